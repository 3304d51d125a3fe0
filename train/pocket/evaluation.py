"""The pocket benchmark's scores before and after training, and what some queries found."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

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
ROWS = 8  # queries on a sheet
_tasks, _digest = cache(data.tasks), cache(data.digest)  # asked for before and after training


def evaluate(
    model: BTokModel, processor: Processor, recipe: Recipe, name: str
) -> tuple[dict[str, Any], dict[str, list[runner.Retrieved]]]:
    """Score the model on all tasks and write the result into the run folder; every rank calls it.

    Args:
        recipe: the run's, with its folder and the queries per task.
        name: of the result's file.

    Returns:
        The result, and what each query found, by task.
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
    return result, retrieved


def format_scores(result: Mapping[str, Any]) -> str:
    """One result of the benchmark as plain text: what is asked, what chance gives, the score."""
    rows: list[tuple[str, str, str, str]] = [("task", "asked -> found", "chance", "now")]
    for name, row in result["tasks"].items():
        rows.append((name, data.ASKED[name], f"{row['chance']:.1f}", f"{row['score']:.1f}"))
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"  {name:<{wide[0]}}  {asked:<{wide[1]}}  {chance:>{wide[2]}}  {score:>{wide[3]}}"
        for name, asked, chance, score in rows
    )


def draw_sheets(recipe: Recipe, retrieved: Mapping[str, list[runner.Retrieved]]) -> None:
    """Draw what some queries found, right or wrong, a contact sheet a task, into the run folder."""
    for task in _tasks(recipe.eval_queries):
        if task.name not in SHEETS:
            continue
        found = retrieved[task.name]
        picked = range(0, len(found), max(1, len(found) // ROWS))[:ROWS]  # evenly spaced
        lines = [
            pictures.SheetRow(
                task.queries[i], [task.candidates[c] for c in found[i].top], *found[i][1:]
            )
            for i in picked
        ]
        title = f"{task.name}: query, the five nearest, the right one framed"
        pictures.contact_sheet(lines, recipe.output / f"retrievals-{task.name}.png", title)
