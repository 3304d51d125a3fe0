"""Parquet files, and all rows of a `datasets.Dataset` looked at by its columns.

No picture's bytes are read for that. A row in which a value is in doubt is then read as a row,
which says what is wrong with it, if anything.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types
from pyarrow.parquet import ParquetFile

from btok.data.sources import LARGEST, LATEST, PARTS, load_dataset
from btok.files import one_line

BATCH = 10_000  # rows that are looked at together
Look = Callable[[Any], np.ndarray]  # an array -> for each of its values, whether it is in doubt


def open_files(pattern: Path) -> tuple[Any, str]:
    """The data set of all parquet files of a pattern but those without rows; a digest of them.

    The digest is of sizes, footers and all columns but pictures' bytes, of which the footers say
    how large they are together.

    Raises:
        ValueError: a file that cannot be read or has other columns than the first; no rows.
        OSError: no such file.
    """
    matched = [str(pattern)] if pattern.is_file() else glob.glob(str(pattern), recursive=True)
    files = sorted(name for name in matched if not os.path.isdir(name))
    if not files:
        what = "a folder, whose files are" if pattern.is_dir() else "no file, expected one or"
        raise FileNotFoundError(f"{pattern} is {what} a pattern like {pattern.parent}/*.parquet")
    digest, filled, first = hashlib.sha256(), list[str](), list[str]()
    for name in files:
        with open(name, "rb") as file, _named(name):
            parquet = ParquetFile(file)
            columns, rows = parquet.schema_arrow.names, parquet.metadata.num_rows
            for part in _told_by(file, parquet):
                digest.update(part)
        first = first or columns
        if set(columns) != set(first):
            had = f"{name} has the columns {', '.join(columns)}, {files[0]} {', '.join(first)}"
            raise ValueError(f"{had}; expected the same in all files of {pattern}")
        filled += [glob.escape(name)] * (rows > 0)  # the datasets library cannot read an empty one
    if not filled:
        raise ValueError(f"{pattern} has no rows, expected at least 1")
    try:
        # its cache looks at times alone, which archives may set; a name of its own at the content
        named = f"btok-{digest.hexdigest()[:16]}"
        data = load_dataset("parquet", named, data_files=filled, split="train")
    except ValueError as error:
        for name in files:
            with _named(name):
                for _ in ParquetFile(name).iter_batches():
                    pass
        raise ValueError(f"{pattern}: {one_line(error)}") from error
    return data, digest.hexdigest()


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, ValueError) as error:
        why = f"{name} cannot be read as parquet: {one_line(error)}"
        raise ValueError(f"{why}; it is damaged or cut off, copy or write it again") from error


def _told_by(file: Any, parquet: Any) -> Iterator[bytes]:
    """A parquet file's size, footer, and all column chunks but those of plain bytes (pictures)."""
    metadata = parquet.metadata
    end = file.seek(-8, os.SEEK_END)
    file.seek(max(end - int.from_bytes(file.read(4), "little"), 0))
    yield b"%d" % end + file.read()
    kinds = [metadata.schema.column(i) for i in range(metadata.num_columns)]
    for group in range(metadata.num_row_groups):
        for i, kind in enumerate(kinds):
            if kind.physical_type != "BYTE_ARRAY" or kind.logical_type.type != "NONE":
                # a reader refuses a damaged chunk; asked for its metadata, pyarrow would abort
                next(parquet.iter_batches(1, row_groups=[group], columns=[kind.path]), None)
                chunk = metadata.row_group(group).column(i)
                file.seek(min(filter(None, (chunk.dictionary_page_offset, chunk.data_page_offset))))
                yield file.read(chunk.total_compressed_size)


class Table:
    """Rows of a `datasets.Dataset`; pictures stay the bytes or paths that they are stored as."""

    def __init__(self, data: Any, rows: int | None) -> None:
        self.data = data.with_format("arrow")
        self.count = len(data) if rows is None else min(rows, len(data))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self.data[index].to_pylist()[0]

    def kinds(self) -> set[tuple[int, bool]]:
        """The different (number of hard negatives, whether there are scores) of the rows; empty
        where they are no lists.
        """
        found = []
        for name in ("negatives", "scores"):
            lengths = np.zeros(self.count, int)
            if name in self.data.column_names:
                try:
                    lengths = _counts(self.data.select_columns(name)[: self.count].column(0))
                except pa.ArrowNotImplementedError:  # what they are a row says
                    return set()
            found.append(lengths)
        negatives, scores = found
        return {
            (int(count), scored)
            for scored in (False, True)
            for count in np.unique(negatives[(scores > 0) == scored])
        }

    def in_doubt(self) -> list[int]:
        """Rows of pairs in which a value may be wrong; all where columns cannot tell."""
        looks: dict[str, Look] = {"query": _sides, "positive": _sides, "negatives": _lists(_sides)}
        looks |= {"target": _texts, "positive_id": _texts, "scores": _lists(_numbers)}
        names = [name for name in looks if name in self.data.column_names]
        chosen = self.data._indices  # of a selection, which would copy its pictures if it were made
        table = self.data.data.table.select(names)
        found = [np.zeros(0, bool)]
        for batch in (table if chosen else table[: self.count]).to_batches(BATCH):
            try:
                batch.validate(full=True)  # texts are UTF-8
                columns = zip(names, batch.columns, strict=True)
                doubts = [looks[name](column) for name, column in columns]
                if "scores" in names:
                    scores = _counts(batch["scores"])
                    hard = _counts(batch["negatives"]) if "negatives" in names else 0
                    doubts.append((scores > 0) & (scores != 1 + hard))
                found.append(np.any(doubts, axis=0))
            except pa.ArrowException:
                found.append(np.ones(len(batch), bool))
        doubt = np.concatenate(found)
        if chosen:
            doubt = doubt[chosen.column(0).to_numpy()[: self.count]]
        return np.flatnonzero(doubt).tolist()


def _is_text(column: Any) -> bool:
    return types.is_string(column.type) or types.is_large_string(column.type)


def _is_bytes(column: Any) -> bool:
    return types.is_binary(column.type) or types.is_large_binary(column.type)


def _counts(column: Any) -> np.ndarray:
    """The length of each text, bytes value or list in a column; 0 for a null."""
    if column.null_count == len(column):
        return np.zeros(len(column), int)
    plain = _is_text(column) or _is_bytes(column)
    counts = (pc.binary_length if plain else pc.list_value_length)(column)
    return counts.fill_null(0).to_numpy(zero_copy_only=False)


def _part(column: Any, name: str) -> Any:
    """A field of objects; nulls where there is none, of a type that one may have."""
    at = column.type.get_field_index(name)
    if at >= 0 and not types.is_null(column.type[at].type):
        return pc.struct_field(column, name)
    return pa.nulls(len(column), pa.string() if name in ("text", "path") else pa.list_(pa.string()))


def _texts(column: Any) -> np.ndarray:
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    return np.zeros_like(valid) if _is_text(column) else valid


def _paths(column: Any) -> np.ndarray:
    nul = pc.match_substring(column, "\0").fill_null(False).to_numpy(zero_copy_only=False)
    return nul | (_counts(column) == 0)


def _pictures(column: Any) -> np.ndarray:
    if _is_text(column):
        return _paths(column)
    if _is_bytes(column):
        return _counts(column) == 0
    if not types.is_struct(column.type):
        return np.ones(len(column), bool)
    paths, stored = _pictures(_part(column, "path")), _part(column, "bytes")
    return paths & (_counts(stored) == 0) if _is_bytes(stored) else paths


def _lists(look: Look) -> Look:
    def lists(column: Any) -> np.ndarray:
        doubt = np.zeros(len(column), bool)
        if column.null_count < len(column):
            of = pc.list_parent_indices(column).to_numpy()
            doubt[of[look(pc.list_flatten(column))]] = True
        return doubt

    return lists


def _numbers(column: Any) -> np.ndarray:
    if not types.is_floating(column.type) and not types.is_integer(column.type):
        return np.ones(len(column), bool)
    numbers = column.cast(pa.float64()).to_numpy(zero_copy_only=False)  # a null is NaN
    return ~(np.abs(numbers) <= LARGEST)


def _seconds(column: Any) -> np.ndarray:
    if column.null_count == len(column):
        return np.zeros(len(column), bool)
    values, of = pc.list_flatten(column), pc.list_parent_indices(column).to_numpy()
    if not types.is_floating(values.type) and not types.is_integer(values.type):
        return _counts(column) > 0
    seconds = values.cast(pa.float64()).to_numpy(zero_copy_only=False)  # a null is NaN
    wrong = ~((seconds >= 0) & (seconds < LATEST))
    wrong[1:] |= (seconds[1:] < seconds[:-1]) & (of[1:] == of[:-1])
    doubt = np.zeros(len(column), bool)
    doubt[of[wrong]] = True
    return doubt


def _sides(column: Any) -> np.ndarray:
    if _is_text(column):
        return _counts(pc.utf8_trim_whitespace(column)) == 0
    if not types.is_struct(column.type) or not {field.name for field in column.type} <= {*PARTS}:
        return np.ones(len(column), bool)
    text, images, video, seconds = (_part(column, name) for name in PARTS)
    frames, times = _counts(video), _counts(seconds)
    empty = _texts(text) | _sides(text) & (_counts(images) == 0) & (frames == 0)
    if _is_text(video):  # a path, which does not tell how many frames there are
        wrong = _paths(video) & video.is_valid().to_numpy(zero_copy_only=False)
        wrong |= (times > 0) & (frames == 0)
    else:
        wrong = _lists(_pictures)(video) | (times > 0) & (times != frames)
    return empty | wrong | _lists(_pictures)(images) | _seconds(seconds)
