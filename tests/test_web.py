"""The page's server: searches, thumbnails and files, and what it must not give away."""

import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Thread
from urllib.parse import quote, urlencode

import pytest
from helpers import environment, nested_checkpoint, tiny_checkpoint, tiny_module
from odd_videos import film, steady
from PIL import Image
from web_folder import COLOURS, HOSTILE, fill, served

from btok import BTokEncoder
from btok.files import printable
from btok.tools.cli import main
from btok.tools.index import Index

pytest.importorskip("fastapi")
import uvicorn

from btok.tools.web import app
from btok.tools.web.app import LARGEST
from btok.tools.web.shelf import STAMP, Shelf


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    outer = tmp_path_factory.mktemp("outer")
    (outer / "secret.txt").write_text("a secret beside the folder")
    return fill(outer / "files")


@pytest.fixture(scope="module")
def place(checkpoint, folder):
    with served(checkpoint, folder) as at:
        yield at


@pytest.fixture(scope="module")
def index(place, checkpoint, folder):
    return Index.open(folder / ".btok", BTokEncoder.from_pretrained(checkpoint))


def ask(place, target, method="GET", body=None, **headers):
    """Status, headers and body, of a target that is sent as it is."""
    connection = http.client.HTTPConnection(*place, timeout=300)
    connection.putrequest(method, target, skip_host="host" in headers)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    if body is not None:
        connection.putheader("content-length", str(len(body)))
    connection.endheaders(body)
    response = connection.getresponse()
    found = response.status, dict(response.getheaders()), response.read()
    connection.close()
    return found


def asked(place, path, method="GET", body=None, **query):
    status, _, said = ask(place, f"{path}?{urlencode(query)}", method, body)
    assert status == 200, said
    return json.loads(said)


@contextmanager
def page(monkeypatch, *line):
    """Host and port of a page of this process, which starts sooner than another."""
    made = []
    monkeypatch.setattr(app, "run", lambda served, at: made.append((served, at.dup())))
    assert main(["serve", *map(str, line), "--port", "0"]) == 0
    ((served, listening),) = made
    server = uvicorn.Server(uvicorn.Config(served, log_level="critical", lifespan="off"))
    thread = Thread(target=server.run, args=([listening],))
    thread.start()
    try:
        yield listening.getsockname()[:2]
    finally:
        server.should_exit = True
        thread.join()


def id_of(index, uri):
    (batch,) = index.rows(["id"], f"uri = '{uri.replace(chr(39), 2 * chr(39))}'")
    return batch["id"][0].as_py()


def test_it_says_what_is_there(place):
    said = asked(place, "/api/about")
    assert said["kinds"] == {"picture": 30, "page": 2, "video": 1, "text": 2}
    assert said["items"] == 35 and said["folder"] == "files"
    assert len(asked(place, "/api/first")) == 24
    assert {hit["kind"] for hit in asked(place, "/api/first", kind="page")} == {"page"}


def test_hits_are_those_of_the_index(place, index):
    for kind, where in ((None, None), ("text", "uri LIKE '%.txt' OR uri LIKE '%.html'")):
        (expected,) = index.search(["a red picture"], 7, where)
        query = {"kind": kind} if kind else {}
        hits = asked(place, "/api/search", q="a red picture", k=7, **query)
        assert [hit["id"] for hit in hits] == [hit.item["id"] for hit in expected]
        assert [hit["score"] for hit in hits] == [round(hit.score, 4) for hit in expected]
    texts = {hit["name"]: hit["excerpt"] for hit in hits}
    assert texts["notes/words.txt"].startswith("a red picture")
    pages = asked(place, "/api/search", q="words", kind="page")
    assert {hit["name"] for hit in pages} == {"report.pdf, page 1", "report.pdf, page 2"}


def test_a_picture_finds_itself_and_words_move_it(place, folder):
    data = (folder / "green4.png").read_bytes()
    hits = asked(place, "/api/search", "POST", data, k=3)
    assert hits[0]["name"] == "green4.png" and hits[0]["score"] == pytest.approx(1, abs=1e-3)
    both = asked(place, "/api/search", "POST", data, k=3, q="and some words")
    assert both[0]["score"] < hits[0]["score"]


def test_what_is_near_an_item_is_not_itself(place, index):
    name = id_of(index, "blue3.png")
    hits = asked(place, "/api/near", id=name, k=8)
    assert len(hits) == 8 and name not in {hit["id"] for hit in hits}
    assert asked(place, "/api/item", id=name)["name"] == "blue3.png"


@pytest.mark.parametrize(
    ("uri", "small", "large"),
    [
        ("large.jpg", ("JPEG", (320, 180)), ("JPEG", (1280, 720))),
        ("red0.png", ("PNG", (64, 48)), ("PNG", (64, 48))),
        ("report.pdf", ("PNG", (120, 80)), ("PNG", (120, 80))),
        ("film.mp4", ("PNG", (128, 96)), ("PNG", (128, 96))),
    ],
)
def test_thumbnails(place, index, uri, small, large):
    """Of a video four frames, two by two."""
    for size, expected in (("small", small), ("large", large)):
        query = urlencode({"id": id_of(index, uri), "size": size})
        status, headers, data = ask(place, f"/thumbnail?{query}")
        with Image.open(io.BytesIO(data)) as image:
            assert status == 200 and (image.format, image.size) == expected
            assert headers["content-type"] == f"image/{expected[0].lower()}"


def test_a_file_is_opened_and_a_part_of_a_video(place, folder, index):
    for uri in ("film.mp4", HOSTILE, "notes/words.txt", "report.pdf"):
        target = f"/file?{urlencode({'id': id_of(index, uri)})}"
        status, _, data = ask(place, target)
        assert status == 200 and data == (folder / uri).read_bytes()
        status, _, data = ask(place, target, range="bytes=3-9")
        assert status == 206 and data == (folder / uri).read_bytes()[3:10]


def test_files_run_no_scripts_here(place, folder, index):
    target = f"/file?{urlencode({'id': id_of(index, 'notes/script.html')})}"
    _, headers, data = ask(place, target)
    assert data == (folder / "notes/script.html").read_bytes()
    assert headers["content-type"] == "application/octet-stream"
    assert headers["content-disposition"].startswith("attachment")
    assert "sandbox" in headers["content-security-policy"]
    _, headers, data = ask(place, target.replace("/file", "/text"))
    assert headers["content-type"].startswith("text/plain") and data.strip() == b"some words"
    for page in ("/", "/page.js", "/api/about", target):
        _, headers, _ = ask(place, page)
        assert headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]


SECRET = "secret beside"
ESCAPES = [
    "/file?id=../secret.txt",
    "/file?id=..%2fsecret.txt",
    "/file?id=%2e%2e%2fsecret.txt",
    "/file?id=%252e%252e%252fsecret.txt",
    "/file?id=....//secret.txt",
    "/file?id=..\\secret.txt",
    "/file?id=/etc/passwd",
    "/file?id=file:///etc/passwd",
    "/file?id=red0.png/../../secret.txt",
    "/file?id=red0.png",
    "/file?id=red0.png%00.txt",
    "/file?id=not%20indexed.xyz",
    "/file?id=.btok",
    "/file?id='%20OR%201=1%20--",
    "/file?id=",
    "/file",
    "/file/../secret.txt",
    "/../secret.txt",
    "/..%2f..%2fsecret.txt",
    "/%2e%2e/secret.txt",
    "//etc/passwd",
    "/style.css/../app.py",
    "/static/../../secret.txt",
    "/app.py",
    "/serve.py",
    "/thumbnail?id=../secret.txt",
    "/text?id=../secret.txt",
    "/text?id=%u002e%u002e/secret.txt",
    "/text?id=%c0%ae%c0%ae/secret.txt",
    "/text?id=%e2%80%a5/secret.txt",
    "/proc/self/environ",
    "/file?id=/proc/self/environ",
    "/FILE?id=../secret.txt",
    f"/file?id={'../' * 1300}etc/passwd",
    f"/file?id={'a' * 5000}",
    "/text?id=%2fetc%2fpasswd",
    "/api/item?id=../secret.txt",
    "/api/near?id=x'%20OR%20'1'='1",
    "/docs",
    "/openapi.json",
]


@pytest.mark.parametrize("target", ESCAPES)
def test_nothing_but_what_is_indexed_is_given(place, target):
    status, _, said = ask(place, target)
    assert status in (400, 404, 422), (status, said)
    assert SECRET.encode() not in said and b"root:" not in said and b"import" not in said
    assert len(said) < 400


def test_an_index_that_was_tampered_with_leads_nowhere(folder, index, tmp_path):
    """Nor does a link, a pipe or another file that came into an indexed one's place."""
    root = tmp_path / "files"
    shutil.copytree(folder, root, ignore=lambda *_: [".btok"])
    shelf = Shelf(index, root, {})
    stamped = {"id": "x", **dict.fromkeys(STAMP, 0)}
    (tmp_path / "secret.txt").write_text("a secret beside the folder")
    absolute = str(tmp_path / "secret.txt")
    for uri in ("../secret.txt", absolute, "notes/../../secret.txt", "notes/../red0.png"):
        with pytest.raises(PermissionError, match="leads out of the folder"):
            shelf.path({"uri": uri, **stamped})
    (root / "red0.png").unlink()
    (root / "red0.png").symlink_to(tmp_path / "secret.txt")
    shutil.move(root / "notes", tmp_path / "notes")
    (root / "notes").symlink_to(tmp_path / "notes")
    for uri in ("red0.png", "notes/words.txt"):
        with pytest.raises(PermissionError, match="leads out of the folder"):
            shelf.path({"uri": uri, **stamped})
    (root / "red1.png").unlink()
    os.mkfifo(root / "red1.png")
    for uri in ("red1.png", "gone.png", ""):
        with pytest.raises(FileNotFoundError, match="is gone since"):
            shelf.path({"uri": uri, **stamped})
    (root / "notes").unlink()
    for uri in (".env", "notes/.ssh/key.txt", ".btok/table.txt", "not indexed.xyz"):
        (root / uri).parent.mkdir(parents=True, exist_ok=True)
        (root / uri).write_text("a secret")
        stat = (root / uri).stat()
        with pytest.raises(PermissionError, match="is no file that is indexed"):
            shelf.path({"uri": uri, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns})
    with pytest.raises(PermissionError, match="is no file that is indexed"):
        shelf.path({"uri": "red2.png"})  # of no size or time: it may be anything by now
    with pytest.raises(ValueError, match="null"):
        shelf.path({"uri": "red2.png\0.txt", **stamped})
    stat = (root / "red2.png").stat()
    had = {"uri": "red2.png", "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    assert shelf.path(had) == root / "red2.png"
    (root / "red2.png").write_bytes((tmp_path / "secret.txt").read_bytes())
    with pytest.raises(FileNotFoundError, match="changed since it was indexed"):
        shelf.path(had)


def test_a_file_that_changes_meanwhile_is_not_given(checkpoint, folder, monkeypatch, tmp_path):
    root = tmp_path / "files"
    root.mkdir()
    for name in ("red0.png", "red1.png", "blue0.png"):
        shutil.copy(folder / name, root)
    with page(monkeypatch, checkpoint, root) as place:
        names = {hit["name"]: hit["id"] for hit in asked(place, "/api/first")}
        for name in names.values():  # which are kept
            assert ask(place, f"/thumbnail?{urlencode({'id': name})}")[0] == 200
        (root / "red0.png").unlink()
        (root / "red1.png").write_bytes(b"other")
        for name, why in (("red0.png", "is gone"), ("red1.png", "changed")):
            for path in ("/file", "/thumbnail"):
                status, _, said = ask(place, f"{path}?{urlencode({'id': names[name]})}")
                assert status == 410 and why in json.loads(said)["detail"]
        assert ask(place, f"/file?{urlencode({'id': names['blue0.png']})}")[0] == 200
        assert len(asked(place, "/api/search", q="red")) == 3  # vectors are still there


@pytest.mark.parametrize("what", ["the folder files", "the index .btok", "the index elsewhere"])
def test_a_folder_that_goes_is_said_to_be_gone(
    checkpoint, folder, monkeypatch, tmp_path, capsys, what
):
    """By all that reads it; and once it is back, as a disk may be, all is as it was."""
    root, picture = tmp_path / "files", (folder / "red0.png").read_bytes()
    root.mkdir()
    shutil.copy(folder / "red0.png", root)
    (root / "words.txt").write_text("some words")
    elsewhere = tmp_path / "elsewhere"
    options = ["--output", elsewhere] if what.endswith("elsewhere") else []
    with page(monkeypatch, checkpoint, root, *options) as place:
        ids = {hit["kind"]: hit["id"] for hit in asked(place, "/api/first")}
        shown, text = (urlencode({"id": ids[kind]}) for kind in ("picture", "text"))
        assert ask(place, f"/thumbnail?{shown}")[0] == 200  # which is kept
        targets = ["/api/first", "/api/search?q=red", f"/api/near?{shown}", f"/api/item?{shown}"]
        targets += [f"/thumbnail?{shown}", f"/file?{shown}", f"/text?{text}"]
        capsys.readouterr()
        gone = {"files": root, ".btok": root / ".btok", "elsewhere": elsewhere}[what.split()[-1]]
        gone.rename(tmp_path / "taken out")
        answers = [ask(place, target) for target in targets]
        answers.append(ask(place, "/api/search", "POST", picture))
        for status, _, said in answers:
            assert status == 410 and json.loads(said) == {"detail": f"{what} is gone"}
        assert ask(place, "/")[0] == ask(place, "/api/about")[0] == 200
        assert capsys.readouterr().err == ""
        (tmp_path / "taken out").rename(gone)
        assert [ask(place, target)[0] for target in targets] == [200] * len(targets)


def test_a_folder_that_goes_meanwhile_is_said_to_be_gone(checkpoint, folder, monkeypatch, tmp_path):
    root = tmp_path / "files"
    root.mkdir()
    shutil.copy(folder / "red0.png", root)

    def taken_out(*_):
        root.rename(tmp_path / "taken out")
        raise ValueError("its index cannot be read")

    with page(monkeypatch, checkpoint, root) as place:
        monkeypatch.setattr(Shelf, "search", taken_out)
        status, _, said = ask(place, "/api/search?q=red")
    assert status == 410 and json.loads(said) == {"detail": "the folder files is gone"}


def test_another_site_gets_nothing(place):
    """Neither by a name that leads here, nor by a page that asks from elsewhere."""
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example"):
        assert ask(place, "/api/about", host=host)[0] == 400
    for host in ("", "[::1", "a b", "localhost@evil.example", "evil.example:localhost"):
        status, headers, said = ask(place, "/api/about", host=host)
        assert status == 400 and "is not served as" in json.loads(said)["detail"]
        assert headers["cross-origin-resource-policy"] == "same-origin"
    for host in ("localhost:1", "127.0.0.1", "[::1]:8765", "LOCALHOST.", "192.168.1.5:80"):
        assert ask(place, "/api/about", host=host)[0] == 200
    _, headers, _ = ask(place, "/api/about", origin="http://evil.example")
    assert "access-control-allow-origin" not in {name.lower() for name in headers}
    assert ask(place, "/api/about", sec_fetch_site="cross-site")[0] == 403
    assert ask(place, "/", sec_fetch_site="cross-site")[0] == 200  # a link that is followed
    assert ask(place, "/api/about", sec_fetch_site="same-origin")[0] == 200


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("/api/search?q=", "the query is empty"),
        ("/api/search?q=%20", "the query is empty"),
        ("/api/search?q=x&k=0", "greater than or equal to 1"),
        ("/api/search?q=x&k=100000", "less than or equal to 240"),
        ("/api/search?q=x&kind=sound", "'picture', 'page', 'video' or 'text'"),
        (f"/api/search?q={'x' * 8193}", "at most 8192 characters"),
        ("/thumbnail?id=x&size=huge", "size is 'huge', expected one of small, large"),
        ("/thumbnail?id=x", "no such item"),
    ],
)
def test_bad_requests_are_told_in_a_line(place, target, said):
    status, _, body = ask(place, target)
    assert status in (404, 422) and said in body.decode()


def test_bad_pictures_are_told(place):
    thin = io.BytesIO()
    Image.new("RGB", (1, 5000)).save(thin, "PNG")
    for data, why in (
        (b"no picture", "image of 10 bytes cannot be read: it is of no known format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image of 41 bytes cannot be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "image of 23 bytes cannot be read"),
        (thin.getvalue(), "image is 5000 x 1 pixels, expected an aspect ratio up to"),
        (b"", "the query is empty"),
    ):
        status, _, said = ask(place, "/api/search", "POST", data)
        assert status == 422 and json.loads(said)["detail"].startswith(why)
    large = io.BytesIO(bytes(LARGEST + 1)).getvalue()
    try:
        status, _, said = ask(place, "/api/search", "POST", large)
        assert status == 413 and "32 MiB" in json.loads(said)["detail"]
    except (BrokenPipeError, ConnectionResetError):
        pass  # refused before all of it was sent
    assert asked(place, "/api/search", q="and it goes on", k=1)


def test_a_query_as_long_as_the_page_allows(place):
    """Spelled as an address it has nine times as many bytes, more than servers take by default."""
    status, _, said = ask(place, f"/?q={quote('漢' * 8192)}")
    assert status == 200 and b"<!doctype html>" in said
    status, _, said = ask(place, f"/api/search?q={quote('漢' * 8193)}")
    assert status == 422 and "q: String should have at most 8192" in json.loads(said)["detail"]


def test_thumbnails_and_searches_at_once(place, index):
    """The model, PDFium, the readers of pictures and videos and the table, all at a time."""
    names = [id_of(index, f"{colour}{i}.png") for colour in COLOURS for i in range(4)]
    names += [id_of(index, uri) for uri in ("report.pdf", "film.mp4", "large.jpg")]
    targets = [
        target
        for number, name in enumerate(map(quote, names))
        for target in (
            f"/thumbnail?id={name}&size=large",
            f"/api/near?id={name}&k=5",
            f"/api/search?q=number%20{number}&k=5",
            f"/file?id={name}",
        )
    ]
    with ThreadPoolExecutor(len(targets)) as pool:
        together = list(pool.map(lambda target: ask(place, target), targets))
    for target, (status, _, said) in zip(targets, together, strict=True):
        assert status == 200 and said == ask(place, target)[2], target


def test_typescript_is_no_video(checkpoint, monkeypatch, tmp_path):
    """Nor is a camera's stream of the same ending a text."""
    (tmp_path / "it's.ts").write_bytes(film("mpegts", "libx264", steady(20)))
    (tmp_path / "code.ts").write_text("export const colour: string = 'red'\n")
    (tmp_path / "code.py").write_text("colour = 'red'\n")
    with page(monkeypatch, checkpoint, tmp_path) as place:
        kinds = asked(place, "/api/about")["kinds"]
        assert kinds == {"picture": 0, "page": 0, "video": 1, "text": 2}
        for kind, names in (("video", {"it's.ts"}), ("text", {"code.ts", "code.py"})):
            for path in ("/api/first", "/api/search"):
                hits = asked(place, path, kind=kind, **({"q": "red"} if "search" in path else {}))
                assert {hit["name"] for hit in hits} == names
                assert {hit["kind"] for hit in hits} == {kind}
        (video,) = asked(place, "/api/first", kind="video")
        status, _, said = ask(place, f"/text?{urlencode({'id': video['id']})}")
        assert status == 422 and "it's.ts is no text" in json.loads(said)["detail"]


def test_scores_are_those_of_a_search(monkeypatch, folder, tmp_path, capsys):
    """Also by late interaction, with fewer components, in int8, of clips, and with instructions."""
    root = tmp_path / "files"
    root.mkdir()
    for name in ("red0.png", "blue0.png", "green0.png", "film.mp4"):
        shutil.copy(folder / name, root)
    options = ["--multi-vector", "--dims", "16", "--storage", "int8", "--clip", "0.5"]
    options += ["--instruction", "of a file", "--query-instruction", "to find:"]
    checkpoint = nested_checkpoint(tmp_path / "checkpoint")
    words = "a red picture"
    assert main(["search", str(checkpoint), str(root), words, *options, "--top", "9"]) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = [re.fullmatch(r" +\d+ +(-?[\d.]+) +(.*)", line).groups() for line in lines]
    with page(monkeypatch, checkpoint, root, *options) as place:
        hits = asked(place, "/api/search", q=words)
        assert [(f"{hit['score']:.3f}", hit["name"]) for hit in hits] == expected
        clips = [hit for hit in hits if hit["kind"] == "video"]
        assert len(clips) > 1 and all(hit["end"] > hit["start"] for hit in clips)
        near = asked(place, "/api/near", id=clips[0]["id"])
        assert len(near) == len(hits) - 1
    with page(monkeypatch, checkpoint, root, "--no-update") as place:
        assert asked(place, "/api/about")["items"] == len(hits)


def test_a_model_of_text_alone_is_not_asked_by_pictures(monkeypatch, folder, tmp_path):
    model, processor = tiny_module("qwen3")
    for part in (model, processor):
        part.save_pretrained(tmp_path / "checkpoint")
    root = tmp_path / "files"
    shutil.copytree(folder / "notes", root)
    with page(monkeypatch, tmp_path / "checkpoint", root) as place:
        assert asked(place, "/api/about")["pictures"] is False
        assert len(asked(place, "/api/search", q="red")) == 2
        status, _, said = ask(place, "/api/search", "POST", (folder / "red0.png").read_bytes())
        assert status == 422 and "text" in json.loads(said)["detail"]


def test_an_unforeseen_error_is_an_answer(checkpoint, folder, place, monkeypatch, capsys):
    with page(monkeypatch, checkpoint, folder) as here:
        monkeypatch.setattr(Shelf, "first", lambda *_: 1 / 0)
        status, _, said = ask(here, "/api/first")
    assert status == 500 and "its terminal says which" in json.loads(said)["detail"]
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_ctrl_c_ends_it_also_while_a_picture_comes(checkpoint, folder, place):
    """Quietly, as does a transfer that breaks off."""
    # a shell that starts something in the background has it ignore Ctrl-C
    heeding = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    heeding += "runpy.run_module('btok', run_name='__main__')"
    command = [sys.executable, "-c", heeding, "serve", str(checkpoint), str(folder)]
    process = subprocess.Popen(
        [*command, "--port", "0", "--no-update"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    at = "127.0.0.1", int(re.match(r"http://127.0.0.1:(\d+) ", process.stdout.readline())[1])
    start = b"POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\nabc"
    with socket.create_connection(at) as broken:
        broken.sendall(start)
    with socket.create_connection(at) as waiting:
        waiting.sendall(start)
        assert ask(at, "/api/about")[0] == 200
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=300) == ("", "") and process.returncode == 0


def test_fifty_queries_at_once_are_those_alone(place):
    words = [f"{name} picture number {i}" for i in range(17) for name in COLOURS][:50]
    alone = [asked(place, "/api/search", q=each, k=5) for each in words]
    with ThreadPoolExecutor(50) as pool:
        together = list(pool.map(lambda each: asked(place, "/api/search", q=each, k=5), words))
    assert together == alone and len({json.dumps(hits) for hits in alone}) > 10


def serve(*arguments, **environ):
    command = [sys.executable, "-m", "btok", "serve", *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(**environ), timeout=600
    )
    return done.returncode, done.stderr


def test_mistakes_are_told_in_a_line(checkpoint, folder, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    new = tmp_path / "new"
    new.mkdir()
    shutil.copy(folder / "red0.png", new)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, said in (
            ((checkpoint, new, "--port", port), f"port {port} of 127.0.0.1 is taken"),
            ((checkpoint, new, "--port", -1), "port is -1, expected 0 to 65535"),
            ((checkpoint, new, "--host", "nowhere.invalid"), "which is no address of this"),
            ((checkpoint, new, "--host", "203.0.113.9"), "which is no address of this"),
            ((checkpoint, new, "--host", "a..b"), "which is no address of this"),
            ((checkpoint, new, "--host", ""), "host is '', expected an address or a name"),
            ((checkpoint, new, "--no-update", "--clip", 5), "clip is given, which is for encoding"),
            ((checkpoint, new, "--no-update"), f"python -m btok encode {checkpoint} {new}"),
            ((checkpoint, empty), "has no file that can be encoded"),
            ((checkpoint, tmp_path / "none"), "expected a folder"),
            ((tmp_path / "none", new, "--port", 0), str(tmp_path / "none")),
            ((checkpoint, new, "--output", "x.npz"), "expected an index"),
        ):
            assert main(["serve", *map(str, arguments)]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith("error: ") and said in line
    assert not (new / ".btok").exists()  # each before anything was encoded


def test_without_the_extra_it_names_it(checkpoint, folder, tmp_path):
    (tmp_path / "fastapi.py").write_text("raise ImportError('no fastapi')")
    path = f"{tmp_path}{os.pathsep}{environment()['PYTHONPATH']}"
    code, said = serve(checkpoint, folder, PYTHONPATH=path)
    assert code == 2
    assert said == 'error: the page needs fastapi and uvicorn: pip install "btok[web]"\n'


def test_an_index_of_other_things_is_refused(checkpoint, tmp_path, monkeypatch, capsys):
    """And one of another model."""
    monkeypatch.setattr(app, "run", lambda *at: None)
    encoder = BTokEncoder.from_pretrained(checkpoint)
    root = tmp_path / "files"
    root.mkdir()
    (root / "words.txt").write_text("some words")
    encoder.encode_to(root / ".btok", ["some words"], [{"id": "a", "uri": "words.txt"}])
    other = tiny_checkpoint(tmp_path / "other", seed=1)
    capsys.readouterr()  # progress bars
    for model, why in ((checkpoint, "of other things than a folder's files"), (other, "model")):
        assert main(["serve", str(model), str(root), "--no-update", "--port", "0"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and why in line


@pytest.mark.parametrize("host", ["::1", "127.0.0.2", "0.0.0.0"])
def test_by_which_names_it_is_called(checkpoint, folder, place, monkeypatch, capsys, host):
    """A page for other machines has this one's, and no site's own that leads here."""
    try:
        socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError:
        pytest.skip(f"{host} is no address here")
    with page(monkeypatch, checkpoint, folder, "--host", host) as (address, port):
        at, own = ("127.0.0.1" if host == "0.0.0.0" else address, port), socket.gethostname()
        said = capsys.readouterr()
        for name, expected in ((f"[{host}]" if ":" in host else host, 200), ("localhost", 200)):
            assert ask(at, "/api/about", host=f"{name}:{port}")[0] == expected
        assert ask(at, "/api/about", host="evil.example")[0] == 400
        everyone = host == "0.0.0.0"
        assert ask(at, "/api/about", host=f"{own.upper()}:1")[0] == (200 if everyone else 400)
    shown = {"0.0.0.0": "localhost", "::1": "[::1]"}.get(host, host)
    assert said.out.startswith(f"http://{shown}:{port}  ")
    assert ("warning: whoever reaches" in said.err) == everyone


def test_without_a_browser_it_says_where_to_look(checkpoint, folder, monkeypatch, capsys):
    monkeypatch.setattr("webbrowser.open", lambda url: False)
    ran = []
    monkeypatch.setattr(app, "run", lambda *at: ran.append(at))
    assert main(["serve", str(checkpoint), str(folder), "--port", "0", "--browser"]) == 0
    said = capsys.readouterr()
    assert "no browser was found here; open http://127.0.0.1:" in said.err
    assert f"35 items of {printable(folder)}" in said.out and len(ran) == 1


def test_an_index_is_served_as_it_is(checkpoint, folder, monkeypatch, tmp_path, capsys):
    """Other addresses than this machine's own are warned of."""
    root = tmp_path / "files"
    root.mkdir()
    shutil.copy(folder / "red0.png", root)
    assert main(["encode", str(checkpoint), str(root)]) == 0
    shutil.copy(folder / "red1.png", root)
    monkeypatch.setattr(app, "run", lambda *at: None)
    line = ["serve", str(checkpoint), str(root), "--port", "0", "--no-update", "--host", "0.0.0.0"]
    capsys.readouterr()
    assert main(line) == 0
    said = capsys.readouterr()
    assert f"  1 items of {printable(root)}" in said.out and "http://localhost:" in said.out
    assert said.err == "warning: whoever reaches 0.0.0.0 can open the indexed files\n"


def test_names_of_any_bytes(checkpoint, folder, monkeypatch, tmp_path):
    root = tmp_path / "files"
    root.mkdir()
    names = [b"caf\xe9.png", b"ein Name\nin zwei Zeilen.png", "\u202egnp.exe.png".encode()]
    for name in names:
        shutil.copy(folder / "red0.png", os.fsencode(root) + b"/" + name)
    with page(monkeypatch, checkpoint, root) as place:
        hits = asked(place, "/api/first")
        assert len(hits) == 3 and all(hit["name"].isprintable() for hit in hits)
        for hit in hits:
            status, headers, data = ask(place, f"/file?id={quote(hit['id'])}")
            assert status == 200 and data == (folder / "red0.png").read_bytes()
            assert "\n" not in headers["content-disposition"]
