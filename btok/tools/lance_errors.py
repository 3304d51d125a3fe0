"""What Lance's errors say, in a line: which table it was, and what could be wrong with it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from btok.files import one_line

# where in Lance it was, and through which of its layers it came
WORDY = re.compile(
    r"(, )?/\S+\.rs:\d+:\d+"
    r"|(External error|Generic \S+ error|LanceError\(\w+\)|Invalid user input): "
)
XML = re.compile(r"<\?xml.*<Message>(.*?)</Message>.*", re.DOTALL)  # of object stores
SIGNS = (  # in what is said of a file that is damaged
    "protobuf",
    "decod",
    "corrupt",
    "magic",
    "invalid range",
    "too small",
    "truncated",
    "sufficient data",
)
DAMAGED = (
    "; a file of it is damaged or gone: open it again, and if that does not help delete it, and "
    "encode makes it again"
)


@contextmanager
def named(uri: str) -> Iterator[None]:
    """One line that says which table it was, and what could be wrong with it, for Lance's errors.

    ValueError in place of those that it raises.
    """
    try:
        yield
    except (ValueError, OSError, RuntimeError, KeyError, TypeError, pa.ArrowException) as error:
        said = XML.sub(r"\1", WORDY.sub("", one_line(error)))
        if said.startswith(f"{uri}: "):
            raise
        raise ValueError(f"{uri}: {said}{DAMAGED if is_damage(uri, error) else ''}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of Rust
            raise
        raise ValueError(f"{uri}: {one_line(error)}{DAMAGED}") from error


def is_damage(uri: str, error: BaseException) -> bool:
    """Whether it may be that a local table lost a file, or part of one."""
    said = str(error).lower()
    gone = "not found" in said and ("/data/" in said or "/_deletions/" in said)
    return "://" not in uri and (gone or any(sign in said for sign in SIGNS))
