"""The model benchmarks: what they count, and that they refuse to time a wrong result."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench import bench_encoding as encoding
from bench import bench_training_step as training
from bench.bench_inference import Shape, multiply_adds
from btok.encoder import BTokEncoder
from btok.inputs import as_side
from btok.vision import by_name

SHAPE = Shape(hidden=64, heads=4, key_heads=2, mlp=96, vocabulary=300, layers=3)
TOWER = encoding.Tower(embed=32, heads=2, layers=2)
CORPUS = encoding.Corpus(20, (3, 20), (4, 8))
BATCH = {"pairs": 6, "side": (2, 4), "text": (4, 12), "chunk": 4, "packed": 6}
STEP = training.Shape(64, 4, 2, 96, 2, 300, vision=32, vision_heads=2, depth=2, **BATCH)


def never(*names, **facts):
    """In a contest's place where nothing may be timed."""
    raise RuntimeError(f"{names} was timed")


@pytest.fixture(scope="module")
def encoders():
    return encoding.Encoders(SHAPE, TOWER, "cpu", torch.float32)


@pytest.fixture
def small(encoders, monkeypatch):
    for name, value in (("SHAPE", SHAPE), ("TOWER", TOWER), ("CORPUS", CORPUS)):
        monkeypatch.setattr(encoding, name, value)
    monkeypatch.setattr(encoding, "Encoders", lambda *_: encoders)
    monkeypatch.setattr(encoding, "prepared", encoding.prepared.__wrapped__)


@pytest.mark.parametrize("whose", ["ours", *encoding.PEERS])
def test_wrong_vectors_are_not_timed(small, encoders, monkeypatch, whose):
    encode, padded, one_by_one = BTokEncoder.encode, encoders.padded, encoders.one_by_one
    if whose == "ours":
        monkeypatch.setattr(BTokEncoder, "encode", lambda *a, **o: encode(*a, **o) + 1e-3)
    elif whose == "one by one":
        monkeypatch.setattr(encoders, "one_by_one", lambda inputs: one_by_one(inputs[::-1]))
    else:  # but those of one input, which is what ours are checked against
        monkeypatch.setattr(encoders, "padded", lambda inputs, *btoks: padded(inputs[::-1], *btoks))
    peer = whose if whose in encoding.PEERS else "padded batches"
    with pytest.raises(AssertionError, match=f"wrong result of {whose}, .*: not timed"):
        encoding.bench_encoding(never, peer)


def test_multiply_adds_of_pictures_are_those_torch_counts(encoders):
    unit = TOWER.patch * TOWER.merge
    inputs = encoding.user_inputs(CORPUS, unit)
    pictures = [value for value in inputs if not isinstance(value, str)]
    assert len(pictures) == 5 and sum(isinstance(value, np.ndarray) for value in pictures) == 2

    def counted(call, *arguments):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            call(*arguments)
        return counter.get_total_flops() // 2

    samples = [by_name(encoders.processor(as_side(picture))) for picture in pictures]
    pixels, grids = (
        torch.cat([sample[key] for sample in samples]) for key in ("pixel_values", "image_grid_thw")
    )
    patches = [len(sample["pixel_values"]) for sample in samples]
    expected = encoding.vision_multiply_adds(TOWER, SHAPE.hidden, patches)
    assert counted(encoders.stock.model.get_image_features, pixels, grids) == expected
    language = multiply_adds(SHAPE, [len(samples[0]["input_ids"])], causal=False)
    seen = encoding.vision_multiply_adds(TOWER, SHAPE.hidden, patches[:1])
    assert counted(encoders.padded, pictures[:1]) == language + seen


def test_bf16_vectors_stay_within_what_they_are_allowed():
    encoders = encoding.Encoders(SHAPE, TOWER, "cpu", torch.bfloat16)
    inputs = encoding.user_inputs(CORPUS, TOWER.patch * TOWER.merge)
    alone = np.concatenate([encoders.padded([value], encoders.btoks) for value in inputs])
    for peer in encoding.PEERS:
        encoders.check(peer, inputs, alone)


@pytest.fixture(scope="module")
def contestants():
    return training.Contestants(STEP, "cpu", torch.float32)


@pytest.fixture
def small_step(contestants, monkeypatch):
    monkeypatch.setattr(training, "SHAPE", STEP)
    monkeypatch.setattr(training, "Contestants", lambda *_: contestants)
    monkeypatch.setattr(training, "prepared", training.prepared.__wrapped__)


@pytest.mark.parametrize("what", ["ntp", "gradients"])
@pytest.mark.parametrize("whose", ["ours", *training.LEVERS])
def test_a_wrong_training_step_is_not_timed(small_step, contestants, monkeypatch, whose, what):
    """Beside the padded passes, which are what all are compared with."""
    changed, method = training.LEVERS.get(whose, {}), "ours"
    right = getattr(contestants, method)

    def wrong(**options):
        losses = right(**options)
        if options != changed:
            return losses
        if what == "ntp":
            return losses._replace(ntp=losses.ntp * (1 + 2e-5))
        for p in contestants.trained:
            p.grad *= 1 + 2e-4
        return losses

    monkeypatch.setattr(contestants, method, wrong)
    noun = "losses" if what == "ntp" else what
    peer = training.PADDED if whose == "ours" else whose
    with pytest.raises(AssertionError, match=f"wrong {noun} of {whose}, .*: not timed"):
        training.bench_training_step(never, peer)
