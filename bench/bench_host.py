"""What a call of condensed_attention costs the host, with a device that does nothing.

On a small batch the host takes longer to launch the kernels than a GPU to run them. Here they are
compiled for sm_90 and every launch goes as far as the driver's own call, which is left out: no GPU
is needed, and none is used. The peer is the same kernels launched the plain way: Triton's own
`kernel[grid](...)`, an op registered with torch's dispatcher, and its registered autograd. Both
have to start the same kernels on arguments of the same kinds before they are timed.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from bench.harness import Call, Contest, wall_seconds
from bench.peers import attention_inputs
from btok_kernels import condensed_attention as op
from btok_kernels import condensed_attention_triton as kernels
from btok_kernels import launch, start
from btok_kernels.layout import CondensedLayout
from tests.compiled.driver import Idle, standing_in

ARCH, HEADS, KEY_HEADS, DIM = 90, 12, 2, 128
SOURCE, TARGET = (50, 40, 61, 47, 55, 52, 58, 43), (9, 7, 12, 6, 8, 10, 5, 9)


idle = cache(Idle)  # one: what is compiled keeps its launcher


def attention(direction: str) -> Call:
    """A call of the condensed attention on a small packed batch, in one direction."""
    layout = CondensedLayout.from_lengths(SOURCE, TARGET, 4)
    q, k, v, d_out = attention_inputs(layout, HEADS, KEY_HEADS, DIM, torch.bfloat16)

    def call() -> Any:
        out = op.condensed_attention(q, k, v, layout, impl="triton")
        return out if direction == "forward" else torch.autograd.grad(out, (q, k, v), d_out)

    return call


def kinds_of(launches: Iterable[tuple[Any, ...]]) -> list[Any]:
    """The kernels that were launched, on which grids, and the kinds of their arguments."""
    return [
        (name, grid, [(a.dtype, a.stride()) if isinstance(a, Tensor) else a for a in arguments])
        for name, grid, _, arguments in launches
    ]


def plain(call: Call) -> None:
    known, eager = start.KNOWN, kernels._is_eager
    start.KNOWN, kernels._is_eager = False, lambda *tensors: False
    try:
        call()
    finally:
        start.KNOWN, kernels._is_eager = known, eager


@pytest.mark.skipif(launch.interpreted(), reason="the interpreter launches nothing")
@pytest.mark.parametrize("direction", ["forward", "forward + backward"])
def bench_host(contest: Contest, direction: str) -> None:
    ours = attention(direction)
    no_reason = mock.patch.object(op, "no_triton", lambda device, dtype: None)
    with standing_in(ARCH, idle) as device, no_reason:
        taken = []
        for call in (ours, ours, partial(plain, ours)):
            device.launched = []
            call()
            taken.append(kinds_of(device.launched))
        device.launched = None
        assert taken[1] and taken[0] == taken[1] == taken[2], f"{direction}: not the same launches"
        names = "launching", f"condensed attention, {direction}", "plain launches"
        both = ours, partial(plain, ours)
        contest(*names, *both, dtype=torch.bfloat16, clock=wall_seconds)
