"""Pictures as Qwen's vision-language models take them: any size, in patches of two frames.

An image or a video becomes `<|vision_start|>` + a placeholder per merged token + `<|vision_end|>`,
and a line break before the text: VLM2Vec's format, no chat template.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from btok.data.records import Side
from btok.families.family import (
    IMAGE_FILE,
    VIDEO_FILE,
    ImageProcessor,
    Seen,
    checked_channels,
    checked_number,
    encode_text,
    patches_of,
    special_token,
)
from btok.inputs import frame_seconds, resized, rgb_array
from btok.vision import Kind, Normalization, Vision

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
TEMPORAL_PATCH = 2
MOST_EDGE = 1024  # pixels of a merged token's edge
MOST_PIXELS = 1 << 28  # that an image or a frame has at least
STOCK_FRAMES = 768  # the most that the stock processors take of a video


class QwenImageProcessor(ImageProcessor):
    """Patches and tokens as Qwen2-VL has them; what a later model changes is an attribute.

    Args:
        tokenizer: with Qwen2-VL's special tokens.
        min_pixels, max_pixels: bounds on the size of an image.
        min_frame_pixels, max_frame_pixels: on that of a video's frame; for Qwen3-VL the lower one
            is on all frames together. None: `min_pixels`.
        patch_size, merge_size: pixels per patch side, patches per merged token side.
        image_mean, image_std: per channel, of values in [0, 1]; these and `patch_size` are the
            family's if None.

    Raises:
        ValueError: a tokenizer that lacks a special token, bounds out of order.
    """

    BOUNDS = ("min_pixels", "max_pixels", "min_frame_pixels", "max_frame_pixels")
    SETTINGS = (*BOUNDS, "patch_size", "merge_size", "image_mean", "image_std")
    stock = stock_video = "Qwen2VL"
    shown = {  # noqa: RUF012
        kind: (f"<|vision_start|><|{kind}_pad|><|vision_end|>", "\n") for kind in ("image", "video")
    }
    patch_size = 14
    image_mean: tuple[float, ...] = CLIP[0]
    image_std: tuple[float, ...] = CLIP[1]
    bounds_of_all_frames = False  # the bounds on a video's pixels are on all its frames together
    timed_slots = False  # each two frames are bracketed on their own, behind their time as text
    needs_seconds = False  # positions take `second_per_grid_ts`, the seconds between two slots

    def __init__(
        self,
        tokenizer: Any,
        *,
        min_pixels: int = 56 * 56,
        max_pixels: int = 1_003_520,
        min_frame_pixels: int | None = None,
        max_frame_pixels: int = 602_112,
        patch_size: int | None = None,
        merge_size: int = 2,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> None:
        if min_frame_pixels is None:
            min_frame_pixels = min_pixels
        for kind, low, high in (
            ("", min_pixels, max_pixels),
            ("frame_", min_frame_pixels, max_frame_pixels),
        ):
            checked_number(f"min_{kind}pixels", low, MOST_PIXELS, Real)
            checked_number(f"max_{kind}pixels", high, sys.maxsize, Real)
            if low > high:
                raise ValueError(
                    f"Processor: min_{kind}pixels is {low}, expected above 0 and at most "
                    f"max_{kind}pixels {high}"
                )
        self.tokenizer = tokenizer
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.min_frame_pixels, self.max_frame_pixels = min_frame_pixels, max_frame_pixels
        given = {"patch_size": patch_size, "image_mean": image_mean, "image_std": image_std}
        for name, value in given.items():
            if value is not None:  # else the family's
                setattr(self, name, value)
        checked_number("patch_size", self.patch_size, MOST_EDGE)
        self.merge_size = checked_number("merge_size", merge_size, MOST_EDGE // self.patch_size)
        self.image_mean = checked_channels("image_mean", self.image_mean)
        self.image_std = checked_channels("image_std", self.image_std, above=0)
        names = ("vision_start", "vision_end", "image_pad", "video_pad")
        self.start, self.end, image, video = (
            special_token(tokenizer, f"<|{name}|>", "Qwen2-VL's") for name in names
        )
        self.pads: dict[Kind, int] = {"image": image, "video": video}
        self.reserved = frozenset((self.start, self.end, image, video))
        self.brackets = None if self.timed_slots else frozenset((self.start, self.end))

    def __call__(self, side: Side) -> Seen:
        ids: list[int] = []
        out: dict[str, Any] = {"vision": []}
        seconds = frame_seconds(side)
        seconds += seconds[-1:] * (len(seconds) % TEMPORAL_PATCH)  # an odd last frame, twice
        clips: dict[Kind, list[Any]] = {"image": [[image] for image in side.images]}
        clips["video"] = [side.video] if len(side.video) else []
        for kind, of_kind in clips.items():
            if not of_kind:
                continue
            video, pad = kind == "video", self.pads[kind]
            pixels, grids = zip(*(self._patchify(clip, video) for clip in of_kind), strict=True)
            for t, h, w in grids:
                merged = h * w // self.merge_size**2
                if video and self.timed_slots:
                    slot = [self.start, *[pad] * merged, self.end]
                    for first, last in zip(seconds[::2], seconds[1::2], strict=True):
                        time = f"<{(first + last) / 2:.1f} seconds>"
                        ids += [*encode_text(self.tokenizer, time), *slot]
                else:
                    ids += [self.start, *[pad] * (t * merged), self.end]
            # a still image's frame travels once and is doubled where it is looked at
            repeat = 1 if video else TEMPORAL_PATCH
            norm = Normalization(self.image_mean, self.image_std, repeat)
            shown = Vision(kind, torch.tensor(grids), torch.cat(pixels), normalization=norm)
            out["vision"].append(shown)
            if video and self.needs_seconds:
                gap = (seconds[-1] - seconds[0]) / max(len(side.video) - 1, 1)
                out["second_per_grid_ts"] = torch.tensor([TEMPORAL_PATCH * gap])
        return Seen(ids, "\n", out)

    def estimate(self, pixels: Sequence[int], frames: int) -> int:
        images = sum(min(max(size, self.min_pixels), self.max_pixels) for size in pixels)
        unit = self.patch_size * self.merge_size
        return int((images + self.max_frame_pixels * frames / TEMPORAL_PATCH) / unit**2)

    @classmethod
    def read(
        cls, image: Mapping[str, Any], video: Mapping[str, Any], config: Mapping[str, Any]
    ) -> dict[str, Any]:
        found = {name: image[name] for name in cls.SETTINGS if name in image}
        for ours, file, stock in (
            ("min_pixels", image, "shortest_edge"),
            ("max_pixels", image, "longest_edge"),
            ("min_frame_pixels", video, "shortest_edge"),
        ):
            bounds = file.get("size")
            if isinstance(bounds, Mapping) and stock in bounds:
                found.setdefault(ours, bounds[stock])
        return found

    def files(self) -> dict[str, dict[str, Any]]:
        # a video's settings are for frames as they are given, up to STOCK_FRAMES of them
        shared = {
            "processor_class": f"{self.stock}Processor",
            "temporal_patch_size": TEMPORAL_PATCH,
            **{name: getattr(self, name) for name in self.SETTINGS if "pixels" not in name},
        }
        image = {
            "image_processor_type": "Qwen2VLImageProcessor",
            "size": {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels},
            **{name: getattr(self, name) for name in self.SETTINGS if "pixels" in name},
        }
        together = self.bounds_of_all_frames
        frames = STOCK_FRAMES if together else 1
        video = {
            "video_processor_type": f"{self.stock_video}VideoProcessor",
            "size": {
                "shortest_edge": self.min_frame_pixels,
                "longest_edge": self.max_frame_pixels * frames,
            },
            "do_sample_frames": False,
            "cap_pixels_per_frame": together,
        }
        if together:
            unit = self.patch_size * self.merge_size
            video["max_video_tokens"] = self.max_frame_pixels // unit**2
        return {IMAGE_FILE: shared | image, VIDEO_FILE: shared | video}

    def _patchify(self, frames: Sequence[Any], video: bool) -> tuple[Tensor, list[int]]:
        """uint8 [patches, 3 * p * p], of a video 3 * 2 * p * p, its odd last frame shown twice; and
        (t, h, w)."""
        shown = [rgb_array(frame) for frame in frames]
        height, width, _ = shown[0].shape
        unit = self.patch_size * self.merge_size
        low, high, together = self.min_pixels, self.max_pixels, 1
        if video:
            low, high = self.min_frame_pixels, self.max_frame_pixels
        if video and self.bounds_of_all_frames:
            together = max(len(frames), TEMPORAL_PATCH)
            high = max(high // unit**2, 1) * unit**2 * together
        height, width = smart_size(height, width, unit, low, high, together)
        clip = np.stack([resized(frame, height, width, "BICUBIC") for frame in shown])
        if video and len(clip) % TEMPORAL_PATCH:
            clip = np.concatenate([clip, clip[-1:]])
        slots = clip.reshape(-1, TEMPORAL_PATCH if video else 1, height, width, 3)
        pixels = patches_of(slots, self.patch_size, self.merge_size)
        return pixels, [len(slots), height // self.patch_size, width // self.patch_size]


def smart_size(
    height: int, width: int, unit: int, min_pixels: int, max_pixels: int, frames: int = 1
) -> tuple[int, int]:
    """Qwen2-VL's size rule: multiples of `unit`, within the pixel bounds, near the aspect ratio.

    With `frames` from 2 on it is Qwen3-VL's for a video, whose bounds are on all frames together.
    ValueError for an aspect ratio above 200.
    """
    if frames > 1 and min(height, width) < unit:
        scale = max(unit / height, unit / width)
        height, width = int(height * scale), int(width * scale)
    if max(height, width) > 200 * min(height, width):
        raise ValueError(f"image is {height} x {width} pixels, expected an aspect ratio up to 200")
    new_height, new_width = round(height / unit) * unit, round(width / unit) * unit
    counted = 1 if frames == 1 else round(frames / TEMPORAL_PATCH) * TEMPORAL_PATCH
    if counted * new_height * new_width > max_pixels:
        shrink = math.sqrt(frames * height * width / max_pixels)
        new_height = max(unit, math.floor(height / shrink / unit) * unit)
        new_width = max(unit, math.floor(width / shrink / unit) * unit)
    elif counted * new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (frames * height * width))
        new_height = math.ceil(height * grow / unit) * unit
        new_width = math.ceil(width * grow / unit) * unit
    return new_height, new_width
