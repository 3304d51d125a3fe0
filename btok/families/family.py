"""What there is to say of a backbone family, and of how it sees."""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from btok.data.records import Side
from btok.vision import KEYS, Vision, vision_of

IMAGE_FILE, VIDEO_FILE = "preprocessor_config.json", "video_preprocessor_config.json"
CHATML = ("<|im_start|>assistant\n", "<|im_end|>")


class Seen(NamedTuple):
    """What an image processor makes of a side's images and video.

    Args:
        ids: the tokens that stand for them.
        gap: what comes between these and the side's text.
        shown: what it shows under `vision`, and whatever else the family's positions take.
    """

    ids: list[int]
    gap: str
    shown: dict[str, Any]


class ImageProcessor(ABC):
    """Pictures become patches, and tokens that hold their places.

    `image_processor(tokenizer, **settings)` makes one; `SETTINGS` names what it takes and keeps as
    attributes, `BOUNDS` those of them that say how large a picture is shown.
    """

    SETTINGS: ClassVar[tuple[str, ...]]
    BOUNDS: ClassVar[tuple[str, ...]]
    reserved: frozenset[int]  # tokens that say where pictures are, so that no text may hold them
    brackets: frozenset[int] | None = None  # of them, those around a picture; None: it needs more
    stock: ClassVar[str]  # the stem of transformers' names, as in `Qwen2VLProcessor`
    # of "image" and "video" what stands for one in the stock processors' prompts, and `Seen.gap`
    shown: ClassVar[Mapping[str, tuple[str, str]]]

    @abstractmethod
    def __init__(self, tokenizer: Any, **settings: Any) -> None: ...

    @abstractmethod
    def __call__(self, side: Side) -> Seen:
        """The images and the video of a side that has some."""

    @abstractmethod
    def estimate(self, pixels: Sequence[int], frames: int) -> int:
        """About how many tokens images of so many pixels and so many frames of a video take."""

    @classmethod
    @abstractmethod
    def read(
        cls, image: Mapping[str, Any], video: Mapping[str, Any], config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Settings that a checkpoint's files have, stock ones too: those of its image processor, of
        its video processor, and the model's.
        """

    @abstractmethod
    def files(self) -> dict[str, dict[str, Any]]:
        """What these settings are in files that the stock processors read, by their names."""


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text as it is: the spelling of a special token is text like any other."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def checked_number(name: str, value: Any, most: int, kind: type = Integral) -> Any:
    """A setting of an image processor from 1 on, and no absurd one; whole, or of another kind."""
    if not isinstance(value, kind) or isinstance(value, bool) or not 1 <= value <= most:  # type: ignore[operator]
        expected = "a whole number" if kind is Integral else "a number"
        raise ValueError(
            f"Processor: {name} is {value!r:.60}, expected {expected} from 1 to {most}"
        )
    return value


def checked_channels(name: str, values: Any, above: float = -math.inf) -> tuple[float, ...]:
    """A setting of an image processor that is a finite number per channel."""
    found = tuple(values) if isinstance(values, Sequence) else ()
    most = sys.float_info.max  # a whole number may be above that, too
    if len(found) != 3 or not all(
        isinstance(value, Real) and above < value <= most  # type: ignore[operator]
        for value in found
    ):
        bound = "finite" if above == -math.inf else f"finite and above {above:g}"
        raise ValueError(f"Processor: {name} is {values!r:.60}, expected three numbers, {bound}")
    return found


def special_token(tokenizer: Any, token: str, whose: str) -> int:
    """The id of a special token; a ValueError for a tokenizer that lacks it."""
    found = tokenizer.convert_tokens_to_ids(token)
    if found is None or found == tokenizer.unk_token_id:
        raise ValueError(f"Processor: the tokenizer has no {token}, expected {whose}")
    return found


def patches_of(slots: np.ndarray, patch: int, merge: int = 1) -> Tensor:
    """Pictures cut into patches: merged tokens in row order, the patches of each together.

    Args:
        slots: uint8 [n, frames, H, W, 3], the frames of a slot being one patch's; H and W are
            multiples of `patch * merge` pixels.
        patch: pixels per patch side; merge: patches per token side.

    Returns:
        uint8 [patches, frames * patch * patch * 3]: frame, row, column, channel.
    """
    n, frames, height, width, _ = slots.shape
    rows, columns = height // patch // merge, width // patch // merge
    # whole rows of a patch move, not bytes: the channels are put first on the device
    lines = np.ascontiguousarray(slots).reshape(-1, 3 * patch).view(f"V{3 * patch}")
    lines = lines.reshape(n, frames, rows, merge, patch, columns, merge)
    lines = lines.transpose(0, 2, 5, 3, 6, 1, 4).copy("C")
    return torch.from_numpy(lines.view(np.uint8).reshape(-1, frames * patch * patch * 3))


@dataclass(frozen=True)
class VisionRules(ABC):
    """How a family's models take images and videos.

    Args:
        image_processor: the class of its image processor.
    """

    image_processor: type[ImageProcessor]
    tower: ClassVar[str] = "visual"  # the attribute of the backbone's `model`
    connector: ClassVar[str | None] = None  # of what features go through next; None: the tower's
    per_video: ClassVar[tuple[str, ...]] = ()  # what positions take besides, a row per video

    @abstractmethod
    def features(self, model: Any, vision: Vision) -> Sequence[Tensor]:
        """What the tower of a backbone's `model` makes of pixels: [tokens, D] for each level.

        The first goes in the place of tokens, the others onto outputs of the first layers.
        """

    def read(self, side: Mapping[str, Any], config: Any) -> list[Vision]:
        """What a side shows, as the stock processor returns it or ours, for a configuration."""
        return vision_of(side)

    def prepare(self, backbone: Any) -> None:
        """Change a backbone before it is used."""
        return  # most are ready as they are

    def num_levels(self, vision_config: Any) -> int:
        """The number of levels of vision features but the first, by the vision configuration."""
        return 0

    def onto_layers(self, levels: Sequence[Tensor]) -> dict[str, Any]:
        """The language model's keyword arguments that put the further levels of vision features
        onto its first layers: [T, D] each, 0 where no vision is.
        """
        raise NotImplementedError

    def merge_size(self, config: Any) -> int:
        """Patches per token along height and along width."""
        return config.vision_config.spatial_merge_size


@dataclass(frozen=True)
class Family:
    """A backbone family; its key in `FAMILIES` is the `model_type` of its configuration.

    Args:
        architecture: the class of transformers that loads it.
        vision: how it sees; None for text alone.
        mrope: (ids [L], the side they are of, as a processor returns it, the backbone's
            configuration) -> int64 [3, L]: time, height and width; None where there is one axis
            alone.
        language_model: the attribute of the backbone's `model` that is its decoder; None where
            that is the decoder itself.
        turns: what opens and what closes a generated target; the first whose end is in a
            tokenizer's vocabulary is taken, else the last.
    """

    architecture: str
    vision: VisionRules | None = None
    mrope: Callable[[np.ndarray, Mapping[str, Any], Any], np.ndarray] | None = None
    language_model: str | None = None
    turns: tuple[tuple[str, str], ...] = (CHATML,)

    def positions(self, ids: np.ndarray, side: Mapping[str, Any], config: Any) -> np.ndarray:
        """int64 [3, L]: `mrope`, or 0, 1, 2, ... on all axes."""
        return self.mrope(ids, side, config) if self.mrope else np.tile(np.arange(len(ids)), (3, 1))

    def shown(self, side: Mapping[str, Any], config: Any) -> list[Vision]:
        """The images and the video of a side, as a processor returns it.

        Raises:
            ValueError: some, for a model of text alone; grids, pixels and placeholders that do not
                agree; patches of another size than the model's.
        """
        if self.vision is None:
            if vision_of(side):
                raise ValueError(
                    f"pack: a sample has images or a video, {config.model_type} takes text alone"
                )
            return []
        shown = self.vision.read(side, config)
        edge = config.vision_config.patch_size
        values = 3 * getattr(config.vision_config, "temporal_patch_size", 1) * edge**2
        for vision in shown:
            repeat = vision.normalization.repeat if vision.normalization else 1
            had = values if vision.pixels is None else vision.pixels.shape[1:].numel() * repeat
            if had != values:
                raise ValueError(
                    f"pack: {KEYS[vision.kind][0]} has {had} values per patch, expected {values} "
                    f"for the model's patch_size {edge}"
                )
        ids = np.asarray(side["input_ids"])
        for kind in KEYS:
            patches = sum(sum(vision.patches) for vision in shown if vision.kind == kind)
            asked = patches // self.vision.merge_size(config) ** 2
            token = getattr(config, f"{kind}_token_id", None)
            if asked != (had := 0 if token is None else int((ids == token).sum())):
                raise ValueError(
                    f"pack: input_ids has {had} {kind} placeholders {token}, expected {asked} "
                    "for its pixels"
                )
        return shown

    def decoder(self, backbone: Any) -> Any:
        """The embedding, `layers` and `norm` of a backbone of this family."""
        model = backbone.model
        return model if self.language_model is None else getattr(model, self.language_model)

    def tower(self, backbone: Any) -> Any:
        """The vision tower of a backbone of this family; None where it has none."""
        return None if self.vision is None else getattr(backbone.model, self.vision.tower)

    def vision_parts(self, backbone: Any) -> dict[nn.Module, int]:
        """The modules that vision features go through, in order: patches that are a row in each."""
        parts = {self.tower(backbone): 1} if self.vision is not None else {}
        if self.vision is not None and self.vision.connector is not None:
            merged = self.vision.merge_size(backbone.config) ** 2
            parts[getattr(backbone.model, self.vision.connector)] = merged
        return parts

    def vision_trains(self, backbone: Any) -> bool:
        """Whether vision features need gradients."""
        parts = self.vision_parts(backbone)
        return any(p.requires_grad for part in parts for p in part.parameters())
