"""What a side shows: its images or its video, as patches or as what the vision tower made of them.

Our processor's mapping has `Vision`s under `vision`, whose pixels are bytes until the tower takes
them: an eighth of an image's floats on the way there. A stock processor's has floats by name:
`pixel_values` + `image_grid_thw` for images, `pixel_values_videos` + `video_grid_thw` for a video.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from btok_kernels.layout import on_device

Kind = Literal["image", "video"]
KEYS: dict[Kind, tuple[str, str]] = {
    "image": ("pixel_values", "image_grid_thw"),
    "video": ("pixel_values_videos", "video_grid_thw"),
}


class Normalization(NamedTuple):
    """What bytes of pixels become: (byte / 255 - mean) / std, in fp32.

    Args:
        mean, std: of each of the three channels, of values in [0, 1].
        repeat: how often the tower takes each channel of a patch, one behind the other: twice for
            a still image where its patches span two frames.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    repeat: int = 1


@dataclass(frozen=True)
class Vision:
    """The images, or the videos, of one side or of a packed row.

    Args:
        kind: which placeholder stands for them, the backbone's `<kind>_token_id`.
        grid: int64 [n, 3] on the host, time, height and width of each, in patches.
        pixels: [patches, values], floats as the tower takes them (channel, frame, row, column), or
            uint8 with a `normalization` (frame, row, column, channel); None where there are
            features.
        features: the vision tower's, [tokens, D] of each of its levels.
        normalization: what uint8 `pixels` become; None for floats.
    """

    kind: Kind
    grid: Tensor
    pixels: Tensor | None = None
    features: tuple[Tensor, ...] = ()
    normalization: Normalization | None = None

    @property
    def patches(self) -> list[int]:
        """The number of patches of each image or video."""
        return self.grid.prod(dim=1).tolist()

    def to(self, device: torch.device | str) -> Vision:
        """This `Vision` with pixels and features on `device`; the grid stays on the host, which
        asks.
        """
        pixels = None if self.pixels is None else on_device(self.pixels, device)
        features = tuple(on_device(level, device) for level in self.features)
        return replace(self, pixels=pixels, features=features)

    def as_floats(self) -> Vision:
        """This `Vision` with pixels as the tower takes them: float32 [patches, values * repeat]."""
        if self.normalization is None or self.pixels is None:
            return self
        mean, std, repeat = self.normalization
        colours = self.pixels.view(len(self.pixels), 1, -1, 3).permute(0, 3, 1, 2)
        values = colours.to(torch.float32, memory_format=torch.contiguous_format)
        # divisors lie on the device: by a Python number CUDA divides with its reciprocal, which
        # rounds otherwise; `new_full` makes them there, so that the host need not wait
        values /= values.new_full((), 255)
        for channel, of_mean, of_std in zip(values.unbind(1), mean, std, strict=True):
            channel -= of_mean
            channel /= values.new_full((), of_std)
        pixels = values.expand(-1, -1, repeat, -1).flatten(1)
        return replace(self, pixels=pixels, normalization=None)


def vision_of(side: Mapping[str, Any]) -> list[Vision]:
    """The images and the video of a side, as a processor returns it.

    Raises:
        ValueError: a grid without pixels, or with more or fewer patches than it says.
    """
    if "vision" in side:
        return list(side["vision"])
    found = []
    for kind, (pixels_key, grid_key) in KEYS.items():
        if side.get(grid_key) is None:
            continue
        if side.get(pixels_key) is None:
            raise ValueError(f"pack: a sample has {grid_key} but no {pixels_key}")
        grid, pixels = torch.as_tensor(side[grid_key]), torch.as_tensor(side[pixels_key])
        if len(pixels) != (asked := int(grid.prod(dim=1).sum())):
            raise ValueError(f"pack: {pixels_key} has {len(pixels)} patches, {grid_key} {asked}")
        found.append(Vision(kind, grid, pixels))
    return found


class Processed(dict[str, Any]):
    """What a processor of ours makes of a side; it also answers to a stock processor's names."""

    def __missing__(self, key: str) -> Any:
        if any(key in names for names in KEYS.values()):
            return by_name(self)[key]
        raise KeyError(key)


def by_name(side: Mapping[str, Any]) -> dict[str, Any]:
    """A side of ours as a stock processor of Qwen's returns it: floats and grids by name."""
    named = {key: value for key, value in side.items() if key != "vision"}
    for shown in side.get("vision", ()):
        pixels, grid = KEYS[shown.kind]
        named |= {pixels: shown.as_floats().pixels, grid: shown.grid}
    return named


def join(parts: Sequence[Vision]) -> tuple[Vision, ...]:
    """The images and videos of many sides, joined in their order into one `Vision` of each kind.

    Raises:
        ValueError: features in some and pixels in others of a kind.
    """
    joined = []
    for kind in KEYS:
        if not (own := [part for part in parts if part.kind == kind]):
            continue
        if len(own) == 1:
            joined += own
            continue
        grid = torch.cat([part.grid for part in own])
        if len({part.normalization for part in own}) > 1:  # our bytes beside stock floats
            own = [part.as_floats() for part in own]
        pixels = [part.pixels for part in own if part.pixels is not None]
        if len(pixels) == len(own):
            normalization = own[0].normalization
            joined.append(Vision(kind, grid, torch.cat(pixels), normalization=normalization))
        elif pixels:
            name = KEYS[kind][0]
            raise ValueError(f"pack: {name} are features in some samples, pixels in others")
        else:
            levels = zip(*(part.features for part in own), strict=True)
            joined.append(Vision(kind, grid, features=tuple(map(_one_device, levels))))
    return tuple(joined)


def _one_device(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate tensors on the accelerator if any is there, else on the host."""
    # the host's come to the device and not the other way: the model reads them there
    device = next((part.device for part in parts if part.device.type != "cpu"), parts[0].device)
    return torch.cat([on_device(part, device) for part in parts])
