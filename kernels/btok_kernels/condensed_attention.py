"""Condensed attention: causal attention in which target rows see the bottleneck tokens only.

    out[i] = softmax(scale * q[i] @ k[S(i)].T) @ v[S(i)]
    S(i) = [start, i] for source and bottleneck rows, [first, i] for target rows, of which a budget
           of bottleneck rows leaves [first, last) and [border, i]

over T packed rows of N sequences (`CondensedLayout`). The sdpa path materialises no mask, and no
scores between rows of different sequences or of target rows with source keys:

    1. cut the mask into plain causal segments, [start, border) and the rest, grouped by length
       (on the host, once per batch)
    2. gather the segments' rows and run torch's fused causal attention on each group
    3. take each row's output from the segment that owns it; the gradients of a bottleneck key from
       its two segments add up in the gather's backward
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .launch import (
    INSTALLED,
    Reasons,
    always,
    autotuned,
    choose,
    hopper_wins,
    no_hopper,
    no_triton,
)
from .layout import TILE, CondensedLayout, Half

HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256)  # of the Triton kernels


def _reference(q: Tensor, k: Tensor, v: Tensor, layout: CondensedLayout, scale: float) -> Tensor:
    """The specification: dense, with the T x T mask, in at least fp32."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[1] // k.shape[1]
    k, v = (t.to(dtype).repeat_interleave(groups, dim=1) for t in (k, v))  # [T, Hq, D]
    rows = torch.arange(len(q), device=q.device)
    begin, stop = layout.row_gap[:, :, None]  # [T, 1] each
    sees = (rows <= rows[:, None]) & (rows >= layout.row_first[:, None])  # [T, T]
    sees &= (rows < begin) | (rows >= stop)
    scores = torch.einsum("ihd,jhd->hij", q.to(dtype), k) * scale
    # rows of the unused tail see nothing: softmax of all -inf is nan, and they give 0
    weights = scores.masked_fill(~sees, -torch.inf).softmax(-1).masked_fill(~sees, 0.0)
    return torch.einsum("hij,jhd->ihd", weights, v).to(q.dtype)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, layout: CondensedLayout, scale: float) -> Tensor:
    """Torch's fused causal attention, a call per group of segments."""
    if scale == 0:  # torch scales what it has masked, and -inf * 0 is NaN
        q, scale = q * 0, 1.0
    rows, shapes, owner, in_place = layout.segments
    if in_place:
        return _causal(q, k, v, shapes[0], scale)
    sizes = [segments * length for segments, length in shapes]
    gathered = (t.index_select(0, rows).split(sizes) for t in (q, k, v))
    parts = zip(*gathered, shapes, strict=True)
    outputs = [_causal(qs, ks, vs, shape, scale) for qs, ks, vs, shape in parts]
    return torch.cat([*outputs, _nothing(q, k, v, outputs)]).index_select(0, owner)


def _nothing(q: Tensor, k: Tensor, v: Tensor, others: Sequence[Tensor]) -> Tensor:
    """Zeros [1, Hq, D] for the rows of no sequence; where there is nothing else they have gradients
    of 0.
    """
    zero = q.new_zeros(1, *q.shape[1:])
    return zero if others else zero + sum(t[:0].sum() for t in (q, k, v))


def _causal(q: Tensor, k: Tensor, v: Tensor, shape: tuple[int, int], scale: float) -> Tensor:
    """Causal attention of S segments of L rows each, one behind the other, [S * L, H, D]."""
    gqa = q.shape[1] != k.shape[1]
    q, k, v = (t.view(*shape, *t.shape[1:]).transpose(1, 2) for t in (q, k, v))  # [S, H, L, D]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
    return out.transpose(1, 2).flatten(0, 1)


def _two_calls(
    q: Tensor, k: Tensor, v: Tensor, layout: CondensedLayout, attend: Callable[..., Tensor]
) -> Tensor:
    """[x ; B] rows, then target rows on [B ; T] keys, by an attention over sequences of any length:
    `attend(q, k, v, half)`, [R, Hq, D] of the half's R rows and its keys."""
    calls, owner = layout.halves
    if len(calls) == 1 and len(calls[0].rows) == len(q):  # all of them, in order: no copies
        return attend(q, k, v, calls[0])
    outputs = [attend(q[half.rows], k[half.keys], v[half.keys], half) for half in calls]
    return torch.cat([*outputs, _nothing(q, k, v, outputs)]).index_select(0, owner)


def _varlen(q: Tensor, k: Tensor, v: Tensor, layout: CondensedLayout, scale: float) -> Tensor:
    """Condensed attention by two calls of torch's `varlen_attn`."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"scale": scale, "window_size": (-1, 0)}  # causal, from the right
    # one split: else the order of sums depends on what else is packed
    options |= {"num_splits": 1} if "num_splits" in known else {}
    if "enable_gqa" in known:
        options["enable_gqa"] = True
    else:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))

    def attend(q: Tensor, k: Tensor, v: Tensor, half: Half) -> Any:  # a pair for return_aux alone
        longest = max(half.row_lens), max(half.key_lens)
        return varlen_attn(q, k, v, half.row_ends, half.key_ends, *longest, **options)

    return _two_calls(q, k, v, layout, attend)


def _xformers(q: Tensor, k: Tensor, v: Tensor, layout: CondensedLayout, scale: float) -> Tensor:
    """Condensed attention by two calls of xformers' memory-efficient attention."""
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalFromBottomRightMask as Mask

    def attend(q: Tensor, k: Tensor, v: Tensor, half: Half) -> Tensor:
        bias = Mask.from_seqlens(half.row_lens, half.key_lens)
        return memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias, scale=scale)[0]

    groups = q.shape[1] // k.shape[1]  # its GQA has no backward
    k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    return _two_calls(q, k, v, layout, attend)


def condensed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: CondensedLayout,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention over packed sequences [x ; B ; T] under the condensation mask.

    `softmax(scale * q @ k.T + mask) @ v`; query head h uses key head `h // (Hq // Hkv)`.
    Source: arXiv 2604.11095, section 3.

    Args:
        q: [T, Hq, D], floating point.
        k, v: [T, Hkv, D], dtype and device of q; Hkv divides Hq.
        layout: where the sequences lie in the T rows; on q's device.
        scale: factor on the scores, at least 0; None for D ** -0.5.
        impl: "triton" (CUDA, or the CPU under TRITON_INTERPRET=1; fp16, bf16, fp32; D of 16, 32,
            64, 80, 96, 128, 256), "hopper" (sm_90 with triton 3.9, fp16 and bf16, D of 64, 80, 96,
            128), "sdpa" (any device, no mask materialised), "varlen" (torch's `varlen_attn` twice:
            CUDA, fp16 and bf16), "xformers" (CUDA, the extra of that name), "reference" (dense,
            computed in at least fp32), or "auto": triton where it can run on CUDA, else sdpa;
            hopper where a device's results or BTOK_AUTOTUNE=1 say that it is the faster. It logs
            once what it took and why not another.

    Returns:
        [T, Hq, D] in q's dtype; 0 in the layout's unused tail. Differentiable in q, k and v.

    Raises:
        TypeError: dtypes or devices that differ, integer inputs.
        ValueError: shapes that do not fit each other or the layout, a scale that is negative or not
            finite, an unknown `impl`.
        RuntimeError: an `impl` that cannot run on these tensors.
    """
    _check(q, k, v, layout, scale)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    scale = float(scale) if isinstance(scale, int) else scale  # or Triton compiles another kernel
    reasons, order = implementations(q, k, v, layout)
    if impl == "auto" and not torch.compiler.is_compiling() and autotuned(q):
        order = (*_faster(q, k, v, layout, scale), *order)
    chosen = choose("condensed_attention", impl, reasons, order)
    if chosen in ("triton", "hopper"):
        from .condensed_attention_triton import attention  # imports triton

        return attention(q, k, v, layout.tiles, scale, chosen == "hopper")
    paths = {"sdpa": _sdpa, "varlen": _varlen, "xformers": _xformers, "reference": _reference}
    return paths[chosen](q, k, v, layout, scale)


def implementations(
    q: Tensor, k: Tensor, v: Tensor, layout: CondensedLayout | None = None
) -> tuple[Reasons, tuple[str, ...]]:
    """The implementations that could compute `condensed_attention` of these tensors, as
    `launch.choose` takes them.

    Args:
        q: [T, Hq, D]; k, v: [T, Hkv, D].
        layout: of the call, where it is known.

    Returns:
        By name why each cannot run, asked by a call, which gives None where it can; and the names
        that "auto" tries in turn.
    """
    reasons: Reasons = {
        "triton": lambda: _no_triton(q, k, v),
        "hopper": lambda: _no_hopper(q, k, v),
        "sdpa": always,
        "varlen": lambda: _no_varlen(q),
        "xformers": lambda: _no_xformers(q),
        "reference": always,
    }
    order = ("triton", "sdpa") if q.is_cuda else ("sdpa",)
    return reasons, ("hopper", *order) if hopper_wins(q, layout) else order


def _faster(
    q: Tensor, k: Tensor, v: Tensor, layout: CondensedLayout, scale: float
) -> tuple[str, ...]:
    """The faster of "triton" and "hopper" on these tensors, by a search under BTOK_AUTOTUNE=1;
    empty where one of them cannot run.
    """
    if _no_hopper(q, k, v):
        return ()
    from .condensed_attention_triton import faster

    return faster(q, k, v, layout.tiles, scale)


def _no_triton(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if q.shape[2] not in HEAD_DIMS:
        return f"q has head dim {q.shape[2]}, its kernels take {HEAD_DIMS}"
    if q.shape[0] * q.shape[1] >= 1 << 31:
        return f"q has {q.shape[0]} rows of {q.shape[1]} heads, 2^31 or more in all; pack fewer"
    groups = q.shape[1] // k.shape[1]
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not fits_32_bits(tensor, groups):
            return (
                f"{name} has strides {list(tensor.stride())}; {TILE} rows and the heads of a group "
                "must lie within 2^31 elements"
            )
    return no_triton(q.device, q.dtype)


def _no_hopper(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the kernels for Hopper cannot run on these tensors, the head dims that their own kernels
    take included; None where they can.
    """
    return no_triton(q.device, q.dtype) or no_hopper(q, k, v) or _no_triton(q, k, v)


def fits_32_bits(tensor: Tensor, groups: int) -> bool:
    """Whether the kernels' offsets within a block of `tensor` [T, H, D], which are int32, fit.

    Offsets of blocks, sequences and key heads are int64.
    """
    stride_t, stride_h, _ = tensor.stride()
    return TILE * stride_t + groups * stride_h + tensor.shape[2] < 1 << 31


def _no_varlen(q: Tensor) -> str | None:
    if not q.is_cuda or q.dtype == torch.float32 or q.dtype == torch.float64:
        return f"q is {q.dtype} on {q.device}; it needs CUDA, and fp16 or bf16"
    return None


def _no_xformers(q: Tensor) -> str | None:
    if not INSTALLED["xformers"]:
        return "xformers is not installed; the extra is btok[xformers]"
    return None if q.is_cuda else f"q is on {q.device}; it needs CUDA"


def _check(q: Tensor, k: Tensor, v: Tensor, layout: CondensedLayout, scale: float | None) -> None:
    name = "condensed_attention"
    for label, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 3:
            raise ValueError(
                f"{name}: {label} has shape {list(tensor.shape)}, expected [T, heads, D]"
            )
        if not tensor.is_floating_point() or tensor.dtype != q.dtype:
            raise TypeError(
                f"{name}: {label} is {tensor.dtype}, q is {q.dtype}, expected one float dtype"
            )
        if tensor.device != q.device:
            raise TypeError(f"{name}: {label} is on {tensor.device}, q on {q.device}")
        if tensor.stride()[-1] != 1 and tensor.shape[-1] > 1:
            raise ValueError(
                f"{name}: {label} has stride {tensor.stride(-1)} in its last dimension, expected 1"
            )
    if not isinstance(layout, CondensedLayout):
        raise TypeError(f"{name}: layout is {type(layout)}, expected a CondensedLayout")
    if layout.device != q.device:
        raise TypeError(
            f"{name}: layout is on {layout.device}, q on {q.device}; use layout.to(device)"
        )
    if k.shape != v.shape:
        raise ValueError(
            f"{name}: v has shape {list(v.shape)}, k {list(k.shape)}, expected equal shapes"
        )
    if k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2]:
        raise ValueError(
            f"{name}: k has shape {list(k.shape)}, which does not fit q's {list(q.shape)}"
        )
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"{name}: k has {k.shape[1]} heads, which does not divide q's {q.shape[1]}"
        )
    if scale is not None and not 0 <= scale < math.inf:
        raise ValueError(f"{name}: scale is {scale}, expected a finite number, at least 0")
    if layout.num_rows != q.shape[0]:
        raise ValueError(f"{name}: layout has {layout.num_rows} rows, q has {q.shape[0]}")
