"""What the benchmarks found, and the README's picture and table.

python bench/report.py page RESULTS.json [--out FOLDER]           a Markdown page and its plots
python bench/report.py compare OLD.json NEW.json                  status 1 where NEW is worse
python bench/report.py mask docs/mask.png
python bench/report.py pocket bench/results/pocket-seed*.json     the `metrics.json` of some runs

RESULTS.json is what `pytest bench/ --benchmark-only --benchmark-json RESULTS.json` writes. A ratio
is our time over the peer's, the median over pairs: below 1 ours is faster.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench.plots import BENCHES, BLUE, GREEN, ORANGE, PALE, PLOTS, Case, Results, groups

FORMAT_VERSION = 2  # of bench/conftest.py
NUMBER = float | int
FILE_KEYS = {
    "when": str,
    "commit": str | None,
    "dirty": bool | None,
    "machine": dict,
    "versions": dict,
    "roofs": dict,
    "missing": dict,
    "cases": list,
}
MACHINE_KEYS = {"device": str, "cpu": str | None, "cores": int | None, "threads": int}
CASE_KEYS = {
    **dict.fromkeys(("bench", "case", "peer", "dtype"), str),
    **dict.fromkeys(("ratio", "flops", "bytes", "share_of_flops", "share_of_bytes"), NUMBER),
    **dict.fromkeys(("quartiles", "interval", "seconds", "peer_seconds"), list),
    **dict.fromkeys(("memory", "peer_memory"), int | None),
    "predicted": NUMBER | None,
    "pairs": int,
}
MEMORY_NOISE = 1 << 20  # bytes by which a resident set moves on its own


def mask_picture(path: str, *, source: int = 6, btoks: int = 3, target: int = 5) -> None:
    """Draws which keys each row of [x ; B ; T] sees: plain causal beside the condensation mask.

    Row i in [start, border) sees keys [start, i]; row i in [border, end) sees keys [first, i].

    Args:
        path: the picture's file.
        source, btoks, target: how many rows x, B and T have.
    """
    start, border, end = 0, source + btoks, source + btoks + target
    parts = (("x", source, BLUE), ("B", btoks, ORANGE), ("T", target, GREEN))
    names = [f"{part}{i + 1}" for part, count, _ in parts for i in range(count)]
    colours = [colour for _, count, colour in parts for _ in range(count)]
    figure = Figure(figsize=(10.4, 5.8), dpi=144)
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", w_pad=0.15, h_pad=0.15)
    panels = figure.subplots(1, 2)
    titles = ("causal mask: T sees x, B and earlier T", "condensation mask: T sees B and earlier T")
    for axes, title, first in zip(panels, titles, (start, source), strict=True):
        cells = np.full((end, end, 3), PALE)
        for i in range(end):
            low = start if i < border else first
            cells[i, low : i + 1] = colours[low : i + 1]
        axes.pcolormesh(cells, edgecolors="white", lw=1.5)
        axes.set(aspect="equal", ylim=(end, 0), xlabel="key", ylabel="row (query)")
        axes.set_xticks(np.arange(end) + 0.5, names)
        axes.set_yticks(np.arange(end) + 0.5, names)
        axes.tick_params(length=0, labeltop=True, labelbottom=False)
        ticks = [*axes.get_xticklabels(), *axes.get_yticklabels()]
        for label, colour in zip(ticks, colours * 2, strict=True):
            label.set(color=colour, fontweight="bold")
        axes.xaxis.set_label_position("top")
        axes.set_title(title, fontsize=11, pad=12)
        axes.spines[:].set_visible(False)
    hidden = (source / 2, border + target / 2)
    panels[1].text(*hidden, "x is hidden from T", ha="center", va="center", backgroundcolor=PALE)
    figure.savefig(path)


def pocket_table(files: list[str]) -> str:
    """Scores of several runs as a Markdown table: a column per run, and their mean."""
    runs = [json.loads(Path(file).read_text()) for file in files]
    if len({run["data_digest"] for run in runs}) != 1:
        raise ValueError("the runs were scored on different data")
    seeds = [f"seed {run['settings']['seed']}" for run in runs]
    lines = [["task", "metric", "chance", "floor", *seeds, "mean", "hard only"]]
    table: list[list[float]] = []
    for name, row in runs[0]["tasks"].items():
        scores = [run["tasks"][name]["score"] for run in runs]
        hard = [run["tasks"][name]["hard_only"] for run in runs]
        table.append([row["chance"], row["floor"], *scores, np.mean(scores), np.mean(hard)])
        lines.append([name, row["metric"], *(f"{x:.1f}" for x in table[-1])])
    means = [f"**{x:.1f}**" for x in np.mean(table, axis=0)]
    lines.insert(1, ["--"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in [*lines, ["**mean**", "", *means]])


class ResultsError(ValueError):
    """A results file that cannot be used, or two that cannot be compared."""


def load(path: Path) -> Results:
    """The content of a results file, its cases in the order of the page.

    Raises:
        ResultsError: the file is missing, not JSON or of another format, or lacks what is needed.
    """
    try:
        results = json.loads(path.read_text())
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ResultsError(f"{path}: not JSON, or cut off: {error}") from None
    _require(f"{path}", results, {"format_version": object})
    if results["format_version"] != FORMAT_VERSION:
        found = results["format_version"]
        raise ResultsError(f"{path}: format_version is {found!r:.20}, not {FORMAT_VERSION}")
    _require(f"{path}", results, FILE_KEYS)
    _require(f"{path}: machine", results["machine"], MACHINE_KEYS)
    for dtype, roof in results["roofs"].items():
        _require(f"{path}: roof of {dtype}", roof, {"flops": NUMBER, "bytes": NUMBER})
    if not results["cases"]:
        raise ResultsError(f"{path}: no cases")
    for i, case in enumerate(results["cases"]):
        where = f"{path}: case {i + 1}"
        _require(where, case, CASE_KEYS)
        if case["bench"] == "inference":
            _require(where, case, {"lengths": list, "num_btoks": int})
        counts = {"quartiles": 2, "interval": 2, "seconds": 3, "peer_seconds": 3}
        for key, count in counts.items():
            positive = (isinstance(x, NUMBER) and 0 < x < math.inf for x in case[key])
            if len(case[key]) != count or not all(positive):
                raise ResultsError(f"{where}: {key} is not {count} positive numbers")
        for key in ("ratio", "flops", "bytes"):
            if not 0 < case[key] < math.inf:
                raise ResultsError(f"{where}: {key} is {case[key]}")
        if case["dtype"] not in results["roofs"]:
            raise ResultsError(f"{where}: no roof of {case['dtype']}")
    order = {bench: i for i, bench in enumerate(BENCHES)}
    results["cases"].sort(key=lambda case: order.get(case["bench"], len(order)))
    return results


def _require(where: str, content: Any, kinds: dict[str, Any]) -> None:
    if not isinstance(content, dict):
        raise ResultsError(f"{where} is not an object")
    for key, kind in kinds.items():
        if key not in content:
            raise ResultsError(f"{where}: no {key}")
        if not isinstance(content[key], kind):
            raise ResultsError(f"{where}: {key} is {content[key]!r:.40}")


def table(*rows: list[str]) -> str:
    """In Markdown; the first row is the header."""
    lines = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    lines.insert(1, ["--"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(case: Case) -> str:
    return "{:.3f} ({:.3f} - {:.3f})".format(case["ratio"], *case["quartiles"])


def mebibytes(memory: int | None) -> str:
    return "" if memory is None else f"{memory / 2**20:.2f}"


def results_table(cases: list[Case]) -> str:
    """One bench's contests in Markdown: times in ms, memory in MiB."""
    header = ["case", "peer", "ratio (quartiles)", "median's 95 %", "speed-up", "predicted"]
    header += ["ours, ms", "peer, ms", "ours, MiB", "peer, MiB", "share of the roof", "pairs"]
    rows = [header]
    for case in cases:
        share, of = max((case[f"share_of_{of}"], of) for of in ("flops", "bytes"))
        rows.append(
            [
                case["case"],
                case["peer"],
                spread(case),
                "{:.3f} - {:.3f}".format(*case["interval"]),
                f"{1 / case['ratio']:.2f}",
                "" if case["predicted"] is None else f"{case['predicted']:.3f}",
                f"{1e3 * case['seconds'][1]:.3f}",
                f"{1e3 * case['peer_seconds'][1]:.3f}",
                mebibytes(case["memory"]),
                mebibytes(case["peer_memory"]),
                f"{100 * share:.1f} % of {of}/s",
                str(case["pairs"]),
            ]
        )
    return table(*rows)


def page(results: Results, stem: str, plots: Iterable[str]) -> str:
    """The Markdown page.

    Args:
        results: of `load`.
        stem, plots: the pictures beside the page are STEM-PLOT.png.
    """
    machine, commit = results["machine"], results["commit"] or "unknown"
    versions = (f"{name} {version}" for name, version in results["versions"].items())
    roofs = (
        [dtype, f"{roof['flops'] / 1e9:.1f}", f"{roof['bytes'] / 1e9:.1f}"]
        for dtype, roof in results["roofs"].items()
    )
    facts = [
        f"CPU: {machine['cpu'] or 'unknown'}",
        f"cores: {machine['cores'] or 'unknown'}, threads: {machine['threads']}",
        f"date: {results['when'][:16].replace('T', ' ')} UTC",
        f"commit: {commit}{' with uncommitted changes' if results['dirty'] else ''}",
        f"versions: {', '.join(versions)}",
    ]
    parts = [
        f"# Benchmarks on {machine['device']}",
        "\n".join(f"- {fact}" for fact in facts),
        "Ratio: our time over the peer's, the median over pairs of calls in turns; below 1 ours is"
        " faster. The quartiles are the pairs', the 95 % interval is the median's own. Predicted:"
        " the ratio by arithmetic. Times are medians. Memory: the peak beyond what was there before"
        " a call. Share of the roof: how close ours comes to the machine's best, in operations or"
        " bytes a second, whichever is closer.",
        table(["roof", "GFLOP/s", "GB/s"], *roofs),
        *(f"![{plot}]({quote(f'{stem}-{plot}.png')})" for plot in plots),
    ]
    for (bench,), cases in groups(results["cases"], "bench").items():
        faster = sum(case["interval"][1] < 1 for case in cases)
        slower = sum(case["interval"][0] > 1 for case in cases)
        parts += [
            f"## {bench}",
            f"The median's interval is below 1 in {faster} of {len(cases)}, above 1 in {slower}.",
            results_table(cases),
        ]
    missing = (f"- {name}: {bench}" for name, bench in results["missing"].items())
    parts += ["## Peers that are not installed", "\n".join(missing) or "None."]
    return "\n\n".join(parts) + "\n"


def write_page(path: Path, folder: Path) -> None:
    """A results file's FOLDER/STEM.md and, beside it, STEM-PLOT.png."""
    results = load(path)
    figures = {name: plot(results) for name, plot in PLOTS.items()}
    drawn = {name: figure for name, figure in figures.items() if figure}
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        figure.savefig(folder / f"{path.stem}-{name}.png", metadata={"Software": None})
    (folder / f"{path.stem}.md").write_text(page(results, path.stem, drawn))


def compare(old: Results, new: Results, threshold: float = 0.1) -> tuple[str, list[str]]:
    """What became of each case's ratio and of our memory.

    Args:
        threshold: by how much, relatively, a ratio may grow, or a memory by more than a MiB. A
            ratio whose quartiles overlap the old ones has not grown.

    Returns:
        The page in Markdown, and a line per regression.

    Raises:
        ResultsError: they are of two machines, or have no case in common.
    """
    machines = [results["machine"] for results in (old, new)]
    for fact in ("device", "cpu", "threads") if machines[0]["device"] == "cpu" else ("device",):
        before, after = (machine[fact] for machine in machines)
        if before != after:
            raise ResultsError(f"not comparable: {fact} was {before}, is {after}")
    sides = [groups(results["cases"], "bench", "case", "peer") for results in (old, new)]
    for names, cases in chain(*(side.items() for side in sides)):
        if len(cases) > 1:
            raise ResultsError(f"not comparable: two cases are {', '.join(names)}")
    both = [key for key in sides[1] if key in sides[0]]
    if not both:
        raise ResultsError("not comparable: no case in common")
    header = ["bench", "case", "peer", "old ratio", "new ratio", "change"]
    rows, regressions = [[*header, "old MiB", "new MiB"]], []
    for key in both:
        (before,), (after,) = (side[key] for side in sides)
        growth = after["ratio"] / before["ratio"] - 1
        sizes = [mebibytes(case["memory"]) for case in (before, after)]
        rows.append([*key, spread(before), spread(after), f"{growth:+.1%}", *sizes])
        where = ", ".join(key)
        if growth > threshold and after["quartiles"][0] > before["quartiles"][1]:
            regressions.append(f"regression: {where}: ratio {spread(before)} -> {spread(after)}")
        if None in (before["memory"], after["memory"]):
            continue
        extra = after["memory"] - before["memory"]
        if extra > max(MEMORY_NOISE, threshold * before["memory"]):
            regressions.append(f"regression: {where}: memory {sizes[0]} -> {sizes[1]} MiB")
    parts = [table(*rows)]
    for name, side, other in (("old", *sides), ("new", *sides[::-1])):
        alone = [f"- {', '.join(key)}" for key in side if key not in other]
        if alone:
            parts.append("\n".join([f"Only in the {name} file:", "", *alone]))
    return "\n\n".join(parts), regressions


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 1 for a regression, 2 for files that cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("page", help="a Markdown page and its plots")
    command.add_argument("results", type=Path)
    command.add_argument("--out", type=Path, help="folder; by default that of the results")
    command = commands.add_parser("compare", help="exit status 1 where NEW is worse than OLD")
    command.add_argument("old", type=Path)
    command.add_argument("new", type=Path)
    command.add_argument("--threshold", type=float, default=0.1, help="relative (default: 0.1)")
    command = commands.add_parser("mask", help="the README's picture")
    command.add_argument("picture")
    command = commands.add_parser("pocket", help="the README's table")
    command.add_argument("metrics", nargs="+")
    args = parser.parse_args(arguments)
    try:
        if args.command == "page":
            write_page(args.results, args.out or args.results.parent)
        elif args.command == "compare":
            text, regressions = compare(load(args.old), load(args.new), args.threshold)
            print("\n".join([text, *([""] * bool(regressions)), *regressions]))
            return int(bool(regressions))
        elif args.command == "mask":
            mask_picture(args.picture)
        else:
            print(pocket_table(args.metrics))
    except (OSError, ResultsError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
