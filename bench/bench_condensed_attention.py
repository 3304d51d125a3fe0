"""condensed_attention on a packed row of about 4,000 tokens, beside torch with a dense mask.

A row of sources of 150-600 tokens, 4 bottleneck tokens and targets of 5-200; 12 query and 2 key
heads of 64. Every case first checks its result against the reference.
"""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

from btok.kernels import CondensedLayout, condensed_attention

HEADS, KEY_HEADS, DIM = 12, 2, 64


def make_layout() -> CondensedLayout:
    rng = random.Random(0)
    source: list[int] = []
    target: list[int] = []
    while sum(source) + sum(target) + 4 * len(source) < 4000:
        source.append(rng.randrange(150, 601))
        target.append(rng.randrange(5, 201))
    return CondensedLayout.from_lengths(source, target, 4)


def dense(q, k, v, layout):
    """torch's fused attention given the T x T mask."""
    rows = torch.arange(layout.num_rows)
    sees = (rows[None] <= rows[:, None]) & (rows[None] >= layout.row_first[:, None])
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=sees, enable_gqa=True)
    return out[0].transpose(0, 1)


def step(attention, q, k, v, layout, grad):
    out = attention(q, k, v, layout)
    return (out, *torch.autograd.grad(out, (q, k, v), grad)) if grad is not None else (out,)


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("name", ["sdpa", "dense mask"])
def bench_packed_row(benchmark, name, direction):
    layout = make_layout()
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(layout.num_rows, heads, DIM, generator=generator)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
    )
    if direction == "forward":
        grad = None
    else:
        q, k, v = (t.requires_grad_() for t in (q, k, v))
    attention = condensed_attention if name == "sdpa" else dense

    def reference(*tensors):
        return condensed_attention(*tensors, impl="reference")

    for got, expected in zip(
        step(attention, q, k, v, layout, grad),
        step(reference, q, k, v, layout, grad),
        strict=True,
    ):
        assert (got - expected).abs().max() < 1e-4, "wrong result: not timed"
    benchmark.group = direction
    benchmark.extra_info |= {"tokens": layout.num_rows, "sequences": len(layout), "impl": name}
    benchmark.pedantic(
        step, (attention, q, k, v, layout, grad), rounds=5, warmup_rounds=1, iterations=1
    )
