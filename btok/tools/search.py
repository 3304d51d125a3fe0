"""What of many rows is nearest, a batch at a time; and late interaction, for items that an index
keeps several vectors of.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
NEAR = 1e-6  # in score, that two rows are as near
TOGETHER = 64  # queries whose candidates are read together
READ_AT_ONCE = 1 << 26  # bytes, in fp32, of candidates' vectors


def nearest(scored: Scored, queries: int, k: int) -> Found:
    """Of each query the k rows of the highest scores; of equal ones those that come first.

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
        [(float(score), int(n)) for score, n in zip(*pair, strict=True) if score > -np.inf]
        for pair in zip(best, numbers, strict=True)
    ]


def late(queries: NDArray[np.float32], rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """[Q, n], the mean over a query's vectors [Q, K, D] of the best product with a row's
    [n, L, D].
    """
    query, key = (torch.from_numpy(np.ascontiguousarray(x)) for x in (queries, rows))
    return maxsim(query, key).numpy()


def rescored(index: Index, queries: NDArray[np.float32], found: Found, k: int) -> Found:
    """Of each query's candidates the k best by late interaction, with those scores.

    Args:
        index: whose rows they are, and have several vectors.
        queries: [Q, K, D].
        found: the candidates.
    """
    together: Found = []
    for first in range(0, len(queries), TOGETHER):
        part = found[first : first + TOGETHER]
        scores: dict[tuple[int, int], float] = {}
        wanted = sorted({number for of_query in part for _, number in of_query})
        step = max(1, READ_AT_ONCE // (4 * index.several * index.dims))
        for start in range(0, len(wanted), step):
            numbers, rows = index.several_of(wanted[start : start + step])
            place = {number: i for i, number in enumerate(numbers)}
            for i, of_query in enumerate(part):
                own = [number for _, number in of_query if number in place]
                if own:
                    at = [place[number] for number in own]
                    (new,) = late(queries[first + i : first + i + 1], rows[at])
                    scores |= {(i, n): float(s) for n, s in zip(own, new, strict=True)}
        for i, of_query in enumerate(part):
            again = [(scores[i, number], number) for _, number in of_query]
            together.append(sorted(again, key=lambda hit: (-hit[0], hit[1]))[:k])
    return together


def recall(
    expected: Sequence[Sequence[tuple[float, int]]],
    found: Sequence[Sequence[tuple[float, int]]],
    k: int,
) -> float:
    """Of the k nearest but the first, which is the query itself, how many were found, or others
    that are as near.
    """
    hits = [
        min(k, max(0, sum(score >= right[-1][0] - NEAR for score, _ in got) - 1))
        for right, got in zip(expected, found, strict=True)
    ]
    return sum(hits) / sum(len(right) - 1 for right in expected)


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
