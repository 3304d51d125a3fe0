"""Odd pictures and animations: see odd_files.py."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from odd_files import Odd, Plays, Refused, Shows
from PIL import Image, ImageCms

H, W = 24, 32
LOSSY = {"quality": 100, "subsampling": 0}
UNREADABLE = Refused("cannot be read")
UNKNOWN = Refused("it is of no known format")


def scene() -> np.ndarray:
    """uint8 [24, 32, 3], smooth, unlike itself however it is turned."""
    y, x = np.mgrid[:H, :W]
    return np.stack([x * 8, y * 10, (x + y) * 4], 2).astype(np.uint8)


def grey() -> np.ndarray:
    """float [24, 32] from 0 to 1."""
    return np.linspace(0, 1, H * W).reshape(H, W)


def three(values: np.ndarray) -> np.ndarray:
    """Greys of 0 .. 1 as a picture."""
    return np.repeat(np.round(values * 255).astype(np.uint8)[..., None], 3, 2)


def saved(image: Any, form: str, **options: Any) -> bytes:
    out = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(out, form, **options)
    return out.getvalue()


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """What is seen of a colour [H, W, 3] of opacities 0 .. 255 [H, W] before a white wall."""
    share = alpha[..., None] / 255
    return np.round(colour * share + 255 * (1 - share)).astype(np.uint8)


# orientation -> how the picture lies in the file
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: np.rot90(p, -1),
}


def pictures() -> Iterator[Odd]:
    yield from turned()
    yield from transparent()
    yield from deep()
    yield from colours()
    yield from formats()
    yield from broken()


def turned() -> Iterator[Odd]:
    for form, ending, options, within in (
        ("JPEG", "jpg", LOSSY, 4),
        ("PNG", "png", {}, 0),
        ("WEBP", "webp", {"lossless": True}, 0),
        ("TIFF", "tif", {}, 0),
    ):
        for number, stored in STORED.items():
            exif = Image.Exif()
            exif[0x0112] = number
            image = np.ascontiguousarray(stored(scene()))
            made = saved(image, form, exif=exif, **options)
            what = f"EXIF orientation {number}"
            yield Odd(f"exif-{number}.{ending}", what, made, Shows([scene()], within, "upright"))
    exif = Image.Exif()
    exif[0x0112] = 77
    made = saved(scene(), "JPEG", exif=exif, **LOSSY)
    yield Odd("exif-77.jpg", "an orientation that is none", made, Shows([scene()], 4))
    made = saved(scene(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff", **LOSSY)
    yield Odd("exif-cut.jpg", "EXIF that is damaged", made, Shows([scene()], 4))


def transparent() -> Iterator[Odd]:
    alpha = np.zeros((H, W), np.uint8)
    alpha[:, 16:] = 255
    alpha[:8] = 128
    seen = Shows([on_white(scene(), alpha)], 1, "on white")
    rgba = np.dstack([scene(), alpha])
    yield Odd("rgba.png", "transparent to the left, half so above", saved(rgba, "PNG"), seen)
    made = saved(rgba, "WEBP", lossless=True, exact=True)
    yield Odd("rgba.webp", "the same", made, seen)
    yield Odd("rgba.tif", "the same", saved(rgba, "TIFF"), seen)
    yield Odd("rgba.jp2", "the same", saved(rgba, "JPEG2000"), seen)
    made = saved(rgba, "AVIF", quality=100, subsampling="4:4:4")
    yield Odd("rgba.avif", "the same", made, Shows([on_white(scene(), alpha)], 8, "on white"))
    shade = np.full((H, W), 60, np.uint8)
    both = Image.merge("LA", [Image.fromarray(shade), Image.fromarray(alpha)])
    seen = Shows([on_white(np.repeat(shade[..., None], 3, 2), alpha)], 1, "on white")
    yield Odd("la.png", "grey and opacity", saved(both, "PNG"), seen)
    index = np.zeros((H, W), np.uint8)
    index[:, 20:] = 1
    palette = Image.fromarray(index, "P")
    palette.putpalette([10, 20, 30, 200, 100, 50])
    colour = np.where(index[..., None] == 1, (200, 100, 50), (255, 255, 255)).astype(np.uint8)
    seen = Shows([colour], 0, "on white")
    made = saved(palette, "PNG", transparency=0)
    yield Odd("palette.png", "a palette's colour is transparent", made, seen)
    made = saved(palette, "PNG", transparency=b"\x80\xff")
    half = np.where(index[..., None] == 1, (200, 100, 50), (132, 137, 142)).astype(np.uint8)
    yield Odd("palette-half.png", "half so", made, Shows([half], 1, "on white"))
    made = saved(palette, "GIF", transparency=0)
    yield Odd("palette.gif", "a GIF of one frame, transparent", made, seen)
    plain = np.where(index[..., None] == 1, scene(), 7).astype(np.uint8)
    made = saved(plain, "PNG", transparency=(7, 7, 7))
    keyed = np.where(index[..., None] == 1, scene(), 255).astype(np.uint8)
    yield Odd("key.png", "an RGB colour is transparent", made, Shows([keyed], 0, "on white"))
    shade = np.where(index == 1, 90, 7).astype(np.uint8)
    made = saved(shade, "PNG", transparency=7)
    keyed = np.repeat(np.where(index == 1, 90, 255).astype(np.uint8)[..., None], 3, 2)
    yield Odd("key-grey.png", "a grey is transparent", made, Shows([keyed], 0, "on white"))
    clear = np.dstack([scene(), np.zeros((H, W), np.uint8)])
    white = np.full((H, W, 3), 255, np.uint8)
    yield Odd("clear.png", "all of it is transparent", saved(clear, "PNG"), Shows([white]))


def tiff(values: np.ndarray, order: str = "<", kind: int | None = None) -> bytes:
    """An uncompressed grey TIFF of one strip; kind 1 unsigned, 2 signed, 3 float."""
    height, width = values.shape
    kind = kind or {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    pixels = values.astype(values.dtype.newbyteorder(order)).tobytes()
    fields = [(256, 4, width), (257, 4, height), (258, 3, values.itemsize * 8), (259, 3, 1)]
    fields += [(262, 3, 1), (273, 4, 8), (277, 3, 1), (278, 4, height), (279, 4, len(pixels))]
    fields += [(339, 3, kind)]
    out = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8 + len(pixels))
    out += pixels + struct.pack(f"{order}H", len(fields))
    for tag, size, value in fields:
        packed = struct.pack(f"{order}{'HI'[size == 4]}", value).ljust(4, b"\0")
        out += struct.pack(f"{order}HHI", tag, size, 1) + packed
    return out + bytes(4)


def png(width: int, height: int, depth: int, colour: int, rows: bytes, more: bytes = b"") -> bytes:
    """A PNG, by hand; `more` are chunks before the pixels."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = chunk(b"IHDR", head) + more + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + parts + chunk(b"IEND", b"")


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def deep() -> Iterator[Odd]:
    sixteen = np.round(grey() * 65535).astype(np.uint16)
    seen = Shows([three(grey())], 1, "scaled")
    yield Odd("deep.png", "greys of 16 bits", saved(Image.fromarray(sixteen), "PNG"), seen)
    yield Odd("deep-le.tif", "greys of 16 bits, low byte first", tiff(sixteen), seen)
    yield Odd("deep-be.tif", "high byte first", tiff(sixteen, ">"), seen)
    yield Odd("deep.pgm", "greys of 16 bits", saved(Image.fromarray(sixteen), "PPM"), seen)
    coloured = np.repeat(sixteen[..., None], 3, 2).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in coloured)
    made = png(W, H, 16, 2, rows)
    yield Odd("deep-rgb.png", "colours of 16 bits", made, seen)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in sixteen)
    made = png(W, H, 16, 0, rows, chunk(b"tRNS", b"\0\0"))
    keyed = three(grey())
    keyed[0, 0] = 255
    what = "greys of 16 bits, black is transparent"
    yield Odd("deep-key.png", what, made, Shows([keyed], 1, "scaled, on white"))
    whole = np.round(grey() * 65535).astype(np.int32)
    yield Odd("int.tif", "integers of 32 bits, to 65,535", tiff(whole), seen)
    eight = np.round(grey() * 255).astype(np.int32)
    yield Odd("int-8.tif", "integers of 32 bits, to 255", tiff(eight), seen)
    yield Odd("int-be.tif", "high byte first", tiff(whole, ">"), seen)
    wide = (grey() * 2e9 - 1e9).astype(np.int32)
    yield Odd("int-wide.tif", "from -1e9 to 1e9", tiff(wide), seen)
    wide = (grey() * 4e9).astype(np.uint32)
    yield Odd("uint-wide.tif", "unsigned, to 4e9", tiff(wide), seen)
    signed = (grey() * 60_000 - 30_000).astype(np.int16)
    yield Odd("short.tif", "integers of 16 bits, from -30,000", tiff(signed), seen)
    unit = grey().astype(np.float32)
    yield Odd("float.tif", "floats from 0 to 1", tiff(unit), seen)
    yield Odd("float-be.tif", "high byte first", tiff(unit, ">"), seen)
    yield Odd("float-255.tif", "floats from 0 to 255", tiff(unit * 255), seen)
    yield Odd("double.tif", "floats of 64 bits, which Pillow does not read", tiff(grey()), UNKNOWN)
    holes, seen_holes = unit.copy(), three(grey())
    holes[5, 5], holes[6, 6], holes[7, 7] = np.nan, np.inf, -np.inf
    seen_holes[5, 5], seen_holes[6, 6], seen_holes[7, 7] = 0, 255, 0
    yield Odd("nan.tif", "floats, one NaN, two infinite", tiff(holes), Shows([seen_holes], 1))
    nothing = np.full((H, W), np.nan, np.float32)
    black = np.zeros((H, W, 3), np.uint8)
    yield Odd("nan-all.tif", "NaN alone", tiff(nothing), Shows([black]))
    yield Odd("float-wide.tif", "floats from -300 to 9,000", tiff(unit * 9300 - 300), seen)


def colours() -> Iterator[Odd]:
    ink = np.dstack([255 - scene(), np.full((H, W), 40, np.uint8)])
    cmyk = Image.fromarray(ink, "CMYK")
    # what paper throws back: of each colour what neither its ink nor black takes
    paper = np.round(scene().astype(float) * (255 - 40) / 255).astype(np.uint8)
    seen = Shows([paper], 6)
    made = saved(cmyk, "JPEG", quality=100, subsampling=0)
    yield Odd("cmyk.jpg", "CMYK, inverted as Adobe has it", made, seen)
    yield Odd("cmyk.tif", "CMYK", saved(cmyk, "TIFF"), Shows([paper], 2))
    palette = Image.fromarray(scene()).quantize(16)
    colour = np.asarray(palette.convert("RGB"))
    yield Odd("colours.png", "a palette of 16", saved(palette, "PNG"), Shows([colour]))
    bits = np.zeros((H, W), np.uint8)
    bits[4:9, 3:20] = 255
    line = Image.fromarray(bits).convert("1")
    seen = Shows([np.repeat(bits[..., None], 3, 2)])
    yield Odd("bits.png", "1 bit", saved(line, "PNG"), seen)
    yield Odd("fax.tif", "1 bit, as a fax is", saved(line, "TIFF", compression="group4"), seen)
    yield Odd("bits.pbm", "1 bit", saved(line, "PPM"), seen)
    shade = np.round(grey() * 255).astype(np.uint8)
    yield Odd("grey.jpg", "greys", saved(shade, "JPEG", quality=100), Shows([three(grey())], 4))
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    muted = scene() // 4 + 90
    other = ImageCms.profileToProfile(Image.fromarray(muted), srgb, lab, outputMode="LAB")
    yield Odd("lab.tif", "CIE L*a*b*", saved(other, "TIFF"), Shows([muted], 12))
    made = saved(Image.fromarray(scene()).convert("YCbCr"), "TIFF")
    yield Odd("ycbcr.tif", "YCbCr", made, Shows([scene()], 3))


def formats() -> Iterator[Odd]:
    seen, near = Shows([scene()]), Shows([scene()], 6)
    jpeg = saved(scene(), "JPEG", **LOSSY)
    yield Odd("jpeg.png", "a JPEG by another name", jpeg, near)
    yield Odd("UPPER.JPG", "a name in upper case", jpeg, near)
    yield Odd("web.jfif", "a JPEG by a browser's name", jpeg, near)
    made = saved(scene(), "JPEG", progressive=True, **LOSSY)
    yield Odd("progressive.jpg", "progressive", made, near)
    made = saved(Image.fromarray(scene()), "MPO", save_all=True, **LOSSY)
    more = [Image.fromarray(255 - scene())]
    made = saved(Image.fromarray(scene()), "MPO", save_all=True, append_images=more, **LOSSY)
    yield Odd("phone.jpg", "a photo with a second one behind it", made, near)
    yield Odd("trailing.jpg", "a film behind the photo", jpeg + bytes(1000), near)
    from pillow_heif import register_heif_opener

    register_heif_opener()
    heic = saved(scene(), "HEIF", quality=100, chroma=444)
    near = Shows([scene()], 12)
    yield Odd("photo.heic", "HEIC", heic, near)
    yield Odd("heic.jpg", "HEIC, as telephones export it", heic, near)
    yield Odd("jpeg.heic", "a JPEG named .heic", jpeg, Shows([scene()], 6))
    made = saved(scene(), "AVIF", quality=100, subsampling="4:4:4")
    yield Odd("photo.avif", "AVIF", made, near)
    yield Odd("photo.jp2", "JPEG 2000", saved(scene(), "JPEG2000"), seen)
    yield Odd("photo.bmp", "BMP", saved(scene(), "BMP"), seen)
    yield Odd("photo.ppm", "PPM", saved(scene(), "PPM"), seen)
    yield Odd(
        "still.gif",
        "a GIF of one frame",
        saved(scene() // 255 * 255, "GIF"),
        Shows([scene() // 255 * 255]),
    )
    yield Odd("interlaced.png", "interlaced, by its end a text", _adam7(), Shows([scene()[:1, :1]]))
    dot = np.full((1, 1, 3), 77, np.uint8)
    yield Odd("dot.png", "1 x 1", saved(dot, "PNG"), Shows([dot]))
    rule = np.full((4, 800, 3), 77, np.uint8)
    yield Odd("rule.png", "200 times as wide as high", saved(rule, "PNG"), Shows([rule]))


def _adam7() -> bytes:
    head = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 1)
    pixel = b"\0" + scene()[0, 0].tobytes()
    parts = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(pixel))
    return b"\x89PNG\r\n\x1a\n" + parts + chunk(b"tEXt", b"a\0b") + chunk(b"IEND", b"")


def broken() -> Iterator[Odd]:
    noise = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)
    for form, name in (("JPEG", "cut.jpg"), ("PNG", "cut.png"), ("WEBP", "cut.webp")):
        made = saved(noise, form)
        yield Odd(name, "cut off in the middle", made[: len(made) // 2], UNREADABLE)
    yield Odd("cut.tif", "cut off", tiff(noise[..., 0].astype(np.uint16))[:400], UNREADABLE)
    yield Odd("empty.png", "no byte", b"", UNKNOWN)
    yield Odd("empty.jpg", "no byte", b"", UNKNOWN)
    yield Odd("text.png", "a text", b"this is no picture", UNKNOWN)
    yield Odd("page.jpg", "a page that says 404", b"<html>404</html>", UNKNOWN)
    made = png(60_000, 60_000, 8, 2, bytes(1000))
    yield Odd("bomb.png", "claims 60,000 x 60,000 pixels", made, UNREADABLE)
    thin = np.full((1, 201, 3), 77, np.uint8)
    thin_said = Refused("expected an aspect ratio up to 200")
    yield Odd("thin.png", "201 times as wide as high", saved(thin, "PNG"), thin_said)
    program = saved(scene(), "EPS")
    yield Odd("program.png", "PostScript, which would be run", program, UNKNOWN)
    flat = np.zeros((H, W, 3), np.uint8)
    icon = saved(flat, "ICO", sizes=[(16, 16)])
    yield Odd("icon.png", "an icon by another name", icon, UNKNOWN)


def animations() -> Iterator[Odd]:
    flat = [np.full((H, W, 3), shade, np.uint8) for shade in (0, 60, 120, 180, 240)]
    for number, frame in enumerate(flat):
        frame[:8] = (255, 0, 0)
        frame[:8, 5 * number : 5 * number + 5] = (0, 0, 255)

    def moving(form: str, lasting: Sequence[int], **options: Any) -> bytes:
        first, *rest = [Image.fromarray(frame) for frame in flat]
        many = {"save_all": True, "append_images": rest, "duration": list(lasting), "loop": 0}
        return saved(first, form, **many, **options)

    even = plays(flat, [0, 0.2, 0.4, 0.6, 0.8], 1.0)
    last = plays(flat, [0, 0.1, 0.5, 0.6, 1.6], 2.0)
    uneven = [100, 400, 100, 1000, 400]
    yield Odd("even.gif", "5 frames of 0.2 s", moving("GIF", [200] * 5), even)
    yield Odd("uneven.gif", "5 frames, uneven", moving("GIF", uneven), last)
    zero = plays(flat, [0, 0.1, 0.2, 0.3, 0.4], 0.5)
    what = "frames of 0 s, which browsers show for 0.1"
    yield Odd("zero.gif", what, moving("GIF", [0] * 5), zero)
    yield Odd("uneven.webp", "5 frames, uneven", moving("WEBP", uneven, lossless=True), last)
    yield Odd("uneven.png", "5 frames, uneven", moving("PNG", uneven), last)
    yield Odd("uneven.apng", "5 frames, uneven", moving("PNG", uneven), last)
    made = moving("PNG", [200] * 4, default_image=True)
    rest = plays(flat[1:], [0, 0.2, 0.4, 0.6], 0.8)
    yield Odd("fallback.png", "a picture, before 4 frames, for those who see no more", made, rest)
    made = moving("AVIF", uneven, quality=100, subsampling="4:4:4")
    yield Odd("uneven.avif", "5 frames, uneven", made, last)
    for form, name, opacity, options in (
        ("GIF", "sprite.gif", 255, {"disposal": 2}),
        ("WEBP", "sprite.webp", 200, {"lossless": True}),
        ("PNG", "sprite.png", 200, {"disposal": 1}),
    ):
        seen, sprites = [], []
        for number in range(4):
            shown = np.zeros((H, W, 4), np.uint8)
            shown[6:18, 8 * number : 8 * number + 8] = (200, 0, 0, opacity)
            sprites.append(Image.fromarray(shown))
            seen.append(on_white(shown[..., :3], shown[..., 3]))
        many = {"save_all": True, "append_images": sprites[1:], "duration": 100, "loop": 0}
        made = saved(sprites[0], form, **many, **options)
        said = plays(seen, [0, 0.1, 0.2, 0.3], 0.4, "on white")
        yield Odd(name, "a sprite that moves over nothing", made, said)
    made = moving("GIF", [200] * 5)
    yield Odd("cut.gif", "cut off in its third frame", made[: len(made) // 2], UNREADABLE)


def plays(frames: Sequence[Any], seconds: Sequence[float], end: float, note: str = "") -> Plays:
    return Plays(frames, seconds, end, within=4, note=note)
