"""Text files: what they say, whatever their encoding, or a word on why they are none."""

from __future__ import annotations

import codecs
import json
import unicodedata
from contextlib import suppress
from pathlib import Path
from typing import Any

HTML = (".html", ".htm", ".xhtml")
CODE = ".py .js .jsx .ts .tsx .java .kt .scala .c .h .cc .cpp .hpp .cs .go .rs .rb .php .swift .lua"
CODE += " .sh .sql .r .jl .pl .css"
DATA = ".json .csv .tsv .xml .yaml .yml .toml .ini"
TEXTS = (".txt", ".md", ".rst", ".tex", ".log", ".docx", *HTML, *CODE.split(), *DATA.split())
CHARACTERS = 8192  # that are read of a text file
PARSED = 1 << 21  # bytes of HTML or JSON that are parsed
TAGS = 20_000  # of HTML that are parsed: each takes more time than any length of text
UNPACKED = 1 << 26  # bytes of a .docx, unpacked, at most
SURE = 0.13  # chardet's confidence from which on it was always right, for texts of 6 to 258 letters
UNTOLD = (
    "is binary, or in an encoding that cannot be told for sure; if it is text, save it as UTF-8"
)
CONTROL = ("Cc", "Cn", "Co", "Cs")  # of Unicode's categories
ALLOWED = "\t\n\r\f\v\b\x1b\x85"  # of them; the escape is a terminal's
# quotes, dashes, an ellipsis, signs such as that of a copyright
QUOTES = b"\x82\x84\x85\x91\x92\x93\x94\x95\x96\x97\x99\xa0\xa9\xab\xae\xb0\xb7\xbb"
BOMS = {  # those of 32 bits begin like those of 16
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
BLOCKS = "address article aside blockquote br caption dd details div dl dt fieldset figcaption"
BLOCKS += " figure footer form h1 h2 h3 h4 h5 h6 header hr legend li main nav ol option p pre"
BLOCKS += " section summary table td th title tr ul"


def read_text(path: Path) -> str:
    """The first 8,192 characters of a text file.

    UTF-8, what a byte order mark says, else what chardet is sure of. Of HTML and .docx what a
    reader sees; JSON without its escapes, if it is not large; everything else as it stands.

    Raises:
        ValueError: a file that is no text, or whose encoding cannot be told.
        OSError: one that cannot be opened.
        ImportError: a reader is missing (the extra `text`).
    """
    kind = path.suffix.lower()
    if kind == ".docx":
        return _docx(path)[:CHARACTERS]
    parsed = kind in (*HTML, ".json")
    with open(path, "rb") as file:
        data = file.read(PARSED if parsed else 4 * CHARACTERS)
        whole = not file.read(1)
    if kind in HTML:
        return _html(data, whole, path)[:CHARACTERS]
    text = decode(data, whole, path)
    if kind == ".json" and whole:
        with suppress(ValueError, RecursionError):  # as it stands, then
            plain = json.dumps(json.loads(text), ensure_ascii=False, indent=1)
            text = plain.encode().decode()  # half a pair of surrogates is no text
    return text[:CHARACTERS]


def decode(data: bytes, whole: bool, name: object, declared: str | None = None) -> str:
    """Bytes as text: by their byte order mark, as UTF-8, as declared, or as chardet is sure of.

    Args:
        data: the bytes; whole: whether they are all, or the last character may be cut.
        name: of the file, for the errors.
        declared: the encoding that they say of themselves.

    Raises:
        ValueError: they are no text, or their encoding cannot be told.
        ImportError: chardet is needed and missing (the extra `text`).
    """
    for mark, encoding in BOMS.items():
        if data.startswith(mark):
            text = _decoded(data[len(mark) :], encoding, whole)
            break
    else:
        # bytes below 128 alone may be meant otherwise; others are not UTF-8 by chance
        tried = ["utf-8", declared] if not data.isascii() else [declared, "utf-8"]
        texts = (_decoded(data, encoding, whole) for encoding in tried if encoding)
        text = next((text for text in texts if text is not None), None)
        if text is None and (text := _damaged_utf8(data)) is None:
            encoding = "cp1252" if _windows_quotes(data) else _detected(data, name)
            text = _decoded(data, encoding, whole)
    if text is None:
        raise ValueError(f"text {name} {UNTOLD}")
    return text


def _decoded(data: bytes, encoding: str, whole: bool) -> str | None:
    """The text; None where it is none in this encoding."""
    try:
        "a".encode(encoding)  # a LookupError for rot13 and such
        text = codecs.getincrementaldecoder(encoding)().decode(data, final=whole)
    except (UnicodeError, LookupError):  # also where a page names a codec that is none of texts
        return None
    return text if _is_text(text) else None


def _is_text(text: str) -> bool:
    """Control characters and unassigned ones are a binary file's, or of another encoding."""
    seen = text[:CHARACTERS]
    odd = sum(c not in ALLOWED and unicodedata.category(c) in CONTROL for c in seen)
    return "\0" not in seen and odd <= len(seen) / 100 + 1


def _damaged_utf8(data: bytes) -> str | None:
    """UTF-8 in which little is broken, as in a log that several programs write."""
    text = data.decode("utf-8", "replace")
    broken = text.count("\ufffd")
    return text if sum(c > "\x7f" for c in text) > 5 * broken and _is_text(text) else None


def _windows_quotes(data: bytes) -> bool:
    """Whether all that is not ASCII is what every Windows code page has in the same place."""
    others = data.translate(None, bytes(range(128)))
    return 0 < len(others) < len(data) / 10 and not others.translate(None, QUOTES)


def _detected(data: bytes, name: object) -> str:
    """The encoding that chardet is sure of."""
    try:
        import chardet
    except ImportError as error:
        raise ImportError(
            f'text {name} is not UTF-8; other encodings need chardet: pip install "btok[text]"'
        ) from error
    found = chardet.detect(data, encoding_era=chardet.EncodingEra.MODERN_WEB)
    if found["encoding"] is None or found["confidence"] < SURE:
        raise ValueError(f"text {name} {UNTOLD}")
    return found["encoding"]


def _html(data: bytes, whole: bool, path: Path) -> str:
    """What a reader of a page sees, a line per block."""
    try:
        from bs4 import BeautifulSoup
        from bs4.dammit import EncodingDetector
    except ImportError as error:
        raise ImportError('HTML files need beautifulsoup4: pip install "btok[text]"') from error
    if data.count(b"<") > TAGS:
        data, whole = b"<".join(data.split(b"<", TAGS)[:TAGS]), False
    declared = EncodingDetector.find_declared_encoding(data, is_html=True)
    soup = BeautifulSoup(decode(data, whole, path, declared), "html.parser")
    for tag in soup(["script", "style", "template", "noscript"]):
        tag.decompose()
    for tag in soup(BLOCKS.split()):
        tag.insert(0, "\n")  # of what a list's item says before it holds another list
        tag.append("\n")
    lines = (" ".join(line.split()) for line in soup.get_text().splitlines())
    return "\n".join(line for line in lines if line)


def _docx(path: Path) -> str:
    """Paragraphs and tables of a Word document, in order."""
    try:
        from docx import Document
        from docx.table import Table
    except ImportError as error:
        raise ImportError('.docx files need python-docx: pip install "btok[text]"') from error
    import zipfile

    try:
        with zipfile.ZipFile(path) as packed:
            if (size := sum(each.file_size for each in packed.infolist())) > UNPACKED:
                raise ValueError(f"it unpacks to {size} bytes, expected at most {UNPACKED}")
        lines: list[str] = []
        told = set[Any]()  # a merged cell stands in each row and column that it takes
        for block in Document(str(path)).iter_inner_content():
            if isinstance(block, Table):
                for row in block.rows:
                    cells = {cell._tc: cell.text for cell in row.cells if cell._tc not in told}
                    told.update(cells)
                    lines.append("\t".join(cells.values()))
            else:
                lines.append(block.text)
            if sum(map(len, lines)) > CHARACTERS:
                break
        return "\n".join(lines)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # of zip files, of XML, of a part that is not there
        why = " ".join(str(error).split())
        raise ValueError(f"document {path} cannot be read: {why}") from error
