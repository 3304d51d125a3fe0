"""Pairs become samples to pack, and ids that tell which positives are interchangeable."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from btok.data.records import NTP_SIDES, Pair, Side
from btok.packing import Sample


def pair_samples(
    pairs: Sequence[Pair],
    process: Callable[[Side], Mapping[str, Any]],
    *,
    ntp_side: str | None = None,
    generate: bool = True,
) -> list[Sample]:
    """Pairs as samples to pack: n queries, then n positives, then each one's first hard negative,
    its second, ...; queries and positives with what they must generate.

    Args:
        pairs: n training examples with equal numbers of negatives, else a ValueError.
        process: the processor.
        ntp_side: in place of every pair's own; None to keep those.
        generate: False leaves all targets out.
    """
    if ntp_side not in (None, *NTP_SIDES):
        raise ValueError(f"pair_samples: ntp_side is {ntp_side!r}, expected one of {NTP_SIDES}")
    if len(counts := {len(pair.negatives) for pair in pairs}) > 1:
        raise ValueError(
            f"pair_samples: pairs have {sorted(counts)} negatives, expected one number"
        )
    queries: list[Sample] = []
    positives: list[Sample] = []
    for pair in pairs:
        query, positive = process(pair.query), process(pair.positive)
        side = (ntp_side or pair.ntp_side) if generate else "none"
        written = None if pair.target is None else process(Side(text=pair.target))
        queries.append((query, (written or positive) if side in ("positive", "both") else None))
        positives.append((positive, (written or query) if side in ("query", "both") else None))
    hard = zip(*(pair.negatives for pair in pairs), strict=True)
    return queries + positives + [(process(side), None) for sides in hard for side in sides]


def to_restore(target: Mapping[str, Any], rate: float, draws: np.ndarray) -> dict[str, Any]:
    """A text of which some tokens are hidden, to be restored from the bottleneck tokens.

    Args:
        target: a text as the processor gives it.
        rate: the share of its tokens that is hidden; at least one is.
        draws: uint64, a random number for each token.
    """
    ids = np.asarray(target["input_ids"]).reshape(-1)
    masked = draws < rate * 2.0**64
    masked[draws.argmin()] = True
    return {"input_ids": ids, "masked": masked}


def positive_ids(pairs: Sequence[Pair], rank: int = 0) -> Tensor:
    """int64 [n]: equal for pairs whose positives are interchangeable, whatever rank holds them."""
    names = [
        f"\0{rank}\0{n}" if pair.positive_id is None else f"{pair.dataset}\0{pair.positive_id}"
        for n, pair in enumerate(pairs)
    ]
    digests = [blake2b(name.encode(), digest_size=8).digest() for name in names]
    return torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in digests])
