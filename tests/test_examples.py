"""The scripts of examples/, as people run them, on a tiny model: what they print is right."""

from __future__ import annotations

import ast
import io
import json
import math
import os
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from helpers import tiny_checkpoint
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (30, 30, 230)}
COLOURS |= {"white": (240, 240, 240), "black": (10, 10, 10)}


def run(capsys, script, *arguments):
    """What a script prints, in this process, in which the imports are made already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        patch.setattr(sys, "path", list(sys.path))
        runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")
    return capsys.readouterr()


def numbers(pattern, text):
    return [float(number) for number in re.findall(pattern, text)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Noisy squares of five colours, pairs that name them, and the same of other squares."""
    path = tmp_path_factory.mktemp("squares")
    rng = np.random.default_rng(0)
    for part, count in (("train", 8), ("held-out", 2)):
        rows = []
        for i in range(count):
            for name, colour in COLOURS.items():
                pixels = np.clip(np.array(colour) + rng.integers(-10, 11, (24, 24, 3)), 0, 255)
                picture = path / part / f"{name}{i}.png"
                picture.parent.mkdir(exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(picture)
                positive = {"images": [str(picture.relative_to(path))]}
                rows.append({"query": name, "positive": positive, "positive_id": name})
        (path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """What the example of training prints, and the checkpoint that it made."""
    pytest.importorskip("peft", reason="peft (the extra of that name) is not installed")
    out = tmp_path_factory.mktemp("trained")
    checkpoint = str(tiny_checkpoint(out / "tiny"))
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.setattr(sys, "path", list(sys.path))
        example = runpy.run_path(str(ROOT / "examples/finetune_lora.py"))
        data = str(folder / "train.jsonl"), str(folder / "held-out.jsonl")
        smaller = {"steps": 40, "group_size": 10, "groups_per_batch": 1}
        example["main"](*data, checkpoint, str(out / "run"), **smaller)
    return said.getvalue(), out / "run" / "checkpoint-40"


def test_finetuning_finds_more_of_what_was_held_out(trained):
    said, checkpoint = trained
    before, after = numbers(r"(\d+\.\d) %", said)
    assert "hit@1 of 10 held-out pairs before" in said and str(checkpoint) in said
    assert before <= 40 and after >= 80  # one in five by chance


def test_a_search_by_words_and_by_picture_finds_the_right_one_first(folder, trained, capsys):
    _, checkpoint = trained
    (folder / "held-out" / "broken.png").write_bytes(b"no picture")
    said = run(capsys, "search_pictures.py", folder / "held-out", "green", checkpoint)
    lines = [line.split() for line in said.out.splitlines()]
    assert [Path(path).stem[:-1] for _, path in lines[:2]] == ["green", "green"]
    cosines = [float(cosine) for cosine, _ in lines]
    assert len(lines) == 5 and cosines == sorted(cosines, reverse=True)
    assert "passed over" in said.err and "broken.png" in said.err
    picture = folder / "train" / "blue3.png"
    said = run(capsys, "search_pictures.py", folder / "held-out", picture, checkpoint)
    cosine, path, *_ = said.out.split()
    assert Path(path).stem[:-1] == "blue" and float(cosine) > 0.9


def test_a_mistake_is_told_in_a_line(folder, tmp_path, trained, capsys):
    with pytest.raises(SystemExit, match=r"^error: .* has no pictures, expected files ending in"):
        run(capsys, "search_pictures.py", tmp_path, "green", trained[1])
    with pytest.raises(SystemExit, match=r"^error: the checkpoint a/b/c does not exist"):
        run(capsys, "search_pictures.py", folder, "green", "a/b/c")
    with pytest.raises(SystemExit, match=r"^error: .*nothing\.jsonl"):
        run(capsys, "finetune_lora.py", folder / "train.jsonl", tmp_path / "nothing.jsonl")


def test_the_kernels_alone_have_dense_gradients_and_their_losses_fall(tmp_path):
    """In a process of its own, which needs nothing of ours but the kernels."""
    done = subprocess.run(
        [sys.executable, ROOT / "examples/kernels_in_your_trainer.py", "300"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    (apart,) = numbers(r"within (\d\.\de-\d+)", done.stdout)
    assert apart < 1e-5
    contrastive, generative = (
        numbers(rf"{name} (\d+\.\d+)", done.stdout) for name in ("contrastive", "generative")
    )
    assert len(contrastive) == len(generative) == 7
    assert contrastive[-1] < contrastive[0] / 10
    # less than the entropy of 20 letters: of the source, which only the bottleneck tokens can tell
    assert generative[-1] < math.log(20) - 0.1


SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_says_what_it_does_and_how_to_run_it(script):
    tree = ast.parse(script.read_text())
    said = ast.get_docstring(tree) or ""
    assert f"    python examples/{script.name}" in said
    assert len(script.read_text().splitlines()) <= 90
    imported = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    if script.stem == "kernels_in_your_trainer":
        assert imported == {"torch", "btok.kernels"}
