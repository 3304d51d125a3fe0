"""Launches of the contrastive loss's kernels: what they are compiled for, their grids and tables.

No kernel is compiled: what Triton would compile is taken down, in a process of its own, as this one
may have the interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from btok_kernels import launch

ROOT = Path(__file__).resolve().parent.parent
SHARED = ("sums", "d_logits", "d_query", "d_candidates")
ARCHITECTURES = (0, 80, 86, 89, 90, 100, 103, 120)

# prints [kernel, grid, what it is compiled for] of each launch
RECORD = """
import json, sys
from types import SimpleNamespace
from unittest import mock
import torch
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from tests.compiled.driver import Target
from btok_kernels import contrastive_loss as op, contrastive_loss_triton as kernels, launch

seen = []
recorded = JITFunction.run

def compile(source, **_):
    names = source.fn.arg_names
    attributes = sorted((names[at[0]], what) for at, what in source.attrs.items())
    constants = sorted((names[at[0]], str(value)) for at, value in source.constants.items())
    found = json.dumps([source.signature, attributes, constants])
    return SimpleNamespace(found=found, result=None)

def take_down(function, *args, grid, warmup, **options):
    kernel = recorded(function, *args, grid=grid, warmup=True, **options)
    seen.append((function.__name__, grid, kernel.found))

driver.set_active(Target(90))
with (
    mock.patch("triton.compiler.compile", compile),
    mock.patch.object(JITFunction, "run", take_down),
    mock.patch.object(launch, "architecture", lambda device: 90),
):
    for rows, dim, negatives, chunk, with_grad in json.loads(sys.argv[1]):
        query = torch.zeros(rows, dim, dtype=torch.float16)
        ids = torch.arange(rows)
        h = torch.zeros(rows, negatives, dim, dtype=torch.float16) if negatives else None
        call = op.Call(query, query, 0.02, h, ids, ids, bidirectional=True, margin=0.1)
        ranks = op.Ranks(None, [rows], slice(0, rows), 1 / rows)
        with mock.patch.object(launch, "contrastive_chunk", lambda *_: chunk):
            kernels.fused(call, ranks, with_grad)
print(json.dumps(seen))
"""


def launches(*calls):
    """(kernel, grid, what it is compiled for) of calls (rows, D, negatives, chunk, gradients)."""
    pytest.importorskip("triton")
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", RECORD, json.dumps(calls)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_other_batch_sizes_compile_nothing():
    """Rows, columns, chunks and tiles that divide by 16, that do not, and that are 1."""
    sizes = [(256, 2), (255, 1), (250, 3), (17, 2), (1, 1), (4112, 1)]
    calls = [
        (rows, 64, negatives, chunk, True) for rows, negatives in sizes for chunk in (0, 5000, 100)
    ]
    found = launches(*calls)
    kinds = {(kernel, compiled) for kernel, _, compiled in found}
    names = sorted(kernel for kernel, _ in kinds)
    assert names == sorted(f"_{name}_kernel" for name in (*SHARED, "rows", "columns"))


def test_rows_of_logits_are_aligned_whatever_their_number():
    """Else each element of a row is an access of its own."""
    for kernel, _, compiled in launches((251, 64, 0, 1000, True)):
        if kernel in ("_rows_kernel", "_columns_kernel"):
            assert ["stride_s", [["tt.divisibility", 16]]] in json.loads(compiled)[1]


def test_grids_hold_as_many_candidates_as_memory_does():
    """CUDA allows 65,535 blocks in a grid's second dimension, 2^31 - 1 in its first."""
    width = launch.contrastive_config("sums", torch.float16, 90)["BLOCK_M"]
    found = launches((2, 1, 65_536 * width // 2, 0, False))
    assert max(grid[0] for _, grid, _ in found) > 65_535
    assert all(size <= 65_535 for _, grid, _ in found for size in grid[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_has_a_configuration(arch, dtype):
    blocks = {name: launch.contrastive_config(name, dtype, arch) for name in SHARED}
    assert len({block["BLOCK_M"] for block in blocks.values()}) == 1
    assert blocks["d_query"]["BLOCK_M"] % blocks["d_query"]["BLOCK_K"] == 0
    for name in ("rows", "columns"):
        assert launch.contrastive_config(name, dtype, arch)["num_stages"] == 1  # no product
    if arch:  # with two, a loop waits for all its copies before its first product
        assert all(block["num_stages"] >= 3 for block in blocks.values())


@pytest.fixture
def tuned(monkeypatch):
    """BTOK_AUTOTUNE=1 on sm_90; what was searched, of which the last candidate always wins."""
    searched = []

    def search(title, default, candidates, run):
        searched.append((title, default, candidates, run))
        return candidates[-1]

    monkeypatch.setattr(launch, "architecture", lambda device: 90)
    monkeypatch.setattr(launch, "search", search)
    monkeypatch.setattr(launch, "found", {})
    monkeypatch.setenv("BTOK_AUTOTUNE", "1")
    return searched


@pytest.mark.parametrize("kernel", [*SHARED, "rows", "columns"])
def test_the_search_keeps_what_kernels_share(kernel, tuned):
    query = torch.zeros(4, 64, dtype=torch.float16)
    options = (True, False, False)
    found = launch.contrastive(kernel, query, options, len)
    ((title, default, candidates, run),) = tuned
    assert kernel in title and run is len
    assert default == launch.contrastive_config(kernel, torch.float16, 90) and default in candidates
    assert found == candidates[-1] and len(candidates) > 10
    if kernel in SHARED:
        assert {x["BLOCK_M"] for x in candidates} == {default["BLOCK_M"]}
    if kernel == "d_query":
        assert all(x["BLOCK_M"] % x["BLOCK_K"] == 0 for x in candidates)
    assert all(size >= 16 for x in candidates for name, size in x.items() if name == "BLOCK_D")
    assert launch.contrastive(kernel, query, options, len) == found
    assert len(tuned) == 1, "searched once"
    launch.contrastive(kernel, query, (True, True, False), len)
    assert len(tuned) == 2, "other options take other registers"


def test_without_the_variable_nothing_is_searched(tuned, monkeypatch):
    monkeypatch.delenv("BTOK_AUTOTUNE")
    query = torch.zeros(4, 64, dtype=torch.float16)
    found = launch.contrastive("sums", query, (False, False, False), len)
    assert found == launch.contrastive_config("sums", torch.float16, 90) and not tuned
