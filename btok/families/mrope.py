"""M-RoPE: the rule of position that Qwen's families share.

Computed here rather than by transformers: since version 5 its `get_rope_index` lets text after a
video start at start + max(height, width), which overlaps a video that lasts longer than that. The
checkpoints were trained with the original rule: text continues at the highest position + 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from btok.vision import Kind, vision_of


def mrope(
    input_ids: Any,
    side: Mapping[str, Any],
    config: Any,
    videos: Sequence[Sequence[Any]] | None = None,
) -> np.ndarray:
    """M-RoPE positions of one sequence, as Qwen2-VL was trained (arXiv 2409.12191, section 2.1).

    Text takes p, p + 1, ... on all three axes. An image or a video that starts at p has
    (p + t, p + y, p + x) at time slot t, row y, column x of its merged grid; what follows goes on
    at the highest position so far + 1.

    Args:
        input_ids: integers [L] (tensor, array, list), a placeholder id per merged vision token.
        side: what they are of, as a processor returns it.
        config: the backbone's configuration.
        videos: in the place of the side's own, in order of appearance, time, height and width in
            patches and, where it is not 1, how far two time slots are apart.

    Returns:
        int64 [3, L]: time, height, width.

    Raises:
        ValueError: vision tokens that do not fit the grids.
    """
    ids = np.asarray(input_ids).tolist()
    merge = config.vision_config.spatial_merge_size
    waiting: dict[int, list[Sequence[Any]]] = {
        config.image_token_id: list(grids_of(side, "image")),
        config.video_token_id: list(grids_of(side, "video") if videos is None else videos),
    }
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


def grids_of(side: Mapping[str, Any], kind: Kind) -> list[list[int]]:
    """Time, height and width in patches of each image or video that a side shows."""
    shown = [vision for vision in vision_of(side) if vision.kind == kind]
    return [row for vision in shown for row in vision.grid.tolist()]
