"""The order of the data: over ranks, workers and resumed runs; and what cannot be read."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import pocket_pairs, tiny_module, tiny_tokenizer
from PIL import Image

from btok.data.samples import pair_samples, positive_ids
from btok.data.sources import open_source
from btok.processing import Processor
from btok.vision import by_name, vision_of
from train.microbatches import Packing
from train.pocket.source import train_set
from train.recipes import Recipe
from train.sampler import (
    TRIES,
    TrainSet,
    _Reading,
    load_steps,
    shared_memory,
    step_groups,
)

COUNT, SIZE = 4, 4
RECIPE = Recipe(
    caption_steps=0, reading_steps=0, steps=12, group_size=SIZE, groups_per_batch=COUNT, seed=7
)


@pytest.fixture(scope="module")
def processor():
    return Processor(tiny_tokenizer(), patch_size=4, min_pixels=64, max_pixels=600)


@pytest.fixture
def sources(tmp_path):
    """60 pairs of texts and 39 with pictures."""
    rows = [{"query": f"query {i}", "positive": f"text {i}"} for i in range(60)]
    found = [("texts", rows, {"weight": 2, "ntp_side": "none"})]
    rows = [{"query": f"see {i}", "positive": {"images": [f"{i}.png"]}} for i in range(39)]
    found.append(("pictures", rows, {"weight": 3, "ntp_side": "query"}))
    for i in range(39):
        Image.new("RGB", (8, 16), (i, 0, 0)).save(tmp_path / f"{i}.png")
    opened = []
    for name, rows, settings in found:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        opened.append(open_source(path, **settings))
    return opened


def read(step):
    return [(p.dataset, p.query.text, p.positive_id) for p in step.pairs]


def equal(a, b):
    """Whether two samples, or one side of each, hold the same tensors."""
    if isinstance(a, tuple):
        return all(equal(x, y) for x, y in zip(a, b, strict=True))
    if a is None or b is None:
        return a is b
    assert all(v.pixels.dtype == torch.uint8 for side in (a, b) for v in vision_of(side))
    a, b = by_name(a), by_name(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def merged(parts):
    """The pairs of all ranks as one rank has them."""
    rows = [read(part) for part in parts]
    groups = [[pairs[i : i + SIZE] for i in range(0, len(pairs), SIZE)] for pairs in rows]
    return [pair for turn in zip(*groups, strict=True) for group in turn for pair in group]


def test_pairs_and_samples_do_not_depend_on_ranks_or_workers(sources, processor):
    alone = TrainSet(RECIPE, processor, sources)
    expected = [alone[step] for step in range(len(alone))]
    assert len({str(read(step)) for step in expected}) == len(alone) == 12
    assert {p.dataset for step in expected for p in step.pairs} == {"texts", "pictures"}
    for step in expected:
        names = [p.dataset for p in step.pairs]
        assert all(len(set(names[i : i + SIZE])) == 1 for i in range(0, len(names), SIZE))
    for world in (2, 4):
        ranks = [TrainSet(RECIPE, processor, sources, rank, world) for rank in range(world)]
        for number in range(len(alone)):
            parts = [steps[number] for steps in ranks]
            assert merged(parts) == read(expected[number])
            assert all(len(part.samples) == 2 * COUNT * SIZE // world for part in parts)
    for workers in (0, 1, 2):
        before = torch.get_rng_state()
        for first in (0, 5):
            got = [step for _, step in load_steps(alone, first, workers)]
            assert [read(step) for step in got] == [read(step) for step in expected[first:]]
            for a, b in zip(got, expected[first:], strict=True):
                assert len(a.samples) == len(b.samples) and not a.skipped
                assert all(equal(x, y) for x, y in zip(a.samples, b.samples, strict=True))
        assert torch.equal(torch.get_rng_state(), before)


def test_samples_are_those_of_all_pairs_at_once(sources, processor):
    (folder,) = {source.root for source in sources}
    path = folder / "hard.jsonl"
    rows = [{"query": f"q{i}", "positive": f"p{i}", "negatives": ["no", f"n{i}"]} for i in range(9)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    source = open_source(path)
    steps = TrainSet(dataclasses.replace(RECIPE, groups_per_batch=1), processor, [source])
    rows = step_groups([9], [1.0], RECIPE.seed, 0, 1, SIZE)[0].rows
    pairs = [source[int(row)] for row in rows]
    expected = pair_samples(pairs, processor)
    got = steps[0]
    assert len(got.samples) == len(expected) == 4 * SIZE
    assert all(equal(x, y) for x, y in zip(got.samples, expected, strict=True))
    assert torch.equal(positive_ids(got.pairs), positive_ids(pairs))
    for sample, positive in zip(got.samples[:SIZE], got.samples[SIZE : 2 * SIZE], strict=True):
        assert sample[1] is positive[0]  # so that its picture is looked at once


def test_the_schedule_decides_what_is_generated(sources, processor):
    recipe = dataclasses.replace(RECIPE, caption_steps=1, ntp_steps=2, ntp_side="positive")
    captions, steps = (TrainSet(r, processor, sources) for r in (recipe.captions, recipe))
    assert (len(captions), len(steps)) == (1, 12)
    four = captions[0], steps[0], steps[1], steps[2]
    for step, wanted in zip(four, ("own", "positive", "positive", "none"), strict=True):
        targets = [target is not None for _, target in step.samples]
        sides = [p.ntp_side if wanted == "own" else wanted for p in step.pairs]
        assert targets == [s == "positive" for s in sides] + [s == "query" for s in sides]


def test_the_pocket_groups_are_as_they_were(processor):
    steps = train_set(RECIPE, processor)
    pairs = pocket_pairs(RECIPE, 3)
    first = 3 * COUNT * SIZE
    assert steps[3].rows == list(range(first, first + COUNT * SIZE))
    for pair, row in zip(steps[3].pairs, steps[3].rows, strict=True):
        (source,) = (source for source in steps.sources if source.name == pair.dataset)
        assert (source[row].target, source[row].query.text) == (pair.target, pair.query.text)
    assert read(steps[3]) == [(p.dataset, p.query.text, p.positive_id) for p in pairs]
    expected = pair_samples(pairs, processor)
    assert all(equal(x, y) for x, y in zip(steps[3].samples, expected, strict=True))
    ((number, part),) = load_steps(train_set(RECIPE, processor, 1, 2), 11)
    assert number == 11
    assert read(part)[:SIZE] == read(steps[11])[SIZE : 2 * SIZE]

    def fail(side):
        raise KeyError("no spare rows")

    with pytest.raises(ValueError, match=r"too little of it can be read .*; row 0: KeyError: "):
        train_set(RECIPE, fail)[0]


def walk(lengths, weights, steps, seed=3, count=2, size=5):
    """(data set, row) of all groups, in order."""
    found = [step_groups(lengths, weights, seed, step, count, size) for step in range(steps)]
    return [(group.source, group.rows.tolist()) for groups in found for group in groups]


def test_an_epoch_has_no_repeats_and_the_next_another_order():
    lengths = [23, 40]
    groups = walk(lengths, [1.0, 2.0], 60)
    for source, length in enumerate(lengths):
        rows = [rows for which, rows in groups if which == source]
        per_epoch = length // 5
        whole = len(rows) // per_epoch
        flat = list(itertools.chain.from_iterable(rows))
        epochs = [flat[i * per_epoch * 5 :][: per_epoch * 5] for i in range(whole)]
        assert len(epochs) >= 3
        for epoch in epochs:
            assert len(set(epoch)) == len(epoch) == per_epoch * 5
            assert set(epoch) <= set(range(length))
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
        left_out = [frozenset(range(length)) - set(epoch) for epoch in epochs]
        assert length % 5 == 0 or len(set(left_out)) > 1


def test_data_sets_are_drawn_by_weight():
    weights = [1.0, 0.5, 3.0, 12.0]
    for seed in range(3):
        drawn = Counter(source for source, _ in walk([50] * 4, weights, 1000, seed=seed))
        expected = [2000 * weight / sum(weights) for weight in weights]
        chi = sum((drawn[i] - e) ** 2 / e for i, e in enumerate(expected))
        assert chi < 21.1, f"seed {seed}: {drawn}"  # once in 10,000 with 3 degrees of freedom
    assert walk([50] * 4, weights, 20, seed=0) != walk([50] * 4, weights, 20, seed=1)


def test_step_1000_alone_is_step_1000_of_a_walk():
    """Counted here pair by pair, as a stream would be."""
    lengths, weights, taken = [31, 12, 77], [2.0, 1.0, 5.0], Counter()
    orders = {}
    for step in range(1001):
        for group in step_groups(lengths, weights, 5, step, 2, 4):
            epoch, place = divmod(taken[group.source], lengths[group.source] // 4)
            order = orders.setdefault((group.source, epoch), group.order.tolist())
            assert group.order.tolist() == order
            assert sorted(order) == list(range(lengths[group.source]))
            assert group.rows.tolist() == order[place * 4 : place * 4 + 4]
            taken[group.source] += 1


def test_the_order_is_pinned():
    """The order of a run that goes on must not change with a version."""
    groups = step_groups([10, 7], [1.0, 1.0], 0, 3, 2, 3)
    assert [(group.source, group.rows.tolist()) for group in groups] == [
        (1, [6, 5, 1]),
        (0, [0, 5, 1]),
    ]


def spoil(sources, how):
    """Spoil pictures; returns their rows."""
    (folder,) = {source.root for source in sources}
    rows = [3, 11, 12, 30]
    for row in rows:
        path = folder / f"{row}.png"
        if how == "gone":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:50] if how == "cut" else b"no picture")
    return rows


@pytest.mark.parametrize("how", ["gone", "cut", "noise"])
def test_a_broken_picture_is_replaced_the_same_way_everywhere(sources, processor, how):
    whole = [read(step) for _, step in load_steps(TrainSet(RECIPE, processor, sources), 0)]
    spoilt = spoil(sources, how)
    alone = [step for _, step in load_steps(TrainSet(RECIPE, processor, sources), 0, 2)]
    sets = [TrainSet(RECIPE, processor, sources, rank, 2) for rank in (0, 1)]
    ranks = [[step for _, step in load_steps(half, 0)] for half in sets]
    named = Counter()
    for step, before, *parts in zip(alone, whole, *ranks, strict=True):
        assert merged(parts) == read(step)
        for part in (step, *parts):
            assert [p.positive_id for p in part.pairs] == [f"\0row {row}" for row in part.rows]
        assert sorted(step.skipped) == sorted(s for part in parts for s in part.skipped)
        ids = {("pictures", f"\0row {row}") for row in spoilt}
        for old, new in zip(before, read(step), strict=True):
            broken = (old[0], old[2]) in ids
            assert (new != old) == broken and (new[0], new[2]) not in ids
            assert not broken or (new[0] == old[0] and new not in before)
        named.update(skipped.row for skipped in step.skipped)
        for skipped in step.skipped:
            assert skipped.dataset == "pictures" and f"{skipped.row}.png" in skipped.reason
    assert set(named) == set(spoilt)


def test_a_bomb_a_wrong_line_and_a_processor_that_fails_are_skipped_too(
    sources, processor, monkeypatch
):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)  # more than twice as many is an error
    for workers in (0, 1):
        with pytest.raises(
            ValueError, match=r"^data set pictures: too little .* bomb DOS attack\.$"
        ):
            list(load_steps(TrainSet(RECIPE, processor, sources), 0, workers))
    monkeypatch.undo()

    texts = sources[0]
    lines = texts.rows.path.read_bytes().replace(b'"query 5"', b'"query,5"')
    texts.rows.path.write_bytes(lines.replace(b'"query": "query 7"', b'"queri"; "query 7"'))
    steps = TrainSet(RECIPE, processor, [texts])
    skipped = {s.row: s.reason for _, step in load_steps(steps, 0) for s in step.skipped}
    assert skipped.keys() == {7} and "expected a JSON object" in skipped[7]

    def fail(side):
        raise KeyError("what PIL's plug-ins raise")

    with pytest.raises(ValueError, match=r"too little of it can be read .*; row .*: KeyError: "):
        TrainSet(RECIPE, fail, [texts])[0]

    def missing(side):
        raise ImportError("an extra")

    with pytest.raises(ImportError, match="an extra"):
        TrainSet(RECIPE, missing, [texts])[0]


def small_set(tmp_path, count, broken):
    """Pairs with pictures, of which some cannot be read."""
    rows = [{"query": f"see {i}", "positive": {"images": [f"s{i}.png"]}} for i in range(count)]
    path = tmp_path / "small.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for i in range(count):
        if i in broken:
            (tmp_path / f"s{i}.png").write_bytes(b"no picture")
        else:
            Image.new("RGB", (8, 16), (i, 0, 0)).save(tmp_path / f"s{i}.png")
    return open_source(path)


def all_ranks(recipe, processor, source, step, world):
    """(place among all ranks' pairs, row) in order, and what was skipped."""
    found, skipped = [], []
    for rank in range(world):
        steps = TrainSet(recipe, processor, [source], rank, world)
        for piece in range(steps.pieces):
            part = steps[step, piece]
            mine = steps.mine[piece * steps.piece :][: len(part.rows)]
            found += zip(mine, part.rows, strict=True)
            skipped += part.skipped
    return sorted(found), sorted(skipped)


@pytest.mark.parametrize("count", [4, 1])
def test_where_a_step_covers_a_small_set_its_other_groups_stand_in(
    tmp_path, processor, monkeypatch, count
):
    broken, size = {3, 7}, 14 if count == 1 else 8
    source = small_set(tmp_path, 20, broken)
    recipe = dataclasses.replace(RECIPE, groups_per_batch=count, group_size=size)
    recipe = dataclasses.replace(recipe, negatives="batch", chunk_tokens=100)
    alone, fell_back = TrainSet(recipe, processor, [source]), 0
    for number in range(len(alone)):
        step, groups = alone[number], alone.groups(number)
        taken = {row for group in groups for row in group.rows.tolist()}
        for which, group in enumerate(groups):
            rows = step.rows[which * size :][:size]
            bad = [place for place, row in enumerate(group.rows) if row in broken]
            assert not broken & set(rows)
            kept = [row for place, row in enumerate(rows) if place not in bad]
            assert kept == [row for row in group.rows.tolist() if row not in broken]
            if set(range(20)) - taken <= broken:  # no spares: in the group each is once
                fell_back += len(bad)
                assert len(set(rows)) == size
        # in two groups of a step: the same positive, and no negative of itself
        same = np.array(step.rows)[:, None] == np.array(step.rows)
        ids = positive_ids(step.pairs)
        assert np.array_equal(same, (ids[:, None] == ids).numpy())
        assert broken & taken <= {skipped.row for skipped in step.skipped} <= broken
    assert (fell_back > 0) == (count > 1)
    expected = [alone[number] for number in range(len(alone))]
    again = [step for _, step in load_steps(alone, 5, 2)]
    assert [step.rows for step in again] == [step.rows for step in expected[5:]]
    for piece, world in ((64, 2), (64, 3), (5, 1), (5, 4)):  # three ranks cut groups in two
        monkeypatch.setattr("train.sampler.PIECE", piece)
        for number, step in enumerate(expected):
            rows, skipped = all_ranks(recipe, processor, source, number, world)
            assert [row for _, row in rows] == step.rows
            assert set(skipped) == set(step.skipped)


def test_a_group_is_filled_while_there_are_as_many_rows_that_can_be_read(tmp_path, processor):
    recipe = dataclasses.replace(RECIPE, groups_per_batch=4, group_size=8)
    source = small_set(tmp_path, 17, set(range(9)))
    steps = TrainSet(recipe, processor, [source])
    for number in range(3):
        rows = np.array(steps[number].rows).reshape(4, 8)
        assert (rows >= 9).all()
    source = small_set(tmp_path, 16, set(range(8)))
    steps = TrainSet(recipe, processor, [source])  # no spares at all
    for number in range(3):
        rows = np.array(steps[number].rows).reshape(4, 8)
        assert (np.sort(rows) == np.arange(8, 16)).all()
    source = small_set(tmp_path, 16, set(range(9)))
    with pytest.raises(
        ValueError,
        match=r"^data set small: too little of it can be read for a group of 8; mend its rows, or "
        r"give a lower --group-size; row \d: ValueError: image .* cannot be read",
    ):
        TrainSet(recipe, processor, [source])[0]
    TrainSet(dataclasses.replace(recipe, group_size=7), processor, [source])[0]


def test_a_set_of_which_nothing_can_be_read_is_not_read_to_its_end(tmp_path):
    source, tried = small_set(tmp_path, 200, ()), Counter()

    def fail(side):
        tried[str(side)] += 1
        raise KeyError("nothing")

    with pytest.raises(ValueError, match=r"too little of it can be read .* KeyError: 'nothing'"):
        TrainSet(RECIPE, fail, [source])[0]
    assert 1 + TRIES < len(tried) <= 1 + 2 * TRIES + COUNT * SIZE and set(tried.values()) == {1}


def test_every_place_of_a_step_has_spares_of_its_own():
    groups = step_groups([1000, 600], [2.0, 3.0], RECIPE.seed, 0, COUNT, SIZE)
    assert {group.source for group in groups} == {0, 1}
    reading = _Reading(TrainSet(RECIPE, None, (), groups=lambda step: groups), 0)
    tried = {0: [], 1: []}
    for number, group in enumerate(groups):
        for place in range(SIZE):
            own, *spares = reading.tries(number, place)
            assert own == group.rows[place] and len(spares) == TRIES
            assert set(spares) < set(range((1000, 600)[group.source]))
            tried[group.source] += [own, *spares]
    assert all(len(set(rows)) == len(rows) for rows in tried.values())
    small = step_groups([6], [1.0], 0, 0, 1, SIZE)
    reading = _Reading(TrainSet(RECIPE, None, (), groups=lambda step: small), 0)
    assert len({*reading.tries(0, 3)}) == 1 + 6 - SIZE


def test_what_cannot_be_grouped_is_refused(sources, processor):
    with pytest.raises(ValueError, match=r"data set pictures has 39 rows, expected .* group's 64"):
        TrainSet(dataclasses.replace(RECIPE, group_size=64), processor, sources[1:])
    (folder,) = {source.root for source in sources}
    row = {"query": "q", "positive": "p", "negatives": ["n"]}
    (folder / "hard.jsonl").write_text(f"{json.dumps(row)}\n" * 8)
    hard = open_source(folder / "hard.jsonl")
    with pytest.raises(ValueError, match=r"differ \(texts 0, hard 1\), expected one number"):
        TrainSet(RECIPE, processor, [sources[0], hard])
    TrainSet(RECIPE, processor, [sources[0], open_source(folder / "hard.jsonl", negatives=0)])


def test_a_row_drawn_twice_into_a_step_is_no_negative_of_itself(sources, processor):
    recipe = dataclasses.replace(RECIPE, groups_per_batch=16)  # more than an epoch of `texts`
    step = TrainSet(recipe, processor, sources[:1])[0]
    ids = positive_ids(step.pairs)
    texts = [p.query.text for p in step.pairs]
    same = np.array(texts)[:, None] == np.array(texts)
    assert same.sum() > len(texts)
    assert np.array_equal(same, (ids[:, None] == ids).numpy())


def test_a_shared_memory_that_is_too_small_is_refused(sources, monkeypatch):
    model, processor = tiny_module()
    recipe = dataclasses.replace(RECIPE, chunk_tokens=100)
    steps = TrainSet(recipe, processor, sources)
    pack = Packing.of(model, processor, recipe)
    size = shared_memory(steps, pack, 0, 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert shared_memory(steps, pack, 0, 2) == 8 * size
    assert shared_memory(steps, pack, 0, 0) == shared_memory(steps, pack, len(steps), 2) == 0
    pixels = sum(v.pixels.nbytes for m in pack(steps[0]).microbatches for v in m.batch.vision)
    assert size > (2 * 2 + steps.pieces) * pixels > 0
    usage = shutil.disk_usage("/")._replace(free=8 * size - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    has = f"{8 * size / 2**20:,.1f} MiB of shared memory, /dev/shm has {8 * size / 2**20:,.1f};"
    with pytest.raises(ValueError, match=f"workers is 2: .* about {has}"):
        shared_memory(steps, pack, 0, 2)


def test_a_step_in_pieces_is_the_step(sources, monkeypatch):
    """Whatever its workers; each of their pieces is packed on its own."""
    model, processor = tiny_module()
    monkeypatch.setattr("train.sampler.PIECE", 3)
    recipe = dataclasses.replace(RECIPE, chunk_tokens=100)
    steps = TrainSet(recipe, processor, sources)
    assert steps.pieces == -(-COUNT * SIZE // 3) > 1
    pack = Packing.of(model, processor, recipe)
    for workers in (0, 2):
        number, found = next(load_steps(steps, 2, workers, pack))
        whole = steps[2]
        assert number == 2 and found.rows == whole.rows and found.pairs == whole.pairs
        places = [place for m in found.microbatches for place in m.places]
        assert sorted(places) == whole.places == list(range(len(whole.samples)))
        assert len(found.microbatches) > steps.pieces
        for m in found.microbatches:
            assert len(m.batch) == len(m.places) and len(m.batch.input_ids) <= 100
            for place, (start, _, border, _) in zip(m.places, m.batch.layout.bounds, strict=True):
                own = torch.as_tensor(whole.samples[place][0]["input_ids"])
                assert torch.equal(m.batch.input_ids[start : border - 4], own)
