"""A JSONL file as rows with random access: checked once, then found by an index beside it.

The index of `mine.jsonl` under the schema `pairs` is `mine.jsonl.pairs.index`: a .npy of where rows
begin, which is mapped; behind it what the check found, in JSON; at its end the sha256 of both. It
is made again where that does not fit, or where the file's content is another.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from array import array
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from btok.files import sha256, whole

VERSION = 4  # of the index and of what rows are checked for: one of another is made again
SEAL = 64  # the last bytes of an index
TICK = 2_000_000_000  # nanoseconds that a change may leave a file's time as it was, on any disk
Row = Mapping[str, Any]
Kind = tuple[int, bool]  # how many hard negatives a row has, and whether it has scores
logger = logging.getLogger("btok")


class JsonLines:
    """The objects of a JSONL file, read when asked for; blank lines are passed over.

    Args:
        path: the file.
        rows: how many are taken, from the first on; None for all.
        kind: of what `check` depends on; the first word is part of the index's name.
        check: row -> its number of hard negatives and whether it has scores, or a ValueError; the
            first opening has it look at every row, with a progress bar where stderr is a terminal.

    Attributes:
        digest: the sha256 of the whole file.
        kinds: what the check says of the rows taken -> the first line of which it says that.

    Raises:
        ValueError: a line among those taken that is wrong (`file:line: why`).
        OSError: no such file.
    """

    def __init__(
        self, path: Path, rows: int | None, kind: str, check: Callable[[Row], Kind]
    ) -> None:
        self.path = path
        starts, found = _index(path, f"{VERSION} {kind}", check)
        self.starts, self.digest = starts[:rows], found["digest"]
        if found["wrong"] and (rows is None or rows > len(starts)):
            line, why = found["wrong"]
            raise ValueError(f"{path}:{line}: {why}")
        self.kinds: dict[Kind, int] = {
            (count, scored): line
            for count, scored, row, line in found["kinds"]
            if row < len(self.starts)
        }

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Row:
        with open(self.path, "rb") as file:
            file.seek(self.starts[index])
            return _object(file.readline())


def _object(line: bytes) -> Row:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if b"\0" in line or line.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
            convert = "iconv -f UTF-16 -t UTF-8"
            raise ValueError(f"it is UTF-16 ({convert}) or damaged, expected UTF-8") from error
        if b"\r" in line.strip():
            raise ValueError(r"its lines end in \r alone, expected \n or \r\n") from error
        raise ValueError(f"expected a JSON object: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"it is {row!r:.60}, expected a JSON object")
    return row


def _index(
    path: Path, kind: str, check: Callable[[Row], Kind]
) -> tuple[np.ndarray, dict[str, Any]]:
    """Where the file's rows begin, int64 [n], and what the check found: from its index, or made and
    kept there.
    """
    index = path.with_name(f"{path.name}.{kind.split()[1]}.index")
    stamp, (starts, found) = _stamp(path), _read(index)
    if found.get("kind") == kind and found["stamp"] == stamp and stamp[1]:
        return starts, found
    same = found.get("kind") == kind and found["stamp"][0] == stamp[0]
    if same and sha256(path) == found["digest"]:
        found["stamp"] = stamp
    else:
        starts, found = _check(path, kind, check)
    try:
        with whole(index) as draft:
            with open(draft, "wb") as file:
                np.save(file, starts)
                file.write(json.dumps(found).encode())
            seal = sha256(draft)
            with open(draft, "ab") as file:
                file.write(seal.encode())
    except OSError as error:
        why = f"{index} cannot be written ({error.strerror})"
        logger.warning(f"{why}: every start will read all of {path.name}")
    return starts, found


def _stamp(path: Path) -> list[int]:
    """A file's size, and times of change in nanoseconds; 0 where it may change within the first.

    The second is the system's own: a copy that keeps the first does not keep that.
    """
    stat = path.stat()
    old = time.time_ns() - stat.st_mtime_ns > TICK
    return [stat.st_size, stat.st_mtime_ns if old else 0, stat.st_ctime_ns]


def _read(index: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """The content of an index; nothing where there is none, or a damaged one."""
    try:
        content = np.memmap(index, np.uint8, "r")
        if hashlib.sha256(content[:-SEAL].data).hexdigest().encode() == content[-SEAL:].tobytes():
            starts = np.load(index, mmap_mode="r")
            end = starts.offset + starts.nbytes
            return starts, json.loads(content[end:-SEAL].tobytes())
    except (OSError, ValueError):  # no file, an empty one, one without rows
        pass
    return np.empty(0, np.int64), {}


def _check(
    path: Path, kind: str, check: Callable[[Row], Kind]
) -> tuple[np.ndarray, dict[str, Any]]:
    """Check every line up to the first wrong one: where rows begin, int64 [n], and what `_index`
    keeps, with the file's digest.
    """
    stamp, digest, at = _stamp(path), hashlib.sha256(), 0  # the stamp first: it may change now
    starts, kinds = array("q"), dict[Kind, list[int]]()
    wrong: tuple[int, str] | None = None
    options: dict[str, Any] = {"unit": "B", "unit_scale": True, "disable": None}
    with (
        open(path, "rb") as file,
        tqdm(total=stamp[0], desc=f"checking {path.name}", **options) as bar,
    ):
        for number, line in enumerate(file, 1):
            digest.update(line)
            if wrong is None and line.removeprefix(BOM_UTF8).strip():
                try:
                    kinds.setdefault(check(_object(line)), [len(starts), number])
                    starts.append(at)
                except (ValueError, RecursionError) as error:  # a value's too, if it is shown
                    wrong = number, str(error)
            at += len(line)
            bar.update(len(line))
    return np.array(starts, np.int64), {
        "kind": kind,
        "stamp": stamp,
        "digest": digest.hexdigest(),
        "kinds": [[*kind, *first] for kind, first in kinds.items()],
        "wrong": wrong,
    }
