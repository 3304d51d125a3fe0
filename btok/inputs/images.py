"""Image files as people see them: upright, on white, greys scaled; animations as frames."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from btok.extras import needed
from btok.files import one_line, printable

MOVING = (".gif", ".webp", ".png", ".apng", ".avif")  # may hold a still image or an animation
HEIF = (".heic", ".heif")
BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
TIFF = (".tif", ".tiff")
IMAGES = (*MOVING, *HEIF, *TIFF, ".jpg", ".jpeg", ".jfif", ".bmp", ".jp2", ".ppm", ".pgm", ".pbm")
# what a file may be taken for: for others Pillow starts programs (EPS) or guesses
FORMATS = ["PNG", "JPEG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "AVIF", "HEIF", "JPEG2000", "PPM"]
BITS, PHOTOMETRIC, ORIENTATION, SAMPLE_FORMAT = 258, 262, 274, 339  # tags of TIFF
UNSIGNED = 1  # a SAMPLE_FORMAT
ANIMATED = ("GIF", "WEBP", "PNG", "AVIF")  # of them; a TIFF has pages, an MPO other pictures
UNTIMED = 0.1  # seconds that browsers show a frame which says 0
MOST = 1 << 32  # pixels of all frames of an animation
BLOCK = 1 << 20  # pixels that are scaled at a time


@contextmanager
def opened(file: str | bytes | Path) -> Iterator[Any]:
    """An image file, by its path or as its bytes, in Pillow.

    Raises:
        ValueError: what is no readable image, also where that shows later, within the block.
        ImportError: HEIC without pillow-heif (the extra `heif`).
    """
    from PIL import Image, UnidentifiedImageError

    name = f"of {len(file)} bytes" if isinstance(file, bytes) else printable(file)
    if _is_heif(file):
        with needed("HEIC files", "pillow-heif", "heif"):
            from pillow_heif import register_heif_opener
        register_heif_opener()
    try:
        Image.init()
        known = [form for form in FORMATS if form in Image.OPEN]
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, "r", known) as image:
            yield image
    except (ImportError, MemoryError):
        raise
    except UnidentifiedImageError as error:  # its text may hold an address
        raise ValueError(f"image {name} cannot be read: it is of no known format") from error
    except Exception as error:  # plug-ins of Pillow raise nearly anything
        why = one_line(error)
        raise ValueError(f"image {name} cannot be read: {why}") from error


def _is_heif(file: str | bytes | Path) -> bool:
    """Whether a file is HEIF by its first bytes: what telephones export as .jpg may be one."""
    start = file[:12] if isinstance(file, bytes) else b""
    if not isinstance(file, bytes):
        with suppress(OSError, ValueError), open(file, "rb") as opened_file:
            start = opened_file.read(12)
    return start[4:8] == b"ftyp" and start[8:12] in BRANDS


def rgb_of(image: Any) -> np.ndarray:
    """A PIL image as it is shown: uint8 [height, width, 3].

    EXIF orientation is applied and transparency put on white, as transformers' `load_image` and its
    image processors do. These clip greys of more than 8 bits to 0 .. 255; here they are scaled: of
    16 bits from 0 .. 65,535; of 32 from that or from 0 .. 255, floats from [0, 1] or 0 .. 255, the
    first that holds all, and where none does from their lowest to their highest.
    """
    from PIL import Image, ImageOps

    tags = getattr(image, "tag_v2", {})  # of a TIFF
    if image.getexif().get(ORIENTATION, 1) != 1:  # else it would be copied
        image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        return _grey(image, tags)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return np.asarray(image.convert("RGB"))


def _grey(image: Any, tags: Any) -> np.ndarray:
    """A picture of greys of more than 8 bits, as `rgb_of` says; `tags` are those of a TIFF.

    It goes by in strips: as a whole, in float64, a large one would take eight times its memory.
    """
    width, height = image.size
    rows = max(1, BLOCK // max(width, 1))
    strips = [(top, min(top + rows, height)) for top in range(0, height, rows)]
    unsigned = image.mode == "I" and tags and tags.get(SAMPLE_FORMAT, (UNSIGNED,))[0] == UNSIGNED

    def values(top: int, end: int) -> np.ndarray:
        strip = np.asarray(image.crop((0, top, width, end)))
        return strip.view(np.uint32) if unsigned else strip  # which Pillow takes for signed

    finite = ((strip := values(*each))[np.isfinite(strip)] for each in strips)
    ranges = [(float(part.min()), float(part.max())) for part in finite if len(part)]
    low = min((least for least, _ in ranges), default=0.0)
    high = max((most for _, most in ranges), default=1.0)
    bits = tags.get(BITS, (16,))[0]
    kind = values(0, 1).dtype.str[1:]
    ends = {"u2": (min(2**bits, 65536) - 1,), "f4": (1, 255)}.get(kind, (255, 65535))
    fitting = [end for end in ends if low >= 0 and high <= end]
    low, high = (0.0, float(fitting[0])) if fitting else (low, max(high, low + 1e-9))
    shown = np.empty((height, width, 3), np.uint8)
    for top, end in strips:
        strip = values(top, end)
        grey = np.nan_to_num(strip.astype(np.float64), nan=low, posinf=high, neginf=low)
        grey = np.round((grey - low) / (high - low) * 255).astype(np.uint8)
        shown[top:end] = (255 - grey if tags.get(PHOTOMETRIC) == 0 else grey)[..., None]  # 0: white
        if isinstance(clear := image.info.get("transparency"), int):
            shown[top:end][strip == clear] = 255
    return shown


def is_animated(path: Path) -> bool:
    """Whether an image file holds frames one after the other; False for what cannot be read."""
    if path.suffix.lower() not in MOVING:
        return False
    try:
        with opened(path) as image:
            return image.format in ANIMATED and bool(getattr(image, "is_animated", False))
    except (ValueError, ImportError):  # reading it will say what is wrong
        return False


def read_animation(path: Path, moments: int) -> tuple[list[np.ndarray], list[float]]:
    """Frames of an animation, evenly over its time, as `read_video` takes them; their seconds.

    Raises:
        ValueError: no readable image; more than 4 billion pixels in all.
    """
    with opened(path) as image:
        count, size = getattr(image, "n_frames", 1), image.width * image.height
        if count * size > MOST:
            raise ValueError(f"it has {count} frames of {size} pixels, expected {MOST} in all")
        first = int(image.info.get("default_image", False))  # what those show that cannot move it
        lasting = []
        for number in range(first, count):
            image.seek(number)
            image.load()  # of WebP and AVIF the duration is known only then
            lasting.append(image.info.get("duration", 0) / 1000 or UNTIMED)
        ends = list(accumulate(lasting))
        wanted = [ends[-1] * (i + 0.5) / moments for i in range(moments)]
        taken = sorted({int(np.searchsorted(ends, at, side="right")) for at in wanted})
        frames = []
        for number in taken:
            image.seek(first + number)
            frames.append(rgb_of(image))
        return frames, [ends[number] - lasting[number] for number in taken]
