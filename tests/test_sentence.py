"""The sentence-transformers module: what it takes, padding, saving, and what it refuses."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import FAMILIES, VISION, environment, tiny_checkpoint, tiny_module
from PIL import Image

import btok
from btok import BTokEncoder, Side

pytest.importorskip(
    "sentence_transformers", reason="the extra `sentence-transformers` is not installed"
)
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize

from btok.inputs import as_side
from btok.model import model_digest
from btok.tools.sentence import BTokTransformer, _side, unpad
from btok.vision import by_name

RNG = np.random.default_rng(0)
PICTURES = [RNG.integers(0, 256, (24, 32, 3), dtype=np.uint8) for _ in range(6)]
INPUTS = [
    "a red seven",
    Image.fromarray(PICTURES[0]),
    "photo.jpg",
    {"text": "which digit?", "image": PICTURES[1:3]},
    PICTURES[3],
    {"text": "what motion?", "video": PICTURES[:3]},
    "x" * 60,
    {"image": PICTURES[4]},
    {"text": "y"},
]
SIDES = [
    Side("a red seven"),
    Side(images=PICTURES[:1]),
    Side("photo.jpg"),
    Side("which digit?", images=PICTURES[1:3]),
    Side(images=PICTURES[3:4]),
    Side("what motion?", video=PICTURES[:3]),
    Side("x" * 60),
    Side(images=PICTURES[4:5]),
    Side("y"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def model(checkpoint):
    return btok.load_sentence_transformer(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def encoder(checkpoint):
    return BTokEncoder.from_pretrained(checkpoint)


def module_of(family):
    return BTokTransformer(*tiny_module(family))


def distance(a, b):
    assert a.shape == b.shape and np.isfinite(a).all() and np.isfinite(b).all()
    return np.abs(a - b).max()


def test_a_padded_batch_is_what_the_encoder_gives(model, encoder):
    expected = encoder.encode(SIDES)
    rows = model.encode(INPUTS)
    assert rows.dtype == np.float32 and rows.shape == (9, 64)
    assert model.get_embedding_dimension() == 64
    assert distance(rows, expected) < 1e-6
    assert distance(model.encode(INPUTS, batch_size=2), expected) < 1e-6
    assert distance(model.encode(INPUTS[::-1])[::-1], expected) < 1e-6
    for value, row in zip(INPUTS, expected, strict=True):
        assert distance(model.encode(value), row) < 1e-6
    assert min(np.abs(rows[0] - row).max() for row in rows[1:]) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_an_embedding_does_not_depend_on_its_padded_batch(family):
    module = module_of(family)
    inputs = [f"text {i} " + "x" * (7 * i % 40) for i in range(31)]
    if family in VISION:
        inputs[:8] = [INPUTS[1], INPUTS[3], INPUTS[5], {"text": "b", "video": PICTURES[1:6]}] * 2
        inputs[8:11] = [{"text": str(i), "image": PICTURES[:i]} for i in (1, 2, 3)]
    encoder = BTokEncoder(module.model, module.processor)
    alone = np.stack([encoder.encode([as_side(_side(value))])[0] for value in inputs])
    model = SentenceTransformer(modules=[module], device="cpu")
    for seed in range(2):
        order = np.random.default_rng(seed).permutation(31)
        rows = model.encode([inputs[i] for i in order], batch_size=31)
        assert distance(rows, alone[order]) < 1e-6


def test_padding_may_be_on_any_side(model):
    features = model.preprocess(INPUTS)
    mask = features["attention_mask"]
    assert mask.shape == features["input_ids"].shape and 0 < mask.float().mean() < 1
    moved = dict(features)
    for key in ("input_ids", "attention_mask"):
        rows = zip(features[key], mask.sum(1).tolist(), strict=True)
        moved[key] = torch.stack([row.roll(len(row) - length) for row, length in rows])
    moved["input_ids"] = moved["input_ids"].masked_fill(moved["attention_mask"] == 0, 7)
    with torch.no_grad():
        right, left = model(dict(features)), model(moved)
    got, expected = (out["sentence_embedding"].numpy() for out in (left, right))
    assert distance(got, expected) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_unpad_gives_back_the_samples(family):
    module = module_of(family)
    sides = [Side("a text"), Side("b" * 20)]
    if module.processor.has_vision:
        sides += [SIDES[3], SIDES[5], SIDES[1], Side("more", video=PICTURES[2:6]), Side("end")]
    features = module.preprocess(sides)
    samples = unpad(features, module.model.backbone.config)
    for sample, side in zip(samples, sides, strict=True):
        expected = by_name(module.processor(side))
        assert sample.keys() == expected.keys()
        assert all(torch.equal(sample[key], expected[key]) for key in sample)
    if family == "qwen2_5_vl":
        assert len(features["second_per_grid_ts"]) == 2


def test_a_model_without_vision_takes_texts_alone():
    module = module_of("qwen2")
    model = SentenceTransformer(modules=[module], device="cpu")
    assert model.modalities == ["text"] and not model.supports("image")
    expected = BTokEncoder(module.model, module.processor).encode(["photo.jpg", "a longer text"])
    assert distance(model.encode(["photo.jpg", "a longer text"]), expected) < 1e-6
    with pytest.raises(ValueError, match="image"):
        model.encode([PICTURES[0]])


def test_a_prompt_is_an_instruction(model, encoder):
    for prompt in ("Find:", "Find: "):
        expected = encoder.encode(SIDES, prompt)
        assert distance(model.encode(INPUTS, prompt=prompt), expected) < 1e-6
    assert distance(expected, encoder.encode(SIDES)) > 1e-2
    assert distance(model.encode_query("a red seven"), encoder.encode(SIDES[:1])[0]) < 1e-6


def test_save_and_load(model, encoder, checkpoint, tmp_path):
    expected = model.encode(INPUTS)
    model.save(str(tmp_path), safe_serialization=False)
    assert (tmp_path / "model.safetensors").exists() and not list(tmp_path.glob("*.bin"))
    assert distance(btok.load_sentence_transformer(tmp_path).encode(INPUTS), expected) == 0
    trusted = SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu")
    assert distance(trusted.encode(INPUTS), expected) == 0
    again = BTokEncoder.from_pretrained(tmp_path)
    assert distance(again.encode(SIDES), encoder.encode(SIDES)) == 0
    with pytest.raises(ValueError, match="trust_remote_code"):
        SentenceTransformer(str(tmp_path), device="cpu")


def test_a_folder_saved_under_the_first_path_loads(model, tmp_path):
    expected = model.encode(INPUTS)
    model.save(str(tmp_path))
    (module,) = json.loads((tmp_path / "modules.json").read_text())
    assert module["type"] == "btok.tools.sentence.BTokTransformer"
    module["type"] = "btok.sentence.BTokTransformer"
    (tmp_path / "modules.json").write_text(json.dumps([module]))
    trusted = SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu")
    assert type(trusted[0]) is BTokTransformer
    for again in (trusted, btok.load_sentence_transformer(tmp_path, device="cpu")):
        assert distance(again.encode(INPUTS), expected) == 0


def test_what_is_pushed_to_the_hub_is_the_same(model, checkpoint, tmp_path, monkeypatch):
    import huggingface_hub

    def keep(self, *, folder_path, **_):
        shutil.copytree(folder_path, tmp_path / "hub")
        return SimpleNamespace(commit_url="url")

    made = lambda self, **_: SimpleNamespace(repo_id="someone/model")  # noqa: E731
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", made)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", keep)
    model.push_to_hub("someone/model")
    expected = model.encode(INPUTS)
    assert distance(btok.load_sentence_transformer(tmp_path / "hub").encode(INPUTS), expected) == 0
    again = BTokEncoder.from_pretrained(tmp_path / "hub")
    assert again.digest == model_digest(checkpoint)


def test_by_its_name_on_a_hub(model, checkpoint, tmp_path):
    """As it lies in the hub's own store after a download; asked for by name, by a child process."""
    stored, commit = tmp_path / "models--someone--model", "0123456789" * 4
    shutil.copytree(checkpoint, stored / "snapshots" / commit)
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text(commit)
    code = """
import btok
from sentence_transformers import SentenceTransformer
name = "someone/model"
for made in (
    SentenceTransformer(name, trust_remote_code=True),
    btok.load_sentence_transformer(name),
    btok.BTokEncoder.from_pretrained(name),
):
    print(made.encode(["a red seven", "x"]).tolist())
"""
    more = {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(**more), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    expected = model.encode(["a red seven", "x"])
    for line in done.stdout.splitlines():
        assert distance(np.array(json.loads(line), np.float32), expected) < 1e-6
    assert done.stdout.count("\n") == 3


@pytest.mark.parametrize(
    ("precision", "dtype", "share"), [("int8", np.int8, 1), ("ubinary", np.uint8, 8)]
)
def test_smaller_vectors(model, precision, dtype, share):
    """Sentence-transformers' own, of our vectors."""
    from sentence_transformers.util import quantize_embeddings

    texts = [f"text {i} of many" for i in range(120)]
    whole = model.encode(texts)
    smaller = model.encode(texts, precision=precision)
    assert smaller.dtype == dtype and smaller.shape == (120, whole.shape[1] // share)
    assert np.array_equal(smaller, quantize_embeddings(whole, precision))


def test_saved_settings_are_kept(checkpoint, encoder, tmp_path):
    model = btok.load_sentence_transformer(checkpoint)
    model.prompts["query"] = "Find:"
    model.similarity_fn_name, model.truncate_dim = "dot", 16
    model.save(str(tmp_path))
    again = btok.load_sentence_transformer(tmp_path, dtype=torch.float64)
    assert again.similarity_fn_name == "dot" and again.dtype == torch.float64
    expected = encoder.encode(SIDES, "Find:")[:, :16]
    assert distance(again.encode_query(INPUTS), expected) < 1e-5


def test_more_modules_are_refused(model, tmp_path):
    SentenceTransformer(modules=[model[0], Normalize()], device="cpu").save(str(tmp_path))
    with pytest.raises(ValueError, match=r"BTokTransformer.*Normalize"):
        btok.load_sentence_transformer(tmp_path)


def test_it_can_be_trained(model):
    model.zero_grad()
    model(model.preprocess(INPUTS[:4]))["sentence_embedding"][:, 0].sum().backward()
    gradient = model[0].model.backbone.get_input_embeddings().weight.grad
    assert gradient.isfinite().all() and gradient.abs().max() > 0
    model.zero_grad()


def test_a_worker_registers_the_attention(model, monkeypatch):
    from transformers import AttentionInterface

    expected = model.encode(INPUTS[:2])
    written = pickle.dumps(model)
    monkeypatch.delitem(AttentionInterface._global_mapping, "condensed")
    assert distance(pickle.loads(written).encode(INPUTS[:2]), expected) == 0


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("", "it is empty"),
        (" \n", "it is empty"),
        ({}, "it is empty"),
        ({"text": "a", "audio": PICTURES[0]}, r"keys \['audio'\]"),
        ({"image": 3}, "image is a int"),
        ({"image": "no/such.png"}, r"no/such\.png cannot be read"),
        ([{"role": "user", "content": "a"}], "image is a dict"),
        (3, "image is a int"),
    ],
)
def test_what_cannot_be_embedded_is_named(model, value, reason):
    with pytest.raises(ValueError, match=f"(?s)BTokTransformer: input .*: .*{reason}"):
        model.encode(["a", value])


def test_options_without_effect_are_refused(model):
    with pytest.raises(ValueError, match="processing_kwargs"):
        model.encode(["a"], processing_kwargs={"text": {"max_length": 3}})
    with pytest.raises(AttributeError):
        model.max_seq_length = 3
    assert model.max_seq_length is None


def test_the_import_is_lazy_and_names_the_extra(checkpoint, monkeypatch):
    code = "import sys, btok; print('sentence_transformers' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert said.stdout.strip() == "False", said.stderr
    monkeypatch.delitem(sys.modules, "btok.tools.sentence")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match=r'pip install "btok\[sentence-transformers\]"'):
        btok.load_sentence_transformer(checkpoint)
