"""Qwen2.5-VL (arXiv 2502.13923): as Qwen2-VL, but time is in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from btok.families import qwen_tower
from btok.families.family import Family, VisionRules
from btok.families.mrope import arguments, mrope, rows
from btok.families.qwen_images import QwenImageProcessor


def qwen2_5_vl_positions(
    input_ids: Any,
    image_grid_thw: Any = None,
    video_grid_thw: Any = None,
    second_per_grid_ts: Any = None,
    *,
    image_token_id: int,
    video_token_id: int,
    spatial_merge_size: int = 2,
    tokens_per_second: float = 4,
) -> np.ndarray:
    """M-RoPE positions of one sequence, as Qwen2.5-VL was trained (its report, section 2.1.3).

    As `qwen2_vl_positions`, but time is in seconds: time slot t of a video is at
    p + floor(t * tokens_per_second * seconds per slot). Images have one slot.

    Args:
        input_ids, image_grid_thw, video_grid_thw, image_token_id, video_token_id,
            spatial_merge_size: as `qwen2_vl_positions` takes them.
        second_per_grid_ts: floats [videos], seconds from one time slot to the next, else a
            ValueError; None for one second.
        tokens_per_second: positions per second, of the vision configuration.

    Returns:
        int64 [3, L]: time, height, width.
    """
    videos = rows(video_grid_thw)
    seconds = [1.0] * len(videos) if second_per_grid_ts is None else rows(second_per_grid_ts)
    if len(seconds) != len(videos):
        raise ValueError(
            f"positions: second_per_grid_ts has {len(seconds)}, video_grid_thw {len(videos)}"
        )
    steps = [np.float32(second) * np.float32(tokens_per_second) for second in seconds]
    timed = [[*grid, step] for grid, step in zip(videos, steps, strict=True)]
    grids = {image_token_id: rows(image_grid_thw), video_token_id: timed}
    return mrope(input_ids, grids, spatial_merge_size)


def _positions(ids: np.ndarray, side: Mapping[str, Any], config: Any) -> np.ndarray:
    return qwen2_5_vl_positions(
        ids,
        second_per_grid_ts=side.get("second_per_grid_ts"),
        tokens_per_second=config.vision_config.tokens_per_second,
        **arguments(side, config),
    )


def _windows(tower: Any, grid: Tensor) -> dict[str, Tensor]:
    from transformers.vision_utils import get_vision_window_index

    sizes = tower.spatial_merge_size, tower.window_size, tower.patch_size
    index, begins = get_vision_window_index(grid, *sizes)
    return {"window_index": index, "cu_window_seqlens": begins}


class _ImageProcessor(QwenImageProcessor):
    stock = "Qwen2_5_VL"
    needs_seconds = True


QWEN2_5_VL = Family(
    "Qwen2_5_VLForConditionalGeneration",
    VisionRules(
        _ImageProcessor,
        partial(qwen_tower.features, more=_windows),
        prepare=qwen_tower.use_in,
        per_video=("second_per_grid_ts",),
    ),
    _positions,
    language_model="language_model",
)
