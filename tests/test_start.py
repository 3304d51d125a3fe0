"""`start` runs the kernel that Triton would, whatever was launched before; needs no GPU.

Kernels are compiled for a driver that takes down what it is given and starts nothing.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from btok_kernels import launch

triton = pytest.importorskip("triton")
if launch.interpreted():
    pytest.skip("nothing is compiled under TRITON_INTERPRET=1", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton import knobs  # noqa: E402
from triton.runtime import driver  # noqa: E402

from bench import bench_host as host  # noqa: E402
from btok_kernels import start as module  # noqa: E402
from btok_kernels.start import Constants, start  # noqa: E402
from tests.compiled.driver import Idle  # noqa: E402


@triton.jit
def _scale_kernel(X, Y, stride_x, N, factor, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(X + offs * stride_x, mask=offs < N)
    tl.store(Y + offs, x * factor, mask=offs < N)


class Device(Idle):
    """As many devices and streams as a test says, the launches on them in `seen`."""

    def __init__(self) -> None:
        super().__init__(90)
        self.number, self.stream = 0, 7
        self.seen = self.launched = []

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        assert device == self.number
        return self.stream


@pytest.fixture
def device(monkeypatch):
    """The current device; `_scale_kernel` is compiled anew for it, and its plain runs counted."""
    here = Device()
    here.plain = 0
    _scale_kernel.device_caches.clear()

    def run(*arguments, **options):
        here.plain += 1
        return type(_scale_kernel).run(_scale_kernel, *arguments, **options)

    monkeypatch.setattr(_scale_kernel, "run", run)
    before = driver._active
    driver.set_active(here)
    yield here
    driver._active = before
    _scale_kernel.device_caches.clear()


FLAT = torch.zeros(64)
HALF = torch.zeros(64, dtype=torch.float16)
SMALL, LARGE = Constants(BLOCK=16, num_warps=1), Constants(BLOCK=32, num_warps=1)
OTHER = Constants(BLOCK=16, num_warps=2)
FIRST = (SMALL, FLAT, FLAT, 5, 9, 0.5)
# one thing of FIRST is another
CHANGES = {
    "an address that 16 does not divide": (SMALL, FLAT[1:], FLAT, 5, 9, 0.5),
    "another such address": (SMALL, FLAT, FLAT[1:], 5, 9, 0.5),
    "a dtype": (SMALL, HALF, FLAT, 5, 9, 0.5),
    "stride 1": (SMALL, FLAT, FLAT, 1, 9, 0.5),
    "a stride that 16 divides": (SMALL, FLAT, FLAT, 32, 9, 0.5),
    "stride 0": (SMALL, FLAT, FLAT, 0, 9, 0.5),
    "another number of rows": (SMALL, FLAT, FLAT, 5, 48, 0.5),
    "more than 32 bits": (SMALL, FLAT, FLAT, (1 << 31) + 1, 9, 0.5),
    "less than 32 bits": (SMALL, FLAT, FLAT, -(1 << 31) - 1, 9, 0.5),
    "an integer for a float": (SMALL, FLAT, FLAT, 5, 9, 3),
    "1 for a float": (SMALL, FLAT, FLAT, 5, 9, 1),
    "True for 1": (SMALL, FLAT, FLAT, 5, 9, True),
    "a constant": (LARGE, FLAT, FLAT, 5, 9, 0.5),
    "an option": (OTHER, FLAT, FLAT, 5, 9, 0.5),
}


def wanted(constants, *arguments):
    """What Triton itself takes for it: the hash of what it compiled, and all arguments."""
    kernel = _scale_kernel.warmup(*arguments, grid=(1,), **constants.arguments)
    return kernel.metadata.hash, (*arguments, constants.arguments["BLOCK"])


def check(device, constants, *arguments, plain):
    """Start twice; the second costs a plain run only where `plain`."""
    for turn in range(2):
        device.plain, device.stream = 0, device.stream + 1
        start(_scale_kernel, (3, 2), constants, *arguments)
        found, grid, stream, given = device.seen.pop()
        assert not device.seen
        if turn:
            assert device.plain == plain
        assert (found, given) == wanted(constants, *arguments)
        assert all(a is b for a, b in zip(given, arguments, strict=False))
        assert (grid, stream) == ((3, 2, 1), device.stream)


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_compiled_for_other_arguments_is_not_started(device, change):
    check(device, *FIRST, plain=0)
    check(device, *CHANGES[change], plain=isinstance(CHANGES[change][-1], bool))
    check(device, *FIRST, plain=0)


def test_of_many_launches_in_any_order_each_is_the_one_that_triton_would_make(device):
    strides, rows = (1, 5, 16, 1 << 31), (1, 9, 16)
    tensors = (FLAT, FLAT[1:], FLAT[4:], HALF, HALF[4:])
    for x, stride, n in itertools.product(tensors, strides, rows):
        start(_scale_kernel, (1,), SMALL, x, FLAT, stride, n, 0.5)
        found, _, _, given = device.seen.pop()
        assert (found, given) == wanted(SMALL, x, FLAT, stride, n, 0.5)


def test_another_device_compiles_for_itself(device):
    check(device, *FIRST, plain=0)
    device.number, device.arch = 1, 80
    check(device, *FIRST, plain=0)
    ptx = [caches[0].popitem()[1].asm["ptx"] for caches in _scale_kernel.device_caches.values()]
    assert ["sm_90" in ptx[0], "sm_80" in ptx[1]] == [True, True]


def test_a_kernel_whose_caches_are_cleared_is_compiled_again(device):
    check(device, *FIRST, plain=0)
    _scale_kernel.device_caches.clear()
    device.plain = 0
    start(_scale_kernel, (1,), *FIRST)
    assert device.plain == 1


def test_a_compiled_kernels_entry_is_asked_for_at_every_launch(device, monkeypatch):
    check(device, *FIRST, plain=0)
    started = []
    entry = property(lambda kernel: lambda *arguments: started.append(arguments))
    monkeypatch.setattr(module.CompiledKernel, "run", entry)
    start(_scale_kernel, (1,), *FIRST)
    assert len(started) == 1 and not device.seen


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_what_looks_into_launches_sees_each(device, hook):
    check(device, *FIRST, plain=0)
    chain = getattr(knobs.runtime, hook)
    chain.add(print)
    try:
        check(device, *FIRST, plain=1)
    finally:
        chain.remove(print)
    check(device, *FIRST, plain=0)


def test_debugging_is_compiled_in(device, monkeypatch):
    check(device, *FIRST, plain=0)
    monkeypatch.setattr(knobs.runtime, "debug", True)
    check(device, *FIRST, plain=1)


def test_a_patched_triton_and_an_unknown_one_launch_themselves(device, monkeypatch):
    check(device, *FIRST, plain=0)
    with monkeypatch.context() as patch:
        patch.setattr(module, "KNOWN", False)
        check(device, *FIRST, plain=1)
    run = module._RUN
    monkeypatch.setattr(module.JITFunction, "run", lambda *args, **options: run(*args, **options))
    check(device, *FIRST, plain=1)


def test_kernels_with_a_hook_of_their_own_launch_themselves(device, monkeypatch):
    seen = []
    monkeypatch.setattr(_scale_kernel, "pre_run_hooks", [lambda *a, **o: seen.append(a)])
    check(device, *FIRST, plain=1)
    assert len(seen) >= 2


def test_the_hosts_benchmark_times_the_same_launches_only(monkeypatch):
    monkeypatch.setattr(host, "DIM", 16)
    timed = []

    def contest(bench, case, peer, ours, theirs, **facts):
        timed.append((bench, case, peer, ours() is not None, theirs()))

    host.bench_host(contest, "forward + backward")
    assert timed == [
        ("launching", "condensed attention, forward + backward", "plain launches", True, None)
    ]
    forward = host.kernels._forward
    monkeypatch.setattr(
        host.kernels,
        "_forward",
        lambda q, k, *rest: forward(q, k, k if module.KNOWN else q, *rest[1:]),
    )
    with pytest.raises(AssertionError, match="forward: not the same launches"):
        host.bench_host(contest, "forward")
