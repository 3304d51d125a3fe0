"""Bytes of pixels: what they become, to the bit, and what they take on their way."""

from __future__ import annotations

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import VISION, tiny_module

from btok.data.records import Side
from btok.families.family import patches_of
from btok.vision import Normalization, Vision, by_name, join, vision_of

RNG = np.random.default_rng(0)
PICTURES = [RNG.integers(0, 256, (448, 448, 3), dtype=np.uint8) for _ in range(3)]
STATISTICS = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def levels(mean, std):
    """(byte / 255 - mean) / std of every byte in numpy's fp32, [3, 256]."""
    bytes_ = np.arange(256, dtype=np.float32)[:, None] / np.float32(255)
    return ((bytes_ - np.array(mean, np.float32)) / np.array(std, np.float32)).T


@pytest.mark.parametrize("repeat", [1, 2])
@pytest.mark.parametrize("statistics", [STATISTICS, ((0.5,) * 3, (0.5,) * 3)])
def test_bytes_become_what_numpy_makes_of_them(statistics, repeat):
    pixels = np.tile(np.repeat(np.arange(256, dtype=np.uint8), 3), (2, 1))  # [patches, 256 * 3]
    norm = Normalization(*statistics, repeat)
    shown = Vision("image", torch.tensor([[1, 1, 2]]), torch.tensor(pixels), normalization=norm)
    got = shown.as_floats()
    expected = np.tile(np.repeat(levels(*statistics), repeat, 0).reshape(-1), (2, 1))
    assert got.pixels.dtype == torch.float32 and got.normalization is None
    assert np.array_equal(got.pixels.numpy(), expected)
    assert got.as_floats() is got


@pytest.mark.parametrize("frames", [1, 2])
@pytest.mark.parametrize("merge", [1, 2, 3])
def test_patches_are_cut_by_hand(frames, merge):
    p, rows, columns = 4, 2, 3  # merged tokens
    shape = (2, frames, rows * merge * p, columns * merge * p + 3, 3)
    slots = RNG.integers(0, 256, shape, dtype=np.uint8)[:, :, :, 3:]  # a view
    expected = [
        slots[n, :, y : y + p, x : x + p].reshape(-1)
        for n in range(2)
        for row in range(rows)
        for column in range(columns)
        for y in range(row * merge * p, (row + 1) * merge * p, p)
        for x in range(column * merge * p, (column + 1) * merge * p, p)
    ]
    assert np.array_equal(patches_of(slots, p, merge).numpy(), np.stack(expected))


@pytest.mark.parametrize("family", VISION)
def test_a_processors_pixels_travel_as_bytes(family):
    """An image's once, though Qwen's towers take it twice; a video's frames both."""
    _, processor = tiny_module(family)
    side = processor(Side("a", images=PICTURES[:1], video=PICTURES))
    qwen = family.startswith("qwen")
    for shown in vision_of(side):
        floats = shown.as_floats().pixels
        once = qwen and shown.kind == "image"
        assert shown.pixels.dtype == torch.uint8 and floats.dtype == torch.float32
        assert floats.nbytes == shown.pixels.nbytes * (8 if once else 4)
        assert len(pickle.dumps(shown.pixels)) < shown.pixels.nbytes + 1000  # no view of more


@torch.no_grad()
@pytest.mark.parametrize("family", VISION)
def test_bytes_and_a_stock_processors_floats_meet_in_a_batch(family):
    model, processor = tiny_module(family)
    videos = [Side("b", video=PICTURES[:2]), Side("c", images=PICTURES[:2])]
    bytes_ = [processor(side) for side in videos]
    floats = [by_name(side) for side in bytes_]
    want = model(model.pack(floats)).embeddings
    for sides in (bytes_, [bytes_[0], floats[1]], [floats[0], bytes_[1]]):
        assert torch.equal(model(model.pack(sides)).embeddings, want)
    features = [side | {"vision": model.encode_vision(side["vision"])} for side in bytes_]
    assert all(vision.pixels is None for side in features for vision in side["vision"])
    assert torch.equal(model(model.pack(features)).embeddings, want)


@torch.no_grad()
def test_features_of_another_width_are_refused():
    """Of a tower that is not this language model's."""
    model, processor = tiny_module()
    side = processor(Side("a", images=PICTURES[:1]))
    (shown,) = model.encode_vision(side["vision"])
    wide = replace(shown, features=tuple(torch.cat([f, f], -1) for f in shown.features))
    with pytest.raises(ValueError, match="features of width 128, the language model has 64"):
        model(model.pack([side | {"vision": [wide]}]))


def test_bytes_of_other_statistics_are_joined_as_floats():
    grid, pixels = torch.tensor([[1, 1, 1]]), torch.zeros(1, 12, dtype=torch.uint8)
    first, second = (
        Vision("image", grid, pixels, normalization=Normalization((mean,) * 3, (0.5,) * 3))
        for mean in (0.5, 0.25)
    )
    (same,) = join([first, first])
    assert same.pixels.dtype == torch.uint8 and same.normalization == first.normalization
    (other,) = join([first, second])
    assert other.normalization is None and other.pixels[:, 0].tolist() == [-1, -0.5]
