"""What there is to say of a backbone family, and of how it sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def text_positions(input_ids: Any) -> np.ndarray:
    """Positions of a model without vision: 0, 1, 2, ... on all three axes.

    Args:
        input_ids: integers [L].

    Returns:
        int64 [3, L].
    """
    length = len(np.asarray(input_ids))
    return np.tile(np.arange(length), (3, 1))


def _of_text(ids: np.ndarray, side: Mapping[str, Any], config: Any) -> np.ndarray:
    return text_positions(ids)


def _one_level(found: Any) -> Sequence[Any]:
    return [found.pooler_output]


def _no_more(vision_config: Any) -> int:
    return 0


@dataclass(frozen=True)
class VisionRules:
    """How a family sees.

    Args:
        stock: the stem of the names of transformers' processors, as in `Qwen2VLProcessor`.
        stock_video: the same of their video processors.
        patch_size: pixels per patch side.
        mean, std: of the pixels, per channel, in [0, 1].
        bounds_of_all_frames: the bounds on a video's pixels are on all its frames together.
        timed_slots: each two frames of a video are bracketed on their own, behind their time as
            text, and not the whole video once.
        needs_seconds: positions take `second_per_grid_ts`, the seconds between a video's slots.
        levels: of what the vision tower returns, a sequence of per-image tensors for each level:
            the first goes in the place of tokens, the others onto outputs of the first layers.
        onto_layers: the language model's keyword arguments for those others, from the rows [T]
            that are vision and the features [rows, D] of each level.
        num_levels: how many others there are, by the vision configuration.
        tower: the attribute of the backbone's `model` that is the vision tower.
    """

    stock: str
    stock_video: str
    patch_size: int
    mean: Sequence[float]
    std: Sequence[float]
    bounds_of_all_frames: bool = False
    timed_slots: bool = False
    needs_seconds: bool = False
    levels: Callable[[Any], Sequence[Any]] = _one_level
    onto_layers: Callable[[Tensor, Sequence[Tensor]], dict[str, Any]] | None = None
    num_levels: Callable[[Any], int] = _no_more
    tower: str = "visual"


@dataclass(frozen=True)
class Family:
    """A backbone family; its key in `FAMILIES` is the `model_type` of its configuration.

    Args:
        architecture: the class of transformers that loads it.
        vision: how it sees; None for text alone.
        positions: (ids [L], the side they are of, as a processor returns it, the backbone's
            configuration) -> int64 [3, L]: time, height and width.
        language_model: the attribute of the backbone's `model` that is its decoder; None where
            that is the decoder itself.
    """

    architecture: str
    vision: VisionRules | None = None
    positions: Callable[[np.ndarray, Mapping[str, Any], Any], np.ndarray] = _of_text
    language_model: str | None = None

    def decoder(self, backbone: Any) -> Any:
        """The embedding, `layers` and `norm` of a backbone of this family."""
        model = backbone.model
        return model if self.language_model is None else getattr(model, self.language_model)

    def tower(self, backbone: Any) -> Any:
        """The vision tower of a backbone of this family; None where it has none."""
        return None if self.vision is None else getattr(backbone.model, self.vision.tower)
