"""The studies: their statistics, their pages, runs that were killed, comparable variants."""

import json
import math
import os
import re
import subprocess
import sys
import time
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn.datasets", reason="needs the demo extra")

from bench import harness
from bench.models import byte_tokenizer
from btok.model import BTokModel
from btok.processing import Processor
from examples.smollm2 import budgets as smollm2_budgets
from examples.studies import (
    ablations,
    budgets_page,
    common,
    efficiency,
    loading,
    negatives,
    pooling,
    transfer,
)
from examples.studies.duel import duel
from train.pocket import data, evaluation, source
from train.pocket.model import build
from train.recipes import RECIPES

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--caption-steps", "1", "--steps", "2", "--groups-per-batch", "1", "--eval-queries", "40"]
TWO = ["--only", "full", "last", "--seeds", "0", "1"]
HALF = 4.302652729911275 / math.sqrt(3)  # Student's 97.5 % quantile of two degrees of freedom


def study(output, *words):
    return common.main(ablations.STUDY, [*words, "--output", str(output)])


def refused(capsys, output, *words):
    """What the study says to these options, in one line."""
    capsys.readouterr()
    assert study(output, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("examples/studies/ablations.py: ")
    return line


def fake_run(variant, seed, *scores):
    kinds = {"I-CLS": "image", "I-QA": "image", "V-CLS": "video"}
    tasks = {
        name: {"score": x, "modality": kind, "meta_task": name, "chance": 10.0, "floor": 20.0}
        for (name, kind), x in zip(kinds.items(), scores, strict=True)
    }
    return {"variant": variant, "seed": seed, "options": "", "tasks": tasks}


RUNS = [
    *(fake_run("full", seed, 50 + seed, 30, 40) for seed in (0, 1, 2)),
    *(fake_run("last", seed, 40 + 2 * seed, 20, 40) for seed in (2, 1, 0, 3)),
    fake_run("K1", 0, 50, 30, 40),
]


def test_interval_by_hand():
    assert common.interval([1.0, 2.0, 3.0]) == pytest.approx((2, HALF))
    assert common.interval([7.0, 9.0]) == pytest.approx((8, 12.706204736))
    assert common.interval([5.0]) == (5.0, math.inf)
    assert common.said([1.0, 2.0, 3.0]) == "2.0 ± 2.5"
    assert common.said([1.0, 2.0, 3.0], "+") == "+2.0 ± 2.5"  # holds 0
    assert common.said([3.0, 4.0, 5.0], "+") == "**+4.0 ± 2.5**"
    assert "it holds 0, so that no gain is shown" in common.verdict([1.0, 2.0, 3.0])
    assert "from -6.5 to -1.5 over 3 seeds: it is without 0" in common.verdict([-3.0, -4.0, -5.0])
    assert "one seed" in common.verdict([4.0])


def test_differences_are_of_the_same_seed():
    found = common.differences(RUNS, "last", "full")
    assert sorted(found["I-CLS"]) == [-10, -9, -8]  # seed 3 has no partner
    assert found["I-QA"] == [-10] * 3 and found["V-CLS"] == found["video"] == [0] * 3
    assert sorted(found["image"]) == [-10, -9.5, -9]
    assert sorted(found["mean"]) == pytest.approx([-20 / 3, -19 / 3, -6])
    assert common.differences(RUNS, "K2", "full") == {}


def test_a_page_says_what_is_there_and_no_more(tmp_path):
    settings = {"caption_steps": 1, "steps": 2, "groups_per_batch": 3, "eval_queries": 40}
    settings |= {"model": "pocket"}
    settings |= {"commit": "abc", "code": "f" * 64, "device": "a CPU", "versions": {"torch": "2"}}
    results = {"settings": settings, "data_digest": "d" * 64, "runs": deepcopy(RUNS)}
    results["runs"][0]["tasks"]["I-QA"]["floor"] = 30.0
    common.write_page(ablations.STUDY, results, tmp_path)
    page = (tmp_path / "studies-ablations.md").read_text()
    assert "| I-CLS | 10.0 | 20.0 | 51.0 ± 2.5 | 43.0 ± 4.1 | 50.0 |" in page
    assert "| I-CLS | **-9.0 ± 2.5** | +0.0 |" in page
    assert "a shortcut's score, in I-QA." in page
    assert "| 2, 1, 0, 3 |" in page and "K8" not in page
    assert "- `K1`: +0.0 with one seed" in page and "measured" in page and "Not yet run" in page
    assert (tmp_path / "studies-ablations.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "studies-ablations.json").read_text()) == results
    settings |= {"model": "some/model", "data": "sets", "mmeb": "v2"}
    common.write_page(ablations.STUDY, results, tmp_path)
    page = (tmp_path / "studies-ablations.md").read_text()
    assert "on MMEB-V2, after" in page and "pocket" not in page and "Not yet run" not in page
    with pytest.raises(ValueError, match="no variant and 'full' have a seed yet"):
        common.write_page(ablations.STUDY, results | {"runs": RUNS[:3]}, tmp_path)


def score_two_tasks():
    """Instead of nine, here and in the process that is killed."""
    evaluation._tasks, evaluation._digest = (lambda n: data.tasks(n)[:2]), (lambda: "of two")


def run_until_first(output):
    """The study in a process of its own, killed when its first run is done."""
    code = "import sys, test_studies as t; t.score_two_tasks(); t.study(*sys.argv[1:])"
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "tests")))
    run = subprocess.Popen([sys.executable, "-c", code, str(output), *TINY, *TWO], env=env)
    first, end = output / "full-seed0/metrics.json", time.monotonic() + 240
    while run.poll() is None and not first.exists() and time.monotonic() < end:
        time.sleep(0.01)
    run.kill()
    run.wait()
    assert first.exists() and not (output / "last-seed1/metrics.json").exists()


def test_killed_after_a_run_it_goes_on_to_the_same_bytes(tmp_path, monkeypatch, capsys):
    for name in ("_tasks", "_digest"):  # put back afterwards
        monkeypatch.setattr(evaluation, name, None)
    score_two_tasks()
    run_until_first(tmp_path / "parts")
    done = (tmp_path / "parts/full-seed0/metrics.json").stat().st_mtime_ns
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for folder in ("parts", "whole"):
            assert study(tmp_path / folder, *TINY, *TWO) == 0
        assert (tmp_path / "parts/full-seed0/metrics.json").stat().st_mtime_ns == done
        parts, whole = (tmp_path / folder / "ablations.json" for folder in ("parts", "whole"))
        assert parts.read_bytes() == whole.read_bytes()
        runs = json.loads(whole.read_text())["runs"]
        found = [(run["variant"], run["seed"]) for run in runs]
        assert found == [("full", 0), ("full", 1), ("last", 0), ("last", 1)]

        capsys.readouterr()
        asked = ["--list", "--only", "last", "K1", "--seeds", "1"]
        assert study(tmp_path / "parts", *TINY, *asked) == 0
        assert capsys.readouterr().out == "done  last --seeds 1\nleft  K1 --seeds 1\n"
        # other settings, other code, or another meaning of a name: what is there is not taken
        said = refused(capsys, tmp_path / "parts", *TINY, "--steps", "3")
        assert "steps 2, this command 3" in said
        other = common.surroundings() | {"code": "other"}
        with monkeypatch.context() as patch:
            patch.setattr(common, "surroundings", lambda: other)
            assert "whose runs have code" in refused(capsys, tmp_path / "parts", *TINY, *TWO)
        renamed = {"full": common.Variant("", ("--ntp-weight", "0.25"))}
        monkeypatch.setattr(ablations, "STUDY", ablations.STUDY._replace(variants=renamed))
        said = refused(capsys, tmp_path / "parts", *TINY, "--only", "full")
        assert "full-seed0 has ntp_weight 0.5, this command 0.25" in said
        (tmp_path / "parts/settings.json").unlink()
        assert "whose runs have caption_steps None" in refused(capsys, tmp_path / "parts", *TINY)
    finally:
        torch.set_num_threads(threads)


def test_a_wrong_option_is_one_line_that_names_it(tmp_path, capsys):
    for words, said in (
        (["--step", "3"], "--step"),
        (["--steps", "many"], "--steps"),
        (["--only", "K3"], "only is 'K3', expected among full, "),
        (["--model", "Qwen/Qwen2-VL-2B-Instruct", "--data", "d"], "with data; "),
        (["--mmeb", "m"], "model is 'pocket' with mmeb"),
        (["--page", str(tmp_path / "page")], "ablations.json"),
    ):
        assert said in refused(capsys, tmp_path / "none", *words)
    assert not (tmp_path / "none").exists()
    assert efficiency.main(["--lengths", "0"]) == 2
    assert "lengths is (0,), expected numbers of at least 1" in capsys.readouterr().err


def test_what_runs_on_mmeb_v2(tmp_path, capsys):
    words = ["--model", "Qwen/Qwen2-VL-2B-Instruct", "--data", "sets", "--mmeb", "v2", "--dry-run"]
    words += ["--seeds", "1", "--launch", "torchrun --nproc-per-node 8"]
    assert study("out", *words, "--only", "no-mask") == 0
    train, score = capsys.readouterr().out.splitlines()
    assert train == (
        f"torchrun --nproc-per-node 8 {ROOT}/train/main.py btok-qwen2vl-2b"
        " --output out/no-mask-seed1 --seed 1 --model Qwen/Qwen2-VL-2B-Instruct --data sets"
        " --condense false"
    )
    assert score == (
        f"{sys.executable} -m btok eval out/no-mask-seed1/checkpoint-5000 mmeb-v2 --data v2"
        " --output out/no-mask-seed1/mmeb-v2"
    )
    assert common.main(transfer.STUDY, [*words, "--output", "out"]) == 0
    assert capsys.readouterr().out.count("--data out/images.toml") == 2
    mixture = common.images_of(tmp_path)
    assert mixture.count("[[dataset]]") == 20 and "train_300k" not in mixture


def test_variants_of_a_seed_see_the_same_batches_of_their_tasks():
    recipe = replace(RECIPES["pocket"], caption_steps=0, reading_steps=0, groups_per_batch=2)
    others = [replace(recipe, num_btoks=0), replace(recipe, ntp_weight=0.0, condense=False)]

    def drawn(recipe, step):
        return [(g.source, g.rows.tolist()) for g in source.step_groups(recipe, step)]

    for step in range(9):
        assert drawn(recipe, step) == drawn(others[0], step) == drawn(others[1], step)
    for modality, count in (("image", 4), ("video", 4), ("visdoc", 1)):
        some = replace(recipe, tasks=modality)
        seen = Counter(data.TASKS[which] for step in range(8) for which, _ in drawn(some, step))
        assert {data.MODALITY[task] for task in seen} == {modality}
        assert set(seen.values()) == {16 // count}
    with pytest.raises(ValueError, match="data is data and tasks is image: "):
        replace(RECIPES["btok-qwen2vl-2b"], tasks="image")


def test_variants_of_a_seed_begin_with_the_same_weights(tmp_path):
    model, processor = build(0, 3, pooling="last")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    (tmp_path / "btok_config.json").unlink()
    models = [BTokModel.from_pretrained(tmp_path, num_btoks=k) for k in (0, 1, 8)]
    states = [model.backbone.state_dict() for model in models]
    for state in states:
        for name, weight in state.items():
            n = min(len(weight), len(states[1][name]))
            assert torch.equal(weight[:n], states[1][name][:n]), name


def test_efficiency_checks_what_it_times_and_says_what_it_is(tmp_path):
    words = ["--lengths", "16", "--btoks", "4", "--seconds", "0.01", "--page", str(tmp_path)]
    assert efficiency.main(words) == 0
    (case,) = json.loads((tmp_path / "studies-efficiency.json").read_text())["cases"]
    row = 2 * 1536**2 + 2 * 1536 * 256 + 3 * 1536 * 8960  # multiply-adds of a layer
    layer = {n: n * row + 2 * 1536 * n * (n + 1) // 2 for n in (16, 20)}
    assert case["flops"] == 2 * 28 * layer[16]
    assert case["modelled"] == pytest.approx(layer[20] / layer[16])
    assert case["interval"][0] <= case["ratio"] <= case["interval"][1] and case["pairs"] == 7
    page = (tmp_path / "studies-efficiency.md").read_text()
    assert "**Modelled**" in page and "**Measured**" in page
    assert (tmp_path / "studies-efficiency.png").stat().st_size > 10_000


def test_the_committed_pages_come_from_the_committed_results(tmp_path):
    for name, write in {
        "ablations": partial(common.write_page, ablations.STUDY),
        "transfer": partial(common.write_page, transfer.STUDY),
        "efficiency": efficiency.write_page,
        "negatives": partial(common.write_page, negatives.STUDY),
        "budgets": lambda results, folder: budgets_page.write_page(folder, results),
    }.items():
        committed = ROOT / f"bench/results/studies-{name}.md"
        write(json.loads(committed.with_suffix(".json").read_text()), tmp_path)
        assert (tmp_path / committed.name).read_text() == committed.read_text()
    pages = "".join(path.read_text() for path in tmp_path.glob("*.md"))
    of_pooling = pooling.RUNS.with_suffix(".md").read_text()
    assert pooling.page(pooling.RUNS) == of_pooling
    pages += of_pooling
    real = smollm2_budgets.RUNS
    of_real = real.with_suffix(".md").read_text()
    assert smollm2_budgets.page(real) == of_real
    pages += of_real
    pages += (ROOT / "bench/results/smollm2.md").read_text()  # tests/test_smollm2.py makes it anew
    told = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    shown = {path.name: re.findall(r"[+-]\d+\.\d ± \d+\.\d", path.read_text()) for path in told}
    assert len(shown["README.md"]) >= 6 and len(shown["results.md"]) > 12
    wrong = [(name, x) for name, found in shown.items() for x in found if x not in pages]
    assert not wrong, f"figures that no page has: {wrong}"


def test_the_pages_of_tools_are_of_the_committed_results():
    pytest.importorskip("lance", reason="pylance (the extra `lance`) is not installed")
    from examples.studies import index, mining

    for name, page in (("index", index.page), ("mining", mining.page)):
        committed = ROOT / f"bench/results/{name}.json"
        results = json.loads(committed.read_text())
        assert page(results) == committed.with_suffix(".md").read_text()
        assert len(results["sizes"]) == {"index": 4, "mining": 2}[name]


def test_what_an_index_costs(tmp_path):
    """At a small size: the steps run, each in its process, and the page is of the results alone."""
    pytest.importorskip("lance", reason="pylance (the extra `lance`) is not installed")
    from examples.studies import index

    assert index.main(["--rows", "1000", "--dims", "32", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "index.json").read_text())
    (found,) = results["sizes"].values()
    assert {*index.STEPS, "disk MiB"} == found.keys()
    assert found["indexed"]["recall@10"] > 0.9 and found["exact"]["seconds"] > 0
    assert 0.9 < found["before"]["recall@10 of int8"] <= found["before"]["recall@10 of float16"]
    page = (tmp_path / "index.md").read_text()
    assert "**measured**" in page and "(modelled)" in page and "| add 1 % |" in page
    (tmp_path / "index.md").unlink()
    assert index.main(["--page", str(tmp_path / "index.json")]) == 0
    assert (tmp_path / "index.md").read_text() == page
    smaller = {name: [[1, 2, 3]] for name in index.SMALLER}
    found = {
        "before": {"found": [[1, 2, 3]], **smaller},
        "exact": {"found": [[1, 2, 9]]},
        "indexed": {},
    }
    with pytest.raises(RuntimeError, match="the exact search found"):
        index.judged(found, 10)


def test_what_reading_costs(capsys):
    loading.main(["--workers", "0", "1", "--steps", "5"])
    said = capsys.readouterr().out.splitlines()
    assert re.search(
        r"patches: .* ms, 602,112 bytes; transformers .* ms .*, 4,816,896 bytes$", said[0]
    )
    assert [line.partition(":")[0] for line in said[1:]] == ["0 workers", "1 workers"]
    assert all(re.search(r": [1-9]\d* pairs a second$", line) for line in said[1:])
    with pytest.raises(SystemExit):
        loading.main(["--workers", "4", "--steps", "9"])
    assert "steps is 9, expected at least 10 for these workers" in capsys.readouterr().err
    processor = Processor(byte_tokenizer(), image_mean=[0.5, 0.5, 0.5])
    with pytest.raises(RuntimeError, match="other patches of this picture: nothing is timed"):
        loading.patches(processor)


def test_a_duel_takes_turns_and_times_the_other_over_today(monkeypatch):
    clock = [0.0]

    def taking(seconds):
        return lambda: clock.__setitem__(0, clock[0] + seconds)

    monkeypatch.setattr(harness.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(harness, "peak", lambda run: 3 << 20)
    found = duel(taking(0.1), taking(0.2))
    assert found["ratio"] == pytest.approx(2) and found["pairs"] == 7
    assert found["interval"] == pytest.approx((2, 2))
    assert found["ms"] == pytest.approx([100, 200])
    assert found["mib"] == [3, 3]
    assert duel(taking(1e-3), taking(1e-3))["pairs"] == 101
