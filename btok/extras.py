"""What the extras bring, imported where it is needed: without one, everything else works."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needed(what: str, package: str, extra: str) -> Iterator[None]:
    """A context for the import of a package that an extra brings.

    Args:
        what: cannot be had without it ("PDF files"); package: its name; extra: of btok.

    Raises:
        ImportError: it is missing; how it is installed.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(f'{what} need {package}: pip install "btok[{extra}]"') from error
