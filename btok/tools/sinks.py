"""Where vectors go: an index, or files for other programs.

    a folder or an address    an index that is searched (`btok.tools.index`, extra `lance`)
    NAME.parquet              a folder of Parquet files, one per part, for other engines
    NAME.npz                  numpy: "vectors" float32 [N, D], and "items", their JSON as bytes

All keep what they were given when `write` returns, know what they have, and refuse vectors of
another model or other settings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from btok.encoder import BTokEncoder
from btok.files import may_be_file, may_be_folder, one_line, whole
from btok.tools import old_index
from btok.tools.rows import Encoded, Row, described, item_name, refuse_other, without_none
from btok.vectors import VectorOptions, options_of
from btok_kernels.ranks import from_first, gather, rank

NPZ, PARQUET = ".npz", ".parquet"
PART = "[0-9a-f]" * 24 + NPZ  # what the parts of an .npz are called, as glob has it


def is_index(output: str | Path) -> bool:
    """Whether an output of this name is an index, and no file for other programs."""
    return Path(output).suffix.lower() not in (NPZ, PARQUET)


def may_be_output(output: str | Path) -> None:
    """A ValueError where something else than an output of this name is in its way."""
    if "://" not in str(output):
        is_file = Path(output).suffix.lower() == NPZ
        (may_be_file if is_file else may_be_folder)("output", Path(output))
        if is_file:
            may_be_folder("output's parts", Path(f"{output}.parts"))


def fitted(
    encoder: BTokEncoder, output: str | Path, options: Mapping[str, Any] | None = None
) -> BTokEncoder:
    """The encoder of an output's vectors.

    Args:
        encoder: its own options are kept unless others are given.
        output: an index that is there has the vectors of its own options, where none are given.
        options: as `BTokEncoder.using` takes them; `multi_vector` True means both.

    Raises:
        ValueError: a file or a folder in the way of such an output.
    """
    may_be_output(output)
    if options:
        encoder = encoder.using(**options)
    elif encoder.options == VectorOptions() and is_index(output):
        from btok.tools.index import Index, is_there

        if not old_index.is_there(output) and is_there(str(output)):
            meta = Index.open(output).meta
            if meta["model"] == encoder.digest:
                encoder = encoder.using(**options_of(meta["settings"]))
    if encoder.options.multi_vector is True:
        encoder = encoder.using(multi_vector="both")
    return encoder


class Sink(Protocol):
    """A destination of vectors. Each process has its own; all are made before any is written to."""

    def lacking(self, items: Sequence[Mapping[str, Any]]) -> list[bool]:
        """Whether each of these items has no vector yet. Every item comes once."""

    def write(self, rows: Sequence[Row]) -> None:
        """Keep rows of items that were lacking; they are there when this returns."""

    def finish(self) -> Encoded:
        """Finish after all processes have written: see to it that there is what came and, where
        that can be, nothing else. The first process calls it, once.

        ValueError: nothing that came has a vector.
        """


def open_sink(
    encoder: BTokEncoder, output: str | Path, instruction: str | None, storage: str | None
) -> Sink:
    """The sink of an output's name. All processes of a group call it.

    Raises:
        ValueError: vectors of another model or other settings there, or something else.
        ImportError: the extra `lance` is missing.
    """
    if encoder.options.dtype != "float32":
        had = f"dtype is {encoder.options.dtype!r}, expected 'float32' for {output}"
        raise ValueError(f"{had}; an index stores int8 with storage='int8'")
    if is_index(output):
        return IndexSink(encoder, output, instruction, storage)
    if encoder.options.multi_vector:
        raise ValueError(f"multi_vector is True, expected False for {output}; an index keeps them")
    if storage not in (None, "float32"):
        raise ValueError(f"storage is {storage!r}, expected 'float32' for {output}")
    kind = NpzSink if Path(output).suffix.lower() == NPZ else ParquetSink
    return kind(Path(output), described(encoder, instruction), encoder.dims)


class IndexSink:
    """An index that is to hold these items and no others.

    Items are compared with the state of the table in which no process had written yet. What was
    encoded is in it part by part; at the end, items that say something else are brought up to date,
    then those that did not come are removed.
    """

    def __init__(
        self, encoder: BTokEncoder, uri: str | Path, instruction: str | None, storage: str | None
    ) -> None:
        from btok.tools.index import Index, open_index

        self.index = open_index(encoder, uri, instruction, storage)
        self.before = Index.open(uri)
        dataset = self.before.dataset
        self.before.dataset = dataset.checkout_version(from_first(dataset.version))
        gather(None)  # all processes have looked: now they may write
        self.seen = np.zeros(self.before.dataset.count_rows(), bool)
        self.asked = self.good = 0  # items that came, and those that have a vector already
        self.changed: list[Mapping[str, Any]] = []
        self.failed: dict[str, str] = {}  # ids that have a row without a vector, and why

    def lacking(self, items: Sequence[Mapping[str, Any]]) -> list[bool]:
        rows = {}
        if len(self.seen):
            found = self.before.look_up("id", [item["id"] for item in items], self.seen)
            rows = {row["id"]: row for row in found}
        wanted = []
        for item in items:
            row = rows.get(item["id"])
            error = None if row is None else row.pop("error", None)
            if error is not None:
                self.failed[item["id"]] = error
            if rank() == 0 and row is not None and row != without_none(item):
                self.changed.append(item)
            wanted.append(row is None or error is not None)
        self.asked += len(items)
        self.good += len(items) - sum(wanted)
        return wanted

    def write(self, rows: Sequence[Row]) -> None:
        self.index.write([row for row in rows if row.item["id"] not in self.failed])
        again = [row for row in rows if row.item["id"] in self.failed]
        news = [row for row in again if row.error != self.failed[row.item["id"]]]
        self.index.write(news, replacing=True)

    def commit(self, parts: Iterable[Sequence[Row]]) -> None:
        """`write` of many parts in one commit, and in another what has rows without vectors."""
        again: list[Row] = []

        def fresh() -> Iterator[Sequence[Row]]:
            for rows in parts:
                again.extend(row for row in rows if row.item["id"] in self.failed)
                yield [row for row in rows if row.item["id"] not in self.failed]

        self.index.write_all(fresh())
        self.write(again)

    def finish(self) -> Encoded:
        index = self.index
        index.refresh()
        if index.dataset.version != self.before.dataset.version:
            index.delete_twins()
        added = len(index) - len(self.before)
        if not self.good + added:
            _refuse_none(self.asked, index.unreadable())
        removed = self._gone()
        index.update(self.changed)
        index.delete([row["id"] for row in removed])
        recall = None
        if index.dataset.version != self.before.dataset.version:
            recall = index.tidy()
        return Encoded(len(index), added, removed, index.unreadable(), recall)

    def _gone(self) -> list[dict[str, Any]]:
        """Rows of before that no item was of."""
        found: list[dict[str, Any]] = []
        if not self.seen.all():
            import pyarrow as pa

            first = 0
            for batch in self.before.rows():
                gone = ~self.seen[first : first + len(batch)]
                if gone.any():
                    found += map(without_none, batch.filter(pa.array(gone)).to_pylist())
                first += len(batch)
        return found


class NpzSink:
    """One file, replaced in one step when all is done; until then parts lie in a folder beside it.

    It holds "vectors", float32 [N, D], and as UTF-8 in uint8 the JSON "items", a mapping per
    vector, and "meta": what the vectors depend on.
    """

    def __init__(self, path: Path, meta: Mapping[str, Any], dims: int) -> None:
        self.path, self.folder, self.meta, self.dims = path, Path(f"{path}.parts"), meta, dims
        self.items: list[Mapping[str, Any]] = []
        self.known = {item["id"] for _, items, _ in self._parts() for item in items}
        gather(None)  # all processes have looked: now they may write

    def lacking(self, items: Sequence[Mapping[str, Any]]) -> list[bool]:
        for item in items:
            try:
                json.dumps(dict(item))
            except TypeError as error:
                raise TypeError(
                    f"item {item['id']!r:.60} cannot be written to {self.path} ({error}); expected "
                    "texts, numbers and lists of these, or another output"
                ) from error
        self.items += items
        return [item["id"] not in self.known for item in items]

    def write(self, rows: Sequence[Row]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        good = [row for row in rows if row.vector is not None]
        errors = {item_name(row.item): row.error for row in rows if row.vector is None}
        text = json.dumps([[row.item["id"] for row in rows], errors]).encode()
        path = self.folder / f"{hashlib.sha256(text).hexdigest()[:24]}.npz"
        self._save(path, [row.vector for row in good], [row.item for row in good], errors)

    def finish(self) -> Encoded:
        row_of = {item["id"]: row for row, item in enumerate(self.items)}
        vectors = np.full((len(self.items), self.dims), np.nan, np.float32)
        unreadable: dict[str, str] = {}
        removed = []
        for rows, items, errors in self._parts():
            unreadable |= errors
            for vector, item in zip(rows, items, strict=True):
                if item["id"] in row_of:
                    vectors[row_of[item["id"]]] = vector
                else:
                    removed.append(item)
        there = ~np.isnan(vectors[:, 0])
        kept = [item for item, good in zip(self.items, there, strict=True) if good]
        if not kept:
            _refuse_none(len(self.items), unreadable)
        names = {item_name(item) for item in kept}
        unreadable = {name: why for name, why in unreadable.items() if name not in names}
        self._save(self.path, vectors[there], kept, {})
        with suppress(OSError):  # none was made, or there are files of others in it
            for path in self.folder.glob(f"{PART}*"):  # drafts of calls that were killed, too
                path.unlink(missing_ok=True)
            self.folder.rmdir()
        added = sum(item["id"] not in self.known for item in kept)
        return Encoded(len(kept), added, removed, unreadable)

    def _save(
        self, path: Path, vectors: Any, items: Sequence[Any], errors: Mapping[str, Any]
    ) -> None:
        said = {"items": list(map(dict, items)), "meta": self.meta, "errors": dict(errors)}
        as_bytes: dict[str, Any] = {
            name: np.frombuffer(json.dumps(value).encode(), np.uint8)
            for name, value in said.items()
        }
        rows = np.asarray(vectors, np.float32).reshape(len(items), self.dims)
        with whole(path) as draft, open(draft, "wb") as file:
            np.savez(file, vectors=rows, **as_bytes)

    def _parts(self) -> Iterator[tuple[NDArray[np.float32], list[dict[str, Any]], dict[str, str]]]:
        """Yield the vectors, their items, and errors by name, of the file and of each part."""
        for path in [self.path, *sorted(self.folder.glob(PART))]:
            if not path.exists():
                continue
            try:
                with np.load(path) as part:
                    vectors = part["vectors"]
                    items, meta, errors = (
                        json.loads(part[name].tobytes()) for name in ("items", "meta", "errors")
                    )
                dict(meta.get("settings", {}))
                if vectors.dtype != np.float32 or vectors.shape[:-1] != (len(items),):
                    had = f"{vectors.dtype} {list(vectors.shape)} for {len(items)} items"
                    raise ValueError(f"it holds {had}")
                if not all(isinstance(item["id"], str) for item in items):
                    raise ValueError("it holds items without ids")
            except Exception as error:  # of numpy, of its zip files and of JSON
                _refuse_damaged(path, error)
            refuse_other(path, meta, self.meta)  # of other dims, too
            if vectors.shape[-1] != self.dims:
                had = f"{list(vectors.shape)}, expected [{len(items)}, {self.dims}]"
                _refuse_damaged(path, ValueError(f"it holds vectors {had}"))
            yield vectors, items, errors


class ParquetSink:
    """A folder to which each part adds a file; none is changed again.

    What cannot be read is a row with an "error", and is tried again by the next run.
    """

    def __init__(self, folder: Path, meta: Mapping[str, Any], dims: int) -> None:
        from btok.tools import tables

        self.folder, self.tables = folder, tables
        self.schema = tables.schema_of(meta, dims, "float32")
        self.known: set[str] = set()
        self.asked = 0
        for path in sorted(folder.glob("*.parquet")):
            ids, schema = read_ids(path, meta)
            self.known.update(ids)
            for field in schema:  # a column has one type in all parts, or none reads them together
                if field.name not in self.schema.names:
                    self.schema = self.schema.append(field)
        gather(None)  # all processes have looked: now they may write

    def lacking(self, items: Sequence[Mapping[str, Any]]) -> list[bool]:
        self.asked += len(items)
        return [item["id"] not in self.known for item in items]

    def write(self, rows: Sequence[Row]) -> None:
        from pyarrow import parquet

        for field in self.tables.new_columns([row.item for row in rows], self.schema):
            self.schema = self.schema.append(field)
        table = self.tables.as_table(rows, self.schema)
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole(self.folder / f"part-{table['part'][0].as_py()}.parquet") as draft:
            parquet.write_table(table, draft)

    def finish(self) -> Encoded:
        from pyarrow import dataset

        unreadable: dict[str, str] = {}
        names = [*self.tables.SAID, "error"]
        good: set[str] = set()
        for path in sorted(self.folder.glob("*.parquet")):
            for row in dataset.dataset(path).to_table(columns=names).to_pylist():
                if row["error"] is None:
                    good.add(row["id"])
                    unreadable.pop(item_name(row), None)
                elif row["id"] not in good:
                    unreadable[item_name(row)] = row["error"]
        if not good:
            _refuse_none(self.asked, unreadable)
        return Encoded(len(good), len(good - self.known), [], unreadable)


def read_ids(path: Path, meta: Mapping[str, Any]) -> tuple[list[str], Any]:
    """Ids of a Parquet file's rows that have a vector, and its schema; a ValueError where it cannot
    be read or is of another model or settings.
    """
    from pyarrow import parquet

    from btok.tools.tables import METADATA

    try:
        schema = parquet.read_schema(path)
        found = json.loads((schema.metadata or {})[METADATA])
        table = parquet.read_table(path, columns=["id", "error"]).to_pylist()
    except Exception as error:  # of Parquet and of JSON
        _refuse_damaged(path, error)
    refuse_other(path, found, meta)
    return [row["id"] for row in table if row["error"] is None], schema


def _refuse_damaged(path: Path, error: Exception) -> NoReturn:
    why = one_line(f"{path} cannot be read ({error})")
    raise ValueError(f"{why}; delete it, and its vectors are made again") from error


def _refuse_none(asked: int, unreadable: Mapping[str, str]) -> None:
    first = f", the first: {next(iter(unreadable.values()))}" if unreadable else ""
    raise ValueError(f"none of {asked} inputs can be read{first}")
