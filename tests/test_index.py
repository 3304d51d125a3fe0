"""The index: what it holds, what survives a kill, what it refuses, ranks, search."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from datetime import timedelta

import numpy as np
import pytest
from helpers import counted, gloo, held, noting, same, spawn, tiny_checkpoint

from btok import BTokEncoder
from btok.adapters import Lora
from btok.model import BTokModel, model_digest
from btok.tools.rows import Row, item_name

pytest.importorskip("lance", reason="pylance (the extra `lance`) is not installed")
from btok.tools import index as index_module
from btok.tools.index import Index, open_index

TEXTS = [f"text {i} " + "x" * (7 * i % 31) for i in range(22)]
IDS = [f"id {i}" for i in range(22)]
NOISE = random.Random(0).randbytes(5000)
COUNTED: list[str] = []  # texts that were prepared
MADE = {"model": "a digest", "settings": {}}  # of an index that no encoder made


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return noting(checkpoint, COUNTED)


@pytest.fixture
def encoder(loaded, monkeypatch):
    monkeypatch.setattr("btok.tools.encode.PART", 4)
    monkeypatch.setattr("btok.tools.encode.SECONDS", 0)
    COUNTED.clear()
    return loaded


def synthetic(count, dims=64, seed=0):
    """Rows of unit vectors in bundles, as embeddings lie."""
    rng = np.random.default_rng(seed)
    vectors = np.repeat(rng.standard_normal((-(-count // 20), dims)), 20, 0)[:count]
    vectors = (vectors + 0.6 * rng.standard_normal(vectors.shape)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    items = [{"id": f"{i}", "uri": f"{i}.pdf", "page": i % 9} for i in range(count)]
    return [Row(item, vector, 7) for item, vector in zip(items, vectors, strict=True)]


def test_what_an_index_holds(encoder, checkpoint, tmp_path):
    items = [
        {"id": name, "page": i, "kind": "odd" if i % 2 else None} for i, name in enumerate(IDS)
    ]
    done = encoder.encode_to(tmp_path / "index", iter(TEXTS), iter(items), show_progress=False)
    assert done == (22, 22, [], {}, None)
    index = Index.open(tmp_path / "index")
    found, vectors = held(tmp_path / "index"), encoder.encode(TEXTS)
    for i, name in enumerate(IDS):
        item, row = found[name]
        assert item == {"page": i} | ({"kind": "odd"} if i % 2 else {})
        assert np.abs(row - vectors[i]).max() < 1e-6
    assert index.meta["model"] == model_digest(checkpoint)
    assert index.meta["checkpoint"] == str(checkpoint)
    assert index.meta["settings"]["num_btoks"] == 4 and index.meta["settings"]["instruction"] == ""
    assert (index.dims, index.storage, len(index)) == (64, "float32", 22)
    columns = ["id", "tokens", "part", "error"]
    rows = [row for batch in index.rows(columns) for row in batch.to_pylist()]
    lengths = {name: len(text) + 4 for name, text in zip(IDS, TEXTS, strict=True)}
    assert {row["id"]: row["tokens"] for row in rows} == lengths
    assert all(row["error"] is None for row in rows) and len({row["part"] for row in rows}) == 6


def test_only_what_is_new_is_encoded(encoder, tmp_path):
    encoder.encode_to(tmp_path / "index", TEXTS[:9], IDS[:9])
    COUNTED.clear()
    texts = [TEXTS[8], "changed", TEXTS[0], "new", *TEXTS[3:6]]
    items = [{"id": "id 8", "note": 1}, "id 1b", "id 0", "new", *IDS[3:6]]
    done = encoder.encode_to(tmp_path / "index", texts, items)
    assert sorted(COUNTED) == ["changed", "new"]
    assert (done.vectors, done.added) == (7, 2)
    assert sorted(row["id"] for row in done.removed) == ["id 1", "id 2", "id 6", "id 7"]
    found = held(tmp_path / "index")
    assert found["id 8"][0] == {"note": 1} and found["id 1b"][0] == {}
    for name, row in zip(items[1:], encoder.encode(texts)[1:], strict=True):
        assert np.abs(found[name][1] - row).max() < 1e-6


def test_where_nothing_is_new_nothing_is_written(encoder, tmp_path):
    """Not even for what cannot be read, which is tried again."""
    inputs = ["", *TEXTS[1:5]]
    encoder.encode_to(tmp_path / "index", inputs, IDS[:5])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("*")}
    COUNTED.clear()
    done = encoder.encode_to(tmp_path / "index", inputs, IDS[:5])
    assert (done.vectors, done.added) == (4, 0) and not COUNTED
    assert done.unreadable == {"id 0": "it is empty, expected a text, an image or a frame"}
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("*")} == before


def test_unreadable_inputs_are_reported_and_tried_again(encoder, tmp_path):
    inputs, late = list(TEXTS[:9]), tmp_path / "late.txt"
    for i in range(4, 9):  # all of the second part, one of the third
        inputs[i] = late
    done = encoder.encode_to(tmp_path / "index", inputs, IDS[:9])
    assert list(held(tmp_path / "index")) == IDS[:4] and done.vectors == 4
    assert sorted(done.unreadable) == IDS[4:9]
    assert all("late.txt" in reason for reason in done.unreadable.values())
    assert Index.open(tmp_path / "index").unreadable() == done.unreadable
    late.write_bytes(b"")
    done = encoder.encode_to(tmp_path / "index", inputs, IDS[:9])
    assert sorted(done.unreadable) == IDS[4:9] and "empty" in done.unreadable["id 4"]
    late.write_text("here now")
    done = encoder.encode_to(tmp_path / "index", inputs, IDS[:9])
    assert (done.vectors, done.added, done.unreadable) == (9, 5, {})
    found = held(tmp_path / "index")
    assert np.abs(np.stack([found[i][1] for i in IDS[:9]]) - encoder.encode(inputs)).max() < 1e-6


def test_items_that_say_something_else_leave_the_vectors(encoder, tmp_path):
    encoder.encode_to(tmp_path / "index", TEXTS[:3], IDS[:3])
    before = held(tmp_path / "index")
    COUNTED.clear()
    items = [{"id": name, "uri": f"{name}.txt", "label": "new"} for name in IDS[:3]]
    done = encoder.encode_to(tmp_path / "index", TEXTS[:3], items)
    assert not COUNTED and (done.vectors, done.added, done.removed) == (3, 0, [])
    for name, (item, row) in held(tmp_path / "index").items():
        assert item == {"uri": f"{name}.txt", "label": "new"}
        assert np.array_equal(row, before[name][1])


def test_an_error_in_the_middle_and_on_again(encoder, tmp_path):
    def breaking():
        yield from TEXTS[:10]
        raise KeyError("gone")

    with pytest.raises(KeyError):
        encoder.encode_to(tmp_path / "index", breaking(), IDS)
    assert sorted(held(tmp_path / "index")) == sorted(IDS[:8])
    COUNTED.clear()
    encoder.encode_to(tmp_path / "index", TEXTS, IDS)
    assert sorted(COUNTED) == sorted(TEXTS[8:])
    encoder.encode_to(tmp_path / "whole", TEXTS, IDS)
    assert same(held(tmp_path / "index"), held(tmp_path / "whole"))


def on_two_ranks(rank, folder, checkpoint):
    import btok.tools.encode

    btok.tools.encode.PART, btok.tools.encode.SECONDS = 4, 0
    with gloo(folder, rank, 2):
        encoder = BTokEncoder.from_pretrained(checkpoint)
        made = counted(encoder)
        for ending in ("", ".npz", ".parquet"):
            made.clear()
            done = encoder.encode_to(f"{folder}/of_two{ending}", TEXTS, IDS)
            assert len(made) == (12, 10)[rank], made  # parts of 4: 0 2 4 and 1 3 5
            assert done == (22, 22, [], {}, None)
        with pytest.raises(ValueError, match="none of 1 inputs can be read, the first: it is emp"):
            encoder.encode_to(f"{folder}/of_none", [""], ["a"])  # on both, neither waits
        with pytest.raises(ValueError, match="full is no index and not empty"):
            encoder.encode_to(f"{folder}/full", TEXTS, IDS)  # which one looks at: neither waits
        noted = [{"id": name, "note": name} for name in IDS]  # a column that both would make
        assert encoder.encode_to(f"{folder}/noted", TEXTS, noted).vectors == 22
        again = encoder.encode_to(f"{folder}/of_two", [*TEXTS[2:], "more"], [*IDS[2:], "more"])
        assert (again.vectors, again.added, len(again.removed)) == (21, 1, 2)


def test_two_ranks_make_the_rows_of_one(encoder, checkpoint, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/me.jpg").write_bytes(b"")
    spawn(on_two_ranks, (str(tmp_path), checkpoint), nprocs=2)
    noted = held(tmp_path / "noted")
    assert noted.keys() == {*IDS} and all(item["note"] == name for name, (item, _) in noted.items())
    encoder.encode_to(tmp_path / "of_one", [*TEXTS[2:], "more"], [*IDS[2:], "more"])
    assert same(held(tmp_path / "of_two"), held(tmp_path / "of_one"))


def test_an_index_of_something_else_is_refused(encoder, tmp_path):
    index = tmp_path / "index"
    encoder.encode_to(index, TEXTS[:2], IDS[:2])
    before = held(index)
    other = BTokEncoder.from_pretrained(tiny_checkpoint(tmp_path / "other", seed=1))
    for wrong, instruction, message in (
        (other, None, "holds vectors of model .*; delete it or give another output"),
        (encoder, "Find: ", "holds vectors of instruction '', this is 'Find: '"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong.encode_to(index, TEXTS[:2], IDS[:2], instruction)
    with pytest.raises(ValueError, match=r"storage is 'int8', but .*index has vectors of float32"):
        encoder.encode_to(index, TEXTS[:2], IDS[:2], storage="int8")
    with pytest.raises(ValueError, match="encoder is of the model"):
        Index.open(index, other)
    assert same(held(index), before)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/me.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="photos is no index and not empty"):
        encoder.encode_to(tmp_path / "photos", TEXTS[:2], IDS[:2])
    with pytest.raises(ValueError, match=r"use BTokEncoder\.from_pretrained"):
        BTokEncoder(encoder.model, encoder.processor).encode_to(tmp_path / "new", ["a"], ["a"])


def test_bad_inputs_are_refused_and_the_index_stays(encoder, tmp_path, monkeypatch):
    index = tmp_path / "index"
    encoder.encode_to(index, TEXTS[:2], IDS[:2])
    before = held(index)
    with pytest.raises(ValueError, match="index: the id 'b' came twice, expected all different"):
        encoder.encode_to(index, ["x", "y", "z"], ["b", "a", "b"])
    assert same(held(index), before)
    with pytest.raises(ValueError, match="none of 2 inputs can be read, the first: it is empty"):
        encoder.encode_to(index, ["", tmp_path / "no.txt"], ["c", "d"])
    with pytest.raises(ValueError, match="none of 0 inputs"):
        encoder.encode_to(index, [], [])
    with pytest.raises(ValueError, match="items is shorter"):
        encoder.encode_to(index, ["x", "y"], ["b"])
    with pytest.raises(ValueError, match="inputs is shorter"):
        encoder.encode_to(index, ["x"], ["b", "c"])
    with pytest.raises(TypeError, match=r"an item is \{'page': 1\}, expected a text or a mapping"):
        encoder.encode_to(index, ["x"], [{"page": 1}])
    for item, message in (
        ({"id": "e", "page": "one"}, "an item's page is 'one', expected int32"),
        ({"id": "e", "vector": 3}, "an item has 'vector', which is the index's own"),
        ({"id": "e", "page": 9.99}, "an item's page is 9.99, expected int32"),
    ):
        with pytest.raises(ValueError, match=message):
            encoder.encode_to(index, ["x"], [item])
    for value in (object(), {"a": 1}, (1, 2), {1}, float("nan"), np.float32(1), [np.zeros(2)]):
        with pytest.raises(TypeError, match=r"item .e. has mine = .*, expected a text, a number"):
            encoder.encode_to(index, ["x"], [{"id": "e", "mine": value}])
    with pytest.raises(TypeError, match="item 'e' has 5, expected names of text"):
        encoder.encode_to(index, ["x"], [{"id": "e", 5: 1}])
    monkeypatch.setattr("btok.tools.encode.WINDOW", 2)  # twice, in windows of their own
    with pytest.raises(ValueError, match="index: the id 'id 0' came twice"):
        encoder.encode_to(index, TEXTS[:5], [*IDS[:4], "id 0"])
    encoder.encode_to(index, TEXTS[:2], IDS[:2])
    assert same(held(index), before)


def test_processes_without_a_group_are_refused(encoder, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="init_process_group"):
        encoder.encode_to(tmp_path / "index", TEXTS[:2], IDS[:2])
    assert not (tmp_path / "index").exists()


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
    monkeypatch.setattr(index_module, "READ", 5)
    encoder.encode_to(tmp_path / "index", [*TEXTS, ""], [*IDS, "unreadable"])
    index = Index.open(tmp_path / "index", encoder)
    found, queries = held(tmp_path / "index"), ["text 3", TEXTS[9]]
    names, vectors = list(found), np.stack([row for _, row in found.values()])
    scores = encoder.encode(queries) @ vectors.T
    for hits, row in zip(index.search(queries, 7), scores, strict=True):
        order = np.argsort(-row, kind="stable")[:7]
        assert [hit.item["id"] for hit in hits] == [names[i] for i in order]
        assert np.allclose([hit.score for hit in hits], row[order], atol=1e-6)
    assert index.search(queries, 1)[1][0].item == {"id": "id 9"}
    assert len(index.search(encoder.encode(queries), 99)[0]) == 22
    (asked,) = index.search(["3"], 1, instruction="text ")
    assert asked[0].score == pytest.approx(index.search(["text 3"], 1)[0][0].score, abs=1e-6)


def test_equal_scores_are_in_the_order_they_were_written(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "READ", 5)
    row = np.full(4, 0.5, np.float32)
    index = Index.create(tmp_path / "index", MADE, 4)
    index.add([Row({"id": f"{i:02}"}, row) for i in range(12)])
    for k in (1, 4, 12, 20):
        (hits,) = index.search(row[None], k)
        assert [hit.item["id"] for hit in hits] == [f"{i:02}" for i in range(12)][:k]


def test_a_search_among_some(tmp_path):
    rows = synthetic(300)
    rows += [Row({"id": "broken", "uri": "a.pdf"}, None, None, "it is empty")]
    index = Index.create(tmp_path / "index", MADE, 64, rows=[rows[:100], rows[100:]])
    query = rows[7].vector[None]
    for exact in (True, None):
        (hits,) = index.search(query, 3, "page < 3 AND uri LIKE '%7.pdf'", exact)
        expected = [r for r in rows[:300] if r.item["page"] < 3 and r.item["uri"].endswith("7.pdf")]
        expected.sort(key=lambda row: -float(query[0] @ row.vector))
        assert [hit.item for hit in hits] == [row.item for row in expected[:3]]
        assert index.search(query, 3, "page = 99", exact) == [[]]
        if exact:
            index.build()
    wrongs = ("page <", "color = 3", "drop table", "page", "page = 'abc'", "1/0 = 1", "")
    for wrong in (*wrongs, "true) OR (true", "uri LIKE '%"):
        for exact in (True, None):
            with pytest.raises(ValueError) as told:
                index.search(query, 3, wrong, exact)
            assert str(told.value).startswith(f"where is {wrong!r}, which is no condition: ")
            assert "\n" not in str(told.value)
    (hits,) = index.search(query, 3, "(uri = '7.pdf') OR uri = 'a)b'")
    assert [hit.item["id"] for hit in hits] == ["7"]
    for queries in (np.ones((2, 3), np.float32), np.ones(64, np.float32)):
        with pytest.raises(ValueError, match=r"queries is float32 .*, expected float32 \[Q, 64\]"):
            index.search(queries)
    with pytest.raises(ValueError, match="k is 0"):
        index.search(query, 0)
    for k in (1.5, "3", True):
        with pytest.raises(TypeError, match=f"k is {k!r}, expected a whole number"):
            index.search(query, k)
    with pytest.raises(ValueError, match="queries has NaNs"):
        index.search(query * np.nan)
    assert index.search(query[:0]) == []
    for exact in (True, None):
        assert len(index.search(query, 10**12, None, exact)[0]) == 300
    with pytest.raises(ValueError, match=r"names no checkpoint; give Index\.open an encoder"):
        index.search(["a text"])


@pytest.mark.parametrize("kind", index_module.KINDS)
@pytest.mark.parametrize("large", [50, 1000])
def test_an_approximate_search_among_some_finds_them_all(tmp_path, monkeypatch, kind, large):
    """Those that match may all lie where a search without the condition would not look."""
    monkeypatch.setattr(index_module.search, "LARGE", large)
    rows = synthetic(4000)
    index = Index.create(tmp_path / "index", MADE, 64, rows=[rows])
    index.build(kind)
    queries = np.stack([row.vector for row in rows[::400]])
    for where, count in (("id = '17'", 1), ("uri LIKE '%77.pdf'", 40), ("page = 4", 444)):
        found = index.search(queries, 10, where)
        expected = index.search(queries, 10, where, exact=True)
        assert [len(hits) for hits in found] == [min(count, 10)] * 10
        alike = [
            len({hit.item["id"] for hit in one} & {hit.item["id"] for hit in other})
            for one, other in zip(found, expected, strict=True)
        ]
        assert sum(alike) >= 0.95 * 10 * min(count, 10)
    many = index.search(queries, 2000)
    assert [len(hits) for hits in many] == [2000] * 10


def test_recall_where_many_are_alike(tmp_path):
    """A neighbour that is as near as the right one is right."""
    rows = synthetic(300)
    rows = [row._replace(vector=rows[0].vector) for row in rows]
    assert Index.create(tmp_path / "index", MADE, 64, rows=[rows]).build() == 1.0


def test_rows_of_two_runs_at_once_are_there_once(encoder, tmp_path):
    encoder.encode_to(tmp_path / "index", TEXTS[:4], IDS[:4])
    index = Index.open(tmp_path / "index")
    items = [{"id": name} for name in IDS]
    for row, item in zip(encoder.encode(TEXTS), items, strict=True):
        if item["id"] != IDS[0]:
            index.write([Row(item, row, 3)])  # as another run does that began with an empty one
    done = encoder.encode_to(tmp_path / "index", [*TEXTS, "more"], [*IDS, "more"])
    assert done.vectors == 23
    encoder.encode_to(tmp_path / "whole", [*TEXTS, "more"], [*IDS, "more"])
    assert same(held(tmp_path / "index"), held(tmp_path / "whole"))


def test_two_runs_make_one_index(encoder, tmp_path, monkeypatch):
    made, create = [], Index.create.__func__

    def late(cls, *arguments, **more):
        create(Index, *arguments, **more)  # by another run, just now
        made.append(1)
        return create(cls, *arguments, **more)

    monkeypatch.setattr(Index, "create", classmethod(late))
    assert encoder.encode_to(tmp_path / "index", TEXTS, IDS).vectors == 22 and made == [1]


def test_what_is_written_at_once_is_tried_again(tmp_path, monkeypatch):
    rows = synthetic(20)
    index = Index.create(tmp_path / "index", MADE, 64, rows=[rows[:10]])
    other, tries = Index.open(tmp_path / "index"), []

    def first(fields):
        tries.append(1)
        if len(tries) == 1:
            other.write([Row({**rows[10].item, "mine": "a"}, rows[10].vector)])
            raise OSError("Retryable commit conflict for version 2: this Merge was preempted")

    monkeypatch.setattr(index.dataset, "add_columns", first, raising=False)
    index.write([Row({**rows[11].item, "mine": "b"}, rows[11].vector)])
    found = {row["id"]: row["mine"] for row in index.look_up("id", ["10", "11"])}
    assert found == {"10": "a", "11": "b"} and tries == [1]


@pytest.mark.parametrize("kind", index_module.KINDS)
def test_an_approximate_index_finds_what_an_exact_search_does(tmp_path, kind):
    rows = synthetic(3000)
    index = Index.create(tmp_path / "index", MADE, 64, rows=[rows])
    assert not index.indexed
    recall = index.build(kind)
    assert index.indexed and recall >= 0.95 and Index.open(index.uri).meta["kind"] == kind
    later = synthetic(100, seed=1)
    index.add([Row({"id": f"later {row.item['id']}"}, row.vector) for row in later])
    index.add([Row({"id": "broken"}, None, None, "it is empty")])
    queries = np.stack([row.vector for row in rows[::50] + later])
    exact, probed = index.search(queries, 10, exact=True), index.search(queries, 10)
    for i, (right, got) in enumerate(zip(exact, probed, strict=True)):
        assert got[0].item == right[0].item and got[0].score == pytest.approx(1, abs=1e-5), i
        scores = {hit.item["id"]: hit.score for hit in right}
        for hit in got:  # scores are exact either way
            assert hit.score == pytest.approx(scores.get(hit.item["id"], hit.score), abs=1e-6)
    hits = [
        len({h.item["id"] for h in a} & {h.item["id"] for h in b})
        for a, b in zip(exact, probed, strict=True)
    ]
    assert sum(hits) / len(queries) >= 9.5
    assert len(index.search(queries[:1], 10)[0]) == 10


def test_an_approximate_index_is_made_of_a_large_table_and_kept_up(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(index_module.search, "LARGE", 300)
    texts = [f"{i} {i * i}" for i in range(400)]
    done = encoder.encode_to(tmp_path / "index", texts[:250], texts[:250])
    assert done.recall is None and not Index.open(tmp_path / "index").indexed
    done = encoder.encode_to(tmp_path / "index", texts[:340], texts[:340])
    assert done.recall is not None and done.recall > 0.9
    encoder.encode_to(tmp_path / "index", texts, texts)
    index = Index.open(tmp_path / "index", encoder)
    assert index.dataset.stats.index_stats("vector_idx")["num_unindexed_rows"] == 0
    for hits, text in zip(index.search(texts[::40], 1), texts[::40], strict=True):
        assert hits[0].item["id"] == text


@pytest.mark.parametrize("storage, error", [("float16", 1e-3), ("int8", 1e-2)])
def test_smaller_storage(tmp_path, storage, error):
    """What it loses: scores move by less than this, recall at 10 by a few in a hundred."""
    rows = synthetic(1000)
    vectors = np.stack([row.vector for row in rows])
    index = Index.create(tmp_path / "index", MADE, 64, storage, [rows])
    stored = np.concatenate([batch for batch, _ in index.vectors()])
    assert np.abs(stored - vectors).max() < error
    scores, found = vectors[::10] @ vectors.T, index.search(vectors[::10], 10)
    kept = 0
    for row, hits in zip(scores, found, strict=True):
        for hit in hits:
            assert hit.score == pytest.approx(row[int(hit.item["id"])], abs=error)
        kept += len({int(hit.item["id"]) for hit in hits} & set(np.argsort(-row)[:10].tolist()))
    assert kept / 1000 > (0.99 if storage == "float16" else 0.97)
    if storage == "int8":
        with pytest.raises(ValueError, match="vectors of int8, of which no approximate index"):
            index.build()
    else:
        assert index.build() > 0.95


def test_rows_are_added_and_take_each_others_place(tmp_path):
    rows = synthetic(30)
    index = Index.create(tmp_path / "index", MADE, 64, rows=[rows[:20]])
    index.add([Row({"id": "19", "note": "it's new"}, rows[5].vector), *rows[20:]])
    found = held(index.uri)
    assert len(found) == 30 and found["19"][0] == {"note": "it's new"}
    assert np.array_equal(found["19"][1], rows[5].vector)
    with pytest.raises(ValueError, match="the id '3' came twice"):
        index.add([rows[3], rows[3]])
    with pytest.raises(ValueError, match=r"the vector of 'a' is \[3\], expected \[64\]"):
        index.add([Row({"id": "a"}, np.ones(3, np.float32))])
    index.delete(["1", "it's none"])
    assert len(index) == 29 and "1" not in held(index.uri)
    for kind, message in (("IVF", "kind is 'IVF', expected one of"), ("IVF_PQ", "29 vectors, an")):
        with pytest.raises(ValueError, match=message):
            index.build(kind)
    with pytest.raises(ValueError, match="storage is 'float8', expected one of float32, float16"):
        Index.create(tmp_path / "other", MADE, 64, "float8")


def test_many_small_files_are_joined(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "FRAGMENTS", 3)
    encoder.encode_to(tmp_path / "index", TEXTS, IDS)
    assert len(Index.open(tmp_path / "index").dataset.get_fragments()) == 1
    encoder.encode_to(tmp_path / "whole", TEXTS, IDS)
    assert same(held(tmp_path / "index"), held(tmp_path / "whole"))


def test_a_reader_keeps_the_state_it_opened(encoder, tmp_path):
    encoder.encode_to(tmp_path / "index", TEXTS[:9], IDS[:9])
    index = Index.open(tmp_path / "index", encoder)
    encoder.encode_to(tmp_path / "index", TEXTS[5:], IDS[5:])
    assert len(index) == 9 and index.search([TEXTS[0]], 1)[0][0].item == {"id": "id 0"}
    index.refresh()
    assert len(index) == 17 and index.search([TEXTS[20]], 1)[0][0].item == {"id": "id 20"}


def test_a_state_goes_an_hour_after_another_took_its_place(encoder, tmp_path, monkeypatch):
    """However long it stood before."""
    encoder.encode_to(tmp_path / "index", TEXTS[:9], IDS[:9])
    first = Index.open(tmp_path / "index", encoder)
    time.sleep(0.5)
    monkeypatch.setattr(index_module, "KEPT", timedelta(seconds=0.4))
    monkeypatch.setattr(index_module, "FRAGMENTS", 0)  # whole files are written anew
    encoder.encode_to(tmp_path / "index", TEXTS[5:12], IDS[5:12])
    assert first.search([TEXTS[0]], 1)[0][0].item == {"id": "id 0"}
    time.sleep(0.5)
    encoder.encode_to(tmp_path / "index", TEXTS[5:14], IDS[5:14])
    with pytest.raises(ValueError, match="open it again"):
        first.search([TEXTS[0]], 1)
    first.refresh()
    assert first.search([TEXTS[12]], 1)[0][0].item == {"id": "id 12"}


def test_an_encoder_is_loaded_for_texts(encoder, checkpoint, tmp_path):
    encoder.encode_to(tmp_path / "index", TEXTS, IDS)
    assert Index.open(tmp_path / "index").search([TEXTS[4]], 1)[0][0].item == {"id": "id 4"}
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    of_moved = BTokEncoder.from_pretrained(moved)
    of_moved.encode_to(tmp_path / "other", TEXTS[:2], IDS[:2])
    with open(moved / "btok_config.json", "ab") as config:
        config.write(b" ")
    with pytest.raises(ValueError, match=r"moved is now '.*'; give Index\.open the encoder"):
        Index.open(tmp_path / "other").search(["a"])


@pytest.mark.parametrize("bad", ["zeros", "NaN"])
def test_a_damaged_vector_is_told_by_its_length(tmp_path, bad):
    rows = synthetic(30)
    wrong = np.full(64, 0 if bad == "zeros" else np.nan, np.float32)
    rows[17] = Row(rows[17].item, wrong)
    index = Index.create(tmp_path / "index", MADE, 64, rows=[rows])
    text = r"index: the vector of 17.pdf, page 8 is damaged, its length is not 1; delete the index"
    with pytest.raises(ValueError, match=text):
        index.search(rows[0].vector[None])


def test_a_damaged_table_is_named(encoder, tmp_path):
    encoder.encode_to(tmp_path / "whole", TEXTS, IDS)

    def open_and_search(folder):
        Index.open(folder, encoder).search(["a"])

    for case, (pattern, change) in enumerate(
        [
            ("data/*", lambda path: path.unlink()),
            ("data/*", lambda path: os.truncate(path, 100)),
            ("data/*", lambda path: path.write_bytes(NOISE)),
            ("_versions/*.manifest", lambda path: os.truncate(path, 30)),
            ("_versions/*.manifest", lambda path: path.write_bytes(NOISE)),
            ("_versions", shutil.rmtree),
        ]
    ):
        folder = shutil.copytree(tmp_path / "whole", tmp_path / f"index-{case}")
        for path in list(folder.glob(pattern)):
            change(path)
        with pytest.raises(ValueError, match=rf"^{folder}: (?!.*\.rs:)"):
            open_and_search(folder)


def test_addresses_that_lead_nowhere(encoder, tmp_path):
    for uri in ("s3://a-bucket-of-nobody/index", "nothing://there/index"):
        with pytest.raises(ValueError, match=rf"^{uri}: "):
            encoder.encode_to(uri, TEXTS[:2], IDS[:2])
    with pytest.raises(ValueError, match=r"none: .* not found"):
        Index.open(tmp_path / "none")
    import lance
    import pyarrow as pa

    lance.write_dataset(pa.table({"a": [1]}), tmp_path / "table")
    for opening in (Index.open, lambda uri: open_index(encoder, uri)):
        with pytest.raises(ValueError, match="table: it is a table of something else"):
            opening(tmp_path / "table")
    later = {**MADE, "format_version": 4}
    Index.create(tmp_path / "later", MADE, 4).dataset.update_schema_metadata(
        {"btok": json.dumps(later)}
    )
    with pytest.raises(ValueError, match="later: format_version is 4, expected 3"):
        Index.open(tmp_path / "later")


def test_a_writer_that_was_killed_before_its_first_commit(encoder, tmp_path):
    for name in ("_transactions", "data"):
        (tmp_path / "index" / name).mkdir(parents=True)
    (tmp_path / "index/data/half.lance").write_bytes(NOISE)
    assert encoder.encode_to(tmp_path / "index", TEXTS[:2], IDS[:2]).vectors == 2


def test_names():
    assert item_name({"id": "a"}) == "a" and item_name({"id": "a", "uri": "b.txt"}) == "b.txt"
    assert item_name({"id": "a", "uri": "b.pdf", "page": 3}) == "b.pdf, page 3"
    assert item_name({"id": "a", "uri": "c.mp4", "start": 30.0, "end": 65}) == "c.mp4, 0:30-1:05"
    assert item_name({"id": "a", "uri": "c.mp4", "end": 3700.5}) == "c.mp4, 0:00-1:01:40"


# -- indexes of older formats


def older(folder, encoder, version, texts=TEXTS[:3], ids=IDS[:3]):
    """Write one, as it was; gives its vectors."""
    vectors = encoder.encode(texts)
    parts = folder if version == 1 else folder / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    np.save(parts / "vectors.npy", vectors)
    items = [{"id": name, "path": f"{name}.txt", "note": 1} for name in ids]
    (parts / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    settings = {"instruction": "", **encoder.settings}
    meta = {"format_version": version, "model": encoder.digest, "settings": settings}
    meta |= {"count": len(ids), "unreadable": {"c": "it is empty"}}
    if version == 2:
        meta |= {"vectors": "parts/vectors.npy", "items": "parts/items.jsonl"}
    (folder / "meta.json").write_text(json.dumps(meta))
    COUNTED.clear()
    return vectors


def test_what_few_items_of_an_older_format_say_stays(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr("btok.tools.old_index.BLOCK", 2)
    older(tmp_path / "index", encoder, 2)
    (path,) = (tmp_path / "index").rglob("*.jsonl")
    items = [json.loads(line) for line in path.read_text().splitlines()]
    items[2]["seldom"] = "said"
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    with pytest.raises(ValueError, match=r"is an index of an older format; `python -m btok encode"):
        Index.open(tmp_path / "index")
    index = open_index(encoder, tmp_path / "index")
    assert [row["seldom"] for row in index.look_up("id", [items[2]["id"]])] == ["said"]


@pytest.mark.parametrize("version", [1, 2])
def test_an_index_of_an_older_format_is_rewritten(encoder, tmp_path, version):
    vectors = older(tmp_path / "index", encoder, version)
    open_index(encoder, tmp_path / "index")
    found = held(tmp_path / "index")
    for row, name in zip(vectors, IDS[:3], strict=True):
        assert found[name][0] == {"uri": f"{name}.txt", "note": 1}
        assert np.array_equal(found[name][1], row)
    assert not COUNTED
    assert not {"meta.json", "parts", "vectors.npy"} & set(os.listdir(tmp_path / "index"))


def test_a_kill_while_an_older_format_is_rewritten(encoder, tmp_path, monkeypatch):
    """Between the commit and the going of the old files, and before both."""
    vectors = older(tmp_path / "index", encoder, 2)
    for name in ("remove", "OldIndex"):
        with monkeypatch.context() as patch, pytest.raises(TypeError):
            patch.setattr(index_module.old_index, name, None)
            open_index(encoder, tmp_path / "index")
        if name == "OldIndex":
            break
        assert (tmp_path / "index/meta.json").exists()
        shutil.copytree(tmp_path / "index", tmp_path / "committed")
        shutil.rmtree(tmp_path / "index")
        older(tmp_path / "index", encoder, 2)
    for folder in ("index", "committed"):
        open_index(encoder, tmp_path / folder)
        found = held(tmp_path / folder)
        assert np.array_equal(np.stack([found[name][1] for name in IDS[:3]]), vectors)
        assert not (tmp_path / folder / "meta.json").exists()


@pytest.mark.parametrize("moved", range(4))
def test_a_kill_of_the_first_format_is_put_right(encoder, tmp_path, moved):
    """It moved finished files from `.ready` over the old ones, one by one."""
    old, index = tmp_path / "old", tmp_path / "index"
    older(old, encoder, 1, TEXTS[:2], IDS[:2])
    vectors = older(index, encoder, 1, TEXTS[:6], IDS[:6])
    (index / ".ready").mkdir()
    for name in ("vectors.npy", "items.jsonl", "meta.json")[moved:]:
        (index / name).rename(index / ".ready" / name)
        shutil.copy(old / name, index / name)
    encoder.encode_to(index, TEXTS[:7], IDS[:7])
    assert [TEXTS[6]] == COUNTED
    found = held(index)
    assert np.array_equal(np.stack([found[name][1] for name in IDS[:6]]), vectors)


def test_a_damaged_index_of_an_older_format_is_refused(encoder, tmp_path):
    older(tmp_path / "whole", encoder, 2)
    meta = json.loads((tmp_path / "whole/meta.json").read_text())
    for case, (file, change, message) in enumerate(
        [
            (meta["vectors"], lambda path: path.unlink(), "No such file"),
            (meta["vectors"], lambda path: os.truncate(path, 0), "expected 8 bytes got 0"),
            (meta["vectors"], lambda path: path.write_bytes(NOISE), "magic string"),
            (meta["vectors"], lambda path: os.truncate(path, 300), "mmap length"),
            (meta["items"], lambda path: os.truncate(path, 20), "Expecting|Unterminated"),
            (meta["items"], lambda path: path.write_text("{}\n" * 3), "'id'"),
            (meta["items"], lambda path: path.write_bytes(NOISE), "decode"),
            ("meta.json", lambda path: path.write_bytes(NOISE), "decode"),
            ("meta.json", lambda path: path.write_text("{}"), "'format_version'"),
            ("meta.json", lambda path: path.write_text("[]"), "list indices"),
            (
                meta["vectors"],
                lambda path: np.save(path, np.zeros((3, 64))),
                r"float64 \[3, 64\], expected float32",
            ),
            (
                "meta.json",
                lambda path: path.write_text(json.dumps(meta | {"format_version": 3})),
                "format_version is 3, expected 1 or 2",
            ),
        ]
    ):
        folder = shutil.copytree(tmp_path / "whole", tmp_path / str(case))
        change(folder / file)
        text = (
            rf"{case} holds no index that can be read \({file}: .*({message}).*; delete it or give"
        )
        with pytest.raises(ValueError, match=text):
            open_index(encoder, folder)
