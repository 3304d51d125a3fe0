"""A contest: two contestants take turns, and what their figures need is written down beside them.

Times are wall-clock seconds around a call that ends in a synchronized device. The two alternate,
the second first in every other pair, so that a machine that slows down slows both: `ratio` is ours
over the peer's, the median over pairs, with both quartiles, which tell how much a pair says, and
the median's 95 % `interval`, which narrows with the pairs. `memory` is the peak of what torch's
allocator holds beyond what it held before a call, results included. (The resident set would have in
it what the C library keeps, which differs from call to call by more than some contestants take.)
"""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import accumulate, chain, cycle, takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

if TYPE_CHECKING:  # bench/gpu.py needs neither
    import pytest
    from pytest_benchmark.fixture import BenchmarkFixture

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
Call = Callable[[], Any]


def settle_allocator() -> None:
    """Have glibc treat memory as it does after some large blocks. Which blocks it gives back, to
    get them again a page at a time, otherwise follows the sizes that it saw last: a contest of
    blocks of some MiB would be about that.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_TRIM_THRESHOLD, 64 << 20)


class Roof(NamedTuple):
    """What the machine does at best: operations, and bytes read and written, a second."""

    flops: float
    bytes: float


@cache
def roof(dtype: torch.dtype) -> Roof:
    """Of a square matrix product and of a copy, each the best of ten."""
    n, length = (8192, 1 << 30) if DEVICE == "cuda" else (1536, 1 << 27)
    a, b = (torch.randn(n, n, dtype=dtype, device=DEVICE) for _ in range(2))
    source = torch.zeros(length, dtype=torch.int8, device=DEVICE)
    target = torch.zeros_like(source)
    product = min(seconds(lambda: a @ b)[0] for _ in range(10))
    copy = min(seconds(lambda: target.copy_(source))[0] for _ in range(10))
    return Roof(2 * n**3 / product, 2 * length / copy)


def seconds(call: Call) -> tuple[float, float]:
    """Of the wall clock and of the processor, this process's threads together."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def median_interval(sample: Sequence[float]) -> tuple[float, float]:
    """Where the median of what a sample is drawn from lies, with 95 % confidence.

    Two order statistics, whatever the distribution; of fewer than six values the smallest and the
    largest, which are less sure.
    """
    ordered, n = sorted(sample), len(sample)
    # as many values lie below the median as a fair coin falls on heads in n tosses
    heads = accumulate(math.comb(n, k) / 2**n for k in range(n))
    rank = max(sum(1 for _ in takewhile(lambda p: p <= 0.025, heads)) - 1, 0)
    return ordered[rank], ordered[-1 - rank]


def device_seconds(call: Call) -> float:
    """Between two events around a call, the L2 cache cold; on a CPU of the wall clock.

    The host gets ahead of the device first, so that launching is timed only where it takes longer
    than what is launched.
    """
    if DEVICE != "cuda":
        return seconds(call)[0]
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _flushed().zero_()
    torch.cuda._sleep(1_000_000)
    before.record()
    call()
    after.record()
    synchronize()
    return before.elapsed_time(after) / 1e3


@cache
def _flushed() -> torch.Tensor:
    """Larger than any L2 cache."""
    return torch.empty(256 << 20, dtype=torch.int8, device=DEVICE)


def duel(today: Call, other: Call, most: float = 0.5, pairs: int | None = None) -> dict[str, Any]:
    """Two calls in turns on the device's clock: `ratio` is the other's time over today's.

    Args:
        today, other: what is called, their results checked before.
        most: seconds that the pairs may take, but there are seven at least, and at most 101.
        pairs: how many instead, where several processes must agree.

    Returns:
        `ratio`, the median over pairs, its 95 % `interval`, `pairs`, and of both (today's first)
        the median `ms` and the peak `mib`.
    """
    calls = (today, other)
    memory = [peak(call) / 2**20 for call in calls]  # and warms up
    if pairs is None:
        both = sum(seconds(partial(device_seconds, call))[0] for call in calls)
        pairs = min(max(int(most / both), 7), 101)
    times: list[tuple[float, float]] = []
    for i in range(pairs):
        order = (0, 1) if i % 2 else (1, 0)
        took = {who: device_seconds(calls[who]) for who in order}
        times.append((took[0], took[1]))
    ratios = [b / a for a, b in times]
    return {
        "ratio": statistics.median(ratios),
        "interval": median_interval(ratios),
        "pairs": pairs,
        "ms": [1e3 * statistics.median(each) for each in zip(*times, strict=True)],
        "mib": memory,
    }


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def peak(call: Call) -> int:
    """Bytes that torch's allocator held at the most, beyond those before the call."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return max(accumulate((change for _, change in sorted(changes)), initial=0))


class Contest:
    """The `contest` fixture: one case of ours beside one peer.

    Args:
        benchmark: pytest-benchmark's fixture; it times ours.
        config: pytest's, for `--benchmark-min-rounds` and `--benchmark-max-time`.
        lines: the table, a line per contest.
    """

    def __init__(
        self, benchmark: BenchmarkFixture, config: pytest.Config, lines: list[str]
    ) -> None:
        self.benchmark, self.lines = benchmark, lines
        settle_allocator()
        names = ("min_rounds", "max_time")
        self.least, self.most = (float(config.getoption(f"benchmark_{n}")) for n in names)

    def __call__(
        self,
        bench: str,
        case: str,
        peer: str,
        ours: Call,
        theirs: Call,
        *,
        dtype: torch.dtype,
        flops: float,
        bytes: float,
        predicted: float | None = None,
        **facts: Any,
    ) -> None:
        """Time both, whose results have been checked.

        Args:
            flops: operations that our result needs.
            bytes: that it needs to read and write, once each.
            predicted: the ratio by arithmetic.
            facts: what else to write down.
        """
        times: list[list[tuple[float, float]]] = [[], []]
        calls = (theirs, ours)

        def turn(who: int) -> None:
            times[who].append(seconds(calls[who]))

        memory = [peak(call) for call in calls]  # and warms up
        turn(0)
        turn(1)
        pairs = max(int(self.least), int(self.most / sum(wall for ((wall, _),) in times)))
        for each in times:
            each.clear()
        turns = chain([1], cycle([0, 2]))  # peer ours, ours peer, peer ours, ...

        def before() -> None:
            for _ in range(next(turns)):
                turn(0)

        self.benchmark.pedantic(turn, (1,), setup=before, rounds=pairs)
        if len(times[0]) < pairs:
            turn(0)
        walls = [[wall for wall, _ in each] for each in times]
        ratios = [[o[i] / t[i] for t, o in zip(*times, strict=True)] for i in range(2)]
        low, ratio, high = statistics.quantiles(ratios[0], n=4)
        interval = median_interval(ratios[0])
        cpu_ratio = statistics.median(ratios[1])
        best = roof(dtype)
        second = statistics.median(walls[1])
        self.benchmark.group = f"{bench}: {case}, {peer}"
        self.benchmark.extra_info |= {
            "bench": bench,
            "case": case,
            "peer": peer,
            "pairs": pairs,
            "ratio": ratio,
            "quartiles": [low, high],
            "interval": interval,
            "cpu_ratio": cpu_ratio,
            "predicted": predicted,
            "seconds": statistics.quantiles(walls[1], n=4),
            "peer_seconds": statistics.quantiles(walls[0], n=4),
            "memory": memory[1],
            "peer_memory": memory[0],
            "flops": flops,
            "bytes": bytes,
            "share_of_flops": flops / second / best.flops,
            "share_of_bytes": bytes / second / best.bytes,
            "dtype": str(dtype).removeprefix("torch."),
            **facts,
        }
        spread = f"{ratio:.3f} ({low:.3f} - {high:.3f})"
        sure = "{:.3f} - {:.3f}".format(*interval)
        expected = "" if predicted is None else f"{predicted:.3f}"
        mega = "  ".join(f"{m / 2**20:8.1f}" for m in memory[::-1])
        self.lines.append(
            f"{bench:19.19}  {case:33.33}  {peer:22.22}{pairs:6}  {spread:22}  {sure:13}"
            f"  {expected:9}  {1e3 * second:10.2f}  {mega}"
        )
