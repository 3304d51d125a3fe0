"""The page of the nested model on real text pairs, beside the grid's model for each number K.

    python examples/smollm2/study.py run wordnet | debian nested --rate 1e-3 --weight 0.2 \
        --seed 0 | 1 | 2 --results FOLDER
    python examples/smollm2/budgets.py [FOLDER]

Makes FOLDER.md and its picture of the files in FOLDER, by default bench/results/smollm2-budgets;
those of a model for each K are in `smollm2` beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench.plots import BLUE, GREEN, GREY, ORANGE, PALE, canvas, log_axis
from bench.report import table
from btok.files import write_text
from examples.smollm2.runs import read
from examples.studies.common import draw, said
from examples.studies.provenance import facts

RUNS = Path(__file__).resolve().parents[2] / "bench" / "results" / "smollm2-budgets"
SETS = {"wordnet": "a WordNet gloss -> its words", "debian": "a summary -> its description"}
FIXED = {1: "K1", 2: "K2", 4: "full", 8: "K8", 16: "K16"}  # the grid's names
TICKS = (36, 72, 144, 288, 576, 1152, 2304)
Scores = dict[int, float]  # by seed


def nested(folder: Path, name: str) -> dict[int, Mapping[str, Any]]:
    """The nested runs of a set of pairs, by seed."""
    files = sorted(folder.glob(f"{name}-nested-seed*.json"))
    return {run["seed"]: run for run in map(read, files)}


def alone(folder: Path, name: str, k: int) -> Scores:
    """The mean reciprocal rank of models trained for k alone, by seed."""
    files = sorted((folder.parent / "smollm2").glob(f"{name}-{FIXED[k]}-seed*.json"))
    return {run["seed"]: run["scores"][name]["raw"]["mrr"] for run in map(read, files)}


def of(runs: Mapping[int, Mapping[str, Any]], view: str, what: str = "mrr") -> Scores:
    """A measure of one view of some runs, by seed."""
    return {seed: run["views"][view][what] for seed, run in runs.items()}


def less(ours: Scores, theirs: Scores) -> str:
    both = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return said(both, "+") if both else "-"


def page(folder: Path) -> str:
    """The page of a folder's runs; a ValueError where there are none."""
    found = {name: nested(folder, name) for name in SETS}
    found = {name: runs for name, runs in found.items() if runs}
    if not found:
        raise ValueError(f"{folder} has no nested runs")
    first = next(iter(next(iter(found.values())).values()))
    settings = first["settings"]
    parts = [
        "# One nested model on real text pairs",
        "**Measured**: mean reciprocal ranks, in percent, of the right answer among 1,000 held-out "
        "ones. SmolLM2-135M with adapters, trained for 60 steps of 16 pairs (far from convergence) "
        "with K = 16 tokens to embed with the first 1, 2, 4, 8 and all of them and in the first "
        "36, 72, 144, 288 and all 576 components, 25 losses of equal share; beside it the study's "
        "models, each trained for one K with all components. The same rate, weight, batches and "
        "seeds. Means over seeds with the 95 % interval of Student's t; differences by seed, in "
        "bold without 0. The models for one K are of another day's code and machine.",
        f"- command: `python examples/smollm2/budgets.py`\n{facts(settings)}",
        f"![Scores over bytes and tokens]({folder.name}.png)",
    ]
    for name, runs in found.items():
        views = next(iter(runs.values()))["views"]
        whole = of(runs, "16 of 576")
        rows = [["k", "trained for k alone", "nested", "nested - alone", "less all 16"]]
        for k in FIXED:
            ours, theirs = of(runs, f"{k} of 576"), alone(folder, name, k)
            same = [theirs[seed] for seed in ours if seed in theirs]
            rows.append([str(k), said(same) if same else "-", said([*ours.values()])])
            rows[-1] += [less(ours, theirs), less(ours, whole)]
        cut = [["components, of all 16 tokens", "bytes", "score", "less all in fp32"]]
        for view in views:
            if view.startswith(("16 of", "int8")):
                low, d = view.startswith("int8"), view.split()[-1]
                scores = of(runs, view)
                size = f"{views[view]['bytes']:.0f}"
                cut.append([f"{'int8' if low else 'fp32'} {d}", size, said([*scores.values()])])
                cut[-1].append(less(scores, whole))
        auto = [["budget", "tokens, mean", "score", "less all 16"]]
        for view in views:
            if view.startswith("auto"):
                tokens, scores = of(runs, view, "tokens"), of(runs, view)
                mean = f"{np.mean([*tokens.values()]):.1f}"
                auto.append([view, mean, said([*scores.values()]), less(scores, whole)])
        seeds = ", ".join(map(str, runs))
        parts += [f"## {SETS[name]} (seeds {seeds})", table(*rows), table(*cut), table(*auto)]
    return "\n\n".join(parts) + "\n"


def picture(folder: Path) -> Figure:
    """The plot of the study: for each set scores over bytes an item, and over tokens."""
    figure = canvas(3.6 * len(SETS))
    panels = figure.subplots(len(SETS), 2, squeeze=False, sharey="row")
    for (left, right), (name, says) in zip(panels, SETS.items(), strict=True):
        runs = nested(folder, name)
        if not runs:
            left.set_visible(False)
            right.set_visible(False)
            continue
        views = next(iter(runs.values()))["views"]
        for label, start, colour in (("fp32", "16 of", BLUE), ("int8", "int8 16", GREEN)):
            some = [view for view in views if view.startswith(start)]
            sizes = [views[view]["bytes"] for view in some]
            draw(left, sizes, [[*of(runs, view).values()] for view in some], label, colour)
        log_axis(left, "x", TICKS, TICKS)
        left.set(xlabel="bytes an item", ylabel="mean reciprocal rank (%)", title=says)
        each = [[*alone(folder, name, k).values()] for k in FIXED]
        draw(right, FIXED, each, "a model for each K", GREY)
        first = [[*of(runs, f"{k} of 576").values()] for k in FIXED]
        draw(right, FIXED, first, "nested, first k", BLUE)
        auto = [view for view in views if view.startswith("auto")]
        tokens = [float(np.mean([*of(runs, v, "tokens").values()])) for v in auto]
        scores = [[*of(runs, v).values()] for v in auto]
        draw(right, tokens, scores, "nested, auto", ORANGE)
        log_axis(right, "x", FIXED, FIXED)
        right.set(xlabel="tokens an input, mean")
        for axes in (left, right):
            axes.grid(color=PALE)
            axes.set_axisbelow(True)
            axes.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    runs = Path(sys.argv[1]) if len(sys.argv) > 1 else RUNS
    write_text(runs.with_suffix(".md"), page(runs))
    picture(runs).savefig(runs.with_suffix(".png"), metadata={"Software": None})
