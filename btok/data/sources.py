"""Training pairs on disk, with random access: a user's JSONL or parquet files.

A row has `query` and `positive`, each a side, and may have `negatives` (a list of sides), `target`
(a text), `positive_id` (a text) and `scores` (a teacher's, a number for the positive and one for
each negative; in all rows or in none); other columns are passed over. A side is a text or an object
of `text`, `images` (a list of pictures), `video` (a file, a folder of frames, or a list of
pictures) and `frame_seconds` (a number per frame). A picture is a path, of a page
`report.pdf#page=7`; in parquet also a file's bytes, or an object of `bytes` and `path` as the
datasets library writes it. Pictures are not opened here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from btok.data.jsonl import JsonLines, Kind, Row
from btok.data.records import NTP_SIDES, NtpSide, Pair, Side
from btok.extras import needed
from btok.files import by_numbers, one_line, what_is
from btok.inputs import FRAMES, IMAGES, LATEST, Page, as_side
from btok.inputs.documents import at_page


class Schema(NamedTuple):
    """What the rows of a file are, and how one becomes a `Pair`.

    Args:
        name: one word, by which a JSONL file's index knows what its rows were checked for.
        columns: that a row must have.
        pair: (row, folder of its paths) -> pair, or a ValueError that says what is wrong with the
            row.
    """

    name: str
    columns: Sequence[str]
    pair: Callable[[Row, Path], Pair]


class Rows(Protocol):
    """Random access to the rows of a data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Row: ...


@dataclass(frozen=True)
class Source:
    """One data set: `source[i]` is a `Pair` with these settings in it, or what reading it raises.

    A pair without a `positive_id` gets its row's: twice in a batch, it is no negative of itself.

    Args:
        name: of the data set.
        rows, schema, root: random access to rows, what they mean, where their paths start.
        weight: share of the groups, relative to other data sets'.
        ntp_side: the side that is generated.
        query_instruction, positive_instruction: put before the text of the query, of the positive
            and negatives.
        negatives: how many of a row's hard negatives are taken, and of the scores, one more.
        digest: of the data set's content, so that a replaced file is noticed; "" for none.
        scored: whether rows have a teacher's scores.

    Raises:
        ValueError: no rows, a setting out of range.
    """

    name: str
    rows: Rows
    schema: Schema
    root: Path
    weight: float = 1.0
    ntp_side: NtpSide = "positive"
    query_instruction: str = ""
    positive_instruction: str = ""
    negatives: int = 0
    digest: str = ""
    scored: bool = False

    def __post_init__(self) -> None:
        for key, had, right, expected in (
            ("rows", len(self), len(self) > 0, "at least 1"),
            ("weight", self.weight, 0 < self.weight < math.inf, "above 0 and finite"),
            ("ntp_side", self.ntp_side, self.ntp_side in NTP_SIDES, f"one of {NTP_SIDES}"),
            ("negatives", self.negatives, self.negatives >= 0, "at least 0"),
        ):
            if not right:
                raise ValueError(f"data set {self.name}: {key} is {had!r}, expected {expected}")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Pair:
        pair = self.schema.pair(self.rows[index], self.root)
        hard = pair.negatives[: self.negatives]
        if len(hard) < self.negatives:
            raise ValueError(f"it has {len(hard)} negatives, expected {self.negatives}")
        keys = [
            as_side(_frames(side), self.positive_instruction) for side in (pair.positive, *hard)
        ]
        return replace(
            pair,
            query=as_side(_frames(pair.query), self.query_instruction),
            positive=keys[0],
            negatives=keys[1:],
            scores=pair.scores[: 1 + self.negatives],
            dataset=self.name,
            ntp_side=self.ntp_side,
            positive_id=f"\0row {index}" if pair.positive_id is None else pair.positive_id,
        )


def open_source(
    data: Any,
    *,
    name: str | None = None,
    schema: Schema | None = None,
    root: str | Path | None = None,
    rows: int | None = None,
    negatives: int | None = None,
    **settings: Any,
) -> Source:
    """Open a data set and look at it: at every line of a JSONL file, if its index does not say what
    was found (`btok/data/jsonl.py`); at all of a parquet file's columns but pictures' bytes, or, of
    another schema than this module's, at its first row.

    Args:
        data: the path of a `.jsonl` or `.parquet` file, a pattern of the latter (`part-*.parquet`),
            or a `datasets.Dataset`.
        name: None for the file's, without its ending.
        schema: None for rows as this module's head describes them.
        root: the folder that paths start from; None for the file's own.
        rows: how many are taken, from the first on; None for all.
        negatives: None for all, the same number in every row.
        settings: the others of `Source`.

    Raises:
        ValueError: another kind of file, a line or a row that is wrong (`file:line: why`; rows
            count from 0), one that cannot be read, missing columns, unequal or too small numbers of
            negatives, scores in some rows alone, what `Source` refuses.
        OSError: no such file.
        ImportError: parquet without the datasets library (the extra `data`).
    """
    schema = schema or PAIRS
    path = Path(data) if isinstance(data, str | Path) else None
    name = name or (path.stem if path else "data")
    folder = Path(root) if root is not None else path.parent if path else Path()
    if rows is not None and rows < 1:
        raise ValueError(f"data set {name}: rows is {rows}, expected at least 1")

    def check(row: Row) -> Kind:
        if missing := [column for column in schema.columns if column not in row]:
            raise ValueError(f"it has no {', '.join(missing)}, its columns are {', '.join(row)}")
        pair = schema.pair(row, folder)
        return len(pair.negatives), len(pair.scores) > 0

    found: Rows
    kinds: dict[Kind, str]  # -> where rows are of that kind
    if path and path.suffix == ".jsonl":
        if not path.is_file():
            had = f"data is {path}, which {what_is(path)}"
            raise FileNotFoundError(f"{had}; expected a file of JSON objects, one a line")
        found = lines = JsonLines(path, rows, " ".join([schema.name, *schema.columns]), check)
        digest, kinds = lines.digest, {kind: f"{path}:{at}" for kind, at in lines.kinds.items()}
    elif path and path.suffix != ".parquet":
        raise ValueError(
            f"data is {path}, which {what_is(path)}; expected one that ends in .jsonl or .parquet"
        )
    else:
        where = of_all = f"data set {name}"
        try:
            _library()  # before pyarrow, which comes with it
            from btok.data.parquet import Table, open_files

            data, digest = open_files(path) if path else (data, data._fingerprint)
            found = table = Table(data, rows)
            seen, looked = set[Kind](), [0] * (len(table) > 0)
            if schema is PAIRS:
                seen, looked = table.kinds(), looked + table.in_doubt()
            for row in looked:
                where = f"{of_all}, row {row}"
                seen.add(check(table[row]))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        kinds = dict.fromkeys(sorted(seen), of_all)
    _refuse_unequal(kinds, negatives)
    taken = min((count for count, _ in kinds), default=0) if negatives is None else negatives
    own = {"negatives": taken, "digest": digest, "scored": any(scored for _, scored in kinds)}
    return Source(name, found, schema, folder, **own, **settings)


def _refuse_unequal(kinds: Mapping[Kind, str], negatives: int | None) -> None:
    """A ValueError that names where numbers of hard negatives differ from those before or are too
    small, or where rows begin to have scores, or to have none."""
    counts, scored = set[int](), set[bool]()
    for where, met in groupby(kinds, kinds.__getitem__):
        for count, has_scores in met:
            counts.add(count)
            scored.add(has_scores)
        if len(counts) > 1 if negatives is None else min(counts) < negatives:
            expected = "one number" if negatives is None else f"at least {negatives}"
            raise ValueError(f"{where}: rows have {sorted(counts)} negatives, expected {expected}")
        if len(scored) > 1:
            had = "some rows have scores and some have none"
            raise ValueError(f"{where}: {had}, expected all or none")


def _library() -> Any:
    with needed("parquet and public data sets", "datasets", "data"):
        import datasets
    return datasets


def load_dataset(*arguments: Any, **options: Any) -> Any:
    """Call `datasets.load_dataset`: an ImportError names the extra where the library is missing, a
    ValueError tells of data that cannot be read.
    """
    library = _library()
    try:
        return library.load_dataset(*arguments, **options)
    except (OSError, ValueError, ImportError, MemoryError):
        raise
    except Exception as error:  # of a damaged description, nearly anything; a cause says more
        cause = error.__cause__ or error
        why = f"{type(cause).__name__}: {one_line(cause)}"
        raise ValueError(f"{arguments[0]} cannot be read: {why}") from error


def characters(text: str) -> str:
    """The text itself; a ValueError for half of a surrogate pair, which JSON can hold and UTF-8
    cannot.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        near = text[max(error.start - 20, 0) : error.start + 1]
        why = "ends in half of a surrogate pair, expected whole characters"
        raise ValueError(f"{near!r} {why}") from error
    return text


def below(root: Path, path: str) -> Path:
    """A path that starts from `root`; a ValueError for what no file can be named."""
    if "\0" in path:
        raise ValueError(f"a path is {path!r:.60}, expected none with a NUL")
    return root / characters(path)


def picture(value: Any, root: Path) -> Path | Page | bytes:
    """A picture of a row: a path below `root`, a page there, or a file's bytes; a ValueError for
    what is none."""
    given = value
    if isinstance(value, dict):
        stored = value.get("bytes")
        value = stored if stored and isinstance(stored, bytes) else value.get("path")
    if not isinstance(value, str | bytes) or not value:
        raise ValueError(f"a picture is {given!r:.60}, expected a path")
    return value if isinstance(value, bytes) else at_page(below(root, value))


def _pair(row: Row, root: Path) -> Pair:
    negatives = part(row, "negatives", list)
    query, positive, *hard = (
        _side(side, where, root)
        for side, where in [
            (row["query"], "query"),
            (row["positive"], "positive"),
            *((side, "a negative") for side in negatives),
        ]
    )
    target, positive_id = (part(row, key, str) or None for key in ("target", "positive_id"))
    scores = tuple(part(row, "scores", list))
    if not all(type(score) in (int, float) and abs(score) <= LARGEST for score in scores):
        raise ValueError(f"scores is {[*scores]!r:.60}, expected finite numbers")
    if scores and len(scores) != 1 + len(hard):
        had = f"it has {len(hard)} negatives and {len(scores)} scores"
        raise ValueError(f"{had}, expected {1 + len(hard)}: the positive's, then each negative's")
    return Pair(query, positive, hard, target=target, positive_id=positive_id, scores=scores)


PAIRS = Schema("pairs", ("query", "positive"), _pair)
PARTS = ("text", "images", "video", "frame_seconds")
LARGEST = float(np.finfo(np.float32).max)  # of a score, which a NaN is not below either


def _side(value: Any, where: str, root: Path) -> Side:
    given = {"text": value} if isinstance(value, str) else value
    if not isinstance(given, dict) or not given.keys() <= set(PARTS):
        raise ValueError(
            f"{where} is {value!r:.60}, expected a text or an object of {', '.join(PARTS)}"
        )
    video = given.get("video") or []
    if not isinstance(video, str):
        video = [picture(frame, root) for frame in part(given, "video", list)]
    images = [picture(image, root) for image in part(given, "images", list)]
    text = part(given, "text", str)
    if not text.strip() and not images and not video:
        raise ValueError(f"{where} is empty, expected a text, a picture or a video")
    seconds = part(given, "frame_seconds", list)
    if seconds:
        numbers = all(type(at) in (int, float) and 0 <= at < LATEST for at in seconds)
        if not numbers or any(b < a for a, b in pairwise(seconds)):
            expected = "seconds from a video's start on, in order"
            raise ValueError(f"frame_seconds is {seconds!r:.60}, expected {expected}")
        if not isinstance(video, str) and len(seconds) != len(video):
            had = f"{where} has {len(video)} frames and {len(seconds)} frame_seconds"
            raise ValueError(f"{had}, expected as many or none")
    return Side(text, images, below(root, video) if isinstance(video, str) else video, seconds)


def part(row: Row, key: str, kind: type) -> Any:
    """A row's value, an empty one for null or none; a ValueError for one of another type."""
    if (value := row.get(key)) is not None and not isinstance(value, kind):
        raise ValueError(f"{key} is {value!r:.60}, expected a {kind.__name__}")
    return characters(value) if value and isinstance(value, str) else value or kind()


def _frames(side: Side) -> Side:
    """A folder of frames as pictures: in order of their numbers, at most so many, evenly; hidden
    files, which a Mac leaves beside those that it copies, are none."""
    folder = side.video
    if not isinstance(folder, Path) or folder.is_file():
        return side

    with os.scandir(folder) as entries:
        shown = [Path(e) for e in entries if e.name[0] != "." and e.is_file()]
    found = [path for path in shown if path.suffix.lower() in IMAGES]
    found.sort(key=lambda path: (by_numbers(path.name), path.name))  # 1.png beside 01.png
    if not found:
        raise ValueError(f"video {folder} has no frames")
    taken = np.linspace(0, len(found) - 1, min(FRAMES, len(found))).astype(int)
    seconds = side.frame_seconds
    if seconds and len(seconds) != len(found):
        had = f"video {folder} has {len(found)} frames and {len(seconds)} frame_seconds"
        raise ValueError(f"{had}, expected as many or none")
    times = [seconds[at] for at in taken] if seconds else []
    return replace(side, video=[found[at] for at in taken], frame_seconds=times)
