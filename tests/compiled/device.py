"""A device for the library's own host code: Triton compiles for it, and `Machine` executes.

    with device(90):
        condensed_attention_triton._forward(q, k, v, tiles, scale)  # tensors on the CPU

Nothing of the host code is changed but what it asks a GPU for: its architecture, and whether
Triton can run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver

from btok_kernels import condensed_attention, contrastive_loss, late_interaction, launch
from tests.compiled.driver import Target
from tests.compiled.machine import Machine
from tests.compiled.memory import Fault, Global
from tests.compiled.ptx import parse
from tests.compiled.warpgroups import Warpgroups, tensor_map

LANES_BYTES = 192 << 20  # of the registers of the thread blocks that are executed side by side
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}  # of a block, by compute capability

program_of = cache(parse)


class Device:
    """What was executed, and what else a launch may touch."""

    def __init__(self, arch: int, rewrite: Mapping[str, Callable[[str], str]], seed: int) -> None:
        self.also: list[Tensor] = []  # tensors that kernels reach without being given them
        self.arch, self.rewrite, self.seed = arch, rewrite, seed
        self.captured: list[tuple[Any, ...]] = []  # launches, as a CUDA graph has them
        self.launched: Counter[str] = Counter()
        self.executed: Counter[tuple[str, str]] = Counter()  # (kernel, opcode): blocks

    def launch(self, kernel: CompiledKernel, grid: Sequence[int], arguments: Sequence[Any]) -> None:
        """Execute a compiled kernel over a grid.

        Raises:
            Fault: anything undefined, or what the device refuses.
        """
        self.captured.append((kernel, grid, arguments))
        self._execute(kernel, grid, arguments)

    def replay(self) -> None:
        """All launches again, as a CUDA graph replays them: the same code, grids, numbers, pointers
        and tensor maps, on what now lies in memory."""
        for launched in self.captured:
            self._execute(*launched)

    def _execute(
        self, kernel: CompiledKernel, grid: Sequence[int], arguments: Sequence[Any]
    ) -> None:
        if (shared := kernel.metadata.shared) > SHARED_BYTES[self.arch]:
            raise Fault(f"{kernel.name} takes {shared} bytes of shared memory")
        types = list(kernel.src.signature.values())
        given = [x for x, t in zip(arguments, types, strict=True) if t != "constexpr"]
        text = kernel.asm["ptx"]
        if kernel.name in self.rewrite:
            text = self.rewrite[kernel.name](text)
        program = program_of(text)
        maps = iter(getattr(kernel.metadata, "tensordesc_meta", None) or ())
        values: list[Any] = []
        tensors, extents = list(self.also), []
        for x in given:
            if isinstance(x, Tensor):
                tensors.append(x)
                values.append(x.data_ptr())
            elif hasattr(x, "block_shape"):  # a tensor map, and what Triton hands over besides
                last = sum((n - 1) * step for n, step in zip(*x.base[2:], strict=True))
                size = (last + 1) * x.base.dtype.itemsize
                extents.append((x.base.address, x.base.address + size))
                values += [tensor_map(x, next(maps)), *x.shape, *x.strides]
            else:
                values.append(x)
        memory = Global(tensors, extents)
        values += [0] * (len(program.params) - len(values))  # Triton's scratch memory: none
        blocks = np.stack(np.unravel_index(np.arange(np.prod(grid)), grid[::-1])[::-1], 1)
        size = sum(bits // 8 * count for bits, count in program.registers.values())
        several = program.threads > 256  # warpgroups that go their own ways
        many = max(1, LANES_BYTES // (size * program.threads + 12 * kernel.metadata.shared))
        for at in range(0, len(blocks), many):
            part = blocks[at : at + many]
            options = program, values, part, kernel.metadata.shared, memory
            machine = Warpgroups(*options, self.seed + at) if several else Machine(*options)
            machine.run()
            for opcode, count in machine.executed.items():
                self.executed[kernel.name, opcode] += count
        self.launched[kernel.name] += 1


@contextmanager
def device(
    arch: int, rewrite: Mapping[str, Callable[[str], str]] | None = None, seed: int = 0
) -> Iterator[Device]:
    """Triton's launches within are compiled for compute capability `arch` and executed here.

    Args:
        arch: as in sm_90.
        rewrite: changes of a kernel's PTX by its name: planted faults.
        seed: in which order the warpgroups of a block go on, and copies arrive.
    """
    here = Device(arch, rewrite or {}, seed)

    def starter(kernel: CompiledKernel) -> Callable[..., None]:
        def start(x, y, z, stream, function, packed, metadata, enter, leave, *arguments):
            here.launch(kernel, (x, y, z), arguments)

        return start

    before = driver._active
    driver.set_active(Target(arch))
    try:
        with (
            mock.patch.object(CompiledKernel, "_init_handles", lambda kernel: None),
            mock.patch.object(CompiledKernel, "run", property(starter)),
            mock.patch.object(launch, "architecture", lambda device: arch),
            mock.patch.object(condensed_attention, "no_triton", lambda device, dtype: None),
            mock.patch.object(contrastive_loss, "no_triton", lambda device, dtype: None),
            mock.patch.object(late_interaction, "no_triton", lambda device, dtype: None),
        ):
            yield here
    finally:
        driver._active = before
