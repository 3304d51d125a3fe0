"""A folder of every kind of file, one with a hostile name, and the page of it, really served."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from helpers import environment
from odd_documents import Sheet, pdf
from odd_videos import film, steady
from PIL import Image

HOSTILE = "<img src=x onerror=alert(1)> \"quoted\" & 'so' %2e%2e.png"
COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 70, 220)}


def fill(folder: Path) -> Path:
    """Thirty pictures, a document of two pages, a video and two texts."""
    (folder / "notes").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(9):
        for name, colour in COLOURS.items():
            picture = rng.integers(0, 40, (48, 64, 3)) + np.array(colour) * 5 // 6
            Image.fromarray(picture.astype(np.uint8)).save(folder / f"{name}{number}.png")
    Image.new("RGB", (1600, 900), (200, 120, 40)).save(folder / "large.jpg")
    Image.new("RGB", (64, 64), (10, 200, 200)).save(folder / HOSTILE)
    Image.new("RGB", (50, 90), (90, 20, 90)).save(folder / f"{'a long name ' * 15}.png")
    (folder / "report.pdf").write_bytes(pdf([Sheet(), Sheet(colour=(0, 0, 255))]))
    (folder / "film.mp4").write_bytes(film("mp4", "libx264", steady(20)))
    (folder / "notes" / "words.txt").write_text("a red picture, and a blue one\n")
    (folder / "notes" / "script.html").write_text("<script>alert(1)</script><p>some words</p>")
    (folder / "not indexed.xyz").write_text("nobody reads this")
    return folder


@contextmanager
def served(checkpoint: Path, folder: Path, *options: str) -> Iterator[tuple[str, int]]:
    """The host and the port of a page."""
    command = [sys.executable, "-m", "btok", "serve", str(checkpoint), str(folder), "--port", "0"]
    process = subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, text=True, env=environment()
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.match(r"http://([^/]+):(\d+)  (\d+) items of ", line)
        assert found, line
        yield found[1], int(found[2])
    finally:
        process.terminate()
        process.wait(300)
