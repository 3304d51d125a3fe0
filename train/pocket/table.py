"""The scores of several runs of the pocket benchmark, their `metrics.json`, as a Markdown table:

python train/pocket/table.py bench/results/pocket-seed*.json
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def table(files: Sequence[Path]) -> str:
    """A column per run, and their mean.

    Raises:
        OSError, ValueError: a file that cannot be read, or is no `metrics.json` of the pocket
            benchmark; runs that were scored on different data or tasks.
    """
    runs = [_run(file) for file in files]
    if len({run["data_digest"] for run in runs}) != 1:
        raise ValueError("the runs were scored on different data")
    if any(run["tasks"].keys() != runs[0]["tasks"].keys() for run in runs):
        raise ValueError("the runs were scored on different tasks")
    seeds = [f"seed {run['settings']['seed']}" for run in runs]
    header = ["task", "metric", "chance", "floor", *seeds, "mean", "hard only"]
    lines, figures = [header, ["--"] * len(header)], []
    for name, row in runs[0]["tasks"].items():
        scores = [run["tasks"][name]["score"] for run in runs]
        hard = [run["tasks"][name]["hard_only"] for run in runs]
        figures.append([row["chance"], row["floor"], *scores, np.mean(scores), np.mean(hard)])
        lines.append([name, row["metric"], *(f"{x:.1f}" for x in figures[-1])])
    lines.append(["**mean**", "", *(f"**{x:.1f}**" for x in np.mean(figures, axis=0))])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _run(file: Path) -> dict[str, Any]:
    """The content of a `metrics.json`, with all that the table shows of it."""

    def held(holder: Any, name: str, kind: type) -> Any:
        if not isinstance(holder, dict) or name not in holder:
            raise ValueError(f"{file} has no {name}, {expected}")
        found = holder[name]
        # true and false are no numbers here
        if type(found) is not kind and not (kind is float and type(found) is int):
            raise ValueError(f"{file}: {name} is {found!r:.40}, {expected}")
        return found

    expected = "expected the metrics.json of a run of the pocket benchmark"
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, no JSON, thousands of brackets
        raise ValueError(f"{file} is no JSON ({error}), {expected}") from error
    held(run, "data_digest", str)
    held(held(run, "settings", dict), "seed", int)
    tasks = held(run, "tasks", dict)
    for task in tasks:
        row = held(tasks, task, dict)
        held(row, "metric", str)
        for name in ("chance", "floor", "score", "hard_only"):
            held(row, name, float)
    if not tasks:
        raise ValueError(f"{file} has no tasks, {expected}")
    return run


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 2 for files that make no table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("metrics", nargs="+", type=Path)
    try:
        print(table(parser.parse_args(argv).metrics))
    except (OSError, ValueError) as error:
        print(f"table: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
