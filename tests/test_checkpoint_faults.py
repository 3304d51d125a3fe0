"""Injected faults around checkpoints: while a thread or several ranks write one, and between the
stop of a run and its resume, at as many ranks or others, whole weights or shards.

As in `test_faults.py` a run ends on the same bits as one that nothing has hurt; within rounding
where the ranks or the way weights lie have changed, then without dropout.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import time

import pytest
from helpers import tiny_checkpoint
from test_faults import EVERY, STEPS, Trainer, assert_same_bits, damage, errors, resumed, steps_of

from btok.files import sha256

# of a run whose weights may lie on all ranks; four groups go to one rank, two or four
ONE_PHASE = ("--caption-steps", "0", "--steps", STEPS, "--muon-rate", "0")
ONE_PHASE += ("--groups-per-batch", "4", "--learning-rate", "1e-4")
ONE_PHASE += ("--temperature", "0.1")  # which rounding errors of a contrastive loss are divided by
SHARD = {False: ("--shard", "false"), True: ("--shard", "true")}
STOPPED = 5  # steps
full = pytest.mark.full


def start(folder, model, world, shard, fault="", restarts=0, more=()):
    return Trainer(folder, model, world, fault, restarts, (*ONE_PHASE, *SHARD[shard], *more))


def finish(*arguments, **options):
    """A trainer that has come to the end of the run, and what it said."""
    trainer = start(*arguments, **options)
    code, said = trainer.end()
    print(said)
    assert code == 0
    return trainer, said


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    """A trainer on so many ranks that has ended, without a fault or after a signal to stop."""
    made = {}

    def of(world, shard, fault=""):
        if (world, shard, fault) not in made:
            folder = tmp_path_factory.mktemp("undisturbed")
            made[world, shard, fault], _ = finish(folder, model, world, shard, fault)
        return made[world, shard, fault]

    return of


@pytest.fixture
def stopped(undisturbed, tmp_path):
    """A run that was stopped after `STOPPED` steps; in `tmp_path` it goes on."""

    def of(world, shard, *faults):
        trainer = undisturbed(world, shard, " ".join([f"until-{STOPPED}", *faults]))
        run = shutil.copytree(trainer.run, tmp_path / "run")
        assert steps_of(run) == [EVERY, STOPPED]
        return run

    return of


def contents(folder):
    """What each file below holds, as a digest."""
    return {str(path): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def wait_for_draft(trainer, step):
    """Until that checkpoint is being written; where its draft is."""
    draft = trainer.run / f".checkpoint-{step}.draft"
    while trainer.process.poll() is None and not draft.exists():
        time.sleep(0.005)
    return draft


def assert_same_numbers(trainer, expected):
    for a, b in zip(trainer.rows(), expected.rows(), strict=True):
        assert a.pop("phase") == b.pop("phase")
        for name in ("contrastive", "gradient_norm"):  # errors of similarities, magnified
            assert a.pop(name) == pytest.approx(b.pop(name), rel=1e-5), name
        assert a == pytest.approx(b, rel=1e-6), a


KILLED = [  # shard, restarts, ranks, seed
    *(pytest.param(False, 0, 2, seed, marks=full) for seed in range(3)),
    *(pytest.param(True, 0, 2, seed, marks=[full] * (seed > 0)) for seed in range(3)),
    *(pytest.param(True, 3, 2, seed, marks=full) for seed in range(3)),
    *(pytest.param(shard, 3, 4, 0, marks=full) for shard in (False, True)),
]


@pytest.mark.parametrize(("shard", "restarts", "world", "seed"), KILLED)
def test_a_rank_is_killed_while_a_checkpoint_is_written(
    tmp_path, model, undisturbed, shard, restarts, world, seed
):
    expected = undisturbed(world, shard)
    rng = random.Random(f"{shard}/{restarts}/{world}/{seed}")
    step, victim, wait = rng.randrange(3, 10, EVERY), rng.randrange(world), rng.uniform(0, 1.5)
    print(f"{wait:.2f} s into checkpoint {step}, rank {victim}")
    trainer = start(tmp_path, model, world, shard, "slow", restarts)
    draft = wait_for_draft(trainer, step)
    time.sleep(wait)
    os.kill(trainer.pid(victim), signal.SIGKILL)
    assert draft.exists(), "the fault came too late"
    code, said = trainer.end()
    print(said)
    if not restarts:
        assert code != 0
        assert max(steps_of(trainer.run), default=0) == step - EVERY
        trainer, said = finish(tmp_path, model, world, shard)
    else:
        assert code == 0
    assert resumed(said) == step - EVERY and "is damaged" not in said
    assert_same_bits(trainer, expected)


@pytest.mark.full
@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize(("step", "ranks"), [(6, [1]), (9, [0, 1]), (STEPS, [1]), (STEPS, [0, 1])])
def test_a_stop_while_a_checkpoint_is_written_ends_after_it(
    tmp_path, model, undisturbed, step, ranks, shard
):
    trainer = start(tmp_path, model, 2, shard, "slow")
    draft = wait_for_draft(trainer, step)
    for rank in ranks:
        os.kill(trainer.pid(rank), signal.SIGTERM)
    assert draft.exists(), "the fault came too late"
    code, said = trainer.end()
    print(said)
    assert code == 0 and not errors(said)
    done = len(trainer.rows())
    assert steps_of(trainer.run)[-1] == done and (step < done < STEPS or step == done == STEPS)
    assert step in steps_of(trainer.run) and not list(trainer.run.glob(".*"))
    trainer, said = finish(tmp_path, model, 2, shard)
    assert resumed(said) == done and "is damaged" not in said
    assert_same_bits(trainer, undisturbed(2, shard))


@pytest.mark.full
@pytest.mark.parametrize(("world", "shard"), [(1, False), (2, False), (2, True)])
def test_the_tokenizer_reads_while_a_checkpoint_is_written(
    tmp_path, model, undisturbed, world, shard
):
    """But not while it is saved itself: it does not take two threads."""
    trainer, _ = finish(tmp_path, model, world, shard, "slow")
    reads = [int((tmp_path / f"{rank}.reads").read_text()) for rank in range(world)]
    assert min(reads[: world if shard else 1]) > 0, "nothing was read while one was written"
    assert_same_bits(trainer, undisturbed(world, shard))


PARTS = [  # what is done to a file of which rank
    ("remove", "model-00002-of-00002.safetensors"),
    pytest.param("remove", "optimizer-00001-of-00002.safetensors", marks=full),
    pytest.param("remove", "model.safetensors.index.json", marks=full),
    pytest.param("truncate", "model-00001-of-00002.safetensors", marks=full),
    pytest.param("truncate", "optimizer-00002-of-00002.safetensors", marks=full),
    pytest.param("flip a bit", "model-00002-of-00002.safetensors", marks=full),
    pytest.param("flip a bit", "optimizer-00001-of-00002.safetensors", marks=full),
]


@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_a_damaged_part_of_a_rank_is_noticed(tmp_path, model, undisturbed, stopped, kind, name):
    run = stopped(2, True)
    path = run / f"checkpoint-{STOPPED}" / name
    if kind == "remove":
        path.unlink()
    else:
        damage([path], kind, random.Random(f"{kind}/{name}"))
    trainer, said = finish(tmp_path, model, 2, True)
    assert f"checkpoint-{STOPPED} is damaged; set aside as checkpoint-{STOPPED}.broken" in said
    assert resumed(said) == EVERY and (run / f"checkpoint-{STOPPED}.broken").is_dir()
    assert_same_bits(trainer, undisturbed(2, True))


@pytest.mark.full
@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("removed", [[STOPPED], [EVERY], [EVERY, STOPPED]])
def test_a_removed_checkpoint_is_not_missed(tmp_path, model, undisturbed, stopped, removed, shard):
    run = stopped(2, shard)
    for step in removed:
        shutil.rmtree(run / f"checkpoint-{step}")
    trainer, said = finish(tmp_path, model, 2, shard)
    assert resumed(said) == max({0, EVERY, STOPPED} - {*removed}) and "is damaged" not in said
    assert_same_bits(trainer, undisturbed(2, shard))


CHANGES = [  # ranks and shards: until the stop, then until the next stop or the end
    [(2, False), (1, False)],
    [(1, False), (2, False)],
    [(2, True), (1, False)],
    [(1, False), (2, True)],
    [(4, True), (2, True)],
    [(2, True), (4, True)],
    [(2, False), (2, True), (2, False)],
    [(2, True), (1, False), (4, True)],
]


@pytest.mark.full
@pytest.mark.parametrize("turns", CHANGES, ids=str)
def test_a_run_goes_on_with_other_ranks_or_shards(tmp_path, model, undisturbed, stopped, turns):
    (world, shard), *turns = turns
    run, before = stopped(world, shard, "plain"), STOPPED
    for turn, (world, shard) in enumerate(turns, 1):
        until = 2 * STOPPED - 1 if turn < len(turns) else STEPS
        fault = f"plain until-{until}" if until < STEPS else "plain"
        trainer, said = finish(tmp_path, model, world, shard, fault)
        assert resumed(said) == before and steps_of(run)[-1] == until
        before = until
    assert_same_numbers(trainer, undisturbed(1, False, "plain"))


DISK_FULL = [pytest.param(*c, marks=full) for c in [(2, 1, 5_000), (2, 1, 250_000), (4, 2, 5_000)]]


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="no prlimit: files are not bounded")
@pytest.mark.parametrize(("world", "victim", "limit"), DISK_FULL)
def test_a_full_disk_of_another_rank_ends_all(tmp_path, model, undisturbed, world, victim, limit):
    """Its part cannot be written; the checkpoints before are as they were."""
    trainer = start(tmp_path, model, world, True)
    trainer.wait_for(EVERY + 2)
    while trainer.process.poll() is None and EVERY not in steps_of(trainer.run):
        time.sleep(0.005)
    before = contents(trainer.run / f"checkpoint-{EVERY}")
    resource.prlimit(trainer.pid(victim), resource.RLIMIT_FSIZE, (limit, limit))  # bytes of a file
    code, said = trainer.end()
    print(said)
    assert code != 0
    (line,) = errors(said)
    (step,) = re.findall(rf"^error: {trainer.run}/checkpoint-(\d+) cannot be written", line)
    assert "raise the limit on a file's size and give the same command again" in line
    assert [(tmp_path / f"{rank}.code").read_text() for rank in range(world)] == ["2"] * world
    assert not list(trainer.run.glob(".*")), "a draft is left"
    assert steps_of(trainer.run)[-1] == int(step) - EVERY
    assert contents(trainer.run / f"checkpoint-{EVERY}") == before
    trainer, said = finish(tmp_path, model, world, True)
    assert resumed(said) == int(step) - EVERY and "is damaged" not in said
    assert_same_bits(trainer, undisturbed(world, True))


@pytest.mark.full
def test_a_replaced_data_file_is_refused_and_a_touched_one_is_not(tmp_path, model):
    data = tmp_path / "pairs.jsonl"
    rows = [json.dumps({"query": f"what is {i}?", "positive": f"number {i}"}) for i in range(40)]
    data.write_text("\n".join(rows))
    more = ("--data", data)
    (tmp_path / "whole").mkdir()
    expected, _ = finish(tmp_path / "whole", model, 2, False, more=more)
    finish(tmp_path, model, 2, False, f"until-{STOPPED}", more=more)
    run = tmp_path / "run"
    before = contents(run)
    replaced = {
        "had another content": [*rows[:7], rows[7].replace("number 7", "number 8"), *rows[8:]],
        "a run with data sets [['pairs', 40,": rows[:-1],
    }
    for why, lines in replaced.items():
        data.write_text("\n".join(lines))
        code, said = start(tmp_path, model, 2, False, more=more).end()
        (line,) = errors(said)
        assert code == 1 and "exitcode: 2" in said and why in line and "pairs" in line
        assert str(run) in line and contents(run) == before
    data.write_text("\n".join(rows))
    os.utime(data, (1, 1))
    trainer, said = finish(tmp_path, model, 2, False, more=more)
    assert resumed(said) == STOPPED
    assert_same_bits(trainer, expected)
