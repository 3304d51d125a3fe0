"""Starts of Triton kernels that cost the host little.

At every launch `kernel[grid](...)` spells out, as text, what it would compile for, before it finds
what it compiled for the same at an earlier one. `start` leaves the first launch of a kind to it and
finds what that compiled by a key of its own:

    a tensor     its dtype, and whether its address divides by 16
    an integer   whether it is 1, whether it divides by 16; itself beyond 32 bits
    a float      nothing
    a tensor map what Triton compiles of it, which it has as `compiled_for`
    constants    themselves

A key may be finer than Triton's, never coarser: code that was compiled for other arguments reads
wrong addresses in silence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

# How a compiled kernel is started is Triton's own affair; these do it alike.
KNOWN = (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 9)
_RUN = JITFunction.run
_STARTED = "started by btok_kernels"  # no key of Triton's own
Started = dict[tuple[Any, ...], tuple[CompiledKernel, list[Any]]]  # and its constants, by key


class Constants:
    """The arguments of a kernel that are compiled in, and options such as num_warps, by name.

    Make one for many launches, as it equals itself alone.
    """

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments


def start(kernel: Any, grid: tuple[int, ...], constants: Constants, *arguments: Any) -> None:
    """`kernel[grid](*arguments, **constants)` on the current device and stream.

    Launches that something looks into (the interpreter, a profiler's hook, a debugging mode) are
    made so, as are those with an argument of another kind than these.

    Args:
        kernel: a `triton.jit` or `gluon.jit` function whose constants come last.
        grid: programs in one to three dimensions.
        constants: a value of every parameter behind the arguments; options.
        arguments: of the other parameters, in their order.
    """
    started = key = None
    if _unobserved(kernel):
        device = driver.active.get_current_device()
        started, key = _started(kernel, device), _key(constants, arguments)
    if started is None or key is None:
        kernel[grid](*arguments, **constants.arguments)
    elif found := started.get(key):
        compiled, compiled_in = found
        x, y, z = (*grid, 1, 1)[:3]
        run = compiled.run  # before its function, as this loads it
        run(
            x, y, z, driver.active.get_current_stream(device),
            compiled.function, compiled.packed_metadata, None, None, None,
            *arguments, *compiled_in,
        )  # fmt: skip
    else:
        compiled = kernel[grid](*arguments, **constants.arguments)
        if isinstance(compiled, CompiledKernel) and len(arguments) <= min(kernel.constexprs):
            names = kernel.arg_names[len(arguments) :]
            started[key] = compiled, [constants.arguments[name] for name in names]


def _unobserved(kernel: Any) -> bool:
    """Whether Triton would do no more at a launch than to start what it compiled."""
    runtime = knobs.runtime
    return (
        KNOWN
        and isinstance(kernel, JITFunction)  # not the interpreter's
        and type(kernel).run is _RUN
        and not kernel.pre_run_hooks
        and not getattr(runtime.launch_enter_hook, "calls", runtime.launch_enter_hook)
        and not getattr(runtime.launch_exit_hook, "calls", runtime.launch_exit_hook)
        and runtime.add_stages_inspection_hook is None
        and not runtime.debug
        and not knobs.compilation.instrumentation_mode
    )


def _started(kernel: JITFunction, device: int) -> Started | None:
    """The starts known of a kernel, kept among Triton's own keys, so that who clears the kernel's
    caches clears them too.

    None where Triton compiles for more than a key says, as for the sizes of tensors on ROCm.
    """
    _, cache, target, *_ = kernel.device_caches[device]
    if _STARTED not in cache and target.backend == "cuda":
        cache[_STARTED] = {}
    return cache.get(_STARTED)


def _key(constants: Constants, arguments: Sequence[Any]) -> tuple[Any, ...] | None:
    """The key of what a launch is compiled for; None where that is not known here."""
    key: list[Any] = [constants]
    add = key.append
    for x in arguments:
        kind = type(x)
        if kind is int:  # "1", as True equals 1
            add("1" if x == 1 else not x & 15 if -1 << 31 <= x < 1 << 31 else x)
        elif isinstance(x, Tensor):
            add(x.dtype)
            add(not x.data_ptr() & 15)
        elif kind is float:
            add(kind)
        elif (compiled_for := getattr(x, "compiled_for", None)) is not None:
            add(compiled_for)
        else:
            return None
    return tuple(key)
