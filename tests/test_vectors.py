"""What vectors an encoder gives: budgets, components, multi-vectors, int8; what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from helpers import nested_checkpoint, nested_module, tiny_module
from test_encoder import PICTURES, SIDES

from btok import BTokEncoder, Side
from btok import calibration as calibration_module
from btok.calibration import Calibration, best_scale, cell_of, quantised
from btok.encoder import _evaluating
from btok.packing import pack

WORDS = ["one", "red", "seven", "blue", "left", "of", "green", "up"]


def texts(count, longest=20, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, longest))) for _ in range(count)]


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def encoder():
    return BTokEncoder(*nested_module())


@pytest.fixture(scope="module")
def calibrated():
    encoder = BTokEncoder(*nested_module())
    encoder.calibrate([*texts(200), *PICTURES * 8])
    return encoder


@pytest.fixture(scope="module")
def rows(encoder):
    """The bottleneck rows [N, 4, D], each input run alone through the whole last layer."""
    found = []
    model = encoder.model
    with torch.no_grad(), _evaluating(model):
        for side in SIDES:
            sample = encoder.processor(side)
            found.append(model(model.pack([sample])).rows[0].numpy())
    return np.stack(found)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_budget_is_the_first_rows_exactly(encoder, rows, k):
    got = encoder.encode(SIDES, num_btoks=k)
    assert np.abs(got - unit(rows[:, :k].mean(1))).max() < 1e-6
    model = encoder.model
    with torch.no_grad(), _evaluating(model):
        for side, vector in zip(SIDES, got, strict=True):
            batch = pack(
                [(encoder.processor(side), None)],
                btok_token_ids=model.btok_token_ids[:k],
                prefix_ids=(),
                suffix_ids=(),
                backbone_config=model.backbone.config,
            )
            assert np.abs(model(batch).embeddings[0].numpy() - vector).max() < 1e-6
    if k < 4:
        assert np.abs(got - encoder.encode(SIDES)).max() > 1e-3


def test_by_default_nothing_changes(encoder):
    plain = BTokEncoder(*tiny_module())
    for options in ({}, {"num_btoks": 4}, {"dims": 64}, {"multi_vector": False}):
        assert np.array_equal(encoder.encode(SIDES, **options), plain.encode(SIDES))
        assert encoder.using(**options).settings == plain.settings


@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("d", [16, 32, 64])
def test_components_are_cut_then_at_length_one(encoder, k, d):
    whole = torch.from_numpy(encoder.encode(SIDES, num_btoks=k))
    expected = torch.nn.functional.normalize(whole[:, :d], dim=-1).numpy()
    got = encoder.encode(SIDES, num_btoks=k, dims=d)
    assert got.shape == (6, d) and got.dtype == np.float32
    assert np.array_equal(got, expected if d < 64 else whole.numpy())


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("d", [16, 64])
def test_multi_vectors_are_the_rows_at_length_one(encoder, rows, k, d):
    got = encoder.encode(SIDES, num_btoks=k, dims=d, multi_vector=True)
    assert got.shape == (6, k, d) and got.dtype == np.float32
    assert np.abs(got - unit(rows[:, :k, :d])).max() < 1e-6
    both = encoder.encode(SIDES, num_btoks=k, dims=d, multi_vector="both")
    assert np.array_equal(both[:, 1:], got)
    assert np.array_equal(both[:, 0], encoder.encode(SIDES, num_btoks=k, dims=d))


def test_options_add_up_and_leave_the_encoder(encoder):
    two = encoder.using(num_btoks=2).using(dims=16)
    assert np.array_equal(two.encode(SIDES), encoder.encode(SIDES, num_btoks=2, dims=16))
    assert np.array_equal(two.encode(SIDES, num_btoks=None), encoder.encode(SIDES, dims=16))
    assert encoder.options.dims is None and encoder.dims == 64 and two.dims == 16
    made = list(encoder.encode_iter(SIDES, num_btoks=2, dims=16, batch_tokens=40))
    for each in made:
        assert np.abs(each.vectors - two.encode(SIDES)[each.ids]).max() < 1e-6
        lengths = [len(encoder.processor(SIDES[i])["input_ids"]) + 2 for i in each.ids]
        assert each.tokens == lengths
    samples = [encoder.processor(side) for side in SIDES]
    got, tokens = two.using(multi_vector=True).encode_samples(samples)
    assert got.shape == (6, 2, 16)
    assert tokens == [len(sample["input_ids"]) + 2 for sample in samples]


def test_the_settings_tell_what_decides_about_vectors(calibrated):
    plain = calibrated.settings
    said = calibrated.using(num_btoks=2, dims=16, multi_vector=True).settings
    assert said == plain | {"num_btoks": 2, "dims": 16, "multi_vector": True}
    digest = calibrated.calibration.digest
    more = {"num_btoks": "auto", "bound": 0.1, "calibration": digest}
    assert calibrated.using(num_btoks="auto", bound=0.1).settings == plain | more
    more = {"vectors": "int8", "calibration": digest}
    assert calibrated.using(dtype="int8").settings == plain | more


REFUSED = [
    ({"num_btoks": 3}, "num_btoks is 3, expected what it was trained for: 1, 2, 4"),
    ({"num_btoks": 8}, "num_btoks is 8, expected what it was trained for: 1, 2, 4"),
    ({"num_btoks": 0}, "num_btoks is 0, expected what it was trained for: 1, 2, 4"),
    ({"num_btoks": True}, "num_btoks is True, expected what it was trained for: 1, 2, 4"),
    ({"num_btoks": "most"}, "num_btoks is 'most', expected what it was trained for: 1, 2, 4"),
    ({"dims": 8}, "dims is 8, expected what it was trained for: 16, 32, 64"),
    ({"dims": 128}, "dims is 128, expected what it was trained for: 16, 32, 64"),
    ({"dims": "auto"}, "dims is 'auto', expected what it was trained for: 16, 32, 64"),
    ({"multi_vector": "none"}, "multi_vector is 'none', expected True, False or 'both'"),
    ({"dtype": "int4"}, r"dtype is 'int4', expected one of \('float32', 'int8'\)"),
    ({"dtype": "int8"}, "dtype='int8' needs a calibration.* calibrate it first"),
    ({"num_btoks": "auto"}, "num_btoks='auto' needs a calibration.* calibrate it first"),
    ({"bound": 0.0}, "bound is 0.0, expected a number above 0 and at most 2"),
    ({"bound": float("nan")}, "bound is nan, expected a number above 0 and at most 2"),
    ({"bound": "x"}, "bound is 'x', expected a number above 0 and at most 2"),
    ({"multi_vector": np.array([1, 2])}, r"multi_vector is array\(\[1, 2\]\), expected True"),
    ({"dtype": "int8", "multi_vector": "both"}, "dtype is 'int8' with multi_vector 'both'"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_it_was_not_trained_for_is_refused_before_any_work(encoder, options, message):
    def inputs():
        raise AssertionError("an input was drawn")
        yield

    for call in (encoder.encode, lambda *a, **o: next(encoder.encode_iter(*a, **o))):
        with pytest.raises(ValueError, match=message):
            call(inputs(), **options)


def test_a_model_trained_for_one_vector_refuses_the_others():
    encoder = BTokEncoder(*tiny_module())
    for options, message in (
        ({"num_btoks": 2}, "num_btoks is 2, expected what it was trained for: 4"),
        ({"num_btoks": "auto"}, "num_btoks is 'auto', expected what it was trained for: 4"),
        ({"dims": 32}, "dims is 32, expected what it was trained for: 64"),
        ({"multi_vector": True}, "multi_vector is True, expected False: it was trained for one"),
    ):
        with pytest.raises(ValueError, match=message):
            encoder.encode(["a"], **options)
    with pytest.raises(TypeError, match="tokens is no option, expected num_btoks"):
        encoder.encode(["a"], tokens=2)


def test_a_checkpoint_loaded_with_fewer_tokens(tmp_path):
    folder = nested_checkpoint(tmp_path)
    whole = BTokEncoder.from_pretrained(folder)
    two = BTokEncoder.from_pretrained(folder, num_btoks=2)
    assert np.abs(two.encode(SIDES) - whole.encode(SIDES, num_btoks=2)).max() < 1e-6
    assert two.settings == whole.using(num_btoks=2).settings
    assert np.abs(two.encode(SIDES, num_btoks=1) - whole.encode(SIDES, num_btoks=1)).max() < 1e-6
    with pytest.raises(ValueError, match="num_btoks is 4, expected what it was trained for: 1, 2"):
        two.encode(SIDES, num_btoks=4)


# -- calibration


def by_hand(encoder, inputs, quantile=0.9):
    """Losses per cell, dims and budget, each input alone."""
    model, losses = encoder.model, {}
    with torch.no_grad(), _evaluating(model):
        for value in inputs:
            side = value if isinstance(value, Side) else Side(value)
            sample = encoder.processor(side)
            found = model(model.pack([sample])).rows[0].double().numpy()
            for d in (16, 32, 64):
                z = [unit(found[:k, :d].mean(0)) for k in (1, 2, 4)]
                losses.setdefault((cell_of(sample), d), []).append([1 - v @ z[-1] for v in z])
    return {
        key: np.sort(of, axis=0)[int(np.ceil(quantile * (len(of) - 1)))]
        for key, of in losses.items()
    }


def test_losses_are_the_quantiles_of_each_kind_and_size(encoder):
    inputs = [*texts(60), *SIDES]
    made = encoder.calibrate(inputs, batch_tokens=100)
    expected = by_hand(encoder, inputs)
    assert made.inputs == 66 == sum(made.counts.values())
    assert {cell.partition("/")[0] for cell in made.counts} == {"text", "image", "video"}
    assert {(cell, d) for cell in made.losses for d in (16, 32, 64)} == expected.keys()
    for (cell, d), losses in expected.items():
        assert np.abs(made.losses[cell][str(d)] - losses).max() < 1e-6
        assert made.losses[cell][str(d)][-1] < 1e-6
    del encoder.calibration


def test_kinds_and_sizes(encoder):
    found = [cell_of(encoder.processor(side)) for side in SIDES]
    assert [cell.partition("/")[0] for cell in found] == [
        *("text", "image", "video", "video", "text", "text")
    ]
    lengths = [len(encoder.processor(side)["input_ids"]) for side in SIDES]
    for cell, length in zip(found, lengths, strict=True):
        size = int(cell.partition("/")[2])
        assert 2**size <= length < 2 ** (size + 1)


def test_each_input_has_the_fewest_tokens_within_the_bound(calibrated):
    made, inputs = calibrated.calibration, [*texts(40, seed=1), PICTURES[0], *SIDES[2:]]
    sides = [Side(images=[v]) if isinstance(v, np.ndarray) else v for v in inputs]
    cells = [cell_of(calibrated.processor(v if isinstance(v, Side) else Side(v))) for v in sides]
    seen = set()
    for bound in (1e-9, *np.ravel([made.losses[c]["32"] for c in {*cells} & {*made.losses}])):
        bound = max(float(bound), 1e-9)
        chosen = []
        for cell in cells:
            small = made.counts.get(cell, 0) < 32
            within = [
                k
                for k, loss in zip((1, 2, 4), made.losses.get(cell, {}).get("32", ()), strict=False)
                if loss <= bound
            ]
            chosen.append(4 if small else min(within))
        got = calibrated.encode(inputs, num_btoks="auto", dims=32, bound=bound, batch_tokens=200)
        for k in {*chosen}:
            expected = calibrated.encode(inputs, num_btoks=k, dims=32)
            which = [i for i, number in enumerate(chosen) if number == k]
            assert np.abs(got[which] - expected[which]).max() < 1e-6
        seen |= {*chosen}
    assert seen == {1, 2, 4}


def test_a_batch_is_of_one_budget(calibrated):
    made, inputs = calibrated.calibration, texts(100, seed=2)
    losses = sorted(of["64"][0] for cell, of in made.losses.items() if made.counts[cell] >= 32)
    options = {"num_btoks": "auto", "bound": losses[len(losses) // 2], "multi_vector": True}
    batches = list(calibrated.encode_iter(inputs, batch_tokens=100, window=50, **options))
    assert sorted(i for batch in batches for i in batch.ids) == list(range(100))
    numbers = set()
    for batch in batches:
        (k,) = {made.budget(cell_of(calibrated.processor(Side(inputs[i]))), options["bound"], 64)
                for i in batch.ids}  # fmt: skip
        assert batch.vectors.shape == (len(batch.ids), k, 64)
        expected = calibrated.encode([inputs[i] for i in batch.ids], num_btoks=k, multi_vector=True)
        assert np.abs(batch.vectors - expected).max() < 1e-6
        assert sum(batch.tokens) <= 100 or len(batch.ids) == 1
        numbers.add(k)
    assert len(numbers) > 1
    with pytest.raises(ValueError, match="num_btoks is 'auto' with multi_vector, which"):
        calibrated.encode(inputs, num_btoks="auto", multi_vector=True)


def test_of_what_few_were_measured_all_tokens_are_taken(calibrated, monkeypatch):
    every, some = calibrated.using(num_btoks="auto", bound=2.0), ["one of seven, " * 4]
    assert np.abs(every.encode(some) - calibrated.encode(some, num_btoks=1)).max() < 1e-6
    assert np.abs(every.encode(["one"]) - calibrated.encode(["one"])).max() < 1e-6  # a rare length
    monkeypatch.setattr(calibration_module, "LEAST", 10**6)
    assert np.abs(every.encode(some) - calibrated.encode(some)).max() < 1e-6


def test_unreadable_inputs_are_told_with_every_budget(calibrated):
    inputs = ["one", "", *texts(8), Side(images=["no/such.png"])]
    made = list(calibrated.encode_iter(inputs, num_btoks="auto", strict=False, batch_tokens=50))
    assert {i for each in made for i in each.errors} == {1, 10}
    assert sorted(i for each in made for i in each.ids) == [0, *range(2, 10)]
    (only,) = calibrated.encode_iter(["", " "], num_btoks="auto", dtype="int8", strict=False)
    assert not only.ids and sorted(only.errors) == [0, 1]


@pytest.mark.parametrize("options", [{}, {"dims": 16}, {"num_btoks": 1}, {"multi_vector": True}])
def test_int8_keeps_cosines(calibrated, options):
    inputs = texts(100, seed=3)
    exact = calibrated.encode(inputs, **options)
    small = calibrated.using(dtype="int8", **options)
    got = small.encode(inputs)
    assert got.dtype == np.int8 and got.shape == exact.shape
    assert np.array_equal(got, np.clip(np.rint(exact / np.float32(small.scale)), -127, 127))
    exact, got = (x.reshape(-1, x.shape[-1]) for x in (exact, got.astype(np.int32)))
    moved = np.abs((got @ got.T) * small.scale**2 - exact @ exact.T)
    most = 5e-2 if "dims" in options else 2e-2  # of few components one that is clipped is much
    assert moved.mean() < most / 10 and np.quantile(moved, 0.99) < most and moved.max() < 0.1


def test_the_scale_has_the_least_squared_error():
    rng = np.random.default_rng(0)
    for vectors in (
        unit(rng.standard_normal((500, 64))),
        unit(rng.standard_normal((500, 64)) * np.r_[40.0, np.ones(63)]),  # one large component
        unit(rng.standard_t(2, (500, 256))),
    ):
        counts = np.bincount((np.abs(vectors) * (1 << 14)).astype(int).ravel(), minlength=1 << 14)

        def error(scale, vectors=vectors):
            return ((quantised(vectors, scale) * scale - vectors) ** 2).mean()

        least = min(error(top / 127) for top in np.geomspace(0.01, 1, 200))
        assert error(best_scale(counts)) < 1.02 * least


def test_a_calibration_is_kept_with_its_checkpoint(tmp_path):
    folder = nested_checkpoint(tmp_path / "mine")
    encoder = BTokEncoder.from_pretrained(folder)
    made = encoder.calibrate(texts(80), quantile=0.5)
    assert made == encoder.calibrate(texts(80), quantile=0.5)
    made.save(folder)
    again = BTokEncoder.from_pretrained(folder)
    assert again.calibration == made and again.calibration.digest == made.digest
    assert Calibration.load(tmp_path) is None
    expected = encoder.encode(texts(9), num_btoks="auto", dtype="int8")
    assert np.array_equal(again.encode(texts(9), num_btoks="auto", dtype="int8"), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"multi_vector": False}, "json is of model '[0-9a-f]+', the checkpoint has '[0-9a-f]+'"),
        ({"budgets": [2, 4]}, "calibrate again: python -m btok calibrate"),
    ],
)
def test_another_checkpoints_calibration_is_refused(tmp_path, changes, message):
    folder = nested_checkpoint(tmp_path)
    BTokEncoder.from_pretrained(folder).calibrate(texts(5)).save(folder)
    file = folder / "btok_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    encoder = BTokEncoder.from_pretrained(folder)
    with pytest.raises(ValueError, match=message):
        encoder.encode(["a"], dtype="int8")
    assert encoder.encode(["a"]).shape == (1, 64)


def test_one_with_fewer_tokens_has_a_calibration_of_its_own(tmp_path):
    folder = nested_checkpoint(tmp_path)
    BTokEncoder.from_pretrained(folder).calibrate(texts(5)).save(folder)
    two = BTokEncoder.from_pretrained(folder, num_btoks=2)
    with pytest.raises(
        ValueError, match="is of num_btoks 4, the checkpoint has 2; calibrate again"
    ):
        two.encode(["a"], num_btoks="auto")
    two.calibrate(texts(5))
    assert two.encode(["a"], num_btoks="auto").shape == (1, 64)


@pytest.mark.parametrize(
    "damage",
    [
        lambda found: found.pop("scales"),
        lambda found: found.update(format_version=2),
        lambda found: found["scales"]["vector"].pop("16"),
        lambda found: found["scales"]["multi_vector"].pop("16"),
        lambda found: found["scales"]["vector"].update({"16": "0.1"}),
        lambda found: found["losses"].clear(),
        lambda found: next(iter(found["losses"].values()))["64"].pop(),
        lambda found: found.update(counts=3),
        lambda found: found.update(more=3),
    ],
)
def test_a_damaged_calibration_is_refused(tmp_path, damage):
    folder = nested_checkpoint(tmp_path)
    path = BTokEncoder.from_pretrained(folder).calibrate(texts(5)).save(folder)
    found = json.loads(path.read_text())
    damage(found)
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"btok_calibration\.json of .* is damaged; calibrate"):
        BTokEncoder.from_pretrained(folder).encode(["a"], dtype="int8")


def test_calibrations_that_cannot_be_made(encoder):
    for quantile in (0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"quantile is {quantile}, expected above"):
            encoder.calibrate(["a"], quantile=quantile)
    with pytest.raises(ValueError, match="inputs has none that can be read"):
        encoder.calibrate([])
    with pytest.raises(ValueError, match="input 1: it is empty"):
        encoder.calibrate(["a", ""])
    made = encoder.calibrate(["a", ""], strict=False)
    assert made.inputs == 1
    del encoder.calibration


def test_a_models_own_tokens_and_components_need_but_scales():
    encoder = BTokEncoder(*tiny_module())
    made = encoder.calibrate(texts(40))
    assert [*made.budgets] == [4] and [*made.dims] == [64] and {*made.scales} == {"vector"}
    got, exact = encoder.encode(["one", "two"], dtype="int8"), encoder.encode(["one", "two"])
    assert np.abs(got * encoder.using(dtype="int8").scale - exact).max() < 1e-2


def test_what_is_held_of_a_cell_is_bounded(encoder, monkeypatch):
    monkeypatch.setattr(calibration_module, "MOST", 10)
    measuring = calibration_module.Measuring(encoder.model.settings, 64, 0.9)
    for i in range(1000):
        measuring._keep("text/1", np.float32(i))
    held = np.array(measuring.losses["text/1"])
    assert len(held) == 10 and measuring.counts == {"text/1": 1000}
    assert held.max() > 500 and len({*held.tolist()}) == 10


def test_an_option_that_there_is_none_of_is_named():
    encoder = BTokEncoder(*nested_module())
    with pytest.raises(TypeError, match="nope is no option, expected num_btoks, dims, "):
        encoder.encode(["a"], nope=1)
    same = encoder.encode(["a"], num_btoks=np.int64(2))
    assert np.array_equal(same, encoder.encode(["a"], num_btoks=2))
