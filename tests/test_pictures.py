"""Loss curves, contact sheets and the picture of the mask, looked at by their pixels."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from btok.data.records import Side
from btok.tools import pictures

ROOT = Path(__file__).resolve().parent.parent


def test_the_import_is_light():
    code = (
        "import sys, btok.tools.pictures;"
        "assert not {'PIL', 'matplotlib', 'transformers', 'triton'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pictures_name_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ImportError, match=r"btok\[demo\]"):
        pictures.loss_curve([{"step": 1, "ntp": 1.0}], tmp_path / "loss.png")


@pytest.fixture
def pixels():
    """Reads a picture as an int array [height, width, 3], where matplotlib is installed."""
    pytest.importorskip("matplotlib", reason="pictures need the demo extra")
    image = pytest.importorskip("PIL.Image")
    return lambda path: np.asarray(image.open(path).convert("RGB")).astype(int)


def near(array, colour, tolerance=6):
    return (np.abs(array - 255 * np.array(colour)) <= tolerance).all(axis=-1)


def checkerboard(size):
    board = np.indices((size, size)).sum(axis=0) % 2
    return np.where(board[..., None] == 1, [255, 0, 255], [0, 0, 0]).astype(np.uint8)


def test_contact_sheet_frames_the_right_one(pixels, tmp_path):
    query, found = (
        Side("which?", images=[checkerboard(56)]),
        [Side(f"number {i}") for i in range(5)],
    )
    lefts = []
    for place in (0, 3):
        right = [i == place for i in range(5)]
        pictures.contact_sheet([(query, found, right)], tmp_path / "sheet.png", "right $ one")
        sheet = pixels(tmp_path / "sheet.png")
        columns = np.flatnonzero(near(sheet, pictures.GREEN).sum(axis=0) > 50)
        lefts.append(columns.min())
        assert columns.max() - columns.min() == pytest.approx(260, abs=12)
    assert lefts[1] - lefts[0] == pytest.approx(3 * 280, abs=2)
    # an image of 56 pixels is shown four times as large, pixel by pixel
    assert near(sheet, (1, 0, 1), 0).sum() == 56 * 56 / 2 * 16

    pictures.contact_sheet([(query, found, [False] * 5, 9)], tmp_path / "missed.png", "missed")
    missed = pixels(tmp_path / "missed.png")
    assert not near(missed, pictures.GREEN).any()
    note = missed[120:, sheet.shape[1] + 4 :]
    assert missed.shape[1] == sheet.shape[1] + 180 and (note < 100).all(axis=-1).sum() > 100


def test_contact_sheet_of_all_kinds(pixels, tmp_path):
    from PIL import Image

    page = Side("name " * 60, images=[Image.new("L", (112, 112), 255)])
    clip, clips = (
        Side(video=[checkerboard(56)] * 4),
        Side("the moment", video=[checkerboard(56)] * 8),
    )
    photo = Side(images=[Image.new("RGB", (1600, 900))])
    rows = [
        pictures.SheetRow(clips, [clip] * 5, [False, True, False, False, True]),
        pictures.SheetRow(page, [Side("W" * 90)] * 3, [False] * 3),
        pictures.SheetRow(photo, [Side()] * 2, [True, True]),
    ]
    pictures.contact_sheet(rows, tmp_path / "sheet.png", "all kinds")
    sheet = pixels(tmp_path / "sheet.png")
    assert 600 < sheet.shape[0] < 1400 and 1800 < sheet.shape[1] < 2200
    # eight frames of the query and four of each candidate, all twice as large
    assert near(sheet, (1, 0, 1), 0).sum() == (8 + 5 * 4) * 56 * 56 / 2 * 4
    with pytest.raises(ValueError):
        pictures.contact_sheet([(page, [page], [])], tmp_path / "sheet.png", "a flag is missing")


def test_loss_curve(pixels, tmp_path):
    path = tmp_path / "loss.png"
    rows = [{"step": i, "phase": "warm-up", "ntp": 3 - i / 50, "loss": 1} for i in range(50)]
    pictures.loss_curve(rows, path)
    one = pixels(path)
    assert near(one, pictures.ORANGE).sum() > 1000 and not near(one, pictures.BLUE).any()
    rows += [{"step": 50 + i, "phase": "main", "ntp": 2, "contrastive": 1} for i in range(50)]
    pictures.loss_curve([{"event": "start"}, *rows], path)
    two = pixels(path)
    assert one.shape[1] == two.shape[1] == 1400 and two.shape[0] == one.shape[0] + 380
    bold = near(two, pictures.BLUE)
    assert bold[:, 760:].sum() > 1000 and not bold[:, :600].any()  # contrastive: second half only
    assert near(two, pictures.ORANGE)[:, 200:600].sum() > 500
    middle = two[two.shape[0] // 4]
    assert len({tuple(middle[x]) for x in (300, 1200)}) == 2  # two shades
    # a jump between phases is neither bridged nor smoothed away: two level lines
    pictures.loss_curve(
        [{"step": i, "phase": f"{i // 99}", "ntp": i // 99} for i in range(198)], path
    )
    level = near(pixels(path), pictures.ORANGE).any(axis=1)
    assert np.diff(level.astype(int)).tolist().count(1) == 2
    pictures.loss_curve([{"step": 1, "contrastive": 1.0}], path)
    with pytest.raises(ValueError, match="no row"):
        pictures.loss_curve([{"step": 1, "loss": 1.0}], path)


def test_mask_picture(pixels, tmp_path):
    drawings = runpy.run_path(str(ROOT / "docs/drawings.py"))
    drawings["masks"]().savefig(tmp_path / "masks.png")
    picture = pixels(tmp_path / "masks.png")
    causal, condensed = np.split(picture, [picture.shape[1] // 2], axis=1)
    cell = near(causal, pictures.ORANGE).sum() / (3 + 2 + 1 + 5 * 3)
    seen = {  # rows x: 6 * 7 / 2; rows B: all of x; rows T: all of x, or nothing of it
        "blue": (pictures.BLUE, 21 + 3 * 6 + 5 * 6, 21 + 3 * 6),
        "orange": (pictures.ORANGE, 6 + 5 * 3, 6 + 5 * 3),
        "green": (pictures.GREEN, 15, 15),
    }
    for name, (colour, before, after) in seen.items():
        assert near(causal, colour).sum() / cell == pytest.approx(before, rel=0.05), name
        assert near(condensed, colour).sum() / cell == pytest.approx(after, rel=0.05), name
