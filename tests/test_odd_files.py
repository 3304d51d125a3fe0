"""Odd files of kinds that people have, read in every way there is: docs/files.md tells of them."""

from __future__ import annotations

import os

import odd_documents
import odd_files
import pytest
from helpers import tiny_checkpoint

from btok import BTokEncoder, Side
from btok.inputs import pages, with_frames
from btok.tools.folder import list_files

for needed in (
    "av",
    "pypdfium2",
    "pillow_heif",
    "docx",
    "lxml",
    "chardet",
    "sentence_transformers",
):
    pytest.importorskip(needed, reason=f"{needed} (of the extra `dev`) is not installed")


def test_odd_files_are_read_as_expected_and_the_page_says_so(tmp_path):
    kinds = odd_files.corpus()
    names = [odd.name for odds in kinds.values() for odd in odds]
    assert len(names) == len(set(names)) > 200
    told = odd_files.run(kinds, tmp_path, tiny_checkpoint(tmp_path / "checkpoint"))
    rows = [each for of_kind in told.values() for each in of_kind]
    wrong = {each.odd.name: each.got for each in rows if not each.as_expected}
    assert wrong.keys() == {each.odd.name for each in rows if each.odd.known}, wrong
    now = odd_files.page(told)
    assert odd_files.PAGE.read_text() == now, f"run {odd_files.COMMAND}"


def test_half_a_character_is_shown_as_such(tmp_path):
    """A row of JSON may have it, and an argument whose bytes are no UTF-8."""
    assert with_frames(Side("cut \ud83d")).text == "cut \ufffd"
    assert with_frames(Side("whole \ud83d\ude00")).text == "whole 😀"
    encoder = BTokEncoder.from_pretrained(tiny_checkpoint(tmp_path))
    one, other = encoder.encode(["cut \ud83d", "cut \ufffd"], show_progress=False)
    assert abs(one - other).max() < 1e-6


def test_an_error_of_one_pdf_is_not_told_of_another(tmp_path):
    """PDFium keeps the last one, and sets none for a file without pages."""
    (tmp_path / "locked.pdf").write_bytes(odd_documents.locked(b"secret"))
    (tmp_path / "none.pdf").write_bytes(odd_documents.pdf([]))
    for _ in range(2):
        with pytest.raises(ValueError, match="needs a password"):
            pages(tmp_path / "locked.pdf")
        with pytest.raises(ValueError, match="cannot be read: Failed to load"):
            pages(tmp_path / "none.pdf")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_a_folder_that_cannot_be_read_is_told(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    (tmp_path / "note.txt").write_text("here")
    listed = list_files(tmp_path)
    (tmp_path / "closed").chmod(0o700)
    assert listed.paths == ["note.txt"]
    assert listed.unreadable == {"closed": "Permission denied"}
