"""An index at an address of S3's, which moto's server on this machine answers to."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress

import pytest
from helpers import gloo, held, same, spawn, tiny_checkpoint
from test_index import IDS, TEXTS
from test_index_kills import killed_anywhere

from btok import BTokEncoder
from btok.tools.cli import main
from btok.tools.index import Index

pytest.importorskip("moto.server", reason="moto is not installed: pip install 'moto[s3,server]'")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def store():
    """The address of a bucket, for this process and its children."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address, before = f"http://127.0.0.1:{port}", dict(os.environ)
    os.environ |= {"AWS_ENDPOINT": address, "AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1"}
    os.environ |= {"AWS_ACCESS_KEY_ID": "some", "AWS_SECRET_ACCESS_KEY": "thing"}
    try:
        until = time.monotonic() + 60
        while True:
            with suppress(OSError):
                urllib.request.urlopen(urllib.request.Request(f"{address}/bucket", method="PUT"))
                break
            assert server.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        yield "s3://bucket"
    finally:
        server.kill()
        server.wait()
        os.environ.clear()
        os.environ |= before


def test_a_folder_in_an_object_store(store, checkpoint, tmp_path, capsys):
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"text {i}")
    (tmp_path / "empty.txt").touch()
    there, here = f"{store}/folder", tmp_path / ".btok"
    for output in (there, str(here)):
        assert main(["encode", str(checkpoint), str(tmp_path), "--output", output]) == 0
    assert same(held(there), held(here))
    version = Index.open(there).dataset.version
    assert main(["encode", str(checkpoint), str(tmp_path), "--output", there]) == 0
    assert Index.open(there).dataset.version == version  # nothing new, nothing written
    (tmp_path / "7.txt").rename(tmp_path / "seven.txt")
    (tmp_path / "8.txt").unlink()
    capsys.readouterr()
    asked = ["text 7", "--output", there, "--where", "uri LIKE 'se%'"]
    assert main(["search", str(checkpoint), str(tmp_path), *asked]) == 0
    said = capsys.readouterr()
    assert said.out.split() == ["1", "1.000", "seven.txt"]
    assert "19 files, 0 of them new or changed, 1 gone, 1 unreadable" in said.err
    assert main(["index", there]) == 0
    assert "19 vectors of float32 [64], 19 files" in capsys.readouterr().out


def test_killed_anywhere(store, checkpoint, tmp_path):
    killed_anywhere(checkpoint, f"{store}/kills", tmp_path, 20)


def on_two_ranks(rank, folder, uri, checkpoint):
    import btok.tools.encode

    btok.tools.encode.PART, btok.tools.encode.SECONDS = 2, 0  # eleven commits, by two at once
    with gloo(folder, rank, 2):
        done = BTokEncoder.from_pretrained(checkpoint).encode_to(uri, TEXTS, IDS)
        assert done == (22, 22, [], {}, None)


def test_two_ranks_commit_at_once(store, checkpoint, tmp_path):
    uri = f"{store}/two"
    spawn(on_two_ranks, (str(tmp_path), uri, checkpoint), nprocs=2)
    BTokEncoder.from_pretrained(checkpoint).encode_to(tmp_path / "one", TEXTS, IDS)
    assert same(held(uri), held(tmp_path / "one"))


def test_what_an_object_store_refuses_is_told_in_a_line(store, checkpoint):
    with pytest.raises(ValueError, match=r"^s3://none/index: .*404.*bucket does not exist") as told:
        BTokEncoder.from_pretrained(checkpoint).encode_to("s3://none/index", TEXTS, IDS)
    assert "\n" not in str(told.value) and "<" not in str(told.value)
