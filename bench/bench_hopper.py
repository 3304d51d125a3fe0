"""The attention kernels for Hopper beside the plain ones and peers, by the length of sequences;
what this says about the default:

    pytest bench/bench_hopper.py --benchmark-only --keep RESULTS.json
    python bench/bench_hopper.py RESULTS.json hopper.json

On sm_90 with triton 3.9 alone. bf16, 12 query and 2 key heads of 128 and of 64, 16,384 packed rows,
an eighth of each sequence targets. "without turns" are the same kernels, whose consumers multiply
when they like.

hopper.json, put beside `btok_kernels/launch.py`, makes `auto` take these kernels on that device
with that triton, for half as many rows or more, from the mean length of sequences on from which
they beat the plain ones here, forward and both ways: the whole interval of their time over the
plain ones' is below 0.97.
"""

from __future__ import annotations

import argparse
import json
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from bench.bench_condensed_attention import DIRECTIONS, hold
from bench.harness import DEVICE, Contest
from bench.peers import PEERS, Attention
from bench.report import WINS
from btok_kernels import launch
from btok_kernels.layout import CondensedLayout

ROWS, BTOKS = 1 << 14, 4
LENGTHS, DIMS = (256, 512, 1024, 2048, 4096, 8192), (128, 64)
RIVALS = ("triton", "without turns", "two varlen calls", "flex", "flash-attn")


@cache
def layout_of(length: int) -> CondensedLayout:
    """The layout of sequences of one length, ROWS rows in all."""
    target, count = length // 8, ROWS // length
    return CondensedLayout.from_lengths([length - target - BTOKS] * count, [target] * count, BTOKS)


def without_turns(layout: CondensedLayout) -> Attention:
    attend = PEERS["hopper"](layout)
    free = {key: config._replace(ping_pong=False) for key, config in launch.HOPPER.items()}

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with mock.patch.dict(launch.HOPPER, free):
            return attend(q, k, v)

    return run


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dim", DIMS)
def bench_hopper(contest: Contest, dim: int, length: int, rival: str, direction: str) -> None:
    small = torch.empty(1, 1, dim, dtype=torch.bfloat16, device=DEVICE)
    if reason := launch.no_hopper(small, small, small):
        pytest.skip(reason)
    makers = {**PEERS, "without turns": without_turns}
    what = f"hopper, D {dim}, length {length}", ("hopper", rival), layout_of(length), direction
    hold(contest, *what, dim, torch.bfloat16, makers, length=length)


def decided(cases: list[dict[str, Any]]) -> dict[str, int | None]:
    """The least length by head dim from which on the kernels beat the plain ones, forward and both
    ways, or None. What was not timed, or failed, is not beaten.
    """
    won = {
        (case["dim"], case["length"], case["direction"])
        for case in cases
        if case.get("impl") == "hopper" and case["peer"] == "triton" and case["interval"][1] < WINS
    }
    found: dict[str, int | None] = {}
    for dim in DIMS:
        found[str(dim)] = None
        for length in reversed(LENGTHS):
            if not won >= {(dim, length, direction) for direction in DIRECTIONS}:
                break
            found[str(dim)] = length
    return found


def main(results: Path, out: Path) -> None:
    """Write the decision that "auto" reads, from a file of contests."""
    found = json.loads(results.read_text())
    least = decided(found["cases"])
    about = {key: found[key] for key in ("machine", "versions", "commit") if key in found}
    device, triton = found["machine"]["device"], found["versions"]["triton"]
    decision = {"device": device, "triton": triton, "from_rows": ROWS // 2, "from_length": least}
    out.write_text(json.dumps(decision | {"about": about}, indent=1) + "\n")
    for dim, length in least.items():
        default = "the plain kernels" if length is None else f"hopper from length {length} on"
        print(f"head dim {dim}: the default should be {default}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="what `auto` reads, of a file of contests")
    for name in ("results", "out"):
        parser.add_argument(name, type=Path)
    try:
        main(**vars(parser.parse_args()))
    except (OSError, ValueError, LookupError, TypeError) as error:
        parser.error(f"{type(error).__name__}: {error}")
