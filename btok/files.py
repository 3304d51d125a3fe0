"""Files: a checkpoint's small ones, digests, writing that a kill leaves whole, names on a line."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

IN_GGUF = "is in GGUF; `python -m btok export {} FOLDER` makes a plain checkpoint of it"


def find(name_or_path: str | Path, name: str) -> Path | None:
    """The path of a checkpoint's file on this machine; None where the checkpoint has none.

    ValueError where there is a file in place of a checkpoint, or nothing; OSError where the hub
    does not have it or does not answer.
    """
    from transformers.utils.hub import cached_file

    path = Path(name_or_path)
    if path.suffix == ".gguf":
        raise ValueError(f"the checkpoint {name_or_path} {IN_GGUF.format(name_or_path)}")
    if path.is_file():
        raise ValueError(
            f"the checkpoint {name_or_path} is a file, expected a folder or a hub id; a pickled "
            "one can run code and is not loaded: write it with save_pretrained"
        )
    if not path.is_dir() and (len(path.parts) > 2 or str(name_or_path)[:1] in (".", "~", "/")):
        raise ValueError(f"the checkpoint {name_or_path} does not exist, and is no hub id")
    with asked_for(name_or_path):
        found = cached_file(name_or_path, name, _raise_exceptions_for_missing_entries=False)
    return Path(found) if found else None


@contextmanager
def asked_for(name_or_path: str | Path) -> Iterator[None]:
    """A context in which transformers loads a checkpoint: an OSError says that it is not on this
    machine.
    """
    try:
        yield
    except OSError as error:
        if Path(name_or_path).is_dir():
            raise
        raise OSError(
            f"the checkpoint {name_or_path} does not exist here, and the hub does not give it: "
            f"{one_line(error)}"
        ) from error


def read_json(name_or_path: str | Path, name: str, kind: type = dict) -> Any:
    """The content of a checkpoint's JSON file, an object or a list; an empty object where there is
    no file.

    ValueError for a file that cannot be read, or holds another kind.
    """
    if (found := find(name_or_path, name)) is None:
        return kind()
    try:
        value = json.loads(found.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # the latter for thousands of brackets
        raise ValueError(f"{found} is no JSON ({error}); write the checkpoint again") from error
    if not isinstance(value, kind):
        expected = "object" if kind is dict else kind.__name__
        raise ValueError(f"{found} is {value!r:.60}, expected a JSON {expected}")
    return value


def what_is(path: Path) -> str:
    """The end of a sentence about a path: "is a folder", "is a file" or "does not exist"."""
    return "is a folder" if path.is_dir() else "is a file" if path.exists() else "does not exist"


def must_be(kind: str, argument: str, path: Path, expected: str = "") -> None:
    """Raise a ValueError, which says what there is instead, unless a path is a file or a folder.

    Args:
        kind: "file" or "folder".
        argument: what the path is of.
        expected: what it should be; by default the kind.
    """
    if not (path.is_dir() if kind == "folder" else path.is_file()):
        expected = expected or f"a {kind}"
        raise ValueError(f"{argument} is {path}, which {what_is(path)}; expected {expected}")


def must_be_checkpoint(argument: str, folder: Path) -> None:
    """Raise a ValueError for a folder without a model's `config.json`, such as a run's, or
    another's.
    """
    had = read_json(folder, "config.json")
    if had.get("model_type") is None:
        lacks = "whose config.json is of no model" if had else "which has no config.json"
        near = checkpoint_in(folder)
        raise ValueError(f"{argument} is {folder}, {lacks}, so it is no checkpoint{near}")


def checkpoint_in(folder: Path) -> str:
    """The end of an error about a folder given in place of a checkpoint: the newest in it, if it is
    a run's.
    """
    steps = [path.parent.name.split("-")[1] for path in folder.glob("checkpoint-*/config.json")]
    newest = max(filter(str.isdecimal, steps), key=int, default=None)
    return "" if newest is None else f"; did you mean {folder / f'checkpoint-{newest}'}?"


def may_be_folder(argument: str, path: Path) -> None:
    """Raise a ValueError where a file is in the way of a folder that is to be made, or added to."""
    there = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not there.is_dir():
        had = "which is a file" if there == path else f"and {there} is a file"
        raise ValueError(f"{argument} is {path}, {had}; expected a folder")


def may_be_file(argument: str, path: Path) -> None:
    """Raise a ValueError where a folder, or a file for its folder, is in the way of a file."""
    if path.is_dir():
        raise ValueError(f"{argument} is {path}, which is a folder; expected a file")
    may_be_folder(f"{argument} is {path}, whose folder", path.parent)


def sha256(path: str | Path) -> str:
    """The digest of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A context that gives a path to write to; the file is at `path`, and on the disk, once the
    block has ended.

    Until then there is what was there before, and after an error or a kill still. An OSError that
    names no file, as of a full disk, names it.
    """
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield draft
        with open(draft, "rb") as file:
            os.fsync(file.fileno())
        rename(draft, path)
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    finally:
        draft.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 that is on the disk when this returns: the file has its old content or this."""
    with whole(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """`write_text` of a value as indented JSON; a NaN is a ValueError, and nothing is written."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def rename(path: Path, target: Path) -> None:
    """Put a file or folder in another's place, on the disk when this returns."""
    os.replace(path, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def by_numbers(name: str) -> list[int | str]:
    """A sort key for names in which frame_2 comes before frame_10."""
    return [int(x) if x.isdecimal() else x for x in re.split(r"(\d+)", name)]


def one_line(said: object) -> str:
    """The message of an error or another object on one line, its line breaks and runs of spaces as
    single spaces.
    """
    return " ".join(str(said).split())


def printable(text: object) -> str:
    """A text on one line: what is no printable character, as in a file's name, is escaped."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode()
        for c in str(text)
    )
