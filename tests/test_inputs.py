"""Files whose names, headers or order mislead: what they show, or why they are refused."""

from __future__ import annotations

import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from btok.data.records import Side
from btok.inputs import Page, as_side, images, pages, read_video, rgb_array, with_frames

BRIGHT = [10 * i for i in range(25)]  # of a video's frames


def video(path, codec="mpeg4", bright=BRIGHT, shape=None, **options):
    av = pytest.importorskip("av", reason="PyAV (the extra `video`) is not installed")
    with av.open(str(path), "w") as box:
        stream = box.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.options = 64, 48, "yuv420p", options
        if shape is not None:
            stream.sample_aspect_ratio = shape
        for value in bright:
            picture = np.full((48, 64, 3), value, np.uint8)
            box.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        box.mux(stream.encode())
    return path


@pytest.mark.parametrize("name", ["b.avi", "b.mkv", "b.mp4", "10:30 party.mp4"])
def test_frames_that_are_stored_in_another_order(tmp_path, name, monkeypatch):
    """AVI has no times for them; a name with a colon is no protocol of FFmpeg's."""
    video(tmp_path / "a.tmp.mkv")  # that PyAV is there
    made = video(tmp_path / f"a{Path(name).suffix}", bf="2")
    made.rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    frames, seconds = read_video(Path(name))
    assert seconds == sorted(set(seconds)) and len(seconds) == 8
    assert seconds[0] <= 0.2 and seconds[-1] >= 2.2
    bright = [frame.mean() for frame in frames]  # of each 10 more than of the one before
    assert np.abs(np.array(bright) - 100 * np.array(seconds)).max() < 8


def test_pixels_that_are_no_squares(tmp_path):
    frames, _ = read_video(video(tmp_path / "a.mkv", shape=Fraction(2, 1)))
    assert frames[0].shape == (48, 128, 3)
    frames, _ = read_video(video(tmp_path / "b.mkv", shape=Fraction(1, 2)))
    assert frames[0].shape == (96, 64, 3)


def test_a_list_that_names_other_files_is_no_video(tmp_path):
    video(tmp_path / "other.mkv")
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile other.mkv\n")
    with pytest.raises(
        ValueError, match=r"list.mp4 cannot be read: it is a concat, expected a vid"
    ):
        read_video(tmp_path / "list.mp4")


def test_a_codec_that_nobody_knows_is_told(tmp_path):
    made = video(tmp_path / "a.avi").read_bytes()
    (tmp_path / "a.avi").write_bytes(made.replace(b"FMP4", b"ZZZZ"))
    assert made != (tmp_path / "a.avi").read_bytes()
    with pytest.raises(ValueError, match=r"a.avi cannot be read: its pictures are in a codec that"):
        read_video(tmp_path / "a.avi")


def tiff(values, bits, photometric, kind):
    """A TIFF of one strip, little-endian, [height, width]."""
    height, width = values.shape
    data = values.tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 277: 1, 278: height}
    tags |= {339: kind, 273: 8, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    head = b"II*\0" + struct.pack("<I", 8 + len(data))
    return head + data + struct.pack("<H", len(tags)) + entries + b"\0" * 4


@pytest.mark.parametrize("dtype", ["<u2", "<f4"])
def test_greys_where_0_is_white(tmp_path, dtype):
    unit = np.linspace(0, 1, 32 * 24).reshape(24, 32)
    values = (unit * (65535 if dtype == "<u2" else 1)).astype(dtype)
    bits, kind = 8 * values.dtype.itemsize, 1 if dtype == "<u2" else 3
    for photometric, expected in ((1, unit), (0, 1 - unit)):
        (tmp_path / "a.tif").write_bytes(tiff(values, bits, photometric, kind))
        got = rgb_array(tmp_path / "a.tif")[..., 0] / 255
        assert np.abs(got - expected).max() < 0.01, photometric


def test_a_grey_picture_is_scaled_as_a_whole_though_in_pieces(monkeypatch):
    values = np.linspace(-5, 9, 24 * 32, dtype=np.float32).reshape(24, 32)
    values[3, 4] = np.nan
    expected = np.round((np.nan_to_num(values, nan=-5) + 5.0) / 14 * 255)
    for block in (1 << 20, 100, 1):
        monkeypatch.setattr(images, "BLOCK", block)
        shown = rgb_array(Image.fromarray(values))
        assert (shown == expected[..., None].astype(np.uint8)).all(), block


@pytest.mark.parametrize("mode", ["RGB", "I", "F", "I;16", "RGBA"])
@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_a_picture_of_no_pixels_is_one_of_none(mode, size):
    assert rgb_array(Image.new(mode, size)).shape == (*size[::-1], 3)


@pytest.mark.parametrize("ending", [".png", ".mp4", ".pdf", ".tif", ".txt", ".docx", ".gif"])
def test_a_name_with_a_line_break_forges_no_line(tmp_path, ending):
    """Neither that of a file which is not there nor that of a damaged one."""
    path = tmp_path / f"a\nerror: b{ending}"
    for content in (None, np.random.default_rng(0).bytes(999)):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises((ValueError, OSError, ImportError)) as raised:
            side = with_frames(as_side(path))
            for image in side.images:
                rgb_array(image)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("ending", [".pdf", ".tif"])
def test_a_page_of_a_damaged_document_is_told_once(tmp_path, ending):
    """As the document itself, whatever its name."""
    if ending == ".pdf":
        pytest.importorskip("pypdfium2", reason="pypdfium2 (the extra `pdf`) is not installed")
    path = tmp_path / f"a\nb{ending}"
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError) as of_all:
        pages(path)
    with pytest.raises(ValueError) as of_one:
        rgb_array(Page(path, 1))
    assert str(of_one.value) == str(of_all.value) and "\n" not in str(of_one.value)


def test_times_beside_a_video_file_are_refused():
    with pytest.raises(
        ValueError, match=r"frame_seconds has 1 times beside the file a\.mp4, which"
    ):
        with_frames(Side(video="a.mp4", frame_seconds=[0.5]))


def test_a_file_of_pages_under_another_name(tmp_path):
    """It is no animation, and not its first page."""
    scans = [Image.new("RGB", (8, 8), (90 * i, 0, 0)) for i in range(3)]
    scans[0].save(tmp_path / "scan.tif", save_all=True, append_images=scans[1:])
    (tmp_path / "scan.tif").rename(tmp_path / "scan.png")
    (image,) = as_side(tmp_path / "scan.png").images
    with pytest.raises(ValueError, match=r"scan.png cannot be read: it has 3 pages, expected one"):
        rgb_array(image)
    scans[0].save(tmp_path / "moving.gif", save_all=True, append_images=scans[1:])
    (tmp_path / "moving.gif").rename(tmp_path / "moving.tif")
    assert pages(tmp_path / "moving.tif") == [Page(tmp_path / "moving.tif", 1)]


def test_a_pdf_that_says_it_has_a_million_pages(tmp_path):
    pytest.importorskip("pypdfium2", reason="the extra `pdf` is not installed")
    (tmp_path / "b.pdf").write_bytes(
        b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n"
        b"2 0 obj<</Type/Pages/Kids[]/Count 1000000>>endobj\ntrailer<</Root 1 0 R>>\n"
    )
    with pytest.raises(ValueError, match=r"b\.pdf is damaged: it says that it has 1000000 pages"):
        pages(tmp_path / "b.pdf")


def test_what_word_shows_of_a_document(tmp_path):
    """Inserted and not deleted text, content controls, tables within tables; no hidden text."""
    docx = pytest.importorskip("docx", reason="python-docx (the extra `text`) is not installed")
    from docx.oxml import parse_xml
    from docx.oxml.ns import nsdecls

    def added(inner):
        document.element.body.insert(0, parse_xml(inner.replace("W", nsdecls("w"), 1)))

    document = docx.Document()
    added(
        "<w:p W><w:r><w:t>seen</w:t></w:r><w:r><w:rPr><w:vanish/></w:rPr><w:t>no</w:t></w:r></w:p>"
    )
    added("<w:sdt W><w:sdtContent><w:p><w:r><w:t>control</w:t></w:r></w:p></w:sdtContent></w:sdt>")
    added(
        "<w:p W><w:ins><w:r><w:t>new</w:t></w:r></w:ins>"
        "<w:del><w:r><w:delText>old</w:delText></w:r></w:del></w:p>"
    )
    table = document.add_table(1, 2)
    table.cell(0, 0).text = "left"
    inner = table.cell(0, 1).add_table(1, 1)
    inner.cell(0, 0).text = "inner"
    document.save(tmp_path / "a.docx")
    lines = as_side(tmp_path / "a.docx").text.split("\n")
    assert lines[:3] == ["new", "control", "seen"]
    assert "left" in lines[3] and "inner" in "".join(lines[3:]) and "no" not in "".join(lines[:3])
