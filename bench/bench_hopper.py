"""The attention kernels for Hopper beside the plain ones and peers, by the length of sequences;
what this says about the default:

    pytest bench/bench_hopper.py --benchmark-only --keep RESULTS.json
    python bench/bench_hopper.py RESULTS.json hopper.json

On sm_90 with triton 3.9 alone. bf16, 12 query and 2 key heads of 128 and of 64, 16,384 packed rows,
an eighth of each sequence targets. "without turns" are the same kernels, whose consumers multiply
when they like.

hopper.json, put beside `btok_kernels/launch.py`, makes `auto` take these kernels on that device
with that triton, from the mean length of sequences on from which they beat the plain ones here,
forward and both ways: the whole interval of their time over the plain ones' is below 0.97.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from bench.harness import DEVICE, Contest, check
from bench.peers import PEERS, Attention, attention_inputs, kept_pairs, truth
from btok_kernels import launch
from btok_kernels.condensed_attention import _two_calls
from btok_kernels.layout import CondensedLayout, Half

HEADS, KEY_HEADS, ROWS, BTOKS = 12, 2, 1 << 14, 4
LENGTHS, DIMS = (256, 512, 1024, 2048, 4096, 8192), (128, 64)
DIRECTIONS = ("forward", "forward + backward")
RIVALS = ("triton", "without turns", "two varlen calls", "flex", "flash-attn")
WINS = 0.97  # of the plain kernels' time


def layout_of(length: int) -> CondensedLayout:
    """Sequences of one length, ROWS rows in all."""
    target, count = length // 8, ROWS // length
    return CondensedLayout.from_lengths([length - target - BTOKS] * count, [target] * count, BTOKS)


@cache
def prepared(length: int, dim: int) -> tuple[CondensedLayout, list[Tensor], list[Tensor]]:
    """The layout; q, k, v and the gradient of the output; what they should give."""
    layout = layout_of(length).to(DEVICE)
    inputs = attention_inputs(layout, HEADS, KEY_HEADS, dim, torch.bfloat16)
    return layout, inputs, truth(layout, *inputs)


def flash(layout: CondensedLayout) -> Attention:
    """FlashAttention on [x ; B] rows, then on target rows with [B ; T] keys."""
    from flash_attn import flash_attn_varlen_func

    def attend(q: Tensor, k: Tensor, v: Tensor, half: Half) -> Tensor:
        longest = max(half.row_lens), max(half.key_lens)
        ends = half.row_ends, half.key_ends
        return flash_attn_varlen_func(q, k, v, *ends, *longest, causal=True)  # from the right

    return lambda q, k, v: _two_calls(q, k, v, layout, attend)


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
    if rival == "flash-attn" and importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash_attn is not installed")
    layout, (q, k, v, grad), expected = prepared(length, dim)
    backward = direction == "forward + backward"

    def step(attend: Attention) -> list[Tensor]:
        with torch.set_grad_enabled(backward):
            out = attend(q, k, v)
        return [out, *torch.autograd.grad(out, (q, k, v), grad)] if backward else [out]

    makers = {**PEERS, "without turns": without_turns, "flash-attn": flash}
    ours, theirs = PEERS["hopper"](layout), makers[rival](layout)
    check("hopper", step(ours), expected, 1e-2)
    check(rival, step(theirs), expected, 1e-2)
    moved = [q, k, v, q] + ([q, q, k, v] if backward else [])
    contest(
        "condensed attention",
        f"hopper, D {dim}, length {length}, {direction}",
        rival,
        lambda: step(ours),
        lambda: step(theirs),
        dtype=torch.bfloat16,
        flops=(14 if backward else 4) * dim * HEADS * kept_pairs(layout),
        bytes=sum(tensor.nbytes for tensor in moved),
        rows=layout.num_rows,
        sequences=len(layout),
        direction=direction,
        impl="hopper",
        dim=dim,
        length=length,
    )


def decided(cases: list[dict[str, Any]]) -> dict[str, int | None]:
    """By head dim the least length from which on the kernels beat the plain ones, forward and both
    ways, or None. What was not timed, or failed, is not beaten."""
    won = {
        (case["dim"], case["length"], case["direction"]): case["interval"][1] < WINS
        for case in cases
        if case.get("impl") == "hopper" and case["peer"] == "triton"
    }
    found: dict[str, int | None] = {}
    for dim in DIMS:
        least = None
        for length in reversed(LENGTHS):
            if not all(won.get((dim, length, direction)) for direction in DIRECTIONS):
                break
            least = length
        found[str(dim)] = least
    return found


def main(results: Path, out: Path) -> None:
    """Write what `auto` reads, of a file of contests."""
    found = json.loads(results.read_text())
    least = decided(found["cases"])
    about = {key: found[key] for key in ("machine", "versions", "commit") if key in found}
    device, triton = found["machine"]["device"], found["versions"]["triton"]
    decision = {"device": device, "triton": triton, "from_length": least, "about": about}
    out.write_text(json.dumps(decision, indent=1) + "\n")
    for dim, length in least.items():
        default = "the plain kernels" if length is None else f"hopper from length {length} on"
        print(f"head dim {dim}: the default should be {default}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
