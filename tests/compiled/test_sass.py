"""Reading machine code: loops, waits, hazards and the model, on a few hand-written lines."""

from __future__ import annotations

import pytest

from tests.compiled import sass


def disassembly(text):
    """`nvdisasm -c` of instructions, one a line; those that end in a colon are labels."""
    lines, at = [".text._kernel:"], 0
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.endswith(":"):
            lines.append(line)
        else:
            guard, space, rest = line.partition(" ") if line[0] == "@" else ("", "", line)
            lines.append(f"        /*{at:04x}*/               {guard}{space} {rest} ;")
            at += 16
    return "\n".join(lines)


def program(text):
    return sass.parse(disassembly(text))


PROLOGUE = """
    LDGSTS.E.BYPASS.128 [R2], desc[UR4][R6.64], P1
    LDGDEPBAR
"""
# two products of one group, waited for once; then work on what they made
CLEAN = f"""{PROLOGUE}
.L_x_1:
    DEPBAR.LE SB0, 0x1
    BAR.SYNC.DEFER_BLOCKING 0x0
    WARPGROUP.ARRIVE
    HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT
    IADD3 R8, P3, R8, 0x40, RZ
    HGMMA.64x64x16.F32.BF16 R24, gdesc[UR12], R24, gsb0
    WARPGROUP.DEPBAR.LE gsb0, 0x0
    FMUL R60, R24, R61
    MUFU.EX2 R60, R60
    LDGSTS.E.BYPASS.128 [R2], desc[UR4][R6.64], P1
    LDGDEPBAR
    ISETP.GE.AND P0, PT, R8, R9, PT
@!P0 BRA `(.L_x_1)
    EXIT
"""
SERIALISED = CLEAN.replace(
    "IADD3 R8, P3, R8, 0x40, RZ", "WARPGROUP.DEPBAR.LE gsb0, 0x0\nWARPGROUP.ARRIVE"
).replace("RZ, !UPT", "RZ, !UPT, gsb0")


def only_loop(text):
    (loop,) = sass.main_loops(program(text))
    return loop


def test_instructions_are_read_with_guards_labels_and_operands():
    lines = program(CLEAN)
    assert [line.opcode for line in lines[:2]] == ["LDGSTS.E.BYPASS.128", "LDGDEPBAR"]
    branch = lines[-2]
    assert (branch.guard, branch.target) == ("@!P0", 2)
    assert sass.successors(lines, len(lines) - 2) == [2, len(lines) - 1]
    assert sass.successors(lines, len(lines) - 1) == []


def test_exponentials_beside_a_product_in_flight_are_counted():
    assert only_loop(CLEAN).beside == 0
    assert only_loop(CLEAN.replace("gsb0, 0x0", "gsb0, 0x1")).beside == 1
    before = CLEAN.replace("DEPBAR.LE SB0, 0x1", "MUFU.EX2 R60, R60")
    assert only_loop(before).beside == 0
    assert only_loop(before.replace("WARPGROUP.DEPBAR.LE gsb0, 0x0", "NOP")).beside == 2


def test_branches_on_a_uniform_predicate_may_fall_through():
    lines = program("NOP\n.L_x_0:\nNOP\nBRA.U !UP0, `(.L_x_0)\nBRA `(.L_x_0)\nEXIT")
    assert sass.successors(lines, 2) == [1, 3]
    assert sass.successors(lines, 3) == [1]


def test_a_clean_loop():
    loop = only_loop(CLEAN)
    assert loop.header == 2
    assert loop.instructions == 13
    assert (loop.products, loop.flops) == (2, 2 * 2 * 64 * 64 * 16)
    assert (loop.drained, loop.exponentials, loop.barriers, loop.copies) == (0, 1, 1, 1)
    assert loop.waits == ("copies 1", "products 0")
    assert not loop.waits_for_all


def test_products_waited_for_one_by_one_are_counted():
    assert only_loop(SERIALISED).drained == 2
    # one wait that leaves the youngest group in flight drains nothing
    assert only_loop(SERIALISED.replace("gsb0, 0x0", "gsb0, 0x1")).drained == 0


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("SB0, 0x1", "SB0, 0x0", True),
        ("DEPBAR.LE SB0, 0x1\n", "", False),
        # a wait for all behind the products does not hold them back
        ("ISETP.GE", "DEPBAR.LE SB0, 0x0\nISETP.GE", False),
    ],
)
def test_a_loop_that_waits_for_all_its_copies(old, new, said):
    assert only_loop(CLEAN.replace(old, new)).waits_for_all == said


def test_copies_begun_before_the_products_go_on_beside_them():
    text = CLEAN.replace("SB0, 0x1", "SB0, 0x0")
    copy = "LDGSTS.E.BYPASS.128 [R2], desc[UR4][R6.64], P1\n"
    prologue, loop = text.split(".L_x_1:")
    early = copy + "    WARPGROUP.ARRIVE"
    loop = loop.replace(copy, "").replace("WARPGROUP.ARRIVE", early)
    assert not only_loop(prologue + ".L_x_1:" + loop).waits_for_all


def test_loops_nest_and_the_inner_one_is_the_main_loop():
    nested = """
    MOV R8, RZ
.L_x_0:
    IADD3 R9, R9, 0x1, RZ
.L_x_1:
    HMMA.16816.F32.BF16 R44, R40, R36, R44
    ISETP.GE.AND P0, PT, R8, R9, PT
@!P0 BRA `(.L_x_1)
    MUFU.EX2 R60, R61
@P2 BRA `(.L_x_2)
    FADD R60, R60, R61
.L_x_2:
@!P1 BRA `(.L_x_0)
    EXIT
"""
    lines = program(nested)
    loops = sass.natural_loops(lines)
    assert {head: len(body) for head, body in loops.items()} == {1: 8, 2: 3}
    loop = only_loop(nested)
    assert (loop.header, loop.products, loop.flops, loop.exponentials) == (2, 1, 4 * 4096, 0)


def test_fp32_multiplies_where_ffma_prevails():
    products = ".L_x_0:\n" + "FFMA R4, R5, R6, R4\n" * 4 + "IADD3 R9, R9, R8, RZ\n" * 4
    softmax = ".L_x_1:\n" + "FFMA R4, R5, R6, R4\n" + "FADD R9, R9, R8\n" * 6
    end = "@!P0 BRA `({})\n"
    text = products + end.format(".L_x_0") + softmax + end.format(".L_x_1") + "EXIT"
    assert only_loop(text).products == 4


@pytest.mark.parametrize(
    ("line", "written", "read"),
    [
        ("HMMA.16816.F32.BF16 R44, R40.reuse, R36, RZ", range(44, 48), {*range(40, 44), 36, 37}),
        ("HGMMA.64x32x16.F32.F16 R24, R88, gdesc[UR4].tnspB, R24", range(24, 40), range(88, 92)),
        ("LDSM.16.MT88.4 R40, [R21+0x8000]", range(40, 44), {21}),
        ("LDS.64 R40, [R21.X4]", {40, 41}, {21}),
        ("STS.128 [R3+UR4], R8", (), {3, 8, 9, 10, 11}),
        ("STG.E.64 desc[UR4][R6.64], R8", (), {6, 7, 8, 9}),
        ("LDG.E.128 R8, desc[UR4][R6.64+0x10]", range(8, 12), {6, 7}),
        ("SHFL.BFLY PT, R189, R192, 0x2, 0x1f", {189}, {192}),
        ("ISETP.GE.AND P0, PT, R8, R9, PT", (), {8, 9}),
        ("IMAD.WIDE.U32 R88, R91, R2, RZ", {88, 89}, {91, 2}),
        ("IADD3 R91, P3, -R139, R184, RZ", {91}, {139, 184}),
        ("CS2R R24, SRZ", {24, 25}, ()),
        ("CS2R.32 R24, SR_CLOCKLO", {24}, ()),
        ("F2FP.BF16.F32.PACK_AB R88, R89, R88", {88}, {89, 88}),
        ("R2UR UR4, R5", (), {5}),
        ("P2R R7, PR, RZ, 0x1", {7}, ()),
        ("LDGSTS.E.BYPASS.128 [R2], desc[UR4][R6.64], P1", (), {2, 6, 7}),
        ("UIADD3 UR4, UR5, 0x1, URZ", (), ()),
    ],
)
def test_registers_of_an_instruction(line, written, read):
    (instruction,) = program(line)
    assert sass.writes(instruction) == set(written)
    assert sass.reads(instruction) == set(read)


def test_what_touches_nothing_in_flight_is_no_hazard():
    assert sass.hazards(program(CLEAN)) == []
    assert sass.hazards(program(SERIALISED)) == []


PIPELINED = """
    HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT, gsb0
    HGMMA.64x64x16.F32.BF16 R64, R100, gdesc[UR8].tnspB, R64, gsb0
    WARPGROUP.DEPBAR.LE gsb0, 0x1
    {}
    WARPGROUP.DEPBAR.LE gsb0, 0x0
    FADD R64, R64, R103
    EXIT
"""


@pytest.mark.parametrize(
    ("line", "hazard"),
    [
        ("FADD R24, R24, R24", None),  # of the older group, which was waited for
        ("FADD R1, R104, R24", None),
        ("FADD R1, R100, R24", None),  # A may be read
        ("FADD R64, R1, R1", "FADD writes R64"),
        ("FADD R1, R95, R1", "FADD reads R95"),
        ("FADD R103, R1, R1", "FADD writes R103"),
        ("LDS.128 R97, [R1]", "LDS.128 writes R100"),  # its last of four
        ("IMAD.WIDE.U32 R62, R1, R2, RZ", None),
        ("IMAD.WIDE.U32 R63, R1, R2, RZ", "IMAD.WIDE.U32 writes R64"),
        ("HGMMA.64x64x16.F32.BF16 R24, R64, gdesc[UR8], R24, gsb0", "A reads R64"),
        ("HGMMA.64x64x16.F32.BF16 R64, R104, gdesc[UR8], R64, gsb0", None),
    ],
)
def test_a_product_in_flight_owns_its_registers(line, hazard):
    found = sass.hazards(program(PIPELINED.format(line)))
    assert found == ([f"at 0x30 {hazard} of a product in flight"] if hazard else [])


def test_a_hazard_may_lie_across_the_edge_of_a_loop():
    # the wait stands behind the write of the next iteration only
    late = """
.L_x_0:
    F2FP.BF16.F32.PACK_AB R88, R1, R2
    WARPGROUP.DEPBAR.LE gsb0, 0x0
    HGMMA.64x64x16.F32.BF16 R24, R88, gdesc[UR8], R24, gsb0
@!P0 BRA `(.L_x_0)
    WARPGROUP.DEPBAR.LE gsb0, 0x0
    EXIT
"""
    assert sass.hazards(program(late)) == [
        "at 0x0 F2FP.BF16.F32.PACK_AB writes R88 of a product in flight"
    ]
    early = late.replace("F2FP.BF16.F32.PACK_AB R88, R1, R2\n", "", 1).replace(
        "gsb0, 0x0\n", "gsb0, 0x0\nF2FP.BF16.F32.PACK_AB R88, R1, R2\n", 1
    )
    assert sass.hazards(program(early)) == []


def test_a_wait_on_one_path_only_is_no_wait():
    text = """
    HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT, gsb0
@P0 BRA `(.L_x_0)
    WARPGROUP.DEPBAR.LE gsb0, 0x0
.L_x_0:
    FADD R24, R24, R25
    EXIT
"""
    assert len(sass.hazards(program(text))) == 1
    assert sass.hazards(program(text.replace("@P0 BRA `(.L_x_0)", "NOP"))) == []


def test_the_report_of_ptxas():
    text = """ptxas info    : (C7515) Potential Performance Loss: products wait
ptxas info    : Compiling entry function '_forward_kernel' for 'sm_90a'
    64 bytes stack frame, 40 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 224 registers, used 1 barriers
"""
    assert sass.report(text) == sass.Report(224, 64, 64, ("C7515",))
    assert sass.report(text.replace("(C7515)", "")).serialized == ()


@pytest.mark.parametrize(
    ("figures", "blocks"),
    [
        ((90, 224, 98304, 8), 1),  # registers
        ((90, 128, 98304, 8), 2),
        ((90, 128, 120000, 8), 1),  # shared memory
        ((90, 32, 0, 8), 8),  # threads
        ((80, 128, 98304, 8), 1),
    ],
)
def test_blocks_of_an_sm(figures, blocks):
    assert sass.blocks_per_sm(*figures) == blocks


def modelled(text, blocks=1, warps=4):
    lines = program(text)
    (loop,) = sass.main_loops(lines)
    return sass.cycles(lines, loop, 90, warps, blocks)


def test_the_model_hides_work_behind_products_that_go_on_beside_it():
    work = "FMUL R3, R1, R2\n" * 100
    beside = CLEAN.replace("WARPGROUP.DEPBAR.LE gsb0, 0x0\n", "")
    beside = beside.replace("DEPBAR.LE SB0, 0x1", f"{work}WARPGROUP.DEPBAR.LE gsb0, 0x0")
    behind = CLEAN.replace("FMUL R60", f"{work}FMUL R60")
    assert modelled(beside) < modelled(behind) - 50
    # two products of 32 cycles each and 32 until the last is seen, then a hundred instructions
    assert 196 <= modelled(behind) <= 260


def test_the_model_drains_every_serialised_product():
    assert modelled(SERIALISED) >= modelled(CLEAN) + 32
    # another block works meanwhile
    assert modelled(SERIALISED, blocks=2) < 2 * modelled(SERIALISED)


@pytest.mark.parametrize(
    ("text", "warps", "blocks"),
    [
        (CLEAN, 4, 8),
        (CLEAN.replace("HGMMA.64x64", "HGMMA.64x256").replace("gsb0, 0x0", "gsb0, 0x1"), 8, 1),
    ],
)
def test_the_model_knows_no_more_than_the_peak(text, warps, blocks):
    lines, loop = program(text), only_loop(text)
    rate = sass.rate(lines, loop, 90, warps, blocks, loop.flops * warps // 4)
    assert rate <= 132 * 1.755e9 * 4096 / 1e12 + 1e-6
    assert rate > 0.9 * 132 * 1.755e9 * 4096 / 1e12
