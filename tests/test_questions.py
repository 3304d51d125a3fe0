"""bench/questions.py without a GPU, and what the answers decide."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import questions, report
from btok_kernels import launch

ROOT = Path(__file__).resolve().parent.parent


ASKED = {"gather, at once or by shards", "MLPs at inference", "tile of sums", "tile of columns"}
OTHERS = {"loss, by rows or recomputed", "CONTRASTIVE_WORKSPACE", "CONTRASTIVE_PANEL"}
OTHERS |= {f"tile of {kernel}, D 16" for kernel in ("forward", "dkdv", "dq")}


@pytest.mark.skipif(not launch.INSTALLED["triton"], reason="triton is not installed")
@pytest.mark.parametrize(
    ("selected", "expected"),
    [
        ("gated or loss_tiles", ASKED),
        pytest.param("not gather", ASKED | OTHERS, marks=pytest.mark.full),
    ],
    ids=["some", "all"],
)
def test_the_interpreter_is_asked_the_questions(tmp_path, selected, expected):
    """In a process, and those of the gather in two."""
    for name in ("bench", "btok", "kernels", "train"):  # or an edit would begin the file anew
        ignored = shutil.ignore_patterns("results", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = os.pathsep.join([str(tmp_path), str(tmp_path / "kernels")])
    env = {name: value for name, value in os.environ.items() if "PYTEST" not in name}  # xdist's
    env |= {"PYTHONPATH": path, "TRITON_INTERPRET": "1", "DIM": "32", "OMP_NUM_THREADS": "1"}
    ask = ("-m", "pytest", "bench/questions.py", "--benchmark-only", "--keep", "found.json", "-k")
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python")
    for command in (
        (*ask, selected),
        (*torchrun, sys.executable, *ask, "gather"),
        ("bench/report.py", "page", "found.json"),
    ):
        run = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stdout + run.stderr
    content = json.loads((tmp_path / "found.json").read_text())
    assert content["machine"]["device"] == "cpu" and not content["errors"]
    asked = {case["bench"] for case in content["cases"]}
    page = (tmp_path / "found.md").read_text()
    assert asked >= expected and all(f"| {name} |" in page for name in asked)
    assert "no answers" in page


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
