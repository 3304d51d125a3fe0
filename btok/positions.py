"""Position indices, one pure function per model family.

Computed here rather than by transformers: since version 5 its `get_rope_index` lets text after a
video start at start + max(height, width), which overlaps a video that lasts longer than that. The
checkpoints were trained with the original rule: text continues at the highest position + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np


def text_positions(input_ids: Any) -> np.ndarray:
    """Positions of a model without vision: 0, 1, 2, ... on all three axes.

    Args:
        input_ids: integers [L].

    Returns:
        int64 [3, L].
    """
    length = len(np.asarray(input_ids))
    return np.tile(np.arange(length), (3, 1))


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
    grids = {image_token_id: _rows(image_grid_thw), video_token_id: _rows(video_grid_thw)}
    return _mrope(input_ids, grids, spatial_merge_size)


def qwen2_5_vl_positions(
    input_ids: Any,
    image_grid_thw: Any = None,
    video_grid_thw: Any = None,
    second_per_grid_ts: Any = None,
    *,
    image_token_id: int,
    video_token_id: int,
    spatial_merge_size: int = 2,
    tokens_per_second: float = 4,
) -> np.ndarray:
    """M-RoPE positions of one sequence, as Qwen2.5-VL was trained (its report, section 2.1.3).

    As `qwen2_vl_positions`, but time is in seconds: time slot t of a video is at
    p + floor(t * tokens_per_second * seconds per slot). Images have one slot.

    Args:
        input_ids, image_grid_thw, video_grid_thw, image_token_id, video_token_id,
            spatial_merge_size: as `qwen2_vl_positions` takes them.
        second_per_grid_ts: floats [videos], seconds from one time slot to the next, else a
            ValueError; None for one second.
        tokens_per_second: positions per second, of the vision configuration.

    Returns:
        int64 [3, L]: time, height, width.
    """
    videos = _rows(video_grid_thw)
    seconds = [1.0] * len(videos) if second_per_grid_ts is None else _rows(second_per_grid_ts)
    if len(seconds) != len(videos):
        raise ValueError(
            f"positions: second_per_grid_ts has {len(seconds)}, video_grid_thw {len(videos)}"
        )
    steps = [np.float32(second) * np.float32(tokens_per_second) for second in seconds]
    timed = [[*grid, step] for grid, step in zip(videos, steps, strict=True)]
    grids = {image_token_id: _rows(image_grid_thw), video_token_id: timed}
    return _mrope(input_ids, grids, spatial_merge_size)


def qwen3_vl_positions(
    input_ids: Any,
    image_grid_thw: Any = None,
    video_grid_thw: Any = None,
    *,
    image_token_id: int,
    video_token_id: int,
    spatial_merge_size: int = 2,
) -> np.ndarray:
    """M-RoPE positions of one sequence, as Qwen3-VL was trained (its report, section 2).

    As `qwen2_vl_positions`, but each time slot of a video is a grid of its own: its time is told by
    the text before it (`<1.5 seconds>`), not by its position. That the axes interleave along the
    head dimension is the rotary embedding's affair, not the index's.

    Args:
        input_ids, image_grid_thw, video_grid_thw, image_token_id, video_token_id,
            spatial_merge_size: as `qwen2_vl_positions` takes them, with one grid per video.

    Returns:
        int64 [3, L]: time, height, width.
    """
    slots = [[1, height, width] for t, height, width in _rows(video_grid_thw) for _ in range(t)]
    grids = {image_token_id: _rows(image_grid_thw), video_token_id: slots}
    return _mrope(input_ids, grids, spatial_merge_size)


# by the configuration's model_type
POSITIONS: Mapping[str, Callable[..., np.ndarray]] = {
    "qwen2_vl": qwen2_vl_positions,
    "qwen2_5_vl": qwen2_5_vl_positions,
    "qwen3_vl": qwen3_vl_positions,
    "qwen2": text_positions,
    "qwen3": text_positions,
    "llama": text_positions,
}


def _rows(grid: Any) -> list[Any]:
    return [] if grid is None else np.asarray(grid).tolist()


def _mrope(input_ids: Any, grids: Mapping[int, Sequence[Sequence[Any]]], merge: int) -> np.ndarray:
    """The rule all families share.

    `grids` holds by placeholder id, in order of appearance, time, height and width in patches and,
    where it is not 1, how far two time slots are apart.
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
