"""One training step on one rank: the loss of this rank's pairs, and its gradients.

Losses and gradients are means over ranks, exactly those of the whole batch in one process.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from btok.data.records import Pair
from btok.model import BTokModel
from btok.objective import Losses, pair_samples, positive_ids
from btok.packing import pack
from btok.processing import Processor
from train.recipes import Recipe


def train_step(
    model: BTokModel, processor: Processor, recipe: Recipe, pairs: Sequence[Pair], step: int
) -> Losses:
    """Forward and backward of this rank's pairs; losses and gradients are means over ranks."""
    captioning, objective = step < recipe.caption_steps, recipe.objective
    step -= recipe.caption_steps
    samples = pair_samples(
        pairs,
        processor,
        ntp_side=None if captioning else recipe.ntp_side,
        generate=captioning or objective.weight(step) > 0,
    )
    batch = pack(
        [sample for sample in samples if not captioning or sample[1] is not None],
        btok_token_ids=() if captioning else model.btok_token_ids,
        prefix_ids=processor.prefix_ids,
        suffix_ids=processor.suffix_ids,
        backbone_config=model.backbone.config,
        target_positions=model.target_positions,
        condense=recipe.condense and not captioning,
    ).to(model.backbone.device)
    output = model(batch)
    count = model.ntp_count(batch)
    all_counts = float(mean_over_ranks(torch.tensor(count, dtype=torch.float64)))
    ntp_scale = count / max(all_counts, 1e-9)
    if captioning:
        assert output.ntp_loss is not None
        ntp = output.ntp_loss * ntp_scale
        losses = Losses(ntp, torch.zeros_like(ntp), ntp)
    else:
        losses = objective(
            output,
            positive_ids(pairs, rank()),
            step=step,
            num_groups=recipe.groups_per_batch // world(),
            ntp_scale=ntp_scale,
        )
    losses.total.backward()
    average_gradients(model)
    return Losses(*mean_over_ranks(torch.stack(losses).detach()))


def average_gradients(model: torch.nn.Module) -> None:
    """Make every gradient its mean over ranks, a missing one counting as zero."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = mean_over_ranks(torch.cat([gradient.flatten() for gradient in gradients]))
    for p, mean in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = mean.view_as(p)


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean; may change `value`."""
    if world() > 1:
        dist.all_reduce(value)
    return value / world()


def rank() -> int:
    """Of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1
