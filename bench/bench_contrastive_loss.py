"""contrastive_loss with its gradients beside other ways to the same loss.

On a CPU the chunked way in fp32 on 4,096 rows of 256; ROWS=8192 takes so many, DIM=32 as wide ones.
On a GPU the Triton way in bf16 on 4k to 128k rows of 1,536; third parties' kernels, which may hang
or crash, come last. Late interaction, of rows of several tokens of 128: on a CPU 512 rows of 8,
LATE_ROWS=8192 TOKENS=16 takes so many; on a GPU 2k to 8k rows of 16. Both results are first checked
against plain torch in fp32.

Operations are those of three matrix products, query @ key.T and its two gradients' (of late
interaction over all pairs of tokens, though of the gradients' terms all but one in L are 0); both
directions need no others, whatever an implementation does. Bytes are the inputs and the gradients,
once each.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import cache, partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench.harness import DEVICE, Contest
from bench.peers import chunked_late_interaction, searched
from btok.kernels import contrastive_loss
from btok_kernels import launch

if DEVICE == "cuda":
    OURS, DTYPE, DIM, TOLERANCE = "triton", torch.bfloat16, 1536, 2e-2
    SIZES = [1 << n for n in range(12, 18)]
    TOKENS, LATE_SIZES = 16, [1 << n for n in range(11, 14)]
else:
    OURS, DTYPE, TOLERANCE = "chunked", torch.float32, 1e-4
    DIM = int(os.environ.get("DIM", 256))
    SIZES = [int(os.environ.get("ROWS", 4096))]
    TOKENS = int(os.environ.get("TOKENS", 8))
    LATE_SIZES = [int(os.environ.get("LATE_ROWS", 512))]
LATE_DIM = 128
TAU = 0.02
DIRECTIONS = ("one direction", "both directions")
Loss = Callable[[Tensor, Tensor, bool], Tensor]  # query, key, whether both directions


def both(loss_of: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    """A loss that is the given one in a single direction, or the mean of both directions."""

    def loss(query: Tensor, key: Tensor, bidirectional: bool) -> Tensor:
        forth = loss_of(query, key)
        return (forth + loss_of(key, query)) / 2 if bidirectional else forth

    return loss


def labels(query: Tensor) -> Tensor:
    return torch.arange(len(query), device=query.device)


def eager(query: Tensor, key: Tensor, bidirectional: bool) -> Tensor:
    logits = (query @ key.T).float() / TAU
    loss = F.cross_entropy(logits, labels(query))
    return (loss + F.cross_entropy(logits.T, labels(query))) / 2 if bidirectional else loss


@both
def chunked_torch(query: Tensor, key: Tensor) -> Tensor:
    """Cross-entropy of 1,024 rows at a time, their logits made again in the backward."""

    def part(rows: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy((rows @ key.T).float() / TAU, targets, reduction="sum")

    pairs = zip(query.split(1024), labels(query).split(1024), strict=True)
    sums = [checkpoint(part, *pair, use_reentrant=False) for pair in pairs]
    return torch.stack(sums).sum() / len(query)


@both
def linear_cross_entropy(query: Tensor, key: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()  # without any, all logits are held
    return F.linear_cross_entropy(query / TAU, key, labels(query), options=options)


@both
def liger(query: Tensor, key: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(key, query / TAU, labels(query))


@both
def cut_cross_entropy(query: Tensor, key: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy as cut

    return cut(query / TAU, key, labels(query))


@both
def inf_cl(query: Tensor, key: Tensor) -> Tensor:
    from inf_cl import cal_inf_loss

    return cal_inf_loss(query, key, scale=torch.tensor(1 / TAU, device=query.device))


def late_torch(query: Tensor, key: Tensor, bidirectional: bool) -> Tensor:
    return chunked_late_interaction(query, key, TAU, bidirectional)


def ours(chunk: Callable[..., int] = launch.contrastive_chunk, impl: str = OURS) -> Loss:
    def loss(query: Tensor, key: Tensor, bidirectional: bool) -> Tensor:
        options: dict[str, Any] = {"temperature": TAU, "bidirectional": bidirectional}
        with mock.patch.object(launch, "contrastive_chunk", chunk):
            return contrastive_loss(query, key, **options, impl=impl)

    return loss


PEERS: dict[str, Loss] = {"eager": eager, "chunked torch": chunked_torch}
if shutil.which("c++"):
    PEERS["torch.compile"] = torch.compile(eager, dynamic=False)
if hasattr(F, "linear_cross_entropy"):
    PEERS["linear_cross_entropy"] = linear_cross_entropy
if DEVICE == "cuda":
    PEERS |= {"searched": searched(ours()), "liger_kernel": liger}
    PEERS |= {"cut_cross_entropy": cut_cross_entropy, "inf_cl": inf_cl}


@cache
def inputs(*shape: int) -> tuple[Tensor, Tensor]:
    """Unit rows, query and key, with a loss of 1 to 8."""
    g = torch.Generator().manual_seed(0)
    key = F.normalize(torch.randn(shape, generator=g), dim=-1)
    query = F.normalize(key + 4 * F.normalize(torch.randn(shape, generator=g), dim=-1), dim=-1)
    query, key = (x.to(DEVICE, DTYPE).requires_grad_() for x in (query, key))
    return query, key


def step(loss_of: Loss, query: Tensor, key: Tensor, bidirectional: bool) -> list[Tensor]:
    """The loss and the gradients of query and key."""
    loss = loss_of(query, key, bidirectional)
    return [loss.detach(), *torch.autograd.grad(loss, (query, key))]


@cache
def truth(shape: tuple[int, ...], bidirectional: bool) -> list[Tensor]:
    """The loss and its gradients by plain torch in fp32, on the host."""
    query, key = (x.detach().float().requires_grad_() for x in inputs(*shape))
    loss = chunked_torch if len(shape) == 2 else late_torch
    return [x.cpu() for x in step(loss, query, key, bidirectional)]


def hold(
    contest: Contest, bench: str, peer: str, theirs: Loss, shape: tuple[int, ...], direction: str
) -> None:
    """A contest with one peer in one direction; query and key have `shape`, [N, D] or [N, K, D]."""
    bidirectional = direction == "both directions"
    torch.compiler.reset()  # beyond some shapes it would run what it has not compiled
    query, key = inputs(*shape)
    rows, *tokens, dim = shape
    contest(
        bench,
        f"{rows} rows{''.join(f' of {n}' for n in tokens)}, {direction}",
        peer,
        *(partial(step, loss, query, key, bidirectional) for loss in (ours(), theirs)),
        dtype=DTYPE,
        flops=3 * 2 * (query.numel() // dim) ** 2 * dim,
        bytes=2 * (query.nbytes + key.nbytes),
        expected=truth(shape, bidirectional),
        tolerance=TOLERANCE,
        rows=rows,
        dim=dim,
        direction=direction,
        impl=OURS,
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("peer", "rows"), [(peer, rows) for peer in PEERS for rows in SIZES])
def bench_contrastive_loss(contest: Contest, peer: str, rows: int, direction: str) -> None:
    hold(contest, "contrastive loss", peer, PEERS[peer], (rows, DIM), direction)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("rows", LATE_SIZES)
def bench_late_interaction(contest: Contest, rows: int, direction: str) -> None:
    shape = rows, TOKENS, LATE_DIM
    hold(contest, "late interaction", "chunked torch", late_torch, shape, direction)
