"""The pocket benchmark's scores before and after training, and what some queries found."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from btok.data.records import RetrievalTask
from btok.encoder import BTokEncoder
from btok.evaluation import runner
from btok.files import write_json
from btok.model import BTokModel
from btok.processing import Processor
from btok.tools import pictures
from btok_kernels.ranks import rank
from train.pocket import data
from train.recipes import Recipe

SHEETS = ("I-RET", "V-RET", "VisDoc")  # tasks with pictures to find: image, video, page
_tasks, _digest = cache(data.tasks), cache(data.digest)  # asked for before and after training


def evaluate(
    model: BTokModel, processor: Processor, recipe: Recipe, name: str
) -> dict[str, list[runner.Retrieved]]:
    """Score the model on all tasks and write the result into the run folder; every rank calls it.

    Args:
        recipe: the run's, with its folder and the queries per task.
        name: of the result's file.

    Returns:
        What each query found, by task.
    """
    encoder = BTokEncoder(model, processor)

    retrieved: dict[str, list[runner.Retrieved]] = {}
    result = runner.evaluate(
        lambda sides: encoder.encode(sides, show_progress=False),
        _tasks(recipe.eval_queries),
        settings=recipe.described(),
        data_digest=_digest(),
        progress=rank() == 0,
        retrieved=retrieved,
    )
    if rank() == 0:
        write_json(recipe.output / name, result)
    return retrieved


def show(recipe: Recipe, retrieved: dict[str, list[runner.Retrieved]]) -> None:
    """Draw what some queries found, and print the scores before and after training."""
    for task in _tasks(recipe.eval_queries):
        if task.name in SHEETS:
            path = recipe.output / f"retrievals-{task.name}.png"
            draw(task, retrieved[task.name], path)
    files = (recipe.output / name for name in ("before.json", "metrics.json"))
    print(runner.format_table(*(json.loads(file.read_text()) for file in files)))


def draw(task: RetrievalTask, found: Sequence[runner.Retrieved], path: Path, rows: int = 8) -> None:
    """A contact sheet of evenly spaced queries, as they came, right or wrong."""
    picked = range(0, len(found), max(1, len(found) // rows))[:rows]
    lines = [
        pictures.SheetRow(
            task.queries[i], [task.candidates[c] for c in found[i].top], *found[i][1:]
        )
        for i in picked
    ]
    title = f"{task.name}: query, the five nearest, the right one framed"
    pictures.contact_sheet(lines, path, title)
