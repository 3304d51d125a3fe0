"""The report: its page and plots, two files compared, the table of several runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.text import Text

from bench import report
from bench.plots import PLOTS
from bench.report import pocket_table

MACHINE = {"device": "cpu", "cpu": "Some CPU", "cores": 2, "threads": 1}
ROOT = Path(__file__).resolve().parent.parent
COMMITTED = ROOT / "bench" / "results"
ROOF = {"flops": 9.6e10, "bytes": 2.2e10}


def fake_case(bench, case, peer, ratio, *, second=0.01, flops=2e8, moved=1e6, **facts):
    """A contest whose quartiles lie 3 % around its medians, and the median's interval 2 %."""

    def quartiles(x):
        return [0.97 * x, x, 1.03 * x]

    fields = {
        "bench": bench,
        "case": case,
        "peer": peer,
        "pairs": 9,
        "ratio": ratio,
        "quartiles": quartiles(ratio)[::2],
        "interval": [0.98 * ratio, 1.02 * ratio],
        "predicted": None,
        "seconds": quartiles(second),
        "peer_seconds": quartiles(second / ratio),
        "memory": 3 << 20,
        "peer_memory": 6 << 20,
        "flops": flops,
        "bytes": moved,
        "share_of_flops": flops / second / ROOF["flops"],
        "share_of_bytes": moved / second / ROOF["bytes"],
        "dtype": "float32",
    }
    return fields | facts


def fake_results(cases):
    return {
        "format_version": 2,
        "when": "2026-03-04T05:06:07.890000+00:00",
        "commit": "0123abc",
        "dirty": False,
        "machine": MACHINE,
        "versions": {"btok": "0.1.0", "torch": "2.11.0"},
        "roofs": {"float32": ROOF},
        "missing": {"xformers": "condensed attention"},
        "cases": cases,
    }


def write(path, results):
    path.write_text(json.dumps(results))
    return path


def run(folder, seed, score, digest="a"):
    row = {"metric": "hit@1", "chance": 10.0, "floor": 25.0, "score": score, "hard_only": score + 1}
    tasks = {"I-CLS": row, "I-QA": row | {"score": score + 20}}
    path = folder / f"{seed}-{digest}.json"
    path.write_text(json.dumps({"tasks": tasks, "settings": {"seed": seed}, "data_digest": digest}))
    return str(path)


def test_a_column_per_run_and_the_means(tmp_path):
    lines = pocket_table([run(tmp_path, 0, 40.0), run(tmp_path, 1, 50.0)]).splitlines()
    assert lines[0] == "| task | metric | chance | floor | seed 0 | seed 1 | mean | hard only |"
    assert lines[2] == "| I-CLS | hit@1 | 10.0 | 25.0 | 40.0 | 50.0 | 45.0 | 46.0 |"
    assert lines[3] == "| I-QA | hit@1 | 10.0 | 25.0 | 60.0 | 70.0 | 65.0 | 46.0 |"
    bold = " | ".join(f"**{x}**" for x in ("10.0", "25.0", "50.0", "60.0", "55.0", "46.0"))
    assert lines[4] == f"| **mean** |  | {bold} |"


def test_runs_on_other_data_are_refused(tmp_path):
    with pytest.raises(ValueError, match="different data"):
        pocket_table([run(tmp_path, 0, 40.0), run(tmp_path, 1, 50.0, digest="b")])


def contest(ratio, case="1x64, K = 4", bench="corpus encoding", **facts):
    return fake_case(bench, case, "padded", ratio, **facts)


def compared(tmp_path, capsys, old, new, *options):
    """Exit status and output of `compare` for two lists of cases, or two whole contents."""
    contents = [each if isinstance(each, dict) else fake_results(each) for each in (old, new)]
    files = [str(write(tmp_path / f"{i}.json", content)) for i, content in enumerate(contents)]
    return report.main(["compare", *files, *options]), capsys.readouterr()


def rows_of(text):
    return [line for line in text.splitlines() if line.startswith("| ")][2:]


def test_the_committed_pages_come_from_the_committed_results(tmp_path):
    """In a process of its own too; with pictures that are the same bytes in both."""
    for name in ("cpu", "cpu-inference"):
        report.write_page(COMMITTED / f"{name}.json", tmp_path)
        assert (tmp_path / f"{name}.md").read_text() == (COMMITTED / f"{name}.md").read_text()
    command = [sys.executable, "bench/report.py", "page", str(COMMITTED / "cpu.json")]
    command += ["--out", str(tmp_path / "new")]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    written = {file.name: file.read_bytes() for file in (tmp_path / "new").iterdir()}
    assert set(written) == {"cpu.md", *(f"cpu-{plot}.png" for plot in PLOTS)}
    for name, content in written.items():
        assert content == (tmp_path / name).read_bytes(), name


def test_a_losing_case_is_a_row_like_any_other(tmp_path):
    lost = contest(1.25, second=0.01, flops=1e8, moved=1.1e8, predicted=1.5, peer_memory=None)
    won = contest(0.8, "1x128 | K = 4", second=0.01, flops=4.8e8, moved=2.2e6)
    content = fake_results([lost, won]) | {"dirty": True, "commit": None, "missing": {}}
    content["errors"] = [{"id": "some[1]", "error": "did not end"}]
    assert report.main(["page", str(write(tmp_path / "a b.json", content))]) == 0
    text = (tmp_path / "a b.md").read_text()
    assert "The median's interval is below 1 in 1 of 2, above 1 in 1." in text
    row = "| 1x64, K = 4 | padded | 1.250 (1.212 - 1.288) | 1.225 - 1.275 | 0.80 | 1.500 | 10.000 |"
    assert f"{row} 8.000 | 3.00 |  | 50.0 % of bytes/s | 9 |" in text
    row = r"| 1x128 \| K = 4 | padded | 0.800 (0.776 - 0.824) | 0.784 - 0.816 | 1.25 |  | 10.000 |"
    assert f"{row} 12.500 | 3.00 | 6.00 | 50.0 % of flops/s | 9 |" in text
    assert "- commit: unknown with uncommitted changes" in text
    assert "## Not timed\n\n- some[1]: did not end\n" in text
    assert text.endswith("## Peers that are not installed\n\nNone.\n")
    # plots without data are left out
    assert {file.name for file in tmp_path.glob("*.png")} == {"a b-roofline.png", "a b-speedup.png"}
    assert "![speedup](a%20b-speedup.png)" in text and "levers" not in text


def test_benches_without_some_figures_are_drawn(tmp_path):
    step = contest(0.5, bench="training step", memory=None)
    single = contest(1.1, bench="inference", lengths=[64], num_btoks=4)
    batch = contest(1.1, "mixed", bench="inference", lengths=[64, 9], num_btoks=4)
    unknown = contest(1.1, bench="something else") | {"flops": None, "share_of_flops": None}
    some = fake_results([step, single, batch, unknown])
    report.write_page(write(tmp_path / "x.json", some), tmp_path)
    drawn = {file.stem for file in tmp_path.glob("*.png")}
    assert drawn == {"x-roofline", "x-speedup", "x-overhead", "x-levers"}


def test_a_roofline_has_every_case_and_numbers_that_do_not_overlap():
    results = report.load(COMMITTED / "cpu.json")
    figure = PLOTS["roofline"](results)
    figure.draw_without_rendering()
    axes, count = figure.axes[0], len({(c["bench"], c["case"]) for c in results["cases"]})
    points = [line.get_xydata()[0] for line in axes.lines if line.get_marker() == "o"]
    assert len(points) == len(axes.texts) == count > 20
    for point in axes.transData.transform(points):
        assert axes.bbox.contains(*point)
    texts = [Text.get_window_extent(text) for text in axes.texts]
    for i, box in enumerate(texts):
        assert box.count_overlaps(texts[:i]) == 0, f"number {i + 1}"


def test_a_regression_is_named_and_fails(tmp_path, capsys):
    old = [contest(1.0), contest(1.0, "other"), contest(1.0, "gone")]
    new = [contest(1.2), contest(1.0, "other", memory=5 << 20), contest(2.0, "came")]
    status, said = compared(tmp_path, capsys, old, new)
    assert status == 1
    rows = [line for line in said.out.splitlines() if line.startswith("| ")][2:]
    row = "| corpus encoding | 1x64, K = 4 | padded | 1.000 (0.970 - 1.030) | 1.200 (1.164 - 1.236)"
    assert rows[0] == f"{row} | +20.0% | 3.00 | 3.00 |" and len(rows) == 2
    assert "Only in the old file:\n\n- corpus encoding, gone, padded\n" in said.out
    assert "Only in the new file:\n\n- corpus encoding, came, padded\n" in said.out
    assert [line for line in said.out.splitlines() if line.startswith("regression")] == [
        "regression: corpus encoding, 1x64, K = 4, padded:"
        " ratio 1.000 (0.970 - 1.030) -> 1.200 (1.164 - 1.236)",
        "regression: corpus encoding, other, padded: memory 3.00 -> 5.00 MiB",
    ]


@pytest.mark.parametrize(
    ("ratio", "facts"),
    [
        (1.2, {"quartiles": [1.02, 1.4]}),  # overlaps the old 0.97 - 1.03
        (1.09, {}),  # beyond the quartiles, but small
        (0.7, {}),
        (1.0, {"memory": None}),
        (1.0, {"memory": 1 << 20}),
        (1.0, {"memory": (4 << 20) - 1}),  # a resident set's noise
    ],
)
def test_noise_and_improvements_do_not_fail(tmp_path, capsys, ratio, facts):
    status, said = compared(tmp_path, capsys, [contest(1.0)], [contest(ratio, **facts)])
    assert status == 0 and "regression" not in said.out
    worse = [contest(1.0)], [contest(1.2)]
    assert compared(tmp_path, capsys, *worse, "--threshold", "0.25")[0] == 0
    assert compared(tmp_path, capsys, *worse, "--threshold", "0.15")[0] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"machine": MACHINE | {"device": "a GPU"}}, "not comparable: device was cpu, is a GPU"),
        ({"machine": MACHINE | {"threads": 2}}, "not comparable: threads was 1, is 2"),
        ({"cases": []}, "not comparable: no case in common"),
        ({"cases": 2 * [contest(1.0)]}, "two cases are corpus encoding, 1x64, K = 4, padded"),
    ],
)
def test_files_that_cannot_be_compared_are_refused_in_a_line(tmp_path, capsys, change, message):
    old = fake_results([contest(1.0)])
    status, said = compared(tmp_path, capsys, old, old | change)
    assert status == 2 and said.out == ""
    assert said.err.startswith("report: ") and said.err.endswith(f"{message}\n")
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("command", ["page", "compare"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        (
            b'{"format_version": 2, "cases": [',
            "no results file of the benchmarks (JSONDecodeError",
        ),
        (b"\xff\x00", "(UnicodeDecodeError: "),
        (b"[]", "(TypeError: "),
        (b"{}", "(KeyError: 'format_version')"),
        (b'{"format_version": 1}', "format_version is 1, not 2"),
        (json.dumps(fake_results([contest(1.0) | {"ratio": 0}])).encode(), "(ZeroDivisionError: "),
        (json.dumps(fake_results([{"bench": "some"}])).encode(), "(KeyError: "),
    ],
)
def test_a_file_that_is_no_results_file_is_refused_in_a_line(
    tmp_path, capsys, command, content, message
):
    path, good = tmp_path / "bad.json", write(tmp_path / "good.json", fake_results([contest(1.0)]))
    if content is not None:
        path.write_bytes(content)
    files = [path] if command == "page" else [good, path]
    assert report.main([command, *map(str, files)]) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1
    assert not list(tmp_path.glob("*.md"))


def test_the_figures_of_readme_and_docs_are_those_of_the_pages():
    page, docs = (COMMITTED / "cpu.md").read_text(), (ROOT / "docs").glob("*.md")
    for text in ((ROOT / "README.md").read_text(), "".join(path.read_text() for path in docs)):
        shown = re.findall(r"\d\.\d{3} \(\d\.\d{3} - \d\.\d{3}\)", text)
        assert len(shown) >= 6 and all(ratio in page for ratio in shown)
    speed, count = (ROOT / "docs" / "speed.md").read_text().splitlines(), 0
    for case in report.load(COMMITTED / "cpu-inference.json")["cases"]:
        if case["case"][:2] == "1x":
            low, high = case["interval"]
            figures = f"{case['ratio']:.3f}, {low:.3f} - {high:.3f} | {case['predicted']:.3f} |"
            line = next(x for x in speed if x.startswith(f"| {case['lengths'][0]:,} |"))
            assert figures in line
            count += 1
    assert count == 10
