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
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.harness import DEVICE, Contest
from bench.models import random_qwen2_vl
from btok import adapters
from btok.data.records import NtpSide, Pair, Side
from btok.data.samples import pair_samples
from btok.model import BTokModel
from btok.objective import Losses
from btok.packing import Sample, pack
from btok.vision import Vision
from train.microbatches import Packing
from train.recipes import Recipe
from train.step import train_step

K = 4


class Shape(NamedTuple):
    """A Qwen2-VL and a batch for it; 2B's by default."""

    hidden: int = 1536
    heads: int = 12
    key_heads: int = 2
    mlp: int = 8960
    layers: int = 28
    vocabulary: int = 151936
    vision: int = 1280
    vision_heads: int = 16
    depth: int = 32
    pairs: int = 64
    side: tuple[int, int] = (8, 32)  # of an image, in tokens
    text: tuple[int, int] = (4, 120)  # tokens
    chunk: int = 8  # samples that are padded together
    packed: int = 12  # that a packed pass has on average


SMALL = Shape(
    128, 4, 1, 744, 7, 12672, 112, 4, 8, pairs=8, side=(4, 16), text=(4, 60), chunk=4, packed=6
)
SHAPE, DTYPE = (Shape(), torch.bfloat16) if DEVICE == "cuda" else (SMALL, torch.float32)
# relative differences of the losses and of the gradients that rounding may make
BOUNDS = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-2, 0.1)}

LEVERS: dict[str, dict[str, Any]] = {
    "without reused vision": {"reuse_vision": False},
    "without packing": {"chunk_tokens": 1},  # a sample a pass
    "without GradCache": {"gradcache": False, "chunk_tokens": None},
    "with checkpointing": {"checkpoint_activations": True},
}
PADDED = "two padded passes"


class Contestants:
    """One model's weights behind all, and a batch of pairs.

    Args:
        shape: the model's and the batch's.
        device, dtype: of the frozen weights; adapters are fp32.
    """

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        vision = {
            "depth": shape.depth,
            "embed_dim": shape.vision,
            "num_heads": shape.vision_heads,
            "initializer_range": shape.vision**-0.5,
        }
        self.image = shape.vocabulary - K - 1  # the placeholder's id
        ids = {"image_token_id": self.image, "video_token_id": self.image - 1}
        backbone = random_qwen2_vl(shape, vision, device, dtype, **ids, tie_word_embeddings=True)
        self.btoks = range(shape.vocabulary - K, shape.vocabulary)
        adapters.attach(backbone, adapters.Lora(dropout=0.0), self.btoks, "random")
        for name, p in backbone.named_parameters():
            if "lora_B" in name:  # begins at zero, and A's gradients with it
                torch.nn.init.normal_(p, std=0.02)
        self.stock = copy.deepcopy(backbone, {id(p): p for p in backbone.parameters()}).train()
        self.stock.set_attn_implementation("sdpa")
        self.btok = BTokModel.from_backbone(backbone, btok_token_ids=self.btoks).train()
        self.trained = [p for p in backbone.parameters() if p.requires_grad]
        self.processor = SimpleNamespace(prefix_ids=(2, 3), suffix_ids=(1,))
        self.pairs, sides = make_pairs(shape, self.image)
        self.samples = pair_samples(self.pairs, lambda side: sides[str(side.text)])
        self.chunk = shape.chunk
        rows = sum(len(source["input_ids"]) + K for source, _ in self.samples)
        self.recipe = Recipe(
            caption_steps=0,
            ntp_weight=5.0,
            negatives="batch",
            groups_per_batch=1,
            gradcache=True,
            chunk_tokens=rows * shape.packed // len(self.samples),
        )
        of_target = {"prefix_ids": (2, 3), "suffix_ids": (1,), "backbone_config": backbone.config}
        self.packing: dict[str, Any] = {**of_target, "btok_token_ids": self.btoks}
        self.targets = pack(self.samples, **self.packing).num_targets

    def zero(self) -> None:
        for p in self.trained:
            p.grad = None

    def ours(self, **changed: Any) -> Losses:
        """Packing and `train_step`; gradients are left in the parameters."""
        self.zero()
        recipe = dataclasses.replace(self.recipe, **changed)
        self.btok.checkpoint_activations(recipe.checkpoint_activations)
        processor: Any = self.processor
        microbatches = Packing.of(self.btok, processor, recipe).microbatches(self.samples)
        return train_step(self.btok, recipe, self.pairs, microbatches, 0).losses

    def padded(self) -> Losses:
        """GradCache over padded chunks, in two passes each."""
        self.zero()
        count = len(self.samples)
        chunks = [self.samples[at : at + self.chunk] for at in range(0, count, self.chunk)]
        with torch.no_grad():
            parts = [self.encode([source for source, _ in chunk])[0] for chunk in chunks]
        embeddings = torch.cat(parts).requires_grad_()
        query, positive = embeddings.chunk(2)
        own = torch.arange(len(query), device=query.device)
        contrastive = F.cross_entropy(query @ positive.T / self.recipe.temperature, own)
        contrastive.backward()
        assert embeddings.grad is not None
        total = torch.zeros((), device=embeddings.device)
        for chunk, grad in zip(chunks, embeddings.grad.split(self.chunk), strict=True):
            part, kept = self.encode([source for source, _ in chunk], keep=True)
            loss = (part * grad).sum()
            if any(target is not None for _, target in chunk):
                ntp = self.generate(chunk, kept) / self.targets
                loss = loss + self.recipe.ntp_weight * ntp
                total = total + ntp.detach()
            loss.backward()
        weighted = contrastive.detach() + self.recipe.ntp_weight * total
        return Losses(weighted, contrastive.detach(), total, torch.zeros_like(total))

    def see(self, sides: Sequence[Mapping[str, Any]]) -> Tensor:
        """Vision features of the sides' images, [tokens, D]."""
        pixels, grids = (
            torch.cat([side[k] for side in sides]) for k in ("pixel_values", "image_grid_thw")
        )
        with torch.no_grad():
            found = self.stock.model.get_image_features(
                pixels.to(self.stock.device, self.stock.dtype), grids.to(self.stock.device)
            )
        return torch.cat(tuple(found.pooler_output))

    def forward(
        self,
        sides: Sequence[Any],
        tokens: Sequence[Tensor],
        places: Sequence[Tensor],
        left: bool,
        past: Any = None,
        before: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """The stock language model on padded rows, with the vision features of `sides` in place.

        Args:
            tokens, places: ids [L] and positions [3, L] of each.
            left: pad before the tokens, else behind them.
            past, before: a KV cache and its mask [n, K].
        """
        device, width = self.stock.device, max(map(len, tokens))

        def stack(parts: Sequence[Tensor]) -> Tensor:
            pads = [
                (width - part.shape[-1], 0) if left else (0, width - part.shape[-1])
                for part in parts
            ]
            return torch.stack([F.pad(*each) for each in zip(parts, pads, strict=True)]).to(device)

        ids = stack(tokens)
        mask = stack([torch.ones_like(part) for part in tokens])
        embeds = self.stock.get_input_embeddings()(ids)
        having = [side for side in sides if "pixel_values" in side]
        if having:
            features = self.see(having).to(embeds.dtype)
            embeds = embeds.masked_scatter((ids == self.image)[..., None], features)
        return self.stock.model.language_model(
            inputs_embeds=embeds,
            attention_mask=mask if before is None else torch.cat([before, mask], dim=1),
            position_ids=stack(places).transpose(0, 1),
            past_key_values=past,
            **options,
        )

    def encode(
        self, sources: Sequence[Mapping[str, Any]], keep: bool = False
    ) -> tuple[Tensor, Any]:
        """Unit vectors [n, D] and, to `keep` them, the bottleneck tokens' keys and values."""
        from transformers import DynamicCache

        alone = [pack([(source, None)], **self.packing) for source in sources]
        tokens, places = [b.input_ids for b in alone], [b.position_ids for b in alone]
        output = self.forward(sources, tokens, places, left=True, use_cache=keep)
        pooled = output.last_hidden_state[:, -K:].float().mean(1)
        if not keep:
            return F.normalize(pooled, dim=-1), None
        kept = DynamicCache()
        for index, layer in enumerate(output.past_key_values.layers):
            kept.update(layer.keys[:, :, -K:], layer.values[:, :, -K:], index)
        return F.normalize(pooled, dim=-1), kept

    def generate(self, chunk: Sequence[Sample], kept: Any) -> Tensor:
        """The sum over samples of their mean loss per label."""
        some = [i for i, (_, target) in enumerate(chunk) if target is not None]
        kept.batch_select_indices(torch.tensor(some, device=self.stock.device))
        whole = [pack([chunk[i]], **self.packing) for i in some]
        borders = [int(batch.layout.bounds[0, 2]) for batch in whole]
        both = list(zip(whole, borders, strict=True))
        tokens, places = (
            [b.input_ids[n:] for b, n in both],
            [b.position_ids[:, n:] for b, n in both],
        )
        before = torch.ones(len(some), K, dtype=torch.long, device=self.stock.device)
        targets = [chunk[i][1] for i in some]
        output = self.forward(targets, tokens, places, left=False, past=kept, before=before)
        logits = self.stock.lm_head(output.last_hidden_state).float()  # [n, L, V]
        found = [logits[i, (b.label_rows - n).to(logits.device)] for i, (b, n) in enumerate(both)]
        labels = [batch.labels.to(logits.device) for batch in whole]
        return torch.stack(list(map(F.cross_entropy, found, labels))).sum()

    def check(self, name: str, run: Callable[[], Losses], want: tuple[list[float], Tensor]) -> None:
        """Fail unless losses and gradients are those of the baseline."""
        losses, gradient = self.result(run)
        bounds = BOUNDS[self.stock.dtype]
        error = max(abs(x - y) / abs(y) for x, y in zip(losses, want[0], strict=True))
        assert error <= bounds[0], f"wrong losses of {name}, off by {error:.1e}: not timed"
        error = float((gradient - want[1]).norm() / want[1].norm())
        assert error <= bounds[1], f"wrong gradients of {name}, off by {error:.1e}: not timed"

    def result(self, run: Callable[[], Losses]) -> tuple[list[float], Tensor]:
        """Losses, and all gradients in one vector."""
        *losses, _restored = (float(loss) for loss in run())  # of no text: the last is 0
        return losses, torch.cat([p.grad.float().flatten() for p in self.trained])


def make_pairs(shape: Shape, image: int) -> tuple[list[Pair], dict[str, dict[str, Any]]]:
    """Pairs, and their sides as a processor would give them, by the side's text."""
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    sides: dict[str, dict[str, Any]] = {}

    def side(name: str, has_image: bool, most: int) -> Side:
        ids = rng.choices(range(4, shape.vocabulary // 2), k=rng.randint(shape.text[0], most))
        processed: dict[str, Any] = {"input_ids": ids}
        if has_image:
            height, width = (2 * rng.randint(*shape.side) for _ in range(2))  # patches
            pixels = torch.randn(height * width, 3 * 2 * 14 * 14, generator=generator)
            processed["pixel_values"] = pixels
            processed["image_grid_thw"] = torch.tensor([[1, height, width]])
            # as an object, so that the step knows one image where it stands twice
            processed["vision"] = [Vision("image", processed["image_grid_thw"], pixels)]
            processed["input_ids"] = [image] * (height * width // 4) + ids
        sides[name] = processed
        return Side(text=name)

    sides_to_generate: dict[str, NtpSide] = {"question": "positive", "page": "query"}
    pairs = []
    for i in range(shape.pairs):
        kind = ("question", "page")[i % 2] if i % 6 < 5 else "text"
        query = side(f"query {i}", kind == "question", shape.text[1] // 2)
        positive = side(f"positive {i}", kind == "page", shape.text[1])
        of_text: NtpSide = "none" if i % 2 else "positive"
        ntp_side = sides_to_generate.get(kind, of_text)
        pairs.append(Pair(query, positive, [], "some", ntp_side, positive_id=str(i)))
    return pairs, sides


@cache
def prepared() -> tuple[Contestants, tuple[list[float], Tensor], int]:
    """The contestants, the baseline's result, and our step's operations."""
    contestants = Contestants(SHAPE, DEVICE, DTYPE)
    with FlopCounterMode(display=False) as counter:
        contestants.ours()
    want = contestants.result(contestants.padded)
    contestants.check("ours", contestants.ours, want)
    return contestants, want, counter.get_total_flops()


@pytest.mark.parametrize("peer", [PADDED, *LEVERS])
def bench_training_step(contest: Contest, peer: str) -> None:
    contestants, want, flops = prepared()
    theirs: Callable[[], Losses] = contestants.padded
    if peer in LEVERS:
        theirs = partial(contestants.ours, **LEVERS[peer])
    contestants.check(peer, theirs, want)
    frozen = sum(p.nbytes for p in contestants.stock.parameters())
    tokens = sum(
        len(side["input_ids"]) for sample in contestants.samples for side in sample if side
    )
    contest(
        "training step",
        f"{SHAPE.pairs} pairs",
        peer,
        contestants.ours,
        theirs,
        dtype=DTYPE,
        flops=flops,
        bytes=frozen,
        pairs_in_batch=SHAPE.pairs,
        tokens=tokens,
        chunk_tokens=contestants.recipe.chunk_tokens,
    )
