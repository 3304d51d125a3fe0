"""The command that makes the index of a folder, and what others do before they search one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from btok.files import must_be
from btok.inputs import KINDS
from btok.tools.command_line import load
from btok.tools.folder import Listing, list_files, update
from btok.tools.sinks import may_be_output

if TYPE_CHECKING:
    from btok.encoder import BTokEncoder
    from btok.tools.index import Index

WITH_RAY = ("workers", "address", "staging")  # options


@dataclass(frozen=True)
class Encode:
    """Make the index of a folder, or bring it up to date.

    Args:
        checkpoint: a folder with a model and its tokenizer, or a hub id.
        folder: what to index; hidden files and symbolic links are passed over.
        output: the index's folder, or an address such as s3://bucket/index; FOLDER/.btok by
            default. NAME.npz and NAME.parquet are vectors for other programs.
        instruction: put before the text of every file; an index is of one instruction.
        batch_tokens: tokens per packed row.
        storage: what a new index stores: float32, float16 (half the size) or int8 (a quarter).
        num_btoks: how many bottleneck tokens vectors of a new index are made with, of numbers that
            the checkpoint was trained for; "auto" for the fewest that its calibration allows each
            file. What an index has stays.
        dims: how many components a vector of a new index has, the first ones.
        multi_vector: keep in a new index the bottleneck rows, too; searches then compare these.
        clip: seconds; a video is cut into equal parts of at most so many, each an item of its own.
        engine: "ray" shares the work among the machines of a Ray cluster (extra `ray`).
        workers: with Ray, how many encode; one per GPU, or per two CPUs, by default.
        address: of the Ray cluster; RAY_ADDRESS's by default, or a new one on this machine.
        staging: with Ray, a folder that all machines see; OUTPUT.parts by default.
    """

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    output: str | None = None
    instruction: str = ""
    batch_tokens: int = 16384
    storage: str | None = None
    num_btoks: int | Literal["auto"] | None = None
    dims: int | None = None
    multi_vector: bool = False
    clip: float | None = None
    engine: Literal["local", "ray"] = "local"
    workers: int | None = None
    address: str | None = None
    staging: Path | None = None

    @property
    def index(self) -> str:
        """The folder or address where the vectors are kept."""
        return self.output or str(self.folder.resolve() / ".btok")


def listed(command: Encode) -> Listing:
    """The files of a command's folder, but for what it keeps there itself.

    Raises:
        ValueError: no folder, or none with a file that can be embedded; something else in the way
            of the output.
    """
    must_be("folder", "folder", command.folder)
    output = command.index
    may_be_output(output)
    own = [] if "://" in output else [Path(output), Path(f"{output}.parts")]
    found = list_files(command.folder.resolve(), *own, *filter(None, [command.staging]))
    if not found.paths:
        why = [f"{name}: {why}" for name, why in found.unreadable.items()]
        had = f"no file that can be encoded{found.passed_over()}{'; '.join(['', *why])}"
        raise ValueError(
            f"folder {command.folder} has {had}; expected one ending in {' '.join(KINDS)}"
        )
    return found


def bring_up_to_date(
    command: Encode,
    found: Listing,
    where: str | None = None,
    encoder: BTokEncoder | None = None,
) -> Index | None:
    """Encode what is new or changed in a command's folder, and forget what is gone.

    Args:
        command: the settings.
        found: what `listed` gave.
        where: a condition that is looked at before anything is encoded.
        encoder: of the command's checkpoint, where that is loaded already.

    Returns:
        The index, if the output is one.

    Raises:
        ValueError: a setting that fits no other or not what is there.
    """
    output, root = command.index, command.folder.resolve()
    if command.clip is not None and not 0.1 <= command.clip < math.inf:
        raise ValueError(f"clip is {command.clip}, expected at least 0.1 seconds")
    settings = command.instruction, command.batch_tokens, command.storage, where, command.clip
    asked_for = ("num_btoks", command.num_btoks), ("dims", command.dims)
    options: dict[str, Any] = {name: value for name, value in asked_for if value is not None}
    options |= {"multi_vector": True} if command.multi_vector else {}
    if command.engine == "ray":
        from btok.tools import ray_engine

        ray = command.workers, command.address, command.staging
        return ray_engine.update(command.checkpoint, root, found, output, *settings, *ray, options)
    if given := [name for name in WITH_RAY if getattr(command, name) is not None]:
        raise ValueError(f"{given[0]} is given, which only --engine ray has")
    encoder = encoder or load(command.checkpoint)
    return update(encoder, root, found, output, *settings, options)
