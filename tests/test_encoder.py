"""BTokEncoder: order, packing budget, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import tiny_qwen2_vl

from btok import BTokEncoder, Side

RNG = np.random.default_rng(0)
PICTURES = [RNG.integers(0, 256, (24, 32, 3), dtype=np.uint8) for _ in range(6)]
SIDES = [
    Side("a red seven"),
    Side(images=[PICTURES[0]]),
    Side("which digit?", images=PICTURES[1:3]),
    Side("what motion?", video=PICTURES[3:6]),
    Side("x" * 60),
    Side("y"),
]


def test_rows_keep_their_order_whatever_the_budget():
    encoder = BTokEncoder(*tiny_qwen2_vl())
    rows = encoder.encode(SIDES)
    assert rows.shape == (6, 64) and rows.dtype == np.float32
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    for budget in (1, 40, 100):
        assert np.abs(encoder.encode(SIDES, batch_tokens=budget) - rows).max() < 1e-6
    backwards = encoder.encode(SIDES[::-1])[::-1]
    assert np.abs(backwards - rows).max() < 1e-6
    assert np.abs(rows[0] - rows[1]).max() > 1e-2


def test_the_mode_of_the_model_is_left_as_it_was():
    model, processor = tiny_qwen2_vl()
    for training in (True, False):
        model.train(training)
        BTokEncoder(model, processor).encode(SIDES[:1])
        assert model.training == training


def test_nothing_to_embed_is_refused():
    encoder = BTokEncoder(*tiny_qwen2_vl())
    with pytest.raises(ValueError, match="sides is empty"):
        encoder.encode([])
    with pytest.raises(TypeError, match="image is a int"):
        encoder.encode([Side(images=[3])])
