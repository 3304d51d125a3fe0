"""BTokEncoder.encode, from a user's texts and pictures to vectors, beside simpler loops.

padded batches  as VLM2Vec embeds, on the same weights: the inputs in the order given, through the
                same Processor a batch of 16 at a time, padded; transformers' forward with torch's
                attention, the last layer in full, the last token; without the logits
one by one      encode itself, on one input at a time

Three inputs of four are texts, the rest pictures, arrays and PIL's in turn; their lengths in tokens
are log-uniform and in random order. On a GPU the model is Qwen2-VL-2B's shape in bf16; on a CPU it
is a twelfth as wide, in fp32, language model and vision tower, with all their layers. The weights
are random. Operations are twice the multiply-adds of vision tower and language model, the last
layer's for the K rows alone; `predicted` is the ratio of multiply-adds.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from bench import bench_inference
from bench.bench_inference import BATCH, SHAPE, K, Shape, multiply_adds
from bench.harness import DEVICE, Contest
from bench.models import byte_tokenizer, pooled_of_padded, random_qwen2_vl
from btok.encoder import BTokEncoder
from btok.families.qwen_images import TEMPORAL_PATCH, QwenImageProcessor
from btok.inputs import as_side
from btok.model import BTokModel
from btok.processing import Processor
from btok.vision import by_name, vision_of

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.1}


class Tower(NamedTuple):
    """A Qwen2-VL vision tower; 2B's by default."""

    embed: int = 1280
    heads: int = 16
    layers: int = 32
    patch: int = 14  # pixels
    merge: int = 2
    mlp_ratio: int = 4


class Corpus(NamedTuple):
    """How many inputs, and the tokens of a text and of a picture, [least, most]."""

    inputs: int
    text: tuple[int, int]
    image: tuple[int, int]


PEERS = ("padded batches", "one by one")
if DEVICE == "cuda":
    DTYPE, TOWER, CORPUS = torch.bfloat16, Tower(), Corpus(128, (32, 4096), (64, 1280))
else:
    DTYPE, TOWER, CORPUS = torch.float32, Tower(112, 4), Corpus(32, (16, 128), (16, 64))


class Encoders:
    """Random weights behind ours with K bottleneck tokens, with none, and stock transformers."""

    def __init__(self, shape: Shape, tower: Tower, device: str, dtype: torch.dtype) -> None:
        self.processor = Processor(byte_tokenizer(), patch_size=tower.patch)
        images = self.processor.image_processor
        assert isinstance(images, QwenImageProcessor)
        vision = {
            "depth": tower.layers,
            "embed_dim": tower.embed,
            "num_heads": tower.heads,
            "mlp_ratio": tower.mlp_ratio,
            "patch_size": tower.patch,
            "spatial_merge_size": tower.merge,
            "initializer_range": tower.embed**-0.5,
        }
        ids = {
            "image_token_id": images.pads["image"],
            "video_token_id": images.pads["video"],
            "vision_start_token_id": images.start,
            "vision_end_token_id": images.end,
        }
        backbone = random_qwen2_vl(shape, vision, device, dtype, **ids).eval()
        self.stock = copy.deepcopy(backbone, {id(p): p for p in backbone.parameters()})
        self.btoks = list(range(shape.vocabulary - K, shape.vocabulary))
        model = BTokModel.from_backbone(backbone, btok_token_ids=self.btoks).eval()
        self.btok = BTokEncoder(model, self.processor)
        model = BTokModel.from_backbone(backbone, btok_token_ids=(), pooling="last").eval()
        self.last = BTokEncoder(model, self.processor)

    def ours(self, inputs: Sequence[Any]) -> np.ndarray:
        """[N, D], unit norm."""
        return self.btok.encode(inputs, show_progress=False)

    def one_by_one(self, inputs: Sequence[Any]) -> np.ndarray:
        return np.concatenate([self.ours([value]) for value in inputs])

    @torch.no_grad()
    def padded(self, inputs: Sequence[Any], btoks: Sequence[int] = ()) -> np.ndarray:
        """Transformers' own: of [x ; B] the mean of B's rows, or of x the last row, [N, D]."""
        pooled, device, rows = [], self.stock.device, max(len(btoks), 1)
        for at in range(0, len(inputs), BATCH):
            samples = [by_name(self.processor(as_side(v))) for v in inputs[at : at + BATCH]]
            ids = [torch.cat([s["input_ids"], torch.tensor(btoks).long()]) for s in samples]
            vision = {}
            if seen := [s for s in samples if "pixel_values" in s]:
                for key in ("pixel_values", "image_grid_thw"):
                    vision[key] = torch.cat([s[key] for s in seen]).to(device)
                pictures = pad_sequence(ids, batch_first=True) == self.stock.config.image_token_id
                vision["mm_token_type_ids"] = pictures.int().to(device)
            pooled.append(pooled_of_padded(self.stock.model, ids, rows, **vision))
        return F.normalize(torch.cat(pooled), dim=-1).cpu().numpy()

    def check(self, peer: str, inputs: Sequence[Any], alone: np.ndarray) -> None:
        """Fail unless ours are those of each [x ; B] alone, and the peer's what they should be."""
        results = {"ours": (self.ours(inputs), alone)}
        if peer == "one by one":
            results[peer] = (self.one_by_one(inputs), alone)
        else:
            last = self.last.encode(inputs, show_progress=False)
            results[peer] = (self.padded(inputs), last)
        for name, (got, want) in results.items():
            error = float(np.linalg.norm(got - want, axis=1).max())
            right = error <= TOLERANCES[self.stock.dtype]
            assert right, f"wrong result of {name}, off by {error:.1e}: not timed"


def user_inputs(corpus: Corpus, unit: int) -> list[Any]:
    """Texts and pictures, the latter of `unit` ** 2 pixels a token."""
    rng, pixels = random.Random(0), np.random.default_rng(0)

    def size(bounds: tuple[int, int]) -> float:
        return math.exp(rng.uniform(*map(math.log, bounds)))

    inputs: list[Any] = []
    for i in range(corpus.inputs):
        if i % 4:
            inputs.append("".join(rng.choices("etaoins ", k=round(size(corpus.text)))))
            continue
        area, aspect = size(corpus.image) * unit**2, math.exp(rng.uniform(-0.7, 0.7))
        shape = (round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect)), 3)
        picture = pixels.integers(0, 256, shape, dtype=np.uint8)
        inputs.append(picture if i % 8 else Image.fromarray(picture))
    rng.shuffle(inputs)
    return inputs


def vision_multiply_adds(tower: Tower, hidden: int, patches: Iterable[int]) -> int:
    """Of the vision tower, for pictures of so many patches and a language model so wide."""
    embed, merged = tower.embed, tower.merge**2
    of_patch = 3 * TEMPORAL_PATCH * tower.patch**2 * embed
    of_patch += tower.layers * (4 + 2 * tower.mlp_ratio) * embed**2
    of_patch += merged * embed**2 + embed * hidden  # the merger, over the patches of its token
    return sum(n * of_patch + tower.layers * 2 * embed * n * n for n in patches)


@cache
def prepared() -> tuple[Encoders, list[Any], np.ndarray]:
    """The encoders, what they are given, and what ours should make of it."""
    encoders = Encoders(SHAPE, TOWER, DEVICE, DTYPE)
    inputs = user_inputs(CORPUS, TOWER.patch * TOWER.merge)
    alone = [encoders.padded([value], encoders.btoks) for value in inputs]
    return encoders, inputs, np.concatenate(alone)


@pytest.mark.parametrize("peer", PEERS)
def bench_encoding(contest: Contest, peer: str) -> None:
    encoders, inputs, alone = prepared()
    encoders.check(peer, inputs, alone)
    samples = [encoders.processor(as_side(value)) for value in inputs]
    lengths = [len(sample["input_ids"]) for sample in samples]
    patches = [n for sample in samples for v in vision_of(sample) for n in v.patches]
    language = multiply_adds(SHAPE, [n + K for n in lengths], pooled=K)
    vision = vision_multiply_adds(TOWER, SHAPE.hidden, patches)
    expected = 1.0
    if peer == "padded batches":
        ratio = bench_inference.predicted(SHAPE, "padded last token", lengths)
        expected = (language + vision) / (language / ratio + vision)
    contest(
        "corpus encoding",
        f"{len(inputs)} inputs",
        peer,
        partial(encoders.ours, inputs),
        partial(
            {"padded batches": encoders.padded, "one by one": encoders.one_by_one}[peer], inputs
        ),
        dtype=DTYPE,
        flops=2 * (language + vision),
        bytes=sum(p.nbytes for p in encoders.stock.model.parameters()),
        predicted=expected,
        inputs=len(inputs),
        tokens=sum(lengths),
        images=len(patches),
    )
