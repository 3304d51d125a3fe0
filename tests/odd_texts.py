"""Odd text files: see odd_files.py."""

# ruff: noqa: RUF001 -- the quotes and commas that people write

from __future__ import annotations

import codecs
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from odd_files import Odd, Refused, Says

TOKENS = ("image_pad", "video_pad", "im_start", "im_end", "vision_start", "vision_end")
TOKENS += ("endoftext", "btok_0")
SENTENCES = {
    "german": "Sehr geehrte Damen und Herren, für Ihre schnelle Lieferung danke ich sehr. "
    "Leider war eines der Gläser beschädigt, sodass ich es zurückschicken müsste. Schöne Grüße",
    "russian": "Съешь же ещё этих мягких французских булок, да выпей чаю. Письмо пришло вчера.",
    "japanese": "明日は天気がよければ公園へ行って、友達と写真を撮りましょう。カメラを忘れずに。",
    "chinese": "今天天气很好，我们一起去公园散步，然后在湖边的餐馆吃午饭。请不要忘记带上照相机。",
}
NEITHER = Refused("is binary, or in an encoding that cannot be told for sure")


def special_tokens() -> Iterator[Odd]:
    for name in TOKENS:
        text = f"what does <|{name}|> stand for?"
        yield Odd(f"{name}.txt", "names a special token", text.encode(), Says(text))
    text = (
        "# prompts\n\n<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>\nhi<|im_end|>\n"
    )
    yield Odd("prompt.md", "a whole prompt", text.encode(), Says(text))
    text = "the tag <image> and <fake_token_around_image>"
    yield Odd("idefics.txt", "another family's tokens", text.encode(), Says(text))
    rows = {"prompt": "<|image_pad|><|endoftext|>"}
    said = json.dumps(rows, indent=1)
    yield Odd("prompt.json", "in a value", json.dumps(rows).encode(), Says(said))
    page = b"<p>the token <code>&lt;|vision_start|&gt;</code> opens a picture</p>"
    yield Odd("prompt.html", "escaped", page, Says("the token <|vision_start|> opens a picture"))


def texts() -> Iterator[Odd]:
    yield from encodings()
    yield from contents()
    yield from pages()
    yield from data()
    yield from word()


def encodings() -> Iterator[Odd]:
    german = SENTENCES["german"]
    for name, mark, encoding in (
        ("utf-8", codecs.BOM_UTF8, "utf-8"),
        ("utf-16-le", codecs.BOM_UTF16_LE, "utf-16-le"),
        ("utf-16-be", codecs.BOM_UTF16_BE, "utf-16-be"),
        ("utf-32-le", codecs.BOM_UTF32_LE, "utf-32-le"),
        ("utf-32-be", codecs.BOM_UTF32_BE, "utf-32-be"),
    ):
        made = mark + german.encode(encoding)
        yield Odd(f"{name}-bom.txt", "with a byte order mark", made, Says(german))
    for language, encoding in (
        ("german", "utf-16-le"),
        ("german", "utf-16-be"),
        ("german", "cp1252"),
        ("russian", "cp1251"),
        ("russian", "koi8-r"),
        ("japanese", "shift_jis"),
        ("japanese", "euc_jp"),
        ("chinese", "gb18030"),
        ("chinese", "big5"),
    ):
        text = SENTENCES[language]
        if encoding == "big5":
            text = "今天天氣很好，我們一起去公園散步，然後在湖邊的餐館吃午飯。請帶上照相機。"
        made = text.encode(encoding)
        yield Odd(f"{encoding}.txt", f"{language}, without a mark", made, Says(text))
    text = "“I’m not sure,” she said – and that’s all I know… We’ll see what they’re up to, "
    text += "and whether it rains in the morning."
    made = text.encode("cp1252")
    yield Odd("quotes.txt", "English, with the quotes of Windows", made, Says(text))
    text = "a" + "é" * 20_000
    cut = Says(text[:8192], cut=True)
    yield Odd("long.txt", "20,001 characters of UTF-8", text.encode(), cut)
    text = "a" + "😀" * 9_000
    cut = Says(text[:8192], cut=True)
    yield Odd("cut.txt", "byte 32,768 is within a character", text.encode(), cut)
    text = "a" + SENTENCES["japanese"] * 500
    made = text.encode("shift_jis")
    yield Odd("cut-sjis.txt", "the same, in shift_jis", made, Says(text[:8192], cut=True))
    broken = (german * 3).encode() + b"\xff\xfe" + german.encode()
    said = german * 3 + "\ufffd\ufffd" + german
    yield Odd("mixed.log", "UTF-8 with two broken bytes", broken, Says(said))


def contents() -> Iterator[Odd]:
    program = b"\x7fELF\x02\x01\x01" + bytes(range(256)) * 8
    yield Odd("program.txt", "a binary", program, Refused("is binary"))
    yield Odd("picture.txt", "a PNG", _png(), Refused("is binary"))
    empty = Refused("it is empty, expected a text, an image or a frame")
    yield Odd("empty.txt", "no byte", b"", empty)
    yield Odd("white.txt", "white space alone", b" \n\t\r\n  ", empty)
    yield Odd("bom.txt", "a byte order mark alone", codecs.BOM_UTF8, empty)
    yield Odd("bom-16.txt", "that of UTF-16 alone", codecs.BOM_UTF16_LE, empty)
    yield Odd("nul.txt", "a text with a NUL", b"a text\0 that was cut", Refused("is binary"))
    colours = "\x1b[31merror:\x1b[0m disk full\n"
    yield Odd("colours.log", "ANSI escapes", colours.encode(), Says(colours))
    lines = "one\r\ntwo\r\n"
    yield Odd("crlf.txt", "line ends of Windows", lines.encode(), Says(lines))
    code = "def f(x):\n    return x | 1  # naïve\n"
    yield Odd("code.py", "source code", code.encode(), Says(code))
    yield Odd("one.txt", "one character", b"x", Says("x"))
    emoji = "👩‍👩‍👧 café e\u0301 \u202eabc\u202c"
    yield Odd("emoji.txt", "joined emoji, combining and turning marks", emoji.encode(), Says(emoji))


def pages() -> Iterator[Odd]:
    page = (
        b"<html><head><title>News</title><style>p{}</style><script>var x = 1 < 2;</script></head>"
    )
    page += (
        b"<body><p>Caf&eacute; &amp; <b>bo</b>ld &#8212; ok<br>next<!-- no --></p></body></html>"
    )
    said = Says("News\nCafé & bold — ok\nnext")
    yield Odd("page.html", "script, style, entities, inline tags", page, said)
    page = b"<ul><li>one<ul><li>two</li></ul></li><li>three</li></ul><div>a<div>b</div>c</div>"
    yield Odd("nested.htm", "lists in lists", page, Says("one\ntwo\nthree\na\nb\nc"))
    page = "<meta charset=windows-1251><p>Привет, мир"
    yield Odd(
        "declared.html", "a charset that it declares", page.encode("cp1251"), Says("Привет, мир")
    )
    page = "<meta charset=utf-16><p>Straße"
    yield Odd("wrong.html", "UTF-8 that declares another charset", page.encode(), Says("Straße"))
    made = codecs.BOM_UTF16_LE + "<p>Straße".encode("utf-16-le")
    yield Odd("utf-16.html", "UTF-16 with a mark", made, Says("Straße"))
    table = b"<table><tr><th>a<th>b<tr><td>1<td>2</table>"
    yield Odd("table.html", "tags that are not closed", table, Says("a\nb\n1\n2"))
    page = "<meta charset=rot13><p>Straße"
    yield Odd("rot13.html", "a charset that is none", page.encode("cp1252"), NEITHER)
    empty = Refused("it is empty")
    yield Odd("script.html", "a script alone", b"<script>run()</script>", empty)


def data() -> Iterator[Odd]:
    rows = "name;price\nmilk;1,20\n"
    yield Odd("rows.csv", "a table", rows.encode(), Says(rows))
    made = b'{"city": "K\\u00f6ln", "n": 1e3, "face": "\\ud83d\\ude00"}'
    said = '{\n "city": "Köln",\n "n": 1000.0,\n "face": "😀"\n}'
    yield Odd("escapes.json", "escapes of Unicode", made, Says(said))
    broken = '{"city": "Köln", '
    yield Odd("broken.json", "cut off", broken.encode(), Says(broken))
    half = '{"a": "\\ud83d"}'
    yield Odd("half.json", "half a pair of surrogates", half.encode(), Says(half))
    deep = "[" * 3000
    yield Odd("deep.json", "3,000 lists in lists", deep.encode(), Says(deep))
    lines = '{"a": 1}\n{"a": 2}\n'
    yield Odd("lines.json", "a value per line", lines.encode(), Says(lines))
    xml = '<?xml version="1.0"?><a>b</a>'
    yield Odd("data.xml", "XML, as it stands", xml.encode(), Says(xml))


def word() -> Iterator[Odd]:
    from docx import Document

    def saved(write: Any) -> bytes:
        document, out = Document(), io.BytesIO()
        write(document)
        document.save(out)
        return out.getvalue()

    def letter(document: Any) -> None:
        document.add_heading("Offer")
        document.add_paragraph("Dear ").add_run("Ms. Weiß").bold = True
        table = document.add_table(2, 2)
        for at, cell in enumerate(("item", "price", "tea", "3 €")):
            table.cell(*divmod(at, 2)).text = cell
        document.add_paragraph("Yours")

    said = "Offer\nDear Ms. Weiß\nitem\tprice\ntea\t3 €\nYours"
    whole = saved(letter)
    yield Odd("letter.docx", "paragraphs and a table", whole, Says(said))

    def merged(document: Any) -> None:
        table = document.add_table(2, 2)
        table.cell(0, 0).merge(table.cell(0, 1)).text = "prices"
        table.cell(1, 0).text, table.cell(1, 1).text = "tea", "3 €"

    yield Odd("merged.docx", "a merged cell", saved(merged), Says("prices\ntea\t3 €"))
    yield Odd("blank.docx", "nothing in it", saved(lambda _: None), Refused("it is empty"))
    cut = whole[: len(whole) // 2]
    yield Odd("cut.docx", "cut off", cut, Refused("cannot be read"))
    yield Odd("text.docx", "a text", b"not a zip file", Refused("cannot be read"))

    def bomb(path: Path) -> None:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
            with zipfile.ZipFile(io.BytesIO(whole)) as good:
                for name in good.namelist():
                    packed.writestr(name, good.read(name))
            packed.writestr("word/media/image1.bmp", bytes(1 << 27))

    yield Odd("bomb.docx", "unpacks to 128 MiB", bomb, Refused("expected at most 67108864"))

    def laughs(path: Path) -> None:
        entities = '<!ENTITY a0 "ha">' + "".join(
            f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 9)
        )
        with zipfile.ZipFile(path, "w") as packed, zipfile.ZipFile(io.BytesIO(whole)) as good:
            for name in good.namelist():
                part = good.read(name)
                if name == "word/document.xml":
                    text = part.decode().replace("Yours", "&a8;")
                    head, rest = text.split("?>", 1)
                    part = f"{head}?><!DOCTYPE d [{entities}]>{rest}".encode()
                packed.writestr(name, part)

    grows = "entities that grow to 200 million characters"
    yield Odd("laughs.docx", grows, laughs, Refused("cannot be read"))


def _png() -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(out, "PNG")
    return out.getvalue()
