"""One runner for every evaluation set: encode once, rank by similarity, score, sum up.

tasks -> `Embedder`: each different side once, in chunks that the ranks share -> `score_task`: every
query's ranking of its pool -> means over tasks

Rows [n, D] are compared by dot product, and rows [n, K, D], of K vectors each, by late interaction.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from btok.data.records import RetrievalTask, Side
from btok.evaluation.metrics import (
    expected,
    mean_interval,
    parse_metric,
    published_name,
    published_scores,
    rank,
    score,
)
from btok_kernels.late_interaction import maxsim
from btok_kernels.ranks import from_first, gather, world
from btok_kernels.ranks import rank as this_rank

Rows = NDArray[np.float32]
Encode = Callable[[Sequence[Side]], Rows]

CHUNK = 128  # sides that are encoded together, by one rank: a row depends on nothing else
_BLOCK = 1 << 24  # similarities of a global pool held at a time (64 MiB)
_IN_MEMORY = 1 << 28  # bytes of a pool's rows; those of a larger one lie in a file


class Retrieved(NamedTuple):
    """What a query found: its five best candidates, which are right, the first right one's rank."""

    top: list[int]
    right: list[bool]
    rank: int


class Scored(NamedTuple):
    """A task's row of the result, what each query found, and each query's score in [0, 1]."""

    row: dict[str, Any]
    found: list[Retrieved]
    values: list[float]


class Embedder:
    """Sides become rows, of which this process, rank 0 alone, keeps those of the last pool.

    Args:
        encode: at most `CHUNK` sides -> rows [n, D], or [n, K, D]; each rank is asked for its own.
        key: of a side, equal for equal content, which is then encoded once, and in an order that
            does not depend on the pool's; None where every side is another.
        scratch: a folder for the rows of a large pool; None for the system's.
        advance: called with a number of sides that are done.

    Raises:
        ValueError: rows that are not [n, D] or [n, K, D], or not finite.
    """

    def __init__(
        self,
        encode: Encode,
        key: Callable[[Side], Hashable] | None = None,
        scratch: Path | None = None,
        advance: Callable[[int], object] = lambda _: None,
    ) -> None:
        self.encode, self.key, self.scratch, self.advance = encode, key, scratch, advance
        self.last: tuple[list[Hashable], Rows] = ([], np.empty((0, 0), np.float32))

    def __call__(
        self, sides: Sequence[Side], what: str, pool: bool = False
    ) -> tuple[Rows, NDArray[np.intp]]:
        """Rows [U, D], or [U, K, D], of the different sides among N, and which row each has, [N];
        empty on other ranks than 0. Those of a pool are kept for the next task of it.
        """
        keys: list[Hashable] = list(range(len(sides)))
        if self.key is not None:  # which may read files: once is enough
            keys = from_first(list(map(self.key, sides)) if this_rank() == 0 else None)
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        order = sorted(first)  # type: ignore[type-var]
        known = pool and self.key is not None and self.last[0] == order
        rows = self.last[1] if known else self._encode([sides[first[key]] for key in order], what)
        if pool:
            self.last = order, rows
        self.advance(len(sides) - (0 if known else len(order)))
        place = {key: row for row, key in enumerate(order)}
        return rows, np.array([place[key] for key in keys], np.intp)

    def _encode(self, sides: Sequence[Side], what: str) -> Rows:
        rows: Rows | None = None
        chunks = [sides[i : i + CHUNK] for i in range(0, len(sides), CHUNK)]
        for start in range(0, len(chunks), world()):
            part: Any = None
            if start + this_rank() < len(chunks):
                part = self._checked(chunks[start + this_rank()], what)
            for i, found in enumerate(gather(part)[: len(chunks) - start]):
                if rows is None:
                    rows = self._room(len(sides) if this_rank() == 0 else 0, found.shape[1:])
                if found.shape[1:] != rows.shape[1:]:
                    raise ValueError(f"task {what}: rows {found.shape} against {rows.shape}")
                if this_rank() == 0:
                    rows[(start + i) * CHUNK :][: len(found)] = found
                self.advance(len(found))
        assert rows is not None
        return rows

    def _checked(self, sides: Sequence[Side], what: str) -> Rows:
        try:
            rows = np.asarray(self.encode(sides), dtype=np.float32)
        except (ValueError, TypeError) as error:
            raise type(error)(f"task {what}: {error}") from error
        if rows.ndim not in (2, 3) or len(rows) != len(sides):
            raise ValueError(f"task {what}: encode made {rows.shape} rows of {len(sides)} sides")
        if not np.isfinite(rows).all():
            raise ValueError(f"task {what}: encode made rows that are not finite")
        return rows

    def _room(self, count: int, of_each: tuple[int, ...]) -> Rows:
        shape = (count, *of_each)
        if 4 * math.prod(shape) <= _IN_MEMORY:
            return np.empty(shape, np.float32)
        with tempfile.TemporaryFile(dir=self.scratch) as file:  # gone with the last who looks at it
            return np.memmap(file, np.float32, "w+", shape=shape)


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

    In a process group every rank calls it, encodes its share and has the result.

    Args:
        encode: at most `CHUNK` sides -> rows [N, D]; or [N, K, D], whose similarity in place of
            the dot product is `btok.kernels.maxsim`.
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
            without a positive; rows of another shape or not finite.
    """
    tasks = list(tasks)
    names = [task.name for task in tasks]
    if not tasks or len(set(names)) < len(names):
        raise ValueError(f"evaluate: tasks must have one name each and be at least one: {names}")
    for task in tasks:
        check(task)
    embed = Embedder(encode)
    rows: dict[str, dict[str, Any]] = {}
    for task in tasks:
        rows[task.name], found, _ = score_task(embed, task)
        if retrieved is not None:
            retrieved[task.name] = found
        if progress:
            print(f"{task.name}: {rows[task.name]['score']:.1f}", file=sys.stderr, flush=True)

    def means(of: str) -> dict[str, float]:
        groups = dict.fromkeys(row[of] for row in rows.values())
        scores = {g: [r["score"] for r in rows.values() if r[of] == g] for g in groups}
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


def score_task(embed: Embedder, task: RetrievalTask) -> Scored:
    """Score one task that `check` has passed; in a process group on every rank, and rank 0 scores.

    With `published_qrels` the row has `origin` beside `score`, the metric as the code that
    published the set computes it, and `published`, all that it reports, as shares.
    """
    queries = embed(task.queries, task.name)
    candidates = embed(task.candidates, task.name, pool=True)
    return from_first(_score(task, *queries, *candidates) if this_rank() == 0 else None)


def _score(
    task: RetrievalTask,
    queries: Rows,
    asked: NDArray[np.intp],
    candidates: Rows,
    shown: NDArray[np.intp],
) -> Scored:
    if queries.shape[1:] != candidates.shape[1:]:
        had = f"rows {queries.shape} against {candidates.shape}"
        raise ValueError(f"task {task.name}: {had}")
    found, values, published = [], [], []
    for i, ranking in enumerate(_rankings(queries, asked, candidates, shown, task.pools)):
        qrels = task.qrels[i]
        relevance = np.zeros(len(shown))
        relevance[list(qrels)] = list(qrels.values())
        ranked = relevance[ranking]
        hard = ranked if task.hard is None else ranked[np.isin(ranking, task.hard[i])]
        scored = [
            f(task.metric, x) if qrels else 0.0 for f in (score, expected) for x in (ranked, hard)
        ]
        values.append(scored)
        right = (ranked > 0).tolist()
        place = right.index(True) if qrels else len(right)
        found.append(Retrieved(ranking[:5].tolist(), right[:5], 1 + place))
        if task.published_qrels is not None:
            best = ranking[:10].tolist()
            published.append(published_scores(best, qrels, task.published_qrels[i]))
    points, hard_only, chance, floor = (100 * np.mean(values, axis=0)).tolist()
    scores = [value[0] for value in values]
    low, high = mean_interval(scores)
    row: dict[str, Any] = {"meta_task": task.meta_task, "modality": task.modality}
    row |= {"metric": task.metric, "score": points, "chance": chance, "floor": floor}
    row |= {"hard_only": hard_only, "ci95": [100 * low, 100 * high]}
    row |= {"queries": len(task.queries), "candidates": len(task.candidates)}
    if published:
        means = {name: float(np.mean([each[name] for each in published])) for name in published[0]}
        row |= {"origin": 100 * means[published_name(task.metric)], "published": means}
    return Scored(row, found, scores)


def _rankings(
    queries: Rows,
    asked: NDArray[np.intp],
    candidates: Rows,
    shown: NDArray[np.intp],
    pools: Sequence[Sequence[int]] | None,
) -> Iterator[NDArray[np.intp]]:
    """Per query, the candidate indices of its pool, best first.

    Candidates that show the same have one row, and so one product: they are equal to the last bit.
    """
    if pools is None:
        vectors = math.prod(queries.shape[1:-1])  # of a query
        step = max(1, _BLOCK // (len(candidates) * vectors))
        for i in range(0, len(asked), step):
            for scores in _similarities(queries[asked[i : i + step]], candidates):
                yield rank(scores[shown])
        return
    for row, pool in zip(asked, map(np.asarray, pools), strict=True):
        rows, inverse = np.unique(shown[pool], return_inverse=True)
        if queries.ndim == 2:
            scores = candidates[rows] @ queries[row]
        else:
            (scores,) = _similarities(queries[row : row + 1], candidates[rows])
        yield pool[rank(scores[inverse])]


def _similarities(queries: Rows, candidates: Rows) -> Rows:
    """[n, m] of rows [n, D] and [m, D], or of [n, K, D] and [m, K, D]."""
    if queries.ndim == 2:
        return queries @ candidates.T
    return maxsim(torch.from_numpy(queries), torch.from_numpy(candidates)).numpy()


def check(task: RetrievalTask) -> None:
    """A ValueError for a task that does not fit together; it names the task and the query."""
    parse_metric(task.metric)
    n, where = len(task.queries), f"task {task.name}"
    if n == 0:
        raise ValueError(f"{where}: it has no queries")
    named = ("qrels", "pools", "hard", "published_qrels")
    for what, lists in ((name, getattr(task, name)) for name in named):
        if lists is not None and len(lists) != n:
            raise ValueError(f"{where}: {what} has {len(lists)} entries for {n} queries")
    everything = frozenset(range(len(task.candidates)))
    for i, qrels in enumerate(task.qrels):
        public = task.published_qrels is not None
        if not (qrels or public) or not all(0 < value < np.inf for value in qrels.values()):
            had = f"qrels is {dict(qrels)}"
            raise ValueError(f"{where}, query {i}: {had}, expected a positive, and all above 0")
        pool = everything if task.pools is None else frozenset(task.pools[i])
        hard = pool if task.hard is None else frozenset(task.hard[i])
        if task.pools is not None and len(pool) < len(task.pools[i]) and not public:
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
