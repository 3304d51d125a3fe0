"""What a side shows: its images or its video, as patches or as what the vision tower made of them.

A processor's mapping has them by name: `pixel_values` + `image_grid_thw` for images,
`pixel_values_videos` + `video_grid_thw` for a video. Under `vision` it may have `Vision`s instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from btok_kernels.layout import on_device

Kind = Literal["image", "video"]
KEYS: dict[Kind, tuple[str, str]] = {
    "image": ("pixel_values", "image_grid_thw"),
    "video": ("pixel_values_videos", "video_grid_thw"),
}


@dataclass(frozen=True)
class Vision:
    """The images, or the videos, of one side or of a packed row.

    Args:
        kind: which placeholder stands for them, the backbone's `<kind>_token_id`.
        grid: int64 [n, 3], time, height and width of each, in patches.
        pixels: [patches, values]; None where there are features.
        features: the vision tower's, [tokens, D] of each of its levels.
    """

    kind: Kind
    grid: Tensor
    pixels: Tensor | None = None
    features: tuple[Tensor, ...] = ()

    @property
    def patches(self) -> list[int]:
        """The number of patches of each image or video."""
        return self.grid.prod(dim=1).tolist()

    def to(self, device: torch.device | str) -> Vision:
        """The same with every tensor on `device`."""
        pixels = None if self.pixels is None else on_device(self.pixels, device)
        features = tuple(on_device(level, device) for level in self.features)
        return replace(self, grid=on_device(self.grid, device), pixels=pixels, features=features)


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


def join(parts: Sequence[Vision]) -> tuple[Vision, ...]:
    """Those of many sides as one of each kind, in their order.

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
        pixels = [part.pixels for part in own if part.pixels is not None]
        if len(pixels) == len(own):
            joined.append(Vision(kind, grid, torch.cat(pixels)))
        elif pixels:
            name = KEYS[kind][0]
            raise ValueError(f"pack: {name} are features in some samples, pixels in others")
        else:
            levels = zip(*(part.features for part in own), strict=True)
            joined.append(Vision(kind, grid, features=tuple(map(_one_device, levels))))
    return tuple(joined)


def _one_device(parts: Sequence[Tensor]) -> Tensor:
    """One behind the other, on the accelerator if any is there, else on the host."""
    # the host's come to the device and not the other way: the model reads them there
    device = next((part.device for part in parts if part.device.type != "cpu"), parts[0].device)
    return torch.cat([on_device(part, device) for part in parts])
