"""What the benchmarks found: a page, a comparison of two files; and the pocket benchmark's table.

python bench/report.py page RESULTS.json [--out FOLDER]           a Markdown page and its plots
python bench/report.py compare OLD.json NEW.json                  status 1 where NEW is worse
python bench/report.py pocket bench/results/pocket-seed*.json     the `metrics.json` of some runs

RESULTS.json is what `pytest bench/ --benchmark-only --keep RESULTS.json` writes. A ratio is our
time over the peer's, the median over pairs: below 1 ours is faster.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from urllib.parse import quote

import numpy as np

from bench.plots import BENCHES, PLOTS, Case, Results, groups
from bench.provenance import FORMAT_VERSION, versions_line

MEMORY_NOISE = 1 << 20  # bytes by which a resident set moves on its own
WINS, LEAST_MIB = 0.97, 16  # a ratio that is a gain; MiB between two peaks that make a difference
RULE = (
    "Ours is today's choice, the peer an alternative. A contest is won where the whole interval is"
    f" beyond {WINS}, or, where neither side's is, by a peak memory smaller by as much and by"
    f" {LEAST_MIB} MiB. What wins somewhere and loses nowhere takes the other's place; of two ways"
    " between which a rule chooses, one that only loses is deleted."
)


def pocket_table(files: list[str]) -> str:
    """Scores of several runs as a Markdown table: a column per run, and their mean."""
    runs = [json.loads(Path(file).read_text()) for file in files]
    if len({run["data_digest"] for run in runs}) != 1:
        raise ValueError("the runs were scored on different data")
    seeds = [f"seed {run['settings']['seed']}" for run in runs]
    lines = [["task", "metric", "chance", "floor", *seeds, "mean", "hard only"]]
    figures: list[list[float]] = []
    for name, row in runs[0]["tasks"].items():
        scores = [run["tasks"][name]["score"] for run in runs]
        hard = [run["tasks"][name]["hard_only"] for run in runs]
        figures.append([row["chance"], row["floor"], *scores, np.mean(scores), np.mean(hard)])
        lines.append([name, row["metric"], *(f"{x:.1f}" for x in figures[-1])])
    means = [f"**{x:.1f}**" for x in np.mean(figures, axis=0)]
    return table(*lines, ["**mean**", "", *means])


class ResultsError(ValueError):
    """A results file that cannot be used, or two that cannot be compared."""


def load(path: Path) -> Results:
    """The content of a results file, its cases in the order of the page.

    Raises:
        ResultsError: the file is missing, cut off or of another format, or no page can be made of
            it.
    """
    order = {bench: i for i, bench in enumerate(BENCHES)}
    try:
        results = json.loads(path.read_text())
        if results["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version is {results['format_version']}, not {FORMAT_VERSION}")
        results["cases"].sort(key=lambda case: order.get(case["bench"], len(order)))
        page(results, path.stem, ())
    except OSError as error:
        raise ResultsError(f"{path}: {error.strerror}") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ResultsError(f"{path} is no results file of the benchmarks ({why})") from error
    return results


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
        share, of = max((case[f"share_of_{of}"] or 0, of) for of in ("flops", "bytes"))
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
                f"{100 * share:.1f} % of {of}/s" if share else "",
                str(case["pairs"]),
            ]
        )
    return table(*rows)


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
    """What the contests of today's choice and one alternative decide.

    Where a rule takes one of the two from case to case, a case says in `chosen` which.
    """
    outcomes, names = (
        [outcome(case) for case in cases],
        {1: cases[0]["peer"], -1: cases[0]["today"]},
    )
    wins, losses = outcomes.count(1), outcomes.count(-1)
    rule = "chosen" in cases[0]
    if wins and not losses:
        return f"delete {names[-1]}" if rule else "replace"
    if losses and not wins and rule:
        return f"delete {names[1]}"
    wrong = [
        case["case"]
        for case, won in zip(cases, outcomes, strict=True)
        if rule and won and case["chosen"] != names[won]
    ]
    return f"keep; the choice is wrong for {'; '.join(wrong)}" if wrong else "keep"


def answers(cases: list[Case]) -> str:
    """A line per decision in Markdown.

    Between two ways every case has a line, as the crossing is what is asked for; of a choice with
    many alternatives only the one that would replace it by most, or the one that came nearest.
    """
    rows = [["question", "today", "alternative", "ratio (95 %)", "cases", "verdict"]]

    def add(some: list[Case], on: str, decided: str) -> None:
        ratio = np.exp(np.mean([np.log(case["ratio"]) for case in some]))
        low, high = (f(case["interval"][i] for case in some) for i, f in ((0, min), (1, max)))
        first, figures = some[0], f"{ratio:.3f} ({low:.3f} - {high:.3f})"
        rows.append([first["bench"], first["today"], first["peer"], figures, on, decided])

    for (_bench,), asked in groups(cases, "bench").items():
        by_peer = [*groups(asked, "peer").values()]
        if asked[0]["kind"] == "ways":
            for case in asked:
                mib = "{:.0f}, {:.0f} MiB".format(
                    case["memory"] / 2**20, case["peer_memory"] / 2**20
                )
                won = {1: f"{case['peer']} wins", -1: f"{case['today']} wins", 0: "tie"}
                add([case], f"{case['case']} ({mib})", won[outcome(case)])
            add(asked, f"all {len(asked)}", verdict(asked))
            continue
        most = max(map(len, by_peer))  # one that fails somewhere replaces nothing
        whole = [some for some in by_peer if len(some) == most]
        # the highest ratio is the fastest alternative's
        best = max(
            whole, key=lambda some: (verdict(some) != "keep", np.prod([c["ratio"] for c in some]))
        )
        add(best, f"{len(best)} of {len(best)}, best of {len(by_peer)}", verdict(best))
    return table(*rows)


def page(results: Results, stem: str, plots: Iterable[str]) -> str:
    """The Markdown page.

    Args:
        results: of `load`.
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
    asked = [case for case in results["cases"] if "kind" in case]
    timed = [case for case in results["cases"] if "kind" not in case]
    if asked:
        dry = "Of a dry run on a CPU: no answers. " if machine["device"] == "cpu" else ""
        parts += ["## Questions", dry + RULE, answers(asked)]
    for (bench,), cases in groups(timed, "bench").items():
        faster = sum(case["interval"][1] < 1 for case in cases)
        slower = sum(case["interval"][0] > 1 for case in cases)
        parts += [
            f"## {bench}",
            f"The median's interval is below 1 in {faster} of {len(cases)}, above 1 in {slower}.",
            results_table(cases),
        ]
    if errors := results.get("errors"):
        parts += ["## Not timed", "\n".join(f"- {case['id']}: {case['error']}" for case in errors)]
    missing = (f"- {name}: {bench}" for name, bench in results["missing"].items())
    parts += ["## Peers that are not installed", "\n".join(missing) or "None."]
    return "\n\n".join(parts) + "\n"


def write_page(path: Path, folder: Path) -> None:
    """A results file's FOLDER/STEM.md and, beside it, STEM-PLOT.png."""
    results = load(path)
    timed = [case for case in results["cases"] if "kind" not in case]
    figures = {name: plot({**results, "cases": timed}) for name, plot in PLOTS.items() if timed}
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
    command = commands.add_parser("pocket", help="the table of several runs")
    command.add_argument("metrics", nargs="+")
    args = parser.parse_args(arguments)
    try:
        if args.command == "page":
            write_page(args.results, args.out or args.results.parent)
        elif args.command == "compare":
            text, regressions = compare(load(args.old), load(args.new), args.threshold)
            print("\n".join([text, *([""] * bool(regressions)), *regressions]))
            return int(bool(regressions))
        else:
            print(pocket_table(args.metrics))
    except (OSError, ResultsError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
