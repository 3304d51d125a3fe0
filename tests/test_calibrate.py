"""`python -m btok calibrate`: which inputs it takes, what it writes and says, what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers import nested_checkpoint
from PIL import Image

from btok import BTokEncoder, Side
from btok.calibration import Calibration
from btok.tools import cli

TEXTS = [f"a text of {i} words {'ab ' * (i % 7)}" for i in range(50)]


@pytest.fixture
def checkpoint(tmp_path):
    return nested_checkpoint(tmp_path / "mine")


def run(*arguments):
    return cli.main(["calibrate", *map(str, arguments)])


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def same(one, other):
    assert (one.inputs, one.counts, one.quantile) == (other.inputs, other.counts, other.quantile)
    for cell, by_dims in one.losses.items():
        for d, losses in by_dims.items():
            assert np.abs(np.subtract(losses, other.losses[cell][d])).max() < 1e-5
    return True


def test_pairs_sides_and_folders(checkpoint, tmp_path, capsys):
    picture = Image.fromarray(np.full((24, 32, 3), 90, np.uint8))
    (tmp_path / "files").mkdir()
    picture.save(tmp_path / "files/a.png")
    for i, text in enumerate(TEXTS):
        (tmp_path / f"files/{i}.txt").write_text(text)
    (tmp_path / "files/broken.png").write_bytes(b"nothing")
    shown = {"images": ["files/a.png"]}
    sides = lines(tmp_path / "sides.jsonl", [*({"text": text} for text in TEXTS), shown])
    queries = [f"which text has {i}?" for i in range(50)]
    rows = [{"query": q, "positive": t} for q, t in zip(queries, TEXTS, strict=True)]
    pairs = lines(tmp_path / "pairs.jsonl", rows)
    encoder = BTokEncoder.from_pretrained(checkpoint)
    every = [*TEXTS, Side(images=[tmp_path / "files/a.png"])]
    for inputs, arguments, expected in (
        (tmp_path / "files", [], every),
        (sides, ["--quantile", "0.5"], every),
        (pairs, ["--batch-tokens", "200"], [*queries, *TEXTS]),
        (pairs, ["--instruction", "Find:"], [f"Find: {text}" for text in [*queries, *TEXTS]]),
        (sides, ["--count", "7"], [every[i] for i in range(0, 51, 8)]),
    ):
        assert run(checkpoint, inputs, *arguments) == 0
        said = capsys.readouterr().out
        made = Calibration.load(checkpoint)
        quantile = 0.5 if "--quantile" in arguments else 0.9
        assert same(made, encoder.calibrate(expected, quantile=quantile))
        assert f"btok_calibration.json: {len(expected)} inputs; 1 - cos to all 4 tokens" in said
        assert said.count("scale of int8") == 2
        for cell, count in made.counts.items():
            size = 2 ** int(cell.partition("/")[2])
            kind = cell.partition("/")[0]
            (line,) = (row for row in said.splitlines() if f"  {kind}, {size} tokens" in row)
            assert f"{count} inputs" in line and ("fewer than 32" in line) == (count < 32)
    before = (checkpoint / "btok_calibration.json").read_bytes()
    assert run(checkpoint, sides, "--count", "7") == 0
    assert (checkpoint / "btok_calibration.json").read_bytes() == before
    again = BTokEncoder.from_pretrained(checkpoint)
    assert again.encode(["a"], num_btoks="auto", dtype="int8").dtype == np.int8


@pytest.mark.parametrize("start", ["", "\n", " \r\n\n", "\ufeff", "\ufeff\n"])
def test_pairs_are_told_from_sides_by_the_first_row(checkpoint, tmp_path, capsys, start):
    pairs = [{"id": i, "query": f"query {i}", "positive": text} for i, text in enumerate(TEXTS)]
    sides = [{"text": text, "of": {"query": 1, "positive": 2}, "query": 3} for text in TEXTS]
    for name, rows, count in (("pairs", pairs, 100), ("sides", sides, 50)):
        path = lines(tmp_path / f"{name}.jsonl", rows)
        path.write_text(start + path.read_text(), encoding="utf-8")
        assert run(checkpoint, path) == 0
        assert f"btok_calibration.json: {count} inputs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["gone", "sides.jsonl"], "checkpoint is gone, which does not exist; expected a folder"),
        (["mine", "gone.jsonl"], "inputs is gone.jsonl, which does not exist; expected a"),
        (["mine", "a.txt"], "inputs is a.txt, expected a folder or a .jsonl file"),
        (["mine", "empty"], "inputs is empty, which has no file that can be encoded"),
        (["mine", "none.jsonl"], "data set none: rows is 0, expected at least 1"),
        (
            ["mine", "bad.jsonl"],
            "bad.jsonl:2: query is empty, expected a text, a picture or a video",
        ),
        (["mine", "broken"], "inputs has none that can be read"),
        (["mine", "sides.jsonl", "--quantile", "0"], "quantile is 0.0, expected above 0"),
        (["mine", "sides.jsonl", "--count", "-1"], "count is -1, expected at least 0"),
        (["mine", "sides.jsonl", "--batch-tokens", "0"], "batch_tokens is 0"),
    ],
)
def test_mistakes_are_a_line(checkpoint, tmp_path, monkeypatch, capsys, arguments, why):
    monkeypatch.chdir(tmp_path)
    lines(tmp_path / "sides.jsonl", [{"text": text} for text in TEXTS])
    lines(tmp_path / "bad.jsonl", [{"text": "a"}, {"text": " "}])
    (tmp_path / "none.jsonl").write_text("")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.png").write_bytes(b"nothing")
    assert run(*arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and why in said and said.count("\n") == 1, said
    assert not (checkpoint / "btok_calibration.json").exists()
