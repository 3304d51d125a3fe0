"""Text files: no encoding is guessed wrongly, and a missing reader is named."""

# ruff: noqa: RUF001 - letters of other scripts are what this is about
from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

from btok.inputs import as_side, rgb_array
from btok.inputs.text import decode

TEXTS = {
    "cp1252": [
        "Die Müllabfuhr fährt morgen früh um sieben Uhr durch die Straße.",
        "Le garçon a mangé une pêche très mûre près du château.",
        "El niño comió una manzana en el jardín de su casa mañana.",
        "Résumé: café crème, naïve façade, déjà vu – €5",
        "O coração não é um órgão tão simples; São Paulo é grande.",
        "Smörgåsbord på västkusten är gott när det är kallt.",
        "Der Hund läuft über die Wiese und bellt die Kühe an, während die Bäuerin am Zaun steht. "
        "Später gehen alle zurück ins Dorf, wo es Äpfel, Nüsse und süßen Most gibt.",
        "Les élèves sont arrivés très tôt à l'école; la maîtresse leur a donné des exercices de "
        "français. Après la récréation, ils ont étudié l'histoire de la Révolution.",
        "Señor, mañana estará aquí el niño pequeño con su tía; después comerán paella en Málaga.",
        "På øen går børnene på æblejagt hver søndag, når solen står højt på himlen over fjorden.",
    ],
    "cp1257": ["Žmogus eina į mišką ieškoti grybų, o šuo bėga paskui jį per šlapią žolę."],
    "cp1250": ["Zażółć gęślą jaźń, proszę bardzo.", "Příliš žluťoučký kůň úpěl ďábelské ódy."],
    "cp1251": ["Привет, как дела? Это текст на русском языке.", "Добър ден, как сте днес?"],
    "koi8-r": ["Съешь ещё этих мягких французских булок, да выпей чаю."],
    "cp1253": ["Ελληνικά κείμενα για δοκιμή και για μελέτη."],
    "cp1254": ["Türkçe metin: şu köşe yaz köşesi, şu köşe kış köşesi. Iğdır."],
    "cp1255": ["שלום עולם, זה טקסט בעברית לבדיקה."],
    "shift_jis": ["こんにちは世界。これは日本語です。", "東京特許許可局、今日は良い天気ですね。"],
    "gb18030": ["你好，世界。这是中文文本，用于测试编码。", "我们今天去北京看长城。"],
    "big5": ["你好，世界。這是中文文本，用於測試編碼。"],
    "euc_kr": ["안녕하세요 세계. 이것은 한국어 텍스트입니다."],
    "utf-16-le": ["hello world, plain english", "日本語 テキスト です", "Привет как дела"],
    "cp437": ["Rechnung über 42 Euro für Herrn Müller in Köln"],
    "mac_roman": ["schöne Grüße aus Köln, déjà vu"],
}


def test_no_encoding_is_guessed_wrongly():
    """Whole texts and their beginnings are what they are, or refused; long ones are read."""
    pytest.importorskip("chardet", reason="chardet (the extra `text`) is not installed")
    read = refused = 0
    for encoding, texts in TEXTS.items():
        for text in texts:
            for length in (6, 10, 20, 30, 45, 80, 150, 200):
                part = text[:length]
                try:
                    got = decode(part.encode(encoding), True, "a")
                except ValueError as error:
                    assert "save it as UTF-8" in str(error) and len(part) < 100, part
                    refused += 1
                    continue
                assert got == part, (encoding, part)
                read += 1
    assert read > refused > 0


def test_a_broken_byte_in_utf8_is_not_another_encoding():
    text = "größere Straßen, schöne Städte und süße Früchte"
    data = text.encode()
    assert decode(data[:20] + b"\xff" + data[20:], True, "a").replace("\ufffd", "") == text
    assert decode(data[:-2], False, "a") == text[:-2]  # cut, not broken
    with pytest.raises(ValueError, match="text a is binary"):
        decode(bytes(range(32)) * 9, True, "a")


@pytest.mark.parametrize(
    ("name", "content", "module", "extra"),
    [
        ("a.pdf", b"%PDF-1.4", "pypdfium2", "pdf"),
        ("a.heic", b"\0\0\0\x18ftypheic", "pillow_heif", "heif"),
        ("a.jpg", b"\0\0\0\x18ftypheic", "pillow_heif", "heif"),
        ("a.docx", b"PK", "docx", "text"),
        ("a.html", b"<p>", "lxml", "text"),
        ("a.txt", "Müller".encode("cp1252"), "chardet", "text"),
    ],
)
def test_a_reader_that_is_missing_is_named_with_its_extra(
    tmp_path, monkeypatch, name, content, module, extra
):
    (tmp_path / name).write_bytes(content)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'pip install "btok\[{extra}\]"'):
        [rgb_array(image) for image in as_side(tmp_path / name).images]


def test_files_that_need_no_extra_are_read_without_any(tmp_path, monkeypatch):
    for module in ("pypdfium2", "pillow_heif", "docx", "lxml", "chardet", "av"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "empty.txt").touch()
    assert as_side(tmp_path / "empty.txt").text == ""
    (tmp_path / "a.txt").write_text("Müller", encoding="utf-16")
    assert as_side(tmp_path / "a.txt").text == "Müller"
    Image.new("L", (4, 4), 9).save(tmp_path / "a.png")
    assert [rgb_array(image).max() for image in as_side(tmp_path / "a.png").images] == [9]
    assert as_side(Path(tmp_path / "a.mp4")).video  # read later


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("<p>first</p>" + "<b>" * 400_000 + "last", "first"),
        ("<div>" * 1000 + "deep", "deep"),
        ("<p>first</p>" + "<div>" * 300_000, "first"),
        ("<p>x" * 300_000, "x\n"),
        ("<!--" * 400_000, ""),
        ("</p " * 400_000, ""),
        ("<![ " * 400_000, ""),
    ],
)
def test_html_of_a_great_many_tags_is_read_at_once(tmp_path, content, text):
    """No time grows by the square of its size."""
    pytest.importorskip("lxml", reason="lxml (the extra `text`) is not installed")
    (tmp_path / "a.html").write_text(content)
    assert as_side(tmp_path / "a.html").text.startswith(text)


def test_letters_of_other_code_pages_are_not_taken_for_windows():
    """Where these have letters Windows has quotes and dashes, and the other way about."""
    pytest.importorskip("chardet", reason="chardet (the extra `text`) is not installed")
    for text, encoding in (
        ("Das Mädchen wäre länger geblieben, die Bäcker auch.", "cp850"),
        ("Während der Ferien wäre es schön gewesen", "cp850"),
        ("Mi tía vive aquí con María en la ciudad vieja.", "mac_roman"),
        ("La canción de la razón, del corazón", "mac_roman"),
        ("Le café est fermé aujourd'hui,", "cp850"),
        ("Le café est fermé aujourd'hui, mais le théâtre est ouvert jusqu'à minuit.", "mac_roman"),
        ("Perché non è più così? La città è già là, però", "cp1252"),
        ("“It’s what they’ve said” – so we’ll see, won’t we", "cp1252"),
        ("これは日本語です。", "iso2022_jp"),
    ):
        try:
            assert decode(text.encode(encoding), True, "a") == text, text
        except ValueError as error:
            assert "save it as UTF-8" in str(error) and encoding != "iso2022_jp" and "’" not in text


def test_what_a_file_says_of_its_encoding(tmp_path):
    for name, content in (
        ("a.xml", '<?xml version="1.0" encoding="ISO-8859-1"?><a>caf\xe9</a>'),
        ("a.py", "# -*- coding: latin-1 -*-\nname = 'caf\xe9'"),
        ("a.html", '<meta charset="iso-8859-1"><p>caf\xe9</p>'),
    ):
        (tmp_path / name).write_bytes(content.encode("latin-1"))
        assert "café" in as_side(tmp_path / name).text
    for declared in ("utf-16le", "utf-16", "unicode_escape", "rot13", "no-such"):
        page = f'<meta charset="{declared}"><p>C:\\new table</p>'
        (tmp_path / "a.html").write_text(page)
        assert as_side(tmp_path / "a.html").text == "C:\\new table"
