"""The index: a Lance table of vectors and what they stand for, in a folder or an object store.

encoder, inputs and items -> `btok.tools.encode.encode_to` -> `Index` -> `search`

Its columns are those of `btok.tools.tables`. What a commit writes is there whole or not at all, and
a reader sees one state of the table until it asks for another. The table's metadata say of which
model and settings its vectors are. A small table is searched exactly, all rows of it; `Index.build`
makes an approximate index of a large one, and says how much of an exact search's result that finds.
"""

from __future__ import annotations

import json
import os
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from functools import cached_property
from itertools import chain, pairwise
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from btok.files import may_be_folder, one_line
from btok.tools import old_index, search, tables
from btok.tools.lance_errors import WORDY, is_damage, named
from btok.tools.lookup import Places
from btok.tools.rows import (
    Row,
    described,
    item_name,
    quoted,
    refuse_other,
    refuse_ungrouped,
    without_none,
)
from btok.tools.search import PROBES, REFINED, TUNED
from btok_kernels.ranks import on_first

if TYPE_CHECKING:
    from btok.encoder import BTokEncoder

os.environ.setdefault("LANCE_LOG", "error")  # it has advice for those who call it
try:
    import lance
    import pyarrow as pa
    import pyarrow.compute as pc
except ImportError as error:
    raise ImportError(
        'an index needs pylance: pip install "btok[lance]"; without it vectors can be written to '
        "an output that ends in .npz"
    ) from error

FORMAT_VERSION = 3
READ = 1 << 11  # rows of a batch that is read: 12 MB of 1,536 dimensions in fp32
NARROW = 1 << 16  # rows of one without vectors
BUFFER = 1 << 26  # bytes that are read ahead
WHOLE = "error IS NULL"  # it is there or a vector is, and is read in no time
LENGTHS = 5e-2  # by which a stored vector's squared length may be off
STALE = 0.1  # of the rows outside of it, from which it is extended
KINDS = ("IVF_PQ", "IVF_HNSW_SQ")
RECALL = 0.95  # what `build` looks for
SAMPLE = 200  # stored vectors that ask, to tell a recall
SAMPLED = 64  # vectors a partition to train on: a quarter of Lance's, of its time and memory
LEAST = 256  # vectors, which is how many codes a product quantiser has
FRAGMENTS = 64  # files of a table, from which small ones are joined
KEPT = timedelta(hours=1)  # that a state which is no longer the newest stays, for who reads it
MANY = 10_000  # ids of a commit that removes
UNCOMMITTED = {"data", "_transactions", "_versions"}  # left by who was killed before a commit
RETRIES = 20  # of a commit beside others'
CONFLICTS = ("conflict", "preempted")  # as Lance tells of them


class Hit(NamedTuple):
    """What a search found: the cosine of the two vectors, or by late interaction the mean of the
    query's vectors' best ones, and what the item says.
    """

    score: float
    item: dict[str, Any]


class Index:
    """Vectors and what they stand for; `open` reads one, `btok.tools.encode.encode_to` makes one.

    Args:
        uri: a folder or an address that Lance knows (`s3://`, `gs://`, `az://`; credentials come
            from the environment, as for those services' own tools).
        dataset: the table, in the state it had when it was opened.
        meta: "model" (digest), "checkpoint", "settings", "storage", "dims", "format_version"; of an
            index of several vectors an item, "vectors", how many.
        encoder: what makes vectors of queries; loaded when it is needed.
    """

    def __init__(self, uri: str, dataset: Any, encoder: BTokEncoder | None = None) -> None:
        self.uri, self.dataset = uri, dataset
        self.places: dict[str, Any] = {}
        if encoder is not None:
            self.encoder = encoder
        with named(uri):
            found = (dataset.schema.metadata or {}).get(tables.METADATA)
            if found is None:
                raise ValueError("it is a table of something else")
            self.meta: dict[str, Any] = json.loads(found)
            if (version := self.meta["format_version"]) != FORMAT_VERSION:
                raise ValueError(f"format_version is {version!r}, expected {FORMAT_VERSION}")
            self.dims, self.storage = int(self.meta["dims"]), str(self.meta["storage"])
            self.several = int(self.meta.get("vectors", 0))
            if tables.STORAGE.get(self.storage) != dataset.schema.field("vector").type.value_type:
                raise ValueError(f"its vectors are not of {self.storage}")

    @classmethod
    def open(cls, uri: str | Path, encoder: BTokEncoder | None = None) -> Index:
        """Open an index that exists.

        Args:
            uri: its folder or address.
            encoder: of the checkpoint that its vectors are of; by default that is loaded from where
                it was, once texts are searched for.

        Raises:
            ValueError: none there, one that cannot be read, an address without credentials, an
                encoder of another model.
        """
        if "://" not in str(uri):
            may_be_folder("uri", Path(uri))
        if old_index.is_there(uri):
            raise ValueError(
                f"{uri} is an index of an older format; `python -m btok encode CHECKPOINT FOLDER "
                f"--output {uri}` rewrites it, vectors unchanged"
            )
        with named(str(uri)):
            index = cls(str(uri), lance.dataset(str(uri)), encoder)
        if encoder is not None and encoder.digest != index.meta["model"]:
            raise ValueError(
                f"encoder is of the model {encoder.digest!r}, {uri} holds vectors of "
                f"{index.meta['model']!r}"
            )
        return index

    @classmethod
    def create(
        cls,
        uri: str | Path,
        meta: Mapping[str, Any],
        dims: int,
        storage: str = "float32",
        rows: Iterable[Sequence[Row]] = (),
        items: Iterable[Mapping[str, Any]] | None = None,
        several: int = 0,
    ) -> Index:
        """A new index, of some rows or none, in one commit.

        Args:
            meta: of which "model" and "settings" at least.
            dims: D, of its vectors.
            storage: what components are stored as: "float32", "float16" or "int8" (times a number
                per vector; no approximate index can be made of those).
            items: what rows may say; by default what the first part of them does.
            several: how many vectors for late interaction an item has below its one, in float16 or
                int8: rows are then [1 + several, D].
        """
        meta = {"format_version": FORMAT_VERSION, **meta, "storage": storage, "dims": dims}
        meta |= {"vectors": several} if several else {}
        schema, rows = tables.schema_of(meta, dims, storage), iter(rows)
        first = next(rows, ())
        said = [row.item for row in first] if items is None else items
        for field in tables.new_columns(list(said), schema):
            schema = schema.append(field)
        batches = tables.as_batches(chain([first], rows), schema)
        with named(str(uri)):
            dataset = lance.write_dataset(batches, str(uri), schema=schema, mode="create")
        return cls(str(uri), dataset)

    def __len__(self) -> int:
        """The number of items with a vector."""
        with named(self.uri):
            return self.dataset.count_rows(WHOLE)

    def distinct(self, column: str) -> int:
        """The number of different values in a column, over the items with a vector."""
        query = f"SELECT count(DISTINCT {column}) FROM dataset WHERE {WHOLE}"
        with named(self.uri):
            return self.dataset.sql(query).build().to_batch_records()[0][0][0].as_py()

    def refresh(self) -> None:
        """Move this index to the newest state of its table."""
        with named(self.uri):
            self.dataset = lance.dataset(self.uri)

    @property
    def columns(self) -> list[str]:
        """The names of the columns that items fill, without the index's own."""
        own = tables.own_names(self.dataset.schema)
        return [name for name in self.dataset.schema.names if name not in own]

    @property
    def bytes_of_item(self) -> int:
        """The number of bytes that an item's vectors take, before Lance packs them."""
        size = np.dtype(self.storage).itemsize
        factor = 4 if self.storage == "int8" else 0  # of each vector
        return size * self.dims + factor + self.several * (min(size, 2) * self.dims + factor)

    @cached_property
    def encoder(self) -> BTokEncoder:
        """The encoder that makes vectors of queries."""
        from btok.tools.command_line import load

        if not (checkpoint := self.meta.get("checkpoint")):
            raise ValueError(f"{self.uri} names no checkpoint; give Index.open an encoder")
        encoder = load(checkpoint)
        if encoder.digest != self.meta["model"]:
            raise ValueError(
                f"{self.uri} holds vectors of the model {self.meta['model']!r}, {checkpoint} "
                f"is now {encoder.digest!r}; give Index.open the encoder"
            )
        return encoder

    # -- what is there

    def rows(
        self, columns: Sequence[str] | None = None, where: str | None = None
    ) -> Iterator[pa.RecordBatch]:
        """The rows, a batch at a time, in the order in which they were written.

        Args:
            columns: their names; by default what items say.
            where: which rows, as SQL: "uri LIKE '%.pdf' AND page < 3".
        """
        yield from self._scan(self.columns if columns is None else columns, where)

    def _scan(
        self, columns: Sequence[str], where: str | None, **more: Any
    ) -> Iterator[pa.RecordBatch]:
        """Batches in the order in which rows were written, few of them ahead."""
        size = READ if "vector" in columns else NARROW
        if self.several and "vectors" in columns:
            size = max(1, READ // self.several)
        with named(self.uri):
            scanner = self.dataset.scanner(
                columns=list(columns),
                filter=where,
                batch_size=size,
                io_buffer_size=BUFFER,
                scan_in_order=True,
                **more,
            )
            yield from scanner.to_batches()

    def look_up(
        self, column: str, values: Collection[str], seen: NDArray[np.bool_] | None = None
    ) -> list[dict[str, Any]]:
        """The rows whose "id" or "uri" is one of these, with what they say and their "error".

        The first call of a column reads all of it, and keeps 24 bytes a row for the others.

        Args:
            seen: bool [rows], made true where one of them is.
        """
        places, wanted = self._places(column), {*values}
        at = places.find(wanted)
        found = []
        rows = self._told([*self.columns, "error"], places.numbers[at].tolist())
        for place, row in zip(at, rows, strict=True):
            if row.get(column) in wanted:  # and no other that has the hash of one
                found.append(row)
                if seen is not None:
                    seen[place] = True
        return found

    def _places(self, column: str) -> Places:
        """The row numbers at which each value of a column stands, in the state that is open now."""
        if self.places.get("version") != self.dataset.version:
            self.places = {"version": self.dataset.version}
        if column not in self.places:
            batches = self._scan([column], None, with_row_id=True)
            self.places[column] = Places(
                (batch[column].to_pylist(), batch["_rowid"].to_numpy()) for batch in batches
            )
        return self.places[column]

    def _numbered(self, columns: Sequence[str], numbers: Iterable[int]) -> pa.Table:
        """The rows of these numbers, of which there is one, in any order, with their "_rowid"."""
        # `take`, of a table from which rows were deleted, needs a thousand times as long
        with named(self.uri):
            return self.dataset.scanner(
                columns=list(columns), filter=_among(numbers), with_row_id=True
            ).to_table()

    def _told(self, columns: Sequence[str], numbers: Sequence[int]) -> list[dict[str, Any]]:
        """The values of some columns, for each of the rows of these numbers."""
        if not numbers:
            return []
        table = self._numbered(columns, sorted({*numbers}))
        by_number = {row.pop("_rowid"): without_none(row) for row in table.to_pylist()}
        return [by_number[number] for number in numbers]

    def has(self, ids: Collection[str]) -> bool:
        """Whether any of these ids is in the index."""
        wanted = pa.array(ids, pa.string())
        batches = self.rows(["id"])
        return any(pc.any(pc.is_in(batch["id"], value_set=wanted)).as_py() for batch in batches)

    def unreadable(self) -> dict[str, str]:
        """The reason why an item has no vector, by the item's name."""
        found = self.rows([*self.columns, "error"], "error IS NOT NULL")
        rows = (row for batch in found for row in batch.to_pylist())
        return {item_name(row): row["error"] for row in rows}

    def vectors(
        self, where: str | None = None, several: bool = False
    ) -> Iterator[tuple[NDArray[np.float32], pa.Array]]:
        """Yield the vectors a batch at a time, float32 [n, D], or the several of each item [n, K,
        D], and the rows' numbers.

        ValueError for a vector that is not of length 1: a file is damaged.
        """
        wanted = self._stored(several)
        among = f"({where}) AND {WHOLE}" if where else WHOLE
        with named(self.uri):
            for batch in self._scan(wanted, among, batch_readahead=2, with_row_id=True):
                rows = self._floats(batch)
                lengths = np.einsum("...d,...d->...", rows, rows)
                wrong, *_ = np.nonzero(~(np.abs(lengths - 1) < LENGTHS))  # as those of a NaN
                if len(wrong):
                    (item,) = self._told(self.columns, [batch["_rowid"][wrong[0]].as_py()])
                    raise ValueError(
                        f"the vector of {item_name(item)} is damaged, its length is not 1; delete "
                        "the index, and encode makes it again"
                    )
                yield rows, batch["_rowid"]

    def _floats(self, read: pa.RecordBatch | pa.Table) -> NDArray[np.float32]:
        """float32 [n, D] of the column "vector", or [n, K, D] of "vectors"."""
        names, shape = read.schema.names, [len(read), self.dims]
        if several := "vectors" in names:
            shape.insert(1, self.several)
        stored = pc.list_flatten(read["vectors" if several else "vector"])
        rows = stored.to_numpy(zero_copy_only=False).reshape(shape).astype(np.float32, copy=False)
        if "scale" in names or "scales" in names:
            scale = pc.list_flatten(read["scales"]) if several else read["scale"]
            rows *= scale.to_numpy(zero_copy_only=False).reshape(*shape[:-1], 1)
        return rows

    def _stored(self, several: bool) -> list[str]:
        """The columns of the one vector, or of the several."""
        names = ("vectors", "scales") if several else ("vector", "scale")
        return [*names[: 2 if self.storage == "int8" else 1]]

    def several_of(self, numbers: Sequence[int]) -> tuple[list[int], NDArray[np.float32]]:
        """The numbers of the given rows, as they lie on disk, and their several vectors, float32
        [n, K, D].
        """
        table = self._numbered(self._stored(True), numbers)
        return table["_rowid"].to_pylist(), self._floats(table)

    # -- search

    def search(
        self,
        queries: Any,
        k: int = 5,
        where: str | None = None,
        exact: bool | None = None,
        instruction: str | None = None,
        rescore: bool | None = None,
    ) -> list[list[Hit]]:
        """Find the k nearest items of each query, the best first.

        Args:
            queries: vectors, float32 [Q, D], unit norm, or what `BTokEncoder.encode` takes; of an
                index of several vectors an item also [Q, 1 + K, D], as `multi_vector` "both" gives.
            where: among which rows, as SQL: "uri LIKE '%.pdf'".
            exact: compare with all rows; by default only where no approximate index was built, or a
                condition leaves 100,000 rows or fewer. Scores are exact either way.
            instruction: put before the text of queries that are no vectors.
            rescore: compare the 10 k nearest, or with `exact` all rows, by late interaction; by
                default where the index has several vectors an item, and the queries, too.

        Returns:
            Hits per query; equal scores in the order in which the rows were written.

        Raises:
            ValueError: k below 1, vectors of another length, a condition that is no SQL or names
                what no item says, a damaged vector; rescore where one vector is all there is.
        """
        if not isinstance(k, Integral) or isinstance(k, bool):
            raise TypeError(f"k is {k!r:.60}, expected a whole number")
        if k < 1:
            raise ValueError(f"k is {k}, expected at least 1")
        queries, several = search.asked(self, queries, instruction, rescore)
        if not len(queries):
            return []
        count = self.count(where)
        if not (k := min(int(k), count)):
            return [[] for _ in queries]
        found = search.found(self, queries, several, k, where, exact, count)
        numbers = [number for of_query in found for _, number in of_query]
        items = iter(self._told(self.columns, numbers))
        return [[Hit(score, next(items)) for score, _ in of_query] for of_query in found]

    def count(self, where: str | None) -> int:
        """The number of vectors among the rows of a condition; a ValueError for what is no
        condition.
        """
        if where is None:
            return len(self)
        depth = 0
        for bracket in re.sub(r"'[^']*'|\"[^\"]*\"|[^()]", "", where):
            depth += 1 if bracket == "(" else -1
            if depth < 0:
                break
        try:
            if depth:
                raise ValueError("its brackets do not match")
            return self.dataset.count_rows(f"({where}) AND {WHOLE}")
        except (ValueError, OSError, RuntimeError, pa.ArrowException) as error:
            if is_damage(self.uri, error):
                with named(self.uri):
                    raise
            said = WORDY.sub("", one_line(error))
            raise ValueError(f"where is {where!r}, which is no condition: {said}") from error

    def proposed(
        self, queries: NDArray[np.float32], k: int, where: str | None, probes: int
    ) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
        """Yield the candidates that the approximate index has for queries [Q, D], and rows that are
        not in it yet: which query a row is for, its number, and its vector, float32 [D].
        """
        nearest = {
            "column": "vector",
            "q": queries,
            "k": k,
            "nprobes": probes,
            "refine_factor": REFINED,
        }
        with named(self.uri):
            table = self.dataset.scanner(
                columns=["vector"],
                nearest=nearest,
                filter=where,
                prefilter=True,
                with_row_id=True,
                disable_scoring_autoprojection=True,
            ).to_table()
        table = table.filter(pc.is_valid(table["vector"]))
        asking = table["query_index"].to_pylist() if len(queries) > 1 else [0] * len(table)
        return zip(asking, table["_rowid"].to_pylist(), self._floats(table), strict=True)

    @property
    def indexed(self) -> bool:
        """Whether an approximate index was built."""
        return any(each.name == "vector_idx" for each in self.dataset.describe_indices())

    def build(self, kind: str = "IVF_PQ", k: int = TUNED) -> float:
        """Make an approximate index, and look at as many of its partitions as its recall needs.

        Args:
            kind: "IVF_PQ" (small), or "IVF_HNSW_SQ" (faster; a byte per component).

        Returns:
            Recall at k against exact search, of stored vectors that ask for their neighbours; what
            other queries get may be less. Of a table of a few rows only there is no index to make.

        Raises:
            ValueError: another kind, a table of int8.
        """
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}, expected one of {', '.join(KINDS)}")
        if self.storage == "int8":
            raise ValueError(
                f"{self.uri} has vectors of int8, of which no approximate index can be made; "
                "encode with float16, or search it exactly"
            )
        self.refresh()
        if (count := len(self)) < LEAST:
            raise ValueError(f"{self.uri} has {count} vectors, an index needs {LEAST}")
        settings: dict[str, Any] = {"num_partitions": max(1, round(count**0.5))}
        settings["sample_rate"] = SAMPLED
        if kind == "IVF_PQ":
            eighth = (n for n in (8, 4, 2) if self.dims % n == 0)
            settings["num_sub_vectors"] = self.dims // next(eighth, 1)
        queries = self._sample()
        expected = search.exact(self, queries, k + 1, None)  # a vector is its own nearest
        with named(self.uri):
            self.dataset.create_index("vector", kind, metric="cosine", replace=True, **settings)
        recall = 0.0
        for probes in PROBES:
            found = search.probed(self, queries, k + 1, None, probes)
            recall = search.recall(expected, found, k)
            if recall >= RECALL or probes >= settings["num_partitions"]:
                break
        self.meta |= {"probes": probes, "recall": round(recall, 4), "kind": kind}
        with named(self.uri):
            self.dataset.update_schema_metadata({tables.METADATA.decode(): json.dumps(self.meta)})
        return recall

    def _sample(self) -> NDArray[np.float32]:
        """Some of the vectors, evenly."""
        count = len(self)
        step = max(1, count // SAMPLE)
        taken, first = [], 0
        for rows, _ in self.vectors():
            taken.append(rows[-first % step :: step].copy())
            first += len(rows)
        return np.concatenate(taken)[:SAMPLE]

    # -- change

    def add(self, rows: Sequence[Row]) -> None:
        """Add rows in one commit; a row whose id is there already takes its place.

        ValueError for an id twice among them.
        """
        ids = [row.item["id"] for row in rows]
        if len({*ids}) < len(ids):
            ((twice, _),) = Counter(ids).most_common(1)
            raise ValueError(f"{self.uri}: the id {twice!r} came twice, expected all different")
        self.refresh()
        self.write(rows, replacing=self.has(ids))

    def write(self, rows: Sequence[Row], replacing: bool = False) -> None:
        """Add rows in one commit, none of whose ids is there, or all of whose may be."""
        if not rows:
            return

        def write() -> None:
            self._widen([row.item for row in rows])
            table = tables.as_table(rows, self.dataset.schema)
            if replacing:
                merge = self.dataset.merge_insert("id").when_matched_update_all()
                merge.when_not_matched_insert_all().execute(table)
            else:
                self.dataset = lance.write_dataset(table, self.uri, mode="append")

        self._again(write)

    def _again(self, write: Callable[[], None]) -> None:
        """Write, again where another process wrote at the same time what this goes not together
        with.
        """
        for left in reversed(range(RETRIES)):
            try:
                with named(self.uri):
                    return write()
            except ValueError as error:
                if not left or not any(sign in str(error) for sign in CONFLICTS):
                    raise
                time.sleep(random.random() / 4)
                self.refresh()

    def write_all(self, parts: Iterable[Sequence[Row]]) -> None:
        """Add rows of new ids, part by part, in one commit; items say what the table has columns
        for.
        """
        schema = self.dataset.schema
        batches = tables.as_batches(parts, schema)
        if (first := next(batches, None)) is None:
            return
        every = chain([first], batches)
        with named(self.uri):
            self.dataset = lance.write_dataset(every, self.uri, schema=schema, mode="append")

    def update(self, items: Sequence[Mapping[str, Any]]) -> None:
        """Have rows say what items of the same ids say, in one commit; their vectors stay."""
        if not items:
            return

        def write() -> None:
            self._widen(items)
            fields = [self.dataset.schema.field(name) for name in self.columns]
            said = {field.name: tables.column(items, field.name, field.type) for field in fields}
            self.dataset.merge_insert("id").when_matched_update_all().execute(pa.table(said))

        self._again(write)

    def _widen(self, items: Sequence[Mapping[str, Any]]) -> None:
        """Make the columns that items need."""
        if fields := tables.new_columns(items, self.dataset.schema):
            self.dataset.add_columns(fields)

    def delete(self, ids: Sequence[str]) -> None:
        """Forget rows, 10,000 in a commit."""
        for first in range(0, len(ids), MANY):
            self._delete(f"id IN ({', '.join(map(quoted, ids[first : first + MANY]))})")

    def _delete(self, which: str) -> None:
        self._again(lambda: self.dataset.delete(which))

    def delete_twins(self) -> None:
        """Delete all but the first of rows with one id, as two runs at the same time leave them."""
        places = self._places("id")
        numbers = places.numbers[places.alike()].tolist()
        came: set[str] = set()
        gone = []
        for number, row in zip(numbers, self._told(["id"], numbers), strict=True):
            if row["id"] in came:
                gone.append(number)
            came.add(row["id"])
        if gone:
            self._delete(_among(gone))

    def tidy(self) -> float | None:
        """Join small files, forget old states, keep the approximate index up; its recall, if one
        was built now.
        """
        recall = None
        with named(self.uri):
            if len(self.dataset.get_fragments()) > FRAGMENTS:
                self.dataset.optimize.compact_files()
            if self.indexed:
                stats = self.dataset.stats.index_stats("vector_idx")
                if stats["num_unindexed_rows"] > STALE * stats["num_indexed_rows"]:
                    self.dataset.optimize.optimize_indices()
            elif self.storage != "int8" and len(self) >= search.LARGE:
                recall = self.build()
            # those in whose place another stood already then
            versions = self.dataset.versions()
            until = datetime.now() - KEPT
            old = [v["version"] for v, later in pairwise(versions) if later["timestamp"] < until]
            if old:
                self.dataset.cleanup_old_versions(timedelta(0), versions=old)
        return recall


def open_index(
    encoder: BTokEncoder,
    uri: str | Path,
    instruction: str | None = None,
    storage: str | None = None,
) -> Index:
    """The index of an encoder and its settings, made if there is none; one of an older format is
    rewritten. All processes of a group call it.

    Args:
        encoder: from `BTokEncoder.from_pretrained`, which names its checkpoint; with `multi_vector`
            "both" for an index of several vectors an item.
        instruction: put before the text of every input; an index is of one instruction.
        storage: as `Index.create` takes it; None for what there is, or float32.

    Raises:
        ValueError: vectors of another model, settings or storage, or no index; no checkpoint to
            name the model; several processes that have no process group.
    """
    refuse_ungrouped()
    asked, place = described(encoder, instruction), str(uri)
    on_first(lambda: _make(encoder, place, asked, storage or "float32"))
    index = Index.open(place)
    refuse_other(place, index.meta, asked)
    if storage not in (None, index.storage):
        raise ValueError(f"storage is {storage!r}, but {place} has vectors of {index.storage}")
    index.encoder = encoder
    return index


def is_there(uri: str) -> bool:
    """Whether there is a table, of whatever kind."""
    try:
        lance.dataset(uri)
    except ValueError as error:
        if "not found" in str(error).lower() and "Dataset at path" in str(error):
            return False
        with named(uri):
            raise
    return True


def _make(encoder: BTokEncoder, uri: str, asked: Mapping[str, Any], storage: str) -> None:
    """See to it that there is a table: an empty one, or what an index of an older format holds."""
    there = is_there(uri)
    if old_index.is_there(uri):  # which is of one vector an item
        if not there:  # else a kill came between the commit and the going of its files
            old = old_index.OldIndex(Path(uri))
            refuse_other(uri, old.meta, asked)
            Index.create(uri, asked, encoder.dims, storage, old.rows(), old.items)
        old_index.remove(Path(uri))
    elif not there:
        if "://" not in uri and not {path.name for path in Path(uri).glob("*")} <= UNCOMMITTED:
            raise ValueError(f"{uri} is no index and not empty; give another folder")
        several = encoder.shape[0] - 1 if encoder.options.multi_vector else 0
        try:
            Index.create(uri, asked, encoder.dims, storage, several=several)
        except ValueError:
            if not is_there(uri):  # else another run made it just now
                raise


def _among(numbers: Iterable[int]) -> str:
    """The condition of the rows of these numbers."""
    return f"_rowid IN ({', '.join(map(str, numbers))})"
