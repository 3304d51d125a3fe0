"""Metrics against enumeration, and the runner against plain Python."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from helpers import gloo, spawn

from btok.data.records import RetrievalTask, Side
from btok.evaluation import metrics, runner
from btok.evaluation.mmeb_v2 import _as_published
from btok.evaluation.runner import evaluate, format_table
from btok.files import write_json

METRICS = ("hit@1", "hit@3", "ndcg@1", "ndcg@5", "mrr")
RELEVANCES = (
    [1],
    [0, 1],
    [0, 0, 1, 0],
    [1, 1, 0, 0, 0],
    [2, 0, 1, 0, 3, 0],
    [1, 0.5, 2],
    [0] * 6 + [1],
)


def by_definition(metric, relevance):
    """The metric of a ranked list in plain Python."""
    name, _, k = metric.partition("@")
    if name == "mrr":
        return 1 / next(rank for rank, rel in enumerate(relevance, 1) if rel > 0)
    if name == "hit":
        return float(any(rel > 0 for rel in relevance[: int(k)]))

    def gain(rels):
        return sum(rel / math.log2(rank + 1) for rank, rel in enumerate(rels[: int(k)], 1))

    return gain(list(relevance)) / gain(sorted(relevance, reverse=True))


def mean_over_orders(metric, relevance, tail=()):
    """The metric's mean over all orders of `relevance`, each followed by `tail`."""
    orders = list(itertools.permutations(relevance))
    return sum(by_definition(metric, [*order, *tail]) for order in orders) / len(orders)


@pytest.mark.parametrize("metric", METRICS)
def test_score_follows_the_definition(metric):
    for relevance in RELEVANCES:
        for order in itertools.islice(itertools.permutations(relevance), 0, None, 7):
            assert metrics.score(metric, order) == pytest.approx(by_definition(metric, order))


def test_scores_by_hand():
    assert metrics.hit_at_k([0, 1], 1) == 0 and metrics.hit_at_k([0, 1], 2) == 1
    assert metrics.mrr([0, 0, 1, 1]) == pytest.approx(1 / 3)
    # linear gain: the grade 3 counts three times the grade 1, not 2**3 - 1 times
    assert metrics.ndcg_at_k([0, 3, 1], 5) == pytest.approx(
        (3 / math.log2(3) + 1 / 2) / (3 + 1 / math.log2(3))
    )
    # the ideal order is cut at k too
    assert metrics.ndcg_at_k([1, 1, 1], 1) == 1 and metrics.ndcg_at_k([1, 1, 1], 2) == 1
    assert metrics.ndcg_at_k([0] * 5 + [1], 5) == 0


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("relevance", RELEVANCES)
def test_expected_is_the_mean_over_all_orders(metric, relevance):
    assert metrics.expected(metric, relevance) == pytest.approx(mean_over_orders(metric, relevance))


def test_expected_of_a_large_pool():
    relevance = np.zeros(4478)
    relevance[17] = 1
    assert metrics.expected("hit@1", relevance) == pytest.approx(1 / 4478)
    assert metrics.expected("mrr", relevance) == pytest.approx(
        sum(1 / rank for rank in range(1, 4479)) / 4478
    )


def test_rank_keeps_the_pool_order_of_ties():
    assert metrics.rank([1.0, 3.0, 3.0, 2.0, 3.0, 1.0]).tolist() == [1, 2, 4, 3, 0, 5]
    assert metrics.rank(np.zeros(1000, np.float32)).tolist() == list(range(1000))
    assert metrics.rank([-np.inf, 0, np.inf]).tolist() == [2, 1, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.rank([0.0, np.nan]), "NaN at position 1"),
        (lambda: metrics.rank([[0.0]]), r"shape \(1, 1\)"),
        (lambda: metrics.score("recall@1", [1]), "recall@1"),
        (lambda: metrics.score("hit@0", [1]), "hit@0"),
        (lambda: metrics.score("mrr@5", [1]), "mrr@5"),
        (lambda: metrics.hit_at_k([1], 0), "k: 0"),
        (lambda: metrics.score("mrr", [0, 0]), "none of 2 candidates"),
        (lambda: metrics.expected("ndcg@5", []), "none of 0 candidates"),
        (lambda: metrics.score("ndcg@5", [1, -1]), ">= 0"),
        (lambda: metrics.expected("hit@1", [1, np.nan]), "finite"),
        (lambda: metrics.mean_interval([]), "non-empty"),
        (lambda: metrics.mean_interval([0.5, 1.1]), r"\[0, 1\]"),
    ],
)
def test_metric_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_interval_of_hits_is_wilsons():
    # textbook values of the score interval
    assert metrics.mean_interval([0.0] * 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert metrics.mean_interval([1.0] * 10) == pytest.approx((0.72247, 1.0), abs=1e-5)
    assert metrics.mean_interval([0.0, 1.0] * 50) == pytest.approx((0.40383, 0.59617), abs=1e-5)
    low, high = metrics.mean_interval([1.0])
    assert 0 < low < 0.25 and high == 1


def test_interval_of_graded_scores():
    rng = np.random.default_rng(0)
    scores = rng.uniform(0.4, 0.8, 4000)
    half = 1.96 * scores.std() / math.sqrt(4000)
    expected = (scores.mean() - half, scores.mean() + half)
    assert metrics.mean_interval(scores) == pytest.approx(expected, abs=half / 50)
    low, high = metrics.mean_interval([0.6] * 20)
    assert 0.5 < low < 0.6 < high < 0.7


@pytest.mark.parametrize("n", [20, 200])
@pytest.mark.parametrize("kind", ["rare hits", "hits", "ndcg"])
def test_interval_covers(kind, n):
    rng = np.random.default_rng(n)
    values, odds = {
        "rare hits": ([0, 1], [0.95, 0.05]),
        "hits": ([0, 1], [0.5, 0.5]),
        "ndcg": ([0, 0.387, 0.431, 0.5, 0.631, 1], [0.3, 0.1, 0.1, 0.1, 0.1, 0.3]),
    }[kind]
    truth = float(np.dot(values, odds))
    draws = rng.choice(values, size=(2000, n), p=odds)
    intervals = [metrics.mean_interval(scores) for scores in draws]
    covered = np.mean([low <= truth <= high for low, high in intervals])
    assert 0.91 <= covered <= 0.99, covered


class Table:
    """An encoder which looks rows up by text and remembers what it was asked."""

    def __init__(self, rows):
        self.rows, self.calls = rows, []

    def __call__(self, sides):
        self.calls.append([side.text for side in sides])
        return np.array([self.rows[side.text] for side in sides])


def random_task(
    seed, metric="hit@1", *, name="task", pools=True, hard=True, queries=12, candidates=9
):
    """A task and its encoder; whole-number rows, so that sums are exact and ties frequent."""
    rng = np.random.default_rng(seed)
    texts = [f"q{i}" for i in range(queries)] + [f"c{i}" for i in range(candidates)]
    encode = Table({text: rng.integers(-1, 2, 3).astype(np.float32) for text in texts})
    lists = [rng.permutation(candidates)[: rng.integers(4, 7)].tolist() for _ in range(queries)]
    if not pools:
        lists = [list(range(candidates))] * queries
    qrels, hards = [], []
    for pool in lists:
        right = rng.choice(pool, rng.integers(1, 3), replace=False).tolist()
        qrels.append({c: float(rng.integers(1, 4)) for c in right})
        hards.append([*right, *(c for c in pool if c not in right)][: len(right) + 2])
    task = RetrievalTask(
        name=name,
        meta_task="I-RET",
        modality="image",
        metric=metric,
        queries=[Side(text) for text in texts[:queries]],
        candidates=[Side(text) for text in texts[queries:]],
        qrels=qrels,
        pools=lists if pools else None,
        hard=hards if hard else None,
    )
    return task, encode


def ranked_by_hand(task, encode, i):
    pool = range(len(task.candidates)) if task.pools is None else task.pools[i]
    query = encode.rows[task.queries[i].text]
    scores = {c: sum(query * encode.rows[task.candidates[c].text]) for c in pool}
    return sorted(pool, key=lambda c: -scores[c])  # Python's sort is stable


@pytest.mark.parametrize("pools", [True, False])
@pytest.mark.parametrize("metric", ["hit@1", "ndcg@5", "mrr"])
def test_evaluate_by_hand(metric, pools):
    task, encode = random_task(9, metric, pools=pools, candidates=9 if pools else 6)
    found = {}
    row = evaluate(encode, [task], retrieved=found)["tasks"]["task"]
    score, hard_only, chance, floor = [], [], [], []
    for i, qrels in enumerate(task.qrels):
        order = ranked_by_hand(task, encode, i)
        relevance = [qrels.get(c, 0.0) for c in order]
        hard = [qrels.get(c, 0.0) for c in order if c in task.hard[i]]
        others = [qrels.get(c, 0.0) for c in order if c not in task.hard[i]]
        assert len(hard) >= 3 and not any(others)
        score.append(by_definition(metric, relevance))
        hard_only.append(by_definition(metric, hard))
        chance.append(mean_over_orders(metric, relevance))
        floor.append(mean_over_orders(metric, hard, others))
        rank = 1 + min(order.index(c) for c in qrels)
        assert found["task"][i] == (order[:5], [c in qrels for c in order[:5]], rank)
    by_hand = {"score": score, "hard_only": hard_only, "chance": chance, "floor": floor}
    for key, values in by_hand.items():
        assert row[key] == pytest.approx(100 * np.mean(values)), key
    assert len({round(row[key], 3) for key in by_hand}) == 4
    assert row["ci95"] == pytest.approx([100 * x for x in metrics.mean_interval(score)])
    assert row["ci95"][0] < row["score"] < row["ci95"][1]
    assert (row["queries"], row["candidates"]) == (12, len(task.candidates))


def test_global_pool_and_lists_agree(monkeypatch):
    task, encode = random_task(5, "ndcg@5", pools=False, queries=40)
    everything = [list(range(len(task.candidates)))] * len(task.queries)
    lists, whole = {}, {}
    expected = evaluate(encode, [dataclasses.replace(task, pools=everything)], retrieved=lists)
    assert evaluate(encode, [task], retrieved=whole) == expected
    assert whole == lists
    monkeypatch.setattr(runner, "_BLOCK", 20)  # two queries at a time
    assert evaluate(encode, [task]) == expected


def test_without_hard_candidates_everything_is_hard():
    task, encode = random_task(1, hard=False)
    row = evaluate(encode, [task])["tasks"]["task"]
    assert row["hard_only"] == row["score"] and row["floor"] == row["chance"]
    assert 0 < row["chance"] < 100


def test_equal_similarities_keep_the_order_of_the_pool():
    task, encode = random_task(2, hard=False)
    collapsed = Table(dict.fromkeys(encode.rows, np.ones(3)))
    pairs = zip(task.pools, task.qrels, strict=True)
    first = [[*qrels, *(c for c in pool if c not in qrels)] for pool, qrels in pairs]
    last = [pool[::-1] for pool in first]
    for pools, score in ((first, 100.0), (last, 0.0)):
        result = evaluate(collapsed, [dataclasses.replace(task, pools=pools)])
        assert result["overall"] == score


def test_similarities_are_float32():
    task, _ = random_task(0, queries=1, hard=False, pools=False, candidates=2)
    task = dataclasses.replace(task, qrels=[{0: 1.0}])
    rows = {"q0": [1.0], "c0": [1.0], "c1": [1.0 + 1e-12]}  # equal in float32
    assert evaluate(Table(rows), [task])["overall"] == 100


def test_result_is_the_metrics_file(tmp_path, capsys):
    named = [random_task(seed, name=f"task {seed}") for seed in range(3)]
    about = (("I-RET", "image"), ("V-RET", "video"), ("V-RET", "video"))
    tasks = [
        dataclasses.replace(task, meta_task=meta_task, modality=modality)
        for (task, _), (meta_task, modality) in zip(named, about, strict=True)
    ]
    encode = named[0][1]
    result = evaluate(
        encode, iter(tasks), settings={"pooling": "btok"}, data_digest="ab", progress=True
    )
    assert [line.split(":")[0] for line in capsys.readouterr().err.splitlines()] == list(
        result["tasks"]
    )
    keys = ["tasks", "meta_tasks", "modalities", "overall", "settings", "data_digest"]
    assert list(result) == keys
    row = result["tasks"]["task 1"]
    keys = ["meta_task", "modality", "metric", "score", "chance", "floor", "hard_only", "ci95"]
    assert list(row) == [*keys, "queries", "candidates"]
    a, b, c = (row["score"] for row in result["tasks"].values())
    assert len({a, b, c}) == 3
    assert result["overall"] == pytest.approx((a + b + c) / 3)
    assert result["meta_tasks"] == pytest.approx({"I-RET": a, "V-RET": (b + c) / 2})
    assert result["modalities"] == pytest.approx({"image": a, "video": (b + c) / 2})
    assert (result["settings"], result["data_digest"]) == ({"pooling": "btok"}, "ab")

    path = tmp_path / "metrics.json"
    write_json(path, result)
    assert json.loads(path.read_text()) == result
    for bad, error in (({"x": float("nan")}, ValueError), ({"x": object()}, TypeError)):
        with pytest.raises(error):
            write_json(path, bad)
    assert json.loads(path.read_text()) == result
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.json"]


def test_encodes_once_after_all_checks():
    task, encode = random_task(0)
    evaluate(encode, [task], retrieved={})
    assert encode.calls == [[s.text for s in task.queries], [s.text for s in task.candidates]]
    encode.calls.clear()
    broken = dataclasses.replace(task, name="broken", qrels=task.qrels[1:])
    with pytest.raises(ValueError, match="task broken"):
        evaluate(encode, [task, broken])
    assert encode.calls == []


def same_key(side):
    return side.text.partition("/")[0]


def test_what_shows_the_same_is_encoded_once_and_equal_to_the_bit():
    """In whatever order, and for the next task of the same pool not at all."""
    rng = np.random.default_rng(0)
    rows = {f"q{i}": rng.normal(size=8) for i in range(5)} | {
        f"c{i}/{j}": rng.normal(size=8) for i in range(300) for j in range(2)
    }
    encode, done = Table(rows), []
    embed = runner.Embedder(encode, same_key, advance=done.append)
    names = [name for name in rows if name[0] == "c"]
    sides = [Side(name) for name in names]
    got, at = embed(sides, "t", pool=True)
    assert got.shape == (300, 8) and [len(call) for call in encode.calls] == [128, 128, 44]
    assert sum(done) == 600
    for i, name in enumerate(names):
        assert (got[at[i]] == np.float32(rows[f"{name[:-1]}0"])).all()
    embed([Side("q0")], "t")
    encode.calls.pop()
    again, other = embed(sides[::-1], "t", pool=True)
    assert again is got and (other == at[::-1]).all() and len(encode.calls) == 3
    task = RetrievalTask(
        name="t",
        meta_task="I-RET",
        modality="image",
        metric="hit@1",
        queries=[Side(f"q{i}") for i in range(5)],
        candidates=sides,
        qrels=[{2 * i + 1: 1.0} for i in range(5)],
    )
    for pools in (None, [rng.permutation(600).tolist() for _ in range(5)]):
        asked = dataclasses.replace(task, pools=pools)
        encode.calls.clear()
        _, found, _ = runner.score_task(embed, asked)
        assert encode.calls == [[f"q{i}" for i in range(5)]]  # the pool's rows are there
        for i, each in enumerate(found):
            pool = list(range(600)) if pools is None else pools[i]
            first = each.top[0]
            twin = first ^ 1
            assert each.top[1] == twin and pool.index(first) < pool.index(twin)


def test_a_large_pool_lies_in_a_file(monkeypatch, tmp_path):
    """100,000 candidates take no more memory than what describes them."""
    width, count = 256, 100_000
    rows = np.random.default_rng(0).normal(size=(1024, width)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)

    def encode(sides):
        numbers = (divmod(int(side.text), 1024) for side in sides)
        return np.stack([np.roll(rows[i], shift) for shift, i in numbers])

    task = RetrievalTask(
        name="t",
        meta_task="I-RET",
        modality="image",
        metric="hit@1",
        queries=[Side(str(i)) for i in range(8)],
        candidates=[Side(str(i)) for i in range(count)],
        qrels=[{i: 1.0} for i in range(8)],
    )
    expected = runner.score_task(runner.Embedder(encode), task)
    monkeypatch.setattr(runner, "_IN_MEMORY", 1 << 20)
    tracemalloc.start()
    embed = runner.Embedder(encode, scratch=tmp_path)
    scored = runner.score_task(embed, task)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert scored == expected and scored.row["score"] == 100
    assert isinstance(embed.last[1], np.memmap) and not list(tmp_path.iterdir())
    assert most < count * width * 4 / 2


def on_a_rank(rank, world, folder):
    task, encode = random_task(3, "ndcg@5", pools=False, queries=300, candidates=500)
    looked_up = [{c: [x] for c, x in qrels.items()} for qrels in task.qrels]
    task = dataclasses.replace(task, published_qrels=looked_up)
    alone = runner.score_task(runner.Embedder(encode, same_key), task)
    encode.calls.clear()
    with gloo(folder, rank, world):
        embed = runner.Embedder(encode, same_key)
        assert runner.score_task(embed, task) == alone
        assert len(encode.calls) == (4 if rank == 0 else 3)  # of 7 chunks: 3 and 4
        assert len(embed.last[1]) == (500 if rank == 0 else 0)
        assert evaluate(encode, [task])["tasks"]["task"] == alone.row


def test_ranks_share_the_chunks_and_agree(tmp_path):
    spawn(on_a_rank, (2, str(tmp_path)), nprocs=2)


def test_a_public_list_may_repeat_a_candidate_and_lack_the_answer():
    rows = {"q0": [1.0, 0], "q1": [0.6, 0.8], "a": [1.0, 0], "b": [0, 1.0], "c": [0.9, 0.1]}
    task = RetrievalTask(
        name="t",
        meta_task="I-RET",
        modality="image",
        metric="hit@1",
        queries=[Side("q0"), Side("q1")],
        candidates=[Side("a"), Side("b"), Side("c")],
        qrels=[{0: 1.0}, {}],
        pools=[[2, 0, 0, 1], [0, 1]],
        published_qrels=[{0: [1.0]}, {}],
    )
    row, found, values = runner.score_task(runner.Embedder(Table(rows)), task)
    assert row["score"] == row["origin"] == 50 and values == [1.0, 0.0]
    assert found[0].top == [0, 0, 2, 1] and found[1].rank == 3
    assert row["chance"] == 25  # of two of four, and none
    runner.check(task)
    own = dataclasses.replace(task, published_qrels=None)
    with pytest.raises(ValueError, match="query 1: qrels is"):
        runner.check(dataclasses.replace(own, pools=None))
    with pytest.raises(ValueError, match="query 0: its pool names a candidate twice"):
        runner.check(dataclasses.replace(own, qrels=[{0: 1.0}, {1: 1.0}]))


def published_by_definition(prediction, labels, scores):
    """What VLM2Vec's evaluation computes of one query, as its text has it, in plain Python.

    It makes a set of the labels before it joins them with their relevances, which stay in order.
    """
    moved = dict(zip(set(labels), scores, strict=True))
    out = {}
    for k in (1, 5, 10):
        top = prediction[:k]
        hits = [candidate in labels for candidate in top]
        found = len({candidate for candidate in top if candidate in labels})
        precision, recall = found / k, found / len(labels)
        out[f"hit@{k}"] = float(any(hits))
        out[f"precision@{k}"], out[f"recall@{k}"] = precision, recall
        out[f"f1@{k}"] = 2 * precision * recall / (precision + recall) if found else 0
        precisions = [sum(hits[: i + 1]) / (i + 1) for i, hit in enumerate(hits) if hit]
        out[f"map@{k}"] = sum(precisions) / min(len(labels), k)
        out[f"mrr@{k}"] = 1 / (1 + hits.index(True)) if any(hits) else 0
        for name, gain in (("linear", lambda x: x), ("exponential", lambda x: 2**x - 1)):
            gains = [gain(moved.get(candidate, 0)) for candidate in top]
            best = sorted(map(gain, scores), reverse=True)[:k]
            dcg, ideal = (
                sum(x / math.log2(i + 2) for i, x in enumerate(values)) for values in (gains, best)
            )
            out[f"ndcg_{name}@{k}"] = dcg / ideal
    return out


def test_published_scores_follow_the_definition():
    """Graded relevance, several positives, ties and candidates that come again."""
    rng = random.Random(0)
    moved = 0
    for _ in range(200):
        ids = rng.sample(range(100_000), rng.randint(1, 30))
        labels = rng.sample(ids, rng.randint(1, min(len(ids), 12)))
        scores = [rng.randint(1, 3) for _ in labels]
        prediction = ids + rng.choices(ids, k=rng.randint(0, 3))
        similar = [rng.randint(0, 4) for _ in prediction]
        prediction = [prediction[i] for i in metrics.rank(similar)]
        expected = published_by_definition(prediction, labels, scores)
        qrels, published = dict(zip(labels, scores, strict=True)), _as_published(labels, scores)
        got = metrics.published_scores(prediction, qrels, published)
        assert got == pytest.approx(expected)
        moved += published != {label: [score] for label, score in qrels.items()}
        same = {label: [score] for label, score in qrels.items()}
        right = metrics.published_scores(prediction, qrels, same)
        first = list(dict.fromkeys(prediction))
        if len(first) == len(prediction):
            ours = metrics.score("ndcg@5", [qrels.get(candidate, 0) for candidate in prediction])
            assert right["ndcg_linear@5"] == pytest.approx(ours)
    assert moved > 100
    labels, scores, prediction = ["a", "b", "c"], [3, 1, 1], ["a", "b", "c", "d"]
    qrels = dict(zip(labels, scores, strict=True))
    orders = [  # of texts, whose order in a set is another in another process
        metrics.published_scores(
            prediction, qrels, {x: [score] for x, score in zip(order, scores, strict=True)}
        )
        for order in itertools.permutations(labels)
    ]
    got = metrics.published_scores(prediction, qrels, _as_published(labels, scores))
    assert got == pytest.approx({k: np.mean([order[k] for order in orders]) for k in got})
    assert round(got["ndcg_exponential@1"], 4) == 0.4286
    assert set(metrics.published_scores([1, 2], {}, {}).values()) == {0.0}


def test_table():
    task, encode = random_task(0)
    other, _ = random_task(1, "mrr", name="another task")
    before, after = (evaluate(table, [task, other]) for table in (random_task(9)[1], encode))
    head, first, second, last = format_table(before, after).splitlines()
    words = "task metric chance floor before after 95 % interval hard only"
    assert " ".join(head.split()) == words
    row, old = after["tasks"]["another task"], before["tasks"]["another task"]
    assert old["score"] != row["score"]
    shown = [
        row["chance"],
        row["floor"],
        old["score"],
        row["score"],
        *row["ci95"],
        row["hard_only"],
    ]
    numbers = second.replace("[", "").replace("]", "").replace(",", "").split()[3:]
    assert numbers == [f"{x:.1f}" for x in shown]
    assert first.startswith("task          hit@1") and second.startswith("another task  mrr")
    assert last.split()[0] == "mean"
    assert last.split()[3:5] == [f"{before['overall']:.1f}", f"{after['overall']:.1f}"]
    assert len({len(line) for line in (head, first, second, last)}) == 1
    assert "before" not in format_table(None, after)
    with pytest.raises(ValueError, match="another task"):
        format_table(evaluate(encode, [task]), after)


def changed(field, index, value):
    """A function that replaces one query's entry of a task's list."""

    def change(task):
        entries = list(getattr(task, field))
        entries[index] = value(task) if callable(value) else value
        return dataclasses.replace(task, **{field: entries})

    return change


def outside_pool(task):
    return next({c: 1.0} for c in range(9) if c not in task.pools[3])


def wrong_candidates(task):
    return [c for c in task.pools[3] if c not in task.qrels[3]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (changed("qrels", 3, {}), "query 3: qrels is {}, expected a positive"),
        (changed("qrels", 3, {0: 0.0}), "query 3: .*expected a positive, and all above 0"),
        (changed("qrels", 3, {0: float("nan")}), "query 3: .*expected a positive, and all above 0"),
        (changed("qrels", 3, {9: 1.0}), "query 3: positive 9"),
        (changed("qrels", 3, {-1: 1.0}), "query 3: positive -1"),
        (changed("qrels", 3, outside_pool), r"query 3: positive \d is not among its pool"),
        (changed("pools", 3, [0, 1, 9]), "query 3: pool index 9 is not among the 9 candidates"),
        (changed("pools", 3, [-1]), "query 3: pool index -1"),
        (changed("pools", 3, []), "query 3: positive"),
        (changed("pools", 3, lambda t: [*t.pools[3], t.pools[3][0]]), "query 3: .* twice"),
        (changed("hard", 3, lambda t: [*t.hard[3], 9]), "query 3: hard candidate 9"),
        (changed("hard", 3, wrong_candidates), "query 3: positive .* its hard candidates"),
        (lambda t: dataclasses.replace(t, qrels=t.qrels[1:]), "qrels has 11 entries for 12"),
        (lambda t: dataclasses.replace(t, pools=t.pools[1:]), "pools has 11 entries for 12"),
        (lambda t: dataclasses.replace(t, hard=t.hard[1:]), "hard has 11 entries for 12"),
        (lambda t: dataclasses.replace(t, queries=[], qrels=[], pools=[]), "no queries"),
    ],
)
def test_task_errors(change, message):
    task, encode = random_task(4)
    with pytest.raises(ValueError, match=message) as error:
        evaluate(encode, [change(task)])
    assert "task task" in str(error.value)


@pytest.mark.parametrize(
    ("encode", "message"),
    [
        (lambda sides: np.zeros((len(sides) - 1, 3)), r"\(11, 3\) .* 12 sides"),
        (lambda sides: np.zeros(len(sides)), r"\(12,\)"),
        (lambda sides: np.zeros((len(sides), 1, 3, 1)), r"\(12, 1, 3, 1\)"),
        (lambda sides: np.zeros((len(sides), len(sides))), r"\(12, 12\) against \(9, 9\)"),
        (lambda sides: np.full((len(sides), 3), np.nan), "not finite"),
        (lambda sides: np.full((len(sides), 3), np.inf), "not finite"),
    ],
)
def test_encoder_errors(encode, message):
    with pytest.raises(ValueError, match=f"task task: .*{message}"):
        evaluate(encode, [random_task(4)[0]])


def test_names_and_metrics():
    task, encode = random_task(4)
    with pytest.raises(ValueError, match="'hit' is none of"):
        evaluate(encode, [dataclasses.replace(task, metric="hit")])
    with pytest.raises(ValueError, match="one name each"):
        evaluate(encode, [task, task])
    with pytest.raises(ValueError, match="at least one"):
        evaluate(encode, [])


def test_imports_are_light():
    code = (
        "import sys, btok.evaluation.metrics, btok.evaluation.runner;"
        "assert not {'PIL', 'matplotlib', 'transformers', 'triton'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- rows that are several vectors


def late(query, candidate):
    return np.mean([max(float(a @ b) for b in candidate) for a in query])


def multi_task(seed, pools, width=3):
    """Whole-number rows of three vectors each: sums are exact, and ties frequent."""
    task, encode = random_task(seed, "ndcg@5", pools=pools, queries=20, candidates=12)
    rng = np.random.default_rng(seed)
    rows = {text: rng.integers(-1, 2, (3, width)).astype(np.float32) for text in encode.rows}
    return task, Table(rows)


@pytest.mark.parametrize("pools", [True, False])
def test_rows_of_several_vectors_meet_by_late_interaction(monkeypatch, pools):
    for seed in range(5):
        task, encode = multi_task(seed, pools)
        found, score = {}, []
        row = evaluate(encode, [task], retrieved=found)["tasks"]["task"]
        for i, qrels in enumerate(task.qrels):
            pool = range(len(task.candidates)) if task.pools is None else task.pools[i]
            query = encode.rows[task.queries[i].text]
            truth = {c: late(query, encode.rows[task.candidates[c].text]) for c in pool}
            order = sorted(pool, key=lambda c: -round(truth[c], 5))
            score.append(by_definition("ndcg@5", [qrels.get(c, 0.0) for c in order]))
            assert found["task"][i].top == order[:5]
        assert row["score"] == pytest.approx(100 * np.mean(score))
        monkeypatch.setattr(runner, "_BLOCK", 70)  # a query at a time
        assert evaluate(encode, [task])["tasks"]["task"] == row
        monkeypatch.undo()


def test_one_vector_each_is_the_dot_product():
    task, encode = random_task(4, hard=False, pools=False)
    several = Table({text: row[None] for text, row in encode.rows.items()})
    assert evaluate(several, [task]) == evaluate(encode, [task])


def test_what_shows_the_same_is_equal_to_the_bit_with_several_vectors():
    rng = np.random.default_rng(0)
    rows = {f"q{i}": rng.normal(size=(4, 8)) for i in range(5)}
    rows |= {f"c{i}/{j}": rng.normal(size=(4, 8)) for i in range(200) for j in range(2)}
    task = RetrievalTask(
        name="t",
        meta_task="I-RET",
        modality="image",
        metric="hit@1",
        queries=[Side(f"q{i}") for i in range(5)],
        candidates=[Side(name) for name in rows if name[0] == "c"],
        qrels=[{0: 1.0}] * 5,
    )
    for pools in (None, [rng.permutation(400).tolist() for _ in range(5)]):
        asked = dataclasses.replace(task, pools=pools)
        _, found, _ = runner.score_task(runner.Embedder(Table(rows), same_key), asked)
        for i, each in enumerate(found):
            pool = list(range(400)) if pools is None else pools[i]
            assert each.top[1] == each.top[0] ^ 1 and each.top[3] == each.top[2] ^ 1
            assert pool.index(each.top[0]) < pool.index(each.top[1])


def test_a_large_pool_of_several_vectors_lies_in_a_file(monkeypatch, tmp_path):
    task, encode = multi_task(1, False)
    expected = runner.score_task(runner.Embedder(encode), task)
    monkeypatch.setattr(runner, "_IN_MEMORY", 100)
    embed = runner.Embedder(encode, scratch=tmp_path)
    assert runner.score_task(embed, task) == expected
    assert isinstance(embed.last[1], np.memmap) and embed.last[1].shape == (12, 3, 3)


def test_rows_that_do_not_fit_together():
    task, encode = multi_task(0, True)
    for shape, message in (
        ((2, 3), r"task task: rows \(20, 3, 3\) against \(12, 2, 3\)"),
        ((3,), r"task task: rows \(20, 3, 3\) against \(12, 3\)"),
        ((3, 1, 3), r"encode made \(12, 3, 1, 3\) rows of 12 sides"),
    ):
        other = {text: np.zeros(shape) for text in encode.rows if text[0] == "c"}
        with pytest.raises(ValueError, match=message):
            evaluate(Table(encode.rows | other), [task])
    broken = {text: np.full((3, 3), np.nan) for text in encode.rows}
    with pytest.raises(ValueError, match="rows that are not finite"):
        evaluate(Table(broken), [task])
