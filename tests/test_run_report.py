"""The report of a run, read back as a browser reads it."""

from __future__ import annotations

import base64
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from btok.tools import run_curves
from btok.tools.cli import main
from btok.tools.run_curves import curves, read_log
from btok.tools.run_report import read_run, render, write_report

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7 * 7 }}"
DOT = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
VOID = {"meta", "img", "line", "circle", "rect", "polyline", "polygon", "link", "br"}


class Reader(HTMLParser):
    """What a page holds: its text, its tags with their attributes; tags that are not closed."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.text.append(data)

    @property
    def said(self):
        return " ".join(" ".join(self.text).split())

    def named(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(run):
    """The page, after what must hold for every one."""
    html = render(read_run(run))
    page = Reader(html)
    assert page.open == []
    assert not page.named("script") and not page.named("link") and not page.named("iframe")
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("src", "href"):
            assert attributes.get(name, "data:image/png;").startswith("data:image/png;")
        if tag == "img":
            assert attributes["alt"]
        if tag == "th":
            assert attributes["scope"] in ("row", "col")
    assert "url(" not in html and "@import" not in html
    assert page.named("html")[0]["lang"] == "en" and len(page.named("h1")) == 1
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h\d", tag)]
    assert all(after - before <= 1 for before, after in pairwise(levels))
    return page


def log_row(step, **more):
    train = step >= 60
    row = {
        "step": step,
        "phase": "train" if train else "caption",
        "loss": 2.0,
        "ntp": 3 - step / 50,
    }
    row |= {"contrastive": 1.5} if train else {}
    return row | {"learning_rate": 1e-3, "gradient_norm": 4.0, "seconds": 0.5 * (step + 1)} | more


def write_log(run, rows):
    text = "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    (run / "log.jsonl").write_text(text)


def score(points, **more):
    row = {"meta_task": "I-RET", "modality": "image", "metric": "hit@1", "score": points}
    row |= {"chance": 6.25, "floor": 25.0, "hard_only": points, "queries": 40, "candidates": 160}
    return row | {"ci95": [points - 5, points + 5]} | more


@pytest.fixture
def run(tmp_path):
    """A finished run's folder."""
    folder = tmp_path / "demo"
    folder.mkdir()
    config = {"model": "pocket", "data": None, "caption_steps": 60, "steps": 40, "group_size": 16}
    config |= {"groups_per_batch": 4, "eval_queries": 40, "output": str(folder)}
    (folder / "config.json").write_text(json.dumps(config))
    write_log(folder, map(log_row, range(100)))
    for name, points in (("before", 5.0), ("metrics", 32.5)):
        tasks = {"I-RET": score(points), "V-RET": score(points + 2)}
        (folder / f"{name}.json").write_text(json.dumps({"tasks": tasks, "overall": points + 1}))
    start = {"time": "2026-01-02T03:04:05+00:00", "step": 0, "processes": 2, "python": "3.11.7"}
    start |= {"btok": {"version": "0.1.0", "commit": "abcdef0123456789", "changed": True}}
    start |= {"packages": {"versions": {"torch": "2.13.0"}}, "gpus": [], "cpu": {"model": "EPYC"}}
    noted = {"recipe": "pocket", "changed": {"steps": [400, 40], "dora": [True, False]}}
    noted |= {"parameters": 965120, "trained_parameters": 965120, "starts": [start]}
    (folder / "run.json").write_text(json.dumps(noted))
    (folder / "retrievals-I-RET.png").write_bytes(DOT)
    (folder / "loss.png").write_bytes(DOT)
    for step, whole in ((60, True), (100, True), (101, False)):
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "model.safetensors").write_bytes(b"w" * 2_000_000)
        (checkpoint / "optimizer.safetensors").write_bytes(b"o" * 3_000_000)
        if whole:
            (checkpoint / "manifest.json").write_text("{}")
    (folder / "files/scenes").mkdir(parents=True)
    (folder / "files/scenes/red-two-top-left_blue-six-top-right.png").write_bytes(DOT)
    return folder


def test_a_finished_run_is_told_whole(run):
    page = page_of(run)
    assert "Finished: 100 of 100 steps." in page.said
    assert "training time 0:00:50 for 100 steps" in page.said
    assert "2 steps a second, 128 pairs a second" in page.said
    assert "965,120, 965,120 of them trained" in page.said
    assert "commit abcdef012345, with changes" in page.said and "torch 2.13.0" in page.said
    assert "steps 400 40" in page.said and "dora true false" in page.said  # recipe, this run
    assert "I-RET hit@1 6.2 25.0 5.0 32.5 [27.5, 37.5] 32.5 40 160" in page.said
    assert "mean 6.2 25.0 6.0 33.5 33.5" in page.said
    for title in ("Contrastive loss", "Next-token loss", "Learning rate", "Gradient norm"):
        assert title in page.said
    (picture,) = page.named("img")  # the curves are drawn, not shown as a picture
    assert base64.b64decode(picture["src"].split(",")[1]) == DOT
    assert picture["width"] == picture["height"] == "1"
    assert "checkpoint-100 100 2.0 MB 5.0 MB yes" in page.said
    assert "checkpoint-101 101 2.0 MB 5.0 MB no" in page.said
    command = f"btok search {run}/checkpoint-100 {run}/files 'red two top left, blue six top right'"
    assert command in page.said and f"btok serve {run}/checkpoint-100 {run}/files" in page.said
    assert page.said.index("not the recipe's") < page.said.index("All settings")


def test_scores_and_intervals_stand_where_their_numbers_say(run):
    page = page_of(run)
    rows = [attributes for tag, attributes in page.tags if tag in ("line", "circle")]
    ranges = [row for row in rows if row.get("class") == "range" and row["x1"] != "0"]
    assert (ranges[0]["x1"], ranges[0]["x2"]) == ("27.50%", "37.50%")
    nows = [row["cx"] for row in rows if row.get("class") == "now"]
    assert nows[1:] == ["32.50%", "34.50%"]  # behind the key's


def test_a_run_that_goes_on_or_was_killed_says_how_far_it_is(run):
    (run / "metrics.json").unlink()
    write_log(run, [*map(log_row, range(41)), '{"step": 41, "loss"'])
    page = page_of(run)
    assert "Not finished: 41 of 100 steps, the last of them written 20" in page.said
    assert "goes on from checkpoint-100" in page.said
    assert "1 line of log.jsonl could not be read" in page.said
    assert "I-RET hit@1 6.2 25.0 5.0 [0.0, 10.0]" in page.said  # of before, and no other score
    words = f"torchrun --standalone --nproc-per-node 2 train/main.py pocket --output {run}"
    assert f"{words} --steps 40 --dora false" in page.said
    write_log(run, map(log_row, range(100)))
    assert "Trained: 100 of 100 steps, and no scores yet" in page_of(run).said
    (run / "log.jsonl").unlink()
    assert "No step is in its log yet." in page_of(run).said
    (run / "nonfinite.json").write_text("{}")
    assert "Stopped: a loss was not finite" in page_of(run).said


def test_seconds_of_all_starts_are_added(run):
    rows = [log_row(step, seconds=step % 50 + 1.0) for step in range(100)]
    write_log(run, rows)
    assert read_log(run / "log.jsonl").seconds == 100.0


def test_what_a_file_says_is_shown_as_text(run):
    config = json.loads((run / "config.json").read_text()) | {EVIL: EVIL, "data": EVIL}
    (run / "config.json").write_text(json.dumps(config))
    (run / "metrics.json").write_text(
        json.dumps({"tasks": {EVIL: score(30.0, metric=EVIL, meta_task=EVIL, queries=EVIL)}})
    )
    noted = json.loads((run / "run.json").read_text())
    noted |= {"recipe": EVIL, "changed": {EVIL: [EVIL, EVIL]}, "parameters": EVIL}
    noted["starts"][0] |= {"python": EVIL, "time": [EVIL], "gpus": [EVIL, {"name": EVIL}]}
    noted["starts"][0] |= {"btok": EVIL, "packages": {"versions": {EVIL: EVIL}}}
    (run / "run.json").write_text(json.dumps(noted))
    write_log(run, [log_row(0, phase=EVIL), log_row(99, **{EVIL: 1.0}, phase="\ud800")])
    (run / "x'><script>.png").write_bytes(DOT)
    page = page_of(run)
    assert page.said.count("{{ 7 * 7 }}") > 8 and EVIL in page.said


@pytest.mark.parametrize("name", ["config.json", "run.json", "before.json", "metrics.json"])
@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b"null"])
def test_a_damaged_file_is_named(run, name, content):
    (run / name).write_bytes(content)
    assert f"{name} cannot be read: " in page_of(run).said


@pytest.mark.parametrize(
    "row",
    [
        {"ci95": [1, "x"], "chance": None, "floor": math.nan, "score": True},
        {"ci95": None, "score": 10**400, "queries": math.inf, "metric": ["hit"]},
        [],
        "text",
    ],
)
def test_scores_that_are_none_are_left_out(run, row):
    (run / "metrics.json").write_text(json.dumps({"tasks": {"odd": row, "I-RET": score(30.0)}}))
    page = page_of(run)
    assert "I-RET hit@1 6.2 25.0 5.0 30.0" in page.said and " nan" not in page.said.lower()
    (run / "metrics.json").write_text(json.dumps({"tasks": row}))
    page_of(run)


def test_a_log_that_is_damaged_in_places_gives_what_is_whole(run):
    bad = ["", "null", "{}", '{"step": -1}', '{"step": true}', '{"step": 1e3}', "[" * 50_000, "{"]
    bad += [
        '{"step": 1' + " " * run_curves.LONGEST + "}",
        "\x00\x00",
        '{"step": 99999999999999999999}',
    ]
    odd = [log_row(3, ntp=math.nan), log_row(4, ntp=math.inf), log_row(5, ntp=1e308)]
    odd += [log_row(6, ntp=-1e308), log_row(7, ntp="x", seconds=math.nan), log_row(8, skipped=7)]
    write_log(run, [log_row(0), *bad, *odd, log_row(9)])
    log = read_log(run / "log.jsonl")
    assert (log.rows, log.damaged, log.steps, log.skipped) == (8, len(bad) - 1, 10, 7)
    (ntp,) = [curve for curve in curves(log) if curve.title == "Next-token loss"]
    assert ntp.summary.endswith("4 values are not finite")
    for points in (*ntp.lines, *ntp.bands):
        assert all(math.isfinite(float(x)) for x in re.split("[ ,]", points))
    page_of(run)
    write_log(run, [log_row(0, **{f"column {i}": 1.0 for i in range(500)}), log_row(1, ntp=None)])
    assert len(read_log(run / "log.jsonl").columns) == run_curves.COLUMNS
    page_of(run)


def test_a_long_log_is_thinned_and_keeps_its_extremes(run):
    rows = (log_row(step, ntp=9.0 if step == 17_777 else 2.0) for step in range(20_000))
    write_log(run, rows)
    assert len(render(read_run(run))) < 400_000 < (run / "log.jsonl").stat().st_size
    (ntp,) = [c for c in curves(read_log(run / "log.jsonl")) if c.title == "Next-token loss"]
    assert max(len(line.split()) for line in ntp.lines) == run_curves.POINTS
    heights = [float(point.split(",")[1]) for line in ntp.lines for point in line.split()]
    tops = [float(point.split(",")[1]) for band in ntp.bands for point in band.split()]
    assert min(tops) < 0 < min(heights)  # the one value, above the plot of means


def test_curves_meet_their_ticks(run):
    """A value stands as high as its tick says, and a step as far to the right."""
    write_log(run, [log_row(step, ntp=step / 10) for step in range(60)])
    (ntp,) = [c for c in curves(read_log(run / "log.jsonl")) if c.title == "Next-token loss"]
    points = [tuple(map(float, point.split(","))) for point in ntp.lines[0].split()]
    heights = {float(tick.label): 1000 - 10 * tick.at for tick in ntp.y_ticks}
    places = {float(tick.label): 10 * tick.at for tick in ntp.x_ticks}
    assert {0.0, 2.0, 4.0} <= set(heights) and {0.0, 20.0, 40.0} <= set(places)
    for step in (20, 40):
        assert points[step] == pytest.approx((places[step], heights[step / 10]), abs=0.1)


def test_an_evaluation_is_told_set_by_set(tmp_path):
    made = {"model": "abc", "prompts": "canonical", "settings": {"num_btoks": 4}}
    tasks = {"VOC2007": score(40.0, origin=38.0, meta_task="I-CLS", **made)}
    tasks |= {"MSR-VTT": score(20.0, origin=20.0, meta_task="V-RET", **made)}
    result = {"benchmark": "MMEB-V2", "tasks": tasks, "missing": ["GQA", EVIL], "overall": None}
    result |= {"meta_tasks": {"V-RET": 20.0, "I-CLS": None}, "modalities": {"video": None}}
    (tmp_path / "metrics.json").write_text(json.dumps(result))
    page = page_of(tmp_path)
    assert "Evaluation on MMEB-V2 2 of 4 data sets have a score." in page.said
    assert "VOC2007 I-CLS hit@1 6.2 25.0 40.0 38.0 [35.0, 45.0]" in page.said
    assert "Means V-RET 20.0 Data sets are missing, and so a mean, of: all sets, video, I-CLS" in (
        page.said
    )
    assert "Missing data sets GQA, <script>" in page.said
    assert "--tasks 'GQA,<script>" in page.said and "model abc" in page.said


def test_the_command_writes_the_file(run, capsys, tmp_path):
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run}/report.html\n"
    assert (run / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert main(["report", str(run), "--output", str(tmp_path / "x.html")]) == 0
    assert (tmp_path / "x.html").stat().st_size > 10_000
    (tmp_path / "empty").mkdir()
    for words, message in (
        ([str(tmp_path / "empty")], "which has none of config.json"),
        ([str(tmp_path / "gone"), "--output", str(tmp_path / "y.html")], "which does not exist"),
        ([str(run), "--output", str(tmp_path / "no/x.html")], "/no, which does not exist"),
        ([str(run), "--output", str(tmp_path)], "expected a file"),
    ):
        assert main(["report", *words]) == 2
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo", "empty", "x.html"]


def test_what_cannot_be_shown_is_named(run):
    (run / "cut.png").write_bytes(DOT[:10])
    (run / "text.png").write_text("no picture")
    (run / "folder.png").mkdir()  # and a link to nothing, which are passed over
    (run / "gone.png").symlink_to(run / "nowhere.png")
    page = page_of(run)
    assert "cut.png is no picture" in page.said and "text.png is no picture" in page.said
    assert len(page.named("img")) == 1


def test_the_import_is_light():
    code = (
        "import sys, btok.tools.run_report;"
        "assert not {'PIL', 'matplotlib', 'transformers', 'triton', 'jinja2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_jinja2_is_named_where_it_is_missing(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match="jinja2, which comes with torch"):
        write_report(run)
