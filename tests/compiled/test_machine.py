"""The PTX executor, on kernels of a few lines, against truths that do not come from it."""

from __future__ import annotations

import math
import re
import struct

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.compiled.machine import Machine
from tests.compiled.memory import Fault, Global
from tests.compiled.ptx import parse

INT_MIN, NAN, INF = -(2**31), math.nan, math.inf
HEAD = """.visible .entry kernel({params})
.reqntid {threads}
{{
\t.reg .pred %p<16>;
\t.reg .b16 %h<32>;
\t.reg .b32 %r<200>;
\t.reg .b64 %d<64>;
\t.loc 1 7 0
"""


def execute(
    code: str,
    *tensors: Tensor,
    threads: int = 32,
    blocks: int = 1,
    shared: int = 0,
    reach: tuple[Tensor, ...] | None = None,
) -> Machine:
    """Run `code`, in which %d0, %d1, ... are the tensors' addresses, %r0 is %tid.x, %r1 is
    %ctaid.x, %d10 is 4 * %r0; `reach` are the tensors that it may touch, if not those."""
    params = ", ".join(f".param .u64 .ptr .global .align 1 p{i}" for i in range(len(tensors)))
    text = '.file 1 "/somewhere/kernel.py"\n' + HEAD.format(params=params, threads=threads)
    text += "".join(f"ld.param.b64 %d{i}, [p{i}];\n" for i in range(len(tensors)))
    text += "mov.u32 %r0, %tid.x;\nmov.u32 %r1, %ctaid.x;\nmul.wide.u32 %d10, %r0, 4;\n"
    program = parse(f"{text}{code}\nret;\n}}\n")
    ids = np.stack([np.arange(blocks), *np.zeros((2, blocks), np.int64)], 1)
    memory = Global(tensors if reach is None else reach)
    machine = Machine(program, [x.data_ptr() for x in tensors], ids, shared, memory)
    machine.run()
    return machine


WIDTHS = {"h": 2, "r": 4, "d": 8, "p": 1}
FORMATS = {"f16": "<e", "f32": "<f", "f64": "<d"}


def bits_of(x: float, kind: str) -> int:
    """The bits of a number in a PTX type."""
    if kind == "bf16":
        return bits_of(x, "f32") >> 16
    if kind in FORMATS:
        return int.from_bytes(struct.pack(FORMATS[kind], x), "little")
    return int(x) & ((1 << int(kind[1:])) - 1)


def value_of(bits: int, kind: str) -> float:
    """The number that bits are in a PTX type."""
    if kind == "bf16":
        return value_of(bits << 16, "f32")
    if kind in FORMATS:
        return struct.unpack(
            FORMATS[kind], bits.to_bytes(struct.calcsize(FORMATS[kind]), "little")
        )[0]
    width = int(kind[1:])
    bits &= (1 << width) - 1
    return bits - (1 << width) if kind[0] == "s" and bits >> width - 1 else bits


def registers(code: str, to: str, **inputs: int) -> int:
    """The bits of register %`to` after `code`, which starts with the given bits in %`inputs`."""
    sets = "".join(
        f"mov.b{8 * WIDTHS[name[0]]} %{name}, {bits:#x};\n" for name, bits in inputs.items()
    )
    machine = execute(sets + code)
    return int(machine.register(f"%{to}")[5])


def computed(instruction: str, kind: str, *operands: float, to: str | None = None) -> float:
    """d = op(a, b, c) of numbers of one type, in registers as wide as it."""
    register = {16: "h", 32: "r", 64: "d"}[int(re.sub(r"\D", "", kind))]
    names = [f"{register}{i}" for i in range(20, 20 + len(operands))]
    given = {n: bits_of(x, kind) for n, x in zip(names, operands, strict=True)}
    wide = to or kind
    result = {16: "h", 32: "r", 64: "d"}[int(re.sub(r"\D", "", wide))] + "30"
    code = f"{instruction} %{result}, {', '.join('%' + n for n in names)};"
    return value_of(registers(code, result, **given), wide)


def same(got: float, expected: float) -> bool:
    """Equal, NaN to NaN, and a zero's sign counts."""
    if math.isnan(expected):
        return math.isnan(got)
    return got == expected and math.copysign(1, got) == math.copysign(1, expected)


ARITHMETIC = [
    ("add.s32", "s32", (2**31 - 1, 1), INT_MIN),
    ("add.s64", "s64", (2**63 - 1, 1), -(2**63)),
    ("sub.u16", "u16", (3, 5), 65534),
    ("mul.lo.s32", "s32", (65537, 65537), 131073),
    ("mul.lo.s16", "s16", (300, 300), 24464),
    ("mul.hi.s32", "s32", (INT_MIN, 3), -2),
    ("mul.hi.u32", "u32", (2**32 - 1, 2**32 - 1), 2**32 - 2),
    ("mul.hi.u16", "u16", (65535, 65535), 65534),
    ("mul.hi.s64", "s64", (-(2**63), 3), -2),
    ("mul.hi.u64", "u64", (2**64 - 1, 2**64 - 1), 2**64 - 2),
    ("mad.lo.s32", "s32", (-7, 9, 5), -58),
    ("mad.hi.u32", "u32", (2**31, 6, 10), 13),
    ("div.s32", "s32", (-7, 2), -3),
    ("div.s32", "s32", (7, -2), -3),
    ("div.s32", "s32", (INT_MIN, 3), -715827882),
    ("div.s32", "s32", (INT_MIN, INT_MIN), 1),
    ("div.u32", "u32", (2**32 - 1, 2), 2**31 - 1),
    ("rem.s32", "s32", (-7, 2), -1),
    ("rem.s32", "s32", (INT_MIN, 3), -2),
    ("min.s32", "s32", (-1, 1), -1),
    ("min.u32", "u32", (2**32 - 1, 1), 1),
    ("max.s64", "s64", (-1, 1), 1),
    ("max.u64", "u64", (2**64 - 1, 1), 2**64 - 1),
    ("neg.s32", "s32", (INT_MIN,), INT_MIN),
    ("abs.s32", "s32", (-5,), 5),
    ("and.b32", "u32", (0b1100, 0b1010), 0b1000),
    ("or.b16", "u16", (0b1100, 0b1010), 0b1110),
    ("xor.b64", "u64", (0b1100, 0b1010), 0b0110),
    ("not.b32", "u32", (0,), 2**32 - 1),
    ("add.f32", "f32", (1.0, 2.0**-24), 1.0),
    ("sub.rn.f32", "f32", (1.0, 2.0**-24), 1 - 2.0**-24),
    ("mul.f32", "f32", (INF, 0.0), NAN),
    ("fma.rn.f32", "f32", (1 + 2.0**-23, 1 + 2.0**-23, -1 - 2.0**-22), 2.0**-46),
    ("div.full.f32", "f32", (1.0, 0.0), INF),
    ("div.rn.f32", "f32", (6.0, 3.0), 2.0),
    ("min.f32", "f32", (NAN, 1.0), 1.0),
    ("max.f32", "f32", (1.0, NAN), 1.0),
    ("max.NaN.f32", "f32", (1.0, NAN), NAN),
    ("min.NaN.f32", "f32", (NAN, -INF), NAN),
    ("neg.f32", "f32", (0.0,), -0.0),
    ("abs.f32", "f32", (-INF,), INF),
    ("ex2.approx.f32", "f32", (-3.0,), 0.125),
    ("ex2.approx.ftz.f32", "f32", (-INF,), 0.0),
    ("ex2.approx.f32", "f32", (-149.0,), 2.0**-149),
    ("ex2.approx.ftz.f32", "f32", (-149.0,), 0.0),
    ("lg2.approx.f32", "f32", (0.0,), -INF),
    ("lg2.approx.ftz.f32", "f32", (2.0**-140,), -INF),
    ("rcp.rn.f32", "f32", (4.0,), 0.25),
    ("sqrt.rn.f32", "f32", (-1.0,), NAN),
    ("rsqrt.approx.f32", "f32", (16.0,), 0.25),
    ("add.ftz.f32", "f32", (2.0**-130, 0.0), 0.0),
    ("mul.ftz.f32", "f32", (2.0**-100, -(2.0**-40)), -0.0),
    ("max.ftz.f32", "f32", (2.0**-130, -1.0), 0.0),
    ("fma.rn.ftz.f32", "f32", (2.0**-130, 2.0**20, 0.0), 0.0),
    ("mul.rn.bf16", "bf16", (1.0078125, 1.0078125), 1.015625),
    ("add.f16", "f16", (2048.0, 1.0), 2048.0),
    ("add.f16", "f16", (2048.0, 3.0), 2052.0),
    ("add.f16", "f16", (65504.0, 65504.0), INF),
    ("fma.rn.f16", "f16", (1 + 2.0**-10, 1 + 2.0**-10, -1 - 2.0**-9), 2.0**-20),
]


@pytest.mark.parametrize(("instruction", "kind", "operands", "expected"), ARITHMETIC)
def test_arithmetic(instruction, kind, operands, expected):
    assert same(computed(instruction, kind, *operands), expected)


@pytest.mark.parametrize(
    ("instruction", "kind", "a", "by", "expected"),
    [
        ("shl.b32", "u32", 1, 31, 2**31),
        ("shl.b32", "u32", 1, 32, 0),
        ("shl.b64", "u64", 3, 63, 2**63),
        ("shl.b64", "u64", 3, 64, 0),
        ("shl.b16", "u16", 0x8001, 1, 2),
        ("shl.b16", "u16", 1, 16, 0),
        ("shr.u32", "u32", 2**31, 31, 1),
        ("shr.u32", "u32", 2**31, 32, 0),
        ("shr.s32", "s32", -8, 1, -4),
        ("shr.s32", "s32", -8, 32, -1),
        ("shr.s32", "s32", -8, 2**32 - 1, -1),
        ("shr.u16", "u16", 2**15, 16, 0),
        ("shr.s64", "s64", -(2**63), 63, -1),
        ("shr.u64", "u64", 2**63, 200, 0),
    ],
)
def test_a_shift_by_the_width_or_more_leaves_nothing_or_the_sign(
    instruction, kind, a, by, expected
):
    name = {16: "h", 32: "r", 64: "d"}[int(kind[1:])]
    code = f"{instruction} %{name}21, %{name}20, %r22;"
    got = registers(code, f"{name}21", **{f"{name}20": bits_of(a, kind), "r22": by})
    assert value_of(got, kind) == expected


@pytest.mark.parametrize(
    ("instruction", "a", "b", "c", "to", "expected"),
    [
        ("mul.wide.s32", INT_MIN, 2, None, "s64", -(2**32)),
        ("mul.wide.u32", 2**32 - 1, 2, None, "u64", 2**33 - 2),
        ("mad.wide.s32", -3, 4, 10, "s64", -2),
        ("mad.wide.s32", INT_MIN, INT_MIN, 1, "s64", 2**62 + 1),
        ("mad.wide.u32", 2**32 - 1, 2**32 - 1, -1, "u64", (2**32 - 1) ** 2 - 1),
    ],
)
def test_a_wide_product_has_twice_the_bits(instruction, a, b, c, to, expected):
    given = {"r20": bits_of(a, "b32"), "r21": bits_of(b, "b32"), "d22": bits_of(c or 0, "b64")}
    code = f"{instruction} %d23, %r20, %r21{', %d22' if c is not None else ''};"
    assert value_of(registers(code, "d23", **given), to) == expected


@pytest.mark.parametrize(
    ("kind", "a", "position", "length", "expected"),
    [
        ("u32", 0xABCD1234, 8, 8, 0x12),
        ("s32", 0x00000080, 4, 4, -8),
        ("s32", 0x00000070, 4, 4, 7),
        ("u32", 0xABCD1234, 0, 32, 0xABCD1234),
        ("u32", 0xABCD1234, 16, 0, 0),
        ("s32", 0xFFFFFFFF, 3, 0, 0),
        ("s32", 0x80000000, 28, 16, -8),
        ("u32", 0x80000000, 28, 16, 8),
        ("s32", 0x80000000, 40, 4, -1),
        ("s64", 1 << 63, 60, 4, -8),
    ],
)
def test_bit_fields(kind, a, position, length, expected):
    name = "d" if kind.endswith("64") else "r"
    code = f"bfe.{kind} %{name}23, %{name}20, {position}, %r22;"
    got = registers(code, f"{name}23", **{f"{name}20": a, "r22": length})
    assert value_of(got, kind) == expected


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        (0x3210, 0x33221100),
        (0x7654, 0x778899AA),
        (0x5410, 0x99AA1100),
        (0x0123, 0x00112233),
        (0xF8E4, 0x0000FFAA),
        (0xC3D0, 0xFF33FF00),
    ],
)
def test_permuted_bytes(selector, expected):
    code = "prmt.b32 %r23, %r20, %r21, %r22;"
    assert registers(code, "r23", r20=0x33221100, r21=0x778899AA, r22=selector) == expected


@pytest.mark.parametrize("table", [0x00, 0x80, 0xFE, 0x96, 0xCA, 0xE8, 0x01, 0xFF])
def test_lop3_is_its_table(table):
    a, b, c = 0x0F0F3355, 0x12345678, 0xF00FA5C3
    expected = 0
    for bit in range(32):
        row = (a >> bit & 1) * 4 + (b >> bit & 1) * 2 + (c >> bit & 1)
        expected |= (table >> row & 1) << bit
    code = f"lop3.b32 %r23, %r20, %r21, %r22, {table};"
    assert registers(code, "r23", r20=a, r21=b, r22=c) == expected


ORDERED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


@pytest.mark.parametrize("name", [*ORDERED, *(f"{name}u" for name in ORDERED), "num", "nan"])
@pytest.mark.parametrize("x", [-1.0, -0.0, 2.0**-140, NAN])
@pytest.mark.parametrize("y", [0.0, 2.0, NAN])
def test_comparisons_of_floats(name, x, y):
    unordered = math.isnan(x) or math.isnan(y)
    if name in ("num", "nan"):
        expected = unordered == (name == "nan")
    elif unordered:
        expected = name.endswith("u")
    else:
        expected = eval(f"x {ORDERED[name.removesuffix('u')]} y")
    given = {"r20": bits_of(x, "f32"), "r21": bits_of(y, "f32")}
    assert registers(f"setp.{name}.f32 %p1, %r20, %r21;", "p1", **given) == expected
    assert registers(f"setp.{name}.f32 %p2|%p1, %r20, %r21;", "p1", **given) != expected


@pytest.mark.parametrize(
    ("instruction", "a", "b", "expected"),
    [
        ("setp.lt.s32", -1, 1, True),
        ("setp.lt.u32", -1, 1, False),
        ("setp.lo.u32", 1, -1, True),
        ("setp.ls.u32", 2, 2, True),
        ("setp.hi.u32", -1, 1, True),
        ("setp.hs.u32", 1, 2, False),
        ("setp.ne.b32", 1, 1, False),
        ("setp.eq.b32", -1, -1, True),
        ("setp.eq.ftz.f32", 1, 0, True),  # a subnormal
        ("setp.eq.f32", 1, 0, False),
    ],
)
def test_comparisons(instruction, a, b, expected):
    given = {"r20": bits_of(a, "b32"), "r21": bits_of(b, "b32")}
    assert registers(f"{instruction} %p1, %r20, %r21;", "p1", **given) == expected


def test_a_comparison_is_combined_with_a_predicate():
    code = "setp.ne.b32 %p2, %r20, 0; setp.lt.{}.s32 %p1|%p3, %r20, 5, %p2;"
    for x, op, expected in [(0, "and", 0), (3, "and", 1), (7, "or", 1), (3, "xor", 0)]:
        assert registers(code.format(op), "p1", r20=x) == expected
    assert registers(code.format("and"), "p3", r20=7) == 1  # the opposite, combined too


@pytest.mark.parametrize("half", ["f16", "bf16"])
def test_packed_halves_hold_the_first_below_the_second(half):
    pair = bits_of(2.0, half) << 16 | bits_of(-0.5, half)
    other = bits_of(NAN, half) << 16 | bits_of(4.0, half)
    got = registers(f"mul.{half}x2 %r22, %r20, %r20;", "r22", r20=pair)
    assert [value_of(got & 0xFFFF, half), value_of(got >> 16, half)] == [0.25, 4.0]
    got = registers(f"max.{half}x2 %r22, %r20, %r21;", "r22", r20=pair, r21=other)
    assert [value_of(got & 0xFFFF, half), value_of(got >> 16, half)] == [4.0, 2.0]
    got = registers(f"max.NaN.{half}x2 %r22, %r20, %r21;", "r22", r20=pair, r21=other)
    assert got >> 16 == 0x7FFF
    got = registers(f"neg.{half}x2 %r22, %r20;", "r22", r20=pair)
    assert [value_of(got & 0xFFFF, half), value_of(got >> 16, half)] == [0.5, -2.0]
    code = f"setp.num.{half}x2 %p1|%p2, %r20, %r21;"
    assert registers(code, "p1", r20=pair, r21=other) == 1
    assert registers(code, "p2", r20=pair, r21=other) == 0
    code = f"cvt.rn.{half}x2.f32 %r22, %r20, %r21;"  # the first operand is the upper half
    got = registers(code, "r22", r20=bits_of(3.0, "f32"), r21=bits_of(-1.0, "f32"))
    assert [value_of(got & 0xFFFF, half), value_of(got >> 16, half)] == [-1.0, 3.0]
    got = registers("mov.b32 {%h20, %h21}, %r20; mov.b32 %r22, {%h21, %h20};", "r22", r20=pair)
    assert got == (pair >> 16 | pair << 16) & 0xFFFFFFFF


TIES = [1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20, 1 + 2.0**-11, 1 + 3 * 2.0**-11]
EDGES = [0.0, -0.0, INF, -INF, 65519.0, 65520.0, 3.3895e38, 3.4e38, 2.0**-24, 2.0**-25, 2.0**-133]


@pytest.mark.parametrize("half", ["f16", "bf16"])
def test_a_float_is_rounded_to_the_nearest_half_ties_to_even(half):
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[half]
    for x in [*TIES, *EDGES]:
        bits = registers(f"cvt.rn.{half}.f32 %h20, %r20;", "h20", r20=bits_of(x, "f32"))
        assert same(value_of(bits, half), float(torch.tensor(x).to(dtype))), x
    code = f"cvt.rn.{half}.f32 %h20, %r20;"
    assert registers(code, "h20", r20=0xFFC12345) == 0x7FFF  # any NaN
    assert registers(f"cvt.f32.{half} %r20, %h20;", "r20", h20=bits_of(-1.5, half)) == 0xBFC00000


@pytest.mark.parametrize(
    ("instruction", "source", "x", "to", "expected"),
    [
        ("cvt.s64.s32", "s32", -5, "s64", -5),
        ("cvt.u64.u32", "u32", 2**32 - 5, "u64", 2**32 - 5),
        ("cvt.s32.s16", "s16", -5, "s32", -5),
        ("cvt.u32.u16", "u16", 65531, "u32", 65531),
        ("cvt.u16.u32", "u32", 0x12345678, "u16", 0x5678),
        ("cvt.u32.u64", "u64", 2**40 + 7, "u32", 7),
        ("cvt.rn.f32.s32", "s32", 2**24 + 1, "f32", 2.0**24),
        ("cvt.rn.f32.s32", "s32", 2**24 + 3, "f32", 2.0**24 + 4),
        ("cvt.rn.f32.u64", "u64", 2**64 - 1, "f32", 2.0**64),
        ("cvt.rn.f16.s32", "s32", -2049, "f16", -2048.0),
        ("cvt.rzi.s32.f32", "f32", -2.75, "s32", -2),
        ("cvt.rni.s32.f32", "f32", 2.5, "s32", 2),
        ("cvt.rmi.s32.f32", "f32", -2.25, "s32", -3),
        ("cvt.rpi.s32.f32", "f32", 2.25, "s32", 3),
        ("cvt.rzi.s32.f32", "f32", 1e20, "s32", 2**31 - 1),
        ("cvt.rzi.u32.f32", "f32", -3.0, "u32", 0),
        ("cvt.rzi.s32.f32", "f32", NAN, "s32", 0),
        ("cvt.rzi.s64.f32", "f32", NAN, "s64", -(2**63)),
        ("cvt.rni.f32.f32", "f32", 3.5, "f32", 4.0),
        ("cvt.ftz.f32.f16", "f16", 2.0**-24, "f32", 2.0**-24),
        ("cvt.rn.ftz.bf16.f32", "f32", 2.0**-130, "bf16", 0.0),
    ],
)
def test_conversions(instruction, source, x, to, expected):
    names = {16: "h", 32: "r", 64: "d"}
    a, d = (names[int(re.sub(r"\D", "", kind))] for kind in (source, to))
    code = f"{instruction} %{d}30, %{a}20;"
    got = registers(code, f"{d}30", **{f"{a}20": bits_of(x, source)})
    assert same(value_of(got, to), expected)


def test_a_choice_and_moves():
    code = "setp.lt.s32 %p1, %r20, 0; selp.{} %{}23, %{}21, %{}22, %p1;"
    assert registers(code.format("b32", *"rrr"), "r23", r20=2**31, r21=7, r22=9) == 7
    assert registers(code.format("f32", *"rrr"), "r23", r20=1, r21=7, r22=9) == 9
    assert registers(code.format("b16", *"hhh"), "h23", r20=1, h21=7, h22=9) == 9
    assert registers(code.format("b64", *"ddd"), "d23", r20=2**31, d21=7, d22=9) == 7
    assert registers("mov.b64 {%r1, %r2}, %d20;", "r2", d20=5 << 32 | 3) == 5
    assert registers("mov.b64 %d21, {%r20, %r21};", "d21", r20=1, r21=2) == 2 << 32 | 1
    assert registers("mov.b32 %r20, 0fC0200000;", "r20") == bits_of(-2.5, "f32")


# Shuffles and matrices of a warp


@pytest.mark.parametrize("clamp", [31, 0x1800 | 31, 0x1000 | 7, 0])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("step", [0, 1, 5, 16, 31, 33])
def test_shuffles(mode, clamp, step):
    """The manual's pseudo code, 9.7.9.6, lane by lane."""
    code = f"add.s32 %r20, %r0, 100; shfl.sync.{mode}.b32 %r21|%p1, %r20, {step}, {clamp}, -1;"
    machine = execute(code)
    for lane in range(32):
        segment, bound, by = clamp >> 8 & 31, clamp & 31, step & 31
        highest = lane & segment | bound & ~segment
        if mode == "up":
            other = lane - by
            there = other >= highest
        else:
            lowest = lane & segment
            other = {"down": lane + by, "bfly": lane ^ by, "idx": lowest | by & ~segment}[mode]
            there = other <= highest
        assert machine.register("%r21")[lane] == 100 + (other if there else lane)
        assert machine.register("%p1")[lane] == there


ROWS = "shl.b32 %r20, %r0, 4; ld.global.v4.b32 {%r21, %r22, %r23, %r24}, [%d11];"


def matrix_rows() -> Tensor:
    """int16 [32, 8]: four matrices, a row of 16 bytes for each lane, no two numbers the same."""
    return torch.arange(256, dtype=torch.int16).view(32, 8) * 3


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count, transposed):
    """Lane i gives the address of row 31 - i, so that the order of the addresses matters."""
    rows = matrix_rows()
    names = [f"%r{30 + j}" for j in range(count)]
    trans = ".trans" if transposed else ""
    code = f"""
        mul.wide.u32 %d11, %r0, 16; add.s64 %d11, %d0, %d11; {ROWS}
        st.shared.v4.b32 [%r20], {{%r21, %r22, %r23, %r24}};
        sub.s32 %r25, 496, %r20;
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{", ".join(names)}}}, [%r25];"""
    machine = execute(code, rows, shared=512)
    for j, name in enumerate(names):
        matrix = rows.flip(0)[8 * j : 8 * j + 8]
        numbers = (matrix.T if transposed else matrix).tolist()
        for lane in range(32):
            low, high = numbers[lane // 4][lane % 4 * 2 : lane % 4 * 2 + 2]
            assert machine.register(name)[lane] == high << 16 | low


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stmatrix(count, transposed):
    """The register of lane l and matrix j is 1000 j + l and, in the upper half, that plus 500."""
    trans = ".trans" if transposed else ""
    values = "".join(
        f"add.s32 %r{30 + j}, %r0, {1000 * j | 1000 * j + 500 << 16}; shl.b32 %r29, %r0, 16;"
        f"add.s32 %r{30 + j}, %r{30 + j}, %r29;"
        for j in range(count)
    )
    names = ", ".join(f"%r{30 + j}" for j in range(count))
    code = f"""
        {values} shl.b32 %r20, %r0, 4;
        stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r20], {{{names}}};
        mul.wide.u32 %d11, %r0, 16; add.s64 %d11, %d0, %d11;
        setp.lt.u32 %p1, %r0, {8 * count};
        @%p1 ld.shared.v4.b32 {{%r21, %r22, %r23, %r24}}, [%r20];
        @%p1 st.global.v4.b32 [%d11], {{%r21, %r22, %r23, %r24}};"""
    out = torch.full((32, 8), -1, dtype=torch.int16)
    execute(code, out, shared=512)
    for j in range(count):
        matrix = out[8 * j : 8 * j + 8]
        numbers = (matrix.T if transposed else matrix).tolist()
        for lane in range(32):
            pair = numbers[lane // 4][lane % 4 * 2 : lane % 4 * 2 + 2]
            assert pair == [1000 * j + lane, 1000 * j + 500 + lane]
    assert (out[8 * count :] == -1).all()


DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}


def small(*shape: int, half: str = "f32") -> Tensor:
    """Integers of -4 to 4, whose products and sums every type here has exactly."""
    return torch.randint(-4, 5, shape).to(DTYPES.get(half, torch.float32))


def pairs_of(matrix: Tensor, places: list[list[tuple[int, int]]]) -> Tensor:
    """int32 [registers, lanes]: of each place (row, column), the number there and the one to the
    right of it."""
    bits = matrix.view(torch.int16).to(torch.int32) & 0xFFFF
    return torch.tensor(
        [[int(bits[i, j]) | int(bits[i, j + 1]) << 16 for i, j in row] for row in places]
    ).to(torch.int32)


@pytest.mark.parametrize("half", ["f16", "bf16"])
def test_mma(half):
    """Fragments as the manual's 9.7.14.5.8 has them; B is given as its columns."""
    torch.manual_seed(0)
    a, b, c = small(16, 16, half=half), small(8, 16, half=half), small(16, 8)
    lanes = [(lane // 4, lane % 4 * 2) for lane in range(32)]
    of_a = [(0, 0), (8, 0), (0, 8), (8, 8)]
    left = pairs_of(a, [[(g + row, t + k) for g, t in lanes] for row, k in of_a])
    right = pairs_of(b, [[(g, t + k) for g, t in lanes] for k in (0, 8)])
    of_c = [(0, 0), (0, 1), (8, 0), (8, 1)]
    start = torch.stack([torch.stack([c[g + i, t + j] for g, t in lanes]) for i, j in of_c])
    loads = "".join(f"ld.global.b32 %r{20 + i}, [%d11 + {128 * i}];" for i in range(10))
    d, opcode = (
        "{%r26, %r27, %r28, %r29}",
        f"mma.sync.aligned.m16n8k16.row.col.f32.{half}.{half}.f32",
    )
    code = f"""add.s64 %d11, %d0, %d10; {loads}
        {opcode} {d}, {{%r20, %r21, %r22, %r23}}, {{%r24, %r25}}, {d};"""
    machine = execute(code, torch.cat([left, right, start.view(torch.int32)]))
    expected = a.float() @ b.float().T + c
    for i, (row, column) in enumerate(of_c):
        got = machine.register(f"%r{26 + i}").view(np.float32)
        for lane, (g, t) in enumerate(lanes):
            assert got[lane] == expected[g + row, t + column]


# Products of warpgroups

ATOMS = {0: 8, 1: 64, 2: 32, 3: 16}  # halves that are swizzled together, by the descriptor's mode


def layout(mode: int, mn_major: bool, leading: int, stride: int, mn: int, k: int) -> int:
    """Byte offset of an element: the canonical layouts of 9.7.15.5.1.2.1.3 as they stand there,
    in elements, and then Swizzle<B, 4, 3> on the bytes."""
    wide = ATOMS[mode]
    if mn_major and mode == 0:  # ((T,1,m),(8,k)):((1,T,SBO),(1T,LBO))
        at = mn % 8 + mn // 8 * stride + k % 8 * 8 + k // 8 * leading
    elif mn_major:  # ((T,n,m),(8,k)):((1,T,LBO),(nT,SBO))
        at = mn % wide + mn // wide * leading + k % 8 * wide + k // 8 * stride
    elif mode == 0:  # ((8,m),(T,2k)):((1T,SBO),(1,LBO))
        at = mn % 8 * 8 + mn // 8 * stride + k % 8 + k // 8 * leading
    else:  # ((8,m),(T,2k)):((nT,SBO),(1,T))
        at = mn % 8 * wide + mn // 8 * stride + k
    at *= 2
    bits = {0: 0, 1: 3, 2: 2, 3: 1}[mode]
    return at ^ (at >> 7 & (1 << bits) - 1) << 4


def image(matrix: Tensor, mode: int, mn_major: bool, first: int = 0) -> tuple[Tensor, int]:
    """int16 [...]: shared memory that holds the columns of `matrix` from `first` on, and its
    descriptor for address 0."""
    rows, depth, wide = len(matrix), matrix.shape[1], ATOMS[mode]
    if mn_major and mode:
        stride = 8 * wide
        leading = stride * ((depth + 7) // 8)
    elif mn_major:
        stride, leading = 64, 64 * ((rows + 7) // 8)
    else:
        leading, stride = 64, (64 * ((depth + 7) // 8) if mode == 0 else 8 * wide)
    places = [
        [layout(mode, mn_major, leading, stride, mn, k) // 2 for k in range(depth)]
        for mn in range(rows)
    ]
    size = (max(map(max, places)) // 1024 + 1) * 1024
    memory = torch.full((size,), -1, dtype=torch.int16)  # NaN
    memory[torch.tensor(places)] = matrix.view(torch.int16)
    skip = 0 if first == 0 else layout(0, False, 64, 0, 0, first) if mode == 0 else 2 * first
    descriptor = mode << 62 | (2 * stride >> 4) << 32 | (2 * leading >> 4) << 16 | skip >> 4
    return memory, descriptor


FILL = """
    shl.b32 %r2, %r0, 4; mul.wide.u32 %d11, %r0, 16; add.s64 %d11, %d0, %d11;
"""


def filled(size: int) -> str:
    """`size` bytes of the first tensor go to shared memory, by 128 threads."""
    return FILL + "".join(
        f"ld.global.v4.b32 {{%r3, %r4, %r5, %r6}}, [%d11 + {at}];\n"
        f"st.shared.v4.b32 [%r2 + {at}], {{%r3, %r4, %r5, %r6}};\n"
        for at in range(0, size, 2048)
    )


READY = "fence.proxy.async.shared::cta; bar.sync 0; wgmma.fence.sync.aligned;\n"
DONE = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;\n"


def product(columns: int, half: str, left: str, flags: str, scale: str = "0") -> str:
    """wgmma into %r50 and those after it, B's descriptor in %d21."""
    accumulator = ", ".join(f"%r{50 + i}" for i in range(columns // 2))
    return (
        f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{half}.{half} {{{accumulator}}}, "
        f"{left}, %d21, {scale}, 1, 1, {flags};\n"
    )


def accumulated(machine: Machine, columns: int) -> Tensor:
    """[64, columns], of the fragments of 9.7.15.5.1.1.1."""
    d = torch.full((64, columns), math.nan)
    for i in range(columns // 2):
        values = machine.register(f"%r{50 + i}").view(np.float32)
        for lane in range(128):
            row = lane // 32 * 16 + lane % 32 // 4 + i // 2 % 2 * 8
            d[row, i // 4 * 8 + lane % 4 * 2 + i % 2] = float(values[lane])
    return d


SHAPES = [(32, "bf16"), (8, "f16"), (256, "bf16"), (96, "f16")]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("b_major", ["K", "MN"])
@pytest.mark.parametrize("a_major", ["K", "MN", "registers"])
@pytest.mark.parametrize("mode", ATOMS)
def test_wgmma(mode, a_major, b_major, shape):
    columns, half = shape
    torch.manual_seed(0)
    a, b = small(64, 16, half=half), small(columns, 16, half=half)
    memory, descriptor = image(b, mode, b_major == "MN")
    left, flags, loads = "%d20", f"{int(a_major == 'MN')}, {int(b_major == 'MN')}", ""
    at = 2 * len(memory)
    if a_major == "registers":
        lanes = [(lane // 32 * 16 + lane % 32 // 4, lane % 4 * 2) for lane in range(128)]
        of_a = [(0, 0), (8, 0), (0, 8), (8, 8)]
        pairs = pairs_of(a, [[(g + row, t + k) for g, t in lanes] for row, k in of_a])
        loads = "add.s64 %d12, %d1, %d10;" + "".join(
            f"ld.global.b32 %r{40 + i}, [%d12 + {512 * i}];" for i in range(4)
        )
        left, flags, of_left = "{%r40, %r41, %r42, %r43}", f"{int(b_major == 'MN')}", 0
    else:
        pairs = torch.zeros(1, dtype=torch.int32)
        more, of_left = image(a, mode, a_major == "MN")
        memory = torch.cat([memory, more])
    code = f"""{filled(2 * len(memory))} {loads}
        mov.b64 %d21, {descriptor}; mov.b64 %d20, {of_left + (at >> 4)};
        {READY} {product(columns, half, left, flags)} {DONE}"""
    machine = execute(code, memory, pairs, threads=128, shared=2 * len(memory))
    assert torch.equal(accumulated(machine, columns), a.float() @ b.float().T)


@pytest.mark.parametrize("mode", ATOMS)
def test_wgmma_of_later_columns_of_a_line(mode):
    """The descriptor's address moves along a line; the swizzle goes by the address' own bits."""
    torch.manual_seed(0)
    a, b = small(64, 16, half="f16"), small(16, max(ATOMS[mode], 32), half="f16")
    for first in range(0, ATOMS[mode] if mode else 32, 16):
        memory, descriptor = image(b, mode, False, first)
        more, of_left = image(a, 0, False)
        code = f"""{filled(2 * len(memory) + 2 * len(more))}
            mov.b64 %d21, {descriptor}; mov.b64 %d20, {of_left + (len(memory) >> 3)};
            {READY} {product(16, "f16", "%d20", "0, 0")} {DONE}"""
        both = torch.cat([memory, more])
        machine = execute(code, both, threads=128, shared=2 * len(both))
        expected = a.float() @ b[:, first : first + 16].float().T
        assert torch.equal(accumulated(machine, 16), expected)


# Control flow


def test_lanes_part_and_meet_again():
    out = torch.zeros(64, dtype=torch.int32)
    code = """
        add.s64 %d11, %d0, %d10; and.b32 %r20, %r0, 3; mov.b32 %r21, 1;
        setp.eq.b32 %p1, %r20, 0; @%p1 bra $L1;
        setp.eq.b32 %p2, %r20, 1; @%p2 bra $L2;
        add.s32 %r21, %r21, 100;
        bra.uni $L2;
$L1:
        add.s32 %r21, %r21, 10;
$L2:
        @!%p1 mul.lo.s32 %r21, %r21, 2;
        shfl.sync.idx.b32 %r22, %r21, 0, 31, -1;
        add.s32 %r21, %r21, %r22; st.global.b32 [%d11], %r21;"""
    execute(code, out, threads=64)
    assert out.tolist() == [{0: 11, 1: 2}.get(lane % 4, 202) + 11 for lane in range(64)]


def test_blocks_loop_as_often_as_they_need_and_some_end_first():
    out = torch.full((6,), -1, dtype=torch.int32)
    code = """
        setp.eq.b32 %p1, %r1, 2; @%p1 bra $END;
        mov.b32 %r20, 0; mov.b32 %r21, 0;
$LOOP:
        setp.ge.u32 %p2, %r20, %r1; @%p2 bra $STORE;
        add.s32 %r20, %r20, 1; add.s32 %r21, %r21, %r20;
        bar.sync 0;
        bra.uni $LOOP;
$STORE:
        mul.wide.u32 %d11, %r1, 4; add.s64 %d11, %d0, %d11;
        setp.eq.b32 %p3, %r0, 63; @%p3 st.global.b32 [%d11], %r21;
$END:"""
    execute(code, out, threads=64, blocks=6)
    assert out.tolist() == [0, 1, -1, 6, 10, 15]


def test_a_guard_may_be_written_by_its_own_instruction():
    code = "setp.lt.u32 %p1, %r0, 7; @%p1 setp.gt.u32 %p1, %r0, 3; selp.b32 %r20, 1, 0, %p1;"
    expected = [int(3 < lane < 7) for lane in range(32)]
    assert execute(code).register("%r20").tolist() == expected


def test_specials_and_parameters_narrower_than_their_register():
    machine = execute("mov.u32 %r20, %laneid; mov.u32 %r21, %tid.y;", threads=64)
    assert machine.register("%r20").tolist() == [*range(32), *range(32)]
    assert not machine.register("%r21").any()
    text = HEAD.format(params=".param .u32 p0, .param .f32 p1", threads=32)
    text += "ld.param.s32 %d0, [p0]; ld.param.b32 %d1, [p0]; ld.param.b32 %r1, [p1];\nret;\n}"
    machine = Machine(parse(text), [-5, 1.5], np.zeros((1, 3), int), 0, Global([]))
    machine.run()
    assert int(machine.register("%d0")[0]) == 2**64 - 5
    assert int(machine.register("%d1")[0]) == 2**32 - 5
    assert int(machine.register("%r1")[0]) == bits_of(1.5, "f32")


def test_bytes_and_vectors_of_memory():
    numbers = torch.tensor([-2, 3, 127, -128] * 8, dtype=torch.int8)
    out = torch.zeros(32, 4, dtype=torch.int16)
    code = """
        cvt.u64.u32 %d11, %r0; add.s64 %d11, %d0, %d11;
        ld.global.s8 %h20, [%d11]; ld.global.u8 %h21, [%d11];
        mul.wide.u32 %d12, %r0, 8; add.s64 %d12, %d1, %d12;
        st.global.v2.b16 [%d12], {%h20, %h21}; st.global.b8 [%d12+4], %h20;"""
    execute(code, numbers, out)
    for row, number in zip(out.tolist(), numbers.tolist(), strict=True):
        assert row == [number, number & 0xFF, number & 0xFF, 0]


# What is no instruction of ours, or undefined


@pytest.mark.parametrize(
    "instruction",
    [
        "popc.b32 %r20, %r21",
        "add.sat.s32 %r20, %r21, %r22",
        "add.cc.u32 %r20, %r21, %r22",
        "add.f16x3 %r20, %r21, %r22",
        "max.f32 %r20, %r21, %r22, %r23",
        "max.xorsign.abs.f32 %r20, %r21, %r22",
        "fma.rn.relu.f16 %h20, %h21, %h22, %h23",
        "add.ftz.f16 %h20, %h21, %h22",
        "mul.wide.s64 %d20, %d21, %d22",
        "prmt.b32.f4e %r20, %r21, %r22, %r23",
        "lop3.or.b32 %r20|%p1, %r21, %r22, %r23, 0x80, %p2",
        "setp.lo.s32 %p1, %r20, %r21",
        "setp.ltu.s32 %p1, %r20, %r21",
        "setp.lt.b32 %p1, %r20, %r21",
        "mov.b128 %r20, {%d20, %d21}",
        "cvt.rz.f16.f32 %h20, %r20",
        "cvt.sat.f32.f32 %r20, %r21",
        "cvt.rn.relu.f16.f32 %h20, %r20",
        "cvt.rn.satfinite.e4m3x2.f32 %h20, %r20, %r21",
        "cvt.s32.f32 %r20, %r21",
        "shfl.sync.idx.b32 %r20, %r21, 0, 31, 65535",
        "ld.shared::cluster.b32 %r20, [%r21]",
        "ld.local.b32 %r20, [%r21]",
        "ld.volatile.global.b32 %r20, [%d20]",
        "ld.global.v4.b64 {%d20, %d21, %d22, %d23}, [%d24]",
        "ld.global.v2.b32 {%r20, %r21, %r22}, [%d24]",
        "atom.global.add.u32 %r20, [%d20], %r21",
        "cp.async.cg.shared.global [%r20], [%d20], 8",
        "cp.async.ca.shared.global [%r20], [%d20], 16, 16, %d21",
        "cp.async.bulk.commit_group",
        "cp.async.mbarrier.arrive.noinc.shared.b64 [%r20]",
        "bar.sync 1",
        "bar.sync 0, 64",
        "bar.arrive 0, 64",
        "bar.warp.sync 1",
        "barrier.cluster.arrive",
        "membar.gl",
        "fence.acq_rel.gpu",
        "fence.proxy.tensormap::generic.release.gpu",
        "ldmatrix.sync.aligned.m8n16.x1.shared.b8 {%r20}, [%r21]",
        "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r20}, [%r21]",
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1}, {%r2}, {%r3}, {%r4}",
        "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r1}, {%r2}, {%r3}, {%r4}",
        product(8, "f16", "%d20", "0, 0").replace("1, 1", "-1, 1", 1).strip("\n;"),
        product(8, "f16", "%d20", "0, 0").replace("n8k16", "n16k16").strip("\n;"),
        product(8, "f16", "%d20", "0, 0").replace(".f16.f16", ".e4m3.e4m3").strip("\n;"),
        "mov.b32 %r20, %clusterid.x",
        "mov.b32 %r20, other_symbol",
        "call.uni foo, ()",
        "brx.idx %r20, table",
    ],
)
def test_an_instruction_that_is_not_known_is_named(instruction):
    opcode = instruction.split()[0].replace("::", "__")
    with pytest.raises(Fault, match=rf"kernel, line \d+ \(kernel.py:7\): {re.escape(opcode)} "):
        execute(f"setp.eq.b32 %p1, %r0, 99; @%p1 bra $END; {instruction};\n$END:", threads=128)


def test_a_statement_that_is_no_instruction_is_an_error():
    for statement in (".local .b32 x", "{", "ADD %r1"):
        with pytest.raises(ValueError, match=f"ptx: line 1[0-9] has '{re.escape(statement)}"):
            execute(f"\n{statement};\n")


def faulty(message: str, code: str, *tensors: Tensor, **options) -> None:
    """Executing `code` raises a Fault with the message."""
    with pytest.raises(Fault, match=message):
        execute(code, *tensors, **options)


LOAD = "add.s64 %d11, %d0, %d10; ld.global.b32 %r20, [%d11+{}];"


@pytest.mark.parametrize("access", ["ld.global{0} {1}, [%d11]", "st.global{0} [%d11], {1}"])
@pytest.mark.parametrize(
    ("vector", "names"), [(".b32", "%r20"), (".v4.b32", "{%r20, %r21, %r22, %r23}")]
)
def test_global_memory_has_bounds(access, vector, names):
    """Of two tensors with a gap of one element between, 16 bytes before the second."""
    width = 16 if names[0] == "{" else 4
    numbers = torch.zeros(40, dtype=torch.int32)
    first, second = numbers[:12], numbers[16:28]
    at = "setp.eq.b32 %p1, %r0, 31; mov.b64 %d11, %d0; @%p1 add.s64 %d11, %d0, AT;"
    code = f"{at} {access.format(vector, names)};"
    for offset in (0, 48 - width, 64, 112 - width):
        execute(code.replace("AT", str(offset)), numbers, reach=(first, second))
    for offset in (-width, 48, 64 - width, 112, 1 << 20):
        faulty("out of bounds", code.replace("AT", str(offset)), numbers, reach=(first, second))
    for offset in range(1, width):
        faulty("misaligned", code.replace("AT", str(offset)), numbers, reach=(first, second))


def test_a_tensor_ends_at_its_last_element():
    """A view's rows have gaps, which are within; its last row has none behind it."""
    numbers = torch.zeros(64, dtype=torch.int32)
    view = numbers.view(4, 16)[:, :3]  # 12 + 48 * 4 bytes
    code = "add.s64 %d11, %d0, {}; ld.global.b32 %r20, [%d11];"
    execute(code.format(4 * 50), view)
    faulty("out of bounds: 204 from the start of a tensor of 204", code.format(4 * 51), view)
    faulty("out of bounds", code.format(0), numbers, reach=())


def test_shared_memory_has_bounds():
    code = "shl.b32 %r20, %r0, 2; st.shared.b32 [%r20+{0}], %r0; ld.shared.b32 %r21, [%r20+{0}];"
    execute(code.format(8), shared=136)
    faulty("4 bytes at 136 of 136 bytes of shared memory", code.format(12), shared=136)
    faulty("4 bytes at -4 of", code.format(-4), shared=136)
    faulty("misaligned", code.format(2), shared=256)
    matrix = "shl.b32 %r20, %r0, 4; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r21}, [%r20+%s];"
    execute(matrix.replace("%s", "0"), shared=128)
    faulty("128 bytes of shared memory", matrix.replace("%s", "16"), shared=128)
    faulty("not aligned to 16 bytes", matrix.replace("%s", "8"), shared=256)


def test_what_nothing_wrote_is_nan():
    machine = execute("ld.shared.b32 %r20, [4]; add.f32 %r21, %r20, %r20;", shared=8)
    for name in ("%r20", "%r21", "%r30"):
        assert np.isnan(machine.register(name).view(np.float32)).all()
    assert np.isnan(machine.register("%h5").view(np.float16)).all()
    assert np.isnan(machine.register("%d5").view(np.float64)[1:]).all()


STORE = "and.b32 %r20, %r0, 31; shl.b32 %r20, %r20, 2; shr.u32 %r22, %r0, 5;"


def test_two_warps_write_one_address():
    faulty("different values", f"{STORE} st.shared.b32 [%r20], %r22;", threads=64, shared=128)
    execute(f"{STORE} st.shared.b32 [%r20], %r20;", threads=64, shared=128)  # the same value
    one = "setp.eq.b32 %p1, %r22, {}; @%p1 st.shared.b32 [%r20], %r22;"
    code = f"{STORE} {one.format(0)} {{}} {one.format(1)}"
    execute(code.format("bar.sync 0;"), threads=64, shared=128)
    faulty("another warp wrote, with no barrier", code.format(""), threads=64, shared=128)
    faulty("different values", "st.shared.b32 [0], %r0;", shared=4)  # lanes of one warp


@pytest.mark.parametrize("barrier", ["bar.sync 0;", "bar.warp.sync -1;"])
def test_a_warp_reads_what_another_wrote_or_writes_what_another_read(barrier):
    turned = "shl.b32 %r20, %r0, 2; xor.b32 %r21, %r20, 128;"
    read = f"{turned} st.shared.b32 [%r20], %r0; {barrier} ld.shared.b32 %r22, [%r21];"
    write = f"{turned} ld.shared.b32 %r22, [%r21]; {barrier} st.shared.b32 [%r20], %r0;"
    if barrier == "bar.sync 0;":
        machine = execute(read, threads=64, shared=256)
        assert machine.register("%r22").tolist() == [i ^ 32 for i in range(64)]
        execute(write, threads=64, shared=256)
    else:
        faulty("another warp wrote, with no barrier", read, threads=64, shared=256)
        faulty("another warp read, with no barrier", write, threads=64, shared=256)


def test_instructions_of_a_whole_block_or_warp():
    part = "setp.lt.u32 %p1, %r0, {}; @!%p1 bra $END; {}\n$END:"
    faulty("a barrier by a part of a block", part.format(32, "bar.sync 0;"), threads=64)
    faulty("a barrier by a part of a block", part.format(40, "@%p1 bar.sync 0;"), threads=64)
    shuffle = "shfl.sync.idx.b32 %r20, %r0, 0, 31, -1;"
    execute(part.format(32, shuffle), threads=64)
    faulty("a shuffle by a part of a warp", part.format(40, shuffle), threads=64)
    faulty("bar.warp.sync by a part of a warp", part.format(8, "bar.warp.sync -1;"))
    matrix = "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r20}, [0];"
    faulty("ldmatrix by a part of a warp", part.format(8, matrix), shared=128)
    execute("setp.lt.u32 %p1, %r0, 32; @%p1 ret; bar.sync 0;", threads=64)  # the rest of a block


# Asynchronous copies

COPY = "shl.b32 %r20, %r0, 4; mul.wide.u32 %d11, %r0, 16; add.s64 %d11, %d0, %d11;"
START = "cp.async.cg.shared.global [%r20+{0}], [%d11+{0}], 16;"
COMMIT, WAIT = "cp.async.commit_group;", "cp.async.wait_group {};"
NUMBERS = torch.arange(512, dtype=torch.int32)


def copied(*steps: str, at: str = "%r20", **options) -> Machine:
    """Two groups, of 16 bytes a lane each and 1024 bytes apart, then the steps, then a read."""
    groups = START.format(0) + COMMIT + START.format(1024) + COMMIT
    code = f"{COPY} {groups} {' '.join(steps)} ld.shared.b32 %r21, [{at}];"
    return execute(code, NUMBERS, shared=2048, threads=64, **options)


def test_a_copy_is_there_after_its_wait():
    for steps, at, first in [
        ((WAIT.format(1),), "%r20", 0),
        ((WAIT.format(0),), "%r20+1024", 256),
        (("cp.async.wait_all;",), "%r20+1024", 256),
    ]:
        got = copied(*steps, at=at).register("%r21")
        assert got.tolist() == [first + 4 * lane for lane in range(64)]
    code = f"{COPY} {START.format(0)} cp.async.wait_all; ld.shared.b32 %r21, [%r20];"
    assert execute(code, NUMBERS, shared=512).register("%r21")[9] == 36


def test_a_copy_that_is_not_waited_for():
    message = "reads shared memory that an asynchronous copy may still write"
    for steps, at in [
        ((), "%r20"),
        ((WAIT.format(2),), "%r20"),
        ((WAIT.format(1),), "%r20+1024"),
    ]:
        with pytest.raises(Fault, match=message):
            copied(*steps, at=at)
    faulty(
        message,
        f"{COPY} {START.format(0)} {WAIT.format(0)} ld.shared.b32 %r21, [%r20];",
        NUMBERS,
        shared=512,
    )  # never committed


def test_a_copy_is_seen_by_other_warps_after_a_barrier():
    other = "xor.b32 %r22, %r20, 512;"
    got = copied(WAIT.format(0), "bar.sync 0;", other, at="%r22").register("%r21")
    assert got.tolist() == [4 * (lane ^ 32) for lane in range(64)]
    with pytest.raises(Fault, match="another warp wrote, with no barrier"):
        copied(WAIT.format(0), other, at="%r22")
    with pytest.raises(Fault, match="may still write"):  # the barrier is no wait
        copied("bar.sync 0;", other, at="%r22")


def test_what_a_copy_fills_is_left_alone():
    message = "writes shared memory that an asynchronous copy may still write"
    for step in ("st.shared.b32 [%r20], %r0;", START.format(0)):
        copied(WAIT.format(0), "bar.sync 0;", step, WAIT.format(0), "cp.async.wait_all;")
        with pytest.raises(Fault, match=message):
            copied(step)
    read = f"{COPY} xor.b32 %r22, %r20, 512; ld.shared.b32 %r21, [%r22]; {{}} {START.format(0)}"
    execute(read.format("bar.sync 0;"), NUMBERS, shared=1024, threads=64)
    faulty("another warp read, with no barrier", read.format(""), NUMBERS, shared=1024, threads=64)


def test_a_copy_of_no_bytes_writes_zeros_and_reads_nothing():
    code = f"""{COPY} setp.lt.u32 %p1, %r0, 8; selp.b32 %r23, 16, 0, %p1;
        @!%p1 mov.b64 %d11, 0;
        cp.async.cg.shared.global [%r20], [%d11], 0x10, %r23; cp.async.wait_all;
        ld.shared.v4.b32 {{%r24, %r25, %r26, %r27}}, [%r20];"""
    machine = execute(code, NUMBERS, shared=512)
    for i in range(4):
        expected = [4 * lane + i if lane < 8 else 0 for lane in range(32)]
        assert machine.register(f"%r{24 + i}").tolist() == expected
    faulty("out of bounds", code.replace("16, 0, %p1", "16, 16, %p1"), NUMBERS, shared=512)
    faulty(
        "a copy of 16 bytes from 8", code.replace("16, 0, %p1", "8, 0, %p1"), NUMBERS, shared=512
    )


# Faults around products of a warpgroup


def in_steps(**changes: str) -> str:
    """A product of 64 x 16 by 16 x 16 ones in shared memory, in steps that a test may change."""
    memory, of_b = image(torch.ones(16, 16, dtype=torch.float16), 0, False)
    _, of_a = image(torch.ones(64, 16, dtype=torch.float16), 0, False)
    steps = {
        "fill": filled(2 * len(memory) + 2048)
        + f"mov.b64 %d21, {of_b}; mov.b64 %d20, {of_a + (len(memory) >> 3)};"
        + "mov.b32 %r40, 0x3C003C00; mov.b32 %r41, %r40; mov.b32 %r42, %r40; mov.b32 %r43, %r40;",
        "fence": "fence.proxy.async.shared::cta;",
        "barrier": "bar.sync 0;",
        "order": "wgmma.fence.sync.aligned;",
        "product": product(16, "f16", "%d20", "0, 0"),
        "commit": "wgmma.commit_group.sync.aligned;",
        "flight": "",
        "wait": "wgmma.wait_group.sync.aligned 0;",
        "after": "mov.b32 %r30, %r50;",
    }
    assert not changes.keys() - steps.keys()
    return "\n".join((steps | changes).values())


def ones() -> Tensor:
    parts = [image(torch.ones(n, 16, dtype=torch.float16), 0, False)[0] for n in (16, 64)]
    return torch.cat(parts)


def multiplied(**changes: str) -> Machine:
    memory = ones()
    return execute(in_steps(**changes), memory, threads=128, shared=2 * len(memory) + 4096)


FROM_REGISTERS = product(16, "f16", "{%r40, %r41, %r42, %r43}", "0")


def result(machine: Machine, name: str = "%r30") -> set[float]:
    return set(machine.register(name).view(np.float32).tolist())


def test_a_product_adds_to_its_accumulator_where_scale_d_is_set():
    """Two in a group, one in the next; then only the first two have been waited for."""
    once = product(16, "f16", "%d20", "0, 0")
    again = product(16, "f16", "%d20", "0, 0", "%p1")
    setup = "setp.ge.u32 %p1, %r0, 0; wgmma.fence.sync.aligned;"
    machine = multiplied(order=setup, product=once + again)
    assert result(machine) == {32.0}
    machine = multiplied(
        order=setup, product=once + again, wait=DONE + "wgmma.fence.sync.aligned;" + again + DONE
    )
    assert result(machine) == {48.0}
    assert result(multiplied(product=FROM_REGISTERS)) == {16.0}


def test_an_accumulator_is_nan_before_its_wait():
    assert result(multiplied(flight="mov.b32 %r31, %r50;"), "%r31") != {16.0}
    early = multiplied(flight="mov.b32 %r31, %r50;").register("%r31").view(np.float32)
    assert np.isnan(early).all()


def test_a_wait_that_asks_for_too_little_leaves_an_accumulator_nan():
    """The second group goes to other registers; a wait for all but one ends the first only."""
    second = re.sub(r"%r(5\d)", lambda m: f"%r1{m[1]}", product(16, "f16", "%d20", "0, 0"))
    commit = "wgmma.commit_group.sync.aligned;"
    both = dict(product=product(16, "f16", "%d20", "0, 0") + commit + second)
    wait = "wgmma.wait_group.sync.aligned {};"
    tail = "mov.b32 %r30, %r50; mov.b32 %r31, %r150; wgmma.wait_group.sync.aligned 0;"
    for newest, first_done, second_done in [(0, True, True), (1, True, False), (2, False, False)]:
        machine = multiplied(**both, wait=wait.format(newest), after=tail)
        for name, done in (("%r30", first_done), ("%r31", second_done)):
            values = machine.register(name).view(np.float32)
            assert (values == 16).all() if done else np.isnan(values).all()
        assert result(machine, "%r150") == {16.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fence": ""}, "what no fence.proxy.async made visible"),
        ({"barrier": ""}, "a matrix product reads what a warp wrote, with no barrier"),
        ({"order": ""}, "no wgmma.fence before it"),
        ({"wait": DONE + product(16, "f16", "%d20", "0, 0") + DONE}, "no wgmma.fence before it"),
        ({"wait": "", "after": ""}, "kernel ends with Products in flight"),
        ({"commit": "", "after": ""}, "kernel ends with Products in flight"),
        ({"flight": "st.shared.b32 [%r2], %r0;"}, "a matrix product in flight may still read"),
        ({"flight": "st.shared.b32 [%r2+1024], %r0;"}, "a matrix product in flight may still read"),
        (
            {"flight": "cp.async.cg.shared.global [%r2], [%d11], 16;"},
            "writes shared memory that a matrix product in flight may still read",
        ),
        ({"flight": "add.f32 %r52, %r52, %r52;"}, "%r52 was written while a product into it"),
        (
            {"product": FROM_REGISTERS, "flight": "mov.b32 %r42, 0;"},
            "%r42 was written while a product that reads it was in flight",
        ),
        (
            {"product": product(16, "f16", "%d20", "0, 0") + product(8, "f16", "%d20", "0, 0")},
            "accumulators of two products in flight overlap",
        ),
        (
            {"barrier": "bar.sync 0; cp.async.cg.shared.global [%r2], [%d11], 16;"},
            "a matrix product reads what an asynchronous copy may still write",
        ),
        ({"after": "xor.b32 %r3, %r2, 512; st.shared.b32 [%r3], %r0;"}, "that another warp read"),
        ({"order": "wgmma.fence.sync.aligned; add.s64 %d21, %d21, %d10;"}, "lanes .* differ in B"),
        ({"order": "wgmma.fence.sync.aligned; mov.b64 %d21, 0x2000000000000;"}, "a base offset"),
        ({"order": "wgmma.fence.sync.aligned; or.b64 %d21, %d21, 16383;"}, "reads byte .* shared"),
        (
            {
                "order": "wgmma.fence.sync.aligned; setp.lt.u32 %p1, %r0, 64;",
                "product": product(16, "f16", "%d20", "0, 0", "%p1"),
            },
            "lanes of a warpgroup differ in scale-d",
        ),
        (
            {"product": "setp.lt.u32 %p1, %r0, 64; @%p1 " + product(16, "f16", "%d20", "0, 0")},
            "a warpgroup's product by a part of a block",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_product_whose_operands_or_results_are_used_too_soon(changes, message):
    assert result(multiplied()) == {16.0}
    with pytest.raises(Fault, match=message):
        multiplied(**changes)


def test_what_a_product_read_may_be_written_after_its_wait_and_a_barrier():
    multiplied(after="bar.sync 0; xor.b32 %r3, %r2, 512; st.shared.b32 [%r3], %r0;")
    multiplied(product=FROM_REGISTERS, after="mov.b32 %r42, 0;")
    assert result(multiplied(flight="st.shared.b32 [%r2+4096], %r0;")) == {16.0}  # beside it


def test_both_warpgroups_of_a_block_have_their_own_a_and_accumulator():
    torch.manual_seed(0)
    a, b = small(128, 16, half="bf16"), small(24, 16, half="bf16")
    memory, of_b = image(b, 3, False)
    parts = [image(x, 3, False) for x in a.split(64)]
    memory = torch.cat([memory, *(part for part, _ in parts)])
    first, step = parts[0][1] + (len(memory) - 2 * len(parts[0][0]) >> 3), len(parts[0][0]) >> 3
    code = f"""setp.ge.u32 %p1, %r0, 128; @%p1 bra $FILLED; {filled(2 * len(memory))}
$FILLED:
        mov.b64 %d21, {of_b}; mov.b64 %d20, {first}; @%p1 add.s64 %d20, %d20, {step};
        {READY} {product(24, "bf16", "%d20", "0, 0")} {DONE}"""
    machine = execute(code, memory, threads=256, shared=2 * len(memory))
    expected = a.float() @ b.float().T
    for i in range(12):
        values = machine.register(f"%r{50 + i}").view(np.float32)
        for lane in range(256):
            row = lane // 32 * 16 + lane % 32 // 4 + i // 2 % 2 * 8
            assert values[lane] == expected[row, i // 4 * 8 + lane % 4 * 2 + i % 2]
