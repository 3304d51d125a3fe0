"""bench/bench_inference.py: what it counts, and that it refuses to time a wrong result."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import btok.model
from bench import bench_inference as bench

SHAPE = bench.Shape(hidden=64, heads=4, key_heads=2, mlp=96, vocabulary=120, layers=3)
INPUTS = [[i * j % 60 for i in range(1, n + 1)] for j, n in enumerate((29, 5, 60, 1, 17), 1)]


@pytest.fixture(scope="module")
def three():
    return bench.Contestants(SHAPE, "cpu", torch.float32)


def counted(call, *arguments):
    """Multiply-adds that torch counts; its plain attention makes whole squares, causal or not."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call(*arguments)
    return counter.get_total_flops() // 2


def test_multiply_adds_are_those_torch_counts(three):
    def squares(lengths, pooled=None):
        return bench.multiply_adds(SHAPE, lengths, pooled, causal=False)

    with_btoks, alone = [[3] * (32 - bench.K)], [[3] * 32]  # 32 rows are not padded
    assert counted(three.packed, three.btok, with_btoks) == squares([32], pooled=bench.K)
    assert counted(three.packed, three.last, alone) == squares([32], pooled=1)
    assert counted(three.padded, alone) == squares([32])
    assert counted(three.padded, INPUTS) == squares([60] * 5)


@pytest.mark.parametrize("pooled", [None, 1, 3])
def test_a_causal_row_sees_itself_and_what_is_before_it(pooled):
    full, length = SHAPE._replace(layers=2), 7
    rows = range(length) if pooled is None else range(length - pooled, length)
    unseen = sum(length - 1 - row for row in range(length)) + sum(length - 1 - row for row in rows)
    dense, causal = (bench.multiply_adds(full, [length], pooled, causal=c) for c in (False, True))
    assert dense - causal == 2 * SHAPE.hidden * unseen


def test_what_is_predicted_of_the_real_model():
    real = bench.Shape()
    for length in (512, 1024, 2048, 4096, 8192):
        assert 0.96 < bench.predicted(real, "padded last token", [length]) < 0.98
        assert 1 < bench.predicted(real, "packed last token", [length]) < 1.01
    mixed = [64, 8192] + [64] * 14  # one batch, all as long as the longest
    assert bench.predicted(real, "padded last token", mixed) < 0.1


def test_all_three_embed_alike(three):
    three.check(INPUTS)
    alone = torch.cat([three.packed(three.btok, [tokens]) for tokens in INPUTS])
    assert torch.allclose(three.packed(three.btok, INPUTS), alone, atol=1e-6)
    assert (three.packed(three.btok, INPUTS) - three.padded(INPUTS)).norm(dim=1).min() > 0.1


@pytest.mark.parametrize("name", ["btok", "last"])
@pytest.mark.parametrize("how", ["order", "nan", "row"])
def test_a_wrong_result_is_not_timed(three, monkeypatch, name, how):
    right = three.packed

    def wrong(model, inputs):
        if model is not getattr(three, name):
            return right(model, inputs)
        if how == "row":  # of the token before
            return right(model, [tokens[:-1] or [7] for tokens in inputs])
        return right(model, inputs) * torch.nan if how == "nan" else right(model, inputs).flip(0)

    monkeypatch.setattr(three, "packed", wrong)
    with pytest.raises(AssertionError, match=f"wrong result of {name}, .*: not timed"):
        three.check(INPUTS)


def test_one_layers_wrong_mask_is_not_timed(three, monkeypatch):
    """A key too few for the last row of a sequence, in the first layer alone."""
    right, calls = btok.model.condensed_attention, []

    def wrong(q, k, v, layout, **options):
        calls.append(0)
        if len(calls) > 1:
            return right(q, k, v, layout, **options)
        v = v.clone()
        v[layout.bounds[:, 0].long()] = 0
        return right(q, k, v, layout, **options)

    monkeypatch.setattr(btok.model, "condensed_attention", wrong)
    monkeypatch.setitem(bench.TOLERANCES, torch.float32, bench.TOLERANCES[torch.bfloat16])
    with pytest.raises(AssertionError, match="not timed"):
        three.check(INPUTS)


def test_bf16_stays_within_what_it_is_allowed():
    bench.Contestants(SHAPE, "cpu", torch.bfloat16).check(INPUTS)
