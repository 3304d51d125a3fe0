"""Injected faults: a run on many ranks goes on from a whole checkpoint and ends on the same bits.

Each case starts the trainer under torchrun, hurts it once at a random time, and gives the same
command again. Dropout is on, so the random state of every rank counts. An error that would come
again is not tried again.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time

import pytest
from helpers import pocket_pairs, tiny_checkpoint

from train import checkpoint
from train.recipes import Recipe

STEPS, EVERY, SIZE = 12, 3, 2
LAUNCHER = """
import os, signal, sys, threading, time
from pathlib import Path

rank, generation = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
Path(__file__).with_name(f"{rank}.pid").write_text(str(os.getpid()))
sys.path[:0] = [".", "kernels"]

import torch
import train.main
from btok.processing import Processor
from train import checkpoint

train_step, load, faults = train.main.train_step, train.main.load, sys.argv.pop(1).split()
is_last = rank == int(os.environ["WORLD_SIZE"]) - 1

def stop(recipe, *more, **options):
    if is_last and "stop" in faults:
        os.kill(os.getpid(), signal.SIGTERM)
    return load(recipe, *more, **options)

def hurt(model, recipe, pairs, microbatches, step, *more):
    time.sleep(0.1)  # so that it is not over before it is hurt
    Path(__file__).with_name(f"{rank}.worked").write_text(str(generation))
    embeddings = model.backbone.get_input_embeddings()
    if not embeddings._forward_hooks and "plain" not in faults:
        drop = torch.nn.Dropout(0.1)
        embeddings.register_forward_hook(lambda module, inputs, output: drop(output))
    if f"until-{recipe.caption_steps + step + 1}" in faults and is_last:
        os.kill(os.getpid(), signal.SIGTERM)
    if recipe.caption_steps + step == 7 and is_last:  # the run's step
        if "raise" in faults:
            raise ValueError("pair 5 of a set has no positive")
        if "pass" in faults and not generation:
            raise OSError("the folder of a set is away")
        if "nan" in faults:
            embeddings.weight.data.fill_(float("nan"))
    return train_step(model, recipe, pairs, microbatches, step, *more)

# a checkpoint takes two seconds to write, and no thread uses the tokenizer while another does
lock, writing, reads = threading.RLock(), threading.Event(), 0
write, used = checkpoint.Checkpoints._write, {"__call__": 0.01, "save_pretrained": 0.3}

def write_slowly(*arguments):
    writing.set()
    time.sleep(0.3)
    write(*arguments)
    writing.clear()

def slow(function):
    def run(*arguments):
        time.sleep(0.15 * writing.is_set())
        return function(*arguments)
    return run

def alone(function, seconds):
    def run(*arguments):
        global reads
        assert lock.acquire(blocking=False), "two threads use the tokenizer"
        reads += writing.is_set()
        time.sleep(seconds)
        try:
            return function(*arguments)
        finally:
            lock.release()
    return run

if "slow" in faults:
    checkpoint.Checkpoints._write = write_slowly
    checkpoint.save_file, checkpoint.sha256 = slow(checkpoint.save_file), slow(checkpoint.sha256)
    for name, seconds in used.items():
        setattr(Processor, name, alone(getattr(Processor, name), seconds))

train.main.train_step, train.main.load = hurt, stop
train.main.pictures.loss_curve = lambda *arguments: None  # Matplotlib takes a second to load
if generation and rank:
    time.sleep(2)  # processes that are started again do not come together
code = train.main.main()
Path(__file__).with_name(f"{rank}.code").write_text(str(code))
Path(__file__).with_name(f"{rank}.reads").write_text(str(reads))
threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
Path(__file__).with_name(f"{rank}.threads").write_text(" ".join(threads))
sys.stdout.flush()
os._exit(code)  # as train/main.py ends
"""

# how the run is hurt, and on how many seeds with 2 and with 4 ranks
KINDS = {
    "kill one, restarted": (3, 2),
    "kill one": (3, 1),
    "stop all": (2, 2),
    "stop one": (3, 1),
    "stop torchrun": (1, 1),
    "disk full": (3, 2),
    "truncate": (2, 1),
    "flip a bit": (3, 2),
}
FAST = ("kill one, restarted", "stop one", "disk full", "flip a bit")
CASES = [
    pytest.param(
        *(kind, world, seed),
        marks=[] if (world, seed) == (2, 0) and kind in FAST else pytest.mark.full,
    )
    for kind, counts in KINDS.items()
    for world, count in zip((2, 4), counts, strict=True)
    for seed in range(count)
]


class Trainer:
    """The trainer under torchrun, in a folder of its own."""

    def __init__(self, folder, model, world, fault="", restarts=0, more=()):
        self.folder, self.run = folder, folder / "run"
        (folder / "launcher.py").write_text(LAUNCHER)
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *(f"--nproc-per-node={world}", f"--max-restarts={restarts}"),
            *(folder / "launcher.py", fault, "--output", self.run, "--model", model),
            *("--caption-steps", "2", "--steps", STEPS - 2, "--reading-steps", STEPS),
            *("--group-size", SIZE, "--groups-per-batch", world, "--warmup-steps", "2"),
            *("--checkpoint-every", EVERY, "--eval-queries", "0", *more),
        ]
        self.process = subprocess.Popen(
            [str(word) for word in command],
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            cwd=checkpoint.__file__.rsplit("/", 2)[0],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def rows(self):
        """What is in the log, but for the times."""
        log = self.run / "log.jsonl"
        lines = log.read_text().split("\n")[:-1] if log.exists() else []
        return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]

    def wait_for(self, rows):
        config = self.run / "config.json"
        while self.process.poll() is None and not (config.exists() and len(self.rows()) >= rows):
            time.sleep(0.005)

    def pid(self, rank):
        return int((self.folder / f"{rank}.pid").read_text())

    def end(self):
        """(exit code, what it said)"""
        try:
            said, _ = self.process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            self.process.terminate()
            pytest.fail(f"it hangs: {self.process.communicate()[0]}")
        return self.process.returncode, said


def steps_of(run):
    """The steps of a run's checkpoints."""
    names = [path.name.removeprefix("checkpoint-") for path in run.glob("checkpoint-*")]
    return sorted(int(name) for name in names if name.isdigit())


def newest(run):
    """The step of the newest checkpoint, 0 for none."""
    return max(steps_of(run), default=0)


def resumed(said):
    """The step that a run went on from, 0 for its beginning."""
    found = re.search(r"going on from \S+checkpoint-(\d+)", said)
    return int(found[1]) if found else 0


def assert_same_bits(trainer, expected):
    assert trainer.rows() == expected.rows()
    assert checkpoint.newest_valid(trainer.run).name == f"checkpoint-{STEPS}"
    assert not list(trainer.run.glob(".*")), "a draft is left"
    manifests = [
        json.loads((t.run / f"checkpoint-{STEPS}/manifest.json").read_text())
        for t in (trainer, expected)
    ]
    assert manifests[0] == manifests[1]


def errors(said):
    """The lines a user is told, and no worker's traceback."""
    assert "[rank" not in said, said
    return re.findall("^error: .*", said, re.MULTILINE)


def damage(paths, kind, rng):
    path = rng.choice(sorted(p for p in paths if p.is_file()))
    data = bytearray(path.read_bytes())
    at = rng.randrange(len(data))
    print(f"{kind}: {path.name}, byte {at}")
    if kind == "truncate":
        del data[at:]
    else:
        data[at] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """The uninterrupted run of so many ranks."""
    made = {}

    def of(world):
        if world not in made:
            trainer = Trainer(tmp_path_factory.mktemp("whole"), model, world)
            code, said = trainer.end()
            assert code == 0, said
            made[world] = trainer
        return made[world]

    return of


@pytest.mark.parametrize(("kind", "world", "seed"), CASES)
def test_it_goes_on_and_ends_on_the_same_bits(tmp_path, model, whole, kind, world, seed):
    if kind == "disk full" and not hasattr(resource, "prlimit"):
        pytest.skip("no prlimit: the size of a process's files cannot be bounded from outside")
    expected = whole(world)
    rng = random.Random(f"{kind}/{world}/{seed}")
    damaged = kind in ("truncate", "flip a bit")
    after, victim = rng.randrange(EVERY + 1 if damaged else 0, STEPS - EVERY), rng.randrange(world)
    print(f"{kind}, {world} ranks, seed {seed}: after row {after}, rank {victim}")
    restarts = 3 if "restarted" in kind else 0
    trainer = Trainer(tmp_path, model, world, restarts=restarts)
    trainer.wait_for(after)
    time.sleep(rng.uniform(0, 0.2))
    done = len(trainer.rows())
    if kind == "stop torchrun":
        trainer.process.terminate()
    elif kind.startswith("stop"):
        for rank in range(world) if kind == "stop all" else [victim]:
            os.kill(trainer.pid(rank), signal.SIGTERM)
    elif kind == "disk full":
        limit = rng.choice([5_000, 100_000, 550_000])  # bytes of a file
        resource.prlimit(trainer.pid(0), resource.RLIMIT_FSIZE, (limit, limit))
    else:
        os.kill(trainer.pid(victim), signal.SIGKILL)
    code, said = trainer.end()
    print(said)

    if not restarts:
        done, saved = len(trainer.rows()), newest(trainer.run)
        assert done < STEPS, "the fault came too late"
        if damaged:
            folder = trainer.run / f"checkpoint-{saved}"
            damage(folder.iterdir(), kind, rng)
            saved = max(saved - EVERY, 0)
        elif kind.startswith("stop"):
            assert saved == done
        elif kind == "disk full":
            (line,) = errors(said)
            (step,) = re.findall(rf"{trainer.run}/checkpoint-(\d+) cannot be written", line)
            assert done - EVERY <= int(step) <= done  # training goes on while it is written
            assert "raise the limit on a file's size and give the same command again" in line
            assert not list(trainer.run.glob(".*")), "a draft is left"
            codes = [(tmp_path / f"{rank}.code").read_text() for rank in range(world)]
            assert codes == ["2"] * world
        assert (code == 0) == (kind in ("stop all", "stop one"))
        code, said = Trainer(tmp_path, model, world).end()
        print(said)
        assert damaged == (f"{saved + EVERY} is damaged; set aside" in said)
    assert code == 0
    # a thread of the process group that outlives it may abort the process while Python ends
    threads = [(tmp_path / f"{rank}.threads").read_text() for rank in range(world)]
    assert not any("gloo" in names for names in threads)
    if not restarts:
        assert resumed(said) == saved
    # a checkpoint is written while the steps up to the next one are taken
    assert done - resumed(said) <= EVERY * (3 if damaged else 2)
    assert_same_bits(trainer, expected)


@pytest.mark.full
def test_a_rank_that_is_stopped_before_the_first_step_ends_all(tmp_path, model):
    trainer = Trainer(tmp_path, model, 2, fault="stop")
    code, said = trainer.end()
    assert code == 0 and not errors(said), said
    assert trainer.rows() == [] and newest(trainer.run) == 0


@pytest.mark.parametrize(
    ("fault", "world"),
    [
        ("raise", 2),
        pytest.param("raise", 1, marks=pytest.mark.full),
        pytest.param("nan", 2, marks=pytest.mark.full),
    ],
)
def test_an_error_that_would_come_again_is_not_tried_again(tmp_path, model, fault, world):
    code, said = Trainer(tmp_path, model, world, fault=fault, restarts=2).end()
    assert code == 1 and f"exitcode: {2 if fault == 'raise' else 1}" in said, said
    first, *others = errors(said)
    assert others == [first.replace("error: ", "error: not tried again: ")] * 2
    worked = [(tmp_path / f"{rank}.worked").read_text() for rank in range(world)]
    assert worked == ["0"] * world and "going on from" not in said


@pytest.mark.full
def test_an_error_of_the_system_is_tried_again(tmp_path, model, whole):
    trainer = Trainer(tmp_path, model, 2, fault="pass", restarts=3)
    code, said = trainer.end()
    assert code == 0 and "checkpoint-6" in said, said
    assert errors(said) == ["error: the folder of a set is away"]
    assert trainer.rows() == whole(2).rows()


@pytest.mark.full
def test_a_rank_that_fails_alone_ends_all_with_its_line(tmp_path, model):
    code, said = Trainer(tmp_path, model, 2, fault="raise").end()
    assert code == 1 and "exitcode: 2" in said, said
    assert errors(said) == ["error: pair 5 of a set has no positive"]


@pytest.mark.full
def test_a_loss_that_is_not_finite_ends_all_and_names_the_batch(tmp_path, model):
    trainer = Trainer(tmp_path, model, 2, fault="nan")
    code, said = trainer.end()
    assert code == 1 and "exitcode: 1" in said, said
    path = trainer.run / "nonfinite.json"
    (line,) = errors(said)
    assert line.startswith("error: step 7: loss nan") and str(path) in line
    recipe = Recipe(reading_steps=STEPS, group_size=SIZE, groups_per_batch=2)
    assert json.loads(path.read_text()) == {
        "step": 7,
        "pairs": [
            {"rank": rank, "dataset": p.dataset, "row": row, "positive_id": p.positive_id}
            for rank in (0, 1)
            for row, p in enumerate(pocket_pairs(recipe, 7, rank, 2), (7 * 2 + rank) * SIZE)
        ],
    }
    assert newest(trainer.run) == 6
