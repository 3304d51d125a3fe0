"""A driver that stands in for a GPU: the library's own host code compiles its launches for an
architecture, on CPU tensors, and each is recorded or handed on instead of started.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

from btok_kernels import launch

T = TypeVar("T")


class Launch(NamedTuple):
    """A recorded launch: the kernel's name, its constants by name, what it compiled to."""

    name: str
    constants: dict[str, Any]
    kernel: Any


class Launcher:
    """What Triton takes for the entry to a compiled kernel: records the launch, starts nothing."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.source, self.metadata = source, metadata

    def __call__(self, *grid_stream_function_metadata_hooks_and_arguments: Any) -> None:
        function = self.source.fn
        compiled = function.device_caches[driver.active.get_current_device()][0].values()
        kernel = next(kernel for kernel in compiled if kernel.hash == self.metadata.hash)
        constants = {
            function.arg_names[path[0]]: value for path, value in self.source.constants.items()
        }
        driver.active.launches[kernel.hash] = Launch(function.__name__, constants, kernel)


class Target(DriverBase):
    """A driver that names a device of compute capability `arch`, loads and starts nothing.

    Launches go to `launcher_cls`, which Triton makes of a kernel's source and metadata and calls
    with the grid, the stream, the loaded function, packed and launch metadata, two hooks and the
    kernel's arguments.
    """

    launcher_cls: Any = Launcher

    def __init__(self, arch: int) -> None:
        self.arch = arch
        self.launches: dict[str, Launch] = {}
        self.utils = SimpleNamespace(
            load_binary=lambda name, binary, shared, device: (None, None, 0, 0, 1024),
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": sys.maxsize},
        )

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps its compiled kernels, and their target, by device

    def get_current_stream(self, device: int) -> int:
        return 0


class Idle(Target):
    """Takes down what each launch would start, where `launched` is a list."""

    launched: list[tuple[str, tuple[int, ...], int, tuple[Any, ...]]] | None = None

    @property
    def launcher_cls(self) -> Any:
        return partial(partial, self.launch)

    def launch(self, source: Any, metadata: Any, *started: Any) -> None:
        """Its kernel's hash, the grid, the stream and the arguments."""
        if self.launched is not None:
            x, y, z, stream, _, _, _, _, _, *arguments = started
            self.launched.append((metadata.hash, (x, y, z), stream, tuple(arguments)))


@contextmanager
def standing_in(arch: int, target: Callable[[int], T]) -> Iterator[T]:
    """Launches inside compile for `arch`, on CPU tensors, and go to the target's launcher."""
    active, before = target(arch), driver._active
    driver.set_active(active)
    try:
        with mock.patch.object(launch, "architecture", lambda device: arch):
            yield active
    finally:
        driver._active = before


@contextmanager
def recorded_launches(arch: int) -> Iterator[dict[str, Launch]]:
    """Launches inside compile for `arch` and are recorded, by hash."""
    with standing_in(arch, Target) as target:
        yield target.launches
