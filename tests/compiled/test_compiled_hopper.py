"""The compiled kernels of condensed attention for Hopper, executed, warpgroup by warpgroup.

With triton 3.9 or newer alone: `make hopper` runs this beside the environment's own.
"""

from __future__ import annotations

import random

import pytest
import torch

from btok_kernels import launch

if launch.interpreted():
    pytest.skip("Triton compiles nothing under TRITON_INTERPRET=1", allow_module_level=True)
if reason := launch.no_gluon():
    pytest.skip(reason, allow_module_level=True)

from btok_kernels.condensed_attention import condensed_attention
from tests.compiled.cases import LAYOUTS, attention, random_layout
from tests.compiled.conftest import PROPERTY
from tests.compiled.device import device

BF16, FP16 = torch.bfloat16, torch.float16
HEADS = [(6, 1), (2, 2), (2, 1), (1, 1), (4, 2)]


def check(record, dtype, dim, heads, layout, seed, **options):
    errors = attention(90, dtype, dim, heads, layout, seed=seed, impl="hopper", **options)
    record(PROPERTY, [90, str(dtype)[6:], {f"hopper {name}": x for name, x in errors.items()}])
    assert max(errors.values()) <= 1, errors


def full_from(count, values):
    """The first ones in `make hopper`, the others where `full` is asked for."""
    return [pytest.param(x, marks=[pytest.mark.full] * (i >= count)) for i, x in enumerate(values)]


@pytest.mark.parametrize("name", full_from(0, LAYOUTS))
def test_every_layout(record_property, name):
    seed = list(LAYOUTS).index(name)
    dtype, dim = (BF16, FP16)[seed % 2], (128, 64, 128, 80, 96)[seed % 5]
    check(record_property, dtype, dim, HEADS[seed % len(HEADS)], LAYOUTS[name], seed)


@pytest.mark.parametrize(
    ("dtype", "dim", "heads", "name"),
    [
        (BF16, 128, (6, 1), "tail"),
        (FP16, 64, (3, 1), "budgets"),
        (BF16, 80, (2, 2), "K = 0"),
    ],
    ids=str,
)
def test_kernels(record_property, dtype, dim, heads, name):
    check(record_property, dtype, dim, heads, LAYOUTS[name], dim)


@pytest.mark.parametrize("seed", full_from(2, range(32)))
def test_random_layouts(record_property, seed):
    """The order in which warpgroups go on and copies arrive comes of the seed too."""
    rng = random.Random(seed)
    dtype, dim = rng.choice([BF16, FP16]), rng.choice([64, 80, 96, 128, 128])
    check(record_property, dtype, dim, rng.choice(HEADS), random_layout(rng), seed)


def test_a_scale_of_zero_gives_the_mean_of_what_is_seen(record_property):
    check(record_property, BF16, 64, (2, 1), LAYOUTS["tail"], 1, scale=0.0)


def differentiated(q, k, v, d_out, layout):
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = condensed_attention(*leaves, layout, impl="hopper")
    return out.detach(), *torch.autograd.grad(out, leaves, d_out)


def test_nan_of_one_sequence_stays_there():
    """Of the rows behind, of those before, and of the keys that a budget leaves out."""
    layout = LAYOUTS["budgets"]
    inputs = [torch.randn(layout.num_rows, heads, 64).to(BF16) for heads in (2, 1, 1, 2)]
    start, _, _, _, end = layout.sequences()[1]
    with device(90, seed=1):
        clean = differentiated(*inputs, layout)
        for x in inputs:
            x[start:end] = torch.nan
        for got, before in zip(differentiated(*inputs, layout), clean, strict=True):
            assert torch.equal(got[:start], before[:start])
            assert torch.equal(got[end:], before[end:])
            assert got[start:end].isnan().all()


def test_the_order_of_events_changes_no_bit():
    layout = LAYOUTS["long"]
    inputs = [torch.randn(layout.num_rows, heads, 64).to(BF16) for heads in (3, 1, 1, 3)]
    found = []
    for seed in range(3):
        with device(90, seed=seed):
            found.append(differentiated(*inputs, layout))
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))
