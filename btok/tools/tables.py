"""Rows as Arrow tables, for an index and for Parquet files.

id        what a row is of, different in all rows; the same where the content is the same
uri, page, pages, start, end, duration, size, mtime_ns, ctime_ns, and what else the items say
vector    float32, float16 or int8 (then beside its "scale") [D]; null where there is an error
vectors   of an index for late interaction, float16 or int8 (then beside their "scales" [K]) [K * D]
tokens    that it was made of
part      a digest of the ids that were written with it
error     why there is no vector
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from btok.files import one_line
from btok.tools.rows import Row

try:
    import pyarrow as pa
except ImportError as error:
    raise ImportError(
        'tables of vectors need pyarrow: pip install "btok[lance]"; without it vectors can be '
        "written to an output that ends in .npz"
    ) from error

METADATA = b"btok"  # the key, among those of a schema, of what the vectors depend on
SAID = {  # by items of files; others may say more
    "id": pa.string(),
    "uri": pa.string(),
    "page": pa.int32(),
    "pages": pa.int32(),
    "start": pa.float64(),
    "end": pa.float64(),
    "duration": pa.float64(),
    "size": pa.int64(),
    "mtime_ns": pa.int64(),
    "ctime_ns": pa.int64(),
}
OWN = {"tokens": pa.int32(), "part": pa.string(), "error": pa.string()}  # that no item says
STORAGE = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8()}


def schema_of(meta: Mapping[str, Any], dims: int, storage: str) -> pa.Schema:
    """The columns of every table, and its metadata."""
    if storage not in STORAGE:
        raise ValueError(f"storage is {storage!r}, expected one of {', '.join(STORAGE)}")
    small = storage == "int8"
    fields = {**SAID, "vector": pa.list_(STORAGE[storage], dims)}
    fields |= {"scale": pa.float32()} if small else {}
    if several := meta.get("vectors"):
        fields["vectors"] = pa.list_(pa.int8() if small else pa.float16(), several * dims)
        fields |= {"scales": pa.list_(pa.float32(), several)} if small else {}
    return pa.schema({**fields, **OWN}, {METADATA: json.dumps(dict(meta))})


def own_names(schema: pa.Schema) -> set[str]:
    """The column names that no item may use: those for vectors, the factors beside those of int8,
    and `OWN`.
    """
    names = {"vector", "scale", *OWN}
    if json.loads((schema.metadata or {}).get(METADATA, b"{}")).get("vectors"):
        names |= {"vectors", "scales"}
    return names


def as_table(rows: Sequence[Row], schema: pa.Schema) -> pa.Table:
    """Rows as a table of this schema.

    ValueError for a vector of another length, or for what an item says that is of another type than
    the table's others.
    """
    items = [row.item for row in rows]
    if unknown := {name for item in items for name in item} - set(schema.names):
        raise ValueError(f"items have {sorted(unknown)}, of which the table has no column")
    part = hashlib.sha256(json.dumps([item["id"] for item in items]).encode()).hexdigest()[:16]
    kind = schema.field("vector").type
    missing = np.array([row.vector is None for row in rows])
    shape: tuple[int, ...] = (kind.list_size,)
    if several := "vectors" in own_names(schema):
        shape = (1 + schema.field("vectors").type.list_size // kind.list_size, *shape)
    vectors = np.zeros((len(rows), *shape), np.float32)
    for number, row in enumerate(rows):
        if row.vector is not None:
            if np.shape(row.vector) != shape:
                had = f"the vector of {row.item['id']!r} is {list(np.shape(row.vector))}"
                raise ValueError(f"{had}, expected {list(shape)}")
            vectors[number] = row.vector
    (storage,) = (name for name, stored in STORAGE.items() if stored == kind.value_type)

    def listed(values: NDArray[Any], of: Any) -> pa.Array:
        flat = pa.array(values.ravel(), of.value_type)
        return pa.FixedSizeListArray.from_arrays(flat, of.list_size, mask=pa.array(missing))

    stored, scale = compressed(vectors[:, 0] if several else vectors, storage)
    made = {
        "vector": listed(stored, kind),
        "scale": pa.array(scale, pa.float32()),
        "tokens": pa.array([row.tokens for row in rows], pa.int32()),
        "part": pa.array([part] * len(rows)),
        "error": pa.array([row.error for row in rows], pa.string()),
    }
    if several:
        more = "int8" if storage == "int8" else "float16"
        stored, scale = compressed(vectors[:, 1:].reshape(-1, kind.list_size), more)
        made["vectors"] = listed(stored, schema.field("vectors").type)
        made["scales"] = listed(scale, pa.list_(pa.float32(), shape[0] - 1))
    columns = [
        made[field.name] if field.name in made else column(items, field.name, field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def as_batches(parts: Iterable[Sequence[Row]], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Yield each part's rows as Arrow batches of `as_table`; none for an empty part."""
    for part in parts:
        if part:
            yield from as_table(part, schema).to_batches()


def compressed(
    vectors: NDArray[np.float32], storage: str
) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """The vectors [N, D] as they are stored, and the factor of each row, [N]."""
    ones = np.ones(len(vectors), np.float32)
    if storage != "int8":
        return vectors.astype(storage, copy=False), ones
    scale = np.abs(vectors).max(1, initial=0).astype(np.float32) / 127
    scale[scale == 0] = 1
    return np.rint(vectors / scale[:, None]).astype(np.int8), scale


def new_columns(items: Sequence[Mapping[str, Any]], schema: pa.Schema) -> list[pa.Field]:
    """The columns that these items need and the schema lacks.

    ValueError for a name that is the table's own.
    """
    found, own = [], own_names(schema)
    for name in dict.fromkeys(name for item in items for name in item):
        if name in own or name.startswith("_"):
            raise ValueError(f"an item has {name!r}, which is the index's own; give another name")
        if name not in schema.names:
            kind = column(items, name).type
            if not pa.types.is_null(kind):
                found.append(pa.field(name, kind))
    return found


def column(items: Sequence[Mapping[str, Any]], name: str, kind: Any = None) -> pa.Array:
    """The values of all items under one name as a column; a ValueError where they are of several
    types, or another.
    """
    values = [item.get(name) for item in items]
    try:
        made = pa.array(values, kind)
        for value, given in zip(values, made.to_pylist(), strict=True):
            if value != given:  # pyarrow makes 9 of 9.99
                raise TypeError(f"{value!r:.60} would become {given!r:.60}")
        return made
    except (pa.ArrowException, TypeError, OverflowError) as error:
        wrong = values[0]
        for wrong in values if kind is not None else ():
            try:
                if pa.array([wrong], kind).to_pylist() != [wrong]:
                    break
            except (pa.ArrowException, TypeError, OverflowError):
                break
        expected = "values of one type" if kind is None else str(kind)
        raise ValueError(
            f"an item's {name} is {wrong!r:.60}, expected {expected} ({one_line(error)})"
        ) from error
