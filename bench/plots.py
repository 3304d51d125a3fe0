"""The benchmark report's plots."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from bench.report import Results, groups

BLUE, ORANGE, GREEN = (0.20, 0.40, 0.65), (0.93, 0.50, 0.15), (0.10, 0.60, 0.25)
PURPLE, BROWN, RED = (0.55, 0.30, 0.65), (0.55, 0.36, 0.20), (0.80, 0.20, 0.30)
TEAL, GREY = (0.25, 0.65, 0.70), (0.45, 0.45, 0.45)
PALE = (0.94, 0.94, 0.94)
COLOURS = (BLUE, ORANGE, BROWN, GREEN, PURPLE, TEAL, RED, GREY)
# between the sides on which cases that follow each other, as they often lie together, have numbers
GOLDEN_ANGLE = math.pi * (3 - math.sqrt(5))
ONE_TWO_FIVE = np.outer(10.0 ** np.arange(-6, 10), (1, 2, 5)).ravel()


def canvas(height: float) -> Figure:
    """An empty figure, nine inches wide."""
    figure = Figure(figsize=(9, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def log_axis(axes: Axes, name: str, ticks: Iterable[float], values: Iterable[float]) -> None:
    """Axis "x" or "y" with all values in view, and the ticks among them as plain numbers."""
    values = list(values)
    low, high = min(values) / 1.08, max(values) * 1.08
    shown = [float(tick) for tick in ticks if low <= tick <= high]
    axes.set(**{f"{name}scale": "log", f"{name}lim": (low, high)})
    axis = getattr(axes, f"{name}axis")
    axis.set_ticks(shown, [f"{tick:g}" for tick in shown])
    axis.set_minor_locator(NullLocator())


def ratio_axis(axes: Axes, name: str, values: Iterable[float]) -> None:
    """Axis "x" or "y" of ratios, all values and 1 in view, and ticks as plain numbers."""
    values = [1.0, *values]
    span = max(values) - min(values)
    close = max(values) < 4 * min(values)
    step = next((step for step in (0.02, 0.05, 0.1, 0.2, 0.5) if span <= 8 * step), 1)
    log_axis(axes, name, step * np.arange(1, 200) if close else ONE_TWO_FIVE, values)


def colours(results: Results) -> dict[str, Any]:
    """The colour of each bench, the same in every picture."""
    benches = [bench for (bench,) in groups(results["cases"], "bench")]
    return dict(zip(benches, cycle(COLOURS)))


def roofline_plot(results: Results) -> Figure | None:
    """Operations a second over operations per byte: a number per case, under the roofs."""
    cases = groups((c for c in results["cases"] if c["flops"]), "bench", "case")
    if not cases:
        return None
    points, colour_of = [], colours(results)
    for (bench, _case), contests in cases.items():
        flops, moved = contests[0]["flops"], contests[0]["bytes"]
        second = statistics.median(contest["seconds"][1] for contest in contests)
        points.append((flops / moved, flops / second, colour_of[bench]))
    roofs = results["roofs"].items()
    across = [*(roof["flops"] / roof["bytes"] for _, roof in roofs), *(x for x, _, _ in points)]
    x = np.geomspace(min(across) / 3, max(across) * 3, 200)
    figure = canvas(6 + 0.15 * math.ceil(len(points) / 2))
    axes = figure.add_subplot(xlabel="operations per byte", ylabel="operations per second")
    for (dtype, roof), style in zip(roofs, cycle(("-", "--", ":", "-."))):
        label = f"{dtype}: {roof['flops'] / 1e9:,.0f} GFLOP/s, {roof['bytes'] / 1e9:,.0f} GB/s"
        axes.plot(x, np.minimum(roof["flops"], roof["bytes"] * x), f"k{style}", lw=1, label=label)
    lines = axes.get_legend_handles_labels()
    keys = []
    where: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "center"}
    for i, (names, (x, y, colour)) in enumerate(zip(cases, points, strict=True), 1):
        label, angle = f"{i}  {': '.join(names)}", i * GOLDEN_ANGLE
        keys += axes.plot(x, y, "o", ms=4, color=colour, label=label)
        aside = 11 * math.cos(angle), 9 * math.sin(angle)
        axes.annotate(str(i), (x, y), aside, color=colour, fontsize=7, **where)
    highest = max(roof["flops"] for _, roof in roofs)
    axes.set(xscale="log", yscale="log", ylim=(None, 4 * highest))
    axes.legend(*lines, loc="upper left", fontsize=8)  # above the roof, where nothing lies
    figure.legend(handles=keys, loc="outside lower left", fontsize=7, ncols=2, frameon=False)
    return figure


def contests_plot(results: Results) -> Figure:
    """Two bars per contest: the peer's time over ours, and the peak of its memory over ours."""
    benches, colour_of = groups(results["cases"], "bench"), colours(results)
    figure = canvas(0.8 + 0.17 * (len(results["cases"]) + 2 * len(benches)))
    time, memory = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    names, shown, y = {}, {time: [1.0], memory: [1.0]}, 0
    for (bench,), cases in benches.items():
        names[y] = bench
        for case in cases:
            y += 1
            names[y] = f"{case['case']}, {case['peer']}"
            low, high = case["quartiles"]
            bars = {time: [1 / high, 1 / case["ratio"], 1 / low]}
            if case["memory"] and case["peer_memory"]:
                bars[memory] = [case["peer_memory"] / case["memory"]]
            for axes, factor in bars.items():
                middle = factor[len(factor) // 2]
                axes.barh(y, middle - 1, 0.72, left=1, color=colour_of[bench])
                axes.plot([factor[0], factor[-1]], [y, y], color="black", lw=1)
                place = axes.get_yaxis_transform()
                axes.text(1.01, y, f"{middle:.2f}", transform=place, va="center", fontsize=7)
                shown[axes] += factor
        y += 2
    for axes, what in ((time, "time, with quartiles"), (memory, "peak memory")):
        axes.set_title(f"the peer's over ours: {what}", fontsize=9)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color=PALE)
        axes.axvline(1, color="black", lw=0.8)
        axes.set_axisbelow(True)
        ratio_axis(axes, "x", shown[axes])
    time.set_yticks(list(names), list(names.values()), fontsize=7)
    for label in time.get_yticklabels():
        label.set_fontweight("bold" if (label.get_text(),) in benches else "normal")
    time.set_ylim(y - 1, -1)
    return figure


PLOTS = {"roofline": roofline_plot, "contests": contests_plot}
