"""One training step on one rank: the loss of this rank's pairs, and its gradients.

Losses and gradients are means over ranks, exactly those of the whole batch in one process. A step's
samples are split into microbatches, a packed pass each. Three ways lead through them: `at_once`,
`by_gradcache` with the same gradients in less memory, and `caption`, without bottleneck tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from btok import adapters
from btok.data.records import Pair
from btok.data.samples import positive_ids
from btok.model import BTokModel, BTokOutput
from btok.objective import Losses
from btok.packing import Sample, count_labels, group_by_tokens, pack
from btok.processing import Processor
from btok.vision import vision_of
from btok_kernels.ranks import rank, world
from train.checkpoint import random_state, set_random_state
from train.parallel import average_gradients, mean_over_ranks
from train.recipes import Recipe


class Microbatch(NamedTuple):
    """Samples of one packed pass, and their places among those of the step."""

    places: list[int]
    samples: list[Sample]


class StepResult(NamedTuple):
    """The losses of a step, means over ranks; the tokens that all ranks packed for it, and the
    operations that these and their images need of the model.
    """

    losses: Losses
    tokens: int
    flops: float


Forward = Callable[[Sequence[Sample]], BTokOutput]  # with a share of the step's generative loss
Contrast = Callable[[Tensor], Tensor]  # the contrastive loss of a step's embeddings
Weigh = Callable[[Tensor, Tensor | None], Losses]  # contrastive and generative loss as one


def train_step(
    model: BTokModel,
    processor: Processor,
    recipe: Recipe,
    pairs: Sequence[Pair],
    samples: Sequence[Sample],
    step: int,
    captioning: bool = False,
) -> StepResult:
    """Forward and backward of this rank's pairs; gradients are left in the parameters.

    Args:
        samples: of the pairs, as `pair_samples` gives them.
        step: from 0, for the schedule of the objective.
        captioning: the generative loss alone, of plain causal rows without bottleneck tokens.
    """
    if captioning:
        samples = [sample for sample in samples if sample[1] is not None]
    patches = count_patches(samples)
    if recipe.reuse_vision and is_frozen(model):
        samples = cache_vision_features(model, samples, recipe.vision_memory, recipe.chunk_tokens)
    forward = _packed_forward(model, processor, recipe, samples, captioning)
    lengths = [sum(map(_length, sample)) for sample in samples]
    microbatches = split(samples, lengths, recipe.chunk_tokens)
    ids = positive_ids(pairs, rank()).to(model.backbone.device)  # where the embeddings are
    groups = recipe.groups_per_batch // world()
    contrast = partial(recipe.objective.contrastive, ids=ids, num_groups=groups)
    weigh = partial(recipe.objective.weighted, step=step)
    with adapters.norms_once(model.backbone):
        if captioning:
            losses = caption(forward, microbatches)
        elif recipe.gradcache:
            losses = by_gradcache(model, forward, microbatches, contrast, weigh)
        else:
            losses = at_once(forward, microbatches, contrast, weigh)
    # once, behind all passes: a rank may have more of them than another
    average_gradients(model)
    tokens = sum(lengths) + (0 if captioning else len(samples) * len(model.btok_token_ids))
    worked = torch.tensor([tokens, model_flops(model, tokens, patches)], dtype=torch.float64)
    total, flops = (mean_over_ranks(worked) * world()).tolist()
    return StepResult(Losses(*mean_over_ranks(torch.stack(losses).detach())), round(total), flops)


def _packed_forward(
    model: BTokModel,
    processor: Processor,
    recipe: Recipe,
    samples: Sequence[Sample],
    captioning: bool,
) -> Forward:
    """The model on some of these samples, in one packed pass."""
    of_target: dict[str, Any] = {
        "prefix_ids": processor.prefix_ids,
        "suffix_ids": processor.suffix_ids,
        "backbone_config": model.backbone.config,
    }
    packing = {
        **of_target,
        "btok_token_ids": () if captioning else model.btok_token_ids,
        "target_positions": model.settings.target_positions,
        "condense": recipe.condense and not captioning,
    }
    counts = count_labels([target for _, target in samples if target is not None], **of_target)
    mine = counts[0 if model.settings.ntp_reduction == "sample_mean" else 1]
    # all ranks' mean, so that a target weighs the same on a rank that has few of them
    count = max(float(mean_over_ranks(torch.tensor(mine, dtype=torch.float64))), 1e-9)
    device, half = model.backbone.device, recipe.dtype == "bfloat16"

    def forward(some: Sequence[Sample]) -> BTokOutput:
        batch = pack(some, **packing).to(device)
        # adapters are fp32, their products need not be
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            embeddings, ntp = model(batch)
        share = None if ntp is None else ntp * (model.ntp_count(batch) / count)
        return BTokOutput(embeddings, share)

    return forward


def split(samples: Sequence[Sample], lengths: list[int], tokens: int | None) -> list[Microbatch]:
    """Microbatches of so many tokens at most, the largest first; all samples in one for None."""
    turns = [list(range(len(samples)))]
    if tokens is not None:
        # largest first, so that a memory too small for a step shows in its first pass
        longest = sorted(turns[0], key=lengths.__getitem__, reverse=True)
        turns = group_by_tokens([lengths[place] for place in longest], tokens)
        turns = [[longest[at] for at in turn] for turn in turns]
    return [Microbatch(places, [samples[place] for place in places]) for places in turns]


def at_once(
    forward: Forward, microbatches: Sequence[Microbatch], contrast: Contrast, weigh: Weigh
) -> Losses:
    """One backward through all microbatches, whose activations are kept until then."""
    outputs = [forward(samples) for _, samples in microbatches]
    embeddings = _as_they_came([output.embeddings for output in outputs], microbatches)
    losses = weigh(contrast(embeddings), _sum([output.ntp_loss for output in outputs]))
    losses.total.backward()
    return losses


def by_gradcache(
    model: BTokModel,
    forward: Forward,
    microbatches: Sequence[Microbatch],
    contrast: Contrast,
    weigh: Weigh,
) -> Losses:
    """The gradients of `at_once` with the activations of one microbatch (arXiv 2101.06983).

    Embed all without gradients; the contrastive loss and its gradients of the embeddings; then
    each microbatch again, whose backward takes those and its generative loss.
    """
    was_training, states, parts = model.training, [], []
    dropping = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
    # in eval mode the last layer runs for the pooled rows alone; but with dropout both passes must
    # run the same rows, targets included, so that they draw the same
    model.train(was_training and dropping)
    with torch.no_grad():
        for _, samples in microbatches:
            states.append(random_state())
            some = samples if dropping else [(source, None) for source, _ in samples]
            parts.append(forward(some).embeddings)
    model.train(was_training)
    embeddings = _as_they_came(parts, microbatches).requires_grad_()
    contrastive = contrast(embeddings)
    contrastive.backward()
    assert embeddings.grad is not None
    ntps = []
    for (places, samples), state in zip(microbatches, states, strict=True):
        if dropping:
            set_random_state(state)
        part, ntp = forward(samples)
        # in the contrastive loss's place, what has its gradients of this part
        weigh((part * embeddings.grad[places]).sum(), ntp).total.backward()
        ntps.append(None if ntp is None else ntp.detach())
    return weigh(contrastive.detach(), _sum(ntps))


def caption(forward: Forward, microbatches: Sequence[Microbatch]) -> Losses:
    """The generative loss alone, each microbatch's backward at once."""
    ntps = []
    for _, samples in microbatches:
        ntp = forward(samples).ntp_loss
        assert ntp is not None
        ntp.backward()
        ntps.append(ntp.detach())
    total = sum(ntps[1:], ntps[0])
    return Losses(total, torch.zeros_like(total), total)


def _as_they_came(parts: Sequence[Tensor], microbatches: Sequence[Microbatch]) -> Tensor:
    """The microbatches' embeddings in the order of the step's samples."""
    # of one microbatch too: its samples are sorted by length
    order = torch.tensor([place for places, _ in microbatches for place in places])
    return torch.cat(list(parts))[order.argsort().to(parts[0].device)]


def _sum(values: Sequence[Tensor | None]) -> Tensor | None:
    there = [value for value in values if value is not None]
    return torch.stack(there).sum() if len(there) > 1 else (there[0] if there else None)


def _length(side: Mapping[str, Any] | None) -> int:
    return 0 if side is None else torch.as_tensor(side["input_ids"]).numel()


def _patches(samples: Sequence[Sample]) -> dict[int, tuple[Mapping[str, Any], int]]:
    """By identity each side that shows something, wherever it stands, and its patches."""
    sides = {id(side): side for sample in samples for side in sample if side is not None}
    counts = {name: sum(sum(v.patches) for v in vision_of(side)) for name, side in sides.items()}
    return {name: (side, counts[name]) for name, side in sides.items() if counts[name]}


def count_patches(samples: Sequence[Sample]) -> int:
    """Patches of all images and videos, each counted once, wherever it stands."""
    return sum(count for _, count in _patches(samples).values())


def model_flops(model: BTokModel, tokens: int, patches: int) -> float:
    """Operations of a step, by the common count: 2 per token and weight of the layers forward, 2
    for the gradient that goes on, 2 for the weight's own where it trains. Whatever is computed
    twice (GradCache, checkpointing), attention's square and the logits are left out.
    """
    tower = model.family.tower(model.backbone)
    parts = [(model.family.decoder(model.backbone).layers, tokens)]
    parts += [(tower, patches)] if tower is not None else []
    total = 0.0
    for part, count in parts:
        weights = [p for p in part.parameters() if p.ndim > 1]
        every, trained = (
            sum(p.numel() for p in some)
            for some in (weights, [p for p in weights if p.requires_grad])
        )
        total += count * (2 * every + 2 * trained + (2 * every if trained else 0))
    return total


def is_frozen(model: BTokModel) -> bool:
    """Whether there is a vision tower and nothing in it trains."""
    tower = model.family.tower(model.backbone)
    return tower is not None and not any(p.requires_grad for p in tower.parameters())


def cache_vision_features(
    model: BTokModel, samples: Sequence[Sample], memory: int, tokens: int | None = None
) -> list[Sample]:
    """The samples with vision features, each side's made once, wherever it stands.

    Args:
        memory: bytes of features that stay on the device; later ones wait on the host.
        tokens: of which the tower makes as many in one pass, at most; a larger side is alone.
    """
    rules = model.family.vision
    assert rules is not None
    patches = (tokens or 1 << 13) * rules.merge_size(model.backbone.config) ** 2
    showing = _patches(samples)
    names, found = list(showing), dict[int, Any]()
    for turn in group_by_tokens([count for _, count in showing.values()], patches):
        made = model.encode_vision([showing[names[i]][0] for i in turn])
        for i, side in zip(turn, made, strict=True):
            for at, vision in enumerate(side["vision"]):
                memory -= sum(level.nbytes for level in vision.features)
                side["vision"][at] = vision if memory >= 0 else vision.to("cpu")
            found[names[i]] = side

    def features(side: Any) -> Any:
        return found.get(id(side), side)

    return [(features(source), features(target)) for source, target in samples]
