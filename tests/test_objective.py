"""The training objective."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from btok.objective import Objective


def test_the_loss_is_infonce_plus_weighted_generation():
    generator = torch.Generator().manual_seed(0)
    z = F.normalize(torch.randn(8, 16, generator=generator, dtype=torch.float64), dim=1)
    ids = torch.tensor([1, 2, 2, 3])
    ntp = torch.tensor(1.0, dtype=torch.float64)

    def info_nce(rows):
        losses = []
        for i in rows:
            logits = {j: float(z[i] @ z[4 + j]) / 0.05 for j in rows if i == j or ids[i] != ids[j]}
            total = torch.tensor(list(logits.values())).logsumexp(0)
            losses.append(float(total) - logits[i])
        return sum(losses) / len(losses)

    batch = Objective(temperature=0.05, ntp_weight=5.0, ntp_steps=3)
    losses = batch.weighted(batch.contrastive(z, ids), ntp, step=2)
    assert float(losses.contrastive) == pytest.approx(info_nce(range(4)), abs=1e-6)
    assert float(losses.ntp) == 1.0
    assert float(losses.total) == pytest.approx(float(losses.contrastive) + 5.0)
    assert float(batch.weighted(losses.contrastive, ntp, step=3).total) == float(losses.contrastive)

    group = Objective(temperature=0.05, ntp_weight=0.0, negatives="group")
    losses = group.weighted(group.contrastive(z, ids, num_groups=2), ntp, step=0)
    expected = (info_nce([0, 1]) + info_nce([2, 3])) / 2
    assert float(losses.total) == pytest.approx(expected, abs=1e-6)


def test_a_batch_without_targets_trains_on_contrast_alone():
    z = F.normalize(torch.randn(4, 8), dim=1)
    contrastive = Objective().contrastive(z, torch.tensor([1, 2]))
    losses = Objective().weighted(contrastive, None, step=0)
    assert float(losses.ntp) == 0 and losses.total == losses.contrastive
