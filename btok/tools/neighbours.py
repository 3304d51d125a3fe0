"""The nearest of many vectors in bounded memory, exactly, and files that are filled block by block.

Scores are made for a block of rows and a block of candidates at a time; of equal ones the candidate
that comes first is the nearer. So what is found depends on no block and no order of blocks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ROWS, CANDIDATES = 1 << 10, 1 << 13  # of which scores are made at a time: 32 MiB of them
NONE = torch.iinfo(torch.int64).min  # in the place of a candidate, where there are too few


class Blocks:
    """A file of records, and beside it a byte per block that tells whether it is there.

    What was written survives a kill; of a block that was not, nothing counts. Processes may fill
    different blocks at the same time.

    Args:
        path: of the file; that of the bytes ends in `.done`.
        count: how many records.
        kind: of a record, fixed in size.
        size: records of a block; the last may be shorter.
        create: make the files that are missing.
    """

    def __init__(self, path: Path, count: int, kind: Any, size: int, create: bool = True) -> None:
        self.path, self.done = path, path.with_name(f"{path.name}.done")
        self.count, self.kind, self.size = count, np.dtype(kind), size
        self.number = -(-count // size)
        sizes = {path: count * self.kind.itemsize, self.done: self.number}
        if create and any(not x.exists() or x.stat().st_size != n for x, n in sizes.items()):
            for each, length in reversed(sizes.items()):  # nothing counts as there from now on
                each.write_bytes(b"")
                os.truncate(each, length)

    def missing(self) -> list[int]:
        """The numbers of the blocks that are still to be written."""
        return np.flatnonzero(np.fromfile(self.done, np.uint8) == 0).tolist()

    def rows(self, block: int) -> range:
        """The numbers of a block's records."""
        return range(block * self.size, min((block + 1) * self.size, self.count))

    def write(self, block: int, records: NDArray[Any]) -> None:
        """Keep a block; it is on the disk when this returns."""
        content = np.ascontiguousarray(records, self.kind.base).tobytes()
        start = self.rows(block).start * self.kind.itemsize
        for path, at, data in ((self.path, start, content), (self.done, block, b"\1")):
            try:
                with open(path, "r+b") as file:
                    file.seek(at)
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                if error.filename is None:  # as of a full disk
                    error.filename = str(path)
                raise

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """The records from `start` on, before `stop`; read, not mapped: memory stays bounded."""
        return np.fromfile(self.path, self.kind, stop - start, offset=start * self.kind.itemsize)

    def take(self, numbers: NDArray[np.int64]) -> NDArray[Any]:
        """The records of these numbers, in their order."""
        found, where = np.unique(numbers, return_inverse=True)
        rows = np.empty(len(found), self.kind)
        cuts = [0, *(np.flatnonzero(np.diff(found) != 1) + 1).tolist(), len(found)]
        for first, last in pairwise(cuts):
            if first < last:
                rows[first:last] = self.read(int(found[first]), int(found[last - 1]) + 1)
        return rows[where]


def as_keys(scores: Tensor, numbers: Tensor) -> Tensor:
    """Sort keys int64 of candidates: higher for a higher score, and of equal ones for the earlier
    candidate.

    Args:
        scores: float32, -inf for what is no candidate.
        numbers: int64, of the same shape or one that spreads to it; the candidates'.
    """
    bits = (scores + 0.0).view(torch.int32)  # -0.0 is as near as 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    keys = (ordered << 32) + (0xFFFFFFFF - numbers)
    return keys.masked_fill_(scores == -torch.inf, NONE)


def of_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The scores, float32, and the candidates' numbers, int64, that `as_keys` made keys of; of NONE
    -inf and 0.
    """
    ordered = keys >> 32
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).int()
    scores = bits.view(torch.float32).masked_fill(keys == NONE, -torch.inf)
    return scores, (0xFFFFFFFF - (keys & 0xFFFFFFFF)).masked_fill(keys == NONE, 0)


def nearest(
    queries: Tensor,
    candidates: Blocks,
    k: int,
    limits: Tensor | None,
    hide: Callable[[Tensor, int], None],
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """Find for each query the nearest candidates whose score is not above its limit.

    Args:
        queries: float32 [N, D], on the device that works.
        candidates: a file of float32 [D]; a NaN tells that there is no vector.
        k: how many.
        limits: float32 [N]; None for no limits.
        hide: (scores [N, M], number of the first of M candidates) puts -inf where one does not
            count for a query.

    Returns:
        Scores float32 [N, k], the nearest first, -inf where there are no more; the candidates'
        numbers int64 [N, k], 0 there; and int64 [N], how many that count have a higher score than
        the limit.
    """
    best = torch.full((len(queries), k), NONE, device=queries.device)
    above = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    for start in range(0, candidates.count, CANDIDATES):
        rows = candidates.read(start, min(start + CANDIDATES, candidates.count))
        block = torch.from_numpy(rows).to(queries.device)
        bad = block[:, 0].isnan()
        scores = queries @ block.masked_fill(bad[:, None], 0).T
        scores.masked_fill_(bad, -torch.inf)
        hide(scores, start)
        if limits is not None:
            far = scores > limits[:, None]
            above += far.sum(1)
            scores.masked_fill_(far, -torch.inf)
        best = _merged(best, scores, start)
    scores, numbers = of_keys(best)
    return scores.cpu().numpy(), numbers.cpu().numpy(), above.cpu().numpy()


def _merged(best: Tensor, scores: Tensor, start: int) -> Tensor:
    """The k best keys of those that there are and of a block's, in order."""
    k = best.shape[1]
    numbers = torch.arange(start, start + scores.shape[1], device=scores.device)
    if scores.shape[1] <= k:
        return torch.cat([best, as_keys(scores, numbers)], 1).topk(k).values
    # keys of all would take three times as long; of equal scores `topk` takes any, and one more
    # tells whether some were left
    top, at = scores.topk(k + 1)
    keys = as_keys(top[:, :k], at[:, :k] + start)
    left = (top[:, k] == top[:, k - 1]) & (top[:, k] > -torch.inf)
    if bool(left.any()):
        keys[left] = as_keys(scores[left], numbers).topk(k).values
    return torch.cat([best, keys], 1).topk(k).values


def mixed(*words: NDArray[np.uint64] | int) -> NDArray[np.uint64]:
    """uint64 that look random, of words alone (splitmix64 over them in turn)."""
    state: Any = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):
        for word in words:
            state = state + np.asarray(word, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state
