"""`python -m btok encode | search | export`: what is indexed, found, encoded again, and merged."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import held, tiny_checkpoint
from PIL import Image

from btok import BTokEncoder, inputs
from btok.adapters import Lora
from btok.model import BTokModel
from btok.processing import Processor
from btok.tools import folder as folder_module
from btok.tools.cli import main
from btok.tools.folder import list_files

RNG = np.random.default_rng(0)
SHAPES = [(24, 32), (40, 24), (32, 32), (16, 48)]
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(tiny_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def folder(tmp_path):
    """Two texts and four pictures, one level deep."""
    mine = tmp_path / "mine"
    (mine / "sub").mkdir(parents=True)
    (mine / "note.txt").write_text("milk, bread and a red seven")
    (mine / "sub/READ.md").write_text("# how to use it")
    for i, shape in enumerate(SHAPES):
        picture = RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)
        Image.fromarray(picture).save(mine / f"sub/{i}.png")
    return mine


@pytest.fixture
def encoded(monkeypatch):
    """How many inputs the model got, since last emptied."""
    seen = []
    call = Processor.__call__
    monkeypatch.setattr(
        Processor, "__call__", lambda self, side: seen.append(side) or call(self, side)
    )
    return seen


def search(capsys, *arguments):
    """Paths found, in order, and what stderr said."""
    assert main(["search", *map(str, arguments)]) == 0
    said = capsys.readouterr()
    lines = [line.split(maxsplit=2) for line in said.out.splitlines()]
    assert [int(place) for place, _, _ in lines] == list(range(1, len(lines) + 1))
    scores = [float(score) for _, score, _ in lines]
    assert scores == sorted(scores, reverse=True) and all(-1.001 < s < 1.001 for s in scores)
    return [path for _, _, path in lines], said.err


def test_a_file_is_found_by_its_own_content(checkpoint, folder, capsys):
    assert main(["encode", checkpoint, str(folder)]) == 0
    said = capsys.readouterr()
    assert said.out == "" and said.err.endswith(
        ".btok: 6 files, 6 of them new or changed, 0 gone, 0 unreadable\n"
    )
    for i in range(4):
        image = folder / f"sub/{i}.png"
        paths, _ = search(capsys, checkpoint, folder, "--image", image, "--top", "3")
        assert paths[0] == f"sub/{i}.png" and len(paths) == 3
    assert search(capsys, checkpoint, folder, "# how to use it")[0][0] == "sub/READ.md"
    paths, _ = search(capsys, checkpoint, folder, "milk, bread and a red seven", "--top", "99")
    assert paths[0] == "note.txt" and len(paths) == 6
    both, _ = search(capsys, checkpoint, folder, "red", "--image", image)
    assert len(both) == 5


def test_only_new_and_changed_files_are_encoded(checkpoint, folder, capsys, encoded):
    assert main(["encode", checkpoint, str(folder)]) == 0
    assert len(encoded) == 6
    encoded.clear()
    os.utime(folder / "note.txt", (1, 1))  # touched, same bytes
    os.rename(folder / "sub/0.png", folder / "sub/new.png")
    (folder / "sub/READ.md").write_text("# how to use IT")  # same size
    (folder / "sub/1.png").unlink()
    capsys.readouterr()
    paths, said = search(capsys, checkpoint, folder, "# how to use IT", "--top", "9")
    assert [side.text for side in encoded].count("# how to use IT") == 2  # the file and the query
    assert len(encoded) == 2  # not what was touched or has another name
    assert "5 files, 1 of them new or changed, 1 gone, 0 unreadable" in said
    assert paths[0] == "sub/READ.md"
    assert sorted(paths) == ["note.txt", "sub/2.png", "sub/3.png", "sub/READ.md", "sub/new.png"]
    encoded.clear()
    assert main(["encode", checkpoint, str(folder)]) == 0
    assert not encoded
    assert "5 files, 0 of them new or changed, 0 gone" in capsys.readouterr().err


def test_a_file_that_could_not_be_read_is_looked_at_again(checkpoint, tmp_path, capsys):
    """Its id is not of its content, which nobody knows."""
    pytest.importorskip("pypdfium2", reason="pypdfium2 (the extra `pdf`) is not installed")
    folder = tmp_path / "a folder whose name is long" / "and another one, so that paths are alike"
    folder.mkdir(parents=True)
    for name, colour in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (40, 40), colour).save(folder / f"{name}.pdf")
    (tmp_path / "note.txt").write_text("a note")
    command = ["encode", checkpoint, str(tmp_path)]
    with pytest.MonkeyPatch.context() as without:
        without.setitem(sys.modules, "pypdfium2", None)
        assert main(command) == 0
        assert 'pip install "btok[pdf]"' in capsys.readouterr().err
    assert main(command) == 0
    before = held(tmp_path / ".btok")
    assert len(before) == 3 and all(re.match("[0-9a-f]{64}[.]", name) for name in before)
    alone = BTokEncoder.from_pretrained(checkpoint).encode([folder / "b.pdf"])[0]
    (folder / "a.pdf").unlink()
    assert main(command) == 0
    (vector,) = (v for item, v in held(tmp_path / ".btok").values() if item["uri"].endswith("pdf"))
    assert np.abs(vector - alone).max() < 1e-6


def test_a_file_that_changes_while_it_is_read(checkpoint, folder, capsys, monkeypatch):
    """As a log that is rotated: what is encoded may be of another content than its id says."""
    look = folder_module.look

    def rotated(root, path, *more):
        looked = look(root, path, *more)
        if path == "note.txt":
            (folder / "note.txt").rename(folder / "old.txt")
            (folder / "note.txt").write_text("a new note")
        return looked

    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "look", rotated)
        assert main(["encode", checkpoint, str(folder)]) == 0
    said = capsys.readouterr().err
    assert "note.txt: it changed while it was read; the next run tries again" in said
    assert main(["encode", checkpoint, str(folder)]) == 0
    found = {item["uri"]: vector for item, vector in held(folder / ".btok").values()}
    for name in ("note.txt", "old.txt"):
        alone = BTokEncoder.from_pretrained(checkpoint).encode([folder / name])[0]
        assert np.abs(found[name] - alone).max() < 1e-6


def test_files_of_one_content_are_each_found(checkpoint, folder, capsys, encoded):
    for name in ("a.png", "sub/z.png"):
        shutil.copy(folder / "sub/1.png", folder / name)
    shutil.copy(folder / "note.txt", folder / "a.md")  # the same, read as another kind
    assert main(["encode", checkpoint, str(folder)]) == 0
    image = folder / "sub/1.png"

    def found(said):
        paths, told = search(capsys, checkpoint, folder, "--image", image, "--top", "99")
        assert said in told
        return paths

    assert set(found("9 files, 0 of them new")[:3]) == {"a.png", "sub/1.png", "sub/z.png"}
    before = held(folder / ".btok")
    encoded.clear()
    (folder / "a.png").rename(folder / "sub/b.png")  # after the second of them
    os.rename(folder / "note.txt", folder / "other.TXT")
    assert set(found("9 files, 0 of them new or changed, 0 gone")[:3]) == {
        *("sub/1.png", "sub/b.png", "sub/z.png")
    }
    (folder / "sub/1.png").rename(image := folder / "first.png")
    (folder / "sub/b.png").unlink()
    assert set(found("8 files, 0 of them new")[:2]) == {"first.png", "sub/z.png"}
    assert len(encoded) == 2  # the queries
    (folder / "sub/z.png").rename(folder / "sub/1.png")
    shutil.copy(image, folder / "a.png")
    image.rename(folder / "sub/z.png")
    (folder / "other.TXT").rename(folder / "note.txt")
    image = folder / "a.png"
    assert len(found("9 files, 1 of them new or changed, 0 gone")) == 9
    again = held(folder / ".btok")  # which knows a.png's new time
    assert again.keys() == before.keys()
    errors = np.array([abs(again[name][1] - row).max() for name, (_, row) in before.items()])
    # a product's last bits may depend on its rows, which differ for what was encoded alone
    assert (errors > 0).sum() <= 1 and errors.max() <= 1e-6


def test_instructions_of_files_and_of_the_query(checkpoint, folder, capsys):
    (folder / "other.txt").write_text("Find: milk")
    mine = [checkpoint, str(folder)]
    assert main(["encode", *mine, "--instruction", "Keep:"]) == 0
    for query, instruction, best in (
        ("milk, bread and a red seven", "Keep:", "note.txt"),
        ("Find: milk", "Keep:", "other.txt"),
        ("Keep: Find: milk", "", "other.txt"),
    ):
        arguments = [*mine, query, "--instruction", "Keep:", "--query-instruction", instruction]
        assert main(["search", *arguments]) == 0
        _, score, path = capsys.readouterr().out.splitlines()[0].split(maxsplit=2)
        assert (score, path) == ("1.000", best)
    for other in ([], ["--instruction", "Find:"]):
        assert main(["search", *mine, "milk", *other]) == 2
        said = capsys.readouterr().err
        assert "holds vectors of instruction 'Keep:', this is '" in said and "delete it" in said


def test_content_is_not_read_where_size_and_time_are_the_same(
    checkpoint, folder, monkeypatch, capsys
):
    assert main(["encode", checkpoint, str(folder)]) == 0
    digested, digest = [], hashlib.file_digest

    def noted(file, name):
        digested.append(Path(file.name).name)
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", noted)
    os.utime(folder / "note.txt", (1, 1))
    assert main(["encode", checkpoint, str(folder)]) == 0
    assert digested == ["model.safetensors", "btok_config.json", "note.txt"]


def test_unreadable_files_are_skipped_and_told(checkpoint, folder, capsys, monkeypatch):
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 nothing")
    (folder / "empty.txt").write_text("")
    (folder / "clip.mp4").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "av", None)
    for new in (6, 0):
        paths, said = search(capsys, checkpoint, folder, "x", "--top", "99")
        assert len(paths) == 6
        assert f"6 files, {new} of them new or changed, 0 gone, 3 unreadable" in said
        assert "  broken.jpg: image" in said and "  empty.txt: it is empty" in said
        assert '  clip.mp4: video files need PyAV: pip install "btok[video]"' in said
    for i in range(12):
        (folder / f"z{i}.txt").write_text("")
    _, said = search(capsys, checkpoint, folder, "x")
    assert "15 unreadable" in said and said.count(": it is empty") == 8
    assert said.rstrip().endswith(
        f"  ... and 5 more; python -m btok index {folder}/.btok names all"
    )
    assert main(["index", str(folder / ".btok")]) == 0
    named = capsys.readouterr().out
    assert "6 vectors of float32 [64], 6 files" in named and named.count(": it is empty") == 13
    Image.fromarray(np.zeros((24, 24, 3), np.uint8)).save(folder / "broken.jpg")
    paths, said = search(capsys, checkpoint, folder, "x", "--top", "99")
    assert "broken.jpg" in paths and "14 unreadable" in said


def test_links_and_hidden_files_are_not_followed(folder, tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/diary.txt").write_text("dear diary")
    (folder / "diary.txt").symlink_to(tmp_path / "secret/diary.txt")
    (folder / "away").symlink_to(tmp_path / "secret")
    (folder / "loop").symlink_to(folder)
    (folder / ".hidden.txt").write_text("no")
    (folder / ".git").mkdir()
    (folder / ".git/a.txt").write_text("no")
    (folder / "packed.zip").write_text("no")
    os.mkfifo(folder / "pipe.txt")
    expected = ["note.txt", *(f"sub/{i}.png" for i in range(4)), "sub/READ.md"]
    found = list_files(folder)
    assert found.paths == expected and found.unreadable == {}
    assert found.others == {"links": 3, "hidden": 2, ".zip": 1, "no ordinary files": 1}


def test_what_is_passed_over_is_counted(checkpoint, folder, capsys):
    for name in ("a.zip", "b.ZIP", "c.exe", "Makefile", ".hidden", "._note.txt", ".DS_Store"):
        (folder / name).write_text("no")
    assert main(["encode", checkpoint, str(folder)]) == 0
    said = capsys.readouterr().err
    assert "6 files, 6 of them new" in said
    assert said.endswith("; passed over: 3 hidden, 2 .zip, 1 .exe, 1 without an ending\n")
    assert main(["encode", checkpoint, str(folder), "--output", str(folder / "own")]) == 0
    capsys.readouterr()
    assert main(["encode", checkpoint, str(folder), "--output", str(folder / "own")]) == 0
    said = capsys.readouterr().err  # the index's own files are not counted, or read
    assert "6 files, 0 of them new" in said and "4 hidden" in said  # the other index is hidden


@pytest.mark.parametrize(
    "why", [PermissionError(13, "Permission denied"), FileNotFoundError(2, "gone")]
)
def test_what_lies_in_a_folder_that_cannot_be_read_is_kept(
    checkpoint, folder, capsys, encoded, monkeypatch, why
):
    (folder / "sub/deep").mkdir()
    shutil.copy(folder / "note.txt", folder / "sub/deep/same.txt")
    shutil.copy(folder / "note.txt", folder / "z.txt")
    assert main(["encode", checkpoint, str(folder)]) == 0
    capsys.readouterr()
    encoded.clear()
    scandir = os.scandir

    def unreadable(path):
        if Path(path) == folder / "sub":
            raise type(why)(*why.args, str(path))
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", unreadable)
        (folder / "z.txt").rename(folder / "a.txt")
        paths, said = search(capsys, checkpoint, folder, "milk, bread and a red seven")
    assert set(paths[:3]) == {"a.txt", "note.txt", "sub/deep/same.txt"} and len(encoded) == 1
    assert "8 files, 0 of them new or changed, 0 gone, 1 unreadable" in said
    assert f"\n  sub/: {why.strerror}; what was known of it stays\n" in said
    assert "8 files, 0 of them new" in search(capsys, checkpoint, folder, "x")[1]
    shutil.rmtree(folder / "sub")
    assert "2 files, 0 of them new or changed, 6 gone" in search(capsys, checkpoint, folder, "x")[1]


def test_a_folder_of_which_nothing_can_be_read(checkpoint, folder, capsys, monkeypatch):
    def unreadable(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", unreadable)
    assert main(["encode", checkpoint, str(folder)]) == 2
    assert "no file that can be encoded; .: Permission denied; expected" in capsys.readouterr().err


def test_a_name_cannot_forge_a_line(checkpoint, folder, capsys):
    names = ["a\n  1   1.000  forged.txt", "b\x1b[2K\r.txt", "c\u202etxt.exe.txt", "ä ñ 猫.txt"]
    for name in names:
        (folder / name).write_text(f"words of {name!r}")
    (folder / "d\n.png").write_bytes(b"no picture")
    paths, said = search(capsys, checkpoint, folder, "x", "--top", "99")
    assert {r"a\n  1   1.000  forged.txt", r"b\x1b[2K\r.txt", r"c\u202etxt.exe.txt"} < set(paths)
    assert "ä ñ 猫.txt" in paths and len(paths) == 10
    assert r"  d\n.png: image " in said and said.count("\n") == 2


def test_the_pages_of_documents_are_found(checkpoint, folder, tmp_path, capsys, monkeypatch):
    """A page of a scan and of a PDF by its own picture; only what changed is rendered again."""
    pypdfium2 = pytest.importorskip("pypdfium2", reason="the extra `pdf` is not installed")
    seeds = range(5)
    scans = [
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (60, 40, 3), np.uint8))
        for i in seeds
    ]
    scans[0].save(folder / "scan.tif", save_all=True, append_images=scans[1:3])
    scans[0].save(folder / "report.pdf", save_all=True, append_images=scans[1:])
    scans[4].save(folder / "one.PDF")
    rendered = []
    render = pypdfium2.PdfPage.render
    monkeypatch.setattr(
        pypdfium2.PdfPage, "render", lambda *a, **k: rendered.append(a) or render(*a, **k)
    )
    assert main(["encode", checkpoint, str(folder)]) == 0
    assert "9 files, 15 items, 15 of them new or changed" in capsys.readouterr().err
    assert len(rendered) == 6
    for number in (1, 3, 4):
        image = f"{folder}/report.pdf#page={number}"
        paths, said = search(capsys, checkpoint, folder, "--image", image, "--top", "2")
        assert paths[0] == f"report.pdf, page {number}" and "0 of them new or changed" in said
    scans[1].save(tmp_path / "page.png")
    paths, _ = search(capsys, checkpoint, folder, "--image", tmp_path / "page.png", "--top", "1")
    assert paths == ["scan.tif, page 2"]
    arguments = [checkpoint, folder, "--image", folder / "one.PDF", "--top", "2"]
    paths, _ = search(capsys, *arguments, "--picture", tmp_path / "hits.png")
    assert set(paths) == {"one.PDF", "report.pdf, page 5"}
    with Image.open(tmp_path / "hits.png") as sheet:
        assert sheet.width > 700
    del rendered[:]
    (folder / "report.pdf").rename(folder / "renamed.pdf")
    two, *others = (scan.copy() for scan in scans[2:])  # Pillow keeps options with a picture
    two.save(folder / "one.PDF", save_all=True, append_images=others)
    assert main(["encode", checkpoint, str(folder)]) == 0
    assert "9 files, 17 items, 3 of them new or changed, 0 gone" in capsys.readouterr().err
    assert len(rendered) == 3
    assert main(["search", checkpoint, str(folder), "--image", str(folder / "renamed.pdf")]) == 2
    assert "renamed.pdf has 5 pages, expected one" in capsys.readouterr().err


def test_documents_that_cannot_be_read_are_named(checkpoint, folder, capsys):
    raw = pytest.importorskip("pypdfium2.raw", reason="the extra `pdf` is not installed")
    pages = [Image.new("RGB", (40, 60), (90 * i, 0, 0)) for i in range(3)]
    pages[0].save(folder / "good.pdf", save_all=True, append_images=pages[1:])
    whole = (folder / "good.pdf").read_bytes()
    (folder / "damaged.pdf").write_bytes(b"%PDF-1.4 and nothing")
    (folder / "empty.pdf").write_bytes(b"")
    marked = whole.replace(
        b"trailer\n<<",
        b"trailer\n<< /Encrypt << /Filter /Standard /V 1 /R 2 "
        b"/O (" + b"x" * 32 + b") /U (" + b"y" * 32 + b") /P -4 >>",
        1,
    )
    assert raw and marked != whole
    (folder / "locked.pdf").write_bytes(marked)
    assert main(["encode", checkpoint, str(folder)]) == 0
    said = capsys.readouterr().err
    assert "7 files, 9 items" in said and "3 unreadable" in said
    assert "locked.pdf cannot be read: it is encrypted, and needs a password" in said
    assert "  damaged.pdf: document" in said and "  empty.pdf: document" in said


def test_an_index_of_other_things_than_files_is_left_alone(checkpoint, folder, tmp_path, capsys):
    from btok import BTokEncoder

    encoder = BTokEncoder.from_pretrained(checkpoint)
    encoder.encode_to(tmp_path / "index", ["a", "b"], ["1", "2"])
    assert main(["encode", checkpoint, str(folder), "--output", str(tmp_path / "index")]) == 2
    said = capsys.readouterr().err
    assert "index is an index of other things than files ('1'); give another --output" in said


def test_a_search_by_a_text_file_and_words(checkpoint, folder, capsys):
    """Both are the query."""
    (folder / "both.txt").write_text("apple\nmilk, bread and a red seven")
    arguments = [checkpoint, folder, "apple", "--image", folder / "note.txt"]
    assert search(capsys, *arguments)[0][0] == "both.txt"


def test_a_file_that_was_changed_in_place_is_noticed(checkpoint, folder, capsys):
    """Its size and time are what they were."""
    assert main(["encode", checkpoint, str(folder)]) == 0
    stat = (folder / "note.txt").stat()
    (folder / "note.txt").write_text("MILK, bread and a red seven")
    os.utime(folder / "note.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    capsys.readouterr()
    assert main(["encode", checkpoint, str(folder)]) == 0
    assert "6 files, 1 of them new or changed" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_mistake(checkpoint, folder):
    """As `| head` is one."""
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), f"{ROOT}:{ROOT}/kernels")))
    with subprocess.Popen(
        [sys.executable, "-m", "btok", "search", checkpoint, folder, "milk"],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        running.stdout.close()
        said = running.stderr.read()
    assert running.returncode == 0 and said.count("\n") == 1, said


def test_a_mistake_of_another_process_is_told_once(checkpoint, folder, tmp_path):
    """Its own, as a vector that is not finite; and one that every process makes."""
    model, processor = BTokModel.from_pretrained(checkpoint), Processor.from_pretrained(checkpoint)
    (tilde,) = processor.encode("~")
    model.backbone.get_input_embeddings().weight.data[tilde] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    processor.save_pretrained(tmp_path / "broken")
    shutil.rmtree(folder / "sub")
    for i in range(258):
        (folder / f"{i:03}.txt").write_text(f"file {i}" + " ~" * (i == 257))  # in the second's part
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), f"{ROOT}:{ROOT}/kernels")))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for arguments, message in (
        ([tmp_path / "broken", folder], "is not finite"),
        ([tmp_path / "broken", tmp_path / "no"], "expected a folder"),
    ):
        said = subprocess.run(
            [*start, "-m", "btok", "encode", *arguments],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=300,
        )
        errors = [line for line in said.stderr.splitlines() if line.startswith("error: ")]
        assert said.returncode and len(errors) == 1 and message in errors[0], said.stderr


def test_names_that_are_no_utf8(checkpoint, folder, tmp_path, capsys):
    (Path(os.fsdecode(os.fsencode(folder) + b"/\xff\xfe.txt"))).write_text("an odd name")
    pytest.importorskip("matplotlib", reason="matplotlib (the extra `demo`) is not installed")
    picture = tmp_path / "hits.png"
    paths, _ = search(capsys, checkpoint, folder, "an odd name", "--picture", picture)
    assert paths[0] == "\\udcff\\udcfe.txt" and picture.exists()


def test_the_index_may_lie_elsewhere(checkpoint, folder, tmp_path, capsys, encoded):
    output = ["--output", str(tmp_path / "index")]
    assert main(["encode", checkpoint, str(folder), *output]) == 0
    assert not (folder / ".btok").exists() and (tmp_path / "index/_versions").exists()
    encoded.clear()
    search(capsys, checkpoint, folder, "x", *output)
    assert len(encoded) == 1


def test_a_contact_sheet(checkpoint, folder, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib (the extra `demo`) is not installed")
    arguments = [checkpoint, str(folder), "a red seven", "--image", str(folder / "sub/0.png")]
    arguments += ["--top", "6", "--picture", str(tmp_path / "hits.png")]
    search(capsys, *arguments)
    with Image.open(tmp_path / "hits.png") as sheet:
        assert sheet.width > 1500 and sheet.height > 200
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["search", *arguments]) == 2
    assert 'pip install "btok[demo]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encode", "MODEL", "no/such"], "folder is no/such, which does not exist; expected"),
        (
            ["encode", "MODEL", "EMPTY"],
            "has no file that can be encoded; expected one ending in .txt .md",
        ),
        (["encode", "MODEL", "BROKEN"], "none of 2 inputs can be read, the first: image"),
        (["encode", "no/such/model", "MINE"], "no/such/model"),
        (["encode", "MODEL", "MINE", "--batch-tokens", "0"], "batch_tokens is 0"),
        (["encode", "MODEL", "MINE", "--batch", "0"], "--batch"),
        (["encode", "MODEL"], "FOLDER"),
        (["serch", "MODEL", "MINE"], "serch"),
        (["search", "MODEL", "MINE"], "query is empty, expected words or an --image"),
        (["search", "MODEL", "MINE", "x", "--top", "0"], "top is 0, expected at least 1"),
        (["search", "MODEL", "MINE", "x", "--image", "no.png"], "image is no.png, which does not"),
        (
            ["search", "MODEL", "MINE", "x", "--where", "colour = 3"],
            "where is 'colour = 3', which is no condition",
        ),
        (["search", "OTHER", "INDEXED", "x"], "delete it or give another output"),
        (
            ["search", "MODEL", "MINE", "x", "--picture", "a.txt"],
            "picture is a.txt, expected a nam",
        ),
        (
            ["search", "MODEL", "MINE", "x", "--picture", "no/a.png"],
            "picture is no/a.png, in a fol",
        ),
    ],
)
def test_a_mistake_is_one_line(
    checkpoint, folder, tmp_path, capsys, monkeypatch, arguments, message
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    for name in "ab":
        (tmp_path / f"broken/{name}.png").write_bytes(b"\x89PNG")
    places = {"MODEL": checkpoint, "MINE": folder, "EMPTY": tmp_path / "empty"}
    places |= {"BROKEN": tmp_path / "broken", "OTHER": tmp_path / "other", "INDEXED": folder}
    if "OTHER" in arguments:
        tiny_checkpoint(tmp_path / "other", seed=1)
        assert main(["encode", checkpoint, str(folder)]) == 0
        capsys.readouterr()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments = [str(places.get(word, word)) for word in arguments]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1, said
    assert message in said
    if "--top" in arguments:
        monkeypatch.setenv("BTOK_DEBUG", "1")
        with pytest.raises(ValueError, match="top is 0"):
            main(arguments)


def test_stopped_by_hand(monkeypatch, capsys):
    def stop(command):
        raise KeyboardInterrupt

    monkeypatch.setattr("btok.tools.cli.run", stop)
    assert main(["encode", "a", "b"]) == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_as_a_command(checkpoint, folder):
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), f"{ROOT}:{ROOT}/kernels")))
    shutil.rmtree(folder / "sub")
    said = subprocess.run(
        [sys.executable, "-m", "btok", "search", checkpoint, folder, "milk"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert said.returncode == 0, said.stderr
    assert said.stdout.split()[::2] == ["1", "note.txt"]
    assert said.stderr.count("\n") == 1, said.stderr


def test_export_merges_adapters(tmp_path, checkpoint, capsys):
    pytest.importorskip("peft")
    lora = Lora(rank=2, alpha=4, dropout=0.0)
    BTokModel.from_pretrained(checkpoint, lora=lora).save_pretrained(tmp_path / "lora")
    assert main(["export", str(tmp_path / "lora"), str(tmp_path / "out")]) == 0
    assert "a plain checkpoint; embeddings move by" in capsys.readouterr().out
    assert BTokModel.from_pretrained(tmp_path / "out").btok_token_ids
    assert main(["export", str(tmp_path / "lora"), str(tmp_path / "out")]) == 2
    assert "is not empty; name a new folder" in capsys.readouterr().err
    (tmp_path / "none").mkdir()
    assert main(["export", str(tmp_path / "none"), str(tmp_path / "other")]) == 2
    assert "has no config.json, so it is no checkpoint" in capsys.readouterr().err


def test_a_folder_is_searched_for_every_kind_of_input(tmp_path):
    """A new one is a change of `inputs` alone."""
    lists = [inputs.TEXTS, inputs.DOCUMENTS, inputs.IMAGES, inputs.VIDEOS]
    endings = sorted({ending for value in lists for ending in value})
    assert len(endings) > 10 and folder_module.KINDS is inputs.KINDS
    for ending in endings:
        (tmp_path / f"a{ending}").touch()
    assert list_files(tmp_path).paths == [f"a{ending}" for ending in endings]
