"""The settings a checkpoint keeps: saved, loaded, asked for, refused."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError

import pytest

from btok.config import CONFIG_NAME, BTokConfig

SETTINGS = BTokConfig([7, 8], "last", "continue", "text", "token_mean")


def test_what_is_saved_is_loaded(tmp_path):
    SETTINGS.save(tmp_path, "qwen2")
    assert BTokConfig.load(tmp_path, "qwen2", None) == SETTINGS
    asked = {"pooling": "last", "target_positions": None, "ntp_reduction": "sample_mean"}
    loaded = BTokConfig.load(tmp_path, "qwen2", 2, **asked)
    assert loaded == BTokConfig((7, 8), "last", "continue", "text", "sample_mean")
    assert json.loads((tmp_path / CONFIG_NAME).read_text()) == {
        "format_version": 1,
        "architecture": "qwen2",
        "num_btoks": 2,
        "btok_token_ids": [7, 8],
        "pooling": "last",
        "target_positions": "continue",
        "vision_positions": "text",
        "ntp_reduction": "token_mean",
        "budgets": [],
        "dims": [],
        "multi_vector": False,
    }


def test_a_checkpoint_of_others_has_none(tmp_path):
    assert BTokConfig.load(tmp_path, "qwen2", 4, pooling="mean") is None


def test_it_does_not_change():
    with pytest.raises(FrozenInstanceError):
        SETTINGS.pooling = "btok"


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        (
            {"architecture": "qwen3"},
            ValueError,
            "is .qwen3., .* of another checkpoint",
        ),
        ({"num_btoks": 3}, ValueError, "num_btoks is 3, but .* was saved with 2; ask for that"),
        ({"pooling": "btok"}, ValueError, "pooling is 'btok', but .* was saved with 'last'"),
        ({"pooling": "max"}, ValueError, r"pooling is 'max', expected one of \('btok', 'last'"),
        ({"vision_positions": "mrope"}, ValueError, "vision_positions is 'mrope', but"),
        ({"poling": "last"}, TypeError, "poling is no setting, expected pooling, target"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, asked, error, message):
    SETTINGS.save(tmp_path, "qwen2")
    with pytest.raises(error, match=message):
        BTokConfig.load(tmp_path, **{"architecture": "qwen2", "num_btoks": None, **asked})


def test_k_0_needs_rows_to_pool():
    with pytest.raises(ValueError, match="K = 0 use pooling='last' or 'mean', not 'btok'"):
        BTokConfig(())
    assert BTokConfig((), "mean").btok_token_ids == ()
