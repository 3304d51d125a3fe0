"""The training objective: InfoNCE over embeddings plus next-token prediction, on one rank.

    L = InfoNCE(z_query, z_positive) + w(step) * NTP

Each rank computes its share; the mean of the shares over ranks is the exact loss of the global
batch, and so are their gradients. Source: arXiv 2604.11095, section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from btok.data.records import NTP_SIDES, Pair, Side
from btok.model import BTokOutput
from btok.packing import Sample
from btok_kernels.contrastive_loss import contrastive_loss


class Losses(NamedTuple):
    """One rank's shares, scalars: `total` to back-propagate, and its parts before weighting."""

    total: Tensor
    contrastive: Tensor
    ntp: Tensor


@dataclass(frozen=True)
class Objective:
    """The loss's weights and choices.

    Args:
        temperature: of InfoNCE.
        ntp_weight: w while it lasts; 0 trains without the generative objective.
        ntp_steps: steps after which w is 0; None for never.
        negatives: "batch" (the whole global batch, as in the paper) or "group" (the pairs of a
            query's own group).
    """

    temperature: float = 0.02
    ntp_weight: float = 5.0
    ntp_steps: int | None = None
    negatives: Literal["batch", "group"] = "batch"

    def weight(self, step: int) -> float:
        """w(step), steps counted from 0."""
        return 0.0 if self.ntp_steps is not None and step >= self.ntp_steps else self.ntp_weight

    def __call__(
        self,
        output: BTokOutput,
        ids: Tensor,
        *,
        step: int,
        num_groups: int = 1,
        ntp_scale: float = 1.0,
    ) -> Losses:
        """This rank's share of the loss.

        Args:
            output: of a batch of n queries, their n positives, and h times n hard negatives.
            ids: int64 [n], equal where positives are interchangeable.
            step: from 0, for the schedule.
            num_groups: groups of equal size among the n pairs, one behind the other.
            ntp_scale: this rank's targets over the mean number of targets per rank.
        """
        query, positive, *negatives = output.embeddings.split(len(ids))
        parts = [query, positive, ids]
        if negatives:
            parts.append(torch.stack(negatives, dim=1))  # [n, h, D]
        whole = self.negatives == "batch"
        chunks = zip(*(t.chunk(1 if whole else num_groups) for t in parts), strict=True)
        losses = [
            contrastive_loss(
                q,
                p,
                temperature=self.temperature,
                negatives=hard[0] if hard else None,
                query_ids=i,
                key_ids=i,
                group=None if whole else "local",
            )
            for q, p, i, *hard in chunks
        ]
        contrastive = torch.stack(losses).mean()
        ntp = contrastive.new_zeros(()) if output.ntp_loss is None else output.ntp_loss * ntp_scale
        return Losses(contrastive + self.weight(step) * ntp, contrastive, ntp)


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


def positive_ids(pairs: Sequence[Pair], rank: int = 0) -> Tensor:
    """int64 [n]: equal for pairs whose positives are interchangeable, whatever rank holds them."""
    names = [
        f"\0{rank}\0{n}" if pair.positive_id is None else f"{pair.dataset}\0{pair.positive_id}"
        for n, pair in enumerate(pairs)
    ]
    digests = [blake2b(name.encode(), digest_size=8).digest() for name in names]
    return torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in digests])
