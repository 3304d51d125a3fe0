"""Kernels of a few lines of PTX, for the tests of the executor."""

from __future__ import annotations

import math
import re
import struct

import numpy as np
import pytest
from torch import Tensor

from tests.compiled.machine import Machine
from tests.compiled.memory import Fault, Global
from tests.compiled.ptx import parse

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


def faulty(message: str, code: str, *tensors: Tensor, **options) -> None:
    """Executing `code` raises a Fault with the message."""
    with pytest.raises(Fault, match=message):
        execute(code, *tensors, **options)
