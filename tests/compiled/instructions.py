"""What each PTX instruction does, by its opcode.

A handler looks at an instruction once, finds its registers, and returns a call that does it for
the lanes that are at it (bool [lanes]; None for all). Section numbers are those of the PTX manual.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.compiled.asynchronous import Copy, Product, to_float
from tests.compiled.memory import UNSIGNED, Fault
from tests.compiled.ptx import Instruction, dtype_of, register_list

if TYPE_CHECKING:
    from tests.compiled.machine import Machine

Active = np.ndarray | None
Run = Callable[[Active], None]


def _refuse(ins: Instruction, known: set[str]) -> None:
    """Modifiers that no handler knows may change what an instruction does."""
    if unknown := set(ins.words[1:-1]) - known:
        raise Fault(f"an instruction with modifiers that are not known: {sorted(unknown)}")


# Arithmetic, 9.7.1 to 9.7.4, and logic, 9.7.8


def _bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 -> the nearest bf16's bits, ties to even; every NaN becomes 0x7FFF, as cvt.rn does."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = bits + np.uint64(0x7FFF) + (bits >> np.uint64(16) & np.uint64(1)) >> np.uint64(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))


def _from_float(x: np.ndarray, kind: str) -> np.ndarray:
    """float32 -> uint16, the bits of "f16" or "bf16"."""
    return _bfloat16(x) if kind == "bf16" else x.astype(np.float16).view(np.uint16)


def _quotient(x: Any, y: Any) -> Any:
    """Of floats, or of integers towards zero."""
    if x.dtype.kind == "f":
        return x / y
    y = np.where(y == 0, y.dtype.type(1), y)  # division by zero is undefined, not an error
    found = np.floor_divide(np.abs(x), np.abs(y))
    return np.where((x < 0) != (y < 0), -found, found) if x.dtype.kind == "i" else found


def _fused(x: Any, y: Any, z: Any) -> Any:
    """x * y + z, rounded once: the product of two floats is exact in double."""
    if x.dtype == np.float32:
        return (x.astype(np.float64) * y + z).astype(np.float32)
    return x * y + z


def _shift_left(x: Any, by: Any) -> Any:
    bits = 8 * x.dtype.itemsize
    return np.where(by < bits, x << np.minimum(by, bits - 1).astype(x.dtype), x.dtype.type(0))


def _shift_right(x: Any, by: Any) -> Any:
    bits = 8 * x.dtype.itemsize
    found = x >> np.minimum(by, bits - 1).astype(x.dtype)
    return found if x.dtype.kind == "i" else np.where(by < bits, found, x.dtype.type(0))


def _in_double(function: Callable) -> Callable:
    return lambda x: function(x.astype(np.float64)).astype(x.dtype)


def _flush(x: Any) -> Any:
    """Subnormals to zero."""
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, x.dtype.type(0), x)


FUNCTIONS: dict[str, Callable] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "mad": _fused,
    "fma": _fused,
    "div": _quotient,
    "rem": lambda x, y: x - _quotient(x, y) * y,
    "neg": np.negative,
    "abs": np.abs,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "shl": _shift_left,
    "shr": _shift_right,
    "ex2": _in_double(np.exp2),
    "lg2": _in_double(np.log2),
    "rcp": _in_double(np.reciprocal),
    "sqrt": np.sqrt,
    "rsqrt": _in_double(lambda x: 1 / np.sqrt(x)),
}


def _function(ins: Instruction) -> Callable:
    """Of an opcode and its modifiers."""
    op, kind, modifiers = ins.words[0], ins.words[-1], set(ins.words[1:-1])
    _refuse(ins, {"rn", "ftz", "lo", "hi", "wide", "full", "approx", "NaN"})
    if op in ("min", "max"):
        if kind.lstrip("bus").isdigit() or "NaN" in modifiers:
            return np.minimum if op == "min" else np.maximum
        return np.fmin if op == "min" else np.fmax  # the other one, where one is NaN
    if modifiers & {"wide", "hi"}:
        return _long_product(kind, "hi" in modifiers)
    function = FUNCTIONS[op]
    if "ftz" not in modifiers:
        return function
    return lambda *x: _flush(function(*map(_flush, x)))


def _long_product(kind: str, high: bool) -> Callable:
    """mul or mad whose product has twice the bits; or the upper half of it."""
    bits = int(kind[1:])
    if bits > 32:
        raise Fault("a product of 64-bit integers in twice the bits")
    wide = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{bits // 4}")

    def product(x: Any, y: Any, z: Any = 0) -> Any:
        full = x.astype(wide) * y.astype(wide)
        return (full >> wide.type(bits)).astype(x.dtype) + x.dtype.type(z) if high else full + z

    return product


def arithmetic(machine: Machine, ins: Instruction) -> Run:
    """d = op(a, b, c), all of one type, but for a shift's count and a long product's sum."""
    op, kind, (to, *operands) = ins.words[0], ins.words[-1], ins.operands
    if kind in ("bf16", "bf16x2", "f16x2"):
        return _packed(machine, ins)
    function = _function(ins)
    kinds = [kind] * 3
    if op in ("shl", "shr"):
        kinds[1] = "u32"
    if op == "mad" and "wide" in ins.words:
        kinds[2] = f"{kind[0]}{2 * int(kind[1:])}"
    x = [machine.source(operand, k) for operand, k in zip(operands, kinds, strict=False)]
    if isinstance(function, np.ufunc) and to != "_":
        out = machine.source(to, kind)  # in place: half the time of a copy
        return lambda active: function(*x, out=out, where=True if active is None else active)
    return lambda active: machine.write(to, function(*x), active)


def _packed(machine: Machine, ins: Instruction) -> Run:
    """One or two halves of a register, computed in fp32 and rounded."""
    half = ins.words[-1].removesuffix("x2")
    function = _function(ins)
    to, *operands = ins.operands
    count = 2 if ins.words[-1].endswith("x2") else 1
    x = [machine.source(operand, f"b{16 * count}") for operand in operands]

    def run(active: Active) -> None:
        found = np.uint32(0)
        for i in range(count):
            parts = [to_float((v >> v.dtype.type(16 * i)).astype(np.uint16), half) for v in x]
            found = found | _from_float(function(*parts), half).astype(np.uint32) << 16 * i
        machine.write(to, found.astype(UNSIGNED[2 * count]), active)

    return run


def bit_field(machine: Machine, ins: Instruction) -> Run:
    """bfe, 9.7.1.20: `length` bits of a from `position` on, extended by their sign if signed."""
    to, a, position, length = ins.operands
    signed = ins.words[-1] == "s32"
    if ins.words[-1] not in ("u32", "s32"):
        raise Fault("a bit field of 64 bits")
    x = machine.source(a, "u32")
    at, count = int(position, 0), int(length, 0)
    if at + count > 32:
        raise Fault(f"a bit field of {count} bits from {at} on")

    def run(active: Active) -> None:
        field = x << np.uint32(32 - at - count)
        field = field.view(np.int32) if signed else field
        machine.write(to, field >> field.dtype.type(32 - count), active)

    return run


def permute(machine: Machine, ins: Instruction) -> Run:
    """prmt, 9.7.9.7: each byte of d is one of the eight of (a, b), or eight copies of its sign."""
    to, *operands = ins.operands
    a, b, selector = (machine.source(operand, "u32") for operand in operands)

    def run(active: Active) -> None:
        both = np.asarray(a).astype(np.uint64) | np.asarray(b).astype(np.uint64) << np.uint64(32)
        found = np.uint32(0)
        for i in range(4):
            pick = np.asarray(selector).astype(np.uint64) >> np.uint64(4 * i) & np.uint64(15)
            byte = both >> (pick & np.uint64(7)) * np.uint64(8) & np.uint64(0xFF)
            sign = np.where(byte >> np.uint64(7), np.uint64(0xFF), np.uint64(0))
            byte = np.where(pick & np.uint64(8), sign, byte)
            found = found | byte.astype(np.uint32) << np.uint32(8 * i)
        machine.write(to, found, active)

    return run


def logic3(machine: Machine, ins: Instruction) -> Run:
    """lop3, 9.7.8.6: bit 4a + 2b + c of the immediate, for each bit of a, b and c."""
    to, *operands, table = ins.operands
    a, b, c = (machine.source(operand, "u32") for operand in operands)
    rows = [i for i in range(8) if int(table, 0) >> i & 1]

    def run(active: Active) -> None:
        found = a & np.uint32(0)
        for i in rows:
            found = found | (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        machine.write(to, found, active)

    return run


# Comparison and selection, 9.7.6


def _not_nan(x: Any, y: Any) -> Any:
    return (x == x) & (y == y)


COMPARISONS: dict[str, Callable] = {
    "eq": operator.eq,
    "ne": lambda x, y: (x != y) & _not_nan(x, y),
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "num": _not_nan,
    "nan": lambda x, y: ~_not_nan(x, y),
}
COMPARISONS |= {  # true as well where one is NaN
    f"{name}u": lambda x, y, f=COMPARISONS[name]: f(x, y) | ~_not_nan(x, y)
    for name in ("eq", "ne", "lt", "le", "gt", "ge")
}


def set_predicate(machine: Machine, ins: Instruction) -> Run:
    """setp: a predicate and maybe its opposite; of packed halves, one each."""
    _refuse(ins, {*COMPARISONS, "ftz", "and", "or", "xor"})
    compare, kind, (to, a, b, *more) = COMPARISONS[ins.words[1]], ins.words[-1], ins.operands
    names = to.split("|")
    if kind in ("bf16", "bf16x2", "f16x2", "f16"):
        bits = "b32" if kind.endswith("x2") else "b16"
        x, y = (machine.source(operand, bits) for operand in (a, b))
        half = kind.removesuffix("x2")

        def run_packed(active: Active) -> None:
            parts = [
                [to_float((v >> v.dtype.type(16 * i)).astype(np.uint16), half) for v in (x, y)]
                for i in range(len(names))
            ]
            for name, pair in zip(names, parts, strict=True):
                machine.write(name, compare(*pair), active)

        return run_packed
    x, y = (machine.source(operand, kind) for operand in (a, b))
    combine = FUNCTIONS[ins.words[2]] if more else None

    def run(active: Active) -> None:
        found = compare(x, y)
        results = [found, ~found][: len(names)]
        if combine is not None:
            results = [combine(result, machine.source(more[0], "pred")) for result in results]
        for name, result in zip(names, results, strict=True):
            machine.write(name, result, active)

    return run


def select(machine: Machine, ins: Instruction) -> Run:
    """selp: a where the predicate holds, else b."""
    to, a, b, predicate = ins.operands
    x, y = (machine.source(operand, ins.words[-1]) for operand in (a, b))
    holds = machine.source(predicate, "pred")
    return lambda active: machine.write(to, np.where(holds, x, y), active)


# Moves and conversions, 9.7.9


def move(machine: Machine, ins: Instruction) -> Run:
    """mov, of a register or between one and the pieces that make it up."""
    kind, (to, a) = ins.words[-1], ins.operands
    if to.startswith("{"):
        names = register_list(to)
        x = machine.source(a, kind)
        bits = 8 * x.dtype.itemsize // len(names)

        def unpack(active: Active) -> None:
            for i, name in enumerate(names):
                piece = x >> x.dtype.type(bits * i)
                machine.write(name, piece.astype(UNSIGNED[bits // 8]), active)

        return unpack
    if a.startswith("{"):
        whole = machine.source(to, kind).dtype
        bits = 8 * whole.itemsize // len(register_list(a))
        pieces = [machine.source(name, f"b{bits}") for name in register_list(a)]

        def pack(active: Active) -> None:
            found = whole.type(0)
            for i, piece in enumerate(pieces):
                found = found | np.asarray(piece).astype(whole) << whole.type(bits * i)
            machine.write(to, found, active)

        return pack
    x = machine.source(a, kind)
    return lambda active: machine.write(to, x, active)


def convert(machine: Machine, ins: Instruction) -> Run:
    """cvt.d.a, 9.7.9.22: to the nearest, towards zero (rzi), or by dropping and extending bits."""
    _refuse(ins, {"rn", "rz", "rzi", "rni", "rmi", "rpi", "ftz", ins.words[-2]})
    to_kind, kind, (to, *operands) = ins.words[-2], ins.words[-1], ins.operands
    rounding = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
    rounds = next((rounding[word] for word in ins.words if word in rounding), None)
    if "rz" in ins.words:
        raise Fault("a conversion that rounds towards zero")
    x = [machine.source(operand, kind) for operand in operands]

    def run(active: Active) -> None:
        if to_kind.endswith("x2"):  # the first operand is the upper half
            high, low = (_from_float(v, to_kind.removesuffix("x2")) for v in x)
            machine.write(to, high.astype(np.uint32) << 16 | low, active)
            return
        value = to_float(x[0], "bf16") if kind == "bf16" else x[0]
        if rounds is not None:
            value = rounds(value)
        if to_kind in ("bf16", "f16"):
            machine.write(to, _from_float(value.astype(np.float32), to_kind), active)
            return
        machine.write(to, np.asarray(value).astype(dtype_of(to_kind)), active)

    return run


def shuffle(machine: Machine, ins: Instruction) -> Run:
    """shfl.sync, 9.7.9.6: a register of another lane of the warp, where there is such a lane."""
    mode, (to, a, b, c, _) = ins.words[2], ins.operands
    x, by, clamp = machine.source(a, "u32"), machine.source(b, "u32"), int(c, 0)
    lane = machine.special["%laneid"].astype(np.int64)
    segment = clamp >> 8 & 31
    lowest, highest = lane & segment, lane & segment | clamp & 31 & ~segment
    names = to.split("|")

    def run(active: Active) -> None:
        machine.whole_warps(active, "a shuffle")
        step = np.asarray(by).astype(np.int64)
        other = {
            "bfly": lane ^ step,
            "idx": lowest | step & 31 & ~segment,
            "up": lane - step,
            "down": lane + step,
        }[mode]
        there = other >= highest if mode == "up" else other <= highest
        other = np.where(there, other, lane) + np.arange(len(lane)) - lane
        machine.write(names[0], x[other], active)
        for name in names[1:]:
            machine.write(name, there, active)

    return run


# Memory, 9.7.9.8 to 9.7.9.12


def load_parameter(machine: Machine, ins: Instruction) -> Run:
    to, name = ins.operands
    value = machine.parameters[name.strip("[]")]
    bits = value.view(UNSIGNED[value.dtype.itemsize])[()]
    return lambda active: machine.write(to, bits, active)


HINTS = {"L1__evict_last", "L1__evict_first", "L1__no_allocate", "L2__cache_hint", "relaxed", "gpu"}


def access(machine: Machine, ins: Instruction) -> Run:
    """ld and st, of up to 16 bytes a lane."""
    if ins.words[1] == "param":
        return load_parameter(machine, ins)
    loads, space, kind = ins.words[0] == "ld", ins.words[1].removesuffix("__cta"), ins.words[-1]
    _refuse(ins, {"global", "shared", "shared__cta", "v2", "v4", *HINTS})
    if space not in ("global", "shared"):
        raise Fault(f"an access to .{space}")
    where, what = ins.operands[1::-1] if loads else ins.operands[:2]
    names = register_list(what)
    element = dtype_of(kind).itemsize
    width = element * len(names)
    sources = [] if loads else [machine.source(name, f"b{8 * element}") for name in names]

    def run(active: Active) -> None:
        lanes = machine.lanes(active)
        addresses = machine.address(where, "u64" if space == "global" else "u32")[lanes]
        if loads:
            if space == "global":
                memory, index = machine.memory.view(addresses, width, "a load")
                found = memory[index]
            else:
                at = machine.shared.locate(machine.block_of[lanes], addresses, width)
                found = machine.shared.load(at, width, machine.warp_bits[lanes])
            found = np.ascontiguousarray(found).view(UNSIGNED[element])  # [lanes, names]
            for i, name in enumerate(names):
                machine.register(name)[lanes] = found[:, i]
            return
        values = np.stack([np.broadcast_to(x, machine.block_of.shape)[lanes] for x in sources], 1)
        if space == "global":
            memory, index = machine.memory.view(addresses, width, "a store")
            memory[index] = values.view(memory.dtype)
        else:
            at = machine.shared.locate(machine.block_of[lanes], addresses, width)
            machine.shared.store(at, width, machine.warp_bits[lanes], values)

    return run


def copy_async(machine: Machine, ins: Instruction) -> Run:
    """cp.async, 9.7.9.25.3: 4, 8 or 16 bytes; those behind the source's size are zeros."""
    if ins.words[2] == "commit_group":
        return lambda active: machine.copies.commit(machine.whole_blocks(active, "cp.async.commit"))
    if ins.words[2] in ("wait_group", "wait_all"):
        newest = int(ins.operands[0]) if ins.operands else 0
        return lambda active: machine.copies.wait(
            machine.whole_blocks(active, "cp.async.wait"), newest
        )
    _refuse(ins, {"async", "ca", "cg", "shared", "shared__cta", "L2__128B", "L2__cache_hint"})
    to, source, size, *length = ins.operands
    width = int(size, 0)
    lengths = machine.source(length[0], "u32") if length else np.uint32(width)

    def run(active: Active) -> None:
        lanes = machine.lanes(active)
        lanes = np.arange(len(machine.alive))[lanes]
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


# Synchronisation, 9.7.13


def barrier(machine: Machine, ins: Instruction) -> Run:
    """bar.sync 0: all threads of a block; bar.warp.sync: of a warp."""
    if "warp" in ins.words:
        return lambda active: machine.whole_warps(active, "bar.warp.sync") is None
    if ins.operands != ("0",):
        raise Fault("a barrier of a part of a block")
    return lambda active: machine.shared.barrier(machine.whole_blocks(active, "a barrier"))


def fence(machine: Machine, ins: Instruction) -> Run:
    """fence.proxy.async, 9.7.13.4: what was stored becomes visible to wgmma; others order nothing
    here, where every store is seen at once."""
    if ins.words[1:3] == ("proxy", "async"):
        return lambda active: machine.shared.fence(machine.whole_blocks(active, "a fence"))
    return lambda active: None


# Matrices, 9.7.14 and 9.7.15


def matrices(machine: Machine, ins: Instruction) -> Run:
    """ldmatrix and stmatrix, 9.7.14.5.15: 8 x 8 matrices of 16 bits.

    Lanes 8 j to 8 j + 7 have the addresses of matrix j's rows; register j of lane l has columns
    2 (l % 4) and the next of row l / 4, or, transposed, those two rows of column l / 4.
    """
    _refuse(
        ins, {"sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared__cta"}
    )
    loads, transposed = ins.words[0] == "ldmatrix", "trans" in ins.words
    where, what = ins.operands[1::-1] if loads else ins.operands[:2]
    names = register_list(what)
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
    """mma.sync m16n8k16, 9.7.14.5.8: D = A @ B + C of a warp, in fp32."""
    if ins.words[3:6] != ("m16n8k16", "row", "col") or ins.words[6] != "f32":
        raise Fault("a matrix product of another shape")
    half = ins.words[7]
    to, a, b, c = (register_list(operand) for operand in ins.operands)
    lane = np.arange(32)
    group, pair = lane // 4, lane % 4 * 2  # rows of A and columns of B; two columns, or rows

    def halves(name: str, warps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        bits = machine.register(name)[warps]  # [W, 32]
        low, high = (bits & 0xFFFF).astype(np.uint16), (bits >> 16).astype(np.uint16)
        return to_float(low, half), to_float(high, half)

    def run(active: Active) -> None:
        warps = machine.whole_warps(active, "a matrix product")
        left = np.empty((len(warps), 16, 16), np.float32)
        right = np.empty((len(warps), 16, 8), np.float32)
        for i, name in enumerate(a):
            row, column = group + i % 2 * 8, pair + i // 2 * 8
            left[:, row, column], left[:, row, column + 1] = halves(name, warps)
        for i, name in enumerate(b):
            row = pair + i * 8
            right[:, row, group], right[:, row + 1, group] = halves(name, warps)
        product = left @ right
        for i, (name, start) in enumerate(zip(to, c, strict=True)):
            found = product[:, group + i // 2 * 8, pair + i % 2]
            before = np.broadcast_to(machine.source(start, "f32"), machine.block_of.shape)[warps]
            machine.register(name)[warps] = (found + before).view(np.uint32)

    return run


def warpgroup(machine: Machine, ins: Instruction) -> Run:
    """wgmma, 9.7.15.5: D = A @ B + scale_d * D, from shared memory or with A in registers."""
    what = ins.words[1]
    if what == "fence":  # orders registers, which are at rest here between a wait and a product
        return lambda active: None
    if what in ("commit_group", "wait_group"):
        newest = int(ins.operands[0]) if ins.operands else 0

        def group(active: Active) -> None:
            blocks = machine.whole_blocks(active, f"wgmma.{what}")
            if what == "wait_group":
                machine.products.wait(blocks, newest)
            else:
                machine.products.commit(blocks)

        return group
    shape, result, half, *_ = ins.words[4:]
    d, a, b, scale, *flags = ins.operands
    columns = int(shape.removeprefix("m64n").removesuffix("k16"))
    if result != "f32" or not shape.endswith("k16") or flags[:2] != ["1", "1"]:
        raise Fault("a warpgroup's product of another kind")
    accumulator = tuple(register_list(d))
    from_registers = a.startswith("{")
    transposed = [flag == "1" for flag in flags[2:]]
    products = machine.products

    def descriptors(name: str, blocks: np.ndarray) -> np.ndarray:  # [B, G]
        return machine.source(name, "u64").reshape(products.shape)[blocks, :, 0]

    def run(active: Active) -> None:
        blocks = machine.whole_blocks(active, "a warpgroup's product")
        right, granules = products.operand(
            blocks, descriptors(b, blocks), columns, transposed[-1]
        )
        pieces = [granules]
        left: Any = tuple(register_list(a))
        if not from_registers:
            left, granules = products.operand(blocks, descriptors(a, blocks), 64, transposed[0])
            pieces.append(granules)
        keeps = np.broadcast_to(machine.source(scale, "pred"), machine.block_of.shape)
        keeps = keeps.reshape(products.shape)[blocks, :, 0]
        products.start(Product(accumulator, blocks, left, right, pieces, keeps, half))

    return run


REGISTERS_ONLY: dict[str, Callable[[Machine, Instruction], Run]] = {
    **dict.fromkeys((*FUNCTIONS, "min", "max"), arithmetic),
    "bfe": bit_field,
    "prmt": permute,
    "lop3": logic3,
    "setp": set_predicate,
    "selp": select,
    "mov": move,
    "cvt": convert,
}
OPCODES: dict[str, Callable[[Machine, Instruction], Run]] = {
    **REGISTERS_ONLY,
    "shfl": shuffle,
    "ld": access,
    "st": access,
    "cp": copy_async,
    "bar": barrier,
    "barrier": barrier,
    "fence": fence,
    "membar": fence,
    "ldmatrix": matrices,
    "stmatrix": matrices,
    "mma": multiply,
    "wgmma": warpgroup,
}
