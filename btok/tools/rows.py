"""What an index, or a file of vectors, is made of: rows, and what their vectors depend on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import date, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from btok.encoder import BTokEncoder
from btok_kernels.ranks import world

SAYABLE = (str, int, float, bool, bytes, datetime, date)  # by an item


class Row(NamedTuple):
    """What an item says, at least its "id", and its vector, float32 [D], or why it has none."""

    item: Mapping[str, Any]
    vector: NDArray[np.float32] | None
    tokens: int | None = None
    error: str | None = None


class Encoded(NamedTuple):
    """What a run left: how many vectors there are, how many of them are new, what the items said
    that went, by name why others have no vector; the recall of an approximate index, if one was
    made.
    """

    vectors: int
    added: int
    removed: list[dict[str, Any]]
    unreadable: dict[str, str]
    recall: float | None = None


def as_item(item: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """An item as a mapping; a TypeError where its "id" is no text, or it says what no column holds
    and gives back as it was.
    """
    found = {"id": item} if isinstance(item, str) else item
    if not isinstance(found, Mapping) or not isinstance(found.get("id"), str):
        raise TypeError(f"an item is {item!r:.60}, expected a text or a mapping with a text as id")
    for name, value in found.items():
        if not isinstance(name, str):
            raise TypeError(f"item {found['id']!r:.60} has {name!r:.60}, expected names of text")
        each = value if isinstance(value, list) else [value]
        if not all(v is None or (type(v) in SAYABLE and v == v) for v in each):  # not of a NaN
            raise TypeError(
                f"item {found['id']!r:.60} has {name} = {value!r:.60}, expected a text, a number, "
                "bytes, a date or a list of these"
            )
    return found


def item_name(item: Mapping[str, Any]) -> str:
    """The name that people know an item by: its "uri", with its "page" or times where it has them;
    else its "id".
    """
    name = str(item.get("uri") or item["id"])
    if item.get("page"):
        name += f", page {item['page']}"
    if item.get("end") is not None:
        name += f", {_clock(item.get('start') or 0)}-{_clock(item['end'])}"
    return name


def _clock(seconds: float) -> str:
    """1:05:30, or 5:30 within an hour."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def without_none(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without its nulls, which say nothing."""
    return {name: value for name, value in row.items() if value is not None}


def quoted(text: str) -> str:
    """A text as a quoted literal in an SQL condition."""
    return "'" + text.replace("'", "''") + "'"


def refuse_ungrouped() -> None:
    """A ValueError where torchrun started several processes that have no process group."""
    if int(os.environ.get("WORLD_SIZE", 1)) > world():
        raise ValueError("under torchrun call torch.distributed.init_process_group first")


def described(encoder: BTokEncoder, instruction: str | None) -> dict[str, Any]:
    """The settings that an encoder's vectors depend on, and where its checkpoint is."""
    digest = encoder.digest  # which needs a checkpoint
    return {
        "model": digest,
        "checkpoint": str(Path(str(encoder.checkpoint)).resolve()),
        "settings": {"instruction": instruction or "", **encoder.settings},
    }


def difference(had: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """The first setting in which two mappings differ, as "dims 16, this is all"; "" where they do
    not.
    """
    for name in sorted(had.keys() | asked.keys()):
        if had.get(name) != asked.get(name):
            return f"{name} {_said(name, had.get(name))}, this is {_said(name, asked.get(name))}"
    return ""


def _said(name: str, value: Any) -> str:
    """A setting's value in a message; None is what is not said because it is as usual."""
    if value is None:
        return "all" if name == "dims" else "not set"
    return repr(value)


def refuse_other(place: str | Path, had: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise a ValueError where vectors there are of another model or other settings."""
    new = {"model": asked["model"], **asked["settings"]}
    old = {"model": had.get("model"), **had.get("settings", {})}
    # bounds on pixels were once kept for models of text alone, too
    old = {name: v for name, v in old.items() if name in new or not name.endswith("_pixels")}
    if why := difference(old, new):
        raise ValueError(f"{place} holds vectors of {why}; delete it or give another output")
