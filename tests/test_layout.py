"""CondensedLayout: bounds from lengths, what it refuses, and the segments it cuts."""

from __future__ import annotations

import random
import re

import pytest
import torch

from btok.kernels import CondensedLayout
from btok_kernels.layout import TILE


def random_layout(rng: random.Random) -> CondensedLayout:
    """Up to six sequences, empty sources and targets among them, K from 0 to 5, maybe a tail, and
    maybe a budget each."""
    count = rng.randrange(1, 7)
    source = [rng.choice([0, 1, rng.randrange(2, 40)]) for _ in range(count)]
    target = [rng.choice([0, 1, rng.randrange(2, 25)]) for _ in range(count)]
    btoks = rng.randrange(0, 6)
    condense = rng.random() < 0.7
    budgets = [rng.randrange(btoks + 1) for _ in source] if rng.random() < 0.4 else None
    layout = CondensedLayout.from_lengths(source, target, btoks, condense, budgets=budgets)
    tail = rng.choice([0, 0, 3])
    return CondensedLayout(layout.bounds, layout.num_rows + tail)


def allowed_by_loops(layout: CondensedLayout) -> torch.Tensor:
    """The mask's truth, [T, T], from the four or five integers by plain loops."""
    allowed = torch.zeros(layout.num_rows, layout.num_rows, dtype=torch.bool)
    for start, first, border, end, *last in layout.bounds.tolist():
        for i in range(start, end):
            for j in range(layout.num_rows):
                lowest = start if i < border else first
                allowed[i, j] = lowest <= j <= i
                if last and i >= border and last[0] <= j < border:
                    allowed[i, j] = False
    return allowed


def test_bounds_of_known_sequences():
    layout = CondensedLayout.from_lengths([3, 0, 2], [2, 1, 0], 4)
    assert layout.bounds.tolist() == [[0, 3, 7, 9], [9, 9, 13, 14], [14, 16, 20, 20]]
    assert layout.num_rows == 20 and len(layout) == 3
    full = CondensedLayout.from_lengths([3], [2], 4, condense=False)
    assert full.bounds.tolist() == [[0, 0, 7, 9]]
    some = CondensedLayout.from_lengths([3, 0], [2, 1], 4, budgets=[1, 4])
    assert some.bounds.tolist() == [[0, 3, 7, 9, 4], [9, 9, 13, 14, 13]]
    none = CondensedLayout.from_lengths([3, 0], [2, 2], 0)
    assert none.bounds.tolist() == [[0, 2, 3, 5], [5, 5, 5, 7]]


def test_every_pair_is_in_exactly_the_segments_the_mask_allows():
    rng = random.Random(0)
    for _ in range(60):
        layout = random_layout(rng)
        covered = torch.zeros(layout.num_rows, layout.num_rows, dtype=torch.int64)
        rows, shapes, owner, in_place = layout.segments
        assert not in_place or rows.tolist() == owner.tolist() == list(range(layout.num_rows))
        at = 0
        for count, length in shapes:
            for segment in rows[at : at + count * length].unflatten(0, (count, length)).tolist():
                for place, row in enumerate(segment):
                    if owner[row] == at + place:
                        covered[row, segment[: place + 1]] += 1
                at += length
        assert at == len(rows)
        assert torch.equal(covered, allowed_by_loops(layout).long()), layout.bounds.tolist()


def test_tiles_cover_the_mask_once_and_the_longest_come_first():
    rng = random.Random(2)
    layouts = [random_layout(rng) for _ in range(40)]
    layouts.append(CondensedLayout.from_lengths([300, 5], [140, 0], 4, num_rows=600))
    layouts.append(CondensedLayout.from_lengths([130], [9], 0, max_sequences=7))
    layouts.append(CondensedLayout.from_lengths([200, 3], [300, 140], 140, budgets=[130, 2]))
    for layout in layouts:
        allowed = allowed_by_loops(layout).long()
        row_tiles, key_tiles = layout.tiles.tolist()
        covered, owned = torch.zeros_like(allowed), torch.zeros(layout.num_rows)
        for row, last_row, key, last_key, *besides in row_tiles:
            assert last_row - row <= TILE
            owned[row:last_row] += 1
            covered[row:last_row, key:last_key] += 1
            covered[row:last_row, slice(*besides or [0, 0])] += 1
        causal = torch.ones_like(allowed).tril()
        assert (owned == 1).all()
        assert torch.equal(covered * causal, allowed), layout.bounds.tolist()
        covered, owned = torch.zeros_like(allowed), torch.zeros(layout.num_rows)
        for key, last_key, row, last_row, *_ in key_tiles:
            assert last_key - key <= TILE
            owned[key:last_key] += 1
            covered[row:last_row, key:last_key] += 1
        assert (owned == 1).all()
        assert torch.equal(covered * causal, allowed), layout.bounds.tolist()
        for tiles in (row_tiles, key_tiles):
            work = [last - first for _, _, first, last, *_ in tiles]
            assert work == sorted(work, reverse=True)


def test_layouts_of_one_capacity_have_tiles_of_one_shape():
    rng = random.Random(3)
    shapes = set()
    for _ in range(40):
        layout = random_layout(rng)
        roomy = CondensedLayout(layout.bounds, 1000, max_sequences=6)
        shapes.add((layout.bounds.shape[1], *roomy.tiles.shape))
    assert sorted((columns, width) for columns, _, _, width in shapes) == [(4, 4), (5, 6)]
    with pytest.raises(ValueError, match="max_sequences is 1, bounds has 2"):
        CondensedLayout.from_lengths([3, 4], [1, 1], 2, max_sequences=1)


def test_row_first_agrees_with_the_loops():
    rng = random.Random(1)
    for _ in range(60):
        layout = random_layout(rng)
        allowed = allowed_by_loops(layout)
        for row, first in enumerate(layout.row_first.tolist()):
            expected = int(allowed[row].nonzero()[0]) if allowed[row].any() else layout.num_rows
            assert first == expected, (row, layout.bounds.tolist())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, -2], [0, 0], 1), "source_lens has -2"),
        (([1], [-1], 1), "target_lens has -1"),
        (([1, 2], [0], 1), r"target_lens has shape \[1\], source_lens \[2\]"),
        (([1], [0], -1), "num_btoks is -1"),
        (([3], [2], 1, True, 5), "num_rows is 5, the sequences take 6"),
        (([3], [2], 4, True, None, None, [5]), "budgets has 5, expected from 0 to num_btoks, 4"),
        (([3], [2], 4, True, None, None, [-1]), "budgets has -1"),
        (([3], [2], 4, True, None, None, [1, 2]), r"budgets has shape \[2\], expected one number"),
    ],
)
def test_bad_lengths_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CondensedLayout.from_lengths(*arguments)


@pytest.mark.parametrize(
    "given",
    [
        {"source_lens": [2.5, 1]},
        {"target_lens": torch.tensor([1.5, 1])},
        {"num_btoks": 1.5},
        {"budgets": [0.5, 1]},
        {"source_lens": [float("nan"), 1]},
        {"source_lens": [1j, 1]},
        {"target_lens": None},
    ],
)
def test_what_is_no_number_of_rows_is_refused(given):
    """A float is one where it is whole, as the sum of a mask."""
    ((name, value),) = given.items()
    arguments = {"source_lens": [2, 1], "target_lens": [1, 1], "num_btoks": 1}
    with pytest.raises(TypeError, match=re.escape(f"{name} is {value!r}, expected integers")):
        CondensedLayout.from_lengths(**arguments | given)
    whole = {"source_lens": torch.tensor([2.0, 1.0]), "target_lens": [1.0, 1.0], "num_btoks": 1.0}
    expected = CondensedLayout.from_lengths(**arguments)
    assert torch.equal(CondensedLayout.from_lengths(**whole).bounds, expected.bounds)


@pytest.mark.parametrize(
    ("bounds", "rows", "message"),
    [
        ([[0, 2, 1, 3]], 3, "sequence 0 are .*start <= first <= border <= end"),
        ([[0, 0, 2, 3], [2, 2, 3, 4]], 4, r"sequence 1 takes rows \[2, 4\)"),
        ([[0, 0, 2, 3]], 2, r"sequence 0 takes rows \[0, 3\)"),
        ([[-1, 0, 2, 3]], 3, r"sequence 0 takes rows \[-1, 3\)"),
        ([[0, 1, 2, 3, 0]], 3, "sequence 0 are .*, first <= last <= border"),
        ([[0, 1, 2, 3, 3]], 3, "sequence 0 are .*, first <= last <= border"),
    ],
)
def test_bad_bounds_are_refused(bounds, rows, message):
    with pytest.raises(ValueError, match=message):
        CondensedLayout(torch.tensor(bounds, dtype=torch.int32), rows)


def test_bounds_of_another_type_are_refused():
    with pytest.raises(TypeError, match="expected int32"):
        CondensedLayout(torch.zeros(1, 4), 1)
    with pytest.raises(TypeError, match=r"\[1, 3\]"):
        CondensedLayout(torch.zeros(1, 3, dtype=torch.int32), 1)
