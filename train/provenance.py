"""`run.json`: what a run was made by. Nothing reads it to train; the report shows it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from btok.files import write_json
from btok.model import BTokModel
from btok_kernels.ranks import world
from train.recipes import RECIPES, Recipe

NOT_SHOWN = ("extras", "environment")  # of what is known of a machine
NAME = "run.json"


def note_start(
    recipe: Recipe, name: str, model: BTokModel, step: int, machine: Mapping[str, Any]
) -> None:
    """Add this start to those of the run: when, at which step, on what machine, by which commit.

    Args:
        recipe, name: the run's settings, and the recipe that they started from.
        model: as it trains; its parameters are counted.
        step: the first that is done now.
        machine: as `btok.tools.env.gather` describes it.
    """
    had, now = RECIPES[name].described(), recipe.described()
    changed = {key: [had[key], now[key]] for key in now if now[key] != had[key]}
    weights = [(p.numel(), p.requires_grad) for p in model.parameters()]
    noted = {"recipe": name, "changed": changed, "parameters": sum(n for n, _ in weights)}
    noted["trained_parameters"] = sum(n for n, trains in weights if trains)
    shown = {key: value for key, value in machine.items() if key not in NOT_SHOWN}
    start = {"time": _now(), "step": step, "processes": world(), **shown}
    starts = [*_read(recipe).get("starts", []), start]
    write_json(recipe.output / NAME, {**noted, "starts": starts})


def note_end(recipe: Recipe) -> None:
    """Note in `run.json` when the run ended, what comes after training included."""
    write_json(recipe.output / NAME, {**_read(recipe), "ended": _now()})


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _read(recipe: Recipe) -> dict[str, Any]:
    """The content of `run.json`; empty for an older version's run, or where it is damaged."""
    try:
        noted = json.loads((recipe.output / NAME).read_text(encoding="utf-8"))
        return noted if isinstance(noted.get("starts"), list) else {}
    except (OSError, ValueError, AttributeError):
        return {}
