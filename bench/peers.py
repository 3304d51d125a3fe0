"""Length mixes of packed rows, and everything that computes our attention over them; late
interaction by plain torch.

A peer of the attention takes the layout, prepares what a training step would prepare once per batch
(schedules, masks, indices), and returns a function of q [T, Hq, D] and k, v [T, Hkv, D] to
[T, Hq, D].
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from btok_kernels.condensed_attention import _two_calls, condensed_attention
from btok_kernels.layout import CondensedLayout, Half

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
BTOKS = 4


def filled(rows: int, source: tuple[int, int], target: tuple[int, int]) -> CondensedLayout:
    """Sequences of random lengths, [least, most] tokens of each part, until `rows` are taken."""
    rng = random.Random(0)
    sources: list[int] = []
    targets: list[int] = []
    while sum(sources) + sum(targets) + BTOKS * len(sources) < rows:
        sources.append(rng.randrange(source[0], source[1] + 1))
        targets.append(rng.randrange(target[0], target[1] + 1))
    return CondensedLayout.from_lengths(sources, targets, BTOKS)


def mixes(divisor: int = 1) -> dict[str, CondensedLayout]:
    """Layouts of some length mixes by name: about 16k packed rows each, or that over `divisor`."""

    def n(length: int) -> int:
        return max(1, length // divisor)

    def equal(sequences: int, source: int, target: int) -> CondensedLayout:
        return CondensedLayout.from_lengths([n(source)] * sequences, [n(target)] * sequences, BTOKS)

    return {
        "uniform 512": equal(32, 448, 60),
        "image queries": filled(n(16384), (n(300), n(1500)), (n(5), n(200))),
        "long video": equal(2, 8000, 188),
        "short pairs": filled(n(16384), (n(20), n(120)), (n(5), n(60))),
        "plain causal": CondensedLayout.from_lengths([n(8192)] * 2, [0, 0], 0),
    }


def kept_pairs(layout: CondensedLayout) -> int:
    """(row, key) pairs that the mask keeps."""
    rows = torch.arange(layout.num_rows, device=layout.device)
    return int((rows + 1 - layout.row_first).clamp(min=0).sum())


def attention_inputs(
    layout: CondensedLayout, heads: int, key_heads: int, dim: int, dtype: torch.dtype
) -> list[Tensor]:
    """q, k, v and the gradient of the output, random."""
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(layout.num_rows, n, dim, generator=generator).to(layout.device, dtype)
        for n in (heads, key_heads, key_heads, heads)
    ]
    for tensor in tensors[:3]:
        tensor.requires_grad_()
    return tensors


def truth(layout: CondensedLayout, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    """O, dQ, dK and dV in fp32, a sequence at a time so that the scores fit."""
    inputs = [t.detach().float().requires_grad_() for t in (q, k, v)]
    found = []
    for start, first, border, end in layout.bounds.tolist():
        bounds = torch.tensor([[0, first - start, border - start, end - start]], dtype=torch.int32)
        alone = CondensedLayout(bounds, end - start, layout.device)
        some_q, some_k, some_v = (t[start:end] for t in inputs)
        out = condensed_attention(some_q, some_k, some_v, alone, impl="reference")
        grads = torch.autograd.grad(out, inputs, grad[start:end].float())
        found.append([out.detach(), *(t[start:end] for t in grads)])
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def ours(layout: CondensedLayout, impl: str) -> Attention:
    layout = CondensedLayout(layout.bounds, layout.num_rows, layout.device)  # builds its schedules
    return lambda q, k, v: condensed_attention(q, k, v, layout, impl=impl)


def searched(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The attention call under BTOK_AUTOTUNE=1: its first call searches the fastest launches."""
    return mock.patch.dict(os.environ, BTOK_AUTOTUNE="1")(call)


def dense(layout: CondensedLayout) -> Attention:
    """torch's fused attention given the T x T mask."""
    rows = torch.arange(layout.num_rows, device=layout.device)
    sees = (rows[None] <= rows[:, None]) & (rows[None] >= layout.row_first[:, None])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.is_cuda:  # the kernel there that takes a mask takes no grouped heads
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=sees, enable_gqa=not q.is_cuda)
        return out[0].transpose(0, 1)

    return attend


def per_segment(layout: CondensedLayout) -> Attention:
    """A call of torch's fused attention for each causal segment, [start, border), [first, end)."""
    segments = []
    for start, first, border, end in layout.bounds.tolist():
        segments.append((start, start, border))
        if border < end:
            segments.append((first, border, end))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outputs = []
        for begin, kept, stop in segments:
            qs, ks, vs = (t[begin:stop].transpose(0, 1)[None] for t in (q, k, v))
            out = F.scaled_dot_product_attention(qs, ks, vs, is_causal=True, enable_gqa=True)
            outputs.append(out[0, :, kept - begin :].transpose(0, 1))
        return torch.cat(outputs)

    return attend


def flex(layout: CondensedLayout) -> Attention:
    """FlexAttention, compiled, with its block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    row_first, rows = layout.row_first, layout.num_rows

    def keep(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (key <= row) & (key >= row_first[row])

    build = torch.compile(create_block_mask, dynamic=False)
    mask = build(keep, None, None, rows, rows, device=str(layout.device))
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return attend


def flash(layout: CondensedLayout) -> Attention:
    """FlashAttention on [x ; B] rows, then on target rows with [B ; T] keys."""
    from flash_attn import flash_attn_varlen_func

    def attend(q: Tensor, k: Tensor, v: Tensor, half: Half) -> Tensor:
        longest = max(half.row_lens), max(half.key_lens)
        ends = half.row_ends, half.key_ends
        return flash_attn_varlen_func(q, k, v, *ends, *longest, causal=True)  # from the right

    return lambda q, k, v: _two_calls(q, k, v, layout, attend)


def chunked_late_interaction(
    query: Tensor, key: Tensor, tau: float, bidirectional: bool, rows: int = 0
) -> Tensor:
    """InfoNCE with late interaction of query [N, K, D] and key [N, L, D] as plain torch does it.

    Some rows at a time, `rows` or as many as keep their products [c, K, N, L] at 2^26 numbers,
    which are made again in the backward. The other direction's columns come from the same scores.
    """
    count, tokens = len(query), query.shape[1] * key.shape[1]
    rows = rows or max(1, (1 << 26) // (count * tokens))

    def part(some: Tensor, key: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
        products = torch.einsum("iad,jbd->iajb", some, key)
        logits = products.amax(3).float().mean(1) / tau  # [c, N]
        return logits.logsumexp(1).sum(), logits.logsumexp(0), logits.diagonal(first).sum()

    found = [
        checkpoint(part, some, key, i * rows, use_reentrant=False)
        for i, some in enumerate(query.split(rows))
    ]
    of_rows, of_columns, positives = (torch.stack(x) for x in zip(*found, strict=True))
    loss = (of_rows.sum() - positives.sum()) / count
    if not bidirectional:
        return loss
    return (loss + (of_columns.logsumexp(0).sum() - positives.sum()) / count) / 2


PEERS: dict[str, Callable[[CondensedLayout], Attention]] = {
    "triton": lambda layout: ours(layout, "triton"),
    "hopper": lambda layout: ours(layout, "hopper"),
    "sdpa": lambda layout: ours(layout, "sdpa"),
    "xformers": lambda layout: ours(layout, "xformers"),
    "dense mask": dense,
    "per segment": per_segment,
    "two varlen calls": lambda layout: ours(layout, "varlen"),
    "flex": flex,
    "flash-attn": flash,
    "searched": lambda layout: searched(ours(layout, "triton")),
}
