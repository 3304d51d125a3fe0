"""Embedding with bottleneck tokens beside simpler ways, on the same random weights.

"inference" goes from lists of token ids to unit vectors: packing and padding are timed, tokenizing
is not. A case is so many inputs of so many tokens, or a set of mixed lengths, log-uniform.

ours               BTokModel with K bottleneck tokens: packed rows, the last layer for the K rows
                   alone
padded last token  as VLM2Vec embeds: transformers' forward with torch's attention on the inputs in
                   the order given, padded in batches of 16 as its evaluation scripts have it, the
                   last layer in full; without the logits, which it makes and nothing needs
packed last token  BTokModel with K = 0: packed rows, the last layer for the last row alone
full last layer    ours with the last layer for all rows

"corpus encoding" goes from a user's inputs to vectors with BTokEncoder.encode. Three inputs of four
are texts, the rest pictures, arrays and PIL's in turn, of log-uniform lengths in random order.

padded batches     padded last token, through the same Processor a batch at a time
one by one         encode itself, on one input at a time

Gradients are off as BTokEncoder (inference mode) and VLM2Vec's scripts (no_grad) have it. On a GPU
the model is Qwen2-VL-2B's shape in bf16. On a CPU it is a twelfth as wide, in fp32, with all layers
of language model and vision tower, since with fewer the last one's shortcut would save more;
LONGEST=8192 adds longer inputs, WIDTH=256 makes the language model a sixth as wide, where less of
the time goes into Python. Operations are twice the multiply-adds; `predicted` is their ratio.
"""

from __future__ import annotations

import copy
import math
import os
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bench.harness import DEVICE, Contest
from bench.models import SPECIAL, Shape, Tower, byte_tokenizer, random_qwen2_vl
from btok.encoder import BTokEncoder
from btok.inputs import as_side
from btok.model import BTokModel
from btok.packing import group_by_tokens
from btok.processing import Processor
from btok.vision import join

BATCH = 16  # inputs that are padded together
BUDGET = 16384  # packed rows at most, BTokEncoder's default
K = 4
PATCH, MERGE = 14, 2  # pixels of a patch's side, patches of a token's
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.1}  # rounding moves a bf16 vector by 0.05

PEERS = ("padded last token", "packed last token")
LENGTHS = [64, 128, 256, 512, 1024, 2048, 4096, 8192]
if DEVICE == "cuda":
    DTYPE, SHAPE, TOWER = torch.bfloat16, Shape(), Tower()
    # alone, most of an input's time goes into launching: so a batch, too, that one packed row holds
    SIZES = [f"{n}x{length}" for length in LENGTHS for n in {1, min(BATCH, 15360 // length)}]
    MIXED = (64, (64, 8192))  # inputs; fewest and most tokens
    CORPUS = (128, (32, 4096), (64, 1280))  # inputs; tokens of a text, of a picture
else:
    width = int(os.environ.get("WIDTH", 128))  # a multiple of 64
    longest = int(os.environ.get("LONGEST", 1024))
    DTYPE, SHAPE, TOWER = torch.float32, Shape(width, 4, 1, width * 93 // 16, 2000), Tower(112, 4)
    SIZES = [f"1x{n}" for n in LENGTHS if n <= longest] + ["16x64"]
    MIXED = (16, (64, 512))
    CORPUS = (32, (16, 128), (16, 64))
CASES = [(size, K, peer) for size in [*SIZES, "mixed"] for peer in PEERS]
CASES += [("1x512", k, "packed last token") for k in (1, 2, 8, 16)]
CASES += [(size, K, "full last layer") for size in ("1x64", "1x512", "16x64")]


class Contestants:
    """One backbone's random weights behind ours with K bottleneck tokens, ours with none, and stock
    transformers. They take samples as a processor gives them: token ids, and maybe pixels.
    """

    def __init__(
        self, shape: Shape, tower: Tower, device: str, dtype: torch.dtype, num_btoks: int = K
    ) -> None:
        backbone = random_qwen2_vl(shape, tower, device, dtype).eval()
        self.stock = copy.deepcopy(backbone, {id(p): p for p in backbone.parameters()})
        self.processor = Processor(byte_tokenizer())
        self.btok_ids = range(shape.vocab_size - num_btoks, shape.vocab_size)
        ours = partial(BTokModel.from_backbone, backbone)
        self.btok = ours(btok_token_ids=self.btok_ids).eval()
        self.full = ours(btok_token_ids=self.btok_ids, last_layer="full").eval()
        self.last = ours(btok_token_ids=(), pooling="last").eval()

    @torch.inference_mode()
    def packed(self, model: BTokModel, samples: Sequence[Mapping[str, Any]]) -> Tensor:
        """A model of ours, on rows that are filled as BTokEncoder fills them, [N, D]."""
        order = sorted(range(len(samples)), key=lambda i: -len(samples[i]["input_ids"]))
        lengths = [len(samples[i]["input_ids"]) + len(model.btok_token_ids) for i in order]
        rows = [[order[at] for at in turn] for turn in group_by_tokens(lengths, BUDGET)]
        batches = (model.pack([samples[i] for i in row]) for row in rows)
        pooled = [model(batch.to(self.stock.device)).embeddings for batch in batches]
        return torch.cat(pooled)[torch.tensor(order).argsort()]

    @torch.no_grad()
    def padded(self, samples: Iterable[Mapping[str, Any]], btok_ids: Sequence[int] = ()) -> Tensor:
        """Transformers' own: of [x ; B] the mean of B's rows, or of x the last row, [N, D]."""
        btoks, rows = torch.tensor(btok_ids).long(), len(btok_ids) or 1
        pooled, samples = [], iter(samples)
        while batch := list(islice(samples, BATCH)):
            ids = [torch.cat([torch.as_tensor(each["input_ids"]), btoks]) for each in batch]
            padded = pad_sequence(ids, batch_first=True)
            mask = pad_sequence([torch.ones_like(tokens) for tokens in ids], batch_first=True)
            inputs: dict[str, Any] = {"input_ids": padded, "attention_mask": mask}
            for pictures in join([shown for each in batch for shown in each.get("vision", ())]):
                inputs["mm_token_type_ids"] = (padded == self.stock.config.image_token_id).int()
                inputs["image_grid_thw"] = pictures.grid
                inputs["pixel_values"] = pictures.as_floats().pixels
            inputs = {key: tensor.to(self.stock.device) for key, tensor in inputs.items()}
            states = self.stock.model(**inputs, use_cache=False).last_hidden_state
            last = mask.sum(1, keepdim=True) + torch.arange(-rows, 0)  # [n, rows]
            pooled.append(states[torch.arange(len(batch))[:, None], last].float().mean(1))
        return F.normalize(torch.cat(pooled), dim=-1)

    def alone(self, samples: Iterable[Mapping[str, Any]]) -> Tensor:
        """The vectors [N, D] that K tokens should give: transformers' of each [x ; B] by itself."""
        return torch.cat([self.padded([sample], self.btok_ids) for sample in samples])

    def check(self, name: str, vectors: Any, want: Tensor) -> None:
        """An AssertionError where a vector is not what it should be."""
        error = float((torch.as_tensor(vectors).cpu() - want.cpu()).norm(dim=-1).max())
        right = error <= TOLERANCES[self.stock.dtype]
        assert right, f"wrong result of {name}, off by {error:.1e}: not timed"


def multiply_adds(
    shape: Shape, lengths: Sequence[int], pooled: int | None = None, causal: bool = True
) -> int:
    """The multiply-adds of the language model's layers, for sequences of so many rows.

    Args:
        pooled: how many rows of each the last layer is for, keys and values aside; None for all.
        causal: half of attention's square, or all of it, as where torch is given a mask tensor.
    """
    width, depth = shape.hidden_size, shape.num_hidden_layers
    key_width = width // shape.num_attention_heads * shape.num_key_value_heads
    keys = 2 * width * key_width  # and values
    others = 2 * width**2 + 3 * width * shape.intermediate_size

    def layer(length: int, rows: int) -> int:
        pairs = rows * length - (rows * (rows - 1) // 2 if causal else 0)
        return length * keys + rows * others + 2 * width * pairs

    return sum((depth - 1) * layer(n, n) + layer(n, pooled or n) for n in lengths)


def vision_multiply_adds(tower: Tower, hidden_size: int, patches: Iterable[int]) -> int:
    """The multiply-adds of the vision tower, for these patches and a language model so wide."""
    width = tower.embed_dim
    of_patch = 2 * 3 * PATCH**2 * width  # its pixels, which stand for two frames
    of_patch += tower.depth * 12 * width**2  # an MLP is four times as wide
    of_patch += MERGE**2 * width**2 + width * hidden_size  # the merger, over a token's patches
    return sum(n * of_patch + tower.depth * 2 * width * n**2 for n in patches)


def predicted(shape: Shape, peer: str, lengths: Sequence[int], num_btoks: int = K) -> float:
    """The ratio of our multiply-adds to a peer's."""
    longer = [n + num_btoks for n in lengths]
    ours = multiply_adds(shape, longer, pooled=num_btoks)
    if peer == "full last layer":
        return ours / multiply_adds(shape, longer)
    if peer == "packed last token":
        return ours / multiply_adds(shape, lengths, pooled=1)
    batches = [lengths[at : at + BATCH] for at in range(0, len(lengths), BATCH)]
    padded = [multiply_adds(shape, [max(b)] * len(b), causal=len(set(b)) == 1) for b in batches]
    return ours / sum(padded)


def log_uniform(rng: random.Random, bounds: tuple[int, int]) -> float:
    return math.exp(rng.uniform(*map(math.log, bounds)))


def user_inputs(count: int, text: tuple[int, int], image: tuple[int, int]) -> list[Any]:
    """Texts and pictures of fewest and most tokens."""
    rng, pixels = random.Random(0), np.random.default_rng(0)
    inputs: list[Any] = []
    for i in range(count):
        if i % 4:
            inputs.append("".join(rng.choices("etaoins ", k=round(log_uniform(rng, text)))))
            continue
        area = log_uniform(rng, image) * (PATCH * MERGE) ** 2
        aspect = math.exp(rng.uniform(-0.7, 0.7))
        size = (round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect)), 3)
        picture = pixels.integers(0, 256, size, dtype=np.uint8)
        inputs.append(picture if i % 8 else Image.fromarray(picture))
    rng.shuffle(inputs)
    return inputs


contestants = cache(Contestants)


@cache
def prepared(size: str, num_btoks: int = K) -> tuple[Contestants, list[dict[str, list[int]]]]:
    """The contestants, and samples of random tokens that they embed rightly."""
    four, rng = contestants(SHAPE, TOWER, DEVICE, DTYPE, num_btoks), random.Random(0)
    if size == "mixed":
        lengths = [round(log_uniform(rng, MIXED[1])) for _ in range(MIXED[0])]
    else:
        count, length = map(int, size.split("x"))
        lengths = [length] * count
    tokens = range(len(SPECIAL), SHAPE.vocab_size // 2)
    samples = [{"input_ids": rng.choices(tokens, k=length)} for length in lengths]
    alone = four.alone(samples)
    four.check("btok", four.packed(four.btok, samples), alone)
    four.check("full", four.packed(four.full, samples), alone)
    four.check("last", four.packed(four.last, samples), four.padded(samples))
    return four, samples


@pytest.mark.parametrize(("size", "num_btoks", "peer"), CASES)
def bench_inference(contest: Contest, size: str, num_btoks: int, peer: str) -> None:
    four, samples = prepared(size, num_btoks)
    peers = {
        "padded last token": partial(four.padded, samples),
        "packed last token": partial(four.packed, four.last, samples),
        "full last layer": partial(four.packed, four.full, samples),
    }
    lengths = [len(sample["input_ids"]) for sample in samples]
    contest(
        "inference",
        f"{size}, K = {num_btoks}",
        peer,
        partial(four.packed, four.btok, samples),
        peers[peer],
        dtype=DTYPE,
        flops=2 * multiply_adds(SHAPE, [n + num_btoks for n in lengths], pooled=num_btoks),
        bytes=sum(p.nbytes for p in four.stock.model.language_model.parameters()),
        predicted=predicted(SHAPE, peer, lengths, num_btoks),
        size=size,
        num_btoks=num_btoks,
        lengths=lengths,
    )


@pytest.mark.parametrize("peer", ["padded batches", "one by one"])
def bench_encoding(contest: Contest, peer: str) -> None:
    four, inputs = contestants(SHAPE, TOWER, DEVICE, DTYPE), user_inputs(*CORPUS)
    sides = [as_side(value) for value in inputs]
    samples = [four.processor(side) for side in sides]
    lengths = [len(sample["input_ids"]) for sample in samples]
    patches = [n for sample in samples for shown in sample.get("vision", ()) for n in shown.patches]
    language = multiply_adds(SHAPE, [n + K for n in lengths], pooled=K)
    seeing = vision_multiply_adds(TOWER, SHAPE.hidden_size, patches)
    ours = partial(BTokEncoder(four.btok, four.processor).encode, show_progress=False)
    alone = four.alone(samples)
    theirs: Callable[[], Any]
    if peer == "one by one":
        theirs = lambda: np.concatenate([ours([value]) for value in inputs])  # noqa: E731
        want, expected = alone, 1.0
    else:
        theirs = lambda: four.padded(map(four.processor, sides)).cpu()  # noqa: E731
        want = four.packed(four.last, samples)
        ratio = predicted(SHAPE, "padded last token", lengths)
        expected = (language + seeing) / (language / ratio + seeing)
    four.check("ours", ours(inputs), alone)
    four.check(peer, theirs(), want)
    contest(
        "corpus encoding",
        f"{len(inputs)} inputs",
        peer,
        partial(ours, inputs),
        theirs,
        dtype=DTYPE,
        flops=2 * (language + seeing),
        bytes=sum(p.nbytes for p in four.stock.model.parameters()),
        predicted=expected,
        inputs=len(inputs),
        tokens=sum(lengths),
        images=len(patches),
    )
