"""A folder of your own becomes an index on disk and is searched; adapters are merged.

    python -m btok encode CHECKPOINT FOLDER [--output INDEX]
    python -m btok search CHECKPOINT FOLDER "a red seven" [--top 5] [--picture hits.png]
    python -m btok export CHECKPOINT OUT

Images, pages as images, text files (.txt, .md; their first 8,192 characters) and, with the extra
`video`, videos. Either command encodes what is new or changed, though not what only has another
name, and forgets what was deleted. An index is `meta.json` (settings, what could not be read) and
the files of vectors and items that it names. `torchrun -m btok encode ...` shares the work among
processes.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import tyro

from btok.data.records import Side
from btok.encoder import BTokEncoder
from btok.files import sha256
from btok.inputs import KINDS, as_side, rgb_array, with_frames
from btok.tools import pictures
from btok.tools.command_line import parse
from btok.tools.export import export
from btok.tools.index import Index, encode_to, open_index
from btok_kernels.ranks import rank

SHOWN = 10  # unreadable files that are named
CAPTION = 60  # characters of a text file that a picture shows


@dataclass(frozen=True)
class Encode:
    """Make the index of a folder, or bring it up to date.

    Args:
        checkpoint: a folder with a model and its tokenizer, or a hub id.
        folder: what to index; hidden files and symbolic links are passed over.
        output: the index's folder; FOLDER/.btok by default.
        instruction: put before the text of every file; an index is of one instruction.
        batch_tokens: tokens per packed row.
    """

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    output: Path | None = None
    instruction: str = ""
    batch_tokens: int = 16384


@dataclass(frozen=True)
class Search(Encode):
    """Find files of a folder by words, by an image, or by both.

    Args:
        query: the words.
        image: the image.
        query_instruction: put before the query's words.
        top: how many files to show.
        picture: draw them into this file (needs the extra `demo`).
    """

    query: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="QUERY")] = ""
    image: Path | None = None
    query_instruction: str = ""
    top: int = 5
    picture: Path | None = None


@dataclass(frozen=True)
class Export:
    """Merge a checkpoint's LoRA adapters into a plain checkpoint, and compare the two.

    Args:
        checkpoint: a folder with adapters.
        out: a new folder.
        bound: what a component of an embedding may move by; by default 1e-5, or 2e-2 below fp32.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    bound: float | None = None


Command = (
    Annotated[Encode, tyro.conf.subcommand("encode")]
    | Annotated[Search, tyro.conf.subcommand("search")]
    | Annotated[Export, tyro.conf.subcommand("export")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 2 for a mistake in it, told in a line (BTOK_DEBUG=1 shows where)."""
    try:
        argv = list(sys.argv[1:] if argv is None else argv)
        command = parse(Command, argv, "python -m btok")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            # before the group: see `join` in train/main.py
            import torch.distributed.nn.functional  # noqa: F401

            dist.init_process_group("gloo")
        run(command)
    except (ValueError, TypeError, OSError, ImportError) as error:
        if os.environ.get("BTOK_DEBUG"):
            raise
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        return 130
    if dist.is_initialized():
        dist.barrier()  # a rank that leaves early may take the others down
        dist.destroy_process_group()
    return 0


def run(command: Encode | Export) -> None:
    """Bring the index up to date and, for a search, print what is nearest; or merge adapters."""
    if isinstance(command, Export):
        moved = export(command.checkpoint, command.out, command.bound)
        print(f"{command.out}: merged; embeddings move by {moved:.1e} at most")
        return
    query = Side()
    if isinstance(command, Search):
        if command.top < 1:
            raise ValueError(f"top is {command.top}, expected at least 1")
        if not command.query.strip() and command.image is None:
            raise ValueError("query is empty, expected words or an --image")
        if command.image is not None and not command.image.is_file():
            raise ValueError(f"image is {command.image}, expected a file")
        query = Side(command.query, images=[command.image] if command.image else [])
    if not command.folder.is_dir():
        raise ValueError(f"folder is {command.folder}, expected a folder")
    root = command.folder.resolve()
    paths = list_files(root)
    if not paths:
        raise ValueError(f"folder {command.folder} has no file ending in {' '.join(KINDS)}")
    encoder = load(command.checkpoint)
    output = command.output or root / ".btok"
    index = update(encoder, root, paths, output, command.instruction, command.batch_tokens)
    if isinstance(command, Search) and rank() == 0:
        vectors = encoder.encode([query], command.query_instruction, show_progress=False)
        (found,) = index.search(vectors, command.top)
        hits = [(score, index.items[row]["path"]) for score, row in found]
        for place, (score, path) in enumerate(hits, 1):
            print(f"{place:>3}  {score:6.3f}  {_printable(path)}")
        if command.picture is not None:
            draw(query, root, hits, command.picture)


def list_files(root: Path) -> list[str]:
    """Paths, relative to the folder, of the files of the kinds we embed, sorted.

    Neither hidden ones nor symbolic links, which may lead out of the folder or in circles.
    """
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            if path.suffix.lower() in KINDS and path.is_file() and not path.is_symlink():
                found.append(path.relative_to(root).as_posix())
    return sorted(found)


def load(checkpoint: str) -> BTokEncoder:
    """The encoder of a checkpoint, on this process's GPU where there is one."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of a checkpoint's shards
    encoder = BTokEncoder.from_pretrained(checkpoint)
    if torch.cuda.is_available():
        encoder.model.to(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    return encoder


def update(
    encoder: BTokEncoder,
    root: Path,
    paths: Sequence[str],
    output: Path,
    instruction: str,
    batch_tokens: int,
) -> Index:
    """Make the index hold just these files of a folder, and say what was done."""
    old = {item["path"]: item for item in open_index(encoder, output, instruction).items}
    items = describe(root, paths, old)
    inputs = [root / path for path in paths]
    index = encode_to(encoder, output, inputs, items, instruction, batch_tokens)
    now, unreadable = {item["id"] for item in index.items}, index.meta["unreadable"]
    if rank() == 0:
        new = len(now - {item["id"] for item in old.values()})
        gone = sum(old[path]["id"] not in now for path in old.keys() - set(paths))
        said = f"{len(now)} files, {new} of them new or changed"
        said += f", {gone} gone, {len(unreadable)} unreadable"
        print(f"{output}: {said}", file=sys.stderr)
        for name, why in list(unreadable.items())[:SHOWN]:
            print(_printable(f"  {name}: {why}"), file=sys.stderr)
        if len(unreadable) > SHOWN:
            print(f"  ... and the rest in {output / 'meta.json'}", file=sys.stderr)
    return index


def describe(
    root: Path, paths: Sequence[str], old: Mapping[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Files as items; a content is looked at where size or time are not those of the old item.

    An id is the content, the ending that says how to read it, and which file of these it is: the
    same after a file was renamed.
    """
    items: list[dict[str, Any]] = []
    count: Counter[str] = Counter()
    for path in paths:
        item: dict[str, Any] = {"path": path}
        try:
            stat = (root / path).stat()
            item |= {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
            known = old.get(path, {})
            if item.items() <= known.items():
                content = known["id"].rpartition("-")[0]
            else:
                content = sha256(root / path)
                content += Path(path).suffix.lower()
        except OSError:  # the encoder will say what is wrong
            content = path
        count[content] += 1
        items.append({"id": f"{content}-{count[content]}", **item})
    return items


def draw(query: Side, root: Path, hits: Sequence[tuple[float, str]], path: Path) -> None:
    """A contact sheet of what a query found."""
    sides = []
    for score, name in hits:
        side = with_frames(as_side(root / name))
        text = _printable(f"{score:.3f} {name} {side.text[:CAPTION]}")
        sides.append(Side(text, [rgb_array(image) for image in side.images], side.video))
    query = Side(query.text, [rgb_array(image) for image in query.images])
    title = f"the {len(hits)} nearest files of {_printable(root.name)}"
    pictures.contact_sheet([pictures.SheetRow(query, sides, None)], path, title)


def _printable(text: str) -> str:
    """Without the parts of file names that are no UTF-8."""
    return text.encode(errors="replace").decode()
