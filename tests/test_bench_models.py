"""The model benchmarks: what they count, and that they refuse to time a wrong result."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import btok.model
from bench import bench_encoding as encoding
from bench import bench_training_step as training
from bench.models import Shape, Tower
from btok.inputs import as_side

SHAPE, TOWER = Shape(64, 4, 2, 96, 300, num_hidden_layers=3), Tower(32, 2, 2)
MIXED, CORPUS = (5, (1, 60)), (20, (3, 20), (4, 8))
BATCH = training.Batch(6, side=(2, 4), text=(4, 12), chunk=4, packed=6)


def never(*names, **facts):
    """In a contest's place where nothing may be timed."""
    raise RuntimeError(f"{names} was timed")


@pytest.fixture(scope="module")
def four():
    return encoding.Contestants(SHAPE, TOWER, "cpu", torch.float32)


@pytest.fixture
def small(four, monkeypatch):
    """The contests of embedding, with small models and inputs."""
    for name in ("SHAPE", "TOWER", "MIXED", "CORPUS"):
        monkeypatch.setattr(encoding, name, globals()[name])
    monkeypatch.setattr(encoding, "contestants", lambda *_: four)
    monkeypatch.setattr(encoding, "prepared", encoding.prepared.__wrapped__)


def counted(call, *arguments):
    """Multiply-adds that torch counts; its plain attention makes whole squares, causal or not."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call(*arguments)
    return counter.get_total_flops() // 2


def test_multiply_adds_are_those_torch_counts(four):
    def squares(lengths, pooled=None):
        return encoding.multiply_adds(SHAPE, lengths, pooled, causal=False)

    def samples(*lengths):
        return [{"input_ids": [9] * length} for length in lengths]

    # 32 rows are not padded
    with_btoks = samples(32 - encoding.K)
    assert counted(four.packed, four.btok, with_btoks) == squares([32], pooled=encoding.K)
    assert counted(four.packed, four.last, samples(32)) == squares([32], pooled=1)
    assert counted(four.packed, four.full, with_btoks) == squares([32])
    assert counted(four.padded, samples(32)) == squares([32])
    assert counted(four.padded, samples(29, 5, 60, 1, 17)) == squares([60] * 5)


@pytest.mark.parametrize("pooled", [None, 1, 3])
def test_a_causal_row_sees_itself_and_what_is_before_it(pooled):
    full, length = SHAPE._replace(num_hidden_layers=2), 7
    rows = range(length) if pooled is None else range(length - pooled, length)
    unseen = sum(length - 1 - row for row in (*range(length), *rows))
    dense, causal = (
        encoding.multiply_adds(full, [length], pooled, causal=c) for c in (False, True)
    )
    assert dense - causal == 2 * SHAPE.hidden_size * unseen


def test_multiply_adds_of_pictures_are_those_torch_counts(four):
    pictures = [value for value in encoding.user_inputs(*CORPUS) if not isinstance(value, str)]
    assert len(pictures) == 5 and sum(hasattr(value, "shape") for value in pictures) == 2
    samples = [four.processor(as_side(picture)) for picture in pictures]
    pixels, grids = (
        torch.cat([sample[key] for sample in samples]) for key in ("pixel_values", "image_grid_thw")
    )
    patches = [len(sample["pixel_values"]) for sample in samples]
    expected = encoding.vision_multiply_adds(TOWER, SHAPE.hidden_size, patches)
    assert counted(four.stock.model.get_image_features, pixels, grids) == expected
    language = encoding.multiply_adds(SHAPE, [len(samples[0]["input_ids"])], causal=False)
    seen = encoding.vision_multiply_adds(TOWER, SHAPE.hidden_size, patches[:1])
    assert counted(four.padded, samples[:1]) == language + seen


def test_what_is_predicted_of_the_real_model():
    for length in (512, 1024, 2048, 4096, 8192):
        assert 0.96 < encoding.predicted(Shape(), "padded last token", [length]) < 0.98
        assert 1 < encoding.predicted(Shape(), "packed last token", [length]) < 1.01
    mixed = [64, 8192] + [64] * 14  # one batch, all as long as the longest
    assert encoding.predicted(Shape(), "padded last token", mixed) < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_embed_alike_and_are_timed(small, monkeypatch, dtype):
    """With what the pages and plots of the results read."""
    found = {}

    def contest(bench, case, peer, ours, theirs, **facts):
        found[peer] = (bench, case, len(ours()), len(theirs()), facts)

    every = encoding.Contestants(SHAPE, TOWER, "cpu", dtype)
    monkeypatch.setattr(encoding, "contestants", lambda *_: every)
    for peer in (*encoding.PEERS, "full last layer"):
        encoding.bench_inference(contest, "mixed", encoding.K, peer)
        *names, _, _, facts = found[peer]
        assert names == ["inference", "mixed, K = 4"] and len(facts["lengths"]) == 5
        assert {"flops", "bytes", "predicted", "size", "num_btoks"} < set(facts)
    for peer in ("padded batches", "one by one"):
        encoding.bench_encoding(contest, peer)
        bench, case, ours, theirs, facts = found[peer]
        assert (bench, case, ours, theirs) == ("corpus encoding", "20 inputs", 20, 20)
        assert (facts["inputs"], facts["images"]) == (20, 5)
    _, samples = encoding.prepared("mixed")
    apart = every.packed(every.btok, samples) - every.packed(every.last, samples)
    assert apart.norm(dim=1).min() > 0.1


@pytest.mark.parametrize("name", ["btok", "full", "last"])
@pytest.mark.parametrize("how", ["order", "nan", "row"])
def test_a_wrong_result_is_not_timed(small, four, monkeypatch, name, how):
    right = four.packed

    def wrong(model, samples):
        if model is not getattr(four, name):
            return right(model, samples)
        if how == "row":  # of the token before
            samples = [{"input_ids": sample["input_ids"][:-1] or [7]} for sample in samples]
        rows = right(model, samples)
        return {"order": rows.flip(0), "nan": rows * torch.nan, "row": rows}[how]

    monkeypatch.setattr(four, "packed", wrong)
    with pytest.raises(AssertionError, match=f"wrong result of {name}, .*: not timed"):
        encoding.bench_inference(never, "mixed", encoding.K, "padded last token")


def test_one_layers_wrong_mask_is_not_timed(small, monkeypatch):
    """A key too few for the last row of a sequence, in the first layer alone."""
    right, calls = btok.model.condensed_attention, []

    def wrong(q, k, v, layout, **options):
        calls.append(0)
        if len(calls) > 1:
            return right(q, k, v, layout, **options)
        v = v.clone()
        v[layout.bounds[:, 0].long()] = 0
        return right(q, k, v, layout, **options)

    monkeypatch.setattr(btok.model, "condensed_attention", wrong)
    monkeypatch.setitem(encoding.TOLERANCES, torch.float32, encoding.TOLERANCES[torch.bfloat16])
    with pytest.raises(AssertionError, match="not timed"):
        encoding.bench_inference(never, "mixed", encoding.K, "padded last token")


@pytest.mark.parametrize("whose", ["ours", "padded batches", "one by one"])
def test_wrong_vectors_are_not_timed(small, four, monkeypatch, whose):
    encode, padded = encoding.BTokEncoder.encode, four.padded
    if whose == "padded batches":  # but those of one input, which ours are checked against
        monkeypatch.setattr(four, "padded", lambda inputs, *ids: padded(list(inputs)[::-1], *ids))
    else:

        def wrong(encoder, inputs, **options):
            alone = len(inputs) == 1
            return encode(encoder, inputs, **options) + 1e-3 * (alone == (whose == "one by one"))

        monkeypatch.setattr(encoding.BTokEncoder, "encode", wrong)
    peer = "padded batches" if whose == "ours" else whose
    with pytest.raises(AssertionError, match=f"wrong result of {whose}, .*: not timed"):
        encoding.bench_encoding(never, peer)


@pytest.fixture(scope="module")
def contestants():
    return training.Contestants(SHAPE, TOWER, BATCH, "cpu", torch.float32)


@pytest.mark.parametrize("what", ["ntp", "gradients"])
@pytest.mark.parametrize("whose", ["ours", *training.LEVERS])
def test_a_wrong_training_step_is_not_timed(contestants, monkeypatch, whose, what):
    """Beside the padded passes, which are what all are compared with."""
    monkeypatch.setattr(training, "Contestants", lambda *_: contestants)
    monkeypatch.setattr(training, "prepared", training.prepared.__wrapped__)
    changed, right = training.LEVERS.get(whose, {}), contestants.ours

    def wrong(**options):
        losses = right(**options)
        if options != changed:
            return losses
        if what == "ntp":
            return losses._replace(ntp=losses.ntp * (1 + 2e-5))
        for p in contestants.trained:
            p.grad *= 1 + 2e-4
        return losses

    monkeypatch.setattr(contestants, "ours", wrong)
    noun = "losses" if what == "ntp" else what
    peer = training.PADDED if whose == "ours" else whose
    with pytest.raises(AssertionError, match=f"wrong {noun} of {whose}, .*: not timed"):
        training.bench_training_step(never, peer)
