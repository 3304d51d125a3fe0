"""What a user has becomes a `Side`: texts, pictures, files, and videos through PyAV."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from btok.data.records import Side

TEXTS = (".txt", ".md")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
VIDEOS = (".mp4", ".mkv", ".webm", ".mov", ".avi")
KINDS = TEXTS + IMAGES + VIDEOS  # what is looked for in a folder
CHARACTERS = 8192  # that are read of a text file
FRAMES = 8  # that are read of a video file
FRAMES_PER_SECOND = 2.0  # of a video that does not say: the rate the checkpoints' own sampling has


def as_side(value: Any, instruction: str | None = None) -> Side:
    """The side an input stands for; only a text file is read yet.

    Args:
        value: a `Side`; a str, always a text; a `Path`, by its ending a text file (its first
            8,192 characters), a video or an image; an image as bytes of a file, a PIL image or a
            uint8 array [height, width, 3]; or a list of images.
        instruction: put before the text, a space between the two unless it ends in white space.

    Raises:
        OSError: a text file that cannot be opened.
    """
    if isinstance(value, str):
        value = Side(value)
    elif isinstance(value, Path) and value.suffix.lower() in TEXTS:
        with open(value, encoding="utf-8", errors="replace") as file:
            value = Side(file.read(CHARACTERS))
    elif isinstance(value, Path) and value.suffix.lower() in VIDEOS:
        value = Side(video=value)
    elif not isinstance(value, Side):
        value = Side(images=value if isinstance(value, list | tuple) else [value])
    if instruction:
        gap = " " if value.text and not instruction[-1].isspace() else ""
        value = replace(value, text=instruction + gap + value.text)
    return value


def with_frames(side: Side) -> Side:
    """The side with a video file read; ValueError where there is nothing to embed."""
    if isinstance(side.video, str | Path):
        frames, seconds = read_video(side.video)
        side = replace(side, video=frames, frame_seconds=seconds)
    if not side.text.strip() and not len(side.images) and not len(side.video):
        raise ValueError("it is empty, expected a text, an image or a frame")
    return side


def read_video(path: str | Path, frames: int = FRAMES) -> tuple[list[np.ndarray], list[float]]:
    """At most so many frames, uint8 [height, width, 3], evenly over a video's time; their seconds.

    Raises:
        ImportError: PyAV is missing (the extra `video`).
        ValueError: a file that is no readable video.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError('video files need PyAV: pip install "btok[video]"') from error
    found: dict[float, np.ndarray] = {}  # by seconds
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            tick = float(stream.time_base or 1e-6)  # seconds
            length = (stream.duration or 0) * tick or (container.duration or 0) / 1_000_000
            start = (stream.start_time or 0) * tick
            for i in range(frames):
                until = start + length * (i + 0.5) / frames
                container.seek(int(until / tick), stream=stream)  # a key frame before
                shown = None
                for frame in container.decode(stream):
                    if shown is not None and frame.time is not None and frame.time > until:
                        break
                    shown = frame
                at = 0.0 if shown is None or shown.time is None else shown.time - start
                if shown is not None and at not in found:
                    found[at] = shown.to_ndarray(format="rgb24")
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(f"video {path} cannot be read: {error}") from error
    if not found:
        raise ValueError(f"video {path} has no frame that can be read")
    return list(found.values()), list(found)


def rgb_array(image: Any) -> np.ndarray:
    """A PIL image, a path, a file's bytes or a uint8 array [height, width, 3] as such an array.

    TypeError for another array or type; ValueError for what is no readable image.
    """
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise TypeError(
                f"image is an array {image.dtype} {list(image.shape)}, expected uint8 [H, W, 3]"
            )
        return image
    from PIL import Image, UnidentifiedImageError

    if isinstance(image, str | bytes | Path):
        name = f"of {len(image)} bytes" if isinstance(image, bytes) else str(image)
        try:
            with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
                return np.asarray(opened.convert("RGB"))
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            unknown = isinstance(error, UnidentifiedImageError)  # its text may hold an address
            why = "it is of no known format" if unknown else error
            raise ValueError(f"image {name} cannot be read: {why}") from error
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
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
    """The time of each frame of a side's video; ValueError for times that are not one per frame."""
    count = len(side.video)
    seconds = [float(at) for at in side.frame_seconds]
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
        frames = FRAMES if isinstance(side.video, str | Path) else len(side.video)
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
    if isinstance(image, str | bytes | Path):
        from PIL import Image

        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            return opened.width * opened.height
    return image.width * image.height
