"""The training objective: InfoNCE over embeddings plus next-token prediction, on one rank.

    L = InfoNCE(z_query, z_positive) + w(step) * NTP

Each rank computes its share; the mean of the shares over ranks is the exact loss of the global
batch, and so are their gradients. Source: arXiv 2604.11095, section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from btok_kernels.contrastive_loss import contrastive_loss


class Losses(NamedTuple):
    """One rank's shares, scalars: `total` to back-propagate, and its parts before weighting."""

    total: Tensor
    contrastive: Tensor
    ntp: Tensor


@dataclass(frozen=True)
class Objective:
    """L = InfoNCE + w NTP: its weights and choices.

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
        """w(step), the weight of the generative loss at a step, counted from 0."""
        return 0.0 if self.ntp_steps is not None and step >= self.ntp_steps else self.ntp_weight

    def weighted(self, contrastive: Tensor, ntp: Tensor | None, step: int) -> Losses:
        """`L = InfoNCE + w(step) * NTP` of this rank's shares of both; None for an NTP of 0."""
        ntp = contrastive.new_zeros(()) if ntp is None else ntp
        return Losses(contrastive + self.weight(step) * ntp, contrastive, ntp)

    def contrastive(self, embeddings: Tensor, ids: Tensor, num_groups: int = 1) -> Tensor:
        """This rank's share of InfoNCE.

        Args:
            embeddings: [(2 + h) * n, D], of n queries, their n positives, and h times n hard
                negatives.
            ids: int64 [n], equal where positives are interchangeable.
            num_groups: groups of equal size among the n pairs, one behind the other.
        """
        query, positive, *negatives = embeddings.split(len(ids))
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
        return torch.stack(losses).mean()
