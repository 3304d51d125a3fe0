"""Copies and matrix products that go on behind the instructions after them.

Both are put into groups, and a wait asks that all but the newest so many groups of a block have
ended. Nothing takes effect before the wait that asks for it: a copy's bytes are not there, an
accumulator holds NaN. So a wait that is missing, or asks for too little, shows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.compiled.memory import Fault

if TYPE_CHECKING:
    from tests.compiled.machine import Machine

UNCOMMITTED = 1 << 30
NAN = np.uint32(0x7FA00000)  # signalling: arithmetic quiets it, so that any write to it shows


@dataclass
class Pending:
    """Something in flight: in which blocks, and in which of their groups."""

    blocks: np.ndarray  # bool [B]
    group: np.ndarray  # int [B]
    what: Any


class Groups:
    """What is in flight, in the order it was issued."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.pending: list[Pending] = []
        self.committed = np.zeros(machine.blocks, np.int64)

    def issue(self, blocks: np.ndarray, what: Any) -> None:
        here = np.zeros(self.machine.blocks, bool)
        here[blocks] = True
        group = np.full(self.machine.blocks, UNCOMMITTED)
        self.pending.append(Pending(here, group, what))

    def commit(self, blocks: np.ndarray) -> None:
        """What these blocks have issued since their last commit is one group."""
        for pending in self.pending:
            fresh = blocks[pending.blocks[blocks] & (pending.group[blocks] == UNCOMMITTED)]
            pending.group[fresh] = self.committed[fresh]
        self.committed[blocks] += 1

    def wait(self, blocks: np.ndarray, newest: int) -> None:
        """End all but the `newest` groups of these blocks."""
        for pending in self.pending:
            old = pending.group[blocks] < self.committed[blocks] - newest
            done = blocks[pending.blocks[blocks] & old]
            if len(done):
                pending.blocks[done] = False
                self.end(pending.what, done)
        self.pending = [pending for pending in self.pending if pending.blocks.any()]

    def end(self, what: Any, blocks: np.ndarray) -> None:
        raise NotImplementedError

    def finished(self) -> None:
        """At the end of the kernel."""
        if self.pending:
            raise Fault(f"{self.machine.program.name} ends with {type(self).__name__} in flight")


@dataclass
class Copy:
    """cp.async of some lanes; what it read is in `values`."""

    lanes: np.ndarray  # [n]
    at: np.ndarray  # [n], in shared memory
    width: int
    values: np.ndarray  # uint8 [n, width]


class Copies(Groups):
    """cp.async, 9.7.9.25.3: global to shared memory, behind zeros where the source is shorter."""

    def start(self, copy: Copy) -> None:
        machine = self.machine
        machine.shared.begin_copy(copy.at, copy.width, machine.warp_bits[copy.lanes])
        self.issue(np.unique(machine.block_of[copy.lanes]), copy)

    def end(self, what: Copy, blocks: np.ndarray) -> None:
        machine = self.machine
        of = np.isin(machine.block_of[what.lanes], blocks)
        bits = machine.warp_bits[what.lanes[of]]
        machine.shared.end_copy(what.at[of], what.width, bits, what.values[of])

    def finished(self) -> None:
        """A kernel may end without waiting for copies that it no longer needs."""


@dataclass
class Product:
    """One wgmma of the G warpgroups of some blocks: D (+)= A @ B.T, 16 columns of A and of B.

    A [64, 16] lies in shared memory or in four registers, B [N, 16] in shared memory.
    """

    accumulator: tuple[str, ...]  # N / 2 registers
    blocks: np.ndarray  # [B], ascending
    a: np.ndarray | tuple[str, ...]  # byte offsets [B, G, 64, 16], or registers
    b: np.ndarray  # byte offsets [B, G, N, 16]
    granules: list[np.ndarray]  # of 16 bytes that it reads, [B, G, ...] each
    keeps: np.ndarray  # bool [B, G]: adds to what the accumulator has
    half: str  # "f16" or "bf16"
    issued: list[np.ndarray] = field(default_factory=list)  # A's registers, [lanes] each


# The fragments of a warpgroup's 128 lanes (9.7.15.5.1.1.1): four warps of 16 rows each, in which
# lane l has rows l / 4 and l / 4 + 8, and columns 2 (l % 4) and the next of every 8.
ROW = np.arange(128) // 32 * 16 + np.arange(128) % 32 // 4
COLUMN = np.arange(128) % 4 * 2


def to_float(bits: np.ndarray, half: str) -> np.ndarray:
    """uint16 -> float32."""
    if half == "f16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << 16).view(np.float32)


class Products(Groups):
    """wgmma.mma_async (9.7.15): products of a warpgroup, which is four warps in step."""

    def __init__(self, machine: Machine) -> None:
        super().__init__(machine)
        self.shape = (machine.blocks, max(machine.warps // 4, 1), 128)  # of a register
        self.values: dict[tuple[str, ...], np.ndarray] = {}  # of accumulators in flight
        self.fenced = np.zeros(machine.blocks, bool)

    def fence(self, blocks: np.ndarray) -> None:
        """wgmma.fence, 9.7.15.7.1: what was written to registers comes before the next product.

        That there is one since the last wait is checked, not that nothing was written behind it:
        LLVM moves conversions of A below the fences that Triton emits, and ptxas, which knows
        what a register depends on, orders them itself.
        """
        self.fenced[blocks] = True

    def wait(self, blocks: np.ndarray, newest: int) -> None:
        """Registers may be written from now on, so that the next product needs another fence."""
        super().wait(blocks, newest)
        self.fenced[blocks] = False

    def operand(
        self, blocks: np.ndarray, descriptors: np.ndarray, rows: int, transposed: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Byte offsets [B, G, rows, 16] of a matrix's elements, and the 16-byte pieces they fill.

        A descriptor [B, G] (9.7.15.5.1.2.2) has the address, two strides and the swizzle; the
        layouts are the canonical K-major and MN-major ones (9.7.15.5.1.2.1.3).
        """
        if (descriptors >> np.uint64(49) & np.uint64(7)).any():
            raise Fault("a descriptor with a base offset")
        if (descriptors >> np.uint64(62) != descriptors.flat[0] >> np.uint64(62)).any():
            raise Fault("descriptors with different swizzles")
        fields = descriptors[..., None] >> np.array([0, 16, 32], np.uint64) & np.uint64(0x3FFF)
        start, leading, stride = np.moveaxis(fields.astype(np.int64) << 4, -1, 0)[..., None, None]
        mode = int(descriptors.flat[0] >> np.uint64(62))
        line = {0: 16, 1: 128, 2: 64, 3: 32}[mode]  # bytes that are swizzled together
        row, k = np.arange(rows)[:, None], np.arange(16)[None]
        if transposed:  # MN-major: lines along the rows
            wide = line // 2
            of_row, of_k = (leading, stride) if mode else (stride, leading)
            at = start + row // wide * of_row + k // 8 * of_k + k % 8 * line + row % wide * 2
        else:  # K-major: lines along k, eight rows one behind the other
            of_k = k * 2 if mode else k // 8 * leading + k % 8 * 2
            at = start + row // 8 * stride + row % 8 * line + of_k
        at = at ^ ((at >> 7 & (line // 16 - 1)) << 4)
        shared = self.machine.shared
        if (at + 2 > shared.size).any():
            raise Fault(f"a matrix product reads byte {int(at.max())} of {shared.size} shared ones")
        at += blocks[:, None, None, None] * shared.pitch
        return at, (at[..., ::8, :] if transposed else at[..., ::8]) >> 4

    def start(self, product: Product) -> None:
        machine, key = self.machine, product.accumulator
        if not self.fenced[product.blocks].all():
            raise Fault("a warpgroup's product with no wgmma.fence before it")
        for granules in product.granules:
            machine.reads(product.blocks, granules)
        if key not in self.values:
            if any(set(key) & set(other) for other in self.values):
                raise Fault("the accumulators of two products in flight overlap")
            self.values[key] = np.zeros((len(key), *self.shape), np.float32)
        if isinstance(product.a, tuple):
            product.issued = [machine.register(name).copy() for name in product.a]
        fresh = product.blocks[~self._in_flight(key)[product.blocks]]
        for value, name in zip(self.values[key], key, strict=True):
            register = machine.register(name).reshape(self.shape)
            value[fresh] = register[fresh].view(np.float32)
            register[fresh] = NAN
        self.issue(product.blocks, product)

    def _in_flight(self, key: tuple[str, ...]) -> np.ndarray:
        """bool [B]: the blocks in which a product into these registers is."""
        flying = [p.blocks for p in self.pending if p.what.accumulator == key]
        return np.any(flying, axis=0) if flying else np.zeros(self.machine.blocks, bool)

    def end(self, what: Product, blocks: np.ndarray) -> None:
        machine, shared = self.machine, self.machine.shared
        nth = np.searchsorted(what.blocks, blocks)
        halves = shared.data.reshape(-1).view(np.uint16)
        b = to_float(halves[what.b[nth] >> 1], what.half)  # [B, G, N, 16]
        if isinstance(what.a, tuple):
            a = self._from_registers(what, blocks)
        else:
            a = to_float(halves[what.a[nth] >> 1], what.half)  # [B, G, 64, 16]
        d = a @ b.swapaxes(-1, -2)  # [B, G, 64, N]
        values = self.values[what.accumulator]
        for j, value in enumerate(values):
            part = d[:, :, ROW + j // 2 % 2 * 8, j // 4 * 8 + COLUMN + j % 2]  # [B, G, 128]
            value[blocks] = part + np.where(what.keeps[nth][..., None], value[blocks], 0)
        for granules in what.granules:
            for group in range(self.shape[1]):
                machine.has_read(blocks, granules[nth, group], group)
        landed = blocks[~self._in_flight(what.accumulator)[blocks]]
        for value, name in zip(values, what.accumulator, strict=True):
            register = machine.register(name).reshape(self.shape)
            if (register[landed] != NAN).any():
                raise Fault(f"{name} was written while a product into it was in flight")
            register[landed] = value[landed].view(np.uint32)
        if not self._in_flight(what.accumulator).any():
            del self.values[what.accumulator]

    def _from_registers(self, what: Product, blocks: np.ndarray) -> np.ndarray:
        """A [B, G, 64, 16] of four registers of pairs, of rows and rows + 8, columns and + 8."""
        a = np.empty((len(blocks), self.shape[1], 64, 16), np.float32)
        for i, (name, bits) in enumerate(zip(what.a, what.issued, strict=True)):
            pairs = bits.reshape(self.shape)[blocks]
            # LLVM gives a zero of A and of D one register where D starts at zero; the machine code
            # has them apart, so that A's stays what it was
            now = self.machine.register(name).reshape(self.shape)[blocks]
            if name not in what.accumulator and (now != pairs).any():
                raise Fault(f"{name} was written while a product that reads it was in flight")
            row, column = ROW + i % 2 * 8, COLUMN + i // 2 * 8
            a[:, :, row, column] = to_float((pairs & 0xFFFF).astype(np.uint16), what.half)
            a[:, :, row, column + 1] = to_float((pairs >> 16).astype(np.uint16), what.half)
        return a
