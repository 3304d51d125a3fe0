"""The page's server: searches, thumbnails and files, and what it must not give away."""

import http.client
import io
import json
import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote, urlencode

import pytest
from helpers import environment, tiny_checkpoint
from PIL import Image
from web_folder import COLOURS, HOSTILE, fill, served

from btok import BTokEncoder
from btok.files import printable
from btok.tools.cli import main
from btok.tools.index import Index

pytest.importorskip("fastapi")
from btok.tools.web.app import LARGEST
from btok.tools.web.shelf import Shelf


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
    connection = http.client.HTTPConnection(*place, timeout=60)
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
    stamped = {"id": "x"}
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
    stat = (root / "red2.png").stat()
    had = {"uri": "red2.png", "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    assert shelf.path(had) == root / "red2.png"
    (root / "red2.png").write_bytes((tmp_path / "secret.txt").read_bytes())
    with pytest.raises(FileNotFoundError, match="changed since it was indexed"):
        shelf.path(had)


def test_a_file_that_changes_meanwhile_is_not_given(checkpoint, folder, tmp_path):
    root = tmp_path / "files"
    root.mkdir()
    for name in ("red0.png", "red1.png", "blue0.png"):
        shutil.copy(folder / name, root)
    with served(checkpoint, root) as place:
        names = {hit["name"]: hit["id"] for hit in asked(place, "/api/first")}
        (root / "red0.png").unlink()
        (root / "red1.png").write_bytes(b"other")
        for name, why in (("red0.png", "is gone"), ("red1.png", "changed")):
            for path in ("/file", "/thumbnail"):
                status, _, said = ask(place, f"{path}?{urlencode({'id': names[name]})}")
                assert status == 410 and why in json.loads(said)["detail"]
        assert ask(place, f"/file?{urlencode({'id': names['blue0.png']})}")[0] == 200
        assert len(asked(place, "/api/search", q="red")) == 3  # vectors are still there


def test_another_site_gets_nothing(place):
    """Neither by a name that leads here, nor by a page that asks from elsewhere."""
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example"):
        assert ask(place, "/api/about", host=host)[0] == 400
    for host in ("localhost:1", "127.0.0.1"):
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
    for data, why in ((b"no picture", "of no known format"), (b"", "the query is empty")):
        status, _, said = ask(place, "/api/search", "POST", data)
        assert status == 422 and why in json.loads(said)["detail"]
    large = io.BytesIO(bytes(LARGEST + 1)).getvalue()
    try:
        status, _, said = ask(place, "/api/search", "POST", large)
        assert status == 413 and "32 MiB" in json.loads(said)["detail"]
    except (BrokenPipeError, ConnectionResetError):
        pass  # refused before all of it was sent
    assert asked(place, "/api/search", q="and it goes on", k=1)


def test_fifty_queries_at_once_are_those_alone(place):
    words = [f"{name} picture number {i}" for i in range(17) for name in COLOURS][:50]
    alone = [asked(place, "/api/search", q=each, k=5) for each in words]
    with ThreadPoolExecutor(50) as pool:
        together = list(pool.map(lambda each: asked(place, "/api/search", q=each, k=5), words))
    assert together == alone and len({json.dumps(hits) for hits in alone}) > 10


def serve(*arguments, **environ):
    command = [sys.executable, "-m", "btok", "serve", *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(**environ), timeout=120
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


def test_without_a_browser_it_says_where_to_look(checkpoint, folder, monkeypatch, capsys):
    import btok.tools.web.app as app

    monkeypatch.setattr("webbrowser.open", lambda url: False)
    ran = []
    monkeypatch.setattr(app, "run", lambda *at: ran.append(at))
    assert main(["serve", str(checkpoint), str(folder), "--port", "0", "--browser"]) == 0
    said = capsys.readouterr()
    assert "no browser was found here; open http://127.0.0.1:" in said.err
    assert f"35 items of {printable(folder)}" in said.out and len(ran) == 1


def test_an_index_is_served_as_it_is(checkpoint, folder, monkeypatch, tmp_path, capsys):
    """Other addresses than this machine's own are warned of."""
    import btok.tools.web.app as app

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


def test_names_of_any_bytes(checkpoint, folder, tmp_path):
    root = tmp_path / "files"
    root.mkdir()
    names = [b"caf\xe9.png", b"ein Name\nin zwei Zeilen.png", "\u202egnp.exe.png".encode()]
    for name in names:
        shutil.copy(folder / "red0.png", os.fsencode(root) + b"/" + name)
    with served(checkpoint, root) as place:
        hits = asked(place, "/api/first")
        assert len(hits) == 3 and all(hit["name"].isprintable() for hit in hits)
        for hit in hits:
            status, headers, data = ask(place, f"/file?id={quote(hit['id'])}")
            assert status == 200 and data == (folder / "red0.png").read_bytes()
            assert "\n" not in headers["content-disposition"]
