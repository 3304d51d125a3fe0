"""What models of the kernels leave open, asked of the device: contests of today's choice.

    pytest bench/questions.py --benchmark-only [-k attention_tiles]

Ours is today's choice, the peer an alternative; both results are checked before. `make gpu` runs
these, those of the gather with a process for each GPU, and `bench.report` tells what they decide:
of the kind "ways" case by case, of "tiles" the best. On a CPU, under TRITON_INTERPRET=1, the same
is asked on tiny shapes: that tries the code and answers nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from bench.bench_contrastive_loss import DIRECTIONS, DTYPE, TAU, Loss, inputs, ours, step, truth
from bench.harness import DEVICE, Call, Contest, check
from bench.peers import attention_inputs, mixes
from bench.peers import truth as attention_truth
from btok.gated_mlp import GatedMLP
from btok_kernels import launch, ranks
from btok_kernels.condensed_attention import condensed_attention
from btok_kernels.contrastive_loss import contrastive_loss_and_grad
from btok_kernels.layout import CondensedLayout

if DEVICE == "cuda":
    HEADS, KEY_HEADS, MOST_NEIGHBOURS, TOLERANCE = 12, 2, 99, 2e-2
    DIMS = [128, 64, 256]
    LAYOUTS = {mix: mixes()[mix] for mix in ("image queries", "long video", "short pairs")}
    SIZES = [1 << n for n in range(12, 19)]
    TILE_ROWS, WORKSPACE_ROWS, PANEL_ROWS = 8192, [1 << 15, 1 << 17], [1 << 13, 1 << 15]
    MLP_WIDTHS, MLP_ROWS = (1536, 8960), [512, 4096, 16384]  # of Qwen2-VL-2B
    RANK_ROWS = [512, 2048, 8192]
else:
    HEADS, KEY_HEADS, MOST_NEIGHBOURS, TOLERANCE = 2, 1, 1, 1e-4
    DIMS, LAYOUTS = [16], {"few rows": CondensedLayout.from_lengths([9, 5], [4, 0], 2)}
    SIZES = [16]
    TILE_ROWS, WORKSPACE_ROWS, PANEL_ROWS = 16, [16], [16]
    MLP_WIDTHS, MLP_ROWS = (32, 64), [8]
    RANK_ROWS = [8]
TRUTH_ROWS = 1 << 14  # up to here the loss is checked against fp32, then the two against each other
RANK_PAIRS = 15  # that all ranks agree on

# kernel -> what launches it once more with a configuration
Runs = dict[str, Callable[[Any], object]]

pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not launch.interpreted(), reason="asked of a GPU, or of the interpreter"
)


def neighbours(config: dict[str, int], fixed: tuple[str, ...] = ()) -> list[dict[str, int]]:
    """Launches that differ from one in one number: a block halved or doubled, warps, stages."""
    found = []
    for name, value in config.items():
        if name in fixed:
            continue
        if "warps" in name:
            others = [n for n in (4, 8) if n != value]
        elif "stages" in name:
            others = [n for n in (value - 1, value + 1) if n > 0]
        else:
            others = [n for n in (value // 2, 2 * value) if n >= 16 or n >= value]
        found += [config | {name: other} for other in others]
    return found[:MOST_NEIGHBOURS]


def named(config: dict[str, int]) -> str:
    short = {k.lower().removeprefix("block_").removeprefix("num_"): n for k, n in config.items()}
    return ", ".join(f"{name} {size}" for name, size in short.items())


@contextmanager
def attention_launches(configs: dict[str, launch.Config]) -> Iterator[Runs]:
    """Launch kernels with these configurations; yields what launches each of them once more."""
    runs: Runs = {}

    def attention(kernel: str, q: Tensor, run: Callable[[launch.Config], object]) -> None:
        arch = launch.architecture(q.device)
        usual = launch.attention_config(kernel, q.shape[2], q.dtype, arch)
        runs[kernel] = run
        run(configs.get(kernel, usual))

    with mock.patch.object(launch, "attention", attention):
        yield runs


@cache
def attention_case(mix: str, dim: int) -> tuple[CondensedLayout, list[Tensor], list[Tensor]]:
    layout = LAYOUTS[mix].to(DEVICE)
    tensors = attention_inputs(layout, HEADS, KEY_HEADS, dim, DTYPE)
    return layout, tensors, attention_truth(layout, *tensors)


ARCH = launch.architecture(torch.device(DEVICE))
ATTENTION_TILES = [
    pytest.param(kernel, dim, mix, other, id=f"{kernel}-D{dim}-{mix}-{named(other)}")
    for dim in DIMS
    for kernel in ("forward", "dkdv", "dq")
    for other in neighbours(launch.attention_config(kernel, dim, DTYPE, ARCH)._asdict())
    for mix in LAYOUTS
]


@pytest.mark.parametrize(("kernel", "dim", "mix", "other"), ATTENTION_TILES)
def bench_attention_tiles(
    contest: Contest, kernel: str, dim: int, mix: str, other: dict[str, int]
) -> None:
    """The tile table of the attention against its neighbours."""
    layout, (q, k, v, grad), expected = attention_case(mix, dim)
    today, choice = launch.attention_config(kernel, dim, DTYPE, ARCH), launch.Config(**other)
    for config in (today, choice):
        with attention_launches({kernel: config}) as runs:
            out = condensed_attention(q, k, v, layout, impl="triton")
            results = [out, *torch.autograd.grad(out, (q, k, v), grad)]
        check(named(config._asdict()), results, expected, TOLERANCE / 2)
    calls = [partial(runs[kernel], config) for config in (today, choice)]
    names, question = named(today._asdict()), f"tile of {kernel}, D {dim}"
    contest(question, mix, named(other), *calls, dtype=DTYPE, kind="tiles", today=names)


@contextmanager
def loss_launches(configs: dict[str, dict[str, int]]) -> Iterator[Runs]:
    """As `attention_launches`, for the kernels of the contrastive loss."""
    trials: Runs = {}
    usual = launch.contrastive

    def contrastive(
        kernel: str, query: Tensor, options: tuple[bool, ...], trial: Callable[..., object]
    ) -> dict[str, int]:
        trials[kernel] = trial
        return configs.get(kernel) or usual(kernel, query, options, trial)

    with mock.patch.object(launch, "contrastive", contrastive):
        yield trials


def some_rows(rows: int, columns: int, dtype: torch.dtype) -> int:
    """A chunk for the way by rows at any size, at least one that a matrix product is worth."""
    return min(rows, max(1024, launch.CONTRASTIVE_WORKSPACE // (columns * (4 + dtype.itemsize))))


def recompute(*_: Any) -> int:
    """In the place of `launch.contrastive_chunk`: no rows of logits."""
    return 0


LOSS_TILES = [
    pytest.param(kernel, other, id=f"{kernel}-{named(other)}")
    for kernel in ("sums", "d_logits", "d_query", "d_candidates", "rows", "columns")
    for other in neighbours(
        launch.contrastive_config(kernel, DTYPE, ARCH),
        # a table made before all of them run is for tiles of that width
        () if kernel in ("rows", "columns") else ("BLOCK_M",),
    )
]


@pytest.mark.parametrize(("kernel", "other"), LOSS_TILES)
def bench_loss_tiles(contest: Contest, kernel: str, other: dict[str, int]) -> None:
    """The launches of the loss's kernels against their neighbours, both directions."""
    today = launch.contrastive_config(kernel, DTYPE, ARCH)
    way = ours(some_rows if kernel in ("rows", "columns") else recompute, "triton")
    with loss_launches({kernel: other}) as trials:
        results = step(way, *inputs(TILE_ROWS), True)
    check(named(other), results, truth(TILE_ROWS, True), TOLERANCE)
    calls = [partial(trials[kernel], config) for config in (today, other)]
    question, case, names = f"tile of {kernel}", f"{TILE_ROWS} candidates", named(today)
    contest(question, case, named(other), *calls, dtype=DTYPE, kind="tiles", today=names)


def loss_pair(rows: int, bidirectional: bool, today: Loss, other: Loss) -> list[Call]:
    """A loss with its gradients by two ways, checked."""
    calls = [partial(step, loss, *inputs(rows), bidirectional) for loss in (today, other)]
    results = calls[0]()
    if rows <= TRUTH_ROWS:
        check("today's", results, truth(rows, bidirectional), TOLERANCE)
        results = truth(rows, bidirectional)
    check("the alternative", calls[1](), results, TOLERANCE)
    return [*calls]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("rows", SIZES)
def bench_ways(contest: Contest, rows: int, direction: str) -> None:
    """The loss by rows against the loss by recomputed tiles, time and memory by size."""
    chosen = "rows" if launch.contrastive_chunk(rows, rows, DTYPE) else "recompute"
    ways = ours(some_rows, "triton"), ours(recompute, "triton")
    calls = loss_pair(rows, direction == DIRECTIONS[1], *ways)
    question, case = "loss, by rows or recomputed", f"{rows} candidates, {direction}"
    contest(
        question, case, "recompute", *calls, dtype=DTYPE, kind="ways", today="rows", chosen=chosen
    )


WORKSPACES = [
    (name, rows, today * times // 2)
    for name, some in (
        ("CONTRASTIVE_WORKSPACE", WORKSPACE_ROWS),
        ("CONTRASTIVE_PANEL", PANEL_ROWS),
    )
    for today in [getattr(launch, name)]
    for times in (1, 4, 8)[:MOST_NEIGHBOURS]
    for rows in some
]


@pytest.mark.parametrize(("name", "rows", "size"), WORKSPACES)
def bench_workspace(contest: Contest, name: str, rows: int, size: int) -> None:
    """The sizes of what the two ways of the loss hold at once."""
    way = ours(some_rows if name == "CONTRASTIVE_WORKSPACE" else recompute, "triton")

    def sized(query: Tensor, key: Tensor, bidirectional: bool) -> Tensor:
        with mock.patch.object(launch, name, size):
            return way(query, key, bidirectional)

    calls = loss_pair(rows, True, way, sized)
    today, case = str(getattr(launch, name)), f"{rows} candidates"
    contest(name, case, str(size), *calls, dtype=DTYPE, kind="tiles", today=today)


@pytest.mark.parametrize("rows", MLP_ROWS)
def bench_gated_mlps(contest: Contest, rows: int) -> None:
    """The MLP that writes over its gate against transformers' own, without gradients."""
    width, inner = MLP_WIDTHS
    shapes = {"gate_proj": (width, inner), "up_proj": (width, inner), "down_proj": (inner, width)}
    options: dict[str, Any] = {"bias": False, "device": DEVICE, "dtype": DTYPE}
    layers = {name: nn.Linear(*shape, **options) for name, shape in shapes.items()}
    gated = GatedMLP(SimpleNamespace(**layers, act_fn=nn.SiLU(), training=False))

    def stock(x: Tensor) -> Tensor:
        return gated.down_proj(gated.act_fn(gated.gate_proj(x)) * gated.up_proj(x))

    x = torch.randn(rows, width, device=DEVICE).to(DTYPE)
    calls = [torch.no_grad()(partial(mlp, x)) for mlp in (gated, stock)]
    check("GatedMLP", [calls[0]()], [calls[1]()], 0)
    question, case = "MLPs at inference", f"{rows} rows"
    contest(question, case, "stock MLP", *calls, dtype=DTYPE, kind="ways", today="GatedMLP")


@cache
def world() -> int:
    """How many ranks there are, of torchrun."""
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        return 1
    if DEVICE == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    return dist.get_world_size()


@pytest.mark.parametrize("rows", RANK_ROWS)
def bench_gather(contest: Contest, rows: int) -> None:
    """One gather against a broadcast for each shard, and the threshold between them."""
    if world() == 1:
        pytest.skip("asked of the ranks of torchrun")
    query, key = (x.detach()[:rows] for x in inputs(max(RANK_ROWS)))

    def route(by_shard: bool) -> Any:
        with mock.patch.object(ranks, "_one_by_one", lambda *_: by_shard):
            return contrastive_loss_and_grad(query, key, temperature=TAU, impl="triton")

    calls = [partial(route, way) for way in (False, True)]
    check("by shards", calls[1]()[:3], calls[0]()[:3], TOLERANCE)
    size = rows * (query.shape[1] * DTYPE.itemsize + 4)
    chosen = "by shards" if ranks._one_by_one(world(), rows, size) else "at once"
    question, case = "gather, at once or by shards", f"{world()} ranks of {rows} rows"
    facts: dict[str, Any] = {"kind": "ways", "today": "at once", "chosen": chosen}
    contest(question, case, "by shards", *calls, dtype=DTYPE, pairs=RANK_PAIRS, **facts)
