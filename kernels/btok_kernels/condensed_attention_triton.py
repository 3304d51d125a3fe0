"""The Triton kernels of condensed attention, forward and backward.

A program takes one block of one of `CondensedLayout.tiles`, the longest first. A row tile is up to
TILE rows of one sequence that share their first key; with the G query heads of a key head it makes
TILE * G packed rows, packed row p being row p // G in head p % G, so that a short target still
fills a matrix product. Steps:

    forward    per BLOCK_M packed rows, over the blocks of the keys they see: O, LSE
    delta      rowsum(O * dO)
    dK, dV     per BLOCK_N keys of a key tile, over the blocks of the packed rows that see them; the
               scores come out transposed, so that no product needs the transpose of a result
    dQ         per BLOCK_M packed rows, over the blocks of the forward

No block that the mask empties is visited; those on the diagonal are MASKED, the others are seen
whole. Blocks are counted from the first key (or row) of their own tile, so the order of every sum
is the same wherever a sequence lies. No atomics: the same bits on every run. Where targets have
budgets of bottleneck rows, those of a row tile, APART, are blocks of their own after the others.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, empty, empty_like
from torch.nn import Parameter

from . import launch
from .condensed_attention import fits_32_bits
from .layout import TILE
from .start import Constants, start

DELTA_ROWS = 32
DENSE = torch.contiguous_format  # outputs, however the rows of an input lie
PLAIN = {Tensor, Parameter}  # others have dispatch of their own
LOG2E = tl.constexpr(1.4426950408889634)
INF = tl.constexpr(float("inf"))


@triton.jit
def _load(ptrs, mask, offs_d, D: tl.constexpr):
    """[B, BLOCK_D] at `ptrs`; 0 where `mask` [B] (None: nowhere) is not set and behind column D."""
    if mask is not None:
        mask = mask[:, None]
    if offs_d.shape[0] != D:
        mask = offs_d[None, :] < D if mask is None else mask & (offs_d[None, :] < D)
    return tl.load(ptrs, mask=mask) if mask is None else tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def _store(ptrs, x, mask, offs_d, D: tl.constexpr):
    mask = mask[:, None]
    if offs_d.shape[0] != D:
        mask = mask & (offs_d[None, :] < D)
    tl.store(ptrs, x, mask=mask)


@triton.jit
def _row_block(
    TILES, item, KV_HEADS,
    TILE: tl.constexpr, G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    APART: tl.constexpr,
):  # fmt: skip
    """The packed rows of one work item and the keys they see, counted from the tile's firsts."""
    BLOCKS: tl.constexpr = TILE * G // BLOCK_M  # of a tile and key head
    tile = TILES + (6 if APART else 4) * (item // (BLOCKS * KV_HEADS))
    head = item // BLOCKS % KV_HEADS
    begin = item % BLOCKS * BLOCK_M
    row, last_row, key, last_key = (
        tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    )  # fmt: skip
    packed = begin + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    position = row - key + packed // G  # [BLOCK_M] of a row among the keys: it sees [0, position]
    low = row - key + begin // G
    keys = tl.minimum(last_key - key, row - key + (begin + BLOCK_M - 1) // G + 1)
    # in blocks that all rows see; the first row's own key is never among them, so that there is
    # always a block left to mask
    whole = low // BLOCK_N * BLOCK_N
    rows = (last_row - row) * G
    # offsets of heads, rows and keys may pass 2^31 elements
    head, row, key = head.to(tl.int64), row.to(tl.int64), key.to(tl.int64)
    return head, row, begin, rows, key, packed, position, whole, keys


@triton.jit
def _keys_apart(TILES, item, KV_HEADS, TILE: tl.constexpr, G: tl.constexpr, BLOCK_M: tl.constexpr):
    """The first of the keys that all rows of a work item see besides, and how many they are."""
    tile = TILES + 6 * (item // (TILE * G // BLOCK_M * KV_HEADS))
    first, last = tl.load(tile + 4), tl.load(tile + 5)
    return first.to(tl.int64), last - first


@triton.jit
def _packed_ptrs(
    base, begin, offs_d, stride_t, stride_h, G: tl.constexpr, BLOCK_M: tl.constexpr
):  # fmt: skip
    """[BLOCK_M, BLOCK_D] of the packed rows from `begin` on; `base` is of packed row 0.

    The host sees to it that offsets within a block fit 32 bits; those of the block may not.
    """
    begin = tl.cast(begin, tl.uint32)  # divided in fewer instructions
    packed = begin % G + tl.arange(0, BLOCK_M).to(tl.uint32)
    token, head = (packed // G).to(tl.int32), (packed % G).to(tl.int32)
    base += (begin // G).to(tl.int64) * stride_t
    return base + ((token * stride_t + head * stride_h)[:, None] + offs_d[None, :])


@triton.jit
def _attend(
    acc, row_sum, row_max, q, k_ptrs, v_ptrs, stride_kt, stride_vt,
    key, begin, end, keys, position, scale_log2, offs_d,
    D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The forward over the blocks from `begin` to `end` of `keys` that are counted from `key`."""
    for n in tl.range(begin, end, BLOCK_N):
        k_block = k_ptrs + (key + n) * stride_kt
        v_block = v_ptrs + (key + n) * stride_vt
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < keys if MASKED else None
        k = _load(k_block, mask_n, offs_d, D)  # [BLOCK_N, BLOCK_D]
        s = tl.dot(q, k.T, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if MASKED:
            # scaled before the mask: a scale of 0 times -inf would be NaN
            s = tl.where(offs_n[None, :] <= position[:, None], s * scale_log2, -INF)
            new_max = tl.maximum(row_max, tl.max(s, 1))  # [BLOCK_M]
            p = tl.exp2(s - new_max[:, None])  # [BLOCK_M, BLOCK_N]
        else:
            new_max = tl.maximum(row_max, tl.max(s, 1) * scale_log2)  # [BLOCK_M]
            p = tl.exp2(s * scale_log2 - new_max[:, None])  # [BLOCK_M, BLOCK_N]
        shrink = tl.exp2(row_max - new_max)  # [BLOCK_M]
        v = _load(v_block, mask_n, offs_d, D)  # [BLOCK_N, BLOCK_D]
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        row_sum = row_sum * shrink + tl.sum(p, 1)
        row_max = new_max
    return acc, row_sum, row_max


# a batch's sizes are not specialised: a multiple of 16 would compile the kernel once more
@triton.jit(do_not_specialize=["stride_lh"])
def _forward_kernel(
    Q, K, V, OUT, LSE, TILES,
    stride_qt, stride_qh,
    stride_kt, stride_kh,
    stride_vt, stride_vh,
    stride_ot, stride_oh,
    stride_lh,
    KV_HEADS, scale_log2,
    TILE: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    offs_d = tl.arange(0, BLOCK_D)
    offs_n = tl.arange(0, BLOCK_N)[:, None]
    head, row, begin, rows, key, packed, position, whole, keys = _row_block(
        TILES, tl.program_id(0), KV_HEADS, TILE, G, BLOCK_M, BLOCK_N, APART
    )
    if begin >= rows:  # behind the end of a short tile, or of the tiles
        return
    mask_m = packed < rows
    out_base = OUT + row * stride_ot + head * G * stride_oh
    lse_base = LSE + head * stride_lh + row * G
    if keys <= 0:  # rows of no sequence
        out_ptrs = _packed_ptrs(out_base, begin, offs_d, stride_ot, stride_oh, G, BLOCK_M)
        _store(out_ptrs, tl.zeros([BLOCK_M, BLOCK_D], OUT.dtype.element_ty), mask_m, offs_d, D)
        tl.store(lse_base + packed, tl.full([BLOCK_M], -INF, tl.float32), mask=mask_m)
        return
    q_base = Q + row * stride_qt + head * G * stride_qh
    q_ptrs = _packed_ptrs(q_base, begin, offs_d, stride_qt, stride_qh, G, BLOCK_M)
    q = _load(q_ptrs, mask_m, offs_d, D)  # [BLOCK_M, BLOCK_D]
    k_base = K + head * stride_kh
    v_base = V + head * stride_vh
    k_ptrs = k_base + offs_n * stride_kt + offs_d[None, :]
    v_ptrs = v_base + offs_n * stride_vt + offs_d[None, :]

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = tl.full([BLOCK_M], -INF, tl.float32)  # of the scores in base 2
    # A loop that may run no time hands its accumulators on untouched; ptxas then waits for every
    # product by itself. The masked one always runs, and the other stands behind a condition.
    tl.assume(keys > whole)
    acc, row_sum, row_max = _attend(
        acc, row_sum, row_max, q, k_ptrs, v_ptrs, stride_kt, stride_vt,
        key, whole, keys, keys, position, scale_log2, offs_d, D, BLOCK_N, True,
    )  # fmt: skip
    if whole > 0:
        acc, row_sum, row_max = _attend(
            acc, row_sum, row_max, q, k_ptrs, v_ptrs, stride_kt, stride_vt,
            key, 0, whole, keys, position, scale_log2, offs_d, D, BLOCK_N, False,
        )  # fmt: skip
    if APART:
        key, keys = _keys_apart(TILES, tl.program_id(0), KV_HEADS, TILE, G, BLOCK_M)
        position = tl.full([BLOCK_M], 1, tl.int32) * (keys - 1)
        if keys > 0:
            acc, row_sum, row_max = _attend(
                acc, row_sum, row_max, q, k_ptrs, v_ptrs, stride_kt, stride_vt,
                key, 0, keys, keys, position, scale_log2, offs_d, D, BLOCK_N, True,
            )  # fmt: skip

    out_ptrs = _packed_ptrs(out_base, begin, offs_d, stride_ot, stride_oh, G, BLOCK_M)
    _store(out_ptrs, (acc / row_sum[:, None]).to(OUT.dtype.element_ty), mask_m, offs_d, D)
    tl.store(lse_base + packed, row_max + tl.log2(row_sum), mask=mask_m)


@triton.jit(do_not_specialize=["stride_lh", "ROWS"])
def _delta_kernel(
    OUT, DO, DELTA,
    stride_ot, stride_oh,
    stride_dot, stride_doh,
    stride_lh,
    ROWS,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    offs_d = tl.arange(0, BLOCK_D)
    begin = tl.program_id(0) * BLOCK_M
    packed = begin + tl.arange(0, BLOCK_M)
    head = tl.program_id(1).to(tl.int64)
    mask_m = packed < ROWS
    o_base = OUT + head * G * stride_oh
    do_base = DO + head * G * stride_doh
    o_ptrs = _packed_ptrs(o_base, begin, offs_d, stride_ot, stride_oh, G, BLOCK_M)
    do_ptrs = _packed_ptrs(do_base, begin, offs_d, stride_dot, stride_doh, G, BLOCK_M)
    o = _load(o_ptrs, mask_m, offs_d, D).to(tl.float32)  # [BLOCK_M, BLOCK_D]
    do = _load(do_ptrs, mask_m, offs_d, D).to(tl.float32)
    tl.store(DELTA + head * stride_lh + packed, tl.sum(o * do, 1), mask=mask_m)


@triton.jit
def _statistics_of(BASE, m, rows, other, BLOCK_M: tl.constexpr):
    """[BLOCK_M] fp32 from row m on; `other` behind the last row.

    A tensor of fewer elements than threads is copied by every thread that needs it, which takes an
    address register for each; so every element is loaded by neighbouring threads, once by each.
    """
    COPIES: tl.constexpr = 256 // BLOCK_M if BLOCK_M > 32 else 1
    offs = m + tl.arange(0, BLOCK_M * COPIES) // COPIES
    copies = tl.load(BASE + offs, mask=offs < rows, other=other)
    return tl.max(tl.reshape(copies, [BLOCK_M, COPIES]), 1)


@triton.jit
def _gather_rows(
    dk, dv, k, v, Q, DO, LSE, DELTA,
    stride_qt, stride_qh,
    stride_dot, stride_doh,
    begin, end, rows, scale_log2, offs_d,
    G: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, STAGES: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """dK, dV, or both over the blocks of packed rows from `begin` to `end`."""
    for m in tl.range(begin, end, BLOCK_M, num_stages=STAGES):
        packed = m + tl.arange(0, BLOCK_M)
        mask_m = packed < rows
        lse = _statistics_of(LSE, m, rows, INF, BLOCK_M)  # [BLOCK_M]; p = 0 behind the last row
        delta = _statistics_of(DELTA, m, rows, 0.0, BLOCK_M)  # [BLOCK_M]
        if MASKED:
            # NaN in a row of Q or dO must not reach the keys it does not see, through 0 * NaN: such
            # a row is read as 0, and its NaN comes in by p, where p is not masked
            sound = (tl.abs(delta) < INF) & (lse == lse)
            mask_m = mask_m & sound
            lse = tl.where(sound, lse, float("nan"))
            delta = tl.where(sound, delta, 0.0)
        q_ptrs = _packed_ptrs(Q, m, offs_d, stride_qt, stride_qh, G, BLOCK_M)
        q = _load(q_ptrs, mask_m, offs_d, D)  # [BLOCK_M, BLOCK_D]
        do_ptrs = _packed_ptrs(DO, m, offs_d, stride_dot, stride_doh, G, BLOCK_M)
        do = _load(do_ptrs, mask_m, offs_d, D)  # [BLOCK_M, BLOCK_D]
        st = tl.dot(k, q.T, input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        if DK:
            dpt = tl.dot(v, do.T, input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        pt = tl.exp2(st * scale_log2 - lse[None, :])
        if MASKED:
            pt = tl.where(tl.arange(0, BLOCK_N)[:, None] <= (packed // G)[None, :], pt, 0.0)
        if DV:
            dv = tl.dot(pt.to(do.dtype), do, dv, input_precision="ieee")  # [BLOCK_N, BLOCK_D]
        if DK:
            dst = pt * (dpt - delta[None, :])
            dk = tl.dot(dst.to(q.dtype), q, dk, input_precision="ieee")  # [BLOCK_N, BLOCK_D]
    return dk, dv


@triton.jit(do_not_specialize=["stride_lh", "CAPACITY"])
def _dkdv_kernel(
    Q, K, V, DO, LSE, DELTA, DK, DV, TILES,
    stride_qt, stride_qh,
    stride_kt, stride_kh,
    stride_vt, stride_vh,
    stride_dot, stride_doh,
    stride_gt, stride_gh,
    stride_lh,
    KV_HEADS, CAPACITY, scale, scale_log2,
    TILE: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED_STAGES: tl.constexpr, HAS_DK: tl.constexpr, HAS_DV: tl.constexpr,
    APART: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = TILE // BLOCK_N
    offs_d = tl.arange(0, BLOCK_D)
    offs_n = tl.arange(0, BLOCK_N)
    item = tl.program_id(0)
    tile = TILES + (6 if APART else 4) * (CAPACITY + item // (BLOCKS * KV_HEADS))
    head = (item // BLOCKS % KV_HEADS).to(tl.int64)
    key = tl.load(tile) + item % BLOCKS * BLOCK_N  # the block's first, and its rows' first
    keys = tl.load(tile + 1) - key
    if keys <= 0:  # as in the forward
        return
    rows = (tl.load(tile + 3) - key) * G
    mask_n = offs_n < keys
    first = key.to(tl.int64)
    if rows <= 0:  # keys that no row sees
        grad_ptrs = first * stride_gt + head * stride_gh
        grad_ptrs += offs_n[:, None] * stride_gt + offs_d[None, :]
        nothing = tl.zeros([BLOCK_N, BLOCK_D], DK.dtype.element_ty)
        if HAS_DK:
            _store(DK + grad_ptrs, nothing, mask_n, offs_d, D)
        if HAS_DV:
            _store(DV + grad_ptrs, nothing, mask_n, offs_d, D)
        return
    # packed rows up to here do not see all keys of the block; at least one block is masked
    unseen = tl.maximum((tl.minimum(keys, BLOCK_N) - 1) * G, 1)
    masked = tl.minimum(tl.cdiv(unseen, BLOCK_M) * BLOCK_M, rows)
    k_base = K + first * stride_kt + head * stride_kh
    v_base = V + first * stride_vt + head * stride_vh
    k = _load(k_base + offs_n[:, None] * stride_kt + offs_d[None, :], mask_n, offs_d, D)
    v = k
    if HAS_DK:
        v = _load(v_base + offs_n[:, None] * stride_vt + offs_d[None, :], mask_n, offs_d, D)
    q_base = Q + first * stride_qt + head * G * stride_qh
    do_base = DO + first * stride_dot + head * G * stride_doh
    lse_base = LSE + head * stride_lh + first * G
    delta_base = DELTA + head * stride_lh + first * G

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    tl.assume(masked > 0)  # as in the forward
    dk, dv = _gather_rows(
        dk, dv, k, v, q_base, do_base, lse_base, delta_base,
        stride_qt, stride_qh, stride_dot, stride_doh, 0, masked, rows, scale_log2, offs_d,
        G, D, BLOCK_M, BLOCK_N, True, MASKED_STAGES, HAS_DK, HAS_DV,
    )  # fmt: skip
    if rows > masked:
        dk, dv = _gather_rows(
            dk, dv, k, v, q_base, do_base, lse_base, delta_base,
            stride_qt, stride_qh, stride_dot, stride_doh, masked, rows, rows, scale_log2, offs_d,
            G, D, BLOCK_M, BLOCK_N, False, None, HAS_DK, HAS_DV,
        )  # fmt: skip
    # made again, as registers that live through the loops spill
    mask_n = tl.arange(0, BLOCK_N) < tl.load(tile + 1) - key
    grad_ptrs = first * stride_gt + head * stride_gh
    grad_ptrs += offs_n[:, None] * stride_gt + offs_d[None, :]
    if HAS_DV:
        _store(DV + grad_ptrs, dv.to(DV.dtype.element_ty), mask_n, offs_d, D)
    if HAS_DK:
        _store(DK + grad_ptrs, (dk * scale).to(DK.dtype.element_ty), mask_n, offs_d, D)


@triton.jit
def _gather_keys(
    dq, q, do, lse, delta, k_ptrs, v_ptrs, stride_kt, stride_vt,
    key, begin, end, keys, position, scale_log2, offs_d,
    D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dQ over blocks of keys, as `_attend` has them."""
    for n in tl.range(begin, end, BLOCK_N):
        k_block = k_ptrs + (key + n) * stride_kt
        v_block = v_ptrs + (key + n) * stride_vt
        offs_n = n + tl.arange(0, BLOCK_N)
        mask_n = offs_n < keys if MASKED else None
        k = _load(k_block, mask_n, offs_d, D)  # [BLOCK_N, BLOCK_D]
        v = _load(v_block, mask_n, offs_d, D)  # [BLOCK_N, BLOCK_D]
        s = tl.dot(q, k.T, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        p = tl.exp2(s * scale_log2 - lse[:, None])
        dp = tl.dot(do, v.T, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        ds = p * (dp - delta[:, None])
        if MASKED:
            ds = tl.where(offs_n[None, :] <= position[:, None], ds, 0.0)
            k = tl.where(k == k, k, 0.0)  # as above: the rows that see a NaN have it in ds
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")  # [BLOCK_M, BLOCK_D]
    return dq


@triton.jit(do_not_specialize=["stride_lh"])
def _dq_kernel(
    Q, K, V, DO, LSE, DELTA, DQ, TILES,
    stride_qt, stride_qh,
    stride_kt, stride_kh,
    stride_vt, stride_vh,
    stride_dot, stride_doh,
    stride_gt, stride_gh,
    stride_lh,
    KV_HEADS, scale, scale_log2,
    TILE: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    offs_d = tl.arange(0, BLOCK_D)
    offs_n = tl.arange(0, BLOCK_N)[:, None]
    head, row, begin, rows, key, packed, position, whole, keys = _row_block(
        TILES, tl.program_id(0), KV_HEADS, TILE, G, BLOCK_M, BLOCK_N, APART
    )
    if begin >= rows:  # behind the end of a short tile, or of the tiles
        return
    mask_m = packed < rows
    grad_base = DQ + row * stride_gt + head * G * stride_gh
    if keys <= 0:  # rows of no sequence
        grad_ptrs = _packed_ptrs(grad_base, begin, offs_d, stride_gt, stride_gh, G, BLOCK_M)
        _store(grad_ptrs, tl.zeros([BLOCK_M, BLOCK_D], DQ.dtype.element_ty), mask_m, offs_d, D)
        return
    q_base = Q + row * stride_qt + head * G * stride_qh
    q_ptrs = _packed_ptrs(q_base, begin, offs_d, stride_qt, stride_qh, G, BLOCK_M)
    q = _load(q_ptrs, mask_m, offs_d, D)  # [BLOCK_M, BLOCK_D]
    do_base = DO + row * stride_dot + head * G * stride_doh
    do_ptrs = _packed_ptrs(do_base, begin, offs_d, stride_dot, stride_doh, G, BLOCK_M)
    do = _load(do_ptrs, mask_m, offs_d, D)  # [BLOCK_M, BLOCK_D]
    statistics = head * stride_lh + row * G + packed
    lse = tl.load(LSE + statistics, mask=mask_m, other=INF)  # [BLOCK_M]
    delta = tl.load(DELTA + statistics, mask=mask_m, other=0.0)  # [BLOCK_M]
    k_base = K + head * stride_kh
    v_base = V + head * stride_vh
    k_ptrs = k_base + offs_n * stride_kt + offs_d[None, :]
    v_ptrs = v_base + offs_n * stride_vt + offs_d[None, :]

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    tl.assume(keys > whole)  # as in the forward
    dq = _gather_keys(
        dq, q, do, lse, delta, k_ptrs, v_ptrs, stride_kt, stride_vt,
        key, whole, keys, keys, position, scale_log2, offs_d, D, BLOCK_N, True,
    )  # fmt: skip
    if whole > 0:
        dq = _gather_keys(
            dq, q, do, lse, delta, k_ptrs, v_ptrs, stride_kt, stride_vt,
            key, 0, whole, keys, position, scale_log2, offs_d, D, BLOCK_N, False,
        )  # fmt: skip
    if APART:
        key, keys = _keys_apart(TILES, tl.program_id(0), KV_HEADS, TILE, G, BLOCK_M)
        position = tl.full([BLOCK_M], 1, tl.int32) * (keys - 1)
        if keys > 0:
            dq = _gather_keys(
                dq, q, do, lse, delta, k_ptrs, v_ptrs, stride_kt, stride_vt,
                key, 0, keys, keys, position, scale_log2, offs_d, D, BLOCK_N, True,
            )  # fmt: skip

    grad_ptrs = _packed_ptrs(grad_base, begin, offs_d, stride_gt, stride_gh, G, BLOCK_M)
    _store(grad_ptrs, (dq * scale).to(DQ.dtype.element_ty), mask_m, offs_d, D)


def _strides(*tensors: Tensor) -> list[int]:
    """The strides of the rows and of the heads of each tensor [T, H, D]."""
    return [stride for tensor in tensors for stride in tensor.stride()[:2]]


@cache
def _constants(
    heads: int, key_heads: int, dim: int, columns: int, config: launch.Config, **others: int
) -> Constants:
    return Constants(
        TILE=TILE,
        G=heads // key_heads,
        D=dim,
        BLOCK_D=max(16, triton.next_power_of_2(dim)),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        APART=columns == 6,  # of the tiles
        num_warps=config.warps,
        num_stages=config.stages,
        **others,
    )


@cache
def _delta_constants(groups: int, dim: int) -> Constants:
    block_d = max(16, triton.next_power_of_2(dim))
    return Constants(G=groups, D=dim, BLOCK_D=block_d, BLOCK_M=DELTA_ROWS, num_warps=4)


def _statistics(q: Tensor, k: Tensor) -> tuple[int, int, int]:
    """The shape [Hkv, T, G] of a tensor with one figure per row and head."""
    return k.shape[1], q.shape[0], q.shape[1] // k.shape[1]


def _row_blocks(q: Tensor, tiles: Tensor, config: launch.Config) -> tuple[int]:
    return (tiles.shape[1] * (TILE * q.shape[1] // config.block_m),)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, scale: float, hopper: bool = False
) -> tuple[Tensor, Tensor]:
    """O [T, Hq, D] in q's dtype, and the base-2 log-sum-exp of each row's scores, fp32 [Hkv, T, G].

    In that order the packed rows of a key head lie one behind the other. `hopper`: by the kernels
    of `condensed_attention_hopper`.
    """
    if hopper:
        from . import condensed_attention_hopper  # needs triton 3.9

        return condensed_attention_hopper.forward(q, k, v, tiles, scale)
    out = empty_like(q, memory_format=DENSE)
    lse = empty(_statistics(q, k), dtype=torch.float32, device=q.device)
    (_, heads, dim), key_heads = q.shape, k.shape[1]

    def forward(config: launch.Config) -> None:
        start(
            _forward_kernel, _row_blocks(q, tiles, config),
            _constants(heads, key_heads, dim, tiles.shape[2], config),
            q, k, v, out, lse, tiles,
            *_strides(q, k, v, out), lse.stride(0),
            key_heads, scale * LOG2E.value,
        )  # fmt: skip

    launch.attention("forward", q, forward)
    return out, lse


def _backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tiles: Tensor,
    scale: float, hopper: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dQ [T, Hq, D], dK and dV [T, Hkv, D] in q's dtype."""
    if hopper:
        from . import hopper_backward

        return hopper_backward.backward(d_out, q, k, v, out, lse, tiles, scale)
    dq, dk, dv, delta = (empty_like(t, memory_format=DENSE) for t in (q, k, v, lse))
    if d_out.stride(-1) != 1 or not fits_32_bits(d_out, q.shape[1] // k.shape[1]):
        d_out = d_out.contiguous()
    (rows, heads, dim), key_heads = q.shape, k.shape[1]
    inputs = q, k, v, d_out, lse, delta
    strides = (*_strides(q, k, v, d_out),)
    scales = scale, scale * LOG2E.value

    def dkdv(config: launch.Config) -> None:
        capacity = tiles.shape[1]
        # two accumulators of 256 columns do not fit the registers: the scores are made twice there
        for has_dk, has_dv in ((1, 1),) if dim <= 128 else ((0, 1), (1, 0)):
            start(
                _dkdv_kernel, (capacity * (TILE // config.block_n) * key_heads,),
                # its loads of rows wait for those of their statistics: half the stages are theirs
                _constants(
                    heads, key_heads, dim, tiles.shape[2], config,
                    MASKED_STAGES=2 * config.stages - 1, HAS_DK=has_dk, HAS_DV=has_dv,
                ),
                *inputs, dk, dv, tiles,
                *strides, *_strides(dk), lse.stride(0),
                key_heads, capacity, *scales,
            )  # fmt: skip

    def dq_(config: launch.Config) -> None:
        start(
            _dq_kernel, _row_blocks(q, tiles, config),
            _constants(heads, key_heads, dim, tiles.shape[2], config),
            *inputs, dq, tiles,
            *strides, *_strides(dq), lse.stride(0),
            key_heads, *scales,
        )  # fmt: skip

    with launch.on(q.device):
        packed = rows * lse.shape[2]
        start(
            _delta_kernel, (-(-packed // DELTA_ROWS), key_heads),
            _delta_constants(lse.shape[2], dim),
            out, d_out, delta,
            *_strides(out, d_out), lse.stride(0),
            packed,
        )  # fmt: skip
    launch.attention("dkdv", q, dkdv)
    launch.attention("dq", q, dq_)
    return dq, dk, dv


# a copy that another library carries has its own, or the last one imported would take them over
_COPY = __package__ != "btok_kernels"
_NAMESPACE = (__package__ or "").replace(".", "_") if _COPY else "btok"


@torch.library.custom_op(f"{_NAMESPACE}::condensed_attention", mutates_args=())
def _op(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, scale: float, hopper: bool = False
) -> tuple[Tensor, Tensor]:
    return _forward(q, k, v, tiles, scale, hopper)


@_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, scale: float, hopper: bool = False
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(_statistics(q, k), dtype=torch.float32)


@torch.library.custom_op(f"{_NAMESPACE}::condensed_attention_backward", mutates_args=())
def _backward_op(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tiles: Tensor,
    scale: float, hopper: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _backward(d_out, q, k, v, out, lse, tiles, scale, hopper)


@_backward_op.register_fake
def _(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tiles: Tensor,
    scale: float, hopper: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.hopper = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, d_out: Tensor, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, tiles, out, lse = ctx.saved_tensors
    grads = _backward_op(d_out, q, k, v, out, lse, tiles, ctx.scale, ctx.hopper)
    return *grads, None, None, None


_op.register_autograd(_differentiate, setup_context=_save)


class _Eager(torch.autograd.Function):
    """The op without round trips through the dispatcher, which take longer than its launches."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, scale: float, hopper: bool
    ) -> Tensor:
        out, lse = _forward(q, k, v, tiles, scale, hopper)
        ctx.save_for_backward(q, k, v, tiles, out, lse)
        ctx.scale, ctx.hopper = scale, hopper
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, tiles, out, lse = ctx.saved_tensors
        # there is no second derivative: the op says so
        eager = _is_eager(d_out, q, k, v) and not torch.is_grad_enabled()
        backward = _backward if eager else _backward_op
        grads = backward(d_out, q, k, v, out, lse, tiles, ctx.scale, ctx.hopper)
        return *grads, None, None, None


def _is_eager(*tensors: Tensor) -> bool:
    """Whether nothing but autograd has to see the op: no compiler, no mode, no transform."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
        or not PLAIN.issuperset(map(type, tensors))
    )


def attention(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, scale: float, hopper: bool = False
) -> Tensor:
    """`condensed_attention` of checked inputs: [T, Hq, D] in q's dtype."""
    if not _is_eager(q, k, v, tiles):
        return _op(q, k, v, tiles, scale, hopper)[0]
    if not torch.is_grad_enabled():
        return _forward(q, k, v, tiles, float(scale), hopper)[0]
    return _Eager.apply(q, k, v, tiles, float(scale), hopper)


def faster(q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, scale: float) -> tuple[str, ...]:
    """The faster of "triton" and "hopper" by a search on these tensors, with the backward where
    autograd will want it; empty where more than autograd sees the op.
    """
    if not _is_eager(q, k, v, tiles):
        return ()
    backward = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))

    def run(impl: str) -> None:
        out, lse = _forward(q, k, v, tiles, scale, impl == "hopper")
        if backward:
            _backward(out, q, k, v, out, lse, tiles, scale, impl == "hopper")

    ways = "forward and backward" if backward else "forward"
    with launch.on(q.device):
        return (launch.fastest("impl of attention", (ways,), q, "triton", lambda: ["hopper"], run),)
