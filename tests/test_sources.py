"""A user's data sets: what rows become, and what is refused at opening."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from btok.data import sources
from btok.data.records import Pair, Side
from btok.data.sources import open_source
from btok.inputs import FRAMES


def write(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_every_part_of_a_row_becomes_its_part_of_the_pair(tmp_path):
    rows = [
        {"query": "a cat", "positive": "a text, with ünïcode", "id": 7},
        {
            "query": {"text": "which one?", "images": ["a.png", str(tmp_path / "b.png")]},
            "positive": {"video": ["f1.png", "f2.png"], "frame_seconds": [0, 1.5], "text": None},
            "target": "the second",
            "positive_id": "two",
        },
        {"query": {"video": "clip.mp4"}, "positive": {"images": ["c.png"]}, "target": None},
    ]
    path = tmp_path / "mine.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text(f"{lines[0]}\n\n  \n{lines[1]}\n{lines[2]}", encoding="utf-8")
    images = tmp_path / "images"
    images.mkdir()
    for folder in (images, tmp_path):
        (folder / "clip.mp4").touch()
    source = open_source(path, root=images, weight=2, ntp_side="both")
    assert (source.name, len(source), source.weight) == ("mine", 3, 2)
    shared = {"negatives": [], "dataset": "mine", "ntp_side": "both"}
    assert source[1] == Pair(
        Side("which one?", [images / "a.png", tmp_path / "b.png"], [], []),
        Side("", [], [images / "f1.png", images / "f2.png"], [0, 1.5]),
        target="the second",
        positive_id="two",
        **shared,
    )
    assert source[0].positive.text == "a text, with ünïcode"
    assert source[2].query.video == images / "clip.mp4" and source[2].target is None
    assert source[0].positive_id != source[2].positive_id is not None
    assert source[0] == pickle.loads(pickle.dumps(source))[0]
    assert open_source(path)[2].query.video == tmp_path / "clip.mp4"
    assert len(open_source(path, rows=2)) == 2 and len(open_source(path, rows=9)) == 3


def test_instructions_and_negatives(tmp_path):
    row = {"query": "q", "positive": "p", "negatives": ["n", {"images": ["x.png"]}]}
    path = write(tmp_path / "a.jsonl", [row] * 2)
    pair = open_source(path, query_instruction="Find:", positive_instruction="Page:\n")[1]
    assert (pair.query.text, pair.positive.text) == ("Find: q", "Page:\np")
    assert [side.text for side in pair.negatives] == ["Page:\nn", "Page:\n"]
    assert [len(open_source(path, negatives=n)[0].negatives) for n in (0, 1, 2)] == [0, 1, 2]


def test_a_folder_of_frames_is_a_video(tmp_path):
    for number in range(1, 21):
        Image.new("RGB", (8, 8)).save(tmp_path / f"f_{number}.png")
    (tmp_path / "notes.txt").touch()
    path = write(tmp_path / "a.jsonl", [{"query": {"video": "."}, "positive": "p"}])
    frames = open_source(path)[0].query.video
    taken = [1 + int(at * 19 / (FRAMES - 1)) for at in range(FRAMES)]
    assert [frame.name for frame in frames] == [f"f_{number}.png" for number in taken]
    (tmp_path / "none").mkdir()
    for video, error in (("none", ValueError), ("gone", FileNotFoundError)):
        source = open_source(write(path, [{"query": {"video": video}, "positive": "p"}]))
        with pytest.raises(error, match=video):
            source[0]


GOOD = {"query": "q", "positive": "p"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": "q", "posi', "expected a JSON object: Invalid control"),
        ("[1]", r"it is \[1\], expected a JSON object"),
        ('{"query": "q", "pos": 1}', "it has no positive, its columns are query, pos"),
        ('{"query": "q", "positive": null}', "positive is None, expected a text or an object"),
        ('{"query": " ", "positive": "p"}', "query is empty"),
        ('{"query": {"image": "a.png"}, "positive": "p"}', "object of text, images, video"),
        ('{"query": {"images": "a.png"}, "positive": "p"}', "images is 'a.png', expected a list"),
        ('{"query": {"images": [3]}, "positive": "p"}', "a picture is 3"),
        ('{"query": {"text": 3}, "positive": "p"}', "text is 3, expected a str"),
        ('{"query": "q", "positive": "p", "negatives": "n"}', "negatives is 'n', expected a list"),
        ('{"query": "q", "positive": "p", "target": 4}', "target is 4"),
        ('{"query": "q", "positive": "p", "negatives": ["n"]}', r"\[0, 1\] negatives"),
        ('{"query": "q\xff", "positive": "p"}', "can't decode byte 0xff"),
    ],
)
def test_a_wrong_line_is_told_with_file_and_line(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    good = json.dumps(GOOD)
    path.write_text(f"{good}\n\n{good}\n{line}\n{good}\n", encoding="latin-1")
    with pytest.raises(ValueError, match=rf"bad\.jsonl:4: .*{message}"):
        open_source(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 0}, "weight is 0, expected above 0"),
        ({"ntp_side": "left"}, "ntp_side is 'left', expected one of"),
        ({"negatives": 1}, r"rows have \[0\] negatives, expected at least 1"),
        ({"rows": 0}, "rows is 0"),
    ],
)
def test_a_setting_out_of_range_is_refused(tmp_path, settings, message):
    path = write(tmp_path / "a.jsonl", [GOOD])
    with pytest.raises(ValueError, match=message):
        open_source(path, **settings)


def test_files_that_are_none(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="data set empty: rows is 0, expected at least 1"):
        open_source(tmp_path / "empty.jsonl")
    with pytest.raises(ValueError, match=r"neither \.jsonl nor \.parquet"):
        open_source(tmp_path / "a.csv")
    with pytest.raises(FileNotFoundError):
        open_source(tmp_path / "gone.jsonl")


def test_parquet_with_paths_and_bytes(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    stored = (tmp_path / "a.png").read_bytes()
    side = {"text": "t", "images": [{"bytes": stored, "path": None}]}
    rows = [
        {"query": f"q{i}", "positive": side, "negatives": ["n"], "target": None} for i in range(5)
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    source = open_source(tmp_path / "a.parquet", rows=4)
    assert len(source) == 4 and source.negatives == 1
    pair = source[3]
    assert (pair.query.text, pair.negatives[0].text) == ("q3", "n")
    assert pair.positive.images == [stored] and pair.target is None
    again = pickle.loads(pickle.dumps(source))[3]
    assert again == pair

    features = datasets.Features(
        query={"images": datasets.List(datasets.Image())}, positive=datasets.Value("string")
    )
    data = datasets.Dataset.from_list(
        [{"query": {"images": [stored]}, "positive": "p"}], features=features
    )
    assert open_source(data, name="given")[0].query.images == [stored]

    for number, (bad, message) in enumerate(
        [
            ([*rows[:3], {**GOOD, "positive": side, "negatives": ["n", "m"]}], r"\[1, 2\] negat"),
            ([{"query": "q", "pos": "p"}], "it has no positive, its columns are query, pos"),
            ([{"query": 3, "positive": "p"}], "query is 3, expected a text"),
        ]
    ):
        datasets.Dataset.from_list(bad).to_parquet(tmp_path / f"bad{number}.parquet")
        with pytest.raises(ValueError, match=f"data set bad{number}: .*{message}"):
            open_source(tmp_path / f"bad{number}.parquet")
    with pytest.raises(FileNotFoundError):
        open_source(tmp_path / "gone.parquet")


def test_without_the_datasets_library_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"btok\[data\]"):
        open_source(tmp_path / "a.parquet")


def test_a_picture_of_a_row():
    assert sources.picture("a.png", Path("x")) == Path("x/a.png")
    assert sources.picture({"bytes": None, "path": "a.png"}, Path("x")) == Path("x/a.png")
    assert sources.picture({"bytes": b"1", "path": "a.png"}, Path("x")) == b"1"
    with pytest.raises(ValueError, match="a picture is None"):
        sources.picture({"bytes": None, "path": None}, Path("x"))
