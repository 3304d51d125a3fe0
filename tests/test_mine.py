"""`python -m btok mine`: what is chosen, that nothing is lost or mixed, what is refused."""

from __future__ import annotations

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
from helpers import environment, tiny_checkpoint
from PIL import Image

from btok import BTokEncoder
from btok.data.records import Side
from btok.data.sources import open_source
from btok.files import sha256
from btok.tools import mine as mine_module
from btok.tools import mine_output, neighbours
from btok.tools.cli import main
from btok.tools.mine import Mine, mine
from btok.tools.neighbours import Blocks, as_keys, mixed, nearest
from btok.tools.related import digest, shown

WORDS = ["red", "green", "blue", "seven", "six", "cat", "dog", "tree"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(tiny_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Blocks of a few, so that there are several."""
    monkeypatch.setattr(mine_module, "PART", 8)
    monkeypatch.setattr(mine_module, "ROWS", 16)
    monkeypatch.setattr(neighbours, "CANDIDATES", 20)


def text(rng, words):
    return " ".join(rng.choices(WORDS, k=words))


def some_rows(count, seed=0):
    rng = random.Random(seed)
    return [
        {"query": f"{text(rng, 3)} {i}", "positive": f"{text(rng, 5)} {i}"} for i in range(count)
    ]


def write(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def of(checkpoint, pairs, output, **options):
    options = {"count": 2, "ranks": (1, 10)} | options
    mine(Mine(checkpoint, (pairs,), output, **options))
    return read(output)


def told(path):
    return json.loads(Path(f"{path}.json").read_text())


def related_rows():
    """Rows whose queries, positives and ids are shared in all ways."""
    rows = some_rows(60)
    rows[3]["query"] = rows[7]["query"]  # both positives are right for both
    rows[10]["positive"] = rows[11]["positive"]
    rows[20]["positive_id"] = rows[21]["positive_id"] = rows[22]["positive_id"] = "a"
    rows[23]["positive"], rows[23]["positive_id"] = rows[22]["positive"], "b"
    rows[24]["positive_id"] = "b"  # by way of 22 and 23 as right as 20's
    rows[30] |= {"id": [1, {"x": None}], "note": "naïve \U0001f600", "negatives": ["old", "older"]}
    return rows


def right_for(rows):
    """By row the positives that are right for its query, told by loops."""
    same = {row["positive"]: {row["positive"]} for row in rows}
    for _ in rows:
        for a in rows:
            for b in rows:
                if a.get("positive_id") is not None and a["positive_id"] == b.get("positive_id"):
                    both = same[a["positive"]] | same[b["positive"]]
                    for each in both:
                        same[each] = same[each] | both
        if max(map(len, same.values())) >= 4:
            break
    return [
        set().union(*(same[b["positive"]] for b in rows if b["query"] == a["query"])) for a in rows
    ]


def scores_of(checkpoint, rows):
    """Cosines of all queries and all different positives, in the order in which these come."""
    encoder = BTokEncoder.from_pretrained(checkpoint)
    positives = [*dict.fromkeys(row["positive"] for row in rows)]
    made = [
        encoder.encode(texts, show_progress=False)
        for texts in ([row["query"] for row in rows], positives)
    ]
    return positives, (made[0].astype(float) @ made[1].T.astype(float)).tolist()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ranks": (4, 9), "count": 3},
        {"ranks": (2, 50), "margin": 0.05, "short": "drop"},
        {"ranks": (1, 30), "relative": 0.95, "short": "drop", "count": 3},
        {"ranks": (3, 8), "relative": 0.9, "margin": 0.02, "short": "fill", "count": 4},
        {"ranks": (5, 20), "draw": "random", "seed": 3, "count": 4},
        {"ranks": (2, 7), "draw": "random", "margin": 0.1, "short": "fill", "count": 6},
    ],
)
def test_the_rows_of_a_plain_loop(checkpoint, tmp_path, options):
    rows = related_rows()
    pairs = write(tmp_path / "a.jsonl", rows)
    got = of(checkpoint, pairs, tmp_path / "hard.jsonl", scores=True, **options)
    positives, table = scores_of(checkpoint, rows)
    right = right_for(rows)
    asked = {"count": 2, "ranks": (1, 10), "margin": None, "relative": None} | options
    (low, high), count = asked["ranks"], asked["count"]
    source, place = open_source(pairs, negatives=0), {p: i for i, p in enumerate(positives)}
    keys = [
        [digest(shown(side)) for side in sides]
        for sides in ([source[i].query for i in range(60)], map(Side, positives))
    ]
    expected, short, filled = [], 0, 0
    for i, row in enumerate(rows):
        own = table[i][place[row["positive"]]]
        most = min(
            float("inf") if asked["margin"] is None else own - asked["margin"],
            float("inf") if asked["relative"] is None else own * asked["relative"],
        )
        order = [j for j in range(len(positives)) if positives[j] not in right[i]]
        order.sort(key=lambda j: (-table[i][j], j))
        good = [(rank, j) for rank, j in enumerate(order, 1) if table[i][j] <= most]
        within = [each for each in good if low <= each[0] <= high]
        if asked.get("draw") == "random":
            drawn = {j: int(mixed(asked.get("seed", 0), keys[0][i], keys[1][j])) for _, j in within}
            within.sort(key=lambda each: drawn[each[1]])
        taken = within[:count]
        if asked.get("short") == "fill" and len(taken) < count:
            more = [each for each in good if each[0] > high][: count - len(taken)]
            filled += len(taken) + len(more) == count
            taken += more
        if len(taken) < count:
            short += 1
            continue
        chosen = [positives[j] for _, j in sorted(taken)]
        expected.append({**row, "negatives": chosen})
        scores = got[len(expected) - 1].pop("scores")
        true = [own, *(table[i][j] for _, j in sorted(taken))]
        assert np.abs(np.array(scores) - true).max() < 2e-6
    assert got == expected and len(expected) > 3
    assert (short > 0) >= (asked.get("short") == "drop")
    report = told(tmp_path / "hard.jsonl")
    assert (report["written"], report["dropped"], report["filled"]) == (len(got), short, filled)
    assert (filled > 0) == (asked.get("short") == "fill")


def test_what_is_written_is_what_training_reads(checkpoint, tmp_path):
    rows = related_rows()
    of(checkpoint, write(tmp_path / "a.jsonl", rows), tmp_path / "hard.jsonl", scores=True)
    source = open_source(tmp_path / "hard.jsonl")
    assert source.negatives == 2 and source.scored and len(source) == len(rows)
    assert [side.text for side in source[30].negatives] == read(tmp_path / "hard.jsonl")[30][
        "negatives"
    ]
    assert len(source[30].scores) == 3
    bare = of(checkpoint, tmp_path / "hard.jsonl", tmp_path / "again.jsonl")
    assert not any("scores" in row for row in bare)  # those were of other negatives, maybe
    for a, b in zip(rows, bare, strict=True):
        assert list(a) == [name for name in b if name in a]
        assert {**a, "negatives": b["negatives"]} == b
    report = told(tmp_path / "hard.jsonl")
    assert report["digest"] == sha256(tmp_path / "hard.jsonl")
    mean = np.mean([row["scores"][0] for row in read(tmp_path / "hard.jsonl")])
    assert abs(report["mean_score"]["positive"] - mean) < 1e-5
    assert not (tmp_path / "hard.jsonl.parts").exists()


def picture(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), colour).save(path)


def test_pictures_of_the_same_content_and_paths_seen_from_another_folder(
    checkpoint, tmp_path, capsys
):
    data, out = tmp_path / "data", tmp_path / "out" / "deep"
    rows = []
    for i in range(8):
        picture(data / "p" / f"{i}.png", (30 * i, 90, 10))
        rows.append({"query": f"which {i}", "positive": {"images": [f"p/{i}.png"]}})
    shutil.copy(data / "p" / "0.png", data / "p" / "copy.png")
    rows[1]["positive"] = {"images": ["p/copy.png"], "video": None}
    rows[2]["query"] = {"text": "this", "images": [str(data / "p" / "2.png")]}
    (data / "frames").mkdir()
    for i in range(2):
        picture(data / "frames" / f"{i}.png", (0, 0, 99 * i))
    rows[3]["positive"] = {"video": "frames", "text": "clip"}
    rows[4]["positive"] = {"video": ["p/4.png", "p/5.png"], "frame_seconds": [0, 1]}
    (data / "p" / "broken.png").write_bytes(b"no picture")
    rows += [
        {"query": "broken", "positive": {"images": ["p/broken.png"]}},
        {"query": "gone", "positive": {"images": ["p/gone.png"]}},
    ]
    pairs = write(data / "a.jsonl", rows)
    got = of(checkpoint, pairs, out / "hard.jsonl", count=5, ranks=(1, 6), short="drop")
    said = capsys.readouterr().err
    assert "a.jsonl:9: left out" in said and "a.jsonl:10: left out" in said
    assert told(out / "hard.jsonl")["unreadable"] == 2 and len(got) == 8
    for i, row in enumerate(got):
        shown = [n["images"][0] for n in row["negatives"] if n.get("images")]
        own = {"copy.png", "0.png"} if i < 2 else {f"{i}.png"}
        assert not own & {Path(name).name for name in shown}
        assert not any("broken" in name or "gone" in name for name in shown)
        assert all((out / name).exists() for name in shown)
    pair = open_source(out / "hard.jsonl")[3]
    assert [frame.resolve() for frame in pair.positive.video] == [
        data / f"frames/{i}.png" for i in (0, 1)
    ]
    assert got[2]["query"] == rows[2]["query"]  # its path is absolute
    beside = of(checkpoint, pairs, data / "hard.jsonl", count=5, ranks=(1, 6), short="drop")
    assert beside[1]["positive"] == rows[1]["positive"]
    assert [Path(n["images"][0]).name for n in beside[5]["negatives"] if "images" in n] == [
        Path(n["images"][0]).name for n in got[5]["negatives"] if "images" in n
    ]


def test_instructions_are_before_the_texts(checkpoint, tmp_path):
    pairs = write(tmp_path / "a.jsonl", some_rows(30))
    options = {"query_instruction": "Find:", "positive_instruction": "Page:"}
    got = of(checkpoint, pairs, tmp_path / "hard.jsonl", scores=True, **options)
    encoder = BTokEncoder.from_pretrained(checkpoint)
    for row in got[::7]:
        query = encoder.encode([row["query"]], "Find:", show_progress=False)[0]
        keys = encoder.encode([row["positive"], *row["negatives"]], "Page:", show_progress=False)
        assert np.abs(keys @ query - row["scores"]).max() < 1e-5
    assert not any("Page:" in negative for row in got for negative in row["negatives"])


def test_files_do_not_mix(checkpoint, tmp_path):
    rows = some_rows(20), [{"query": f"q {i}", "positive": f"other {i}"} for i in range(20)]
    pairs = tuple(write(tmp_path / f"{n}.jsonl", part) for n, part in zip("ab", rows, strict=True))
    mine(Mine(checkpoint, pairs, tmp_path / "hard", count=3, ranks=(1, 12)))
    for name, part in zip("ab", rows, strict=True):
        of(checkpoint, tmp_path / f"{name}.jsonl", tmp_path / "one.jsonl", count=3, ranks=(1, 12))
        assert (tmp_path / "one.jsonl").read_bytes() == (
            tmp_path / f"hard/{name}.jsonl"
        ).read_bytes()
        for path in tmp_path.glob("one.jsonl*"):
            path.unlink()
        own = {row["positive"] for row in part}
        assert all(own >= {*row["negatives"]} for row in read(tmp_path / f"hard/{name}.jsonl"))


def test_a_draw_does_not_depend_on_the_order_of_rows(checkpoint, tmp_path, monkeypatch):
    rows = some_rows(40)
    options = {"draw": "random", "ranks": (2, 30), "count": 3}
    pairs = write(tmp_path / "a.jsonl", rows)
    first = of(checkpoint, pairs, tmp_path / "first.jsonl", **options)
    other = of(checkpoint, pairs, tmp_path / "other.jsonl", seed=1, **options)
    assert first != other
    turned = of(
        checkpoint, write(tmp_path / "b.jsonl", rows[::-1]), tmp_path / "t.jsonl", **options
    )
    assert turned[::-1] == first
    for name, size in (("PART", 1000), ("ROWS", 7)):
        monkeypatch.setattr(mine_module, name, size)
    monkeypatch.setattr(neighbours, "CANDIDATES", 1000)
    whole = of(checkpoint, pairs, tmp_path / "whole.jsonl", **options)
    assert whole == first


# -- killed, stopped, shared


RUN = """
import sys, time
import btok.tools.mine as module
from btok.tools import mine_output, neighbours
module.PART, module.ROWS, neighbours.CANDIDATES = 8, 16, 20
where, pause, line = module.Blocks.write, float(sys.argv.pop(1)), mine_output.as_line
def write(self, *arguments):
    time.sleep(pause)
    where(self, *arguments)
def as_line(row):
    time.sleep(pause / 8)
    return line(row)
module.Blocks.write, mine_output.as_line = write, as_line
from btok.tools.cli import main
sys.exit(main(sys.argv[1:]))
"""
OPTIONS = ["--count", "3", "--ranks", "2", "20", "--draw", "random", "--scores"]


def begun(checkpoint, pairs, output, pause):
    command = ["mine", checkpoint, str(pairs), "--output", str(output), *OPTIONS]
    start = [sys.executable, "-c", RUN, str(pause), *command]
    # a shell has what it starts in the background ignore SIGINT, and children inherit that
    hear = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    options = {"stderr": subprocess.PIPE, "text": True, "preexec_fn": hear}
    return subprocess.Popen(start, env=environment(), **options)


def until(ready, child):
    limit = time.monotonic() + 120
    while not ready():
        assert child.poll() is None and time.monotonic() < limit
        time.sleep(0.005)


def marks(parts, pattern):
    return sum(sum(path.read_bytes()) for path in parts.glob(pattern))


@pytest.mark.parametrize(
    "stage", ["query.f32.done", "positive.f32.done", "*.chosen.done", "*.jsonl"]
)
def test_killed_and_gone_on_with(checkpoint, tmp_path, stage):
    pairs = write(tmp_path / "a.jsonl", some_rows(70))
    child = begun(checkpoint, pairs, tmp_path / "whole.jsonl", 0)
    assert child.wait() == 0, child.stderr.read()
    half = tmp_path / "half.jsonl"
    parts = tmp_path / "half.jsonl.parts"
    child = begun(checkpoint, pairs, half, 0.2)
    if stage == "*.jsonl":
        until(lambda: any(parts.glob(stage)), child)
    else:
        until(lambda: marks(parts, stage) >= 2, child)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not half.exists() and not Path(f"{half}.json").exists()
    kept = [path.name for path in parts.iterdir() if path.name.endswith(".done")]
    before = {name: marks(parts, name) for name in kept}
    assert before
    made = []
    with pytest.MonkeyPatch.context() as patch:
        noted = Blocks.write
        patch.setattr(
            Blocks, "write", lambda self, *a: made.append(self.done.name) or noted(self, *a)
        )
        assert main(["mine", checkpoint, str(pairs), "--output", str(half), *OPTIONS]) == 0
    for name, count in before.items():  # no block that was there is made again
        blocks = -(-70 // (16 if "chosen" in name else 8))
        assert made.count(name) == blocks - count
    for ending in ("", ".json"):
        whole = tmp_path / f"whole.jsonl{ending}"
        assert Path(f"{half}{ending}").read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir() if "half" in path.name) == [
        "half.jsonl",
        "half.jsonl.json",
    ]


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_stopped_cleanly(checkpoint, tmp_path, sign):
    pairs = write(tmp_path / "a.jsonl", some_rows(70))
    child = begun(checkpoint, pairs, tmp_path / "half.jsonl", 0.2)
    until(lambda: marks(tmp_path / "half.jsonl.parts", "query.f32.done") >= 1, child)
    child.send_signal(sign)
    assert child.wait() == 130
    assert child.stderr.read().endswith("stopped; the same command goes on where it was\n")


RANK = """
import sys
import btok.tools.mine as module
from btok.tools import neighbours
from helpers import gloo
module.PART, module.ROWS, neighbours.CANDIDATES = 8, 16, 20
from pathlib import Path
folder, rank, checkpoint, pairs, output = sys.argv[1:]
with gloo(folder, int(rank), 2):
    module.mine(module.Mine(checkpoint, (Path(pairs),), Path(output), 3, (2, 20)))
    try:
        module.mine(module.Mine(checkpoint, (Path(pairs),), Path(output), 4, (2, 20)))
    except ValueError as error:
        assert "count 3, this is 4" in str(error), error
    else:
        raise AssertionError
"""


def test_ranks_share_the_work(checkpoint, tmp_path):
    pairs = write(tmp_path / "a.jsonl", some_rows(70))
    of(checkpoint, pairs, tmp_path / "one.jsonl", count=3, ranks=(2, 20))
    shared = [checkpoint, pairs, tmp_path / "two.jsonl"]
    children = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, tmp_path, str(rank), *shared], env=environment()
        )
        for rank in range(2)
    ]
    assert [child.wait() for child in children] == [0, 0]
    for ending in ("", ".json"):
        one, two = (tmp_path / f"{name}.jsonl{ending}" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


# -- what is refused


def refused(capsys, checkpoint, *arguments):
    assert main(["mine", checkpoint, *map(str, arguments)]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    return line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--count", 0], "mine: count is 0, expected at least 1"),
        (["--ranks", 0, 5], "mine: ranks is 0 5, expected the first, from 1 on, and the last"),
        (["--ranks", 9, 5], "mine: ranks is 9 5, expected the first"),
        (["--ranks", 9, 11], "mine: ranks is 9 11, expected at least as many as count, 4"),
        (["--ranks", 9], "--ranks"),
        (["--ranks", 9, 10001], "mine: ranks is 9 10001, expected at most 10000"),
        (["--margin", -1], "mine: margin is -1.0, expected from 0 to 2"),
        (["--margin", "nan"], "mine: margin is nan, expected from 0 to 2"),
        (["--relative", 1.5], "mine: relative is 1.5, expected above 0 and at most 1"),
        (["--seed", -1], "mine: seed is -1, expected from 0"),
        (["--batch-tokens", 0], "mine: batch_tokens is 0, expected at least 1"),
        (["--draw", "far"], "far"),
        (["--short", "skip"], "skip"),
        (["--ranks", 1, 20, "--count", 9], "a.jsonl has 9 different positives, of which 8 at most"),
        (["--ranks", 5, 20, "--count", 5], "from 5 on and count 5 need 9"),
    ],
)
def test_options_that_do_not_fit(checkpoint, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.setattr(BTokEncoder, "encode_iter", None)  # nothing is encoded
    pairs = write(tmp_path / "a.jsonl", some_rows(9))
    assert message in refused(capsys, checkpoint, pairs, "--output", tmp_path / "h.jsonl", *options)
    assert {path.name for path in tmp_path.iterdir()} <= {"a.jsonl", "a.jsonl.pairs.index"}


def test_files_that_do_not_fit(checkpoint, tmp_path, capsys):
    a = write(tmp_path / "a.jsonl", some_rows(30))
    (tmp_path / "more").mkdir()
    b = write(tmp_path / "more/a.jsonl", some_rows(30))
    out = ["--output", tmp_path / "h.jsonl"]
    wrong = write(tmp_path / "wrong.jsonl", [{"query": "q", "positive": "p"}, {"query": "q"}])
    for arguments, message in (
        ([a, b, *out], "for 2 files, expected a folder"),
        ([a, b, "--output", tmp_path / "h"], "pairs has two files a.jsonl, expected different"),
        ([tmp_path / "a.csv", *out], "a.csv, expected .jsonl files"),
        ([a, "--output", a], "is a file of pairs, expected another one"),
        ([tmp_path / "gone.jsonl", *out], "gone.jsonl, which does not exist; expected a"),
        ([wrong, *out], "wrong.jsonl:2: it has no positive"),
    ):
        assert message in refused(capsys, checkpoint, *arguments)
    (tmp_path / "h.jsonl.parts").write_text("")
    line = refused(capsys, checkpoint, a, *out)
    assert "mine: output's parts is" in line and "which is a file; expected a folder" in line
    (tmp_path / "h.jsonl.parts").unlink()
    (tmp_path / "h.jsonl.json").mkdir()  # told before anything is encoded
    line = refused(capsys, checkpoint, a, *out)
    assert "mine: output's report is" in line and "which is a folder; expected a file" in line
    assert not (tmp_path / "h.jsonl.parts").exists()
    assert main(["mine", checkpoint, *map(str, out)]) == 2


def test_an_output_of_something_else(checkpoint, tmp_path, capsys):
    pairs = write(tmp_path / "a.jsonl", some_rows(30))
    path = tmp_path / "h.jsonl"
    path.write_text("mine\n")
    command = [pairs, "--output", path, "--ranks", 1, 9]
    assert "was not made by mine" in refused(capsys, checkpoint, *command)
    assert path.read_text() == "mine\n" and not Path(f"{path}.parts").exists()
    path.unlink()
    assert main(["mine", checkpoint, *map(str, command)]) == 0
    made = path.read_bytes()
    assert main(["mine", checkpoint, *map(str, command)]) == 0
    assert "is there already" in capsys.readouterr().err
    left = Path(f"{path}.parts/query.f32")  # without what says whose it is
    left.parent.mkdir()
    left.write_text("left")
    assert main(["mine", checkpoint, *map(str, command)]) == 0
    assert "is there already" in capsys.readouterr().err and left.read_text() == "left"
    for more, message in (
        (["--count", 3], "count 4, this is 3"),
        (["--scores"], "scores False, this is True"),
        (["--query-instruction", "Find"], "query_instruction '', this is 'Find'"),
    ):
        assert message in refused(capsys, checkpoint, *command, *more)
    other = tiny_checkpoint(tmp_path / "other", seed=1)
    assert "is of model" in refused(capsys, str(other), *command)
    assert path.read_bytes() == made
    path.write_bytes(made + b"\n")
    assert "was changed since it was made" in refused(capsys, checkpoint, *command)


def test_a_file_of_someone_else_is_never_replaced(checkpoint, tmp_path, capsys):
    pairs = write(tmp_path / "a.jsonl", some_rows(30))
    path, report = tmp_path / "h.jsonl", tmp_path / "h.jsonl.json"
    command = [pairs, "--output", path, "--ranks", 1, 9]
    assert "--short drop" in refused(capsys, checkpoint, *command, "--margin", 0.9)
    path.write_text("mine\n")  # beside the parts of that call
    line = refused(capsys, checkpoint, *command)
    assert f"output is {path}, which is there and was not made by mine; name another" in line
    for other in ('{"x": 1}', "[1]", "no JSON", '{"digest": "a", "made_of": {"vectors": 1}}'):
        report.write_text(other)
        assert refused(capsys, checkpoint, *command) == line
        assert path.read_text() == "mine\n" and report.read_text() == other
    path.unlink()
    line = refused(capsys, checkpoint, *command)
    assert f"output is {report}, which is there and was not made by mine" in line
    report.unlink()
    kept = Path(f"{path}.parts/manifest.json")
    before = kept.read_text()
    kept.write_text("[1]")
    assert f"output is {kept}, which is there" in refused(capsys, checkpoint, *command)
    kept.unlink()  # a folder of the parts' name, with other things in it
    (kept.parent / "note.txt").write_text("kept")
    assert f"output is {kept.parent}, which is there" in refused(capsys, checkpoint, *command)
    assert (kept.parent / "note.txt").read_text() == "kept"
    kept.write_text(before)
    with pytest.MonkeyPatch.context() as patch:  # it comes while vectors are made
        search = mine_module.search
        patch.setattr(mine_module, "search", lambda *a: path.write_text("late") and search(*a))
        line = refused(capsys, checkpoint, *command)
    assert f"output is {path}, which is there" in line and path.read_text() == "late"
    path.unlink()
    assert main(["mine", checkpoint, *map(str, command)]) == 0
    path.unlink()  # as a refusal says; its report is still there
    assert main(["mine", checkpoint, *map(str, command), "--count", "3"]) == 0
    assert told(path)["made_of"]["choice"]["count"] == 3


@pytest.mark.parametrize("renames", [0, 1])
@pytest.mark.parametrize("old", [False, True])
def test_killed_between_the_output_and_its_report(checkpoint, tmp_path, capsys, renames, old):
    pairs = write(tmp_path / "a.jsonl", some_rows(30))
    whole, path = tmp_path / "whole.jsonl", tmp_path / "h.jsonl"
    of(checkpoint, pairs, whole)
    if old:  # a report of an output that was deleted
        of(checkpoint, pairs, path, count=3)
        path.unlink()
    left = [renames]

    def rename(one, other):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        os.replace(one, other)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(mine_output, "rename", rename)
        of(checkpoint, pairs, path)
    assert path.exists() == (renames == 1)
    if renames:  # it is known for what it is
        with pytest.raises(ValueError, match="is of count 2, this is 3"):
            of(checkpoint, pairs, path, count=3)
    of(checkpoint, pairs, path)
    for ending in ("", ".json"):
        assert Path(f"{path}{ending}").read_bytes() == Path(f"{whole}{ending}").read_bytes()
    assert not Path(f"{path}.parts").exists()


def test_parts_of_other_settings(checkpoint, tmp_path, capsys):
    """Vectors of other inputs are refused; another choice is made of the same vectors."""
    pairs = write(tmp_path / "a.jsonl", some_rows(40))
    path = tmp_path / "h.jsonl"
    command = [pairs, "--output", path, "--ranks", 1, 9, "--margin", 0.3]
    line = refused(capsys, checkpoint, *command)
    assert "40 rows, this first, have fewer than 4 candidates left in the ranks 1 to 9" in line
    assert "--short drop" in line and "a.jsonl:" in line
    line = refused(capsys, checkpoint, *command, "--positive-instruction", "Page")
    assert "h.jsonl.parts is of positive_instruction '', this is 'Page'; delete" in line
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BTokEncoder, "_vectors", None)  # none is made again
        assert main(["mine", checkpoint, *map(str, command), "--short", "fill"]) == 0
    assert told(path)["filled"] > 0 and len(read(path)) + told(path)["dropped"] == 40


def test_rows_that_can_never_have_enough(checkpoint, tmp_path, capsys):
    """As all positives but a few are right for one query: told before anything is encoded."""
    rows = some_rows(20)
    for row in rows[4:]:
        row["query"] = "the same"
    pairs = write(tmp_path / "a.jsonl", rows)
    command = [pairs, "--output", tmp_path / "h.jsonl", "--ranks", 3, 10, "--count", 3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BTokEncoder, "encode_iter", None)
        line = refused(capsys, checkpoint, *command)
        assert "a.jsonl:5: 16 of 20 rows, this first, have fewer than 3" in line
    assert main(["mine", checkpoint, *map(str, command), "--short", "drop"]) == 0
    assert len(read(tmp_path / "h.jsonl")) == 4
    margin = [*map(str, command), "--short", "drop", "--margin", "2"]
    margin[2] = str(tmp_path / "none.jsonl")
    assert "no row has 3 negatives within margins" in refused(capsys, checkpoint, *margin)


# -- the parts


def test_equal_scores_are_taken_in_order(tmp_path):
    rng = np.random.default_rng(0)
    import torch

    vectors = rng.integers(-2, 3, (300, 4)).astype(np.float32)
    queries = rng.integers(-2, 3, (9, 4)).astype(np.float32)
    vectors[[5, 250]] = np.nan
    file = Blocks(tmp_path / "v", 300, ("<f4", (4,)), 70)
    for block in file.missing():
        file.write(block, vectors[file.rows(block).start : file.rows(block).stop])
    assert (file.take(np.array([7, 3, 299, 7])) == vectors[[7, 3, 299, 7]]).all()
    table = queries @ vectors.T
    for k, limit in ((1, 99.0), (7, 3.0), (400, 2.0)):
        limits = torch.full((9,), limit) if limit < 99 else None
        scores, numbers, above = nearest(
            torch.from_numpy(queries), file, k, limits, lambda *_: None
        )
        for row in range(9):
            order = [j for j in range(300) if table[row, j] <= limit]
            order.sort(key=lambda j: (-table[row, j], j))
            found = np.isfinite(scores[row])
            assert numbers[row][found].tolist() == order[:k]
            assert scores[row][found].tolist() == table[row, order[:k]].tolist()
            assert above[row] == (np.nan_to_num(table[row], nan=-99) > limit).sum()
    scores = torch.tensor([[-0.0, 0.0, -1.5, 3.0, -torch.inf]])
    keys = as_keys(scores, torch.arange(5))[0].tolist()
    assert keys[0] > keys[1] and keys[3] > keys[0] and keys[1] > keys[2] > keys[4]


def test_a_full_disk_names_the_file(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    file = Blocks(tmp_path / "v", 4, "<f4", 2)
    file.path.unlink()
    file.path.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*v'"):
        file.write(0, np.zeros(2, np.float32))
    assert file.missing() == [0, 1]
