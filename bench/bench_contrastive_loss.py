"""contrastive_loss, forward and backward, beside other ways to the same loss.

On a CPU N = M = 8,192 rows of 256; on a GPU 4k to 128k rows of 1,536 in bfloat16, and 256k of our
own, both of whose ways are timed beside the one that is chosen. Every case first checks its result.
`beyond` is the peak memory in bytes beyond inputs and gradients, in a process of its own: what the
allocator counts on a GPU, the resident set on a CPU. So is the first run of a third party's kernel,
which may hang.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from btok.kernels import contrastive_loss, contrastive_loss_and_grad
from btok_kernels import launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [8192] if DEVICE == "cpu" else [1 << n for n in range(12, 18)]
DIM = 256 if DEVICE == "cpu" else 1536
ROUNDS = 2 if DEVICE == "cpu" else 10
TAU = 0.02
PATIENCE = 120  # seconds for a first run


def both(loss_of: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """The loss of a direction, or half the sum of that and of the other direction's."""

    def loss(query: Tensor, key: Tensor, bidirectional: bool) -> Tensor:
        forth = loss_of(query, key)
        return (forth + loss_of(key, query)) / 2 if bidirectional else forth

    return loss


def labels(query: Tensor) -> Tensor:
    return torch.arange(len(query), device=query.device)


def eager(query: Tensor, key: Tensor, bidirectional: bool) -> Tensor:
    logits = (query @ key.T).float() / TAU
    loss = F.cross_entropy(logits, labels(query))
    return (loss + F.cross_entropy(logits.T, labels(query))) / 2 if bidirectional else loss


@both
def chunked_torch(query: Tensor, key: Tensor) -> Tensor:
    """Cross-entropy of 1,024 rows at a time, their logits made again in the backward."""

    def part(rows: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy((rows @ key.T).float() / TAU, targets, reduction="sum")

    pairs = zip(query.split(1024), labels(query).split(1024), strict=True)
    sums = [checkpoint(part, *pair, use_reentrant=False) for pair in pairs]
    return torch.stack(sums).sum() / len(query)


@both
def linear_cross_entropy(query: Tensor, key: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()  # without any, all logits are held
    return F.linear_cross_entropy(query / TAU, key, labels(query), options=options)


@both
def liger(query: Tensor, key: Tensor) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(key, query / TAU, labels(query))


@both
def cut_cross_entropy(query: Tensor, key: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy as cut

    return cut(query / TAU, key, labels(query))


@both
def inf_cl(query: Tensor, key: Tensor) -> Tensor:
    from inf_cl import cal_inf_loss

    return cal_inf_loss(query, key, scale=torch.tensor(1 / TAU, device=query.device))


FOREIGN = {"liger_kernel": liger, "cut_cross_entropy": cut_cross_entropy, "inf_cl": inf_cl}


def ours(impl: str, chunk: Callable[..., int] = launch.contrastive_chunk) -> Callable[..., Tensor]:
    def loss(query: Tensor, key: Tensor, bidirectional: bool) -> Tensor:
        options: dict[str, Any] = {"temperature": TAU, "bidirectional": bidirectional}
        with mock.patch.object(launch, "contrastive_chunk", chunk):
            return contrastive_loss(query, key, **options, impl=impl)

    return loss


def some_rows(rows: int, columns: int, dtype: torch.dtype) -> int:
    """A chunk for the way by rows at any size, at least one that a matrix product is worth."""
    return min(rows, max(1024, launch.CONTRASTIVE_WORKSPACE // (columns * (4 + dtype.itemsize))))


OURS = {"chunked": ours("chunked")}
if DEVICE == "cuda":
    OURS |= {"triton": ours("triton"), "triton, rows": ours("triton", some_rows)}
    OURS |= {"triton, recompute": ours("triton", lambda *_: 0)}


def peers() -> dict[str, Callable[..., Tensor]]:
    some = {"eager": eager, "chunked torch": chunked_torch, **OURS}
    if shutil.which("c++"):
        some["compile"] = torch.compile(eager, dynamic=False)
    if hasattr(F, "linear_cross_entropy"):
        some["linear_cross_entropy"] = linear_cross_entropy
    if DEVICE == "cuda":
        some |= {name: peer for name, peer in FOREIGN.items() if importlib.util.find_spec(name)}
    return some


# those that have hung come last
CASES = [(name, rows) for name in peers() for rows in SIZES]
if DEVICE == "cuda":
    CASES += [(name, 1 << 18) for name in ("triton", "triton, recompute")]


def inputs(rows: int) -> list[Tensor]:
    """Unit rows with a loss of 1 to 8."""
    g = torch.Generator().manual_seed(0)
    key = F.normalize(torch.randn(rows, DIM, generator=g), dim=-1)
    query = F.normalize(key + 4 * F.normalize(torch.randn(rows, DIM, generator=g), dim=-1), dim=-1)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    return [x.to(DEVICE, dtype).requires_grad_() for x in (query, key)]


def step(name: str, query: Tensor, key: Tensor, bidirectional: bool) -> list[Tensor]:
    loss = peers()[name](query, key, bidirectional)
    gradients = torch.autograd.grad(loss, (query, key))
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return [loss.detach(), *gradients]


def peak(name: str, rows: int, bidirectional: bool, queue: Any) -> None:
    """Bytes beyond inputs and gradients, into the queue."""
    step(name, *inputs(rows if name == "compile" else 64), bidirectional)
    query, key = inputs(rows)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the largest so far becomes that of now
        before = resident()
    results = step(name, query, key, bidirectional)
    after = torch.cuda.max_memory_allocated() if DEVICE == "cuda" else resident()
    queue.put(after - before - sum(x.nbytes for x in results))


def resident() -> int:
    """The largest resident set, in bytes; getrusage would count the parent's, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def beyond(name: str, rows: int, bidirectional: bool) -> int:
    spawn = multiprocessing.get_context("spawn")
    queue = spawn.Queue()
    child = spawn.Process(target=peak, args=(name, rows, bidirectional, queue))
    child.start()
    child.join(PATIENCE)
    refuse = pytest.fail if name in OURS else pytest.skip
    if child.is_alive():
        child.kill()
        refuse(f"{name} did not finish in {PATIENCE} s")
    if child.exitcode != 0:
        refuse(f"{name} failed at {rows} rows: exit code {child.exitcode}")
    return queue.get(timeout=10)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one direction", "both"])
@pytest.mark.parametrize(("name", "rows"), CASES)
def bench_contrastive_loss(benchmark, name, rows, bidirectional):
    memory = beyond(name, rows, bidirectional)
    query, key = inputs(rows)
    if name == "chunked":
        want = step("chunked torch", query, key, bidirectional)
    else:
        options: dict[str, Any] = {"temperature": TAU, "bidirectional": bidirectional}
        pair = [x.detach().float() for x in (query, key)]
        want = list(contrastive_loss_and_grad(*pair, **options, impl="chunked"))[:3]
    got = step(name, query, key, bidirectional)
    bound = 2e-2 if DEVICE == "cuda" else 1e-4
    for x, y in zip(got, want, strict=True):
        assert (x.float() - y.float()).norm() <= bound * y.float().norm(), "wrong result: not timed"
    del got, want
    benchmark.group = f"{rows} rows, {'both directions' if bidirectional else 'one direction'}"
    flops = 3 * 2 * rows * rows * DIM  # of the three products that one direction needs
    benchmark.extra_info |= {"impl": name, "rows": rows, "dim": DIM, "flops": flops}
    benchmark.extra_info["beyond"] = memory
    benchmark.pedantic(step, (name, query, key, bidirectional), rounds=ROUNDS)
