"""Indexes as they were before they were tables: read once, by `btok.tools.index`, to be rewritten.

meta.json                    model digest, settings, count, and by name the other two
parts/vectors-<digest>.npy   fp32 [N, D]; in format 1 it was vectors.npy, beside meta.json
parts/items-<digest>.jsonl   a line per row, each with its "id"; in format 1, items.jsonl
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from btok.files import one_line, rename
from btok.tools.rows import Row

MANIFEST = "meta.json"
FORMATS = (1, 2)
FORMAT_1 = ("vectors.npy", "items.jsonl", MANIFEST)
FOLDERS = ("parts", ".ready", ".draft")
BLOCK = 1 << 13  # rows that are rewritten together


def is_there(uri: str | Path) -> bool:
    """Whether an index of the old format lies in this folder; none does at an address."""
    return "://" not in str(uri) and Path(uri, MANIFEST).exists()


class OldIndex:
    """The content of an index of the old format; vectors that an unfinished run had made are not
    among it.

    Args:
        folder: where it lies; meta: the content of `meta.json`.
        items: a mapping per vector; vectors: float32 [N, D], mapped from disk.

    Raises:
        ValueError: a file of it is damaged or gone, or of a later format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.items: list[dict[str, Any]] = []
        self.vectors = np.empty((0, 0), np.float32)
        for name in FORMAT_1:  # a kill may have left them on their way, to be moved in this order
            if (folder / ".ready" / name).exists():
                rename(folder / ".ready" / name, folder / name)
        file = MANIFEST
        try:
            self.meta: dict[str, Any] = json.loads((folder / file).read_text())
            if (version := self.meta["format_version"]) not in FORMATS:
                raise ValueError(f"format_version is {version!r}, expected 1 or 2")
            names = self.meta.get("vectors", FORMAT_1[0]), self.meta.get("items", FORMAT_1[1])
            if not isinstance(self.meta.setdefault("settings", {}), dict):
                raise ValueError(f"settings is {self.meta['settings']!r:.60}, expected an object")
            if count := self.meta["count"]:
                file = names[0]
                self.vectors = np.lib.format.open_memmap(folder / file, mode="r")
                if self.vectors.ndim != 2 or self.vectors.dtype != np.float32:
                    had = f"{self.vectors.dtype} {list(self.vectors.shape)}"
                    raise ValueError(f"it holds {had}, expected float32 [N, D]")
                file = names[1]
                lines = (folder / file).read_bytes().splitlines()
                self.items = [
                    {"uri" if name == "path" else name: v for name, v in json.loads(line).items()}
                    for line in lines
                ]
                ids = {item["id"] for item in self.items}
                if wrong := [each for each in ids if not isinstance(each, str)]:
                    raise ValueError(f"an item's id is {wrong[0]!r:.60}, expected a text")
                if not count == len(self.vectors) == len(ids) == len(self.items):
                    found = f"{len(self.vectors)} vectors and {len(ids)} items"
                    raise ValueError(f"{found}, expected {count}")
        except Exception as error:  # numpy has Python read a header, which raises errors of its own
            if isinstance(error, MemoryError | OSError) and not isinstance(
                error, FileNotFoundError
            ):
                raise  # of the machine
            why = one_line(f"{folder} holds no index that can be read ({file}: {error})")
            raise ValueError(f"{why}; delete it or give another folder") from error

    def rows(self) -> Iterator[Sequence[Row]]:
        """Yield the rows of a table with this index's content, in blocks; what was a "path" is now
        a "uri".
        """
        for first in range(0, len(self.items), BLOCK):
            items = self.items[first : first + BLOCK]
            vectors = self.vectors[first : first + BLOCK]
            yield [Row(item, vector) for item, vector in zip(items, vectors, strict=True)]


def remove(folder: Path) -> None:
    """Delete the files of an index of the old format; the manifest last, which says that there is
    something to do.
    """
    for name in FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in FORMAT_1:
        (folder / name).unlink(missing_ok=True)
