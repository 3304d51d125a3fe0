"""Sides become token ids and pixel patches, without torchvision.

The stock Qwen-VL processors need torchvision for video and refuse to load without it, even for
images. This one needs numpy and Pillow, reads and writes the same files, and gives the same pixels.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from btok.data.records import Side
from btok.families import FAMILIES, named_family
from btok.families.family import CLIP, VisionRules
from btok.files import read_json
from btok.tokens import add_to_tokenizer

CONFIG_NAME, VIDEO_CONFIG_NAME = "preprocessor_config.json", "video_preprocessor_config.json"
TEMPORAL_PATCH = 2
STOCK_FRAMES = 768  # the most that the stock processors take of a video
FRAMES_PER_SECOND = 2.0  # of a video that does not say: the rate the checkpoints' own sampling has

_UNUSED = VisionRules("", "", 14, *CLIP)  # of a model without vision
_LLAMA_TURN = ("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>")


class Processor:
    """Tokenizer and patchifier of a checkpoint.

    A side becomes `<|vision_start|>` + a placeholder per merged token + `<|vision_end|>` for each
    image or the video, a line break and the text as it is: VLM2Vec's format, no chat template. For
    Qwen3-VL each two frames of a video are bracketed so, with their time before it:
    `<1.5 seconds>`. Models without vision take text alone.

    Args:
        tokenizer: a transformers tokenizer, with Qwen2-VL's special tokens where there is vision.
        model_type: the backbone's, one of `btok.families.FAMILIES`.
        min_pixels, max_pixels: bounds on the size of an image.
        min_frame_pixels, max_frame_pixels: on that of a video's frame; for Qwen3-VL the lower one
            is on all frames together. None: `min_pixels`.
        patch_size, merge_size: pixels per patch side, patches per merged token side.
        image_mean, image_std: per channel, of values in [0, 1]; these and `patch_size` are the
            family's if None.

    Raises:
        ValueError: an unknown model type, a tokenizer that lacks a special token, bounds out of
            order.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        model_type: str = "qwen2_vl",
        min_pixels: int = 56 * 56,
        max_pixels: int = 1_003_520,
        min_frame_pixels: int | None = None,
        max_frame_pixels: int = 602_112,
        patch_size: int | None = None,
        merge_size: int = 2,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> None:
        vision = named_family(model_type, "Processor: model_type").vision
        if min_frame_pixels is None:
            min_frame_pixels = min_pixels
        for kind, low, high in (
            ("", min_pixels, max_pixels),
            ("frame_", min_frame_pixels, max_frame_pixels),
        ):
            if not 0 < low <= high:
                raise ValueError(
                    f"Processor: min_{kind}pixels is {low}, expected above 0 and at most "
                    f"max_{kind}pixels {high}"
                )
        self.tokenizer, self.model_type = tokenizer, model_type
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.min_frame_pixels, self.max_frame_pixels = min_frame_pixels, max_frame_pixels
        self.vision = vision
        own = vision or _UNUSED
        self.patch_size, self.merge_size = patch_size or own.patch_size, merge_size
        self.image_mean, self.image_std = tuple(image_mean or own.mean), tuple(image_std or own.std)
        self.vision_start, self.vision_end, self.image_pad, self.video_pad = (
            self._special(name) if self.has_vision else -1
            for name in ("vision_start", "vision_end", "image_pad", "video_pad")
        )
        # around a generated target: a turn of Qwen's chat format, or of Llama 3's
        llama = "<|start_header_id|>" in tokenizer.get_vocab()
        prefix, suffix = _LLAMA_TURN if llama else ("<|im_start|>assistant\n", "<|im_end|>")
        self.prefix_ids, self.suffix_ids = self.encode(prefix), self.encode(suffix)
        # (pixel / 255 - mean) / std for every byte value: exact, and one look-up per pixel
        mean, std = (np.array(x, np.float32) for x in (self.image_mean, self.image_std))
        levels = np.arange(256, dtype=np.float32)[:, None] / np.float32(255)
        self._levels = ((levels - mean) / std).T.copy()  # [3, 256]

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, num_btoks: int = 4, **settings: Any
    ) -> Processor:
        """Load a checkpoint's tokenizer, give it K bottleneck tokens, and read its pixel settings.

        `settings`, as the class takes them, go before those in the checkpoint's files, ours or
        stock ones; a stock file's upper bound on a video is not taken. The model type is that of
        `config.json`. No code that comes with a checkpoint is run.
        """
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
        add_to_tokenizer(tokenizer, num_btoks)
        both = read_json(name_or_path, "processor_config.json")  # first, as transformers has it
        saved = both.get("image_processor") or read_json(name_or_path, CONFIG_NAME)
        saved = {"processor_class": both.get("processor_class")} | saved
        video = both.get("video_processor") or read_json(name_or_path, VIDEO_CONFIG_NAME)
        for ours, file, stock in (
            ("min_pixels", saved, "shortest_edge"),
            ("max_pixels", saved, "longest_edge"),
            ("min_frame_pixels", video, "shortest_edge"),
        ):
            if stock in (bounds := file.get("size", {})):
                saved.setdefault(ours, bounds[stock])
        by_class = {f"{f.vision.stock}Processor": kind for kind, f in FAMILIES.items() if f.vision}
        written_for = by_class.get(str(saved.get("processor_class")), "qwen2_vl")
        own = {name: saved[name] for name in _SETTINGS if name in saved}
        own["model_type"] = read_json(name_or_path, "config.json").get("model_type", written_for)
        return cls(tokenizer, **own | settings)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer and the files that the stock image and video processors read.

        These give the same patches then, the video's for frames as they are given, up to
        `STOCK_FRAMES` of them.
        """
        self.tokenizer.save_pretrained(folder)
        if self.vision is None:
            return
        shared = {
            "processor_class": f"{self.vision.stock}Processor",
            "temporal_patch_size": TEMPORAL_PATCH,
            **{name: getattr(self, name) for name in _SETTINGS if "pixels" not in name},
        }
        image = {
            "image_processor_type": "Qwen2VLImageProcessor",
            "size": {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels},
            **{name: getattr(self, name) for name in _SETTINGS if "pixels" in name},
        }
        together = self.vision.bounds_of_all_frames
        frames = STOCK_FRAMES if together else 1
        video = {
            "video_processor_type": f"{self.vision.stock_video}VideoProcessor",
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
        for name, own in ((CONFIG_NAME, image), (VIDEO_CONFIG_NAME, video)):
            (Path(folder) / name).write_text(json.dumps(shared | own, indent=2) + "\n")

    def __call__(self, side: Side) -> dict[str, Tensor]:
        """Token ids and patches of one side.

        Returns:
            `input_ids` int64 [L]; where there are images `pixel_values` fp32 [patches, 3 * 2 *
            patch_size ** 2] and `image_grid_thw` int64 [images, 3]; for a video
            `pixel_values_videos` and `video_grid_thw`, for Qwen2.5-VL `second_per_grid_ts` [1].

        Raises:
            TypeError, ValueError: an image that is no picture, times that are not one per frame,
                pictures for a model without vision.
        """
        vision = self.vision
        if vision is None and (len(side.images) or len(side.video)):
            raise ValueError(f"a side has images or a video, a {self.model_type} takes text alone")
        ids: list[int] = []
        out: dict[str, Tensor] = {}
        videos = [side.video] if len(side.video) else []
        seconds = _frame_seconds(side)
        for pad, clips, pixels, grid in (
            (self.image_pad, [[image] for image in side.images], *_IMAGE_KEYS),
            (self.video_pad, videos, *_VIDEO_KEYS),
        ):
            if not clips:
                continue
            patches = [self._patchify(clip, clips is videos) for clip in clips]
            for _, (t, h, w) in patches:
                merged = h * w // self.merge_size**2
                if clips is videos and vision is not None and vision.timed_slots:
                    slot = [self.vision_start, *[pad] * merged, self.vision_end]
                    for first, last in zip(seconds[::2], seconds[1::2], strict=True):
                        ids += [*self.encode(f"<{(first + last) / 2:.1f} seconds>"), *slot]
                else:
                    ids += [self.vision_start, *[pad] * (t * merged), self.vision_end]
            out[pixels] = torch.from_numpy(np.concatenate([flat for flat, _ in patches]))
            out[grid] = torch.tensor([thw for _, thw in patches])
        if videos and vision is not None and vision.needs_seconds:
            gap = (seconds[-1] - seconds[0]) / max(len(side.video) - 1, 1)
            out["second_per_grid_ts"] = torch.tensor([TEMPORAL_PATCH * gap])
        if side.text:
            ids += self.encode("\n" + side.text if ids else side.text)
        return {"input_ids": torch.tensor(ids), **out}

    @property
    def has_vision(self) -> bool:
        """Whether it takes images and videos."""
        return self.vision is not None

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, special tokens in it recognised."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _special(self, name: str) -> int:
        token = self.tokenizer.convert_tokens_to_ids(f"<|{name}|>")
        if token is None or token == self.tokenizer.unk_token_id:
            raise ValueError(f"Processor: the tokenizer has no <|{name}|>, expected Qwen2-VL's")
        return token

    def _patchify(self, frames: Sequence[Any], video: bool) -> tuple[np.ndarray, list[int]]:
        """[patches, 3 * 2 * p * p] and (t, h, w); an odd last frame is shown twice."""
        height, width, _ = rgb_array(frames[0]).shape
        unit = self.patch_size * self.merge_size
        low, high, together = self.min_pixels, self.max_pixels, 1
        if video:
            low, high = self.min_frame_pixels, self.max_frame_pixels
        if video and self.vision is not None and self.vision.bounds_of_all_frames:
            together = max(len(frames), TEMPORAL_PATCH)
            high = high // unit**2 * unit**2 * together
        height, width = smart_size(height, width, unit, low, high, together)
        clip = np.stack([_resized(rgb_array(frame), height, width) for frame in frames])
        if len(clip) % TEMPORAL_PATCH:
            clip = np.concatenate([clip, clip[-1:]])
        m, p = self.merge_size, self.patch_size
        t, h, w = len(clip) // TEMPORAL_PATCH, height // p, width // p
        values = np.stack([self._levels[c][clip[..., c]] for c in range(3)], axis=1)  # [F, 3, H, W]
        blocks = values.reshape(t, TEMPORAL_PATCH, 3, h // m, m, p, w // m, m, p)
        # merged tokens in row order, the patches of each together, then channel, time, row, column
        flat = blocks.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, -1)
        return np.ascontiguousarray(flat), [t, h, w]


_SETTINGS = (
    *("min_pixels", "max_pixels", "min_frame_pixels", "max_frame_pixels"),
    *("patch_size", "merge_size", "image_mean", "image_std"),
)
_IMAGE_KEYS = ("pixel_values", "image_grid_thw")
_VIDEO_KEYS = ("pixel_values_videos", "video_grid_thw")


def rgb_array(image: Any) -> np.ndarray:
    """A PIL image, a path, a file's bytes or a uint8 array [height, width, 3] as such an array.

    TypeError for another array or type; ValueError for what is no readable image.
    """
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise TypeError(
                f"image is an array {image.dtype} {list(image.shape)}, expected uint8 [H, W, 3]"
            )
        return image
    from PIL import Image, UnidentifiedImageError

    if isinstance(image, str | bytes | Path):
        name = f"of {len(image)} bytes" if isinstance(image, bytes) else str(image)
        try:
            with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
                return np.asarray(opened.convert("RGB"))
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            unknown = isinstance(error, UnidentifiedImageError)  # its text may hold an address
            why = "it is of no known format" if unknown else error
            raise ValueError(f"image {name} cannot be read: {why}") from error
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    raise TypeError(
        f"image is a {type(image).__name__}, expected a PIL image, an array, a path or bytes"
    )


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


def _frame_seconds(side: Side) -> list[float]:
    """The time of each frame of a side's video, an odd last one twice."""
    count = len(side.video)
    seconds = [float(at) for at in side.frame_seconds]
    seconds = seconds or [i / FRAMES_PER_SECOND for i in range(count)]
    if len(seconds) != count:
        raise ValueError(
            f"a side has {count} frames and {len(seconds)} frame_seconds, expected as many or none"
        )
    return seconds + seconds[-1:] * (count % TEMPORAL_PATCH)


def _resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    if image.shape[:2] == (height, width):
        return image
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
