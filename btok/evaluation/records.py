"""Records and pictures of public data sets: on this disk, on the hub, and what is wrong with one.

A data set is some files of a repository on the hub, which a configuration and a split pick out; on
disk the same files lie in a folder under the same names. `fetch` and `unpack` alone open a
connection.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import Decimal
from fnmatch import fnmatch
from itertools import chain
from numbers import Integral, Real
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from btok.extras import needed
from btok.files import by_numbers, one_line, rename, whole, write_text

PICTURES = (".jpg", ".jpeg", ".png")
ENDINGS = (".parquet", ".jsonl", ".json")
REVISION = "revision{}.txt"  # the commit that `fetch` got a configuration's files from


class Row:
    """A record, and where it is.

    Args:
        name: of the data set; number: of the record, from 0.
    """

    def __init__(self, name: str, number: int, record: Mapping[str, Any]) -> None:
        self.name, self.number, self.record = name, number, record

    def __getitem__(self, field: str) -> Any:
        """A field; a ValueError that names data set, row and field where there is none."""
        if not isinstance(self.record, Mapping) or self.record.get(field) is None:
            has = ", ".join(map(str, self.record)) if isinstance(self.record, Mapping) else "none"
            raise self.wrong(f"no field {field!r}, it has {has}")
        return self.record[field]

    def text(self, field: str) -> str:
        """The value of a field that must be a text; else a ValueError."""
        if not isinstance(found := self[field], str):
            raise self.wrong(f"{field} is {found!r:.60}, expected a text")
        return found

    def texts(self, field: str) -> list[str]:
        """The value of a field that must be a list of texts, and not empty; else a ValueError."""
        found = self[field]
        found = list(found) if isinstance(found, np.ndarray | tuple) else found
        if not isinstance(found, list) or not found or not all(isinstance(x, str) for x in found):
            raise self.wrong(f"{field} is {found!r:.60}, expected a list of texts")
        return found

    def key(self, field: str) -> Any:
        """The value of a field that must name something, a number or a text; else a ValueError."""
        if not isinstance(found := self[field], Integral | str):
            raise self.wrong(f"{field} is {found!r:.60}, expected a whole number or a text")
        return found if isinstance(found, str) else int(found)

    def wrong(self, why: str, kind: type[Exception] = ValueError) -> Exception:
        """The error that tells what is wrong with this row."""
        return kind(f"{self.name}, row {self.number}: {why}")


class Pictures:
    """Pictures and frames below a folder, each looked for once.

    Args:
        root: the folder.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.seen: dict[str, list[str]] = {}

    def image(self, row: Row, *path: str) -> str:
        """The path of a picture that is there; a FileNotFoundError that names it and the row."""
        found = os.path.join(self.root, *path)
        if found not in self.seen:
            if not os.path.isfile(found):
                raise row.wrong(f"no picture {found}", FileNotFoundError)
            self.seen[found] = [found]
        return found

    def frames(self, row: Row, *path: str, most: int | None = None, least: int = 1) -> list[str]:
        """The frames in a folder in their order; where there are more, `most` of them, the first,
        the last and evenly between. A FileNotFoundError for fewer than `least`.
        """
        folder = os.path.join(self.root, *path)
        if folder not in self.seen:
            names = os.listdir(folder) if os.path.isdir(folder) else []
            shown = (name for name in names if name[0] != ".")  # a Mac leaves hidden ones beside
            names = [name for name in shown if os.path.splitext(name)[1].lower() in PICTURES]
            names.sort(key=lambda name: (by_numbers(name.lower()), name))  # 1.png beside 01.png
            self.seen[folder] = [f"{folder}/{name}" for name in names]
        found = self.seen[folder]
        if len(found) < least:
            had = f"{folder} has {len(found)} frames, expected at least {least}"
            raise row.wrong(had, FileNotFoundError)
        if most is None or len(found) < most:
            return found
        return [found[i] for i in np.linspace(0, len(found) - 1, most, dtype=int)]

    def folders(self, folder: str) -> list[str]:
        """The folders in a folder, sorted: in what order a disk lists them is its own affair."""
        there = os.path.join(self.root, folder)
        names = sorted(os.listdir(there)) if os.path.isdir(there) else []
        return [name for name in names if os.path.isdir(os.path.join(there, name))]


def relevant(name: str, qrels: Iterable[Mapping[str, Any]]) -> dict[Any, dict[Any, Any]]:
    """The pages with a score above 0 by query id, of a page named twice the higher one: BEIR's
    qrels, records of `query-id`, `corpus-id` and `score`.
    """
    found: dict[Any, dict[Any, Any]] = {}
    for number, record in enumerate(qrels):
        row = Row(f"{name} (qrels)", number, record)
        query, page, score = row.key("query-id"), row.key("corpus-id"), row["score"]
        if not isinstance(score, Real | Decimal) or score != score:
            raise row.wrong(f"score is {score!r:.60}, expected a number")
        score = score if isinstance(score, int) else float(score)
        if score > 0:
            of_query = found.setdefault(query, {})
            of_query[page] = max(of_query.get(page, 0), score)
    return found


def corpus(
    name: str, files: Sequence[Path], folder: Path, name_of: Callable[[Any], str]
) -> list[Mapping[str, Any]]:
    """The pages of BEIR's corpus, `corpus-id` alone, each with its picture in a file.

    Those that are not there yet are taken out of the records, a few at a time, byte for byte.

    Args:
        name: of the data set.
        files: its corpus, in one or several.
        folder: of the pages.
        name_of: the name that a page has there, by its id; a ValueError for one that leads out.
    """
    ids = chain(*(read(path, ["corpus-id"]) for path in files))
    rows = [Row(f"{name} (corpus)", i, record) for i, record in enumerate(ids)]
    paths = []
    for row in rows:
        page = PurePath(name_of(row.key("corpus-id")))
        if page.is_absolute() or ".." in page.parts:
            had = f"corpus-id is {row['corpus-id']!r:.60}"
            raise row.wrong(f"{had}, expected no way out of a folder")
        paths.append(folder / page)
    if not all(path.is_file() for path in paths):
        for row, path, record in zip(rows, paths, chain(*map(read, files)), strict=True):
            if path.is_file():
                continue
            if not isinstance(picture := stored(record.get("image")), bytes):
                raise row.wrong(f"no picture {path}, nor one in the record", FileNotFoundError)
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole(path) as draft:
                draft.write_bytes(picture)
    return [{"corpus-id": row.key("corpus-id")} for row in rows]


def stored(image: Any) -> Any:
    """A record's picture; the hub's files have its bytes in a mapping."""
    return image.get("bytes") if isinstance(image, Mapping) else image


def patterns(config: str, split: str) -> list[str]:
    """The file name patterns under which a configuration's files may lie, the likeliest first."""
    if not config:
        return [f"{split}[-.]*", f"data/{split}[-.]*"]
    by_split = [f"{config}/", f"data/{config}/", f"{config}/data/", f"{config}-"]
    return [f"{start}{split}[-.]*" for start in by_split] + [
        f"{config}/*",
        f"{config}.*",
        f"json/{config}.*",
    ]


def pick(names: Iterable[str], config: str, split: str) -> list[str]:
    """The files among `names` with the records of a configuration, in one format; empty where there
    are none.
    """
    for pattern in patterns(config, split):
        for ending in ENDINGS:
            if found := sorted(
                name
                for name in names
                if name.endswith(ending)
                and fnmatch(name, pattern)
                and name.count("/") == pattern.count("/")
            ):
                return found
    return []


def find(folder: Path, config: str, split: str) -> list[Path]:
    """The files of a configuration in a folder; a FileNotFoundError where one is missing."""
    every = (path for pattern in patterns(config, split) for path in folder.glob(pattern))
    names = pick({path.relative_to(folder).as_posix() for path in every}, config, split)
    if not names:
        where = folder / patterns(config, split)[0]
        raise FileNotFoundError(f"no records, expected {where} ending in {' or '.join(ENDINGS)}")
    numbers = [re.search(r"-(\d+)-of-(\d+)", name) for name in names]
    if any(numbers):
        counts = {int(found[2]) for found in numbers if found}
        indices = sorted(int(found[1]) for found in numbers if found)
        if indices != list(range(max(counts))) or len(counts) > 1 or not all(numbers):
            some = ", ".join(str(folder / name) for name in names[:3])
            raise FileNotFoundError(f"not just files 0 to {max(counts) - 1} of records, as {some}")
    return [folder / name for name in names]


def read(path: Path, columns: Sequence[str] | None = None) -> Iterator[Mapping[str, Any]]:
    """The records of a file, a few at a time; of parquet only some columns, if they are named.

    Raises:
        ValueError: it is damaged; ImportError: parquet without pyarrow (the extra `data`).
    """
    try:
        if path.suffix != ".parquet":
            text = path.read_text(encoding="utf-8")
            as_list = path.suffix == ".json" and text.lstrip().startswith("[")
            lines = (line for line in text.split("\n") if line.strip())
            yield from json.loads(text) if as_list else map(json.loads, lines)
            return
        with needed("parquet files", "pyarrow", "data"):
            from pyarrow.parquet import ParquetFile
        with ParquetFile(path, pre_buffer=False) as file:  # else what was read is kept
            for batch in file.iter_batches(16, columns=columns):  # a picture may be in each
                yield from batch.to_pylist()
    except (ValueError, OSError, RecursionError) as error:  # pyarrow's are of the first two
        raise ValueError(f"{path} cannot be read ({one_line(error)}); fetch it again") from error


def revision(folder: Path, configs: Sequence[str]) -> str:
    """The commit on the hub that the files of configurations are of; "local" for files that came
    otherwise.
    """
    noted = [folder / REVISION.format(config) for config in configs]
    commits = {path.read_text().strip() if path.is_file() else "local" for path in noted}
    return " ".join(sorted(commits))


@contextmanager
def _hub() -> Iterator[None]:
    """A context that raises what the hub's client raises as an OSError, and a damaged archive as a
    ValueError.
    """
    try:
        yield
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        why = "; its copy in the hub's cache is damaged, delete that"
        raise ValueError(f"the archive cannot be read ({one_line(error)}){why}") from error
    except (OSError, ValueError, ImportError, MemoryError):
        raise
    except Exception as error:  # of whichever client of HTTP it has
        raise OSError(f"the hub does not answer: {one_line(error)}") from error


def listed(source: str, commit: str) -> tuple[str, dict[str, int]]:
    """A repository's commit on the hub, in full, and the bytes of each of its files."""
    from huggingface_hub import HfApi

    with _hub():
        info = HfApi().dataset_info(source, revision=commit, files_metadata=True)
    return info.sha or commit, {file.rfilename: file.size or 0 for file in info.siblings or []}


def fetch(source: str, commit: str, configs: Sequence[str], split: str, folder: Path) -> None:
    """Get the files of some configurations from the hub, and note the commit they are of.

    ValueError for a configuration that the repository does not have.
    """
    from huggingface_hub import hf_hub_download

    sha, there = listed(source, commit)
    for config in configs:
        files = pick(there, config, split)
        if not files:
            raise ValueError(f"{source} at {sha} has no records of {config or split}")
        with _hub():
            for name in files:
                hf_hub_download(source, name, repo_type="dataset", revision=sha, local_dir=folder)
        write_text(folder / REVISION.format(config), f"{sha}\n")


def unpack(
    source: str,
    revision: str,
    files: Sequence[str],
    strip: str,
    into: Path,
    wanted: Callable[[str], bool],
    marker: Path,
) -> int:
    """Get an archive, maybe in parts, from the hub, and take out of it what is wanted.

    Args:
        source, revision, files: the repository, its commit, and the archive's parts in it.
        strip: what its members' names start with.
        into: where they go; what is there already stays.
        wanted: of a member's name without `strip`.
        marker: a file that is there from the first member until all are out.

    Returns:
        How many files that were.
    """
    from huggingface_hub import hf_hub_download

    sha, _ = listed(source, revision)
    count = 0
    with _hub():
        paths = [hf_hub_download(source, x, repo_type="dataset", revision=sha) for x in files]
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
        with (
            gzip.GzipFile(fileobj=io.BufferedReader(_Joined(paths))) as joined,
            tarfile.open(fileobj=joined, mode="r|") as tar,
        ):
            for member in tar:
                name = member.name.removeprefix("./").removeprefix(strip)
                if not member.isfile() or not wanted(name) or (into / name).exists():
                    continue
                member.name = f"{name}.part"  # a kill leaves no half of a picture under its name
                tar.extract(member, into, filter="data")
                rename(into / member.name, into / name)
                count += 1
            while joined.read(1 << 20):  # at the end of which all of it has to add up
                pass
    marker.unlink()
    return count


class _Joined(io.RawIOBase):
    """Files one after the other, as one."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.waiting = list(paths)
        self.file: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self.file or self.waiting:
            self.file = self.file or open(self.waiting.pop(0), "rb")  # noqa: SIM115
            if count := self.file.readinto(buffer):
                return count
            self.file.close()
            self.file = None
        return 0
