"""What the PTX of a kernel with warpgroups says of them: registers, and products in flight.

A group of products is what one `wgmma.commit_group` ends; `wgmma.wait_group n` leaves the n
youngest in flight.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

_LABEL = re.compile(r"^(\$L__BB\w+):")
_BRANCH = re.compile(r"\bbra(?:\.uni)?\s+(\$L__BB\w+)")
_REGISTERS = re.compile(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)")
_WAIT = re.compile(r"wgmma\.wait_group\.sync\.aligned\s+(\d+)")


class Overlap(NamedTuple):
    """Of one loop with products: how many groups each wait leaves in flight, in order, and how many
    are in flight at least over an exponential, the softmax."""

    waits: tuple[int, ...]
    softmax: int


class Warpgroups(NamedTuple):
    """Registers of a thread, of those that multiply and of those that copy; the loops' overlap."""

    consumers: tuple[int, ...]
    producers: tuple[int, ...]
    loops: tuple[Overlap, ...]


# What the kernels for Hopper are written for.
WANTED = {
    "forward": Overlap((1, 0), 1),  # the values, over the softmax of the block behind them
    "dq": Overlap((2, 1, 0), 2),  # dP and dQ; dQ over dS
    "dkdv": Overlap((1, 1, 0, 0), 1),  # dP^T; dV over dS^T
}


def _loops(lines: list[str], *holding: str) -> list[tuple[int, int]]:
    """The innermost spans from a label to a branch back to it that hold all these instructions."""
    labels = {found[1]: at for at, line in enumerate(lines) if (found := _LABEL.match(line))}
    spans = set()
    for at, line in enumerate(lines):
        begin = labels.get(found[1], at) if (found := _BRANCH.search(line)) else at
        if all(any(opcode in line for line in lines[begin:at]) for opcode in holding):
            spans.add((begin, at))
    return sorted(
        (begin, end)
        for begin, end in spans
        if not any(begin <= x and y <= end and (x, y) != (begin, end) for x, y in spans)
    )


def _overlap(lines: list[str]) -> Overlap:
    flying, waits, softmax = 0, [], []
    for turn in range(2):  # the second with what the first leaves in flight
        for line in lines:
            if "wgmma.commit_group" in line:
                flying += 1
            elif found := _WAIT.search(line):
                flying = min(flying, int(found[1]))
                waits += [int(found[1])] * turn
            elif "ex2." in line:
                softmax += [flying] * turn
    return Overlap(tuple(waits), min(softmax, default=0))


def warpgroups(ptx: str) -> Warpgroups:
    """Of code in which each warpgroup's begins with the registers that it takes or gives away."""
    lines = [line.partition("//")[0] for line in ptx.splitlines()]
    given = [(at, int(found[1])) for at, x in enumerate(lines) if (found := _REGISTERS.search(x))]

    def registers(loops: list[tuple[int, int]]) -> tuple[int, ...]:
        before = ([count for at, count in given if at < begin] for begin, _ in loops)
        return tuple(sorted({counts[-1] for counts in before if counts}))

    products = _loops(lines, "wgmma.mma_async", "ex2.")
    return Warpgroups(
        registers(products),
        registers(_loops(lines, "cp.async.bulk.tensor")),
        tuple(_overlap(lines[begin : end + 1]) for begin, end in products),
    )


def read(groups: Any) -> Warpgroups:
    """What JSON made lists of."""
    consumers, producers, loops = groups
    read = (Overlap(tuple(waits), softmax) for waits, softmax in loops)
    return Warpgroups(tuple(consumers), tuple(producers), tuple(read))


def faults(kernel: str, groups: Warpgroups) -> Iterator[str]:
    """Where products are not in flight as they should be."""
    if not groups.loops:
        yield "no loop with products and a softmax was found in the PTX"
    for number, loop in enumerate(groups.loops, 1):
        if loop != WANTED[kernel]:
            yield (
                f"loop {number} of {len(groups.loops)}: waits leave {loop.waits} products in "
                f"flight, {loop.softmax} over the softmax, not {WANTED[kernel].waits} and "
                f"{WANTED[kernel].softmax}"
            )
