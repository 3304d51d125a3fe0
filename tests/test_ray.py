"""A folder is encoded by Ray Data: the rows of one process, whoever is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import environment, held, same, tiny_checkpoint

for name in ("lance", "ray"):
    pytest.importorskip(name, reason=f"{name} (the extra `ray`) is not installed")
from btok.tools.cli import main  # noqa: E402


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(tiny_checkpoint(tmp_path_factory.mktemp("tiny")))


def write(folder, count):
    """Texts, three of one content, pages, a name that is no UTF-8, and two that cannot be read."""
    folder.mkdir()
    for i in range(count):
        (folder / f"{i:05}.txt").write_text(f"text {i} " + "x" * (7 * i % 31))
    shutil.copy(folder / "00000.txt", folder / "copy.txt")
    shutil.copy(folder / "00000.txt", folder / "another.txt")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 nothing")
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe.txt")).write_text("an odd name")
    return folder


def test_only_what_this_run_asked_for_is_committed(tmp_path):
    """Parts of a run that was killed may be of files that are gone, or clips of another length."""
    import pyarrow as pa
    from pyarrow import parquet

    from btok.tools.ray_engine import rows_of
    from btok.tools.rows import Row
    from btok.tools.tables import as_table, schema_of

    rows, items = tmp_path / "rows", tmp_path / "items"
    rows.mkdir()
    items.mkdir()
    schema = schema_of({"model": "a digest", "settings": {}}, 4, "float32")
    vectors = np.eye(4, dtype=np.float32)
    for part, ids in enumerate((("gone", "moved"), ("moved", "bad", "new"))):
        made = [Row({"id": name, "uri": f"old {name}"}, vectors[part], 3) for name in ids]
        made = [row if row.item["id"] != "bad" else Row(row.item, None, None, "no") for row in made]
        parquet.write_table(as_table(made, schema), rows / f"{part}.parquet")
    ids = ["new", "bad", "moved", "not made"]
    said = [json.dumps({"id": name, "uri": f"new {name}"}) for name in ids]
    parquet.write_table(pa.table({"id": ids, "item": said, "path": said}), items / "0.parquet")
    found = {row.item["id"]: row for part in rows_of(rows, items) for row in part}
    assert found.keys() == {"new", "bad", "moved"}
    assert all(row.item["uri"] == f"new {name}" for name, row in found.items())
    assert found["bad"].error == "no" and found["bad"].vector is None
    assert found["moved"].vector.tolist() == vectors[0].tolist()
    assert found["new"].vector.tolist() == vectors[1].tolist()


ENCODE = """
import sys
from btok.tools.cli import main
sys.exit(main(sys.argv[1:]))
"""


ALONE = {"HF_HUB_OFFLINE": "1", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}  # of children
ALONE |= {"RAY_worker_niceness": "0"}  # or they wait for all other tests


def encode(*arguments, cwd=None):
    """`python -m btok encode` with Ray, in a process of its own."""
    command = [sys.executable, "-c", ENCODE, "encode", *map(str, arguments), "--engine", "ray"]
    return subprocess.run(
        command, env=environment(**ALONE), capture_output=True, text=True, timeout=900, cwd=cwd
    )


def test_ray_makes_the_rows_of_one_process(checkpoint, tmp_path, capsys):
    folder, output = write(tmp_path / "folder", 40), tmp_path / "index"
    said = encode(checkpoint, folder, "--output", "index", "--workers", "2", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    assert "43 files, 43 of them new or changed, 0 gone, 2 unreadable" in said.stderr
    assert "  broken.jpg: image" in said.stderr and "  empty.txt: it is empty" in said.stderr
    assert "45 inputs in " in said.stderr and " a second" in said.stderr
    assert main(["encode", checkpoint, str(folder), "--output", str(tmp_path / "alone")]) == 0
    assert same(held(output), held(tmp_path / "alone"))
    assert not Path(f"{output}.parts").exists()
    (folder / "00001.txt").unlink()
    (folder / "00002.txt").rename(folder / "moved.txt")
    capsys.readouterr()
    assert main(["encode", checkpoint, str(folder), "--output", str(output)]) == 0
    assert "42 files, 0 of them new or changed, 1 gone" in capsys.readouterr().err


def test_what_is_refused(checkpoint, tmp_path, capsys):
    folder = write(tmp_path / "folder", 1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("")
    for words, message in (
        (["--output", "a.npz"], "output is a.npz, expected an index's folder or address with Ray"),
        (["--output", "s3://bucket/index"], "staging is None, expected a folder that all machines"),
        (["--workers", "0"], "workers is 0, expected at least 1"),
        (["--staging", str(tmp_path / "full")], "full, which has other things in it"),
        (["--staging", str(tmp_path / "full/mine.txt")], "mine.txt, which is a file; expected a"),
    ):
        assert main(["encode", checkpoint, str(folder), "--engine", "ray", *words]) == 2
        assert message in capsys.readouterr().err
    assert main(["encode", checkpoint, str(folder), "--workers", "2"]) == 2
    assert "workers is given, which only --engine ray has" in capsys.readouterr().err


COUNTING = """
import os, sys
from pathlib import Path
from btok.tools import ray_engine
from btok.tools.cli import main
made = Path(sys.argv[1])

class Counting(ray_engine.Encode):
    def __call__(self, batch):
        out = super().__call__(batch)
        with open(made / f"{os.getpid()}.txt", "a") as file:
            file.write("".join(each + chr(10) for each in out["id"].to_pylist()))
        return out

ray_engine.Encode = Counting
sys.exit(main(sys.argv[2:]))
"""


def ids_of(files):
    return [line for path in files for line in path.read_text().splitlines()]


@pytest.mark.full
def test_a_worker_then_the_driver_are_killed(checkpoint, tmp_path):
    """5,000 inputs: every id once, none lost, none made again after its part was there."""
    from pyarrow import parquet

    folder, output, made = write(tmp_path / "folder", 5000), tmp_path / "index", tmp_path / "made"
    staging = Path(f"{output}.parts")
    made.mkdir()
    command = [sys.executable, "-c", COUNTING, str(made), "encode", checkpoint, str(folder)]
    command += ["--output", str(output), "--engine", "ray", "--workers", "2"]

    def until(ready):
        for _ in range(6000):
            assert driver.poll() is None, "it ended before it was killed"
            if ready():
                return
            time.sleep(0.05)
        raise AssertionError("it never came so far")

    def parts():
        return [p for p in staging.glob("done/*.parquet") if "pending" not in p.name]

    with open(tmp_path / "log.txt", "w") as log:
        driver = subprocess.Popen(command, env=environment(**ALONE), stdout=log, stderr=log)
        until(lambda: len(parts()) >= 2)
        os.kill(int(next(made.glob("*.txt")).stem), signal.SIGKILL)
        there = len(parts())
        until(lambda: len(parts()) >= there + 3)
        driver.kill()
        driver.wait()
    time.sleep(5)  # its cluster ends with it
    before = {each for path in parts() for each in parquet.read_table(path)["id"].to_pylist()}
    first = {path: path.read_text() for path in made.glob("*.txt")}
    assert 5 * 200 <= len(before) < 5000
    said = subprocess.run(
        command, env=environment(**ALONE), capture_output=True, text=True, timeout=900
    )
    assert said.returncode == 0, said.stderr
    again = ids_of(path for path in made.glob("*.txt") if path not in first)
    assert len(again) == len(set(again)) and not before & set(again)
    assert main(["encode", checkpoint, str(folder), "--output", str(tmp_path / "alone")]) == 0
    assert same(held(output), held(tmp_path / "alone"))
    assert "5003 files, 5003 of them new or changed, 0 gone, 2 unreadable" in said.stderr
    assert not staging.exists()
