"""A user's data sets: what rows become, and what is refused at opening."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from btok.data import sources
from btok.data.records import Pair, Side
from btok.data.sources import Schema, open_source
from btok.files import sha256
from btok.inputs import FRAMES, Page, rgb_array


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


def test_a_picture_may_be_a_page_of_a_document(tmp_path):
    scans = [Image.new("RGB", (8, 8), (90 * i, 0, 0)) for i in range(3)]
    scans[0].save(tmp_path / "scan.tif", save_all=True, append_images=scans[1:])
    scans[1].save(tmp_path / "a#page=1.png")
    names = ["scan.tif#page=3", "scan.tif#page=4", "scan.tif", "a#page=1.png"]
    rows = [{"query": {"images": [name]}, "positive": "a scan"} for name in names]
    source = open_source(write(tmp_path / "mine.jsonl", rows))
    read = [source[i].query.images[0] for i in range(4)]
    assert read[0] == Page(tmp_path / "scan.tif", 3)
    assert rgb_array(read[0]).tolist() == np.asarray(scans[2]).tolist()
    with pytest.raises(ValueError, match=r"scan.tif has no page 4"):
        rgb_array(read[1])
    with pytest.raises(ValueError, match=r"scan.tif has 3 pages, expected one: .*scan.tif#page=1"):
        rgb_array(read[2])
    assert rgb_array(read[3]).max() == 90


def test_instructions_and_negatives(tmp_path):
    row = {"query": "q", "positive": "p", "negatives": ["n", {"images": ["x.png"]}]}
    path = write(tmp_path / "a.jsonl", [row] * 2)
    pair = open_source(path, query_instruction="Find:", positive_instruction="Page:\n")[1]
    assert (pair.query.text, pair.positive.text) == ("Find: q", "Page:\np")
    assert [side.text for side in pair.negatives] == ["Page:\nn", "Page:\n"]
    assert [len(open_source(path, negatives=n)[0].negatives) for n in (0, 1, 2)] == [0, 1, 2]


def test_scores_of_a_teacher(tmp_path):
    row = {**GOOD, "negatives": ["n", "m"], "scores": [3, 0.5, -1e30]}
    path = write(tmp_path / "a.jsonl", [row, {**row, "scores": [1, 2, 3]}])
    for _ in range(2):  # the second time by the index
        cut = [open_source(path, negatives=n) for n in (None, 2, 1, 0)]
        assert all(source.scored for source in cut)
        assert [len(source[1].scores) for source in cut] == [3, 3, 2, 1]
        assert cut[0][0].scores == (3, 0.5, -1e30) and cut[2][0].scores == (3, 0.5)
    bare = write(tmp_path / "b.jsonl", [{**row, "scores": []}, {**row, "scores": None}, GOOD])
    source = open_source(bare, negatives=0)
    assert not source.scored and not any(source[i].scores for i in range(3))
    some = write(tmp_path / "c.jsonl", [row, row, {**GOOD, "negatives": ["n", "m"]}, row])
    message = r"c\.jsonl:3: some rows have scores and some have none, expected all or none"
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            open_source(some)
        assert open_source(some, rows=2).scored


def test_a_folder_of_frames_is_a_video(tmp_path):
    for number in range(1, 21):
        Image.new("RGB", (8, 8)).save(tmp_path / f"f_{number}.png")
    (tmp_path / "notes.txt").touch()
    path = write(tmp_path / "a.jsonl", [{"query": {"video": "."}, "positive": "p"}])
    for hidden in ("._f_1.png", ".f_0.png", ".DS_Store"):  # as a Mac leaves them
        (tmp_path / hidden).write_bytes(b"\0\5\x16\7Mac OS X")
    (tmp_path / "f_0.png").mkdir()
    frames = open_source(path)[0].query.video
    taken = [1 + int(at * 19 / (FRAMES - 1)) for at in range(FRAMES)]
    assert [frame.name for frame in frames] == [f"f_{number}.png" for number in taken]
    for count in (20, 3):  # seconds of all frames go with those that are taken
        video = {"video": ".", "frame_seconds": [at / 4 for at in range(count)]}
        source = open_source(write(path, [{"query": video, "positive": "p"}]))
        if count == 20:
            assert source[0].query.frame_seconds == [(number - 1) / 4 for number in taken]
        else:
            with pytest.raises(ValueError, match="20 frames and 3 frame_seconds, expected as many"):
                source[0]
    (tmp_path / "none").mkdir()
    (tmp_path / "none/._1.png").touch()
    for video, error in (("none", ValueError), ("gone", FileNotFoundError)):
        source = open_source(write(path, [{"query": {"video": video}, "positive": "p"}]))
        with pytest.raises(error, match=video):
            source[0]


GOOD = {"query": "q", "positive": "p"}


def test_frames_of_one_number_are_in_order_of_their_names(tmp_path, monkeypatch):
    names = ["1.jpg", "1.png", "01.png", "x\u00b2_1.png", "2.png"]
    for name in names:
        (tmp_path / name).touch()
    listed = os.scandir
    orders = []
    for turn in (sorted, lambda found, key: sorted(found, key=key, reverse=True)):

        @contextmanager
        def scandir(folder, turn=turn):
            with listed(folder) as entries:
                yield turn(entries, key=lambda entry: entry.name)

        monkeypatch.setattr(os, "scandir", scandir)
        orders.append([path.name for path in sources._frames(Side(video=tmp_path)).video])
    assert orders == [["1.jpg", "01.png", "1.png", "2.png", "x\u00b2_1.png"]] * 2


VIDEO = '{"positive": "p", "query": {"video": ["a", "b"], "frame_seconds": %s}}'
ORDER = "expected seconds from a video's start on, in order"


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
        (VIDEO % '["a", "b"]', rf"frame_seconds is \['a', 'b'\], {ORDER}"),
        (VIDEO % "[NaN, NaN]", rf"frame_seconds is \[nan, nan\], {ORDER}"),
        (VIDEO % "[0, Infinity]", rf"frame_seconds is \[0, inf\], {ORDER}"),
        (VIDEO % "[false, true]", rf"frame_seconds is \[False, True\], {ORDER}"),
        (VIDEO % "[null, null]", rf"frame_seconds is \[None, None\], {ORDER}"),
        (VIDEO % f"[0, {10**400}]", rf"frame_seconds is \[0, 1000000.*, {ORDER}"),
        (VIDEO % "[-1, 0]", rf"frame_seconds is \[-1, 0\], {ORDER}"),
        (VIDEO % "[1.5, 1]", rf"frame_seconds is \[1.5, 1\], {ORDER}"),
        (VIDEO % "[1.5]", "query has 2 frames and 1 frame_seconds, expected as many or none"),
        (
            '{"positive": {"text": "p", "frame_seconds": [1]}, "query": "q"}',
            "positive has 0 frames",
        ),
        ('{"query": {"video": []}, "positive": "p"}', "query is empty"),
        (
            '{"query": {"images": [{"bytes": "aGk="}]}, "positive": "p"}',
            "a picture is {'bytes': 'a",
        ),
        *(
            (row.replace("?", r"a \ud83d b"), r"'a \\ud83d' ends in half of a surrogate pair")
            for row in (
                '{"query": "?", "positive": "p"}',
                '{"query": "q", "positive": {"text": "?"}}',
                '{"query": "q", "positive": "p", "target": "?"}',
                '{"query": "q", "positive": "p", "positive_id": "?"}',
                '{"query": "q", "positive": "p", "negatives": ["?"]}',
                '{"query": {"images": ["?"]}, "positive": "p"}',
                '{"query": {"video": "?"}, "positive": "p"}',
            )
        ),
        (
            r'{"query": {"images": ["a\u0000"]}, "positive": "p"}',
            r"a path is 'a\\x00', expected none",
        ),
        (r'{"query": {"video": "a\u0000"}, "positive": "p"}', r"a path is 'a\\x00', expected none"),
        ('{"query": "q", "positive": "p", "positive_id": 4}', "positive_id is 4, expected a str"),
        *(
            (f'{{"query": "q", "positive": "p", "negatives": ["n"], "scores": {had}}}', message)
            for had, message in (
                ("2", "scores is 2, expected a list"),
                ("[1, true]", r"scores is \[1, True\], expected finite numbers"),
                ("[1, 1e39]", r"scores is \[1, 1e\+39\], expected finite numbers"),
                ("[1, NaN]", r"scores is \[1, nan\], expected finite numbers"),
                (f"[1, -{10**400}]", r"scores is \[1, -1000000.*, expected finite numbers"),
                ('[1, "2"]', r"scores is \[1, '2'\], expected finite numbers"),
                ("[1]", "it has 1 negatives and 1 scores, expected 2: the positive's, then each"),
                ("[1, 2, 3]", "it has 1 negatives and 3 scores, expected 2"),
            )
        ),
        (f'{{"query": {"[" * 9999}{"]" * 9999}}}', "JSON object: maximum recursion depth"),
        (f'{{"query": {"9" * 9999}}}', "JSON object: Exceeds the limit"),
        ("\0" * 20, "it is UTF-16 .* or damaged, expected UTF-8"),
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


@pytest.fixture
def counted(monkeypatch):
    """A schema that counts the rows that were checked."""
    rows = []

    def pair(row, root):
        rows.append(row)
        return sources._pair(row, root)

    monkeypatch.setattr(sources, "PAIRS", sources.PAIRS._replace(pair=pair))
    return rows


def settle(path, ago=60):
    """As if the file had been written some seconds ago."""
    os.utime(path, ns=(time.time_ns() - ago * 10**9,) * 2)


def test_rows_are_checked_once(tmp_path, counted):
    path = write(tmp_path / "a.jsonl", [{"query": f"q{i}", "positive": "p"} for i in range(5)])
    settle(path)
    digest = sha256(path)
    for opening in range(3):
        for rows in (None, 2):
            counted.clear()
            source = open_source(path, rows=rows)
            assert len(counted) == (0 if opening or rows else 5)
            assert len(source) == (rows or 5) and source.digest == digest
            assert [source[i].query.text for i in range(len(source))][1] == "q1"
    assert isinstance(source.rows.starts, np.memmap) and source.rows.starts.dtype == np.int64
    settle(path, ago=30)  # copied or touched: what is in it counts
    counted.clear()
    assert open_source(path).digest == digest and not counted
    (index,) = tmp_path.glob("a.jsonl.*")
    made = index.stat().st_mtime_ns
    assert open_source(path).digest == digest and index.stat().st_mtime_ns == made


@pytest.mark.parametrize("ago", [0, 30])
def test_a_changed_file_is_read_again(tmp_path, counted, ago):
    """Of the same size too, and within the resolution of its time."""
    path = write(tmp_path / "a.jsonl", [GOOD] * 3)
    settle(path, ago=60 if ago else 0)
    before = open_source(path).digest
    for text in ("Q", "longer"):
        write(path, [GOOD, {"query": text, "positive": "p"}, GOOD])
        settle(path, ago)
        counted.clear()
        source = open_source(path)
        assert source[1].query.text == text and source.digest == sha256(path) != before
        assert len(counted) == 3 + 1  # and the one that was asked for


def damage_cut(index):
    index.write_bytes(index.read_bytes()[:-10])


def damage_bit(index):
    content = bytearray(index.read_bytes())
    content[140] ^= 1
    index.write_bytes(content)


def damage_version(index):
    index.write_bytes(index.read_bytes().replace(b'"kind": "4 ', b'"kind": "3 '))


@pytest.mark.parametrize("damage", [damage_cut, damage_bit, damage_version, Path.touch, None])
def test_a_damaged_index_is_made_again(tmp_path, counted, damage):
    path = write(tmp_path / "a.jsonl", [{"query": f"q{i}", "positive": "p"} for i in range(9)])
    settle(path)
    open_source(path)
    (index,) = tmp_path.glob("a.jsonl.*")
    whole = index.read_bytes()
    counted.clear()
    if damage is None:
        index.write_bytes(b"")
    else:
        damage(index)
    assert open_source(path)[8].query.text == "q8"
    assert len(counted) == (1 if damage is Path.touch else 9 + 1) and index.read_bytes() == whole


def test_a_check_that_is_stopped_leaves_no_index(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", [GOOD] * 4)
    stopping = iter([False, False, True])

    def pair(row, root):
        if next(stopping):
            raise KeyboardInterrupt
        return sources._pair(row, root)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sources, "PAIRS", sources.PAIRS._replace(pair=pair))
        open_source(path)
    assert list(tmp_path.iterdir()) == [path]
    assert len(open_source(path)) == 4
    mapped = open_source(path)
    assert pickle.loads(pickle.dumps(mapped))[3] == mapped[3]


def test_rows_and_negatives_of_one_index(tmp_path, counted):
    counts = (2, 2, 1, 2, 0)
    rows = [{**GOOD, "negatives": ["n"] * count} for count in counts]
    path = write(tmp_path / "a.jsonl", rows)
    with open(path, "a") as file:
        file.write("\n{\n")
    for _ in range(2):
        assert [open_source(path, rows=n).negatives for n in (1, 2)] == [2, 2]
        assert len(open_source(path, rows=5, negatives=0)) == 5
        assert len(open_source(path, rows=4, negatives=1)) == 4
        for settings, line, message in (
            ({"rows": 3}, 3, r"rows have \[1, 2\] negatives, expected one number"),
            ({"rows": 4, "negatives": 2}, 3, r"rows have \[1, 2\] negatives, expected at least 2"),
            ({"rows": 5, "negatives": 1}, 5, r"rows have \[0, 1, 2\] negatives, expected at least"),
            ({"rows": 6, "negatives": 0}, 7, "expected a JSON object"),
            ({"negatives": 0}, 7, "expected a JSON object"),
        ):
            with pytest.raises(ValueError, match=rf"a\.jsonl:{line}: {message}"):
                open_source(path, **settings)
    assert len(counted) == 5


def test_each_schema_of_a_file_has_an_index(tmp_path):
    path = write(tmp_path / "a.jsonl", [GOOD] * 2)
    other = Schema("other", ("query",), lambda row, root: Pair(Side(row["query"]), Side("o")))
    for _ in range(2):
        assert open_source(path, schema=other)[0].positive.text == "o"
        assert open_source(path)[0].positive.text == "p"
    assert len(list(tmp_path.glob("*.index"))) == 2


def test_where_no_index_can_be_kept_one_line_says_so(tmp_path, counted, caplog):
    path = write(tmp_path / "a.jsonl", [GOOD] * 2)
    (tmp_path / "a.jsonl.pairs.index").mkdir()
    for _ in range(2):
        assert len(open_source(path)) == 2
    assert len(counted) == 4 and len(caplog.messages) == 2
    assert "every start will read all of a.jsonl" in caplog.messages[0]
    assert not list(tmp_path.glob("*.tmp"))


def opened(path, ready):
    ready.wait()
    source = open_source(path)
    return len(source), source[len(source) - 1].query.text


def test_processes_that_build_at_once_do_not_harm_each_other(tmp_path):
    rows = [{"query": f"q{i}", "positive": "p"} for i in range(2000)]
    path = write(tmp_path / "a.jsonl", rows)
    with multiprocessing.Manager() as manager, ProcessPoolExecutor(4) as pool:
        ready = manager.Barrier(4)
        found = list(pool.map(opened, [path] * 4, [ready] * 4))
    assert found == [(2000, "q1999")] * 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "a.jsonl.pairs.index"]


def test_files_of_other_systems(tmp_path):
    path, two = (
        tmp_path / "a.jsonl",
        [json.dumps({**GOOD, "query": f"q{i} \u00e9"}) for i in (0, 1)],
    )
    for text, encoding in (
        ("\n".join(two), "utf-8-sig"),
        ("\ufeff\n" + "\r\n".join(two), "utf-8"),
        (two[0] + "\n\ufeff" + two[1] + "\r", "utf-8"),
    ):
        path.write_bytes(text.encode(encoding))
        for _ in range(2):  # the second time by the index
            assert [open_source(path)[i].query.text for i in (0, 1)] == ["q0 \u00e9", "q1 \u00e9"]
    path.write_bytes("\r".join(two).encode())
    with pytest.raises(ValueError, match=r"a\.jsonl:1: its lines end in \\r alone, expected"):
        open_source(path)
    for encoding in ("utf-16", "utf-16-le", "utf-16-be"):
        path.write_bytes("\n".join(two).encode(encoding))
        with pytest.raises(
            ValueError, match=r"a\.jsonl:1: it is UTF-16 \(iconv -f UTF-16 -t UTF-8"
        ):
            open_source(path)
    path.write_bytes("\n\n".encode("utf-16"))
    with pytest.raises(ValueError, match=r"a\.jsonl:1: it is UTF-16"):
        open_source(path)


def test_files_that_are_none(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="data set empty: rows is 0, expected at least 1"):
        open_source(tmp_path / "empty.jsonl")
    (tmp_path / "a.csv").touch()
    with pytest.raises(ValueError, match=r"a file; expected one that ends in \.jsonl or \.parquet"):
        open_source(tmp_path / "a.csv")
    with pytest.raises(FileNotFoundError, match=r"data is .*gone\.jsonl, which does not exist"):
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
    digest = open_source(tmp_path / "*.parquet").digest
    assert digest == source.digest == open_source(tmp_path / "a.parquet", rows=1).digest
    rows[2]["query"] = "Q2"
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    assert open_source(tmp_path / "a.parquet").digest != digest

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
            (
                [{**GOOD, "positive": side, "negatives": ["n"] * count} for count in (1, 2, 3)],
                r"\[1, 2, 3\] negat",  # of all there are
            ),
            ([{"query": "q", "pos": "p"}], "it has no positive, its columns are query, pos"),
            ([{"query": 3, "positive": "p"}], "query is 3, expected a text"),
        ]
    ):
        datasets.Dataset.from_list(bad).to_parquet(tmp_path / f"bad{number}.parquet")
        with pytest.raises(ValueError, match=f"data set bad{number}(, row 0)?: .*{message}"):
            open_source(tmp_path / f"bad{number}.parquet")
    with pytest.raises(FileNotFoundError):
        open_source(tmp_path / "gone.parquet")


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    """Writes rows, or a pyarrow table, as a parquet file."""
    datasets = pytest.importorskip("datasets")
    import pyarrow
    from pyarrow.parquet import write_table

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def write(name, rows, **options):
        if isinstance(rows, list):
            columns = dict.fromkeys(key for row in rows for key in row)
            rows = pyarrow.Table.from_pylist([columns | row for row in rows])
        write_table(rows, tmp_path / name, **options)
        return tmp_path / name

    return write


def with_video(seconds, video=("a", "b"), text=None):
    return {**GOOD, "query": {"video": list(video), "frame_seconds": seconds, "text": text}}


def with_picture(stored, path=None):
    return {**GOOD, "query": {"images": [{"bytes": stored, "path": path}]}}


FINE = [
    with_video([0.0, 1.5]),
    with_video(None),
    with_video([], (), "t"),
    with_picture(b"x"),
    with_picture(None, "a.png"),
    {**GOOD, "query": {"video": "a.mp4", "frame_seconds": [1.0]}},
    {**GOOD, "target": "t", "positive_id": "i", "negatives": ["n", "m"]},
    {**GOOD, "target": None, "positive_id": None, "negatives": None, "scores": None},
    {**GOOD, "negatives": ["n"], "scores": [1.5, -2.0]},
    {**GOOD, "scores": [1]},
]
WRONG: list[tuple[list[Any], Any, str]] = [  # behind which good rows
    ([GOOD], {**GOOD, "query": None}, "query is None, expected a text"),
    ([GOOD], {**GOOD, "positive": " \n"}, "positive is empty"),
    ([GOOD], {**GOOD, "negatives": [" "]}, "a negative is empty"),
    ([GOOD], {**GOOD, "negatives": [None]}, "a negative is None"),
    ([GOOD], {**GOOD, "target": 3}, "target is 3, expected a str"),
    ([GOOD], {**GOOD, "positive_id": 3}, "positive_id is 3, expected a str"),
    (FINE[:3], with_video([0.0, float("nan")]), rf"frame_seconds is \[0.0, nan\], {ORDER}"),
    (FINE[:3], with_video([0.0, None]), rf"frame_seconds is \[0.0, None\], {ORDER}"),
    (FINE[:3], with_video([1.7e9, 1.8e9]), rf"frame_seconds is .*, {ORDER}"),
    (FINE[:3], with_video([1.0, 0.5]), rf"frame_seconds is \[1.0, 0.5\], {ORDER}"),
    (FINE[:3], with_video([1.0]), "query has 2 frames and 1 frame_seconds"),
    (FINE[:3], with_video([1.0], (), "t"), "query has 0 frames and 1 frame_seconds"),
    ([], with_video(["1", "2"]), rf"frame_seconds is \['1', '2'\], {ORDER}"),
    (FINE[:3], with_video(None, ("a", None)), "a picture is None"),
    (FINE[:3], with_video(None, ("a", "b\0")), r"a path is 'b\\x00'"),
    (FINE[:3], with_video(None, ()), "query is empty"),
    (FINE[3:5], with_picture(None), "a picture is {'bytes': None"),
    (FINE[3:5], with_picture(b"", ""), "a picture is {'bytes': b''"),
    (FINE[5:6], {**GOOD, "query": {"video": "a\0"}}, r"a path is 'a\\x00'"),
    ([], {**GOOD, "query": {"video": "", "text": "t"}}, "video is ''"),
    (FINE[9:], {**GOOD, "scores": [1, 2]}, "it has 0 negatives and 2 scores, expected 1"),
    (FINE[8:9], {**FINE[8], "scores": [1.0, float("inf")]}, "scores is .*, expected finite"),
    (FINE[8:9], {**FINE[8], "scores": [1.0, -1e39]}, "scores is .*, expected finite"),
    (FINE[8:9], {**FINE[8], "scores": [1.0, None]}, "scores is .*, expected finite"),
    (FINE[8:9], {**FINE[8], "scores": [1.0]}, "it has 1 negatives and 1 scores, expected 2"),
    ([GOOD], {**GOOD, "scores": 3}, "scores is 3, expected a list"),
    ([GOOD], {**GOOD, "scores": ["a"]}, r"scores is \['a'\], expected finite"),
    ([], {**GOOD, "query": {"text": 3, "images": ["a"]}}, "text is 3"),
]


@pytest.mark.parametrize(("good", "row", "message"), WRONG)
def test_a_wrong_row_of_parquet_is_told_before_it_is_drawn(parquet, good, row, message):
    path = parquet("a.parquet", [*good, row, row])
    with pytest.raises(ValueError, match=rf"data set a, row {len(good)}: {message}"):
        open_source(path, negatives=0)
    if good:
        assert len(open_source(path, rows=len(good), negatives=0)) == len(good)


def test_right_rows_of_parquet_are_in_no_doubt(parquet):
    from btok.data.parquet import Table

    for row in FINE:
        negatives = len(row.get("negatives") or ())
        rows = open_source(parquet("a.parquet", [row, row]), negatives=negatives).rows
        assert isinstance(rows, Table) and rows.in_doubt() == []
    import datasets

    data = datasets.Dataset.from_list([GOOD, {**GOOD, "query": " "}, GOOD, {**GOOD, "query": "x"}])
    assert open_source(data.select([3, 0]))[0].query.text == "x"
    with pytest.raises(ValueError, match="data set data, row 2: query is empty"):
        open_source(data.select([3, 0, 1]))


def test_scores_in_some_rows_of_parquet(parquet):
    scored, bare = {**GOOD, "scores": [1.0]}, {**GOOD, "scores": None}
    assert open_source(parquet("a.parquet", [scored, scored])).scored
    assert not open_source(parquet("b.parquet", [bare, bare])).scored
    path = parquet("c.parquet", [scored, scored, bare])
    with pytest.raises(ValueError, match="data set c: some rows have scores and some have none"):
        open_source(path)
    assert open_source(path, rows=2)[1].scores == (1.0,)


def test_parquet_texts_that_are_none(parquet):
    import pyarrow as pa

    texts = pa.array([b"good", b"\xff"], pa.binary()).view(pa.string())
    with pytest.raises(ValueError, match=r"data set a, row 1: .*can't decode byte 0xff"):
        open_source(parquet("a.parquet", pa.table({"query": texts, "positive": ["a", "b"]})))
    views = pa.table({"query": pa.array(["a", " "], pa.string_view()), "positive": ["a", "b"]})
    with pytest.raises(ValueError, match="data set a, row 1: query is empty"):
        open_source(parquet("a.parquet", views))


def test_parquet_files_that_cannot_be_read(tmp_path, parquet):
    whole = parquet(
        "part-0.parquet", [{"query": f"q{i}" * 99, "positive": "p"} for i in range(999)]
    )
    good, second = whole.read_bytes(), tmp_path / "part-1.parquet"
    pages = good[:500] + b"\x77" * 2000 + good[2500:]
    for content in (b"", b"PAR1", b"no parquet at all", good[:300], good[:-9], pages):
        second.write_bytes(content)
        for path in (second, tmp_path / "part-*.parquet"):
            with pytest.raises(
                ValueError, match=r"/part-1\.parquet cannot be read as parquet: .*;"
            ):
                open_source(path)
    parquet("part-1.parquet", [{"q": "q", "positive": "p"}])
    had = (
        r"part-1\.parquet has the columns q, positive, .*part-0\.parquet query, positive; expected"
    )
    with pytest.raises(ValueError, match=had):
        open_source(tmp_path / "part-*.parquet")
    parquet("part-1.parquet", [{"query": {"text": "q"}, "positive": "p"}])
    with pytest.raises(
        ValueError, match=r"part-\*\.parquet: parquet cannot be read: TypeError: Could"
    ):
        open_source(tmp_path / "part-*.parquet")
    import pyarrow as pa

    none = pa.table({"query": pa.array([], pa.string()), "positive": pa.array([], pa.string())})
    empty = parquet("part-1.parquet", none)
    with pytest.raises(ValueError, match=r"data set part-1: .*part-1\.parquet has no rows"):
        open_source(empty)
    (tmp_path / "._part-2.parquet").write_bytes(b"\0\5\x16\7Mac OS X")
    assert len(open_source(tmp_path / "part-*.parquet")) == 999  # an empty part has nothing to give
    (tmp_path / "a[1].parquet").write_bytes(good)
    assert len(open_source(tmp_path / "a[1].parquet")) == 999
    (tmp_path / "folder.parquet").mkdir()
    for name, what in (
        ("folder", "a folder, whose files are"),
        ("none-*", "no file, expected one"),
    ):
        with pytest.raises(FileNotFoundError, match=f"{what}.* a pattern like .*/\\*.parquet"):
            open_source(tmp_path / f"{name}.parquet")
    second.unlink()
    second.symlink_to("gone")
    with pytest.raises(FileNotFoundError, match=r"part-1\.parquet"):
        open_source(tmp_path / "part-*.parquet")


def test_a_parquet_file_with_a_damaged_footer_ends_no_process(parquet):
    """pyarrow aborts where it is asked for the metadata of some damaged column chunks."""
    files = pytest.importorskip("btok.data.parquet", reason="the extra `data` is not installed")
    row = {"query": "q", "positive": {"text": "p", "frame_seconds": [0.0]}, "negatives": ["n"]}
    path = parquet("a.parquet", [row])
    good = path.read_bytes()
    footer = range(len(good) - 8 - int.from_bytes(good[-8:-4], "little"), len(good) - 8)
    refused = 0
    for place in footer:
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
        try:
            with open(path, "rb") as file, files._named(path.name):
                list(files._told_by(file, files.ParquetFile(file)))
        except ValueError:
            refused += 1
    assert 0.3 < refused / len(footer) < 0.9


@pytest.mark.parametrize("described", ["x", {"x": 3}, {"_type": "List"}, {"_type": "Value"}])
def test_a_parquet_file_with_a_damaged_description(parquet, described):
    """What the datasets library has put into a file may say anything of its columns."""
    pa = pytest.importorskip("pyarrow", reason="the extra `data` is not installed")
    table = pa.table({"query": ["q"], "positive": ["p"]})
    said = json.dumps({"info": {"features": {"query": described}}}).encode()
    path = parquet("a.parquet", table.replace_schema_metadata({b"huggingface": said}))
    with pytest.raises(ValueError, match=r"a\.parquet: parquet cannot be read: "):
        open_source(path)


def test_a_replaced_parquet_file_of_the_same_size_and_time(parquet):
    """As an archive unpacks it: neither its digest nor the rows are the other's."""
    rows = [{"query": f"q{i:03}", "positive": "p"} for i in range(99)]
    found, sizes = [], set()
    for word in ("q0x0", "q0y0"):
        rows[50]["query"] = word
        path = parquet("a.parquet", rows, compression="none", use_dictionary=False)
        os.utime(path, (1, 1))
        sizes.add(path.stat().st_size)
        source = open_source(path)
        found.append((source.digest, source[50].query.text))
    assert len(sizes) == 1 and [word for _, word in found] == ["q0x0", "q0y0"]
    assert found[0][0] != found[1][0]
    moved = path.rename(path.with_name("b.parquet"))
    assert open_source(moved).digest == found[1][0]


def test_without_the_datasets_library_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"btok\[data\]"):
        open_source(tmp_path / "a.parquet")


def test_a_picture_of_a_row():
    assert sources.picture("a.png", Path("x")) == Path("x/a.png")
    assert sources.picture({"bytes": None, "path": "a.png"}, Path("x")) == Path("x/a.png")
    assert sources.picture({"bytes": b"1", "path": "a.png"}, Path("x")) == b"1"
    with pytest.raises(ValueError, match=r"a picture is {'bytes': None, 'path': None}"):
        sources.picture({"bytes": None, "path": None}, Path("x"))
