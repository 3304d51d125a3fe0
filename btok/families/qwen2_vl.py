"""Qwen2-VL (arXiv 2409.12191)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from btok.families import qwen_tower
from btok.families.family import Family, VisionRules
from btok.families.mrope import arguments, mrope, rows
from btok.families.qwen_images import QwenImageProcessor


def qwen2_vl_positions(
    input_ids: Any,
    image_grid_thw: Any = None,
    video_grid_thw: Any = None,
    *,
    image_token_id: int,
    video_token_id: int,
    spatial_merge_size: int = 2,
) -> np.ndarray:
    """M-RoPE positions of one sequence, as Qwen2-VL was trained (its report, section 2.1).

    Text takes p, p + 1, ... on all three axes. An image or a video that starts at p has
    (p + t, p + y, p + x) at time slot t, row y, column x of its merged grid; what follows goes on
    at the highest position so far + 1.

    Args:
        input_ids: integers [L] (tensor, array, list), a placeholder id per merged vision token.
        image_grid_thw, video_grid_thw: integers [n, 3], time, height and width in patches, in order
            of appearance, else a ValueError; None for none.
        image_token_id, video_token_id: the placeholder ids.
        spatial_merge_size: patches per merged token along height and along width.

    Returns:
        int64 [3, L]: time, height, width.
    """
    grids = {image_token_id: rows(image_grid_thw), video_token_id: rows(video_grid_thw)}
    return mrope(input_ids, grids, spatial_merge_size)


def _positions(ids: np.ndarray, side: Mapping[str, Any], config: Any) -> np.ndarray:
    return qwen2_vl_positions(ids, **arguments(side, config))


QWEN2_VL = Family(
    "Qwen2VLForConditionalGeneration",
    VisionRules(QwenImageProcessor, qwen_tower.features, prepare=qwen_tower.use_in),
    _positions,
    language_model="language_model",
)
