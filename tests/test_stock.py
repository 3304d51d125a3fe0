"""What other engines make of our checkpoints by their files alone: our ids, and our vectors."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
from helpers import (
    FAMILIES,
    VISION,
    environment,
    stock_image_processor,
    tiny_module,
    tiny_tokenizer,
)
from PIL import Image

from btok import BTokEncoder, Side, load_sentence_transformer
from btok.adapters import Lora
from btok.inputs import as_side
from btok.model import BTokModel
from btok.processing import Processor
from btok.tokens import add_to_tokenizer, btok_names, end_with_btoks
from btok.tools.export import export

TEXTS = ["what is it?", "a", "milk, bread\nand a red seven ", "x" * 200]


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    """A family's checkpoint, and its model and processor, as they were before it was saved."""
    folder = tmp_path_factory.mktemp(request.param)
    model, processor = tiny_module(request.param)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return request.param, folder, model, processor


def stock_tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def ours(model, processor, side):
    """As the model packs it."""
    return [*processor(side)["input_ids"].tolist(), *model.btok_token_ids]


def test_a_text(saved):
    _, folder, model, processor = saved
    stock = stock_tokenizer(folder)
    for text in TEXTS:
        assert stock(text)["input_ids"] == ours(model, processor, Side(text))
    assert stock(TEXTS[3], truncation=True, max_length=9)["input_ids"][-4:] == [
        *model.btok_token_ids
    ]
    plain = stock(TEXTS[0], add_special_tokens=False)["input_ids"]
    assert plain == processor(Side(TEXTS[0]))["input_ids"].tolist()


def test_a_conversation(saved):
    _, folder, model, processor = saved
    stock = stock_tokenizer(folder)

    def of(*contents, **more):
        messages = [
            {"role": role, "content": content}
            for role, content in zip(("system", "user")[-len(contents) :], contents, strict=True)
        ]
        return stock.apply_chat_template(messages, return_dict=False, **more)

    for text in TEXTS:
        assert of(text) == ours(model, processor, Side(text))
        assert of([{"type": "text", "text": text}], add_generation_prompt=True) == of(text)
    for instruction in ("Find it:", "Find it:\n"):
        expected = ours(model, processor, as_side("a text", instruction))
        assert of(instruction, "a text") == expected
        assert of([{"type": "text", "text": instruction}], "a text") == expected
    assert of("", "a text") == ours(model, processor, Side("a text"))


def test_engines_know_a_checkpoint_that_they_would_serve_rightly(saved):
    """And no other; transformers goes by `model_type` and loads both."""
    import transformers

    kind, folder, model, _ = saved
    architecture = model.family.architecture
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [f"BTok{architecture}"]
    auto = {"ForCausalLM": "AutoModelForCausalLM"}.get(architecture[-11:])
    load = getattr(transformers, auto or "AutoModelForImageTextToText").from_pretrained
    again = load(folder)
    assert type(again).__name__ == architecture
    expected = model.backbone.state_dict()
    assert all((weight == expected[name]).all() for name, weight in again.state_dict().items())
    for pooling, count, marked in (
        ("last", 4, False),
        ("last", 0, False),
        ("btok", 1, False),
        ("mean", 4, kind in VISION),  # of a text model modules.json tells
    ):
        ids = model.btok_token_ids[:count]
        other = BTokModel.from_backbone(model.backbone, btok_token_ids=ids, pooling=pooling)
        other.save_pretrained(folder / "other")
        config = json.loads((folder / "other" / "config.json").read_text())
        assert config["architectures"] == ["BTok" * marked + architecture]


def test_a_template_of_before_gives_way(saved):
    """It ended alike; vLLM found no loop over a message's parts in it."""
    _, folder, _, processor = saved
    tokenizer = stock_tokenizer(folder)
    own = tokenizer.chat_template
    assert "{%- for part in message['content'] | default([], true) -%}" in own
    tokenizer.chat_template = "{%- set IMAGE = '' -%}{{- all.image + all.text + BTOKS -}}"
    assert end_with_btoks(tokenizer, 4, getattr(processor.image_processor, "shown", None))
    assert tokenizer.chat_template == own


def test_no_template_is_lost():
    tokenizer = tiny_tokenizer()
    add_to_tokenizer(tokenizer, 2)
    tokenizer.chat_template = {"default": "D", "chat": "C", "tools": "T"}
    for _ in range(2):
        assert end_with_btoks(tokenizer, 2)
        found = dict(tokenizer.chat_template)
        assert found.pop("default").endswith("BTOKS -}}")
        assert found == {"chat": "C", "chat_default": "D", "tools": "T"}


def stock_processor(kind, folder, monkeypatch):
    """Transformers' own, made without torchvision, which its video half alone needs."""
    import transformers
    from transformers.processing_utils import ProcessorMixin

    names = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
    found = getattr(transformers, f"{names.get(kind, 'Idefics3')}Processor")
    image_processor = stock_image_processor(folder)
    tokenizer = stock_tokenizer(folder)
    if kind not in names:
        return found(image_processor, tokenizer, image_seq_len=4)

    def without_checks(self, image_processor, tokenizer, video_processor, chat_template=None):
        self.image_processor, self.tokenizer = image_processor, tokenizer
        self.video_processor = self.feature_extractor = video_processor
        self.chat_template = tokenizer.chat_template

    monkeypatch.setattr(ProcessorMixin, "__init__", without_checks)
    return found(image_processor, tokenizer, None)


def test_pictures(saved, monkeypatch):
    kind, folder, model, processor = saved
    if kind not in VISION:
        pytest.skip("text alone")
    stock = stock_processor(kind, folder, monkeypatch)
    rng = np.random.default_rng(0)
    shown = [rng.integers(0, 256, (h, w, 3), dtype=np.uint8) for h, w in ((40, 60), (70, 33))]
    pictures = [Image.fromarray(each) for each in shown]
    for count, text in ((1, "what is it?"), (2, "what are they?"), (2, "")):
        parts = [{"type": "image", "image": each} for each in pictures[:count]]
        parts += [{"type": "text", "text": text}] if text else []
        messages = [{"role": "user", "content": parts}]
        asked = stock.tokenizer.apply_chat_template(messages, tokenize=False)
        got = stock(text=[asked], images=[pictures[:count]], add_special_tokens=False)
        expected = ours(model, processor, Side(text, shown[:count]))
        assert np.array(got["input_ids"])[0].tolist() == expected
    # a prompt that is written by hand, as for the text part of an embeddings request
    image, gap = processor.image_processor.shown["image"]
    got = stock(text=[f"{image}{gap}what is it?"], images=[pictures[:1]])
    assert np.array(got["input_ids"])[0].tolist() == ours(
        model, processor, Side("what is it?", shown[:1])
    )


def test_videos(saved):
    """Their place in a conversation; the stock processors need torchvision to fill it."""
    kind, folder, _, processor = saved
    if kind not in VISION:
        pytest.skip("text alone")
    parts = [{"type": "video", "video": "a.mp4"}, {"type": "text", "text": "what moves?"}]
    stock = stock_tokenizer(folder)
    asked = stock.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    video, gap = processor.image_processor.shown["video"]
    assert asked == f"{video}{gap}what moves?{''.join(btok_names(4))}"
    frames = [np.zeros((16, 16, 3), np.uint8)] * 2
    said = processor.tokenizer.decode(processor(Side("what moves?", video=frames))["input_ids"])
    assert said.endswith(f"{gap}what moves?")


def test_a_saved_checkpoint_is_loaded_and_saved_again(saved, tmp_path):
    _, folder, model, processor = saved
    again = Processor.from_pretrained(folder, 4)
    side = Side("what is it?")
    assert again(side)["input_ids"].tolist() == processor(side)["input_ids"].tolist()
    again.save_pretrained(tmp_path)
    assert stock_tokenizer(tmp_path)(side.text)["input_ids"] == ours(model, again, side)
    fewer = Processor.from_pretrained(folder, 2)
    fewer.save_pretrained(tmp_path / "fewer")
    expected = [*processor(side)["input_ids"].tolist(), *model.btok_token_ids[:2]]
    assert stock_tokenizer(tmp_path / "fewer")(side.text)["input_ids"] == expected


def test_export_upgrades_what_was_saved_before(saved, tmp_path):
    """By a version that left the tokenizer as it was."""
    _, folder, model, processor = saved
    old = tmp_path / "old"
    shutil.copytree(folder, old)
    (old / "chat_template.jinja").unlink()
    processor.tokenizer.save_pretrained(old)
    config = json.loads((old / "config.json").read_text())
    config["architectures"] = [model.family.architecture]
    (old / "config.json").write_text(json.dumps(config))
    assert stock_tokenizer(old)("a")["input_ids"] == processor(Side("a"))["input_ids"].tolist()
    encoder = BTokEncoder.from_pretrained(old)
    assert export(old, tmp_path / "new") == 0.0
    assert stock_tokenizer(tmp_path / "new")("a")["input_ids"] == ours(model, processor, Side("a"))
    again = BTokEncoder.from_pretrained(tmp_path / "new")
    assert np.array_equal(encoder.encode(["a"]), again.encode(["a"]))
    assert encoder.settings == again.settings
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config["architectures"] == [f"BTok{model.family.architecture}"]
    assert stock_tokenizer(old)("a")["input_ids"] == processor(Side("a"))["input_ids"].tolist()


WITHOUT_US = """
import sys
sys.modules["btok"] = None  # not to be imported
import json
import numpy as np
from sentence_transformers import SentenceTransformer
texts = json.loads(sys.argv[1])
for folder in sys.argv[2:]:
    model = SentenceTransformer(folder, device="cpu")
    got = model.encode(texts, batch_size=3)
    assert [type(part).__name__ for part in model] == ["Transformer", "Pooling", "Normalize"]
    assert np.abs(got - np.load(f"{folder}/ours.npy")).max() < 1e-6, folder
    print("right")
"""
POOLED = {"last of 4": (4, "last"), "one": (1, "btok"), "last": (0, "last"), "mean": (0, "mean")}


def test_sentence_transformers_alone_gives_our_vectors(tmp_path):
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    folders = []
    for kind in ("llama", "qwen2", "qwen3"):
        for name, (count, pooling) in POOLED.items():
            made, processor = tiny_module(kind)
            ids = made.btok_token_ids[:count]
            model = BTokModel.from_backbone(made.backbone, btok_token_ids=ids, pooling=pooling)
            folder = tmp_path / f"{kind} {name}"
            model.save_pretrained(folder)
            Processor(processor.tokenizer, model_type=kind, num_btoks=count).save_pretrained(folder)
            vectors = BTokEncoder.from_pretrained(folder).encode(TEXTS)
            np.save(folder / "ours.npy", vectors)
            again = load_sentence_transformer(folder, device="cpu")
            assert np.abs(again.encode(TEXTS) - vectors).max() < 1e-6
            folders.append(folder)
    command = [sys.executable, "-c", WITHOUT_US, json.dumps(TEXTS), *map(str, folders)]
    said = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert said.stdout.split() == ["right"] * 12, said.stderr


@pytest.mark.parametrize("kind, adapted", [("llama", False), ("qwen2_vl", False), ("llama", True)])
def test_what_needs_our_pooling_is_refused_without_it(tmp_path, kind, adapted):
    """sentence-transformers would take the last row of a decoder, and say nothing."""
    st = pytest.importorskip("sentence_transformers", reason="it is not installed")
    model, processor = tiny_module(kind)
    if adapted or kind == "qwen2_vl":
        settings = {"btok_token_ids": model.btok_token_ids, "pooling": "last"}
        model = BTokModel.from_backbone(model.backbone, **settings)
    if adapted:
        pytest.importorskip("peft", reason="peft is not installed")
        model.save_pretrained(tmp_path / "base")
        model = BTokModel.from_pretrained(tmp_path / "base", lora=Lora(rank=2, alpha=4, dropout=0))
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="trust_remote_code"):
        st.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    trusted = st.SentenceTransformer(str(tmp_path / "saved"), device="cpu", trust_remote_code=True)
    vectors = BTokEncoder.from_pretrained(tmp_path / "saved").encode(TEXTS)
    assert np.abs(trusted.encode(TEXTS) - vectors).max() < 1e-6
    if adapted:  # merged it is a plain one
        export(tmp_path / "saved", tmp_path / "merged")
        alone = st.SentenceTransformer(str(tmp_path / "merged"), device="cpu")
        assert len(alone) == 3 and np.abs(alone.encode(TEXTS) - vectors).max() < 1e-5


def test_without_bottleneck_tokens_nothing_is_added(tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    start = tokenizer.convert_ids_to_tokens(3)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[start, "$A"], pair=[start, "$A", "$B"], special_tokens=[(start, 3)]
    )
    assert tokenizer("a")["input_ids"][0] == 3
    Processor(tokenizer, model_type="llama").save_pretrained(tmp_path)
    assert stock_tokenizer(tmp_path)("a")["input_ids"] == tokenizer.encode(
        "a", add_special_tokens=False
    )
    assert tokenizer("a")["input_ids"][0] == 3  # the one in memory stays as it was


def test_a_tokenizer_that_cannot_is_told(tmp_path):
    assert not end_with_btoks(object(), 4)
    tokenizer = tiny_tokenizer()
    add_to_tokenizer(tokenizer, 2)
    processor = Processor(tokenizer, model_type="llama")
    assert processor.num_btoks == 2

    class Slow:
        def __deepcopy__(self, _):
            return self

        def save_pretrained(self, folder):
            pass

    processor.tokenizer = Slow()
    with pytest.warns(UserWarning, match="Slow cannot end inputs with bottleneck tokens"):
        processor.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Processor(tokenizer, model_type="llama").save_pretrained(tmp_path)
