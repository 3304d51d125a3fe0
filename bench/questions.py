"""What models of the kernels leave open, asked of the device: contests of today's choice.

    pytest bench/questions.py --benchmark-only [-k ways]

Ours is today's choice, the peer an alternative; both results are checked before. `make gpu` runs
these, those of the gather with a process for each GPU, and `bench.report` tells what they decide.
(Whether other tiles are faster is asked by the peer "searched" of the kernels' own benchmarks.) On
a CPU, under TRITON_INTERPRET=1, the same is asked on tiny shapes: that tries the code and answers
nothing.
"""

from __future__ import annotations

import os
from functools import cache, partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

from bench.bench_contrastive_loss import DIM, DIRECTIONS, DTYPE, TAU, inputs, ours, step, truth
from bench.harness import DEVICE, Call, Contest
from btok.gated_mlp import GatedMLP
from btok_kernels import launch, ranks
from btok_kernels.contrastive_loss import contrastive_loss_and_grad

if DEVICE == "cuda":
    SIZES, TOLERANCE = [1 << n for n in range(12, 19)], 2e-2
    HELD = {"CONTRASTIVE_WORKSPACE": [1 << 15, 1 << 17], "CONTRASTIVE_PANEL": [1 << 13, 1 << 15]}
    MLP: dict[str, Any] = {"hidden_size": 1536, "intermediate_size": 8960}  # of Qwen2-VL-2B
    MLP_ROWS = [512, 4096, 16384]
    RANK_ROWS = [512, 2048, 8192]
else:
    SIZES, TOLERANCE = [16], 1e-4
    HELD = {"CONTRASTIVE_WORKSPACE": [16], "CONTRASTIVE_PANEL": [16]}
    MLP, MLP_ROWS = {"hidden_size": 32, "intermediate_size": 64}, [8]
    RANK_ROWS = [8]
TRUTH_ROWS = 1 << 14  # up to here the loss is checked against fp32, then the two against each other
RANK_PAIRS = 15  # that all ranks agree on
BOTH = DIRECTIONS[1]

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not launch.interpreted(), reason="asked of a GPU, or of the interpreter"
)


def ask(
    contest: Contest,
    question: str,
    case: str,
    today: tuple[str, Call],
    other: tuple[str, Call],
    expected: list[Tensor],
    **facts: Any,
) -> None:
    """A contest of today's choice and an alternative, each with its name."""
    (name, ours), (peer, theirs) = today, other
    facts |= {"today": name, "dtype": DTYPE, "expected": expected, "tolerance": TOLERANCE}
    contest(question, case, peer, ours, theirs, **facts)


def some_rows(rows: int, columns: int, dtype: torch.dtype) -> int:
    """A chunk for the way by rows at any size, at least one that a matrix product is worth."""
    return min(rows, max(1024, launch.CONTRASTIVE_WORKSPACE // (columns * (4 + dtype.itemsize))))


def recompute(*_: Any) -> int:
    """Zero rows of logits at once: a stand-in for `launch.contrastive_chunk`."""
    return 0


def loss_step(rows: int, direction: str, chunk: Any) -> Call:
    return partial(step, ours(chunk, "triton"), *inputs(rows, DIM), direction == BOTH)


def loss_truth(rows: int, direction: str, today: Call) -> list[Tensor]:
    return truth((rows, DIM), direction == BOTH) if rows <= TRUTH_ROWS else today()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("rows", SIZES)
def bench_ways(contest: Contest, rows: int, direction: str) -> None:
    """The loss by rows against the loss by recomputed tiles, time and memory by size."""
    chosen = "rows" if launch.contrastive_chunk(rows, rows, DTYPE) else "recompute"
    today, other = (loss_step(rows, direction, way) for way in (some_rows, recompute))
    expected, case = loss_truth(rows, direction, today), f"{rows} candidates, {direction}"
    ways = ("rows", today), ("recompute", other)
    ask(contest, "loss, by rows or recomputed", case, *ways, expected, chosen=chosen)


@pytest.mark.parametrize("times", [0.5, 2, 4])
@pytest.mark.parametrize(("name", "rows"), [(name, n) for name, some in HELD.items() for n in some])
def bench_workspace(contest: Contest, name: str, rows: int, times: float) -> None:
    """The sizes of what the two ways of the loss hold at once."""
    today = loss_step(rows, BOTH, some_rows if name == "CONTRASTIVE_WORKSPACE" else recompute)
    size, other = getattr(launch, name), int(getattr(launch, name) * times)
    sized = mock.patch.object(launch, name, other)(today)
    choices = (str(size), today), (str(other), sized)
    expected = loss_truth(rows, BOTH, today)
    ask(contest, f"{name}, or {times:g} of it", f"{rows} candidates", *choices, expected)


@pytest.mark.parametrize("rows", MLP_ROWS)
def bench_gated_mlps(contest: Contest, rows: int) -> None:
    """The MLP that writes over its gate against transformers' own, without gradients."""
    config = Qwen2Config(**MLP)
    stock = Qwen2MLP(config).to(DEVICE, DTYPE).eval()
    x = torch.randn(rows, config.hidden_size, device=DEVICE).to(DTYPE)
    today, other = (torch.no_grad()(lambda mlp=mlp: [mlp(x)]) for mlp in (GatedMLP(stock), stock))
    choices = ("GatedMLP", today), ("stock MLP", other)
    ask(contest, "MLPs at inference", f"{rows} rows", *choices, other())


@cache
def world() -> int:
    """Start the process group of torchrun, and return its number of ranks."""
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    return dist.get_world_size()


# by a mark: what skips itself once it has begun is kept as not timed, and is not held again
@pytest.mark.skipif(
    int(os.environ.get("WORLD_SIZE", 1)) < 2, reason="asked of the ranks of torchrun"
)
@pytest.mark.parametrize("rows", RANK_ROWS)
def bench_gather(contest: Contest, rows: int) -> None:
    """One gather against a broadcast for each shard, and the threshold between them."""
    query, key = (x.detach()[:rows] for x in inputs(max(RANK_ROWS), DIM))

    def route(by_shard: bool) -> Any:
        with mock.patch.object(ranks, "_one_by_one", lambda *_: by_shard):
            return contrastive_loss_and_grad(query, key, temperature=TAU, impl="triton")

    today, other = partial(route, False), partial(route, True)
    size = rows * (query.shape[1] * DTYPE.itemsize + 4)
    chosen = "by shards" if ranks._one_by_one(world(), rows, size) else "at once"
    question, case = "gather, at once or by shards", f"{world()} ranks of {rows} rows"
    routes = ("at once", today), ("by shards", other)
    ask(contest, question, case, *routes, today()[:3], chosen=chosen, pairs=RANK_PAIRS)
