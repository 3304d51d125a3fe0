"""The pocket benchmark: nine meta-tasks made in seconds from data that ordinary packages carry.

Pictures and videos show coloured scans of handwritten digits (scikit-learn's `load_digits`) on one
constant canvas colour; pages show documentation, read with `ast` from the sources of scikit-learn,
scipy and numpy. A record is a pure function of (split, task, seed, index) and of their versions.

A scene is a tuple of `Thing`. Records come in families about one scene and edits of one attribute:
neighbours in a training group, candidates in a test pool. So it is not enough to name what is
there: attributes must be bound to their digits.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from random import Random
from textwrap import wrap
from typing import Any, NamedTuple

import numpy as np

from btok.data.records import NtpSide, Pair, RetrievalTask, Side

MODALITY = dict.fromkeys(("I-CLS", "I-QA", "I-RET", "I-VG"), "image")
MODALITY |= dict.fromkeys(("V-CLS", "V-QA", "V-RET", "M-RET"), "video") | {"VisDoc": "visdoc"}
TASKS = tuple(MODALITY)
# the side that training generates is words, or a page's first ones
NTP_SIDE: dict[str, NtpSide] = {**dict.fromkeys(TASKS, "positive")}
NTP_SIDE |= dict.fromkeys(("I-RET", "V-RET", "VisDoc"), "query")

ASKED = {  # what a query is, and what it finds
    "I-CLS": "a digit -> its name",
    "I-QA": "a scene and a question -> the answer",
    "I-RET": "a description -> the scene",
    "I-VG": "a scene and what to find -> the crop",
    "V-CLS": "a moving digit -> its motion",
    "V-QA": "a video and a question -> the answer",
    "V-RET": "a description -> the video",
    "M-RET": "a video and a moment -> the clip",
    "VisDoc": "a function's first words -> its page",
}

CELL, STEP, SCAN = 28, 14, 24  # pixels: one merged token; one patch and one step; one scan
CANVAS = np.array([24, 24, 32])
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {"red": (230, 30, 30), "green": (30, 180, 60), "blue": (50, 90, 250)}
COLOURS |= {"yellow": (250, 230, 40), "orange": (250, 140, 20), "purple": (150, 50, 200)}
COLOURS |= {"pink": (255, 150, 200), "white": (250, 250, 250)}
LEVELS = np.arange(17)[:, None]
PALETTES = {  # [17, 3], a colour for every level of ink
    name: ((LEVELS * rgb + (16 - LEVELS) * CANVAS + 8) // 16).astype(np.uint8)
    for name, rgb in COLOURS.items()
}
BLANKS = {n: np.full((CELL * n, CELL * n, 3), CANVAS, np.uint8) for n in (2, 3)}
MOTIONS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}  # a step down and right
MOTIONS |= {"up left": (-1, -1), "up right": (-1, 1), "down left": (1, -1), "down right": (1, 1)}
MOTIONS |= {"still": (0, 0), "blinking": (0, 0)}
WAY = (0, 1, 1, 2)  # steps made by frame: one inside each pair of frames that a model merges
ANSWERS = {"digit": DIGITS, "colour": tuple(COLOURS), "motion": tuple(MOTIONS)}
QUESTIONS = {  # (asked, given)
    ("digit", "colour"): "which digit is {0.colour}?",
    ("colour", "digit"): "what color is the {0.digit}?",
    ("digit", "motion"): "which digit {0.state}?",
    ("colour", "motion"): "which color {0.state}?",
    ("motion", "colour"): "how does the {0.colour} digit move?",
    ("motion", "digit"): "how does the {0.digit} move?",
}
FIND = ("find the {0.colour} digit", "find the {0.digit}", "find the digit {0.state}")
MOMENT = ("the moment of the {0.colour} digit", "the moment of the {0.digit}")
POOLS = {"I-RET": (4, 12), "I-VG": (3, 7), "V-RET": (4, 12), "M-RET": (4, 6)}  # family, others

SKIPPED = {"tests", "testing", "conftest", "externals", "_external", "_lib", "f2py", "distutils"}
SKIPPED |= {"__config__"}  # written by the build
QUERY_WORDS, TARGET_WORDS = 7, 12  # of a page's name and text
LINES, COLUMNS, GLYPH = 8, 16, (14, 7)
INK, PAPER = 20, 235
MISSING = 'the pocket benchmark needs {}: pip install "btok[demo]"'
Scene = tuple["Thing", ...]


class Thing(NamedTuple):
    """A digit of a scene: the upper left pixel of its cell in frame 0; no motion in pictures."""

    digit: str
    colour: str
    scan: int
    y: int
    x: int
    motion: str = ""

    @property
    def name(self) -> str:
        return f"{self.colour} {self.digit}"

    @property
    def state(self) -> str:
        if self.motion:
            return f"moves {self.motion}" if any(MOTIONS[self.motion]) else f"is {self.motion}"
        rows, columns = ("top", "middle", "bottom"), ("left", "center", "right")
        return f"{rows[self.y // CELL]} {columns[self.x // CELL]}"

    def corner(self, frame: int) -> tuple[int, int]:
        down, right = MOTIONS.get(self.motion, (0, 0))
        return self.y + WAY[frame] * STEP * down, self.x + WAY[frame] * STEP * right


class Page(NamedTuple):
    name: str
    text: str
    part: str  # of the library, such as scipy.signal


class Record(NamedTuple):
    query: Side
    positive: Side
    key: str  # equal where positives are interchangeable
    target: str | None = None
    answers: Sequence[str] = ()  # all, where the positive is one
    present: Sequence[str] = ()  # those in the scene


@cache
def _scans() -> tuple[np.ndarray, dict[str, dict[str, list[int]]]]:
    """Ink from 0 to 16 of all scans [1797, 24, 24], and by split and digit which scans show it."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(MISSING.format("scikit-learn")) from error
    data = load_digits()
    ink = np.kron(data.images.astype(np.uint8), np.ones((1, 3, 3), np.uint8))
    order = list(range(len(ink)))
    Random("pocket scans").shuffle(order)
    return ink, {
        split: {name: [i for i in part if data.target[i] == d] for d, name in enumerate(DIGITS)}
        for split, part in (("train", order[:1300]), ("test", order[1300:]))
    }


def _docstrings(body: Sequence[ast.stmt], path: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Dotted name and first paragraph of a body's functions, classes and methods, in order."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("__"):
            text = (ast.get_docstring(node, clean=False) or "").strip()
            yield ".".join([*path, node.name]), " ".join(re.split(r"\n\s*\n", text)[0].split())
            if isinstance(node, ast.ClassDef):
                yield from _docstrings(node.body, [*path, node.name])


@cache
def _pages() -> dict[str, list[Page]]:
    """Pages by split, in the order of their files; a hash of the text makes a tenth test pages."""
    seen: set[str] = set()
    split: dict[str, list[Page]] = {"train": [], "test": []}
    for package in ("numpy", "scipy", "sklearn"):
        spec = importlib.util.find_spec(package)
        roots = (spec and spec.submodule_search_locations) or []
        files = [file for root in roots for file in Path(root).rglob("*.py")]
        if not files:
            raise ImportError(MISSING.format(f"the sources of {package}"))
        for file in sorted(files):
            parts = (package, *file.relative_to(roots[0]).with_suffix("").parts)
            if not SKIPPED.isdisjoint(parts):
                continue
            tree = ast.parse(file.read_bytes())
            for name, text in _docstrings(tree.body, [p for p in parts if p[0] != "_"]):
                plain = text.isascii() and len(text.split()) >= 4 and len(name) <= 3 * COLUMNS
                if plain and seen.isdisjoint((name, text)):
                    seen |= {name, text}
                    half = "test" if hashlib.sha256(text.encode()).digest()[0] < 26 else "train"
                    split[half].append(Page(name, text, ".".join(parts[:2])))
    return split


@cache
def _glyphs() -> np.ndarray:
    """The bitmap of every ASCII character [128, 14, 7]."""
    from PIL import Image, ImageDraw, ImageFont

    sheet = Image.new("L", (GLYPH[1], 128 * GLYPH[0]), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default_imagefont()
    for code in range(33, 127):
        draw.text((0, code * GLYPH[0] + 1), chr(code), fill=INK, font=font)
    return np.asarray(sheet).reshape(128, *GLYPH)


def sources() -> dict[str, str]:
    """Versions of the packages that the records are made of."""
    return {name: version(name) for name in ("scikit-learn", "scipy", "numpy", "pillow")}


def render(scene: Scene, cells: int = 3, frame: int = 0) -> np.ndarray:
    """Draw one frame of a scene, uint8 [28 cells, 28 cells, 3]."""
    image = BLANKS[cells].copy()
    ink, _ = _scans()
    for thing in scene:
        if thing.motion != "blinking" or frame % 2 == 0:
            y, x = (at + (CELL - SCAN) // 2 for at in thing.corner(frame))
            image[y : y + SCAN, x : x + SCAN] = PALETTES[thing.colour].take(ink[thing.scan], axis=0)
    return image


def caption(scene: Scene) -> str:
    """Describe a scene: "red two top left, pink six top right"; "red two moves up"."""
    return ", ".join(f"{thing.name} {thing.state}" for thing in scene)


def _show(scene: Scene, text: str = "", cells: int = 3) -> Side:
    if scene[0].motion:
        return Side(text, video=tuple(render(scene, cells, frame) for frame in range(len(WAY))))
    return Side(text, images=(render(scene, cells),))


def _scene(rng: Random, split: str, count: int, cells: int = 3, moving: bool = False) -> Scene:
    """Different digits in different colours and cells; or two of them in different motions."""
    scans, places = _scans()[1][split], rng.sample(range(cells * cells), count)
    digits, colours = rng.sample(DIGITS, count), rng.sample(ANSWERS["colour"], count)
    scene = tuple(
        Thing(digit, colour, rng.choice(scans[digit]), CELL * (at // cells), CELL * (at % cells))
        for digit, colour, at in zip(digits, colours, places, strict=True)
    )
    if moving:
        one = _move(rng, scene[0])
        return one, _move(rng, scene[1], one)
    return scene


def _move(rng: Random, thing: Thing, *others: Thing, motion: str = "") -> Thing:
    """Give a thing a motion, if not named one new to it and others, and a start; none may meet."""
    starts = {-1: (2, 3, 4), 0: (0, 1, 2, 3, 4), 1: (0, 1, 2)}  # in steps, to stay on the canvas
    taken = {thing.motion, *(other.motion for other in others)}
    while True:
        chosen = motion or rng.choice([name for name in MOTIONS if name not in taken])
        y, x = (STEP * rng.choice(starts[way]) for way in MOTIONS[chosen])
        moved = thing._replace(y=y, x=x, motion=chosen)
        pairs = ((moved.corner(f), other.corner(f)) for other in others for f in range(len(WAY)))
        if not any(abs(y - v) < CELL and abs(x - u) < CELL for (y, x), (v, u) in pairs):
            return moved


def _swap(scene: Scene, attribute: str) -> Scene:
    """Exchange the colours or the digits of the first two things."""
    a, b, *rest = scene
    if attribute == "colour":
        return a._replace(colour=b.colour), b._replace(colour=a.colour), *rest
    a, b = a._replace(digit=b.digit, scan=b.scan), b._replace(digit=a.digit, scan=a.scan)
    return a, b, *rest


def _classification(rng: Random, split: str, asked: str) -> Iterator[Record]:
    """Four digits of one colour in one place, or four motions of one digit."""
    (thing,) = _scene(rng, split, 1, 2)
    for answer in rng.sample(ANSWERS[asked], 4):
        if asked == "motion":
            thing = _move(rng, thing, motion=answer)
        else:
            thing = thing._replace(digit=answer, scan=rng.choice(_scans()[1][split][answer]))
        query = _show((thing,), f"what {asked}?", cells=3 if thing.motion else 2)
        target = f"{answer}: {caption((thing,)) if thing.motion else thing.name}"
        yield Record(query, Side(answer), answer, target, ANSWERS[asked])


def _qa(rng: Random, split: str, kind: tuple[str, str]) -> Iterator[Record]:
    """Two questions about a scene, and about its swap, where each has the other's answer."""
    asked, given = kind
    moving = "motion" in kind
    scene = _scene(rng, split, 2 if moving else rng.choice((2, 3)), moving=moving)
    for variant in (scene, _swap(scene, given if asked == "motion" else asked)):
        shown = _show(variant)
        present = [getattr(thing, asked) for thing in variant]
        for thing, answer in zip(variant[:2], present[:2], strict=True):
            query = replace(shown, text=QUESTIONS[kind].format(thing))
            target = f"{answer}: {caption(variant)}"
            yield Record(query, Side(answer), answer, target, ANSWERS[asked], present)


def _retrieval(rng: Random, split: str, moving: bool) -> Iterator[Record]:
    """Captions to find a scene and its edits by: swapped colours, a new digit, a new state."""
    scene = _scene(rng, split, 2, moving=moving)
    one, two = rng.sample((0, 1), 2)
    redrawn, moved = list(scene), list(scene)
    digit = rng.choice([name for name in DIGITS if name not in {thing.digit for thing in scene}])
    redrawn[one] = scene[one]._replace(digit=digit, scan=rng.choice(_scans()[1][split][digit]))
    if moving:
        moved[two] = _move(rng, scene[two], scene[one])
    else:
        places = [(CELL * (at // 3), CELL * (at % 3)) for at in range(9)]
        free = [place for place in places if place not in {(thing.y, thing.x) for thing in scene}]
        y, x = rng.choice(free)
        moved[two] = scene[two]._replace(y=y, x=x)
    for variant in (scene, _swap(scene, "colour"), tuple(redrawn), tuple(moved)):
        yield Record(Side(caption(variant)), _show(variant), caption(tuple(sorted(variant))))


def _grounding(rng: Random, split: str, template: str) -> Iterator[Record]:
    """Each thing of a scene, to be found cut out, on any cell of a canvas; one of its swap."""
    scene = _scene(rng, split, 3)
    swapped = _swap(scene, "colour")
    for variant, thing in [*((scene, thing) for thing in scene), (swapped, swapped[0])]:
        cut = thing._replace(y=CELL * rng.randrange(2), x=CELL * rng.randrange(2))
        query, positive = _show(variant, template.format(thing)), _show((cut,), cells=2)
        yield Record(query, positive, thing.name, f"{thing.name}: {caption(variant)}")


def _moments(rng: Random, split: str, template: str) -> Iterator[Record]:
    """The four moments of a video, two frames each, to be found as clips."""
    scene = _scene(rng, split, 4, 2)
    clips = [(render((thing,), cells=2),) * 2 for thing in scene]
    video = tuple(frame for clip in clips for frame in clip)
    shown = ", ".join(thing.name for thing in scene)
    for thing, clip in rng.sample(list(zip(scene, clips, strict=True)), 4):
        query, target = Side(template.format(thing), video=video), f"{thing.name}: {shown}"
        yield Record(query, Side(video=clip), thing.name, target)


def _page(page: Page) -> Record:
    """A picture of the name and the text, each wrapped, while they fit: uint8 [112, 112, 3]."""
    words = f"{page.name} {page.text}".split()
    lines = [*wrap(page.name, COLUMNS), *wrap(page.text, COLUMNS, break_on_hyphens=False)]
    shown = "".join(line.ljust(COLUMNS) for line in lines[:LINES]).ljust(LINES * COLUMNS)
    cells = _glyphs()[np.frombuffer(shown.encode(), np.uint8).reshape(LINES, COLUMNS)]
    image = cells.transpose(0, 2, 1, 3).reshape(LINES * GLYPH[0], COLUMNS * GLYPH[1], 1)
    query, target = " ".join(words[:QUERY_WORDS]), " ".join(words[:TARGET_WORDS])
    return Record(Side(query), Side(images=(image.repeat(3, axis=2),)), page.name, target)


def _neighbours(rng: Random, split: str, count: int) -> Iterator[Record]:
    """Pages that follow each other, mostly of one file."""
    start = rng.randrange(len(_pages()[split]) - count + 1)
    yield from map(_page, _pages()[split][start : start + count])


FAMILIES: dict[str, tuple[Callable[..., Iterator[Record]], Sequence[Any]]] = {  # and their kinds
    "I-CLS": (_classification, ["digit"]),
    "I-QA": (_qa, [kind for kind in QUESTIONS if "motion" not in kind]),
    "I-RET": (_retrieval, [False]),
    "I-VG": (_grounding, FIND),
    "V-CLS": (_classification, ["motion"]),
    "V-QA": (_qa, [kind for kind in QUESTIONS if "motion" in kind]),
    "V-RET": (_retrieval, [True]),
    "M-RET": (_moments, MOMENT),
    "VisDoc": (_neighbours, [4]),
}


def _records(split: str, task: str, seed: int, index: int, size: int) -> list[Record]:
    """Draw the records of families of one kind, cut at `size`."""
    rng = Random(f"{seed}/{split}/{task}/{index}")
    draw, kinds = FAMILIES[task]
    kind = rng.choice(kinds)
    records: list[Record] = []
    while len(records) < size:
        records += draw(rng, split, kind)
    return records[:size]


def train_group(task: str, index: int, size: int = 16, seed: int = 0) -> list[Pair]:
    """Draw a group of training pairs of one task; the same arguments give the same bytes.

    Args:
        task: one of `TASKS`.
        index: which group, from 0.
        size: how many pairs; every four are near-duplicates, so that in-batch negatives are hard.
        seed: another one gives other groups of the same training scans and pages.

    Raises:
        ValueError: an unknown task, a size below 2 or a negative index.
        ImportError: packages of the `demo` extra, or their sources, are missing.
    """
    if task not in TASKS:
        raise ValueError(f"train_group: task is {task!r}, not one of {', '.join(TASKS)}")
    if size < 2 or index < 0:
        raise ValueError(f"train_group: size is {size}, not >= 2, or index is {index}, not >= 0")
    records = _records("train", task, seed, index, size)
    return [Pair(r.query, r.positive, (), task, NTP_SIDE[task], r.target, r.key) for r in records]


def tasks(queries: int = 400) -> list[RetrievalTask]:
    """Make the test set, one retrieval task per meta-task, of scans and pages never trained on.

    Args:
        queries: how many per task (VisDoc: at most one per test page); fewer are the first of more.

    Raises:
        ValueError: fewer than 40 queries, too few to draw other scenes from.
        ImportError: as `train_group`.
    """
    if queries < 40:
        raise ValueError(f"tasks: queries is {queries}, not >= 40")
    made = [_pooled(task, queries) for task in TASKS[:-1]]
    pages, task = _pages()["test"], "VisDoc"
    records = [_page(page) for page in pages]
    sides = [record.positive for record in records]
    asked = Random("pool/VisDoc").sample(range(len(pages)), len(pages))[:queries]
    asks = [records[i].query for i in asked]
    qrels = [{i: 1.0} for i in asked]
    hard = [[j for j, page in enumerate(pages) if page.part == pages[i].part] for i in asked]
    visdoc = RetrievalTask(task, task, MODALITY[task], "ndcg@5", asks, sides, qrels, hard=hard)
    return [*made, visdoc]


def held_out(task: str, count: int) -> list[Record]:
    """The first `count` records of the test set's families, each family whole but for the last;
    of pages as many as are there at most, evenly spaced.

    Raises:
        ImportError: as `train_group`.
    """
    if task == "VisDoc":
        pages = _pages()["test"]
        return [_page(page) for page in pages[:: max(1, len(pages) // count)][:count]]
    families = (_records("test", task, 0, index, 4) for index in range(-(-count // 4)))
    return [record for family in families for record in family][:count]


def _pooled(task: str, count: int) -> RetrievalTask:
    """A query per family, with a pool of all answers; or of the family's scenes, which are hard,
    and of others' positives, half of these with the query's words, so that words are not enough."""
    families = [_records("test", task, 0, index, 4) for index in range(count)]
    rights = [family[0] for family in families]
    near, far = POOLS.get(task, (0, 0))
    found: dict[str, tuple[int, Side]] = {}

    def place(side: Side) -> int:
        return found.setdefault(_fingerprint(side), (len(found), side))[0]

    rng = Random(f"pool/{task}")
    owns = [{r.key: place(r.positive) for r in rng.sample(f[:near], near)} for f in families]
    qrels, pools, hard = [], [], []
    for right, own in zip(rights, owns, strict=True):
        pool = own | {answer: place(Side(answer)) for answer in right.answers}
        others = rng.sample(rights, len(rights))
        same_words = [other for other in others if other.query.text == right.query.text]
        for size, some in ((near + far // 2, same_words), (near + far, others)):
            for other in some:
                if len(pool) < size and other.key not in pool:
                    pool[other.key] = place(other.positive)
        qrels.append({pool[right.key]: 1.0})
        pools.append(rng.sample(list(pool.values()), len(pool)))
        hard.append([at for key, at in pool.items() if key in (own or right.present)])
    queries, sides = [right.query for right in rights], [side for _, side in found.values()]
    known = hard if any(hard) else None
    return RetrievalTask(task, task, MODALITY[task], "hit@1", queries, sides, qrels, pools, known)


def texts(groups: int = 16) -> Iterator[str]:
    """Yield texts to train a tokenizer on: training pages; words and captions of groups."""
    for page in _pages()["train"]:
        yield f"{page.name} {page.text}"
    for pair in (p for task in TASKS[:-1] for i in range(groups) for p in train_group(task, i)):
        yield from filter(None, (pair.query.text, pair.positive.text, pair.target))


def digest() -> str:
    """Hash all test tasks and the first four training groups of every task (see `sources`)."""
    parts: list[Any] = []
    for task in tasks():
        parts += (task.name, task.meta_task, task.modality, task.metric)
        parts += (task.qrels, task.pools, task.hard)
        parts += (_fingerprint(side) for side in (*task.queries, *task.candidates))
    for pair in (pair for name in TASKS for index in range(4) for pair in train_group(name, index)):
        parts += (_fingerprint(pair.query), _fingerprint(pair.positive))
        parts += (pair.dataset, pair.ntp_side, pair.target, pair.positive_id)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _fingerprint(side: Side) -> str:
    total = hashlib.sha256(repr((side.text, len(side.images), len(side.video))).encode())
    for frame in (*side.images, *side.video):
        total.update(repr(frame.shape).encode() + frame.tobytes())
    return total.hexdigest()
