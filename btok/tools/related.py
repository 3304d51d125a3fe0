"""What rows of pairs have to do with each other: which show the same, and which positives are right
for a query.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from btok.data.jsonl import JsonLines
from btok.data.records import Side
from btok.data.sources import Source
from btok.files import one_line, sha256, whole
from btok.inputs import Page

ABSENT = -1  # in the place of a query or a candidate


class Related(NamedTuple):
    """The relations between a data set's rows: which show the same, and which positives are right.

    Args:
        query_of, candidate_of: int64 [rows], which different query and positive a row has; ABSENT
            for a row that cannot be read.
        queries, candidates: int64, the row that each comes first in.
        keys: uint64, of the content of the queries and of the candidates.
        groups: of each query the groups of candidates that are right for it, as `begins` cuts them.
        members: of each group its candidates, as `lists` gives them.
        allowed: int64 [queries], how many candidates are no positive of each.
        unreadable: by row why it cannot be read.
    """

    query_of: NDArray[np.int64]
    candidate_of: NDArray[np.int64]
    queries: NDArray[np.int64]
    candidates: NDArray[np.int64]
    keys: tuple[NDArray[np.uint64], NDArray[np.uint64]]
    groups: NDArray[np.int64]
    begins: NDArray[np.int64]
    members: tuple[NDArray[np.int64], NDArray[np.int64]]
    allowed: NDArray[np.int64]
    unreadable: Mapping[int, str]


def looked(source: Source, path: Path) -> tuple[NDArray[np.uint64], dict[int, str]]:
    """Digests of each row's query, positive and id, uint64 [rows, 3], 0 for no id; and by row why
    it cannot be read.

    Kept in a file, as all files that rows name are read for them.
    """
    try:
        with np.load(path) as kept:
            names = json.loads(kept["unreadable"].tobytes())
            return kept["digests"], {int(row): why for row, why in names.items()}
    except Exception:  # none is there; of a damaged one numpy and its zip files raise several kinds
        pass
    digests, unreadable = np.zeros((len(source), 3), np.uint64), dict[int, str]()
    for row in tqdm(range(len(source)), desc=f"looking at {source.name}", disable=None):
        try:
            pair = source[row]
            name = pair.positive_id or "\0"
            own = 0 if name.startswith("\0") else max(digest(name), 1)
            digests[row] = digest(shown(pair.query)), digest(shown(pair.positive)), own
        except (OSError, ValueError) as error:
            unreadable[row] = one_line(error)
    said = np.frombuffer(json.dumps(unreadable).encode(), np.uint8)
    with whole(path) as draft, open(draft, "wb") as file:
        np.savez(file, digests=digests, unreadable=said)
    return digests, unreadable


def digest(text: str) -> int:
    """64 bits of a text."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest())


def shown(side: Side) -> str:
    """A key of a side, the same for sides that show the same, by whatever names."""
    several = not isinstance(side.video, str | Path)
    seen = [*side.images], [*side.video] if several else [side.video], [*side.frame_seconds]
    return json.dumps([side.text, several, *seen], default=_content)


def _content(seen: Any) -> Any:
    if isinstance(seen, Page):
        return [_sha256(seen.path), seen.number]
    return _sha256(seen)


@lru_cache(maxsize=4096)
def _sha256(path: Path) -> str:
    return sha256(path)


def relate(digests: NDArray[np.uint64], unreadable: Mapping[int, str]) -> Related:
    """Which queries and positives are the same, and which positives are right for a query: those
    of all rows with this query, and those that share an id with one of them, also by way of others.
    """
    good = np.ones(len(digests), bool)
    good[[*unreadable]] = False
    rows = np.flatnonzero(good)
    query_of, candidate_of = (np.full(len(digests), ABSENT) for _ in range(2))
    query_keys, first, query_of[rows] = distinct(digests[rows, 0])
    queries = rows[first]
    candidate_keys, first, candidate_of[rows] = distinct(digests[rows, 1])
    candidates = rows[first]
    named = rows[digests[rows, 2] > 0]
    _, _, names = distinct(digests[named, 2])
    group = joined(candidate_of[named], names, len(candidates))
    count = int(group.max(initial=-1)) + 1
    pairs = np.unique(query_of[rows] * count + group[candidate_of[rows]])
    of_query, groups = np.divmod(pairs, max(count, 1))
    right = np.zeros(len(queries), np.int64)
    np.add.at(right, of_query, np.bincount(group, minlength=count)[groups])
    return Related(
        query_of=query_of,
        candidate_of=candidate_of,
        queries=queries,
        candidates=candidates,
        keys=(query_keys, candidate_keys),
        groups=groups,
        begins=np.searchsorted(of_query, np.arange(len(queries) + 1)),
        members=lists(group, count),
        allowed=len(candidates) - right,
        unreadable=unreadable,
    )


def distinct(
    values: NDArray[np.uint64],
) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]:
    """Different values in the order in which they come, where each comes first, and of all which
    one it is."""
    found, first, which = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    return found[order], first[order], place[which]


def joined(places: NDArray[np.int64], names: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """int64 [count]: equal for places that are together under a name, or by way of others, and from
    0 on.

    Args:
        places, names: int64 [n], from 0 on; place i is under name i.
        count: of places.
    """
    labels = np.arange(count)
    while len(places):
        least = np.full(names.max() + 1, count)
        np.minimum.at(least, names, labels[places])
        lower = labels.copy()
        np.minimum.at(lower, places, least[names])
        if (lower == labels).all():
            break
        labels = lower
    return np.unique(labels, return_inverse=True)[1]


def lists(of: NDArray[np.int64], count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The places of each value from 0 to count - 1: all places in order, and where each value's
    begin.

    Value v is at `places[begins[v] : begins[v + 1]]`, ascending.
    """
    places = np.argsort(of, kind="stable")
    return places, np.searchsorted(of[places], np.arange(count + 1))


class Hidden:
    """Puts -inf where a candidate is right for a query.

    Args:
        related: of the data set.
        asking: int64 [N], the queries.
    """

    def __init__(self, related: Related, asking: NDArray[np.int64]) -> None:
        self.of: list[list[NDArray[np.int64]]] = []  # views of each group's candidates, in order
        places, begins = related.members
        for query in asking.tolist():
            groups = related.groups[related.begins[query] : related.begins[query + 1]].tolist()
            self.of.append([places[begins[group] : begins[group + 1]] for group in groups])
        # most queries have one candidate alone
        self.single = [len(own) == 1 and len(own[0]) == 1 for own in self.of]
        self.rows = np.flatnonzero(self.single)
        self.only = np.array([self.of[row][0][0] for row in self.rows], np.int64)
        self.others = np.flatnonzero(~np.array(self.single, bool))

    def __call__(self, scores: Tensor, start: int) -> None:
        stop = start + scores.shape[1]
        within = (self.only >= start) & (self.only < stop)
        at = self.rows[within], self.only[within] - start
        scores[tuple(torch.from_numpy(each).to(scores.device) for each in at)] = -torch.inf
        for row in self.others.tolist():
            for own in self.of[row]:
                first, last = np.searchsorted(own, (start, stop))
                if first < last:
                    columns = torch.from_numpy(own[first:last] - start).to(scores.device)
                    scores[row, columns] = -torch.inf


def lines_of(source: Source) -> JsonLines:
    """The lines of a JSONL file's pairs."""
    assert isinstance(source.rows, JsonLines)
    return source.rows


def at_line(source: Source, row: int) -> str:
    """The file and line of a row."""
    rows, line = lines_of(source), 1
    start = int(rows.starts[row])
    with open(rows.path, "rb") as file:
        while start > 0 and (read := file.read(min(start, 1 << 20))):
            line += read.count(b"\n")
            start -= len(read)
    return f"{rows.path}:{line}"
