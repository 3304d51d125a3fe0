"""The contrastive loss of rows of several vectors, with its gradients, beside plain torch.

On a CPU the chunked way in fp32 on 512 rows of 8 tokens of 128; ROWS=8192 TOKENS=16 takes so many.
On a GPU the Triton way in bf16 on 2k to 8k rows of 16. Both results are first checked against plain
torch in fp32.

The peer makes the products [c, K, M, L] of some rows at a time, and again in its backward.
Operations are those of three matrix products over all pairs of tokens, query @ key.T and its two
gradients', though of the latter L - 1 of L terms are 0. Bytes are the inputs and the gradients,
once each. `scores_bytes` is what the products of all pairs of tokens would take in fp32.
"""

from __future__ import annotations

import os
from functools import cache, partial

import pytest
import torch
from torch import Tensor

from bench.bench_contrastive_loss import DIRECTIONS, TAU, TOLERANCE, random_pairs, step
from bench.harness import DEVICE, Contest, check
from bench.peers import chunked_late_interaction
from btok.kernels import contrastive_loss

if DEVICE == "cuda":
    OURS, DTYPE, TOKENS = "triton", torch.bfloat16, 16
    SIZES = [1 << n for n in range(11, 14)]
else:
    OURS, DTYPE = "chunked", torch.float32
    TOKENS = int(os.environ.get("TOKENS", 8))
    SIZES = [int(os.environ.get("ROWS", 512))]
DIM = 128
PEER = "chunked torch"


def ours(query: Tensor, key: Tensor, bidirectional: bool) -> Tensor:
    return contrastive_loss(query, key, temperature=TAU, bidirectional=bidirectional, impl=OURS)


def peer(query: Tensor, key: Tensor, bidirectional: bool) -> Tensor:
    return chunked_late_interaction(query, key, TAU, bidirectional)


@cache
def inputs(rows: int) -> tuple[Tensor, Tensor]:
    """Unit tokens, query and key, with a loss of 1 to 8."""
    return random_pairs(rows, TOKENS, DIM)


@cache
def truth(rows: int, bidirectional: bool) -> list[Tensor]:
    """By plain torch in fp32."""
    query, key = (x.detach().float().requires_grad_() for x in inputs(rows))
    return [x.cpu() for x in step(peer, query, key, bidirectional)]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("rows", SIZES)
def bench_late_interaction(contest: Contest, rows: int, direction: str) -> None:
    bidirectional = direction == "both directions"
    query, key = inputs(rows)
    expected = truth(rows, bidirectional)
    we, they = (partial(step, loss, query, key, bidirectional) for loss in (ours, peer))
    check(OURS, we(), expected, TOLERANCE)
    check(PEER, they(), expected, TOLERANCE)
    contest(
        "late interaction",
        f"{rows} rows of {TOKENS}, {direction}",
        PEER,
        we,
        they,
        dtype=DTYPE,
        flops=3 * 2 * (rows * TOKENS) ** 2 * DIM,
        bytes=2 * (query.nbytes + key.nbytes),
        scores_bytes=4 * (rows * TOKENS) ** 2,
        rows=rows,
        tokens=TOKENS,
        dim=DIM,
        direction=direction,
        impl=OURS,
    )
