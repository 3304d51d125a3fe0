"""The drawings of README and docs: `python docs/drawings.py [FOLDER]`.

Masks and bounds are those of `CondensedLayout`, so that a drawing shows what the kernels do.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from btok.kernels import CondensedLayout
from btok.tools.pictures import BLUE, GREEN, ORANGE

PALE, GREY = (0.93, 0.93, 0.93), (0.45, 0.45, 0.45)
LIGHT = (0.97, 0.76, 0.56)  # orange that waits
X, B, T = 6, 3, 5  # rows of the drawn sequence


def canvas(width: float, height: float, *widths: float) -> tuple[Figure, list[Any]]:
    """A figure of so many inches, and its panels, of these relative widths, without axes."""
    figure = Figure(figsize=(width, height), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1)
    panels = figure.subplots(1, len(widths) or 1, width_ratios=widths or None, squeeze=False)[0]
    for panel in panels:
        panel.set_axis_off()
    return figure, list(panels)


def box(
    panel: Any, x: float, y: float, width: float, height: float, text: str, colour: Any, **more: Any
) -> None:
    """A filled box with a text in it."""
    style = {"boxstyle": "round,pad=0,rounding_size=0.08", "linewidth": 0, "facecolor": colour}
    panel.add_patch(FancyBboxPatch((x, y), width, height, **style))
    look = {"color": "white", "fontsize": 10, "fontweight": "bold"} | more
    panel.text(x + width / 2, y + height / 2, text, ha="center", va="center", **look)


def arrow(
    panel: Any, start: Any, end: Any, colour: Any = GREY, bend: float = 0.0, line: str = "solid"
) -> None:
    """From one place to another, bent to one side."""
    look = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.8, "mutation_scale": 14}
    look |= {"linestyle": line}
    look |= {"connectionstyle": f"arc3,rad={bend}", "shrinkA": 2, "shrinkB": 2}
    panel.annotate("", end, start, arrowprops=look)


def tokens(panel: Any, x: float, y: float, counts: tuple[int, int, int], size: float = 1) -> float:
    """A row of boxes x1.., B1.., T1..; where it ends."""
    for name, count, colour in zip("xBT", counts, (BLUE, ORANGE, GREEN), strict=True):
        for i in range(count):
            box(panel, x, y, 0.88 * size, 0.88 * size, f"{name}{i + 1}", colour, fontsize=9 * size)
            x += size
    return x


def matrix(panel: Any, condense: bool, title: str) -> None:
    """Which keys each row of [x ; B ; T] sees."""
    layout = CondensedLayout.from_lengths([X], [T], B, condense=condense)
    names = [f"{n}{i + 1}" for n, c in (("x", X), ("B", B), ("T", T)) for i in range(c)]
    colours = [BLUE] * X + [ORANGE] * B + [GREEN] * T
    cells = np.full((len(names), len(names), 3), PALE)
    for row, first in enumerate(layout.row_first.tolist()):
        cells[row, first : row + 1] = colours[first : row + 1]
    panel.set_axis_on()
    panel.pcolormesh(cells, edgecolors="white", lw=1.5)
    panel.set(aspect="equal", ylim=(len(names), 0), xlabel="key", ylabel="row (query)")
    panel.set_xticks(np.arange(len(names)) + 0.5, names, fontsize=9)
    panel.set_yticks(np.arange(len(names)) + 0.5, names, fontsize=9)
    panel.tick_params(length=0, labeltop=True, labelbottom=False)
    ticks = [*panel.get_xticklabels(), *panel.get_yticklabels()]
    for label, colour in zip(ticks, colours * 2, strict=True):
        label.set(color=colour, fontweight="bold")
    panel.xaxis.set_label_position("top")
    panel.set_title(title, fontsize=11, pad=10)
    panel.spines[:].set_visible(False)


def mask() -> Figure:
    """What passes through the bottleneck tokens, and the mask that has it so."""
    figure, (flow, right) = canvas(12.6, 5.0, 1.5, 1)
    end, b, t = X + B + T, X + B / 2, X + B + T / 2
    flow.set(xlim=(-0.3, end + 0.7), ylim=(-3.2, 6.1), aspect="equal")
    tokens(flow, 0, 0, (X, B, T))
    said = {"ha": "center", "fontsize": 10}
    bold = said | {"fontweight": "bold"}
    flow.text(X / 2, -0.75, "x: pictures, video, text", color=BLUE, **bold)
    flow.text(b, -0.75, "B: learned", color=ORANGE, **bold)
    flow.text(t, -0.75, "T: a target, in training", color=GREEN, **bold)
    arrow(flow, (X / 2, 1.0), (b - 1, 1.0), BLUE, -0.45)
    flow.text(X / 2 + 1.2, 2.15, "B sees x", color=BLUE, **said)
    arrow(flow, (b + 1, 1.0), (t - 0.2, 1.0), ORANGE, -0.6)
    flow.text(t - 1.1, 2.15, "T sees B", color=ORANGE, **said)
    arrow(flow, (X / 2, -1.0), (t, -1.0), GREY, 0.25, "dashed")
    flow.text(b, -2.4, "T does not see x", color="black", backgroundcolor="white", **bold)
    box(flow, b - 2.2, 3.4, 4.4, 0.9, "embedding: mean of B", ORANGE)
    arrow(flow, (b - 0.05, 1.0), (b - 0.05, 3.3), ORANGE)
    flow.text(b, 4.6, "contrastive loss:\nnear what belongs to it", va="bottom", **said)
    box(flow, t - 0.3, 3.4, 3.4, 0.9, "next token of T", GREEN)
    arrow(flow, (t + 1.4, 1.0), (t + 1.4, 3.3), GREEN)
    flow.text(t + 1.4, 4.6, "generative loss:\nwritten from B alone", va="bottom", **said)
    flow.text(
        0,
        4.9,
        "What the target needs of x\nhas to pass through B,\nand so into the embedding.",
        fontsize=10.5,
        va="center",
    )
    matrix(right, True, "the condensation mask")
    right.text(X / 2, X + B + T / 2, "x is hidden from T", ha="center", va="center", fontsize=10)
    return figure


def masks() -> Figure:
    """Plain causal rows beside condensed ones."""
    figure, panels = canvas(11.4, 5.6, 1, 1)
    matrix(panels[0], False, "causal: T sees x, B and earlier T")
    matrix(panels[1], True, "condensed: T sees B and earlier T")
    panels[1].text(X / 2, X + B + T / 2, "hidden", ha="center", va="center", fontsize=10)
    return figure


def packing() -> Figure:
    """Three samples padded, and packed with the four integers of each."""
    lengths = [(6, 3), (2, 1), (4, 4)]
    sources, targets = ([pair[i] for pair in lengths] for i in (0, 1))
    layout = CondensedLayout.from_lengths(sources, targets, 2)
    figure, (panel,) = canvas(12.6, 4.9)
    width, rows = max(x + 2 + t for x, t in lengths), layout.num_rows
    panel.set(xlim=(-0.4, rows + 0.4), ylim=(-3.2, 6.9), aspect="equal")
    panel.text(0, 6.45, f"padded: {3 * width} rows, grey ones for nothing", fontsize=11)
    for i, (x, t) in enumerate(lengths):
        tokens(panel, 0, 5.2 - i, (x, 2, t))
        for empty in range(x + 2 + t, width):
            box(panel, empty, 5.2 - i, 0.88, 0.88, "", PALE)
    panel.text(0, 1.75, f"packed: {rows} rows, one behind the other", fontsize=11)
    at = 0.0
    for x, t in lengths:
        at = tokens(panel, at, 0.5, (x, 2, t))
    for bounds in layout.bounds.tolist():
        for place in bounds:
            panel.plot([place - 0.06] * 2, [-0.05, 0.42], color=GREY, lw=1)
            panel.text(place - 0.06, -0.55, place, ha="center", fontsize=9, color=GREY)
        start, first, border, end = bounds
        said = f"start {start}, first {first},\nborder {border}, end {end}"
        panel.text((start + end) / 2, -1.75, said, ha="center", fontsize=9.5)
    panel.text(
        0,
        -2.9,
        "a row in [start, border) sees keys [start, itself];"
        "  a row in [border, end) sees keys [first, itself]",
        fontsize=10.5,
    )
    return figure


def gradients() -> Figure:
    """A step of training: every pass, and which gradient goes where."""
    figure, (panel,) = canvas(12.6, 5.6)
    panel.set(xlim=(0, 25.2), ylim=(-0.2, 10.9))
    heads = (
        "1  embed, without gradients",
        "2  compare, on all ranks",
        "3  once more, with gradients",
    )
    for x, head in zip((0.2, 8.9, 17.0), heads, strict=True):
        panel.text(x, 10.35, head, fontsize=11, fontweight="bold")
    for i in range(3):
        y = 7.6 - 3.2 * i
        tokens(panel, 0.2, y, (3, 1, 0), 0.8)
        panel.text(0.2, y - 0.62, f"microbatch {i + 1}: [x ; B]", fontsize=9, color=GREY)
        box(panel, 4.6, y, 1.9, 0.75, "vectors", ORANGE, fontsize=9)
        arrow(panel, (3.5, y + 0.37), (4.5, y + 0.37))
        arrow(panel, (6.6, y + 0.37), (8.8, 5.4), ORANGE)
        tokens(panel, 17.9, y, (3, 1, 3), 0.8)
        panel.text(17.9, y - 0.62, f"microbatch {i + 1}: [x ; B ; T]", fontsize=9, color=GREY)
        arrow(panel, (14.6, 5.4), (17.7, y + 0.37), ORANGE)
    box(panel, 8.9, 4.3, 5.6, 2.2, "contrastive loss,\nd loss / d vectors", ORANGE)
    panel.text(11.7, 7.1, "keys of all ranks,\nnever all logits", ha="center", fontsize=9.5)
    panel.text(
        11.7, 2.5, "vectors and their gradients\nare all that is kept", ha="center", fontsize=9.5
    )
    panel.text(
        0.2,
        -0.15,
        "In 3 a microbatch's rows get d loss / d vectors and the generative loss of T, in one"
        " backward; activations of one microbatch exist at a time.",
        fontsize=10,
    )
    return figure


def hopper() -> Figure:
    """The beginning of a block of the forward: three warpgroups, time downwards."""
    figure, (panel,) = canvas(9, 6.8)
    columns = {"producer": 3.0, "consumer 0": 0.0, "consumer 1": 6.0}
    boxes = [  # whose, from when to when, what
        ("producer", 0, 1, "K 0", BLUE), ("producer", 1, 2, "V 0", BLUE),
        ("producer", 2, 3, "K 1", BLUE), ("producer", 3, 4, "V 1", BLUE),
        ("producer", 4, 5, "K 2", BLUE), ("producer", 8.2, 9.2, "V 2", BLUE),
        ("producer", 9.2, 10.2, "K 3", BLUE),
        ("consumer 0", 1.2, 2.2, "Q K 0", ORANGE), ("consumer 0", 2.2, 4.2, "softmax 0", GREY),
        ("consumer 0", 4.2, 6.2, "Q K 1, P 0 V 0", ORANGE),
        ("consumer 0", 6.2, 8.2, "softmax 1", GREY),
        ("consumer 0", 8.2, 10.2, "Q K 2, P 1 V 1", ORANGE),
        ("consumer 1", 0, 0.6, "first turn", LIGHT),
        ("consumer 1", 1.55, 2.2, "issued", LIGHT), ("consumer 1", 2.2, 3.2, "Q K 0", ORANGE),
        ("consumer 1", 3.2, 5.2, "softmax 0", GREY), ("consumer 1", 5.2, 6.2, "issued", LIGHT),
        ("consumer 1", 6.2, 8.2, "Q K 1, P 0 V 0", ORANGE),
        ("consumer 1", 8.2, 10.2, "softmax 1", GREY),
    ]  # fmt: skip
    width = 1.7
    for who, begin, end, text, colour in boxes:
        look = {"fontsize": 9, "color": "black" if colour == LIGHT else "white"}
        box(panel, columns[who], begin + 0.04, width, end - begin - 0.08, text, colour, **look)
    arrows = [  # from whom and when, to whom and when
        ("producer", 1, "consumer 0", 1.2, BLUE), ("producer", 1, "consumer 1", 1.55, BLUE),
        ("producer", 2, "consumer 0", 4.2, BLUE), ("producer", 3, "consumer 0", 4.2, BLUE),
        ("producer", 2, "consumer 1", 5.2, BLUE), ("producer", 3, "consumer 1", 5.2, BLUE),
        ("producer", 4, "consumer 0", 8.2, BLUE), ("producer", 5, "consumer 0", 8.2, BLUE),
        ("consumer 0", 2.2, "producer", 4, ORANGE), ("consumer 1", 3.2, "producer", 4, ORANGE),
        ("consumer 0", 6.2, "producer", 8.2, ORANGE), ("consumer 1", 8.2, "producer", 8.2, ORANGE),
        ("consumer 1", 0.3, "consumer 0", 1.2, GREEN),  # the first is a present
        ("consumer 0", 1.4, "consumer 1", 1.65, GREEN),
        ("consumer 1", 1.85, "consumer 0", 4.3, GREEN),
        ("consumer 0", 4.4, "consumer 1", 5.3, GREEN),
        ("consumer 1", 5.5, "consumer 0", 8.3, GREEN),
    ]  # fmt: skip
    for source, begin, target, end, colour in arrows:
        right = columns[target] > columns[source]
        ends = columns[source] + width * right, columns[target] + width * (not right)
        arrow(panel, (ends[0], begin), (ends[1], end + 0.06), colour)
        panel.texts[-1].set_zorder(0)  # turns pass behind the producer
    names = {"consumer 0": "consumer 0: rows 0 to 63", "consumer 1": "consumer 1: rows 64 to 127"}
    for who, x in columns.items():
        panel.text(x + width / 2, -0.35, names.get(who, who), ha="center", fontweight="bold")
    meanings = {"full: a copy is there": BLUE, "empty: both consumers gave it back": ORANGE,
                "turn: issued, the other may issue": GREEN}  # fmt: skip
    for x, (text, colour) in zip((-0.6, 1.9, 5.3), meanings.items(), strict=True):
        panel.text(x, 10.9, text, color=colour, fontsize=10, fontweight="bold")
    panel.set(xlim=(-0.7, 8.6), ylim=(11, -0.8))
    return figure


DRAWINGS = {
    "mask": mask,
    "masks": masks,
    "packing": packing,
    "gradients": gradients,
    "hopper": hopper,
}


def main(folder: Path) -> None:
    """Draw all into a folder."""
    for name, draw in DRAWINGS.items():
        draw().savefig(folder / f"{name}.png", metadata={"Software": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent)
