"""A folder of your own becomes an index on disk and is searched; adapters are merged; a checkpoint
is scored on a public benchmark.

    python -m btok encode CHECKPOINT FOLDER [--output INDEX]
    python -m btok search CHECKPOINT FOLDER "a red seven" [--top 5] [--picture hits.png]
    python -m btok export CHECKPOINT OUT
    python -m btok eval CHECKPOINT mmeb-v2 --data DIR [--tasks V-RET,DocVQA] [--output SCORES]

Images, text files (.txt, .md, source code, ...; their first 8,192 characters) and, with the extras
`video`, `pdf`, `heif` and `text`, videos, the pages of PDFs, HEIC, HTML and .docx. Either command
encodes what is new or changed, though not what only has another name, and forgets what was deleted.
An index is `meta.json` (settings, what could not be read) and the files of vectors and items that
it names. `torchrun -m btok encode ...` shares the work among processes.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch.distributed as dist
import tyro

from btok.data.records import Side
from btok.encoder import BTokEncoder
from btok.files import one_line, printable, sha256
from btok.inputs import DOCUMENTS, KINDS, Page, as_side, pages, rgb_array, with_frames
from btok.inputs.documents import at_page
from btok.tools import pictures
from btok.tools.command_line import load, parse
from btok.tools.evaluate import Evaluate, evaluate
from btok.tools.export import export
from btok.tools.gguf import export_gguf
from btok.tools.index import Index, encode_to, item_name, open_index
from btok_kernels.ranks import rank

READING = 2  # of files; another makes all vectors again
SHA256 = 64  # hexadecimal digits
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
    """Merge a checkpoint's LoRA adapters into a plain checkpoint, and compare the two; or make one
    of a GGUF file.

    Args:
        checkpoint: a folder with adapters, or a text model's .gguf file (extra `gguf`).
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
    | Annotated[Evaluate, tyro.conf.subcommand("eval")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 2 for a mistake in it, told in a line (BTOK_DEBUG=1 shows where)."""
    store: dist.Store = dist.HashStore()  # by which processes agree who tells of a mistake
    try:
        argv = list(sys.argv[1:] if argv is None else argv)
        several = int(os.environ.get("WORLD_SIZE", 1)) > 1
        if several:
            store, number, count = next(dist.rendezvous("env://"))
        command = parse(Command, argv, "python -m btok")
        if several:
            # before the group: see `join` in train/parallel.py
            import torch.distributed.nn.functional  # noqa: F401

            group = dist.PrefixStore("group", store)
            dist.init_process_group("gloo", store=group, rank=number, world_size=count)
        run(command)
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
    return 0


def run(command: Encode | Export | Evaluate) -> None:
    """Bring the index up to date and, for a search, print what is nearest; or merge adapters, or
    evaluate.
    """
    if isinstance(command, Evaluate):
        evaluate(command)
        return
    if isinstance(command, Export):
        if command.checkpoint.suffix == ".gguf":
            export_gguf(command.checkpoint, command.out)
            print(f"{command.out}: dequantised to float32")
            return
        moved = export(command.checkpoint, command.out, command.bound)
        print(f"{command.out}: merged; embeddings move by {moved:.1e} at most")
        return
    query = Side()
    if isinstance(command, Search):
        if command.top < 1:
            raise ValueError(f"top is {command.top}, expected at least 1")
        if not command.query.strip() and command.image is None:
            raise ValueError("query is empty, expected words or an --image")
        if command.picture is not None:
            pictures.drawable(command.picture)
        if command.image is not None:
            image = at_page(command.image)
            if not (image.path if isinstance(image, Page) else image).is_file():
                raise ValueError(f"image is {command.image}, expected a file")
            query = as_side(image)
        query = replace(query, text="\n".join(filter(None, (command.query, query.text))))
    if not command.folder.is_dir():
        raise ValueError(f"folder is {command.folder}, expected a folder")
    root = command.folder.resolve()
    output = command.output or root / ".btok"
    listed = list_files(root, output)
    if not listed.paths:
        why = [f"{name}: {why}" for name, why in listed.unreadable.items()]
        had = f"no file that can be encoded{listed.passed_over()}{'; '.join(['', *why])}"
        raise ValueError(
            f"folder {command.folder} has {had}; expected one ending in {' '.join(KINDS)}"
        )
    encoder = load(command.checkpoint)
    index = update(encoder, root, listed, output, command.instruction, command.batch_tokens)
    if isinstance(command, Search) and rank() == 0:
        vectors = encoder.encode([query], command.query_instruction, show_progress=False)
        (found,) = index.search(vectors, command.top)
        hits = [(score, index.items[row]) for score, row in found]
        for place, (score, item) in enumerate(hits, 1):
            print(f"{place:>3}  {score:6.3f}  {printable(item_name(item))}")
        if command.picture is not None:
            draw(query, root, hits, command.picture)


@dataclass
class Listing:
    """What there is in a folder.

    Args:
        paths: of the files of the kinds that are embedded, relative to the folder, sorted.
        others: how many files of each other ending there are, and of links and hidden things.
        unreadable: folders that cannot be read, relative to it, and why.
    """

    paths: list[str]
    others: Counter[str]
    unreadable: dict[str, str]

    def passed_over(self) -> str:
        """In words, the most frequent first; empty for nothing."""
        most = sorted(self.others.items(), key=lambda other: (-other[1], other[0]))
        said = ", ".join(f"{count} {what}" for what, count in most)
        return said and f"; passed over: {said}"


def list_files(root: Path, output: Path | None = None) -> Listing:
    """Look through a folder, but for an index in it.

    Hidden things are passed over, which an index and what macOS leaves on other disks are, too, and
    symbolic links, which may lead out of the folder or in circles.
    """
    found = Listing([], Counter(), {})
    own = None if output is None else output.resolve()

    def name(path: str | Path) -> str:
        return Path(path).relative_to(root).as_posix()

    def unreadable(error: OSError) -> None:
        found.unreadable[name(error.filename)] = error.strerror or str(error)

    for folder, folders, names in os.walk(root, onerror=unreadable):
        for each in list(folders):
            path = Path(folder, each)
            if path == own or each.startswith(".") or path.is_symlink():
                folders.remove(each)
                if path != own:
                    found.others["links" if path.is_symlink() else "hidden"] += 1
        for path in (Path(folder, each) for each in names):
            if path.name.startswith("."):
                found.others["hidden"] += 1
            elif path.is_symlink():
                found.others["links"] += 1
            elif path.suffix.lower() not in KINDS or not path.is_file():
                ending = path.suffix.lower() if path.suffix else "without an ending"
                found.others[printable(ending) if path.is_file() else "no ordinary files"] += 1
            else:
                found.paths.append(name(path))
    found.paths.sort()
    return found


def update(
    encoder: BTokEncoder,
    root: Path,
    listed: Listing,
    output: Path,
    instruction: str,
    batch_tokens: int,
) -> Index:
    """Make the index hold just these files of a folder, and say what was done.

    What lies in a folder that cannot be read now stays as it was.
    """
    old: dict[str, list[dict[str, Any]]] = {}
    for item in open_index(encoder, output, instruction).items:
        if not isinstance(item.get("path"), str):
            raise ValueError(
                f"{output} is an index of other things than files ({item['id']!r:.60}); give "
                "another --output"
            )
        old.setdefault(item["path"], []).append(item)
    lost = [
        path
        for path in old
        if any(Path(path).is_relative_to(folder) for folder in listed.unreadable)
    ]
    items = describe(root, sorted({*listed.paths, *lost}), old, set(lost))
    inputs = [_input(root, item) for item in items]
    index = encode_to(encoder, output, inputs, items, instruction, batch_tokens)
    now, unreadable = {item["id"] for item in index.items}, index.meta["unreadable"]
    if rank() == 0:
        had = {item["id"] for of_path in old.values() for item in of_path}
        files = len({item["path"] for item in index.items})
        pages = f", {len(now)} items" if len(now) > files else ""
        there = {item["path"] for item in items}
        gone = sum(item["id"] not in now for path in old.keys() - there for item in old[path])
        said = f"{files} files{pages}, {len(now - had)} of them new or changed"
        said += f", {gone} gone, {len(unreadable) + len(listed.unreadable)} unreadable"
        print(f"{printable(str(output))}: {said}{listed.passed_over()}", file=sys.stderr)
        told = {
            f"{folder}/": f"{why}; what was known of it stays"
            for folder, why in listed.unreadable.items()
        }
        told |= unreadable
        for name, why in list(told.items())[:SHOWN]:
            print(printable(f"  {name}: {why}"), file=sys.stderr)
        if len(told) > SHOWN:
            print(f"  ... and the rest in {printable(str(output / 'meta.json'))}", file=sys.stderr)
    return index


def describe(
    root: Path,
    paths: Sequence[str],
    old: Mapping[str, Sequence[Mapping[str, Any]]],
    lost: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Files as items, a document's pages each as one; a content is looked at where size or time are
    not those of the old items. Lost files stay as they were.

    An id is the content, the ending that says how to read it, which way of reading that was, which
    file of these it is, and which page: the same after a file was renamed.
    """
    items: list[dict[str, Any]] = []
    count: Counter[str] = Counter()
    taken = {item["id"].partition("#")[0] for path in lost for item in old[path]}
    for path in paths:
        if path in lost:
            items += map(dict, old[path])
            continue
        item: dict[str, Any] = {"path": path}
        known = dict(next(iter(old.get(path, ())), {}))
        number = known.get("pages", 0)
        ending = Path(path).suffix.lower()
        try:
            stat = (root / path).stat()
            item |= {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
            item["ctime_ns"] = stat.st_ctime_ns  # which a copy that keeps the time does not keep
            if item.items() <= known.items():
                content = known["id"][:SHA256]
            else:
                content, number = sha256(root / path), 0
            content += f"{ending}@{READING}"
            if ending in DOCUMENTS and not number:
                number = len(pages(root / path))
        except (OSError, ValueError, ImportError):  # the encoder will say what is wrong
            content = path
        count[content] += 1
        while f"{content}-{count[content]}" in taken:
            count[content] += 1
        name = f"{content}-{count[content]}"
        if number > 1:
            item["pages"] = number
            items += [{"id": f"{name}#{n}", **item, "page": n} for n in range(1, number + 1)]
        else:
            items.append({"id": name, **item, **({"pages": 1} if number else {})})
    return items


def _input(root: Path, item: Mapping[str, Any]) -> Path | Page:
    """What an item of an index is encoded from."""
    path = root / item["path"]
    return Page(path, item["page"]) if "page" in item else path


def draw(
    query: Side, root: Path, hits: Sequence[tuple[float, Mapping[str, Any]]], path: Path
) -> None:
    """A contact sheet of what a query found."""
    sides = []
    for score, item in hits:
        side = with_frames(as_side(_input(root, item)))
        text = printable(f"{score:.3f} {item_name(item)} {side.text[:CAPTION]}")
        sides.append(_drawn(replace(side, text=text)))
    title = f"the {len(hits)} nearest of {printable(root.name)}"
    rows = [pictures.SheetRow(_drawn(with_frames(query)), sides, None)]
    pictures.contact_sheet(rows, path, title)


def _drawn(side: Side) -> Side:
    return replace(side, images=[rgb_array(image) for image in side.images])
