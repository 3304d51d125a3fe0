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


DAMAGED = [
    ({"btok_token_ids": None}, "btok_token_ids is None, expected a list of whole numbers"),
    ({"btok_token_ids": 3}, "btok_token_ids is 3, expected a list of whole numbers"),
    (
        {"btok_token_ids": [1.5, 2]},
        r"btok_token_ids is \[1\.5, 2\], expected a list of whole numbers",
    ),
    ({"budgets": None}, "budgets is None, expected a list of whole numbers"),
    ({"dims": ["x"]}, r"dims is \['x'\], expected a list of whole numbers"),
    ({"pooling": [1]}, r"pooling is \[1\], expected one of \('btok'"),
    ({"multi_vector": "no"}, r"multi_vector is 'no', expected one of \(False, True\)"),
    ({"format_version": 2, "budgets": 3}, "saved with 2; use the btok that wrote it"),
]


@pytest.mark.parametrize(("changes", "message"), DAMAGED)
def test_a_damaged_file_is_refused_with_the_setting(tmp_path, changes, message):
    SETTINGS.save(tmp_path, "qwen2")
    file = tmp_path / CONFIG_NAME
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        BTokConfig.load(tmp_path, "qwen2", None)


def test_a_file_without_token_ids_or_that_is_no_object_is_refused(tmp_path):
    file = tmp_path / CONFIG_NAME
    file.write_text(json.dumps({"format_version": 1, "architecture": "qwen2"}))
    with pytest.raises(ValueError, match="btok_token_ids is None, expected a list"):
        BTokConfig.load(tmp_path, "qwen2", None)
    for content in ("[1]", "3", "null"):
        file.write_text(content)
        with pytest.raises(ValueError, match=r"btok_config\.json is .*, expected a JSON object"):
            BTokConfig.load(tmp_path, "qwen2", None)


def test_numbers_that_it_was_trained_for_may_be_asked_for_as_a_list(tmp_path):
    nested = BTokConfig([7, 8, 9], budgets=[1, 2, 3], dims=[16])
    nested.save(tmp_path, "qwen2")
    for asked in ([1, 2, 3], (1, 2, 3)):
        assert BTokConfig.load(tmp_path, "qwen2", None, budgets=asked, dims=[16]) == nested
        two = BTokConfig.load(tmp_path, "qwen2", 2, budgets=asked)
        assert two == BTokConfig([7, 8], budgets=[1, 2], dims=[16])
    with pytest.raises(ValueError, match=r"budgets is \(1, 3\), but .* saved with \(1, 2, 3\)"):
        BTokConfig.load(tmp_path, "qwen2", None, budgets=[1, 3])


def test_k_0_needs_rows_to_pool():
    with pytest.raises(ValueError, match="K = 0 use pooling='last' or 'mean', not 'btok'"):
        BTokConfig(())
    assert BTokConfig((), "mean").btok_token_ids == ()
