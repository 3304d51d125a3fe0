"""The compiled kernels of condensed attention, executed: forward, delta, dK and dV, dQ.

What is executed is the PTX that ships for each architecture, dtype and head dim, launched by the
library's own host code.
"""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from btok_kernels import launch

if launch.interpreted():
    pytest.skip("Triton compiles nothing under TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

from btok_kernels.condensed_attention import HEAD_DIMS
from tests.compiled.cases import LAYOUTS, attention, random_layout
from tests.compiled.conftest import PROPERTY

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = [  # architecture, dtype, head dim, query and key heads, layout
    (90, BF16, 128, (6, 1), "long"),
    (90, BF16, 128, (2, 2), "ragged"),
    (90, FP16, 128, (3, 1), "tail"),
    (90, BF16, 64, (3, 1), "long"),
    (90, FP16, 64, (2, 2), "no targets"),
    (90, BF16, 80, (4, 2), "K = 0"),
    (90, BF16, 16, (2, 2), "no sources"),
    (90, BF16, 256, (2, 1), "ragged"),
    (90, FP32, 64, (2, 1), "not condensed"),
    (80, BF16, 128, (3, 1), "long"),
    (80, FP16, 128, (2, 2), "tail"),
    (80, BF16, 64, (6, 1), "no targets"),
    (80, FP16, 96, (4, 2), "not condensed"),
    (80, BF16, 256, (2, 1), "ragged"),
    (80, BF16, 32, (2, 2), "no sources"),
    (80, FP32, 256, (1, 1), "no sources"),
    (80, FP32, 32, (2, 2), "ragged"),
    (90, BF16, 128, (6, 1), "budgets"),
    (90, FP16, 64, (2, 2), "large budgets"),
    (90, BF16, 80, (2, 2), "large budgets"),
    (90, BF16, 256, (2, 1), "budgets"),
    (80, BF16, 128, (2, 2), "budgets"),
    (80, FP16, 64, (3, 1), "large budgets"),
    (80, FP32, 32, (2, 2), "budgets"),
]


def check(record, arch, dtype, dim, heads, layout, **options):
    errors = attention(arch, dtype, dim, heads, layout, **options)
    record(PROPERTY, [arch, str(dtype)[6:], errors])
    assert max(errors.values()) <= 1, errors


@pytest.mark.parametrize(
    ("arch", "dtype", "dim", "heads", "layout"),
    CASES,
    ids=[f"sm_{a}-{str(t)[6:]}-{d}-{h[0]}x{h[1]}-{n.replace(' ', '_')}" for a, t, d, h, n in CASES],
)
def test_kernels(record_property, arch, dtype, dim, heads, layout):
    check(record_property, arch, dtype, dim, heads, LAYOUTS[layout], seed=dim)


@pytest.mark.parametrize("arch", [80, 90])
def test_a_scale_of_zero_gives_the_mean_of_what_is_seen(record_property, arch):
    check(record_property, arch, BF16, 64, (2, 1), LAYOUTS["tail"], scale=0.0)


@pytest.mark.full
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("arch", [80, 90])
def test_every_layout(record_property, arch, name):
    for heads in ((2, 2), (6, 1)):
        check(record_property, arch, BF16, 64, heads, LAYOUTS[name], seed=1)


@pytest.mark.full
@pytest.mark.parametrize(
    ("arch", "dtype", "dim", "heads"),
    list(itertools.product([80, 90], [BF16, FP16, FP32], HEAD_DIMS, [(2, 2), (6, 1)])),
)
def test_random_layouts(record_property, arch, dtype, dim, heads):
    rng = random.Random(f"{arch} {dtype} {dim} {heads}")
    for seed in range(2):
        check(record_property, arch, dtype, dim, heads, random_layout(rng), seed=seed)
