"""The index on disk: what it holds, what survives a kill, what it refuses, ranks."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch.multiprocessing as mp
from helpers import gloo, tiny_checkpoint
from PIL import Image

from btok import BTokEncoder, Side, files
from btok.adapters import Lora
from btok.model import BTokModel, model_digest
from btok.tools import index as index_module
from btok.tools.index import open_index

TEXTS = [f"text {i} " + "x" * (7 * i % 31) for i in range(22)]
IDS = [f"id {i}" for i in range(22)]
NOISE = random.Random(0).randbytes(5000)
COUNTED: list[str] = []  # texts that were prepared


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def loaded(checkpoint):
    encoder = BTokEncoder.from_pretrained(checkpoint)
    processor = encoder.processor

    class Counting:
        def __getattr__(self, name):
            return getattr(processor, name)

        def __call__(self, side):
            COUNTED.append(side.text)
            return processor(side)

    encoder.processor = Counting()
    return encoder


@pytest.fixture
def encoder(loaded, monkeypatch):
    monkeypatch.setattr("btok.tools.index.PART", 4)
    COUNTED.clear()
    return loaded


@pytest.fixture(scope="module")
def whole(loaded, tmp_path_factory):
    """The bytes of an uninterrupted call."""
    folder = tmp_path_factory.mktemp("whole") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("btok.tools.index.PART", 4)
        loaded.encode_to(folder, TEXTS, IDS)
    return content(folder)


def content(folder):
    """Bytes of the manifest, the vectors and the items; there is no other file."""
    meta = json.loads((folder / "meta.json").read_text())
    names = ["meta.json", meta["vectors"], meta["items"]]
    there = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    assert sorted(there) == sorted(names)
    return [(folder / name).read_bytes() for name in names]


def as_format_1(folder):
    """Turn an index into what was written before there were parts; gives its `meta`."""
    meta = json.loads((folder / "meta.json").read_text()) | {"format_version": 1}
    for key, name in (("vectors", "vectors.npy"), ("items", "items.jsonl")):
        (folder / meta.pop(key)).rename(folder / name)
    (folder / "parts").rmdir()
    (folder / "meta.json").write_text(json.dumps(meta))
    return meta


def test_what_a_store_holds(encoder, checkpoint, tmp_path):
    items = [{"id": name, "page": i} for i, name in enumerate(IDS)]
    store = encoder.encode_to(tmp_path / "store", iter(TEXTS), iter(items), show_progress=False)
    content(tmp_path / "store")
    meta = json.loads((tmp_path / "store/meta.json").read_text())
    vectors = np.load(tmp_path / "store" / meta["vectors"])
    assert isinstance(store.vectors, np.memmap) and Path(meta["vectors"]).parent == Path("parts")
    assert vectors.dtype == np.float32 and np.array_equal(vectors, store.vectors)
    assert np.abs(vectors - encoder.encode(TEXTS)).max() < 1e-6
    lines = (tmp_path / "store" / meta["items"]).read_text().splitlines()
    assert [json.loads(line) for line in lines] == items == store.items
    assert meta == store.meta and meta["format_version"] == 2
    assert meta["model"] == model_digest(checkpoint) and meta["count"] == 22
    assert meta["settings"]["num_btoks"] == 4 and meta["unreadable"] == {}


def test_an_index_of_the_first_format_opens(encoder, checkpoint, tmp_path):
    vectors = np.eye(2, 64, dtype=np.float32)
    np.save(tmp_path / "vectors.npy", vectors)
    (tmp_path / "items.jsonl").write_text('{"id": "a", "page": 1}\n{"id": "b"}\n')
    settings = {"instruction": "Find:", "pooling": "btok", "num_btoks": 4, "dtype": "torch.float32"}
    settings["vision_positions"] = encoder.model.settings.vision_positions
    for name in ("min_pixels", "max_pixels", "min_frame_pixels", "max_frame_pixels"):
        settings[name] = getattr(encoder.processor.image_processor, name)
    meta = {"format_version": 1, "model": model_digest(checkpoint), "settings": settings}
    meta |= {"count": 2, "unreadable": {"c": "it is empty"}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    index = open_index(encoder, tmp_path, "Find:")
    assert index.items == [{"id": "a", "page": 1}, {"id": "b"}] and index.meta == meta
    assert np.array_equal(index.vectors, vectors)
    index = encoder.encode_to(tmp_path, ["of a", "new"], ["a", "c"], "Find:")
    assert COUNTED == ["Find: new"] and np.array_equal(index.vectors[0], vectors[0])
    assert index.meta["format_version"] == 2 and index.meta["model"] == meta["model"]
    content(tmp_path)


def test_an_index_of_the_first_format_stays_where_nothing_is_new(encoder, tmp_path):
    encoder.encode_to(tmp_path / "store", TEXTS[:3], IDS[:3])
    meta = as_format_1(tmp_path / "store")
    COUNTED.clear()
    index = encoder.encode_to(tmp_path / "store", TEXTS[:3], IDS[:3])
    assert not COUNTED and index.meta == meta and len(index.vectors) == 3
    files = ["items.jsonl", "meta.json", "vectors.npy"]
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == files


@pytest.mark.parametrize("moved", range(4))
def test_a_kill_of_the_first_format_is_put_right(encoder, tmp_path, moved):
    """It moved finished files from `.ready` over the old ones, one by one, parts still there."""
    old, store = tmp_path / "old", tmp_path / "store"
    encoder.encode_to(old, TEXTS[:2], IDS[:2])
    encoder.encode_to(store, TEXTS[:6], IDS[:6])
    as_format_1(old)
    meta = as_format_1(store)
    vectors = np.load(store / "vectors.npy")
    (store / ".ready").mkdir()
    (store / ".draft").mkdir()
    (store / ".draft/vectors.npy").write_bytes(b"cut")
    for name in ("vectors.npy", "items.jsonl", "meta.json")[moved:]:
        (store / name).rename(store / ".ready" / name)
        shutil.copy(old / name, store / name)
    index = open_index(encoder, store)
    assert index.meta == meta and np.array_equal(index.vectors, vectors)
    COUNTED.clear()
    index = encoder.encode_to(store, TEXTS[:7], IDS[:7])
    assert [TEXTS[6]] == COUNTED and np.array_equal(index.vectors[:6], vectors)
    content(store)


def test_an_error_in_the_middle_and_on_again(encoder, whole, tmp_path):
    def breaking():
        yield from TEXTS[:10]
        raise KeyError("gone")

    with pytest.raises(KeyError):
        encoder.encode_to(tmp_path / "store", breaking(), IDS)
    assert open_index(encoder, tmp_path / "store").meta["count"] == 0
    assert len(list((tmp_path / "store/parts").iterdir())) == 2
    COUNTED.clear()
    encoder.encode_to(tmp_path / "store", TEXTS, IDS)
    assert sorted(COUNTED) == sorted(TEXTS[8:])
    assert content(tmp_path / "store") == whole
    COUNTED.clear()
    files = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    before = [path.stat().st_mtime_ns for path in files]
    encoder.encode_to(tmp_path / "store", TEXTS, IDS)
    assert not COUNTED and [path.stat().st_mtime_ns for path in files] == before


STEPS = ((os, "replace"), (os, "fsync"), (os, "unlink"), (np.lib.format, "open_memmap"))


@pytest.mark.parametrize("start", ["fresh", "old", "format 1"])
def test_a_kill_at_any_step_of_writing_loses_nothing(encoder, tmp_path, monkeypatch, start):
    """Each of these steps is once the last that a process does, and once what it dies before."""
    real = {step: getattr(*step) for step in STEPS}
    items = {"new": [{"id": name} for name in IDS[:6]], "none": []}
    whole = encoder.encode_to(tmp_path / "whole", TEXTS[:6], IDS[:6])
    old = encoder.encode_to(tmp_path / "old", ["an old one", *TEXTS[:3]], ["old", *IDS[:3]])
    if start == "format 1":
        as_format_1(tmp_path / "old")
    for dies in range(1, 1000):
        folder, calls = tmp_path / str(dies), 0
        if start != "fresh":
            shutil.copytree(tmp_path / "old", folder)

        def step(function, *arguments, dies=dies, **keywords):
            nonlocal calls
            calls += 1
            if 2 * calls <= dies:
                result = function(*arguments, **keywords)
            if 2 * calls >= dies:  # the dead clear nothing up either
                raise KeyboardInterrupt
            return result

        for (where, name), function in real.items():
            monkeypatch.setattr(where, name, partial(step, function))
        try:
            encoder.encode_to(folder, TEXTS[:6], IDS[:6])
            break
        except KeyboardInterrupt:
            pass
        for (where, name), function in real.items():
            monkeypatch.setattr(where, name, function)
        found = open_index(encoder, folder)
        assert found.items in ([] if start == "fresh" else old.items, items["new"])
        done = {item["id"] for item in found.items}
        for _, ids, _ in index_module._parts(folder):
            done.update(ids)
        assert dies < 14 or len(done) > 3  # a part is there after its sync and two renames
        COUNTED.clear()
        store = encoder.encode_to(folder, TEXTS[:6], IDS[:6])
        lacking = [TEXTS[i] for i in range(6) if IDS[i] not in done]
        assert sorted(COUNTED) == sorted(lacking)
        assert store.items == items["new"]
        content(folder)
        if start == "fresh":
            assert content(folder) == content(tmp_path / "whole")
        assert np.abs(store.vectors - whole.vectors).max() < 1e-6
    for (where, name), function in real.items():
        monkeypatch.setattr(where, name, function)
    assert dies > 30


CHILD = """
import sys, time
import btok.tools.index
from btok import BTokEncoder
from test_index import IDS, TEXTS
btok.tools.index.PART = 4
def slow():
    for i, text in enumerate(TEXTS):
        time.sleep(60 if i == 17 else 0)
        yield text
BTokEncoder.from_pretrained(sys.argv[1]).encode_to(sys.argv[2], slow(), IDS)
"""


def kill_at(code, arguments, ready):
    """Run code in a process of its own and kill it, without warning, once something is so."""
    root = Path(__file__).parent.parent
    path = os.pathsep.join(map(str, (root, root / "kernels", root / "tests")))
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), path)))
    command = [sys.executable, "-c", code, *arguments]
    child = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
    try:
        until = time.monotonic() + 120
        while not ready():
            assert child.poll() is None and time.monotonic() < until
            time.sleep(0.005)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()


def test_killed_and_started_again_the_bytes_are_the_same(encoder, whole, checkpoint, tmp_path):
    folder = tmp_path / "store"
    kill_at(CHILD, [checkpoint, folder], lambda: list((folder / "parts").glob("*.npz")))
    encoder.encode_to(folder, TEXTS, IDS)
    assert 0 < len(COUNTED) <= 18
    assert content(folder) == whole


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
import btok.tools.index
from btok import BTokEncoder
from test_index import mixed
checkpoint, store, folder = sys.argv[1:]
btok.tools.index.PART = 250
inputs, ids, _ = mixed(Path(folder))
def stopping():
    for i, value in enumerate(inputs):
        time.sleep(600 if i == 1100 else 0)
        yield value
BTokEncoder.from_pretrained(checkpoint).encode_to(store, stopping(), ids)
"""


def test_2000_mixed_inputs_killed_halfway(loaded, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("btok.tools.index.PART", 250)
    folder = tmp_path / "inputs"
    folder.mkdir()
    inputs, ids, broken = mixed(folder)
    store = loaded.encode_to(tmp_path / "whole", inputs, ids)
    assert [item["id"] for item in store.items] == [x for i, x in enumerate(ids) if i not in broken]
    told = store.meta["unreadable"]
    assert list(told) == [ids[i] for i in sorted(broken)]
    reasons = ("truncated", "decompression bomb", "it is empty", "No such file")
    for (i, name), reason in zip(sorted(broken.items()), reasons, strict=True):
        assert reason in told[ids[i]] and name in told[ids[i]]
    picked = [0, *range(3, 2000, 80), 1999]
    rows = [next(r for r, item in enumerate(store.items) if item["id"] == ids[i]) for i in picked]
    alone = np.concatenate([loaded.encode([inputs[i]]) for i in picked])
    assert np.abs(store.vectors[rows] - alone).max() < 1e-6

    half = tmp_path / "half"
    kill_at(HALF, [checkpoint, half, folder], lambda: len([*half.glob("parts/*.npz")]) == 4)
    COUNTED.clear()
    loaded.encode_to(half, inputs, ids)
    assert len(COUNTED) == 999  # of the other half, the empty one never came so far
    assert content(half) == content(tmp_path / "whole")


def test_only_what_is_new_is_encoded(encoder, tmp_path):
    encoder.encode_to(tmp_path / "store", TEXTS[:9], IDS[:9])
    COUNTED.clear()
    texts = [TEXTS[8], "changed", TEXTS[0], "new", *TEXTS[3:6]]
    items = [{"id": "id 8", "note": 1}, "id 1b", "id 0", "new", *IDS[3:6]]
    store = encoder.encode_to(tmp_path / "store", texts, items)
    assert sorted(COUNTED) == ["changed", "new"]
    assert store.items[:2] == [{"id": "id 8", "note": 1}, {"id": "id 1b"}]
    assert [item["id"] for item in store.items[2:]] == items[2:]
    assert np.abs(store.vectors - encoder.encode(texts)).max() < 1e-6


def test_unreadable_inputs_are_reported_and_tried_again(encoder, tmp_path):
    inputs, late = list(TEXTS[:9]), tmp_path / "late.txt"
    for i in range(4, 9):  # all of the second part, one of the third
        inputs[i] = late
    store = encoder.encode_to(tmp_path / "store", inputs, IDS[:9])
    assert [item["id"] for item in store.items] == IDS[:4]
    assert list(store.meta["unreadable"]) == IDS[4:9]
    assert all("late.txt" in reason for reason in store.meta["unreadable"].values())
    late.write_text("here now")
    store = encoder.encode_to(tmp_path / "store", inputs, IDS[:9])
    assert [item["id"] for item in store.items] == IDS[:9] and not store.meta["unreadable"]
    assert np.abs(store.vectors - encoder.encode(inputs)).max() < 1e-6


def test_unreadable_inputs_do_not_move_the_rest_after_a_stop(encoder, tmp_path, monkeypatch):
    inputs, parts, part = ["", *TEXTS[1:9], "", *TEXTS[10:]], [], index_module._part

    def noted(folder, name, holds):
        if name == "{}.npz":
            ids, unreadable = json.loads(holds)
            parts.append({*ids, *unreadable})
        return part(folder, name, holds)

    monkeypatch.setattr(index_module, "_part", noted)

    def breaking():
        yield from inputs[:10]
        raise KeyError("gone")

    with pytest.raises(KeyError):
        encoder.encode_to(tmp_path / "parts", breaking(), IDS)
    COUNTED.clear()
    store = encoder.encode_to(tmp_path / "parts", inputs, IDS)
    assert sorted(COUNTED) == sorted([TEXTS[8], *TEXTS[10:]])
    assert list(store.meta["unreadable"]) == [IDS[0], IDS[9]]
    assert parts == [set(IDS[i : i + 4]) for i in range(0, 22, 4)]
    encoder.encode_to(tmp_path / "whole", inputs, IDS)
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def test_parts_that_another_process_took_are_missed(encoder, tmp_path):
    commit = index_module._commit

    def robbed(index, order):
        next((tmp_path / "store/parts").glob("*.npz")).unlink()
        return commit(index, order)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "_commit", robbed)
        with pytest.raises(ValueError, match="of 22 vectors are there; if another process"):
            encoder.encode_to(tmp_path / "store", TEXTS, IDS)
    assert len(encoder.encode_to(tmp_path / "store", TEXTS, IDS).items) == 22


def test_files_that_another_process_removed_first(encoder, tmp_path, monkeypatch):
    """What is to be removed may be gone; for what is to be kept there is a line."""
    unlink, rename = Path.unlink, files.rename

    def second(path, missing_ok=False):
        unlink(path, missing_ok=True)
        unlink(path, missing_ok=missing_ok)

    def robbed(path, target):
        if "vectors" in target.name:
            unlink(path)
        rename(path, target)

    monkeypatch.setattr(Path, "unlink", second)
    with monkeypatch.context() as patch:
        patch.setattr(files, "rename", robbed)
        with pytest.raises(ValueError, match=r"store: .*No such file.*; if another process writes"):
            encoder.encode_to(tmp_path / "store", TEXTS, IDS)
    assert len(encoder.encode_to(tmp_path / "store", TEXTS, IDS).items) == 22


def test_a_damaged_part_is_named(encoder, tmp_path):
    """With what to do, after which the same call ends on the same bytes."""

    def breaking():
        yield from TEXTS[:10]
        raise KeyError("gone")

    encoder.encode_to(tmp_path / "whole", TEXTS, IDS)
    with pytest.raises(KeyError):
        encoder.encode_to(tmp_path / "store", breaking(), IDS)
    part = min((tmp_path / "store/parts").glob("*.npz"))
    good = part.read_bytes()
    rows = good.index(b"rows.npy") + 200  # a bit of a vector
    array, others = io.BytesIO(), io.BytesIO()
    np.save(array, np.zeros(3))
    np.savez(others, text=np.zeros(3, np.uint8))
    damaged = [b"", NOISE, good[:-9], good[: len(good) // 2], array.getvalue(), others.getvalue()]
    for bytes_ in (*damaged, good[:rows] + bytes([good[rows] ^ 1]) + good[rows + 1 :]):
        part.write_bytes(bytes_)
        text = rf"^\S*{part.name} cannot be read \(.*\); delete it, and the same command makes its"
        with pytest.raises(ValueError, match=text):
            encoder.encode_to(tmp_path / "store", TEXTS, IDS)
        assert open_index(encoder, tmp_path / "store").meta["count"] == 0
    part.unlink()
    encoder.encode_to(tmp_path / "store", TEXTS, IDS)
    assert content(tmp_path / "store") == content(tmp_path / "whole")


def test_vectors_that_no_manifest_names_are_not_trusted(encoder, tmp_path, monkeypatch):
    """Those of a call that was killed before its manifest was there, then damaged."""
    encoder.encode_to(tmp_path / "whole", TEXTS, IDS)
    zeros = io.BytesIO()
    np.save(zeros, np.zeros((22, 64), np.float32))
    for case, damage in enumerate([b"", NOISE, zeros.getvalue()]):
        store = tmp_path / str(case)
        open_index(encoder, store)
        with monkeypatch.context() as patch, pytest.raises(TypeError):
            patch.setattr(index_module, "write_text", None)
            encoder.encode_to(store, TEXTS, IDS)
        (vectors,) = (store / "parts").glob("vectors-*")
        vectors.write_bytes(damage)
        encoder.encode_to(store, TEXTS, IDS)
        assert content(store) == content(tmp_path / "whole")


def test_a_store_of_something_else_is_refused(encoder, tmp_path):
    store = tmp_path / "store"
    encoder.encode_to(store, TEXTS[:2], IDS[:2])
    before = content(store)
    other = BTokEncoder.from_pretrained(tiny_checkpoint(tmp_path / "other", seed=1))
    for wrong, instruction, message in (
        (other, None, "holds vectors of model .*; delete it or give another folder"),
        (encoder, "Find: ", "holds vectors of instruction '', this is 'Find: '"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong.encode_to(store, TEXTS[:2], IDS[:2], instruction)
    assert content(store) == before
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/me.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="photos is no index and not empty"):
        encoder.encode_to(tmp_path / "photos", TEXTS[:2], IDS[:2])
    with pytest.raises(ValueError, match=r"use BTokEncoder\.from_pretrained"):
        BTokEncoder(encoder.model, encoder.processor).encode_to(tmp_path / "new", ["a"], ["a"])


def test_bad_inputs_are_refused_and_the_store_stays(encoder, tmp_path):
    store = tmp_path / "store"
    encoder.encode_to(store, TEXTS[:2], IDS[:2])
    before = content(store)
    with pytest.raises(ValueError, match="the id 'b' came twice"):
        encoder.encode_to(store, ["x", "y", "z"], ["b", "a", "b"])
    with pytest.raises(ValueError, match="none of 2 inputs can be read, the first: it is empty"):
        encoder.encode_to(store, ["", tmp_path / "no.txt"], ["c", "d"])
    with pytest.raises(ValueError, match="none of 0 inputs"):
        encoder.encode_to(store, [], [])
    with pytest.raises(ValueError, match="shorter"):
        encoder.encode_to(store, ["x", "y"], ["b"])
    encoder.encode_to(store, TEXTS[:2], IDS[:2])
    assert content(store) == before


def test_processes_without_a_group_are_refused(encoder, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="init_process_group"):
        encoder.encode_to(tmp_path / "store", TEXTS[:2], IDS[:2])
    assert not (tmp_path / "store").exists()


def test_the_digest_is_of_weights_and_settings(checkpoint, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in checkpoint.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert model_digest(copy) == model_digest(checkpoint)
    (copy / "optimizer.safetensors").write_bytes(b"moments")
    assert model_digest(copy) == model_digest(checkpoint)
    for name in ("btok_config.json", "model.safetensors"):
        digest = model_digest(copy)
        with open(copy / name, "ab") as file:
            file.write(b" ")
        assert model_digest(copy) != digest
    with pytest.raises(ValueError, match="holds no weights"):
        model_digest(tmp_path)


def test_the_digest_of_adapters_is_of_their_base_too(checkpoint, tmp_path):
    pytest.importorskip("peft")
    base, folder = tmp_path / "base", tmp_path / "lora"
    shutil.copytree(checkpoint, base)
    BTokModel.from_pretrained(base, lora=Lora(rank=2)).save_pretrained(folder)
    digest = model_digest(folder)
    assert digest != model_digest(base)
    base.rename(tmp_path / "moved")
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "moved")}
    file.write_text(json.dumps(config))
    assert model_digest(folder) == digest  # the same vectors
    file.write_text(json.dumps(config | {"lora_alpha": 7}))
    assert model_digest(folder) != digest
    file.write_text(json.dumps(config))
    with open(tmp_path / "moved/model.safetensors", "ab") as weights:
        weights.write(b" ")
    assert model_digest(folder) != digest


def test_search_is_exact(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr("btok.tools.index.BLOCK", 5)
    store = encoder.encode_to(tmp_path / "store", TEXTS, IDS)
    queries = encoder.encode(["text 3", TEXTS[9]])
    scores = queries @ np.asarray(store.vectors).T
    for found, row in zip(store.search(queries, 7), scores, strict=True):
        assert [i for _, i in found] == np.argsort(-row, kind="stable")[:7].tolist()
        assert np.allclose([score for score, _ in found], np.sort(row)[::-1][:7], atol=1e-6)
    assert store.search(queries, 1)[1][0][1] == 9
    assert len(store.search(queries, 99)[0]) == 22
    store.vectors = np.full((12, 2), 0.5**0.5, np.float32)  # a tie
    assert [i for _, i in store.search(np.ones((1, 2), np.float32), 12)[0]] == list(range(12))


@pytest.mark.parametrize("damage", ["exponent", "sign and exponent", "NaN"])
def test_a_damaged_vector_is_told_by_its_length(encoder, tmp_path, damage):
    store = encoder.encode_to(tmp_path / "store", TEXTS, IDS)
    vectors = np.lib.format.open_memmap(store.files[0], mode="r+")
    column = int(np.abs(vectors[17]).argmax())
    bits = vectors.view(np.uint32)
    flipped = {"exponent": 1 << 30, "sign and exponent": 3 << 29, "NaN": 0x7FC00000}[damage]
    bits[17, column] = flipped if damage == "NaN" else bits[17, column] ^ flipped
    vectors.flush()
    query = np.zeros((1, vectors.shape[1]), np.float32)
    with pytest.raises(ValueError, match=r"store: vector 17 in parts/vectors-\S+ is damaged"):
        index_module.Index(tmp_path / "store").search(query)


def on_two_ranks(rank, folder, checkpoint):
    import btok.tools.index

    btok.tools.index.PART = 4
    with gloo(folder, rank, 2):
        encoder = BTokEncoder.from_pretrained(checkpoint)
        mine = []
        original, encoder.processor = encoder.processor, lambda side: 0
        encoder.processor = type(
            "Counting",
            (),
            {
                "__getattr__": lambda _, name: getattr(original, name),
                "__call__": lambda _, side: mine.append(side.text) or original(side),
            },
        )()
        store = encoder.encode_to(f"{folder}/store_of_two", TEXTS, IDS)
        assert len(mine) == (12, 10)[rank], mine  # parts of 4: 0 2 4 and 1 3 5
        assert store.items == [{"id": name} for name in IDS]


def test_two_ranks_make_the_bytes_of_one(whole, checkpoint, tmp_path):
    mp.spawn(on_two_ranks, (str(tmp_path), checkpoint), nprocs=2)
    assert content(tmp_path / "store_of_two") == whole


def test_opening_needs_no_writing_where_nothing_is_new(encoder, tmp_path, monkeypatch):
    encoder.encode_to(tmp_path / "store", TEXTS[:3], IDS[:3])
    for name in ("replace", "mkdir"):
        monkeypatch.setattr(os, name, None)
    assert len(open_index(encoder, tmp_path / "store").items) == 3
    assert len(encoder.encode_to(tmp_path / "store", TEXTS[:3], IDS[:3]).items) == 3


def test_items_that_say_something_else_leave_the_vectors(encoder, tmp_path):
    encoder.encode_to(tmp_path / "store", TEXTS[:3], IDS[:3])
    meta, vectors, _ = content(tmp_path / "store")
    file = tmp_path / "store" / json.loads(meta)["vectors"]
    before = file.stat().st_mtime_ns
    items = [{"id": name, "page": 1} for name in IDS[:3]]
    assert encoder.encode_to(tmp_path / "store", TEXTS[:3], items).items == items
    assert file.stat().st_mtime_ns == before and content(tmp_path / "store")[1] == vectors


def test_a_damaged_index_is_refused(encoder, tmp_path):
    encoder.encode_to(tmp_path / "whole", TEXTS[:3], IDS[:3])
    meta = json.loads((tmp_path / "whole/meta.json").read_text())
    for case, (file, change, message) in enumerate(
        [
            (meta["vectors"], lambda path: path.unlink(), "No such file"),
            (meta["vectors"], lambda path: os.truncate(path, 0), "expected 8 bytes got 0"),
            (meta["vectors"], lambda path: path.write_bytes(NOISE), "magic string"),
            (meta["vectors"], lambda path: os.truncate(path, 300), "mmap length"),
            (meta["items"], lambda path: os.truncate(path, 20), "Expecting|Unterminated"),
            (meta["items"], lambda path: os.truncate(path, 15), "3 vectors and 1 items, exp"),
            (meta["items"], lambda path: path.write_text("{}\n" * 3), "'id'"),
            (meta["items"], lambda path: path.write_text("3\n" * 3), "not subscriptable"),
            (meta["items"], lambda path: path.write_bytes(NOISE), "decode"),
            ("meta.json", lambda path: path.write_bytes(NOISE), "decode"),
            ("meta.json", lambda path: path.write_text("{}"), "'format_version'"),
            ("meta.json", lambda path: path.write_text("[]"), "list indices"),
            (
                "meta.json",
                lambda path: path.write_text(json.dumps(meta | {"unreadable": [1]})),
                r"unreadable is \[1\], expected an object",
            ),
            (
                meta["vectors"],
                lambda path: np.save(path, np.zeros((3, 64))),
                r"float64 \[3, 64\], expected float32",
            ),
            (
                meta["items"],
                lambda path: path.write_text('{"id": 1}\n{"id": 2}\n{"id": 3}\n'),
                "id is 1",
            ),
            (
                "meta.json",
                lambda path: path.write_text(json.dumps(meta | {"format_version": 3})),
                "format_version is 3, expected 2",
            ),
        ]
    ):
        folder = tmp_path / str(case)
        shutil.copytree(tmp_path / "whole", folder)
        change(folder / file)
        text = (
            rf"{case} holds no index that can be read \({file}: .*({message}).*; delete it or give"
        )
        with pytest.raises(ValueError, match=text):
            open_index(encoder, folder)
