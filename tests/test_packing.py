"""pack: rows, labels and pixels of a batch, token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import (
    BTOKS,
    IMAGE,
    PREFIX,
    SUFFIX,
    TINY,
    VIDEO,
    VISION,
    VISION_END,
    VISION_START,
    text,
    tiny_backbone,
    tiny_module,
    vision,
)

from btok.data.records import Side
from btok.packing import pack
from btok.processing import Processor
from btok.vision import Vision, join

CONFIG = tiny_backbone().config
OPTIONS = {
    "btok_token_ids": BTOKS[:2],
    "prefix_ids": PREFIX,
    "suffix_ids": SUFFIX,
    "backbone_config": CONFIG,
}


def test_rows_labels_and_bottleneck_rows():
    batch = pack(
        [({"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}), ({"input_ids": [4]}, None)], **OPTIONS
    )
    #                     0  1  2   3    4    5   6  7  8  9   10   11   12
    assert batch.input_ids.tolist() == [5, 6, 7, 100, 101, 50, 51, 8, 9, 52, 4, 100, 101]
    assert batch.btok_rows.tolist() == [[3, 4], [11, 12]]
    assert batch.layout.bounds.tolist() == [[0, 3, 5, 10], [10, 11, 13, 13]]
    # the prefix's last row predicts the first counted token, and the last is the suffix
    assert batch.label_rows.tolist() == [6, 7, 8]
    assert batch.labels.tolist() == [8, 9, 52]
    assert batch.label_samples.tolist() == [0, 0, 0]
    assert batch.num_targets == 1 and len(batch) == 2
    assert batch.vision == ()


def test_vision_tokens_are_no_labels_and_pixels_keep_their_order():
    picture, clip = vision([(1, 4, 4)], 1), vision([(2, 4, 4)], 2, video=True)
    other = vision([(1, 4, 6)], 3)
    batch = pack([(picture, other), (clip, picture), (other, clip)], **OPTIONS)
    ids = batch.input_ids[batch.label_rows + 1]
    assert torch.equal(ids, batch.labels)
    assert not set(ids.tolist()) & {IMAGE, VIDEO, *PREFIX, *BTOKS}
    assert {VISION_START, VISION_END, *SUFFIX} <= set(ids.tolist())
    images = [picture, other, picture, other]
    shown, clips = join(batch.vision)
    assert (shown.kind, clips.kind) == ("image", "video")
    assert torch.equal(shown.pixels, torch.cat([i["pixel_values"] for i in images]))
    assert torch.equal(shown.grid, torch.cat([i["image_grid_thw"] for i in images]))
    assert torch.equal(clips.pixels, torch.cat([clip["pixel_values_videos"]] * 2))
    assert batch.label_samples.unique().tolist() == [0, 1, 2] and batch.num_targets == 3


@pytest.mark.parametrize(
    # start 0, image 1..3, end 4, text 5..8, bottleneck 9..10: 14 rows up to position 10
    ("rule", "first"),
    [("reference", 14), ("continue", 11)],
)
def test_where_a_targets_positions_start(rule, first):
    picture = vision([(1, 4, 6)], 1)  # 1 + 6 + 1 + 4 tokens, then 2 bottleneck tokens
    batch = pack([(picture, text(3, 0))], target_positions=rule, **OPTIONS)
    _, _, border, end = batch.layout.bounds[0].tolist()
    assert border == 14
    assert batch.position_ids[:, border - 1].tolist() == [10] * 3
    expected = list(range(first, first + end - border))
    assert batch.position_ids[:, border:].tolist() == [expected] * 3


def test_what_a_processor_returns_is_taken_as_it_is():
    picture = vision([(1, 4, 4)], 1)
    nested = picture | {"input_ids": torch.tensor([picture["input_ids"]]), "attention_mask": None}
    a, b = pack([(picture, None)], **OPTIONS), pack([(nested, None)], **OPTIONS)
    assert torch.equal(a.input_ids, b.input_ids)
    assert torch.equal(a.position_ids, b.position_ids)


def test_moving_a_batch_moves_every_tensor_but_the_grids():
    batch = pack([(vision([(1, 4, 4)], 1), text(3, 0))], **OPTIONS).to("meta")
    parts = (batch, *batch.vision)
    named = [item for part in parts for item in vars(part).items()]
    tensors = {name: v for name, v in named if isinstance(v, torch.Tensor)}
    assert tensors.pop("grid").device.type == "cpu"  # what the host asks
    assert len(tensors) == 8 and {t.device.type for t in tensors.values()} == {"meta"}
    assert batch.layout.device.type == "meta"


@pytest.mark.parametrize("order", [("cpu", "meta"), ("meta", "cpu"), ("cpu", "cpu")])
def test_features_of_two_devices_are_joined_on_the_accelerator(order):
    """Features beyond the budget of `vision_memory` wait on the host; `meta` refuses to meet it."""
    sides = [vision([(1, 2, 2)], seed) for seed in range(2)]
    for side, device in zip(sides, order, strict=True):
        levels = (torch.zeros(1, 64, device=device), torch.ones(1, 8, device=device))
        side["vision"] = [Vision("image", side["image_grid_thw"], features=levels)]
    (vision_of_all,) = join(pack([(side, None) for side in sides], **OPTIONS).vision)
    levels = vision_of_all.features
    assert [(*x.shape, x.device.type) for x in levels] == [(2, 64, max(order)), (2, 8, max(order))]


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        ([], {}, "samples is empty"),
        ([({"input_ids": []}, None)], {"btok_token_ids": ()}, "sample 0 has no tokens"),
        ([(text(2, 0), text(2, 1))], {"prefix_ids": ()}, "prefix_ids is empty"),
        ([(text(2, 0), None)], {"target_positions": "end"}, "target_positions is 'end'"),
        ([({"input_ids": [3, IMAGE]}, None)], {}, "no grid is left"),
        (
            [(vision([(1, 4, 4)], 1) | {"pixel_values": torch.zeros(7, 96)}, None)],
            {},
            "pixel_values has 7 patches",
        ),
        ([(vision([(1, 4, 4)], 1) | {"pixel_values": None}, None)], {}, "but no pixel_values"),
    ],
)
def test_bad_samples_are_refused(samples, options, message):
    with pytest.raises(ValueError, match=message):
        pack(samples, **{**OPTIONS, **options})


@pytest.mark.parametrize("family", VISION)
def test_patches_of_another_size_than_the_models_are_refused(family):
    """The grid and the placeholders agree: all is as that size has it."""
    model, processor = tiny_module(family)
    settings = TINY[family].settings | {"patch_size": 8}
    other = Processor(processor.tokenizer, model_type=family, **settings)
    frames = [np.zeros((32, 32, 3), np.uint8)] * 2
    for side in (Side(images=frames), Side(video=frames)):
        model.pack([processor(side)])
        message = r"pixel_values\w* has \d+ values per patch, expected \d+ .* patch_size 4$"
        with pytest.raises(ValueError, match=message):
            model.pack([other(side)])


def test_positions_follow_the_backbones_family():
    clip = vision([(2, 4, 4)], 1, video=True)
    seconds = clip | {"second_per_grid_ts": torch.tensor([1.5])}
    times = {
        "qwen2_vl": (clip, [0, *[1] * 4, *[2] * 4, 3, 4, 5, 6, 7]),
        "qwen2_5_vl": (seconds, [0, *[1] * 4, *[4] * 4, 5, 6, 7, 8, 9]),  # 2 positions a second
        "qwen3_vl": (clip, [0, *[1] * 4, *[3] * 4, 5, 6, 7, 8, 9]),
    }
    for family, (side, expected) in times.items():
        options = OPTIONS | {"backbone_config": tiny_backbone(family=family).config}
        batch = pack([(side, None)], **options | {"btok_token_ids": ()})
        assert batch.position_ids[0].tolist() == expected


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
@pytest.mark.parametrize("rule", ["reference", "continue"])
def test_text_is_counted_from_each_sequences_start(family, rule):
    options = OPTIONS | {"backbone_config": tiny_backbone(family=family).config}
    samples = [(text(3, 0), text(2, 1)), ({"input_ids": [IMAGE]}, {"input_ids": [VIDEO, 5]})]
    batch = pack(samples, target_positions=rule, **options)
    assert batch.position_ids.tolist() == [[*range(10), *range(8)]] * 3
    assert batch.labels.tolist()[-3:] == [VIDEO, 5, *SUFFIX]  # ids like any other here
    with pytest.raises(ValueError, match=f"{family} takes text alone"):
        pack([(vision([(1, 4, 4)], 1), None)], **options)


def test_another_family_is_refused():
    from transformers import BertConfig

    with pytest.raises(ValueError, match="model_type is 'bert', expected one of"):
        pack([(text(3, 0), None)], **OPTIONS | {"backbone_config": BertConfig()})
