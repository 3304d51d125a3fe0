"""The vision towers of Qwen's models, called so that the host need not wait for the device.

All that follows from the sizes of images (positions, where each begins, windows) is made on the
host and copied; all images are one call of torch's attention for sequences of any length, where
the device has it, and one each elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from btok.families.family import VisionRules
from btok.vision import Vision
from btok_kernels.layout import on_device

ATTENTION = "flash_varlen_vision"  # transformers asks the name whether it takes all in one call


class QwenVision(VisionRules):
    """How Qwen's models see; what a later tower takes besides is a method."""

    def more(self, tower: Any, grid: Tensor) -> dict[str, Tensor]:
        """The further arguments that a later model's vision tower takes of grids [n, 3], on the
        host.
        """
        return {}

    def prepare(self, backbone: Any) -> None:
        """Make `attention` that of the vision tower."""
        from transformers import AttentionInterface

        AttentionInterface.register(ATTENTION, attention)
        backbone.set_attn_implementation({"vision_config": ATTENTION})

    def features(self, model: Any, vision: Vision) -> list[Tensor]:
        """The tower's [tokens, D], and those of its levels, if any; the grid lies on the host."""
        from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids

        tower, grid = model.visual, vision.grid
        plan = {
            "position_ids": get_vision_position_ids(grid, tower.spatial_merge_size),
            "cu_seqlens": get_vision_cu_seqlens(grid),
            **self.more(tower, grid),
        }
        assert vision.pixels is not None
        there: dict[str, Any] = {
            name: on_device(value, vision.pixels.device) for name, value in plan.items()
        }
        lengths: dict[int, list[int]] = {}
        longest = {"cu_seqlens": "max_seqlen", "cu_window_seqlens": "max_window_seqlen"}
        for begins, most in longest.items():
            if begins in plan:
                sizes = lengths[id(there[begins])] = plan[begins].diff().tolist()
                there[most] = max(sizes)
        # not get_image_features, which cuts the result into images again
        found = tower(vision.pixels.to(tower.dtype), grid, lengths=lengths, **there)
        return [found.pooler_output, *(getattr(found, "deepstack_features", None) or ())]


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    lengths: Mapping[int, Sequence[int]] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Every patch sees those of its image, frame or window: [1, H, T, D] each -> [1, T, H, D].

    Args:
        cu_seq_lens_q: int32, where each begins, and T.
        max_length_q: patches of the longest.
        lengths: patches of each, by the identity of `cu_seq_lens_q`; None to read that.
    """
    half = query.dtype in (torch.float16, torch.bfloat16)
    if query.is_cuda and half and torch.cuda.get_device_capability(query.device) >= (8, 0):
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
        ends = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
        out: Any = varlen_attn(q, k, v, *ends, scale=scaling)
        return out[None], None
    sizes = cu_seq_lens_q.diff().tolist() if lengths is None else lengths[id(cu_seq_lens_q)]
    each = [
        nn.functional.scaled_dot_product_attention(q, k, v, scale=scaling)
        for q, k, v in zip(*(t.split(list(sizes), dim=2) for t in (query, key, value)), strict=True)
    ]
    return torch.cat(each, dim=2).transpose(1, 2), None
