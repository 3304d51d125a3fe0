"""A command line becomes a dataclass by tyro, and a checkpoint an encoder."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Sequence
from typing import Any

import torch
import tyro

from btok.encoder import BTokEncoder


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


def load(checkpoint: str, **settings: Any) -> BTokEncoder:
    """The encoder of a checkpoint, on this process's GPU where there is one; settings as
    `BTokEncoder.from_pretrained` takes them.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of a checkpoint's shards
    encoder = BTokEncoder.from_pretrained(checkpoint, **settings)
    if torch.cuda.is_available():
        encoder.model.to(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    return encoder
