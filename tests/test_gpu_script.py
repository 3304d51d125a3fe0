"""bench/gpu.py without a GPU: stages, cut-offs, questions; what their answers decide."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu, questions, report
from btok_kernels import launch

ROOT = Path(__file__).resolve().parent.parent


def dry(tree, out, *options):
    """In a copy of the sources, since what other code left is not gone on with."""
    if not tree.exists():
        for name in ("bench", "btok", "kernels", "train"):
            ignored = shutil.ignore_patterns("results", "__pycache__")
            shutil.copytree(ROOT / name, tree / name, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", tree)
    path = os.pathsep.join([str(tree), str(tree / "kernels")])
    result = subprocess.run(
        [sys.executable, tree / "bench/gpu.py", "--dry", "--out", out, *options],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


FAST = ("gated MLPs", "gather", "loss tiles")  # of which each takes a second or two to import


@pytest.mark.skipif(not launch.INSTALLED["triton"], reason="triton is not installed")
@pytest.mark.parametrize(
    "stages", [FAST, pytest.param(gpu.QUESTIONS, marks=pytest.mark.full)], ids=["fast", "all"]
)
def test_a_dry_run_asks_its_questions_and_goes_on_where_it_was_killed(tmp_path, stages):
    tree, out = tmp_path / "tree", tmp_path / "out"
    printed = dry(tree, out, "--budget", "540", "--only", *stages)
    for stage in stages:
        assert f"{stage}: status 0" in printed, printed
    content = json.loads((out / "gpu.json").read_text())
    assert content["machine"]["device"] == "cpu" and not content["errors"]
    page = (out / "gpu.md").read_text()
    assert printed.endswith(page + "\n") and "no answers" in page
    asked = {case["bench"] for case in content["cases"]}
    expected = {"gather, at once or by shards", "MLPs at inference", "tile of sums"}
    if stages == gpu.QUESTIONS:
        expected |= {f"tile of {kernel}, D 16" for kernel in ("forward", "dkdv", "dq")}
        expected |= {"loss, by rows or recomputed", "CONTRASTIVE_WORKSPACE", "CONTRASTIVE_PANEL"}
    assert asked >= expected and all(f"| {name} |" in page for name in asked)

    stages_file = out / "stages.json"
    done = json.loads(stages_file.read_text())
    del done["stages"]["gated MLPs"]
    stages_file.write_text(json.dumps(done))
    again = dry(tree, out, "--only", "gated MLPs", "gather")
    assert "gated MLPs: status 0; 1 skipped" in again and "gather ..." not in again
    assert json.loads((out / "gpu.json").read_text())["cases"] == content["cases"]


def test_a_stage_that_hangs_is_ended_with_all_it_started(tmp_path):
    pid_file = tmp_path / "pid"
    hang = (
        "import pathlib, subprocess, time; child = subprocess.Popen(['sleep', '60']); "
        f"pathlib.Path({str(pid_file)!r}).write_text(str(child.pid)); time.sleep(60)"
    )
    log = tmp_path / "log"
    assert gpu.run_within(3, [sys.executable, "-c", hang], log) == "killed after 3 s"
    state = Path(f"/proc/{pid_file.read_text()}/stat")

    def alive():
        try:
            return state.read_text().split()[2] not in "ZX"
        except (FileNotFoundError, ProcessLookupError):
            return False

    deadline = time.monotonic() + 20  # the signal was sent; the kernel delivers it when it does
    while alive():
        assert time.monotonic() < deadline, "a process the stage had started lives on"
        time.sleep(0.1)
    assert gpu.run_within(20, [sys.executable, "-c", "raise SystemExit(3)"], log) == "status 3"


def test_nothing_is_timed_where_a_device_test_fails(tmp_path, monkeypatch):
    ran, status = [], "status 1"

    def run(seconds, command, log):
        ran.append(log.stem)
        log.write_text("")
        return status if log.stem == "tests" else "status 0"

    monkeypatch.setattr(gpu, "run_within", run)
    gpu.run_stages(tmp_path, 600, None, dry=False)
    assert ran == ["tests"]
    gpu.run_stages(tmp_path, 600, ["ways"], dry=False)
    assert ran == ["tests", "ways"]
    status = "status 0"
    gpu.run_stages(tmp_path, 600, None, dry=False)  # the failed tests run again
    names = [stage.replace(" ", "-") for stage in gpu.STAGES]
    assert ran[2:] == [name for name in names if name != "ways"]
    assert ran[2:4] == ["tests", "tiles"]


def contest(ratio, case="a", bench="tile", peer="y", kind="tiles", **facts):
    names = {"bench": bench, "case": case, "today": "x", "peer": peer, "kind": kind}
    figures = {"ratio": ratio, "interval": [ratio - 0.01, ratio + 0.01]}
    return {**names, **figures, "memory": 64 << 20, "peer_memory": 64 << 20, **facts}


@pytest.mark.parametrize(
    ("ratios", "facts", "expected"),
    [
        ([1.0, 0.99], {}, "keep"),
        ([0.5, 0.98], {}, "keep"),
        ([1.1, 1.0], {}, "replace"),
        ([1.03, 1.0], {}, "keep"),  # the interval begins at 1.02
        ([2.0, 0.9], {}, "keep"),
        ([1.01, 1.0], {"peer_memory": 32 << 20}, "replace"),
        ([1.01, 1.0], {"memory": 2 << 20, "peer_memory": 1 << 20}, "keep"),
        ([0.5, 1.0], {"chosen": "x"}, "delete y"),
        ([2.0, 1.0], {"chosen": "x"}, "delete x"),
        ([1.0, 1.0], {"chosen": "x"}, "keep"),
        ([2.0, 0.5], {"chosen": "x"}, "keep; the choice is wrong for 0"),
        ([2.0, 0.5], {"chosen": "y"}, "keep; the choice is wrong for 1"),
    ],
)
def test_the_interval_decides(ratios, facts, expected):
    kind = "ways" if "chosen" in facts else "tiles"
    cases = [contest(r, str(i), kind=kind, **facts) for i, r in enumerate(ratios)]
    assert report.verdict(cases) == expected
    assert report.answers(cases).endswith(f"| {expected} |")


def test_the_answer_of_a_table_is_the_best_alternative_that_ran_everywhere():
    cases = [contest(1.1, case, peer="good") for case in "ab"]
    cases += [contest(r, case, peer="mixed") for case, r in zip("ab", (2.0, 0.8), strict=True)]
    cases += [contest(2.5, peer="fails on b")]
    line = report.answers(cases).splitlines()[-1]
    assert line == "| tile | x | good | 1.100 (1.090 - 1.110) | 2 of 2, best of 3 | replace |"
    line = report.answers([case for case in cases if case["peer"] != "good"]).splitlines()[-1]
    assert "| mixed |" in line and line.endswith("| keep |")


def test_neighbours_differ_in_one_number(monkeypatch):
    monkeypatch.setattr(questions, "MOST_NEIGHBOURS", 99)  # of which a CPU tries one
    config = {"BLOCK_N": 64, "BLOCK_M": 128, "num_warps": 8, "num_stages": 1}
    changes = [
        {name: n for name, n in other.items() if n != config[name]}
        for other in questions.neighbours(config, ("BLOCK_M",))
    ]
    expected = [{"BLOCK_N": 32}, {"BLOCK_N": 128}, {"num_warps": 4}, {"num_stages": 2}]
    assert changes == expected
    assert questions.named(config) == "n 64, m 128, warps 8, stages 1"


def test_a_kernel_is_launched_as_asked_and_once_more():
    q, seen = torch.zeros(4, 2, 64), []
    other = launch.Config(16, 16, 4, 2)
    usual = launch.attention_config("dq", 64, q.dtype, 0)
    with questions.attention_launches({"forward": other}) as runs:
        launch.attention("forward", q, seen.append)
        launch.attention("dq", q, seen.append)
    assert seen == [other, usual]
    runs["dq"](other)
    assert seen[-1] == other
    query = q[:, 0]
    with questions.loss_launches({"sums": {"BLOCK_M": 32}}) as trials:
        assert launch.contrastive("sums", query, (), seen.append) == {"BLOCK_M": 32}
        usual = launch.contrastive_config("rows", query.dtype, 0)
        assert launch.contrastive("rows", query, (), seen.append) == usual
    assert set(trials) == {"sums", "rows"}
