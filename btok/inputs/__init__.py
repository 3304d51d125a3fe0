"""What a user has becomes a `Side`: texts, pictures, pages, videos, and files of all of these.

text.py       text files, HTML and .docx     images.py  pictures and animations
documents.py  the pages of PDF and TIFF      video.py   videos
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from btok.data.records import Side
from btok.inputs.documents import DOCUMENTS, NOMINAL, Page, at_page, only_page, pages
from btok.inputs.images import IMAGES, is_animated, opened, read_animation, rgb_of
from btok.inputs.text import TEXTS, read_text
from btok.inputs.video import FRAMES, VIDEOS, Clip, cut, duration, is_video, read_video

__all__ = ["DOCUMENTS", "FRAMES", "IMAGES", "KINDS", "TEXTS", "VIDEOS", "Clip", "Page", "as_side"]
__all__ += ["cut", "duration", "estimate_tokens", "frame_seconds", "is_video", "pages"]
__all__ += ["read_video", "resized", "rgb_array", "with_frames"]

KINDS = tuple(dict.fromkeys(TEXTS + DOCUMENTS + IMAGES + VIDEOS))  # looked for in a folder
FRAMES_PER_SECOND = 2.0  # of a video that does not say: the rate the checkpoints' own sampling has
LATEST = 10**9  # seconds that a frame's time is below: a date in seconds is not


def as_side(value: Any, instruction: str | None = None) -> Side:
    """The side an input stands for; only a text file is read yet.

    Args:
        value: a `Side`; a str, always a text; a `Path`, by its ending a text file (its first
            8,192 characters), a document of one page, a video, an animation (a video, too) or an
            image; a `Page` or a `Clip`; an image as bytes of a file, a PIL image or a uint8 array
            [height, width, 3]; or a list of images.
        instruction: put before the text, a space between the two unless it ends in white space;
            not where there is nothing to embed.

    Raises:
        OSError: a text file that cannot be opened.
        ValueError: a text file that is no text, a document of several pages.
        ImportError: what reads the file is missing; the message names the extra.
    """
    if isinstance(value, str):
        value = Side(value)
    elif isinstance(value, Path):
        value = _file(value)
    elif isinstance(value, Clip):
        value = Side(video=value)
    elif not isinstance(value, Side):
        value = Side(images=value if isinstance(value, list | tuple) else [value])
    if not isinstance(value.text, str):
        raise TypeError(f"text is a {type(value.text).__name__}, expected a str")
    if instruction and not _is_empty(value):
        gap = " " if value.text and not instruction[-1].isspace() else ""
        value = replace(value, text=instruction + gap + value.text)
    return value


def _file(path: Path) -> Side:
    kind = path.suffix.lower()
    if is_video(path):
        return Side(video=path)
    if kind in TEXTS:
        return Side(read_text(path))
    if kind in DOCUMENTS:
        return Side(images=[only_page(path)])
    return Side(video=path) if is_animated(path) else Side(images=[path])


def with_frames(side: Side) -> Side:
    """The side with a video file read; ValueError where there is nothing to embed, and for times
    beside a file, which has its own.
    """
    if _of_file(side):
        if len(side.frame_seconds):
            raise ValueError(
                f"frame_seconds has {len(side.frame_seconds)} times beside the file {side.video}, "
                "which has its own; expected none"
            )
        file = Path(side.video) if isinstance(side.video, str) else side.video
        if isinstance(file, Path) and file.suffix.lower() in IMAGES:
            frames, seconds = read_animation(file, FRAMES)
        else:
            frames, seconds = read_video(file, FRAMES)
        side = replace(side, video=frames, frame_seconds=seconds)
    try:
        side.text.encode()
    except UnicodeEncodeError:  # half an emoji, as of a text that was cut: no tokenizer takes it
        whole = side.text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        side = replace(side, text=whole)
    if _is_empty(side):
        raise ValueError("it is empty, expected a text, an image or a frame")
    return side


def _of_file(side: Side) -> bool:
    """Whether a side's video is a file, or a part of one, that is still to be read."""
    return isinstance(side.video, str | Path | Clip)


def _is_empty(side: Side) -> bool:
    seen = _of_file(side) or len(side.images) or len(side.video)
    return not seen and not side.text.strip()


def rgb_array(image: Any) -> np.ndarray:
    """A picture as it is shown, uint8 [height, width, 3]; `rgb_of` says how.

    Args:
        image: a PIL image, a path or a file's bytes (the first frame of an animation), a `Page`, or
            such an array.

    Raises:
        TypeError: another array or type.
        ValueError: what is no readable image, a document of several pages.
        ImportError: what reads it is missing; the message names the extra.
    """
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise TypeError(
                f"image is an array {image.dtype} {list(image.shape)}, expected uint8 [H, W, 3]"
            )
        return image
    if isinstance(image, str | Path):
        image = at_page(Path(image))
        if isinstance(image, Path) and image.suffix.lower() in DOCUMENTS:
            image = only_page(image)
    if isinstance(image, Page):
        return image.rgb_array()
    if isinstance(image, str | bytes | Path):
        with opened(image) as read:
            if read.format == "TIFF" and read.n_frames > 1:  # as bytes, or under a wrong name
                raise ValueError(f"it has {read.n_frames} pages, expected one")
            return rgb_of(read)
    from PIL import Image

    if isinstance(image, Image.Image):
        return rgb_of(image)
    raise TypeError(
        f"image is a {type(image).__name__}, expected a PIL image, an array, a path or bytes"
    )


def resized(image: np.ndarray, height: int, width: int, resampling: str) -> np.ndarray:
    """uint8 [H, W, 3] of another size, by one of Pillow's `Image.Resampling`."""
    if image.shape[:2] == (height, width):
        return image
    from PIL import Image

    filtered = Image.fromarray(image).resize((width, height), Image.Resampling[resampling])
    return np.asarray(filtered)


def frame_seconds(side: Side) -> list[float]:
    """The time of each frame of a side's video; ValueError for what are no times, one per frame."""
    count = len(side.video)
    seconds: list[float] = []
    for at in side.frame_seconds:
        try:
            seconds.append(float(at))
        except (TypeError, ValueError, OverflowError):
            seconds.append(math.nan)
        if not abs(seconds[-1]) < LATEST:
            raise ValueError(f"frame_seconds has {at!r:.60}, expected seconds below {LATEST}")
    seconds = seconds or [i / FRAMES_PER_SECOND for i in range(count)]
    if len(seconds) != count:
        raise ValueError(
            f"a side has {count} frames and {len(seconds)} frame_seconds, expected as many or none"
        )
    return seconds


def estimate_tokens(value: Any, processor: Any) -> int:
    """About how many tokens an input takes, from headers alone; 0 where that cannot be told."""
    try:
        side = as_side(value)
        frames = FRAMES if _of_file(side) else len(side.video)
        seen = 0
        if processor.image_processor is not None:
            pixels = [_pixels(image) for image in side.images]
            seen = processor.image_processor.estimate(pixels, frames)
        return seen + len(side.text)
    except Exception:  # reading it will say what is wrong
        return 0


def _pixels(image: Any) -> int:
    if isinstance(image, np.ndarray):
        return image.shape[0] * image.shape[1]
    if isinstance(image, Page):
        return NOMINAL
    if isinstance(image, str | bytes | Path):
        with opened(image) as read:
            return read.width * read.height
    return image.width * image.height
