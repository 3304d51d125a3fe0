"""The pocket benchmark, read back from its pixels and words alone.

`facts` recovers a scene from a picture by looking every 8x8 block up among scikit-learn's scans;
`satisfies` reads a query's words and decides whether a candidate is right. Neither calls the code
that made them.
"""

import json
import re
import sys
import types
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from train.pocket import data as pocket
from train.pocket import table

sklearn_datasets = pytest.importorskip("sklearn.datasets", reason="needs the demo extra")

PINNED = {"scikit-learn": "1.9.1", "scipy": "1.17.1", "numpy": "2.3.5", "pillow": "13.0.0"}
DIGEST = "84dd2d8ab6db7deb55b2b22044b2d7f538e26741a69b3c0d70cb7e631eebf14d"
SCENES = pocket.TASKS[:-1]
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
PLACES = [f"{y} {x}" for y in ("top", "middle", "bottom") for x in ("left", "center", "right")]


@pytest.fixture(scope="module")
def tasks():
    return {task.name: task for task in pocket.tasks()}


@cache
def scans():
    data = sklearn_datasets.load_digits()
    return {image.astype(np.uint8).tobytes(): i for i, image in enumerate(data.images)}, data.target


def read(frame):
    """Every (colour, digit, scan) of a frame and its cell's corner; nothing else may be drawn."""
    known, target = scans()
    canvas, found, ink = np.array((24.0, 24.0, 32.0)), {}, 0
    colours = {name: rgb - canvas for name, rgb in pocket.COLOURS.items()}
    for y in range(0, frame.shape[0] - 27, 14):
        for x in range(0, frame.shape[1] - 27, 14):
            block = frame[y + 3 : y + 27 : 3, x + 3 : x + 27 : 3] - canvas  # [8, 8, 3]
            total = block.sum((0, 1))
            if not total.any():
                continue
            colour = max(colours, key=lambda n: colours[n] @ total / np.linalg.norm(colours[n]))
            line = colours[colour]
            levels = np.rint(block @ line / (line @ line) * 16)  # [8, 8]
            scan = known.get(levels.clip(0, 255).astype(np.uint8).tobytes())
            if scan is not None and abs(block - levels[..., None] / 16 * line).max() <= 0.51:
                found[colour, DIGITS[target[scan]], scan] = (y, x)
                ink += 9 * np.count_nonzero(levels)
    assert ink == np.count_nonzero((frame != canvas).any(-1))
    return found


MEMO = {}


def facts(side):
    """{(colour, digit, scan): state}: the place in a scene, the motion in a video, else nothing."""
    if id(side) not in MEMO:
        MEMO[id(side)] = (
            side,
            _facts([*side.images, *side.video]),
        )  # the side itself, to keep its id
    return MEMO[id(side)][1]


def _facts(frames):
    frames_read = [read(frame) for frame in frames]
    paths = {}
    for at, found in enumerate(frames_read):
        for thing, corner in found.items():
            paths.setdefault(thing, {})[at] = corner
    if len(frames) == 4:
        return {thing: motion(path) for thing, path in paths.items()}
    if len(frames) == 1 and frames[0].shape == (84, 84, 3):
        return {thing: PLACES[p[0][0] // 28 * 3 + p[0][1] // 28] for thing, p in paths.items()}
    return dict.fromkeys(paths, "")


def motion(path):
    steps = {tuple(np.sign(np.subtract(path[b], path[a])).tolist()) for a, b in pairwise(path)}
    steps -= {(0, 0)}
    if not steps:
        assert list(path) in ([0, 1, 2, 3], [0, 2])
        return "still" if len(path) == 4 else "blinking"
    assert len(path) == 4
    ((down, right),) = steps
    return f"{('', 'down', 'up')[down]} {('', 'right', 'left')[right]}".strip()


def says(state):
    return f"is {state}" if state in ("still", "blinking") else f"moves {state}"


def satisfies(query, candidate):
    """Whether a candidate is right, from the words and pixels of both."""
    scene = facts(query)
    if not scene:  # a description: what it says, and nothing else, is to be seen
        state = says if candidate.video else str
        there = [f"{c} {d} {state(s)}" for (c, d, _), s in facts(candidate).items()]
        return sorted(query.text.split(", ")) == sorted(there)
    answers = {"what digit?", "what motion?"}
    for (colour, digit, _), state in scene.items():
        answers = {
            "what digit?": digit,
            "what motion?": state,
            f"which digit is {colour}?": digit,
            f"which digit {says(state)}?": digit,
            f"what color is the {digit}?": colour,
            f"which color {says(state)}?": colour,
            f"how does the {colour} digit move?": state,
            f"how does the {digit} move?": state,
            f"find the {colour} digit": (colour, digit),
            f"find the {digit}": (colour, digit),
            f"find the digit {state}": (colour, digit),
            f"the moment of the {colour} digit": (colour, digit),
            f"the moment of the {digit}": (colour, digit),
        }
        if query.text in answers:
            seen = [thing[:2] for thing in facts(candidate)]
            return answers[query.text] in (candidate.text, *seen)
    raise AssertionError(f"nothing in the scene fits {query.text!r}")


def content(side):
    return side.text, tuple((f.shape, f.tobytes()) for f in (*side.images, *side.video))


def contents(group):
    return [(content(p.query), content(p.positive), p.target, p.positive_id) for p in group]


@pytest.mark.parametrize("task", pocket.TASKS)
def test_groups_are_pure_functions_of_their_arguments(task):
    group = contents(pocket.train_group(task, 5))
    assert len(group) == 16
    assert group != contents(pocket.train_group(task, 6))
    assert group != contents(pocket.train_group(task, 5, seed=1))
    assert group == contents(pocket.train_group(task, 5))
    assert group[:6] == contents(pocket.train_group(task, 5, size=6))


@pytest.mark.parametrize("name", SCENES)
def test_only_the_positive_satisfies_its_query(tasks, name):
    task = tasks[name]
    for i in range(25):
        pool = task.pools[i]
        right = [at for at in pool if satisfies(task.queries[i], task.candidates[at])]
        assert right == list(task.qrels[i]), (i, task.queries[i].text)


@pytest.mark.parametrize("name", SCENES)
def test_positive_ids_are_equal_where_positives_are_interchangeable(name):
    for index in range(3):
        group = pocket.train_group(name, index)
        for one in group:
            for other in group:
                same = one.positive_id == other.positive_id
                assert satisfies(one.query, other.positive) == same, (one, other)


def test_pools_are_unique_and_hold_the_positive_and_the_hard(tasks):
    sizes = {"I-CLS": {10}, "I-QA": {8, 10}, "I-RET": {16}, "I-VG": {10}, "V-CLS": {10}}
    sizes |= {"V-QA": {8, 10}, "V-RET": {16}, "M-RET": {10}}
    for name, task in tasks.items():
        assert (task.meta_task, task.modality) == (name, pocket.MODALITY[name])
        assert task.metric == ("ndcg@5" if name == "VisDoc" else "hit@1")
        assert len(task.queries) == len(task.qrels) == 400
        assert len({content(side) for side in task.candidates}) == len(task.candidates)
        assert (task.hard is None) == (name in ("I-CLS", "V-CLS"))
        pools = task.pools or [range(len(task.candidates))] * 400
        assert not task.pools or {len(pool) for pool in pools} == sizes[name]
        for pool, right, hard in zip(pools, task.qrels, task.hard or pools, strict=True):
            assert len(right) == 1 and len(set(pool)) == len(pool)
            assert set(right) <= set(hard) <= set(pool)


def test_fewer_queries_are_the_first_of_more(tasks):
    few = pocket.tasks(queries=40)
    for task in few:
        queries = tasks[task.name].queries[:40]
        assert [content(side) for side in task.queries] == [content(side) for side in queries]


def test_the_order_of_candidates_does_not_tell_the_positive(tasks):
    for name in SCENES:
        task = tasks[name]
        orders = [(task.pools, 0.25), (task.hard or task.pools, 0.65)]
        if name in pocket.POOLS:  # candidates are no fixed list of answers: their index could tell
            orders.append(([sorted(hard) for hard in task.hard], 0.5))
        for order, limit in orders:
            at = Counter(ids.index(*right) for ids, right in zip(order, task.qrels, strict=True))
            assert max(at.values()) < limit * 400, (name, at)


@pytest.mark.parametrize("name", ["I-RET", "V-RET"])
def test_hard_scenes_differ_in_one_attribute(tasks, name):
    task = tasks[name]
    for i in range(25):
        scenes = {at: facts(task.candidates[at]) for at in task.hard[i]}
        truth = scenes.pop(*task.qrels[i])
        assert sorted(difference(truth, scene) for scene in scenes.values()) == [
            "colour",
            "digit",
            "state",
        ]


def difference(a, b):
    """The only attribute in which two scenes differ, read by colour, by scan and by state."""
    drawn = [sorted((scan, state) for (_, _, scan), state in scene.items()) for scene in (a, b)]
    looks = [sorted((colour, state) for (colour, *_), state in scene.items()) for scene in (a, b)]
    things = [set(scene) for scene in (a, b)]
    if drawn[0] == drawn[1]:
        assert {c for c, *_ in a} == {c for c, *_ in b} and not things[0] & things[1]
        return "colour"
    if looks[0] == looks[1]:
        assert len(things[0] & things[1]) == 1 and len({digit for _, digit, _ in a | b}) == 3
        return "digit"
    assert things[0] == things[1] and sum(a[thing] != b[thing] for thing in a) == 1
    return "state"


@pytest.mark.parametrize("name", ["I-QA", "V-QA", "I-VG", "M-RET"])
def test_hard_candidates_are_those_of_the_scene(tasks, name):
    task = tasks[name]
    for i in range(40):
        scene = facts(task.queries[i])
        words = {word for (*thing, _), state in scene.items() for word in (*thing, state)}
        for at in task.pools[i]:
            candidate = task.candidates[at]
            there = candidate.text in words - {""} or bool(facts(candidate).keys() & scene.keys())
            assert there == (at in task.hard[i])


@pytest.mark.parametrize("name", ["I-VG", "M-RET"])
def test_words_alone_leave_several_candidates(tasks, name):
    task, fitting = tasks[name], []
    for query, pool in zip(task.queries[:60], task.pools, strict=False):
        word = re.search(f"{'|'.join((*DIGITS, *pocket.COLOURS))}", query.text)
        if word:
            named = [thing for at in pool for thing in facts(task.candidates[at])]
            fitting.append(sum(word[0] in thing for thing in named))
    assert len(fitting) > 30 and np.mean([1 / n for n in fitting]) < 0.35


@pytest.mark.parametrize("name", ["I-QA", "V-QA", "I-RET", "V-RET", "I-VG", "M-RET"])
def test_groups_are_hard(name):
    """Every four pairs share their scans, and ask for different positives."""
    for index in range(4):
        group = pocket.train_group(name, index)
        for family in (group[at : at + 4] for at in range(0, 16, 4)):
            scenes = [
                facts(pair.positive if name in ("I-RET", "V-RET") else pair.query)
                for pair in family
            ]
            assert all({t[2] for t in scenes[0]} & {t[2] for t in scene} for scene in scenes)
            assert len({pair.positive_id for pair in family}) == (2 if name.endswith("QA") else 4)


def test_page_groups_are_neighbours():
    shared = 0
    for index in range(10):
        group = pocket.train_group("VisDoc", index)
        for family in (group[at : at + 4] for at in range(0, 16, 4)):
            assert len({pair.positive_id for pair in family}) == 4
            shared += len({pair.positive_id.rsplit(".", 1)[0] for pair in family}) < 4
    assert shared > 35  # of 40


def test_train_and_test_share_no_scan_and_no_page(tasks):
    trained, held = set(), set()
    for name in SCENES:
        for index in range(5):
            for pair in pocket.train_group(name, index):
                trained |= {t[2] for side in (pair.query, pair.positive) for t in facts(side)}
        pooled = {at for pool in tasks[name].pools[:20] for at in pool}
        for side in (*tasks[name].queries[:20], *(tasks[name].candidates[at] for at in pooled)):
            held |= {t[2] for t in facts(side)}
    assert len(trained) > 300 and len(held) > 200 and not trained & held
    pages = {content(side) for side in tasks["VisDoc"].candidates}
    train = {content(p.positive) for i in range(40) for p in pocket.train_group("VisDoc", i)}
    assert len(train) > 500 and not pages & train
    read_pages = {page_text(side.images[0]) for side in tasks["VisDoc"].candidates[:100]}
    seen = {"".join(text.split()) for text in pocket.texts(groups=1)}
    assert not any(text.startswith(page) for page in read_pages for text in seen)


@cache
def letters():
    from PIL import Image, ImageDraw, ImageFont

    table, font = {}, ImageFont.load_default_imagefont()
    for code in range(32, 127):
        cell = Image.new("L", (7, 14), 255)
        ImageDraw.Draw(cell).text((0, 1), chr(code), fill=0, font=font)
        table[(np.asarray(cell) > 127).tobytes()] = chr(code)
    return table


def page_text(page):
    """Read a page letter by letter, without its spaces."""
    assert page.shape == (112, 112, 3) and (page == page[..., :1]).all()
    rows = (page[y : y + 14, :, 0] > 127 for y in range(0, 112, 14))
    text = (letters()[row[:, x : x + 7].tobytes()] for row in rows for x in range(0, 112, 7))
    return "".join("".join(text).split())


def test_pages_show_their_name_and_text(tasks):
    assert len(letters()) == 95
    for pair in pocket.train_group("VisDoc", 0, size=40):
        shown, words = page_text(pair.positive.images[0]), pair.target.split()
        start = "".join(words)[:80]
        assert shown.startswith(start[: len(shown)]) and len(shown) > 15
        assert pair.positive_id == words[0] and len(words) <= 12
        assert words[0].startswith(("numpy.", "scipy.", "sklearn."))
        assert pair.query.text.split() == words[:7]
    task = tasks["VisDoc"]
    for query, right, hard in zip(task.queries, task.qrels, task.hard, strict=True):
        shown = page_text(task.candidates[next(iter(right))].images[0])
        assert shown.startswith("".join(query.text.split())[:60])
        first = {page_text(task.candidates[at].images[0]).split(".")[0] for at in hard[:5]}
        assert first == {query.text.split(".")[0]}
    assert np.mean([len(hard) > 3 for hard in task.hard]) > 0.9


def test_sides_are_uint8_in_whole_tokens(tasks):
    shapes = {
        "I-CLS": [(1, 56)],
        "I-QA": [(1, 84)],
        "I-RET": [(1, 84)],
        "I-VG": [(1, 84), (1, 56)],
        "V-CLS": [(4, 84)],
        "V-QA": [(4, 84)],
        "V-RET": [(4, 84)],
        "M-RET": [(8, 56), (2, 56)],
        "VisDoc": [(1, 112)],
    }
    for name, task in tasks.items():
        sides = [*task.queries[:40], *task.candidates[:40]]
        sides += [s for p in pocket.train_group(name, 0) for s in (p.query, p.positive)]
        for side in sides:
            frames = [*side.images, *side.video]
            assert all(f.dtype == np.uint8 and f.shape[2:] == (3,) for f in frames)
            assert all(f.shape[0] == f.shape[1] and f.shape[0] % 28 == 0 for f in frames)
            assert bool(side.video) == (len(frames) > 1) and bool(frames) >= (not side.text)
            assert not frames or (len(frames), frames[0].shape[0]) in shapes[name]


@pytest.mark.parametrize("name", pocket.TASKS)
def test_targets_describe_what_is_shown(name):
    for pair in pocket.train_group(name, 1):
        assert pair.dataset == name and not pair.negatives
        visual = bool(pair.query.images or pair.query.video)
        assert pair.ntp_side == ("positive" if visual else "query")
        if name in ("I-RET", "V-RET"):
            assert pair.target is None
            phrases = pair.query.text.split(", ")  # in any order; the identity has one order
            phrases.sort(key=lambda phrase: phrase.split()[1])
            assert pair.positive_id == ", ".join(phrases)
        elif name != "VisDoc":
            answer, described = pair.target.split(": ")
            assert answer == (pair.positive.text or " ".join(next(iter(facts(pair.positive)))[:2]))
            said = [" ".join(phrase.split()[:2]) for phrase in described.split(", ")]
            assert sorted(said) == sorted(f"{c} {d}" for c, d, _ in facts(pair.query))
            if name not in ("I-CLS", "M-RET"):
                state = says if pair.query.video else str
                there = [f"{c} {d} {state(s)}" for (c, d, _), s in facts(pair.query).items()]
                assert sorted(described.split(", ")) == sorted(there)
            if name == "M-RET":
                assert said == [" ".join(t[:2]) for t in facts(pair.query)]


def test_texts_cover_the_words_of_the_test_set(tasks):
    texts = list(pocket.texts())
    words = {word for text in texts for word in re.findall(r"\w+", text)}
    for name in SCENES:
        for side in (*tasks[name].queries, *tasks[name].candidates):
            assert set(re.findall(r"\w+", side.text)) <= words
    assert texts == list(pocket.texts()) and len(texts) > 8000


def test_classes_are_balanced(tasks):
    for name in ("I-CLS", "V-CLS"):
        task = tasks[name]
        answers = Counter(task.candidates[at].text for right in task.qrels for at in right)
        assert len(answers) == 10 and max(answers.values()) < 70 and min(answers.values()) > 20


def test_digest_is_pinned():
    if pocket.sources() != PINNED:
        pytest.skip(f"the digest is known for {PINNED}, not for {pocket.sources()}")
    assert pocket.digest() == DIGEST


def test_errors_name_what_is_wrong(monkeypatch):
    with pytest.raises(ValueError, match=r"'I-OCR', not one of I-CLS, I-QA, .*VisDoc"):
        pocket.train_group("I-OCR", 0)
    with pytest.raises(ValueError, match="size is 1"):
        pocket.train_group("I-CLS", 0, size=1)
    with pytest.raises(ValueError, match="index is -1"):
        pocket.train_group("I-CLS", -1)
    with pytest.raises(ValueError, match="queries is 39"):
        pocket.tasks(queries=39)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"scikit-learn: pip install \"btok\[demo\]\""):
        pocket._scans.__wrapped__()
    monkeypatch.setattr(
        pocket.importlib, "util", types.SimpleNamespace(find_spec=lambda name: None)
    )
    with pytest.raises(ImportError, match=r"sources of numpy: pip install \"btok\[demo\]\""):
        pocket._pages.__wrapped__()


SCORES = {"metric": "hit@1", "chance": 10.0, "floor": 25.0}


def score_file(folder, seed, score, digest="a"):
    row = SCORES | {"score": score, "hard_only": score + 1}
    tasks = {"I-CLS": row, "I-QA": row | {"score": score + 20}}
    path = folder / f"{seed}-{digest}.json"
    path.write_text(json.dumps({"tasks": tasks, "settings": {"seed": seed}, "data_digest": digest}))
    return str(path)


def test_the_table_of_runs_has_a_column_for_each_and_the_means(tmp_path, capsys):
    assert table.main([score_file(tmp_path, 0, 40.0), score_file(tmp_path, 1, 50.0)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| task | metric | chance | floor | seed 0 | seed 1 | mean | hard only |"
    assert lines[2] == "| I-CLS | hit@1 | 10.0 | 25.0 | 40.0 | 50.0 | 45.0 | 46.0 |"
    assert lines[3] == "| I-QA | hit@1 | 10.0 | 25.0 | 60.0 | 70.0 | 65.0 | 46.0 |"
    bold = " | ".join(f"**{x}**" for x in ("10.0", "25.0", "50.0", "60.0", "55.0", "46.0"))
    assert lines[4:] == [f"| **mean** |  | {bold} |"]


def test_runs_on_other_data_and_no_scores_make_no_table(tmp_path, capsys):
    (tmp_path / "bad.json").write_text("{}")
    for other, why in ((score_file(tmp_path, 1, 50.0, "b"), "different data"), ("none", "none")):
        assert table.main([score_file(tmp_path, 0, 40.0), other]) == 2
        assert why in capsys.readouterr().err
    assert table.main([str(tmp_path / "bad.json")]) == 2


@pytest.mark.parametrize(
    "text, why",
    [
        ("[1]", " has no data_digest"),
        ("{}", " has no data_digest"),
        ("{", " is no JSON"),
        ("[" * 100_000, " is no JSON"),
        ({"data_digest": None}, ": data_digest is None"),
        ({"settings": [0]}, r": settings is \[0\]"),
        ({"settings": {}}, " has no seed"),
        ({"tasks": {}}, " has no tasks"),
        ({"tasks": {"I-CLS": {"metric": "hit@1"}}}, " has no chance"),
        ({"tasks": {"I-CLS": SCORES | {"score": "fifty"}}}, ": score is 'fifty'"),
        ({"tasks": {"I-CLS": SCORES | {"score": True}}}, ": score is True"),
    ],
)
def test_a_file_that_is_no_metrics_json_is_named_with_what_was_expected(
    tmp_path, capsys, text, why
):
    good = score_file(tmp_path, 0, 40.0)
    other = tmp_path / "other.json"
    if isinstance(text, dict):
        text = json.dumps(json.loads(Path(good).read_text()) | text)
    other.write_text(text)
    assert table.main([good, str(other)]) == 2
    said = capsys.readouterr().err
    expected = "expected the metrics.json of a run of the pocket benchmark"
    assert re.fullmatch(rf"table: {re.escape(str(other))}{why}.*, {expected}\n", said)


def test_runs_of_other_tasks_make_no_table(tmp_path, capsys):
    good = score_file(tmp_path, 0, 40.0)
    run = json.loads(Path(good).read_text())
    del run["tasks"]["I-QA"]
    (tmp_path / "fewer.json").write_text(json.dumps(run))
    assert table.main([good, str(tmp_path / "fewer.json")]) == 2
    assert capsys.readouterr().err == "table: the runs were scored on different tasks\n"
