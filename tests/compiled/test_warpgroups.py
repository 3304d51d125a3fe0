"""Blocks of several warpgroups in the PTX executor: barriers, boxes of TMA, and who was told what;
that what a GPU would do silently wrong, or never end, is a fault."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.compiled.memory import Fault, Global
from tests.compiled.ptx import parse
from tests.compiled.small_kernels import HEAD
from tests.compiled.warpgroups import TensorMap, Warpgroups

NUMBERS = torch.arange(24 * 64, dtype=torch.int16).view(24, 64)
SEEDS = range(4)


def box(shape=(64, 20), rows=8, numbers=NUMBERS) -> TensorMap:
    """Of 64 columns, swizzled, so that rows outside of the shape are zeros."""
    return TensorMap(numbers.data_ptr(), shape, (2 * numbers.stride(0),), (64, rows), 128)


def run(
    code: str, *tensors: Tensor, map_: TensorMap | None = None, seed: int = 0, blocks: int = 2
) -> Warpgroups:
    """Three warpgroups run `code`, in which %r2 is a thread's, %r0 %tid.x, %p0 its first thread;
    %d0 on are the tensors' addresses, %d20 the tensor map's."""
    params = [f".param .u64 .ptr .global .align 1 p{i}" for i in range(len(tensors))]
    params += [".param .align 64 .b8 box[128]"]
    text = HEAD.format(params=",\n".join(params), threads=384)
    text += "".join(f"ld.param.b64 %d{i}, [p{i}];\n" for i in range(len(tensors)))
    text += """mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; shr.u32 %r2, %r0, 7;
        and.b32 %r3, %r0, 127; setp.eq.b32 %p0, %r3, 0;
        mov.b64 %d21, box; cvta.param.u64 %d20, %d21;\n"""
    program = parse(f"{text}{code}\nret;\n}}\n")
    ids = np.stack([np.arange(blocks), *np.zeros((2, blocks), np.int64)], 1)
    arguments = [*(x.data_ptr() for x in tensors), map_ or box()]
    team = Warpgroups(program, arguments, ids, 4096, Global([*tensors, NUMBERS]), seed)
    team.run()
    return team


def faulty(message: str, code: str, *tensors: Tensor, **options) -> None:
    """In whichever order things happen."""
    for seed in SEEDS:
        with pytest.raises(Fault, match=message):
            run(code, *tensors, seed=seed, **options)


def wait(at: int, parity: int = 0) -> str:
    return f"""mov.b32 %r8, {at}; mov.b32 %r9, {parity};
{{
.reg .pred complete;
waitLoop:
mbarrier.try_wait.parity.shared::cta.b64 complete, [%r8], %r9;
@!complete bra.uni waitLoop;
}}
"""


def of_group(group: int, code: str) -> str:
    """A part of the code for one warpgroup."""
    of_group.count += 1
    end = f"$AFTER{of_group.count}"
    return f"setp.ne.b32 %p7, %r2, {group}; @%p7 bra {end};\n{code}\n{end}:\n"


of_group.count = 0
INIT = of_group(0, "@%p0 mbarrier.init.shared::cta.b64 [2048], 1; fence.proxy.async.shared::cta;")
MEET = "barrier.sync 1;\n"
EXPECT = "@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [2048], 1024;\n"
COPY = """mov.b32 %r10, 0; mov.b32 %r11, 16;
@%p0 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [0], [%d20, {%r10, %r11}], [2048];
"""  # noqa: E501
STORE = """mul.wide.u32 %d11, %r3, 4; add.s64 %d11, %d0, %d11;
shl.b32 %r12, %r3, 2; ld.shared.b32 %r13, [%r12]; st.global.b32 [%d11], %r13;
"""


@pytest.mark.parametrize("seed", SEEDS)
def test_a_box_is_there_after_its_wait(seed):
    """Its first 512 bytes: four rows of 128 bytes, of which TMA swizzles 16-byte pieces."""
    out = torch.zeros(128, dtype=torch.int32)
    code = INIT + MEET + of_group(0, EXPECT + COPY) + of_group(2, wait(2048) + STORE)
    run(code, out, seed=seed, blocks=1)
    pieces = out.view(torch.int16).view(4, 8, 8)
    for row in range(4):
        for piece in range(8):
            assert torch.equal(pieces[row, piece ^ row], NUMBERS[16 + row, 8 * piece :][:8])


def test_rows_outside_of_the_tensor_are_zeros():
    rows = box().read([0, 16], Global([NUMBERS])).view(np.int16)
    assert (rows[:4] == NUMBERS[16:20].numpy()).all() and not rows[4:].any()
    assert not box().read([0, -8], Global([NUMBERS])).any()
    assert not box((40, 20)).read([0, 0], Global([NUMBERS])).view(np.int16)[:, 40:].any()
    with pytest.raises(Fault, match="out of bounds"):
        box((64, 30)).read([0, 20], Global([NUMBERS]))


def test_the_end_of_a_range_of_rows_can_be_outside():
    """The way of `condensed_attention_hopper._descriptor`, for rows [5, 9) of head 1 of 2."""
    of_heads = NUMBERS.view(12, 2, 64)
    steps = tuple(2 * n for n in (64, 128, 128, (1 << 34) - 128))
    shape = (64, 2, 1 << 30, 0x7FFF0000, 0x7FFF0000)
    map_ = TensorMap(NUMBERS.data_ptr(), shape, steps, (64, 1, 8, 1, 1), 128)
    begin, end, n = 5, 9, 2
    place = [0, 1, (1 << 30) - (end - begin) + n, end, 1 << 30]
    rows = map_.read(place, Global([NUMBERS])).view(np.int16)
    assert (rows[:2] == of_heads[begin + n : end, 1].numpy()).all() and not rows[2:].any()


def test_what_cannot_be_a_tensor_map():
    for bad in (
        {"address": 8}, {"strides": (120,)}, {"strides": (-16,)}, {"shape": (64, 0)},
        {"box": (65, 8)}, {"box": (64, 257)},
    ):  # fmt: skip
        good = {"address": 16, "shape": (64, 20), "strides": (128,), "box": (64, 8), "swizzle": 128}
        with pytest.raises(Fault, match="a tensor map"):
            TensorMap(**good | bad)


def test_a_copy_that_is_not_waited_for():
    out = torch.zeros(128, dtype=torch.int32)
    code = INIT + MEET + of_group(0, EXPECT + COPY) + of_group(2, STORE)
    # it is on its way, or there and untold, or yet to begin
    faulty("may still write|did not wait|a copy to shared memory that a warp has used", code, out)


def test_bytes_that_nobody_expects_or_that_do_not_come():
    faulty("deadlocked", INIT + MEET + of_group(0, EXPECT) + of_group(1, wait(2048)))
    half = EXPECT.replace("1024", "512")
    faulty("deadlocked", INIT + MEET + of_group(0, half + COPY) + of_group(1, wait(2048)))


def test_barriers_are_made_visible():
    out = torch.zeros(128, dtype=torch.int32)
    code = INIT + MEET + of_group(0, EXPECT + COPY) + of_group(2, wait(2048) + STORE)
    unfenced = code.replace("fence.proxy.async.shared::cta;", "")
    faulty("a barrier that no fence.proxy.async made visible", unfenced, out)
    faulty("another warp wrote, with no barrier|there is no barrier", code.replace(MEET, ""), out)


def test_arrivals_are_counted():
    arrive = "@%p0 mbarrier.arrive.shared::cta.b64 _, [2048];"
    run(INIT + MEET + of_group(0, arrive + wait(2048) + arrive + wait(2048, 1)))
    run(INIT + MEET + of_group(0, arrive) + of_group(1, wait(2048)))
    faulty(
        "deadlocked", INIT + MEET + of_group(0, arrive) + of_group(1, wait(2048) + wait(2048, 1))
    )
    three = "@%p0 mbarrier.arrive.shared::cta.b64 _, [2048], 3;"
    faulty("more arrivals at a barrier than 1", INIT + MEET + of_group(0, three))
    faulty("no barrier at 2048", MEET + of_group(0, arrive))


def test_all_warpgroups_meet():
    run(MEET + of_group(1, "bar.sync 2, 128;") + MEET)
    faulty("deadlocked", of_group(0, MEET) + of_group(1, MEET))
    faulty("used by two warpgroups", "bar.sync 2, 128;")


WRITE = """shl.b32 %r12, %r3, 2; st.shared.b32 [%r12], %r3; {}
@%p0 mbarrier.arrive.shared::cta.b64 _, [2048];"""


@pytest.mark.parametrize("seed", SEEDS)
def test_what_a_warpgroup_wrote_is_told_by_its_arrival(seed):
    out = torch.zeros(128, dtype=torch.int32)
    read = of_group(1, wait(2048) + STORE)
    write = of_group(0, WRITE.format("bar.sync 2, 128;"))
    run(INIT + MEET + write + read, out, seed=seed)
    assert out.tolist() == list(range(128))
    with pytest.raises(Fault, match="another warp wrote, with no barrier"):
        run(INIT + MEET + of_group(0, WRITE.format("")) + read, out, seed=seed)


def test_a_copy_to_what_is_in_use():
    twice = EXPECT + COPY + COPY
    faulty("where another is still on its way", INIT + MEET + of_group(0, twice))
    out = torch.zeros(128, dtype=torch.int32)
    again = wait(2048) + STORE + "bar.sync 2, 128;" + EXPECT + COPY
    faulty("a warp has used", INIT + MEET + of_group(0, EXPECT + COPY + again), out)


def test_a_place_outside_of_shared_memory():
    code = INIT + MEET + of_group(0, EXPECT + COPY)
    faulty("or misaligned", code.replace("[0], [%d20", "[128], [%d20"))
    faulty("of 4096 bytes", code.replace("[0], [%d20", "[4096], [%d20"))
    faulty(
        "no tensor map at 7",
        code.replace("[%d20,", "[%d22,").replace("mov.b32 %r10", "mov.b64 %d22, 7; mov.b32 %r10"),
    )
