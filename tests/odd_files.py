"""Odd files of kinds that people have: each is made, read in every way there is, and told.

`PYTHONPATH=.:kernels python tests/odd_files.py` writes docs/files.md. The files are those of
`corpus` (odd_pictures.py, odd_videos.py, odd_texts.py, odd_documents.py), each declared once:
its name, how it is made, what is expected.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/files.md"
COMMAND = "PYTHONPATH=.:kernels python tests/odd_files.py"
SAME = 1e-5  # between vectors of one file


class Says(NamedTuple):
    """A text, as it is read."""

    text: str
    cut: bool = False  # of so many characters that it is read alone, not embedded

    def __str__(self) -> str:
        return f"the text {quoted(self.text)}"


@dataclass
class Shows:
    """Pictures: one, or one per page; each uint8 [H, W, 3], met within so much per value."""

    pictures: Sequence[np.ndarray]
    within: int = 0
    note: str = ""

    def __str__(self) -> str:
        said = " and ".join(sizes(self.pictures))
        said += f", {self.note}" if self.note else ""
        return said + (f", within {self.within}" if self.within else "")


@dataclass
class Plays:
    """A video: all its frames [H, W, 3], with the seconds each starts at, and where it ends."""

    frames: Sequence[np.ndarray]
    seconds: Sequence[float]
    end: float
    within: int = 10  # of a mean over a frame
    note: str = ""

    def shown(self, moments: int = 8) -> list[int]:
        """Frames that are on show in the middle of each of so many equal parts of the time."""
        found: list[int] = []
        for i in range(moments):
            at = self.end * (i + 0.5) / moments
            now = max(n for n, second in enumerate(self.seconds) if second <= at)
            found += [now] if now not in found else []
        return found

    def __str__(self) -> str:
        return told_frames(self.shown(), self.seconds) + (f", {self.note}" if self.note else "")


class Refused(NamedTuple):
    """No input; why, in part."""

    why: str

    def __str__(self) -> str:
        return f"refused: {self.why}"


class PassedOver(NamedTuple):
    """Not looked at in a folder; counted as this."""

    counted: str

    def __str__(self) -> str:
        return f"passed over, counted as {self.counted}"


class Odd(NamedTuple):
    """A file.

    Args:
        name: in the folder.
        what: it is, in words.
        make: bytes to write, or what makes it at a path.
        expected: what it is read as.
        known: why it is not, where that is left.
    """

    name: str
    what: str
    make: bytes | Callable[[Path], Any]
    expected: Says | Shows | Plays | Refused | PassedOver
    known: str = ""


class Told(NamedTuple):
    """A row of the page; `as_expected` where every way gave what is expected."""

    odd: Odd
    got: str
    as_expected: bool


def corpus() -> dict[str, list[Odd]]:
    """The files by kind."""
    import odd_documents
    import odd_pictures
    import odd_texts
    import odd_videos

    return {
        "Texts that spell special tokens": list(odd_texts.special_tokens()),
        "Pictures": list(odd_pictures.pictures()),
        "Animations": list(odd_pictures.animations()),
        "Videos": list(odd_videos.videos()),
        "Texts": list(odd_texts.texts()),
        "Documents": list(odd_documents.documents()),
        "Names and folders": list(odd_documents.folders()),
    }


def make(odd: Odd, folder: Path) -> Path:
    """The file, made in a folder."""
    path = folder / odd.name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(odd.make, bytes):
        path.write_bytes(odd.make)
    else:
        odd.make(path)
    return path


@dataclass
class Ways:
    """What each way makes of the files; `vectors` by file and page, `refusals` by file."""

    encoder: Any
    vectors: dict[str, list[np.ndarray]] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)
    others: Counter[str] = field(default_factory=Counter)
    skipped: dict[int, str] = field(default_factory=dict)


def run(kinds: dict[str, list[Odd]], work: Path, checkpoint: Path) -> dict[str, list[Told]]:
    """Make the files below `work`, take every way with each, and tell."""
    import btok
    from btok.data.sources import open_source
    from btok.tools import encode_folder

    folder, apart = work / "folder", work / "apart"
    files = [odd for odds in kinds.values() for odd in odds]
    for odd in files:
        alone = isinstance(odd.expected, Says) and odd.expected.cut
        make(odd, apart if alone else folder)
    encoder = btok.BTokEncoder.from_pretrained(checkpoint)
    sentence = btok.load_sentence_transformer(checkpoint, device="cpu")
    before, encode_folder.load = encode_folder.load, lambda _: encoder
    try:
        ways = Ways(encoder)
        index_of(ways, folder, checkpoint)
        data = write_rows(files, folder)
        source = open_source(data)
        ways.skipped = train(data, checkpoint, work / "run")
        rows = iter(range(len(source)))
        told: dict[str, list[Told]] = {}
        for kind, odds in kinds.items():
            told[kind] = []
            for odd in odds:
                if isinstance(odd.expected, PassedOver):
                    told[kind].append(tell_passed_over(odd, ways, files))
                    continue
                if isinstance(odd.expected, Says) and odd.expected.cut:
                    got, wrong = read_as(odd, ways, [apart / odd.name])
                    told[kind].append(Told(odd, got + "; read alone", not wrong))
                    continue
                inputs = inputs_of(folder / odd.name)
                at = [next(rows) for _ in inputs]
                got, wrong = read_as(odd, ways, inputs)
                if isinstance(odd.expected, Refused):
                    wrong += list(refusals(odd, ways, sentence, inputs, at, folder))
                else:
                    wrong += list(vectors(odd, ways, sentence, inputs, at, source, folder))
                got = "; ".join([got, *(f"**{each}**" for each in wrong)])
                told[kind].append(Told(odd, got, not wrong))
        return told
    finally:
        encode_folder.load = before


def inputs_of(path: Path) -> list[Any]:
    """A document's pages, or the file."""
    from btok.inputs import DOCUMENTS, pages

    if path.suffix.lower() in DOCUMENTS:
        with contextlib.suppress(ValueError):
            return list(pages(path))
    return [path]


def command(*arguments: Any) -> tuple[int, str, str]:
    """A command of btok: its exit, what it printed, and to stderr."""
    from btok.tools.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(each) for each in arguments])
    return code, out.getvalue(), err.getvalue()


def index_of(ways: Ways, folder: Path, checkpoint: Path) -> None:
    """`encode`: vectors and refusals of a folder."""
    from helpers import held

    from btok.tools.folder import as_uri, list_files
    from btok.tools.index import Index

    code, _, said = command("encode", checkpoint, folder)
    assert code == 0, said
    listed = list_files(folder, folder / ".btok")
    real = {as_uri(path): path for path in listed.paths}
    for item, vector in held(folder / ".btok").values():
        ways.vectors.setdefault(real[item["uri"]], []).append(vector)
    ways.refusals = Index.open(folder / ".btok").unreadable()
    ways.others = listed.others


def write_rows(files: Sequence[Odd], folder: Path) -> Path:
    """Training pairs: every input the positive of one, and plain ones to stand in for others."""
    from btok.inputs import is_video
    from btok.inputs.images import is_animated

    rows = []
    for odd in files:
        path = folder / odd.name
        if isinstance(odd.expected, PassedOver) or not path.is_file():
            continue
        if isinstance(odd.expected, Says):
            sides: list[Any] = [{"text": odd.expected.text}]
        elif is_video(path) or is_animated(path):
            sides = [{"video": f"{folder.name}/{odd.name}"}]
        else:
            inputs = inputs_of(path)
            several = len(inputs) > 1
            sides = [
                {"images": [f"{folder.name}/{odd.name}" + (f"#page={n}" if several else "")]}
                for n in range(1, 1 + len(inputs))
            ]
        query = f"the file {odd.name!a}"
        rows += [{"query": f"{query}, {n}", "positive": side} for n, side in enumerate(sides)]
    plain = 96 + -len(rows) % 16  # in whole groups, so that each row has its turn
    rows += [{"query": f"number {n}", "positive": str(n)} for n in range(plain)]
    data = folder.parent / "rows.jsonl"  # not within, where it would be indexed
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data


def train(data: Path, checkpoint: Path, output: Path) -> dict[int, str]:
    """A run over all rows, each once; why rows were skipped."""
    from train.main import main

    for_all = len(data.read_text().splitlines()) // 16
    options: dict[str, Any] = {"--model": checkpoint, "--data": data, "--output": output}
    options |= {"--group-size": 16, "--groups-per-batch": 1, "--steps": for_all}
    options |= {"--caption-steps": 0, "--reading-steps": 0, "--eval-queries": 0}
    options |= {"--warmup-steps": 1, "--max-skipped": 10_000}
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(["pocket", *(str(each) for pair in options.items() for each in pair)])
    assert not code, said.getvalue()
    lines = (line.partition("rows, row ")[2] for line in said.getvalue().splitlines())
    told = (line.partition(": ") for line in lines if line)
    return {int(number): why for number, _, why in told}


def read_as(odd: Odd, ways: Ways, inputs: Sequence[Any]) -> tuple[str, list[str]]:
    """What a file is read as, in words, and what is wrong with that."""
    from btok.inputs import as_side, rgb_array, with_frames

    expected = odd.expected
    try:
        sides = [with_frames(as_side(value)) for value in inputs]
        for side in sides:
            check_tokens(side, ways.encoder.processor)
        pictures = [rgb_array(image) for side in sides for image in side.images]
    except Exception as error:
        why = " ".join(str(error).split())
        if isinstance(expected, Refused) and expected.why in why:
            return str(expected), []
        return f"refused: {why}", ["not as expected"]
    first = sides[0]
    if len(first.video):
        return frames_as(expected, first.video, first.frame_seconds)
    if pictures:
        fits = isinstance(expected, Shows) and sizes(pictures) == sizes(expected.pictures)
        off = 0
        if isinstance(expected, Shows) and fits:
            pairs = zip(pictures, expected.pictures, strict=True)
            off = max(int(abs(a.astype(int) - b).max()) for a, b in pairs)
            fits = off <= expected.within
        got = str(expected) if fits else " and ".join(sizes(pictures))
        return got + stock(odd, inputs, pictures), [] if fits else [f"off by {off}"]
    fits = isinstance(expected, Says) and first.text == expected.text
    return f"the text {quoted(first.text)}", [] if fits else ["not as expected"]


def check_tokens(side: Any, processor: Any) -> None:
    """A text is a token per byte, and none of them is a placeholder or a bottleneck token."""
    ids = processor(side)["input_ids"].tolist()
    if side.text:
        assert len(ids) == len(side.text.encode())
        assert not processor.reserved.intersection(ids)


def stock(odd: Odd, inputs: Sequence[Any], pictures: Sequence[np.ndarray]) -> str:
    """Whether transformers shows a picture the same, by `load_image` or its image processor."""
    from PIL import Image, ImageOps
    from transformers.image_transforms import convert_to_rgb
    from transformers.image_utils import load_image

    if not isinstance(inputs[0], Path) and (len(inputs) > 1 or odd.name.lower().endswith(".pdf")):
        return ""
    path = str(getattr(inputs[0], "path", inputs[0]))
    shown = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(Exception):
            shown.append(np.asarray(load_image(path)))
        with contextlib.suppress(Exception), Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            shown.append(np.asarray(convert_to_rgb(upright, return_numpy=True)))
    if not shown:
        return "; transformers refuses it"
    same = any(np.array_equal(each, pictures[0]) for each in shown)
    return "; so does transformers" if same else "; not so transformers"


def frames_as(expected: Any, video: Any, seconds: Sequence[float]) -> tuple[str, list[str]]:
    """Which of a video's frames were read, each told by its look, and whether their times are."""
    if not isinstance(expected, Plays):
        return f"{len(video)} frames", ["not as expected"]
    numbers, wrong = [], []
    for frame, at in zip(video, seconds, strict=True):
        if frame.shape != expected.frames[0].shape:
            return f"frames of {sizes([frame])[0]}", ["not as expected"]
        off = [float(abs(frame.astype(int) - each).mean()) for each in expected.frames]
        numbers.append(int(np.argmin(off)))
        if min(off) > expected.within:
            wrong.append(f"a frame is off by {min(off):.0f}")
        if abs(at - expected.seconds[numbers[-1]]) > 2e-3:
            wrong.append(f"frame {numbers[-1]} is said to be at {at:.3f} s")
    if numbers != expected.shown():
        wrong.append("not the expected frames")
    return told_frames(numbers, expected.seconds) + (
        f", {expected.note}" if expected.note else ""
    ), wrong


def refusals(
    odd: Odd, ways: Ways, sentence: Any, inputs: Sequence[Any], at: Sequence[int], folder: Path
) -> Iterator[str]:
    """The ways that do not refuse a file as it must be."""
    why = odd.expected.why  # type: ignore[union-attr]
    said = {"encode": ways.refusals.get(odd.name, ""), "training": ways.skipped.get(at[0], "")}
    path = inputs[0]
    try:
        ways.encoder.encode([path], show_progress=False)
    except (ValueError, TypeError) as error:
        said["encoder.encode"] = str(error)
    video = bool(getattr(_side(path), "video", ()))
    value: Any = {"video": path} if video else {"image": path}
    if _is_text(path):  # which no other way opens
        value = ""
        said.pop("training")
    try:
        sentence.encode([value])
    except ValueError as error:
        said["sentence-transformers"] = why if _is_text(path) else str(error)
    code, _, err = command("search", "-", folder, "--image", path)
    said["search"] = err if code == 2 and err.count("\n") == 1 else f"exit {code}: {err}"
    for way in ("encode", "search", "encoder.encode", "training", "sentence-transformers"):
        got = " ".join(said.get(way, why if way == "training" and _is_text(path) else "").split())
        if why not in got:
            yield f"{way}: {got or 'not refused'}".replace(str(folder), "FOLDER")


def vectors(
    odd: Odd,
    ways: Ways,
    sentence: Any,
    inputs: Sequence[Any],
    at: Sequence[int],
    source: Any,
    folder: Path,
) -> Iterator[str]:
    """The ways that give another vector than `encode`'s index has."""
    from btok.inputs import as_side, with_frames
    from btok.tools.cli import printable

    known = ways.vectors.get(odd.name, [])
    if len(known) != len(inputs):
        yield f"encode: {len(known)} of {len(inputs)} vectors"
        return
    for number, (value, row, vector) in enumerate(zip(inputs, at, known, strict=True)):
        (again,) = ways.encoder.encode([value], show_progress=False)
        if (off := abs(again - vector).max()) > SAME:
            yield f"encoder.encode: off by {off:.0e}"
        if row in ways.skipped:
            yield f"training: {ways.skipped[row]}"
        else:
            process = ways.encoder.processor
            sample, other = (
                process(with_frames(each)) for each in (source[row].positive, as_side(value))
            )
            if not _equal(sample, other):
                yield "training: another sample"
        side = as_side(value)
        given: Any = {"image": value}
        if side.text:
            given = side.text
        elif isinstance(side.video, Path):
            given = {"video": str(value)}
        (again,) = sentence.encode([given])
        if (off := abs(again - vector).max()) > SAME:
            yield f"sentence-transformers: off by {off:.0e}"
        page = f"#page={number + 1}" if len(inputs) > 1 else ""
        if 0 < number < len(inputs) - 1:  # of many pages the first and the last are looked for
            continue
        query = [side.text] if side.text else ["--image", f"{folder / odd.name}{page}"]
        code, out, _ = command("search", "-", folder, *query, "--top", 9999)
        name = printable(odd.name) + page.replace("#page=", ", page ")
        scores = {}
        for line in out.splitlines():
            _, score, found = line.split(maxsplit=2)
            scores[found] = float(score)
        if code or scores.get(name, 0) < 0.9995 or max(scores.values()) > 1.0005:
            yield f"search: exit {code}, score {scores.get(name)}"


def _equal(a: Any, b: Any) -> bool:
    from btok.vision import by_name

    a, b = dict(by_name(a)), dict(by_name(b))
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def _side(path: Any) -> Any:
    from btok.inputs import as_side

    try:
        return as_side(path)
    except (ValueError, OSError):
        return None


def _is_text(path: Any) -> bool:
    from btok.inputs import TEXTS

    return isinstance(path, Path) and path.suffix.lower() in TEXTS


def tell_passed_over(odd: Odd, ways: Ways, files: Sequence[Odd]) -> Told:
    """Whether a folder's listing counted a file with its like, and looked at none of these."""
    alike = sum(each.expected == odd.expected for each in files)
    counted = ways.others[odd.expected.counted]  # type: ignore[union-attr]
    seen = [name for name in (*ways.vectors, *ways.refusals) if name.startswith(odd.name)]
    fits = counted == alike and not seen
    got = str(odd.expected) if fits else f"{counted} counted, {len(seen)} looked at"
    return Told(odd, got, fits)


def sizes(pictures: Sequence[np.ndarray]) -> list[str]:
    """As people say them, width first; equal ones after each other together."""
    said = [f"{picture.shape[1]} x {picture.shape[0]}" for picture in pictures]
    counts: list[tuple[str, int]] = []
    for size in said:
        if counts and counts[-1][0] == size:
            counts[-1] = (size, counts[-1][1] + 1)
        else:
            counts.append((size, 1))
    return [f"{count} pictures of {size}" if count > 1 else size for size, count in counts]


def told_frames(numbers: Sequence[int], seconds: Sequence[float]) -> str:
    frames = " ".join(map(str, numbers))
    return f"frames {frames} of {len(seconds)}, at {' '.join(f'{seconds[n]:g}' for n in numbers)} s"


def quoted(text: str) -> str:
    """The start of a text on a line, for a table of Markdown."""
    from btok.tools.cli import printable

    start = printable(text[:40]).replace("|", "\\|").replace("`", "'")
    return f"`{start}`" + (f" ... ({len(text)} characters)" if len(text) > 40 else "")


def page(told: dict[str, list[Told]]) -> str:
    """docs/files.md."""
    from btok.tools.cli import printable

    rows = [each for of_kind in told.values() for each in of_kind]
    right = sum(each.as_expected for each in rows)
    lines = ["# Odd files, and what is made of them", "", HEAD, ""]
    lines += [f"{right} of {len(rows)} files are as expected."]
    for kind, of_kind in told.items():
        lines += ["", f"## {kind}", "", "| file | expected | got |", "|--|--|--|"]
        for each in of_kind:
            name = printable(each.odd.name).replace("|", "\\|")
            name = name if len(name) <= 40 else f"{name[:30]}...{name[-4:]}"
            got = "as expected" if each.got == str(each.odd.expected) else each.got
            got = got.replace(str(each.odd.expected), "as expected")
            got += f"; {each.odd.known}" if each.odd.known else ""
            lines.append(f"| `{name}`: {each.odd.what} | {each.odd.expected} | {got} |")
    return "\n".join(lines) + "\n"


HEAD = f"""```bash
python -m btok encode CHECKPOINT my-files      # reads them, and names what it cannot read
{COMMAND}   # makes and reads the files below, writes this page
```
Made with Pillow, PyAV, PDFium and plain bytes; `make test` makes and reads all of them again, and
fails where this page is not what comes out.

Each file takes five ways: `python -m btok encode`, `search` (it finds itself, score 1.000),
`BTokEncoder.encode`, a training run that has it in a row, and sentence-transformers. *got* is what
it was read as; it is "as expected" only where all five ways had the same vector, or refused it for
the same reason. *so does transformers* is said of a picture whose pixels its `load_image` or its
image processor gives, too. Of videos and animations all frames are known, and each one that was
read is told by its look; seconds count from the first frame."""


def main() -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]
    from helpers import tiny_checkpoint

    with tempfile.TemporaryDirectory() as work:
        checkpoint = tiny_checkpoint(Path(work, "checkpoint"))
        told = run(corpus(), Path(work), checkpoint)
    PAGE.write_text(page(told))
    for each in (each for of_kind in told.values() for each in of_kind if not each.as_expected):
        print(f"{each.odd.name}: expected {each.odd.expected}, got {each.got}", file=sys.stderr)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import odd_files  # by the name that the kinds' modules import it by

    odd_files.main()
