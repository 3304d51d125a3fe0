"""Qwen2.5-VL (arXiv 2502.13923): as Qwen2-VL, but time is in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from btok.families.family import Family
from btok.families.mrope import grids_of, mrope
from btok.families.qwen_images import QwenImageProcessor
from btok.families.qwen_tower import QwenVision


def qwen2_5_vl_positions(input_ids: Any, side: Mapping[str, Any], config: Any) -> np.ndarray:
    """M-RoPE positions of one sequence, as Qwen2.5-VL was trained (its report, section 2.1.3).

    As `mrope`, but time is in seconds: time slot t of a video is at
    p + floor(t * tokens_per_second * seconds per slot). Images have one slot.

    Args:
        input_ids, config: as `mrope` takes them.
        side: its `second_per_grid_ts`, floats [videos], are the seconds from one time slot to the
            next, else a ValueError; one second where it has none.

    Returns:
        int64 [3, L]: time, height, width.
    """
    videos, given = grids_of(side, "video"), side.get("second_per_grid_ts")
    seconds = [1.0] * len(videos) if given is None else np.asarray(given).tolist()
    if len(seconds) != len(videos):
        raise ValueError(
            f"positions: second_per_grid_ts has {len(seconds)}, video_grid_thw {len(videos)}"
        )
    steps = np.asarray(seconds, np.float32) * np.float32(config.vision_config.tokens_per_second)
    timed = [[*grid, step] for grid, step in zip(videos, steps, strict=True)]
    return mrope(input_ids, side, config, timed)


class _ImageProcessor(QwenImageProcessor):
    stock = "Qwen2_5_VL"
    needs_seconds = True


class _Vision(QwenVision):
    per_video = ("second_per_grid_ts",)

    def more(self, tower: Any, grid: Tensor) -> dict[str, Tensor]:
        from transformers.vision_utils import get_vision_window_index

        sizes = tower.spatial_merge_size, tower.window_size, tower.patch_size
        index, begins = get_vision_window_index(grid, *sizes)
        return {"window_index": index, "cu_window_seqlens": begins}


QWEN2_5_VL = Family(
    "Qwen2_5_VLForConditionalGeneration",
    _Vision(_ImageProcessor),
    qwen2_5_vl_positions,
    language_model="language_model",
)
