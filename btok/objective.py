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

from btok.model import BTokOutput
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
