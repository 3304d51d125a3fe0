"""Two calls timed in turns, as the studies write it down."""

from __future__ import annotations

from typing import Any

from bench.harness import Call, in_turns


def duel(today: Call, other: Call, most: float = 0.5) -> dict[str, Any]:
    """Figures of two calls in turns: `ratio` is the other's time over today's.

    Args:
        today, other: what is called, their results checked before.
        most: seconds that the pairs may take, but there are seven at least, and at most 101.

    Returns:
        `ratio`, the median over pairs, its 95 % `interval`, `pairs`, and of both (today's first)
        the median `ms` and the peak `mib`.
    """
    found = in_turns(other, today, most=most)
    return {
        **{name: found[name] for name in ("ratio", "interval", "pairs")},
        "ms": [1e3 * found[whose][1] for whose in ("peer_seconds", "seconds")],
        "mib": [found[whose] / 2**20 for whose in ("peer_memory", "memory")],
    }
