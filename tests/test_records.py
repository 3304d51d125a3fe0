"""Records of public data sets: found on disk, got from a hub, told where they are wrong."""

from __future__ import annotations

import http.server
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from helpers import tiny_checkpoint
from mmeb_miniature import Miniature
from PIL import Image

from btok.evaluation import mmeb_v2, records
from btok.evaluation.records import Pictures, Row

ROOT = Path(__file__).resolve().parent.parent


def test_a_field_that_is_wrong_is_told():
    row = Row("set", 3, {"a": "x", "b": None, "c": ["x", 1], "d": [], "e": ("x",)})
    assert row["a"] == row.text("a") == "x" and row.texts("e") == ["x"]
    assert row.texts("e") == Row("", 0, {"e": np.array(["x"])}).texts("e")
    for call, why in (
        (lambda: row["b"], "set, row 3: no field 'b', it has a, b, c, d, e"),
        (lambda: row.text("c"), r"set, row 3: c is \['x', 1\], expected a text"),
        (lambda: row.texts("c"), r"set, row 3: c is \['x', 1\], expected a list of texts"),
        (lambda: row.texts("d"), r"set, row 3: d is \[\], expected a list of texts"),
        (lambda: Row("set", 3, [1])["a"], "set, row 3: no field 'a', it has none"),
    ):
        with pytest.raises(ValueError, match=why):
            call()


@pytest.mark.parametrize(
    ("config", "split", "there", "expected"),
    [
        ("", "test", ["test-0.parquet", "train-0.parquet", "README.md"], ["test-0.parquet"]),
        ("", "test", ["data/test-1.parquet", "data/test-0.parquet"], "data/test-0 data/test-1"),
        ("MC", "test", ["MC/test-0.parquet", "OE/test-0.parquet"], ["MC/test-0.parquet"]),
        ("MC", "test", ["data/MC/test.jsonl", "MC.parquet"], ["data/MC/test.jsonl"]),
        ("a", "train", ["json/a.json", "json/ab.json", "video/a.zip"], ["json/a.json"]),
        ("a", "train", ["a/b/train-0.parquet"], []),
        ("queries", "test", ["queries/test-0.parquet", "corpus/test-0.parquet"], "queries/test-0"),
        ("queries", "test", ["queries/queries.jsonl"], ["queries/queries.jsonl"]),
        ("", "test", ["test.jsonl", "test.parquet", "test.json"], ["test.parquet"]),
        ("", "test", ["test-0.parquet", "test_small-0.parquet", "testmini-0.parquet"], "test-0"),
    ],
)
def test_the_files_of_a_configuration(tmp_path, config, split, there, expected):
    if isinstance(expected, str):
        expected = [f"{name}.parquet" for name in expected.split()]
    assert records.pick(there, config, split) == expected
    for name in there:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    if expected:
        found = records.find(tmp_path, config, split)
        assert [path.relative_to(tmp_path).as_posix() for path in found] == expected
    else:
        with pytest.raises(FileNotFoundError, match=rf"no records, expected {tmp_path}/"):
            records.find(tmp_path, config, split)


@pytest.mark.parametrize(
    ("there", "whole"),
    [
        (["00000-of-00002", "00001-of-00002"], True),
        (["00000-of-00002-0a1b2c", "00001-of-00002-3d4e5f"], True),
        (["00000-of-00002"], False),
        (["00001-of-00002-3d4e5f"], False),
        (["00000-of-00002", "00000-of-00002 (1)"], False),
        (["00000-of-00001", "00000-of-00002", "00001-of-00002"], False),
    ],
)
def test_a_file_of_several_that_is_missing_is_told(tmp_path, there, whole):
    for name in there:
        (tmp_path / f"test-{name}.parquet").touch()
    if whole:
        assert len(records.find(tmp_path, "", "test")) == len(there)
    else:
        with pytest.raises(
            FileNotFoundError, match=r"not just files 0 to \d of records, as .*test-0"
        ):
            records.find(tmp_path, "", "test")


def test_pages_of_a_corpus_are_written_a_few_at_a_time(tmp_path):
    """Pictures of 64 MB in parts of 4 MB."""
    pa = pytest.importorskip("pyarrow", reason="the extra `data` is not installed")
    import pyarrow.parquet as pq

    picture, path = os.urandom(1 << 20), tmp_path / "corpus.parquet"
    rows = [{"corpus-id": i, "image": {"bytes": picture, "path": None}} for i in range(64)]
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)
    del rows
    before, most = pa.total_allocated_bytes(), 0

    def name_of(key):
        nonlocal most
        most = max(most, pa.total_allocated_bytes() - before)
        return f"{key}.png"

    found = records.corpus("set", [path], tmp_path, name_of)
    assert found == [{"corpus-id": i} for i in range(64)]
    seen = 0
    for _ in records.read(path):
        seen = max(seen, pa.total_allocated_bytes() - before)
    assert seen < 32 << 20
    assert (tmp_path / "63.png").read_bytes() == picture


def test_a_page_is_written_below_its_folder_alone(tmp_path, monkeypatch):
    """The folder's own path may be relative, and hold ".."; a page's name may not lead out."""
    pa = pytest.importorskip("pyarrow", reason="the extra `data` is not installed")
    import pyarrow.parquet as pq

    monkeypatch.chdir(tmp_path)
    path = tmp_path / "corpus.parquet"
    for name, why in (("../x", r"'\.\./x'"), (f"{tmp_path}/out", "'/.*")):
        pq.write_table(pa.Table.from_pylist([{"corpus-id": name, "image": b"png"}]), path)
        with pytest.raises(
            ValueError, match=rf"set \(corpus\), row 0: corpus-id is {why}, expected no way out"
        ):
            records.corpus("set", [path], tmp_path / "pages", "{}.png".format)
    assert not list(tmp_path.rglob("*.png"))
    Path("below").mkdir()
    monkeypatch.chdir("below")
    Miniature(tmp_path).make("ViDoRe_docvqa")
    rows, _, _ = mmeb_v2.load("ViDoRe_docvqa", "..")
    assert mmeb_v2.build("ViDoRe_docvqa", data_dir="..", **rows).candidates


def test_numbers_of_qrels_are_of_any_kind():
    rows = [
        {"query-id": np.int64(1), "corpus-id": np.uint32(2), "score": np.float32(2)},
        {"query-id": 1, "corpus-id": 3, "score": Decimal(1)},
    ]
    assert records.relevant("set", rows) == {1: {2: 2.0, 3: 1.0}}
    for wrong in (float("nan"), "1", [1]):
        with pytest.raises(
            ValueError, match=r"set \(qrels\), row 0: score is .*, expected a number"
        ):
            records.relevant("set", [rows[0] | {"score": wrong}])


def test_records_of_every_ending_are_the_same(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="the extra `data` is not installed")
    import pyarrow.parquet as pq

    rows = [{"a": "x", "b": [1, 2]}, {"a": "ü\n\u2028\x85", "b": []}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows)
    (tmp_path / "c.jsonl").write_text(lines, encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    for name in ("a.json", "b.json", "c.jsonl", "d.parquet"):
        assert list(records.read(tmp_path / name)) == rows, name
    for name in ("a.json", "c.jsonl", "d.parquet"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=rf"{name} cannot be read \(.*; fetch it again"):
            list(records.read(tmp_path / name))
    (tmp_path / "c.jsonl").write_text("[" * 10_000)
    with pytest.raises(ValueError, match=r"c\.jsonl cannot be read"):
        list(records.read(tmp_path / "c.jsonl"))


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 10, 20, 63, 64])
def test_frames_are_the_first_the_last_and_evenly_between(tmp_path, count):
    """In the order of their numbers; by the rule that what is between is cut to a whole number."""
    for i in range(count):
        (tmp_path / "v").mkdir(exist_ok=True)
        (tmp_path / f"v/frame_{i}.jpg").write_bytes(b"")
    (tmp_path / "v").mkdir(exist_ok=True)
    (tmp_path / "v/info.json").write_text("{}")
    (tmp_path / "v/._frame_0.jpg").write_bytes(b"\0\5\x16\7Mac OS X")
    row, pictures = Row("set", 0, {}), Pictures(str(tmp_path))
    if count == 0:
        with pytest.raises(
            FileNotFoundError, match=r"set, row 0: .*/v has 0 frames, expected at l"
        ):
            pictures.frames(row, "v", most=8)
        return
    taken = [int(Path(path).stem[6:]) for path in pictures.frames(row, "v", most=8)]
    expected = [i * (count - 1) // 7 for i in range(8)] if count >= 8 else list(range(count))
    assert taken == expected
    assert len(pictures.frames(row, "v")) == count


def test_frames_of_one_number_have_an_order_of_their_own(tmp_path, monkeypatch):
    """Not the disk's."""
    (tmp_path / "v").mkdir()
    for name in ("1.jpg", "01.jpg", "2.jpg"):
        (tmp_path / "v" / name).touch()
    listed = os.listdir
    for backwards in (False, True):
        monkeypatch.setattr(os, "listdir", lambda at, b=backwards: sorted(listed(at), reverse=b))
        found = Pictures(str(tmp_path)).frames(Row("set", 0, {}), "v")
        assert [Path(path).name for path in found] == ["01.jpg", "1.jpg", "2.jpg"]


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of a hub as the client asks for: what a repository has, and its files."""

    repositories: dict[str, dict[str, bytes]] = {}  # noqa: RUF012
    asked: list[str] = []  # noqa: RUF012
    sha = "c0ffee" + "0" * 34

    def do_HEAD(self):
        self.do_GET(head=True)

    def do_GET(self, head=False):
        path = self.path.partition("?")[0].lstrip("/")
        self.asked.append(path)
        if path.startswith("api/datasets/"):
            name = path.removeprefix("api/datasets/").partition("/revision/")[0]
            files = self.repositories.get(name)
            siblings = [{"rfilename": f, "size": len(x)} for f, x in (files or {}).items()]
            body = json.dumps({"id": name, "sha": self.sha, "siblings": siblings}).encode()
            return self.answer(body if files is not None else None, head, "application/json")
        name, _, file = path.removeprefix("datasets/").partition(f"/resolve/{self.sha}/")
        return self.answer(self.repositories.get(name, {}).get(file), head, "application/octet")

    def answer(self, body, head, kind):
        self.send_response(404 if body is None else 200)
        body = b"" if body is None else body
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{hash(body) & 0xFFFFFFFF:08x}"')
        self.send_header("X-Repo-Commit", self.sha)
        self.end_headers()
        if not head:
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def packed(root, folder, strip, parts=1):
    """A tar.gz of a folder, its members below `strip`, in parts."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for path in sorted((root / folder).rglob("*")):
            if path.is_file() and path.suffix in (".jpg", ".png"):
                tar.add(path, f"{strip}{path.relative_to(root / folder)}")
    whole = out.getvalue()
    step = -(-len(whole) // parts)
    return [whole[i : i + step] for i in range(0, len(whole), step)]


FETCH = """
import sys
from btok.evaluation import mmeb_v2
from btok.tools import evaluate
print(evaluate.needs(sys.argv[2:]))
for name in sys.argv[2:]:
    mmeb_v2.fetch(name, sys.argv[1])
"""


def test_data_sets_come_from_a_hub_one_at_a_time(tmp_path):
    """With the hub's own client, of a hub on this machine; what another set needs stays packed."""
    pa = pytest.importorskip("pyarrow", reason="the extra `data` is not installed")
    import pyarrow.parquet as pq

    names = ["OK-VQA", "NIGHTS", "MVBench", "VisRAG_ChartQA"]
    mini = Miniature(tmp_path / "there")
    made = {name: mini.make(name) for name in [*names, "GQA"]}
    mini.make("EgoSchema")
    store: dict[str, dict[str, bytes]] = {"TIGER-Lab/MMEB-V2": {}}
    for name in names:
        spec = mmeb_v2.data_set(name)
        files = store.setdefault(spec.source, {})
        for part in spec.configs:
            rows = list(records.read(mini.root / spec.records / part / f"{spec.split}.jsonl"))
            if part == "corpus":  # its pictures travel in it
                for i, path in enumerate(sorted((mini.root / spec.media).glob("*.png"))):
                    rows[i]["corpus-id"] = f"{rows[i]['corpus-id']}"
                    rows[i]["image"] = {"bytes": path.read_bytes(), "path": None}
            out = io.BytesIO()
            pq.write_table(pa.Table.from_pylist(rows), out)
            files[f"{part}/{spec.split}-00000-of-00001.parquet"] = out.getvalue()
        if spec.family != "pages":
            into, archive = spec.archive, mmeb_v2.TABLE["archives"][spec.archive]
            parts = packed(mini.root, into, archive["strip"], len(archive["files"]))
            store["TIGER-Lab/MMEB-V2"] |= dict(zip(archive["files"], parts, strict=True))
    Hub.repositories, Hub.asked = store, []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = tmp_path / "here"
    env = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"} | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT}/kernels",
    }
    run = [sys.executable, "-c", FETCH, str(here), *names]
    said = subprocess.run(run, check=True, env=env, capture_output=True, text=True).stdout
    assert "is the hub's figure" in said and said.count("image-tasks/mmeb_v1.tar.gz") == 1
    assert said.count("records 0.00 GB, media about ") == len(names)
    for name in names:
        rows, revision, files = mmeb_v2.load(name, here)
        assert revision == Hub.sha and files
        task = mmeb_v2.build(name, data_dir=here, **rows)
        assert len(task.queries) == len(made[name]["records"])
        if name != "VisRAG_ChartQA":
            expected = mmeb_v2.build(name, made[name]["records"], mini.root)
            shown = [[Path(x).name for x in (*s.images, *s.video)] for s in expected.candidates]
            assert [[Path(x).name for x in (*s.images, *s.video)] for s in task.candidates] == shown
    assert Image.open(here / "image-tasks/OK-VQA/q1.jpg").size == (24, 20)
    assert not (here / "image-tasks/GQA").exists()
    assert not (here / "video-tasks/frames/video_qa/EgoSchema").exists()
    assert not list(here.rglob("*.part"))

    images = here / "image-tasks"
    store["ziyjiang/MMEB_Test_Instruct"].pop("NIGHTS/test-00000-of-00001.parquet")
    missing = subprocess.run([*run[:4], "NIGHTS"], env=env, capture_output=True, text=True)
    assert "has no records of NIGHTS" in missing.stderr
    store["ziyjiang/MMEB_Test_Instruct"] |= {
        "NIGHTS/test-00000-of-00001.parquet": (
            images / "NIGHTS/test-00000-of-00001.parquet"
        ).read_bytes()
    }
    assert not list(here.rglob(".*.unfinished"))

    kept = images / "NIGHTS/1.jpg"
    content = kept.read_bytes()
    kept.unlink()
    Hub.asked.clear()
    subprocess.run([*run[:4], "NIGHTS"], check=True, env=env, capture_output=True)
    assert kept.read_bytes() == content
    assert records.revision(images, ["NIGHTS"]) == Hub.sha
    assert records.revision(images, ["GQA"]) == "local"

    archives = store.pop("TIGER-Lab/MMEB-V2")
    kept.unlink()
    subprocess.run([*run[:4], "NIGHTS"], env=env, capture_output=True)
    assert not list(here.rglob(".*.unfinished"))  # nothing was begun
    store["TIGER-Lab/MMEB-V2"] = archives
    for blob in (tmp_path / "hub").rglob("blobs/*"):  # the archive in the client's own store
        content = blob.read_bytes()
        for damaged in (content[:-9000], content[:-8] + b"\0" * 4 + content[-4:]):  # its CRC
            blob.write_bytes(damaged)
            done = subprocess.run([*run[:4], "NIGHTS"], env=env, capture_output=True, text=True)
            if b"ustar" not in content and done.returncode == 0:
                continue  # of another set's archive
            assert "ValueError: the archive cannot be read (" in done.stderr
        blob.write_bytes(damaged)
    with pytest.raises(
        FileNotFoundError, match=r"NIGHTS: its media are half unpacked, says .*NIGHTS"
    ):
        mmeb_v2.load("NIGHTS", here)
    server.shutdown()


def test_without_a_hub_fetching_says_so(tmp_path):
    run = [sys.executable, "-m", "btok", "eval", str(tiny_checkpoint(tmp_path / "tiny")), "mmeb-v2"]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/kernels", "HF_HUB_OFFLINE": "1"}
    run += ["--fetch", "--tasks", "MSVD"]
    done = subprocess.run(run, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: Cannot reach http")
    assert done.stderr.count("\n") == 1
    env |= {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:1"}
    done = subprocess.run(run, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: the hub does not answer: ")
    assert done.stderr.count("\n") == 1
    Miniature(tmp_path / "data").make("MSVD")  # of what is there nothing is asked
    run += ["--data", "data"]
    done = subprocess.run(run, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
