"""One training step, from processed pairs to gradients, beside the same step in two padded passes.

ours               `train_step` with GradCache: packed passes [x ; B ; T], logits at label rows, the
                   frozen vision tower once per image
two padded passes  as the authors' code does it, with transformers' own forward and torch's
                   attention: GradCache over padded chunks of one side of the pairs; with gradients
                   [x ; B] with a KV cache, then T on the bottleneck tokens' keys and values, logits
                   of all T rows; the vision tower each time

and ours with one lever the other way. A packed pass has half as many samples again as a padded
chunk, so that what padding took goes into both speed and memory. All give the same losses and the
same gradients, which is checked first. Adapters (DoRA) and the K rows train, without dropout. The
pairs are as the paper's mixture has them: an image and a question find a text and generate it, a
text finds a page, which generates the text, a few have no image. On a GPU it is Qwen2-VL-2B with
random weights in bf16; on a CPU, in fp32, a twelfth as wide with a quarter of the layers, its
vision tower and its vocabulary likewise. `flops` are those of our step's matrix products, as torch
counts them.
"""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Callable, Sequence
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.harness import DEVICE, Contest
from bench.models import SPECIAL, Shape, Tower, random_qwen2_vl
from btok import adapters
from btok.data.records import NtpSide, Pair, Side
from btok.data.samples import pair_samples
from btok.model import BTokModel
from btok.objective import Losses
from btok.packing import PackedBatch, Sample, pack
from btok.vision import Vision, join
from train.microbatches import Packing
from train.recipes import Recipe
from train.step import train_step

K = 4
AROUND: Any = SimpleNamespace(prefix_ids=(1, 7), suffix_ids=(2,))  # a target's own tokens


class Batch(NamedTuple):
    """Pairs of a step, and how they are passed through the model."""

    pairs: int = 64
    side: tuple[int, int] = (8, 32)  # of an image, in tokens
    text: tuple[int, int] = (4, 120)  # tokens
    chunk: int = 8  # samples that are padded together
    packed: int = 12  # that a packed pass has on average


if DEVICE == "cuda":
    DTYPE, SHAPE, TOWER, BATCH = torch.bfloat16, Shape(), Tower(), Batch()
else:
    DTYPE, SHAPE, TOWER = torch.float32, Shape(128, 4, 1, 744, 12672, 7), Tower(112, 4, 8)
    BATCH = Batch(8, side=(4, 16), text=(4, 60), chunk=4, packed=6)
# relative differences of the losses and of the gradients that rounding may make
BOUNDS = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-2, 0.1)}

PADDED = "two padded passes"
LEVERS: dict[str, dict[str, Any]] = {
    "without reused vision": {"reuse_vision": False},
    "without packing": {"chunk_tokens": 1},  # a sample a pass
    "without GradCache": {"gradcache": False, "chunk_tokens": None},
    "with checkpointing": {"checkpoint_activations": True},
}


class Contestants:
    """One model's weights behind all, and a batch of pairs; adapters are fp32."""

    def __init__(
        self, shape: Shape, tower: Tower, batch: Batch, device: str, dtype: torch.dtype
    ) -> None:
        backbone = random_qwen2_vl(shape, tower, device, dtype)
        self.btok_ids = range(shape.vocab_size - K, shape.vocab_size)
        adapters.attach(backbone, adapters.Lora(dropout=0.0), self.btok_ids, "random")
        for name, p in backbone.named_parameters():
            if "lora_B" in name:  # begins at zero, and A's gradients with it
                torch.nn.init.normal_(p, std=0.02)
        self.stock = copy.deepcopy(backbone, {id(p): p for p in backbone.parameters()}).train()
        self.stock.set_attn_implementation("sdpa")
        self.btok = BTokModel.from_backbone(backbone, btok_token_ids=self.btok_ids).train()
        self.trained = [p for p in backbone.parameters() if p.requires_grad]
        self.pairs, self.samples = make_pairs(batch, backbone.config)
        starts = range(0, len(self.samples), batch.chunk)
        self.chunks = [self.samples[at : at + batch.chunk] for at in starts]
        rows = sum(len(source["input_ids"]) + K for source, _ in self.samples)
        self.recipe = Recipe(
            caption_steps=0,
            ntp_weight=5.0,
            negatives="batch",
            groups_per_batch=1,
            gradcache=True,
            chunk_tokens=rows * batch.packed // len(self.samples),
        )

    def ours(self, **changed: Any) -> Losses:
        """Packing and `train_step`; gradients are left in the parameters."""
        self.btok.zero_grad()
        recipe = dataclasses.replace(self.recipe, **changed)
        self.btok.checkpoint_activations(recipe.checkpoint_activations)
        microbatches = Packing.of(self.btok, AROUND, recipe).microbatches(self.samples)
        return train_step(self.btok, recipe, self.pairs, microbatches, 0).losses

    def padded(self) -> Losses:
        """GradCache over padded chunks, in two passes each."""
        self.btok.zero_grad()
        with torch.no_grad():
            embeddings = torch.cat([self.encode(chunk)[0] for chunk in self.chunks])
        query, positive = embeddings.requires_grad_().chunk(2)
        own = torch.arange(len(query), device=query.device)
        contrastive = F.cross_entropy(query @ positive.T / self.recipe.temperature, own)
        contrastive.backward()
        assert embeddings.grad is not None
        gradients = embeddings.grad.split([len(chunk) for chunk in self.chunks])
        targets = sum(target is not None for _, target in self.samples)
        generative = torch.zeros_like(contrastive)
        for chunk, gradient in zip(self.chunks, gradients, strict=True):
            part, cache = self.encode(chunk, keep=True)
            loss = (part * gradient).sum()
            if any(target is not None for _, target in chunk):
                ntp = self.generate(chunk, cache) / targets
                loss = loss + self.recipe.ntp_weight * ntp
                generative += ntp.detach()
            loss.backward()
        contrastive = contrastive.detach()
        total = contrastive + self.recipe.ntp_weight * generative
        return Losses(total, contrastive, generative, torch.zeros_like(total))

    def alone(self, sample: Sample) -> tuple[PackedBatch, Tensor]:
        """A sample by itself, and of each of its rows what `forward` takes: 1, the token's id and
        its three positions, [5, L].
        """
        options = vars(AROUND) | {"backbone_config": self.stock.config}
        batch = pack([sample], btok_token_ids=self.btok_ids, **options)
        ids = batch.input_ids[None]
        return batch, torch.cat([torch.ones_like(ids), ids, batch.position_ids])

    def forward(self, sides: Sequence[Any], rows: Sequence[Tensor], **cache: Any) -> Any:
        """The stock language model on rows as of `alone`, padded on the left, with the vision
        features of `sides` in place.
        """
        device, width = self.stock.device, max(row.shape[1] for row in rows)
        padded = torch.stack([F.pad(row, (width - row.shape[1], 0)) for row in rows], 1).to(device)
        mask, ids, positions = padded[0], padded[1], padded[2:]  # [n, width], [3, n, width]
        embeds = self.stock.get_input_embeddings()(ids)
        for images in join([shown for side in sides for shown in side.get("vision", ())]):
            assert images.pixels is not None
            pixels = images.pixels.to(device, self.stock.dtype)
            with torch.no_grad():
                found = self.stock.model.get_image_features(pixels, images.grid.to(device))
            features = torch.cat(found.pooler_output).to(embeds.dtype)
            places = (ids == self.stock.config.image_token_id)[..., None]
            embeds = embeds.masked_scatter(places, features)
        if "past_key_values" in cache:  # of K rows, which all see
            mask = F.pad(mask, (K, 0), value=1)
        return self.stock.model.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, **cache
        )

    def encode(self, chunk: Sequence[Sample], keep: bool = False) -> tuple[Tensor, Any]:
        """Unit vectors [n, D] and, to `keep` them, the bottleneck tokens' keys and values."""
        from transformers import DynamicCache

        sources = [source for source, _ in chunk]
        rows = [self.alone((source, None))[1] for source in sources]
        output = self.forward(sources, rows, use_cache=keep)
        cache = DynamicCache()
        for index, layer in enumerate(output.past_key_values.layers if keep else ()):
            cache.update(layer.keys[:, :, -K:], layer.values[:, :, -K:], index)
        return F.normalize(output.last_hidden_state[:, -K:].float().mean(1), dim=-1), cache

    def generate(self, chunk: Sequence[Sample], cache: Any) -> Tensor:
        """The sum over samples of their mean loss per label."""
        some = [i for i, (_, target) in enumerate(chunk) if target is not None]
        cache.batch_select_indices(torch.tensor(some, device=self.stock.device))
        batches, rows = zip(*(self.alone(chunk[i]) for i in some), strict=True)
        borders = [int(batch.layout.bounds[0, 2]) for batch in batches]
        of_targets = [row[:, border:] for row, border in zip(rows, borders, strict=True)]
        output = self.forward([chunk[i][1] for i in some], of_targets, past_key_values=cache)
        logits = self.stock.lm_head(output.last_hidden_state).float()  # [n, L, V]
        losses = []
        for each, batch in zip(logits, batches, strict=True):
            from_the_end = (batch.label_rows - len(batch.input_ids)).to(each.device)
            losses.append(F.cross_entropy(each[from_the_end], batch.labels.to(each.device)))
        return torch.stack(losses).sum()

    def result(self, run: Callable[[], Losses]) -> tuple[Tensor, Tensor]:
        """The losses, and all gradients in one vector."""
        losses = torch.stack(run()[:3])  # of no text to restore: the last is 0
        return losses.detach(), torch.cat([p.grad.float().flatten() for p in self.trained])

    def check(self, name: str, run: Callable[[], Losses], want: tuple[Tensor, Tensor]) -> None:
        """An AssertionError unless losses and gradients are those of the baseline."""
        (losses, gradients), bounds = self.result(run), BOUNDS[self.stock.dtype]
        error = float(((losses - want[0]) / want[0]).abs().max())
        assert error <= bounds[0], f"wrong losses of {name}, off by {error:.1e}: not timed"
        error = float((gradients - want[1]).norm() / want[1].norm())
        assert error <= bounds[1], f"wrong gradients of {name}, off by {error:.1e}: not timed"


def make_pairs(batch: Batch, config: Any) -> tuple[list[Pair], list[Sample]]:
    """Random pairs for a model of this configuration, and their samples."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    tokens = range(len(SPECIAL), config.text_config.vocab_size // 2)
    sides: dict[str, dict[str, Any]] = {}  # by the text, as a processor would give them

    def side(name: str, has_image: bool, most: int) -> Side:
        ids = rng.choices(tokens, k=rng.randint(batch.text[0], most))
        sides[name] = {"input_ids": ids}
        if has_image:
            height, width = (2 * rng.randint(*batch.side) for _ in range(2))  # patches
            pixels = torch.randn(height * width, 3 * 2 * 14 * 14, generator=generator)
            places = [config.image_token_id] * (height * width // 4)
            image = Vision("image", torch.tensor([[1, height, width]]), pixels)
            sides[name] = {"input_ids": places + ids, "vision": [image]}
        return Side(text=name)

    pairs, generated = [], dict[str, NtpSide](question="positive", page="query", text="none")
    for i in range(batch.pairs):
        kind = ("question", "page")[i % 2] if i % 6 < 5 else "text"
        query = side(f"query {i}", kind == "question", batch.text[1] // 2)
        positive = side(f"positive {i}", kind == "page", batch.text[1])
        pairs.append(Pair(query, positive, [], "some", generated[kind], positive_id=str(i)))
    return pairs, pair_samples(pairs, lambda side: sides[str(side.text)])


@cache
def prepared() -> tuple[Contestants, tuple[Tensor, Tensor], int]:
    """The contestants, the baseline's result, and our step's operations."""
    contestants = Contestants(SHAPE, TOWER, BATCH, DEVICE, DTYPE)
    with FlopCounterMode(display=False) as counter:
        contestants.ours()
    want = contestants.result(contestants.padded)
    contestants.check("ours", contestants.ours, want)
    return contestants, want, counter.get_total_flops()


@pytest.mark.parametrize("peer", [PADDED, *LEVERS])
def bench_training_step(contest: Contest, peer: str) -> None:
    contestants, want, flops = prepared()
    with_lever = partial(contestants.ours, **LEVERS.get(peer, {}))
    theirs = contestants.padded if peer == PADDED else with_lever
    contestants.check(peer, theirs, want)
    sides = [side for sample in contestants.samples for side in sample if side]
    contest(
        "training step",
        f"{BATCH.pairs} pairs",
        peer,
        contestants.ours,
        theirs,
        dtype=DTYPE,
        flops=flops,
        bytes=sum(p.nbytes for p in contestants.stock.parameters()),
        pairs_in_batch=BATCH.pairs,
        tokens=sum(len(side["input_ids"]) for side in sides),
        chunk_tokens=contestants.recipe.chunk_tokens,
    )
