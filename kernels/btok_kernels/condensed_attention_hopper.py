"""Condensed attention on Hopper, in Gluon: the forward with a producer of copies beside two
consumers that multiply in turns.

A program takes the same block of packed rows as in `condensed_attention_triton`, BLOCK_M of them,
and has three warpgroups:

    producer     copies K and V, block by block, into BUFFERS places of shared memory (TMA)
    consumer 0   the first half of the rows: products, softmax, output
    consumer 1   the second half

What is full and what is empty is told by barriers in shared memory. A consumer issues the scores of
block j and the weighted values of block j - 1 together, hands the tensor cores to the other one,
and computes the softmax of block j while that one multiplies (PING_PONG).

TMA copies whole boxes of a tensor; what lies outside of it comes as zeros. `_descriptor` makes the
end of any range of rows such an outside, so that no row of a neighbour, which may be NaN, is read.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor, empty, empty_like
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from . import launch
from .layout import TILE
from .start import Constants, start

DENSE = torch.contiguous_format
LOG2E = 1.4426950408889634
INF = gl.constexpr(float("inf"))
BILLION = gl.constexpr(1 << 30)  # rows a descriptor pretends to have
GL_TYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@gluon.jit
def work_item(
    TILES, KV_HEADS,
    TILE: gl.constexpr, G: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    APART: gl.constexpr,
):  # fmt: skip
    """The packed rows of this program and the keys they see, counted from the tile's firsts."""
    BLOCKS: gl.constexpr = TILE * G // BLOCK_M  # of a tile and key head
    item = gl.program_id(0)
    tile = TILES + (6 if APART else 4) * (item // (BLOCKS * KV_HEADS))
    head = item // BLOCKS % KV_HEADS
    begin = item % BLOCKS * BLOCK_M
    row, last_row, key, last_key = (
        gl.load(tile), gl.load(tile + 1), gl.load(tile + 2), gl.load(tile + 3)
    )  # fmt: skip
    rows = (last_row - row) * G
    keys = gl.minimum(last_key - key, row - key + (begin + BLOCK_M - 1) // G + 1)
    # blocks that all rows see; the first row's own key is never among them, so that there is always
    # a block left to mask, of which every row sees a key
    whole = (row - key + begin // G) // BLOCK_N
    masked = (keys + BLOCK_N - 1) // BLOCK_N - whole
    return head, begin, row, rows, key, keys, whole, masked


@gluon.jit
def keys_apart(
    TILES, KV_HEADS, TILE: gl.constexpr, G: gl.constexpr, BLOCK_M: gl.constexpr,
    APART: gl.constexpr,
):  # fmt: skip
    """The first of the keys that all rows of a work item see besides, and how many they are."""
    first = 0
    keys = 0
    if APART:
        tile = TILES + 6 * (gl.program_id(0) // (TILE * G // BLOCK_M * KV_HEADS))
        first = gl.load(tile + 4)
        keys = gl.load(tile + 5) - first
    return first, keys


@gluon.jit
def allocate_places(K, V, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, BUFFERS: gl.constexpr):
    """BUFFERS places for blocks of K, as many for V, and the barriers of what is full and empty."""
    k_s = gl.allocate_shared_memory(K.dtype, [BUFFERS, 1, 1, BLOCK_N, 1, BLOCK_D], K.layout)
    v_s = gl.allocate_shared_memory(V.dtype, [BUFFERS, 1, 1, BLOCK_N, 1, BLOCK_D], V.layout)
    k_full = mbarrier.allocate_mbarrier(batch=BUFFERS)
    k_empty = mbarrier.allocate_mbarrier(batch=BUFFERS)
    v_full = mbarrier.allocate_mbarrier(batch=BUFFERS)
    v_empty = mbarrier.allocate_mbarrier(batch=BUFFERS)
    for i in gl.static_range(BUFFERS):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    return k_s, v_s, k_full, k_empty, v_full, v_empty


@gluon.jit
def produce(
    K, V, TILES, KV_HEADS, places,
    TILE: gl.constexpr, G: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BUFFERS: gl.constexpr, APART: gl.constexpr,
):  # fmt: skip
    """The producer: a block's K, then its V, as soon as their places are empty."""
    k_s, v_s, k_full, k_empty, v_full, v_empty = places
    head, _, _, _, key, keys, whole, masked = work_item(
        TILES, KV_HEADS, TILE, G, BLOCK_M, BLOCK_N, APART
    )
    first_apart, apart = keys_apart(TILES, KV_HEADS, TILE, G, BLOCK_M, APART)
    seen = masked + (apart + BLOCK_N - 1) // BLOCK_N
    for j in range(0, seen + whole):
        buffer = j % BUFFERS
        phase = (j // BUFFERS & 1) ^ 1  # the first round finds all places empty
        n = gl.where(j < masked, whole + j, j - seen) * BLOCK_N
        end = key + keys
        left = keys - n
        if APART:
            there = (j >= masked) & (j < seen)
            end = gl.where(there, first_apart + apart, end)
            left = gl.where(there, apart - (j - masked) * BLOCK_N, left)
        at = [BILLION, end, BILLION - left, head, 0]
        mbarrier.wait(k_empty.index(buffer), phase)
        mbarrier.expect(k_full.index(buffer), K.nbytes_per_cta)
        tma.async_load(K, at, k_full.index(buffer), k_s.index(buffer))
        mbarrier.wait(v_empty.index(buffer), phase)
        mbarrier.expect(v_full.index(buffer), V.nbytes_per_cta)
        tma.async_load(V, at, v_full.index(buffer), v_s.index(buffer))


@gluon.jit
def _weights(s, row_max, row_sum, last, scale_log2, BLOCK_N: gl.constexpr, MASKED: gl.constexpr):
    """exp2 of one block of scores, up to each row's `last`, and how much what was summed before
    shrinks."""
    if MASKED:
        offs_n = gl.arange(0, BLOCK_N, gl.SliceLayout(0, s.type.layout))
        # scaled before the mask: a scale of 0 times -inf would be NaN
        s = gl.where(offs_n[None, :] <= last[:, None], s * scale_log2, -INF)
        new_max = gl.maximum(row_max, gl.max(s, 1))  # [rows]
        p = gl.exp2(s - new_max[:, None])  # [rows, BLOCK_N]
    else:
        new_max = gl.maximum(row_max, gl.max(s, 1) * scale_log2)  # [rows]
        p = gl.exp2(s * scale_log2 - new_max[:, None])  # [rows, BLOCK_N]
    shrink = gl.exp2(row_max - new_max)  # [rows]
    return p, shrink, row_sum * shrink + gl.sum(p, 1), new_max


@gluon.jit
def block(buffers, at, ROWS: gl.constexpr, BLOCK_D: gl.constexpr):
    """One buffer without the dimensions that only TMA needs."""
    return buffers.index(at).reshape([ROWS, BLOCK_D])


@gluon.jit
def _attend(
    acc, p, row_max, row_sum, q, places, turn, j, last, scale_log2,
    OWN: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, BUFFERS: gl.constexpr,
    MASKED: gl.constexpr, PING_PONG: gl.constexpr,
):  # fmt: skip
    """Scores and weights of block j, and the weighted values of block j - 1."""
    k_s, v_s, k_full, k_empty, v_full, v_empty = places
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    of_acc: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    k_at = j % BUFFERS
    v_at = (j - 1) % BUFFERS
    zeros = gl.zeros([q.shape[0], BLOCK_N], gl.float32, scores)
    mbarrier.wait(k_full.index(k_at), j // BUFFERS & 1)
    if PING_PONG:
        mbarrier.wait(turn.index(OWN), j & 1)
    k = block(k_s, k_at, BLOCK_N, BLOCK_D)
    s = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(v_at), (j - 1) // BUFFERS & 1)
    v = block(v_s, v_at, BLOCK_N, BLOCK_D)
    acc = warpgroup_mma(p, v, acc, is_async=True)
    if PING_PONG:
        mbarrier.arrive(turn.index(1 - OWN))
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(k_empty.index(k_at))
    weights, shrink, row_sum, row_max = _weights(
        s, row_max, row_sum, last, scale_log2, BLOCK_N, MASKED
    )
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(v_empty.index(v_at))
    acc = acc * gl.convert_layout(shrink, of_acc)[:, None]
    p = gl.convert_layout(weights.to(q.dtype), p.type.layout)
    return acc, p, row_max, row_sum


@gluon.jit
def packed_offsets(
    begin, stride_t, stride_h, G: gl.constexpr, ROWS: gl.constexpr, layout: gl.constexpr
):
    """int32 [ROWS] of packed rows from `begin` on, behind that of token `begin // G`, head 0."""
    packed = gl.cast(begin, gl.uint32) % G + gl.arange(0, ROWS, layout).to(gl.uint32)
    return (packed // G).to(gl.int32) * stride_t + (packed % G).to(gl.int32) * stride_h


@gluon.jit
def packed_rows(
    X, stride_t, stride_h, head, row, begin, G: gl.constexpr, ROWS: gl.constexpr,
    BLOCK_D: gl.constexpr, lines: gl.constexpr,
):  # fmt: skip
    """Where packed rows from `begin` on of a tile that starts at `row` lie in X [T, H, D]:
    pointers [ROWS, BLOCK_D]."""
    base = X + (row + begin // G).to(gl.int64) * stride_t + head.to(gl.int64) * G * stride_h
    offs_d = gl.arange(0, BLOCK_D, gl.SliceLayout(0, lines))
    offsets = packed_offsets(begin, stride_t, stride_h, G, ROWS, gl.SliceLayout(1, lines))
    return base + (offsets[:, None] + offs_d[None, :])


@gluon.jit
def packed_mask(
    begin, rows, D: gl.constexpr, ROWS: gl.constexpr, BLOCK_D: gl.constexpr, lines: gl.constexpr
):
    """bool [ROWS, BLOCK_D]: which of `packed_rows` a tile of that many packed rows has."""
    mask = (begin + gl.arange(0, ROWS, gl.SliceLayout(1, lines)) < rows)[:, None]
    if BLOCK_D != D:
        mask = mask & (gl.arange(0, BLOCK_D, gl.SliceLayout(0, lines))[None, :] < D)
    return mask


@gluon.jit
def _consume(
    Q, OUT, LSE, TILES,
    stride_qt, stride_qh, stride_ot, stride_oh, stride_lh,
    KV_HEADS, scale_log2, q_s, places, turn,
    OWN: gl.constexpr, TILE: gl.constexpr, G: gl.constexpr, D: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BUFFERS: gl.constexpr,
    APART: gl.constexpr, PING_PONG: gl.constexpr,
):  # fmt: skip
    """A consumer: half of the rows, over all blocks of the keys that they see."""
    k_s, v_s, k_full, k_empty, v_full, _ = places
    ROWS: gl.constexpr = BLOCK_M // 2
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    result: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, result, 2)
    of_scores: gl.constexpr = gl.SliceLayout(1, scores)
    of_result: gl.constexpr = gl.SliceLayout(1, result)
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    head, begin, row, rows, key, _, whole, masked = work_item(
        TILES, KV_HEADS, TILE, G, BLOCK_M, BLOCK_N, APART
    )
    begin += OWN * ROWS
    mask = packed_mask(begin, rows, D, ROWS, BLOCK_D, lines)
    of_q = packed_rows(Q, stride_qt, stride_qh, head, row, begin, G, ROWS, BLOCK_D, lines)
    q = q_s.index(OWN)
    q.store(gl.load(of_q, mask=mask, other=0.0))
    fence_async_shared()
    gl.barrier()

    packed = begin + gl.arange(0, ROWS, of_scores)  # [ROWS]
    position = row - key + packed // G  # [ROWS] of a row among the keys: it sees [0, position]
    acc = gl.zeros([ROWS, BLOCK_D], gl.float32, result)
    row_sum = gl.zeros([ROWS], gl.float32, of_scores)
    row_max = gl.full([ROWS], -INF, gl.float32, of_scores)  # of the scores in base 2
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, scores)
    if PING_PONG and OWN == 1:
        mbarrier.arrive(turn.index(0))
    mbarrier.wait(k_full.index(0), 0)
    if PING_PONG:
        mbarrier.wait(turn.index(OWN), 0)
    k = block(k_s, 0, BLOCK_N, BLOCK_D)
    s = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    if PING_PONG:
        mbarrier.arrive(turn.index(1 - OWN))
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_empty.index(0))
    weights, _, row_sum, row_max = _weights(
        s, row_max, row_sum, position - whole * BLOCK_N, scale_log2, BLOCK_N, True
    )
    p = gl.convert_layout(weights.to(q.dtype), operand)
    seen = masked
    if APART:
        _, apart = keys_apart(TILES, KV_HEADS, TILE, G, BLOCK_M, APART)
        seen += (apart + BLOCK_N - 1) // BLOCK_N
    for j in range(1, seen):
        last = position - (whole + j) * BLOCK_N
        if APART:
            last = gl.where(j < masked, last, apart - 1 - (j - masked) * BLOCK_N)
        acc, p, row_max, row_sum = _attend(
            acc, p, row_max, row_sum, q, places, turn, j, last, scale_log2,
            OWN, BLOCK_N, BLOCK_D, BUFFERS, True, PING_PONG,
        )  # fmt: skip
    blocks = seen + whole
    for j in range(seen, blocks):
        acc, p, row_max, row_sum = _attend(
            acc, p, row_max, row_sum, q, places, turn, j, position, scale_log2,
            OWN, BLOCK_N, BLOCK_D, BUFFERS, False, PING_PONG,
        )  # fmt: skip
    v_at = (blocks - 1) % BUFFERS
    mbarrier.wait(v_full.index(v_at), (blocks - 1) // BUFFERS & 1)
    acc = warpgroup_mma(p, block(v_s, v_at, BLOCK_N, BLOCK_D), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])

    # made again, as registers that live through the loops spill
    head, begin, row, rows, _, _, _, _ = work_item(
        TILES, KV_HEADS, TILE, G, BLOCK_M, BLOCK_N, APART
    )
    begin += OWN * ROWS
    lse_base = LSE + head.to(gl.int64) * stride_lh + row.to(gl.int64) * G
    packed = begin + gl.arange(0, ROWS, of_scores)
    gl.store(lse_base + packed, row_max + gl.log2(row_sum), mask=packed < rows)
    out = acc / gl.convert_layout(row_sum, of_result)[:, None]
    of_out = packed_rows(OUT, stride_ot, stride_oh, head, row, begin, G, ROWS, BLOCK_D, lines)
    out = gl.convert_layout(out.to(OUT.dtype.element_ty), lines)
    gl.store(of_out, out, mask=packed_mask(begin, rows, D, ROWS, BLOCK_D, lines))


@gluon.jit(do_not_specialize=["stride_lh"])
def _forward_kernel(
    Q, K, V, OUT, LSE, TILES,
    stride_qt, stride_qh,
    stride_ot, stride_oh,
    stride_lh,
    KV_HEADS, scale_log2,
    TILE: gl.constexpr, G: gl.constexpr, D: gl.constexpr, BLOCK_D: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BUFFERS: gl.constexpr, APART: gl.constexpr,
    PING_PONG: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = BLOCK_M // 2
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    head, begin, row, rows, _, keys, _, _ = work_item(
        TILES, KV_HEADS, TILE, G, BLOCK_M, BLOCK_N, APART
    )
    if begin >= rows:  # behind the end of a short tile, or of the tiles
        return
    if keys <= 0:  # rows of no sequence
        offs_m = gl.arange(0, BLOCK_M, gl.SliceLayout(1, lines))
        gl.store(
            packed_rows(OUT, stride_ot, stride_oh, head, row, begin, G, BLOCK_M, BLOCK_D, lines),
            gl.zeros([BLOCK_M, BLOCK_D], OUT.dtype.element_ty, lines),
            mask=packed_mask(begin, rows, D, BLOCK_M, BLOCK_D, lines),
        )
        lse_base = LSE + head.to(gl.int64) * stride_lh + row.to(gl.int64) * G + begin
        nothing = gl.full([BLOCK_M], -INF, gl.float32, gl.SliceLayout(1, lines))
        gl.store(lse_base + offs_m, nothing, mask=begin + offs_m < rows)
        return
    plain: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_s = gl.allocate_shared_memory(Q.dtype.element_ty, [2, ROWS, BLOCK_D], plain)
    places = allocate_places(K, V, BLOCK_N, BLOCK_D, BUFFERS)
    turn = mbarrier.allocate_mbarrier(batch=2)
    for i in gl.static_range(2):
        mbarrier.init(turn.index(i), count=1)
    fence_async_shared()
    gl.warp_specialize(
        [
            (produce, (
                K, V, TILES, KV_HEADS, places, TILE, G, BLOCK_M, BLOCK_N, BUFFERS, APART,
            )),
            (_consume, (
                Q, OUT, LSE, TILES, stride_qt, stride_qh, stride_ot, stride_oh, stride_lh,
                KV_HEADS, scale_log2, q_s, places, turn,
                0, TILE, G, D, BLOCK_D, BLOCK_M, BLOCK_N, BUFFERS, APART, PING_PONG,
            )),
            (_consume, (
                Q, OUT, LSE, TILES, stride_qt, stride_qh, stride_ot, stride_oh, stride_lh,
                KV_HEADS, scale_log2, q_s, places, turn,
                1, TILE, G, D, BLOCK_D, BLOCK_M, BLOCK_N, BUFFERS, APART, PING_PONG,
            )),
        ],
        [4, 4], [REGISTERS, REGISTERS],
    )  # fmt: skip


class Rows(NamedTuple):
    """The address and layout of a tensor [T, H, D], without keeping it."""

    address: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def data_ptr(self) -> int:
        return self.address


@lru_cache(1024)  # a backward of a layer asks for six
def _descriptor(rows: Rows, block: int) -> TensorDescriptor:
    """The descriptor of boxes of `block` rows of one head that end where a range of rows does.

    Two dimensions more, of 2^34 elements less a row and of a row, reach the row at which the range
    ends from one that is 2^30 rows away: addresses wrap around at 2^64. The third dimension has
    2^30 rows, so that what lies behind the range is outside of it (the idea of Triton's
    `ragged_tma`). The box at row n of the range [begin, end) is at [2^30, end, 2^30 - (end - begin)
    + n, head, 0].
    """
    _, heads, dim = rows.shape
    stride_t, stride_h, _ = rows.strides
    if rows.address % 16:  # of what torch.compile had traced with another
        raise RuntimeError(
            "condensed_attention: impl='hopper' was given a tensor that begins "
            f"{rows.address % 16} bytes behind a multiple of 16, where its copies begin; clone it"
        )
    described = TensorDescriptor(
        rows,
        [0x7FFF0000, 0x7FFF0000, BILLION.value, heads, dim],
        [(1 << 34) - stride_t, stride_t, stride_t, stride_h, 1],
        [1, 1, block, 1, triton.next_power_of_2(dim)],
        gl.NVMMASharedLayout(128, 16, 5),
    )
    described.compiled_for = described.__mangle__()  # of `start`
    return described


def boxes(tensor: Tensor, block: int) -> TensorDescriptor:
    """The tensor map of `tensor` [T, H, D] for copies of `block` rows of a head."""
    rows = Rows(tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
    return _descriptor(rows, block)


@cache
def constants(
    heads: int, key_heads: int, dim: int, columns: int, config: launch.HopperConfig, **others: int
) -> Constants:
    """The constants that are compiled into a kernel, and its number of warps; tiles have 4 or 6
    columns.
    """
    return Constants(
        G=heads // key_heads, D=dim, BLOCK_D=triton.next_power_of_2(dim), BLOCK_M=config.block_m,
        BLOCK_N=config.block_n, BUFFERS=config.stages, APART=columns == 6,
        REGISTERS=config.registers, num_warps=4, **others,
    )  # fmt: skip


def forward(q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """O [T, Hq, D] in q's dtype, and the base-2 log-sum-exp of each row's scores, fp32 [Hkv, T, G]:
    what `condensed_attention_triton._forward` returns."""
    out = empty_like(q, memory_format=DENSE)
    (rows, heads, dim), key_heads = q.shape, k.shape[1]
    lse = empty((key_heads, rows, heads // key_heads), dtype=torch.float32, device=q.device)

    def run(config: launch.HopperConfig) -> None:
        start(
            _forward_kernel, (tiles.shape[1] * (TILE * heads // config.block_m),),
            constants(
                heads, key_heads, dim, tiles.shape[2], config,
                TILE=TILE, PING_PONG=config.ping_pong,
            ),
            q, boxes(k, config.block_n), boxes(v, config.block_n), out, lse, tiles,
            *q.stride()[:2], *out.stride()[:2], lse.stride(0),
            key_heads, scale * LOG2E,
        )  # fmt: skip

    launch.hopper("forward", q, run)
    return out, lse
