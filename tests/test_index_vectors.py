"""An index of fewer components or tokens, and of several vectors an item, searched by late
interaction.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers import held, nested_checkpoint

from btok import BTokEncoder
from btok.tools import cli, search
from btok.tools import encode as encode_module
from btok.tools import index as index_module
from btok.tools.index import Index, open_index
from btok.tools.rows import Row

MADE = {"model": "a digest", "settings": {}}  # of an index that no encoder made
TEXTS = [f"text {i} {'ab' * i}" for i in range(40)]
IDS = [f"id {i}" for i in range(40)]
QUERIES = ["text 3", "abab", "text 17"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return nested_checkpoint(tmp_path_factory.mktemp("nested"))


@pytest.fixture(scope="module")
def encoder(checkpoint):
    return BTokEncoder.from_pretrained(checkpoint)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def synthetic(count, several=4, dims=16, seed=0):
    """Rows [1 + several, dims], whose mean is the first."""
    rng = np.random.default_rng(seed)
    vectors = unit(rng.standard_normal((count, several, dims))).astype(np.float32)
    whole = np.concatenate([unit(vectors.mean(1, keepdims=True)), vectors], 1)
    return [Row({"id": f"{i}", "page": i % 5}, row, 7) for i, row in enumerate(whole)]


def late(query, rows):
    """[n], by plain Python."""
    return np.array([np.mean([max(float(a @ b) for b in row) for a in query]) for row in rows])


def stored(rows, storage):
    """The several vectors, [N, K, D], as the storage rounds them."""
    vectors = np.stack([row.vector[1:] for row in rows])
    if storage != "int8":
        return vectors.astype(np.float16).astype(np.float32)
    scale = np.abs(vectors).max(-1, keepdims=True) / 127
    return np.rint(vectors / scale).astype(np.float32) * scale


@pytest.mark.parametrize("storage", ["float32", "float16", "int8"])
def test_the_nearest_by_late_interaction(tmp_path, monkeypatch, storage):
    rows = synthetic(300)
    rows.append(Row({"id": "broken", "page": 1}, None, None, "it is empty"))
    index = Index.create(tmp_path / "index", MADE, 16, storage, [rows[:100], rows[100:]], several=4)
    index = Index.open(tmp_path / "index")
    assert (index.several, index.dims, len(index)) == (4, 16, 300)
    assert index.columns[-1] == "ctime_ns"
    size = {"float32": 4 * 16 + 2 * 64, "float16": 2 * 80, "int8": 80 + 4 * 5}[storage]
    assert index.bytes_of_item == size
    vectors, queries = (
        stored(rows[:300], storage),
        np.stack([r.vector for r in synthetic(9, seed=1)]),
    )
    dense = np.concatenate([part for part, _ in index.vectors()])
    for exact in (True, None):
        found = index.search(queries, 5, exact=exact)
        some = index.search(queries, 5, "page < 3", exact=exact)
        for query, hits, among in zip(queries, found, some, strict=True):
            truth = late(query[1:], vectors)
            candidates = np.argsort(-(dense @ query[0]), kind="stable")[: 300 if exact else 50]
            order = sorted(candidates, key=lambda i: -truth[i])[:5]
            assert [hit.item["id"] for hit in hits] == [str(i) for i in order]
            assert np.allclose([hit.score for hit in hits], truth[order], atol=1e-6)
            small = [i for i in np.argsort(-(dense @ query[0])) if i % 5 < 3]
            order = sorted(small if exact else small[:50], key=lambda i: -truth[i])[:5]
            assert [hit.item["id"] for hit in among] == [str(i) for i in order]
    for name, value in (("TOGETHER", 2), ("READ_AT_ONCE", 7 * 4 * 64)):
        monkeypatch.setattr(search, name, value)
    monkeypatch.setattr(index_module, "READ", 20)
    assert index.search(queries, 5) == index.search(queries, 5)
    for one, other in zip(found, index.search(queries, 5), strict=True):
        assert [hit.item for hit in one] == [hit.item for hit in other]
        assert np.allclose([h.score for h in one], [h.score for h in other], atol=1e-6)
    assert len(index.search(queries[:1], 10**9)[0]) == 300
    assert index.search(queries, 5, "page = 99") == [[]] * 9
    only = index.search(queries[:, 0], 5)
    assert index.search(queries, 5, rescore=False) == only
    assert only[0][0].score == pytest.approx(float((dense @ queries[0, 0]).max()), abs=1e-6)


def test_an_approximate_index_proposes(tmp_path):
    rows = synthetic(600)
    index = Index.create(tmp_path / "index", MADE, 16, rows=[rows], several=4)
    index.build()
    assert index.indexed
    queries, vectors = np.stack([row.vector for row in rows[:40]]), stored(rows, "float16")
    for i, hits in enumerate(index.search(queries, 3)):
        assert hits[0].item["id"] == str(i) and hits[0].score == pytest.approx(1, abs=1e-3)
        truth = late(queries[i][1:], vectors)
        assert all(hit.score == pytest.approx(truth[int(hit.item["id"])], abs=1e-5) for hit in hits)


def test_equal_scores_are_in_the_order_they_were_written(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "READ", 12)
    row = np.full((3, 4), 0.5, np.float32)
    index = Index.create(tmp_path / "index", MADE, 4, several=2)
    index.add([Row({"id": f"{i:02}"}, row) for i in range(30)])
    for k in (1, 2, 40):
        for exact in (True, None):
            (hits,) = index.search(row[None], k, exact=exact)
            assert [hit.item["id"] for hit in hits] == [f"{i:02}" for i in range(30)][:k]


def test_rows_take_each_others_place(tmp_path):
    rows = synthetic(20)
    index = Index.create(tmp_path / "index", MADE, 16, "int8", [rows], several=4)
    index.add([Row({"id": "3", "vectors of": "a name"}, rows[4].vector)])
    (hits,) = index.search(rows[4].vector[None], 2, exact=True)
    assert {hit.item["id"] for hit in hits} == {"3", "4"}
    assert hits[0].score == hits[1].score == pytest.approx(1, abs=1e-2)
    index.update([{"id": "3", "note": "new"}])
    assert index.search(rows[4].vector[None], 1, "note = 'new'")[0][0].item["note"] == "new"


@pytest.mark.parametrize("multi", [False, True])
def test_what_is_given_is_checked(tmp_path, multi):
    rows = synthetic(20)
    rows = rows if multi else [row._replace(vector=row.vector[0]) for row in rows]
    index = Index.create(tmp_path / "index", MADE, 16, rows=[rows], several=4 * multi)
    shape = r"\[Q, 16\] or \[Q, 1 \+ K, 16\]" if multi else r"\[Q, 16\]"
    for wrong in (np.ones((2, 8)), np.ones(16), np.ones((2, 1, 16)), np.ones((1, 1, 1, 16))):
        with pytest.raises(ValueError, match=rf"queries is float64 .*, expected float32 {shape}$"):
            index.search(wrong)
    dense = np.ones((2, 16), np.float32)
    why = r"queries is float32 \[2, 16\], expected \[Q, 1 \+ K, 16\]" if multi else "one vector an"
    with pytest.raises(ValueError, match=f"rescore is True, .*{why}"):
        index.search(dense, rescore=True)
    bad = [Row({"id": "new"}, np.ones((2, 16), np.float32))]
    with pytest.raises(ValueError, match=rf"'new' is \[2, 16\], expected \[{'5, ' * multi}16\]"):
        index.add(bad)
    for name in ("vector", "scale", *(("vectors", "scales") if multi else ())):
        with pytest.raises(ValueError, match=f"an item has '{name}', which is the index's own"):
            index.add([Row({"id": "new", name: "x"}, rows[0].vector)])
    if not multi:  # what was a name of an item's own stays one
        index.add([Row({"id": "new", "vectors": "x", "scales": "y"}, rows[0].vector)])
        (row,) = (r for b in index.rows(where="id = 'new'") for r in b.to_pylist())
        assert (row["vectors"], row["scales"]) == ("x", "y")


def test_a_damaged_vector_of_several_is_told(tmp_path):
    rows = synthetic(20)
    rows[7].vector[3] = 0
    index = Index.create(tmp_path / "index", MADE, 16, rows=[rows], several=4)
    with pytest.raises(ValueError, match="the vector of 7, page 2 is damaged, its length is not 1"):
        index.search(rows[0].vector[None], exact=True)


# -- made by an encoder


@pytest.mark.parametrize(
    "options", [{"dims": 16}, {"num_btoks": 2}, {"num_btoks": 1, "dims": 32, "storage": "float16"}]
)
def test_an_index_of_fewer_components_or_tokens(encoder, checkpoint, tmp_path, options):
    folder = tmp_path / "index"
    done = encoder.encode_to(folder, TEXTS, IDS, show_progress=False, **options)
    assert done.vectors == 40
    own = {name: value for name, value in options.items() if name != "storage"}
    expected = encoder.encode(TEXTS, show_progress=False, **own)
    found = held(folder)
    for name, vector in zip(IDS, expected, strict=True):
        assert np.abs(found[name][1] - vector).max() < (1e-3 if "storage" in options else 1e-6)
    index = Index.open(folder)
    assert index.meta["settings"] == {"instruction": "", **encoder.using(**own).settings}
    scores = encoder.encode(QUERIES, show_progress=False, **own) @ expected.T
    for given in (None, encoder, encoder.using(dims=64)):
        for hits, row in zip(Index.open(folder, given).search(QUERIES, 4), scores, strict=True):
            assert [hit.item["id"] for hit in hits] == [IDS[i] for i in np.argsort(-row)[:4]]
    # what is added later is like what is there
    done = encoder.encode_to(folder, [*TEXTS, "one more"], [*IDS, "more"], show_progress=False)
    assert done.added == 1
    more = encoder.encode(["one more"], show_progress=False, **own)
    assert np.abs(held(folder)["more"][1] - more[0]).max() < 1e-3
    with pytest.raises(ValueError, match=r"holds vectors of (dims|num_btoks) .*, this is "):
        encoder.encode_to(folder, TEXTS, IDS, dims=64, num_btoks=4)
    with pytest.raises(ValueError, match=r"(multi_vector|dims) .*, this is"):
        encoder.encode_to(folder, TEXTS, IDS, multi_vector=True)


@pytest.mark.parametrize("storage", ["float32", "int8"])
def test_an_index_of_several_vectors(encoder, tmp_path, storage):
    folder, options = tmp_path / "index", {"num_btoks": 2, "dims": 32, "multi_vector": True}
    inputs, items = [*TEXTS, ""], [*IDS, "empty"]
    done = encoder.encode_to(folder, inputs, items, storage=storage, **options)
    assert done.vectors == 40 and list(done.unreadable) == ["empty"]
    rows = encoder.encode(TEXTS, **options)
    asked = encoder.encode(QUERIES, **options)
    truth = np.stack([late(query, rows) for query in asked])
    index, close = Index.open(folder), 1e-3 if storage == "float32" else 2e-2
    assert index.several == 2 and index.meta["settings"]["multi_vector"] is True
    for hits, scores in zip(index.search(QUERIES, 5), truth, strict=True):
        by_id = dict(zip(IDS, scores, strict=True))
        assert np.allclose([hit.score for hit in hits], np.sort(scores)[::-1][:5], atol=close)
        for hit in hits:
            assert hit.score == pytest.approx(by_id[hit.item["id"]], abs=close)
    both = encoder.encode(QUERIES, **options | {"multi_vector": "both"})
    assert index.search(both, 5) == index.search(QUERIES, 5)
    dense = encoder.encode(QUERIES, num_btoks=2, dims=32)
    assert index.search(QUERIES, 5, rescore=False) == index.search(dense, 5)
    done = encoder.encode_to(folder, [*TEXTS, "one more"], [*IDS, "more"])
    assert done.added == 1 and len(Index.open(folder).search(["one more"], 1)) == 1
    assert index.search(["one more"], 1)[0][0].item["id"] != "more"  # the state it opened
    index.refresh()
    assert index.search(["one more"], 1)[0][0].item["id"] == "more"


def test_what_waits_to_be_written_is_bounded(encoder, tmp_path, monkeypatch):
    monkeypatch.setattr(encode_module, "PART", 4)
    monkeypatch.setattr(encode_module, "MOST", 8 * 4 * 5 * 64)
    encoder.encode_to(tmp_path / "index", TEXTS, IDS, multi_vector=True)
    rows = Index.open(tmp_path / "index").rows(["part"])
    assert len({name for batch in rows for name in batch["part"].to_pylist()}) == 5


def test_what_an_output_does_not_keep_is_refused(encoder, tmp_path, monkeypatch):
    for name in ("a.npz", "a.parquet"):
        with pytest.raises(ValueError, match=f"multi_vector is True, expected False for .*{name}"):
            encoder.encode_to(tmp_path / name, TEXTS, IDS, multi_vector=True)
    with pytest.raises(ValueError, match="num_btoks is 3, expected what it was trained for"):
        encoder.encode_to(tmp_path / "index", TEXTS, IDS, num_btoks=3)
    encoder = BTokEncoder(encoder.model, encoder.processor, encoder.checkpoint)
    encoder.calibrate(TEXTS, show_progress=False)
    with pytest.raises(ValueError, match=r"dtype is 'int8', expected 'float32' .* storage='int8'"):
        encoder.encode_to(tmp_path / "index", TEXTS, IDS, dtype="int8")
    with pytest.raises(ValueError, match="num_btoks is 'auto' with multi_vector"):
        encoder.encode_to(tmp_path / "index", TEXTS, IDS, num_btoks="auto", multi_vector=True)
    assert not list(tmp_path.iterdir())
    encoder.encode_to(tmp_path / "a.npz", TEXTS, IDS, dims=16)
    with np.load(tmp_path / "a.npz") as made:
        assert made["vectors"].shape == (40, 16)
        assert json.loads(made["meta"].tobytes())["settings"]["dims"] == 16


def test_budgets_by_the_calibration(encoder, tmp_path):
    encoder = BTokEncoder(encoder.model, encoder.processor, encoder.checkpoint)
    encoder.calibrate(TEXTS * 3, show_progress=False)
    encoder.encode_to(tmp_path / "index", TEXTS, IDS, num_btoks="auto", bound=0.5)
    expected = encoder.encode(TEXTS, num_btoks="auto", bound=0.5, show_progress=False)
    found = held(tmp_path / "index")
    assert max(np.abs(found[i][1] - row).max() for i, row in zip(IDS, expected, strict=True)) < 1e-6
    assert encoder.encode_to(tmp_path / "index", TEXTS, IDS).added == 0
    index = open_index(encoder.using(num_btoks="auto", bound=0.5), tmp_path / "index")
    assert index.search([TEXTS[5]], 1)[0][0].score == pytest.approx(1, abs=1e-6)
    encoder.calibrate(TEXTS * 4, show_progress=False)
    with pytest.raises(ValueError, match=r"holds vectors of calibration '[0-9a-f]+', this is"):
        encoder.encode_to(tmp_path / "index", TEXTS, IDS)


def test_the_command(checkpoint, tmp_path, capsys):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, text in enumerate(TEXTS[:12]):
        (folder / f"{i}.txt").write_text(text)
    options = ["--num-btoks", "2", "--dims", "32", "--multi-vector"]
    assert cli.main(["encode", str(checkpoint), str(folder), *options]) == 0
    assert cli.main(["index", str(folder / ".btok")]) == 0
    said = capsys.readouterr().out
    assert "12 vectors of float32 [32] and 2 times as many for late interaction" in said
    assert f"{4 * 32 + 2 * 2 * 32} bytes of vectors an item" in said
    encoder = BTokEncoder.from_pretrained(checkpoint)
    made = {"num_btoks": 2, "dims": 32}
    sides = [TEXTS[i] for i in range(12)]
    query = encoder.encode(["text 3 ababab"], multi_vector=True, **made)[0]
    truth = late(query, encoder.encode(sides, multi_vector=True, **made))
    assert cli.main(["search", str(checkpoint), str(folder), "text 3 ababab", "--top", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, i in zip(lines, np.argsort(-truth)[:3], strict=True):
        _, score, name = line.split()
        assert name == f"{i}.txt" and float(score) == pytest.approx(truth[i], abs=2e-3)
    line = ["search", str(checkpoint), str(folder), "text 3", "--no-rescore", "--top", "1"]
    assert cli.main(line) == 0
    dense = encoder.encode(["text 3"], **made) @ encoder.encode(sides, **made).T
    score = float(capsys.readouterr().out.split()[1])
    assert score == pytest.approx(dense.max(), abs=2e-3)
    assert cli.main(["encode", str(checkpoint), str(folder), "--dims", "16"]) == 2
    assert "holds vectors of dims 32, this is 16" in capsys.readouterr().err
    bare = [*line[:4], "--output", str(tmp_path / "bare")]
    assert cli.main(bare) == 0
    capsys.readouterr()
    assert cli.main([*bare, "--no-rescore"]) == 2
    why = f"rescore is False, but {tmp_path / 'bare'} has one vector an item and rescores nothing"
    assert why in capsys.readouterr().err
