"""Which texts came, and where they stand: what a set and a scan of all rows say."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
from test_index import MADE, synthetic

from btok.tools import lookup
from btok.tools.index import Index
from btok.tools.lookup import Came, Places


def test_what_came_is_what_a_set_says():
    rng, came, before = random.Random(0), Came(), set()
    for _ in range(60):
        texts = [str(rng.randrange(4000)) for _ in range(rng.randrange(200))]
        expected = []
        for text in texts:
            expected.append(text in before)
            before.add(text)
        assert came.add(texts).tolist() == expected
    lengths = [len(run) for run in came.runs]
    assert sum(lengths) == len(before)
    assert all(one > 2 * other for one, other in pairwise(lengths))


@pytest.mark.parametrize("alike", [False, True])
def test_places_are_those_of_a_scan(monkeypatch, alike):
    if alike:  # all texts have one of three hashes
        monkeypatch.setattr(lookup, "hash", lambda text: len(text or "") % 3, raising=False)
    column = ["b", None, "a", "ccc", "b", "dddd"]
    numbers = np.arange(10, 16, dtype=np.uint64)
    places = Places([(column[:4], numbers[:4]), (column[4:], numbers[4:])])
    assert places.numbers.tolist() == numbers.tolist()
    for texts in (["b"], ["a", "zz", "b"], ["zz"], []):
        found = places.find(texts).tolist()
        right = [row for row, text in enumerate(column) if text in texts]
        assert set(right) <= set(found) and found == sorted(found)
        assert alike or found == right
    assert Places([]).find(["a"]).tolist() == []


@pytest.mark.parametrize("alike", [False, True])
def test_rows_are_looked_up_in_a_table_that_was_changed(tmp_path, monkeypatch, alike):
    if alike:
        monkeypatch.setattr(lookup, "hash", lambda text: len(text or "") % 3, raising=False)
    rows = synthetic(300)
    index = Index.create(tmp_path / "index", MADE, 64, rows=[rows[:100], rows[100:200]])
    index.add(rows[200:])
    index.delete([str(i) for i in range(0, 300, 7)])
    index.update([{"id": str(i), "uri": "moved"} for i in range(50, 60) if i % 7])
    index.refresh()
    wanted = [str(i) for i in random.Random(0).sample(range(400), 150)]
    seen = np.zeros(index.dataset.count_rows(), bool)
    found = index.look_up("id", wanted, seen)
    ids = [name for batch in index.rows(["id"]) for name in batch["id"].to_pylist()]
    assert [row["id"] for row in found] == [name for name in ids if name in wanted]
    assert [name for name, was in zip(ids, seen, strict=True) if was] == [
        row["id"] for row in found
    ]
    moved = {str(i) for i in range(50, 60) if i % 7}
    assert {row["id"] for row in index.look_up("uri", ["moved"])} == moved
    index.add(rows[:1])  # of a row that was deleted, in a newer state
    assert [row["id"] for row in index.look_up("id", ["0"])] == ["0"]
    assert index.has(["0", "none"]) and not index.has(["none"])
