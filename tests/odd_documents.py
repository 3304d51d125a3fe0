"""Odd documents, names and folders: see odd_files.py."""

from __future__ import annotations

import hashlib
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from odd_files import Odd, PassedOver, Refused, Says, Shows
from PIL import Image

PAD = bytes.fromhex("28bf4e5e4e758a4164004e56fffa01082e2e00b6d0683e802f0ca9fe6453697a")
NO_COLOUR = (255, 255, 255)


class Sheet(NamedTuple):
    """A page, in points; a box on it, from its lower left corner: x, y, width, height."""

    width: int = 60
    height: int = 40
    box: tuple[int, int, int, int] = (10, 20, 20, 10)
    colour: tuple[int, int, int] = (255, 0, 0)
    rotate: int = 0
    more: str = ""

    def content(self) -> bytes:
        if not self.box[2]:
            return b" "
        colour = " ".join(f"{value / 255:g}" for value in self.colour)
        return f"{colour} rg {' '.join(map(str, self.box))} re f".encode()

    def shown(self, scale: float = 2.0) -> np.ndarray:
        """The page at 144 dots per inch, drawn by hand."""
        height, width = round(self.height * scale), round(self.width * scale)
        picture = np.full((height, width, 3), 255, np.uint8)
        x, y, w, h = (round(value * scale) for value in self.box)
        picture[height - y - h : height - y, x : x + w] = self.colour
        return np.rot90(picture, -self.rotate // 90)


def pdf(sheets: Sequence[Sheet], *, key: bytes = b"", trailer: str = "", form: str = "") -> bytes:
    """A PDF by hand: catalog 1, pages 2, then of each sheet a page and its content."""
    kids = " ".join(f"{3 + 2 * n} 0 R" for n in range(len(sheets)))
    objects = [f"<</Type/Catalog/Pages 2 0 R{form}>>".encode()]
    objects += [f"<</Type/Pages/Kids[{kids}]/Count {len(sheets)}>>".encode()]
    for n, sheet in enumerate(sheets):
        number = 4 + 2 * n
        box = f"/MediaBox[0 0 {sheet.width} {sheet.height}]/Rotate {sheet.rotate}{sheet.more}"
        objects += [f"<</Type/Page/Parent 2 0 R{box}/Contents {number} 0 R>>".encode()]
        content = sheet.content()
        if key:
            content = rc4(hashlib.md5(key + number.to_bytes(5, "little")).digest()[:10], content)
        objects += [b"<</Length %d>>stream\n%s\nendstream" % (len(content), content)]
    return joined(objects, trailer)


def joined(objects: Sequence[bytes], trailer: str = "") -> bytes:
    out, at = b"%PDF-1.7\n", []
    for number, each in enumerate(objects, 1):
        at.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, each)
    table = b"".join(b"%010d 00000 n \n" % place for place in at)
    head = b"xref\n0 %d\n0000000000 65535 f \n" % (len(at) + 1)
    end = f"trailer\n<</Size {len(at) + 1}/Root 1 0 R{trailer}>>\nstartxref\n{len(out)}\n%%EOF\n"
    return out + head + table + end.encode()


def rc4(key: bytes, data: bytes) -> bytes:
    box, j, out = list(range(256)), 0, bytearray()
    for i in range(256):
        j = (j + box[i] + key[i % len(key)]) % 256
        box[i], box[j] = box[j], box[i]
    i = j = 0
    for byte in data:
        i = (i + 1) % 256
        j = (j + box[i]) % 256
        box[i], box[j] = box[j], box[i]
        out.append(byte ^ box[(box[i] + box[j]) % 256])
    return bytes(out)


def locked(password: bytes) -> bytes:
    """A PDF of one page, encrypted with 40 bits, that opens with a password."""
    owner, name = bytes(range(32)), b"0123456789abcdef"
    padded = (password + PAD)[:32]
    key = hashlib.md5(padded + owner + (-4).to_bytes(4, "little", signed=True) + name).digest()[:5]
    user = rc4(key, PAD)
    lock = f"<</Filter/Standard/V 1/R 2/P -4/O<{owner.hex()}>/U<{user.hex()}>>>"
    return pdf([Sheet()], key=key, trailer=f"/ID[<{name.hex()}><{name.hex()}>]/Encrypt {lock}")


def filled() -> bytes:
    """A form's field with a value and its look."""
    look = b"0 0 1 rg 0 0 20 10 re f"
    return joined(
        [
            b"<</Type/Catalog/Pages 2 0 R/AcroForm<</Fields[4 0 R]>>>>",
            b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
            b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 60 40]/Annots[4 0 R]>>",
            b"<</Type/Annot/Subtype/Widget/FT/Tx/T(name)/V(x)/Rect[10 20 30 30]/F 4/P 3 0 R"
            b"/AP<</N 5 0 R>>>>",
            b"<</Type/XObject/Subtype/Form/BBox[0 0 20 10]/Length %d>>stream\n%s\nendstream"
            % (len(look), look),
        ]
    )


def tiff(images: Sequence[Image.Image]) -> bytes:
    out = io.BytesIO()
    images[0].save(out, "TIFF", save_all=True, append_images=images[1:])
    return out.getvalue()


def documents() -> Iterator[Odd]:
    one = pdf([Sheet()])
    yield Odd("one.pdf", "a page", one, Shows([Sheet().shown()]))
    yield Odd("report.PDF", "a name in upper case", one, Shows([Sheet().shown()]))
    sheets = [Sheet(colour=(30 * n, 0, 255 - 30 * n)) for n in range(7)]
    seven = pdf(sheets)
    yield Odd("seven.pdf", "7 pages", seven, Shows([sheet.shown() for sheet in sheets]))
    for turn in (90, 180, 270):
        sheet = Sheet(rotate=turn)
        seen = Shows([sheet.shown()], 0, "turned")
        yield Odd(f"rotate-{turn}.pdf", f"/Rotate {turn}", pdf([sheet]), seen)
    sheets = [Sheet(), Sheet(30, 90, (0, 0, 10, 10))]
    seen = Shows([sheet.shown() for sheet in sheets])
    yield Odd("sizes.pdf", "pages of two sizes", pdf(sheets), seen)
    huge = Sheet(14_000, 7_000, (7_000, 0, 7_000, 3_500))
    yield Odd("huge.pdf", "5 x 2.5 m", pdf([huge]), Shows([huge.shown(4096 / 14_000)], 0))
    cropped = Sheet(more="/CropBox[10 0 60 40]")
    seen = Shows([Sheet(50, 40, (0, 20, 20, 10)).shown()])
    yield Odd("cropped.pdf", "a part of the page is shown", pdf([cropped]), seen)
    blank = Sheet(box=(0, 0, 0, 0))
    yield Odd("blank.pdf", "an empty page", pdf([blank]), Shows([blank.shown()]))
    form = Sheet(colour=(0, 0, 255)).shown()
    yield Odd("form.pdf", "a form that is filled in", filled(), Shows([form]))
    password = Refused("it is encrypted, and needs a password")
    yield Odd("locked.pdf", "encrypted", locked(b"secret"), password)
    yield Odd("printed.pdf", "encrypted, without a password", locked(b""), Shows([Sheet().shown()]))
    unreadable = Refused("cannot be read")
    noise = np.random.default_rng(0).bytes(2000)
    yield Odd("damaged.pdf", "noise behind a head", b"%PDF-1.7\n" + noise, unreadable)
    yield Odd("text.pdf", "a text", b"not a document", unreadable)
    yield Odd("empty.pdf", "no byte", b"", unreadable)
    yield Odd("cut.pdf", "cut off after a third of it", seven[: len(seven) // 3], unreadable)
    end = one[: one.rindex(b"xref\n0")]
    yield Odd("tableless.pdf", "its table is gone", end, unreadable)
    yield Odd("moved.pdf", "100 bytes before its head", bytes(100) + one, Shows([Sheet().shown()]))
    yield Odd("none.pdf", "no page", pdf([]), Refused("cannot be read"))
    scans = [Image.new("RGB", (20 + 4 * n, 30), (80 * n, 0, 0)) for n in range(3)]
    seen = Shows([np.asarray(scan) for scan in scans])
    yield Odd("scan.tif", "3 pages", tiff(scans), seen)
    mixed = [Image.new("1", (20, 30), 1), Image.new("L", (20, 30), 90), Image.new("CMYK", (20, 30))]
    seen = Shows([np.full((30, 20, 3), shade, np.uint8) for shade in (255, 90, 255)])
    yield Odd("mixed.tiff", "bits, greys and CMYK", tiff(mixed), seen)


def folders() -> Iterator[Odd]:
    words = b"a note"
    for name, what in (
        ("line\nbreak.txt", "a line break in its name"),
        ("\x1b[31mred.txt", "an escape sequence in its name"),
        ("\u202egpj.txt", "a right-to-left mark in its name"),
        ("a  b#page=1.txt", "blanks and a page in its name"),
        ("deep/er/and/deeper/note.txt", "in folders of folders"),
        ("folder.txt/note.txt", "in a folder that is named like a text"),
        (os.fsdecode(b"\xff\xfe.txt"), "a name that is no UTF-8"),
        ("x" * 251 + ".txt", "a name of 255 bytes"),
        ("NOTE.TXT", "an ending in upper case"),
    ):
        said = f"{what}, it says"
        yield Odd(name, what, said.encode(), Says(said))
    yield Odd(".hidden.txt", "hidden", words, PassedOver("hidden"))
    yield Odd("._x.png", "what macOS leaves on other disks", b"\0\5\x16\7", PassedOver("hidden"))
    yield Odd(".git", "a hidden folder", _hidden, PassedOver("hidden"))
    links = PassedOver("links")
    yield Odd("link.txt", "a link to a file", lambda path: path.symlink_to("NOTE.TXT"), links)
    yield Odd("gone.txt", "a link to nothing", lambda path: path.symlink_to("no"), links)
    yield Odd("loop", "a link to its own folder", lambda path: path.symlink_to("."), links)
    pipe = PassedOver("no ordinary files")
    yield Odd("pipe.txt", "a pipe", os.mkfifo, pipe)
    yield Odd("pipe.mp4", "a pipe", os.mkfifo, pipe)
    for ending, what in (
        (".eps", "PostScript"),
        (".doc", "Word, before 2007"),
        (".xlsx", "a sheet"),
        (".zip", "an archive"),
        (".svg", "a drawing"),
        (".mp3", "sound"),
        (".ico", "an icon"),
    ):
        yield Odd(f"other{ending}", what, words, PassedOver(ending))
    yield Odd("README", "no ending", words, PassedOver("without an ending"))


def _hidden(path: Path) -> None:
    path.mkdir()
    (path / "config.txt").write_bytes(zlib.compress(b"x"))
