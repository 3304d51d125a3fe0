"""What each PTX instruction does, by its opcode; `arithmetic.py` has those of registers alone.

A handler looks at an instruction once, finds its registers, and returns a call that does it for
the lanes that are at it (bool [lanes]; None for all). A modifier or type that it does not know is
refused there, before anything runs. Section numbers are those of the PTX manual.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.compiled.arithmetic import BITS, INTEGERS, REGISTERS_ONLY, Active, Run, check, halves
from tests.compiled.asynchronous import Copy, Product
from tests.compiled.memory import UNSIGNED, Fault
from tests.compiled.ptx import Instruction, dtype_of, register_list

if TYPE_CHECKING:
    from tests.compiled.machine import Machine
    from tests.compiled.warpgroups import Warpgroups


def shuffle(machine: Machine, ins: Instruction) -> Run:
    """shfl.sync, 9.7.9.6: a register of another lane of the warp, where there is such a lane."""
    check(ins, {"sync", "up", "down", "bfly", "idx"}, {"b32"})
    mode, (to, a, b, c, members) = ins.words[2], ins.operands
    if int(members, 0) & 0xFFFFFFFF != 0xFFFFFFFF:
        raise Fault(f"a shuffle among the lanes {members} of a warp")
    x, by, clamp = machine.source(a, "u32"), machine.source(b, "u32"), int(c, 0)
    lane = machine.special["%laneid"].astype(np.int64)
    segment = clamp >> 8 & 31
    lowest, highest = lane & segment, lane & segment | clamp & 31 & ~segment
    names = to.split("|")

    def run(active: Active) -> None:
        machine.whole_warps(active, "a shuffle")
        step = by.astype(np.int64) & 31
        other = {
            "bfly": lane ^ step,
            "idx": lowest | step & ~segment,
            "up": lane - step,
            "down": lane + step,
        }[mode]
        there = other >= highest if mode == "up" else other <= highest
        other = np.where(there, other, lane) + np.arange(len(lane)) - lane
        machine.write(names[0], np.broadcast_to(x, lane.shape)[other], active)
        for name in names[1:]:
            machine.write(name, there, active)

    return run


# Memory (9.7.9.8 to 9.7.9.11)


def load_parameter(machine: Machine, ins: Instruction) -> Run:
    """ld.param, extended to the register's width if it is narrower."""
    check(ins, {"param"}, {*BITS, *INTEGERS, "f32", "f64"})
    to, name = ins.operands
    value = machine.parameters[name.strip("[]")]
    kind = dtype_of(ins.words[-1])
    if kind.itemsize != value.dtype.itemsize:
        raise Fault(f"{8 * kind.itemsize} bits of a parameter of {8 * value.dtype.itemsize}")
    return lambda active: machine.write(to, value.view(kind), active)


# Of caches, and of orders that hold here anyway
HINTS = {"L1__evict_last", "L1__evict_first", "L1__no_allocate", "L2__cache_hint", "relaxed", "gpu"}


def access(machine: Machine, ins: Instruction) -> Run:
    """ld and st, of up to 16 bytes a lane."""
    if ins.words[1] == "param":
        return load_parameter(machine, ins)
    kinds = {*BITS, *INTEGERS, "b8", "u8", "s8", "f32", "f64"}
    check(ins, {"global", "shared", "shared__cta", "v2", "v4", *HINTS}, kinds)
    loads, kind = ins.words[0] == "ld", ins.words[-1]
    in_global = "global" in ins.words
    if not in_global and not {"shared", "shared__cta"} & set(ins.words):
        raise Fault("an access that names neither global nor shared memory")
    where, what = ins.operands[1::-1] if loads else ins.operands[:2]
    names = register_list(what)
    element = dtype_of(kind).itemsize
    width = element * len(names)
    if width > 16 or len(names) != max([1, *(n for n in (2, 4) if f"v{n}" in ins.words)]):
        raise Fault(f"{len(names)} registers of {element} bytes")
    sources = [] if loads else [machine.source(name, f"b{8 * element}") for name in names]
    to = [machine.register(name) for name in names] if loads else []

    def run(active: Active) -> None:
        lanes = machine.lanes(active)
        addresses = machine.address(where, "u64" if in_global else "u32")[lanes]
        if loads:
            if in_global:
                memory, index = machine.memory.view(addresses, width, "a load")
                found = memory[index]
            else:
                at = machine.shared.locate(machine.block_of[lanes], addresses, width)
                if machine.team:
                    machine.team.load(machine.group, machine.block_of[lanes], at)
                found = machine.shared.load(at, width, machine.warp_bits[lanes])
            found = np.ascontiguousarray(found).view(dtype_of(kind))  # [lanes, names]
            for i, register in enumerate(to):
                part = found[:, i]
                wide = part.dtype.itemsize == register.dtype.itemsize
                register[lanes] = part.view(register.dtype) if wide else part
            return
        values = np.stack([np.broadcast_to(x, machine.block_of.shape)[lanes] for x in sources], 1)
        if in_global:
            memory, index = machine.memory.view(addresses, width, "a store")
            memory[index] = values.view(memory.dtype)
        else:
            at = machine.shared.locate(machine.block_of[lanes], addresses, width)
            machine.shared.store(at, width, machine.warp_bits[lanes], values)

    return run


def copy_async(machine: Machine, ins: Instruction) -> Run:
    """cp.async, 9.7.9.25.3: 4, 8 or 16 bytes, or as many zeros where the source's size is 0."""
    if "bulk" in ins.words:
        return copy_box(machine, ins)
    groups = machine.copies
    if ins.words[1:] == ("async", "commit_group"):
        return lambda active: groups.commit(machine.whole_blocks(active, "cp.async.commit_group"))
    if ins.words[1:] in (("async", "wait_group"), ("async", "wait_all")):
        newest = int(ins.operands[0], 0) if "wait_group" in ins.words else 0

        def wait(active: Active) -> None:
            blocks = machine.whole_blocks(active, "a wait for copies")
            if "wait_all" in ins.words:
                groups.commit(blocks)
            groups.wait(blocks, newest)

        return wait
    spaces = {"async", "ca", "cg", "shared", "shared__cta", "global"}
    check(ins, spaces, {"global", "L2__64B", "L2__128B", "L2__256B"})
    to, source, size, *length = ins.operands
    width = int(size, 0)
    if width not in ((16,) if "cg" in ins.words else (4, 8, 16)) or len(length) > 1:
        raise Fault(f"a copy of {size} bytes with {len(ins.operands)} operands")
    lengths = machine.source(length[0], "u32") if length else np.uint32(width)

    def run(active: Active) -> None:
        lanes = np.arange(len(machine.alive))[machine.lanes(active)]
        at = machine.shared.locate(
            machine.block_of[lanes], machine.address(to, "u32")[lanes], width
        )
        values = np.zeros((len(lanes), width), np.uint8)
        sizes = np.broadcast_to(lengths, machine.block_of.shape)[lanes]
        addresses = machine.address(source, "u64")[lanes]
        if not np.isin(sizes, (0, width)).all():
            raise Fault(f"a copy of {width} bytes from {int(sizes.max())}")
        full = sizes > 0
        if full.any():
            memory, index = machine.memory.view(addresses[full], width, "a copy")
            values[full] = np.ascontiguousarray(memory[index]).view(np.uint8)
        machine.copies.start(Copy(lanes, at, width, values))

    return run


# Synchronisation (9.7.13)


def barrier(machine: Machine, ins: Instruction) -> Run:
    """bar.sync, 9.7.13.1: all threads of a block, or as many as a warpgroup has; bar.warp.sync,
    9.7.13.2: of a warp."""
    if ins.words == ("bar", "warp", "sync") and int(ins.operands[0], 0) & 0xFFFFFFFF == 0xFFFFFFFF:
        return lambda active: machine.whole_warps(active, "bar.warp.sync")
    if machine.team and ins.words == ("bar", "sync") and ins.operands[1:] == ("128",):
        team, group, name = machine.team, machine.group, machine.source(ins.operands[0], "u32")

        def sync(active: Active) -> None:
            blocks = machine.whole_blocks(active, "a barrier")
            lanes = np.broadcast_to(name, machine.block_of.shape).reshape(machine.blocks, -1)
            names = np.unique(lanes[blocks])
            if len(names) != 1:
                raise Fault(f"threads of a warpgroup are at the barriers {names.tolist()}")
            team.sync(int(names[0]), group, blocks)

        return sync
    if ins.words not in (("bar", "sync"), ("barrier", "sync")) or ins.operands != ("0",):
        raise Fault("a barrier that is not of a whole block or warp")
    return lambda active: machine.shared.barrier(machine.whole_blocks(active, "a barrier"))


def fence(machine: Machine, ins: Instruction) -> Run:
    """fence.proxy.async, 9.7.13.4: what was stored to shared memory becomes visible to wgmma."""
    if ins.words not in (("fence", "proxy", "async"), ("fence", "proxy", "async", "shared__cta")):
        raise Fault("a fence that is not known")
    return lambda active: machine.shared.fence(
        machine.whole_blocks(active, "a fence"), machine.group
    )


def registers_of_a_warpgroup(machine: Machine, ins: Instruction) -> Run:
    """setmaxnreg, 9.7.19.5, and cvta, 9.7.9.20, of what lies in one memory anyway."""
    if ins.words[0] == "cvta":
        check(ins, {"param"}, {"u64"})
        value = machine.source(ins.operands[1], "u64")
        return lambda active: machine.write(ins.operands[0], value, active)
    check(ins, {"inc", "dec", "sync", "aligned"}, {"u32"})
    if not 24 <= int(ins.operands[0]) <= 256 or int(ins.operands[0]) % 8:
        raise Fault(f"{ins.operands[0]} registers a thread")
    return lambda active: machine.whole_blocks(active, "setmaxnreg")


def elect(machine: Machine, ins: Instruction) -> Run:
    """elect.sync, 9.7.13.11: one lane of each warp, whichever."""
    if ins.words != ("elect", "sync") or int(ins.operands[1], 0) & 0xFFFFFFFF != 0xFFFFFFFF:
        raise Fault("an election among a part of a warp's lanes")
    lane, elected = ins.operands[0].split("|")
    leader = machine.team.elected if machine.team else 0

    def run(active: Active) -> None:
        machine.whole_warps(active, "an election")
        machine.write(elected, machine.special["%laneid"] == leader, active)
        machine.write(lane, np.full(machine.block_of.shape, leader, np.uint32), active)

    return run


def _of_a_team(machine: Machine) -> Warpgroups:
    if machine.team is None:
        raise Fault("an instruction of blocks that are made of several warpgroups")
    return machine.team


def mbarrier(machine: Machine, ins: Instruction) -> Run:
    """mbarrier.init and .arrive, 9.7.13.15.9 and 13."""
    team, words, memory = _of_a_team(machine), ins.words[1:-2], ins.words[-2:]
    if memory != ("shared__cta", "b64") or words not in (
        ("init",), ("arrive",), ("arrive", "expect_tx"),
    ):  # fmt: skip
        raise Fault("an operation on a barrier that is not known")
    where = next(operand for operand in ins.operands if operand.startswith("["))
    number = machine.source(ins.operands[-1], "u32") if ins.operands[-1] != where else np.uint32(1)
    expects = "expect_tx" in words

    def run(active: Active) -> None:
        lanes = np.arange(len(machine.alive))[machine.lanes(active)]
        blocks, offsets = machine.block_of[lanes], machine.address(where, "u32")[lanes]
        at, bits = machine.shared.locate(blocks, offsets, 8), machine.warp_bits[lanes]
        if words == ("init",):
            machine.shared.store(at, 8, bits, np.zeros((len(lanes), 1), np.uint64))
        else:
            machine.shared.see(at, 8, bits)
        numbers = np.broadcast_to(number, machine.block_of.shape)[lanes]
        for block, offset, n in zip(
            blocks.tolist(), offsets.tolist(), numbers.tolist(), strict=True
        ):
            if words == ("init",):
                team.initialise(block, offset, n)
            else:
                arrivals, expected = (1, n) if expects else (n, 0)
                team.arrive(machine.group, block, offset, arrivals, expected)

    return run


def copy_box(machine: Machine, ins: Instruction) -> Run:
    """cp.async.bulk.tensor, 9.7.9.27.1.2: a box of a tensor to shared memory."""
    team = _of_a_team(machine)
    *words, dimensions, to, source, how = ins.words[1:]
    place = register_list(ins.operands[1].partition("{")[2].rstrip("}] "))
    if (
        words != ["async", "bulk", "tensor"]
        or (to, source, how) != ("shared__cta", "global", "mbarrier__complete_tx__bytes")
        or dimensions != f"{len(place)}d"
        or len(ins.operands) != 3
    ):
        raise Fault("a copy of another kind")
    address = machine.source(ins.operands[1].strip("[ ").partition(",")[0], "u64")
    coordinates = [machine.source(name, "s32") for name in place]

    def run(active: Active) -> None:
        shape = machine.block_of.shape
        to, barriers = (machine.address(ins.operands[i], "u32") for i in (0, 2))
        for lane in np.arange(len(machine.alive))[machine.lanes(active)].tolist():
            block = int(machine.block_of[lane])
            at = machine.shared.locate(np.array([block]), barriers[lane : lane + 1], 8)
            machine.shared.see(at, 8, machine.warp_bits[lane : lane + 1])
            where = [int(np.broadcast_to(x, shape)[lane]) for x in coordinates]
            map_ = int(np.broadcast_to(address, shape)[lane])
            team.issue(machine.group, block, int(to[lane]), map_, where, int(barriers[lane]))

    return run


def gate_of(machine: Machine, ins: Instruction) -> Callable[[np.ndarray], np.ndarray] | None:
    """Of an instruction that may have to wait for another warpgroup: tells of the lanes at it those
    that need not. mbarrier.try_wait, 9.7.13.15.16, in its loop; a barrier of all threads."""
    team = _of_a_team(machine)
    if ins.words[0] in ("bar", "barrier") and ins.words[1:] == ("sync",) and not ins.operands[1:]:

        def gathered(lanes: np.ndarray) -> np.ndarray:
            blocks = machine.whole_blocks(lanes, "a barrier")
            past = np.zeros(machine.blocks, bool)
            past[blocks] = team.gather(machine.group, blocks)
            return np.repeat(past, machine.threads)

        return gathered
    if ins.words[:2] != ("mbarrier", "try_wait"):
        return None
    if ins.words[2:] != ("parity", "shared__cta", "b64") or ins.guard or len(ins.operands) != 3:
        raise Fault("a wait for a barrier that is not known")
    where, parity = ins.operands[1], machine.source(ins.operands[2], "u32")

    def over(lanes: np.ndarray) -> np.ndarray:
        blocks = machine.whole_blocks(lanes, "a wait for a barrier")
        here = np.flatnonzero(lanes)
        offsets = machine.address(where, "u32")
        at = machine.shared.locate(machine.block_of[here], offsets[here], 8)
        machine.shared.see(at, 8, machine.warp_bits[here])
        parities = np.broadcast_to(parity, machine.block_of.shape).reshape(machine.blocks, -1)
        offsets = offsets.reshape(machine.blocks, -1)
        past = np.zeros(machine.blocks, bool)
        for block in blocks.tolist():
            if np.ptp(offsets[block]) or np.ptp(parities[block]):
                raise Fault("threads of a warpgroup wait for different phases")
            waited = int(offsets[block, 0]), int(parities[block, 0]) & 1
            past[block] = team.over(machine.group, block, *waited)
        return np.repeat(past, machine.threads)

    return over


# Matrices of a warp (9.7.14) and of a warpgroup (9.7.15)


def matrices(machine: Machine, ins: Instruction) -> Run:
    """ldmatrix, 9.7.14.5.15, and stmatrix, 9.7.14.5.16: 8 x 8 matrices of 16 bits.

    Lanes 8 j to 8 j + 7 have the addresses of matrix j's rows; register j of lane l has columns
    2 (l % 4) and the next of row l / 4, or, transposed, those two rows of column l / 4.
    """
    counts = {"x1": 1, "x2": 2, "x4": 4}
    check(ins, {"sync", "aligned", "m8n8", *counts, "trans", "shared", "shared__cta"}, {"b16"})
    loads, transposed = ins.words[0] == "ldmatrix", "trans" in ins.words
    where, what = ins.operands[1::-1] if loads else ins.operands[:2]
    names = register_list(what)
    if "m8n8" not in ins.words or counts.get(ins.words[4]) != len(names):
        raise Fault(f"{len(names)} registers, or matrices that are not 8 x 8")
    lane = np.arange(32)

    def run(active: Active) -> None:
        warps = machine.whole_warps(active, ins.words[0])  # [W, 32]
        flat = warps.reshape(-1)
        rows = machine.address(where, "u32")
        if (rows[warps[:, : 8 * len(names)]] % 16).any():
            raise Fault("a matrix row that is not aligned to 16 bytes")
        for j, name in enumerate(names):
            register = machine.register(name)
            found = np.zeros(len(flat), np.uint32)
            values = register[flat]
            pieces = [(lane // 4, lane % 4 * 4)]
            if transposed:
                pieces = [(lane % 4 * 2 + i, lane // 4 * 2) for i in range(2)]
            width = 4 // len(pieces)
            for i, (row, column) in enumerate(pieces):
                offsets = (rows[warps[:, 8 * j + row]] + column).reshape(-1)
                at = machine.shared.locate(machine.block_of[flat], offsets, width)
                bits = machine.warp_bits[flat]
                if loads:
                    part = machine.shared.load(at, width, bits)[:, 0].astype(np.uint32)
                    found |= part << np.uint32(16 * i)
                else:
                    part = (values >> np.uint32(16 * i)).astype(UNSIGNED[width])
                    machine.shared.store(at, width, bits, part[:, None])
            if loads:
                register[flat] = found

    return run


def multiply(machine: Machine, ins: Instruction) -> Run:
    """mma.sync m16n8k16, 9.7.14.5.14, with the fragments of 9.7.14.5.8: D = A @ B + C of a warp,
    in fp32."""
    *shape, result, half, other, start = ins.words[1:]
    if (
        shape != ["sync", "aligned", "m16n8k16", "row", "col"]
        or (result, start) != ("f32", "f32")
        or half != other
        or half not in ("f16", "bf16")
    ):
        raise Fault("a matrix product of another kind")
    to, a, b, c = (register_list(operand) for operand in ins.operands)
    if [len(names) for names in (to, a, b, c)] != [4, 4, 2, 4]:
        raise Fault("a fragment that has not 4, 4, 2 and 4 registers")
    fragments = {name: machine.register(name) for name in (*a, *b)}
    starts = [machine.source(name, "f32") for name in c]
    lane = np.arange(32)
    group, pair = lane // 4, lane % 4 * 2  # rows of A and columns of B; two columns, or rows

    def run(active: Active) -> None:
        warps = machine.whole_warps(active, "a matrix product")
        left = np.empty((len(warps), 16, 16), np.float32)
        right = np.empty((len(warps), 16, 8), np.float32)
        for i, name in enumerate(a):
            row, column = group + i % 2 * 8, pair + i // 2 * 8
            left[:, row, column], left[:, row, column + 1] = halves(fragments[name][warps], half)
        for i, name in enumerate(b):
            row = pair + i * 8
            right[:, row, group], right[:, row + 1, group] = halves(fragments[name][warps], half)
        product = left @ right
        lanes = machine.block_of.shape
        before = [np.broadcast_to(start, lanes)[warps].astype(np.float32) for start in starts]
        for i, name in enumerate(to):
            found = product[:, group + i // 2 * 8, pair + i % 2] + before[i]
            machine.register(name)[warps] = found.view(np.uint32)

    return run


def warpgroup(machine: Machine, ins: Instruction) -> Run:
    """wgmma, 9.7.15.5.2 and 9.7.15.7: D = A @ B + scale_d * D, A in shared memory or registers."""
    products = machine.products
    if ins.words == ("wgmma", "fence", "sync", "aligned"):
        return lambda active: products.fence(machine.whole_blocks(active, "wgmma.fence"))
    if ins.words == ("wgmma", "commit_group", "sync", "aligned"):
        return lambda active: products.commit(machine.whole_blocks(active, "wgmma.commit_group"))
    if ins.words == ("wgmma", "wait_group", "sync", "aligned"):
        newest = int(ins.operands[0], 0)
        return lambda active: products.wait(
            machine.whole_blocks(active, "wgmma.wait_group"), newest
        )
    *words, shape, result, half, other = ins.words[1:]
    found = re.fullmatch(r"m64n(\d+)k16", shape)
    if (
        words != ["mma_async", "sync", "aligned"]
        or found is None
        or result != "f32"
        or half != other
        or half not in ("f16", "bf16")
    ):
        raise Fault("a warpgroup's product of another kind")
    columns = int(found[1])
    d, a, b, scale, *flags = ins.operands
    accumulator, from_registers = tuple(register_list(d)), a.startswith("{")
    left_registers = tuple(register_list(a))
    if columns % 8 or not 8 <= columns <= 256 or len(accumulator) != columns // 2:
        raise Fault(f"{len(accumulator)} registers of an accumulator of {columns} columns")
    if flags[:2] != ["1", "1"] or len(flags) != (3 if from_registers else 4):
        raise Fault(f"a product with the flags {flags}")
    if from_registers and len(left_registers) != 4:
        raise Fault(f"{len(left_registers)} registers of A")
    transposed = [flag == "1" for flag in flags[2:]]
    scale_d = machine.source(scale, "pred")

    def uniform(values: np.ndarray, blocks: np.ndarray, what: str) -> np.ndarray:  # [B, G]
        of_lanes = np.broadcast_to(values, machine.block_of.shape).reshape(products.shape)[blocks]
        if (of_lanes != of_lanes[..., :1]).any():
            raise Fault(f"the lanes of a warpgroup differ in {what}")
        return of_lanes[..., 0]

    def run(active: Active) -> None:
        blocks = machine.whole_blocks(active, "a warpgroup's product")
        descriptors = uniform(machine.source(b, "u64"), blocks, "B's descriptor")
        right, granules = products.operand(blocks, descriptors, columns, transposed[-1])
        pieces = [granules]
        left: Any = left_registers
        if not from_registers:
            descriptors = uniform(machine.source(a, "u64"), blocks, "A's descriptor")
            left, granules = products.operand(blocks, descriptors, 64, transposed[0])
            pieces.append(granules)
        keeps = uniform(scale_d, blocks, "scale-d")
        products.start(Product(accumulator, blocks, left, right, pieces, keeps, half))

    return run


OPCODES: dict[str, Callable[[Machine, Instruction], Run]] = {
    **REGISTERS_ONLY,
    "shfl": shuffle,
    "ld": access,
    "st": access,
    "cp": copy_async,
    "bar": barrier,
    "barrier": barrier,
    "fence": fence,
    "setmaxnreg": registers_of_a_warpgroup,
    "cvta": registers_of_a_warpgroup,
    "elect": elect,
    "mbarrier": mbarrier,
    "ldmatrix": matrices,
    "stmatrix": matrices,
    "mma": multiply,
    "wgmma": warpgroup,
}
