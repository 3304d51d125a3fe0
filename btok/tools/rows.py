"""What an index, or a file of vectors, is made of: rows, and what their vectors depend on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
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
    """What people call an item: its "uri", with its "page" or times where it has them; else its
    "id".
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
    """What a row says; a null says nothing."""
    return {name: value for name, value in row.items() if value is not None}


def refuse_ungrouped() -> None:
    """A ValueError where torchrun started several processes that have no process group."""
    if int(os.environ.get("WORLD_SIZE", 1)) > world():
        raise ValueError("under torchrun call torch.distributed.init_process_group first")


def refuse_twice(where: str, ids: Sequence[str]) -> None:
    """A ValueError that names an id which is there twice."""
    if len(set(ids)) < len(ids):
        before: set[str] = set()
        for each in ids:
            if each in before:
                raise ValueError(f"{where}: the id {each!r} came twice, expected all different")
            before.add(each)


def described(encoder: BTokEncoder, instruction: str | None) -> dict[str, Any]:
    """What an encoder's vectors depend on, and where it is."""
    digest = encoder.digest  # which needs a checkpoint
    return {
        "model": digest,
        "checkpoint": str(Path(str(encoder.checkpoint)).resolve()),
        "settings": {"instruction": instruction or "", **encoder.settings},
    }


def said(name: str, value: Any) -> str:
    """A setting's value in a message; None is what is not said because it is as usual."""
    if value is None:
        return "all" if name == "dims" else "not set"
    return repr(value)


def refuse_other(place: str | Path, had: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """A ValueError where vectors there are of another model or other settings."""
    old = {"model": had.get("model"), **had.get("settings", {})}
    new = {"model": asked["model"], **asked["settings"]}
    # bounds on pixels were once kept for models of text alone, too
    kept = {name for name in old if not name.endswith("_pixels")}
    for name in sorted(new.keys() | kept):
        if old.get(name) != new.get(name):
            raise ValueError(
                f"{place} holds vectors of {name} {said(name, old.get(name))}, this is "
                f"{said(name, new.get(name))}; delete it or give another output"
            )
