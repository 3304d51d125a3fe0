"""The backward of condensed attention on Hopper: as in the forward, a producer of copies beside two
consumers.

    dQ       a consumer has 64 packed rows, and takes K and V block by block. It reads O and dO
             first, and tells delta = rowsum(O * dO) to the next launch
    dK, dV   a consumer has 64 keys, and takes Q and dO of one head after the other, block by block;
             the scores come out transposed

No atomics: a sum is always added up in one order. What a copy brings in cannot be read as 0: in the
gradients, NaN in a row of Q, K or dO may reach rows and keys of its own sequence that share a block
with those that see it, as NaN in V may in the forward; never those of another sequence.
"""

from __future__ import annotations

from torch import Tensor, empty_like
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from . import launch
from .condensed_attention import fits_32_bits
from .condensed_attention_hopper import (
    BILLION,
    DENSE,
    INF,
    LOG2E,
    allocate_places,
    block,
    boxes,
    constants,
    keys_apart,
    packed_mask,
    packed_rows,
    produce,
    work_item,
)
from .layout import TILE
from .start import start


@gluon.jit
def _gather_keys(
    dq, ds, q, do, lse, delta, places, j, last, scale_log2,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, BUFFERS: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """dS of block j, and the product of block j - 1's with its keys."""
    k_s, v_s, k_full, k_empty, v_full, v_empty = places
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    at = j % BUFFERS
    before = (j - 1) % BUFFERS
    zeros = gl.zeros([q.shape[0], BLOCK_N], gl.float32, scores)
    mbarrier.wait(k_full.index(at), j // BUFFERS & 1)
    k = block(k_s, at, BLOCK_N, BLOCK_D)
    s = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(at), j // BUFFERS & 1)
    v = block(v_s, at, BLOCK_N, BLOCK_D)
    dp = warpgroup_mma(do, v.permute((1, 0)), zeros, use_acc=False, is_async=True)
    dq = warpgroup_mma(ds, block(k_s, before, BLOCK_N, BLOCK_D), dq, is_async=True)
    s = warpgroup_mma_wait(2, deps=[s])
    p = gl.exp2(s * scale_log2 - lse[:, None])  # [rows, BLOCK_N]
    dp = warpgroup_mma_wait(1, deps=[dp])
    mbarrier.arrive(v_empty.index(at))
    new = p * (dp - delta[:, None])
    if MASKED:
        offs_n = gl.arange(0, BLOCK_N, gl.SliceLayout(0, scores))
        new = gl.where(offs_n[None, :] <= last[:, None], new, 0.0)
    dq = warpgroup_mma_wait(0, deps=[dq])
    mbarrier.arrive(k_empty.index(before))
    return dq, gl.convert_layout(new.to(q.dtype), ds.type.layout)


@gluon.jit
def _consume_keys(
    Q, OUT, DO, LSE, DELTA, DQ, TILES,
    stride_qt, stride_qh, stride_ot, stride_oh, stride_dot, stride_doh, stride_gt, stride_gh,
    stride_lh,
    KV_HEADS, scale, scale_log2, q_s, do_s, places,
    OWN: gl.constexpr, TILE: gl.constexpr, G: gl.constexpr, D: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BUFFERS: gl.constexpr,
    APART: gl.constexpr,
):  # fmt: skip
    """A consumer of dQ: half of the rows, over all blocks of the keys that they see."""
    k_s, v_s, k_full, _, v_full, v_empty = places
    ROWS: gl.constexpr = BLOCK_M // 2
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    result: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, result, 2)
    of_scores: gl.constexpr = gl.SliceLayout(1, scores)
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    of_lines: gl.constexpr = gl.SliceLayout(1, lines)
    head, begin, row, rows, key, _, whole, masked = work_item(
        TILES, KV_HEADS, TILE, G, BLOCK_M, BLOCK_N, APART
    )
    begin += OWN * ROWS
    mask = packed_mask(begin, rows, D, ROWS, BLOCK_D, lines)
    of_q = packed_rows(Q, stride_qt, stride_qh, head, row, begin, G, ROWS, BLOCK_D, lines)
    q = q_s.index(OWN)
    q.store(gl.load(of_q, mask=mask, other=0.0))
    of_d_out = packed_rows(DO, stride_dot, stride_doh, head, row, begin, G, ROWS, BLOCK_D, lines)
    d_out = gl.load(of_d_out, mask=mask, other=0.0)
    do = do_s.index(OWN)
    do.store(d_out)
    of_out = packed_rows(OUT, stride_ot, stride_oh, head, row, begin, G, ROWS, BLOCK_D, lines)
    out = gl.load(of_out, mask=mask, other=0.0)
    delta_lines = gl.sum(out.to(gl.float32) * d_out.to(gl.float32), 1)  # [ROWS]
    statistics = head.to(gl.int64) * stride_lh + row.to(gl.int64) * G
    packed = begin + gl.arange(0, ROWS, of_lines)
    gl.store(DELTA + statistics + packed, delta_lines, mask=packed < rows)
    delta = gl.convert_layout(delta_lines, of_scores)
    fence_async_shared()
    gl.barrier()

    packed = begin + gl.arange(0, ROWS, of_scores)  # [ROWS]
    lse = gl.load(LSE + statistics + packed, mask=packed < rows, other=INF)
    position = row - key + packed // G  # [ROWS] of a row among the keys: it sees [0, position]
    dq = gl.zeros([ROWS, BLOCK_D], gl.float32, result)
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, scores)
    mbarrier.wait(k_full.index(0), 0)
    k = block(k_s, 0, BLOCK_N, BLOCK_D)
    s = warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(0), 0)
    v = block(v_s, 0, BLOCK_N, BLOCK_D)
    dp = warpgroup_mma(do, v.permute((1, 0)), zeros, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])
    p = gl.exp2(s * scale_log2 - lse[:, None])
    dp = warpgroup_mma_wait(0, deps=[dp])
    mbarrier.arrive(v_empty.index(0))
    offs_n = gl.arange(0, BLOCK_N, gl.SliceLayout(0, scores))
    last = position - whole * BLOCK_N
    first = gl.where(offs_n[None, :] <= last[:, None], p * (dp - delta[:, None]), 0.0)
    ds = gl.convert_layout(first.to(q.dtype), operand)
    seen = masked
    if APART:
        _, apart = keys_apart(TILES, KV_HEADS, TILE, G, BLOCK_M, APART)
        seen += (apart + BLOCK_N - 1) // BLOCK_N
    for j in range(1, seen):
        last = position - (whole + j) * BLOCK_N
        if APART:
            last = gl.where(j < masked, last, apart - 1 - (j - masked) * BLOCK_N)
        dq, ds = _gather_keys(
            dq, ds, q, do, lse, delta, places, j, last, scale_log2,
            BLOCK_N, BLOCK_D, BUFFERS, True,
        )  # fmt: skip
    blocks = seen + whole
    for j in range(seen, blocks):
        dq, ds = _gather_keys(
            dq, ds, q, do, lse, delta, places, j, position, scale_log2,
            BLOCK_N, BLOCK_D, BUFFERS, False,
        )  # fmt: skip
    k = block(k_s, (blocks - 1) % BUFFERS, BLOCK_N, BLOCK_D)
    dq = warpgroup_mma(ds, k, dq, is_async=True)
    dq = warpgroup_mma_wait(0, deps=[dq])

    head, begin, row, rows, _, _, _, _ = work_item(
        TILES, KV_HEADS, TILE, G, BLOCK_M, BLOCK_N, APART
    )
    begin += OWN * ROWS
    of_dq = packed_rows(DQ, stride_gt, stride_gh, head, row, begin, G, ROWS, BLOCK_D, lines)
    grad = gl.convert_layout((dq * scale).to(DQ.dtype.element_ty), lines)
    gl.store(of_dq, grad, mask=packed_mask(begin, rows, D, ROWS, BLOCK_D, lines))


@gluon.jit(do_not_specialize=["stride_lh"])
def _dq_kernel(
    Q, K, V, OUT, DO, LSE, DELTA, DQ, TILES,
    stride_qt, stride_qh, stride_ot, stride_oh, stride_dot, stride_doh, stride_gt, stride_gh,
    stride_lh,
    KV_HEADS, scale, scale_log2,
    TILE: gl.constexpr, G: gl.constexpr, D: gl.constexpr, BLOCK_D: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BUFFERS: gl.constexpr, APART: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    head, begin, row, rows, _, keys, _, _ = work_item(
        TILES, KV_HEADS, TILE, G, BLOCK_M, BLOCK_N, APART
    )
    if begin >= rows:  # behind the end of a short tile, or of the tiles
        return
    if keys <= 0:  # rows of no sequence
        offs_m = gl.arange(0, BLOCK_M, gl.SliceLayout(1, lines))
        gl.store(
            packed_rows(DQ, stride_gt, stride_gh, head, row, begin, G, BLOCK_M, BLOCK_D, lines),
            gl.zeros([BLOCK_M, BLOCK_D], DQ.dtype.element_ty, lines),
            mask=packed_mask(begin, rows, D, BLOCK_M, BLOCK_D, lines),
        )
        statistics = head.to(gl.int64) * stride_lh + row.to(gl.int64) * G + begin
        nothing = gl.zeros([BLOCK_M], gl.float32, gl.SliceLayout(1, lines))
        gl.store(DELTA + statistics + offs_m, nothing, mask=begin + offs_m < rows)
        return
    plain: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_s = gl.allocate_shared_memory(Q.dtype.element_ty, [2, BLOCK_M // 2, BLOCK_D], plain)
    do_s = gl.allocate_shared_memory(Q.dtype.element_ty, [2, BLOCK_M // 2, BLOCK_D], plain)
    places = allocate_places(K, V, BLOCK_N, BLOCK_D, BUFFERS)
    fence_async_shared()
    gl.warp_specialize(
        [
            (produce, (
                K, V, TILES, KV_HEADS, places, TILE, G, BLOCK_M, BLOCK_N, BUFFERS, APART,
            )),
            (_consume_keys, (
                Q, OUT, DO, LSE, DELTA, DQ, TILES,
                stride_qt, stride_qh, stride_ot, stride_oh, stride_dot, stride_doh,
                stride_gt, stride_gh, stride_lh,
                KV_HEADS, scale, scale_log2, q_s, do_s, places,
                0, TILE, G, D, BLOCK_D, BLOCK_M, BLOCK_N, BUFFERS, APART,
            )),
            (_consume_keys, (
                Q, OUT, DO, LSE, DELTA, DQ, TILES,
                stride_qt, stride_qh, stride_ot, stride_oh, stride_dot, stride_doh,
                stride_gt, stride_gh, stride_lh,
                KV_HEADS, scale, scale_log2, q_s, do_s, places,
                1, TILE, G, D, BLOCK_D, BLOCK_M, BLOCK_N, BUFFERS, APART,
            )),
        ],
        [4, 4], [REGISTERS, REGISTERS],
    )  # fmt: skip


@gluon.jit
def _key_tile(TILES, CAPACITY, KV_HEADS, APART: gl.constexpr):
    """The keys of this program, how many rows see some of them from the first key's on."""
    item = gl.program_id(0)
    tile = TILES + (6 if APART else 4) * (CAPACITY + item // KV_HEADS)
    key = gl.load(tile)
    return item % KV_HEADS, key, gl.load(tile + 1) - key, gl.load(tile + 3) - key


@gluon.jit
def _row_blocks(keys, rows, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Of the rows' blocks: how many there are; how many have a mask, those on the diagonal, at
    least one, and the last one if it is short; the first of the others, and the one behind them."""
    blocks = (rows + BLOCK_M - 1) // BLOCK_M
    unseen = gl.maximum(gl.minimum(keys, BLOCK_N) - 1, 1)
    masked = gl.minimum((unseen + BLOCK_M - 1) // BLOCK_M, blocks)
    whole = gl.maximum(rows // BLOCK_M, masked)
    return blocks, masked + blocks - whole, masked, whole


@gluon.jit
def _nth_block(i, masked, whole):
    """Of those with a mask."""
    return gl.where(i < masked, i, i + whole - masked)


@gluon.jit
def _produce_rows(
    Q, K, V, DO, LSE, DELTA, TILES, stride_lh, CAPACITY, KV_HEADS, k_s, v_s, kv_full, places,
    G: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BUFFERS: gl.constexpr,
    APART: gl.constexpr,
):  # fmt: skip
    """The producer of dK and dV: K and V of all keys, then Q and dO, head by head, with the
    statistics of their rows."""
    q_s, do_s, lse_s, delta_s, q_full, do_full, empty = places
    each: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    head, key, keys, rows = _key_tile(TILES, CAPACITY, KV_HEADS, APART)
    mbarrier.expect(kv_full, K.nbytes_per_cta + V.nbytes_per_cta)
    at = [BILLION, key + keys, BILLION - keys, head, 0]
    tma.async_load(K, at, kv_full, k_s)
    tma.async_load(V, at, kv_full, v_s)
    blocks, first, masked, whole = _row_blocks(keys, rows, BLOCK_M, BLOCK_N)
    for j in range(0, blocks * G):
        buffer = j % BUFFERS
        phase = (j // BUFFERS & 1) ^ 1  # the first round finds all places empty
        # of all heads those with a mask, then of all heads the others
        rest = j - first * G
        others = gl.maximum(blocks - first, 1)
        g = gl.where(rest < 0, j // first, rest // others)
        m = gl.where(rest < 0, _nth_block(j % first, masked, whole), masked + rest % others)
        m = m * BLOCK_M
        at = [BILLION, key + rows, BILLION - rows + m, head * G + g, 0]
        row = m + gl.arange(0, BLOCK_M, each)
        statistics = head.to(gl.int64) * stride_lh + key.to(gl.int64) * G + g
        # behind the last row Q and dO are 0: what p is there counts for nothing
        lse = gl.load(LSE + statistics + row * G, mask=row < rows, other=0.0)
        delta = gl.load(DELTA + statistics + row * G, mask=row < rows, other=0.0)
        mbarrier.wait(empty.index(buffer), phase)
        mbarrier.expect(q_full.index(buffer), Q.nbytes_per_cta)
        tma.async_load(Q, at, q_full.index(buffer), q_s.index(buffer))
        lse_s.index(buffer).store(lse)
        delta_s.index(buffer).store(delta)
        mbarrier.arrive(q_full.index(buffer))
        mbarrier.expect(do_full.index(buffer), DO.nbytes_per_cta)
        tma.async_load(DO, at, do_full.index(buffer), do_s.index(buffer))


@gluon.jit
def _gather_rows(
    dk, dv, k, v, places, j, m, first_key, scale_log2,
    BLOCK_M: gl.constexpr, BLOCK_D: gl.constexpr, BUFFERS: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """One block of rows of one head, for dK and dV."""
    q_s, do_s, lse_s, delta_s, q_full, do_full, empty = places
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, dk.type.layout, 2)
    of_rows: gl.constexpr = gl.SliceLayout(0, scores)
    KEYS: gl.constexpr = k.shape[0]
    at = j % BUFFERS
    zeros = gl.zeros([KEYS, BLOCK_M], gl.float32, scores)
    mbarrier.wait(q_full.index(at), j // BUFFERS & 1)
    lse = lse_s.index(at).load(of_rows)
    q = block(q_s, at, BLOCK_M, BLOCK_D)
    st = warpgroup_mma(k, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(do_full.index(at), j // BUFFERS & 1)
    do = block(do_s, at, BLOCK_M, BLOCK_D)
    dpt = warpgroup_mma(v, do.permute((1, 0)), zeros, use_acc=False, is_async=True)
    st = warpgroup_mma_wait(1, deps=[st])
    pt = gl.exp2(st * scale_log2 - lse[None, :])  # [KEYS, BLOCK_M]
    if MASKED:
        offs_n = first_key - m + gl.arange(0, KEYS, gl.SliceLayout(1, scores))
        pt = gl.where(offs_n[:, None] <= gl.arange(0, BLOCK_M, of_rows)[None, :], pt, 0.0)
    weights = gl.convert_layout(pt.to(q.dtype), operand)
    dv = warpgroup_mma(weights, do, dv, is_async=True)
    dpt = warpgroup_mma_wait(1, deps=[dpt])
    # from shared memory only here: its registers are free
    dst = pt * (dpt - delta_s.index(at).load(of_rows)[None, :])
    dv = warpgroup_mma_wait(0, deps=[dv])
    ds = gl.convert_layout(dst.to(q.dtype), operand)
    dk = warpgroup_mma(ds, q, dk, is_async=True)
    dk = warpgroup_mma_wait(0, deps=[dk])
    mbarrier.arrive(empty.index(at))
    return dk, dv


@gluon.jit
def _consume_rows(
    DK, DV, TILES,
    stride_gt, stride_gh,
    CAPACITY, KV_HEADS, scale, scale_log2, k_s, v_s, kv_full, places,
    OWN: gl.constexpr, G: gl.constexpr, D: gl.constexpr, BLOCK_D: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BUFFERS: gl.constexpr, APART: gl.constexpr,
):  # fmt: skip
    """A consumer of dK and dV: half of the keys, over all rows that see them."""
    KEYS: gl.constexpr = BLOCK_N // 2
    result: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    head, key, keys, rows = _key_tile(TILES, CAPACITY, KV_HEADS, APART)
    blocks, first, masked, whole = _row_blocks(keys, rows, BLOCK_M, BLOCK_N)
    k = k_s.reshape([BLOCK_N, BLOCK_D]).slice(OWN * KEYS, KEYS, 0)
    v = v_s.reshape([BLOCK_N, BLOCK_D]).slice(OWN * KEYS, KEYS, 0)
    dk = gl.zeros([KEYS, BLOCK_D], gl.float32, result)
    dv = gl.zeros([KEYS, BLOCK_D], gl.float32, result)
    mbarrier.wait(kv_full, 0)
    for j in range(0, first * G):
        m = _nth_block(j % first, masked, whole) * BLOCK_M
        dk, dv = _gather_rows(
            dk, dv, k, v, places, j, m, OWN * KEYS, scale_log2, BLOCK_M, BLOCK_D, BUFFERS, True,
        )  # fmt: skip
    for j in range(first * G, blocks * G):
        dk, dv = _gather_rows(
            dk, dv, k, v, places, j, 0, OWN * KEYS, scale_log2, BLOCK_M, BLOCK_D, BUFFERS, False,
        )  # fmt: skip

    head, key, keys, _ = _key_tile(TILES, CAPACITY, KV_HEADS, APART)
    offs_n = OWN * KEYS + gl.arange(0, KEYS, gl.SliceLayout(1, lines))
    offs_d = gl.arange(0, BLOCK_D, gl.SliceLayout(0, lines))
    mask = (offs_n < keys)[:, None] & (offs_d[None, :] < D)
    base = key.to(gl.int64) * stride_gt + head.to(gl.int64) * stride_gh
    offsets = offs_n[:, None] * stride_gt + offs_d[None, :]
    grad = gl.convert_layout((dk * scale).to(DK.dtype.element_ty), lines)
    gl.store(DK + base + offsets, grad, mask=mask)
    grad = gl.convert_layout(dv.to(DV.dtype.element_ty), lines)
    gl.store(DV + base + offsets, grad, mask=mask)


@gluon.jit(do_not_specialize=["stride_lh", "CAPACITY"])
def _dkdv_kernel(
    Q, K, V, DO, LSE, DELTA, DK, DV, TILES,
    stride_gt, stride_gh, stride_lh,
    CAPACITY, KV_HEADS, scale, scale_log2,
    G: gl.constexpr, D: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BUFFERS: gl.constexpr, APART: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    lines: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [4, 1], [1, 0])
    head, key, keys, rows = _key_tile(TILES, CAPACITY, KV_HEADS, APART)
    if keys <= 0:  # behind the end of the tiles
        return
    if rows <= 0:  # keys that no row sees
        offs_n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, lines))
        offs_d = gl.arange(0, BLOCK_D, gl.SliceLayout(0, lines))
        mask = (offs_n < keys)[:, None] & (offs_d[None, :] < D)
        base = key.to(gl.int64) * stride_gt + head.to(gl.int64) * stride_gh
        offsets = offs_n[:, None] * stride_gt + offs_d[None, :]
        nothing = gl.zeros([BLOCK_N, BLOCK_D], DK.dtype.element_ty, lines)
        gl.store(DK + base + offsets, nothing, mask=mask)
        gl.store(DV + base + offsets, nothing, mask=mask)
        return
    k_s = gl.allocate_shared_memory(K.dtype, [1, 1, BLOCK_N, 1, BLOCK_D], K.layout)
    v_s = gl.allocate_shared_memory(V.dtype, [1, 1, BLOCK_N, 1, BLOCK_D], V.layout)
    q_s = gl.allocate_shared_memory(Q.dtype, [BUFFERS, 1, 1, BLOCK_M, 1, BLOCK_D], Q.layout)
    do_s = gl.allocate_shared_memory(DO.dtype, [BUFFERS, 1, 1, BLOCK_M, 1, BLOCK_D], DO.layout)
    row: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    lse_s = gl.allocate_shared_memory(gl.float32, [BUFFERS, BLOCK_M], row)
    delta_s = gl.allocate_shared_memory(gl.float32, [BUFFERS, BLOCK_M], row)
    kv_full = mbarrier.allocate_mbarrier()
    q_full = mbarrier.allocate_mbarrier(batch=BUFFERS)
    empty = mbarrier.allocate_mbarrier(batch=BUFFERS)
    do_full = mbarrier.allocate_mbarrier(batch=BUFFERS)
    mbarrier.init(kv_full, count=1)
    for i in gl.static_range(BUFFERS):
        mbarrier.init(q_full.index(i), count=2)  # the copy, and the statistics
        mbarrier.init(empty.index(i), count=2)
        mbarrier.init(do_full.index(i), count=1)
    places = q_s, do_s, lse_s, delta_s, q_full, do_full, empty
    fence_async_shared()
    gl.warp_specialize(
        [
            (_produce_rows, (
                Q, K, V, DO, LSE, DELTA, TILES, stride_lh, CAPACITY, KV_HEADS,
                k_s, v_s, kv_full, places, G, BLOCK_M, BLOCK_N, BUFFERS, APART,
            )),
            (_consume_rows, (
                DK, DV, TILES, stride_gt, stride_gh,
                CAPACITY, KV_HEADS, scale, scale_log2, k_s, v_s, kv_full, places,
                0, G, D, BLOCK_D, BLOCK_M, BLOCK_N, BUFFERS, APART,
            )),
            (_consume_rows, (
                DK, DV, TILES, stride_gt, stride_gh,
                CAPACITY, KV_HEADS, scale, scale_log2, k_s, v_s, kv_full, places,
                1, G, D, BLOCK_D, BLOCK_M, BLOCK_N, BUFFERS, APART,
            )),
        ],
        [4, 4], [REGISTERS, REGISTERS],
    )  # fmt: skip


def backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, tiles: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dQ [T, Hq, D], dK and dV [T, Hkv, D] in q's dtype."""
    groups = q.shape[1] // k.shape[1]
    if d_out.stride(-1) != 1 or not launch.takes_tma(d_out) or not fits_32_bits(d_out, groups):
        d_out = d_out.clone(memory_format=DENSE)  # `contiguous` might give it back as it is
    dq, dk, dv, delta = (empty_like(t, memory_format=DENSE) for t in (q, k, v, lse))
    (_, heads, dim), key_heads = q.shape, k.shape[1]
    capacity, columns = tiles.shape[1:]
    scales = scale, scale * LOG2E

    def dq_(config: launch.HopperConfig) -> None:
        start(
            _dq_kernel, (capacity * (TILE * heads // config.block_m),),
            constants(heads, key_heads, dim, columns, config, TILE=TILE),
            q, boxes(k, config.block_n), boxes(v, config.block_n),
            out, d_out, lse, delta, dq, tiles,
            *q.stride()[:2], *out.stride()[:2], *d_out.stride()[:2], *dq.stride()[:2],
            lse.stride(0),
            key_heads, *scales,
        )  # fmt: skip

    def dkdv(config: launch.HopperConfig) -> None:
        start(
            _dkdv_kernel, (capacity * key_heads,),
            constants(heads, key_heads, dim, columns, config),
            boxes(q, config.block_m), boxes(k, TILE), boxes(v, TILE), boxes(d_out, config.block_m),
            lse, delta, dk, dv, tiles,
            *dk.stride()[:2], lse.stride(0),
            capacity, key_heads, *scales,
        )  # fmt: skip

    launch.hopper("dq", q, dq_)
    launch.hopper("dkdv", q, dkdv)
    return dq, dk, dv
