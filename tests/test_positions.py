"""Position indices against positions written by hand, and transformers' where they are right."""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch
from helpers import IMAGE, MROPE, VIDEO, tiny_backbone

from btok.families import FAMILIES
from btok.vision import Vision


def positions(ids, images=(), videos=(), family="qwen2_vl", **more):
    """The family's rule; `more` is what else a processor says of the side."""
    grids = {"image": images, "video": videos}
    shown = [Vision(kind, torch.tensor(grid)) for kind, grid in grids.items() if grid]
    config = stock_model(family).config
    return FAMILIES[family].positions(ids, {"vision": shown, **more}, config).tolist()


@cache
def stock_model(family):
    return tiny_backbone(family=family).model


def stock_positions(family, ids, images, videos, **options):
    """transformers' `get_rope_index`."""
    kinds = [{IMAGE: 1, VIDEO: 2}.get(token, 0) for token in ids]
    index, _ = stock_model(family).get_rope_index(
        torch.tensor([ids]),
        mm_token_type_ids=torch.tensor([kinds]),
        image_grid_thw=torch.tensor(images) if images else None,
        video_grid_thw=torch.tensor(videos) if videos else None,
        **options,
    )
    return index[:, 0].tolist()


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
        ([IMAGE], [], "no grid is left"),
        ([5, IMAGE, 5], [[1, 2, 4]], "fewer than 2 vision tokens"),
        ([5], [[1, 2, 2]], "no vision tokens for the grids"),
    ],
)
def test_placeholders_that_do_not_match_are_refused(ids, images, message):
    with pytest.raises(ValueError, match=message):
        positions(ids, images)


def test_seconds_of_qwen2_5_vl():
    """Of which the tiny model has 2 positions in a second."""
    options = {"family": "qwen2_5_vl", "videos": [[3, 2, 4]]}
    ids = [9, *[VIDEO] * 6, 7]
    got = positions(ids, second_per_grid_ts=torch.tensor([0.75]), **options)
    assert got == [
        [0, 1, 1, 2, 2, 4, 4, 5],  # 0, 1.5 and 3 positions on, rounded down
        [0, 1, 1, 1, 1, 1, 1, 5],
        [0, 1, 2, 1, 2, 1, 2, 5],
    ]
    assert positions(ids, **options)[0] == [0, 1, 1, 3, 3, 5, 5, 6]  # one second if not told
    short = positions(ids, second_per_grid_ts=[0.1], **options)
    assert short[0] == [0, 1, 1, 1, 1, 1, 1, 3] and short[2] == [0, 1, 2, 1, 2, 1, 2, 3]


def test_two_videos_of_qwen2_5_vl_have_their_own_seconds_and_images_none():
    got = positions(
        [VIDEO, VIDEO, 5, *[IMAGE] * 2, *[VIDEO] * 2, 6],
        images=[[1, 2, 4]],
        videos=[[2, 2, 2], [2, 2, 2]],
        family="qwen2_5_vl",
        second_per_grid_ts=[1.0, 2.0],
    )
    assert got == [
        [0, 2, 3, 4, 4, 6, 10, 11],
        [0, 0, 3, 4, 4, 6, 6, 11],
        [0, 0, 3, 4, 5, 6, 6, 11],
    ]
    with pytest.raises(ValueError, match="second_per_grid_ts has 1, video_grid_thw 2"):
        positions([VIDEO] * 2, [], [[1, 2, 2]] * 2, "qwen2_5_vl", second_per_grid_ts=[1.0])


def test_each_slot_of_a_qwen3_vl_video_is_a_grid_of_its_own():
    slot = [VIDEO] * 2
    got = positions(
        [20, 8, *slot, 9, 21, 22, 8, *slot, 9, *[IMAGE] * 2, 5],
        images=[[1, 4, 2]],
        videos=[[2, 2, 4]],
        family="qwen3_vl",
    )
    assert got == [
        #    first slot      times   second slot     image
        [0, 1, 2, 2, 4, 5, 6, 7, 8, 8, 10, 11, 11, 13],
        [0, 1, 2, 2, 4, 5, 6, 7, 8, 8, 10, 11, 12, 13],
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 11, 13],
    ]
    with pytest.raises(ValueError, match="no vision tokens for the grids"):
        positions([20, *slot], videos=[[2, 2, 4]], family="qwen3_vl")


def test_a_model_without_vision_counts():
    for family in ("qwen2", "qwen3", "llama"):
        assert FAMILIES[family].positions([7, 8, 9], {}, None).tolist() == [[0, 1, 2]] * 3


@pytest.mark.parametrize("family", MROPE)
def test_equal_to_transformers_where_that_is_right(family):
    """Right for images, for videos no longer than high or wide, and for all of Qwen3-VL's.

    Vision inputs are apart: of two side by side transformers makes one.
    """
    rng = random.Random(family)
    for _ in range(60):
        ids, images, videos, seconds = [5], [], [], []
        for _ in range(rng.randrange(5)):
            h, w = rng.randrange(1, 5), rng.randrange(1, 5)
            if rng.random() < 0.5:
                images.append([1, 2 * h, 2 * w])
                ids += [IMAGE] * (h * w)
            else:
                slots = rng.randrange(1, 6 if family == "qwen3_vl" else max(h, w) + 1)
                videos.append([slots, 2 * h, 2 * w])
                # the last slot at most as far as the height or width
                seconds.append(rng.uniform(0, (max(h, w) - 0.01) / (2 * slots)))
                if family == "qwen3_vl":
                    ids += ([7, 8] + [VIDEO] * (h * w)) * slots
                else:
                    ids += [VIDEO] * (slots * h * w)
            ids += [6] * rng.randrange(1, 4)
        timed = family == "qwen2_5_vl"
        more = {"second_per_grid_ts": torch.tensor(seconds)} if timed else {}
        expected = stock_positions(family, ids, images, videos, **more)
        got = positions(ids, images, videos, family, **more)
        assert got == expected, (ids, images, videos, seconds)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_transformers_puts_text_after_a_long_small_video_too_early(family):
    """Why these functions exist. Where this fails, transformers has returned to the rule."""
    ids, videos = [9, *[VIDEO] * 3, 7], [[3, 2, 2]]
    ours = positions(ids, [], videos, family)
    last = ours[0][3]
    assert last == (5 if family == "qwen2_5_vl" else 3)
    assert [axis[4] for axis in ours] == [last + 1] * 3
    stock = stock_positions(family, ids, None, videos)
    assert [axis[:4] for axis in stock] == [axis[:4] for axis in ours]
    assert [axis[4] for axis in stock] == [2] * 3  # among the video's own time slots


def test_the_rotary_embedding_of_qwen3_vl_interleaves_the_axes():
    """Frequency i turns with time, height, width, time, ...; those past the sections with time."""
    backbone = tiny_backbone(family="qwen3_vl")
    index = torch.tensor([3.0, 5.0, 11.0])
    cos, _ = backbone.model.language_model.rotary_emb(torch.zeros(1), index.long()[:, None, None])
    axes = [0, 1, 2, 0, 1, 2, 0, 0]  # of 8 frequencies; sections 4, 2, 2
    angle = index[axes] / 10000.0 ** (torch.arange(8) / 8)
    assert torch.allclose(cos[0, 0], angle.cos().repeat(2), atol=1e-6)
