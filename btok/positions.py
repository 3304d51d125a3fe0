"""M-RoPE position indices, one pure function per model family.

Computed here rather than by transformers: since version 5 its `get_rope_index` lets text after a
video start at start + max(height, width), which overlaps a video with more time slots than that.
The checkpoints were trained with the original rule: text continues at the highest position + 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def qwen2_vl_positions(
    input_ids: Any,
    image_grid_thw: Any = None,
    video_grid_thw: Any = None,
    *,
    image_token_id: int,
    video_token_id: int,
    spatial_merge_size: int = 2,
) -> np.ndarray:
    """M-RoPE positions of one sequence, as Qwen2-VL was trained (its report, section 2.1).

    Text takes p, p + 1, ... on all three axes. An image or a video that starts at p has
    (p + t, p + y, p + x) at time slot t, row y, column x of its merged grid; what follows goes on
    at the highest position so far + 1.

    Args:
        input_ids: integers [L] (tensor, array, list), a placeholder id per merged vision token.
        image_grid_thw, video_grid_thw: integers [n, 3], time, height and width in patches, in order
            of appearance, else a ValueError; None for none.
        image_token_id, video_token_id: the placeholder ids.
        spatial_merge_size: patches per merged token along height and along width.

    Returns:
        int64 [3, L]: time, height, width.
    """
    ids = np.asarray(input_ids).tolist()
    grids = {image_token_id: image_grid_thw, video_token_id: video_grid_thw}
    waiting = {t: [] if grid is None else np.asarray(grid).tolist() for t, grid in grids.items()}
    pieces = [np.empty((3, 0), np.int64)]
    row = position = 0
    while row < len(ids):
        if ids[row] in waiting:
            token = ids[row]
            if not waiting[token]:
                raise ValueError(
                    f"qwen2_vl_positions: input_ids has a vision token {token} at {row} and no "
                    "grid is left for it"
                )
            time, height, width = waiting[token].pop(0)
            shape = (time, height // spatial_merge_size, width // spatial_merge_size)
            length = shape[0] * shape[1] * shape[2]
            if ids[row : row + length] != [token] * length:
                raise ValueError(
                    f"qwen2_vl_positions: input_ids has fewer than {length} vision tokens {token} "
                    f"at {row}, the grid is {[time, height, width]}"
                )
            piece = position + np.indices(shape).reshape(3, length)
        else:
            length = 1
            while row + length < len(ids) and ids[row + length] not in waiting:
                length += 1
            piece = np.broadcast_to(position + np.arange(length), (3, length))
        pieces.append(piece)
        position = int(piece.max()) + 1
        row += length
    left = {token: grids for token, grids in waiting.items() if grids}
    if left:
        raise ValueError(f"qwen2_vl_positions: no vision tokens for the grids {left}")
    return np.concatenate(pieces, axis=1)
