"""Scores of every view of a checkpoint's bottleneck rows, all made from one pass.

    z_kd = normalize(mean(rows[:, :k, :d], 1))      V_kd = normalize(rows[:, :k, :d])

As no row sees a later one, that is what `encode(num_btoks=k, dims=d)` gives; the encoder's tests
hold it to that. A view is named by what it is: "16 of 128", "int8 16 of 128", "rows 4 of 128",
"int8 rows 4 of 128", "auto 0.02".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from btok.calibration import Calibration, cell_of, quantised
from btok.data.records import RetrievalTask, Side
from btok.encoder import BTokEncoder
from btok.evaluation import runner
from btok.inputs import with_frames

Rows = NDArray[np.float32]
TOGETHER = 64  # sides of a packed pass


class Embedded(NamedTuple):
    """Sides as the model has them: rows [N, K, D], and each one's kind and size."""

    rows: Rows
    cells: list[str]


class View(NamedTuple):
    """What an item is compared by: its bytes, and its vectors [N, d] or [N, k, d] of `Embedded`."""

    bytes: float
    vectors: Callable[[Embedded], Rows]
    budgets: Callable[[Embedded], NDArray[np.intp]] | None = None  # of "auto", each side's


def embed(encoder: BTokEncoder, sides: Sequence[Side]) -> Embedded:
    """Embed sides with all K rows each."""
    made: list[Rows] = []
    cells: list[str] = []
    model = encoder.model.eval()
    for at in range(0, len(sides), TOGETHER):
        samples = [encoder.processor(with_frames(side)) for side in sides[at : at + TOGETHER]]
        cells += map(cell_of, samples)
        with torch.inference_mode():
            rows = model(model.pack(samples).to(model.backbone.device)).rows
        assert rows is not None
        made.append(rows.float().cpu().numpy())
    return Embedded(np.concatenate(made), cells)


def unit(x: Rows) -> Rows:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def dense(rows: Rows, k: int, d: int) -> Rows:
    """The embeddings [N, d] by the first k rows and d components."""
    return unit(rows[:, :k, :d].mean(1))


def rounded(x: Rows, scale: float | None) -> Rows:
    """The floats that int8 vectors of a scale stand for; the vectors themselves without a scale."""
    return x if scale is None else quantised(x, scale) * np.float32(scale)


def views_of(
    budgets: Sequence[int],
    dims: Sequence[int],
    width: int,
    calibration: Calibration,
    bounds: Sequence[float] = (),
    rows: bool = False,
    cross: bool = False,
) -> Iterator[tuple[str, View]]:
    """The views of a model, by name.

    Args:
        budgets: k, the last one K; dims: d below the width; width: D.
        calibration: of the model, for int8 and the bounds.
        bounds: of "auto": the fewest rows whose calibrated loss is at most that.
        rows: also the rows as vectors.
        cross: every d with every k, not with K alone.
    """
    most = budgets[-1]
    for k in budgets:
        for d in (*dims, width) if cross or k == most else (width,):
            yield f"{k} of {d}", View(4 * d, partial(_embedding, k, d, None))
            scales = [
                calibration.scales.get(of, {}).get(str(d)) for of in ("vector", "multi_vector")
            ]
            if k == most and scales[0]:
                yield f"int8 {k} of {d}", View(d, partial(_embedding, k, d, scales[0]))
            if rows:
                yield f"rows {k} of {d}", View(4 * k * d, partial(_rows, k, d, None))
                if scales[1]:
                    yield f"int8 rows {k} of {d}", View(k * d, partial(_rows, k, d, scales[1]))
    for bound in bounds:
        by = calibration, bound, width
        yield f"auto {bound:g}", View(4 * width, partial(_chosen, *by), partial(_numbers, *by))


def _embedding(k: int, d: int, scale: float | None, embedded: Embedded) -> Rows:
    return rounded(dense(embedded.rows, k, d), scale)


def _rows(k: int, d: int, scale: float | None, embedded: Embedded) -> Rows:
    return rounded(unit(embedded.rows[:, :k, :d]), scale)


def _chosen(calibration: Calibration, bound: float, width: int, embedded: Embedded) -> Rows:
    numbers = _numbers(calibration, bound, width, embedded)
    out = np.empty((len(numbers), width), np.float32)
    for k in np.unique(numbers):
        out[numbers == k] = dense(embedded.rows[numbers == k], int(k), width)
    return out


def _numbers(
    calibration: Calibration, bound: float, width: int, embedded: Embedded
) -> NDArray[np.intp]:
    return np.array([calibration.budget(cell, bound, width) for cell in embedded.cells])


def _looked_up(vectors: Rows, place: Mapping[int, int], sides: Sequence[Side]) -> Rows:
    return vectors[[place[id(side)] for side in sides]]


def score(
    encoder: BTokEncoder, tasks: Sequence[RetrievalTask], views: Mapping[str, View]
) -> dict[str, dict[str, Any]]:
    """The bytes an item and the score of each task in percent, by view; for "auto" also how many
    bottleneck tokens an input has, in the mean.
    """
    sides = [side for task in tasks for side in (*task.queries, *task.candidates)]
    embedded = embed(encoder, sides)
    place = {id(side): i for i, side in enumerate(sides)}
    found = {}
    for name, view in views.items():
        result = runner.evaluate(partial(_looked_up, view.vectors(embedded), place), tasks)
        scores = {task: row["score"] for task, row in result["tasks"].items()}
        found[name] = {"bytes": view.bytes, "mean": result["overall"], "tasks": scores}
        if view.budgets:
            found[name]["tokens"] = float(view.budgets(embedded).mean())
    return found
