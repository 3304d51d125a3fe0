"""The report: its page and plots, what contests decide, two files compared."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import report
from bench.plots import PLOTS

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = ROOT / "bench" / "results"
REAL = json.loads((COMMITTED / "cpu.json").read_text())
MACHINE = REAL["machine"]


def contest(x, case="1x64, K = 4", bench="corpus encoding", **facts):
    """One of the committed cases with other figures: a ratio of x, quartiles 3 % around it."""
    found = {"bench": bench, "case": case, "peer": "padded", "predicted": None, "pairs": 9}
    found |= {"ratio": x, "quartiles": [0.97 * x, 1.03 * x], "interval": [0.98 * x, 1.02 * x]}
    found |= {"seconds": [0.01] * 3, "peer_seconds": [0.01 / x] * 3}
    return REAL["cases"][0] | found | {"memory": 3 << 20, "peer_memory": 6 << 20} | facts


def write(path, cases, **changes):
    path.write_text(json.dumps(REAL | {"cases": cases} | changes))
    return path


def test_the_committed_pages_come_from_the_committed_results(tmp_path):
    """In a process of its own too; with pictures that are the same bytes in both."""
    for name in ("cpu", "cpu-inference"):
        report.write_page(COMMITTED / f"{name}.json", tmp_path)
        assert (tmp_path / f"{name}.md").read_text() == (COMMITTED / f"{name}.md").read_text()
    command = [sys.executable, "bench/report.py", str(COMMITTED / "cpu.json")]
    command += ["--out", str(tmp_path / "new")]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    written = {file.name: file.read_bytes() for file in (tmp_path / "new").iterdir()}
    assert set(written) == {"cpu.md", *(f"cpu-{plot}.png" for plot in PLOTS)}
    for name, content in written.items():
        assert content == (tmp_path / name).read_bytes(), name


def test_a_losing_case_is_a_row_like_any_other(tmp_path):
    lost = contest(1.25, predicted=1.5, peer_memory=None, share_of_flops=0.1, share_of_bytes=0.5)
    won = contest(0.8, "1x128 | K = 4", share_of_flops=0.5, share_of_bytes=0.1)
    changes = {"dirty": True, "commit": None, "found": {"a kernel": "a launch"}}
    changes["errors"] = [{"id": f"some[{i}]", "error": "did not end"} for i in range(3)]
    path = write(tmp_path / "a b.json", [lost, won], **changes)
    assert report.main([str(path)]) == 0
    text = (tmp_path / "a b.md").read_text()
    assert "The median's interval is below 1 in 1 of 2, above 1 in 1." in text
    row = "| 1x64, K = 4 | padded | 1.250 (1.212 - 1.288) | 1.225 - 1.275 | 0.80 | 1.500 | 10.000 |"
    assert f"{row} 8.000 | 3.00 |  | 50.0 % of bytes/s | 9 |" in text
    row = r"| 1x128 \| K = 4 | padded | 0.800 (0.776 - 0.824) | 0.784 - 0.816 | 1.25 |  | 10.000 |"
    assert f"{row} 12.500 | 3.00 | 6.00 | 50.0 % of flops/s | 9 |" in text
    assert "- commit: unknown with uncommitted changes" in text
    assert "## Not timed\n\n- some[0], 3 in all: did not end\n" in text
    assert text.endswith("## What the search for launches found\n\n- a kernel: a launch\n")
    assert "![contests](a%20b-contests.png)" in text


def test_benches_without_some_figures_are_drawn(tmp_path):
    step = contest(0.5, bench="training step", memory=None)
    unknown = contest(1.1, bench="something else", flops=None, share_of_flops=None)
    report.write_page(write(tmp_path / "x.json", [step, unknown]), tmp_path)
    assert {file.stem for file in tmp_path.glob("*.png")} == {"x-roofline", "x-contests"}
    report.write_page(write(tmp_path / "y.json", [unknown]), tmp_path)
    assert {file.stem for file in tmp_path.glob("y*.png")} == {"y-contests"}


def test_a_roofline_has_every_case_and_its_number():
    figure = PLOTS["roofline"](REAL)
    figure.draw_without_rendering()
    counted = [case for case in REAL["cases"] if case["flops"]]  # launches have none
    axes, count = figure.axes[0], len({(case["bench"], case["case"]) for case in counted})
    points = [line.get_xydata()[0] for line in axes.lines if line.get_marker() == "o"]
    assert [text.get_text() for text in axes.texts] == [str(i + 1) for i in range(count)]
    assert len(points) == count > 20
    assert all(axes.bbox.contains(*point) for point in axes.transData.transform(points))


@pytest.mark.parametrize(
    ("ratios", "facts", "expected"),
    [
        ([1.0, 0.99], {}, "keep"),
        ([0.5, 0.98], {}, "keep"),
        ([1.1, 1.0], {}, "replace"),
        ([1.04, 1.0], {}, "keep"),  # the interval begins at 1.02
        ([2.0, 0.9], {}, "keep"),
        ([1.01, 1.0], {"memory": 64 << 20, "peer_memory": 32 << 20}, "replace"),
        ([1.01, 1.0], {"memory": 2 << 20, "peer_memory": 1 << 20}, "keep"),
        ([0.5, 1.0], {"chosen": "x"}, "delete padded"),
        ([2.0, 1.0], {"chosen": "x"}, "delete x"),
        ([1.0, 1.0], {"chosen": "x"}, "keep"),
        ([2.0, 0.5], {"chosen": "x"}, "keep; the choice is wrong for 0"),
        ([2.0, 0.5], {"chosen": "padded"}, "keep; the choice is wrong for 1"),
    ],
)
def test_the_interval_decides(ratios, facts, expected):
    cases = [contest(r, str(i), today="x", **facts) for i, r in enumerate(ratios)]
    assert report.verdict(cases) == expected
    assert report.answers(cases).endswith(f"| all 2 | {expected} |")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        (b'{"format_version": 2, "cas', "no results file of the benchmarks (JSONDecodeError"),
        (b"\xff\x00", "(UnicodeDecodeError: "),
        (b"[]", "(TypeError: "),
        (b"{}", "(KeyError: 'format_version')"),
        (b'{"format_version": 1}', "format_version is 1, not 2"),
        (json.dumps(REAL | {"cases": [contest(1.0, ratio=0)]}).encode(), "(ZeroDivisionError: "),
        (json.dumps(REAL | {"cases": [{"bench": "some"}]}).encode(), "(KeyError: "),
        (json.dumps(REAL | {"cases": [contest(1.0, bytes=0)]}).encode(), "(ZeroDivisionError: "),
        (json.dumps(REAL | {"cases": [contest(1.0, flops="x")]}).encode(), "(TypeError: "),
        (json.dumps(REAL | {"roofs": {}}).encode(), "(ValueError: "),
    ],
)
def test_a_file_that_is_no_results_file_is_refused_in_a_line(tmp_path, capsys, content, message):
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_bytes(content)
    assert report.main([str(path)]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1
    assert not list(tmp_path.glob("*.md"))


def test_the_figures_of_readme_and_docs_are_those_of_the_pages():
    page, docs = (COMMITTED / "cpu.md").read_text(), (ROOT / "docs").glob("*.md")
    for text in ((ROOT / "README.md").read_text(), "".join(path.read_text() for path in docs)):
        shown = re.findall(r"\d\.\d{3} \(\d\.\d{3} - \d\.\d{3}\)", text)
        assert len(shown) >= 6 and all(ratio in page for ratio in shown)
    speed, count = (ROOT / "docs" / "speed.md").read_text().splitlines(), 0
    for case in json.loads((COMMITTED / "cpu-inference.json").read_text())["cases"]:
        if case["case"][:2] == "1x":
            low, high = case["interval"]
            figures = f"{case['ratio']:.3f}, {low:.3f} - {high:.3f} | {case['predicted']:.3f} |"
            line = next(x for x in speed if x.startswith(f"| {case['lengths'][0]:,} |"))
            assert figures in line
            count += 1
    assert count == 10
