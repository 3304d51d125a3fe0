"""The training objective on one rank: InfoNCE over embeddings plus the generative losses.

    L = c(step) * InfoNCE(z_query, z_positive) + w(step) * NTP + r * Reconstruction

InfoNCE is one loss, or the mean of one for each budget of bottleneck rows and each number of
components that the model learns to embed with, all of the rows of one pass:

    z_kd = normalize(mean(rows[:, :k, :d], 1))      dense; s = z_kd @ z_kd'
    V_kd = normalize(rows[:, :k, :d])               late; s = mean_a max_b V_kd[a] @ V_kd'[b]

Each rank computes its share; the mean of the shares over ranks is the exact loss of the global
batch, and so are their gradients. Sources: arXiv 2604.11095, section 3.3; nested components
(Matryoshka) arXiv 2205.13147; nested multi-vectors (MetaEmbed) arXiv 2509.18095.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from btok_kernels.contrastive_loss import contrastive_loss

Distillation = Literal["kl", "margin_mse"]


class Losses(NamedTuple):
    """One rank's shares, scalars: `total` to back-propagate, and its parts before weighting."""

    total: Tensor
    contrastive: Tensor
    ntp: Tensor
    reconstruction: Tensor


@dataclass(frozen=True)
class Objective:
    """The loss: its weights and choices.

    Args:
        temperature: of InfoNCE.
        ntp_weight: w while it lasts; 0 trains without the generative objective.
        ntp_steps: steps after which w is 0; None for never.
        negatives: "batch" (the whole global batch, as in the paper) or "group" (the pairs of a
            query's own group).
        budgets: numbers of bottleneck rows to embed with; empty for all alone.
        dims: numbers of components to embed in, besides all.
        multi_vector: share of the multi-vector loss in the contrastive one, from 0 to 1.
        margin, hardness: of `contrastive_loss`: candidates that are nearer than the positive by so
            much are dropped; those that are near weigh more.
        distillation: how a teacher's scores of the positive and the hard negatives are followed:
            "kl" (of the two softmaxes) or "margin_mse" (of the differences from the positive).
        distillation_weight: its weight beside InfoNCE; 0 without.
        teacher_temperature: that divides the teacher's scores, as `temperature` does ours.
        reconstruction_weight: r, of texts that are restored.
        contrastive_from: the step from which c is 1; before it, 0 (a compression warm-up).
    """

    temperature: float = 0.02
    ntp_weight: float = 5.0
    ntp_steps: int | None = None
    negatives: Literal["batch", "group"] = "batch"
    budgets: tuple[int, ...] = ()
    dims: tuple[int, ...] = ()
    multi_vector: float = 0.0
    margin: float | None = None
    hardness: float = 0.0
    distillation: Distillation = "kl"
    distillation_weight: float = 0.0
    teacher_temperature: float = 1.0
    reconstruction_weight: float = 0.0
    contrastive_from: int = 0

    @property
    def takes_rows(self) -> bool:
        """Whether `contrastive` is of bottleneck rows [N, K, D], not of embeddings [N, D]."""
        return bool(self.budgets) or self.multi_vector > 0

    def weight(self, step: int) -> float:
        """w(step), the weight of the generative loss at a step, counted from 0."""
        return 0.0 if self.ntp_steps is not None and step >= self.ntp_steps else self.ntp_weight

    def contrasts(self, step: int) -> bool:
        """Whether there is a contrastive loss at a step."""
        return step >= self.contrastive_from

    def weighted(
        self, contrastive: Tensor, ntp: Tensor | None, step: int, restored: Tensor | None = None
    ) -> Losses:
        """`L = InfoNCE + w(step) * NTP + r * Reconstruction` of this rank's shares; None for 0."""
        nothing = contrastive.new_zeros(())
        ntp = nothing if ntp is None else ntp
        total = contrastive + self.weight(step) * ntp
        if restored is not None:
            total = total + self.reconstruction_weight * restored
        return Losses(total, contrastive, ntp, nothing if restored is None else restored)

    def views(self, vectors: Tensor) -> Iterator[tuple[float, Tensor]]:
        """Yield (share of the loss, what is compared): embeddings [N, d], or bottleneck rows [N, k,
        d].

        Args:
            vectors: [N, K, D] bottleneck rows where the objective `takes_rows`, or embeddings
                [N, D] at length 1.
        """
        *_, number, dim = vectors.shape
        if vectors.ndim == 2:
            yield 1 / (1 + len(self.dims)), vectors
            for d in self.dims:
                yield 1 / (1 + len(self.dims)), F.normalize(vectors[:, :d], dim=-1)
            return
        budgets, dims = self.budgets or (number,), (*self.dims, dim)
        share = 1 / (len(budgets) * len(dims))
        for k in budgets:
            for d in dims:
                rows = vectors[:, :k, :d]
                if self.multi_vector < 1:
                    pooled = F.normalize(rows.mean(1), dim=-1)
                    yield share * (1 - self.multi_vector), pooled
                if self.multi_vector:
                    yield share * self.multi_vector, F.normalize(rows, dim=-1)

    def contrastive(
        self,
        vectors: Tensor,
        ids: Tensor,
        num_groups: int = 1,
        scores: Tensor | None = None,
        row_weight: float | None = None,
    ) -> Tensor:
        """This rank's share of InfoNCE, and of the distillation of a teacher.

        Args:
            vectors: as `views` takes them, of n queries, their n positives, and h times n hard
                negatives.
            ids: int64 [n], equal where positives are interchangeable.
            num_groups: groups of equal size among the n pairs, one behind the other.
            scores: [n, 1 + h], a teacher's, of the positive and the hard negatives.
            row_weight: of a pair in the mean over all ranks' pairs, times the ranks; None for 1/n.
        """
        total = []
        for share, view in self.views(vectors):
            loss = self._infonce(view, ids, num_groups)
            if self.distillation_weight and scores is not None:
                follows = self._distilled(view, scores).sum() * (row_weight or 1 / len(ids))
                loss = loss + self.distillation_weight * follows
            total.append(share * loss)
        return torch.stack(total).sum() if len(total) > 1 else total[0]

    def _infonce(self, vectors: Tensor, ids: Tensor, num_groups: int) -> Tensor:
        query, positive, *negatives = vectors.split(len(ids))
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
                margin=self.margin,
                group=None if whole else "local",
                hardness=self.hardness,
            )
            for q, p, i, *hard in chunks
        ]
        return torch.stack(losses).mean()

    def _distilled(self, vectors: Tensor, scores: Tensor) -> Tensor:
        """[n], how far each query's own candidates are from where the teacher has them."""
        query, *candidates = vectors.split(len(scores))
        keys = torch.stack(candidates, 1)  # [n, 1 + h, d], or [n, 1 + h, k, d]
        if vectors.ndim == 2:
            similarity = torch.einsum("nd,ncd->nc", query, keys)
        else:
            similarity = torch.einsum("nad,ncbd->ncab", query, keys).amax(-1).mean(-1)
        ours = similarity / self.temperature
        teacher = scores.to(ours) / self.teacher_temperature
        if self.distillation == "kl":
            ours, teacher = ours.log_softmax(1), teacher.log_softmax(1)
            return (teacher.exp() * (teacher - ours)).sum(1)
        apart = (ours[:, :1] - ours[:, 1:]) - (teacher[:, :1] - teacher[:, 1:])
        return apart.square().mean(1)
