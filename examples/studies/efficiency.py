"""What the K rows of [x ; B] cost at inference beside last-token pooling, over the input's length.

    python examples/studies/efficiency.py [--page FOLDER] [--lengths N ...] [--btoks K ...]

modelled   the ratio of multiply-adds of Qwen2-VL-2B's language model for one input of n tokens:
           n + K rows over n through all layers; and with the last layer for the pooled rows alone
measured   the ratio of wall times on this machine of the model that `bench/bench_encoding.py` has
           for it, from a list of token ids to a unit vector, one input at a time; both sides run
           the last layer for the pooled rows alone, on the same random weights

Before it is timed, an embedding has to be that of transformers' own forward. The two take turns; a
ratio is the median over pairs, with the median's 95 % interval.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.bench_encoding import DTYPE, SHAPE, multiply_adds, predicted, prepared
from bench.harness import settle_allocator
from bench.models import Shape
from bench.plots import BLUE, GREEN, ORANGE, PALE, PURPLE, RED, TEAL, canvas, log_axis
from bench.report import table
from btok.files import write_json, write_text
from examples.studies.common import parse
from examples.studies.duel import duel
from examples.studies.provenance import facts_of, surroundings

PROG, STEM = "examples/studies/efficiency.py", "studies-efficiency"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, TEAL)


@dataclass(frozen=True)
class Options:
    """The study's command line."""

    page: Path = Path("runs/studies")
    """Folder of the page, its picture and its numbers."""
    lengths: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    """Tokens of an input."""
    btoks: tuple[int, ...] = (1, 4, 16)
    """Numbers K."""
    seconds: float = 10.0
    """That the pairs of a case take, about; at least 7 pairs, at most 101."""

    def __post_init__(self) -> None:
        for name in ("lengths", "btoks"):
            if not (had := getattr(self, name)) or min(had) < 1:
                raise ValueError(f"{name} is {had}, expected numbers of at least 1")
        if not self.seconds > 0:
            raise ValueError(f"seconds is {self.seconds}, expected above 0")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the study; returns 0, or 2 for a mistake in the command, told in one line."""
    try:
        options = parse(Options, argv, PROG)
    except ValueError as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 2
    settle_allocator()
    shape = f"{SHAPE.num_hidden_layers} layers of width {SHAPE.hidden_size}, "
    shape += str(DTYPE).removeprefix("torch.")
    settings = surroundings() | {"seconds": options.seconds, "shape": shape}
    settings["load"] = f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    cases = [case(n, k, options.seconds) for k in options.btoks for n in options.lengths]
    write_page({"settings": settings, "cases": cases}, options.page)
    return 0


def case(tokens: int, num_btoks: int, most: float) -> dict[str, Any]:
    """The cost of K bottleneck tokens over the last token, modelled and measured."""
    contestants, samples = prepared(f"1x{tokens}", num_btoks)  # checked
    last, ours = (
        partial(contestants.packed, m, samples) for m in (contestants.last, contestants.btok)
    )
    short, long = (multiply_adds(Shape(), [n]) for n in (tokens, tokens + num_btoks))
    found = {"tokens": tokens, "num_btoks": num_btoks, "flops": 2 * short, "modelled": long / short}
    for name, shape in (("modelled_pooled", Shape()), ("modelled_here", SHAPE)):
        found[name] = predicted(shape, "packed last token", [tokens], num_btoks)
    found |= duel(last, ours, most)
    print(f"{tokens} tokens, K = {num_btoks}: {found['ratio']:.3f}", file=sys.stderr, flush=True)
    return found


def write_page(results: dict[str, Any], folder: Path) -> None:
    """`studies-efficiency.md`, its picture, and the numbers beside it."""
    settings, cases = results["settings"], results["cases"]
    header = ["tokens", "K", "GFLOP of the tokens, 2B, modelled", "all rows, 2B, modelled"]
    header += ["pooled rows, 2B, modelled", "pooled rows, as timed, modelled", "measured", "95 %"]
    rows = [[*header, "last token, ms", "K rows, ms", "pairs"]]
    for c in cases:
        modelled = (f"{c[key]:.4f}" for key in ("modelled", "modelled_pooled", "modelled_here"))
        row = [f"{c['tokens']}", f"{c['num_btoks']}", f"{c['flops'] / 1e9:.0f}", *modelled]
        row += [f"{c['ratio']:.3f}", "{:.3f} - {:.3f}".format(*c["interval"])]
        rows.append([*row, *(f"{ms:.1f}" for ms in c["ms"]), str(c["pairs"])])
    above, below = (sum(c["interval"][i] * s > s for c in cases) for i, s in ((0, 1), (1, -1)))
    parts = [
        "# Overhead of the bottleneck tokens at inference",
        facts_of(settings, f"python {PROG} --seconds {settings['seconds']:g}"),
        "One text input, one forward over [x ; B] beside last-token pooling over x: a ratio above 1"
        " says that the K rows cost more. **Modelled**: multiply-adds of Qwen2-VL-2B's language"
        " model (28 layers of width 1536, 12 heads, 2 of keys, MLP 8960), with all rows through all"
        " layers, and with the last layer for the pooled rows alone, as btok runs it. **Measured**:"
        f" {settings['shape']}, random weights, wall time; its embeddings had to be those of"
        " transformers' own forward first. The median over pairs of calls in turns, with its 95 %"
        f" interval; the machine's load when it began was {settings['load']}, so other programs may"
        " have been in it. The full-size model is not measured here.",
        f"The measured interval is above 1 in {above} of {len(cases)} cases, below 1 in {below};"
        f" it holds 1 in the other {len(cases) - above - below}.",
        table(*rows),
        f"![The ratio over the input's length]({STEM}.png)",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{STEM}.md", "\n\n".join(parts) + "\n")
    write_json(folder / f"{STEM}.json", results)
    picture(cases).savefig(folder / f"{STEM}.png", metadata={"Software": None})


def picture(cases: list[dict[str, Any]]) -> Figure:
    """Modelled at full size, and measured beside the same arithmetic."""
    figure = canvas(3.8)
    left, right = figure.subplots(1, 2)
    lengths = sorted({c["tokens"] for c in cases})
    for i, k in enumerate(dict.fromkeys(c["num_btoks"] for c in cases)):
        colour, shift = COLOURS[i % len(COLOURS)], 1.05**i  # intervals would cover each other
        line = [c for c in cases if c["num_btoks"] == k]
        x = [c["tokens"] for c in line]
        left.plot(x, [c["modelled"] for c in line], "o-", ms=3, color=colour, label=f"K = {k}")
        left.plot(x, [c["modelled_pooled"] for c in line], ":", color=colour)
        right.plot(x, [c["modelled_here"] for c in line], ":", color=colour)
        bounds = [[abs(c["ratio"] - c["interval"][i]) for c in line] for i in (0, 1)]
        shifted, ratios = [n * shift for n in x], [c["ratio"] for c in line]
        right.errorbar(shifted, ratios, bounds, fmt="o", ms=3, color=colour)
    left.set(title="modelled, Qwen2-VL-2B (dotted: pooled rows alone in the last layer)")
    right.set(title="measured, with 95 % (dotted: its arithmetic)")
    for axes in (left, right):
        log_axis(axes, "x", lengths, [*lengths, 1.1 * lengths[-1]])
        axes.axhline(1, color="black", lw=0.8)
        axes.set(xlabel="input tokens", ylabel="K rows over last token")
        axes.title.set_fontsize(8)
        axes.grid(color=PALE)
    left.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    sys.exit(main())
