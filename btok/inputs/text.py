"""Text files: what they say, whatever their encoding, or a word on why they are none."""

from __future__ import annotations

import codecs
import json
import re
import unicodedata
from contextlib import suppress
from pathlib import Path

from btok.extras import needed
from btok.files import one_line, printable

HTML = (".html", ".htm", ".xhtml")
CODE = ".py .js .jsx .ts .mts .tsx .java .kt .scala .c .h .cc .cpp .hpp .cs .go .rs .rb .php"
CODE += " .swift .lua .sh .sql .r .jl .pl .css"
DATA = ".json .csv .tsv .xml .yaml .yml .toml .ini"
DECLARING = (".xml", ".tex", *CODE.split())  # may say their encoding within
TEXTS = (".txt", ".md", ".rst", ".tex", ".log", ".docx", *HTML, *CODE.split(), *DATA.split())
CHARACTERS = 8192  # that are read of a text file
PARSED = 1 << 21  # bytes of HTML or JSON that are parsed
UNPACKED = 1 << 26  # bytes of a .docx, unpacked, at most
SURE = 0.13  # chardet's confidence from which on it was always right, for texts of 6 to 258 letters
UNTOLD = (
    "is binary, or in an encoding that cannot be told for sure; if it is text, save it as UTF-8"
)
CONTROL = ("Cc", "Cn", "Co", "Cs")  # of Unicode's categories
ALLOWED = "\t\n\r\f\v\b\x1b\x85"  # of them; the escape is a terminal's
# quotes, apostrophes and dashes of Windows, where they can be nothing else: other code pages have
# letters in their places
OPENED, CLOSED = rb"(?<![A-Za-z\x80-\xff])\x93(?=\w)", rb"(?<=[\w.,!?])\x94(?![A-Za-z\x80-\xff])"
OTHERS = rb"(?<=[A-Za-z])\x92(?=(?:s|t|m|d|ll|re|ve)\b)|(?<= )[\x96\x97](?= )"
# a capital or a quote within a word, or two scripts in one: what no language has
UNLIKELY = re.compile(
    r"[a-z\xdf-\xf6\xf8-\xff][\xc0-\xd6\xd8-\xde\u0152\u0160\u0178\u017d]"
    r"|\w[\xb8\u02c6\u201a-\u201e\u2020-\u203a]\w"
    r"|[a-zA-Z][\u0370-\u07ff]|[\u0370-\u07ff][a-zA-Z]"
)
DECLARED = re.compile(rb"(?:charset|encoding|coding)\s*[:=]\s*[\"']?([-\w.:]+)", re.IGNORECASE)
JAPANESE = re.compile(rb"\x1b\$[@B]")  # mail in 7 bits, which are no ASCII
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
UNSEEN = "script style template noscript"


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
    text = decode(data, whole, path, _declared(data) if kind in DECLARING else None)
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
        if JAPANESE.search(data):
            tried = ["iso2022_jp", *tried]
        texts = (_decoded(data, encoding, whole) for encoding in tried if encoding)
        text = next((text for text in texts if text is not None), None)
        if text is None and (text := _damaged_utf8(data)) is None:
            encoding = "cp1252" if _windows_quotes(data) else _detected(data, name)
            text = _decoded(data, encoding, whole)
    if text is None:
        raise ValueError(f"text {printable(name)} {UNTOLD}")
    return text


def _decoded(data: bytes, encoding: str, whole: bool) -> str | None:
    """The bytes as text in this encoding; None where they are no text in it."""
    try:
        "a".encode(encoding)  # a LookupError for rot13 and such
        text = codecs.getincrementaldecoder(encoding)().decode(data, final=whole)
    except (UnicodeError, LookupError):  # also where a page names a codec that is none of texts
        return None
    return text if _is_text(text) else None


def _is_text(text: str) -> bool:
    """Whether a text looks like one: many control or unassigned characters mean a binary file, or
    another encoding.
    """
    seen = text[:CHARACTERS]
    odd = sum(c not in ALLOWED and unicodedata.category(c) in CONTROL for c in seen)
    return "\0" not in seen and odd <= len(seen) / 100 + 1


def _damaged_utf8(data: bytes) -> str | None:
    """UTF-8 in which little is broken, as in a log that several programs write."""
    text = data.decode("utf-8", "replace")
    broken = text.count("\ufffd")
    return text if sum(c > "\x7f" for c in text) > 5 * broken and _is_text(text) else None


def _windows_quotes(data: bytes) -> bool:
    """Whether all that is not ASCII is quotes, apostrophes and dashes, as Windows has them."""
    pairs = len(re.findall(OPENED, data)) == len(re.findall(CLOSED, data))
    rest = re.sub(b"|".join((OPENED, CLOSED, OTHERS)), b"", data)
    return pairs and rest.isascii() and not data.isascii()


def _declared(data: bytes) -> str | None:
    """The encoding that a page or program says it has, as browsers understand that."""
    if (found := DECLARED.search(data[:1024])) is None:
        return None
    name = found[1].decode("ascii", "replace").lower().replace("_", "-")
    if name in ("iso-8859-1", "iso8859-1", "latin-1", "latin1", "us-ascii", "ascii"):
        return "cp1252"
    return None if name.startswith(("utf-16", "utf-32", "utf-7", "unicode", "raw-")) else name


def _detected(data: bytes, name: object) -> str:
    """The encoding that chardet is sure of."""
    with needed(f"text {printable(name)} is not UTF-8; other encodings", "chardet", "text"):
        import chardet
    found = chardet.detect(data, encoding_era=chardet.EncodingEra.MODERN_WEB)
    encoding = found["encoding"] if found["confidence"] >= SURE else None
    if encoding is None or UNLIKELY.search(data.decode(encoding, "replace")):
        raise ValueError(f"text {printable(name)} {UNTOLD}")
    return encoding


def _html(data: bytes, whole: bool, path: Path) -> str:
    """What a reader of a page sees, a line per block."""
    with needed("HTML files", "lxml", "text"):
        from lxml import etree
    text = decode(data, whole, path, _declared(data))
    blocks, unseen = set(BLOCKS.split()), set(UNSEEN.split())
    try:
        parser = etree.HTMLParser(encoding="utf-8", huge_tree=True)
        root = etree.fromstring(text.encode(), parser) if text.strip() else None
    except etree.ParseError:  # nothing to see, as in a comment alone
        root = None
    said: list[str] = []
    hidden = length = 0
    for event, node in (
        etree.iterwalk(root, ("start", "end", "comment", "pi")) if root is not None else ()
    ):
        if event == "start":
            hidden += node.tag in unseen
            new = "\n" * (node.tag in blocks) + (node.text or "")
        else:
            hidden -= event == "end" and node.tag in unseen
            new = "\n" * (event == "end" and node.tag in blocks) + (node.tail or "")
        if not hidden:
            said.append(new)
            length += len(new.strip())
        if length > CHARACTERS:
            break
    lines = (" ".join(line.split()) for line in "".join(said).splitlines())
    return "\n".join(line for line in lines if line)


def _docx(path: Path) -> str:
    """What a reader of a Word document's body sees: a line per paragraph and per row of a table."""
    with needed(".docx files", "python-docx", "text"):
        from docx import Document
        from lxml import etree
    import zipfile

    try:
        with zipfile.ZipFile(path) as packed:
            if (size := sum(each.file_size for each in packed.infolist())) > UNPACKED:
                raise ValueError(f"it unpacks to {size} bytes, expected at most {UNPACKED}")
        said, hidden = "", 0
        for event, node in etree.iterwalk(Document(str(path)).element.body, ("start", "end")):
            tag = etree.QName(node).localname
            if tag in ("del", "moveFrom", "Fallback"):  # taken out, or there twice
                hidden += 1 if event == "start" else -1
            elif event == "start" and tag in ("t", "tab", "br", "cr") and not hidden:
                if not node.getparent().xpath("./*[local-name()='rPr']/*[local-name()='vanish']"):
                    said += {"t": node.text or "", "tab": "\t"}.get(tag, "\n")
            elif event == "end" and tag in ("p", "tc", "tr"):
                kept = said.rstrip("\n" if tag == "tc" else "\t" if tag == "tr" else "")
                said = (kept if tag != "p" else said) + {"p": "\n", "tc": "\t", "tr": "\n"}[tag]
            if len(said) > CHARACTERS:
                break
        return said.strip("\n")
    except (OSError, MemoryError):
        raise
    except Exception as error:  # of zip files, of XML, of a part that is not there
        why = one_line(error)
        raise ValueError(f"document {printable(path)} cannot be read: {why}") from error
