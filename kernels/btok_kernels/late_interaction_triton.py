"""Triton kernels of late interaction: `impl="triton"` of late_interaction.py.

Rows are query tokens, K for each query; columns are keys, each of L tokens.

    maxima    a tile [rows, columns]: per key token b the products, over D in steps; their running
              maximum and which b it was
    d query   a tile [D, rows]: per step of columns d s and the argmax once, then for each b the
              keys' tokens b times what of d s is their own
    d key     a tile [D, columns] of one b: per step of rows the queries times what of d s is b's

Gradients come out transposed, so that what a kernel computes, d s where the argmax is b, is the
second factor of its product. As the first it would be in registers, which Triton 3.6 lets the next
step write while a product of Hopper's still reads them (`make aot` finds that).

Sums are fp32 and each element is added to by one program of one launch: no atomics, the same bits
on every run. d s is multiplied in the inputs' dtype, fp16 after a scaling by a power of two that
the largest of a tile sets, so that small ones do not underflow.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .late_interaction import Similarity, index_dtype, pairs

# Sizes that differ from batch to batch do not compile a kernel again.
_kernel = triton.jit(do_not_specialize=("R", "M", "K", "L"))


@_kernel
def _maxima_kernel(
    Q, KEYS, BEST, WHERE,
    stride_q, stride_k, stride_l, stride_s, R, M, L, D,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BEST and WHERE [R, stride_s] of one tile: the largest product over L tokens, and whose."""
    row_tiles = tl.cdiv(R, BLOCK_N)
    offs_n = (tl.program_id(0) % row_tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = (tl.program_id(0) // row_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_n, mask_m = offs_n < R, offs_m < M
    q_ptrs = Q + offs_n[:, None] * stride_q + offs_d[None, :]  # [BLOCK_N, BLOCK_D]
    k_ptrs = KEYS + offs_m[None, :] * stride_k + offs_d[:, None]  # [BLOCK_D, BLOCK_M]
    best = tl.full([BLOCK_N, BLOCK_M], float("-inf"), tl.float32)
    where = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    tl.assume(D > 0)  # else ptxas drains every product of the loop before the next
    for b in range(L):
        s = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for d in range(0, D, BLOCK_D):
            mask_d = d + offs_d < D
            q = tl.load(q_ptrs + d, mask=mask_n[:, None] & mask_d[None, :], other=0.0)
            k = tl.load(k_ptrs + d, mask=mask_m[None, :] & mask_d[:, None], other=0.0)
            s = tl.dot(q, k, s, input_precision="ieee")
        better = (s > best) | (s != s)  # NaN stays, as in torch
        where = tl.where(better, b, where)
        best = tl.where(better, s, best)
        k_ptrs += stride_l
    at = offs_n[:, None] * stride_s + offs_m[None, :]
    # rows are padded: a mask that could end anywhere would store one element at a time
    mask = mask_n[:, None] & (offs_m < stride_s)[None, :]
    tl.store(BEST + at, best, mask=mask)
    tl.store(WHERE + at, where.to(WHERE.dtype.element_ty), mask=mask)


@_kernel
def _d_query_tokens_kernel(
    D_SCORES, WHERE, KEYS, FACTOR, D_QUERY,
    stride_s, stride_k, stride_l, R, M, K, L, D,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of D_QUERY [R, D], by BLOCK_K keys; D_SCORES is [R / K, stride_s]."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n, mask_d = offs_n < R, offs_d < D
    d_ptrs = D_SCORES + (offs_n // K)[None, :] * stride_s
    at_ptrs = WHERE + offs_n[None, :] * stride_s
    acc = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
    tl.assume(L > 0)
    for start in range(0, M, BLOCK_K):
        offs_m = start + offs_k
        # read transposed: [BLOCK_K, BLOCK_N]
        mask = (offs_m < stride_s)[:, None] & mask_n[None, :]
        d = tl.load(d_ptrs + offs_m[:, None], mask=mask, other=0.0)
        at = tl.load(at_ptrs + offs_m[:, None], mask=mask, other=0).to(tl.int32)
        k_ptrs = KEYS + offs_m.to(tl.int64)[None, :] * stride_k + offs_d[:, None]
        mask_k = (offs_m < M)[None, :] & mask_d[:, None]
        for b in range(L):
            k = tl.load(k_ptrs + b * stride_l, mask=mask_k, other=0.0)  # [BLOCK_D, BLOCK_K]
            own = tl.where(at == b, d, 0.0).to(d.dtype)
            acc = tl.dot(k, own, acc, input_precision="ieee")
    out_ptrs = D_QUERY + offs_n[None, :] * D + offs_d[:, None]
    tl.store(out_ptrs, acc * tl.load(FACTOR), mask=mask_n[None, :] & mask_d[:, None])


@_kernel
def _d_key_tokens_kernel(
    D_SCORES, WHERE, Q, FACTOR, D_KEY,
    stride_s, stride_q, stride_dk, stride_dl, R, M, K, L, D,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Onto one tile of D_KEY [M, L, D], the tokens b of some keys, by BLOCK_K rows."""
    b = tl.program_id(0) % L
    offs_m = (tl.program_id(0) // L).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m, mask_d = offs_m < M, offs_d < D
    acc = tl.zeros([BLOCK_D, BLOCK_M], tl.float32)
    tl.assume(R > 0)
    for start in range(0, R, BLOCK_K):
        offs_n = (start + offs_k).to(tl.int64)
        mask_n = offs_n < R
        mask = mask_n[:, None] & (offs_m < stride_s)[None, :]
        d_ptrs = D_SCORES + (offs_n // K)[:, None] * stride_s + offs_m[None, :]
        d = tl.load(d_ptrs, mask=mask, other=0.0)  # [BLOCK_K, BLOCK_M]
        at_ptrs = WHERE + offs_n[:, None] * stride_s + offs_m[None, :]
        at = tl.load(at_ptrs, mask=mask, other=0).to(tl.int32)
        q_ptrs = Q + offs_n[None, :] * stride_q + offs_d[:, None]
        q = tl.load(q_ptrs, mask=mask_n[None, :] & mask_d[:, None], other=0.0)
        own = tl.where(at == b, d, 0.0).to(d.dtype)
        acc = tl.dot(q, own, acc, input_precision="ieee")  # q: [BLOCK_D, BLOCK_K]
    out_ptrs = D_KEY + offs_m[None, :] * stride_dk + b * stride_dl + offs_d[:, None]
    mask = mask_m[None, :] & mask_d[:, None]
    out = tl.load(out_ptrs, mask=mask, other=0.0)  # [BLOCK_D, BLOCK_M]
    tl.store(out_ptrs, out + acc * tl.load(FACTOR), mask=mask)


def _scores(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """s [c, m], fp32, and the argmax [c, K, m or some more] over the tokens of key [m, L, D]."""
    (c, k, dim), (m, length, _) = query.shape, key.shape
    tokens = query.reshape(c * k, dim)
    padded = triton.cdiv(m, 16) * 16  # so that all rows are aligned
    best = torch.empty(c * k, padded, device=query.device)
    where = torch.empty(best.shape, dtype=index_dtype(length), device=query.device)

    def run(meta: dict[str, int]) -> None:
        tiles = triton.cdiv(c * k, meta["BLOCK_N"]) * triton.cdiv(m, meta["BLOCK_M"])
        _maxima_kernel[(tiles,)](
            Q=tokens, KEYS=key, BEST=best, WHERE=where, stride_q=tokens.stride(0),
            stride_k=key.stride(0), stride_l=key.stride(1), stride_s=best.stride(0),
            R=c * k, M=m, L=length, D=dim, **meta,
        )  # fmt: skip

    if best.numel():
        with launch.on(query.device):
            run(launch.contrastive("maxima", tokens, (), run))
    return best.view(c, k, -1)[..., :m].mean(1), where.view(c, k, -1)


def _differentiate(
    d: Tensor, where: Tensor, query: Tensor, key: Tensor, d_query: Tensor, d_key: Tensor
) -> None:
    """d [c, m], fp32, of `_scores` into d_query [c, K, D] and onto d_key [m, L, D], both fp32."""
    (c, k, dim), (m, length, _) = query.shape, key.shape
    if not d.numel():
        d_query.zero_()
        return
    tokens = query.reshape(c * k, dim)
    gain = torch.ones_like(d[0, :1])
    if query.dtype == torch.float16:  # the largest to 2^13 or a little more
        exponent = torch.frexp(d.abs().amax()).exponent.clamp(min=-100)
        gain = torch.ldexp(gain, 14 - exponent)
    scores = torch.zeros(c, where.shape[2], dtype=query.dtype, device=query.device)
    scores[:, :m] = d * gain
    factor = 1 / (gain * k)
    shared: dict[str, Any] = {"D_SCORES": scores, "WHERE": where, "stride_s": where.stride(1)}
    shared |= {"R": c * k, "M": m, "K": k, "L": length, "D": dim}

    def run_query(meta: dict[str, int]) -> None:
        grid = triton.cdiv(c * k, meta["BLOCK_N"]), triton.cdiv(dim, meta["BLOCK_D"])
        _d_query_tokens_kernel[grid](
            KEYS=key, FACTOR=factor, D_QUERY=d_query, stride_k=key.stride(0),
            stride_l=key.stride(1), **shared, **meta,
        )  # fmt: skip

    def run_key(meta: dict[str, int], factor: Tensor) -> None:
        grid = triton.cdiv(m, meta["BLOCK_M"]) * length, triton.cdiv(dim, meta["BLOCK_D"])
        _d_key_tokens_kernel[grid](
            Q=tokens, FACTOR=factor, D_KEY=d_key, stride_q=tokens.stride(0),
            stride_dk=d_key.stride(0), stride_dl=d_key.stride(1), **shared, **meta,
        )  # fmt: skip

    with launch.on(query.device):
        run_query(launch.contrastive("d_query_tokens", tokens, (), run_query))
        # a search adds 0 times what there is to add
        nothing = partial(run_key, factor=torch.zeros_like(factor))
        run_key(launch.contrastive("d_key_tokens", tokens, (), nothing), factor)


TRITON = Similarity(_scores, pairs, _differentiate)
