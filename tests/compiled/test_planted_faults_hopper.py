"""Faults planted in the kernels for Hopper are found, as in `test_planted_faults.py`.

Most are found in any order of events, by who was told of what; the seed of a fault is not chosen.
"""

from __future__ import annotations

import re

import pytest
import torch

from btok_kernels import launch

if launch.interpreted():
    pytest.skip("Triton compiles nothing under TRITON_INTERPRET=1", allow_module_level=True)
if reason := launch.no_gluon():
    pytest.skip(reason, allow_module_level=True)

from btok_kernels import condensed_attention_hopper as forward
from btok_kernels import hopper_backward as backward
from btok_kernels.layout import CondensedLayout
from tests.compiled import aot
from tests.compiled.cases import attention
from tests.compiled.memory import Fault
from tests.compiled.test_planted_faults import source

# blocks enough that every place for copies is used again, with more than one of them masked
LAYOUT = CondensedLayout.from_lengths([420, 9], [100, 12], 4, condense=False)


def run(rewrite=None):
    # with such a scale single keys weigh, also where there are many
    options = {"seed": 2, "scale": 0.4, "impl": "hopper"}
    return attention(90, torch.bfloat16, 64, (2, 1), LAYOUT, rewrite=rewrite, **options)


def killed(rewrite=None) -> bool:
    try:
        return max(run(rewrite).values()) > 1
    except Fault:
        return True


NOTHING = "pass"
IN_SOURCE = {  # name: module, function, its text, the text instead
    "K is overwritten": (
        forward, "produce", "mbarrier.wait(k_empty.index(buffer), phase)", NOTHING,
    ),
    "V is overwritten": (
        forward, "produce", "mbarrier.wait(v_empty.index(buffer), phase)", NOTHING,
    ),
    "the other phase of empty places": (
        forward, "produce", "(j // BUFFERS & 1) ^ 1", "j // BUFFERS & 1",
    ),
    "bytes of a copy not expected": (
        forward, "produce", "expect(v_full.index(buffer), V.nbytes_per_cta)",
        "expect(v_full.index(buffer), V.nbytes_per_cta // 2)",
    ),
    "a copy nobody expects": (
        forward, "produce", "mbarrier.expect(k_full.index(buffer), K.nbytes_per_cta)", NOTHING,
    ),
    "a copy that tells the wrong barrier": (
        forward, "produce", "tma.async_load(V, at, v_full.index(buffer)",
        "tma.async_load(V, at, k_full.index(buffer)",
    ),
    "a box of another head": (
        forward, "produce", "BILLION - left, head, 0]", "BILLION - left, head + 1, 0]",
    ),
    "a box a row further": (
        forward, "produce", "at = [BILLION, end,", "at = [BILLION, end + 1,",
    ),
    "a range that ends a row early": (
        forward, "produce", "left = keys - n", "left = keys - n - 1",
    ),
    "K of the first block not waited for": (
        forward, "_consume", "mbarrier.wait(k_full.index(0), 0)", NOTHING,
    ),
    "K not waited for": (
        forward, "_attend", "mbarrier.wait(k_full.index(k_at), j // BUFFERS & 1)", NOTHING,
    ),
    "V not waited for": (
        forward, "_attend", "mbarrier.wait(v_full.index(v_at), (j - 1) // BUFFERS & 1)", NOTHING,
    ),
    "V of the last block not waited for": (
        forward, "_consume", "mbarrier.wait(v_full.index(v_at), (blocks - 1) // BUFFERS & 1)",
        NOTHING,
    ),
    "another phase of V": (
        forward, "_attend", "(j - 1) // BUFFERS & 1)", "j // BUFFERS & 1)",
    ),
    "K never given back": (
        forward, "_attend", "mbarrier.arrive(k_empty.index(k_at))", NOTHING,
    ),
    "V never given back": (
        forward, "_attend", "mbarrier.arrive(v_empty.index(v_at))", NOTHING,
    ),
    "K given back before its product is over": (
        forward, "_attend",
        "s = warpgroup_mma_wait(1, deps=[s])\n    mbarrier.arrive(k_empty.index(k_at))",
        "mbarrier.arrive(k_empty.index(k_at))\n    s = warpgroup_mma_wait(1, deps=[s])",
    ),
    "one consumer gives K back for both": (
        forward, "allocate_places", "mbarrier.init(k_empty.index(i), count=2)",
        "mbarrier.init(k_empty.index(i), count=1)",
    ),
    "a turn never given": (
        forward, "_attend", "mbarrier.arrive(turn.index(1 - OWN))", NOTHING,
    ),
    "the first turn never given": (
        forward, "_consume", "mbarrier.arrive(turn.index(0))", NOTHING,
    ),
    "Q not made visible to products": (
        forward, "_consume", "fence_async_shared()", NOTHING,
    ),
    "barriers not made visible to TMA": (
        forward, "_forward_kernel", "fence_async_shared()", NOTHING,
    ),
    "a product too many in flight": (
        forward, "_attend", "acc = warpgroup_mma_wait(0, deps=[acc])",
        "acc = warpgroup_mma_wait(1, deps=[acc])",
    ),
    "a row that does not see itself": (
        forward, "_weights", "offs_n[None, :] <= last[:, None]", "offs_n[None, :] < last[:, None]",
    ),
    "masked scores not scaled": (
        forward, "_weights", "s * scale_log2, -INF)", "s, -INF)",
    ),
    "a maximum that nothing shrinks for": (
        forward, "_attend", "acc = acc * gl.convert_layout(shrink, of_acc)[:, None]", NOTHING,
    ),
    "a block too many without a mask": (
        forward, "work_item", "whole = (row - key + begin // G) // BLOCK_N",
        "whole = (row - key + begin // G + BLOCK_N) // BLOCK_N",
    ),
    "dQ: K given back before its second product": (
        backward, "_gather_keys",
        "dq = warpgroup_mma_wait(0, deps=[dq])\n    mbarrier.arrive(k_empty.index(before))",
        "mbarrier.arrive(k_empty.index(before))\n    dq = warpgroup_mma_wait(0, deps=[dq])",
    ),
    "dQ: K of the block before given back, not its own": (
        backward, "_gather_keys", "mbarrier.arrive(k_empty.index(before))",
        "mbarrier.arrive(k_empty.index(at))",
    ),
    "dQ: V not waited for": (
        backward, "_gather_keys", "mbarrier.wait(v_full.index(at), j // BUFFERS & 1)", NOTHING,
    ),
    "dQ: under another mask": (
        backward, "_consume_keys", "offs_n[None, :] <= last[:, None]",
        "offs_n[None, :] < last[:, None]",
    ),
    "dQ: a block without its mask": (
        backward, "_gather_keys", "gl.where(offs_n[None, :] <= last[:, None], new, 0.0)", "new",
    ),
    "dQ: without its scale": (
        backward, "_consume_keys", "(dq * scale)", "dq",
    ),
    "dK, dV: K and V not waited for": (
        backward, "_consume_rows", "mbarrier.wait(kv_full, 0)", NOTHING,
    ),
    "dK, dV: Q and statistics not waited for": (
        backward, "_gather_rows", "mbarrier.wait(q_full.index(at), j // BUFFERS & 1)", NOTHING,
    ),
    "dK, dV: dO not waited for": (
        backward, "_gather_rows", "mbarrier.wait(do_full.index(at), j // BUFFERS & 1)", NOTHING,
    ),
    "dK, dV: Q overwritten": (
        backward, "_produce_rows", "mbarrier.wait(empty.index(buffer), phase)", NOTHING,
    ),
    "dK, dV: Q and dO given back too early": (
        backward, "_gather_rows",
        "dk = warpgroup_mma_wait(0, deps=[dk])\n    mbarrier.arrive(empty.index(at))",
        "mbarrier.arrive(empty.index(at))\n    dk = warpgroup_mma_wait(0, deps=[dk])",
    ),
    "dK, dV: statistics that nobody waits for": (
        backward, "_dkdv_kernel", "mbarrier.init(q_full.index(i), count=2)",
        "mbarrier.init(q_full.index(i), count=1)",
    ),
    "dK, dV: rows of another head": (
        backward, "_produce_rows", "head * G + g, 0]", "head * G, 0]",
    ),
    "dK, dV: statistics of another block": (
        backward, "_produce_rows", "row = m + gl.arange", "row = gl.arange",
    ),
    "dK, dV: under another mask": (
        backward, "_gather_rows", "offs_n[:, None] <= gl.arange", "offs_n[:, None] < gl.arange",
    ),
    "dK, dV: delta left out": (
        backward, "_gather_rows", "pt * (dpt - delta_s.index(at).load(of_rows)[None, :])",
        "pt * dpt",
    ),
}  # fmt: skip


def parted(faults):
    """Every seventh fault in `make hopper`; the others where `full` is asked for."""
    return [pytest.param(x, marks=[pytest.mark.full] * (i % 7 > 0)) for i, x in enumerate(faults)]


@pytest.mark.parametrize("name", parted(IN_SOURCE))
def test_faults_in_the_source(name):
    module, kernel, old, new = IN_SOURCE[name]
    with source(module, kernel, old, new):
        assert killed()


def without_barrier(text: str) -> str:
    """The code without the bar.sync before the last consumer's thread gives V back. (That of K is
    covered by the one of V before, which the producer waits for first.)"""
    lines = text.split("\n")
    barriers = [
        i
        for i, line in enumerate(lines)
        if "bar.sync" in line
        and "mbarrier.arrive" in "".join(lines[i : i + 8])
        and re.search(r"wgmma\.wait_group\S*\s+0;", "".join(lines[i - 8 : i]))
    ]
    return "\n".join(lines[: barriers[-1]] + lines[barriers[-1] + 1 :])


def test_a_warpgroup_meets_before_one_of_its_threads_arrives():
    assert killed({"_forward_kernel": without_barrier})


def test_the_waits_of_the_second_consumer_are_hidden_by_turns_alone():
    """Consumer 1 multiplies behind consumer 0, which has waited for the same copy and then given it
    the turn: its own wait adds nothing. Without turns it does."""
    old = "mbarrier.wait(k_full.index(k_at), j // BUFFERS & 1)"
    new = f"if OWN == 0:\n        {old}"
    config = launch.HOPPER["forward"]
    with source(forward, "_attend", old, new):
        assert not killed()
        launch.HOPPER["forward"] = config._replace(ping_pong=False)
        try:
            assert killed()
        finally:
            launch.HOPPER["forward"] = config


LOST_OVERLAP = {  # no result changes: `make aot` finds these
    "the softmax waits for the values": (
        forward, "_attend", "s = warpgroup_mma_wait(1, deps=[s])",
        "s = warpgroup_mma_wait(0, deps=[s])",
    ),
    "the values are multiplied synchronously": (
        forward, "_attend", "acc = warpgroup_mma(p, v, acc, is_async=True)",
        "acc = warpgroup_mma(p, v, acc)",
    ),
    "the values are waited for before the softmax": (
        forward, "_attend", "weights, shrink, row_sum, row_max = _weights(",
        "acc = warpgroup_mma_wait(0, deps=[acc])\n"
        "    weights, shrink, row_sum, row_max = _weights(",
    ),
    "dQ: the weights wait for dP": (
        backward, "_gather_keys", "s = warpgroup_mma_wait(2, deps=[s])",
        "s = warpgroup_mma_wait(1, deps=[s])",
    ),
    "dK, dV: dV is multiplied synchronously": (
        backward, "_gather_rows", "dv = warpgroup_mma(weights, do, dv, is_async=True)",
        "dv = warpgroup_mma(weights, do, dv)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(x, marks=[pytest.mark.full] * (i >= 2)) for i, x in enumerate(LOST_OVERLAP)],
)
def test_lost_overlap_is_a_problem_of_what_ships(name):
    module, function, old, new = LOST_OVERLAP[name]
    job = aot.Job("hopper", 90, 64, "bfloat16", "G2 hopper")
    with source(module, function, old, new):
        said = aot.problems(aot.compile_job(job))
    assert said and all("products in flight" in line for line in said)
