"""One runner for every evaluation set: encode once, rank by dot product, score, sum up."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from btok.data.records import RetrievalTask, Side
from btok.evaluation.metrics import expected, mean_interval, parse_metric, rank, score

Rows = NDArray[np.float32]
Encode = Callable[[Sequence[Side]], Rows]

_BLOCK = 1 << 24  # similarities of a global pool held at a time (64 MiB)


class Retrieved(NamedTuple):
    """What a query found: its five best candidates, which are right, the first right one's rank."""

    top: list[int]
    right: list[bool]
    rank: int


def evaluate(
    encode: Encode,
    tasks: Iterable[RetrievalTask],
    *,
    settings: Mapping[str, Any] | None = None,
    data_digest: str | None = None,
    progress: bool = False,
    retrieved: dict[str, list[Retrieved]] | None = None,
) -> dict[str, Any]:
    """Scores an encoder: `metric(qrels[argsort(-(candidates[pool] @ query), stable)])`, in percent.

    Args:
        encode: sides -> rows [N, D]; called once for a task's queries, once for its candidates.
        tasks: all are checked before anything is encoded.
        settings, data_digest: copied into the result.
        progress: print a line per task to stderr.
        retrieved: filled, if given: task name -> what each query found (for contact sheets).

    Returns:
        `{"tasks": {name: row}, "meta_tasks", "modalities", "overall", "settings", "data_digest"}`.
        In a row, `chance` is what a random order of the pool gives; `floor` what a random order of
        the hard candidates gives, followed by all others; `hard_only` the score among the hard
        candidates alone; `ci95` [low, high] of the score. The means are over tasks.

    Raises:
        ValueError: no tasks or a name twice; a task that does not fit together, such as a query
            without a positive; rows that are not [N, D] or not finite.
    """
    tasks = list(tasks)
    names = [task.name for task in tasks]
    if not tasks or len(set(names)) < len(names):
        raise ValueError(f"evaluate: tasks must have one name each and be at least one: {names}")
    for task in tasks:
        _check(task)
    rows: dict[str, dict[str, Any]] = {}
    for task in tasks:
        rows[task.name], found = _score_task(encode, task)
        if retrieved is not None:
            retrieved[task.name] = found
        if progress:
            print(f"{task.name}: {rows[task.name]['score']:.1f}", file=sys.stderr, flush=True)

    def means(key: str) -> dict[str, float]:
        groups = dict.fromkeys(row[key] for row in rows.values())
        scores = {g: [r["score"] for r in rows.values() if r[key] == g] for g in groups}
        return {g: float(np.mean(values)) for g, values in scores.items()}

    return {
        "tasks": rows,
        "meta_tasks": means("meta_task"),
        "modalities": means("modality"),
        "overall": float(np.mean([row["score"] for row in rows.values()])),
        "settings": dict(settings or {}),
        "data_digest": data_digest,
    }


def format_table(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> str:
    """Two results of `evaluate` as a plain-text table with the means in its last line.

    `before` may be None, which leaves its column out; else both must hold the same tasks.
    """
    if before is not None and list(before["tasks"]) != list(after["tasks"]):
        raise ValueError(f"format_table: {list(before['tasks'])} is not {list(after['tasks'])}")
    rows = after["tasks"].values()

    def numbers(title: str, result: Mapping[str, Any], key: str) -> list[str]:
        values = [row[key] for row in result["tasks"].values()]
        return [title, *(f"{x:.1f}" for x in [*values, np.mean(values)])]

    columns = [
        ["task", *after["tasks"], "mean"],
        ["metric", *(row["metric"] for row in rows), ""],
        numbers("chance", after, "chance"),
        numbers("floor", after, "floor"),
        *([numbers("before", before, "score")] if before is not None else []),
        numbers("after", after, "score"),
        ["95 % interval", *("[{:.1f}, {:.1f}]".format(*row["ci95"]) for row in rows), ""],
        numbers("hard only", after, "hard_only"),
    ]
    for i, column in enumerate(columns):
        width = max(map(len, column))
        columns[i] = [x.ljust(width) if i < 2 else x.rjust(width) for x in column]
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def _score_task(encode: Encode, task: RetrievalTask) -> tuple[dict[str, Any], list[Retrieved]]:
    queries = _embed(encode, task, task.queries)
    candidates = _embed(encode, task, task.candidates)
    if queries.shape[1] != candidates.shape[1]:
        raise ValueError(f"task {task.name}: rows {queries.shape} against {candidates.shape}")
    found, values = [], []
    for i, ranking in enumerate(_rankings(queries, candidates, task.pools)):
        relevance = np.zeros(len(candidates))
        relevance[list(task.qrels[i])] = list(task.qrels[i].values())
        ranked = relevance[ranking]
        hard = ranked if task.hard is None else ranked[np.isin(ranking, task.hard[i])]
        values.append([f(task.metric, x) for f in (score, expected) for x in (ranked, hard)])
        right = (ranked > 0).tolist()
        found.append(Retrieved(ranking[:5].tolist(), right[:5], 1 + right.index(True)))
    points, hard_only, chance, floor = (100 * np.mean(values, axis=0)).tolist()
    low, high = mean_interval([v[0] for v in values])
    row: dict[str, Any] = {"meta_task": task.meta_task, "modality": task.modality}
    row |= {"metric": task.metric, "score": points, "chance": chance, "floor": floor}
    row |= {"hard_only": hard_only, "ci95": [100 * low, 100 * high]}
    row |= {"queries": len(queries), "candidates": len(candidates)}
    return row, found


def _embed(encode: Encode, task: RetrievalTask, sides: Sequence[Side]) -> Rows:
    rows = np.asarray(encode(sides), dtype=np.float32)
    if rows.ndim != 2 or len(rows) != len(sides):
        raise ValueError(f"task {task.name}: encode made {rows.shape} rows of {len(sides)} sides")
    if not np.isfinite(rows).all():
        raise ValueError(f"task {task.name}: encode made rows that are not finite")
    return rows


def _rankings(
    queries: Rows, candidates: Rows, pools: Sequence[Sequence[int]] | None
) -> Iterator[NDArray[np.intp]]:
    """Per query, the candidate indices of its pool, best first."""
    if pools is None:
        step = max(1, _BLOCK // len(candidates))
        for i in range(0, len(queries), step):
            yield from map(rank, queries[i : i + step] @ candidates.T)
        return
    for query, pool in zip(queries, map(np.asarray, pools), strict=True):
        yield pool[rank(candidates[pool] @ query)]


def _check(task: RetrievalTask) -> None:
    parse_metric(task.metric)
    n, where = len(task.queries), f"task {task.name}"
    if n == 0:
        raise ValueError(f"{where}: it has no queries")
    for what, lists in (("qrels", task.qrels), ("pools", task.pools), ("hard", task.hard)):
        if lists is not None and len(lists) != n:
            raise ValueError(f"{where}: {what} has {len(lists)} entries for {n} queries")
    everything = frozenset(range(len(task.candidates)))
    for i, qrels in enumerate(task.qrels):
        if not qrels or not all(0 < value < np.inf for value in qrels.values()):
            had = f"qrels is {dict(qrels)}"
            raise ValueError(f"{where}, query {i}: {had}, expected a positive, and all above 0")
        pool = everything if task.pools is None else frozenset(task.pools[i])
        hard = pool if task.hard is None else frozenset(task.hard[i])
        if task.pools is not None and len(pool) < len(task.pools[i]):
            raise ValueError(f"{where}, query {i}: its pool names a candidate twice")
        for what, some, others, among in (
            ("pool index", pool, everything, f"the {len(everything)} candidates"),
            ("positive", frozenset(qrels), pool, "its pool"),
            ("hard candidate", hard, pool, "its pool"),
            ("positive", frozenset(qrels), hard, "its hard candidates"),
        ):
            if not some <= others:
                what = f"{what} {min(some - others)}"
                raise ValueError(f"{where}, query {i}: {what} is not among {among}")
