"""The compiled kernels of the contrastive loss, executed, both ways, with every option."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from test_contrastive_loss import OPTIONS

from btok_kernels import launch

if launch.interpreted():
    pytest.skip("Triton compiles nothing under TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

from tests.compiled.cases import contrastive
from tests.compiled.conftest import PROPERTY

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
RECOMPUTE = 0
CASES = [  # architecture, dtype, rows, D, rows of a chunk, options
    (90, BF16, 300, 200, RECOMPUTE, "plain"),
    (90, BF16, 150, 136, RECOMPUTE, "everything"),
    (90, FP16, 129, 64, RECOMPUTE, "bidirectional margin"),
    (90, FP32, 70, 40, RECOMPUTE, "everything"),
    (90, BF16, 150, 64, 64, "everything"),
    (90, FP16, 40, 64, 64, "plain"),
    (80, BF16, 150, 136, RECOMPUTE, "everything"),
    (80, FP16, 300, 80, RECOMPUTE, "negatives"),
    (80, BF16, 17, 20, RECOMPUTE, "ids"),
    (80, FP16, 150, 64, 64, "everything"),
    (80, FP32, 40, 24, 16, "bidirectional"),
]


def check(record, arch, dtype, rows, dim, chunk, options, **more):
    errors = contrastive(arch, dtype, rows, dim, chunk=chunk, **OPTIONS[options], **more)
    record(PROPERTY, [arch, str(dtype)[6:], errors])
    ran = {"rows"} if chunk else {"sums", "d_logits", "d_query", "d_candidates"}
    assert ran <= errors.keys()
    assert max(errors.values()) <= 1, errors


@pytest.mark.parametrize(
    ("arch", "dtype", "rows", "dim", "chunk", "options"),
    CASES,
    ids=[f"sm_{a}-{str(t)[6:]}-{n}x{d}-{c}-{o.replace(' ', '_')}" for a, t, n, d, c, o in CASES],
)
def test_kernels(record_property, arch, dtype, rows, dim, chunk, options):
    check(record_property, arch, dtype, rows, dim, chunk, options)


@pytest.mark.full
@pytest.mark.parametrize(
    ("arch", "dtype", "options", "chunk"),
    list(itertools.product([80, 90], [BF16, FP16, FP32], OPTIONS, [RECOMPUTE, 64])),
)
def test_random_shapes(record_property, arch, dtype, options, chunk):
    rng = random.Random(f"{arch} {dtype} {options} {chunk}")
    rows, dim = rng.choice([1, 16, 129, rng.randrange(2, 200)]), rng.choice([8, 20, 64, 136])
    panel = rng.choice([128, 256, 4096])
    check(record_property, arch, dtype, rows, dim, chunk, options, seed=rows, panel=panel)
