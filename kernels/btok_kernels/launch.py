"""Which implementation of an op runs.

"auto" says once what it took; an explicit implementation that cannot run raises.
"""

from __future__ import annotations

import logging

logger = logging.getLogger("btok_kernels")
_announced: set[tuple[str, str]] = set()


def choose(op: str, impl: str, available: tuple[str, ...], default: str) -> str:
    """Resolve `impl` for the op named `op`.

    Args:
        op: the public function's name, for messages.
        impl: what the caller asked for, "auto" included.
        available: the implementations there are.
        default: what "auto" takes.

    Raises:
        RuntimeError: "triton" where this version has no Triton kernel for the op.
        ValueError: an unknown implementation.
    """
    choices = ("auto", *available)
    if impl == "triton" and impl not in available:
        raise RuntimeError(f"{op}: impl='triton' is not in this version; use one of {choices}")
    if impl not in choices:
        raise ValueError(f"{op}: impl is {impl!r}, expected one of {choices}")
    if impl != "auto":
        return impl
    if (op, default) not in _announced:
        _announced.add((op, default))
        logger.info("%s: impl 'auto' takes '%s'", op, default)
    return default
