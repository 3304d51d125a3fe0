"""condensed_attention, forward and forward + backward, beside other ways to the same attention.

On a CPU: the sdpa path in fp32, 12 query and 2 key heads of 64, on packed rows of about 4,000 and
1,000 tokens (4 bottleneck tokens a sequence), and on one plain causal sequence of 2,000, where
"per segment" is a single call of torch's fused attention. On a CUDA device: the Triton kernels in
bf16, heads of 128, on every length mix beside every peer that runs there. Both results are first
checked against the reference. Operations are 4 D per pair of row and key that the mask keeps and
query head forward, 10 D more backward; `predicted` is the share of pairs that the mask keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.harness import DEVICE, Contest
from bench.peers import PEERS, Attention, attention_inputs, filled, kept_pairs, mixes, truth
from btok_kernels.layout import CondensedLayout

HEADS, KEY_HEADS = 12, 2
if DEVICE == "cuda":
    OURS, DTYPE, DIM, TOLERANCE = "triton", torch.bfloat16, 128, 1e-2
    LAYOUTS = mixes()
    CASES = [(mix, peer) for peer in PEERS if peer != OURS for mix in LAYOUTS]
else:
    OURS, DTYPE, DIM, TOLERANCE = "sdpa", torch.float32, 64, 1e-5
    LAYOUTS = {
        "packed 4k": filled(4000, (150, 600), (5, 200)),
        "packed 1k": filled(1000, (40, 150), (5, 50)),
        "plain causal 2k": CondensedLayout.from_lengths([2000], [0], 0),
    }
    CASES = [("packed 4k", "dense mask"), ("packed 1k", "dense mask")]
    CASES += [("packed 4k", "per segment"), ("plain causal 2k", "per segment")]
DIRECTIONS = ("forward", "forward + backward")


@cache
def prepared(
    layout: CondensedLayout, dim: int = DIM, dtype: torch.dtype = DTYPE
) -> tuple[CondensedLayout, list[Tensor], list[Tensor]]:
    """The layout on the device; q, k, v and the gradient of the output; what they should give."""
    layout = layout.to(DEVICE)
    inputs = attention_inputs(layout, HEADS, KEY_HEADS, dim, dtype)
    return layout, inputs, truth(layout, *inputs)


def hold(
    contest: Contest,
    case: str,
    names: tuple[str, str],
    layout: CondensedLayout,
    direction: str,
    dim: int = DIM,
    dtype: torch.dtype = DTYPE,
    makers: Mapping[str, Callable[[CondensedLayout], Attention]] = PEERS,
    **facts: Any,
) -> None:
    """A contest between two of `makers`, ours first, in one direction."""
    layout, (q, k, v, grad), expected = prepared(layout, dim, dtype)
    backward = direction == "forward + backward"

    def step(attention: Attention) -> list[Tensor]:
        with torch.set_grad_enabled(backward):
            out = attention(q, k, v)
        return [out, *torch.autograd.grad(out, (q, k, v), grad)] if backward else [out]

    if DEVICE == "cuda":
        torch.compiler.reset()  # beyond some shapes it would run what it has not compiled
    ours, theirs = (cache(partial(makers[name], layout)) for name in names)
    moved = [q, k, v, q] + ([q, q, k, v] if backward else [])  # out is as large as q
    contest(
        "condensed attention",
        f"{case}, {direction}",
        names[1],
        lambda: step(ours()),
        lambda: step(theirs()),
        dtype=dtype,
        flops=(14 if backward else 4) * dim * HEADS * kept_pairs(layout),
        bytes=sum(tensor.nbytes for tensor in moved),
        expected=expected,
        tolerance=TOLERANCE,
        rows=layout.num_rows,
        sequences=len(layout),
        direction=direction,
        impl=names[0],
        dim=dim,
        **facts,
    )


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("mix", "peer"), CASES)
def bench_condensed_attention(contest: Contest, mix: str, peer: str, direction: str) -> None:
    layout = LAYOUTS[mix]
    share = kept_pairs(layout) / layout.num_rows**2 if peer == "dense mask" else None
    hold(contest, mix, (OURS, peer), layout, direction, predicted=share)
