"""Odd videos: see odd_files.py."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from odd_files import Odd, Plays, Refused, Says

TICK = Fraction(1, 1000)
RATE = 10


def numbered(count: int) -> list[np.ndarray]:
    """Frames [48, 64, 3] that tell their number by two greys, and what is up by a white band."""
    frames = []
    for number in range(count):
        frame = np.full((48, 64, 3), 255, np.uint8)
        frame[16:, :32], frame[16:, 32:] = 16 * (number // 16), 16 * (number % 16)
        frame[16:24, :8] = 128
        frames.append(frame)
    return frames


def steady(count: int) -> list[float]:
    return [n / RATE for n in range(count)]


def film(
    form: str,
    codec: str,
    seconds: Sequence[float],
    pixels: str = "yuv420p",
    *,
    tick: Fraction = TICK,
    start: float = 0.0,
    options: dict[str, str] | None = None,
    muxer: dict[str, str] | None = None,
    sound: bool = False,
) -> bytes:
    """A file of so many numbered frames, at these seconds."""
    import av

    av.logging.set_level(av.logging.PANIC)
    out = io.BytesIO()
    with av.open(out, "w", format=form, options=muxer or {}) as container:
        stream: Any = container.add_stream(codec, rate=RATE, options=options or {})
        stream.width, stream.height, stream.pix_fmt = 64, 48, pixels
        stream.codec_context.time_base = tick
        stream.bit_rate = 2_000_000
        stream.codec_context.thread_count = 1
        other: Any = container.add_stream("aac", rate=44100) if sound else None
        for pixels_of, at in zip(numbered(len(seconds)), seconds, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels_of, format="rgb24")
            frame.pts, frame.time_base = round((at + start) / tick), tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if other is not None:
            container.mux(other.encode(_silence()))
            container.mux(other.encode(None))
    return out.getvalue()


def _silence() -> Any:
    import av

    frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
    frame.sample_rate = 44100
    return frame


def sound(form: str, codec: str = "aac") -> bytes:
    """A file of silence alone."""
    import av

    out = io.BytesIO()
    with av.open(out, "w", format=form, options={"id3v2_version": "0"}) as container:
        stream: Any = container.add_stream(codec, rate=44100)
        stream.layout = "mono"
        for _ in range(20):
            container.mux(stream.encode(_silence()))
        container.mux(stream.encode(None))
    return out.getvalue()


def covered_song() -> bytes:
    """An MP3 with a picture as its cover, in the tag before the sound."""
    from PIL import Image

    cover = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(cover, "PNG")
    body = b"\0image/png\0\x03\0" + cover.getvalue()
    frame = b"APIC" + len(body).to_bytes(4, "big") + b"\0\0" + body
    size = bytes(len(frame) >> shift & 127 for shift in (21, 14, 7, 0))
    return b"ID3\x03\0\0" + size + frame + sound("mp3", "libmp3lame")


def turned(made: bytes, a: int, b: int, c: int, d: int) -> bytes:
    """An MP4 with another display matrix: x' = a x + c y, y' = b x + d y."""
    at = made.index(b"tkhd") + 44
    cells = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
    matrix = b"".join(cell.to_bytes(4, "big", signed=True) for cell in cells)
    return made[:at] + matrix + made[at + 36 :]


def plays(
    seconds: Sequence[float],
    end: float | None = None,
    turn: Callable[[np.ndarray], np.ndarray] = np.asarray,
    note: str = "",
    known: int | None = None,
) -> Plays:
    """The numbered frames at these seconds, of which the file holds the first `known`."""
    frames = [turn(frame) for frame in numbered(len(seconds))][:known]
    seconds = seconds[:known]
    return Plays(frames, seconds, seconds[-1] + 1 / RATE if end is None else end, note=note)


def videos() -> Iterator[Odd]:
    twenty = steady(20)
    made = film("mp4", "libx264", twenty)
    yield Odd("plain.mp4", "H.264", made, plays(twenty))
    for name, matrix, turn, note in (
        ("turned-90.mp4", (0, 1, -1, 0), lambda x: np.rot90(x, -1), "turned right"),
        ("turned-180.mp4", (-1, 0, 0, -1), lambda x: np.rot90(x, 2), "upside down"),
        ("turned-270.mp4", (0, -1, 1, 0), np.rot90, "turned left"),
        ("mirrored.mp4", (-1, 0, 0, 1), lambda x: x[:, ::-1], "mirrored"),
        ("flipped.mp4", (1, 0, 0, -1), lambda x: x[::-1], "flipped"),
        ("transposed.mp4", (0, 1, 1, 0), lambda x: x.transpose(1, 0, 2), "transposed"),
    ):
        said = plays(twenty, turn=turn, note=note)
        yield Odd(name, "a display matrix", turned(made, *matrix), said)
    live = film("matroska", "libx264", twenty, muxer={"live": "1"})
    yield Odd("live.mkv", "a recording that stores no duration", live, plays(twenty))
    fragments = {"movflags": "frag_keyframe+empty_moov"}
    late = film("matroska", "libx264", twenty, start=100)
    yield Odd("late.mkv", "times that start at 100 s", late, plays(twenty))
    made_late = film("mp4", "libx264", twenty, start=3)
    yield Odd("late.mp4", "times that start at 3 s", made_late, plays(twenty))
    pieces = film("mp4", "libx264", twenty, muxer=fragments)
    yield Odd("fragments.mp4", "in fragments, as streams are", pieces, plays(twenty))
    uneven = [0, 0.1, 0.2, 0.3, 5, 5.1, 9, 9.5, 9.6, 9.7]
    for form, name in (("matroska", "uneven.mkv"), ("mp4", "uneven.mp4")):
        made_uneven = film(form, "libx264", uneven)
        yield Odd(name, "an uneven frame rate", made_uneven, plays(uneven, 9.8))
    still = [0.0, 10.0, 20.0, 30.0]
    slides = film("matroska", "libx264", still)
    yield Odd("slides.mkv", "a slide in 10 s", slides, plays(still))
    none = Refused("it holds audio, no moving pictures")
    yield Odd("sound.mp4", "sound alone", sound("mp4"), none)
    yield Odd("sound.mkv", "sound alone", sound("matroska"), none)
    covered = Refused("it holds audio and a still cover, no moving pictures")
    yield Odd("song.mp4", "an MP3 with a cover", covered_song(), covered)
    both = film("mp4", "libx264", twenty, sound=True)
    yield Odd("both.mp4", "with sound", both, plays(twenty))
    quiet = {"x265-params": "log-level=none:pools=none:frame-threads=1"}
    for name, form, codec, pixels, what in (
        ("deep.mp4", "mp4", "libx264", "yuv420p10le", "10 bits, H.264"),
        ("deep.mkv", "matroska", "libx265", "yuv420p10le", "10 bits, H.265"),
        ("full.mkv", "matroska", "libx264", "yuv444p", "colours of full size"),
        ("lossless.mkv", "matroska", "ffv1", "bgr0", "RGB"),
        ("deep.mov", "mov", "prores_ks", "yuv422p10le", "10 bits, ProRes"),
        ("clip.webm", "webm", "libvpx-vp9", "yuv420p", "VP9"),
    ):
        options = quiet if codec == "libx265" else {}
        made_deep = film(form, codec, twenty, pixels, options=options)
        yield Odd(name, what, made_deep, plays(twenty))
    fixed = Fraction(1, RATE)
    fives = [n / 25 for n in range(20)]
    for name, form, codec in (
        ("clip.avi", "avi", "mpeg4"),
        ("clip.wmv", "asf", "wmv2"),
        ("clip.flv", "flv", "flv"),
        ("camera.avi", "avi", "mjpeg"),
        ("clip.3gp", "3gp", "mpeg4"),
    ):
        pixels = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        yield Odd(name, codec, film(form, codec, twenty, pixels, tick=fixed), plays(twenty))
    dvd = film("mpeg", "mpeg2video", fives, tick=Fraction(1, 25))
    yield Odd("clip.mpg", "MPEG-2", dvd, plays(fives, 0.8))
    stream = film("mpegts", "libx264", twenty)
    yield Odd("stream.ts", "a transport stream", stream, plays(twenty))
    many = steady(250)
    hours = film("mpegts", "libx264", many, start=100, options={"g": "50"})
    yield Odd("long.ts", "key frames each 5 s, times that start late", hours, plays(many))
    disc = film("mpegts", "libx264", twenty, muxer={"mpegts_m2ts_mode": "1"})
    yield Odd("camera.m2ts", "of a camera", disc, plays(twenty))
    code = "export const x: number = 1;\n"
    yield Odd("program.ts", "TypeScript", code.encode(), Says(code))
    yield Odd("one.mp4", "one frame", film("mp4", "libx264", [0]), plays([0.0]))
    yield Odd("three.mp4", "three frames", film("mp4", "libx264", steady(3)), plays(steady(3)))
    keys = film("mp4", "libx264", many, options={"g": "250", "sc_threshold": "0"})
    yield Odd("long.mp4", "250 frames, one of them a key frame", keys, plays(many))
    cut = made[: len(made) * 2 // 3]
    yield Odd("cut.mp4", "cut off, its directory is gone", cut, Refused("cannot be read"))
    yield Odd("empty.mp4", "no byte", b"", Refused("cannot be read"))
    yield Odd("page.mp4", "a page that says 404", b"<html>404</html>", Refused("cannot be read"))
    made = film("matroska", "libx264", many)
    for name, cut, lost in (
        ("cut.mkv", made[: len(made) * 2 // 3], 0),
        ("cut.ts", hours[: len(hours) // 2], 2),  # frames whose packets begin, as its times say
    ):
        what, count = "cut off; what is there is read", decodable(cut)
        yield Odd(name, what, cut, plays(many, (count + lost) / RATE, known=count))
    yield Odd("named.mp4", "Matroska by another name", live, plays(twenty))


def decodable(made: bytes) -> int:
    """How many frames a decoder of all of a file gets."""
    import av

    count = 0
    with av.open(io.BytesIO(made)) as container, contextlib.suppress(av.FFmpegError):
        for _ in container.decode(video=0):
            count += 1
    return count
