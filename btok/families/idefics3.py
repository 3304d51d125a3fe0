"""Idefics3 (arXiv 2408.12637) and SmolVLM (arXiv 2504.05299): a picture in square tiles, and whole.

    <fake_token_around_image><row_1_col_1> placeholders <fake_token_around_image><row_1_col_2> ...
    <fake_token_around_image><global-img> placeholders <fake_token_around_image>

There is a line break behind each row of tiles, and one before the whole picture, which is one tile.
A picture of no more than a tile, and each frame of a video, is the last line alone. A tile takes as
many tokens as any other; positions are those of text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import Tensor

from btok.data.records import Side
from btok.families.family import (
    IMAGE_FILE,
    VIDEO_FILE,
    Family,
    ImageProcessor,
    Seen,
    VisionRules,
    checked_channels,
    checked_number,
    encode_text,
    patches_of,
    special_token,
)
from btok.inputs import frame_seconds, resized, rgb_array
from btok.vision import KEYS, Normalization, Vision, vision_of

MOST = 4096  # pixels of a picture's longer edge, at most
MOST_TILES = 64  # along it
ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
ONES += " fifteen sixteen seventeen eighteen nineteen"
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"


class TileImageProcessor(ImageProcessor):
    """Tiles of pictures, each tile's patches in row order, and their tokens.

    Args:
        tokenizer: with Idefics3's special tokens.
        longest_edge: of a picture, in pixels, before it is cut into tiles; at most 4,096.
        tile: the edge of a tile in pixels.
        do_image_splitting: False shows pictures whole alone, as one tile.
        patch_size, merge_size: pixels per patch side, patches per token side.
        image_mean, image_std: per channel, of values in [0, 1].

    Raises:
        ValueError: a tokenizer that lacks a special token; edges that do not go together.
    """

    BOUNDS = ("longest_edge", "tile", "do_image_splitting")
    SETTINGS = (*BOUNDS, "patch_size", "merge_size", "image_mean", "image_std")
    stock = "Idefics3"
    shown = {"image": ("<image>", ""), "video": ("<video>", "\n\n")}  # noqa: RUF012

    def __init__(
        self,
        tokenizer: Any,
        *,
        longest_edge: int = 2048,
        tile: int = 512,
        do_image_splitting: bool = True,
        patch_size: int = 16,
        merge_size: int = 4,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
    ) -> None:
        for name, value in (
            ("longest_edge", longest_edge),
            ("tile", tile),
            ("patch_size", patch_size),
            ("merge_size", merge_size),
        ):
            checked_number(name, value, MOST)
        if not isinstance(do_image_splitting, bool):
            had = f"Processor: do_image_splitting is {do_image_splitting!r:.60}"
            raise ValueError(f"{had}, expected True or False")
        if not tile <= longest_edge <= MOST_TILES * tile:
            raise ValueError(
                f"Processor: tile is {tile} and longest_edge {longest_edge}, expected the "
                f"second to be 1 to {MOST_TILES} of the first"
            )
        if tile < patch_size or (tile // patch_size) % merge_size:
            raise ValueError(
                f"Processor: tile is {tile}, {tile // patch_size} patches of {patch_size} pixels, "
                f"expected a multiple of merge_size {merge_size} of them"
            )
        self.tokenizer, self.longest_edge, self.tile = tokenizer, longest_edge, tile
        self.do_image_splitting = do_image_splitting
        self.patch_size, self.merge_size = patch_size, merge_size
        self.image_mean = checked_channels("image_mean", image_mean)
        self.image_std = checked_channels("image_std", image_std, above=0)
        self.around, self.image = (
            special_token(tokenizer, name, "Idefics3's")
            for name in ("<fake_token_around_image>", "<image>")
        )
        self.reserved = frozenset((self.around, self.image))

    @property
    def tokens(self) -> int:
        """How many tokens stand for a tile."""
        return (self.tile // self.patch_size // self.merge_size) ** 2

    def __call__(self, side: Side) -> Seen:
        ids: list[int] = []
        tiles: list[np.ndarray] = []  # uint8 [tile, tile, 3]
        for image in side.images:
            cut, rows = self._cut(rgb_array(image))
            tiles += cut
            columns = (len(cut) - 1) // max(rows, 1)  # the last of `cut` is the whole
            for row in range(rows):
                for column in range(columns):
                    ids += self._tile(f"<row_{row + 1}_col_{column + 1}>")
                ids += encode_text(self.tokenizer, "\n" if row + 1 < rows else "\n\n")
            ids += [*self._tile("<global-img>"), self.around]
        if len(side.video):
            seconds = frame_seconds(side)
            before = (
                f"You are provided the following series of {_in_words(len(seconds))} frames from a "
                f"{timedelta(seconds=int(seconds[-1]))} [H:MM:SS] video.\n"
            )
            for frame, second in zip(side.video, seconds, strict=True):
                minutes, rest = divmod(int(second), 60)
                when = f"{before}\nFrame from {minutes:02d}:{rest:02d}:"
                ids += encode_text(self.tokenizer, when)
                ids += [*self._tile("<global-img>"), self.around]
                tiles.append(self._whole(rgb_array(frame), self.tile))
                before = ""
        edge = self.tile // self.patch_size
        whole = edge * self.patch_size
        shown = Vision(
            "image",
            torch.tensor([[1, edge, edge]] * len(tiles)),
            patches_of(np.stack(tiles)[:, None, :whole, :whole], self.patch_size),
            normalization=Normalization(self.image_mean, self.image_std),
        )
        return Seen(ids, "\n\n" if len(side.video) else "", {"vision": [shown]})

    def estimate(self, pixels: Sequence[int], frames: int) -> int:
        cut = math.ceil(self.longest_edge / self.tile) ** 2 if self.do_image_splitting else 0
        return (len(pixels) * (cut + 1) + frames) * self.tokens

    @classmethod
    def read(
        cls, image: Mapping[str, Any], video: Mapping[str, Any], config: Mapping[str, Any]
    ) -> dict[str, Any]:
        found = {name: image[name] for name in cls.SETTINGS if name in image}
        for ours, file, *keys in (
            ("longest_edge", image, "size", "longest_edge"),
            ("tile", image, "max_image_size", "longest_edge"),
            ("patch_size", config, "vision_config", "patch_size"),
            ("merge_size", config, "scale_factor"),
        ):
            value: Any = file
            for key in keys:
                value = value.get(key) if isinstance(value, Mapping) else None
            if value is not None:
                found.setdefault(ours, value)
        return found

    def files(self) -> dict[str, dict[str, Any]]:
        shared: dict[str, Any] = {
            "processor_class": f"{self.stock}Processor",
            "max_image_size": {"longest_edge": self.tile},
            "resample": 1,  # Lanczos
            **{name: getattr(self, name) for name in self.SETTINGS if name not in self.BOUNDS},
        }
        image = {
            "image_processor_type": f"{self.stock}ImageProcessor",
            "size": {"longest_edge": self.longest_edge},
            "do_image_splitting": self.do_image_splitting,
        }
        both = {"processor_class": f"{self.stock}Processor", "image_seq_len": self.tokens}
        return {IMAGE_FILE: shared | image, "processor_config.json": both}

    def _tile(self, place: str) -> list[int]:
        """The tokens of a tile."""
        at = special_token(self.tokenizer, place, "Idefics3's")
        return [self.around, at, *[self.image] * self.tokens]

    def _cut(self, image: np.ndarray) -> tuple[list[np.ndarray], int]:
        """A picture's tiles, row by row, then the whole; how many rows, 0 for the whole alone."""
        edge = self.tile
        if not self.do_image_splitting:
            return [self._whole(image, self.longest_edge)], 0
        image = resized(image, *_longest(image, self.longest_edge), "LANCZOS")
        image = resized(image, *_multiples(image, edge), "LANCZOS")
        rows, columns = image.shape[0] // edge, image.shape[1] // edge
        if rows == columns == 1:
            return [image], 0
        cut = image.reshape(rows, edge, columns, edge, 3).swapaxes(1, 2).reshape(-1, edge, edge, 3)
        return [*cut, resized(image, edge, edge, "LANCZOS")], rows

    def _whole(self, image: np.ndarray, longest_edge: int) -> np.ndarray:
        image = resized(image, *_longest(image, longest_edge), "LANCZOS")
        return resized(image, self.tile, self.tile, "LANCZOS")


def _longest(image: np.ndarray, edge: int) -> tuple[int, int]:
    """The size whose longer edge is `edge`; the other one keeps the aspect ratio and is even."""
    height, width, _ = image.shape
    if width >= height:
        other = int(edge / (width / height))
        return max(other + other % 2, 1), edge
    other = int(edge * (width / height))
    return edge, max(other + other % 2, 1)


def _multiples(image: np.ndarray, tile: int) -> tuple[int, int]:
    """The size in whole tiles: the longer edge rounded up, then the other by the aspect ratio."""
    height, width, _ = image.shape
    ratio = width / height
    if width >= height:
        width = math.ceil(width / tile) * tile
        return math.ceil(int(width / ratio) / tile) * tile, width
    height = math.ceil(height / tile) * tile
    return height, math.ceil(int(height * ratio) / tile) * tile


def _in_words(number: int) -> str:
    if number < 20:
        return ONES.split()[number]
    if number > 99:
        return str(number)
    tens, ones = divmod(number, 10)
    return TENS.split()[tens - 2] + (f"-{ONES.split()[ones]}" if ones else "")


def _patches(tiles: Tensor, size: int) -> Tensor:
    """[n, 3, H, W] as [patches, 3 * size * size], each tile's in row order.

    What is less than a patch at the right and below, the tower does not look at (SmolVLM-2.2B has
    tiles of 384 pixels and patches of 14).
    """
    height, width = (edge // size * size for edge in tiles.shape[2:])
    tiles = tiles[..., :height, :width]
    return (
        tiles.unflatten(3, (-1, size))
        .unflatten(2, (-1, size))
        .permute(0, 2, 4, 1, 3, 5)
        .flatten(0, 2)
        .flatten(1)
    )


class _TiledVision(VisionRules):
    tower, connector = "vision_model", "connector"

    def read(self, side: Mapping[str, Any], config: Any) -> list[Vision]:
        """What a side shows, from btok's processor, or from the stock one's tiles [1, n, 3, H, W],
        none of which is padding.
        """
        pixels, grid = KEYS["image"]
        if "vision" in side or side.get(pixels) is None or side.get(grid) is not None:
            return vision_of(side)
        size = config.vision_config.patch_size
        tiles = torch.as_tensor(side[pixels]).flatten(0, -4)
        grids = torch.tensor([[1, tiles.shape[2] // size, tiles.shape[3] // size]] * len(tiles))
        return [Vision("image", grids, _patches(tiles, size))]

    def features(self, model: Any, vision: Vision) -> list[Tensor]:
        assert vision.pixels is not None
        size = model.config.vision_config.patch_size
        edge = math.isqrt(len(vision.pixels) // len(vision.grid))  # of a tile, in patches
        patches = vision.pixels.to(model.dtype).view(-1, edge, edge, 3, size, size)
        tiles = patches.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        # not get_image_features: the host would wait there for which tiles are padding, and none is
        mask = torch.ones(len(tiles), edge, edge, dtype=torch.bool, device=tiles.device)
        seen = model.vision_model(pixel_values=tiles, patch_attention_mask=mask)
        return [model.connector(seen.last_hidden_state).flatten(0, 1)]

    def merge_size(self, config: Any) -> int:
        return config.scale_factor


class _SmolVLMImageProcessor(TileImageProcessor):
    stock = "SmolVLM"

    def files(self) -> dict[str, dict[str, Any]]:
        files = super().files()
        video = {k: v for k, v in files[IMAGE_FILE].items() if not k.startswith(("image_p", "do_"))}
        video |= {"video_processor_type": "SmolVLMVideoProcessor", "do_sample_frames": False}
        return files | {VIDEO_FILE: video | {"size": {"longest_edge": self.tile}}}


def _family(model: str, images: type[ImageProcessor]) -> Family:
    return Family(
        f"{model}ForConditionalGeneration",
        _TiledVision(images),
        language_model="text_model",
        turns=(("\nAssistant:", "<end_of_utterance>"),),
    )


IDEFICS3 = _family("Idefics3", TileImageProcessor)
SMOLVLM = _family("SmolVLM", _SmolVLMImageProcessor)
