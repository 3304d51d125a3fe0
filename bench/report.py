"""What the benchmarks found, as a Markdown page with its plots:

    python bench/report.py RESULTS.json [--out FOLDER]

RESULTS.json is what `pytest bench/ --benchmark-only --keep RESULTS.json` writes. A ratio is our
time over the peer's, the median over pairs: below 1 ours is faster.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from bench.provenance import versions_line

FORMAT_VERSION = 2  # of a file of contests
WINS, LEAST_MIB = 0.97, 16  # a ratio that is a gain; MiB between two peaks that make a difference
RULE = (
    "Ours is today's choice, the peer an alternative. A contest is won where the whole interval is"
    f" beyond {WINS}, or, where neither side's is, by a peak memory smaller by as much and by"
    f" {LEAST_MIB} MiB. What wins somewhere and loses nowhere takes the other's place; of two ways"
    " between which a rule chooses, one that only loses is deleted."
)
Case = dict[str, Any]
Results = dict[str, Any]


class ResultsError(ValueError):
    """A results file that cannot be used."""


def groups(cases: Iterable[Case], *keys: str) -> dict[tuple[str, ...], list[Case]]:
    """Cases by some fields' values, in the order of first appearance."""
    found: dict[tuple[str, ...], list[Case]] = {}
    for case in cases:
        found.setdefault(tuple(case.get(key, "") for key in keys), []).append(case)
    return found


def table(*rows: list[str]) -> str:
    """Rows as a Markdown table; the first row is the header."""
    lines = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    lines.insert(1, ["--"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mebibytes(memory: int | None) -> str:
    return "" if memory is None else f"{memory / 2**20:.2f}"


HEADER = ["case", "peer", "ratio (quartiles)", "median's 95 %", "speed-up", "predicted", "ours, ms"]
HEADER += ["peer, ms", "ours, MiB", "peer, MiB", "share of the roof", "pairs"]


def row(case: Case) -> list[str]:
    """A contest as a table row under `HEADER`: times in ms, memory in MiB."""
    share, of = max((case[f"share_of_{of}"] or 0, of) for of in ("flops", "bytes"))
    return [
        case["case"],
        case["peer"],
        "{:.3f} ({:.3f} - {:.3f})".format(case["ratio"], *case["quartiles"]),
        "{:.3f} - {:.3f}".format(*case["interval"]),
        f"{1 / case['ratio']:.2f}",
        "" if case["predicted"] is None else f"{case['predicted']:.3f}",
        *(f"{1e3 * case[whose][1]:.3f}" for whose in ("seconds", "peer_seconds")),
        *(mebibytes(case[whose]) for whose in ("memory", "peer_memory")),
        f"{100 * share:.1f} % of {of}/s" if share else "",
        str(case["pairs"]),
    ]


def outcome(case: Case) -> int:
    """1 where the alternative wins, -1 where today's choice does, 0 where neither does."""
    low, high = case["interval"]
    if low > 1 / WINS or high < WINS:
        return 1 if low > 1 else -1
    today, other = case["memory"], case["peer_memory"]
    if abs(today - other) < LEAST_MIB << 20:
        return 0
    return (other < WINS * today) - (today < WINS * other)


def verdict(cases: list[Case]) -> str:
    """A phrase on what the contests of today's choice and one alternative decide.

    Where a rule takes one of the two from case to case, a case says in `chosen` which.
    """
    names = {1: cases[0]["peer"], -1: cases[0]["today"]}
    won = {case["case"]: outcome(case) for case in cases}
    rule, somewhere = "chosen" in cases[0], set(won.values()) - {0}
    if somewhere == {1}:
        return f"delete {names[-1]}" if rule else "replace"
    if somewhere == {-1} and rule:
        return f"delete {names[1]}"
    chosen = {case["case"]: case.get("chosen") for case in cases}
    wrong = [case for case, who in won.items() if rule and who and chosen[case] != names[who]]
    return f"keep; the choice is wrong for {'; '.join(wrong)}" if wrong else "keep"


def answers(cases: list[Case]) -> str:
    """A line per contest and one per decision in Markdown."""
    rows = [["question", "today", "alternative", "ratio (95 %)", "cases", "verdict"]]

    def add(some: list[Case], on: str, decided: str) -> None:
        mean = math.prod(case["ratio"] for case in some) ** (1 / len(some))
        low, high = (f(case["interval"][i] for case in some) for i, f in ((0, min), (1, max)))
        names = [some[0][key] for key in ("bench", "today", "peer")]
        rows.append([*names, f"{mean:.3f} ({low:.3f} - {high:.3f})", on, decided])

    for asked in groups(cases, "bench").values():
        for case in asked:
            mib = ", ".join(f"{case[of] / 2**20:.0f}" for of in ("memory", "peer_memory"))
            won = {1: f"{case['peer']} wins", -1: f"{case['today']} wins", 0: "tie"}
            add([case], f"{case['case']} ({mib} MiB)", won[outcome(case)])
        add(asked, f"all {len(asked)}", verdict(asked))
    return table(*rows)


def page(results: Results, stem: str, plots: Iterable[str]) -> str:
    """The benchmark report as a Markdown page.

    Args:
        results: what a results file holds.
        stem, plots: the pictures beside the page are STEM-PLOT.png.
    """
    machine, commit = results["machine"], results["commit"] or "unknown"
    roofs = (
        [dtype, f"{roof['flops'] / 1e9:.1f}", f"{roof['bytes'] / 1e9:.1f}"]
        for dtype, roof in results["roofs"].items()
    )
    facts = [
        f"CPU: {machine['cpu'] or 'unknown'}",
        f"cores: {machine['cores'] or 'unknown'}, threads: {machine['threads']}",
        f"date: {results['when'][:16].replace('T', ' ')} UTC",
        f"commit: {commit}{' with uncommitted changes' if results['dirty'] else ''}",
    ]
    parts = [
        f"# Benchmarks on {machine['device']}",
        "\n".join([*(f"- {fact}" for fact in facts), versions_line(results["versions"])]),
        "Ratio: our time over the peer's, the median over pairs of calls in turns; below 1 ours is"
        " faster. The quartiles are the pairs', the 95 % interval is the median's own. Predicted:"
        " the ratio by arithmetic. Times are medians. Memory: the peak beyond what was there before"
        " a call. Share of the roof: how close ours comes to the machine's best, in operations or"
        " bytes a second, whichever is closer.",
        table(["roof", "GFLOP/s", "GB/s"], *roofs),
        *(f"![{plot}]({quote(f'{stem}-{plot}.png')})" for plot in plots),
    ]
    asked = [case for case in results["cases"] if "today" in case]
    timed = [case for case in results["cases"] if "today" not in case]
    if asked:
        dry = "Of a dry run on a CPU: no answers. " if machine["device"] == "cpu" else ""
        parts += ["## Questions", dry + RULE, answers(asked)]
    for (bench,), cases in groups(timed, "bench").items():
        faster = sum(case["interval"][1] < 1 for case in cases)
        slower = sum(case["interval"][0] > 1 for case in cases)
        parts += [
            f"## {bench}",
            f"The median's interval is below 1 in {faster} of {len(cases)}, above 1 in {slower}.",
            table(HEADER, *map(row, cases)),
        ]
    same: dict[tuple[str, str], list[str]] = {}
    for case in results.get("errors", ()):
        same.setdefault((case["id"].partition("[")[0], case["error"]), []).append(case["id"])
    if same:
        lines = (f"- {ids[0]}, {len(ids)} in all: {why}" for (_, why), ids in same.items())
        parts += ["## Not timed", "\n".join(lines)]
    if found := results.get("found"):
        lines = (f"- {kernel}: {launch}" for kernel, launch in found.items())
        parts += ["## What the search for launches found", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def write_page(path: Path, folder: Path) -> None:
    """A results file's FOLDER/STEM.md and, beside it, STEM-PLOT.png.

    Raises:
        ResultsError: the file is missing, cut off or of another format, or no page can be made of
            it.
    """
    from bench.plots import PLOTS  # what only times needs no matplotlib

    try:
        results = json.loads(path.read_text())
        if results["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version is {results['format_version']}, not {FORMAT_VERSION}")
        cases = [case for case in results["cases"] if "today" not in case]
        figures = {name: plot({**results, "cases": cases}) for name, plot in PLOTS.items() if cases}
        drawn = {name: figure for name, figure in figures.items() if figure}
        text = page(results, path.stem, drawn)
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror}") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ResultsError(f"{path} is no results file of the benchmarks ({why})") from error
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        figure.savefig(folder / f"{path.stem}-{name}.png", metadata={"Software": None})
    (folder / f"{path.stem}.md").write_text(text)


def main(arguments: list[str] | None = None) -> int:
    """Write the page of a results file; the exit status is 2 for a file that cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path, help="folder; by default that of the results")
    args = parser.parse_args(arguments)
    try:
        write_page(args.results, args.out or args.results.parent)
    except (OSError, ResultsError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
