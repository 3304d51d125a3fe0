"""The kernels for Hopper on an sm_90 device with triton 3.9; elsewhere `make hopper` runs them."""

from __future__ import annotations

import random

import pytest
import torch

from btok.kernels import CondensedLayout, condensed_attention
from btok_kernels import launch

DEVICE = "cuda"
if not torch.cuda.is_available() or launch.interpreted():
    pytest.skip("needs CUDA", allow_module_level=True)
PROBE = torch.empty(1, 1, 64, dtype=torch.bfloat16, device=DEVICE)
if REASON := launch.no_hopper(PROBE, PROBE, PROBE):
    pytest.skip(REASON, allow_module_level=True)

DTYPES = [torch.bfloat16, torch.float16]
STEPS = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # between neighbours, relatively


def layouts(seed):
    """Three sequences, empty and one-token parts among them, maybe padded to more rows."""
    rng = random.Random(seed)
    source, target = ([rng.choice([0, 1, 70, 300, 700]) for _ in range(3)] for _ in range(2))
    btoks = rng.choice([0, 1, 4, 64])
    rows = sum(source) + sum(target) + 3 * btoks + rng.choice([0, 5, 140])
    condense = rng.random() < 0.75
    return CondensedLayout.from_lengths(source, target, btoks, condense, num_rows=rows).to(DEVICE)


def inputs(layout, heads, key_heads, dim, dtype, seed=0):
    """q, k, v and dO."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(layout.num_rows, n, dim, generator=generator).to(DEVICE, dtype)
        for n in (heads, key_heads, key_heads, heads)
    ]


def differentiate(layout, q, k, v, d_out, impl):
    """The output and the three gradients."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = condensed_attention(*leaves, layout, impl=impl)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out.to(out.dtype))]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "key_heads"), [(2, 2), (6, 2), (12, 2)])
@pytest.mark.parametrize("dim", [64, 80, 96, 128])
def test_it_is_no_further_from_the_truth_than_the_plain_kernels(dim, heads, key_heads, dtype):
    """Than twice as far, and a step of the dtype."""
    for seed in range(3):
        layout = layouts(seed)
        tensors = inputs(layout, heads, key_heads, dim, dtype, seed)
        truth = differentiate(layout, *(x.double() for x in tensors), impl="reference")
        plain, found = (differentiate(layout, *tensors, impl=i) for i in ("triton", "hopper"))
        names = ("out", "dq", "dk", "dv")
        for name, exact, one, other in zip(names, truth, plain, found, strict=True):
            bound = 2 * (one - exact).abs().max() + STEPS[dtype] * exact.abs().max()
            error = (other - exact).abs().max()
            assert error <= bound, f"{name}, seed {seed}: {error:.2e} of {bound:.2e}"


def test_the_same_bits_on_every_run():
    layout = layouts(5)
    tensors = inputs(layout, 12, 2, 128, torch.bfloat16)
    first = differentiate(layout, *tensors, impl="hopper")
    for _ in range(5):
        for one, other in zip(first, differentiate(layout, *tensors, impl="hopper"), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dim", [64, 128])
def test_what_is_not_finite_stays_in_its_sequence(dim):
    layout = CondensedLayout.from_lengths([300, 200, 131], [40, 0, 70], 4).to(DEVICE)
    tensors = inputs(layout, 6, 2, dim, torch.bfloat16)
    right = differentiate(layout, *tensors, impl="hopper")
    start, end = (int(layout.bounds[1, at]) for at in (0, 3))
    for x in tensors:
        x[start:end] = torch.nan
    others = torch.ones(layout.num_rows, dtype=torch.bool, device=DEVICE)
    others[start:end] = False
    for one, other in zip(right, differentiate(layout, *tensors, impl="hopper"), strict=True):
        assert torch.equal(one[others], other[others])
        assert other[start:end].isnan().any()


@pytest.mark.parametrize("kernel", ["forward", "dq", "dkdv"])
@pytest.mark.parametrize("dim", [64, 128])
def test_every_launch_of_a_search_gives_the_same(monkeypatch, dim, kernel):
    """But for rounding."""
    layout = layouts(7)
    tensors = inputs(layout, 12, 2, dim, torch.bfloat16)
    want = differentiate(layout, *tensors, impl="hopper")
    for config in launch.hopper_candidates(kernel, dim):
        monkeypatch.setitem(launch.HOPPER, kernel, config)
        for one, other in zip(want, differentiate(layout, *tensors, impl="hopper"), strict=True):
            difference = (one.float() - other.float()).abs().max()
            assert difference <= 4 * STEPS[torch.bfloat16] * one.abs().max(), config
