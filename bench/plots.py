"""The benchmark report's plots, of a results file that `bench.report.load` has checked."""

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
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator
from matplotlib.transforms import Bbox

BLUE, ORANGE, GREEN = (0.20, 0.40, 0.65), (0.93, 0.50, 0.15), (0.10, 0.60, 0.25)
PURPLE, BROWN, RED = (0.55, 0.30, 0.65), (0.55, 0.36, 0.20), (0.80, 0.20, 0.30)
TEAL, GREY = (0.25, 0.65, 0.70), (0.45, 0.45, 0.45)
PALE = (0.94, 0.94, 0.94)
BENCHES = {  # in the order of the page
    "condensed attention": BLUE,
    "contrastive loss": ORANGE,
    "inference": GREEN,
    "training step": PURPLE,
    "corpus encoding": BROWN,
    "late interaction": TEAL,
    "launching": RED,
}
PEERS = (ORANGE, GREEN, PURPLE, BROWN, RED, TEAL, GREY)
ONE_TWO_FIVE = np.outer(10.0 ** np.arange(-6, 10), (1, 2, 5)).ravel()
Case = dict[str, Any]
Results = dict[str, Any]
Colour = tuple[float, float, float]


def groups(cases: Iterable[Case], *keys: str) -> dict[tuple[str, ...], list[Case]]:
    """Cases by some fields' values, in the order of first appearance."""
    found: dict[tuple[str, ...], list[Case]] = {}
    for case in cases:
        found.setdefault(tuple(case.get(key, "") for key in keys), []).append(case)
    return found


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
    """The same for ratios, with 1 in view."""
    values = [1.0, *values]
    span = max(values) - min(values)
    close = max(values) < 4 * min(values)
    step = next((step for step in (0.02, 0.05, 0.1, 0.2, 0.5) if span <= 8 * step), 1)
    log_axis(axes, name, step * np.arange(1, 200) if close else ONE_TWO_FIVE, values)


def speed_ups(case: Case) -> list[float]:
    """Lower quartile, median, upper quartile."""
    low, high = case["quartiles"]
    return [1 / high, 1 / case["ratio"], 1 / low]


def factor_bar(axes: Axes, y: float, factors: list[float], colour: Colour) -> None:
    """From 1 to a factor, which is written at the right: alone, or between its quartiles."""
    factor = factors[len(factors) // 2]
    axes.barh(y, factor - 1, 0.72, left=1, color=colour)
    axes.plot([factors[0], factors[-1]], [y, y], color="black", lw=1)
    place = axes.get_yaxis_transform()
    axes.text(1.01, y, f"{factor:.2f}", transform=place, va="center", fontsize=7)


def roofline_plot(results: Results) -> Figure | None:
    """Operations a second over operations per byte: a number per case, under the roofs."""
    cases = groups((c for c in results["cases"] if c["flops"]), "bench", "case")
    points, dots = [], []
    for i, ((bench, case), contests) in enumerate(cases.items(), 1):
        flops, moved = contests[0]["flops"], contests[0]["bytes"]
        second = statistics.median(contest["seconds"][1] for contest in contests)
        colour, label = BENCHES.get(bench, GREY), f"{i}  {bench}: {case}"
        dots.append(Line2D([], [], marker="o", ms=4, ls="", color=colour, label=label))
        points.append((flops / moved, flops / second, colour))
    if not points:
        return None
    figure = canvas(6 + 0.15 * math.ceil(len(points) / 2))
    axes = figure.add_subplot(xlabel="operations per byte", ylabel="operations per second")
    axes.set(xscale="log", yscale="log")
    corners = [roof["flops"] / roof["bytes"] for roof in results["roofs"].values()]
    across = [*corners, *(x for x, _, _ in points)]
    x = np.geomspace(min(across) / 3, max(across) * 3, 200)
    for (dtype, roof), style in zip(results["roofs"].items(), cycle(("-", "--", ":", "-."))):
        label = f"{dtype}: {roof['flops'] / 1e9:,.0f} GFLOP/s, {roof['bytes'] / 1e9:,.0f} GB/s"
        highest = np.minimum(roof["flops"], roof["bytes"] * x)
        axes.plot(x, highest, style, color="black", lw=1, label=label)
    for *at, colour in points:
        axes.plot(*at, marker="o", ms=4, ls="", color=colour)
    axes.set_ylim(top=4 * max(roof["flops"] for roof in results["roofs"].values()))
    axes.legend(loc="upper left", fontsize=8)  # above the roof, where nothing lies
    figure.legend(handles=dots, loc="outside lower left", fontsize=7, ncols=2, frameon=False)
    number_points(figure, axes, points)
    return figure


def number_points(figure: Figure, axes: Axes, points: list[tuple[float, float, Colour]]) -> None:
    """Write each point's number at the nearest place that no other point or number takes."""
    figure.draw_without_rendering()  # lays out, so that data have a place in pixels
    figure.set_layout_engine("none")
    centres = axes.transData.transform([(x, y) for x, y, _ in points])
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in centres]
    for i, (x, y) in enumerate(centres):
        width = 6 + 8 * len(str(i + 1))
        for step in range(400):
            radius, angle = 13 + 6 * (step // 16), math.pi * step / 8
            dx, dy = radius * math.cos(angle), radius * math.sin(angle)
            box = Bbox.from_bounds(x + dx - width / 2, y + dy - 6, width, 12)
            inside = all(axes.bbox.fully_contains(*corner) for corner in (box.min, box.max))
            if inside and not box.count_overlaps(taken):
                break
        taken.append(box)
        axes.annotate(
            str(i + 1),
            points[i][:2],
            (72 / figure.dpi * dx, 72 / figure.dpi * dy),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=7,
            color=points[i][2],
            arrowprops={"arrowstyle": "-", "color": GREY, "lw": 0.5, "shrinkA": 1, "shrinkB": 2},
        )


def speedup_plot(results: Results) -> Figure:
    """A bar per contest."""
    benches = groups(results["cases"], "bench")
    figure = canvas(0.8 + 0.17 * (len(results["cases"]) + 2 * len(benches)))
    axes = figure.add_subplot(title="speed-up: the peer's time over ours, with quartiles")
    names, y = {}, 0
    for (bench,), cases in benches.items():
        names[y] = bench
        for case in cases:
            y += 1
            names[y] = f"{case['case']}, {case['peer']}"
            factor_bar(axes, y, speed_ups(case), BENCHES.get(bench, GREY))
        y += 2
    axes.set_yticks(list(names), list(names.values()), fontsize=7)
    for label in axes.get_yticklabels():
        label.set_fontweight("bold" if (label.get_text(),) in benches else "normal")
    ratio_axis(axes, "x", (x for case in results["cases"] for x in speed_ups(case)))
    axes.set(ylim=(y - 1, -1), axisbelow=True)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=PALE)
    axes.axvline(1, color="black", lw=0.8)
    return figure


def memory_plot(results: Results) -> Figure | None:
    """A panel per bench and direction: bars by case, each with its owner's name behind it."""
    benches = ("condensed attention", "contrastive loss", "training step")
    kept = [
        c for c in results["cases"] if c["bench"] in benches and c["memory"] and c["peer_memory"]
    ]
    panels = {names: memories(cases) for names, cases in groups(kept, "bench", "direction").items()}
    if not panels:
        return None
    heights = [
        0.9 + 0.15 * sum(len(each) + 1 for each in found.values()) for found in panels.values()
    ]
    figure = canvas(sum(heights))
    rows = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (names, found) in zip(rows, panels.items(), strict=True):
        memory_bars(axes, found)
        axes.set(title="peak memory: " + ", ".join(filter(None, names)), axisbelow=True)
        axes.grid(color=PALE)
    return figure


def memories(cases: list[Case]) -> dict[str, dict[str, float]]:
    """MiB by case and by who takes it; ours, which comes first, is the median over peers."""
    found = {}
    for (case,), contests in groups(cases, "case").items():
        ours = statistics.median(contest["memory"] for contest in contests)
        peers = {contest["peer"]: contest["peer_memory"] for contest in contests}
        found[case] = {who: size / 2**20 for who, size in {"ours": ours, **peers}.items()}
    return found


def memory_bars(axes: Axes, found: dict[str, dict[str, float]]) -> None:
    """Of what `memories` gives."""
    ticks, y = {}, 0
    for case, each in found.items():
        ticks[y + (len(each) - 1) / 2] = case
        for who, size in each.items():
            axes.barh(y, size, 0.9, color=BLUE if who == "ours" else ORANGE)
            axes.annotate(f" {size:.4g}  {who}", (size, y), va="center", fontsize=6)
            y += 1
        y += 1
    sizes = [size for each in found.values() for size in each.values()]
    low, high = min(sizes) / 2, max(sizes)
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=7)
    axes.set(xlabel="MiB", ylim=(y - 1, -1))
    log_axis(axes, "x", ONE_TWO_FIVE, (low, high * (high / low) ** 0.5))  # room for the names


def overhead_plot(results: Results) -> Figure | None:
    """Inference of one input: the ratio over its length, and over K, with its 95 % interval."""
    single = [c for c in results["cases"] if c["bench"] == "inference" and len(c["lengths"]) == 1]
    last = [c for c in single if c["lengths"] == [512] and c["peer"] == "packed last token"]
    panels = {
        "input tokens, K = 4": [(c["lengths"][0], c) for c in single if c["num_btoks"] == 4],
    }
    if len(last) > 1:
        panels["bottleneck tokens K, 512 input tokens"] = [(c["num_btoks"], c) for c in last]
    panels = {name: points for name, points in panels.items() if points}
    if not panels:
        return None
    colours = dict(zip((peer for (peer,) in groups(single, "peer")), cycle(PEERS)))
    figure = canvas(4.2)
    row = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (name, points) in zip(row, panels.items(), strict=True):
        points.sort(key=lambda point: point[0])
        for peer, colour in colours.items():
            x = [size for size, case in points if case["peer"] == peer]
            line = [case for _, case in points if case["peer"] == peer]
            bounds = np.array([case["interval"] for case in line]).reshape(-1, 2)
            axes.fill_between(x, *bounds.T, color=colour, alpha=0.2, lw=0)
            axes.plot(x, [case["ratio"] for case in line], "o-", ms=4, color=colour)
            predicted = [case["predicted"] or math.nan for case in line]
            axes.plot(x, predicted, "--", lw=1, color=colour)
        sizes = sorted({size for size, _ in points})
        log_axis(axes, "x", sizes, sizes)
        axes.axhline(1, color="black", lw=0.8)
        axes.set_xlabel(name)
    shown = [case for points in panels.values() for _, case in points]
    ratio_axis(row[0], "y", (x for c in shown for x in (*c["interval"], c["predicted"] or 1)))
    row[0].set_ylabel("our time over the peer's")
    keys = [Line2D([], [], marker="o", ms=4, color=c, label=peer) for peer, c in colours.items()]
    keys.append(Line2D([], [], ls="--", lw=1, color="black", label="predicted"))
    figure.legend(handles=keys, loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    return figure


def levers_plot(results: Results) -> Figure | None:
    """The training step: each peer's time and memory over ours, baselines before levers."""
    cases = [case for case in results["cases"] if case["bench"] == "training step"]
    if not cases:
        return None
    cases.sort(key=lambda case: case["peer"].startswith("without "))
    figure = canvas(1.3 + 0.25 * len(cases))
    time, memory = figure.subplots(1, 2, sharey=True)
    sizes = []
    for y, case in enumerate(cases):
        colour = BLUE if case["peer"].startswith("without ") else ORANGE
        factor_bar(time, y, speed_ups(case), colour)
        if case["memory"] and case["peer_memory"]:
            sizes.append(case["peer_memory"] / case["memory"])
            factor_bar(memory, y, sizes[-1:], colour)
    ratio_axis(time, "x", (x for case in cases for x in speed_ups(case)))
    ratio_axis(memory, "x", sizes)
    for axes, what in ((time, "time"), (memory, "peak memory")):
        axes.set(title=f"{what}: the peer's over ours", axisbelow=True)
        axes.axvline(1, color="black", lw=0.8)
        axes.grid(axis="x", color=PALE)
    names = [f"{case['case']}, {case['peer']}" for case in cases]
    time.set_yticks(range(len(cases)), names, fontsize=8)
    time.set_ylim(len(cases) - 0.4, -0.6)
    return figure


PLOTS = {
    "roofline": roofline_plot,
    "speedup": speedup_plot,
    "memory": memory_plot,
    "overhead": overhead_plot,
    "levers": levers_plot,
}
