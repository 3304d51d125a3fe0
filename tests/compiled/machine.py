"""Executes a PTX kernel on numpy arrays, all thread blocks of a launch side by side.

A lane is one thread of one block; an instruction is one numpy call over the lanes that are at it.
Lanes part at a branch that they do not all take, and those at the lowest instruction go on first,
so that they meet again. That order is one of many a GPU may take; what depends on it is found by
other means: shared memory notes who touched what since the last barrier (`memory.Shared`), and an
asynchronous copy or product (`asynchronous.py`) takes effect at its wait and no earlier, while its
operands are watched. Registers and shared memory start as garbage.

Not modelled: the machine code that ptxas makes of the PTX; races in global memory, and an address
that leaves one tensor for another right behind it; the order in which tensor cores sum, and their
rounding; which of two zeros min and max take; copies and products that some warps of a block wait
for and others do not (an error); time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.compiled.asynchronous import Copies, Products
from tests.compiled.instructions import OPCODES, REGISTERS_ONLY, Run, gate_of
from tests.compiled.memory import GARBAGE, ONES, UNSIGNED, Fault, Global, Shared
from tests.compiled.ptx import Instruction, Program, dtype_of

if TYPE_CHECKING:
    from tests.compiled.warpgroups import Warpgroups

Operand = Any  # an array [lanes] or a constant; numpy gives both the same methods
JUMPS = ("bra", "ret", "exit")


class Machine:
    """Some thread blocks of one launch.

    Args:
        program: the kernel.
        arguments: a value per parameter: an address, an int or a float.
        blocks: int [B, 3], each block's %ctaid.
        shared: bytes of shared memory a block has.
        memory: what global memory the launch may touch.
        team: whose warpgroup of theirs this is alone; None for whole blocks.
    """

    def __init__(
        self,
        program: Program,
        arguments: Sequence[int | float],
        blocks: np.ndarray,
        shared: int,
        memory: Global,
        team: tuple[Warpgroups, int] | None = None,
    ) -> None:
        if len(arguments) != len(program.params):
            raise Fault(f"{len(arguments)} arguments for {len(program.params)} parameters")
        self.program, self.memory = program, memory
        self.team, self.group = team or (None, None)
        self.blocks = len(blocks)
        self.threads = program.threads if self.team is None else 128
        self.warps = self.threads // 32
        lanes = self.blocks * self.threads
        thread = np.arange(lanes, dtype=np.uint32) % self.threads + 128 * (self.group or 0)
        self.block_of = np.arange(lanes) // self.threads  # [lanes]
        self.shared = self.team.shared if self.team else Shared(self.blocks, shared, self.warps)
        self.warp_bits = (1 << (thread // 32)).astype(self.shared.wrote.dtype)  # [lanes]
        self.special = {"%laneid": thread % 32, "%tid.x": thread}
        for axis, of_block in zip("xyz", blocks.T.astype(np.uint32), strict=True):
            self.special[f"%ctaid.{axis}"] = np.repeat(of_block, self.threads)
        for axis in "yz":
            self.special[f"%tid.{axis}"] = np.zeros_like(thread)
        self.registers = {
            prefix: np.full((count, lanes), True)
            if bits == 1
            else np.full((count, lanes), GARBAGE * ONES[bits // 8], UNSIGNED[bits // 8])
            for prefix, (bits, count) in program.registers.items()
        }
        self.parameters = {
            name: np.array(value).astype(dtype_of("u64" if kind == "map" else kind))
            for (kind, name), value in zip(program.params, arguments, strict=True)
        }
        self.maps = {name for kind, name in program.params if kind == "map"}
        self.copies, self.products = Copies(self), Products(self)
        self.alive = np.ones(lanes, bool)
        self.executed: dict[str, int] = {}  # by opcode: blocks that executed it
        self.waiting: dict[int, np.ndarray] = {}  # instruction -> lanes that are to go on there
        self.blocked: dict[int, np.ndarray] = {}  # the same, of those that cannot
        # of instructions that may have to wait for another warpgroup: of the lanes at it, those
        # that need not
        self.gates: dict[int, Callable[[np.ndarray], np.ndarray]] = {}

    # operands

    def register(self, name: str) -> np.ndarray:
        """[lanes] as unsigned integers, or bool."""
        prefix = name.rstrip("0123456789")
        if prefix not in self.registers:
            raise Fault(f"{name} is no register that the kernel declares")
        return self.registers[prefix][int(name[len(prefix) :])]

    def source(self, operand: str, kind: str) -> Operand:
        """A register's lanes or a constant, as numpy's type of a PTX type."""
        dtype = dtype_of(kind)
        if operand in self.maps:
            return self.parameters[operand].astype(dtype)
        if operand in self.special:
            return self.special[operand].astype(f"u{dtype.itemsize}").view(dtype)
        if operand.startswith("%"):
            bits = self.register(operand)
            if bits.dtype == dtype:
                return bits
            ratio = bits.dtype.itemsize // dtype.itemsize  # the low part of a wider register
            if not ratio:
                raise Fault(f"{operand} is narrower than .{kind}")
            return bits.view(dtype) if ratio == 1 else bits.view(dtype)[::ratio]
        if dtype == np.dtype(bool):
            return np.bool_(int(operand))
        if operand[:2].lower() in ("0f", "0d"):
            value = int(operand[2:], 16)
        elif operand == "global_smem":
            value = 0  # the one symbol: the start of shared memory
        else:
            value = int(operand.rstrip("U"), 0)
        width = dtype.itemsize
        return UNSIGNED[width].type(value & ((1 << 8 * width) - 1)).view(dtype)

    def write(self, name: str, values: Operand, active: np.ndarray | None) -> None:
        """To a register: bits of the same width, or a narrower unsigned number, extended."""
        if name == "_":
            return
        register = self.register(name)
        values = np.asarray(values)
        if values.dtype.itemsize == register.dtype.itemsize:
            values = values.view(register.dtype)
        np.copyto(register, values, where=True if active is None else active, casting="unsafe")

    def address(self, operand: str, kind: str) -> np.ndarray:
        """int64 [lanes] of `[%rd4 + 16]`."""
        base, _, offset = operand.strip("[] ").partition("+")
        found = np.asarray(self.source(base.strip(), kind)).astype(np.int64)
        return np.broadcast_to(found, self.block_of.shape) + int(offset.strip() or 0)

    # who is at an instruction

    def lanes(self, active: np.ndarray | None) -> np.ndarray | slice:
        """To index [lanes] with; a slice makes views, which is faster."""
        return slice(None) if active is None else np.flatnonzero(active)

    def whole_blocks(self, active: np.ndarray | None, what: str) -> np.ndarray:
        """Indices of the blocks at an instruction that needs all their threads."""
        if active is None:
            return np.arange(self.blocks)
        here = active.reshape(self.blocks, -1)
        some = here.any(1)
        if ((~here & self.alive.reshape(self.blocks, -1)).any(1) & some).any():
            raise Fault(f"{what} by a part of a block's threads")
        return np.flatnonzero(some)

    def whole_warps(self, active: np.ndarray | None, what: str) -> np.ndarray:
        """int [warps, 32], the lanes of the warps at an instruction that needs all of a warp's."""
        warps = np.arange(len(self.alive)).reshape(-1, 32)
        if active is None:
            return warps
        here = active.reshape(-1, 32)
        if (here.any(1) != here.all(1)).any():
            raise Fault(f"{what} by a part of a warp's lanes")
        return warps[here.all(1)]

    # execution

    def bind(self, instruction: Instruction) -> Run:
        """The instruction as a call over the lanes that are at it (None: all)."""
        if instruction.words[0] not in OPCODES:
            raise Fault("an instruction that is not known")
        run = OPCODES[instruction.words[0]](self, instruction)
        if instruction.guard is None:
            return run
        name, negated = instruction.guard
        predicate = self.register(name)

        def guarded(active: np.ndarray | None) -> None:
            holds = ~predicate if negated else predicate
            here = holds if active is None else holds & active
            if here.all():
                run(None)
            elif here.any():
                run(here.copy())  # the instruction may write its own guard

        return guarded

    def taken(self, instruction: Instruction, active: np.ndarray) -> np.ndarray:
        """Of the lanes at a branch or an exit, those that take it."""
        if instruction.guard is None:
            return active
        name, negated = instruction.guard
        return active & (self.register(name) != negated)

    def run(self) -> None:
        """Until every thread has returned.

        Raises:
            Fault: anything undefined; the message names the instruction and the blocks.
        """
        self.start()
        self.advance()
        self.finish()

    def start(self) -> None:
        """Look at all instructions once."""
        program = self.program
        self.code: list[Run | None] = []
        for at, instruction in enumerate(program.instructions):
            try:
                if gate := None if self.team is None else gate_of(self, instruction):
                    self.gates[at] = gate
                here = gate or instruction.words[0] in JUMPS
                self.code.append(None if here else self.bind(instruction))
            except (Fault, ValueError, KeyError, IndexError) as fault:  # or unlike any known form
                raise Fault(f"{program.name}, {instruction}: {fault}") from None
        self.waiting = {0: np.ones_like(self.alive)}

    def advance(self) -> None:
        """As far as its threads get."""
        program = self.program
        with np.errstate(all="ignore"):
            while self.waiting:
                at = min(self.waiting)
                lanes = self.waiting.pop(at)
                try:
                    self._go_on(self.code, at, lanes, self.waiting)
                except Fault as fault:
                    here = self.at
                    raise Fault(f"{program.name}, {program.instructions[here]}: {fault}") from None

    def wake(self) -> None:
        """Those that could not go on are to try again."""
        for at, lanes in self.blocked.items():
            self._join(self.waiting, at, lanes)
        self.blocked = {}

    def finish(self) -> None:
        """See that nothing is left behind."""
        self.copies.finished()
        self.products.finished()

    # of blocks that are made of several warpgroups, or not

    def reads(self, blocks: np.ndarray, granules: np.ndarray) -> None:
        """A product reads 16-byte pieces of shared memory, [blocks, ...]."""
        if self.team is None:
            self.shared.begin_product(granules)
        else:
            self.team.begin_product(self.group, blocks, granules)

    def has_read(self, blocks: np.ndarray, granules: np.ndarray, group: int) -> None:
        """A warpgroup's product is over."""
        if self.team is None:
            self.shared.end_product(granules, 0xF << 4 * group)
        else:
            self.team.end_product(self.group, blocks, granules)

    def _go_on(
        self,
        code: list[Run | None],
        at: int,
        lanes: np.ndarray,
        waiting: dict[int, np.ndarray],
    ) -> None:
        """One set of lanes, until it parts, meets others or ends."""
        program = self.program
        stop = min(waiting, default=len(code))
        active = None if lanes.all() else lanes
        # what threads that have returned compute goes nowhere, and to leave them out takes longer
        for_registers = None if (lanes == self.alive).all() else active
        blocks = int(lanes.reshape(self.blocks, -1).any(1).sum())
        while at < stop:
            self.at = at
            instruction, run = program.instructions[at], code[at]
            self.executed[instruction.words[0]] = (
                self.executed.get(instruction.words[0], 0) + blocks
            )
            if run is not None:
                run(for_registers if instruction.words[0] in REGISTERS_ONLY else active)
                at += 1
                continue
            if at in self.gates:
                through = lanes & self.gates[at](lanes)
                if (through != lanes).any():
                    self._join(self.blocked, at, lanes & ~through)
                    if through.any():
                        self._join(waiting, at + 1, through)
                    return
                at += 1
                continue
            taken = self.taken(instruction, lanes)
            stay = lanes & ~taken
            if instruction.words[0] == "bra":
                target = program.labels[instruction.operands[0]]
                if not stay.any():
                    at = target
                    continue
                if taken.any():
                    self._join(waiting, target, taken)
            else:
                self.alive &= ~taken
            if not stay.any():
                return
            if taken.any():
                self._join(waiting, at + 1, stay)
                return
            at += 1
        self._join(waiting, at, lanes)

    @staticmethod
    def _join(waiting: dict[int, np.ndarray], at: int, lanes: np.ndarray) -> None:
        waiting[at] = waiting[at] | lanes if at in waiting else lanes
