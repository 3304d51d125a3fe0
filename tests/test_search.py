"""`search` with the demo's checkpoint, over a folder of all the pocket benchmark's test images."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from btok import BTokEncoder
from btok.evaluation import runner
from btok.tools.cli import main

ROOT = Path(__file__).parent.parent
TAKEN = {"VisDoc": 5, "I-RET": 25}  # queries up to which a task gives some


@pytest.fixture
def checkpoint(tmp_path):
    """BTOK_DEMO's, or that of a finished `make demo`; trained here, for minutes, without both."""
    if "BTOK_DEMO" in os.environ:
        return Path(os.environ["BTOK_DEMO"])
    if (ROOT / "runs/demo/metrics.json").exists():
        return ROOT / "runs/demo/checkpoint-1000"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(min(2, os.cpu_count() or 1)), "train/main.py", "pocket"]
    command += ["--output", str(tmp_path / "demo"), "--eval-queries", "0"]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return tmp_path / "demo/checkpoint-1000"


@pytest.mark.full
def test_what_the_evaluation_finds_is_found_in_a_folder(checkpoint, tmp_path, capsys):
    """1,600 scenes, three of four an edit of another, and 571 pages, under names that say nothing;
    the first 5 queries for a page and 20 for a scene whose answer the evaluation has first."""
    pytest.importorskip("sklearn", reason="scikit-learn (the extra `demo`) is not installed")
    from train.pocket import data as pocket

    tasks = [task for name in TAKEN for task in pocket.tasks() if task.name == name]
    encoder = BTokEncoder.from_pretrained(checkpoint)
    retrieved: dict[str, list[runner.Retrieved]] = {}
    runner.evaluate(lambda sides: encoder.encode(sides), tasks, retrieved=retrieved)
    folder, asked = tmp_path / "folder", {}
    folder.mkdir()
    for task in tasks:
        names = []
        for side in task.candidates:
            (pixels,) = side.images
            names.append(hashlib.sha256(b"salt" + pixels.tobytes()).hexdigest()[:16] + ".png")
            Image.fromarray(pixels).save(folder / names[-1])
        right = [i for i, found in enumerate(retrieved[task.name]) if found.rank == 1]
        for i in right[: TAKEN[task.name] - len(asked)]:
            (answer,) = task.qrels[i]
            asked[task.queries[i].text] = names[answer]
    assert len(list(folder.iterdir())) == sum(len(task.candidates) for task in tasks) > 2000
    assert len(asked) == 25

    hits = 0
    for query, answer in asked.items():
        assert main(["search", str(checkpoint), str(folder), query, "--top", "5"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 5
        hits += answer in [line.split()[2] for line in lines]
    assert hits >= 20, f"{hits} of 25 in the first five"
