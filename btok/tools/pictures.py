"""Pictures of a run: loss curves, and a contact sheet of what queries found."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from btok.data.records import Side
from btok.extras import needed

Path = str | os.PathLike[str]
ENDINGS = (".png", ".pdf", ".svg", ".jpg")
_DPI, _TEXT = 144, 11  # pixels per inch, so 1 pt is 2 px; pt
_GAP, _PAD, _FOUND, _LINE = 20, 12, 236, 26  # px: around and in frames, a cell, a line of text
BLUE, ORANGE, GREEN = (0.20, 0.40, 0.65), (0.93, 0.50, 0.15), (0.10, 0.60, 0.25)
_GREY = (0.55, 0.55, 0.55)


class SheetRow(NamedTuple):
    """A line of a contact sheet: a query, what it found, which of it is right, the right rank.

    `right` is None where nobody knows.
    """

    query: Side
    retrieved: Sequence[Side]
    right: Sequence[bool] | None
    rank: int | None = None


def loss_curve(log_rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Draws losses over steps: raw values light, a running mean bold, phases shaded.

    Args:
        log_rows: a run's log in order, "step" growing over the whole run: "contrastive" and "ntp"
            (a panel each, missing in some rows or in all) and "phase" (may be missing).
        path: the picture's file.

    Raises:
        ValueError: no row has a step and one of the two losses.
    """
    rows = [row for row in log_rows if row.get("step") is not None]
    colours = {"contrastive": BLUE, "ntp": ORANGE}
    keys = [key for key in colours if any(row.get(key) is not None for row in rows)]
    if not keys:
        raise ValueError("loss_curve: no row has a step and a contrastive or ntp loss")
    starts = {row.get("phase"): row["step"] for row in reversed(rows)}
    phases = sorted(starts, key=starts.__getitem__)
    ends = [*(starts[phase] for phase in phases[1:]), rows[-1]["step"]]
    figure = _figure(1400, 160 + 380 * len(keys))
    figure.set_layout_engine("constrained", w_pad=0.15, h_pad=0.1)
    panels = figure.subplots(len(keys), sharex=True, squeeze=False)[:, 0]
    for panel, key in zip(panels, keys, strict=True):
        for i, (phase, end) in enumerate(zip(phases, ends, strict=True)):
            if phase:
                panel.axvspan(starts[phase], end, color=f"C{i}", alpha=0.1, lw=0, label=phase)
            part = [r for r in rows if r.get(key) is not None and r.get("phase") == phase]
            steps, values = [r["step"] for r in part], np.array([r[key] for r in part], float)
            reach = len(rows) // 60
            smooth = [values[max(0, i - reach) : i + reach + 1].mean() for i in range(len(part))]
            panel.plot(steps, values, color=colours[key], alpha=0.35, lw=0.8)
            panel.plot(steps, smooth, color=colours[key], lw=2.2)
        panel.set(ylabel=f"{key} loss".replace("ntp", "next-token"), xmargin=0)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("step")
    figure.legend(handles=panels[0].patches, loc="outside upper center", ncols=9, frameon=False)
    figure.savefig(path, dpi=_DPI)


def contact_sheet(rows: Iterable[SheetRow], path: Path, title: str) -> None:
    """Draws queries and the best candidates of each, right ones framed in green.

    Args:
        rows: one line each; where nothing retrieved is right, the line says so at its end.
        path, title: the picture's file and its heading.
    """
    rows = [SheetRow(*row) for row in rows]
    renderer = _figure(1, 1).canvas.get_renderer()
    wide = 468 if any(len(row.query.images) + len(row.query.video) > 1 for row in rows) else 300
    sides = [[(row.query, wide), *((side, _FOUND) for side in row.retrieved)] for row in rows]
    lines = [[_cell(*side, renderer) for side in line] for line in sides]
    heights = [2 * _PAD + max(height for _, _, height in line) for line in lines]
    step, columns = _FOUND + 2 * _PAD + _GAP, max((len(line) for line in lines), default=1)
    centres = [_GAP + wide / 2, *(_GAP + wide + step * i - _FOUND / 2 for i in range(1, columns))]
    end, top = centres[-1] + step / 2 + 4, 120
    missed = [row.right is not None and not any(row.right) for row in rows]
    width = end + 180 * any(missed)
    figure = _figure(width, top + sum(heights) + _GAP * len(rows))
    limits = {"xlim": (0, width), "ylim": (figure.bbox.height, 0), "autoscale_on": False}
    axes = figure.add_axes((0, 0, 1, 1), frame_on=False, xticks=(), yticks=(), **limits)
    axes.text(_GAP, 52, title, fontsize=15, parse_math=False)
    for i, x in enumerate(centres):
        axes.text(x, 100, i or "query", ha="center", fontsize=_TEXT, color=_GREY)
    for row, line, height in zip(rows, lines, heights, strict=True):
        y = top + height / 2
        for x, (picture, text, tall) in zip(centres, line, strict=False):
            bottom = round(y + tall / 2)
            if picture is not None:
                h, w = picture.shape[:2]
                box = np.floor([x - w / 2, x + w / 2, bottom - tall + h, bottom - tall])
                axes.imshow(picture, extent=box, aspect="auto", interpolation="nearest")
            axes.text(x, bottom, text, size=_TEXT, ha="center", va="bottom", parse_math=False)
        frames = [False] * len(row.retrieved) if row.right is None else row.right
        for x, right in zip(centres[1 : len(line)], frames, strict=True):
            edge = {"edgecolor": GREEN, "lw": 4} if right else {"edgecolor": _GREY, "lw": 0.6}
            axes.bar(x, height, _FOUND + 2 * _PAD, top, fill=False, **edge)
        if row.right is not None and not any(row.right):
            place = f"at rank {row.rank}" if row.rank else f"not in top {len(row.right)}"
            axes.text(end, y, f"right one\n{place}", va="center", fontsize=_TEXT)
        top += height + _GAP
    figure.savefig(path, dpi=_DPI)


def drawable(path: Path) -> None:
    """Whether a picture can be written, before what it shows is made.

    Raises:
        ValueError: its ending says no picture, its folder is not there, or a folder is in the way.
        ImportError: matplotlib is missing (the extra `demo`).
    """
    ending = os.path.splitext(path)[1].lower()
    if ending not in ENDINGS:
        raise ValueError(f"picture is {path}, expected a name ending in {', '.join(ENDINGS)}")
    if not os.path.isdir(os.path.dirname(path) or "."):
        raise ValueError(f"picture is {path}, in a folder that is not there")
    if os.path.isdir(path):
        raise ValueError(f"picture is {path}, which is a folder; expected a file")
    _figure(1, 1)


def bars(
    groups: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    path: Path,
    title: str,
) -> None:
    """Draws each series' value in each group, in percent, side by side; None has no bar.

    Args:
        groups: what stands below the bars.
        series: its name -> a value per group; the first is ours, in colour.
        path: the picture's file.
        title: its heading.
    """
    wide = 120 + len(groups) * (30 + 34 * len(series))  # px: room for two digits above each bar
    head = 80 + 30 * -(-len(series) // 2)
    figure = _figure(max(900, wide), 400 + head)
    tall = figure.bbox.height
    axes = figure.add_axes(
        (70 / figure.bbox.width, 50 / tall, 1 - 90 / figure.bbox.width, 320 / tall)
    )
    width = 0.86 / len(series)
    greys = np.linspace(0.3, 0.75, max(len(series) - 1, 1))
    for i, (name, values) in enumerate(series.items()):
        there = [(x, value) for x, value in enumerate(values) if value is not None]
        places = [x + (i - (len(series) - 1) / 2) * width for x, _ in there]
        colour = GREEN if i == 0 else str(greys[i - 1])
        drawn = axes.bar(places, [v for _, v in there], 0.92 * width, color=colour, label=name)
        labels = [f"{value:.0f}" for _, value in there]
        axes.bar_label(drawn, labels, fontsize=_TEXT - 1, color=_GREY, padding=1)
    axes.set(ylim=(0, 105), xlim=(-0.6, len(groups) - 0.4))
    axes.set_xticks(range(len(groups)), groups, fontsize=_TEXT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0)
    left = 70 / figure.bbox.width
    figure.text(left, 1 - 40 / tall, title, fontsize=13)
    place = {"loc": "upper left", "bbox_to_anchor": (left, 1 - 50 / tall), "borderaxespad": 0}
    figure.legend(**place, ncols=2, frameon=False, fontsize=_TEXT, borderpad=0)
    figure.savefig(path, dpi=_DPI)


def _figure(width: float, height: float) -> Any:
    """A figure of so many pixels, unknown to pyplot."""
    with needed("pictures", "matplotlib", "demo"):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
    FigureCanvasAgg(figure)
    return figure


def _cell(side: Side, width: int, renderer: Any) -> tuple[Any, str, int]:
    """A side's picture or None, its lines of text, and the height of both in pixels."""
    from matplotlib.font_manager import FontProperties

    picture, font = _picture(side, width), FontProperties(size=_TEXT)
    for letters in range(width // 8, 4, -1):
        lines = textwrap.wrap(side.text, letters, max_lines=5, placeholder=" …")
        if all(renderer.get_text_width_height_descent(x, font, False)[0] <= width for x in lines):
            break
    tall = 0 if picture is None else len(picture) + 10 * bool(lines)
    return picture, "\n".join(lines), tall + _LINE * len(lines)


def _picture(side: Side, width: int) -> Any:
    """The images, or the frames as a filmstrip, at most `width` wide; small ones stay crisp."""
    from PIL import Image

    frames = [*side.images, *side.video]
    frames = [f if isinstance(f, Image.Image) else Image.fromarray(f) for f in frames]
    if not frames:
        return None
    w, h, n = max(f.width for f in frames), max(f.height for f in frames), len(frames)
    gap, band = 4, 14 if side.video else 0
    c = np.arange(n, 0, -1)  # how many columns
    scales = np.minimum((width - gap * (c + 1)) / (w * c), 256 / (h * np.ceil(n / c)))
    scales = np.where(scales < 1, scales, np.floor(scales))
    scale, columns = scales.max(), int(c[scales.argmax()])
    resample = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
    w, h = int(w * scale) + gap, int(h * scale) + gap + 2 * band
    sheet = np.full((-(-n // columns) * h + gap, columns * w + gap, 3), 255, np.uint8)
    for i, frame in enumerate(frames):
        size = (max(1, int(frame.width * scale)), max(1, int(frame.height * scale)))
        frame = frame.convert("RGB").resize(size, resample)
        block = sheet[i // columns * h :, i % columns * w :][gap:h, gap:w]
        if band:
            block[:] = 50
            holes = (np.arange(w - gap) - 4) % 16 < 8
            block[4:10, holes] = block[-10:-4, holes] = 255
        block[band : band + size[1], : size[0]] = np.asarray(frame)
    return sheet
