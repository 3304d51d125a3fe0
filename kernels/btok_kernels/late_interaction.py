"""Late interaction (MaxSim): each query token meets its best key token.

    s_ij = mean_a max_b query[i, a] . key[j, b]

for N queries of K tokens and M keys of L. The mean, not the sum, so that of unit tokens it is in
[-1, 1], as a cosine is. The N x M x K x L products are never held, nor the K x L of a tile:

    1. scores: per token b of the keys one product [tile] of all query tokens with it; a running
       maximum, and in a byte each which b it was (two, from 257 key tokens on)
    2. gradients: per b, what of d s belongs to it, W_b = where(argmax == b, d s / K, 0), goes into
       d query as W_b @ key_b and into d key_b as W_b.T @ query

A maximum over whole tiles is far cheaper on a CPU than one over a short last dimension. Where
several b attain it, the first takes the gradient, whatever the implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .launch import Reasons, always, choose, no_triton

_TILE_MAXIMA = 1 << 22  # (query token, key) pairs of one tile; 16 times that on a GPU
_BLOCK_MAXIMA = 1 << 19  # of them, those whose running maximum stays in a processor's cache


def _reference(query: Tensor, key: Tensor) -> Tensor:
    """The specification: [N, M], dense, in at least fp32."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    products = torch.einsum("iad,jbd->iajb", query.to(dtype), key.to(dtype))
    return products.max(3).values.mean(1)  # of equal ones `max` takes the first, unlike `amax`


class Similarity(NamedTuple):
    """The kernels or torch functions of one implementation; all without autograd, into memory that
    is given.

    Args:
        scores: of (query [c, ...], key [m, ...]), s [c, m] and what `differentiate` is to be given.
        pairs: of (query [n, ...], key [n, ...]), each row's s with its own key, [n].
        differentiate: of (d s [c, m], that, query, key, d query, d key) writes d query, which is
            contiguous, and adds to d key.
    """

    scores: Callable[[Tensor, Tensor], tuple[Tensor, Any]]
    pairs: Callable[[Tensor, Tensor], Tensor]
    differentiate: Callable[..., None]


def tile_rows(query: Tensor, columns: int) -> int:
    """How many rows of query [N, K, D] make a tile with so many keys."""
    maxima = _TILE_MAXIMA * (16 if query.device.type == "cuda" else 1)
    return max(1, maxima // max(1, query.shape[1] * columns))


def index_dtype(tokens: int) -> torch.dtype:
    """The smallest dtype for the index of a key token among `tokens`."""
    return torch.uint8 if tokens <= 256 else torch.int16 if tokens <= 1 << 15 else torch.int32


def _blocks(query: Tensor, columns: int) -> list[slice]:
    width = max(1, _BLOCK_MAXIMA // max(1, query.shape[:2].numel()))
    width = max(width, 64)  # less is no matrix product any more
    return [slice(at, min(at + width, columns)) for at in range(0, columns, width)]


def _scores(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """s [c, m] and the argmax [c, K, m] over the tokens of key [m, L, D]."""
    c, k, _ = query.shape
    tokens = query.flatten(0, 1)  # [c K, D]
    s = query.new_empty(c, len(key))
    where = torch.empty(c * k, len(key), dtype=index_dtype(key.shape[1]), device=query.device)
    for columns in _blocks(query, len(key)):
        best = tokens @ key[columns, 0].T  # [c K, block]
        product, at = torch.empty_like(best), torch.zeros_like(best, dtype=where.dtype)
        for b in range(1, key.shape[1]):
            torch.mm(tokens, key[columns, b].T, out=product)
            at.masked_fill_(product > best, b)
            torch.maximum(best, product, out=best)
        torch.mean(best.unflatten(0, (c, k)), 1, out=s[:, columns])
        where[:, columns] = at
    return s, where.unflatten(0, (c, k))


def pairs(query: Tensor, key: Tensor) -> Tensor:
    """Each row's s with its own key, [n] in at least fp32, of query [n, K, D] and key [n, L, D]."""
    wide = torch.promote_types(query.dtype, torch.float32)
    # some rows at a time: the products of all are as large as L / D times the queries
    parts = zip(query.split(1024), key.split(1024), strict=True)
    products = (q.to(wide) @ k.to(wide).transpose(1, 2) for q, k in parts)
    return torch.cat([x.amax(2).mean(1) for x in products])


def _differentiate(
    d: Tensor, where: Tensor, query: Tensor, key: Tensor, d_query: Tensor, d_key: Tensor
) -> None:
    """d [c, m] of `_scores` into d_query [c, K, D] and onto d_key [m, L, D]."""
    tokens, d_tokens = query.flatten(0, 1), d_query.zero_().flatten(0, 1)  # [c K, D]
    share = (d / query.shape[1])[:, None]  # [c, 1, m]
    for columns in _blocks(query, len(key)):
        at, d_at = where[..., columns], share[..., columns]
        for b in range(key.shape[1]):
            own = torch.where(at == b, d_at, 0.0).flatten(0, 1)  # [c K, block]
            d_tokens.addmm_(own, key[columns, b])
            d_key[columns, b].addmm_(own.T, tokens)


CHUNKED = Similarity(_scores, pairs, _differentiate)


def similarity(impl: str) -> Similarity:
    """The `Similarity` of an implementation: "triton" or "chunked"."""
    if impl != "triton":
        return CHUNKED
    from .late_interaction_triton import TRITON  # at the first call only

    return TRITON


def computed(x: Tensor, impl: str) -> Tensor:
    """The tensor in the dtype that an implementation takes: the kernels multiply halves, torch in
    at least fp32.
    """
    if impl == "triton":
        return x if x.stride(-1) == 1 else x.contiguous()
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _MaxSim(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, impl: str, with_grad: bool) -> Tensor:
        kind = similarity(impl)
        q, k = computed(query, impl), computed(key, impl)
        s = q.new_empty(len(q), len(k), dtype=torch.promote_types(q.dtype, torch.float32))
        height, kept = tile_rows(q, len(k)), []
        with torch.autocast(query.device.type, enabled=False):  # it would round the products
            for at in range(0, len(q), height):
                s[at : at + height], where = kind.scores(q[at : at + height], k)
                kept += [where] * with_grad
        ctx.save_for_backward(query, key, *kept)
        ctx.impl, ctx.height = impl, height
        return s

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, key, *kept = ctx.saved_tensors
        q, k = computed(query, ctx.impl), computed(key, ctx.impl)
        d_query = torch.empty(q.shape, dtype=upstream.dtype, device=q.device)
        d_key = torch.zeros(k.shape, dtype=upstream.dtype, device=k.device)
        differentiate = similarity(ctx.impl).differentiate
        with torch.autocast(query.device.type, enabled=False):
            for i, where in enumerate(kept):
                rows = slice(i * ctx.height, (i + 1) * ctx.height)
                differentiate(upstream[rows], where, q[rows], k, d_query[rows], d_key)
        return d_query.to(query.dtype), d_key.to(key.dtype), None, None


def implementations(query: Tensor) -> tuple[Reasons, tuple[str, ...]]:
    """The implementations that could compute `maxsim` of such tokens, as `launch.choose` takes
    them: by name why each cannot run, asked by a call, which gives None where it can; and the names
    that "auto" tries.
    """
    reasons: Reasons = {
        "triton": lambda: no_triton(query.device, query.dtype),
        "chunked": always,
        "reference": always,
    }
    return reasons, ("triton", "chunked") if query.device.type == "cuda" else ("chunked",)


def maxsim(query: Tensor, key: Tensor, *, impl: str = "auto") -> Tensor:
    """Late interaction: the mean over a query's tokens of each one's best product with a key's.

    `torch.einsum("iad,jbd->iajb", query, key).max(3).values.mean(1)`, without those N x K x M x L
    products: beyond the result memory is a few tiles, and for the gradients N K M bytes (two each
    for more than 256 key tokens). Differentiable in both; where several tokens of a key attain the
    maximum, the first takes the gradient.

    Args:
        query: [N, K, D], floating, taken as it is (not normalised here). N may be 0.
        key: [M, L, D], of the same dtype and device. M may be 0.
        impl: "triton" (CUDA, fp16, bf16 or fp32), "chunked" (torch), "reference" (dense) or "auto":
            triton where it can run on CUDA, else chunked.

    Returns:
        [N, M] in at least fp32, in which the products add up too. Of unit tokens, in [-1, 1].

    Raises:
        TypeError: a wrong type, dtype or device.
        ValueError: a wrong shape.
        RuntimeError: an `impl` that cannot run here.

    Source: arXiv 2004.12832 (ColBERT), section 3.3, which sums; arXiv 2509.18095 (MetaEmbed).
    """
    name = "maxsim"
    for label, tensor, rows in (("query", query, "N, K"), ("key", key, "M, L")):
        if not isinstance(tensor, Tensor) or tensor.ndim != 3 or not tensor.is_floating_point():
            is_tensor = isinstance(tensor, Tensor)
            had = f"{tensor.dtype} {list(tensor.shape)}" if is_tensor else f"{type(tensor)}"
            kind = f"a floating-point tensor [{rows}, D]"
            raise TypeError(f"{name}: {label} is {had}, expected {kind}")
        if 0 in tensor.shape[1:]:
            shape = f"{list(tensor.shape)}"
            raise ValueError(f"{name}: {label} is {shape}, expected at least one token and D > 0")
    if key.dtype != query.dtype or key.device != query.device:
        theirs, ours = (f"{x.dtype} on {x.device}" for x in (key, query))
        raise TypeError(f"{name}: key is {theirs}, expected {ours} as query")
    if key.shape[2] != query.shape[2]:
        width = query.shape[2]
        raise ValueError(f"{name}: key is {list(key.shape)}, expected D {width} as query's")
    chosen = choose(name, impl, *implementations(query))
    if chosen == "reference":
        with torch.autocast(query.device.type, enabled=False):
            return _reference(query, key)
    with_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad)
    return _MaxSim.apply(query, key, chosen, with_grad)
