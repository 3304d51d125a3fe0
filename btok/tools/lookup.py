"""Which texts came, and where in a table they stand, in a few bytes of memory each.

An index may hold a hundred million rows: their ids are too many for a set or a dict of every
process, and to read all of them again for every few thousand files would take time that grows with
the square of their number.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

DIGEST = 16  # bytes, of which two texts have the same by chance once in 10^22 among 10^8


class Came:
    """Texts that came, 16 bytes each: digests in sorted runs, each over twice as long as the next,
    so that all additions together take n log n.
    """

    def __init__(self) -> None:
        self.runs: list[NDArray[np.bytes_]] = []

    def add(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """bool [N]: of each whether it came before, or earlier among these."""
        digests = [blake2b(text.encode(), digest_size=DIGEST).digest() for text in texts]
        again = np.ones(len(texts), bool)
        values, first = np.unique(np.array(digests, f"S{DIGEST}"), return_index=True)
        new = np.ones(len(values), bool)
        for run in self.runs:
            at = np.searchsorted(run, values)
            new &= run[np.minimum(at, len(run) - 1)] != values
        again[first] = ~new
        if new.any():
            self.runs.append(values[new])
        while len(self.runs) > 1 and len(self.runs[-2]) <= 2 * len(self.runs[-1]):
            self.runs.append(np.sort(np.concatenate((self.runs.pop(), self.runs.pop()))))
        return again


class Places:
    """Where in a column each text stands, 24 bytes a row.

    Args:
        batches: the column's texts, None for a row without one, and the numbers that the table has
            for these rows, some at a time.
    """

    def __init__(self, batches: Iterable[tuple[Sequence[str | None], NDArray[np.uint64]]]) -> None:
        found = [(np.empty(0, np.int64), np.empty(0, np.uint64))]
        for texts, numbers in batches:
            found.append((np.fromiter(map(hash, texts), np.int64, len(texts)), numbers))
        hashes, self.numbers = map(np.concatenate, zip(*found, strict=True))
        self.rows = np.argsort(hashes, kind="stable")
        self.hashes = hashes[self.rows]

    def find(self, texts: Iterable[str]) -> NDArray[np.int64]:
        """Rows that may have one of these texts, in order, by their place in the column: all that
        have, and others whose hash is the same by chance.
        """
        wanted = np.array([hash(text) for text in texts], np.int64)
        first = np.searchsorted(self.hashes, wanted, "left")
        last = np.searchsorted(self.hashes, wanted, "right")
        ranges = [self.rows[a:b] for a, b in zip(first, last, strict=True) if b > a]
        return np.unique(np.concatenate(ranges)) if ranges else np.empty(0, np.int64)

    def alike(self) -> NDArray[np.int64]:
        """Rows that may have the text of another one, in order: as `find`, by their hashes."""
        same = self.hashes[1:] == self.hashes[:-1]
        return np.unique(np.concatenate([self.rows[1:][same], self.rows[:-1][same]]))
