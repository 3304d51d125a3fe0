"""What a call of condensed_attention costs the host, with a device that does nothing.

    python bench/host.py [--pairs 2000]

On a small batch the host takes longer to launch the kernels than a GPU to run them. Here they are
compiled for sm_90 and every launch goes as far as the driver's own call, which is left out: no GPU
is needed, and none is used. The peer is the same kernels launched the plain way: Triton's own
`kernel[grid](...)`, an op registered with torch's dispatcher, and its registered autograd. Both
have to start the same kernels on arguments of the same kinds before they are timed. The two take
turns; a ratio is ours over the peer's, the median over pairs.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.runtime import driver

from bench.driver import Target
from bench.harness import Call, in_turns, median_interval, settle_allocator, wall_seconds
from btok_kernels import condensed_attention as op
from btok_kernels import condensed_attention_triton as kernels
from btok_kernels import launch, start
from btok_kernels.layout import CondensedLayout

ARCH, HEADS, KEY_HEADS, DIM = 90, 12, 2, 128
SOURCE, TARGET = (50, 40, 61, 47, 55, 52, 58, 43), (9, 7, 12, 6, 8, 10, 5, 9)


class Idle(Target):
    """Starts nothing; gives `launched` what a launch would start."""

    def __init__(self) -> None:
        super().__init__(ARCH)
        self.launched: list[Any] | None = None

    @property
    def launcher_cls(self) -> Any:
        return partial(partial, self.launch)

    def launch(self, source: Any, metadata: Any, *started: Any) -> None:
        if self.launched is not None:
            x, y, z, _, _, _, _, _, _, *arguments = started
            kinds = [(a.dtype, a.stride()) if isinstance(a, Tensor) else a for a in arguments]
            self.launched.append((metadata.hash, (x, y, z), kinds))


@contextmanager
def idle() -> Iterator[Idle]:
    """Tensors on the CPU are taken for a device's, whose launches do nothing."""
    here, before = Idle(), driver._active
    driver.set_active(here)
    try:
        with ExitStack() as patches:
            for module, name, value in (
                (launch, "architecture", lambda device: ARCH),
                (op, "no_triton", lambda device, dtype: None),
            ):
                patches.enter_context(mock.patch.object(module, name, value))
            yield here
    finally:
        driver._active = before


def calls() -> dict[str, tuple[Call, Call]]:
    """Ours and the peer's, by direction, on a small packed batch."""
    layout = CondensedLayout.from_lengths(SOURCE, TARGET, 4)
    generator = torch.Generator().manual_seed(0)
    q, k, v, d_out = (
        torch.randn(layout.num_rows, heads, DIM, generator=generator).bfloat16()
        for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
    )
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]

    def forward() -> Tensor:
        return op.condensed_attention(q, k, v, layout, impl="triton")

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(), leaves, d_out)

    def plain(call: Call) -> None:
        known, eager = start.KNOWN, kernels._is_eager
        start.KNOWN, kernels._is_eager = False, lambda *tensors: False
        try:
            call()
        finally:
            start.KNOWN, kernels._is_eager = known, eager

    directions = {"forward": forward, "forward + backward": both}
    return {name: (call, partial(plain, call)) for name, call in directions.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=2000)
    pairs = parser.parse_args().pairs
    torch.set_num_threads(1)
    settle_allocator()
    print(f"{'':19} {'ours':>9} {'plain':>9}   ratio (quartiles), 95 % of the median")
    with idle() as device:
        for name, (ours, theirs) in calls().items():
            taken = []
            for call in (ours, ours, theirs):
                device.launched = []
                call()
                taken.append(device.launched)
            device.launched = None
            assert taken[1] and taken[0] == taken[1] == taken[2], f"{name}: not the same launches"
            for count in (min(pairs, 100), pairs):  # the first to warm up
                found = in_turns(ours, theirs, pairs=count, clock=wall_seconds)
            first, ratio, third = statistics.quantiles(found.ratios)
            us = "".join(f"{1e6 * statistics.median(each):7.1f} us" for each in found.times)
            sure = "{:.3f} - {:.3f}".format(*median_interval(found.ratios))
            print(f"{name:19} {us}   {ratio:.3f} ({first:.3f} - {third:.3f}), {sure}", flush=True)


if __name__ == "__main__":
    main()
