"""An index whose writer was killed, without warning, is gone on with: nothing lost or twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import environment, held, noting, same, tiny_checkpoint
from PIL import Image
from test_index import IDS

from btok import Side


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def kill_at(code, arguments, ready):
    """Run code in a process of its own and kill it, without warning, once something is so."""
    child = subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment())
    try:
        until = time.monotonic() + 120
        while not ready():
            assert child.poll() is None and time.monotonic() < until
            time.sleep(0.005)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()


KILLS = """
import json, os, random, signal, sys, time
from pathlib import Path
import btok.tools.encode
import lance  # not used before a fork, which its threads would not survive
from btok import BTokEncoder
from helpers import counted
from test_index import IDS, TEXTS
btok.tools.encode.PART, btok.tools.encode.SECONDS = 4, 0
encoder = BTokEncoder.from_pretrained(sys.argv[1])
place, out, rng = sys.argv[2], Path(sys.argv[3]), random.Random(0)

def child(what, name):
    if pid := os.fork():
        return pid
    status = 1
    try:
        what(name)
        status = 0
    finally:
        os._exit(status)

def run(name):
    encoder.encode_to(f"{place}/{name}", TEXTS, IDS, show_progress=False)

def again(name):
    from btok.tools import index
    before = set()
    if index.is_there(f"{place}/{name}"):
        ids = [b["id"].to_pylist() for b in index.Index.open(f"{place}/{name}").rows(["id"])]
        before = {each for of_batch in ids for each in of_batch}
    made = counted(encoder)
    run(name)
    (out / f"{name}.json").write_text(json.dumps([sorted(before), sorted(made)]))

start = time.monotonic()
assert os.waitpid(child(run, "whole"), 0)[1] == 0
whole = time.monotonic() - start
for number in map(str, range(int(sys.argv[4]))):
    pid = child(run, number)
    time.sleep(rng.random() * whole)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert os.waitpid(child(again, number), 0)[1] == 0
"""


def killed_anywhere(checkpoint, place, out, times):
    """Kill in random places, and go on: every id once, no vector made twice after it was
    committed.
    """
    command = [sys.executable, "-c", KILLS, str(checkpoint), str(place), str(out), str(times)]
    subprocess.run(command, env=environment(), check=True, timeout=900)
    whole, stopped = held(f"{place}/whole"), []
    assert sorted(whole) == sorted(IDS)
    for number in range(times):
        before, made = json.loads((out / f"{number}.json").read_text())
        assert sorted([*before, *made]) == sorted(IDS)
        assert same(held(f"{place}/{number}"), whole)
        stopped.append(len(before))
    assert len(set(stopped)) > 2, stopped  # the kills came at different times


def test_killed_anywhere_and_started_again(checkpoint, tmp_path):
    killed_anywhere(checkpoint, tmp_path / "indexes", tmp_path, 20)


def mixed(folder, count=2000):
    """Texts, pictures as files, bytes and arrays, a few videos, and four that cannot be read."""
    rng = np.random.default_rng(0)
    inputs: list = [f"text {i} " + "x" * (7 * i % 31) for i in range(count)]
    for i in range(3, count, 8):
        picture = rng.integers(0, 256, (*rng.integers(8, 40, 2), 3), dtype=np.uint8)
        path, kind = folder / f"{i}.jpg", i // 8 % 4
        if kind < 2:
            Image.fromarray(picture).save(path)
        frames = Side(f"video {i}", video=[picture, picture[::-1].copy()])
        inputs[i] = (path, path.read_bytes() if kind == 1 else None, picture, frames)[kind]
    broken = {10: "cut.jpg", count // 3: "bomb.png", count // 2: "", count - 2: "gone.png"}
    for i, name in broken.items():
        inputs[i] = folder / name if name else ""
    picture = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(picture).save(folder / "cut.jpg")
    os.truncate(folder / "cut.jpg", (folder / "cut.jpg").stat().st_size - 200)
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    return inputs, [f"id {i}" for i in range(count)], broken


HALF = """
import sys, time
from pathlib import Path
import btok.tools.encode
from btok import BTokEncoder
from test_index_kills import mixed
checkpoint, index, folder = sys.argv[1:]
btok.tools.encode.PART, btok.tools.encode.SECONDS = 250, 0
inputs, ids, _ = mixed(Path(folder))
def stopping():
    for i, value in enumerate(inputs):
        time.sleep(600 if i == 1100 else 0)
        yield value
BTokEncoder.from_pretrained(checkpoint).encode_to(index, stopping(), ids)
"""


def test_2000_mixed_inputs_killed_halfway(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("btok.tools.encode.PART", 250)
    monkeypatch.setattr("btok.tools.encode.SECONDS", 0)
    encoder = noting(checkpoint, prepared := [])
    folder = tmp_path / "inputs"
    folder.mkdir()
    inputs, ids, broken = mixed(folder)
    done = encoder.encode_to(tmp_path / "whole", inputs, ids)
    whole = held(tmp_path / "whole")
    assert whole.keys() == {x for i, x in enumerate(ids) if i not in broken}
    assert done.unreadable.keys() == {ids[i] for i in broken}
    reasons = ("truncated", "decompression bomb", "it is empty", "No such file")
    for (i, name), reason in zip(sorted(broken.items()), reasons, strict=True):
        assert reason in done.unreadable[ids[i]] and name in done.unreadable[ids[i]]
    picked = [0, *range(3, 2000, 80), 1999]
    alone = np.concatenate([encoder.encode([inputs[i]]) for i in picked])
    assert np.abs(np.stack([whole[ids[i]][1] for i in picked]) - alone).max() < 1e-6

    half = tmp_path / "half"

    def halfway():
        return len([*half.glob("_versions/*.manifest")]) == 5  # the empty table, then four parts

    kill_at(HALF, [checkpoint, half, folder], halfway)
    prepared.clear()
    encoder.encode_to(half, inputs, ids)
    # of the other half all but the empty one, which never came so far; two are tried again
    assert len(prepared) == 999 + 2
    assert same(held(half), whole)
