"""bench/questions.py without a GPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from btok_kernels import launch

ROOT = Path(__file__).resolve().parent.parent
ASKED = {"loss, by rows or recomputed", "gather, at once or by shards", "MLPs at inference"}
ASKED |= {
    f"CONTRASTIVE_{held}, or {times} of it"
    for held in ("WORKSPACE", "PANEL")
    for times in (0.5, 2, 4)
}


@pytest.mark.skipif(not launch.INSTALLED["triton"], reason="triton is not installed")
def test_the_interpreter_is_asked_the_questions(tmp_path):
    """In a process, and those of the gather in two."""
    for name in ("bench", "btok", "kernels", "train"):  # or an edit would begin the file anew
        ignored = shutil.ignore_patterns("results", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = os.pathsep.join([str(tmp_path), str(tmp_path / "kernels")])
    env = {name: value for name, value in os.environ.items() if "PYTEST" not in name}  # xdist's
    env |= {"PYTHONPATH": path, "TRITON_INTERPRET": "1", "DIM": "32", "OMP_NUM_THREADS": "1"}
    ask = ("-m", "pytest", "bench/questions.py", "--benchmark-only", "--benchmark-max-time=0.05")
    ask += ("--benchmark-min-rounds=2", "--keep", "found.json")
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python")
    for command in (
        ask,  # the gather is skipped, and still to be held
        (*torchrun, sys.executable, *ask, "-k", "gather"),
        ("bench/report.py", "found.json"),
    ):
        run = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stdout + run.stderr
    content = json.loads((tmp_path / "found.json").read_text())
    assert content["machine"]["device"] == "cpu" and not content["errors"]
    page = (tmp_path / "found.md").read_text()
    assert {case["bench"] for case in content["cases"]} == ASKED
    assert all(f"| {name} |" in page for name in ASKED) and "no answers" in page
