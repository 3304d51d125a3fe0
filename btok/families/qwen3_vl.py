"""Qwen3-VL (arXiv 2511.21631): videos slot by slot, vision features onto the first layers too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from btok.families.family import Family
from btok.families.mrope import grids_of, mrope
from btok.families.qwen_images import QwenImageProcessor
from btok.families.qwen_tower import QwenVision


def qwen3_vl_positions(input_ids: Any, side: Mapping[str, Any], config: Any) -> np.ndarray:
    """M-RoPE positions of one sequence, as Qwen3-VL was trained (its report, section 2).

    As `mrope`, but each time slot of a video is a grid of its own: its time is told by the text
    before it (`<1.5 seconds>`), not by its position. That the axes interleave along the head
    dimension is the rotary embedding's affair, not the index's.

    Args:
        input_ids, side, config: as `mrope` takes them.

    Returns:
        int64 [3, L]: time, height, width.
    """
    slots = [[1, h, w] for time, h, w in grids_of(side, "video") for _ in range(time)]
    return mrope(input_ids, side, config, slots)


class _ImageProcessor(QwenImageProcessor):
    stock = stock_video = "Qwen3VL"
    patch_size = 16
    image_mean = image_std = (0.5, 0.5, 0.5)
    bounds_of_all_frames = True
    timed_slots = True
    # the stock processor puts brackets around each slot, and leaves those around all where they are
    shown = QwenImageProcessor.shown | {"video": ("<|video_pad|>", "\n")}


class _Vision(QwenVision):
    def more(self, tower: Any, grid: Tensor) -> dict[str, Tensor]:
        from transformers.vision_utils import get_vision_interpolation_indices_and_weights

        indices, weights = get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=tower.config.spatial_merge_size,
        )
        return {"interp_indices": indices, "interp_weights": weights}

    def prepare(self, backbone: Any) -> None:
        super().prepare(backbone)
        backbone.model.language_model._deepstack_process = _add

    def num_levels(self, vision_config: Any) -> int:
        return len(vision_config.deepstack_visual_indexes)

    def onto_layers(self, levels: Sequence[Tensor]) -> dict[str, Any]:
        return {"visual_pos_masks": None, "deepstack_visual_embeds": list(levels)}


def _add(hidden: Tensor, at: None, level: Tensor) -> Tensor:
    # transformers' own picks the rows by a mask, and the host waits for how many there are
    return hidden + level.to(hidden.dtype)


QWEN3_VL = Family(
    "Qwen3VLForConditionalGeneration",
    _Vision(_ImageProcessor),
    qwen3_vl_positions,
    language_model="language_model",
)
