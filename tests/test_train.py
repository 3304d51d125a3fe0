"""The trainer: gradients over ranks, stop and resume, checkpoints, and what it refuses."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    BTOKS,
    gloo,
    gradients,
    one_step,
    pocket_pairs,
    spawn,
    tiny_backbone,
    tiny_checkpoint,
    tiny_module,
    tiny_tokenizer,
    worst_gradient,
)
from PIL import Image
from safetensors.torch import load_file

from btok.data.mixture import load_mixture
from btok.encoder import BTokEncoder
from btok.files import sha256
from btok.model import BTokModel
from train import checkpoint
from train.main import check, finish, main, make_optimizers, recipe_name
from train.parallel import FITS, Processes, same_folder
from train.pocket.source import train_set
from train.provenance import note_end, note_start
from train.recipes import RECIPES, Recipe
from train.sampler import step_groups
from train.step import train_step

ROOT = Path(__file__).resolve().parent.parent
RECIPE = Recipe(caption_steps=2, reading_steps=0, steps=2, group_size=4, groups_per_batch=2)


def step_gradients(dtype, step, negatives, reduction, rank, world):
    model, processor = tiny_module(dtype=dtype)
    # ranks have equal numbers of targets, not of labels
    model.settings = dataclasses.replace(model.settings, ntp_reduction=reduction)
    recipe = dataclasses.replace(RECIPE, negatives=negatives)
    captioning = step < recipe.caption_steps
    if captioning:
        recipe = recipe.captions
    else:
        step -= recipe.caption_steps
    drawn = train_set(recipe, processor, rank, world)[step]
    data = drawn.pairs, drawn.samples
    losses = one_step(model, processor, recipe, *data, step, captioning).losses
    return gradients(model), losses


CASES = [
    (torch.float64, 0, "group", "sample_mean"),
    (torch.float64, 0, "group", "token_mean"),
    (torch.float64, 2, "group", "token_mean"),
    (torch.float64, 3, "batch", "sample_mean"),
    (torch.float32, 2, "batch", "sample_mean"),
]


def on_two_ranks(rank, folder):
    torch.set_num_threads(1)
    with gloo(folder, rank, 2):
        results = [step_gradients(*case, rank, 2) for case in CASES]
    if rank == 0:
        torch.save([(got, tuple(losses)) for got, losses in results], f"{folder}/results.pt")


def test_gradients_of_a_step_on_two_ranks_equal_one_process(tmp_path):
    spawn(on_two_ranks, (str(tmp_path),), nprocs=2)
    for case, (got, losses) in zip(CASES, torch.load(tmp_path / "results.pt"), strict=True):
        expected, wanted = step_gradients(*case, 0, 1)
        error, name = worst_gradient(got, expected)
        exact = case[0] == torch.float64
        assert error < (1e-12 if exact else 1e-5), f"{case} {name}: {error:.1e}"
        assert losses == pytest.approx(tuple(map(float, wanted)), rel=1e-12 if exact else 1e-5)


def test_a_steps_pairs_do_not_depend_on_the_ranks():
    def read(pairs):
        return [(p.dataset, p.query.text, p.positive.text, p.target) for p in pairs]

    def step_pairs(step, rank=0, world=1):
        return train_set(recipe, tiny_module()[1], rank, world)[step].pairs

    recipe = Recipe(reading_steps=3, caption_steps=0)
    for step in (0, 3, 1000):
        alone = step_pairs(step)
        split = [step_pairs(step, rank, 2) for rank in (0, 1)]
        size = recipe.group_size
        merged = [p for i in range(2) for part in split for p in part[i * size : (i + 1) * size]]
        assert read(merged) == read(alone) == read(pocket_pairs(recipe, step))
        names = [p.dataset for p in alone]
        assert (set(names) == {"I-CLS"}) == (step < 3)
    assert read(step_pairs(7)) != read(step_pairs(8))


def test_the_rate_warms_up_and_decays_in_each_phase():
    recipe = Recipe(caption_steps=100, steps=50, warmup_steps=10, learning_rate=1.0)
    rates = [recipe.captions.learning_rate_at(step) for step in range(100)]
    rates += [recipe.learning_rate_at(step) for step in range(50)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert rates[100] == pytest.approx(0.1) and rates[109] == 1.0
    for last in (99, 149):
        assert 0.05 < rates[last] < 0.08
    assert all(a >= b for a, b in itertools.pairwise(rates[10:100]))


def saved_run(tmp_path, step=3):
    model, processor = tiny_module()
    optimizers = make_optimizers(model, RECIPE)
    assert [len(o.param_groups[0]["params"]) > 5 for o in optimizers.values()] == [True, True]
    torch.manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for optimizer in optimizers.values():
        optimizer.step()
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(step, model, processor, optimizers, {"processes": 1})
    checkpoints.commit(wait=True)
    return checkpoints.final, model, optimizers


def save_on_a_rank(rank, folder):
    save, write = checkpoint.save_file, checkpoint.Checkpoints._write

    def slow(tensors, path, *more):
        path.write_bytes(b"half of it")
        time.sleep(2)
        save(tensors, path, *more)

    with gloo(folder, rank, 2), pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save_file", slow)
        late = lambda *a: time.sleep(rank) or write(*a)  # noqa: E731
        patch.setattr(checkpoint.Checkpoints, "_write", late)
        saved_run(Path(folder))


def test_only_who_writes_a_file_says_what_is_in_it(tmp_path):
    """Rank 0 writes a model that is not sharded; the other must not look at it meanwhile."""
    spawn(save_on_a_rank, (str(tmp_path),), nprocs=2)
    assert checkpoint.newest_valid(tmp_path).name == "checkpoint-3"


def test_what_another_rank_is_still_writing_is_in_no_manifest(tmp_path, monkeypatch):
    """Safetensors writes beside a file's place, and renames."""
    write = checkpoint.Checkpoints._write

    def beside(self, *arguments):
        (self.draft / ".tmpA1b2C3").write_text("half of it")
        write(self, *arguments)
        (self.draft / ".tmpA1b2C3").unlink()

    monkeypatch.setattr(checkpoint.Checkpoints, "_write", beside)
    folder, _, _ = saved_run(tmp_path)
    assert ".tmpA1b2C3" not in json.loads((folder / "manifest.json").read_text())
    assert checkpoint.newest_valid(tmp_path) == folder


def test_what_is_saved_is_what_was_there_when_saving_began(tmp_path, monkeypatch):
    """While a thread writes, training goes on."""
    begun, go_on = threading.Event(), threading.Event()
    write = checkpoint.Checkpoints._write

    def later(*arguments):
        begun.set()
        assert go_on.wait(60)
        write(*arguments)

    monkeypatch.setattr(checkpoint.Checkpoints, "_write", later)
    model, processor = tiny_module()
    optimizers = make_optimizers(model, RECIPE)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    checkpoints = checkpoint.Checkpoints(tmp_path)
    checkpoints.save(1, model, processor, optimizers, {})
    assert begun.wait(60)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    checkpoints.commit()  # nothing is there yet
    assert checkpoint.newest_valid(tmp_path) is None
    go_on.set()
    checkpoints.commit(wait=True)
    again = BTokModel.from_pretrained(checkpoint.newest_valid(tmp_path))
    assert all(torch.equal(p, before[name]) for name, p in again.named_parameters())


def test_a_checkpoint_restores_weights_moments_and_random_state(tmp_path):
    folder, model, optimizers = saved_run(tmp_path)
    noise = torch.randn(4)
    again = BTokModel.from_pretrained(folder)
    assert again.btok_token_ids == model.btok_token_ids
    fresh = make_optimizers(again, RECIPE)
    assert checkpoint.load(folder, fresh) == {"step": 3, "processes": 1}
    assert torch.equal(torch.randn(4), noise)
    assert sum(len(o.state) for o in fresh.values()) == len(list(model.parameters()))
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
        for which, optimizer in optimizers.items():
            for key, value in optimizer.state.get(a, {}).items():
                assert torch.equal(value, fresh[which].state[b][key]), (name, key)


def test_an_index_tells_weights_from_moments(tmp_path):
    """For engines that else take every safetensors file of a folder for weights."""
    folder, *_ = saved_run(tmp_path)
    found = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(found.values()) == {"model.safetensors"}
    assert found.keys() == load_file(folder / "model.safetensors").keys()
    assert "model.safetensors.index.json" in json.loads((folder / "manifest.json").read_text())


@pytest.mark.parametrize(
    "damage", ["flip a bit", "truncate", "no manifest", "a list for one", "a file missing"]
)
def test_a_broken_checkpoint_is_set_aside_for_the_one_before(tmp_path, damage):
    saved_run(tmp_path, 3)
    folder, *_ = saved_run(tmp_path, 5)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    if damage == "flip a bit":
        data[len(data) // 2] ^= 1
        weights.write_bytes(data)
    elif damage == "truncate":
        weights.write_bytes(data[:-100])
    elif damage == "no manifest":
        (folder / "manifest.json").unlink()
    elif damage == "a list for one":
        (folder / "manifest.json").write_text("[1]")
    else:
        (folder / "optimizer.safetensors").unlink()
    assert checkpoint.newest_valid(tmp_path).name == "checkpoint-3"
    assert (tmp_path / "checkpoint-5.broken").is_dir()


def test_the_newest_two_checkpoints_are_kept(tmp_path):
    (tmp_path / ".checkpoint-1.draft").mkdir()  # a save that was killed
    for step in (2, 10, 9):
        saved_run(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-9"]
    assert checkpoint.newest_valid(tmp_path / "nothing") is None


def test_a_disk_that_is_full_leaves_the_older_checkpoints_and_no_draft(tmp_path, monkeypatch):
    saved_run(tmp_path, 3)

    def fail(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("train.checkpoint.save_file", fail)
    with pytest.raises(
        OSError, match=r"checkpoint-5 cannot be written .*No space left.*free space"
    ):
        saved_run(tmp_path, 5)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]
    assert checkpoint.newest_valid(tmp_path).name == "checkpoint-3"


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EDQUOT, "free space there"),
        (errno.EACCES, "make it writable"),
        (errno.EROFS, "make it writable"),
        (errno.EFBIG, "raise the limit on a file's size"),
        (errno.EIO, "mend that"),
    ],
)
def test_what_to_do_is_what_the_error_asks_for(number, remedy):
    """Python's errors, and those of safetensors and tokenizers, which have a text alone."""
    text = os.strerror(number)
    for error in (OSError(number, text), RuntimeError(f"I/O error: {text} (os error {number})")):
        said = checkpoint.unwritable(Path("run"), error)
        assert said.endswith(f"{error}); {remedy} and give the same command again")
    said = checkpoint.unwritable(Path("run"), ValueError("a tensor on meta"))
    assert said.endswith("a tensor on meta); mend that and give the same command again")


@pytest.mark.parametrize("own", [False, True])
def test_a_loss_that_is_not_finite_stops_and_names_the_batch(tmp_path, capsys, monkeypatch, own):
    def diverge(model, recipe, pairs, microbatches, step, *more):
        done = train_step(model, recipe, pairs, microbatches, step, *more)
        total = done.losses.total * float("nan" if recipe.caption_steps + step == 3 else 1)
        return done._replace(losses=done.losses._replace(total=total))

    monkeypatch.setattr("train.main.train_step", diverge)
    write = checkpoint.Checkpoints._write  # is still at it when the loss comes
    monkeypatch.setattr(checkpoint.Checkpoints, "_write", lambda *a: time.sleep(2) or write(*a))
    model, output = tiny_checkpoint(tmp_path / "model"), tmp_path / "run"
    words = "--reading-steps 6 --group-size 2 --groups-per-batch 1 --eval-queries 0"
    words += " --checkpoint-every 2 --steps 4 --caption-steps " + ("0" if own else "2")
    if own:
        rows = [{"query": "q", "positive": "p", "positive_id": f"id {i}"} for i in range(9)]
        (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        words += f" --data {tmp_path / 'pairs.jsonl'}"
    assert main(["--model", str(model), "--output", str(output), *words.split()]) == 1
    said = capsys.readouterr().err
    assert "\nerror: step 3: loss nan, gradient norm" in f"\n{said}"
    assert f"{output}/nonfinite.json names its batch" in said
    recipe = Recipe(reading_steps=6, group_size=2, groups_per_batch=1)
    names = [(p.dataset, 6 + i, p.positive_id) for i, p in enumerate(pocket_pairs(recipe, 3))]
    if own:
        (group,) = step_groups([9], [1.0], 0, 3, 1, 2)
        names = [("pairs", row, f"id {row}") for row in group.rows.tolist()]
    assert json.loads((output / "nonfinite.json").read_text()) == {
        "step": 3,
        "pairs": [
            {"rank": 0, "dataset": name, "row": row, "positive_id": id} for name, row, id in names
        ],
    }
    assert [p.name for p in output.glob("*checkpoint*")] == ["checkpoint-2"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


COMMAND = [
    *(sys.executable, "train/main.py", "pocket", "--steps", "5", "--caption-steps", "4"),
    *("--reading-steps", "1", "--group-size", "4", "--groups-per-batch", "2"),
    *("--eval-queries", "40", "--checkpoint-every", "3"),
]


def launch(output):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [*COMMAND, "--output", str(output)],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_stopped_and_started_again_it_ends_the_same_bit_for_bit(tmp_path):
    whole = launch(tmp_path / "whole")
    assert whole.wait(300) == 0, whole.stdout.read()

    parts = tmp_path / "parts"
    stop_at = random.Random(time.time_ns()).randrange(1, 7)
    run = launch(parts)
    log = parts / "log.jsonl"
    while run.poll() is None and not (log.exists() and log.read_text().count("\n") >= stop_at):
        time.sleep(0.01)
    run.send_signal(signal.SIGTERM)
    said, _ = run.communicate(timeout=300)
    assert run.returncode == 0, said
    assert "the same command goes on" in said
    assert not (parts / "metrics.json").exists()

    again = launch(parts)
    said, _ = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert "VisDoc" in said and "mean" in said
    expected, got = (
        json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path / "whole", parts)
    )
    for result in (expected, got):
        result["settings"].pop("output")
    assert got == expected, f"stopped after step {stop_at}"
    last = "checkpoint-9"
    a, b = (load_file(f / last / "model.safetensors") for f in (tmp_path / "whole", parts))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(9))
    for name in (
        "loss.png",
        "retrievals-I-RET.png",
        "retrievals-V-RET.png",
        "retrievals-VisDoc.png",
    ):
        assert (parts / name).stat().st_size > 10_000


def test_what_cannot_be_drawn_does_not_end_a_run(tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError("no\nfont")

    (tmp_path / "log.jsonl").write_text('{"step": 0, "ntp": 1.0}\n')
    monkeypatch.setattr("train.main.pictures.loss_curve", fail)
    finish(dataclasses.replace(RECIPE, output=tmp_path), None)
    out, err = capsys.readouterr()
    assert err == "not drawn: no font\n" and f"report.html are in {tmp_path}" in out
    assert (tmp_path / "report.html").exists()
    monkeypatch.setattr("train.main.write_report", fail)
    monkeypatch.setattr("train.main.note_end", fail)
    finish(dataclasses.replace(RECIPE, output=tmp_path), None)
    assert capsys.readouterr().err == "not drawn: no font\n" * 3


def test_a_run_notes_its_starts(tmp_path):
    recipe = dataclasses.replace(RECIPES["pocket"], output=tmp_path, steps=7, dims=(8, 16))
    model, machine = tiny_module()[0], {"python": "3", "extras": {}, "environment": {"A": "b"}}
    for step in (0, 5):
        note_start(recipe, recipe_name(["--steps", "7"]), model, step, machine)
    note_end(recipe)
    noted = json.loads((tmp_path / "run.json").read_text())
    changed = {"output": ["runs/pocket", str(tmp_path)], "steps": [400, 7], "dims": [[], [8, 16]]}
    assert noted["recipe"] == "pocket" and noted["changed"] == changed and noted["ended"]
    assert noted["parameters"] == sum(p.numel() for p in model.parameters())
    for start, step in zip(noted["starts"], (0, 5), strict=True):
        assert start.pop("time") <= noted["ended"]
        assert start == {"step": step, "processes": 1, "python": "3"}
    for damage in ("{", "[]", '{"starts": 3}'):
        (tmp_path / "run.json").write_text(damage)
        note_start(recipe, "pocket", model, 6, machine)
        assert len(json.loads((tmp_path / "run.json").read_text())["starts"]) == 1


SMALL = ["--muon-rate", "0", "--caption-steps", "0", "--eval-queries", "0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--steppz", "3"],
            "'--steppz' is no option of python train/main.py; did you mean --steps or --ntp",
        ),
        (["--steps", "many"], "many"),
        (["--temperature", "0"], "temperature is 0.0, expected above 0"),
        (["--learning-rate", "nan"], "learning_rate is nan"),
        (["--num-btoks", "0", "--pooling", "btok"], "K = 0 needs pooling 'last' or 'mean'"),
        (["--eval-queries", "10"], "eval_queries is 10, expected 0 or at least 40"),
        (["--eval-queries", "-1"], "eval_queries is -1, expected 0 or at least 40"),
        (["--seed", "-1"], "seed is -1, expected at least 0"),
        (["--ntp-steps", "-1"], "ntp_steps is -1, expected at least 0"),
        (["--lora-dropout", "1"], "lora_dropout is 1.0, expected at least 0 and below 1"),
        (["--beta2", "1"], "beta2 is 1.0, expected above 0 and below 1"),
        (["pockett"], "recipe is 'pockett'; did you mean pocket? expected one of pocket, btok-"),
        (["elsewhere"], "recipe is 'elsewhere'; expected one of pocket, btok-"),
        (["--model", "no/such/folder"], "no/such/folder"),
        (
            ["--shard", "true"],
            "shard is true and muon_rate is 3.0: Muon needs whole matrices; shard",
        ),
        (["--shard", "true"], "; add --muon-rate 0 --caption-steps 0 --eval-queries 0\n"),
        (
            ["--data", "a"],
            "error: data is a and caption_steps is 600: that phase is for the pocket",
        ),
        (["--data", "a", "--tasks", "image"], "benchmark's; add --caption-steps 0 --tasks all\n"),
        (["--data", "b/" * 99, "--shard", "true"], f"data is {('b/' * 99)[:-1]} and caption_steps"),
        (
            ["--data", "a", "--shard", "true"],
            "; add --muon-rate 0 --caption-steps 0 --eval-queries",
        ),
        (
            ["--shard", "true", *SMALL, "--lora-rank", "8"],
            "lora_rank is 8: what trains is small, and the same on every GPU; add --lora-rank 0\n",
        ),
        (["--shard", "true", *SMALL], "shard is true with 1 processes and replicas 1, expected"),
        (["--replicas", "2"], "replicas is 2, which needs shard"),
        (["--lora-rank", "8"], "model is pocket and lora_rank is 8: its weights begin at random"),
        (["--tensorboard", "true"], "TensorBoard needs the extra: pip install 'btok[tensorboard]'"),
        (["--max-pixels", "9"], "max_pixels is 9, expected at least the model's lowest"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    tmp_path, capsys, monkeypatch, arguments, message
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it were not there
    output = tmp_path / "run"
    recipe = [] if arguments[0].startswith("-") else [arguments.pop(0)]
    assert main([*recipe, "--output", str(output), *arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert message in said
    assert not output.exists()


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("task X, query 3:\n no positive"), 2, "task X, query 3: no positive"),
        (FloatingPointError("loss nan"), 1, "loss nan"),
        (torch.OutOfMemoryError("CUDA:\n 3 GiB"), 2, f"{FITS}: CUDA: 3 GiB"),
    ],
)
def test_an_error_of_the_run_is_one_line_too(tmp_path, capsys, monkeypatch, error, code, line):
    def fail(*arguments):
        raise error

    monkeypatch.setattr("train.main.parse", fail)
    assert main(["--output", str(tmp_path)]) == code
    assert capsys.readouterr().err == f"error: {line}\n"
    monkeypatch.setenv("BTOK_DEBUG", "1")
    with pytest.raises(type(error)):
        main(["--output", str(tmp_path)])


def test_a_process_without_a_gpu_of_its_own(monkeypatch):
    processes = Processes()
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "3"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="LOCAL_RANK is 3, this machine has 2 GPUs"):
        processes.join()


def test_a_folder_that_is_not_shared(tmp_path):
    same_folder(tmp_path)
    with pytest.raises(ValueError, match=r"output is .*/away, which process 0 does not see"):
        same_folder(tmp_path / "away")


def test_what_a_run_needs_is_asked_before_it_leaves_anything(tmp_path, capsys, monkeypatch):
    """Of the machine's shared memory, and whether all see a run that goes on."""
    words = "--steps 1 --caption-steps 0 --reading-steps 0 --eval-queries 0 --group-size 2"
    command = [*words.split(), "--groups-per-batch", "8", "--output", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=3 << 19))
        assert main([*command, "--workers", "1"]) == 2
        assert "/dev/shm has 1.5; give fewer workers" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main([*command, "--workers", "1", "--checkpoint-every", "1"]) == 0

    def unseen(folder):
        raise ValueError(f"output is {folder}, which process 1 does not see")

    monkeypatch.setattr("train.parallel.same_folder", unseen)
    monkeypatch.setattr("train.main.load", lambda *a, **k: pytest.fail("it was loaded"))
    assert main(command) == 2
    assert "which process 1 does not see" in capsys.readouterr().err


def test_a_checkpoint_of_another_model_is_refused(tmp_path, capsys):
    model = BTokModel.from_backbone(tiny_backbone(), btok_token_ids=BTOKS[:2])
    model.save_pretrained(tmp_path / "two")
    tiny_tokenizer().save_pretrained(tmp_path / "two")
    output = ["--output", str(tmp_path / "run")]
    assert main([*output, "--model", str(tmp_path / "two")]) == 2
    assert "num_btoks is 4, but" in capsys.readouterr().err
    config = tmp_path / "two" / "config.json"
    config.write_text(config.read_text().replace('"qwen2_vl"', '"bert"'))
    assert main([*output, "--model", str(tmp_path / "two"), "--num-btoks", "2"]) == 2
    assert "is 'bert', expected one of ('qwen2_vl', " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_folder_of_other_settings_is_refused(tmp_path, capsys):
    settings = {**dataclasses.asdict(RECIPES["pocket"]), "output": "", "processes": 4}
    del settings["max_pixels"]  # of before there was the setting
    settings["data sets"] = []
    (tmp_path / "config.json").write_text(json.dumps({**settings, "seed": 5}))
    assert main(["--output", str(tmp_path)]) == 2
    message = "seed 5, this command asks for 0; give the same settings or another --output"
    assert f"holds a run with {message}" in capsys.readouterr().err
    for damaged, why in (("", "Expecting value"), ("[1]", "'list' object is not a mapping")):
        (tmp_path / "config.json").write_text(damaged)
        assert main(["--output", str(tmp_path)]) == 2
        said = f"error: {tmp_path}/config.json does not hold a run's settings ({why}"
        assert capsys.readouterr().err.startswith(said)


def test_a_run_goes_on_over_the_same_data_under_another_name_alone(tmp_path):
    """Whatever the kind of file; the other settings of a data set are as they were, too."""
    (tmp_path / "run").mkdir()
    mixture, data = tmp_path / "mix.toml", tmp_path / "a.jsonl"
    rows = [json.dumps({"query": f"q{i}", "positive": "p"}) for i in range(9)]

    def described(settings="", name="a", path=None, lines=rows):
        tmp_path.joinpath(f"{name}.jsonl").write_text("\n".join(lines))
        mixture.write_text(f'[[dataset]]\npath = "{name}.jsonl"\n{settings}')
        recipe = Recipe(
            output=tmp_path / "run", data=path or mixture, caption_steps=0, eval_queries=0
        )
        return check(recipe, load_mixture(recipe.data))

    config = tmp_path / "run/config.json"
    config.write_text(json.dumps(described()))
    described(name="renamed")
    described(path=data)
    for settings in ('ntp_side = "query"', 'query_instruction = "Find:"', "weight = 2", "rows = 8"):
        with pytest.raises(ValueError, match="holds a run with data sets"):
            described(settings)
    for name in ("a", "renamed"):
        with pytest.raises(ValueError, match="whose data set a had another content"):
            described(name=name, lines=[*rows[:5], rows[5].replace("q5", "q6"), *rows[6:]])
    ((*entry, _, _),) = json.loads(config.read_text())["data sets"]
    config.write_text(json.dumps({**described(), "data sets": [entry]}))  # of an older version
    described()
    with pytest.raises(ValueError, match="holds a run with data"):
        described(name="renamed")


def test_damaged_data_is_one_line_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"query": f"q{i}" * 99, "positive": "p"} for i in range(99)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "part-0.parquet")
    whole = (tmp_path / "part-0.parquet").read_bytes()
    for content in (whole[:300], whole[:500] + bytes(500) + whole[1000:]):
        (tmp_path / "part-1.parquet").write_bytes(content)
        command = ["--data", str(tmp_path / "part-*.parquet"), "--output", str(tmp_path / "run")]
        assert main([*command, "--caption-steps", "0", "--eval-queries", "0"]) == 2
        (line,) = [e for e in capsys.readouterr().err.splitlines() if e.startswith("error: ")]
        assert f"{tmp_path}/part-1.parquet cannot be read as parquet: " in line
        assert not (tmp_path / "run").exists()


def test_adapters_on_data_of_ones_own(tmp_path, capsys, monkeypatch):
    """All levers and dropout, read ahead by a worker; stopped in the middle, the same bits."""
    model, data = tiny_checkpoint(tmp_path / "model"), tmp_path / "pairs.jsonl"
    rng = np.random.default_rng(0)
    with open(data, "w") as file:
        for i in range(24):
            picture = rng.integers(0, 256, (16, 8 * (1 + i % 3), 3), dtype=np.uint8)
            Image.fromarray(picture).save(tmp_path / f"{i}.png")
            row = {"query": {"text": f"what is {i}?", "images": [f"{i}.png"]}}
            file.write(json.dumps(row | {"positive": f"it is number {i}"}) + "\n")
    (tmp_path / "5.png").write_bytes((tmp_path / "5.png").read_bytes()[:60])
    words = "--lora-rank 2 --group-size 8 --groups-per-batch 2 --negatives batch --muon-rate 0"
    words += " --caption-steps 0 --steps 6 --warmup-steps 1 --checkpoint-every 2 --workers 1"
    words += " --chunk-tokens 150 --gradcache true --checkpoint-activations true"
    words += " --max-skipped 1"  # of 96 pairs that are drawn four are the one that is cut
    command = ["--model", str(model), "--data", str(data), *words.split()]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*command, "--output", str(whole)]) == 0
    said = capsys.readouterr().err
    assert said.count("pairs, row 5: ValueError: image") == 1
    assert "Loading weights" not in said and "Writing model" not in said
    rows = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["skipped"] == 1 and all(row["contrastive"] > 0 for row in rows)

    def stopping(model, recipe, pairs, microbatches, step, *more):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(model, recipe, pairs, microbatches, step, *more)

    with monkeypatch.context() as patch:
        patch.setattr("train.main.train_step", stopping)
        assert main([*command, "--output", str(parts)]) == 0
    assert (parts / "checkpoint-3").is_dir() and not (parts / "checkpoint-4").exists()
    older = shutil.copytree(parts, tmp_path / "older")
    assert main([*command, "--output", str(parts)]) == 0
    a, b = (load_file(f / "checkpoint-6" / "adapter_model.safetensors") for f in (whole, parts))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    logs = [(f / "log.jsonl").read_text().splitlines() for f in (whole, parts)]
    rows = [[json.loads(line) | {"seconds": 0} for line in log] for log in logs]
    assert rows[0] == rows[1]
    assert BTokEncoder.from_pretrained(parts / "checkpoint-6").encode(["number 3"]).shape == (1, 64)
    state, manifest = (older / "checkpoint-3" / f for f in ("trainer.json", "manifest.json"))
    assert json.loads(state.read_text()) == {"step": 3, "processes": 1, "unreadable": [[0, 5]]}
    state.write_text('{"step": 3, "processes": 1, "skipped": 70}')  # as before pairs were kept
    digests = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(digests | {state.name: sha256(state)}))
    assert main([*command, "--output", str(older)]) == 0
    c = load_file(older / "checkpoint-6" / "adapter_model.safetensors")
    assert all(torch.equal(a[k], c[k]) for k in a)
    noted = json.loads((parts / "run.json").read_text())
    assert [start["step"] for start in noted["starts"]] == [0, 3]
    assert noted["changed"]["lora_rank"] == [0, 2]
    report = (parts / "report.html").read_text()
    assert "Finished: 6 of 6 steps." in report and "6 steps in 2 starts" in report

    assert main([*command, "--output", str(tmp_path / "none"), "--max-skipped", "0"]) == 2
    assert "1 pairs could not be read, over max_skipped 0; mend" in capsys.readouterr().err
    config = parts / "config.json"
    settings = json.loads(config.read_text())
    ((*entry, digest, _),) = settings["data sets"]
    assert entry == ["pairs", 24, 1.0] and digest == sha256(data)
    data.write_text(data.read_text().replace("number 23", "number 32"))
    assert main([*command, "--output", str(parts)]) == 2
    assert "a run whose data set pairs had another content; give the" in capsys.readouterr().err
    config.write_text(json.dumps(settings | {"data sets": [entry]}))  # as before there were digests
    assert main([*command, "--output", str(parts)]) == 0

    with open(data, "a") as file:
        file.write('{"query": "cut off')
    assert main([*command, "--output", str(tmp_path / "cut")]) == 2
    assert f"error: {data}:25: " in capsys.readouterr().err
    assert not (tmp_path / "cut").exists()
