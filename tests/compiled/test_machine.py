"""Control flow, memory and asynchronous copies of the PTX executor: what they do, and that what a
GPU would do silently wrong is a fault."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from tests.compiled.machine import Machine
from tests.compiled.memory import Fault, Global
from tests.compiled.ptx import parse
from tests.compiled.small_kernels import HEAD, bits_of, execute, faulty

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


def test_every_parameter_has_an_argument():
    program = parse(HEAD.format(params=".param .u32 p0, .param .u32 p1", threads=32) + "ret;\n}")
    with pytest.raises(Fault, match="1 arguments for 2 parameters"):
        Machine(program, [1], np.zeros((1, 3), int), 0, Global([]))
    faulty("32 bits of a parameter of 64", "ld.param.b32 %r20, [p0];", torch.zeros(1))


def test_a_statement_that_is_no_instruction_is_an_error():
    for statement in (".local .b32 x", "{", "ADD %r1"):
        with pytest.raises(ValueError, match=f"ptx: line 1[0-9] has '{re.escape(statement)}"):
            execute(f"\n{statement};\n")


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


def test_a_block_has_at_most_twelve_warps():
    faulty("13 warps in a block", "ret;", threads=416)


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
