"""A folder of your own becomes an index and is searched; a checkpoint becomes a plain one, one with
others, finds hard negatives, or is scored on a public benchmark.

    python -m btok encode CHECKPOINT FOLDER [--output INDEX] [--storage float16]
    python -m btok search CHECKPOINT FOLDER "a red seven" [--top 5] [--picture hits.png]
    python -m btok serve CHECKPOINT FOLDER [--port 8765] [--browser]
    python -m btok index INDEX [--build IVF_PQ]
    python -m btok export CHECKPOINT OUT
    python -m btok merge CHECKPOINT CHECKPOINT --weights 0.5 0.5 --output OUT
    python -m btok check-server URL CHECKPOINT
    python -m btok calibrate CHECKPOINT INPUTS.jsonl [--quantile 0.9]
    python -m btok mine CHECKPOINT PAIRS.jsonl --output HARD.jsonl [--count 4] [--ranks 10 100]
    python -m btok eval CHECKPOINT mmeb-v2 --data DIR [--tasks V-RET,DocVQA] [--output SCORES]
    python -m btok report RUN [--output FILE]
    python -m btok env [--json]

Images, text files (.txt, .md, source code, ...; their first 8,192 characters) and, with the extras
`video`, `pdf`, `heif` and `text`, videos, the pages of PDFs, HEIC, HTML and .docx. `encode` and
`search` encode what is new or changed, though not what only has another name, and forget what was
deleted. An index is a table of Lance (extra `lance`), in a folder or an object store; an output
that ends in .npz or .parquet is for other programs. `torchrun -m btok encode ...` shares the work
among processes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch.distributed as dist
import tyro

from btok.data.records import Side
from btok.files import must_be, one_line, printable
from btok.inputs import Page, as_side, rgb_array, with_frames
from btok.inputs.documents import at_page
from btok.tools import old_index, pictures
from btok.tools.calibrate import Calibrate, calibrate
from btok.tools.check_server import CheckServer, check_server
from btok.tools.command_line import parse
from btok.tools.encode_folder import Encode, bring_up_to_date, listed
from btok.tools.env import Env, describe_machine
from btok.tools.evaluate import Evaluate, evaluate
from btok.tools.export import export
from btok.tools.folder import as_input, said_of_recall
from btok.tools.gguf import export_gguf
from btok.tools.merge import Merge, merge
from btok.tools.mine import Mine, mine
from btok.tools.rows import item_name
from btok.tools.run_report import Report, write_report
from btok.tools.sinks import is_index
from btok.tools.web.serve import Serve, serve
from btok_kernels.ranks import rank

CAPTION = 60  # characters of a text file that a picture shows


@dataclass(frozen=True)
class Search(Encode):
    """Find files of a folder by words, by an image, or by both.

    Args:
        query: the words.
        image: the image.
        query_instruction: put before the query's words.
        top: how many files to show.
        where: among which, as SQL: "uri LIKE '%.pdf' AND page < 3".
        exact: compare with all vectors, where there is an approximate index too.
        rescore: compare the bottleneck rows of the nearest, where the index has them.
        picture: draw them into this file (needs the extra `demo`).
    """

    query: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="QUERY")] = ""
    image: Path | None = None
    query_instruction: str = ""
    top: int = 5
    where: str | None = None
    exact: bool = False
    rescore: bool = True
    picture: Path | None = None


@dataclass(frozen=True)
class Describe:
    """Say what an index holds, and what could not be read; make its approximate index.

    Args:
        index: its folder or address.
        build: IVF_PQ, or IVF_HNSW_SQ (larger, faster); built by itself from 100,000 vectors on.
    """

    index: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="INDEX")]
    build: str | None = None


@dataclass(frozen=True)
class Export:
    """Make a plain checkpoint that other engines read: merge LoRA adapters and compare the two,
    join weights in several files, have the tokenizer end with the bottleneck tokens; or make one of
    a GGUF file.

    Args:
        checkpoint: a folder, or a text model's .gguf file (extra `gguf`).
        out: a new folder.
        bound: what a component of an embedding may move by; by default 1e-5, or 2e-2 below fp32.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    bound: float | None = None


COMMANDS: dict[str, type] = {
    "encode": Encode,
    "search": Search,
    "serve": Serve,
    "index": Describe,
    "export": Export,
    "check-server": CheckServer,
    "calibrate": Calibrate,
    "eval": Evaluate,
    "mine": Mine,
    "merge": Merge,
    "report": Report,
    "env": Env,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 2 for a mistake in it, told in a line (BTOK_DEBUG=1 shows where)."""
    status = 0
    store: dist.Store = dist.HashStore()  # by which processes agree who tells of a mistake
    try:
        argv = list(sys.argv[1:] if argv is None else argv)
        several = int(os.environ.get("WORLD_SIZE", 1)) > 1
        if several:
            store, number, count = next(dist.rendezvous("env://"))
        command = parse(COMMANDS, argv, "python -m btok")
        if several:
            # before the group: see `join` in train/parallel.py
            import torch.distributed.nn.functional  # noqa: F401

            group = dist.PrefixStore("group", store)
            dist.init_process_group("gloo", store=group, rank=number, world_size=count)
        status = run(command)
        if sys.stdout is not None:
            sys.stdout.flush()
        if dist.is_initialized():
            dist.barrier()  # a rank that leaves early may take the others down
    except BrokenPipeError:  # of `| head`, which has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, TypeError, OSError, ImportError) as error:
        if os.environ.get("BTOK_DEBUG"):
            raise
        if store.add("failed", 1) == 1:
            print(f"error: {printable(one_line(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    except RuntimeError:  # of a collective that another process has left with a mistake
        if not dist.is_initialized() or not store.add("failed", 0):
            raise
        return 2
    if dist.is_initialized():
        dist.destroy_process_group()
    return status


def run(command: object) -> int:
    """Run one of `COMMANDS`.

    Returns:
        What the process ends with: 0, or 1 where a server was found wrong.
    """
    match command:
        case CheckServer():
            return 0 if check_server(command) else 1
        case Env():
            print(describe_machine(command))
        case Report():
            print(printable(write_report(command.run, command.output)))
        case Serve():
            serve(command)
        case Evaluate():
            evaluate(command)
        case Calibrate():
            calibrate(command)
        case Mine():
            mine(command)
        case Merge():
            merge(command.checkpoints, command.weights, command.output)
            print(f"{command.output}: the weighted mean of {len(command.weights)} checkpoints")
        case Export() if command.checkpoint.suffix == ".gguf":
            export_gguf(command.checkpoint, command.out)
            print(f"{command.out}: dequantised to float32")
        case Export():
            moved = export(command.checkpoint, command.out, command.bound)
            print(f"{command.out}: a plain checkpoint; embeddings move by {moved:.1e} at most")
        case Describe():
            describe(command)
        case Search():
            search(command)
        case Encode():
            bring_up_to_date(command, listed(command))
    return 0


def describe(command: Describe) -> None:
    """Print what an index holds."""
    from btok.tools.index import Index, is_there

    folder, makes = Path(command.index), "`python -m btok encode` makes"
    if "://" not in command.index:
        must_be("folder", "index", folder, f"one that {makes}")
        if not is_there(command.index) and not (folder / old_index.MANIFEST).exists():
            near = folder / ".btok"
            near_by = f"; did you mean {near}?" if near.is_dir() else ""
            raise ValueError(f"index is {folder}, which holds none that {makes}{near_by}")
    index = Index.open(command.index)
    if command.build is not None:
        print(f"{printable(command.index)}: {said_of_recall(index.build(command.build))}")
    said = f"{len(index)} vectors of {index.storage} [{index.dims}]"
    if index.several:
        said += f" and {index.several} times as many for late interaction"
    said += f", {index.distinct('uri')} files, {index.bytes_of_item} bytes of vectors an item"
    said += f", by {index.meta.get('checkpoint')} ({index.meta['model']})"
    if index.indexed:
        said += f"; {index.meta.get('kind')}, recall@10 {index.meta.get('recall')}"
    print(printable(f"{command.index}: {said}"))
    for name, why in index.unreadable().items():
        print(printable(f"  {name}: {why}"))


def search(command: Search) -> None:
    """Bring an index up to date and print what is nearest."""
    query = asked(command)
    if command.folder.is_dir() and not is_index(command.index):
        raise ValueError(
            f"output is {command.index}, which encode makes; expected an index to search"
        )
    found = listed(command)
    index = bring_up_to_date(command, found, command.where)
    if index is None or rank() > 0:
        return
    if not command.rescore and not index.several:
        raise ValueError(
            f"rescore is False, but {index.uri} has one vector an item and rescores nothing; "
            "leave --no-rescore out"
        )
    way = command.exact or None, command.query_instruction, None if command.rescore else False
    (hits,) = index.search([query], command.top, command.where, *way)
    for place, (score, item) in enumerate(hits, 1):
        print(f"{place:>3}  {score:6.3f}  {printable(item_name(item))}")
    if command.picture is not None:
        root = command.folder.resolve()
        shown = [(score, item, as_input(root, item, found.real)) for score, item in hits]
        draw(query, shown, f"the {len(hits)} nearest of {printable(root.name)}", command.picture)


def asked(command: Search) -> Side:
    """The query of a search command, as a `Side`."""
    query = Side()
    if command.top < 1:
        raise ValueError(f"top is {command.top}, expected at least 1")
    if not command.query.strip() and command.image is None:
        raise ValueError("query is empty, expected words or an --image")
    if command.picture is not None:
        pictures.drawable(command.picture)
    if command.image is not None:
        image = at_page(command.image)
        must_be("file", "image", image.path if isinstance(image, Page) else image)
        query = as_side(image)
    return replace(query, text="\n".join(filter(None, (command.query, query.text))))


def draw(
    query: Side, hits: Sequence[tuple[float, Mapping[str, Any], Any]], title: str, path: Path
) -> None:
    """A contact sheet of what a query found: of each its score, its item and the input itself."""
    sides = []
    for score, item, value in hits:
        side = with_frames(as_side(value))
        text = printable(f"{score:.3f} {item_name(item)} {side.text[:CAPTION]}")
        sides.append(_drawn(replace(side, text=text)))
    rows = [pictures.SheetRow(_drawn(with_frames(query)), sides, None)]
    pictures.contact_sheet(rows, path, title)


def _drawn(side: Side) -> Side:
    return replace(side, images=[rgb_array(image) for image in side.images])
