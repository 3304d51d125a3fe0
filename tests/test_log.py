"""What a run tells of its steps: the log, a terminal's bar, lines where there is none."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys

import pytest
import torch
from helpers import gloo, spawn

from btok.objective import Losses
from train import log as module
from train.log import TrainLog, peak_flops
from train.recipes import Recipe
from train.sampler import Skipped
from train.step import StepResult

RECIPE = Recipe(caption_steps=2, reading_steps=0, steps=2, group_size=4, groups_per_batch=2)

RESULT = StepResult(Losses(*map(torch.tensor, (4.5, 1.5, 2.25, 0.0))), tokens=100, flops=0.0)


def on_a_terminal(monkeypatch):
    """What is caught from here on is a terminal's."""
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)


def test_the_log_drops_rows_to_be_done_again_and_shows_rates(tmp_path, capsys, monkeypatch):
    on_a_terminal(monkeypatch)
    numbers = {"loss": 4.5, "contrastive": 1.5, "ntp": 2.25}
    numbers |= {"learning_rate": 0.5, "gradient_norm": 3.0}
    rows = [{"step": step, "phase": "train", **numbers} for step in range(4)]
    recipe = dataclasses.replace(RECIPE, output=tmp_path)
    for first in (0, 2):
        with TrainLog(recipe, first) as log:
            log.began -= 8
            for row in rows[first:]:
                log.write(row["step"], False, RESULT, 0.5, 3.0)
            log.bar.refresh()
        with open(tmp_path / "log.jsonl", "a") as file:
            file.write('{"step": 4, "pha')  # a write that was cut
    with TrainLog(recipe, 4):
        log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row.pop("seconds") > 0 for row in log] == [True] * 4 and log == rows
    bar = capsys.readouterr().err
    assert "contrastive=1.500, ntp=2.250, pairs/s=2, tokens/s=25]" in bar and "4/4 [" in bar


def test_the_log_shows_the_share_of_the_devices_peak(tmp_path, capsys, monkeypatch):
    on_a_terminal(monkeypatch)
    recipe = dataclasses.replace(RECIPE, output=tmp_path, dtype="bfloat16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100-SXM4-80GB")
    with TrainLog(recipe, 0) as log:
        log.began -= 10
        log.write(0, True, RESULT._replace(flops=10 * 312e12 * 0.25), 0.5, 3.0)
        log.bar.refresh()
    assert "MFU=25.0%]" in capsys.readouterr().err
    assert peak_flops(dataclasses.replace(recipe, dtype="float32")) == 0
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another")
    assert peak_flops(recipe) == 0


def test_the_log_writes_to_tensorboard(tmp_path, monkeypatch):
    scalars = {}

    class Writer:
        def __init__(self, folder, purge_step):
            scalars["folder"] = (folder, purge_step)

        def add_scalar(self, name, value, step):
            scalars[name] = (value, step)

        def close(self):
            scalars["closed"] = True

    module = type(sys)("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, module.__name__, module)
    recipe = dataclasses.replace(RECIPE, output=tmp_path, tensorboard=True)
    with TrainLog(recipe, 2) as log:
        log.write(2, True, RESULT, 0.5, 3.0)
    assert scalars.pop("pairs/s")[1] == scalars.pop("tokens/s")[1] == 2
    folder = (str(tmp_path / "tensorboard"), 2)
    numbers = {"loss": 4.5, "ntp": 2.25, "learning_rate": 0.5, "gradient_norm": 3.0}
    assert scalars == {"folder": folder, "closed": True} | {k: (v, 2) for k, v in numbers.items()}
    monkeypatch.setitem(sys.modules, module.__name__, None)
    with pytest.raises(ImportError, match=r"btok\[tensorboard\]"):
        TrainLog(recipe, 0)


def told(recipe, steps, demonstrate=None, after=100.0):
    """A log of some steps, of which each was done so many seconds after the one before."""
    with TrainLog(recipe, 0, demonstrate=demonstrate) as log:
        for step in range(steps):
            log.began -= after
            log.write(step, step < recipe.caption_steps, RESULT, 0.5, 3.0)


def test_lines_are_plain_where_there_is_no_terminal(tmp_path, capsys):
    told(dataclasses.replace(RECIPE, output=tmp_path), 3)
    out, err = capsys.readouterr()
    assert err == "" and out.isascii() and not {"\r", "\x1b"} & {*out}
    first, second, third = out.splitlines()
    assert first.startswith("0:01:40  step 1 of 4: ntp 2.250, 0.08 pairs/s, 1 tokens/s; about 0:05")
    assert second.startswith("0:03:20  step 2 of 4: ntp 2.250, ")
    assert third.startswith("0:05:00  step 3 of 4: contrastive 1.500, ntp 2.250, ")
    assert third.endswith("; about 0:01:40 left")


def test_a_line_has_the_means_since_the_one_before(tmp_path, capsys):
    recipe = dataclasses.replace(RECIPE, output=tmp_path, caption_steps=0, steps=9)
    with TrainLog(recipe, 0) as log:
        for step, ntp in enumerate((1.0, 2.0, 6.0, 4.0)):
            log.began -= 100 * (step in (1, 3))
            losses = RESULT.losses._replace(ntp=torch.tensor(ntp))
            log.write(step, False, RESULT._replace(losses=losses), 0.5, 3.0)
    said = [line.split("ntp ")[1][:5] for line in capsys.readouterr().out.splitlines()]
    assert said == ["1.500", "5.000"]


def test_a_long_run_says_less_often(tmp_path, capsys):
    recipe = dataclasses.replace(RECIPE, output=tmp_path, caption_steps=0, steps=1000)
    told(recipe, 1000, after=10.0)
    lines = capsys.readouterr().out.splitlines()
    assert 60 < len(lines) < 120  # of 10,000 seconds
    assert [line.split()[0] for line in lines[:3]] == ["0:00:10", "0:00:40", "0:01:10"]


def test_a_demonstration_goes_with_each_line(tmp_path, capsys, monkeypatch):
    on_a_terminal(monkeypatch)
    asked = []

    def demonstrate(captioning):
        asked.append(captioning)
        return "right: it finds that one"

    recipe = dataclasses.replace(RECIPE, output=tmp_path)
    told(recipe, 3, demonstrate)  # on a terminal, too, beside the bar
    out = capsys.readouterr().out
    assert asked == [True, True, False] and out.count("\n         right: it finds that one") == 3
    told(recipe, 3)
    assert capsys.readouterr().out == ""  # the bar says the rest


def test_one_rank_speaks(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(module, "rank", lambda: 1)
    told(dataclasses.replace(RECIPE, output=tmp_path), 3, pytest.fail)
    assert capsys.readouterr() == ("", "") and not (tmp_path / "log.jsonl").exists()


def unreadable(*ats):
    return [Skipped(source, f"set {source}", row, f"cut at {row}") for source, row in ats]


def skipped_of(recipe):
    """The counts that a run's log has."""
    lines = (recipe.output / "log.jsonl").read_text().splitlines()
    return [json.loads(line).get("skipped", 0) for line in lines]


def test_a_pair_that_cannot_be_read_counts_once_however_often_it_is_drawn(tmp_path, capsys):
    """As it does in a run that was stopped, which tells of it again."""
    drawn = [unreadable((0, 3)), unreadable((0, 3), (1, 3)), [], unreadable((1, 3), (0, 3))] * 9
    recipe = dataclasses.replace(RECIPE, output=tmp_path, max_skipped=2)
    for first in (0, 2, 1, 3):
        state = [(), [[0, 3]], [(0, 3), (1, 3)], [[0, 3], [1, 3]]][first]
        with TrainLog(recipe, first, state) as log:
            for step, found in enumerate(drawn[first:], first):
                log.count_skipped(found)
                log.write(step, False, RESULT, 0.5, 3.0)
            assert sorted(log.unreadable) == [(0, 3), (1, 3)]
        assert skipped_of(recipe) == [1, *[2] * 35]
        lines = capsys.readouterr().err.splitlines()
        told = sorted(line for line in lines if "cut" in line)
        assert told == ["set 0, row 3: cut at 3", "set 1, row 3: cut at 3"]
    said = r"^3 pairs could not be read, over max_skipped 2; "
    with TrainLog(recipe, 36, [[0, 3], [1, 3]]) as log, pytest.raises(ValueError, match=said):
        log.count_skipped(unreadable((1, 4)))


def skip_on_a_rank(rank, folder):
    """Both ranks have a pair in one step, then each has the other's."""
    turns = [[[(0, 1)], [(0, 1)]], [[(0, 2)], []], [[], [(0, 2), (1, 7)]], [[(1, 7)], [(0, 1)]]]
    recipe = dataclasses.replace(RECIPE, output=folder, max_skipped=3)
    with (
        gloo(folder, rank, 2),
        open(folder / f"{rank}.err", "w") as file,
        contextlib.redirect_stderr(file),
        TrainLog(recipe, 0) as log,
    ):
        for step, parts in enumerate(turns):
            log.count_skipped(unreadable(*parts[rank]))
            log.write(step, False, RESULT, 0.5, 3.0)
        assert sorted(log.unreadable) == [(0, 1), (0, 2), (1, 7)]
        with pytest.raises(ValueError, match=r"^4 pairs could not be read"):
            log.count_skipped(unreadable(*[(1, 8)] * rank))


def test_all_ranks_hold_what_any_of_them_could_not_read(tmp_path):
    spawn(skip_on_a_rank, (tmp_path,), nprocs=2)
    assert skipped_of(dataclasses.replace(RECIPE, output=tmp_path)) == [1, 2, 3, 3]
    told = [(tmp_path / f"{rank}.err").read_text() for rank in (0, 1)]
    assert [said.count("cut at") for said in told] == [4, 0]
