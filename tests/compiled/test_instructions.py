"""Instructions on registers and shuffles, against truths that do not come from the executor."""

from __future__ import annotations

import math
import re

import pytest
import torch

from tests.compiled.memory import Fault
from tests.compiled.small_kernels import (
    bits_of,
    computed,
    execute,
    faulty,
    registers,
    same,
    value_of,
)

INT_MIN, NAN, INF = -(2**31), math.nan, math.inf
FOUR = "{%r1, %r2, %r3, %r4}"

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
    ("instruction", "a", "b", "expected"),
    [
        ("add.s16x2", 0x0001FFFF, 0x00010001, 0x00020000),  # no carry into the upper one
        ("add.u16x2", 0xFFFF8000, 0x00018000, 0x00000000),
        ("add.s16x2", 0x7FFF0003, 0x0001FFFE, 0x80000001),
        ("min.s16x2", 0x8000FFFF, 0x00010002, 0x8000FFFF),
        ("min.u16x2", 0x8000FFFF, 0x00010002, 0x00010002),
        ("max.s16x2", 0x8000FFFF, 0x00010002, 0x00010002),
        ("max.u16x2", 0x8000FFFF, 0x00010002, 0x8000FFFF),
    ],
)
def test_two_integers_of_a_register(instruction, a, b, expected):
    assert registers(f"{instruction} %r22, %r20, %r21;", "r22", r20=a, r21=b) == expected
    assert registers(f"{instruction} %r22, %r20, {b:#x};", "r22", r20=a) == expected


@pytest.mark.parametrize("instruction", ["sub.s16x2", "mul.lo.u16x2", "add.sat.s16x2"])
def test_pairs_that_ptx_has_no_such_instruction_of(instruction):
    faulty("not known", f"{instruction} %r22, %r20, %r21;")


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
        "ld.b32 %r20, [%d20]",  # generic
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
        "and.f32 %r20, %r21, %r22",
        f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f16 {FOUR}, {FOUR}, {{%r5, %r6}}, {FOUR}",
        f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {FOUR}, {FOUR}, {{%r5}}, {FOUR}",
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r1}, {%r2}, {%r3}, {%r4}",
        "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%r1}, {%r2}, {%r3}, {%r4}",
        "mov.b32 %r20, %clusterid.x",
        "mov.b32 %r20, other_symbol",
        "call.uni foo, ()",
        "brx.idx %r20, table",
    ],
)
def test_an_instruction_that_is_not_known_is_named(instruction):
    opcode = instruction.split()[0].replace("::", "__")
    with pytest.raises(Fault, match=rf"kernel, line \d+ \(kernel.py:7\): {re.escape(opcode)} "):
        execute(f"bra.uni $END;\n{instruction};\n$END:", threads=128)  # is not reached


def test_registers_are_declared_and_wide_enough():
    faulty("%q1 is no register that the kernel declares", "mov.b32 %r20, %q1;")
    faulty("%h20 is narrower than .s32", "add.s32 %r20, %h20, %r21;")
