"""`python -m btok calibrate`: what fewer bottleneck tokens cost a checkpoint, measured once."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from btok.calibration import LEAST, Calibration
from btok.data.jsonl import Row
from btok.data.records import Pair
from btok.data.sources import PAIRS, PARTS, Schema, open_source
from btok.files import must_be, printable
from btok.tools.command_line import load
from btok.tools.folder import as_input, describe, list_files
from btok_kernels.ranks import world


@dataclass(frozen=True)
class Calibrate:
    """Measure, on inputs such as will be encoded, what `--num-btoks auto` and int8 go by, and keep
    it in the checkpoint's folder as btok_calibration.json.

    Args:
        checkpoint: a folder with a model and its tokenizer.
        inputs: a .jsonl file of pairs (both sides are taken) or of sides, or a folder as `encode`
            takes it.
        count: how many rows or files are taken, evenly; 0 for all.
        quantile: share of the inputs of a kind and size that lose at most what is said of them.
        instruction: put before the text of every file or side.
        query_instruction, positive_instruction: put before the texts of pairs in its place.
        batch_tokens: tokens per packed row.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    inputs: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="INPUTS")]
    count: int = 4096
    quantile: float = 0.9
    instruction: str = ""
    query_instruction: str = ""
    positive_instruction: str = ""
    batch_tokens: int = 16384


def calibrate(command: Calibrate) -> None:
    """Run the command.

    Raises:
        ValueError: an option out of range; a checkpoint that is no folder; inputs that are none, or
            of which none can be read; several processes.
    """
    if not 0 < command.quantile <= 1:
        raise ValueError(f"quantile is {command.quantile}, expected above 0 and at most 1")
    if command.count < 0:
        raise ValueError(f"count is {command.count}, expected at least 0, which is all")
    must_be("folder", "checkpoint", command.checkpoint, "a folder to write into")
    if world() > 1:
        raise ValueError(f"calibrate is one process's work, started were {world()}")
    inputs = of_folder(command) if command.inputs.is_dir() else of_rows(command)
    encoder = load(str(command.checkpoint))
    instruction = command.instruction if command.inputs.is_dir() else None  # rows have it
    batch_tokens, quantile = command.batch_tokens, command.quantile
    made = encoder.calibrate(inputs, instruction, batch_tokens, quantile=quantile, strict=False)
    print(f"{printable(made.save(command.checkpoint))}: {report(made)}")


def evenly(number: int, count: int) -> range:
    """The indices of at most `count` of `number` things, spread evenly."""
    return range(0, number, max(1, -(-number // count)) if count else 1)


def of_folder(command: Calibrate) -> Iterator[Any]:
    """The files of a folder, and the pages of documents."""
    root = command.inputs.resolve()
    listed = list_files(root)
    if not listed.paths:
        raise ValueError(f"inputs is {command.inputs}, which has no file that can be encoded")
    listed.paths = [listed.paths[i] for i in evenly(len(listed.paths), command.count)]
    real = listed.real
    return (as_input(root, item, real) for item in describe(root, listed, None))


def of_rows(command: Calibrate) -> Iterator[Any]:
    """Yield both sides of each pair in a command's JSONL file, or each side of a file of sides."""
    must_be("file", "inputs", command.inputs, "a folder or a .jsonl file")
    if command.inputs.suffix != ".jsonl":
        raise ValueError(f"inputs is {command.inputs}, expected a folder or a .jsonl file")
    pairs = are_pairs(command.inputs)
    settings: dict[str, Any] = {"negatives": 0}
    for name in ("query_instruction", "positive_instruction"):
        settings[name] = getattr(command, name) or command.instruction
    source = open_source(command.inputs, schema=PAIRS if pairs else SIDES, **settings)
    rows = (source[i] for i in evenly(len(source), command.count))
    return (side for row in rows for side in ((row.query, row.positive) if pairs else (row.query,)))


def are_pairs(path: Path) -> bool:
    """Whether a JSONL file's first row is a pair; what is no row its reader refuses."""
    with open(path, "rb") as file:
        line = next((line for line in file if line.removeprefix(BOM_UTF8).strip()), b"")
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and row.keys() >= {*PAIRS.columns}


def _side(row: Row, root: Path) -> Pair:
    """A side as a pair with itself, by which it is read and checked as a pair's are."""
    side = {name: row[name] for name in PARTS if name in row}
    return PAIRS.pair({"query": side, "positive": side}, root)


SIDES = Schema("sides", (), _side)


def report(made: Calibration) -> str:
    """A calibration as plain text, a line per kind and size."""
    share = f"{100 * made.quantile:g} %"
    lines = [f"{made.inputs} inputs; 1 - cos to all {made.num_btoks} tokens, of {share} at most"]
    own = str(made.dims[-1])
    for cell, count in made.counts.items():
        kind, _, size = cell.partition("/")
        losses = zip(made.budgets, made.losses[cell][own], strict=True)
        said = "  ".join(f"{k}: {loss:.4f}" for k, loss in losses)
        if count < LEAST:
            said = f"fewer than {LEAST}: all {made.num_btoks} tokens"
        name = f"{kind}, {2 ** int(size)} tokens and more"
        lines.append(f"  {name:<34}{count:>6} inputs  {said}")
    for kind, scales in made.scales.items():
        said = "  ".join(f"{d}: {scale:.3g}" for d, scale in scales.items())
        lines.append(f"  scale of int8, {kind}: {said}")
    return "\n".join(lines)
