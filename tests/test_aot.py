"""The shipped Triton launches, compiled ahead of time: nothing spills, tensor cores are used.

A few of them here; `make aot`, which CI runs, compiles all.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
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
    "hgmma": 32,
    "hmma": 0,
    "stl": 0,
    "ldl": 0,
}


def check(folder, *arguments):
    """`aot.py --check` in a process that compiles, whatever this one does."""
    triton = importlib.util.find_spec("triton")
    if triton is None:
        pytest.skip("triton is not installed")
    tools = Path(str(triton.origin)).parent / "backends/nvidia/bin"
    if missing := [name for name in ("ptxas", "nvdisasm") if not (tools / name).exists()]:
        pytest.skip(f"this installation of triton has no {' and no '.join(missing)}")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    table = folder / "aot.md"
    result = subprocess.run(
        [sys.executable, ROOT / "bench/aot.py", "--check", "--out", table, *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return table.read_text()


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


@pytest.mark.full
def test_all_launches_are_sound(tmp_path):
    assert "; 0 problems." in check(tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"arch": 80, "hgmma": 0, "hmma": 64}, None),
        ({"dtype": "float32", "hgmma": 0}, None),
        ({"kernel": "delta", "blocks": "D128 M64", "hgmma": 0}, None),
        ({"blocks": "D128 M32 N64", "hgmma": 0, "hmma": 64}, None),
        ({"spills": 8}, "spills 8 bytes"),
        ({"shared": (227 << 10) + 1}, "232449 bytes of shared memory, limit 232448"),
        ({"arch": 80, "hgmma": 0, "hmma": 64, "shared": 170000}, "limit 166912"),
        ({"hgmma": 0, "hmma": 64}, "no HGMMA"),
        ({"blocks": "D128 M32 N64", "hgmma": 0}, "no tensor-core instruction"),
        ({"arch": 80, "hgmma": 0}, "no tensor-core instruction"),
    ],
)
def test_the_check_fails_on_what_must_not_ship(changes, said, tmp_path):
    from bench import aot  # imports triton, which must not happen before the interpreter's tests

    rows = [aot.Row(**GOOD), aot.Row(**(GOOD | changes))]
    assert len(aot.problems(rows)) == (said is not None)
    table = tmp_path / "aot.md"
    if said is None:
        aot.finish(rows, table, check=True)
        return
    with pytest.raises(SystemExit) as error:
        aot.finish(rows, table, check=True)
    assert said in str(error.value.code)
    assert said in table.read_text()


def test_the_table_is_sorted_and_merges_equal_groups(tmp_path):
    from bench import aot

    other = GOOD | {"variant": "G1"}
    rows = [aot.Row(**(GOOD | {"kernel": "dq"})), aot.Row(**GOOD), aot.Row(**other)]
    lines = aot.table(rows).splitlines()
    assert lines == aot.table(rows[::-1]).splitlines()
    assert [line[:44] for line in lines[-2:]] == [
        "| dq | 90 | 128 | bfloat16 | G6 | D128 M128 ",
        "| forward | 90 | 128 | bfloat16 | G1, G6 | D",
    ]
