"""An index of a folder and that folder's files, as a page may show them: what is indexed, nothing
else, and only as it was when its vector was made.
"""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from btok.data.records import Side
from btok.files import printable
from btok.inputs import (
    DOCUMENTS,
    IMAGES,
    KINDS,
    TEXTS,
    VIDEOS,
    Page,
    as_side,
    is_video,
    rgb_array,
    with_frames,
)
from btok.tools.folder import as_part, changed
from btok.tools.index import Hit, Index
from btok.tools.rows import item_name, quoted, without_none

BOTH = tuple(ending for ending in VIDEOS if ending in TEXTS)  # `.ts` is TypeScript or a video
# a folder's kinds by their endings
ENDINGS = {
    "picture": tuple(ending for ending in IMAGES if ending not in DOCUMENTS),
    "page": DOCUMENTS,
    "video": tuple(ending for ending in VIDEOS if ending not in BOTH),
    "text": TEXTS,
}
STAMP = ("size", "mtime_ns")  # by which a file is known to be what was indexed
SIZES = {"small": 320, "large": 1280}  # pixels of the longer edge, at most
LOSSLESS = 1 << 16  # pixels of a picture, up to which JPEG would show more than it saves
GRID = 4  # frames that stand for a video, in two rows
EXCERPT = 280  # characters of a text that a hit shows
KEPT = 1 << 26  # bytes of thumbnails that are kept


class Shown(NamedTuple):
    """A picture for a browser."""

    data: bytes
    media_type: str


class Shelf:
    """The part of an index that a web page may show.

    Args:
        index: of the folder's files.
        root: the folder, resolved.
        real: by uri, the paths that are no UTF-8 (`Listing.real`).
        query_instruction: put before the text of queries.

    Raises:
        ValueError: an index of other things than files.
    """

    def __init__(
        self, index: Index, root: Path, real: Mapping[str, str], query_instruction: str = ""
    ) -> None:
        lacking = " OR ".join(f"{name} IS NULL" for name in ("uri", *STAMP))
        if not {"uri", *STAMP} <= {*index.columns} or index.count(lacking):
            raise ValueError(
                f"{index.uri} is an index of other things than a folder's files; give the --output "
                "of an `encode` of this folder"
            )
        self.index, self.root, self.real = index, root, real
        self.query_instruction = query_instruction
        # one query at a time has the model, and one file's pixels the memory
        self.encoding, self.reading, self.looking = (threading.Lock() for _ in range(3))
        self.thumbnails: OrderedDict[tuple[str, str], Shown] = OrderedDict()
        self.streams = self._streams()

    def must_be_there(self) -> None:
        """Raise a FileNotFoundError where the folder or its index is gone, as with a disk."""
        if not self.root.is_dir():
            raise FileNotFoundError(f"the folder {printable(self.root.name)} is gone")
        if "://" not in self.index.uri and not (index := Path(self.index.uri)).is_dir():
            raise FileNotFoundError(f"the index {printable(index.name)} is gone")

    def counts(self) -> dict[str, int]:
        """The number of items of each kind."""
        return {kind: self.index.count(self._among(kind)) for kind in ENDINGS}

    def _streams(self) -> frozenset[str]:
        """The videos whose ending is one of `BOTH`, by uri."""
        found = self.index.rows(["uri"], _ending(BOTH))
        uris = {uri for batch in found for uri in batch["uri"].to_pylist()}
        return frozenset(uri for uri in uris if self._is_stream(uri))

    def _is_stream(self, uri: str) -> bool:
        try:
            return is_video(self._path(uri))
        except (OSError, ValueError):
            return False

    def _among(self, kind: str | None) -> str | None:
        """The condition of a kind; a ValueError for another than these."""
        if kind is None:
            return None
        if kind not in ENDINGS:
            raise ValueError(f"kind is {kind!r:.40}, expected one of {', '.join(ENDINGS)}")
        among = _ending(ENDINGS[kind])
        streams = ", ".join(quoted(uri) for uri in sorted(self.streams))
        if streams and kind in ("video", "text"):
            among += f" OR uri IN ({streams})" if kind == "video" else ""
            among = f"({among}) AND uri NOT IN ({streams})" if kind == "text" else among
        return among

    def search(self, text: str, picture: bytes, kind: str | None, k: int) -> list[dict[str, Any]]:
        """The k items nearest to words, a picture (a file's bytes), or both, as the page is told of
        them.

        Raises:
            ValueError: neither, or no picture that can be read.
        """
        if not text.strip() and not picture:
            raise ValueError("the query is empty, expected words or a picture")
        side = with_frames(as_side(Side(text, images=[picture] if picture else [])))
        with self.encoding:
            (found,) = self.index.search(
                [side], k, self._among(kind), instruction=self.query_instruction
            )
        return self._told(found)

    def near(self, name: str, kind: str | None, k: int) -> list[dict[str, Any]]:
        """The items nearest to an item, without itself.

        Raises:
            KeyError: there is none of this id.
        """
        self.item(name)
        vectors = [rows for rows, _ in self.index.vectors(f"id = {quoted(name)}")]
        (found,) = self.index.search(np.concatenate(vectors)[:1], k + 1, self._among(kind))
        return self._told([hit for hit in found if hit.item["id"] != name][:k])

    def first(self, kind: str | None, k: int) -> list[dict[str, Any]]:
        """The first k items of a kind, in the order in which they were written."""
        among = "error IS NULL"
        if condition := self._among(kind):
            among += f" AND ({condition})"
        rows: list[dict[str, Any]] = []
        for batch in self.index.rows(where=among):
            rows += batch.slice(0, k - len(rows)).to_pylist()  # a batch may have 65,536
            if len(rows) == k:
                break
        return [self.told(without_none(row)) for row in rows]

    def _told(self, found: list[Hit]) -> list[dict[str, Any]]:
        return [{**self.told(hit.item), "score": round(float(hit.score), 4)} for hit in found]

    def told(self, item: Mapping[str, Any]) -> dict[str, Any]:
        """The facts of an item that the page is given: no path but the one within the folder."""
        kind = self._kind(item)
        said = {"id": item["id"], "name": printable(item_name(item)), "kind": kind}
        said |= {key: item[key] for key in ("page", "start", "end") if key in item}
        if kind == "text":
            try:
                said["excerpt"] = self.text(item)[:EXCERPT]
            except (OSError, ValueError, ImportError):
                said["excerpt"] = ""  # gone or changed since; opening it tells why
        return said

    def _kind(self, item: Mapping[str, Any]) -> str:
        if item["uri"] in self.streams:
            return "video"
        ending = Path(item["uri"]).suffix.lower()
        return next((kind for kind, endings in ENDINGS.items() if ending in endings), "text")

    def item(self, name: str) -> dict[str, Any]:
        """The index's columns of an item with a vector; a KeyError for another id."""
        with self.looking:
            for row in self.index.look_up("id", [name]):
                if "error" not in row:
                    return row
        raise KeyError(name)

    def path(self, item: Mapping[str, Any]) -> Path:
        """The file of an item, for who opens it now.

        Raises:
            PermissionError: it lies outside the folder, as through a link or by an index that was
                tampered with, or is none that is indexed.
            FileNotFoundError: it is gone, or no longer what was indexed.
        """
        path, name = self._path(item["uri"]), printable(item["uri"])
        if not path.is_file():
            raise FileNotFoundError(f"{name} is gone since it was indexed")
        hidden = any(part.startswith(".") for part in path.relative_to(self.root).parts)
        if hidden or path.suffix.lower() not in KINDS or not item.keys() >= {*STAMP}:
            raise PermissionError(f"{name} is no file that is indexed")
        if changed(path, item):
            raise FileNotFoundError(f"{name} changed since it was indexed; start the page again")
        return path

    def _path(self, uri: str) -> Path:
        path = self.root / self.real.get(uri, uri)
        if not path.is_relative_to(self.root) or path.resolve() != path:
            raise PermissionError(f"{printable(uri)} leads out of the folder")
        return path

    def text(self, item: Mapping[str, Any]) -> str:
        """The text that was embedded of a text file; a ValueError for another item."""
        if self._kind(item) != "text":
            raise ValueError(f"{printable(item['uri'])} is no text")
        return with_frames(as_side(self.path(item))).text

    def thumbnail(self, item: Mapping[str, Any], size: str) -> Shown | None:
        """A picture, a page, or a video's frames; None of a text.

        Raises:
            PermissionError, FileNotFoundError: as `path`, also of one that was shown before.
            ValueError: it cannot be read any more.
        """
        path, key = self.path(item), (item["id"], size)
        if self._kind(item) == "text":
            return None
        if (shown := self.thumbnails.get(key)) is not None:
            return shown
        with self.reading:
            if (shown := self.thumbnails.get(key)) is not None:  # another made it meanwhile
                return shown
            part = as_part(path, item)
            if isinstance(part, Page):
                frames = [part.rgb_array()]
            else:
                side = with_frames(as_side(part))
                frames = [rgb_array(frame) for frame in (*side.images, *side.video)]
            shown = self.thumbnails[key] = _encoded(_grid(frames), SIZES[size])
            while sum(len(each.data) for each in self.thumbnails.values()) > KEPT:
                self.thumbnails.popitem(last=False)
        return shown


def _ending(endings: tuple[str, ...]) -> str:
    return " OR ".join(f"lower(uri) LIKE '%{ending}'" for ending in endings)


def _grid(frames: list[np.ndarray]) -> np.ndarray:
    """One picture; of a video four frames, evenly over it, beside and below each other."""
    if len(frames) < GRID:
        return frames[0]
    at = np.linspace(0, len(frames) - 1, GRID).round().astype(int)
    height = min(frames[i].shape[0] for i in at)
    width = min(frames[i].shape[1] for i in at)
    a, b, c, d = (frames[i][:height, :width] for i in at)
    return np.concatenate((np.concatenate((a, b), 1), np.concatenate((c, d), 1)))


def _encoded(pixels: np.ndarray, longest: int) -> Shown:
    from PIL import Image

    image, file = Image.fromarray(pixels), io.BytesIO()
    lossless = image.width * image.height <= LOSSLESS
    image.thumbnail((longest, longest))
    if lossless:
        image.save(file, "PNG")
        return Shown(file.getvalue(), "image/png")
    image.save(file, "JPEG", quality=85)
    return Shown(file.getvalue(), "image/jpeg")
