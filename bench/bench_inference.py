"""Embedding with bottleneck tokens beside last-token pooling on the same random weights.

btok               BTokModel with K bottleneck tokens: packed rows, the last layer for the K rows
                   alone
padded last token  as VLM2Vec embeds: transformers' forward with torch's attention on the inputs in
                   the order given, padded in batches of 16 as its evaluation scripts have it, the
                   last layer in full; without the logits, which it makes and nothing needs
packed last token  BTokModel with K = 0: packed rows, the last layer for the last row alone
full last layer    btok with the last layer for all rows

Gradients are off as BTokEncoder (inference mode) and VLM2Vec's scripts (no_grad) have it. From
lists of token ids to unit vectors: packing and padding are timed, tokenizing is not. A case is
so many inputs of so many tokens, or a set of mixed lengths, log-uniform. On a GPU it is the
language model of Qwen2-VL-2B in bf16. On a CPU it is a twelfth as wide, in fp32, with all 28
layers, since with fewer the last one's shortcut would save more; LONGEST=8192 adds longer inputs,
WIDTH=256 makes it a sixth as wide, where less of the time goes into Python. `predicted` is the
ratio of multiply-adds.
"""

from __future__ import annotations

import copy
import math
import os
import random
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import DEVICE, Contest
from bench.models import pooled_of_padded, random_qwen2_vl
from btok.model import BTokModel

BATCH = 16  # inputs that are padded together
BUDGET = 16384  # packed rows at most, BTokEncoder's default
K = 4
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.1}  # rounding moves a bf16 vector by 0.05


class Shape(NamedTuple):
    """A Qwen2-VL language model; 2B's by default."""

    hidden: int = 1536
    heads: int = 12
    key_heads: int = 2
    mlp: int = 8960
    vocabulary: int = 151936
    layers: int = 28


PEERS = ("padded last token", "packed last token")
LENGTHS = [64, 128, 256, 512, 1024, 2048, 4096, 8192]
if DEVICE == "cuda":
    DTYPE, SHAPE, MIXED = torch.bfloat16, Shape(), (64, 64, 8192)  # inputs, shortest, longest
    # alone, most of an input's time goes into launching: so a batch, too, that one packed row holds
    SIZES = [f"{n}x{length}" for length in LENGTHS for n in {1, min(BATCH, 15360 // length)}]
else:
    width = int(os.environ.get("WIDTH", 128))  # a multiple of 64
    DTYPE, SHAPE = torch.float32, Shape(width, 4, 1, width * 93 // 16, 2000)
    MIXED = (16, 64, 512)
    longest = int(os.environ.get("LONGEST", 1024))
    SIZES = [f"1x{n}" for n in LENGTHS if n <= longest] + ["16x64"]
CASES = [(size, K, peer) for size in [*SIZES, "mixed"] for peer in PEERS]
CASES += [("1x512", k, "packed last token") for k in (1, 2, 8, 16)]
CASES += [(size, K, "full last layer") for size in ("1x64", "1x512", "16x64")]


class Contestants:
    """One backbone's random weights behind all four; inputs are lists of token ids."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype, num_btoks: int = K) -> None:
        unused = {"depth": 1, "embed_dim": 32, "num_heads": 2}
        backbone = random_qwen2_vl(shape, unused, device, dtype).eval()
        self.stock = copy.deepcopy(backbone, {id(p): p for p in backbone.parameters()})

        def ours(num_btoks: int, **options: str) -> BTokModel:
            btoks = range(shape.vocabulary - num_btoks, shape.vocabulary)
            return BTokModel.from_backbone(backbone, btok_token_ids=btoks, **options).eval()

        self.btok, self.full = ours(num_btoks), ours(num_btoks, last_layer="full")
        self.last = ours(0, pooling="last")

    @torch.no_grad()
    def padded(self, inputs: Sequence[list[int]], rows: int = 1) -> Tensor:
        """Transformers' own: the mean of each input's last `rows` rows, [N, D], unit norm."""
        ids = [torch.tensor(tokens) for tokens in inputs]
        batches = [ids[at : at + BATCH] for at in range(0, len(ids), BATCH)]
        pooled = [pooled_of_padded(self.stock.model, batch, rows) for batch in batches]
        return F.normalize(torch.cat(pooled), dim=-1)

    @torch.inference_mode()
    def packed(self, model: BTokModel, inputs: Sequence[list[int]]) -> Tensor:
        """A model of ours, on rows that are filled as BTokEncoder fills them, [N, D]."""
        rows: list[list[int]] = []
        room = 0
        for i in sorted(range(len(inputs)), key=lambda i: -len(inputs[i])):
            length = len(inputs[i]) + len(model.btok_token_ids)
            if length > room:
                rows.append([])
                room = BUDGET
            rows[-1].append(i)
            room -= length
        batches = (model.pack([{"input_ids": inputs[i]} for i in row]) for row in rows)
        pooled = [model(batch.to(model.backbone.device)).embeddings for batch in batches]
        return torch.cat(pooled)[torch.tensor([i for row in rows for i in row]).argsort()]

    def check(self, inputs: Sequence[list[int]]) -> None:
        """Fail unless our embeddings are the stock model's; for btok, of each [x ; B] alone."""
        tolerance = TOLERANCES[self.stock.dtype]
        btoks = list(self.btok.btok_token_ids)
        alone = torch.cat([self.padded([tokens + btoks], rows=len(btoks)) for tokens in inputs])
        for name, want in (("btok", alone), ("full", alone), ("last", self.padded(inputs))):
            error = float((self.packed(getattr(self, name), inputs) - want).norm(dim=-1).max())
            assert error <= tolerance, f"wrong result of {name}, off by {error:.1e}: not timed"


def multiply_adds(
    shape: Shape, lengths: Sequence[int], pooled: int | None = None, causal: bool = True
) -> int:
    """Of the layers, for sequences of so many rows.

    Args:
        pooled: how many rows of each the last layer is for, keys and values aside; None for all.
        causal: half of attention's square, or all of it, as where torch is given a mask tensor.
    """
    keys = 2 * shape.hidden * shape.key_heads * (shape.hidden // shape.heads)  # a row's, and values
    others = 2 * shape.hidden**2 + 3 * shape.hidden * shape.mlp

    def layer(length: int, rows: int) -> int:
        pairs = rows * length - (rows * (rows - 1) // 2 if causal else 0)
        return length * keys + rows * others + 2 * shape.hidden * pairs

    return sum((shape.layers - 1) * layer(n, n) + layer(n, pooled or n) for n in lengths)


def predicted(shape: Shape, peer: str, lengths: Sequence[int], num_btoks: int = K) -> float:
    """The ratio of btok's multiply-adds to the peer's."""
    longer = [n + num_btoks for n in lengths]
    ours = multiply_adds(shape, longer, pooled=num_btoks)
    if peer == "full last layer":
        return ours / multiply_adds(shape, longer)
    if peer == "packed last token":
        return ours / multiply_adds(shape, lengths, pooled=1)
    batches = [lengths[at : at + BATCH] for at in range(0, len(lengths), BATCH)]
    padded = [multiply_adds(shape, [max(b)] * len(b), causal=len(set(b)) == 1) for b in batches]
    return ours / sum(padded)


@cache
def prepared(size: str, num_btoks: int = K) -> tuple[Contestants, list[list[int]]]:
    """The contestants and random inputs that they embed rightly."""
    four, rng = contestants(SHAPE, DEVICE, DTYPE, num_btoks), random.Random(0)
    if size == "mixed":
        count, *bounds = MIXED
        lengths = [round(math.exp(rng.uniform(*map(math.log, bounds)))) for _ in range(count)]
    else:
        count, length = map(int, size.split("x"))
        lengths = [length] * count
    inputs = [[rng.randrange(SHAPE.vocabulary // 2) for _ in range(n)] for n in lengths]
    four.check(inputs)
    return four, inputs


contestants = cache(Contestants)


@pytest.mark.parametrize(("size", "num_btoks", "peer"), CASES)
def bench_inference(contest: Contest, size: str, num_btoks: int, peer: str) -> None:
    four, inputs = prepared(size, num_btoks)
    peers: dict[str, Callable[[Sequence[list[int]]], Tensor]] = {
        "padded last token": four.padded,
        "packed last token": partial(four.packed, four.last),
        "full last layer": partial(four.packed, four.full),
    }
    lengths = [len(tokens) for tokens in inputs]
    moved = sum(p.nbytes for p in four.stock.model.language_model.parameters())
    contest(
        "inference",
        f"{size}, K = {num_btoks}",
        peer,
        partial(four.packed, four.btok, inputs),
        partial(peers[peer], inputs),
        dtype=DTYPE,
        flops=2 * multiply_adds(SHAPE, [n + num_btoks for n in lengths], pooled=num_btoks),
        bytes=moved,
        predicted=predicted(SHAPE, peer, lengths, num_btoks),
        size=size,
        num_btoks=num_btoks,
        lengths=lengths,
    )
