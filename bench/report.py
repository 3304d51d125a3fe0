"""The README's picture and table.

python bench/report.py mask docs/mask.png
python bench/report.py pocket bench/results/pocket-seed*.json     the `metrics.json` of some runs
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN = (0.20, 0.40, 0.65), (0.93, 0.50, 0.15), (0.10, 0.60, 0.25)
PALE = (0.94, 0.94, 0.94)


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


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["mask", path]:
            mask_picture(path)
        case ["pocket", *files] if files:
            print(pocket_table(files))
        case _:
            sys.exit(f"usage:{__doc__.partition('.')[2]}")
