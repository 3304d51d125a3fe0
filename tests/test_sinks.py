"""Vectors for other programs: NAME.npz and NAME.parquet; and what needs no extra."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from random import Random

import numpy as np
import pytest
from helpers import counted, environment, nested_checkpoint, tiny_checkpoint

from btok import BTokEncoder

TEXTS = [f"text {i} " + "x" * (7 * i % 31) for i in range(22)]
IDS = [f"id {i}" for i in range(22)]
ENDINGS = (".npz", ".parquet")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def encoder(checkpoint, monkeypatch):
    monkeypatch.setattr("btok.tools.encode.PART", 4)
    monkeypatch.setattr("btok.tools.encode.SECONDS", 0)
    return BTokEncoder.from_pretrained(checkpoint)


def read(path):
    """By id what the items say, and their vectors."""
    if path.suffix == ".npz":
        with np.load(path) as file:
            items, vectors = json.loads(file["items"].tobytes()), file["vectors"]
    else:
        dataset = pytest.importorskip("pyarrow.dataset", reason="pyarrow is not installed")
        rows = dataset.dataset(path).to_table().to_pylist()
        rows = [row for row in rows if row["error"] is None]
        vectors = np.array([row.pop("vector") for row in rows], np.float32)
        own = ("tokens", "part", "error")
        items = [{k: v for k, v in r.items() if v is not None and k not in own} for r in rows]
    assert len(items) == len(vectors) == len({item["id"] for item in items})
    return {item.pop("id"): (item, row) for item, row in zip(items, vectors, strict=True)}


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_a_file_of_vectors_holds(encoder, tmp_path, ending):
    path = tmp_path / f"out{ending}"
    items = [{"id": name, "page": i} for i, name in enumerate(IDS)]
    done = encoder.encode_to(path, [*TEXTS, ""], [*items, "bad"])
    assert (done.vectors, done.added) == (22, 22)
    assert done.unreadable == {"bad": "it is empty, expected a text, an image or a frame"}
    found = read(path)
    for i, (name, row) in enumerate(zip(IDS, encoder.encode(TEXTS), strict=True)):
        assert found[name][0] == {"page": i} and np.abs(found[name][1] - row).max() < 1e-6
    if ending == ".npz":
        with np.load(path) as file:
            meta, vectors = json.loads(file["meta"].tobytes()), file["vectors"]
        assert vectors.dtype == np.float32 and list(found) == IDS  # in the items' order
        assert meta["model"] == encoder.digest and not Path(f"{path}.parts").exists()


@pytest.mark.parametrize("ending", ENDINGS)
def test_only_what_is_new_is_encoded(encoder, tmp_path, ending):
    path, made = tmp_path / f"out{ending}", counted(encoder)

    def breaking():
        yield from TEXTS[:10]
        raise KeyError("gone")

    with pytest.raises(KeyError):
        encoder.encode_to(path, breaking(), IDS)
    assert sorted(made) == sorted(IDS[:8])
    made.clear()
    assert encoder.encode_to(path, TEXTS, IDS).added == 14
    assert sorted(made) == sorted(IDS[8:])
    made.clear()
    done = encoder.encode_to(path, ["new", *TEXTS[1:]], ["new", *IDS[1:]])
    assert made == ["new"] and done.added == 1
    kept = IDS[1:] if ending == ".npz" else IDS  # a part is not changed again
    assert read(path).keys() == {"new", *kept}
    assert [item["id"] for item in done.removed] == (["id 0"] if ending == ".npz" else [])
    (tmp_path / "late.txt").write_text("here now")
    for text, there in ((tmp_path / "never.txt", False), (tmp_path / "late.txt", True)):
        done = encoder.encode_to(path, [*TEXTS, text], [*IDS, "late"])
        assert ("late" in done.unreadable) != there and ("late" in read(path)) == there


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_is_refused(encoder, tmp_path, ending):
    path = tmp_path / f"out{ending}"
    encoder.encode_to(path, TEXTS[:3], IDS[:3])
    before = read(path)
    with pytest.raises(ValueError, match="holds vectors of instruction '', this is 'Find: '"):
        encoder.encode_to(path, TEXTS[:3], IDS[:3], "Find: ")
    with pytest.raises(ValueError, match="storage is 'int8', expected 'float32' for"):
        encoder.encode_to(path, TEXTS[:3], IDS[:3], storage="int8")
    with pytest.raises(ValueError, match="none of 1 inputs can be read, the first: it is empty"):
        encoder.encode_to(tmp_path / f"other{ending}", [""], ["a"])
    assert read(path).keys() == before.keys()
    narrow = BTokEncoder.from_pretrained(nested_checkpoint(tmp_path / "nested"))
    for had, asked, why in ((16, None, "16, this is all"), (None, 16, "all, this is 16")):
        other = tmp_path / f"{had}{ending}"
        narrow.encode_to(other, TEXTS[:3], IDS[:3], dims=had)
        with pytest.raises(ValueError, match=f"holds vectors of dims {why}; delete it or give"):
            narrow.encode_to(other, TEXTS[:3], IDS[:3], dims=asked)
    damaged = path if path.is_file() else next(path.glob("*.parquet"))
    good = damaged.read_bytes()
    for content in (b"", good[: len(good) // 2], b"nothing of the kind" * 9):
        damaged.write_bytes(content)
        message = rf"{damaged.name} cannot be read \(.*\); delete it, and its vectors are made"
        with pytest.raises(ValueError, match=message):
            encoder.encode_to(path, TEXTS[:3], IDS[:3])
    damaged.unlink()
    assert encoder.encode_to(path, TEXTS[:3], IDS[:3]).added == 3


WITHOUT = """
import sys
for name in ("lance", "pyarrow", "datasets"):
    sys.modules[name] = None  # an import of it fails
from btok.tools.cli import main
checkpoint, folder, out = sys.argv[1:]
assert main(["encode", checkpoint, folder, "--output", f"{out}/vectors.npz"]) == 0
for output in ("index", "vectors.parquet"):
    assert main(["encode", checkpoint, folder, "--output", f"{out}/{output}"]) == 2
assert main(["search", checkpoint, folder, "x"]) == 2
assert main(["search", checkpoint, folder, "x", "--output", f"{out}/vectors.npz"]) == 2
assert main(["index", f"{out}/index"]) == 2
"""


@pytest.mark.parametrize("ending", ["", *ENDINGS])
def test_a_full_disk_is_told_and_what_was_written_stays(encoder, tmp_path, ending):
    if ending != ".npz":
        pytest.importorskip("lance", reason="pylance (the extra `lance`) is not installed")
    path = tmp_path / f"out{ending}"
    wide = {"id": "wide", "uri": Random(0).randbytes(200_000).hex()}
    encoder.encode_to(path, TEXTS[:8], IDS[:8])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # stands for the end of a disk
    try:
        with pytest.raises((ValueError, OSError), match=r"[Tt]oo large") as told:
            encoder.encode_to(path, [*TEXTS, "more"], [*IDS, wide])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(path) in str(told.value)
    made = counted(encoder)
    done = encoder.encode_to(path, TEXTS, IDS)
    assert done.vectors == 22 and not {*made} & {*IDS[:20]}  # parts of four, of which five went in


def test_all_parts_of_a_parquet_folder_have_the_same_types(encoder, tmp_path):
    dataset = pytest.importorskip("pyarrow.dataset", reason="pyarrow is not installed")
    path = tmp_path / "out.parquet"
    encoder.encode_to(path, TEXTS[:4], [{"id": name, "price": 1} for name in IDS[:4]])
    more = [{"id": name, "price": 1} for name in IDS[:8]]
    encoder.encode_to(path, TEXTS[:8], more)
    assert dataset.dataset(path).to_table()["price"].to_pylist() == [1] * 8
    more[7] = {"id": "other", "price": 9.99}
    with pytest.raises(ValueError, match=r"an item's price is 9.99, expected int64"):
        encoder.encode_to(path, TEXTS[:8], more)


def test_what_no_npz_can_say_is_refused_before_anything_is_encoded(encoder, tmp_path):
    made = counted(encoder)
    for value in (b"bytes", datetime(2026, 1, 1)):
        with pytest.raises(TypeError, match=r"item 'b' cannot be written to .*out.npz \(Object of"):
            encoder.encode_to(tmp_path / "out.npz", TEXTS[:2], ["a", {"id": "b", "is": value}])
    assert not made and not list(tmp_path.iterdir())


def test_files_of_others_beside_the_parts_stay(encoder, tmp_path):
    (tmp_path / "out.npz.parts").mkdir()
    names = {"mine.txt", "notes.npz", "notes.npz.txt"}
    for name in names:
        (tmp_path / "out.npz.parts" / name).write_text("kept")
    encoder.encode_to(tmp_path / "out.npz", TEXTS, IDS)
    assert {path.name for path in (tmp_path / "out.npz.parts").iterdir()} == names


def test_a_file_in_the_place_of_the_parts_is_told_before_anything_is_encoded(encoder, tmp_path):
    (tmp_path / "out.npz.parts").write_text("")
    made = counted(encoder)
    with pytest.raises(ValueError, match=r"output's parts is .*, which is a file; expected a fold"):
        encoder.encode_to(tmp_path / "out.npz", TEXTS[:2], IDS[:2])
    assert not made


def test_without_the_extra(checkpoint, tmp_path):
    """Vectors are written all the same, and what an index needs is named."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a.txt").write_text("a text")
    said = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(checkpoint), str(tmp_path / "folder"), str(tmp_path)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert said.returncode == 0, said.stderr
    assert said.stderr.count('pip install "btok[lance]"') == 4
    assert "vectors.npz, which encode makes; expected an index to search" in said.stderr
    assert next(iter(read(tmp_path / "vectors.npz").values()))[0]["uri"] == "a.txt"
    assert not (tmp_path / "folder/.btok").exists()
