"""Calls of the library's ops on a device that executes their compiled kernels, and their errors.

Each error is a share of its budget: twice that of torch in the same precision, a step of the dtype
and a floor, as on a GPU (`tests/device`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from test_contrastive_loss import NAMES, differentiate, gap, make, truth
from torch import Tensor

from btok_kernels import condensed_attention_triton, launch
from btok_kernels.condensed_attention import condensed_attention
from btok_kernels.contrastive_loss import _reference, contrastive_loss_and_grad
from btok_kernels.layout import CondensedLayout
from tests.compiled.device import device

Errors = dict[str, float]  # by kernel, as a share of the budget
LAYOUTS = {
    "ragged": CondensedLayout.from_lengths([150, 9], [40, 12], 4),
    "long": CondensedLayout.from_lengths([250], [50], 4),  # a pipeline's stages come round
    "no targets": CondensedLayout.from_lengths([130, 1, 70], [0, 0, 0], 4),
    "no sources": CondensedLayout.from_lengths([0, 0], [33, 5], 4),
    "K = 0": CondensedLayout.from_lengths([90, 17, 0], [30, 0, 6], 0),
    "not condensed": CondensedLayout.from_lengths([70], [65], 3, condense=False),
    "tail": CondensedLayout.from_lengths([60, 5], [20, 3], 4, num_rows=140, max_sequences=9),
    "budgets": CondensedLayout.from_lengths([70, 9, 3], [40, 150, 9], 16, budgets=[5, 1, 16]),
    "large budgets": CondensedLayout.from_lengths([20], [60], 140, budgets=[130]),
}


def random_layout(rng: random.Random) -> CondensedLayout:
    """Up to three sequences, empty and one-token parts among them, maybe a tail and budgets."""
    count = rng.randrange(1, 4)
    source, target = (
        [rng.choice([0, 1, rng.randrange(2, 200), rng.randrange(2, 40)]) for _ in range(count)]
        for _ in range(2)
    )
    btoks = rng.choice([0, 1, 4, 4, 8, 64])
    budgets = [rng.randrange(btoks + 1) for _ in source] if rng.random() < 0.4 else None
    rows = sum(source) + sum(target) + count * btoks + rng.choice([0, 0, 5, 140])
    condense = rng.random() < 0.75
    return CondensedLayout.from_lengths(
        source, target, btoks, condense, num_rows=rows, budgets=budgets
    )


def hopper() -> list[ModuleType]:
    """The modules of the kernels for Hopper, which need triton 3.9."""
    from btok_kernels import condensed_attention_hopper, hopper_backward

    return [condensed_attention_hopper, hopper_backward]


def _strided(values: Tensor, way: int) -> Tensor:
    """The same values with rows and heads apart in one of three ways."""
    rows, heads, dim = values.shape
    if way == 1:  # as a model has them
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    if way == 2:  # a part of a wider projection
        wide = torch.full((rows, heads + 2, dim + 16), torch.nan, dtype=values.dtype)
        return wide[:, 1:-1, 16:].copy_(values)
    return values


def _differentiated(impl: str, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, **options: Any):
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = condensed_attention(*leaves, **options, impl=impl)
    return out.detach(), *torch.autograd.grad(out, leaves, d_out)


def _lse(q: Tensor, k: Tensor, layout: CondensedLayout, scale: float) -> Tensor:
    scores = torch.einsum("ihd,jhd->ihj", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1))
    rows = torch.arange(len(q))
    begin, stop = layout.row_gap[:, :, None]
    hidden = (rows[None] > rows[:, None]) | (rows[None] < layout.row_first[:, None])
    hidden |= (rows[None] >= begin) & (rows[None] < stop)
    return (scores * scale).masked_fill(hidden[:, None], -torch.inf).logsumexp(-1)


def attention(
    arch: int,
    dtype: torch.dtype,
    dim: int,
    heads: tuple[int, int],
    layout: CondensedLayout,
    *,
    seed: int = 0,
    scale: float | None = None,
    rewrite: Mapping[str, Callable[[str], str]] | None = None,
    impl: str = "triton",
    replayed: Sequence[CondensedLayout] = (),
) -> Errors:
    """Forward and backward through autograd; `heads` are those of the queries and of the keys.

    With `replayed` the launches are made again for each of these, as a CUDA graph would: its tiles
    and other inputs are copied to where those of `layout` lie. Errors are the worst of all.
    """
    generator = torch.Generator().manual_seed(seed)
    rng = random.Random(seed)
    inputs = [
        _strided(
            torch.randn(layout.num_rows, h, dim, generator=generator).to(dtype), rng.randrange(3)
        )
        for h in (heads[0], heads[1], heads[1], heads[0])
    ]
    made: list[Tensor] = []

    def empty(*shape: Any, **kwargs: Any) -> Tensor:
        made.append(torch.empty(*shape, **kwargs).fill_(torch.nan))
        return made[-1]

    def empty_like(tensor: Tensor, **_: Any) -> Tensor:
        return empty(tensor.shape, dtype=tensor.dtype)

    with ExitStack() as stack:
        for module in [condensed_attention_triton, *(hopper() if impl == "hopper" else [])]:
            stack.enter_context(mock.patch.object(module, "empty_like", empty_like))
            if hasattr(module, "empty"):
                stack.enter_context(mock.patch.object(module, "empty", empty))
        here = stack.enter_context(device(arch, rewrite, seed))
        got = _differentiated(impl, *inputs, layout=layout, scale=scale)
        found = [_errors(got, made, inputs, layout, scale)]
        for other in replayed:
            for x in inputs:
                x.copy_(torch.randn(x.shape, generator=generator))
            for x in made:
                x.fill_(torch.nan)
            layout.tiles.copy_(other.tiles)
            here.replay()
            found.append(_errors(got, made, inputs, other, scale))
    return {kernel: max(errors[kernel] for errors in found) for kernel in found[0]}


def _errors(
    got: Sequence[Tensor],
    made: Sequence[Tensor],
    inputs: Sequence[Tensor],
    layout: CondensedLayout,
    scale: float | None,
) -> Errors:
    """Of the output and dQ, dK, dV, and of the statistics among all that was `made`."""
    q, k, _, d_out = inputs
    dtype, (rows, heads, dim), key_heads = q.dtype, q.shape, k.shape[1]
    double = [t.double() for t in inputs]
    exact = _differentiated("reference", *double, layout=layout, scale=scale)
    low = _differentiated("sdpa", *inputs, layout=layout, scale=scale)
    factor = dim**-0.5 if scale is None else scale
    base2, delta = (
        x.transpose(0, 1).flatten(1)  # [Hkv, T, G] -> [T, Hq]
        for x in made
        if x.shape == (key_heads, rows, heads // key_heads)
    )
    lse = base2 * math.log(2)
    sees = layout.row_first < layout.num_rows
    results = {
        "out": (got[0], exact[0], low[0]),
        "lse": (
            lse[sees],
            _lse(double[0], double[1], layout, factor)[sees],
            _lse(q.float(), k.float(), layout, factor)[sees],
        ),
        "delta": (
            delta,
            (exact[0] * double[3]).sum(-1),
            (low[0].float() * d_out.float()).sum(-1),
        ),
        "dq": (got[1], exact[1], low[1]),
        "dk": (got[2], exact[2], low[2]),
        "dv": (got[3], exact[3], low[3]),
    }
    assert (lse[~sees] == -torch.inf).all(), "rows that see nothing"
    # fp32 is multiplied and added one by one along the head dim, which torch on a CPU adds in lanes
    steps = dim**0.5 if dtype == torch.float32 else 1.0
    errors = {
        name: _share(*tensors, torch.float32 if name == "lse" else dtype, steps)
        for name, tensors in results.items()
    }
    return {
        "forward": max(errors["out"], errors["lse"]),
        "delta": errors["delta"],
        "dq": errors["dq"],
        "dkdv": max(errors["dk"], errors["dv"]),
    }


def _share(got: Tensor, exact: Tensor, low: Tensor, dtype: torch.dtype, steps: float) -> float:
    if not got.numel():
        return 0.0
    eps = torch.finfo(dtype).eps
    error, error_of_low = got.double() - exact, low.double() - exact
    budget = 2 * error_of_low.abs().amax() + steps * eps * exact.abs().amax() + 1e-5
    # a wrong rounding is within that, but on the whole too small or too large
    bias, bias_of_low = ((e * exact).sum() / exact.square().sum() for e in (error, error_of_low))
    share = max(error.abs().amax() / budget, bias.abs() / (2 * bias_of_low.abs() + eps / 6 + 1e-6))
    return float("inf") if share.isnan() else share.item()


GRADIENT_BOUNDS = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def contrastive(
    arch: int,
    dtype: torch.dtype,
    rows: int,
    dim: int,
    *,
    chunk: int,
    panel: int = 256,
    rewrite: Mapping[str, Callable[[str], str]] | None = None,
    **options: Any,
) -> Errors:
    """The loss and its gradients; `chunk` rows at a time, or recomputed for 0."""
    arguments = make(rows, dim=dim, dtype=dtype, tau=0.07, **options)
    want, want_grads = truth(arguments)
    with (
        device(arch, rewrite) as here,
        mock.patch.object(launch, "contrastive_chunk", lambda *_: chunk),
        mock.patch.object(launch, "CONTRASTIVE_PANEL", panel),
    ):
        here.also = [x for x in arguments.values() if isinstance(x, Tensor)]
        loss, *grads = contrastive_loss_and_grad(**arguments, impl="triton", group="local")
    kept = [g for g, name in zip(grads, NAMES, strict=True) if name in arguments]
    of_loss = abs(loss - want).item() / (1e-6 * max(1, want.item()))
    bound = GRADIENT_BOUNDS[dtype]
    of_grads = float("inf")
    if all(torch.isfinite(g).all() for g in kept):
        low = _low_gap(arguments, want_grads)
        of_grads = gap(kept, want_grads) / (bound + 2 * low)
    worst = max(of_loss, of_grads)
    worst = float("inf") if worst != worst else worst
    return {name.strip("_").removesuffix("_kernel"): worst for name in here.launched}


def _low_gap(arguments: dict[str, Any], want: tuple[Tensor, ...]) -> float:
    return gap(differentiate(lambda **a: _reference(**a).mean(), arguments)[1], want)
