"""Documents: each page of a PDF or of a multi-page TIFF is an input of its own."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from btok.extras import needed
from btok.files import printable
from btok.inputs.images import TIFF, opened, rgb_of

DOCUMENTS = (".pdf", *TIFF)
DPI = 144  # at which the pages of a PDF are rendered
LONGEST = 4096  # pixels of a rendered page's longer edge, at most
NOMINAL = 1224 * 1584  # pixels of a page of letter size: what one is counted as unseen
_pdfium = threading.Lock()  # PDFium is not safe to use from several threads, in whatever documents


@dataclass(frozen=True)
class Page:
    """A page of a document.

    Args:
        path: the document's file.
        number: from 1.
    """

    path: Path
    number: int

    def __str__(self) -> str:
        return f"{self.path}, page {self.number}"

    def rgb_array(self) -> np.ndarray:
        """The page as a picture, uint8 [height, width, 3]; a PDF's at 144 dots per inch.

        Raises:
            ValueError: a damaged or encrypted document, a page that it does not have.
            ImportError: a PDF without pypdfium2 (the extra `pdf`).
        """
        name = printable(self.path)
        missing = f"document {name} has no page {self.number}"
        try:
            if self.path.suffix.lower() in TIFF:
                with opened(self.path) as image:
                    if self.number != 1:  # the pages are a chain: to count them is to walk it
                        try:
                            image.seek(self.number - 1)
                        except EOFError:
                            raise ValueError(missing) from None
                    return rgb_of(image)
            with _pdf(self.path) as document:
                if not 1 <= self.number <= len(document):
                    raise ValueError(missing)
                document.init_forms()  # else what was filled in would not be drawn
                page = document[self.number - 1]
                longer = max(page.get_size())  # points, of 1 / 72 inch
                scale = min(DPI / 72, LONGEST / max(longer, 1.0))
                bitmap = page.render(scale=scale, rev_byteorder=True)
                return np.array(bitmap.to_numpy()[..., :3])
        except ValueError as error:
            if name in str(error):
                raise
            raise ValueError(f"document {printable(self)} cannot be read: {error}") from error


def pages(path: str | Path) -> list[Page]:
    """The pages of a PDF or TIFF file; each is an input for an encoder.

    Raises:
        ValueError: a damaged or encrypted document, one of no pages.
        ImportError: a PDF without pypdfium2 (the extra `pdf`).
    """
    path = Path(path)
    if path.suffix.lower() in TIFF:
        with opened(path) as image:
            count = _tiff_pages(image)
    else:
        with _pdf(path) as document:
            count = len(document)
        if count > path.stat().st_size:
            raise ValueError(
                f"document {printable(path)} is damaged: it says that it has {count} pages"
            )
    if not count:
        raise ValueError(f"document {printable(path)} has no pages")
    return [Page(path, number) for number in range(1, count + 1)]


def _tiff_pages(image: Any) -> int:
    return image.n_frames if image.format == "TIFF" else 1  # another format, under a wrong name


def only_page(path: Path) -> Page:
    """The page of a document of one page; a ValueError for another."""
    first, *others = pages(path)
    if others:
        raise ValueError(
            f"document {printable(path)} has {1 + len(others)} pages, expected one: give each of "
            f"btok.inputs.pages(path), or {path.name}#page=1"
        )
    return first


def at_page(path: Path) -> Path | Page:
    """`report.pdf#page=7` as that page; any other path as it is."""
    named = re.fullmatch(r"(.*)#page=(\d{1,9})", str(path), re.DOTALL)
    if named is None or not named[1].lower().endswith(DOCUMENTS):
        return path
    return Page(Path(named[1]), int(named[2]))


@contextmanager
def _pdf(path: Path) -> Iterator[Any]:
    """A PDF file, open; what is wrong with it is a ValueError."""
    with needed("PDF files", "pypdfium2", "pdf"):
        import pypdfium2
    with _pdfium:
        document = None
        try:
            # of a file without pages PDFium tells the last error, maybe that of another file
            pypdfium2.raw.FPDF_LoadMemDocument64(b"", 0, None)
            document = pypdfium2.PdfDocument(path)
            yield document
        except (pypdfium2.PdfiumError, OSError) as error:
            locked = "password" in str(error).lower()
            why = "it is encrypted, and needs a password" if locked else printable(error)
            raise ValueError(f"document {printable(path)} cannot be read: {why}") from error
        finally:
            if document is not None:
                document.close()
