"""The shipped Triton launches, compiled ahead of time: what they must not do, and what is said.

A few of them here; `make aot`, which CI runs, compiles all.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from btok_kernels import launch

ROOT = Path(__file__).resolve().parents[2]
LOOP = {
    "instructions": 373,
    "products": 12,
    "drained": 0,
    "exponentials": 34,
    "barriers": 2,
    "waits": ("copies 2", "products 0", "products 0"),
    "copies": 8,
    "waits_for_all": False,
    "ratio": 1.0,
    "tflops": 400.0,
    "beside": 30,
}
GOOD = {
    "kernel": "forward",
    "arch": 90,
    "dim": 128,
    "dtype": "bfloat16",
    "variant": "G6",
    "blocks": "D128 M128 N64",
    "warps": 8,
    "stages": 3,
    "shared": 98304,
    "registers": 200,
    "stack": 0,
    "spills": 0,
    "serialized": (),
    "hgmma": 32,
    "hmma": 0,
    "hazards": (),
}


def row(changes=None, *loops):
    """A sound forward but for `changes`; its two main loops but for those of each of `loops`."""
    from tests.compiled import (
        aot,  # imports triton, which must not happen before the interpreter's tests
    )

    made = [aot.LoopRow(**(LOOP | loop)) for loop in loops or ({}, {"instructions": 540})]
    return aot.Row(**(GOOD | {"loops": tuple(made)} | (changes or {})))


def run(*rows):
    from tests.compiled import aot

    return aot.Run("3.6.0", {90: "12.8.93"}, list(rows))


def run_alone(arguments, **variables):
    """Python in a process that compiles, whatever this one does."""
    triton = importlib.util.find_spec("triton")
    if triton is None:
        pytest.skip("triton is not installed")
    tools = Path(str(triton.origin)).parent / "backends/nvidia/bin"
    if missing := [name for name in ("ptxas", "nvdisasm") if not (tools / name).exists()]:
        pytest.skip(f"this installation of triton has no {' and no '.join(missing)}")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    found = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": found, **variables}
    result = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def check(folder, *arguments):
    """The page of `--check`."""
    page = folder / "aot.md"
    command = ["-m", "tests.compiled.aot", "--check", "--out", str(page), *arguments]
    run_alone(command, TRITON_CACHE_DIR=str(folder / "cache"))
    return page.read_text()


def test_attention_launches_for_hopper_are_sound(tmp_path):
    options = ("--only", "attention", "--archs", "90", "--head-dims", "128", "--groups", "6")
    table = check(tmp_path, *options, "--dtypes", "bfloat16")
    for kernel in ("forward", "delta", "dkdv", "dq"):
        assert f"| {kernel} | 90 | 128 | bfloat16 | G6 |" in table


@pytest.mark.full
def test_contrastive_launches_for_hopper_are_sound(tmp_path):
    table = check(tmp_path, "--only", "contrastive", "--archs", "90", "--dtypes", "bfloat16")
    for kernel in ("rows", "columns", "sums", "d_logits", "d_query", "d_candidates"):
        assert f"| {kernel} | 90 | 1536 | bfloat16 |" in table


def test_late_interactions_launches_for_hopper_are_sound(tmp_path):
    table = check(tmp_path, "--only", "late", "--archs", "90", "--dtypes", "bfloat16")
    for kernel in ("maxima", "d_query_tokens", "d_key_tokens"):
        assert f"| {kernel} | 90 | 128 | bfloat16 | K16 |" in table


@pytest.mark.full
def test_all_launches_are_sound(tmp_path):
    assert "; 0 problems." in check(tmp_path)


@pytest.mark.parametrize(
    ("changes", "loops", "said"),
    [
        ({}, [], None),
        ({"arch": 80, "hgmma": 0, "hmma": 64}, [], None),
        ({"dtype": "float32", "hgmma": 0}, [], None),
        ({"kernel": "delta", "blocks": "D128 M64", "hgmma": 0, "loops": ()}, [], None),
        ({"blocks": "D128 M32 N64", "hgmma": 0, "hmma": 64}, [], None),
        ({"spills": 64}, [], None),
        ({"spills": 72}, [], "spills 72 bytes"),
        ({"shared": 227 << 10}, [], None),
        ({"shared": (227 << 10) + 1}, [], "232449 bytes of shared memory, limit 232448"),
        ({"arch": 80, "hgmma": 0, "hmma": 64, "shared": 170000}, [], "limit 166912"),
        ({"hgmma": 0, "hmma": 64}, [], "no HGMMA"),
        ({"blocks": "D128 M32 N64", "hgmma": 0}, [], "no tensor-core instruction"),
        ({"arch": 80, "hgmma": 0}, [], "no tensor-core instruction"),
        ({"loops": ()}, [], "no loop with products was found"),
        ({"serialized": ("C7515",)}, [], "ptxas serialises its products: C7515"),
        ({"hazards": ("at 0x10 FADD writes R24",)}, [], "at 0x10 FADD writes R24"),
        # the last product of each of its two matrix products may be alone in its group
        ({}, [{"drained": 2}], None),
        ({}, [{}, {"drained": 3}], "main loop 2 of 2: 3 of 12 products are waited for one by one"),
        ({}, [{"ratio": 1.05}], None),
        ({}, [{"ratio": 1.06}, {}], "main loop 1 of 2: executed / useful products 1.06"),
        ({"stages": 1}, [{"waits_for_all": True}], None),
        ({"stages": 1}, [{"copies": 0}], "main loop 1 of 1: copies nothing ahead"),
        ({}, [{"waits_for_all": True}], "waits for all copies before its first product, 3 stages"),
        # compiled only: nothing is known of its machine code
        ({"arch": 100, "hgmma": 0, "loops": ()}, [], None),
        ({"arch": 120, "hgmma": 0, "loops": (), "shared": 100 << 10}, [], "limit 101376"),
    ],
)
def test_the_check_fails_on_what_must_not_ship(changes, loops, said, tmp_path):
    from tests.compiled import aot

    runs = [run(row(), row(changes, *loops))]
    assert len(aot.problems(runs[0].rows)) == (said is not None)
    page = tmp_path / "aot.md"
    if said is None:
        aot.finish(runs, page, check=True)
        return
    with pytest.raises(SystemExit) as error:
        aot.finish(runs, page, check=True)
    assert said in str(error.value.code)
    assert "forward sm_" in str(error.value.code)
    assert said in page.read_text()


PTX = """
setmaxnreg.dec.sync.aligned.u32 \t24;
$L__BB0_1:
    cp.async.bulk.tensor.5d.shared::cta.global [%r1], [%rd1];
    @%p1 bra \t$L__BB0_1;
    setmaxnreg.inc.sync.aligned.u32 \t240; // once more
$L__BB0_2: // the warpgroups in a loop
    setmaxnreg.inc.sync.aligned.u32 \t232;
    wgmma.commit_group.sync.aligned;
    ex2.approx.ftz.f32 %r2, %r1;
$L__BB0_3:
    wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%r3};
    wgmma.commit_group.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%r4};
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned \t1;
    ex2.approx.ftz.f32 %r2, %r3;
    wgmma.wait_group.sync.aligned \t0;
    @%p2 bra \t$L__BB0_3;
    bra.uni \t$L__BB0_2;
"""


@pytest.mark.parametrize(
    ("kernel", "old", "new", "said"),
    [
        ("forward", "", "", None),
        ("forward", "\t1;", "\t0;", "leave (0, 0) products in flight, 0 over the softmax"),
        ("forward", "\t0;\n    @%p2", "\t1;\n    @%p2", "leave (1, 1) products in flight, 1"),
        ("forward", "wait_group.sync.aligned \t1;", "fence;", "leave (0,) products in flight, 2"),
        ("forward", "wgmma.mma_async", "mma", "no loop with products and a softmax"),
        ("dq", "", "", "leave (1, 0) products in flight, 1 over the softmax, not (2, 1, 0) and 2"),
    ],
)
def test_products_that_are_not_in_flight_as_they_should_be(kernel, old, new, said):
    from tests.compiled import aot, overlap

    groups = overlap.warpgroups(PTX.replace(old, new) if old else PTX)
    changes = {"kernel": kernel, "variant": "G6 hopper", "warpgroups": groups, "warps": 12}
    found = aot.problems([row(changes)])
    assert len(found) == (said is not None)
    assert said is None or said in found[0]


def test_registers_of_warpgroups_are_in_a_table_of_their_own():
    from tests.compiled import aot, overlap

    groups = overlap.warpgroups(PTX)
    assert (groups.consumers, groups.producers) == ((232,), (24,))
    assert overlap.read(json.loads(json.dumps(groups))) == groups
    hopper = {"variant": "G6 hopper", "warpgroups": groups}
    rows = [row(), row(hopper), row(hopper | {"variant": "G1 hopper"}, {"beside": 3}, {})]
    page = aot.table([run(*rows)]).partition("### Warpgroups")[2]
    assert page.splitlines()[-2:] == [
        "| forward | 128 | G1 | bfloat16 | 232 | 24 | 1, 0 | 1 | 3 of 34 / 30 of 34 |",
        "| forward | 128 | G6 | bfloat16 | 232 | 24 | 1, 0 | 1 | 30 of 34 |",
    ]
    assert "### Warpgroups" not in aot.table([run(row())])


def test_the_table_is_sorted_and_merges_equal_groups_and_dtypes():
    from tests.compiled import aot

    rows = [row({"kernel": "dq"}), row(), row({"variant": "G1"})]
    rows += [row({"variant": name, "dtype": "float16"}) for name in ("G6", "G1")]
    lines = aot.table([run(*rows)]).splitlines()
    assert lines == aot.table([run(*rows[::-1])]).splitlines()
    assert [line[:56] for line in lines[-2:]] == [
        "| dq | 90 | 128 | bfloat16 | G6 | D128 M128 N64 | 8 | 3 ",
        "| forward | 90 | 128 | bfloat16, float16 | G1, G6 | D128",
    ]
    assert (
        "| 373 / 540 | 12 | 34 | 2 | copies 2, 2 x products 0 | 8 | 1.00 | 1.00 | 400 |"
        in lines[-1]
    )


def test_the_summary_has_the_rate_of_unmasked_loops():
    from tests.compiled import aot

    slow = {"instructions": 999, "tflops": 1.0}
    rows = [
        row({"kernel": name}, slow, {"tflops": rate})
        for name, rate in (("forward", 400.0), ("dkdv", 320.0), ("dq", 240.0))
    ]
    (rates,) = aot.attention_rates(rows).values()
    assert rates["forward"] == 400.0
    assert rates["backward"] == pytest.approx(10 / (8 / 320 + 6 / 240))
    assert "| 90 | 128 | bfloat16 | G6 | 400 | 200 | 320 | 240 |" in aot.table([run(*rows)])


def test_rows_of_another_triton_come_back_as_they_were(tmp_path):
    from tests.compiled import aot, overlap

    groups = overlap.Warpgroups((240,), (24,), (overlap.WANTED["dq"],))
    before = run(
        row({"hazards": ("at 0x10",)}),
        row({"loops": (), "kernel": "delta"}),
        row({"warpgroups": groups}),
    )
    (tmp_path / "rows.json").write_text(json.dumps(before))
    assert aot.read_run(tmp_path / "rows.json") == before
    page = aot.table([before, before._replace(triton="3.9.0")])
    assert "1 hazards found" in page
    assert "## Triton 3.9.0" in page


def test_code_that_would_be_the_same_is_not_compiled_again():
    from tests.compiled import aot

    arguments = {"only": None, "head_dims": [64, 80], "groups": None, "rows": None}
    arguments |= {"archs": [80, 90, 100], "dtypes": ["bfloat16", "float16", "float32"]}
    jobs = list(aot.jobs(argparse.Namespace(**arguments)))
    attention = [job[1:] for job in jobs if job.op == "attention"]
    assert attention == [
        (80, 64, "bfloat16", "G6"),
        (80, 80, "bfloat16", "G6"),
        (80, 64, "bfloat16", "G1"),
        (80, 64, "bfloat16", "G6 budgets"),
        (80, 64, "float16", "G6"),
        (80, 64, "float32", "G6"),
        (80, 80, "float32", "G6"),
        (90, 64, "bfloat16", "G6"),
        (90, 80, "bfloat16", "G6"),
        (90, 64, "bfloat16", "G1"),
        (90, 64, "bfloat16", "G6 budgets"),
        (90, 64, "float16", "G6"),
        (100, 64, "bfloat16", "G6"),
    ]
    loss = [(job.arch, job.dtype) for job in jobs if job.op == "contrastive"]
    assert len(loss) == 2 * 6 and (90, "float32") not in loss
    arguments |= {"only": "attention", "groups": [1], "archs": [90], "dtypes": ["float32"]}
    arguments |= {"head_dims": [64]}
    (job,) = aot.jobs(argparse.Namespace(**arguments))
    assert job == aot.Job("attention", 90, 64, "float32", "G1")


def test_of_another_triton_float16_is_of_the_kernels_for_hopper_alone(monkeypatch):
    from tests.compiled import aot

    monkeypatch.setattr(launch, "no_gluon", lambda: None)
    arguments = {"only": None, "head_dims": [64, 80, 256], "groups": None, "rows": Path("rows")}
    arguments |= {"archs": [90], "dtypes": ["bfloat16", "float16"]}
    half = [job for job in aot.jobs(argparse.Namespace(**arguments)) if job.dtype == "float16"]
    assert half == [aot.Job("hopper", 90, dim, "float16", "G6 hopper") for dim in (64, 80)]
    arguments |= {"only": "attention"}
    assert {job.dtype for job in aot.jobs(argparse.Namespace(**arguments))} == {"bfloat16"}


def test_host_code_that_starts_a_compiled_kernel_is_recorded(tmp_path):
    """Under a driver that only names its target: by the kernel's launcher, not by Triton's jit."""
    script = tmp_path / "script.py"  # Triton reads a kernel's source from its file
    script.write_text("""
import torch
import triton
import triton.language as tl
from tests.compiled.driver import recorded_launches

@triton.jit
def _double_kernel(X, N, BLOCK_N: tl.constexpr):
    offs_n = tl.arange(0, BLOCK_N)
    x = tl.load(X + offs_n, mask=offs_n < N)
    tl.store(X + offs_n, 2 * x, mask=offs_n < N)

x = torch.zeros(24)
for arch in (90, 80, 90):
    with recorded_launches(arch) as launches:
        compiled = _double_kernel[(1,)](x, 24, BLOCK_N=32)
        assert [launch.name for launch in launches.values()] == ["_double_kernel"]
        launches.clear()
        compiled[(1, 1, 1)](x, 24, 32)
        (launch,) = launches.values()
    assert launch.kernel is compiled
    assert f"sm_{arch}" in launch.kernel.asm["ptx"]
    assert launch.constants["BLOCK_N"] == 32
""")
    run_alone([str(script)], TRITON_CACHE_DIR=str(tmp_path / "cache"))
