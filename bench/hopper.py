"""The kernels for Hopper: their contest on a device, which says where `auto` takes them, and the
picture of who waits for whom.

    python bench/gpu.py --out DIR --only hopper     the contest; writes DIR/hopper.json and results
    python bench/hopper.py docs/hopper.png          the picture

DIR/hopper-results.json, put beside `btok_kernels/launch.py` as hopper.json, makes `auto` take these
kernels on that device and with that triton, from the mean length of sequences on that it names.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor

from bench.harness import DEVICE, Call, duel
from bench.peers import PEERS, Attention, truth
from btok_kernels import launch
from btok_kernels.condensed_attention import _two_calls
from btok_kernels.layout import CondensedLayout, Half

if TYPE_CHECKING:
    from bench.gpu import Report

HEADS, KEY_HEADS, ROWS, BTOKS = 12, 2, 1 << 14, 4
LENGTHS, DIMS = (256, 512, 1024, 2048, 4096, 8192), (128, 64)
WINS = 0.97  # of the other's time
WAYS = ("forward", "forward and backward")


def layout_of(length: int) -> CondensedLayout:
    """Sequences of one length, an eighth of it targets, ROWS rows in all."""
    target = length // 8
    count = max(1, ROWS // length)
    return CondensedLayout.from_lengths([length - target - BTOKS] * count, [target] * count, BTOKS)


def flash(layout: CondensedLayout) -> Attention:
    """FlashAttention on [x ; B] rows, then on target rows with [B ; T] keys."""
    from flash_attn import flash_attn_varlen_func

    def attend(q: Tensor, k: Tensor, v: Tensor, half: Half) -> Tensor:
        longest = max(half.row_lens), max(half.key_lens)
        return flash_attn_varlen_func(
            q, k, v, half.row_ends, half.key_ends, *longest, causal=True
        )  # causal from the right

    return lambda q, k, v: _two_calls(q, k, v, layout, attend)


@contextmanager
def without_turns() -> Iterator[None]:
    """Consumers that multiply when they like."""
    free = {key: config._replace(ping_pong=False) for key, config in launch.HOPPER.items()}
    with mock.patch.dict(launch.HOPPER, free):
        yield


def unturned(layout: CondensedLayout) -> Attention:
    attend = PEERS["hopper"](layout)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with without_turns():
            return attend(q, k, v)

    return run


def rivals() -> dict[str, Callable[[CondensedLayout], Attention]]:
    """What there is to compare with, the plain kernels first."""
    found = {"triton": PEERS["triton"], "hopper without turns": unturned}
    found |= {name: PEERS[name] for name in ("two varlen calls", "flex")}
    return found | ({"flash-attn": flash} if importlib.util.find_spec("flash_attn") else {})


def prepared(attend: Attention, inputs: list[Tensor], expected: list[Tensor], way: str) -> Call:
    """A checked call.

    Raises:
        ValueError: a wrong result.
    """
    q, k, v, grad = inputs

    def both() -> list[Tensor]:
        out = attend(q, k, v)
        return [out, *torch.autograd.grad(out, (q, k, v), grad)]

    for name, got, want in zip(("out", "dq", "dk", "dv"), both(), expected, strict=True):
        error = float((got.detach().float() - want).norm() / want.norm())
        if not error <= 1e-2:
            raise ValueError(f"wrong {name}, off by {error:.1e}: not timed")
    if way == WAYS[1]:
        return both
    return torch.no_grad()(partial(attend, q, k, v))


def contest(
    make: Callable[[CondensedLayout], Attention],
    layout: CondensedLayout,
    inputs: list[Tensor],
    expected: list[Tensor],
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Of these kernels, as today's, with another way: a row of the report."""
    attends = PEERS["hopper"](layout), make(layout)
    today, other = (prepared(attend, inputs, expected, facts["way"]) for attend in attends)
    return facts | duel(today, other)


def stage(report: Report) -> None:
    """Contests of all lengths, then what they decide."""
    for dim, length in itertools.product(DIMS, LENGTHS):
        layout = layout_of(length).to(DEVICE)
        generator = torch.Generator().manual_seed(0)
        inputs = [
            torch.randn(layout.num_rows, heads, dim, generator=generator)
            .to(DEVICE, torch.bfloat16)
            .requires_grad_(i < 3)
            for i, heads in enumerate((HEADS, KEY_HEADS, KEY_HEADS, HEADS))
        ]
        expected = truth(layout, *inputs)
        for way, (name, make) in itertools.product(WAYS, rivals().items()):
            facts = {"dim": dim, "length": length, "way": way, "rival": name}
            report.measure(
                f"D {dim}, length {length}, {way}: {name}",
                partial(contest, make, layout, inputs, expected, facts),
            )
    results = decided(report.content["rows"]) | {"device": report.content["machine"]["device"]}
    results |= {key: report.content["machine"][key] for key in ("torch", "triton", "commit")}
    report.path.with_name("hopper-results.json").write_text(json.dumps(results, indent=1))
    for dim, least in results["from_length"].items():
        default = "the plain kernels" if least is None else f"hopper from length {least} on"
        print(f"head dim {dim}: the default should be {default}")


def decided(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """`from_length`: by head dim the least length from which on the kernels beat the plain ones,
    forward and both ways, or None. What was not timed, or failed, is not beaten."""
    won = {
        (row["dim"], row["length"], row["way"]): row["interval"][0] > 1 / WINS
        for row in rows
        if row.get("rival") == "triton" and "interval" in row
    }
    found: dict[str, int | None] = {}
    for dim in DIMS:
        least = None
        for length in reversed(LENGTHS):
            if not all(won.get((dim, length, way)) for way in WAYS):
                break
            least = length
        found[str(dim)] = least
    return {"from_length": found}


def picture(path: str) -> None:
    """Draws the beginning of a block of the forward: three warpgroups, time downwards."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    blue, orange, green = (0.20, 0.40, 0.65), (0.93, 0.50, 0.15), (0.10, 0.60, 0.25)
    pale, dark = (0.94, 0.94, 0.94), (0.80, 0.86, 0.94)
    copy, product, other = ("copy", dark), ("product", (0.98, 0.88, 0.74)), ("softmax", pale)
    boxes = [  # column, begin, end, text, what
        (0, 0, 1, "K 0", copy), (0, 1, 2, "V 0", copy), (0, 2, 3, "K 1", copy),
        (0, 3, 4, "V 1", copy), (0, 4, 5, "K 2", copy), (0, 8.2, 9.2, "V 2", copy),
        (0, 9.2, 10.2, "K 3", copy),
        (1, 1.2, 2.2, "Q K 0", product), (1, 2.2, 4.2, "softmax 0", other),
        (1, 4.2, 6.2, "Q K 1 and P 0 V 0", product), (1, 6.2, 8.2, "softmax 1", other),
        (1, 8.2, 10.2, "Q K 2 and P 1 V 1", product),
        (2, 2.2, 3.2, "Q K 0", product), (2, 3.2, 5.2, "softmax 0", other),
        (2, 6.2, 8.2, "Q K 1 and P 0 V 0", product), (2, 8.2, 10.2, "softmax 1", other),
    ]  # fmt: skip
    arrows = [  # from (column, time) to (column, time)
        (blue, 0, 1, 1, 1.2), (blue, 0, 1, 2, 2.2), (blue, 0, 2, 1, 4.2), (blue, 0, 3, 1, 4.2),
        (orange, 1, 2.2, 0, 4), (orange, 2, 3.2, 0, 4),
        (orange, 1, 6.2, 0, 8.2), (orange, 2, 8.2, 0, 8.2),
        (green, 1, 2.2, 2, 2.2), (green, 2, 3.2, 1, 4.2), (green, 1, 6.2, 2, 6.2),
        (green, 2, 8.2, 1, 8.2),
    ]  # fmt: skip
    figure = Figure(figsize=(9, 6.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    width, columns = 1.25, (2.3, 0.0, 4.6)  # turns pass behind the producer
    for column, begin, end, text, (_, colour) in boxes:
        at = columns[column]
        size = width, end - begin
        axes.add_patch(Rectangle((at, begin), *size, fc=colour, ec="white", lw=1.5, zorder=2))
        axes.text(at + width / 2, (begin + end) / 2, text, ha="center", va="center",
                  fontsize=9, zorder=3)  # fmt: skip
    for colour, source, begin, target, end in arrows:
        right = columns[target] > columns[source]
        ends = columns[source] + width * right, columns[target] + width * (not right)
        style = {"arrowstyle": "-|>", "color": colour, "lw": 1.3, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", (ends[1], end + 0.06), (ends[0], begin), arrowprops=style, zorder=0)
    names = ("producer", "consumer 0: rows 0 to 63", "consumer 1: rows 64 to 127")
    for at, name in zip(columns, names, strict=True):
        axes.text(at + width / 2, -0.35, name, ha="center", fontsize=10, fontweight="bold")
    meanings = ((blue, "full: a copy is there"), (orange, "empty: both consumers gave it back"),
                (green, "turn: the tensor cores are handed over"))  # fmt: skip
    lines = [Line2D([], [], color=colour, lw=2, label=text) for colour, text in meanings]
    axes.legend(handles=lines, loc="lower center", ncols=3, frameon=False, fontsize=9,
                bbox_to_anchor=(0.5, -0.07))  # fmt: skip
    axes.set(xlim=(-0.1, columns[2] + width + 0.1), ylim=(10.6, -0.8))
    axes.axis("off")
    figure.savefig(path)


if __name__ == "__main__":
    picture(sys.argv[1])
