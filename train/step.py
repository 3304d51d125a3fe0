"""One training step on one rank: the loss of this rank's pairs, and its gradients.

Losses and gradients are means over ranks, exactly those of the whole batch in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from btok import adapters
from btok.data.records import Pair
from btok.data.samples import positive_ids
from btok.model import BTokModel, BTokOutput
from btok.objective import Losses
from btok.packing import Sample, by_budget, count_labels, pack
from btok.processing import Processor
from btok.vision import vision_of
from btok_kernels.ranks import rank, world
from train.recipes import Recipe

Objective = Callable[[Tensor, Tensor | None], Losses]  # of embeddings and the generative loss


def train_step(
    model: BTokModel,
    processor: Processor,
    recipe: Recipe,
    pairs: Sequence[Pair],
    samples: Sequence[Sample],
    step: int,
) -> Done:
    """Forward and backward of this rank's pairs; losses and gradients are means over ranks.

    Args:
        samples: of the pairs, as `pair_samples` gives them.
    """
    captioning = step < recipe.caption_steps
    step -= recipe.caption_steps
    if captioning:
        samples = [sample for sample in samples if sample[1] is not None]
    ids = positive_ids(pairs, rank()).to(model.backbone.device)  # where the embeddings are
    groups = recipe.groups_per_batch // world()

    def objective(embeddings: Tensor, ntp: Tensor | None) -> Losses:
        output = BTokOutput(embeddings, ntp)
        return recipe.objective(output, ids, step=step, num_groups=groups)

    patches = count_patches(samples)
    if recipe.reuse_vision and is_frozen(model):
        samples = seen_once(model, samples, recipe.vision_memory, recipe.chunk_tokens)
    with adapters.norms_once(model.backbone):
        chunks = Chunks(model, processor, samples, recipe, captioning)
        if captioning:
            losses = chunks.caption()
        elif recipe.gradcache:
            losses = chunks.by_gradcache(objective, recipe.objective.weight(step))
        else:
            losses = chunks.at_once(objective)
    average_gradients(model)
    counts = torch.tensor([chunks.rows, model_flops(model, chunks.rows, patches)])
    tokens, flops = (mean_over_ranks(counts.double()) * world()).tolist()
    losses = Losses(*mean_over_ranks(torch.stack(losses).detach()))
    return Done(losses, round(tokens), flops)


class Done(NamedTuple):
    """The losses of a step, means over ranks; the tokens that all ranks packed for it, and the
    operations that these and their images need of the model.
    """

    losses: Losses
    tokens: int
    flops: float


def count_patches(samples: Sequence[Sample]) -> int:
    """Of all images and videos, each counted once, wherever it stands."""
    sides = {id(side): side for sample in samples for side in sample if side is not None}
    return sum(sum(vision.patches) for side in sides.values() for vision in vision_of(side))


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
        weights = [(p.numel(), p.requires_grad) for p in part.parameters() if p.ndim > 1]
        trained = sum(n for n, trains in weights if trains)
        each = 2 * sum(n for n, _ in weights) + 2 * trained
        if trained:
            each += 2 * sum(n for n, _ in weights)
        total += count * each
    return total


class Chunks:
    """A rank's samples of one step, a packed pass at a time, the largest pass first.

    Args:
        samples: as `btok.packing` takes them.
        captioning: plain causal captioning, without bottleneck tokens.
    """

    def __init__(
        self,
        model: BTokModel,
        processor: Processor,
        samples: Sequence[Sample],
        recipe: Recipe,
        captioning: bool,
    ) -> None:
        self.model, self.samples = model, samples
        self.half = recipe.dtype == "bfloat16"
        of_target = {"prefix_ids": processor.prefix_ids, "suffix_ids": processor.suffix_ids}
        self.options: dict[str, Any] = {
            **of_target,
            "backbone_config": model.backbone.config,
            "btok_token_ids": () if captioning else model.btok_token_ids,
            "target_positions": model.settings.target_positions,
            "condense": recipe.condense and not captioning,
        }
        self.indices = [list(range(len(samples)))]
        sizes = [sum(_length(side) for side in sample) for sample in samples]
        self.rows = sum(sizes) + len(samples) * len(self.options["btok_token_ids"])
        if recipe.chunk_tokens is not None:
            longest = sorted(range(len(samples)), key=sizes.__getitem__, reverse=True)
            turns = by_budget([sizes[i] for i in longest], recipe.chunk_tokens)
            self.indices = [[longest[i] for i in turn] for turn in turns]
        targets = [target for _, target in samples if target is not None]
        counts = count_labels(targets, **of_target, backbone_config=model.backbone.config)
        count = counts[0 if model.settings.ntp_reduction == "sample_mean" else 1]
        self.count = max(float(mean_over_ranks(torch.tensor(count, dtype=torch.float64))), 1e-9)

    def run(self, indices: Sequence[int], generate: bool = True) -> tuple[Tensor, Tensor | None]:
        """Embeddings of some samples, and their share of the generative loss of all ranks' mean."""
        samples = [self.samples[i] for i in indices]
        if not generate:
            samples = [(source, None) for source, _ in samples]
        batch = pack(samples, **self.options).to(self.model.backbone.device)
        # adapters are fp32, their products need not be
        with torch.autocast(self.model.backbone.device.type, torch.bfloat16, enabled=self.half):
            output = self.model(batch)
        if output.ntp_loss is None:
            return output.embeddings, None
        return output.embeddings, output.ntp_loss * (self.model.ntp_count(batch) / self.count)

    def in_order(self, parts: Sequence[Tensor]) -> Tensor:
        """What each chunk gave, as the samples came."""
        if len(parts) == 1:
            return parts[0]
        order = torch.tensor([i for indices in self.indices for i in indices])
        return torch.cat(list(parts))[order.argsort().to(parts[0].device)]

    def caption(self) -> Losses:
        """The generative loss alone."""
        total = None
        for indices in self.indices:
            _, ntp = self.run(indices)
            assert ntp is not None
            ntp.backward()
            total = ntp.detach() if total is None else total + ntp.detach()
        assert total is not None
        return Losses(total, torch.zeros_like(total), total)

    def at_once(self, objective: Objective) -> Losses:
        """One backward through all chunks."""
        parts, ntps = zip(*(self.run(indices) for indices in self.indices), strict=True)
        losses = objective(self.in_order(parts), _sum(ntps))
        losses.total.backward()
        return losses

    def by_gradcache(self, objective: Objective, weight: float) -> Losses:
        """The same gradients with the activations of one chunk (arXiv 2101.06983).

        Embed all without gradients; the contrastive loss and its gradients of the embeddings; then
        each chunk again, whose backward takes those and its generative loss. With dropout both
        passes run the same rows and draw the same.
        """
        model, states = self.model, []
        dropping = any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
        was_training = model.training
        if not dropping:
            model.eval()  # the last layer runs for the pooled rows alone
        parts = []
        with torch.no_grad():
            for indices in self.indices:
                states.append(random_state(model.backbone.device))
                parts.append(self.run(indices, generate=dropping)[0])
        model.train(was_training)
        embeddings = self.in_order(parts).requires_grad_()
        losses = objective(embeddings, None)
        losses.contrastive.backward()
        assert embeddings.grad is not None
        ntps = []
        for indices, state in zip(self.indices, states, strict=True):
            if dropping:
                set_random_state(state, model.backbone.device)
            part, ntp = self.run(indices)
            loss = (part * embeddings.grad[indices]).sum()
            (loss if ntp is None else loss + weight * ntp).backward()
            ntps.append(None if ntp is None else ntp.detach())
        ntp = _sum(ntps)
        if ntp is None:
            return losses
        return Losses(losses.total + weight * ntp, losses.contrastive, ntp)


def is_frozen(model: BTokModel) -> bool:
    """Whether there is a vision tower and nothing in it trains."""
    tower = model.family.tower(model.backbone)
    return tower is not None and not any(p.requires_grad for p in tower.parameters())


def seen_once(
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
    sides = {id(side): side for sample in samples for side in sample if side is not None}
    sizes = {name: sum(sum(v.patches) for v in vision_of(side)) for name, side in sides.items()}
    names = [name for name, size in sizes.items() if size]
    found: dict[int, Any] = {}
    for turn in by_budget([sizes[name] for name in names], patches):
        made = model.encode_vision([sides[names[i]] for i in turn])
        for i, side in zip(turn, made, strict=True):
            for at, vision in enumerate(side["vision"]):
                memory -= sum(level.nbytes for level in vision.features)
                side["vision"][at] = vision if memory >= 0 else vision.to("cpu")
            found[names[i]] = side

    def features(side: Any) -> Any:
        return found.get(id(side), side)

    return [(features(source), features(target)) for source, target in samples]


def random_state(device: torch.device) -> list[Tensor]:
    """Of the CPU and of the device."""
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *cuda]


def set_random_state(state: list[Tensor], device: torch.device) -> None:
    """What `random_state` gave."""
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)


def _sum(values: Sequence[Tensor | None]) -> Tensor | None:
    there = [value for value in values if value is not None]
    return torch.stack(there).sum() if len(there) > 1 else (there[0] if there else None)


def _length(side: Mapping[str, Any] | None) -> int:
    return 0 if side is None else torch.as_tensor(side["input_ids"]).numel()


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
