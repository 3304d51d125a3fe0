"""A command line becomes a dataclass by tyro; what is wrong with it is one line."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import tyro


def parse(kind: Any, argv: Sequence[str], prog: str, **options: Any) -> Any:
    """What a command line describes.

    Args:
        kind: a dataclass, or a union of those that are subcommands.
        argv: the arguments.
        prog: how the program is called, for its help.
        options: for `tyro.cli`.

    Raises:
        ValueError: an unknown, missing or wrong argument.
        SystemExit: help was asked for, and is printed.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(kind, args=argv, prog=prog, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        _, *lines = said.getvalue().splitlines()  # below the title of a box
        raise ValueError(" ".join(line.strip("─│╰╯ ") for line in lines)) from None
