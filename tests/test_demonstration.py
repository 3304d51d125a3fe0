"""What a demo says of its model while it trains, and the files it leaves to be searched."""

from __future__ import annotations

import re
import shlex
import sys

import numpy as np
import pytest
import torch
from helpers import tiny_module
from PIL import Image
from test_pocket import facts

from btok.data.records import Side
from btok.encoder import BTokEncoder
from btok.inputs import read_video
from btok.packing import pack
from train.pocket import data
from train.pocket.demonstration import POOL, SHOWN, Demonstration, closing, opening
from train.pocket.evaluation import format_scores
from train.pocket.files import COUNTS, write_files
from train.recipes import RECIPES, Recipe

pytest.importorskip("sklearn.datasets", reason="needs the demo extra")
RECIPE = Recipe(caption_steps=6, reading_steps=2, steps=4)


@pytest.fixture
def shown():
    """A demonstration of an untrained model."""
    model, processor = tiny_module()
    model.train()
    return Demonstration(model, processor, RECIPE)


def test_it_touches_nothing_of_the_training(shown):
    model = shown.model
    before = {name: p.clone() for name, p in model.named_parameters()}
    drawn = torch.get_rng_state()
    lines = [shown(captioning) for captioning in (True, False, False, True)]
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(module.training for module in model.modules())
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None
    for line, start in zip(lines, ("new picture", "tokens of", "asked for", "new"), strict=True):
        assert re.match("(right|wrong): asked ", line) and start in line
        assert line.isprintable()


def test_what_it_writes_is_what_the_model_finds_most_likely(shown, monkeypatch):
    """As training sees it: at each row the next token, of all that came before."""
    (record, *_), written = data.held_out("I-QA", 4), list[list[int]]()
    keep = lambda ids: written.append(list(ids)) or ""  # noqa: E731
    monkeypatch.setattr(shown.processor.tokenizer, "decode", keep)
    for captioning in (True, False):
        options = shown.packings[captioning].options
        shown.write(record, captioning)
        ids = written.pop()
        sample = (shown.processor(record.query), {"input_ids": ids})
        batch = pack([sample], **options)
        with torch.no_grad():
            hidden = shown.model.hidden_states(batch)
            best = shown.model.backbone.lm_head(hidden[batch.label_rows]).argmax(-1)
        assert len(ids) > 0 and best.tolist()[: len(ids)] == batch.labels.tolist()[: len(ids)]


def test_right_and_wrong_are_told_apart(shown, monkeypatch):
    records = data.held_out("I-QA", SHOWN)
    monkeypatch.setattr(Demonstration, "write", lambda self, record, captioning: record.target)
    assert shown(True).startswith('right: asked of a new picture "')
    answer = records[7].positive.text
    monkeypatch.setattr(Demonstration, "write", lambda *_: f"{answer}: nothing else")
    line = shown(False)  # the second turn
    assert line.startswith("right: asked of the tokens") and f'"{records[7].target}"' in line
    monkeypatch.setattr(Demonstration, "write", lambda *_: f"not {answer}")
    shown.asked = 1
    assert shown(True).startswith("wrong: asked of a new picture")


@pytest.mark.parametrize("place", [0, 1, POOL - 1])
def test_the_scene_it_names_is_the_one_it_finds(shown, monkeypatch, place):
    records = data.held_out("I-RET", SHOWN)

    def encode(self, sides, show_progress):
        assert sides[0].text == records[8].query.text and len(sides) == 1 + POOL
        assert [facts(side) for side in sides[1:5]] == [facts(r.positive) for r in records[8:12]]
        rows = np.zeros((len(sides), POOL), np.float32)
        rows[0] = np.linspace(1, 0.1, POOL)
        order = [*range(1, place + 1), 0, *range(place + 1, POOL)]  # the right one's place
        for at, candidate in enumerate(order):
            rows[1 + candidate, at] = 1
        return rows

    monkeypatch.setattr(BTokEncoder, "encode", encode)
    line = shown.found(records, 8)
    asked = f'asked for "{records[8].query.text}" it finds'
    if place == 0:
        assert line == f"right: {asked} that one of 16 new scenes"
    else:
        other = f'"{records[9].query.text}"; the right one is {place + 1}. of 16'
        assert line == f"wrong: {asked} {other}"


def test_the_first_and_the_last_lines(tmp_path, monkeypatch):
    model, _ = tiny_module()
    first = opening(model, RECIPE).splitlines()
    assert "1 process on CPU, seed 0" in first[0]
    assert first[1].startswith("  steps 1 to 6: ") and first[2].startswith("  steps 7 to 10: ")
    recipe = Recipe(output=tmp_path / "a run", caption_steps=6, steps=4)
    lines = closing(recipe, tmp_path / "a run/files").splitlines()
    words = [shlex.split(line) for line in lines if " -m btok " in line or "train/main.py" in line]
    checkpoint = str(tmp_path / "a run/checkpoint-10")
    assert [line[1:5] for line in words[:2]] == [
        ["-m", "btok", "serve", checkpoint],
        ["-m", "btok", "search", checkpoint],
    ]
    assert words[2][1:5] == ["train/main.py", "pocket", "--model", checkpoint]
    assert str(tmp_path / "a run/report.html") in lines[1]
    monkeypatch.chdir(sys.prefix)
    monkeypatch.setattr(sys, "executable", f"{sys.prefix}/bin/python")
    assert "    bin/python -m btok serve" in closing(recipe, tmp_path / "files")


def test_scores_are_told_with_chance_beside_them():
    rows = {name: {"chance": 10.0, "score": 12.34} for name in data.TASKS}
    head, *lines = format_scores({"tasks": rows}).splitlines()
    assert head.split()[-2:] == ["chance", "now"] and len(lines) == len(data.TASKS)
    assert lines[0].split() == ["I-CLS", "a", "digit", "->", "its", "name", "10.0", "12.3"]


def test_files_show_what_their_names_say(tmp_path):
    folder = tmp_path / "files"
    write_files(folder)
    trained = {
        thing[2]
        for name in ("I-RET", "I-CLS", "V-RET")
        for pair in data.train_group(name, 0)
        for thing in (*facts(pair.query), *facts(pair.positive))
    }
    scenes = list((folder / "scenes").iterdir())
    assert len(scenes) == COUNTS["I-RET"]
    for path in (*scenes, *(folder / "digits").iterdir()):
        seen = facts(Side(images=[np.asarray(Image.open(path))]))
        assert seen and not {scan for _, _, scan in seen} & trained
        if path.parent.name == "scenes":
            said = {f"{colour} {digit} {state}" for (colour, digit, _), state in seen.items()}
            assert said == set(path.stem.replace("-", " ").split("_"))
        else:
            ((colour, digit, _),) = seen
            assert path.stem.startswith(f"{colour}-{digit}-")
    pages = [path.stem for path in (folder / "pages").iterdir()]
    assert len(pages) == COUNTS["VisDoc"] and any(name.startswith("scipy.") for name in pages)
    before = {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}
    assert 100 < len(before) < 200 and sum(map(len, before.values())) < 2_000_000
    write_files(tmp_path / "again")
    for path, content in before.items():
        assert (tmp_path / "again" / path.relative_to(folder)).read_bytes() == content
    (folder / "mine.txt").write_text("kept")
    scenes[0].unlink()
    write_files(folder)
    assert (folder / "mine.txt").exists() and not scenes[0].exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "files"]


def test_videos_have_the_frames_of_the_test_set(tmp_path, monkeypatch):
    pytest.importorskip("av", reason="PyAV (the extra `video`) is not installed")
    write_files(tmp_path / "files")
    records = {r.query.text: r.positive.video for r in data.held_out("V-RET", COUNTS["V-RET"])}
    paths = list((tmp_path / "files/videos").iterdir())
    assert len(paths) == len(records) == COUNTS["V-RET"]
    for path in paths:
        frames, _ = read_video(path)
        shown = records[path.stem.replace("_", ", ").replace("-", " ")]
        assert len(frames) == len(shown) == 4
        for frame, own in zip(frames, shown, strict=True):
            gap = np.abs(np.asarray(frame).astype(int) - own).mean((0, 1))
            assert gap.max() < 8, path  # of 255; the colours of a video are half as sharp
    monkeypatch.setitem(sys.modules, "av", None)
    write_files(tmp_path / "without")
    assert not (tmp_path / "without/videos").exists()
    assert len(list((tmp_path / "without").rglob("*.png"))) == 120


def test_the_demos_recipe_says_what_it_will_do():
    model, _ = tiny_module()
    assert "steps 601 to 1000: to embed, through 4 bottleneck tokens" in opening(
        model, RECIPES["pocket"]
    )
