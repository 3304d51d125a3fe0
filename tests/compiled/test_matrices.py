"""Matrix instructions of a warp and of a warpgroup, on layouts written down from the PTX manual,
and what may not be done around a product in flight."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.compiled.machine import Machine
from tests.compiled.memory import Fault
from tests.compiled.small_kernels import execute, faulty

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


def test_blocks_whose_descriptors_differ_in_their_swizzle():
    memory = ones()
    swizzled = "setp.eq.b32 %p1, %r1, AT; @%p1 or.b64 %d21, %d21, 0x4000000000000000;"
    code = in_steps(order=f"wgmma.fence.sync.aligned; {swizzled}")
    options: dict[str, Any] = {"threads": 128, "blocks": 2, "shared": 8192}
    execute(code.replace("AT", "2"), memory, **options)
    faulty("different swizzles", code.replace("AT", "1"), memory, **options)


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


@pytest.mark.parametrize(
    "change",
    [
        ("1, 1", "-1, 1"),
        ("n8k16", "n16k16"),
        (".f16.f16", ".e4m3.e4m3"),
        ("%d20, %d21, 0, 1, 1, 0,", "{%r1}, %d21, 0, 1, 1,"),
    ],
)
def test_a_product_of_another_kind_is_named(change):
    before, after = change
    code = f"bra.uni $END;\n{product(8, 'f16', '%d20', '0, 0').replace(before, after, 1)}\n$END:"
    faulty(r"kernel, line \d+ \(kernel.py:7\): wgmma.mma_async", code, threads=128)
