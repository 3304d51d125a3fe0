"""PTX instructions that read and write a lane's own registers: arithmetic, logic, comparisons,
selection, moves and conversions. `instructions.py` has the others, and how handlers are written.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tests.compiled.asynchronous import to_float
from tests.compiled.memory import UNSIGNED, Fault
from tests.compiled.ptx import Instruction, dtype_of, register_list

if TYPE_CHECKING:
    from tests.compiled.machine import Machine

Active = np.ndarray | None
Run = Callable[[Active], object]

BITS = {"b16", "b32", "b64"}
INTEGERS = {"u16", "u32", "u64", "s16", "s32", "s64"}
HALVES = {"f16", "f16x2", "bf16", "bf16x2"}
PAIRS = {"u16x2", "s16x2"}


def check(ins: Instruction, modifiers: Collection[str], kinds: Collection[str]) -> None:
    """Anything else in the opcode may change what the instruction does."""
    *given, kind = ins.words[1:]
    if unknown := [word for word in given if word not in modifiers]:
        raise Fault(f"modifiers that are not known: {', '.join(unknown)}")
    if kind not in kinds:
        raise Fault(f"a type that is not known here: {kind}")


# Integer (9.7.1), float (9.7.3) and half precision arithmetic (9.7.4), logic and shifts (9.7.8)


def _bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 -> the nearest bf16's bits, ties to even."""
    bits = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64)
    rounded = bits + np.uint64(0x7FFF) + (bits >> np.uint64(16) & np.uint64(1)) >> np.uint64(16)
    return rounded.astype(np.uint16).reshape(np.shape(x))


def _from_float(x: np.ndarray, half: str) -> np.ndarray:
    """float32 -> uint16, the bits of "f16" or "bf16"; every NaN becomes 0x7FFF, as in cvt.rn."""
    found = _bfloat16(x) if half == "bf16" else x.astype(np.float16).view(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), found)


def _quotient(x: Any, y: Any) -> Any:
    """Of floats, or of integers towards zero."""
    if x.dtype.kind == "f":
        return x / y
    y = np.where(y == 0, y.dtype.type(1), y)  # division by zero is undefined, not an error
    floor = x // y
    return floor + ((floor * y != x) & ((x < 0) != (y < 0)))


def _fused(x: Any, y: Any, z: Any) -> Any:
    """x * y + z. In double the product of two floats is exact; only the sum's second rounding can
    differ from the one rounding of a GPU, by a unit in the last place of about one in 2**29."""
    if x.dtype == np.float32:
        return (x.astype(np.float64) * y + z).astype(np.float32)
    return x * y + z


def _shift_left(x: Any, by: Any) -> Any:
    """Unlike numpy's and C's, by the register's width or more too, to zero."""
    bits = 8 * x.dtype.itemsize
    return np.where(by < bits, x << np.minimum(by, bits - 1).astype(x.dtype), x.dtype.type(0))


def _shift_right(x: Any, by: Any) -> Any:
    """Unlike numpy's and C's, by the register's width or more too, to zero or the sign."""
    bits = 8 * x.dtype.itemsize
    found = x >> np.minimum(by, bits - 1).astype(x.dtype)
    return found if x.dtype.kind == "i" else np.where(by < bits, found, x.dtype.type(0))


def _in_double(function: Callable) -> Callable:
    return lambda x: function(x.astype(np.float64)).astype(x.dtype)


def _flush(x: Any) -> Any:
    """Subnormals to zero of the same sign."""
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(x.dtype.type(0), x), x)


class Operation(NamedTuple):
    """An instruction that computes each lane's result from its operands, all of one type."""

    function: Callable
    operands: int
    modifiers: Collection[str]
    kinds: Collection[str]


ROUNDED = ("rn", "ftz")
APPROXIMATE = ("approx", "ftz")  # computed better than asked
LOGIC = {*BITS, "pred"}
OPERATIONS = {
    "add": Operation(np.add, 2, ROUNDED, {*INTEGERS, *PAIRS, *HALVES, "f32", "f64"}),
    "sub": Operation(np.subtract, 2, ROUNDED, {*INTEGERS, *HALVES, "f32", "f64"}),
    "mul": Operation(np.multiply, 2, (*ROUNDED, "lo", "hi", "wide"), {*INTEGERS, *HALVES, "f32"}),
    "mad": Operation(_fused, 3, ("lo", "hi", "wide"), INTEGERS),
    "fma": Operation(_fused, 3, ROUNDED, {*HALVES, "f32"}),
    "div": Operation(_quotient, 2, (*ROUNDED, "full", "approx"), {*INTEGERS, "f32"}),
    "rem": Operation(lambda x, y: x - _quotient(x, y) * y, 2, (), INTEGERS),
    "min": Operation(np.fmin, 2, ("ftz", "NaN"), {*INTEGERS, *PAIRS, *HALVES, "f32"}),
    "max": Operation(np.fmax, 2, ("ftz", "NaN"), {*INTEGERS, *PAIRS, *HALVES, "f32"}),
    "neg": Operation(np.negative, 1, ("ftz",), {"s16", "s32", "s64", *HALVES, "f32"}),
    "abs": Operation(np.abs, 1, ("ftz",), {"s16", "s32", "s64", *HALVES, "f32"}),
    "and": Operation(np.bitwise_and, 2, (), LOGIC),
    "or": Operation(np.bitwise_or, 2, (), LOGIC),
    "xor": Operation(np.bitwise_xor, 2, (), LOGIC),
    "not": Operation(np.invert, 1, (), LOGIC),
    "shl": Operation(_shift_left, 2, (), BITS),
    "shr": Operation(_shift_right, 2, (), {*BITS, *INTEGERS}),
    "ex2": Operation(_in_double(np.exp2), 1, APPROXIMATE, {*HALVES, "f32"}),
    "lg2": Operation(_in_double(np.log2), 1, APPROXIMATE, {"f32"}),
    "rcp": Operation(_in_double(np.reciprocal), 1, ("rn", *APPROXIMATE), {"f32"}),
    "sqrt": Operation(np.sqrt, 1, ("rn", *APPROXIMATE), {"f32"}),
    "rsqrt": Operation(_in_double(lambda x: 1 / np.sqrt(x)), 1, APPROXIMATE, {"f32"}),
}


def _function(ins: Instruction) -> Callable:
    """Of numpy arrays, for an opcode and its modifiers."""
    operation, kind, modifiers = OPERATIONS[ins.words[0]], ins.words[-1], set(ins.words[1:-1])
    check(ins, operation.modifiers, operation.kinds)
    if len(ins.operands) != 1 + operation.operands:
        raise Fault(f"{len(ins.operands)} operands, expected {1 + operation.operands}")
    function = operation.function
    if modifiers & {"wide", "hi"}:
        function = _long_product(kind, "hi" in modifiers)
    if (
        kind in INTEGERS | PAIRS or "NaN" in modifiers
    ):  # np.fmin and fmax take the other, where one is NaN
        function = {"min": np.minimum, "max": np.maximum}.get(ins.words[0], function)
    if "ftz" not in modifiers:
        return function
    if kind.startswith("f16"):
        raise Fault("a flush of subnormal f16 numbers")
    return lambda *x: _flush(function(*map(_flush, x)))


def _long_product(kind: str, high: bool) -> Callable:
    """mul or mad whose product has twice the bits; or the upper half of it."""
    bits = int(kind[1:])
    if bits == 64 and not high:
        raise Fault("a product of 64-bit integers in twice the bits")
    wide = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{bits // 4}" if bits < 64 else object)

    def product(x: Any, y: Any, z: Any = 0) -> Any:
        full = x.astype(wide) * y.astype(wide)
        return (full >> bits).astype(x.dtype) + z if high else full + z

    return product


def arithmetic(machine: Machine, ins: Instruction) -> Run:
    """d = op(a, b, c), all of one type, but for a shift's count and a long product's sum."""
    op, kind, (to, *operands) = ins.words[0], ins.words[-1], ins.operands
    if kind in HALVES:
        return _packed(machine, ins)
    if kind in PAIRS:
        return _paired(machine, ins)
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


def halves(bits: Any, half: str) -> list[np.ndarray]:
    """float32, the one or two halves of 16 or 32 bits; the lower first."""
    shifts = range(0, 8 * bits.dtype.itemsize, 16)
    return [to_float((bits >> bits.dtype.type(by)).astype(np.uint16), half) for by in shifts]


def _pack(parts: list[np.ndarray], half: str) -> np.ndarray:
    """Rounded, and the first the lower 16 bits."""
    bits = [_from_float(x, half) for x in parts]
    return bits[0] if len(bits) == 1 else bits[0] | bits[1].astype(np.uint32) << np.uint32(16)


def _packed(machine: Machine, ins: Instruction) -> Run:
    """One or two halves of a register, computed in fp32 and rounded."""
    half, bits = ins.words[-1].removesuffix("x2"), f"b{32 if ins.words[-1].endswith('x2') else 16}"
    function = _function(ins)
    to, *operands = ins.operands
    x = [machine.source(operand, bits) for operand in operands]

    def run(active: Active) -> None:
        parts = zip(*(halves(v, half) for v in x), strict=True)
        machine.write(to, _pack([function(*part) for part in parts], half), active)

    return run


def _paired(machine: Machine, ins: Instruction) -> Run:
    """Two 16-bit integers of a register, neither of which carries into the other."""
    function, dtype = _function(ins), dtype_of(ins.words[-1].removesuffix("x2"))
    to, *operands = ins.operands
    x = [machine.source(operand, "b32") for operand in operands]

    def run(active: Active) -> None:
        low, high = (
            function(*((v >> np.uint32(by)).astype(np.uint16).view(dtype) for v in x))
            .view(np.uint16)
            .astype(np.uint32)
            for by in (0, 16)
        )
        machine.write(to, low | high << np.uint32(16), active)

    return run


def bit_field(machine: Machine, ins: Instruction) -> Run:
    """bfe, 9.7.1.19: `length` bits of a from `position` on, extended by the field's sign."""
    kind, (to, a, *field) = ins.words[-1], ins.operands
    check(ins, (), {"u32", "s32", "u64", "s64"})
    x, bits = machine.source(a, kind), int(kind[1:])
    position, length = (machine.source(operand, "u32") for operand in field)

    def run(active: Active) -> None:
        rest = np.maximum(bits - (length & np.uint32(0xFF)).astype(np.int64), 0)
        found = _shift_right(x, position & np.uint32(0xFF))
        machine.write(to, _shift_right(_shift_left(found, rest), rest), active)

    return run


def permute(machine: Machine, ins: Instruction) -> Run:
    """prmt, 9.7.9.7: each byte of d is one of the eight of (a, b), or eight copies of its sign."""
    check(ins, (), {"b32"})
    to, *operands = ins.operands
    a, b, selector = (machine.source(operand, "u32") for operand in operands)

    def run(active: Active) -> None:
        both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
        found: Any = np.uint32(0)
        for i in range(4):
            pick = selector.astype(np.uint64) >> np.uint64(4 * i) & np.uint64(15)
            byte = both >> (pick & np.uint64(7)) * np.uint64(8) & np.uint64(0xFF)
            sign = np.where(byte >> np.uint64(7), np.uint64(0xFF), np.uint64(0))
            byte = np.where(pick & np.uint64(8), sign, byte)
            found = found | byte.astype(np.uint32) << np.uint32(8 * i)
        machine.write(to, found, active)

    return run


def logic3(machine: Machine, ins: Instruction) -> Run:
    """lop3, 9.7.8.6: bit 4a + 2b + c of the immediate, for each bit of a, b and c."""
    check(ins, (), {"b32"})
    to, *operands, table = ins.operands
    a, b, c = (machine.source(operand, "u32") for operand in operands)
    rows = [i for i in range(8) if int(table, 0) >> i & 1]

    def run(active: Active) -> None:
        found = a & np.uint32(0)
        for i in rows:
            found = found | (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        machine.write(to, found, active)

    return run


# Comparison and selection (9.7.6 and 9.7.7)


def _not_nan(x: Any, y: Any) -> Any:
    return (x == x) & (y == y)


def _or_nan(compare: Callable) -> Callable:
    return lambda x, y: compare(x, y) | ~_not_nan(x, y)


COMPARISONS: dict[str, Callable] = {
    "eq": operator.eq,
    "ne": lambda x, y: (x < y) | (x > y),  # false where one is NaN
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
OF_FLOATS = {"num": _not_nan, "nan": lambda x, y: ~_not_nan(x, y), **COMPARISONS}
OF_FLOATS |= {f"{name}u": _or_nan(compare) for name, compare in COMPARISONS.items()}
OF_INTEGERS = COMPARISONS | {"ne": operator.ne}
OF_UNSIGNED = OF_INTEGERS | {
    "lo": operator.lt,
    "ls": operator.le,
    "hi": operator.gt,
    "hs": operator.ge,
}
BOOLEAN = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}


def set_predicate(machine: Machine, ins: Instruction) -> Run:
    """setp, 9.7.6.2: a predicate and maybe its opposite; of two halves (9.7.7.2), one each. Each
    may be combined with another predicate."""
    (to, a, b, *more), compares, kind = ins.operands, ins.words[1], ins.words[-1]
    comparisons = {"f": OF_FLOATS, "u": OF_UNSIGNED}.get(kind.removeprefix("b")[0], OF_INTEGERS)
    check(ins, {*comparisons, *BOOLEAN, "ftz"}, {*BITS, *INTEGERS, *HALVES, "f32"})
    if kind in BITS and compares not in ("eq", "ne"):
        raise Fault(f"{compares} of bits without a sign")
    if "ftz" in ins.words and kind != "f32":
        raise Fault("a flush of subnormal halves")
    compare, names = comparisons[compares], to.split("|")
    combines = BOOLEAN[ins.words[2]] if more else None
    of = {"f16": "b16", "bf16": "b16", "f16x2": "b32", "bf16x2": "b32"}.get(kind, kind)
    operands = [machine.source(operand, of) for operand in (a, b)]
    other = machine.source(more[0], "pred") if more else None

    def run(active: Active) -> None:
        x = operands
        if "ftz" in ins.words:
            x = [_flush(v) for v in x]
        if kind in HALVES:
            parts = [halves(v, kind.removesuffix("x2")) for v in x]
            results = [compare(*part) for part in zip(*parts, strict=True)]
        else:
            results = [compare(*x)]
        if len(results) < len(names):
            results.append(~results[0])
        if combines is not None:
            results = [combines(result, other) for result in results]
        for name, result in zip(names, results, strict=True):
            machine.write(name, result, active)

    return run


def select(machine: Machine, ins: Instruction) -> Run:
    """selp, 9.7.6.3: a where the predicate holds, else b."""
    check(ins, (), {*BITS, *INTEGERS, "f32", "f64"})
    to, a, b, predicate = ins.operands
    x, y = (machine.source(operand, ins.words[-1]) for operand in (a, b))
    holds = machine.source(predicate, "pred")
    return lambda active: machine.write(to, np.where(holds, x, y), active)


# Moves and conversions (9.7.9)


def move(machine: Machine, ins: Instruction) -> Run:
    """mov, of a register, or (9.7.9.4) between one and the pieces that make it up."""
    check(ins, (), {*LOGIC, *INTEGERS, "f32", "f64"})
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
                found = found | piece.astype(whole) << whole.type(bits * i)
            machine.write(to, found, active)

        return pack
    x = machine.source(a, kind)
    return lambda active: machine.write(to, x, active)


def _to_integer(x: np.ndarray, kind: str) -> np.ndarray:
    """Of floats that have been rounded: clamped to the range; NaN becomes zero, but in 64 bits
    only the highest bit."""
    dtype = dtype_of(kind)
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    found = np.where(x >= float(high), dtype.type(high), x.astype(dtype))
    found = np.where(x <= float(low), dtype.type(low), found)
    nan = dtype.type(low) if kind == "s64" else dtype.type(1 << 63 if kind == "u64" else 0)
    return np.where(np.isnan(x), nan, found)


ROUNDINGS = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


def convert(machine: Machine, ins: Instruction) -> Run:
    """cvt.d.a, 9.7.9.21: floats to the nearest, to integers as the modifier says, integers by
    dropping or extending bits."""
    to_kind, kind, (to, *operands) = ins.words[-2], ins.words[-1], ins.operands
    integers, floats = {*INTEGERS, "u8", "s8"}, {"f16", "bf16", "f32"}
    check(ins, {"rn", "ftz", *ROUNDINGS, to_kind}, {*integers, *floats})
    if to_kind not in {*integers, *floats, "f16x2", "bf16x2"}:
        raise Fault(f"a conversion to {to_kind}")
    if kind in integers and to_kind in ("bf16", "bf16x2"):
        raise Fault("a conversion of an integer to bf16")
    flush = _flush if "ftz" in ins.words else lambda x: x
    rounds = next((ROUNDINGS[word] for word in ins.words if word in ROUNDINGS), None)
    if kind in floats and to_kind in integers and rounds is None:
        raise Fault("a conversion to an integer that does not say how it rounds")
    x = [machine.source(operand, "b16" if kind in HALVES else kind) for operand in operands]
    if len(x) != 1 + to_kind.endswith("x2"):
        raise Fault(f"{len(x)} sources")

    def run(active: Active) -> None:
        values = [halves(v, kind)[0] for v in x] if kind in HALVES else x
        if kind == "f32":
            values = [flush(v) for v in values]
        if rounds is not None:
            values = [rounds(v) for v in values]
        if to_kind in HALVES:  # the first operand is the upper half
            found = _pack([v.astype(np.float32) for v in values[::-1]], to_kind.removesuffix("x2"))
        elif kind in floats and to_kind in integers:
            found = _to_integer(values[0], to_kind)
        else:
            found = values[0].astype(dtype_of(to_kind))
        machine.write(to, flush(found) if to_kind == "f32" else found, active)

    return run


REGISTERS_ONLY: dict[str, Callable[[Machine, Instruction], Run]] = {
    **dict.fromkeys(OPERATIONS, arithmetic),
    "bfe": bit_field,
    "prmt": permute,
    "lop3": logic3,
    "setp": set_predicate,
    "selp": select,
    "mov": move,
    "cvt": convert,
}
