"""One training step on one rank: the loss of this rank's pairs, and its gradients.

Losses and gradients are means over ranks, exactly those of the whole batch in one process. A step's
samples are split into microbatches, a packed pass each. Three ways lead through them: `at_once`,
`by_gradcache` with the same gradients in less memory, and `generate`, without a contrastive loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from btok import adapters
from btok.data.records import Pair
from btok.data.samples import positive_ids
from btok.model import BTokModel
from btok.objective import Losses
from btok.packing import PackedBatch, group_by_tokens
from btok.vision import Vision
from btok_kernels.layout import on_device
from btok_kernels.ranks import rank, world
from train import parallel
from train.checkpoint import random_state, set_random_state
from train.microbatches import Microbatch
from train.recipes import Recipe


class StepResult(NamedTuple):
    """The losses of a step, means over ranks; the tokens that all ranks packed for it, and the
    operations that these and their images need of the model.
    """

    losses: Losses
    tokens: int
    flops: float


class Passed(NamedTuple):
    """A microbatch's embeddings or bottleneck rows, as the objective takes them, and its shares of
    the step's generative losses.
    """

    vectors: Tensor
    ntp: Tensor | None
    restored: Tensor | None


Forward = Callable[..., Passed]
Contrast = Callable[[Tensor], Tensor]  # the contrastive loss of a step's vectors
Weigh = Callable[..., Losses]  # contrastive loss, NTP and reconstruction as one


def train_step(
    model: BTokModel,
    recipe: Recipe,
    pairs: Sequence[Pair],
    microbatches: Sequence[Microbatch],
    step: int,
    filler: Microbatch | None = None,
) -> StepResult:
    """Forward and backward of this rank's pairs; gradients are left in the parameters.

    Args:
        microbatches: of the pairs' samples, as `train.microbatches.Packing` makes them.
        step: from 0, for the schedule of the objective.
        filler: run where another rank has more microbatches and weights lie on all ranks.
    """
    patches, tokens = count_patches(microbatches), sum(len(m.batch.input_ids) for m in microbatches)
    # largest first, so that a memory too small for a step shows in its first pass
    microbatches = sorted(microbatches, key=lambda m: -len(m.batch.input_ids))
    if recipe.reuse_vision and is_frozen(model):
        microbatches = cache_vision_features(
            model, microbatches, recipe.vision_memory, recipe.chunk_tokens
        )
    if filler is not None:
        more = parallel.most_of_ranks(len(microbatches)) - len(microbatches)
        microbatches = [*microbatches, *[filler] * more]
    targets = sum(model.ntp_count(m.batch) for m in microbatches)
    restored = sum(model.reconstruction_count(m.batch) for m in microbatches)
    # a filler shows one picture
    shows = any(len(m.batch.vision) > len(m.batch) - len(m.places) for m in microbatches)
    own = [targets, shows, restored, tokens, model_flops(model, tokens, patches)]
    # all ranks' mean, so that a target weighs the same on a rank that has few of them
    agreed = parallel.mean_over_ranks(torch.tensor(own, dtype=torch.float64))
    targets, shows, restored, tokens, flops = agreed.tolist()
    counts = max(targets, 1e-9), max(restored, 1e-9)
    device = model.backbone.device
    ids = on_device(positive_ids(pairs, rank()), device)
    objective, groups = recipe.objective, recipe.groups_per_batch // world()
    scores = None
    if objective.distillation_weight:
        scores = on_device(torch.tensor([pair.scores for pair in pairs]), device)
    forward = partial(_forward, model, recipe, counts)
    weight = world() / (recipe.groups_per_batch * recipe.group_size)
    contrast = partial(
        objective.contrastive, ids=ids, num_groups=groups, scores=scores, row_weight=weight
    )
    weigh = partial(objective.weighted, step=step)
    backward = parallel.Backward(model)
    with adapters.norms_once(model.backbone):
        if not objective.contrasts(step):
            losses = generate(forward, microbatches, weigh, backward)
        elif recipe.gradcache:
            losses = by_gradcache(model, forward, microbatches, contrast, weigh, backward)
        else:
            losses = at_once(forward, microbatches, contrast, weigh, backward)
    backward.finish()
    # what no rank had a use for has no gradient, as in one process: zeros would let it decay
    unused = [] if shows else list(model.family.vision_parts(model.backbone))
    head, embedding = model.backbone.lm_head, model.backbone.get_input_embeddings()
    unused += [] if targets or restored or head.weight is embedding.weight else [head]
    for p in (p for part in unused for p in part.parameters()):
        p.grad = None
    means = parallel.mean_over_ranks(torch.stack(losses).detach())
    return StepResult(Losses(*means), round(tokens * world()), flops * world())


def _forward(
    model: BTokModel,
    recipe: Recipe,
    counts: tuple[float, float],
    batch: PackedBatch,
    places: Sequence[int],
    generate: bool = True,
) -> Passed:
    """The model on a microbatch; its shares of NTP and reconstruction, means over `counts`."""
    device = model.backbone.device
    # adapters and weights that train are fp32, their products need not be
    with torch.autocast(device.type, torch.bfloat16, enabled=recipe.dtype == "bfloat16"):
        output = model(batch.to(device), generate)
    own = model.ntp_count(batch), model.reconstruction_count(batch)
    losses = output.ntp_loss, output.reconstruction_loss
    shares = [
        None if loss is None else loss * (count / total)
        for loss, count, total in zip(losses, own, counts, strict=True)
    ]
    rows = recipe.objective.takes_rows and output.rows is not None
    vectors = output.rows if rows else output.embeddings
    # behind those with a place is what only keeps the ranks in step
    return Passed(vectors[: len(places)], *shares)


def at_once(
    forward: Forward,
    microbatches: Sequence[Microbatch],
    contrast: Contrast,
    weigh: Weigh,
    backward: parallel.Backward,
) -> Losses:
    """One backward through all microbatches, whose activations are kept until then."""
    vectors, ntps, restored = zip(*(forward(m.batch, m.places) for m in microbatches), strict=True)
    contrastive = contrast(_as_they_came(vectors, microbatches))
    losses = weigh(contrastive, _sum(ntps), restored=_sum(restored))
    backward(losses.total, is_last=True)
    return losses


def by_gradcache(
    model: BTokModel,
    forward: Forward,
    microbatches: Sequence[Microbatch],
    contrast: Contrast,
    weigh: Weigh,
    backward: parallel.Backward,
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
        for m in microbatches:
            states.append(random_state())
            batch = m.batch if dropping or m.sources is None else m.sources
            parts.append(forward(batch, m.places, generate=False).vectors)
    model.train(was_training)
    vectors = _as_they_came(parts, microbatches).requires_grad_()
    contrastive = contrast(vectors)
    contrastive.backward()
    assert vectors.grad is not None
    gradients = vectors.grad[on_device(_order(microbatches), vectors.device)]
    shares = gradients.split([len(m.places) for m in microbatches])
    ntps, restored = [], []
    for number, (m, state, share) in enumerate(zip(microbatches, states, shares, strict=True), 1):
        if dropping:
            set_random_state(state)
        passed = forward(m.batch, m.places)
        # in the contrastive loss's place, what has its gradients of this part
        instead = (passed.vectors * share).sum()
        loss = weigh(instead, passed.ntp, restored=passed.restored).total
        backward(loss, is_last=number == len(microbatches))
        ntps.append(None if passed.ntp is None else passed.ntp.detach())
        restored.append(None if passed.restored is None else passed.restored.detach())
    return weigh(contrastive.detach(), _sum(ntps), restored=_sum(restored))


def generate(
    forward: Forward,
    microbatches: Sequence[Microbatch],
    weigh: Weigh,
    backward: parallel.Backward,
) -> Losses:
    """The generative losses alone, each microbatch's backward at once."""
    done = []
    for number, m in enumerate(microbatches, 1):
        passed = forward(m.batch, m.places)
        # of a microbatch without targets a loss of 0, so that all ranks' gradients meet
        nothing = 0 * passed.vectors.sum() + 0.0  # not -0
        losses = weigh(nothing, passed.ntp, restored=passed.restored)
        backward(losses.total, is_last=number == len(microbatches))
        done.append(Losses(*(loss.detach() for loss in losses)))
    return Losses(*(sum(losses[1:], losses[0]) for losses in zip(*done, strict=True)))


def _as_they_came(parts: Sequence[Tensor], microbatches: Sequence[Microbatch]) -> Tensor:
    """The microbatches' embeddings in the order of the step's samples."""
    # of one microbatch too: its samples are sorted by length
    return torch.cat(list(parts))[on_device(_order(microbatches).argsort(), parts[0].device)]


def _order(microbatches: Sequence[Microbatch]) -> Tensor:
    return torch.tensor([place for m in microbatches for place in m.places])


def _sum(values: Sequence[Tensor | None]) -> Tensor | None:
    there = [value for value in values if value is not None]
    return torch.stack(there).sum() if len(there) > 1 else (there[0] if there else None)


def count_patches(microbatches: Sequence[Microbatch]) -> int:
    """Patches of all images and videos, each counted once, wherever it stands."""
    return sum(sum(vision.patches) for vision in _shown(microbatches))


def _shown(microbatches: Sequence[Microbatch]) -> list[Vision]:
    """The images and videos that the microbatches' samples show, each once, in however many rows it
    stands.
    """
    batches = [batch for m in microbatches for batch in (m.batch, m.sources) if batch is not None]
    return list({id(vision): vision for batch in batches for vision in batch.vision}.values())


def model_flops(model: BTokModel, tokens: int, patches: int) -> float:
    """Operations of a step, by the common count: 2 per token and weight of the layers forward, 2
    for the gradient that goes on, 2 for the weight's own where it trains. Whatever is computed
    twice (GradCache, checkpointing), attention's square and the logits are left out.
    """
    vision = model.family.vision_parts(model.backbone)
    parts = [(part, patches // merged) for part, merged in vision.items()]
    parts += [(model.family.decoder(model.backbone).layers, tokens)]
    total, below = 0.0, False  # what comes before it trains
    for part, count in parts:
        weights = [p for p in part.parameters() if p.ndim > 1]
        every, trained = (
            sum(p.numel() for p in some)
            for some in (weights, [p for p in weights if p.requires_grad])
        )
        below = below or trained > 0
        total += count * (2 * every + 2 * trained + (2 * every if below else 0))
    return total


def is_frozen(model: BTokModel) -> bool:
    """Whether the model sees, and nothing that vision features go through trains."""
    return model.family.vision is not None and not model.family.vision_trains(model.backbone)


def cache_vision_features(
    model: BTokModel, microbatches: Sequence[Microbatch], memory: int, tokens: int | None
) -> list[Microbatch]:
    """The microbatches with vision features, each side's made once, wherever it stands.

    Args:
        memory: bytes of features that stay on the device; later ones wait on the host.
        tokens: of which the tower makes as many in one pass, at most; a larger side is alone.
            None for 8,192.
    """
    rules = model.family.vision
    assert rules is not None
    patches = (tokens or 1 << 13) * rules.merge_size(model.backbone.config) ** 2
    shown, found = _shown(microbatches), dict[int, Vision]()
    for turn in group_by_tokens([sum(vision.patches) for vision in shown], patches):
        some = [shown[i] for i in turn]
        for seen, vision in zip(some, model.encode_vision(some), strict=True):
            memory -= sum(level.nbytes for level in vision.features)
            found[id(seen)] = vision if memory >= 0 else vision.to("cpu")

    def features(batch: PackedBatch) -> PackedBatch:
        return replace(batch, vision=tuple(found[id(v)] for v in batch.vision))

    return [
        m._replace(batch=features(m.batch), sources=m.sources and features(m.sources))
        for m in microbatches
    ]
