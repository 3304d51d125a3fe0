"""The scores of several runs of the pocket benchmark as one Markdown table:

python train/pocket/table.py bench/results/pocket-seed*.json      the `metrics.json` of some runs
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def table(files: Sequence[Path]) -> str:
    """A column per run, and their mean.

    Raises:
        ValueError: runs that were scored on different data.
    """
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    if len({run["data_digest"] for run in runs}) != 1:
        raise ValueError("the runs were scored on different data")
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


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 2 for files that make no table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("metrics", nargs="+", type=Path)
    try:
        print(table(parser.parse_args(argv).metrics))
    except (OSError, ValueError, LookupError) as error:
        print(f"table: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
