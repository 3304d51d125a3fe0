"""A search of an index: which rows are nearest to queries, by their numbers.

queries -> vectors -> the nearest, by all rows or as an approximate index proposes them -> of items
with several vectors the best of these by late interaction

Scores are products of stored vectors, also of rows that an approximate index proposed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from btok.vectors import options_of
from btok_kernels.late_interaction import maxsim

if TYPE_CHECKING:
    from btok.tools.index import Index

Found = list[list[tuple[float, int]]]  # of each query scores and rows' numbers, the best first
Scored = Iterable[tuple[NDArray[np.float32], NDArray[np.uint64]]]
LARGE = 100_000  # rows up to which a search compares all
PROBES = (8, 16, 32, 64, 128, 256, 512)  # partitions of an index that a query looks at
TUNED = 10  # the k for which `Index.build` finds how many of them
REFINED = 10  # times k: candidates whose vectors are compared exactly, or by late interaction
NEAR = 1e-6  # in score, that two rows are as near
TOGETHER = 64  # queries whose candidates are held, or read, together
READ_AT_ONCE = 1 << 26  # bytes, in fp32, of candidates' vectors


def asked(
    index: Index, queries: Any, instruction: str | None, rescore: bool | None
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Queries of `Index.search` as vectors [Q, D], and as several each to rescore with, [Q, K, D],
    or None for a search that does not.
    """
    if rescore and not index.several:
        raise ValueError(
            f"rescore is True, but {index.uri} has one vector an item; encode it anew with "
            "multi_vector"
        )
    if isinstance(queries, np.ndarray) and queries.dtype != np.uint8:
        queries = checked(queries, index.dims, index.several)
        if rescore and queries.ndim == 2:
            raise ValueError(
                f"rescore is True, and queries is float32 {list(queries.shape)}, expected "
                f"[Q, 1 + K, {index.dims}], as multi_vector='both' gives"
            )
    else:
        options = options_of(index.meta["settings"])
        if not index.several or rescore is False:
            options["multi_vector"] = False
        encoder = index.encoder.using(**options)
        queries = encoder.encode(queries, instruction, show_progress=False)
    if queries.ndim == 2:
        return queries, None
    return queries[:, 0], None if rescore is False else queries[:, 1:]


def checked(queries: NDArray[Any], dims: int, several: int) -> NDArray[np.float32]:
    """Vectors float32 [Q, D], or, of an index of several vectors an item, [Q, 1 + K, D]; a
    ValueError for others.
    """
    shapes = f"[Q, {dims}]" + (f" or [Q, 1 + K, {dims}]" if several else "")
    wrong = queries.ndim not in ((2, 3) if several else (2,)) or queries.shape[-1] != dims
    if wrong or (queries.ndim == 3 and queries.shape[1] < 2):
        had = f"queries is {queries.dtype} {list(queries.shape)}"
        raise ValueError(f"{had}, expected float32 {shapes}")
    queries = queries.astype(np.float32, copy=False)
    if not np.isfinite(queries).all():
        raise ValueError("queries has NaNs or infinities, expected unit vectors")
    return queries


def found(
    index: Index,
    queries: NDArray[np.float32],
    several: NDArray[np.float32] | None,
    k: int,
    where: str | None,
    exact_only: bool | None,
    count: int,
) -> Found:
    """Find the k nearest rows of each query.

    Args:
        queries, several: as `asked` gives them.
        where: among which rows, `count` of which have a vector, as SQL.
        exact_only: whether no approximate index is to propose any.
    """
    if several is not None and (exact_only or REFINED * k >= count):
        return exact(index, several, k, where)
    most = k if several is None else REFINED * k
    hits: Found = []
    if not exact_only and index.indexed and (where is None or count > LARGE):
        # of a part of the rows, or for more of them, as good results lie further away
        total = count if where is None else len(index)
        share = max(1, total / count) * max(1, most / TUNED)
        probes = round(index.meta.get("probes", PROBES[-1]) * share)
        hits = probed(index, queries, most, where, probes)
    if min(map(len, hits), default=0) < most:
        hits = exact(index, queries, most, where)
    return hits if several is None else rescored(index, several, hits, k)


def exact(index: Index, queries: NDArray[np.float32], k: int, where: str | None) -> Found:
    """The k nearest of all rows, which are read once; by late interaction for queries [Q, K, D]."""
    parts = index.vectors(where, several=queries.ndim == 3)
    score = late if queries.ndim == 3 else lambda queries, rows: queries @ rows.T
    scored = ((score(queries, rows), numbers.to_numpy()) for rows, numbers in parts)
    return nearest(scored, len(queries), k)


def probed(
    index: Index, queries: NDArray[np.float32], k: int, where: str | None, probes: int
) -> Found:
    """The k nearest by the approximate index, of so many partitions, and what is not in it yet."""
    hits: Found = [[] for _ in queries]
    for first in range(0, len(queries), TOGETHER):
        part = queries[first : first + TOGETHER]
        for query, number, row in index.proposed(part, k, where, probes):
            hits[first + query].append((float(part[query] @ row), number))
    return [sorted(of_query, key=_order) for of_query in hits]


def nearest(scored: Scored, queries: int, k: int) -> Found:
    """Keep the k rows of the highest scores for each query; of equal ones those that come first.

    Args:
        scored: scores [Q, n] of some rows and their numbers [n], a batch at a time.
        queries: Q.
    """
    best = np.full((queries, k), -np.inf, np.float32)
    numbers = np.zeros((queries, k), np.uint64)
    for scores, theirs in scored:
        better = scores > best[:, -1:]  # of equal ones the earlier stays
        for query in np.flatnonzero(better.any(1)):
            new = np.flatnonzero(better[query])
            joint = np.concatenate((best[query], scores[query, new]))
            order = np.argsort(-joint, kind="stable")[:k]
            best[query] = joint[order]
            numbers[query] = np.concatenate((numbers[query], theirs[new]))[order]
    return [
        [hit for hit in zip(*of_query, strict=True) if hit[0] > -np.inf]
        for of_query in zip(best.tolist(), numbers.tolist(), strict=True)
    ]


def late(queries: NDArray[np.float32], rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """[Q, n], the mean over a query's vectors [Q, K, D] of the best product with a row's
    [n, L, D].
    """
    query, key = (torch.from_numpy(np.ascontiguousarray(x)) for x in (queries, rows))
    return maxsim(query, key).numpy()


def rescored(index: Index, queries: NDArray[np.float32], hits: Found, k: int) -> Found:
    """Rescore each query's candidates by late interaction, and keep the k best with those scores.

    Args:
        index: whose rows they are, and have several vectors.
        queries: [Q, K, D].
        hits: the candidates.
    """
    together: Found = []
    for first in range(0, len(queries), TOGETHER):
        part = hits[first : first + TOGETHER]
        again: Found = [[] for _ in part]
        wanted = sorted({number for of_query in part for _, number in of_query})
        step = max(1, READ_AT_ONCE // (4 * index.several * index.dims))
        for start in range(0, len(wanted), step):
            numbers, rows = index.several_of(wanted[start : start + step])
            place = {number: i for i, number in enumerate(numbers)}
            for i, of_query in enumerate(part):
                own = [number for _, number in of_query if number in place]
                if own:
                    at = [place[number] for number in own]
                    (scores,) = late(queries[first + i : first + i + 1], rows[at])
                    again[i] += zip(scores.tolist(), own, strict=True)
        together += [sorted(of_query, key=_order)[:k] for of_query in again]
    return together


def recall(expected: Found, found: Found, k: int) -> float:
    """The share of the k nearest rows that were found, or others as near, without the query itself,
    which is the first.
    """
    hits = [
        min(k, max(0, sum(score >= right[-1][0] - NEAR for score, _ in got) - 1))
        for right, got in zip(expected, found, strict=True)
    ]
    return sum(hits) / sum(len(right) - 1 for right in expected)


def _order(hit: tuple[float, int]) -> tuple[float, int]:
    """A sort key by which the highest score comes first, and of equal ones the row that was written
    first.
    """
    score, number = hit
    return -score, number
