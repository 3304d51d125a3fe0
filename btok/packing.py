"""Samples become one packed row `[x ; B ; T][x ; B ; T]...` that the model runs over once.

A sample is a pair (source, target) of mappings as a processor returns them for one sample:
`input_ids`, and what it shows (`btok/vision.py`). Target is None for a sample that is only
embedded. A target with `masked`, bool of its tokens, is a text to be restored: these are not shown,
and they alone count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from btok.config import CHOICES, check_choice
from btok.families import named_family
from btok.vision import Vision, join
from btok_kernels.layout import CondensedLayout, on_device

Sample = tuple[Mapping[str, Any], Mapping[str, Any] | None]


@dataclass(frozen=True)
class PackedBatch:
    """N samples `[x ; B ; T]` in T packed rows, on one device.

    Args:
        input_ids: int64 [T].
        position_ids: int64 [3, T], M-RoPE time, height and width; equal for a model without vision.
        layout: the sequences' rows and the condensation mask.
        btok_rows: int64 [N, K], the rows of each sample's bottleneck tokens.
        label_rows, labels, label_samples: int64 [R], the rows that predict a counted target token,
            those tokens, and the samples they belong to.
        num_targets: samples that have at least one label, not counting those restored.
        vision: what each side shows, in row order; joined where it is moved.
        restored: bool [R], labels of a text to be restored; empty where there is none.
        num_restored, num_restored_labels: such samples, and their labels.
    """

    input_ids: Tensor
    position_ids: Tensor
    layout: CondensedLayout
    btok_rows: Tensor
    label_rows: Tensor
    labels: Tensor
    label_samples: Tensor
    num_targets: int
    vision: tuple[Vision, ...] = ()
    restored: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    num_restored: int = 0
    num_restored_labels: int = 0

    def __len__(self) -> int:
        return len(self.layout)

    def to(self, device: torch.device | str) -> PackedBatch:
        """This batch with every tensor on `device`, and one `Vision` of each kind."""
        moved: dict[str, Any] = {"layout": self.layout.to(device)}
        moved["vision"] = tuple(vision.to(device) for vision in join(self.vision))
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                moved[name] = on_device(value, device)
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
    budgets: Sequence[int] | None = None,
    mask_token_id: int | None = None,
) -> PackedBatch:
    """Pack samples into one ragged row `[x ; B ; T][x ; B ; T]...`.

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
        budgets: per sample, how many bottleneck tokens, the first ones, its target sees; it is then
            where it would be behind so many. None for all K.
        mask_token_id: stands for the tokens of a target that are to be restored.

    Raises:
        ValueError: no samples, an empty sequence, budgets that are not one of 0 to K per sample,
            vision tokens that do not fit the pixels, pixels for a model without vision, an empty
            prefix, an unknown `target_positions` or model.
    """
    if not samples:
        raise ValueError("pack: samples is empty, expected at least one")
    check_choice("pack", "target_positions", target_positions, CHOICES["target_positions"])
    if not len(prefix_ids) and any(target is not None for _, target in samples):
        raise ValueError("pack: prefix_ids is empty, expected the tokens that open a target")
    family = named_family(backbone_config.model_type, "pack: the backbone's model_type")
    num_btoks = len(btok_token_ids)
    vision: list[Vision] = []
    pieces: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    source_lens, target_lens = [], []
    label_rows, label_samples, labels, restored = [], [], list[np.ndarray](), list[bool]()
    if budgets is not None and len(budgets) != len(samples):
        raise ValueError(
            f"pack: budgets has {len(budgets)} numbers, expected one for each of the "
            f"{len(samples)} samples"
        )
    row = 0
    for index, (source, target) in enumerate(samples):
        ids = np.concatenate([_ids(source), np.asarray(btok_token_ids, np.int64)])
        if not len(ids):
            raise ValueError(f"pack: sample {index} has no tokens")
        pieces.append(ids)
        positions.append(family.positions(ids, source, backbone_config))
        vision += family.shown(source, backbone_config)
        source_lens.append(len(ids) - num_btoks)
        row += len(ids)
        if target is None:
            target_lens.append(0)
            continue
        seen = len(ids) - (0 if budgets is None else num_btoks - budgets[index])
        reference = target_positions == "reference"
        shift = seen if reference else int(positions[-1][:, :seen].max(initial=-1)) + 1
        ids, counted = _target(target, prefix_ids, suffix_ids, backbone_config)
        labels.append(ids[counted])
        restored.append("masked" in target)
        if restored[-1]:
            if mask_token_id is None:
                raise ValueError(f"pack: mask_token_id is None, and sample {index} is to restore")
            ids = np.where(counted, mask_token_id, ids)
        pieces.append(ids)
        positions.append(family.positions(ids, target, backbone_config) + shift)
        vision += family.shown(target, backbone_config)
        target_lens.append(len(ids))
        label_rows.append(row - 1 + counted.nonzero()[0])
        label_samples.append(np.full(len(label_rows[-1]), index))
        row += len(ids)

    layout = CondensedLayout.from_lengths(
        source_lens, target_lens, num_btoks, condense, budgets=budgets
    )
    border = layout.bounds[:, 2].long()
    input_ids = torch.from_numpy(np.concatenate(pieces))
    none = np.empty(0, np.int64)
    counts = np.array([len(rows) for rows in label_rows], np.int64)  # of each target
    again = np.array(restored, bool)
    return PackedBatch(
        input_ids=input_ids,
        position_ids=torch.from_numpy(np.concatenate(positions, axis=1)),
        layout=layout,
        btok_rows=border[:, None] + torch.arange(-num_btoks, 0),
        label_rows=torch.from_numpy(np.concatenate([none, *label_rows])),
        labels=torch.from_numpy(np.concatenate([none, *labels])),
        label_samples=torch.from_numpy(np.concatenate([none, *label_samples])),
        num_targets=int((counts[~again] > 0).sum()),
        vision=tuple(vision),
        restored=torch.from_numpy(np.repeat(again, counts) if again.any() else np.empty(0, bool)),
        num_restored=int((counts[again] > 0).sum()),
        num_restored_labels=int(counts[again].sum()),
    )


def _target(
    target: Mapping[str, Any], prefix_ids: Sequence[int], suffix_ids: Sequence[int], config: Any
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of T, and which of them count as labels."""
    ids = np.concatenate([prefix_ids, _ids(target), suffix_ids]).astype(np.int64)
    vision = [getattr(config, f"{kind}_token_id", -1) for kind in ("image", "video")]
    counted = ~np.isin(ids, vision)
    counted[: len(prefix_ids)] = False
    if "masked" in target:
        masked = np.pad(target["masked"], (len(prefix_ids), len(suffix_ids)))
        counted &= masked
    return ids, counted


def _ids(side: Mapping[str, Any]) -> np.ndarray:
    return np.asarray(side["input_ids"], dtype=np.int64).reshape(-1)


def group_by_tokens(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of `sizes` in groups of at most `budget` in all, in order; a larger one has a group
    of its own.
    """
    turns: list[list[int]] = []
    left = 0
    for index, size in enumerate(sizes):
        if not turns or size > left:
            turns.append([])
            left = budget
        turns[-1].append(index)
        left -= size
    return turns
