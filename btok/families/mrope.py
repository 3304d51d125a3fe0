"""M-RoPE: the rule of position that Qwen's families share.

Computed here rather than by transformers: since version 5 its `get_rope_index` lets text after a
video start at start + max(height, width), which overlaps a video that lasts longer than that. The
checkpoints were trained with the original rule: text continues at the highest position + 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from btok.vision import KEYS, vision_of


def mrope(input_ids: Any, grids: Mapping[int, Sequence[Sequence[Any]]], merge: int) -> np.ndarray:
    """Positions of text and grids in the order of their tokens.

    Args:
        input_ids: integers [L].
        grids: by placeholder id, in order of appearance, time, height and width in patches and,
            where it is not 1, how far two time slots are apart.
        merge: patches per merged token along height and along width.

    Returns:
        int64 [3, L]: time, height, width.

    Raises:
        ValueError: vision tokens that do not fit the grids.
    """
    ids = np.asarray(input_ids).tolist()
    waiting = {token: list(of_token) for token, of_token in grids.items()}
    pieces = [np.empty((3, 0), np.int64)]
    row = position = 0
    while row < len(ids):
        if ids[row] in waiting:
            token = ids[row]
            if not waiting[token]:
                raise ValueError(
                    f"positions: input_ids has a vision token {token} at {row} and no grid is left "
                    "for it"
                )
            time, height, width, *step = waiting[token].pop(0)
            shape = (time, height // merge, width // merge)
            length = shape[0] * shape[1] * shape[2]
            if ids[row : row + length] != [token] * length:
                raise ValueError(
                    f"positions: input_ids has fewer than {length} vision tokens {token} at {row}, "
                    f"the grid is {[time, height, width]}"
                )
            piece = np.indices(shape).reshape(3, length)
            if step:
                piece[0] = (piece[0].astype(np.float32) * step[0]).astype(np.int64)
            piece += position
        else:
            length = 1
            while row + length < len(ids) and ids[row + length] not in waiting:
                length += 1
            piece = np.broadcast_to(position + np.arange(length), (3, length))
        pieces.append(piece)
        position = int(piece.max()) + 1
        row += length
    if left := {token: grids for token, grids in waiting.items() if grids}:
        raise ValueError(f"positions: no vision tokens for the grids {left}")
    return np.concatenate(pieces, axis=1)


def rows(grid: Any) -> list[Any]:
    """A grid's rows, or a video's seconds, as a list; empty for None."""
    return [] if grid is None else np.asarray(grid).tolist()


def arguments(side: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """What every rule of Qwen's takes, of a side and the backbone's configuration."""
    shown = vision_of(side)
    grids = {
        grid: [row for vision in shown if vision.kind == kind for row in vision.grid.tolist()]
        for kind, (_, grid) in KEYS.items()
    }
    return {
        **grids,
        "image_token_id": config.image_token_id,
        "video_token_id": config.video_token_id,
        "spatial_merge_size": config.vision_config.spatial_merge_size,
    }
