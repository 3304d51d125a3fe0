"""The page of the study of budgets: tables with intervals, and scores over bytes and over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench.plots import BLUE, GREEN, GREY, ORANGE, PALE, PURPLE, RED, canvas, log_axis
from bench.provenance import versions_line
from bench.report import table
from btok.files import write_json, write_text
from examples.studies.common import ABOUT, ON_POCKET, draw, said

STEM = "studies-budgets"
FIXED = ("K1", "K2", "K4", "K8", "K16")
OBJECTIVES = ("reconstruction", "both-losses", "warm-up")
TICKS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class Results:
    """The runs of `collected`, asked by variant and view."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.content = content
        self.runs = {(run["variant"], run["seed"]): run for run in content["runs"]}
        self.seeds = sorted({seed for _, seed in self.runs})

    def has(self, variant: str) -> bool:
        return any((variant, seed) in self.runs for seed in self.seeds)

    def views(self, variant: str) -> list[str]:
        """The names of a variant's views; of "auto" those of any seed."""
        found = (self.runs[variant, s]["views"] for s in self.seeds if (variant, s) in self.runs)
        return list(dict.fromkeys(name for views in found for name in views))

    def by_seed(self, variant: str, view: str, what: str = "mean") -> dict[int, float]:
        found = {s: self.runs[variant, s]["views"] for s in self.seeds if (variant, s) in self.runs}
        return {s: float(views[view][what]) for s, views in found.items() if view in views}

    def scores(self, variant: str, view: str) -> list[float]:
        return list(self.by_seed(variant, view).values())

    def bytes(self, variant: str, view: str) -> float:
        return next(iter(self.by_seed(variant, view, "bytes").values()))

    def gaps(self, one: tuple[str, str], other: tuple[str, str]) -> list[float]:
        """Scores of a (variant, view) less those of another with the same seed."""
        ours, theirs = self.by_seed(*one), self.by_seed(*other)
        return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def full(results: Results, variant: str) -> str:
    """The view that a variant would be used by without options."""
    width = results.content["width"]
    number = next(k for k in (16, 8, 4, 2, 1) if f"{k} of {width}" in results.views(variant))
    return f"{number} of {width}"


def cells(values: Sequence[float], sign: str = "") -> str:
    return said(values, sign) if values else "-"


def write_page(folder: Path, content: dict[str, Any]) -> None:
    """`studies-budgets.md`, its picture, and these numbers beside it.

    Raises:
        ValueError: no nested run and none of K = 4 are scored yet.
    """
    names = {name for run in content["runs"] for name in run["views"]}
    widths = [int(name.rpartition(" ")[2]) for name in names if " of " in name]
    content = {**content, "width": max(widths, default=0)}
    results = Results(content)
    if not (results.has("nested") and results.has("K4")):
        raise ValueError(f"folder is {folder}: 'nested' and 'K4' have no scored run yet")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{STEM}.md", page(results))
    write_json(folder / f"{STEM}.json", content)
    picture(results).savefig(folder / f"{STEM}.png", metadata={"Software": None})


def page(results: Results) -> str:
    """The study's Markdown page."""
    content, width = results.content, results.content["width"]
    settings, scored = content["settings"], content["scored"]
    variants = [["variant", "what it is", "options", "seeds"]]
    for name in dict.fromkeys(run["variant"] for run in content["runs"]):
        first = next(run for run in content["runs"] if run["variant"] == name)
        seeds = ", ".join(str(run["seed"]) for run in content["runs"] if run["variant"] == name)
        options = f"`{first['options']}`" if first["options"] else ""
        variants.append([name, first["says"], options, seeds])
    parts = [
        "# One model, many budgets",
        f"- commands: `python examples/studies/budgets.py`, then `score`, then `page FOLDER`\n"
        f"- commit: {settings['commit']} trained, {scored['commit']} scored\n"
        f"- device: {settings['device']}\n{versions_line(settings['versions'])}",
        ON_POCKET.format(**settings),
        ABOUT,
        f"![Scores over bytes and over time]({STEM}.png)",
        table(*variants),
        "## Budgets of bottleneck tokens",
        "One model trained for all (`nested`), asked for the first k of its 16 tokens, beside a "
        "model trained for each k, and the first k tokens of the model trained for 16 alone.",
        nested_table(results),
        "## Components, and integers",
        "The first d components of the embedding of K = 4, trained for (`dims`) and not (`K4`); as "
        "int8 with one calibrated scale.",
        dims_table(results),
    ]
    if results.has("multi"):
        parts += [
            "## Rows as vectors",
            "The first k rows compared by late interaction (MaxSim), beside their mean, of models "
            "trained with half the loss on each.",
            rows_table(results),
        ]
    if any(results.has(name) for name in OBJECTIVES):
        rows = [["objective", "score", "less K4 (next-token prediction)"]]
        view = f"4 of {width}"
        rows.append(["K4: next-token prediction", cells(results.scores("K4", view)), ""])
        for name in OBJECTIVES:
            if results.has(name):
                says = next(r["says"] for r in content["runs"] if r["variant"] == name)
                gaps = cells(results.gaps((name, view), ("K4", view)), "+")
                rows.append([f"{name}: {says}", cells(results.scores(name, view)), gaps])
        parts += ["## Generative objectives", table(*rows)]
    parts += ["## A budget for each input", AUTO, auto_table(results)]
    return "\n\n".join(parts) + "\n"


AUTO = (
    "`auto`: the fewest tokens whose calibrated loss of similarity, for inputs of that kind and "
    "size, is at most the bound; beside it the fixed budgets of the same model. Time is the "
    "encoder's, pictures processed, as a share of its time with all 16 tokens, **measured** in "
    "turns: the median and its 95 % interval."
)


def nested_table(results: Results) -> str:
    width = results.content["width"]
    rows = [
        ["k", "trained for k alone", "nested", "nested - alone", "first k of K16", "nested - that"]
    ]
    for name in FIXED:
        view, ours = f"{name[1:]} of {width}", ("nested", f"{name[1:]} of {width}")
        alone = cells(results.scores(name, view)) if results.has(name) else "-"
        gaps = cells(results.gaps(ours, (name, view)), "+") if results.has(name) else "-"
        cut = ("K16", view)
        rows.append(
            [
                *(name[1:], alone, cells(results.scores(*ours)), gaps),
                *(cells(results.scores(*cut)), cells(results.gaps(ours, cut), "+")),
            ]
        )
    return table(*rows)


def dims_table(results: Results) -> str:
    width = results.content["width"]
    found = sorted({int(view.split()[-1]) for view in results.views("K4") if view[:1].isdigit()})
    rows = [["view", "bytes", "trained for d (`dims`)", "not (`K4`)", "difference", "less all"]]
    for low in ("", "int8 "):
        for d in found:
            view = f"{low}4 of {d}"
            whole = ("dims", f"4 of {width}")
            owners = [name for name in ("dims", "K4") if results.scores(name, view)]
            if not owners:
                continue
            rows.append(
                [f"{low or 'fp32 '}{d}".strip(), f"{results.bytes(owners[0], view):.0f}"]
                + [cells(results.scores(name, view)) for name in ("dims", "K4")]
                + [cells(results.gaps(("dims", view), ("K4", view)), "+")]
                + [cells(results.gaps(("dims", view), whole), "+")]
            )
    return table(*rows)


def rows_table(results: Results) -> str:
    width = results.content["width"]
    names = [name for name in ("multi", "all") if results.has(name)]
    rows = [
        ["model", "k", "bytes fp32", "mean of the rows", "rows, MaxSim", "difference", "rows, int8"]
    ]
    for name in names:
        for fixed in FIXED:
            k = fixed[1:]
            dense, late = f"{k} of {width}", f"rows {k} of {width}"
            low = f"int8 {late}"
            if late not in results.views(name):
                continue
            rows.append(
                [name, k, f"{results.bytes(name, late):.0f}"]
                + [cells(results.scores(name, view)) for view in (dense, late)]
                + [cells(results.gaps((name, late), (name, dense)), "+")]
                + [cells(results.scores(name, low))]
            )
    return table(*rows)


def auto_table(results: Results) -> str:
    content, width = results.content, results.content["width"]
    timed = (content["times"] or {}).get("times", {})
    head = ["budget", "tokens, mean", "score", "less all 16", "time", "ms an input"]
    rows = [[*head, "cheapest fixed budget of no lower mean score"]]
    views = [f"{name[1:]} of {width}" for name in FIXED]
    views += [view for view in results.views("nested") if view.startswith("auto")]
    for view in views:
        auto = view.startswith("auto")
        name = view if auto else view.split()[0]
        took = timed.get(name)
        tokens = results.by_seed("nested", view, "tokens") if auto else {}
        mean = f"{np.mean(list(tokens.values())):.1f}" if auto else name
        share = ["-", "-"]
        if took:
            low, high = took["interval"]
            share = [f"{took['ratio']:.2f} [{low:.2f}, {high:.2f}]", f"{took['ms'][1]:.2f}"]
        gaps = cells(results.gaps(("nested", view), ("nested", f"16 of {width}")), "+")
        rows.append([name, mean, cells(results.scores("nested", view)), gaps, *share])
        rows[-1].append(cheapest(results, view, timed) if auto else "")
    return table(*rows)


def cheapest(results: Results, view: str, timed: Mapping[str, Any]) -> str:
    """The fixed budget of the nested model that takes least time for as high a mean score."""
    score = np.mean(results.scores("nested", view))
    fixed = [k[1:] for k in FIXED if k[1:] in timed]
    as_good = [
        k
        for k in fixed
        if np.mean(results.scores("nested", f"{k} of {results.content['width']}")) >= score
    ]
    if not as_good:
        return "none"
    best = min(as_good, key=lambda k: timed[k]["ratio"])
    return f"{best}, time {timed[best]['ratio']:.2f}"


def picture(results: Results) -> Figure:
    """Scores over an item's bytes, and over the encoder's time."""
    width = results.content["width"]
    figure = canvas(4.6)
    left, right = figure.subplots(1, 2, sharey=True)
    series = {
        "K4 cut, not trained for": ("K4", lambda v: v.startswith("4 of "), GREY),
        "dims, fp32": ("dims", lambda v: v.startswith("4 of "), BLUE),
        "dims, int8": ("dims", lambda v: v.startswith("int8 4"), GREEN),
        "rows, MaxSim": ("multi", lambda v: v.startswith("rows") and v.endswith(f" {width}"), RED),
        "rows, MaxSim, int8": (
            "multi",
            lambda v: v.startswith("int8 rows") and v.endswith(f" {width}"),
            ORANGE,
        ),
    }
    shown: list[float] = []
    for label, (variant, wanted, colour) in series.items():
        if not results.has(variant):
            continue
        sizes = {v: results.bytes(variant, v) for v in results.views(variant) if wanted(v)}
        views = sorted(sizes, key=lambda view: sizes[view])
        x = [sizes[view] for view in views]
        draw(left, x, [results.scores(variant, view) for view in views], label, colour)
        shown += x
    log_axis(left, "x", TICKS, shown or [1, 2])
    left.set(xlabel="bytes an item", ylabel="score, mean of nine tasks (%)")
    timed = (results.content["times"] or {}).get("times", {})
    names = [name for name in (k[1:] for k in FIXED) if name in timed]
    auto = [name for name in timed if name.startswith("auto")]
    for label, some, owner, colour in (
        ("a model for each k", names, "", GREY),
        ("nested, first k", names, "nested", BLUE),
        ("nested, auto", auto, "nested", PURPLE),
    ):
        views = [name if name in auto else f"{name} of {width}" for name in some]
        owners = [owner or f"K{name}" for name in some]
        pairs = list(zip(owners, views, some, strict=True))
        pairs = [pair for pair in pairs if results.has(pair[0]) and results.scores(*pair[:2])]
        pairs.sort(key=lambda pair: timed[pair[2]]["ratio"])
        draw(
            right,
            [timed[name]["ratio"] for _, _, name in pairs],
            [results.scores(owner, view) for owner, view, _ in pairs],
            label,
            colour,
        )
    right.set(xlabel="time of the encoder, as a share of that with 16 tokens")
    for axes in (left, right):
        axes.grid(color=PALE)
        axes.set_axisbelow(True)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, loc="lower right")
    return figure
