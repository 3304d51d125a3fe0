"""A contest: two contestants take turns, and what their figures need is written down beside them.

The two alternate, the second first in every other pair, so that a machine that slows down slows
both: `ratio` is ours over the peer's, the median over pairs, with both quartiles, which tell how
much a pair says, and the median's 95 % `interval`, which narrows with the pairs. On a GPU a call is
timed between two events, with a cold L2 cache; on a CPU by the wall clock. `memory` is the peak of
what torch's allocator holds beyond what it held before a call, results included. (The resident set
would have in it what the C library keeps, which differs from call to call by more than some
contestants take.)
"""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from itertools import accumulate, chain, cycle, takewhile
from typing import Any, NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
Call = Callable[[], Any]
Clock = Callable[[Call], float]
Loop = Callable[[Call, Call, int], None]  # what comes before a round, a round, how many


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
    """The best that the machine does: operations, and bytes read and written, a second."""

    flops: float
    bytes: float


@cache
def roof(dtype: torch.dtype) -> Roof:
    """Measure the roof of a dtype by a square matrix product and a copy, each the best of ten."""
    n, length = (8192, 1 << 30) if DEVICE == "cuda" else (1536, 1 << 27)
    a, b = (torch.randn(n, n, dtype=dtype, device=DEVICE) for _ in range(2))
    source = torch.zeros(length, dtype=torch.int8, device=DEVICE)
    target = torch.zeros_like(source)
    product = min(seconds(lambda: a @ b) for _ in range(10))
    copy = min(seconds(lambda: target.copy_(source)) for _ in range(10))
    return Roof(2 * n**3 / product, 2 * length / copy)


def wall_seconds(call: Call) -> float:
    """The wall-clock seconds of a call that ends on the host."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def seconds(call: Call) -> float:
    """The seconds between two events around a call, the L2 cache cold; on a CPU of the wall clock.

    The host gets ahead of the device first, so that launching is timed only where it takes longer
    than what is launched.
    """
    if DEVICE != "cuda":
        return wall_seconds(call)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.empty(256 << 20, dtype=torch.int8, device=DEVICE).zero_()  # larger than any L2 cache
    torch.cuda._sleep(1_000_000)
    before.record()
    call()
    after.record()
    synchronize()
    return before.elapsed_time(after) / 1e3


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


def median_interval(sample: Sequence[float]) -> tuple[float, float]:
    """The 95 % confidence interval for the median of what a sample is drawn from.

    Two order statistics, whatever the distribution; of fewer than six values the smallest and the
    largest, which are less sure.
    """
    ordered, n = sorted(sample), len(sample)
    # as many values lie below the median as a fair coin falls on heads in n tosses
    heads = accumulate(math.comb(n, k) / 2**n for k in range(n))
    rank = max(sum(1 for _ in takewhile(lambda p: p <= 0.025, heads)) - 1, 0)
    return ordered[rank], ordered[-1 - rank]


def check(
    name: str, results: Iterable[Tensor], expected: Iterable[Tensor], tolerance: float
) -> None:
    """An AssertionError where there is no result, or one's relative error is above `tolerance`;
    what one of the two has more, gradients say, is not looked at."""
    pairs = [*zip(results, expected, strict=False)]
    assert pairs, f"no result of {name}: not timed"
    for both in pairs:
        got, want = (x.detach().float().cpu() for x in both)
        assert got.shape == want.shape, f"wrong result of {name}, {got.shape}: not timed"
        error = float((got - want).norm() / want.norm())
        assert error <= tolerance, f"wrong result of {name}, off by {error:.1e}: not timed"


def _plainly(before: Call, target: Call, rounds: int) -> None:
    for _ in range(rounds):
        before()
        target()


def in_turns(
    ours: Call,
    theirs: Call,
    *,
    most: float = 0.5,
    least: int = 7,
    limit: int = 101,
    pairs: int | None = None,
    clock: Clock = seconds,
    loop: Loop = _plainly,
) -> dict[str, Any]:
    """Time two calls, whose results have been checked.

    Args:
        most: seconds that the pairs may take, but there are `least` and at most `limit`.
        pairs: how many instead, where several processes must agree.
        clock: the seconds of a call.
        loop: calls its first argument before its second, so many times.

    Returns:
        `ratio`, ours over the peer's, the median over `pairs`, its `quartiles` and the median's
        `interval`; of ours, and with `peer_` before it of theirs, `seconds` (lower quartile,
        median, upper quartile) and the peak of `memory` in bytes.
    """
    calls = (ours, theirs)
    memory = peak(ours), peak(theirs)  # and warms up
    if pairs is None:
        both = sum(wall_seconds(partial(clock, call)) for call in calls)
        pairs = min(max(int(most / both), least), limit)
    times: tuple[list[float], list[float]] = [], []

    def turn(who: int) -> None:
        times[who].append(clock(calls[who]))

    turns = chain([1], cycle([0, 2]))  # theirs ours, ours theirs, theirs ours, ...

    def before() -> None:
        for _ in range(next(turns)):
            turn(1)

    loop(before, partial(turn, 0), pairs)
    if len(times[1]) < pairs:
        turn(1)
    ratios = [our / their for our, their in zip(*times, strict=True)]
    low, ratio, high = statistics.quantiles(ratios, n=4)
    took, they_took = (statistics.quantiles(each, n=4) for each in times)
    return {
        "pairs": pairs,
        "ratio": ratio,
        "quartiles": [low, high],
        "interval": median_interval(ratios),
        "seconds": took,
        "peer_seconds": they_took,
        "memory": memory[0],
        "peer_memory": memory[1],
    }


class Contest:
    """The `contest` fixture: one case of ours beside one peer.

    Args:
        benchmark: pytest-benchmark's fixture; it times ours.
        config: pytest's, for `--benchmark-min-rounds` and `--benchmark-max-time`.
    """

    def __init__(self, benchmark: BenchmarkFixture, config: pytest.Config) -> None:
        self.benchmark = benchmark
        settle_allocator()
        least, most = (config.getoption(f"benchmark_{name}") for name in ("min_rounds", "max_time"))
        self.bounds: dict[str, Any] = {"most": float(most), "least": int(least), "limit": 10**6}

    def __call__(
        self,
        bench: str,
        case: str,
        peer: str,
        ours: Call,
        theirs: Call,
        *,
        dtype: torch.dtype,
        flops: float | None = None,
        bytes: float | None = None,
        predicted: float | None = None,
        expected: Iterable[Tensor] | None = None,
        tolerance: float = 0.0,
        pairs: int | None = None,
        clock: Clock = seconds,
        **facts: Any,
    ) -> None:
        """Time both, once their results are right; skip a peer that cannot run.

        Args:
            flops: operations that our result needs.
            bytes: that it needs to read and write, once each.
            predicted: the ratio by arithmetic.
            expected, tolerance: of `check`; without, the results have been checked.
            pairs, clock: see `in_turns`.
            facts: what else to write down.

        Raises:
            AssertionError: a wrong result.
        """
        if expected is not None:
            expected = [*expected]
            check("ours", ours(), expected, tolerance)
            try:
                results = theirs()
            except Exception as error:
                pytest.skip(f"{peer} cannot run: {type(error).__name__}: {error}"[:200])
            check(peer, results, expected, tolerance)
            del results

        def loop(before: Call, target: Call, rounds: int) -> None:
            self.benchmark.pedantic(target, setup=before, rounds=rounds)

        found = in_turns(ours, theirs, pairs=pairs, clock=clock, loop=loop, **self.bounds)
        best, second = roof(dtype) if flops else Roof(1, 1), found["seconds"][1]
        self.benchmark.group = f"{bench}: {case}, {peer}"
        self.benchmark.extra_info |= {
            "bench": bench,
            "case": case,
            "peer": peer,
            **found,
            "predicted": predicted,
            "flops": flops,
            "bytes": bytes,
            "share_of_flops": flops and flops / second / best.flops,
            "share_of_bytes": bytes and bytes / second / best.bytes,
            "dtype": str(dtype).removeprefix("torch."),
            **facts,
        }
