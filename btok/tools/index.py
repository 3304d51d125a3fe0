"""A folder of vectors, what they stand for, and the model and settings they were made with.

    vectors.npy   fp32 [N, D]        items.jsonl   a line per row, each with its "id"
    meta.json     model digest, settings, count, what could not be read
    parts/        vectors of an unfinished `encode_to`, a file each

encoder, inputs and items -> `encode_to` (parts, shared by the ranks) -> `Index` -> `search`

A kill loses at most the part in work. A part is one file, written beside its place, synced and
renamed, named by its ids: it is there whole or not at all, and never twice. The three files of the
finished index are written to `.draft/`, which is renamed to `.ready/` once all are synced: from
then on whoever opens the index first moves them into their places, however often interrupted.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from btok import adapters
from btok.config import CONFIG_NAME
from btok.encoder import BTokEncoder
from btok.files import find, read_json, rename, sha256, write_text
from btok_kernels.ranks import rank, world

FORMAT_VERSION = 1
PART = 256  # inputs of a part, encoded together
BLOCK = 1 << 16  # rows of a product
FILES = ("vectors.npy", "items.jsonl", "meta.json")


class Index:
    """Vectors on disk and what they stand for; `open_index` or `encode_to` makes one.

    Args:
        folder: where it lies; meta: the content of `meta.json`.
        items: a mapping per vector; vectors: float32 [N, D], mapped from disk.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text())
        self.items: list[dict[str, Any]] = []
        self.vectors = np.empty((0, 0), np.float32)
        if self.meta["count"]:
            with open(folder / "items.jsonl", "rb") as lines:
                self.items = [json.loads(line) for line in lines]
            self.vectors = np.load(folder / "vectors.npy", mmap_mode="r")

    @classmethod
    def open(cls, folder: str | Path, model: str, settings: Mapping[str, Any]) -> Index:
        """The index in a folder, made if there is none; what a killed process left is put right.

        Args:
            model: from `model_digest`; settings: for JSON.

        Raises:
            ValueError: the folder holds something else, or vectors of another model or settings;
                several processes that have no process group.
        """
        folder = Path(folder)
        if int(os.environ.get("WORLD_SIZE", 1)) > world():
            raise ValueError("under torchrun call torch.distributed.init_process_group first")
        meta: dict[str, Any] = {"format_version": FORMAT_VERSION, "model": model}
        meta["settings"] = dict(settings)
        if rank() == 0:
            _put_in_place(folder)
            if not (folder / "meta.json").exists():
                if folder.exists() and {p.name for p in folder.iterdir()} - {"meta.json.tmp"}:
                    raise ValueError(f"{folder} is no store and not empty; give another folder")
                folder.mkdir(parents=True, exist_ok=True)
                empty = {**meta, "count": 0, "unreadable": {}}
                write_text(folder / "meta.json", json.dumps(empty, indent=2) + "\n")
        _all_here()
        index = cls(folder)
        had, asked = index.meta | index.meta.get("settings", {}), meta | meta["settings"]
        # bounds on pixels were once kept for models of text alone, too
        kept = {name for name in index.meta.get("settings", {}) if not name.endswith("_pixels")}
        for name in sorted(asked.keys() - {"settings"} | kept):
            if had.get(name) != asked.get(name):
                raise ValueError(
                    f"{folder} holds vectors of {name} {had.get(name)!r}, this is "
                    f"{asked.get(name)!r}; delete it or give another folder"
                )
        return index

    def known(self) -> set[str]:
        """Ids that need no encoding: of the index and of parts, unreadable ones of parts too."""
        parts = ([*ids, *broken] for _, ids, broken in self._parts())
        return {item["id"] for item in self.items}.union(*parts)

    def add_part(self, rows: Mapping[str, np.ndarray], unreadable: Mapping[str, str]) -> None:
        """Keep vectors by id, and reasons by id, until `commit`."""
        text = json.dumps([list(rows), dict(unreadable)]).encode()
        path = self.folder / "parts" / f"{hashlib.sha256(text).hexdigest()[:24]}.npz"
        path.parent.mkdir(exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}.tmp")
        with open(draft, "wb") as file:
            np.savez(file, text=np.frombuffer(text, np.uint8), rows=np.array([*rows.values()]))
            file.flush()
            os.fsync(file.fileno())
        rename(draft, path)

    def commit(self, order: Sequence[Mapping[str, Any]]) -> Index:
        """The index with exactly these items, less unreadable ones, their vectors from the parts.

        Raises:
            ValueError: no items, an id twice, or none of the items can be read.
        """
        _all_here()  # all parts are written
        reasons = {i: why for _, _, broken in self._parts() for i, why in broken.items()}
        kept = [dict(item) for item in order if item["id"] not in reasons]
        row_of = {item["id"]: row for row, item in enumerate(kept)}
        if len(row_of) < len(kept):
            twice = next(item["id"] for row, item in enumerate(kept) if row_of[item["id"]] != row)
            raise ValueError(f"{self.folder}: the id {twice!r} came twice, expected all different")
        left_out = [item for item in order if item["id"] in reasons]
        reasons = {item.get("path", item["id"]): reasons[item["id"]] for item in left_out}
        _all_here()
        if rank() == 0:
            if kept and (kept != self.items or reasons != self.meta["unreadable"]):
                self._publish(kept, row_of, reasons)
            shutil.rmtree(self.folder / "parts", ignore_errors=True)
        _all_here()
        if not kept:
            first = f", the first: {next(iter(reasons.values()))}" if reasons else ""
            raise ValueError(f"none of {len(order)} inputs can be read{first}")
        return Index(self.folder)

    def search(self, queries: np.ndarray, top: int = 5) -> list[list[tuple[float, int]]]:
        """Per query [Q, D] its best rows, exactly: (score, row), equal scores in row order."""
        blocks = range(0, len(self.vectors), BLOCK)
        scores = np.concatenate([self.vectors[i : i + BLOCK] @ queries.T for i in blocks]).T
        best = np.argsort(-scores, axis=1, kind="stable")[:, :top]
        return [[(float(s[row]), int(row)) for row in b] for s, b in zip(scores, best, strict=True)]

    def _parts(self) -> Iterator[tuple[Path, list[str], dict[str, str]]]:
        """Each part's file, its ids in the order of its rows, and its reasons."""
        for path in sorted((self.folder / "parts").glob("*.npz")):
            with np.load(path) as part:
                yield path, *json.loads(part["text"].tobytes())

    def _publish(
        self, kept: list[dict[str, Any]], row_of: dict[str, int], reasons: dict[str, str]
    ) -> None:
        draft = self.folder / ".draft"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        out, found = None, 0
        sources = [(None, [item["id"] for item in self.items], {}), *self._parts()]
        for path, ids, _ in sources:
            rows = self.vectors if path is None else np.load(path)["rows"]
            pairs = [(row, row_of[i]) for row, i in enumerate(ids) if i in row_of]
            if pairs and out is None:
                shape = (len(kept), rows.shape[1])
                out = np.lib.format.open_memmap(draft / "vectors.npy", "w+", np.float32, shape)
            if pairs and out is not None:
                here, there = map(list, zip(*pairs, strict=True))
                out[there] = rows[here]
                found += len(pairs)
        if out is None or found != len(kept):
            raise ValueError(
                f"{self.folder}: {found} of {len(kept)} vectors are there; if another process "
                "writes to this folder, let it end; then the same command does the rest"
            )
        out.flush()
        lines = "".join(json.dumps(item) + "\n" for item in kept)
        write_text(draft / "items.jsonl", lines)
        meta = {**self.meta, "count": len(kept), "unreadable": reasons}
        write_text(draft / "meta.json", json.dumps(meta, indent=2) + "\n")
        rename(draft, self.folder / ".ready")
        _put_in_place(self.folder)


def open_index(encoder: BTokEncoder, folder: str | Path, instruction: str | None = None) -> Index:
    """The index of an encoder and its settings in a folder, made if there is none.

    Args:
        encoder: from `BTokEncoder.from_pretrained`, which names its checkpoint.
        instruction: put before the text of every input; an index is of one instruction.

    Raises:
        ValueError: vectors of another model or other settings; no checkpoint to name the model.
    """
    model, images = encoder.model, encoder.processor.image_processor
    settings = {
        "instruction": instruction or "",
        "pooling": model.settings.pooling,
        "num_btoks": len(model.btok_token_ids),
        "dtype": str(model.backbone.dtype),
        "vision_positions": model.settings.vision_positions,
        **({name: getattr(images, name) for name in images.BOUNDS} if images else {}),
    }
    return Index.open(folder, encoder.digest, settings)


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

    A killed call goes on where it was, to the same bytes; inputs that cannot be read are left out
    and named in `meta["unreadable"]`. In a process group the ranks share the work and the folder.

    Args:
        encoder: from `BTokEncoder.from_pretrained`.
        inputs, instruction, batch_tokens, show_progress: as `BTokEncoder.encode` takes them.
        items: per input its id, or a mapping for JSON with its "id", all different. A vector of the
            same id is not computed again, so an id must change with the content.

    Raises:
        ValueError: what `open_index` refuses; an id twice; no input that can be read.
    """
    index = open_index(encoder, folder, instruction)
    known = index.known()
    _all_here()
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
    arguments = (lacking(), instruction, batch_tokens, show_progress and rank() == 0)
    for indices, vectors in encoder.encode_iter(*arguments, window=PART, unreadable=broken):
        rows |= zip((mine[i] for i in indices), vectors, strict=True)
        if len(rows) + len(broken) == PART:  # always met: a window is a part
            index.add_part(rows, {mine[i]: why for i, why in broken.items()})
            rows.clear()
            broken.clear()
    if rows or broken:
        index.add_part(rows, {mine[i]: why for i, why in broken.items()})
    return index.commit(order)


def model_digest(checkpoint: str | Path) -> str:
    """sha256 of a checkpoint's weights (safetensors) and `btok_config.json`; 3 s for 4 GB.

    Of adapters also what scales them, and the base model they name.
    """
    total = hashlib.sha256()
    files = sorted(Path(checkpoint).glob("*model*.safetensors"))
    if not files:
        raise ValueError(f"checkpoint {checkpoint} holds no weights as *model*.safetensors")
    for path in [*files, Path(checkpoint) / CONFIG_NAME]:
        if path.exists():
            total.update(bytes.fromhex(sha256(path)))
    if base := adapters.base_of(checkpoint):
        lora = read_json(checkpoint, adapters.CONFIG_NAME)
        total.update(repr([lora.get(name) for name in ("r", "lora_alpha", "use_dora")]).encode())
        folder = find(base, "config.json")
        total.update(model_digest(folder.parent if folder else base).encode())
    return total.hexdigest()


def _all_here() -> None:
    """Go on once every process is here."""
    if world() > 1:
        dist.barrier()


def _put_in_place(folder: Path) -> None:
    """Move the files of `.ready` over the old ones, or the rest of them after a kill."""
    ready = folder / ".ready"
    if ready.exists():
        for name in FILES:
            if (ready / name).exists():
                rename(ready / name, folder / name)
        shutil.rmtree(folder / "parts", ignore_errors=True)
        ready.rmdir()
