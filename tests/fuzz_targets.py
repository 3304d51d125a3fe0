"""What `fuzz.py` runs over each damaged folder: the public readers, and what must hold of a result.

Each target returns a few words on what it had, for which cases are told apart; or None.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import random
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from helpers import TINY, held, tiny_module
from PIL import Image

from btok import BTokEncoder, Side
from btok.data.sources import open_source
from btok.inputs import as_side, estimate_tokens, pages, rgb_array, with_frames
from btok.inputs.text import CHARACTERS
from btok.processing import Processor
from btok.tools.cli import main
from btok.tools.encode import encode_to
from btok.tools.index import Index, open_index
from btok.tools.rows import item_name

TEXTS = ("", " ", "a text", "\ud800", "\0", "<|image_pad|>", "<|btok_0|>", "\u202e\U0010ffff", "é")
NUMBERS = (0, 1, -1, 0.5, 1e9, 1e308, -1e308, math.nan, math.inf, 2**63, 10**400, None, "1")


class Kit:
    """What the targets share in a process: a tiny model, processors of all families."""

    def __init__(self, keep: Path) -> None:
        self.keep = keep
        self.processors = {family: tiny_module(family)[1] for family in TINY}
        self.processor = self.processors["qwen2_vl"]
        datasets.disable_progress_bars()

    @cached_property
    def encoder(self) -> BTokEncoder:
        return BTokEncoder.from_pretrained(self.keep / "checkpoint")

    @cached_property
    def good(self) -> dict[str, np.ndarray]:
        """The vectors of the files that are not damaged, by name."""
        inputs = ["good.png", "good.txt"]
        folder = self.keep / "seeds/cli/0"
        rows = self.encoder.encode([folder / name for name in inputs], show_progress=False)
        return dict(zip(inputs, rows, strict=True))


def picture(value: Any) -> None:
    assert isinstance(value, np.ndarray) and value.dtype == np.uint8
    assert value.ndim == 3 and value.shape[2] == 3 and value.size


def embedded(side: Side, processor: Processor) -> None:
    """A side through a processor: as many placeholders as its patches ask for."""
    out = processor(side)
    assert len(out["input_ids"]) and int(out["input_ids"].min()) >= 0
    for vision in out.get("vision", ()):
        assert len(vision.pixels) == sum(vision.patches)


def read_file(folder: Path, kit: Kit) -> str:
    """A file as the encoder reads it."""
    (path,) = folder.iterdir()
    said = estimate_tokens(path, kit.processor)
    assert isinstance(said, int) and said >= 0
    side = with_frames(as_side(path))
    assert len(side.text) <= CHARACTERS
    for image in [*side.images, *side.video]:
        picture(rgb_array(image))
    seconds = list(side.frame_seconds)
    assert seconds == sorted(seconds) and all(0 <= each < math.inf for each in seconds)
    assert len(seconds) == len(side.video)
    embedded(side, kit.processor)
    return f"text {len(side.text) > 0}, {len(side.images)} images, {len(side.video)} frames"


def read_pages(folder: Path, kit: Kit) -> str:
    """The pages of a document."""
    (path,) = folder.iterdir()
    found = pages(path)
    for page in found[:3]:
        picture(page.rgb_array())
    return f"{min(len(found), 3)} pages"


def read_rows(folder: Path, kit: Kit) -> str:
    """All rows of training data, as a trainer prepares them; then with the index that this made."""
    path = folder / ("rows.parquet" if "rows.parquet" in os.listdir(folder) else "rows.jsonl")
    cache = kit.keep / "datasets"
    datasets.config.HF_DATASETS_CACHE = cache
    try:
        source = open_source(path)
        assert source.digest == open_source(path).digest
        for i in range(min(len(source), 8)):
            pair = source[i]
            for side in (pair.query, pair.positive, *pair.negatives):
                embedded(with_frames(side), kit.processor)
        return f"{len(source)} rows, {source.negatives} negatives"
    finally:
        shutil.rmtree(cache, ignore_errors=True)


def read_checkpoint(folder: Path, kit: Kit) -> str:
    """A checkpoint's processor, and what it makes of small pictures."""
    processor = Processor.from_pretrained(folder)
    assert processor.encode("a") is not None
    if not processor.has_vision:
        return processor.model_type
    image = np.zeros((24, 40, 3), np.uint8)
    embedded(Side("a", [image, image[:9]], [image, image]), processor)
    estimate_tokens(Side("a", [image]), processor)
    return processor.model_type


def weird_side(rng: random.Random) -> Side:
    def array() -> Any:
        shape = [rng.choice((0, 1, 2, 3, 8, 30, 300)) for _ in range(rng.choice((2, 3, 3, 3)))]
        shape = [2, *shape] if rng.random() < 0.1 else shape
        kind = rng.choice((np.uint8, np.uint8, np.uint8, np.float32, np.int64, bool))
        shape[-1] = 3 if rng.random() < 0.8 else shape[-1]
        mode = rng.choice(("L", "RGBA", "P", "1", "F", "I", "I;16", "LA", "CMYK", "YCbCr", "PA"))
        made = np.ones(shape, kind)
        size = (rng.choice((0, 1, 9, 300)), rng.choice((1, 9, 30)))
        return rng.choice([made, made, Image.new(mode, size), *NUMBERS, b"", "gone.png"])

    def few(make: Callable[[], Any]) -> list[Any]:
        return [make() for _ in range(rng.choice((0, 0, 1, 2, 3)))]

    video: Any = few(array)
    if rng.random() < 0.3:  # frames alike, and their times
        video = [np.ones((8, 8, 3), np.uint8)] * len(video)
    times = [rng.choice(NUMBERS) for _ in video] if rng.random() < 0.7 else few(lambda: 1.0)
    text = "".join(rng.choice(TEXTS) for _ in range(rng.choice((0, 1, 3, 50))))
    return Side(text, few(array), video, times)


def read_side(folder: Path, kit: Kit) -> str:
    """A side of odd arrays, times and texts, which the file's bytes choose."""
    rng = random.Random((folder / "number.bin").read_bytes())
    side = weird_side(rng)
    family = rng.choice(list(kit.processors))
    assert estimate_tokens(side, kit.processors[family]) >= 0
    embedded(with_frames(as_side(side, rng.choice(("", "Find: ")))), kit.processors[family])
    return f"{family}: {len(side.text) > 0} {len(side.images)} {len(side.video)}"


def read_index(folder: Path, kit: Kit) -> str:
    """An index: opened, searched, and brought up to date."""
    index = Index.open(folder)
    (hits,) = index.search(np.ones((1, 64), np.float32) / 8, 3)
    assert len(hits) == min(3, len(index))
    for hit in hits:
        item_name(hit.item).encode()
    open_index(kit.encoder, folder)
    texts = [f"text {i}" for i in range(3)]
    encode_to(kit.encoder, folder, texts, texts, show_progress=False)
    assert held(folder).keys() == set(texts)
    return "read"


def search(folder: Path, kit: Kit) -> str:
    """`python -m btok search` over a folder: what is whole is found, whatever else is in it."""
    out, err = io.StringIO(), io.StringIO()
    command = ["search", str(kit.keep / "checkpoint"), str(folder), "x", "--top", "999"]
    ours = not (folder / ".btok").exists()  # else an index that was damaged, too
    good = kit.good
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(command)
    said = err.getvalue()
    assert "Traceback" not in said
    assert code == 0 or (code == 2 and not ours), f"code {code}: {said}"  # two files are whole
    if code == 2:
        line = said.strip().splitlines()[-1]
        assert line.startswith("error: ") and said.count("error: ") == 1, said
        return line.rpartition(": ")[2]
    found = held(folder / ".btok")
    assert len(out.getvalue().splitlines()) == len(found)
    rows = {item["uri"]: row for item, row in found.values()}
    for name, row in good.items() if ours else ():
        assert np.abs(rows[name] - row).max() < 1e-5
    unreadable = Index.open(folder / ".btok").unreadable()
    return f"{len(found)} found, {json.dumps(unreadable).count('cannot be read')}"


class Target(NamedTuple):
    """A reader, and how often it comes in relation to others."""

    read: Callable[[Path, Kit], str]
    weight: float

    def __call__(self, folder: Path, kit: Kit) -> str:
        return self.read(folder, kit)


TARGETS = {
    "file": Target(read_file, 10),
    "pages": Target(read_pages, 3),
    "rows": Target(read_rows, 3),
    "checkpoint": Target(read_checkpoint, 2),
    "side": Target(read_side, 3),
    "index": Target(read_index, 3),
    "cli": Target(search, 0.5),
}
