"""Samples become one packed row `[x ; B ; T][x ; B ; T]...` that the model runs over once.

A sample is a pair (source, target) of mappings as a processor returns them for one sample:
`input_ids`, and for vision `pixel_values` + `image_grid_thw` or `pixel_values_videos` +
`video_grid_thw` (for Qwen2.5-VL with `second_per_grid_ts`). Target is None for a sample that is
only embedded. Features of `BTokModel.see` may stand in the place of all pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from btok.config import CHOICES, check_choice
from btok.families import named_family
from btok_kernels.layout import CondensedLayout

Sample = tuple[Mapping[str, Any], Mapping[str, Any] | None]
Pixels = Tensor | tuple[Tensor, ...]  # or the vision tower's features of them, by level

VISION_KEYS = (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw"))


@dataclass(frozen=True)
class PackedBatch:
    """N samples in T packed rows.

    Args:
        input_ids: int64 [T].
        position_ids: int64 [3, T], M-RoPE time, height and width; equal for a model without vision.
        layout: the sequences' rows and the condensation mask.
        btok_rows: int64 [N, K], the rows of each sample's bottleneck tokens.
        label_rows, labels, label_samples: int64 [R], the rows that predict a counted target token,
            those tokens, and the samples they belong to.
        num_targets: samples that have at least one label.
        pixel_values, image_grid_thw: [patches, patch size] or a tuple of [tokens, D], the vision
            tower's features; int64 [images, 3], in row order.
        pixel_values_videos, video_grid_thw: the same for videos.
    """

    input_ids: Tensor
    position_ids: Tensor
    layout: CondensedLayout
    btok_rows: Tensor
    label_rows: Tensor
    labels: Tensor
    label_samples: Tensor
    num_targets: int
    pixel_values: Pixels | None = None
    image_grid_thw: Tensor | None = None
    pixel_values_videos: Pixels | None = None
    video_grid_thw: Tensor | None = None

    def __len__(self) -> int:
        return len(self.layout)

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch with every tensor on `device`."""
        moved: dict[str, Any] = {"layout": self.layout.to(device)}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                moved[name] = value.to(device)
            elif isinstance(value, tuple):
                moved[name] = tuple(level.to(device) for level in value)
        return replace(self, **moved)


def pack(
    samples: Sequence[Sample],
    *,
    btok_token_ids: Sequence[int],
    prefix_ids: Sequence[int],
    suffix_ids: Sequence[int],
    backbone_config: Any,
    target_positions: str = "reference",
    condense: bool = True,
) -> PackedBatch:
    """Pack samples into one ragged row.

    Each becomes `[x ; B ; T]` with T = prefix + the target's tokens + suffix (method: arXiv
    2604.11095, section 3). Labels are T's tokens but for the prefix and vision placeholders; the
    row before a label predicts it. B continues x's positions; T has its own, shifted by
    len([x ; B]) ("reference") or by the highest position of [x ; B] + 1 ("continue").

    Args:
        samples: (source, target or None) pairs; `input_ids` of any shape with one sample's tokens.
        btok_token_ids: the K bottleneck tokens' ids; empty for a baseline without them.
        prefix_ids, suffix_ids: tokens around a target's own; the prefix must not be empty.
        backbone_config: the backbone's configuration (model type, vision token ids, merge size).
        target_positions: "reference" or "continue".
        condense: False lets target rows see the source as well (the ablation).

    Raises:
        ValueError: no samples, an empty sequence, vision tokens that do not fit the pixels, pixels
            for a model without vision, an empty prefix, an unknown `target_positions` or model.
    """
    if not samples:
        raise ValueError("pack: samples is empty, expected at least one")
    check_choice("pack", "target_positions", target_positions, CHOICES["target_positions"])
    if not len(prefix_ids) and any(target is not None for _, target in samples):
        raise ValueError("pack: prefix_ids is empty, expected the tokens that open a target")
    num_btoks = len(btok_token_ids)
    pieces: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    source_lens, target_lens = [], []
    label_rows, label_samples = [], []
    row = 0
    for index, (source, target) in enumerate(samples):
        ids = np.concatenate([_ids(source), np.asarray(btok_token_ids, np.int64)])
        if not len(ids):
            raise ValueError(f"pack: sample {index} has no tokens")
        pieces.append(ids)
        positions.append(_positions(ids, source, backbone_config))
        source_lens.append(len(ids) - num_btoks)
        row += len(ids)
        if target is None:
            target_lens.append(0)
            continue
        reference = target_positions == "reference"
        shift = len(ids) if reference else int(positions[-1].max()) + 1
        ids, counted = _target(target, prefix_ids, suffix_ids, backbone_config)
        pieces.append(ids)
        positions.append(_positions(ids, target, backbone_config) + shift)
        target_lens.append(len(ids))
        label_rows.append(row - 1 + counted.nonzero()[0])
        label_samples.append(np.full(len(label_rows[-1]), index))
        row += len(ids)

    layout = CondensedLayout.from_lengths(source_lens, target_lens, num_btoks, condense)
    border = layout.bounds[:, 2].long()
    input_ids = torch.from_numpy(np.concatenate(pieces))
    none = np.empty(0, np.int64)
    rows = torch.from_numpy(np.concatenate([none, *label_rows]))
    return PackedBatch(
        input_ids=input_ids,
        position_ids=torch.from_numpy(np.concatenate(positions, axis=1)),
        layout=layout,
        btok_rows=border[:, None] + torch.arange(-num_btoks, 0),
        label_rows=rows,
        labels=input_ids[rows + 1],
        label_samples=torch.from_numpy(np.concatenate([none, *label_samples])),
        num_targets=sum(len(rows) > 0 for rows in label_rows),
        **_vision(samples),
    )


def count_labels(
    targets: Iterable[Mapping[str, Any]],
    *,
    prefix_ids: Sequence[int],
    suffix_ids: Sequence[int],
    backbone_config: Any,
) -> tuple[int, int]:
    """(targets with at least one label, labels) that `pack` will count."""
    of_target = (prefix_ids, suffix_ids, backbone_config)
    counts = [int(_target(target, *of_target)[1].sum()) for target in targets]
    return sum(count > 0 for count in counts), sum(counts)


def _target(
    target: Mapping[str, Any], prefix_ids: Sequence[int], suffix_ids: Sequence[int], config: Any
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of T, and which of them count as labels."""
    ids = np.concatenate([prefix_ids, _ids(target), suffix_ids]).astype(np.int64)
    vision = [getattr(config, f"{kind}_token_id", -1) for kind in ("image", "video")]
    counted = ~np.isin(ids, vision)
    counted[: len(prefix_ids)] = False
    return ids, counted


def _ids(side: Mapping[str, Any]) -> np.ndarray:
    return np.asarray(side["input_ids"], dtype=np.int64).reshape(-1)


def _positions(ids: np.ndarray, side: Mapping[str, Any], config: Any) -> np.ndarray:
    """[3, L], by the rule of the backbone's family."""
    family = named_family(config.model_type, "pack: the backbone's model_type")
    if family.vision is None and any(side.get(grid) is not None for _, grid in VISION_KEYS):
        raise ValueError(
            f"pack: a sample has images or a video, {config.model_type} takes text alone"
        )
    return family.positions(ids, side, config)


def group_by_tokens(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in turns of at most `budget` in all; what is larger has a turn of its own."""
    turns: list[list[int]] = []
    left = 0
    for index, size in enumerate(sizes):
        if not turns or size > left:
            turns.append([])
            left = budget
        turns[-1].append(index)
        left -= size
    return turns


def _vision(samples: Sequence[Sample]) -> dict[str, Any]:
    """Pixels and grids of all sides in row order, checked against each other."""
    sides = [side for sample in samples for side in sample if side is not None]
    out: dict[str, Any] = {}
    for pixels_key, grid_key in VISION_KEYS:
        having = [side for side in sides if side.get(grid_key) is not None]
        if not having:
            continue
        if any(side.get(pixels_key) is None for side in having):
            raise ValueError(f"pack: a sample has {grid_key} but no {pixels_key}")
        if len({isinstance(side[pixels_key], tuple) for side in having}) > 1:
            raise ValueError(f"pack: {pixels_key} are features in some samples, pixels in others")
        grid = torch.cat([torch.as_tensor(side[grid_key]) for side in having])
        if isinstance(having[0][pixels_key], tuple):  # features
            levels = zip(*(side[pixels_key] for side in having), strict=True)
            out |= {pixels_key: tuple(map(_join, levels)), grid_key: grid}
            continue
        pixels = torch.cat([torch.as_tensor(side[pixels_key]) for side in having])
        if len(pixels) != (asked := int(grid.prod(dim=1).sum())):
            raise ValueError(f"pack: {pixels_key} has {len(pixels)} patches, {grid_key} {asked}")
        out |= {pixels_key: pixels, grid_key: grid}
    return out


def _join(parts: Sequence[Tensor]) -> Tensor:
    """Features one behind the other, on the accelerator if any is there, else on the host."""
    # the host's come to the device and not the other way: the model reads them there
    device = next((part.device for part in parts if part.device.type != "cpu"), parts[0].device)
    return torch.cat([part.to(device, non_blocking=True) for part in parts])
