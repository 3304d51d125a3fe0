"""A command line becomes a dataclass by tyro, and a checkpoint an encoder."""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import takewhile
from typing import Annotated, Any, Union, get_type_hints

import torch
import tyro

from btok.encoder import BTokEncoder

FOREIGN = "Unrecognized options: "  # what tyro does not know
OPTION = re.compile(r"--[^\s=]+|-[A-Za-z]\w*(?==|$)")  # and no negative number
WIDTH = 1 << 20  # of a terminal that no line is too long for: a box cuts words and paths in two
NARROW = 60  # of one that help can be read in


def parse(kind: Any, argv: Sequence[str], prog: str, **options: Any) -> Any:
    """The dataclass that a command line describes.

    Args:
        kind: a dataclass, or by name those that are commands.
        argv: the arguments; of commands the first is the name of one.
        prog: how the program is called, for its help.
        options: for `tyro.cli`.

    Raises:
        ValueError: an unknown command, an unknown, missing or wrong argument.
        SystemExit: help was asked for, and is printed.
    """
    if isinstance(kind, Mapping):
        name = next(iter(argv), "")
        if name in ("-h", "--help"):
            named = [Annotated[own, tyro.conf.subcommand(at)] for at, own in kind.items()]
            kind = Union[tuple(named)]  # noqa: UP007
        elif name in kind:
            kind, argv, prog = kind[name], argv[1:], f"{prog} {name}"
        else:
            had = f"{name!r} is no command{meant(name, kind)}" if name else "expected a command;"
            raise ValueError(f"{had} `{prog} --help` shows all")
    said, asks = io.StringIO(), {"-h", "--help"} & {*argv}
    width = max(NARROW, shutil.get_terminal_size().columns) if asks else WIDTH
    try:
        with contextlib.redirect_stderr(said), of_width(width):
            return tyro.cli(kind, args=argv, prog=prog, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        # below the title of a box, whose lines are dashes where the terminal has no others
        _, *lines = (line.strip("│ ") for line in said.getvalue().splitlines())
        lines = [line for line in lines if line.strip("─╭╮╰╯-")]
        raise ValueError(wrong(kind, argv, lines, prog)) from None


def wrong(kind: Any, argv: Sequence[str], said: Sequence[str], prog: str) -> str:
    """What is wrong with a command line of a dataclass, by what tyro says of it, in a line; but
    first an option that there is none of, which may be why tyro misses another.
    """
    if flag := next(unknown(kind, argv), None):
        near = meant(flag, (*option_names(kind), "--help"))
        return f"{flag!r} is no option of {prog}{near} `{prog} --help` shows all"
    if not said[0].startswith(FOREIGN):
        said = [line for line in said if not line.startswith("For full help")]
        said = [line for line in said if line != f"{prog} --help"]
        return " ".join(said).removeprefix(f"Error parsing {kind.__name__}: ")
    words = said[0].removeprefix(FOREIGN).split(", ")
    return (
        f"{words[0]!r} is an argument too many for {prog}; words that belong together need quotes"
    )


def meant(word: str, known: Iterable[str]) -> str:
    """The end of an error about a mistyped word: the most similar known word, if there is one."""
    near = difflib.get_close_matches(word, list(known), 2)
    return f"; did you mean {' or '.join(near)}?" if near else ";"


def unknown(kind: type, argv: Sequence[str]) -> Iterator[str]:
    """The words that look like options, and are none of a dataclass's."""
    known = {*option_names(kind)}
    for word in takewhile(lambda word: word != "--", argv):
        if found := OPTION.match(word):
            name = found[0].replace("_", "-")
            if name not in known and f"--{name.removeprefix('--no-')}" not in known:
                yield found[0]


def option_names(kind: type) -> Iterator[str]:
    """The options of a dataclass, as a command line has them."""
    hints = get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        marks = getattr(hints[field.name], "__metadata__", ())
        if tyro.conf.Positional not in marks:
            renamed = (name for mark in marks if (name := getattr(mark, "name", None)))
            yield f"--{next(renamed, field.name.replace('_', '-'))}"


@contextlib.contextmanager
def of_width(columns: int) -> Iterator[None]:
    """A context in which the terminal's width is `columns`."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(columns)
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def load(checkpoint: str, **settings: Any) -> BTokEncoder:
    """The encoder of a checkpoint, on this process's GPU where there is one; settings as
    `BTokEncoder.from_pretrained` takes them.
    """
    encoder = BTokEncoder.from_pretrained(checkpoint, **settings)
    if torch.cuda.is_available():
        encoder.model.to(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    return encoder
