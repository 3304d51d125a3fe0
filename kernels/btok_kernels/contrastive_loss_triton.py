"""Triton kernels of the contrastive loss: `impl="triton"` of contrastive_loss.py.

Columns are the keys of all ranks, then their negatives. Logits are fp32: the products q.k, less the
row's positive s_ii (in the column direction the column's, s_jj), times 1 / tau. Two ways, of which
`launch.contrastive_chunk` takes one:

rows: some rows against all columns at a time, all matrix products by torch.
    1. bidirectional: products, then `_columns_kernel` sums each column; the sums of all ranks meet
    2. products, then `_rows_kernel` reads them for the log-sum-exps and writes d logits over them
    3. d query and d candidates are two more products of d logits
recompute: tiles in registers, O((N + M) D) memory.
    1. `_sums_kernel` makes each tile's scores and from them its row and column log-sum-exps
    2. a panel (some thousand rows and columns) at a time: `_d_logits_kernel` makes the scores again
       and writes d logits; `_d_query_kernel` and `_d_candidates_kernel` add what they give

The panel of d logits is what lets a gradient row of any D be summed from tiles that fit registers
while scores are made once for both gradients. Every gradient element is added to by one program of
one launch at a time, launches follow in order: no atomics, the same bits on every run.

The recompute kernels read candidates where the gather left them, through a table with one line per
column tile: where the tile begins (in elements from the first shard), the elements from row to row,
its first column, its number of columns. A tile never straddles two shards: the first sweep, of
either way, takes the shards one by one, as they arrive.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .contrastive_loss import Call
from .ranks import Ranks, join

# What differs from batch to batch is not looked at for what it divides by, as each answer would
# compile a kernel again. D, strides and the pointers to matrices are: that makes wide loads.
_kernel = triton.jit(
    do_not_specialize=("first_row", "N", "M", "columns", "tiles"),
    do_not_specialize_on_alignment=("QUERY_IDS", "ROW_LSE", "D_SCALE"),
)


@triton.jit
def _mask(
    s, rows, cols, offs_n, mask_n, mask_m, QUERY_IDS, KEY_IDS, M, HAS_IDS: tl.constexpr
):  # fmt: skip
    """s [BLOCK_N, BLOCK_M], -inf where there is no candidate; and where rows meet their own keys.

    At once, as the ids of a tile take many registers. `_logits` brings the positives back.
    """
    kept = mask_n[:, None] & mask_m[None, :]  # [BLOCK_N, BLOCK_M]
    own = kept & (rows[:, None] == cols[None, :])  # behind a tile's end cols are of other tiles
    if HAS_IDS:
        is_key = mask_m & (cols < M)
        query_ids = tl.load(QUERY_IDS + offs_n, mask=mask_n, other=0)  # [BLOCK_N]
        key_ids = tl.load(KEY_IDS + cols, mask=is_key, other=0)  # [BLOCK_M]
        same = (query_ids[:, None] == key_ids[None, :]) & is_key[None, :]
        kept = kept & (same == 0)
    return tl.where(kept, s, float("-inf")), own


@triton.jit
def _logits(s, positives, own, scale, margin, HAS_MARGIN: tl.constexpr):
    """s less the positive, 0 at the positive itself; and its logits, -inf where dropped."""
    shift = tl.where(own, 0.0, s - positives)  # [BLOCK_N, BLOCK_M]
    logits = shift * scale
    if HAS_MARGIN:
        logits = tl.where((shift > margin) & (own == 0), float("-inf"), logits)
    return shift, logits


@triton.jit
def _log_sum_exp(logits, axis: tl.constexpr):
    """Over one axis of [BLOCK_N, BLOCK_M]; -inf where all are."""
    top = tl.max(logits, axis)
    top = tl.where(top == float("-inf"), 0.0, top)
    return top + tl.log(tl.sum(tl.exp(logits - tl.expand_dims(top, axis)), axis))


@triton.jit
def _tile(TABLE, tile, ALIGNED: tl.constexpr):
    """A line of the table: begin, elements from row to row, first column, number of columns."""
    begin = tl.multiple_of(tl.load(TABLE + 4 * tile), ALIGNED)
    stride_k = tl.multiple_of(tl.load(TABLE + 4 * tile + 1), ALIGNED)
    return begin, stride_k, tl.load(TABLE + 4 * tile + 2), tl.load(TABLE + 4 * tile + 3)


@triton.jit
def _place(N, BLOCK_N: tl.constexpr):
    """This program's row tile and column tile, in one dimension: a grid's second has 65,535."""
    row_tiles = tl.cdiv(N, BLOCK_N)
    return tl.program_id(0) % row_tiles, tl.program_id(0) // row_tiles


@triton.jit
def _scores(
    Q, K, TABLE, QUERY_IDS, KEY_IDS, pid_n, pid_m, stride_q, first_row, N, M, D,
    HAS_IDS: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The scores of one tile, its rows and columns, and what is no candidate."""
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    begin, stride_k, first_col, count = _tile(TABLE, pid_m, ALIGNED)
    cols = (first_col + offs_m).to(tl.int32)
    mask_n, mask_m = offs_n < N, offs_m < count
    q_ptrs = Q + offs_n.to(tl.int64)[:, None] * stride_q + offs_d[None, :]  # [BLOCK_N, BLOCK_D]
    k_ptrs = K + begin + offs_m.to(tl.int64)[None, :] * stride_k + offs_d[:, None]
    s = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for d in range(0, D, BLOCK_D):
        mask_d = d + offs_d < D
        q = tl.load(q_ptrs + d, mask=mask_n[:, None] & mask_d[None, :], other=0.0)
        k = tl.load(k_ptrs + d, mask=mask_m[None, :] & mask_d[:, None], other=0.0)
        s = tl.dot(q, k, s, input_precision="ieee")  # k: [BLOCK_D, BLOCK_M]
    s, own = _mask(
        s, first_row + offs_n, cols, offs_n, mask_n, mask_m, QUERY_IDS, KEY_IDS, M, HAS_IDS
    )
    return s, own, offs_n, mask_n, cols, mask_m


@_kernel
def _columns_kernel(
    S, POSITIVES, QUERY_IDS, KEY_IDS, SCALE, COLUMN_LSE,
    stride_s, first_row, N, M, margin,
    HAS_IDS: tl.constexpr, HAS_MARGIN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The column log-sum-exps of one tile of products S [N, M], into COLUMN_LSE [row tiles, M].

    S is read beyond M, to the end of its rows of `stride_s`, for the reason in `_rows_kernel`.
    """
    pid_m, pid_n = tl.program_id(0), tl.program_id(1)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_n, mask_m = offs_n < N, cols < M
    s_ptrs = S + offs_n.to(tl.int64)[:, None] * stride_s + cols[None, :]
    mask = mask_n[:, None] & (cols < stride_s)[None, :]
    s = tl.load(s_ptrs, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_M]
    s, own = _mask(
        s, first_row + offs_n, cols, offs_n, mask_n, mask_m, QUERY_IDS, KEY_IDS, M, HAS_IDS
    )
    positives = tl.load(POSITIVES + cols, mask=mask_m, other=0.0)  # [BLOCK_M]
    _, logits = _logits(s, positives[None, :], own, tl.load(SCALE), margin, HAS_MARGIN)
    lse = _log_sum_exp(logits, 0)
    tl.store(COLUMN_LSE + pid_n.to(tl.int64) * M + cols, lse, mask=mask_m)


@triton.jit
def _d_logits(
    s, own, cols, row_positives, row_lse, POSITIVES, COLUMN_LSE, first_col, M, scale, margin,
    HAS_MARGIN: tl.constexpr, IS_BIDIRECTIONAL: tl.constexpr,
):  # fmt: skip
    """d loss / d logits of a tile (summed over directions), and its rows' shares of d scale."""
    shift, logits = _logits(s, row_positives[:, None], own, scale, margin, HAS_MARGIN)
    d = tl.exp(logits - row_lse[:, None])  # [BLOCK_N, BLOCK_M]
    # of the shift, as s itself would cancel; which is -inf where dropped
    d_scale = tl.sum(tl.where(d == 0.0, 0.0, d * shift), 1)  # [BLOCK_N]
    d = tl.where(own, d - 1.0, d)
    if IS_BIDIRECTIONAL:  # noqa: SIM102
        if first_col < M:  # known at run time only: a branch takes fewer registers
            is_key = cols < M
            positives = tl.load(POSITIVES + cols, mask=is_key, other=0.0)  # [BLOCK_M]
            lse = tl.load(COLUMN_LSE + cols, mask=is_key, other=float("inf"))  # [BLOCK_M]
            shift, logits = _logits(s, positives[None, :], own, scale, margin, HAS_MARGIN)
            d_columns = tl.exp(logits - lse[None, :])
            d_scale += tl.sum(tl.where(d_columns == 0.0, 0.0, d_columns * shift), 1)
            d += tl.where(own, d_columns - 1.0, d_columns)
    return d, d_scale


@_kernel
def _rows_kernel(
    S, POSITIVES, QUERY_IDS, KEY_IDS, SCALE, COLUMN_LSE, ROW_LSE, D_SCALE, D_LOGITS,
    stride_s, first_row, N, M, columns, margin, gain,
    HAS_IDS: tl.constexpr, HAS_MARGIN: tl.constexpr, IS_BIDIRECTIONAL: tl.constexpr,
    WITH_GRAD: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Log-sum-exps of whole rows of products S [N, columns], then d logits, maybe over S itself.

    Rows of S and D_LOGITS are `stride_s` long, a multiple of 16, and read and written whole: a mask
    that could end anywhere would make every access one of a single element.
    """
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    mask_n = offs_n < N
    s_ptrs = S + offs_n.to(tl.int64)[:, None] * stride_s
    d_ptrs = D_LOGITS + offs_n.to(tl.int64)[:, None] * stride_s
    scale = tl.load(SCALE)
    row_positives = tl.load(POSITIVES + first_row + offs_n, mask=mask_n, other=0.0)  # [BLOCK_N]
    top = tl.zeros([BLOCK_N], tl.float32)  # the positive's logit: every row has it
    z = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, columns, BLOCK_M):
        cols = start + offs_m
        mask_m = cols < columns
        mask = mask_n[:, None] & (cols < stride_s)[None, :]
        s = tl.load(s_ptrs + cols[None, :], mask=mask, other=0.0)  # [BLOCK_N, BLOCK_M]
        s, own = _mask(
            s, first_row + offs_n, cols, offs_n, mask_n, mask_m, QUERY_IDS, KEY_IDS, M, HAS_IDS
        )
        _, logits = _logits(s, row_positives[:, None], own, scale, margin, HAS_MARGIN)
        higher = tl.maximum(top, tl.max(logits, 1))
        z = z * tl.exp(top - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
        top = higher
    row_lse = tl.where(mask_n, top + tl.log(z), 0.0)
    tl.store(ROW_LSE + offs_n, row_lse, mask=mask_n)

    if WITH_GRAD:
        d_scale = tl.zeros([BLOCK_N], tl.float32)
        for start in range(0, columns, BLOCK_M):
            cols = start + offs_m
            mask_m = cols < columns
            mask = mask_n[:, None] & (cols < stride_s)[None, :]
            s = tl.load(s_ptrs + cols[None, :], mask=mask, other=0.0)  # [BLOCK_N, BLOCK_M]
            s, own = _mask(
                s, first_row + offs_n, cols, offs_n, mask_n, mask_m, QUERY_IDS, KEY_IDS, M, HAS_IDS
            )
            d, d_scale_tile = _d_logits(
                s, own, cols, row_positives, row_lse, POSITIVES, COLUMN_LSE, start, M,
                scale, margin, HAS_MARGIN, IS_BIDIRECTIONAL,
            )  # fmt: skip
            d_scale += d_scale_tile
            tl.store(d_ptrs + cols[None, :], (d * gain).to(D_LOGITS.dtype.element_ty), mask=mask)
        tl.store(D_SCALE + offs_n, d_scale, mask=mask_n)


@_kernel
def _sums_kernel(
    Q, K, TABLE, POSITIVES, QUERY_IDS, KEY_IDS, SCALE, ROW_LSE, COLUMN_LSE,
    stride_q, first_row, N, M, D, margin,
    HAS_IDS: tl.constexpr, HAS_MARGIN: tl.constexpr, IS_BIDIRECTIONAL: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Log-sum-exps of one tile: of rows into ROW_LSE [tiles, N], of keys into [row tiles, M]."""
    pid_n, pid_m = _place(N, BLOCK_N)
    s, own, offs_n, mask_n, cols, mask_m = _scores(
        Q, K, TABLE, QUERY_IDS, KEY_IDS, pid_n, pid_m, stride_q, first_row, N, M, D,
        HAS_IDS, ALIGNED, BLOCK_N, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    scale = tl.load(SCALE)
    row_positives = tl.load(POSITIVES + first_row + offs_n, mask=mask_n, other=0.0)  # [BLOCK_N]
    _, logits = _logits(s, row_positives[:, None], own, scale, margin, HAS_MARGIN)
    row_lse = _log_sum_exp(logits, 1)
    tl.store(ROW_LSE + pid_m.to(tl.int64) * N + offs_n, row_lse, mask=mask_n)
    if IS_BIDIRECTIONAL:
        is_key = mask_m & (cols < M)
        positives = tl.load(POSITIVES + cols, mask=is_key, other=0.0)  # [BLOCK_M]
        _, logits = _logits(s, positives[None, :], own, scale, margin, HAS_MARGIN)
        column_lse = _log_sum_exp(logits, 0)
        tl.store(COLUMN_LSE + pid_n.to(tl.int64) * M + cols, column_lse, mask=is_key)


@_kernel
def _d_logits_kernel(
    Q, K, TABLE, POSITIVES, QUERY_IDS, KEY_IDS, SCALE, ROW_LSE, COLUMN_LSE, D_LOGITS, D_SCALE,
    stride_q, stride_d, first_row, N, M, D, margin, gain,
    HAS_IDS: tl.constexpr, HAS_MARGIN: tl.constexpr, IS_BIDIRECTIONAL: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """d logits of one tile of a panel, 0 behind its last column; D_SCALE is [tiles, N]."""
    pid_n, pid_m = _place(N, BLOCK_N)
    s, own, offs_n, mask_n, cols, _ = _scores(
        Q, K, TABLE, QUERY_IDS, KEY_IDS, pid_n, pid_m, stride_q, first_row, N, M, D,
        HAS_IDS, ALIGNED, BLOCK_N, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    row_positives = tl.load(POSITIVES + first_row + offs_n, mask=mask_n, other=0.0)  # [BLOCK_N]
    row_lse = tl.load(ROW_LSE + offs_n, mask=mask_n, other=0.0)  # [BLOCK_N]
    _, _, first_col, _ = _tile(TABLE, pid_m, ALIGNED)
    d, d_scale = _d_logits(
        s, own, cols, row_positives, row_lse, POSITIVES, COLUMN_LSE, first_col, M,
        tl.load(SCALE), margin, HAS_MARGIN, IS_BIDIRECTIONAL,
    )  # fmt: skip
    tl.store(D_SCALE + pid_m.to(tl.int64) * N + offs_n, d_scale, mask=mask_n)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    d_ptrs = D_LOGITS + offs_n.to(tl.int64)[:, None] * stride_d + offs_m[None, :]
    tl.store(d_ptrs, (d * gain).to(D_LOGITS.dtype.element_ty), mask=mask_n[:, None])


@_kernel
def _d_query_kernel(
    D_LOGITS, K, TABLE, SCALE, D_QUERY,
    stride_d, stride_dq, N, D, tiles, factor,
    ALIGNED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """D_QUERY [N, D] += d logits @ candidates of a panel: one tile of it, by BLOCK_K columns."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n, mask_d = offs_n < N, offs_d < D
    d_ptrs = D_LOGITS + offs_n.to(tl.int64)[:, None] * stride_d + offs_k[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    width = tiles * BLOCK_M
    tl.assume(width > 0)  # else ptxas drains every product of the loop before the next
    begin, stride_k, _, count = _tile(TABLE, 0, ALIGNED)
    for start in range(0, width, BLOCK_K):
        offs_m = start % BLOCK_M + offs_k
        k_ptrs = K + begin + offs_m.to(tl.int64)[:, None] * stride_k + offs_d[None, :]
        d = tl.load(d_ptrs + start, mask=mask_n[:, None], other=0.0)  # [BLOCK_N, BLOCK_K]
        k = tl.load(k_ptrs, mask=(offs_m < count)[:, None] & mask_d[None, :], other=0.0)
        acc = tl.dot(d, k, acc, input_precision="ieee")  # k: [BLOCK_K, BLOCK_D]
        # a step ahead: candidates whose address is read in their own step cannot be prefetched
        following = tl.minimum(start + BLOCK_K, width - BLOCK_K) // BLOCK_M
        begin, stride_k, _, count = _tile(TABLE, following, ALIGNED)
    out_ptrs = D_QUERY + offs_n.to(tl.int64)[:, None] * stride_dq + offs_d[None, :]
    mask = mask_n[:, None] & mask_d[None, :]
    out = tl.load(out_ptrs, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_D]
    tl.store(out_ptrs, out + acc * (tl.load(SCALE) * factor), mask=mask)


@_kernel
def _d_candidates_kernel(
    D_LOGITS, Q, TABLE, SCALE, D_CANDIDATES,
    stride_d, stride_q, stride_dc, N, D, factor,
    ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """D_CANDIDATES [columns, D] += d logits.T @ query of a panel: one tile, by BLOCK_K rows."""
    pid_m = tl.program_id(0)
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_k = tl.arange(0, BLOCK_K)
    mask_d = offs_d < D
    _, _, first_col, count = _tile(TABLE, pid_m, ALIGNED)
    d_ptrs = D_LOGITS + pid_m * BLOCK_M + offs_m[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    tl.assume(N > 0)  # as in d query
    for start in range(0, N, BLOCK_K):
        offs_n = (start + offs_k).to(tl.int64)
        mask_n = offs_n < N
        q_ptrs = Q + offs_n[:, None] * stride_q + offs_d[None, :]
        # read transposed: [BLOCK_M, BLOCK_K]
        d = tl.load(d_ptrs + offs_n[None, :] * stride_d, mask=mask_n[None, :], other=0.0)
        q = tl.load(q_ptrs, mask=mask_n[:, None] & mask_d[None, :], other=0.0)
        acc = tl.dot(d, q, acc, input_precision="ieee")  # q: [BLOCK_K, BLOCK_D]
    out_ptrs = D_CANDIDATES + (first_col + offs_m)[:, None] * stride_dc + offs_d[None, :]
    mask = (offs_m < count)[:, None] & mask_d[None, :]
    out = tl.load(out_ptrs, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_D]
    tl.store(out_ptrs, out + acc * (tl.load(SCALE) * factor), mask=mask)


class _Problem(NamedTuple):
    """The tensors and options that the kernels of one call work on, after the gather."""

    call: Call
    ranks: Ranks
    query: Tensor  # [N, D]
    keys: list[Tensor]  # [m, D] of each rank, M rows in all
    negatives: list[Tensor]  # [m h, D] of each rank
    positives: Tensor  # [M], fp32
    key_ids: Tensor | None  # [M]
    landing: Iterator[tuple[int, slice]]  # ranks and their keys, as the four above are there
    scale: Tensor  # [1], fp32: 1 / tau
    columns: int  # M + M h
    gain: float  # of stored d logits, so that small ones do not underflow in fp16
    factor: float  # of the gradients beside 1 / tau, with 1 / gain

    def config(self, kernel: str, trial: Callable[[dict[str, int]], object]) -> dict[str, int]:
        """How to launch a kernel; a search tries `trial`, which must leave no trace in results."""
        call = self.call
        options = call.bidirectional, call.query_ids is not None, call.margin is not None
        return launch.contrastive(kernel, self.query, options, trial)

    def arguments(self, rows: slice) -> dict[str, Any]:
        """The arguments that every kernel of the loss takes, for some rows of this rank."""
        ids, margin, unread = self.call.query_ids, self.call.margin, self.positives
        return {
            "POSITIVES": self.positives,
            "QUERY_IDS": unread if ids is None else ids[rows],
            "KEY_IDS": unread if self.key_ids is None else self.key_ids,
            "SCALE": self.scale,
            "first_row": self.ranks.own.start + rows.start,
            "N": rows.stop - rows.start,
            "M": len(self.positives),
            "margin": 0.0 if margin is None else float(margin),
            "HAS_IDS": ids is not None,
            "HAS_MARGIN": margin is not None,
        }

    def score_arguments(self, rows: slice) -> dict[str, Any]:
        """The arguments that the kernels that make scores take besides candidates."""
        return {
            "Q": self.query[rows],
            "stride_q": self.query.stride(0),
            "D": self.query.shape[1],
            "IS_BIDIRECTIONAL": self.call.bidirectional,
            **self.arguments(rows),
        }

    def zeros(self, rows: int) -> Tensor:
        return self.positives.new_zeros(rows, self.query.shape[1])


def _spans(rows: int, height: int) -> list[slice]:
    return [slice(at, min(at + height, rows)) for at in range(0, rows, height)]


def _add_product(out: Tensor, a: Tensor, b: Tensor, beta: int = 1) -> None:
    """out = beta * out + a @ b, in fp32 for half inputs too."""
    if a.device.type == "cuda" and a.dtype != torch.float32:
        torch.addmm(out, a, b, out_dtype=torch.float32, beta=beta, out=out)
    else:
        torch.addmm(out, a.float(), b.float(), beta=beta, out=out)


def _column_sums(p: _Problem, rows: slice, s: Tensor) -> Tensor:
    """Log-sum-exps [M] over some rows' products with the keys, in s [N, padded columns]."""
    keys = len(p.positives)

    def run(meta: dict[str, int]) -> Tensor:
        grid = triton.cdiv(keys, meta["BLOCK_M"]), triton.cdiv(len(s), meta["BLOCK_N"])
        sums = s.new_empty(grid[1], keys)
        arguments = p.arguments(rows) | {"S": s, "stride_s": s.stride(0), "COLUMN_LSE": sums}
        _columns_kernel[grid](**arguments, **meta)
        return sums

    return run(p.config("columns", run)).logsumexp(0)


def _row_gradients(
    p: _Problem, rows: slice, s: Tensor, d: Tensor, with_grad: bool, sums: dict[str, Tensor]
) -> None:
    """Some rows' sums, and d logits into `d`, from all their products s [N, padded columns]."""

    def run(meta: dict[str, int], d: Tensor) -> None:
        _rows_kernel[(triton.cdiv(len(s), meta["BLOCK_N"]),)](
            S=s, D_LOGITS=d, stride_s=s.stride(0), columns=p.columns, gain=p.gain,
            IS_BIDIRECTIONAL=p.call.bidirectional, WITH_GRAD=with_grad, **sums, **p.arguments(rows),
            **meta,
        )  # fmt: skip

    # d may be s itself, which a search must read again
    run(p.config("rows", lambda meta: run(meta, torch.empty_like(d))), d)


def _rows(p: _Problem, with_grad: bool, chunk: int) -> list[Tensor]:
    """loss, d scale, d query and d candidates: `chunk` rows against all columns at a time."""
    query, is_bidirectional = p.query, p.call.bidirectional
    of_keys, of_negatives = slice(0, len(p.positives)), slice(len(p.positives), p.columns)
    shards = [(p.keys, of_keys)] + [(p.negatives, of_negatives)] * bool(p.negatives)
    chunks = _spans(len(query), chunk) or [slice(0, 0)]
    padded = triton.cdiv(p.columns, 16) * 16  # so that all rows are aligned, for cuBLAS too
    products = p.positives.new_empty(min(chunk, len(query)), padded)
    rounded = with_grad and query.dtype != torch.float32
    d_logits = torch.empty_like(products, dtype=query.dtype) if rounded else products
    row_lse = p.positives.new_empty(len(query))
    d_scale = torch.empty_like(row_lse)
    column_lse = torch.full_like(p.positives, -torch.inf)
    first = chunks[0 if is_bidirectional else -1]
    ready = 1 if is_bidirectional else 2  # of keys and negatives: those the first sweep multiplies
    for rank, _ in p.landing:
        for of_ranks, columns in shards[:ready]:
            begin = columns.start + sum(map(len, of_ranks[:rank]))
            s = products[: first.stop - first.start, begin : begin + len(of_ranks[rank])]
            _add_product(s, query[first], of_ranks[rank].T, beta=0)
    # of what comes again, one copy costs less than products shard by shard
    parts = [(join(of_ranks), columns) for of_ranks, columns in shards]
    if is_bidirectional:
        for rows in chunks:
            s = products[: rows.stop - rows.start]
            if rows is not first:
                _add_product(s[:, of_keys], query[rows], parts[0][0].T, beta=0)
            column_lse = torch.logaddexp(column_lse, _column_sums(p, rows, s))
        column_lse = p.ranks.logsumexp(column_lse)
    d_query, d_candidates = (p.zeros(n) if with_grad else query for n in (len(query), p.columns))
    for rows in reversed(chunks):
        s, d = (x[: rows.stop - rows.start] for x in (products, d_logits))
        for matrix, columns in parts[ready:] if rows is chunks[-1] else parts:
            _add_product(s[:, columns], query[rows], matrix.T, beta=0)
        sums = {"COLUMN_LSE": column_lse, "ROW_LSE": row_lse[rows], "D_SCALE": d_scale[rows]}
        _row_gradients(p, rows, s, d, with_grad, sums)
        for matrix, columns in parts if with_grad else []:
            _add_product(d_query[rows], d[:, columns], matrix)
            _add_product(d_candidates[columns], d[:, columns].T, query[rows])
    loss = row_lse.sum() + (column_lse[p.ranks.own].sum() if is_bidirectional else 0)
    if not with_grad:
        return [loss]
    factor = p.scale * p.factor
    return [loss, d_scale.sum(), d_query.mul_(factor), d_candidates.mul_(factor)]


def _table(p: _Problem, width: int) -> tuple[Tensor, Tensor, list[int], int]:
    """The first shard, the table of column tiles [tiles, 4], lines per rank, their alignment.

    Offsets are from the first shard: its type and alignment are then those of a plain argument.
    What the first two numbers of all lines divide by is the alignment.
    """
    base, size = next(shard for shard in p.keys if len(shard)), p.query.element_size()
    lines: list[tuple[int, int, int, int]] = []
    counts = []
    firsts = [0, len(p.positives)]  # columns: of the next keys, of the next negatives
    for shards in zip(p.keys, *([p.negatives] if p.negatives else []), strict=True):
        before = len(lines)
        for i, shard in enumerate(shards):
            begin, stride = (shard.data_ptr() - base.data_ptr()) // size, shard.stride(0)
            for tile in _spans(len(shard), width):
                at = begin + tile.start * stride
                lines.append((at, stride, firsts[i] + tile.start, tile.stop - tile.start))
            firsts[i] += len(shard)
        counts.append(len(lines) - before)
    aligned = math.gcd(16 // size, *(n for line in lines for n in line[:2]))
    return base, torch.tensor(lines, dtype=torch.int64, device=base.device), counts, aligned


def _recompute(p: _Problem, with_grad: bool) -> list[Tensor]:
    """loss, d scale, d query and d candidates: scores by tiles, d logits by panels."""
    arch = launch.architecture(p.query.device)
    width = launch.contrastive_config("sums", p.query.dtype, arch)["BLOCK_M"]
    base, table, counts, aligned = _table(p, width)
    candidates = {"K": base, "ALIGNED": aligned}
    row_lse = p.positives.new_full((len(p.query),), -torch.inf)
    column_lse = torch.full_like(p.positives, -torch.inf)
    of_rank = table.split(counts)
    for rank, keys in p.landing:
        lines = of_rank[rank]
        for rows in _spans(len(p.query), launch.CONTRASTIVE_PANEL) if len(lines) else []:
            of_rows, of_columns = _tile_sums(p, rows, lines, candidates)
            row_lse[rows] = torch.logaddexp(row_lse[rows], of_rows.logsumexp(0))
            if p.call.bidirectional:
                sums = of_columns[:, keys].logsumexp(0)
                column_lse[keys] = torch.logaddexp(column_lse[keys], sums)
    loss = row_lse.sum()
    if p.call.bidirectional:
        column_lse = p.ranks.logsumexp(column_lse)
        loss += column_lse[p.ranks.own].sum()
    if not with_grad:
        return [loss]
    return [loss, *_panels(p, table, width, candidates, row_lse, column_lse)]


def _tile_sums(
    p: _Problem, rows: slice, lines: Tensor, candidates: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Log-sum-exps of tiles: of rows [lines, N]; bidirectional: of columns [row tiles, M]."""
    count = rows.stop - rows.start

    def run(meta: dict[str, int]) -> tuple[Tensor, Tensor]:
        row_tiles = triton.cdiv(count, meta["BLOCK_N"])
        of_rows = p.positives.new_empty(len(lines), count)
        of_columns = p.positives.new_empty(row_tiles * p.call.bidirectional, len(p.positives))
        _sums_kernel[(row_tiles * len(lines),)](
            TABLE=lines, ROW_LSE=of_rows, COLUMN_LSE=of_columns, **candidates,
            **p.score_arguments(rows), **meta,
        )  # fmt: skip
        return of_rows, of_columns

    return run(p.config("sums", run))


def _panels(
    p: _Problem, table: Tensor, width: int, candidates: dict[str, Any], row_lse: Tensor,
    column_lse: Tensor,
) -> list[Tensor]:  # fmt: skip
    """d scale, d query and d candidates, some thousand rows and columns of d logits at a time."""
    query, dim = p.query, p.query.shape[1]
    d_query, d_candidates = p.zeros(len(query)), p.zeros(p.columns)
    d_scale = p.positives.new_zeros(())
    tiles = min(len(table), max(1, launch.CONTRASTIVE_PANEL // width))
    d_logits = query.new_empty(min(len(query), launch.CONTRASTIVE_PANEL), tiles * width)
    panel = {"D_LOGITS": d_logits, "stride_d": d_logits.stride(0)}
    product = {"SCALE": p.scale, "D": dim, "ALIGNED": candidates["ALIGNED"], **panel}

    def make_d_logits(rows: slice, lines: Tensor, meta: dict[str, int]) -> Tensor:
        count = rows.stop - rows.start
        shares = row_lse.new_empty(len(lines), count)
        _d_logits_kernel[(triton.cdiv(count, meta["BLOCK_N"]) * len(lines),)](
            TABLE=lines, ROW_LSE=row_lse[rows], COLUMN_LSE=column_lse, D_SCALE=shares, gain=p.gain,
            **panel, **candidates, **p.score_arguments(rows), **meta,
        )  # fmt: skip
        return shares.sum()

    def add_d_query(rows: slice, lines: Tensor, meta: dict[str, int], factor: float = 0.0) -> None:
        count, wide = rows.stop - rows.start, triton.cdiv(dim, meta["BLOCK_D"])
        _d_query_kernel[triton.cdiv(count, meta["BLOCK_N"]), wide](
            TABLE=lines, K=candidates["K"], D_QUERY=d_query[rows], stride_dq=dim, N=count,
            tiles=len(lines), factor=factor, **product, **meta,
        )  # fmt: skip

    def add_d_candidates(
        rows: slice, lines: Tensor, meta: dict[str, int], factor: float = 0.0
    ) -> None:
        _d_candidates_kernel[len(lines), triton.cdiv(dim, meta["BLOCK_D"])](
            TABLE=lines, Q=query[rows], D_CANDIDATES=d_candidates, stride_q=query.stride(0),
            stride_dc=dim, N=rows.stop - rows.start, factor=factor, **product, **meta,
        )  # fmt: skip

    for rows in _spans(len(query), launch.CONTRASTIVE_PANEL):
        for lines in table.split(tiles):
            run = partial(make_d_logits, rows, lines)
            d_scale += run(p.config("d_logits", run))
            # a search adds 0 times what there is to add
            add = partial(add_d_query, rows, lines)
            add(p.config("d_query", add), factor=p.factor)
            add = partial(add_d_candidates, rows, lines)
            add(p.config("d_candidates", add), factor=p.factor)
    return [d_scale, d_query, d_candidates]


def _positives(query: Tensor, key: Tensor) -> Tensor:
    """The scores of rows with their own keys, [N], fp32, a few thousand at a time: they are copied
    to fp32.
    """
    pairs = zip(query.split(4096), key.split(4096), strict=True)
    return torch.cat([(q.float() * k.float()).sum(1) for q, k in pairs])


def fused(call: Call, ranks: Ranks, with_grad: bool) -> list[Tensor]:
    """The loss and, if wanted, its gradients, all in fp32, as the other paths give them."""
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (call.query, call.key))
    own_positives = _positives(query, key)
    parts = [key, own_positives]
    if call.key_ids is not None:
        parts.append(call.key_ids.contiguous())
    if call.negatives is not None:
        parts.append(call.negatives.contiguous())
    (keys, of_positives, *rest), arrivals = ranks.arriving(*parts)
    negatives = [shard.flatten(0, 1) for shard in rest.pop()] if call.negatives is not None else []
    positives = torch.empty(sum(map(len, keys)), device=query.device)
    positives[ranks.own] = own_positives  # every row needs its own, whichever shard comes first
    key_ids = torch.empty_like(positives, dtype=torch.int64) if rest else None

    def landing() -> Iterator[tuple[int, slice]]:
        for rank in arrivals:
            begin = sum(map(len, keys[:rank]))
            own = slice(begin, begin + len(keys[rank]))
            positives[own] = of_positives[rank]
            if key_ids is not None:
                key_ids[own] = rest[0][rank]
            yield rank, own

    share = ranks.weight / (2 if call.bidirectional else 1)
    gain = 2.0**14 if query.dtype == torch.float16 else 1.0  # |d logits| <= 2: no overflow
    columns = sum(len(shard) for shard in (*keys, *negatives))
    ids = None if call.query_ids is None else call.query_ids.contiguous()
    problem = _Problem(
        call._replace(query_ids=ids), ranks, query, keys, negatives, positives, key_ids, landing(),
        1 / call.tau(torch.float32).reshape(1), columns, gain, share / gain,
    )  # fmt: skip
    chunk = launch.contrastive_chunk(len(query), columns, query.dtype)
    with launch.on(query.device):
        if chunk:
            loss, *gradients = _rows(problem, with_grad, chunk)
        else:
            loss, *gradients = _recompute(problem, with_grad)
    if not with_grad:
        return [share * loss]
    d_scale, d_query, d_candidates = gradients
    d_tau = -share * problem.scale.square() * d_scale
    of_keys = len(problem.positives)
    d_key, d_negatives = ranks.reduce_scatter(d_candidates[:of_keys]), d_candidates[of_keys:]
    if call.negatives is not None:
        d_negatives = d_negatives.view(of_keys, *call.negatives.shape[1:])
        d_negatives = ranks.reduce_scatter(d_negatives)
    return [share * loss, d_query, d_key, d_negatives, d_tau]
