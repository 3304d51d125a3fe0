"""Blocks whose warpgroups go their own ways: mbarriers, TMA, and who knows what of whom.

Each warpgroup of the blocks is a `Machine` of its own; they share memory. A seed says which of them
goes on, always as far as it gets, and when and in which order copies arrive. So what a wait is
missing for shows in one order or another; but it is found in any order too:

    an arrival at a barrier tells what the warpgroup has done before its last bar.sync, and what it
    was told itself; who waits for the barrier's phase has been told all that
    a copy's arrival tells of the copy
    a product may read what a copy wrote that its warpgroup has been told of
    a copy may overwrite what all products have read whose end the one that issues it was told of

Where nobody can go on and no copy is under way, the blocks are deadlocked. Not modelled: the limits
of setmaxnreg, clusters, reductions and copies to global memory, mbarriers in other memory.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tests.compiled.machine import Machine
from tests.compiled.memory import Fault, Global, Shared
from tests.compiled.ptx import Program


@dataclass(frozen=True)
class TensorMap:
    """What TMA knows of a tensor of two-byte elements, 9.7.9.27.1; the innermost dimension first.

    Raises:
        Fault: what cuTensorMapEncodeTiled refuses.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # bytes, of all dimensions but the innermost
    box: tuple[int, ...]
    swizzle: int  # bytes that are swizzled together

    def __post_init__(self) -> None:
        if self.address % 16 or any(step % 16 or not 0 <= step < 1 << 40 for step in self.strides):
            raise Fault(f"a tensor map of strides {self.strides} at {self.address}")
        if not all(0 < size <= 1 << 32 for size in self.shape):
            raise Fault(f"a tensor map of shape {self.shape}")
        if not all(0 < size <= 256 for size in self.box) or 2 * self.box[0] > self.swizzle:
            raise Fault(f"a tensor map with boxes {self.box}, swizzled by {self.swizzle} bytes")

    @property
    def size(self) -> int:
        """Bytes of a box."""
        return 2 * math.prod(self.box)

    def read(self, at: Sequence[int], memory: Global) -> np.ndarray:
        """uint8 [rows, bytes] of a box; 0 outside of the tensor."""
        rows = np.zeros((math.prod(self.box[1:]), 2 * self.box[0]), np.uint8)
        length = 2 * max(0, min(self.shape[0] - at[0], self.box[0]))
        if at[0] < 0:
            raise Fault(f"a box that begins at column {at[0]}")
        offsets = np.zeros(1, object)  # of rows; beyond 64 bits until they are taken modulo that
        inside = np.ones(1, bool)
        for start, size, step, count in zip(
            at[1:], self.shape[1:], self.strides, self.box[1:], strict=True
        ):
            places = start + np.arange(count)
            offsets = (places.astype(object)[:, None] * step + offsets).reshape(-1)
            inside = (((places >= 0) & (places < size))[:, None] & inside).reshape(-1)
        if length and inside.any():
            first = (self.address + 2 * at[0] + offsets[inside]) % (1 << 64)
            piece = next(n for n in (16, 8, 4, 2) if length % n == 0)
            where = first.astype(np.int64)[:, None] + np.arange(0, length, piece)
            values, index = memory.view(where.reshape(-1), piece, "a copy")
            found = np.ascontiguousarray(values[index]).view(np.uint8)
            rows[inside, :length] = found.reshape(-1, length)
        return rows


@dataclass
class Told:
    """What is known to be over: of each warpgroup all until a bar.sync, and some copies."""

    until: np.ndarray  # int [warpgroups]
    copies: set[int] = field(default_factory=set)

    def add(self, other: Told) -> None:
        np.maximum(self.until, other.until, out=self.until)
        self.copies |= other.copies


class Mbarrier:
    """An mbarrier object, 9.7.13.15: a phase is over when all have arrived, and all bytes."""

    def __init__(self, count: int, groups: int) -> None:
        self.count = self.pending = count
        self.bytes = 0  # that are expected and not there; fewer than none if they come first
        self.phase = 0
        self.now, self.over = (Told(np.zeros(groups, np.int64)) for _ in range(2))

    def settle(self) -> bool:
        """Whether this ends a phase."""
        if self.pending < 0:
            raise Fault(f"more arrivals at a barrier than {self.count} in a phase")
        if self.pending or self.bytes:
            return False
        self.phase, self.pending = self.phase + 1, self.count
        self.over.add(self.now)
        return True


@dataclass
class Bulk:
    """A box on its way."""

    number: int
    block: int
    at: int  # in the block's shared memory
    map: TensorMap
    place: tuple[int, ...]
    barrier: int


class Warpgroups:
    """Some thread blocks of one launch.

    Args:
        program, arguments, blocks, shared, memory: as of `Machine`; an argument of a tensor map is
            one.
        seed: of the order in which warpgroups go on and copies arrive. Of seeds divisible by 3
            copies arrive when nobody can go on without.
    """

    def __init__(
        self,
        program: Program,
        arguments: Sequence[int | float | TensorMap],
        blocks: np.ndarray,
        shared: int,
        memory: Global,
        seed: int = 0,
    ) -> None:
        self.program, self.memory = program, memory
        self.random, self.late = random.Random(seed), seed % 3 == 0
        self.elected = self.random.randrange(32)  # lane of every warp
        self.groups = program.threads // 128
        if program.threads != 384:
            raise Fault(f"{program.threads} threads, expected three warpgroups")
        self.maps = {  # by the address that the kernel is given
            256 * (i + 1): x for i, x in enumerate(arguments) if isinstance(x, TensorMap)
        }
        values = [256 * (i + 1) if isinstance(x, TensorMap) else x for i, x in enumerate(arguments)]
        self.shared = Shared(len(blocks), shared, program.threads // 32)
        count, pieces = len(blocks), self.shared.pitch // 16
        self.syncs = np.zeros((count, self.groups), np.int64)  # barriers that each has been at
        self.told = [  # in the memory's own table
            [Told(self.shared.told[block, group]) for group in range(self.groups)]
            for block in range(count)
        ]
        self.read = np.full((self.groups, count, pieces), -1)  # by products: after which bar.sync
        self.filled = np.full((count, pieces), -1)  # by which copy
        self.barriers: dict[tuple[int, int], Mbarrier] = {}
        self.copies: list[Bulk] = []
        self.issued = self.events = 0
        self.gathered: dict[int, set[int]] = defaultdict(set)  # at a barrier of a whole block
        self.released: dict[int, set[int]] = defaultdict(set)
        self.named: dict[int, int] = {}  # barriers of one warpgroup: whose
        self.parts = [
            Machine(program, values, blocks, shared, memory, (self, group))
            for group in range(self.groups)
        ]

    def run(self) -> None:
        """Until every thread has returned.

        Raises:
            Fault: anything undefined, or a deadlock.
        """
        asleep: dict[Machine, int] = {}  # since which event
        for part in self.parts:
            part.start()
        while True:
            for part, since in list(asleep.items()):
                if since != self.events:
                    part.wake()
                    del asleep[part]
            awake: list[Machine | None] = [part for part in self.parts if part.waiting]
            if self.copies and not (awake and self.late):
                awake.append(None)
            if not awake:
                break
            part = self.random.choice(awake)
            if part is None:
                self._arrive(self.copies.pop(self.random.randrange(len(self.copies))))
            else:
                since = self.events
                part.advance()
                asleep[part] = since
        if stuck := [where for part in self.parts for where in part.blocked]:
            raise Fault(
                f"{self.program.name} is deadlocked at "
                + "; ".join(str(self.program.instructions[at]) for at in sorted(set(stuck)))
            )
        for part in self.parts:
            part.finish()

    @property
    def executed(self) -> dict[str, int]:
        """By opcode: warpgroups of blocks that executed it."""
        found: dict[str, int] = defaultdict(int)
        for part in self.parts:
            for opcode, count in part.executed.items():
                found[opcode] += count
        return found

    # barriers of threads

    def sync(self, name: int, group: int, blocks: np.ndarray) -> None:
        """A barrier of one warpgroup's threads."""
        if self.named.setdefault(name, group) != group:
            raise Fault(f"barrier {name} is used by two warpgroups")
        self.shared.barrier_of(blocks, group, self.syncs[blocks, group])
        self.syncs[blocks, group] += 1

    def gather(self, group: int, blocks: np.ndarray) -> np.ndarray:
        """A barrier of all threads: bool [blocks], whether a warpgroup is past it."""
        past = np.zeros(len(blocks), bool)
        for i, block in enumerate(map(int, blocks)):
            if group in self.released[block]:
                self.released[block].discard(group)
                past[i] = True
                continue
            self.gathered[block].add(group)
            if len(self.gathered[block]) == self.groups:
                self.gathered[block].clear()
                self.released[block] = set(range(self.groups)) - {group}
                past[i] = True
                self.events += 1
                self.syncs[block] += 1
                everything = Told(self.syncs[block] - 1)
                for told in self.told[block]:
                    everything.copies |= told.copies
                for told in self.told[block]:
                    told.add(everything)
                self.shared.barrier(slice(block, block + 1))
        return past

    # mbarriers

    def initialise(self, block: int, at: int, count: int) -> None:
        if not 1 <= count < 1 << 20 or at % 8:
            raise Fault(f"a barrier of {count} arrivals at {at}")
        self.barriers[block, at] = Mbarrier(count, self.groups)

    def barrier(self, block: int, at: int) -> Mbarrier:
        if (block, at) not in self.barriers:
            raise Fault(f"there is no barrier at {at}")
        return self.barriers[block, at]

    def arrive(self, group: int, block: int, at: int, count: int, expected: int) -> None:
        """Arrivals, and bytes that are to be waited for besides."""
        barrier = self.barrier(block, at)
        told = self.told[block][group]
        told.until[group] = self.syncs[block, group] - 1
        barrier.now.add(told)
        barrier.bytes += expected
        barrier.pending -= count
        self.events += barrier.settle()

    def over(self, group: int, block: int, at: int, parity: int) -> bool:
        """Whether the phase of this parity is; then the warpgroup is told what happened before."""
        barrier = self.barrier(block, at)
        if barrier.phase % 2 == parity:
            return False
        self.told[block][group].add(barrier.over)
        return True

    # TMA

    def issue(
        self, group: int, block: int, at: int, address: int, place: Sequence[int], barrier: int
    ) -> None:
        """A copy of a box begins."""
        if address not in self.maps:
            raise Fault(f"there is no tensor map at {address}")
        box = self.maps[address]
        if len(place) != len(box.box):
            raise Fault(f"{len(place)} coordinates in a tensor of {len(box.box)} dimensions")
        self.barrier(block, barrier)
        shared, told = self.shared, self.told[block][group]
        if at % max(128, box.swizzle * 8) or at + box.size > shared.size:
            raise Fault(f"a box of {box.size} bytes at {at} of {shared.size} bytes, or misaligned")
        if shared.unfenced[block, barrier : barrier + 8].any():
            raise Fault("a barrier that no fence.proxy.async made visible to TMA")
        where, pieces = slice(at, at + box.size), slice(at // 16, (at + box.size) // 16)
        if shared.copying[block, where].any():
            raise Fault("a copy to where another is still on its way")
        if shared.multiplying[block, pieces].any():
            raise Fault("a copy to what a matrix product in flight may still read")
        if (shared.wrote[block, where] | shared.read[block, where]).any():
            raise Fault("a copy to shared memory that a warp has used since the block's barrier")
        late = self.read[:, block, pieces].max(1) > told.until
        if late.any():
            raise Fault(
                f"a copy to what warpgroup {int(late.argmax())} has read, and did not say so"
            )
        if set(np.unique(self.filled[block, pieces]).tolist()) - told.copies - {-1}:
            raise Fault("a copy to where another one was, which nobody said is over")
        shared.copying[block, where] = 1
        self.copies.append(Bulk(self.issued, block, at, box, tuple(place), barrier))
        self.issued += 1

    def _arrive(self, copy: Bulk) -> None:
        """A copy's bytes are there."""
        shared, block = self.shared, copy.block
        rows = copy.map.read(copy.place, self.memory)
        width = rows.shape[1]
        at = copy.at + np.arange(len(rows))[:, None] * width + np.arange(width)
        at = at ^ ((at >> 7 & (copy.map.swizzle // 16 - 1)) << 4)
        shared.data[block, at] = rows
        shared.copying[block, copy.at : copy.at + copy.map.size] = 0
        self.filled[block, copy.at // 16 : (copy.at + copy.map.size) // 16] = copy.number
        barrier = self.barrier(block, copy.barrier)
        barrier.now.copies.add(copy.number)
        barrier.bytes -= copy.map.size
        self.events += barrier.settle()

    # who reads what a copy wrote

    def load(self, group: int, blocks: np.ndarray, at: np.ndarray) -> None:
        """Lanes read shared memory, at offsets through all blocks."""
        by = self.filled.reshape(-1)[at >> 4]
        for block, number in {*zip(blocks.tolist(), by.tolist(), strict=True)}:
            if number >= 0 and number not in self.told[block][group].copies:
                raise Fault("reads a copy that its warpgroup did not wait for")

    def begin_product(self, group: int, blocks: np.ndarray, granules: np.ndarray) -> None:
        """A product reads 16-byte pieces [blocks, ...], of which copies wrote some."""
        filled = self.filled.reshape(-1)[granules]
        for i, block in enumerate(map(int, blocks)):
            by = set(np.unique(filled[i]).tolist()) - {-1}
            if by - self.told[block][group].copies:
                raise Fault("a matrix product reads a copy that its warpgroup did not wait for")
        self.shared.begin_product(granules, group)

    def end_product(self, group: int, blocks: np.ndarray, granules: np.ndarray) -> None:
        """It has been waited for."""
        pieces = granules.reshape(len(blocks), -1)
        filled = self.filled.reshape(-1)[pieces] >= 0
        now = np.broadcast_to(self.syncs[blocks, group][:, None], pieces.shape)
        self.read[group].reshape(-1)[pieces[filled]] = now[filled]
        self.shared.end_product(pieces[~filled], 0xF << 4 * group)
        np.subtract.at(self.shared.multiplying.reshape(-1), pieces[filled], np.int16(1))


def tensor_map(descriptor: object, metadata: Mapping[str, object]) -> TensorMap:
    """Of a Gluon TensorDescriptor, and what Triton compiled of it."""
    elements = 2
    if metadata["elem_size"] != elements or descriptor.padding != "zero":
        raise Fault(f"a descriptor with {metadata['elem_size']} bytes an element")
    swizzle = {1: 32, 2: 64, 3: 128}[metadata["swizzle"]]
    return TensorMap(
        descriptor.base.data_ptr(),
        tuple(descriptor.shape[::-1]),
        tuple(elements * step for step in descriptor.strides[-2::-1]),
        tuple(metadata["block_size"][::-1]),
        swizzle,
    )
