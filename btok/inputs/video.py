"""Video files through PyAV: frames evenly over the time, upright, with their true times."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from btok.extras import needed
from btok.files import one_line, printable

OTHERS = (".3gp", ".ogv", ".m2ts", ".mts", ".ts")
VIDEOS = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", *OTHERS)
LISTS = ("concat", "hls", "dash", "image2", "ffmetadata")  # of FFmpeg's: they name other files
FRAMES = 8  # that are read of a video file
STEPS_BACK = (0.0, 3.0, 12.0, 48.0)  # seconds before a time, from where a key frame is looked for
PACKET = 188  # bytes of an MPEG transport stream's packets, each of which starts with "G"


@dataclass(frozen=True)
class Clip:
    """A part of a video file, which is read as if it had been cut out.

    Args:
        path: the video's file.
        start, end: in seconds from its first frame.
    """

    path: Path
    start: float
    end: float

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end < math.inf:
            raise ValueError(
                f"a clip is of seconds {self.start} to {self.end}, expected 0 <= start < end"
            )

    def __str__(self) -> str:
        return f"{self.path}, seconds {self.start:g} to {self.end:g}"


def is_video(path: Path) -> bool:
    """Whether a file is a video by its ending; of .ts and .mts, which programs' texts have too, by
    its content.
    """
    kind = path.suffix.lower()
    return kind in VIDEOS and (kind not in (".ts", ".mts") or _is_transport_stream(path))


def _is_transport_stream(path: Path) -> bool:
    with open(path, "rb") as file:
        start = file.read(2 * PACKET + 8)
    # cameras put four bytes before each packet
    return start[: 2 * PACKET : PACKET] == b"GG" or start[4 :: PACKET + 4][:2] == b"GG"


def duration(path: str | Path) -> float | None:
    """Seconds from a video's first frame to the end of its last; None where its frames have no
    times. Raises what `read_video` does.
    """
    with _opened(path) as (container, stream):
        if not _has_times(container, stream):
            return None
        start, end = _span(container, stream)
        return end - start


def cut(length: float, most: float) -> list[tuple[float, float]]:
    """Starts and ends, in seconds, of as few equal parts of a length as are at most so long."""
    length = max(round(length, 3), 0.001)
    count = max(1, math.ceil(length / most - 1e-6))
    return list(pairwise(round(length * i / count, 3) for i in range(count + 1)))


def read_video(
    path: str | Path | Clip, frames: int = FRAMES
) -> tuple[list[np.ndarray], list[float]]:
    """Read at most `frames` frames, uint8 [height, width, 3], evenly over a video's time, or a
    clip's, and their seconds.

    The time is cut into equal parts, and what is shown in the middle of each is taken, once. A
    frame is turned as the file's display matrix says. Seconds count from the first frame, or the
    clip's start.

    Raises:
        ImportError: PyAV is missing (the extra `video`).
        ValueError: a file that is no readable video, or holds sound alone; a clip of one whose
            frames have no times, or that ends before.
    """
    if isinstance(path, Clip):
        return _read_clip(path, frames)
    with _opened(path) as (container, stream):
        found: dict[float, np.ndarray] = {}
        if _has_times(container, stream):
            start, end = _span(container, stream)
            found = _at(container, stream, start, end, frames)
            if len(found) < frames:  # a short video, or one shorter than its file says
                start, end = _scanned_span(container, stream, end)
                found = _at(container, stream, start, end, frames)
        return _in_order(found or _counted(path, frames))


def _read_clip(clip: Clip, frames: int) -> tuple[list[np.ndarray], list[float]]:
    with _opened(clip.path) as (container, stream):
        if not _has_times(container, stream):
            raise ValueError("its frames have no times to cut at")
        start, last = _span(container, stream)
        if start + clip.start >= last:
            raise ValueError(f"it ends at {last - start:g} seconds, a clip of it at {clip.start:g}")
        first, end = start + clip.start, min(start + clip.end, last)
        return _in_order(_at(container, stream, first, end, frames))


def _in_order(found: dict[float, np.ndarray]) -> tuple[list[np.ndarray], list[float]]:
    """Frames and their seconds; of a damaged stream a later look may come out earlier."""
    if not found:
        raise ValueError("it has no frame")
    found = dict(sorted(found.items()))
    return list(found.values()), list(found)


@contextmanager
def _opened(path: str | Path) -> Iterator[tuple[Any, Any]]:
    """A video's container and its moving pictures; what is wrong in the block, too, names it."""
    with needed("video files", "PyAV", "video"):
        import av
    try:
        with av.open(os.path.abspath(path)) as container:  # "10:30.mp4" would be of a protocol 10
            if container.format.name in LISTS or container.format.name.endswith("_pipe"):
                raise ValueError(f"it is a {container.format.name}, expected a video")
            yield container, _moving(container)
    except (av.FFmpegError, ValueError) as error:
        raise ValueError(f"video {printable(path)} cannot be read: {one_line(error)}") from error


def _has_times(container: Any, stream: Any) -> bool:
    """Whether a stream's frames have times: AVI has none for frames stored in another order than
    they are shown in.
    """
    return container.format.name != "avi" or not stream.codec_context.has_b_frames


def _moving(container: Any) -> Any:
    """The stream of moving pictures; not the cover of a record."""
    streams = container.streams.video
    moving = [each for each in streams if not each.disposition & each.disposition.attached_pic]
    if not moving:
        kinds = sorted({each.type for each in container.streams if each not in streams})
        cover = ["a still cover"] if streams else []
        raise ValueError(f"it holds {' and '.join(kinds + cover) or 'nothing'}, no moving pictures")
    if not (moving := [each for each in moving if each.codec_context is not None]):
        raise ValueError("its pictures are in a codec that PyAV does not know")
    first = moving[0].disposition.default  # of several the one that players show
    return max(moving, key=lambda s: (bool(s.disposition & first), s.width * s.height))


def _span(container: Any, stream: Any) -> tuple[float, float]:
    """The start and end of a stream in seconds, as its file says, or else by its packets."""
    return _stored_span(container, stream) or _scanned_span(container, stream)


def _stored_span(container: Any, stream: Any) -> tuple[float, float] | None:
    """The start and end of a stream in seconds that its file states; None where it does not."""
    tick = float(stream.time_base or 1e-6)
    length = (stream.duration or 0) * tick or (container.duration or 0) / 1_000_000
    start = (stream.start_time or 0) * tick
    return (start, start + length) if length > 0 else None


def _scanned_span(container: Any, stream: Any, said: float = 0.0) -> tuple[float, float]:
    """The start and end of a stream in seconds by its packets, none of which is decoded; at what
    its file said, if that lies within what is shown last.
    """
    container.seek(0)
    tick = float(stream.time_base or 1e-6)
    gap = int(1 / (stream.average_rate or 25) / tick)  # ticks of a packet that does not say
    first, last = [], []
    for packet in _to_the_end(container.demux(stream)):
        at = packet.pts if packet.pts is not None else packet.dts
        if at is not None and packet.size:
            first.append(at)
            last.append(at + (packet.duration or gap))
    start, latest, end = (
        most(at, default=0) * tick for most, at in ((min, first), (max, first), (max, last))
    )
    # a packet lasts until the next one stored, which may not be the next one shown
    return start, min(end, said) if said > latest else end


def _at(
    container: Any, stream: Any, start: float, end: float, frames: int
) -> dict[float, np.ndarray]:
    """The frames shown in the middle of so many parts of a span, by seconds from its start."""
    import av

    found: dict[float, np.ndarray] = {}
    for i in range(frames):
        until = start + (end - start) * (i + 0.5) / frames
        after = broken = None
        try:
            # where a file has no list of key frames, as of .ts, one after the time may be found, or
            # none: what is decoded without one is grey, and a last resort
            for back in STEPS_BACK:
                frame, complete = _shown(container, stream, until - back, until)
                if frame is not None and frame.time > until:
                    after = frame
                elif complete:
                    break
                else:
                    broken = frame or broken
            else:  # behind the end of a file that was cut off there may be hours to decode in vain
                frame = broken or after
                if frame is not None or until - start < STEPS_BACK[-1]:
                    frame, _ = _shown(container, stream, None, until)
        except av.FFmpegError:  # a damaged part: others may be whole
            continue
        if frame is not None and (at := max(frame.time - start, 0.0)) not in found:
            found[at] = _upright(frame, stream)
    return found


def _shown(container: Any, stream: Any, seek: float | None, until: float) -> tuple[Any, bool]:
    """The last frame of a time up to `until`, or the first; looked for from `seek` on, or from the
    file's beginning. And whether a key frame was before it, or it is one.
    """
    if seek is None:
        container.seek(0)
    else:
        container.seek(int(seek / float(stream.time_base or 1e-6)), stream=stream)
    shown, complete = None, False
    for frame in _to_the_end(container.decode(stream)):
        if frame.time is None:
            continue
        if shown is not None and frame.time > until:
            break
        shown, complete = frame, complete or frame.key_frame
    return shown, complete


def _counted(path: str | Path, frames: int) -> dict[float, np.ndarray]:
    """Frames of a video whose times are not stored, by their number and rate; all are decoded."""
    import av

    with av.open(os.path.abspath(path)) as container:
        stream = _moving(container)
        rate = float(stream.average_rate or 25)
        count = sum(packet.size > 0 for packet in _to_the_end(container.demux(stream)))
    wanted = {int(count * (i + 0.5) / frames) for i in range(frames)}
    with av.open(os.path.abspath(path)) as container:
        stream = _moving(container)
        shown = enumerate(_to_the_end(container.decode(stream)))
        return {n / rate: _upright(frame, stream) for n, frame in shown if n in wanted}


def _to_the_end(items: Iterator[Any]) -> Iterator[Any]:
    """Yield packets or frames to the end; PyAV may end on an IndexError where a file has streams
    that begin late.
    """
    with suppress(IndexError):
        yield from items


def _upright(frame: Any, stream: Any) -> np.ndarray:
    """A frame as its display matrix has it shown, uint8 [height, width, 3]."""
    width, height, shape = frame.width, frame.height, stream.sample_aspect_ratio or 1
    if 0.1 < shape < 10 and shape != 1:  # pixels that are no squares, as of a DVD
        width, height = round(width * max(shape, 1)), round(height / min(shape, 1))
    pixels = frame.reformat(width, height, "rgb24").to_ndarray()
    if (side := frame.side_data.get("DISPLAYMATRIX")) is None:
        return pixels
    # x' = a x + c y and y' = b x + d y, in 1 / 65,536
    a, b, _, c, d, *_ = np.frombuffer(bytes(side), np.int32)
    if abs(int(b)) > abs(int(a)):
        pixels, a, d = pixels.transpose(1, 0, 2), c, b
    return np.ascontiguousarray(pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])
