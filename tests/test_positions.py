"""M-RoPE indices against positions written by hand."""

from __future__ import annotations

import pytest
import torch
from helpers import IMAGE, VIDEO

from btok.positions import qwen2_vl_positions


def positions(ids, images=None, videos=None):
    return qwen2_vl_positions(
        torch.tensor(ids),
        None if images is None else torch.tensor(images),
        None if videos is None else torch.tensor(videos),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    ).tolist()


def test_text_only():
    assert positions([5, 6, 7]) == [[0, 1, 2]] * 3
    assert positions([]) == [[], [], []]


def test_an_image_of_two_rows_and_three_columns():
    got = positions([9, *[IMAGE] * 6, 8, 7], images=[[1, 4, 6]])
    assert got == [
        [0, 1, 1, 1, 1, 1, 1, 4, 5],  # time
        [0, 1, 1, 1, 2, 2, 2, 4, 5],  # height
        [0, 1, 2, 3, 1, 2, 3, 4, 5],  # width
    ]


def test_a_video_with_more_time_slots_than_width():
    got = positions([9, 8, *[VIDEO] * 6, 7], videos=[[3, 2, 4]])
    assert got == [
        [0, 1, 2, 2, 3, 3, 4, 4, 5],
        [0, 1, 2, 2, 2, 2, 2, 2, 5],
        [0, 1, 2, 3, 2, 3, 2, 3, 5],  # the text starts after the last time slot, not the width
    ]


def test_two_images_each_continue_after_the_other():
    got = positions([9, *[IMAGE] * 2, 8, *[IMAGE] * 2, 7], images=[[1, 2, 4], [1, 4, 2]])
    assert got == [
        [0, 1, 1, 3, 4, 4, 6],
        [0, 1, 1, 3, 4, 5, 6],
        [0, 1, 2, 3, 4, 4, 6],
    ]


def test_two_images_side_by_side():
    got = positions([IMAGE] * 4, images=[[1, 2, 4], [1, 4, 2]])
    assert got == [[0, 0, 2, 2], [0, 0, 2, 3], [0, 1, 2, 2]]


def test_an_image_and_a_video_take_their_own_grids():
    got = positions([IMAGE, 5, *[VIDEO] * 2], images=[[1, 2, 2]], videos=[[2, 2, 2]])
    assert got == [[0, 1, 2, 3], [0, 1, 2, 2], [0, 1, 2, 2]]


@pytest.mark.parametrize(
    ("ids", "images", "message"),
    [
        ([IMAGE], None, "no grid is left"),
        ([5, IMAGE, 5], [[1, 2, 4]], "fewer than 2 vision tokens"),
        ([5], [[1, 2, 2]], "no vision tokens for the grids"),
    ],
)
def test_placeholders_that_do_not_match_are_refused(ids, images, message):
    with pytest.raises(ValueError, match=message):
        positions(ids, images)
