"""The real files that `fuzz.py` damages, a folder of them for each case."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import av
import datasets
import docx
import numpy as np
from helpers import TINY, tiny_checkpoint, tiny_module
from PIL import Image
from pillow_heif import register_heif_opener

from btok import BTokEncoder
from btok.tools.cli import main
from btok.tools.encode import encode_to

TURNED = Image.Exif()
TURNED[0x0112] = 6  # orientation
PDF = [
    "<< /Type /Catalog /Pages 2 0 R >>",
    "<< /Type /Pages /Kids [3 0 R 3 0 R] /Count 2 >>",
    "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 90 60] /Contents 4 0 R "
    "/Resources << /Font << /F 5 0 R >> >> >>",
    "<< /Length 66 >> stream\nBT /F 18 Tf 9 9 Td (Seven) Tj ET 1 0 0 rg 9 30 m 50 50 l 60 9 l f\n"
    "endstream",
    "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
]
HTML = '<html><head><meta charset="latin-1"><title>T</title><style>p {}</style></head><body><h1>A'
HTML += "</h1><table><tr><td>1</td><td>&eacute;</td></tr></table><p>text<br>more</body></html>"
JSON = {"a": [1, -2.5e3, None, True], "text": "häuser \u2603 \ud83d\ude00", "b": {"c": {"d": []}}}
# ending -> codec, pixel format
VIDEOS = {"mp4": ("h264", "yuv420p"), "mkv": ("mpeg4", "yuv420p"), "avi": ("mjpeg", "yuvj420p")}
VIDEOS |= {"webm": ("libvpx-vp9", "yuv420p"), "ts": ("mpeg2video", "yuv420p")}
VIDEOS |= {"mov": ("mpeg4", "yuv420p"), "flv": ("flv", "yuv420p"), "wmv": ("wmv2", "yuv420p")}


def noise(height: int = 24, width: int = 40, seed: int = 0, channels: int = 3) -> np.ndarray:
    shape = (height // 8, width // 8, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8).repeat(8, 0).repeat(8, 1)


def image(kind: str, mode: str = "RGB", frames: int = 1, **settings: Any) -> bytes:
    pictures = [Image.fromarray(noise(seed=i)).convert(mode) for i in range(frames)]
    if frames > 1:
        settings |= {"save_all": True, "append_images": pictures[1:], "duration": 100}
    pictures[0].save(out := io.BytesIO(), kind, **settings)
    return out.getvalue()


def video(ending: str, codec: str, pixels: str) -> bytes:
    out = io.BytesIO()
    form = {"ts": "mpegts", "mkv": "matroska", "wmv": "asf"}.get(ending, ending)
    with av.open(out, "w", format=form) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 48, 32, pixels, 5
        for i in range(12):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise(32, 48, i))))
        container.mux(stream.encode())
    return out.getvalue()


def pdf() -> bytes:
    out, places = b"%PDF-1.4\n", []
    for number, said in enumerate(PDF, 1):
        places.append(len(out))
        out += f"{number} 0 obj {said} endobj\n".encode()
    start = len(out)
    out += f"xref\n0 {len(PDF) + 1}\n0000000000 65535 f \n".encode()
    out += b"".join(b"%010d 00000 n \n" % place for place in places)
    out += b"trailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % (len(PDF) + 1, start)
    return out


def word() -> bytes:
    document = docx.Document()
    document.add_paragraph("A text")
    table = document.add_table(2, 2)
    table.cell(0, 0).text, table.cell(1, 1).text = "one", "two"
    document.save(out := io.BytesIO())
    return out.getvalue()


def files() -> dict[str, bytes]:
    """A file of each kind that is read, by a name of which the ending counts."""
    register_heif_opener()
    made = {f"{ending}.{ending}": video(ending, *how) for ending, how in VIDEOS.items()}
    grey = Image.fromarray(np.arange(960, dtype=np.uint16).reshape(24, 40) * 64)
    grey.save(deep := io.BytesIO(), "TIFF")
    grey.save(deep_png := io.BytesIO(), "PNG")
    Image.fromarray(noise().astype(np.float32)[..., 0]).save(floats := io.BytesIO(), "TIFF")
    return made | {
        "rgb.png": image("PNG"),
        "rgba.png": image("PNG", "RGBA", exif=TURNED),
        "palette.png": image("PNG", "P", transparency=0),
        "deep.png": deep_png.getvalue(),
        "moving.apng": image("PNG", frames=3),
        "turned.jpg": image("JPEG", exif=TURNED),
        "progressive.jpeg": image("JPEG", "CMYK", progressive=True),
        "still.gif": image("GIF", "P"),
        "moving.gif": image("GIF", "P", frames=3),
        "still.webp": image("WEBP"),
        "moving.webp": image("WEBP", "RGBA", frames=3),
        "still.avif": image("AVIF"),
        "moving.avif": image("AVIF", frames=3),
        "a.heic": image("HEIF"),
        "pages.tiff": image("TIFF", frames=3),
        "one.tif": image("TIFF", compression="tiff_lzw"),
        "jpeg.tif": image("TIFF", compression="jpeg"),
        "deep.tif": deep.getvalue(),
        "floats.tif": floats.getvalue(),
        "a.bmp": image("BMP"),
        "palette.bmp": image("BMP", "P"),
        "a.ppm": image("PPM"),
        "a.pgm": image("PPM", "L"),
        "a.jp2": image("JPEG2000"),
        "drawn.pdf": pdf(),
        "one.pdf": image("PDF"),
        "a.docx": word(),
        "a.html": HTML.encode("latin-1"),
        "a.json": json.dumps(JSON).encode(),
        "utf16.txt": "Ein Text, häuser\n".encode("utf-16"),
        "latin.txt": ("Die Häuser am Fluß, schön für müde Gäste. " * 9).encode("latin-1"),
        "utf8.md": "# Häuser\n\nein Text ☃".encode(),
        "a.csv": b'a,b\n1,"x, y"\n-2.5,nan\n',
        "code.ts": b"export const a = 1;\n",
    }


def rows(made: dict[str, bytes]) -> tuple[list[Any], dict[str, bytes]]:
    """Rows of training pairs, and the files that they name."""
    named = {name: made[name] for name in ("rgb.png", "turned.jpg", "mp4.mp4")}
    named |= {"clip/1.png": made["rgb.png"], "clip/2.jpg": made["turned.jpg"]}
    side = {"text": "t", "images": ["rgb.png"], "video": [], "frame_seconds": []}
    frames = {"text": "", "images": [], "video": ["rgb.png"] * 2, "frame_seconds": [0.0, 0.5]}
    return [
        {"query": "q", "positive": side, "negatives": ["n"], "target": "t", "positive_id": "1"},
        {"query": {"images": ["turned.jpg"]}, "positive": frames, "negatives": [side]},
        {"query": {"video": "mp4.mp4"}, "positive": {"video": "clip"}, "negatives": ["m"]},
    ], named


def table(picture: bytes) -> bytes:
    stored = {"bytes": picture, "path": "rgb.png"}
    side = {"text": "t", "images": [stored], "video": None, "frame_seconds": []}
    frames = {"text": "", "images": [], "video": [stored, stored], "frame_seconds": [0.0, 0.5]}
    pairs = [{"query": "q", "positive": each, "negatives": ["n"]} for each in (side, frames)]
    datasets.disable_progress_bar()
    datasets.Dataset.from_list(pairs).to_parquet(out := io.BytesIO())
    return out.getvalue()


def checkpoints(folder: Path) -> None:
    """What the processor of each family is read from."""
    for family in TINY:
        tiny_module(family)[1].save_pretrained(folder / family)
        config = {"model_type": family, "scale_factor": 2, "vision_config": {"patch_size": 4}}
        (folder / family / "config.json").write_text(json.dumps(config))


def make(seeds: Path, checkpoint: Path) -> None:
    """Cases below `seeds`, a folder for each in one for each target; a tiny model."""

    def case(target: str, number: int, content: dict[str, bytes]) -> None:
        for name, data in content.items():
            path = seeds / target / str(number) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

    made = files()
    for i, (name, data) in enumerate(made.items()):
        case("file", i, {name: data})
        if name.endswith((".pdf", ".tif", ".tiff")):
            case("pages", i, {name: data})
    pairs, named = rows(made)
    lines = [json.dumps(row).encode() for row in pairs]
    case("rows", 0, {"rows.jsonl": b"\n".join(lines), **named})
    for i, line in enumerate(lines, 1):
        case("rows", i, {"rows.jsonl": line + b"\n", **named})
    case("rows", 9, {"rows.parquet": table(made["rgb.png"])})
    checkpoints(seeds / "checkpoint")
    for i in range(8):
        case("side", i, {"number.bin": bytes([i] * 4)})
    encoder = BTokEncoder.from_pretrained(tiny_checkpoint(checkpoint))
    for i, count in enumerate((1, 7)):
        texts = [f"text {j}" for j in range(count)]
        encode_to(encoder, seeds / "index" / str(i), texts, texts)
    shutil.copytree(seeds / "index/1", seeds / "index/2")
    encode_to(encoder, seeds / "index/2", [*texts[1:], "more", ""], [*texts[1:], "more", "bad"])
    good = {"good.txt": b"a text", "good.png": made["rgb.png"]}
    names = ["moving.gif", "pages.tiff", "mp4.mp4", "a.docx", "a.json", "drawn.pdf", "turned.jpg"]
    for i in range(0, len(names), 2):
        case("cli", i, good | {name: made[name] for name in names[i : i + 3]})
    case("cli", 9, good)
    assert main(["encode", str(checkpoint), str(seeds / "cli/9")]) == 0  # its index is damaged
