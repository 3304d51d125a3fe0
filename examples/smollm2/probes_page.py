"""The probes' page: its tables and pictures, of the numbers that `probes.py` leaves."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench.plots import BLUE, GREEN, ORANGE, PALE, canvas, log_axis
from bench.report import table
from btok.files import write_json, write_text
from examples.studies.common import interval
from examples.studies.provenance import facts_of

STEM = "smollm2-probes"
PROBES = ("recovery", "packing", "overhead", "attention")
THIRDS = ("first", "middle", "last")  # of the layers
OF_RUN = ("steps", "group_size", "seed", "learning_rate", "ntp_weight", "ntp_side", "condense")


def before(folder: Path) -> dict[str, Any]:
    """The numbers that a folder holds from an earlier call, if there are any.

    Raises:
        ValueError: a file that is cut short, or from which no page can be made.
    """
    path = folder / f"{STEM}.json"
    try:
        found = json.loads(path.read_text("utf-8")) if path.exists() else {}
        page(found)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"{path} holds no numbers of these probes ({why}); remove it") from error
    return found


def write_page(found: Mapping[str, Any], folder: Path) -> None:
    """The numbers, and of them alone the page and its pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {name: found[name] for name in PROBES if name in found}
    write_json(folder / f"{STEM}.json", found)
    write_text(folder / f"{STEM}.md", page(found))
    for name, draw in (("attention", attention_picture), ("overhead", overhead_picture)):
        if name in found:
            picture = draw(found[name])
            picture.savefig(folder / f"smollm2-{name}.png", metadata={"Software": None})


def page(found: Mapping[str, Any]) -> str:
    """The Markdown page of the probes that are there."""
    parts = [
        "# Probes of SmolLM2-135M with bottleneck tokens",
        "On SmolLM2-135M-Instruct, dequantised Q4_1 (30 layers of width 576), trained as"
        " [the study](../../examples/smollm2/README.md) has it. Every figure that is not called"
        " modelled is **measured**.",
    ]
    sections = recovery_part, packing_part, overhead_part, attention_part
    last: object = None
    for name, section in zip(PROBES, sections, strict=True):
        if part := found.get(name):
            title, *rest = section(part)
            own = (part["settings"], part["run"])
            parts += [f"## {title}", *([facts(*own)] if own != last else []), *rest]
            last = own
    return "\n\n".join(parts) + "\n"


def facts(settings: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    """The lines on how a probe was made: command, commit, machine, versions, the trained run."""
    said = facts_of(settings, settings["command"]) + f"\n- load at its begin: {settings['load']}"
    if not run:
        return said
    options = ", ".join(f"{key} {run[key]}" for key in OF_RUN)
    return (
        f"{said}\n- run: `{run['name']}`, K = {run['num_btoks']}, {options}; trained at commit "
        f"{run['commit']}; sha256 of its checkpoint {run['digest'][:16]}..."
    )


def recovery_part(part: Mapping[str, Any]) -> list[str]:
    rows = [["model", "loss", "own less another's", "right", "first", "named"]]
    for reading in part["readings"]:
        own, other = (
            {key: np.array(had.split(), float) for key, had in reading[whose].items()}
            for whose in ("own", "other")
        )
        gap = interval((own["loss"] - other["loss"]).tolist())
        means = {key: (own[key].mean(), other[key].mean()) for key in own}
        cells = [
            "{:.{n}f} / {:.{n}f}".format(*pair, n=2 if key == "loss" else 1)
            for key, pair in means.items()
        ]
        rows.append([reading["reader"], cells[0], "{:+.2f} ± {:.2f}".format(*gap), *cells[1:]])
        rows[-1] += [""] * (len(rows[0]) - len(rows[-1]))  # where nothing was written
    first, last = (part["readings"][i]["reader"] for i in (0, -1))
    shown = [["input", "right answer", "written from its B", "written by the untrained model"]]
    for example in part["examples"]:
        wrote = (example["written"][reader] for reader in (first, last))
        shown.append([cell(text) for text in (example["source"], example["target"], *wrote)])
    return [
        "Recovery of the target from the bottleneck rows",
        f"The first {part['inputs']} test pairs of {part['run']['set']}. The target T sees B and"
        " earlier T, never x, but for the line that says so. *Loss*: nats a token, the earlier ones"
        " given, the end token counted. *Right*: tokens that are the most probable ones. *First*:"
        " T's first token alone, which has nothing but B to go by. *Named*: greedy text, made from"
        " the keys and values of the K rows alone, that has one of the answer's words or phrases."
        " Means over inputs of each one's mean, the last three in percent; behind each, after the"
        " stroke, the same with the B of the input before, which is what can be had without x. The"
        " difference of the losses has its 95 % interval over inputs.",
        table(*rows),
        f"The first {len(part['examples'])} test pairs, greedy, none left out:",
        table(*shown),
    ]


def cell(text: str) -> str:
    """A text as it is, in one cell of a Markdown table."""
    return re.sub(r"([\\`*_<>\[\]])", r"\\\1", " ".join(text.split())) or "(nothing)"


def packing_part(part: Mapping[str, Any]) -> list[str]:
    rows = [["one", "other", "largest difference of a component", "at tokens", "smallest cosine"]]
    for gap in part["gaps"]:
        apart = [f"{gap['largest']:.1e}", str(gap["tokens"])] if gap["largest"] else ["0", ""]
        rows.append([gap["one"], gap["other"], *apart, f"{gap['cosine']:.7f}"])
    return [
        "The same vector, alone and packed",
        f"{len(part['lengths'])} inputs of {', '.join(map(str, part['lengths']))} tokens and K ="
        f' {part["run"]["num_btoks"]}: each alone, or all in one packed row. "adapters" is the'
        ' run\'s model in fp32 as it was trained, "fp32" and "bf16" its merged export in that'
        ' precision, "stock" the export in transformers\' own forward, an input at a time.',
        table(*rows),
    ]


def overhead_part(part: Mapping[str, Any]) -> list[str]:
    head = ["tokens", "K", "modelled", "measured", "95 %", "last token, ms", "K rows, ms", "pairs"]
    rows = [head]
    for case in part["cases"]:
        row = [str(case["tokens"]), str(case["num_btoks"]), f"{case['modelled']:.4f}"]
        row += [f"{case['ratio']:.3f}", "{:.3f} - {:.3f}".format(*case["interval"])]
        rows.append([*row, *(f"{ms:.1f}" for ms in case["ms"]), str(case["pairs"])])
    signs = ((0, 1), (1, -1))
    above, below = (sum(c["interval"][i] * s > s for c in part["cases"]) for i, s in signs)
    inside = sum(c["interval"][0] <= c["modelled"] <= c["interval"][1] for c in part["cases"])
    return [
        "Overhead over last-token pooling",
        "One text of random tokens, one forward over [x ; B] beside last-token pooling over x, both"
        f" with the last of {part['layers']} layers for the pooled rows alone, pretrained weights,"
        " fp32: a ratio above 1 says that the K rows cost more. **Measured**: wall time, the median"
        " over pairs of calls in turns, with its 95 % interval; each vector had to be that of"
        " transformers' own forward first. **Modelled**: the ratio of multiply-adds.",
        f"The measured interval is above 1 in {above} of {len(part['cases'])} cases, below 1 in"
        f" {below}; it holds the modelled ratio in {inside}.",
        table(*rows),
        "![The ratio over the input's length](smollm2-overhead.png)",
    ]


def overhead_picture(part: Mapping[str, Any]) -> Figure:
    """Measured ratios over the length, with their intervals, beside the arithmetic."""
    figure, cases = canvas(3.8), part["cases"]
    axes = figure.add_subplot(xlabel="input tokens", ylabel="K rows over last token")
    lengths = sorted({case["tokens"] for case in cases})
    for i, number in enumerate(dict.fromkeys(case["num_btoks"] for case in cases)):
        line = [case for case in cases if case["num_btoks"] == number]
        colour = (BLUE, ORANGE, GREEN)[i % 3]
        x = [case["tokens"] for case in line]
        shifted = [n * 1.05 ** (i - 1) for n in x]  # intervals would cover each other
        bounds = [[abs(c["ratio"] - c["interval"][side]) for c in line] for side in (0, 1)]
        ratios = [case["ratio"] for case in line]
        axes.errorbar(shifted, ratios, bounds, fmt="o", ms=4, color=colour, label=f"K = {number}")
        axes.plot(x, [case["modelled"] for case in line], ":", color=colour)
    log_axis(axes, "x", lengths, [0.95 * lengths[0], 1.05 * lengths[-1]])
    axes.axhline(1, color="black", lw=0.8)
    axes.grid(color=PALE)
    axes.legend(title="measured (dotted: modelled)", fontsize=8, title_fontsize=8)
    return figure


def attention_part(part: Mapping[str, Any]) -> list[str]:
    drawn = part["drawn"]
    plain = np.mean([each["first"] for each in drawn], axis=0)
    mean = np.mean([np.array(each["shares"])[..., [0, -1]].mean(1) for each in drawn], axis=0)
    said = (" / ".join(f"{share:.0f}" for share in shares) for shares in (plain, *mean.T))
    return [
        "What the bottleneck rows attend to",
        f"The first {len(drawn)} test inputs of at least 8 tokens, a line per row of B and third of"
        f" the {part['layers']} layers. Drawn is what a token brings: attention times the norm of"
        " its value, summed over heads, as a share of all that the row sees. In the first / middle"
        " / last third the first token has {} % of plain attention and {} % of this, B itself {} %;"
        " both stand as numbers.".format(*said),
        "![What the rows of B take from each token](smollm2-attention.png)",
    ]


def attention_picture(part: Mapping[str, Any]) -> Figure:
    """A panel per input: its tokens as columns, the K rows of each third as lines.

    The first token and B stand beside as numbers: in their scale nothing else would be seen.
    """
    drawn = part["drawn"]
    number = len(drawn[0]["shares"][0])
    figure = canvas(0.9 + len(drawn) * (0.8 + 0.36 * number))
    panels = figure.subplots(len(drawn), 1, squeeze=False)[:, 0]
    shares = [np.concatenate(each["shares"]) for each in drawn]  # [3 K, L + 1] each
    top = max(lines[:, 1:-1].max() for lines in shares)
    for axes, each, lines in zip(panels, drawn, shares, strict=True):
        shown = lines.copy()
        shown[:, [0, -1]] = np.nan
        image = axes.imshow(shown, aspect="auto", cmap="Blues", vmin=0, vmax=top)
        for column, (y, line) in product((0, -1), enumerate(lines)):
            x = column % len(line)
            axes.text(x, y, f"{line[column]:.0f}", ha="center", va="center", fontsize=6.5)
        names = [token.strip() or "\u2423" for token in each["tokens"]]
        axes.set_xticks(range(len(names) + 1), [*names, "B"], rotation=30, ha="right", fontsize=8)
        names = [f"b{i % number}" for i in range(len(lines))]
        axes.set_yticks(range(len(names)), names, fontsize=6)
        axes.set_facecolor(PALE)
        for border in (0.5, len(line) - 1.5):
            axes.axvline(border, color="white", lw=3)
        for third, name in enumerate(THIRDS):
            axes.axhline(third * number - 0.5, color="white", lw=3)
            at, place = (third + 0.5) * number - 0.5, axes.get_yaxis_transform()
            axes.text(-0.04, at, name, transform=place, va="center", ha="right", fontsize=8)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    figure.suptitle("what a row of B takes from each token, by third of the layers", fontsize=10)
    figure.colorbar(image, ax=list(panels), label="percent of the row", shrink=0.5, pad=0.02)
    return figure
