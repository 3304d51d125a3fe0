"""A folder's files, pages and clips as the items of an index that follows the folder."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, tee
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from btok.encoder import BTokEncoder
from btok.files import printable, sha256
from btok.inputs import DOCUMENTS, KINDS, Clip, Page, cut, duration, is_video, pages
from btok.tools.encode import WINDOW, encode_to
from btok.tools.lookup import Came
from btok.tools.rows import Encoded, quoted, without_none
from btok.tools.sinks import fitted, is_index
from btok_kernels.ranks import rank

if TYPE_CHECKING:
    from btok.tools.index import Index

READING = 2  # of files; another makes all vectors again
DIGEST = re.compile(r"([0-9a-f]{64})(\.[^@]*)@\d+-")  # of a file that could be read, in its id
SHOWN = 10  # unreadable files that are named


@dataclass
class Listing:
    """The files that a folder holds, and what was passed over.

    Args:
        paths: of the files of the kinds that are embedded, relative to the folder, sorted.
        others: how many files of each other ending there are, and of links and hidden things.
        unreadable: folders that cannot be read, relative to it, and why.
    """

    paths: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    unreadable: dict[str, str] = field(default_factory=dict)

    @property
    def real(self) -> dict[str, str]:
        """The paths that are no UTF-8, by their uri."""
        return {as_uri(path): path for path in self.paths if as_uri(path) != path}

    def passed_over(self) -> str:
        """A phrase that counts what was passed over, the most frequent kind first; empty for
        nothing.
        """
        most = sorted(self.others.items(), key=lambda other: (-other[1], other[0]))
        said = ", ".join(f"{count} {what}" for what, count in most)
        return said and f"; passed over: {said}"


def list_files(root: Path, *own: Path) -> Listing:
    """Look through a folder, but for these folders in it, as of an index.

    Hidden things are passed over, which an index and what macOS leaves on other disks are, too, and
    symbolic links, which may lead out of the folder or in circles.
    """
    found = Listing()
    passed = {str(path.resolve()) for path in own}
    top, waiting = str(root.resolve()), [""]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(f"{top}/{folder}") as there:
                entries = list(there)
        except OSError as error:
            found.unreadable[folder or "."] = error.strerror or str(error)
            continue
        for entry in entries:
            path = f"{folder}/{entry.name}" if folder else entry.name
            if f"{top}/{path}" in passed:
                continue
            if entry.name.startswith("."):
                found.others["hidden"] += 1
            elif entry.is_symlink():
                found.others["links"] += 1
            elif entry.is_dir():
                waiting.append(path)
            elif not entry.is_file():
                found.others["no ordinary files"] += 1
            elif (ending := Path(entry.name).suffix.lower()) in KINDS:
                found.paths.append(path)
            else:
                found.others[printable(ending) or "without an ending"] += 1
    found.paths.sort()
    return found


def update(
    encoder: BTokEncoder,
    root: Path,
    listed: Listing,
    output: str | Path,
    instruction: str,
    batch_tokens: int,
    storage: str | None = None,
    where: str | None = None,
    clip: float | None = None,
    options: Mapping[str, Any] | None = None,
) -> Index | None:
    """Make an index, or another sink, hold just these files of a folder, and say what was done.

    What lies in a folder that cannot be read now stays as it was. A file that changes while it is
    encoded gets no vector, and is tried again by the next call. `options` are those of `fitted`.

    Returns:
        The index, if it is one.
    """
    encoder, old = fitted(encoder, output, options), None
    if is_index(output):
        old = index_of_files(encoder, output, instruction, storage, where)
    items, again = tee(describe(root, listed, old, clip))
    real = listed.real
    inputs = (as_input(root, item, real) for item in again)
    done = encode_to(
        encoder,
        output,
        inputs,
        items,
        instruction,
        batch_tokens,
        storage=storage,
        check=lambda item: changed(path_of(root, item, real), item),
    )
    if old is not None:
        old.refresh()
    if rank() == 0:
        tell(listed, output, done, done.vectors if old is None else old.distinct("uri"))
    return old


def index_of_files(
    encoder: BTokEncoder,
    uri: str | Path,
    instruction: str,
    storage: str | None,
    where: str | None = None,
) -> Index:
    """The index there, or a new one; a ValueError where it is of other things than files, or a
    search among some of them would be refused once all are encoded.
    """
    from btok.tools.index import open_index

    index = open_index(encoder, uri, instruction, storage)
    if others := next(index.rows(["id"], "uri IS NULL"), ()):
        raise ValueError(
            f"{uri} is an index of other things than files ({others[0][0].as_py()!r:.60}); "
            "give another --output"
        )
    if where is not None:
        index.count(where)
    return index


def tell(listed: Listing, output: str | Path, done: Encoded, files: int) -> None:
    """Say what was done, and what could not be read."""
    several = f", {done.vectors} items" if done.vectors > files else ""
    there = {as_uri(path) for path in listed.paths} if done.removed else ()
    gone = sum(row.get("uri") not in there for row in done.removed)
    said = f"{files} files{several}, {done.added} of them new or changed"
    said += f", {gone} gone, {len(done.unreadable) + len(listed.unreadable)} unreadable"
    print(f"{printable(output)}: {said}{listed.passed_over()}", file=sys.stderr)
    told = {
        f"{folder}/": f"{why}; what was known of it stays"
        for folder, why in listed.unreadable.items()
    }
    told |= done.unreadable
    for name, why in list(told.items())[:SHOWN]:
        print(printable(f"  {name}: {why}"), file=sys.stderr)
    if len(told) > SHOWN:
        rest = f"  ... and {len(told) - SHOWN} more"
        if is_index(output):
            rest += f"; python -m btok index {output} names all"
        print(printable(rest), file=sys.stderr)
    if done.recall is not None:
        print(f"{printable(output)}: {said_of_recall(done.recall)}", file=sys.stderr)


def said_of_recall(recall: float) -> str:
    """A sentence on the recall of a new approximate index."""
    return (
        f"an approximate index was made, its recall@10 is {recall:.3f} of exact search "
        "(stored vectors asked for their neighbours)"
    )


class Looked(NamedTuple):
    """What a look at a file found: what an index says of it, the digest that its content and the
    way of reading it have (the path where it cannot be read), and by the names that set them apart
    what it says of the file's parts, a document's pages or a video's clips.
    """

    item: dict[str, Any]
    content: str
    parts: Mapping[str, Mapping[str, Any]]


def looked_at(
    root: Path, listed: Listing, old: Index | None, clip: float | None
) -> Iterator[list[Looked]]:
    """A look at every file, in order, some at a time."""
    for window, known in known_windows(listed, old):
        yield [look(root, path, known.get(as_uri(path), {}), clip) for path in window]


def describe(
    root: Path,
    listed: Listing,
    old: Index | None,
    clip: float | None = None,
    looking: Callable[..., Iterator[list[Looked]]] = looked_at,
) -> Iterator[dict[str, Any]]:
    """Files as items, a document's pages and, of so many seconds, a video's clips each as one. What
    lies in a folder that cannot be read stays as it was. `looking` does what `looked_at` does.
    """
    naming = Naming()
    if old is not None:
        yield from naming.take(lost(listed, old))
    for looked in looking(root, listed, old, clip):
        yield from naming.items(looked)


def lost(listed: Listing, old: Index) -> Iterator[dict[str, Any]]:
    """Items in folders that cannot be read now."""
    for folder in listed.unreadable:
        for batch in old.rows(where=f"starts_with(uri, {quoted(f'{as_uri(folder)}/')})"):
            yield from map(without_none, batch.to_pylist())


def known_windows(
    listed: Listing, old: Index | None
) -> Iterator[tuple[list[str], dict[str, dict[str, Any]]]]:
    """The paths, some at a time, and what the index says of their files, by uri."""
    paths = iter(listed.paths)
    while window := list(islice(paths, WINDOW)):
        known: dict[str, dict[str, Any]] = {}
        if old is not None and len(old):
            for row in old.look_up("uri", [as_uri(path) for path in window]):
                known.setdefault(row["uri"], row)
        yield window, known


def look(root: Path, path: str, known: Mapping[str, Any], clip: float | None = None) -> Looked:
    """A content is read where size or time are not those that are known."""
    item: dict[str, Any] = {"uri": as_uri(path)}
    parts: Mapping[str, Mapping[str, Any]] = {}
    ending = Path(path).suffix.lower()
    try:
        item |= stamp(root / path)
        had = DIGEST.match(known.get("id", ""))
        if had is not None and had[2] == ending and item.items() <= known.items():
            content = had[1]
        else:
            content, known = sha256(root / path), {}
        content += f"{ending}@{READING}"
        if ending in DOCUMENTS:
            parts = _pages(known.get("pages") or len(pages(root / path)))
        elif clip is not None and is_video(root / path):
            length = known.get("duration") or duration(root / path)
            parts = {} if length is None else _clips(length, clip)
    except (OSError, ValueError, ImportError):  # the encoder will say what is wrong
        content, parts = f"?{as_uri(path)}", {}
    return Looked(item, content, parts)


def _pages(count: int) -> dict[str, dict[str, Any]]:
    if count == 1:
        return {"": {"pages": 1}}
    return {f"#{number}": {"pages": count, "page": number} for number in range(1, count + 1)}


def _clips(length: float, most: float) -> dict[str, dict[str, Any]]:
    return {
        f"#t={start:.3f},{end:.3f}": {"duration": length, "start": start, "end": end}
        for start, end in cut(length, most)
    }


def stamp(path: Path) -> dict[str, int]:
    """A file's size and times, by which a file that did not change is known without reading it."""
    stat = path.stat()
    found = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    return found | {"ctime_ns": stat.st_ctime_ns}  # which a copy that keeps the time does not keep


def changed(path: Path, item: Mapping[str, Any]) -> str | None:
    """Why a file's vector is not of the content that its id says; None where it is."""
    try:
        found = stamp(path)
    except OSError as error:
        return str(error)
    same = all(item.get(name, value) == value for name, value in found.items())
    return None if same else "it changed while it was read; the next run tries again"


class Naming:
    """Ids of items: the content, the ending that says how to read it, which way of reading that
    was, which file of these it is, and which part; the same after a file was renamed.
    """

    def __init__(self) -> None:
        self.came = Came()
        self.more: Counter[str] = Counter()  # of a content that came twice, the files but the first
        self.taken: set[str] = set()

    def take(self, items: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Items that have ids, which no others get."""
        for item in items:
            self.taken.add(item["id"].partition("#")[0])
            yield item

    def items(self, files: Sequence[Looked]) -> Iterator[dict[str, Any]]:
        """The one item of each file, or those of its parts."""
        again = self.came.add([file.content for file in files])
        for (item, content, parts), before in zip(files, again, strict=True):
            if before:
                self.more[content] += 1
            while f"{content}-{1 + self.more[content]}" in self.taken:
                self.more[content] += 1
            name = f"{content}-{1 + self.more[content]}"
            for which, said in (parts or {"": {}}).items():
                yield {"id": name + which, **item, **said}


def as_uri(path: str) -> str:
    """A path as an index has it: bytes that are no UTF-8 are spelled out, as "\\udce9"."""
    return path.encode(errors="backslashreplace").decode()


def as_input(
    root: Path, item: Mapping[str, Any], real: Mapping[str, str] | None = None
) -> Path | Page | Clip:
    """What an item of a folder is encoded from; `real` has the paths that are no UTF-8."""
    return as_part(path_of(root, item, real or {}), item)


def path_of(root: Path, item: Mapping[str, Any], real: Mapping[str, str]) -> Path:
    """The file of an item of a folder, as `as_input` takes its arguments."""
    return root / real.get(item["uri"], item["uri"])


def as_part(path: Path, item: Mapping[str, Any]) -> Path | Page | Clip:
    """A file, or that page or clip of it which the item is."""
    if item.get("page"):
        return Page(path, item["page"])
    if item.get("end") is not None:
        return Clip(path, item["start"], item["end"])
    return path
