"""A run's log as curves: read line by line, thinned to what a screen can show, and laid out on a
plot of 1000 by 1000 that any width can stretch.
"""

from __future__ import annotations

import json
import math
from array import array
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

POINTS = 240  # that a phase of a curve is thinned to
COLUMNS = 24  # of a log that are kept, whatever a line may have
LONGEST = 1 << 16  # characters of a line; a longer one is none of ours
LAST_STEP = 1 << 53
LARGEST = 1e100  # of a number: differences and sums of such are finite
SIDE = 1000  # of a plot
HEADROOM = 1.15  # above the highest point, where phases are named
NOT_DRAWN = ("step", "seconds", "skipped")
NAMES = {
    "contrastive": "Contrastive loss",
    "ntp": "Next-token loss",
    "reconstruction": "Reconstruction loss",
    "loss": "Total loss",
    "learning_rate": "Learning rate",
    "gradient_norm": "Gradient norm",
}
PHASES = {"caption": "captioning", "train": "training"}


class Tick(NamedTuple):
    """A label at so many percent from the left, or from the bottom."""

    at: float
    label: str


class Span(NamedTuple):
    """A phase of a run: its name, where it begins and how wide it is, in percent."""

    name: str
    left: float
    width: float


@dataclass
class Curve:
    """One quantity over the steps of a run.

    Args:
        title, summary: what it is, and its first and last values in words.
        lines, bands: points of the means, and of the range they were thinned from, one a phase.
        x_ticks, y_ticks, phases: of the plot.
        cut: whether peaks lie above it.
    """

    title: str
    summary: str
    lines: list[str]
    bands: list[str]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    phases: list[Span]
    cut: bool


@dataclass
class Log:
    """The content of a `log.jsonl`.

    Args:
        columns: by name and phase, the steps and the values there, which may not be finite.
        phases: by name its first and last step, in the order they came.
        rows, damaged: lines that were read, and those that could not be.
        steps: done, as the last row says.
        seconds: of training, over all starts.
        skipped: pairs that could not be read.
    """

    columns: dict[str, dict[str, tuple[array[float], array[float]]]] = field(default_factory=dict)
    phases: dict[str, list[int]] = field(default_factory=dict)
    rows: int = 0
    damaged: int = 0
    steps: int = 0
    seconds: float = 0.0
    skipped: int = 0


def number(value: Any) -> float | None:
    """A number of JSON as a float, inf or NaN for what is not finite or absurdly large; None for
    anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) <= LARGEST else math.nan if value != value else math.inf


def finite(value: Any) -> float | None:
    """A JSON number as a finite float; None for anything else."""
    found = number(value)
    return found if found is not None and math.isfinite(found) else None


def read_log(path: Path) -> Log:
    """Read a log, which may be growing, cut short or damaged; empty where there is none."""
    log, before = Log(), 0.0
    if not path.is_file():
        return log
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.strip():
                continue
            row = _row(line)
            if row is None:
                log.damaged += 1
                continue
            step, phase = row["step"], str(row.get("phase", ""))[:40]
            log.rows += 1
            log.steps = step + 1
            first, last = log.phases.setdefault(phase, [step, step])
            log.phases[phase] = [min(first, step), max(last, step)]
            # a run that goes on counts its seconds anew
            if (seconds := finite(row.get("seconds"))) is not None and seconds >= 0:
                log.seconds += seconds - before if seconds >= before else seconds
                before = seconds
            log.skipped = max(log.skipped, int(finite(row.get("skipped")) or 0))
            for name, value in row.items():
                if name in NOT_DRAWN or (found := number(value)) is None:
                    continue
                if name not in log.columns and len(log.columns) >= COLUMNS:
                    continue
                phases = log.columns.setdefault(name, {})
                steps, values = phases.setdefault(phase, (array("d"), array("d")))
                steps.append(step)
                values.append(found)
    return log


def _row(line: str) -> dict[str, Any] | None:
    """The row of the log on a line, as a mapping; None for a line that is no row."""
    if len(line) > LONGEST:
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    good = isinstance(step, int) and not isinstance(step, bool) and 0 <= step < LAST_STEP
    return row if good else None


def curves(log: Log) -> list[Curve]:
    """A curve for each column that has a finite value, losses first."""
    order = [name for name in NAMES if name in log.columns]
    order += [name for name in log.columns if name not in NAMES]
    return [curve for name in order if (curve := _curve(name, log)) is not None]


def _curve(name: str, log: Log) -> Curve | None:
    known = [step for span in log.phases.values() for step in span]
    x0, x1 = min(known), max(max(known), min(known) + 1)
    thinned: list[np.ndarray] = []  # [points, 4] each: step, mean, lowest, highest
    ends, bad = list[str](), 0
    for steps, values in log.columns[name].values():
        x, y = np.frombuffer(steps), np.frombuffer(values)
        there = np.isfinite(y)
        bad += int((~there).sum())
        if there.any():
            x, y = x[there], y[there]
            thinned.append(_thinned(x, y))
            ends += [f"{y[i]:.3g} at step {x[i]:.0f}" for i in (0, -1)]
    if not thinned:
        return None
    means = np.concatenate([part[:, 1] for part in thinned])
    y0, y1, cut = _range(means)
    starts = [*(first for first, _ in log.phases.values()), x1]
    spans = [
        Span(PHASES.get(phase, phase), 100 * (a - x0) / (x1 - x0), 100 * max(b - a, 0) / (x1 - x0))
        for phase, (a, b) in zip(log.phases, pairwise(starts), strict=True)
        if phase
    ]
    scaled = [_scaled(part, x0, x1, y0, y1) for part in thinned]
    summary = ", ".join(dict.fromkeys((ends[0], ends[-1])))
    if bad:
        summary += f"; {bad} {'value is' if bad == 1 else 'values are'} not finite"
    return Curve(
        NAMES.get(name, name.replace("_", " ")[:60]),
        summary,
        [_points(part[:, 0], part[:, 1]) for part in scaled],
        [_points(np.append(p[:, 0], p[::-1, 0]), np.append(p[:, 3], p[::-1, 2])) for p in scaled],
        ticks(x0, x1, 5),
        ticks(y0, y1, 4),
        spans,
        cut,
    )


def _thinned(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[points, 4]: mean step, mean, lowest and highest value of neighbouring steps."""
    place = ((x - x.min()) * POINTS // (x.max() - x.min() + 1)).astype(int)
    count = np.bincount(place, minlength=POINTS)
    low, high = np.full(POINTS, np.inf), np.full(POINTS, -np.inf)
    np.minimum.at(low, place, y)
    np.maximum.at(high, place, y)
    steps, means = (np.bincount(place, v, POINTS) / np.maximum(count, 1) for v in (x, y))
    there = count > 0
    return np.stack([steps, means, low, high], axis=1)[there]


def _range(means: np.ndarray) -> tuple[float, float, bool]:
    """Lowest and highest value of a plot, and whether a few peaks lie above it."""
    low, high = min(0.0, float(means.min())), float(means.max())
    usual = float(np.quantile(means, 0.98))
    cut = high > 3 * usual > 0
    high = 1.3 * usual if cut else high
    return low, (low + 1 if high <= low else low + HEADROOM * (high - low)), cut


def _scaled(part: np.ndarray, x0: float, x1: float, y0: float, y1: float) -> np.ndarray:
    x = SIDE * (part[:, :1] - x0) / (x1 - x0)
    # far beyond the plot is as good as anywhere
    y = SIDE * (1 - np.clip((part[:, 1:] - y0) / (y1 - y0), -1, 2))
    return np.concatenate([x, y], axis=1)


def _points(x: np.ndarray, y: np.ndarray) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))


def ticks(low: float, high: float, most: int) -> list[Tick]:
    """At most `most` ticks at round numbers between two values, with their places in percent."""
    rough = (high - low) / most
    if not (math.isfinite(rough) and rough > 0):
        return []
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= rough * 0.999)
    first = math.ceil(low / step)
    values = [i * step for i in range(first, first + most + 2) if i * step <= high]
    return [Tick(100 * (value - low) / (high - low), f"{value:.6g}") for value in values]
