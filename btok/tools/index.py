"""A folder of vectors, what they stand for, and the model and settings they were made with.

    meta.json                    the manifest: model digest, settings, count, what could not be
                                 read, and by name the two files that are the index:
    parts/vectors-<digest>.npy   fp32 [N, D]
    parts/items-<digest>.jsonl   a line per row, each with its "id"
    parts/<digest>.npz           vectors that an unfinished `encode_to` has made

encoder, inputs and items -> `encode_to` (parts, shared by the ranks) -> `Index` -> `search`

A file of `parts` is named by what it holds, is there whole or not at all, and never changes. The
manifest alone is replaced, in one step: a kill leaves the old index or the new one, and loses at
most the part in work. What the manifest does not name is removed once it is in place.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from btok.encoder import BTokEncoder
from btok.files import one_line, rename, whole, write_text
from btok_kernels.ranks import rank, world

FORMAT_VERSION = 2
FORMAT_1 = ("vectors.npy", "items.jsonl", "meta.json")  # still read; the next change renews it
PART = 256  # inputs of a part, encoded together
BLOCK = 1 << 16  # rows of a product
SHARED = "if another process writes to this folder, let it end; then the same command does the rest"


class Index:
    """Vectors on disk and what they stand for; `open_index` or `encode_to` makes one.

    Args:
        folder: where it lies; meta: the content of `meta.json`; files: of vectors and of items.
        items: a mapping per vector; vectors: float32 [N, D], mapped from disk.

    Raises:
        ValueError: a file of it is damaged or gone, or of a later format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.items: list[dict[str, Any]] = []
        self.vectors = np.empty((0, 0), np.float32)
        file = "meta.json"
        try:
            self.meta: dict[str, Any] = json.loads((folder / file).read_text())
            if (version := self.meta["format_version"]) not in (1, FORMAT_VERSION):
                raise ValueError(f"format_version is {version!r}, expected {FORMAT_VERSION}")
            names = self.meta.get("vectors", FORMAT_1[0]), self.meta.get("items", FORMAT_1[1])
            self.files = [folder / name for name in names]
            for name in ("settings", "unreadable"):
                if not isinstance(self.meta.setdefault(name, {}), dict):
                    raise ValueError(f"{name} is {self.meta[name]!r:.60}, expected an object")
            if count := self.meta["count"]:
                file = names[0]
                self.vectors = np.lib.format.open_memmap(self.files[0], mode="r")
                if self.vectors.ndim != 2 or self.vectors.dtype != np.float32:
                    had = f"{self.vectors.dtype} {list(self.vectors.shape)}"
                    raise ValueError(f"it holds {had}, expected float32 [N, D]")
                file = names[1]
                self.items = [json.loads(line) for line in self.files[1].read_bytes().splitlines()]
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

    def search(self, queries: np.ndarray, top: int = 5) -> list[list[tuple[float, int]]]:
        """Per query [Q, D] its best rows, exactly: (score, row), equal scores in row order.

        ValueError for a vector that is not of length 1: the file is damaged.
        """
        parts = []
        for first in range(0, len(self.vectors), BLOCK):
            block = self.vectors[first : first + BLOCK]
            whole = np.abs(np.einsum("nd,nd->n", block, block) - 1) < 1e-2  # False for a NaN
            if not whole.all():
                raise ValueError(
                    f"{self.folder}: vector {first + int(whole.argmin())} in "
                    f"{self.meta.get('vectors', FORMAT_1[0])} is damaged, its length is not 1; "
                    "delete the folder, and encode makes it again"
                )
            parts.append(block @ queries.T)
        scores = np.concatenate(parts).T
        best = np.argsort(-scores, axis=1, kind="stable")[:, :top]
        return [[(float(s[row]), int(row)) for row in b] for s, b in zip(scores, best, strict=True)]


def open_index(encoder: BTokEncoder, folder: str | Path, instruction: str | None = None) -> Index:
    """The index of an encoder and its settings in a folder, made if there is none.

    Args:
        encoder: from `BTokEncoder.from_pretrained`, which names its checkpoint.
        instruction: put before the text of every input; an index is of one instruction.

    Raises:
        ValueError: vectors of another model or other settings, or no index; no checkpoint to name
            the model; several processes that have no process group.
    """
    folder = Path(folder)
    settings = {"instruction": instruction or "", **encoder.settings}
    asked = {"model": encoder.digest, **settings}
    if int(os.environ.get("WORLD_SIZE", 1)) > world():
        raise ValueError("under torchrun call torch.distributed.init_process_group first")
    if rank() == 0:
        for name in FORMAT_1:  # a kill may have left them on their way, to be moved in this order
            if (folder / ".ready" / name).exists():
                rename(folder / ".ready" / name, folder / name)
        if not (folder / "meta.json").exists():
            if any(not path.name.startswith("meta.json.") for path in folder.glob("*")):
                raise ValueError(f"{folder} is no index and not empty; give another folder")
            folder.mkdir(parents=True, exist_ok=True)
            meta = {"format_version": FORMAT_VERSION, "model": encoder.digest, "settings": settings}
            _write_manifest(folder, {**meta, "count": 0, "unreadable": {}})
    _all_here()
    index = Index(folder)
    had = {"model": index.meta.get("model"), **index.meta.get("settings", {})}
    # bounds on pixels were once kept for models of text alone, too
    kept = {name for name in had if not name.endswith("_pixels")}
    for name in sorted(asked.keys() | kept):
        if had.get(name) != asked.get(name):
            raise ValueError(
                f"{folder} holds vectors of {name} {had.get(name)!r}, this is "
                f"{asked.get(name)!r}; delete it or give another folder"
            )
    return index


def item_name(item: Mapping[str, Any]) -> str:
    """What people call an item: its "path", with its "page" where it has one; else its "id"."""
    page = f", page {item['page']}" if item.get("page") else ""
    return f"{item.get('path', item['id'])}{page}"


def encode_to(
    encoder: BTokEncoder,
    folder: str | Path,
    inputs: Iterable[Any],
    items: Iterable[str | Mapping[str, Any]],
    instruction: str | None = None,
    batch_tokens: int = 16384,
    show_progress: bool = True,
) -> Index:
    """Make `folder` the index of exactly these inputs, in order; encode what it lacks.

    A killed call goes on where it was, to the same bytes. Inputs that cannot be read are left out
    and named in the index's `meta["unreadable"]` by `item_name`. In a process group the ranks share
    the work and the folder.

    Args:
        encoder: from `BTokEncoder.from_pretrained`.
        inputs, instruction, batch_tokens, show_progress: as `BTokEncoder.encode` takes them.
        items: per input its id, or a mapping for JSON with its "id", all different. A vector of the
            same id is not computed again, so an id must change with the content.

    Raises:
        ValueError: what `open_index` refuses; an id twice; no input that can be read.
    """
    index = open_index(encoder, folder, instruction)
    known = {item["id"] for item in index.items}
    for _, ids, reasons in _parts(index.folder):
        known.update(ids, reasons)
    _all_here()  # no part is written before every rank has looked
    order: list[Mapping[str, Any]] = []
    mine: list[str] = []

    def lacking() -> Iterator[Any]:
        """Inputs that have no vector yet; of every world() parts of them this rank's one."""
        count = 0
        for value, item in zip(inputs, items, strict=True):
            order.append({"id": item} if isinstance(item, str) else item)
            if order[-1]["id"] not in known:
                if count // PART % world() == rank():
                    mine.append(order[-1]["id"])
                    yield value
                count += 1

    rows: dict[str, np.ndarray] = {}
    broken: dict[int, str] = {}

    def write_part() -> None:
        """Keep vectors by id, and reasons by id."""
        text = json.dumps([list(rows), {mine[i]: why for i, why in broken.items()}]).encode()
        with whole(_part(index.folder, "{}.npz", text)) as draft, open(draft, "wb") as file:
            np.savez(file, text=np.frombuffer(text, np.uint8), rows=np.array([*rows.values()]))
        rows.clear()
        broken.clear()

    arguments = (lacking(), instruction, batch_tokens, show_progress and rank() == 0)
    for indices, vectors in encoder.encode_iter(*arguments, window=PART, unreadable=broken):
        rows.update(zip((mine[i] for i in indices), vectors, strict=True))
        if len(rows) + len(broken) == PART:  # always met: a window is a part
            write_part()
    if rows or broken:
        write_part()
    try:
        return _commit(index, order)
    except FileNotFoundError as error:
        raise ValueError(f"{index.folder}: {error}; {SHARED}") from error


def _part(folder: Path, name: str, holds: bytes) -> Path:
    """The path of a part, with a digest of what it holds in its name."""
    (folder / "parts").mkdir(exist_ok=True)
    return folder / "parts" / name.format(hashlib.sha256(holds).hexdigest()[:24])


def _parts(folder: Path, vectors: bool = False) -> Iterator[tuple[Any, list[str], dict[str, str]]]:
    """Of each part that is done its vectors, if wanted, the ids of its rows, and reasons by id."""
    for path in sorted(folder.glob("parts/*.npz")):
        try:
            with np.load(path) as part:
                rows = part["rows"] if vectors else None
                ids, reasons = json.loads(part["text"].tobytes())
            whys = reasons.values() if isinstance(reasons, dict) else [None]
            if not all(isinstance(each, str) for each in chain(ids, whys)):
                raise ValueError("it does not hold ids and reasons")
            if rows is not None and ids and (rows.dtype != np.float32 or len(rows) != len(ids)):
                raise ValueError(f"it holds {rows.dtype} {list(rows.shape)} for {len(ids)} ids")
        except FileNotFoundError:  # another process has it; what is missing then will be told
            continue
        except Exception as error:  # of numpy, of its zip files and of JSON
            why = f"{path} cannot be read ({error}); delete it, and the same command makes its"
            raise ValueError(f"{why} vectors again") from error
        yield rows, ids, reasons


def _commit(index: Index, order: list[Mapping[str, Any]]) -> Index:
    """Make the index hold exactly these items, less unreadable ones."""
    _all_here()  # all parts are written
    folder = index.folder
    reasons = {i: why for _, _, broken in _parts(folder) for i, why in broken.items()}
    kept = [dict(item) for item in order if item["id"] not in reasons]
    row_of = {item["id"]: row for row, item in enumerate(kept)}
    if twice := [item["id"] for row, item in enumerate(kept) if row_of[item["id"]] != row]:
        raise ValueError(f"{folder}: the id {twice[0]!r} came twice, expected all different")
    left_out = (item for item in order if item["id"] in reasons)
    unreadable = {item_name(item): reasons[item["id"]] for item in left_out}
    _all_here()  # every rank has read the parts
    if rank() == 0:
        if kept and (kept != index.items or unreadable != index.meta["unreadable"]):
            lines = "".join(json.dumps(item) + "\n" for item in kept)
            vectors = _part(folder, "vectors-{}.npy", json.dumps(list(row_of)).encode())
            items = _part(folder, "items-{}.jsonl", lines.encode())
            if vectors != index.files[0]:  # that one was read; another may be any file
                _write_vectors(vectors, index, row_of)
            write_text(items, lines)
            meta = index.meta | {"format_version": FORMAT_VERSION, "count": len(kept)}
            meta |= {"vectors": f"parts/{vectors.name}", "items": f"parts/{items.name}"}
            _write_manifest(folder, meta | {"unreadable": unreadable})
            index = Index(folder)
        named = {folder / "meta.json", *index.files}
        for pattern in ("parts/*", "meta.json.*", *FORMAT_1, ".draft/*"):  # there format 1 wrote
            for path in set(folder.glob(pattern)) - named:
                path.unlink(missing_ok=True)  # another process may be at it too
    _all_here()
    if not kept:
        first = f", the first: {next(iter(unreadable.values()))}" if unreadable else ""
        raise ValueError(f"none of {len(order)} inputs can be read{first}")
    return Index(folder)


def _write_vectors(path: Path, index: Index, row_of: Mapping[str, int]) -> None:
    """Write the vectors of these ids, out of the index and of parts, each in its row."""
    own: Iterable[Any] = [(index.vectors, [item["id"] for item in index.items], {})]
    missing, out = set(row_of), None
    with whole(path) as draft:
        for rows, ids, _ in chain(own, _parts(index.folder, vectors=True)):
            if pairs := [(row_of[name], row) for row, name in enumerate(ids) if name in row_of]:
                there, here = map(list, zip(*pairs, strict=True))
                if out is None:
                    shape = (len(row_of), rows.shape[1])
                    out = np.lib.format.open_memmap(draft, "w+", np.float32, shape)
                out[there] = rows[here]
                missing.difference_update(ids)
        if missing or out is None:
            raise ValueError(
                f"{index.folder}: {len(row_of) - len(missing)} of {len(row_of)} vectors are there; "
                + SHARED
            )
        out.flush()


def _write_manifest(folder: Path, meta: Mapping[str, Any]) -> None:
    """From now on the index is what this says; file names that are no UTF-8 stay escaped."""
    write_text(folder / "meta.json", json.dumps(meta, indent=2) + "\n")


def _all_here() -> None:
    """Go on once every process is here."""
    if world() > 1:
        dist.barrier()
