"""What the vLLM plugin refuses, with a stand-in for what it asks of vLLM; `make serve-test` has the
real one.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import entry_points
from types import ModuleType, SimpleNamespace

import pytest
from helpers import tiny_module

from btok.tools import vllm_plugin


@pytest.fixture
def vllm(monkeypatch):
    """As many of vLLM's modules as a check asks for."""

    def of_folder(name, folder, revision):
        path = folder / name
        return json.loads(path.read_text()) if path.exists() else None

    def tokenizer(model):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(model.model)

    made = {
        "vllm": {"__version__": "0.32.1"},
        "vllm.transformers_utils": {},
        "vllm.transformers_utils.repo_utils": {"get_hf_file_to_dict": of_folder},
        "vllm.tokenizers": {"cached_tokenizer_from_config": tokenizer},
    }
    for name, content in made.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return sys.modules["vllm"]


def engine(folder, rows="MEAN", **more):
    """What vLLM makes of a folder; `rows` is the pooling that it would do."""
    config = json.loads((folder / "config.json").read_text())
    off = {"enable_chunked_prefill": False, "enable_prefix_caching": False}
    model = SimpleNamespace(
        model=folder,
        revision=None,
        architecture=config["architectures"][0],
        runner_type="pooling",
        skip_tokenizer_init=False,
        hf_config=SimpleNamespace(),
        pooler_config=SimpleNamespace(seq_pooling_type=rows, enable_chunked_processing=False),
    )
    model.multimodal_config = SimpleNamespace(mm_processor_kwargs=None)
    found = {"scheduler_config": SimpleNamespace(**off), "cache_config": SimpleNamespace(**off)}
    return SimpleNamespace(model_config=model, lora_config=None, **found, **more)


@pytest.fixture
def checkpoint(tmp_path):
    model, processor = tiny_module("llama")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return tmp_path


def edit(path, **settings):
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_what_is_right_is_let_through(vllm, checkpoint):
    config = engine(checkpoint)
    vllm_plugin.check(config)
    model = config.model_config
    assert len(model.hf_config.btok_token_ids) == 4 and model.hf_config.btok_pooling == "btok"


def test_what_is_not_ours_is_let_through(vllm, checkpoint):
    (checkpoint / "btok_config.json").unlink()
    edit(checkpoint / "config.json", architectures=["LlamaForCausalLM"])
    config = engine(checkpoint, "LAST")
    vllm_plugin.check(config)
    assert not vars(config.model_config.hf_config)


def test_one_that_pools_the_last_row_may_generate(vllm, checkpoint, monkeypatch):
    edit(checkpoint / "config.json", architectures=["LlamaForCausalLM"])
    edit(checkpoint / "btok_config.json", pooling="last")
    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    config = engine(checkpoint)
    config.model_config.runner_type, config.model_config.pooler_config = "generate", None
    vllm_plugin.check(config)
    config = engine(checkpoint, "LAST")
    monkeypatch.setattr(vllm, "__version__", "0.32.0")
    vllm_plugin.check(config)
    assert config.model_config.hf_config.btok_pooling == "last"
    with pytest.raises(ValueError, match="vLLM would take MEAN"):
        vllm_plugin.check(engine(checkpoint, "MEAN"))


def test_what_would_give_other_vectors_is_refused(vllm, checkpoint, monkeypatch):
    def refused(words, config):
        with pytest.raises(ValueError, match=words) as found:
            vllm_plugin.check(config)
        assert str(found.value).startswith(f"btok: {checkpoint} is not served: ")

    config = engine(checkpoint)
    config.scheduler_config.enable_chunked_prefill = True
    refused("give --no-enable-chunked-prefill", config)
    config = engine(checkpoint)
    config.cache_config.enable_prefix_caching = True
    refused("give --no-enable-prefix-caching", config)
    config = engine(checkpoint)
    config.model_config.pooler_config.enable_chunked_processing = True
    refused("enable_chunked_processing embeds parts", config)
    config = engine(checkpoint)
    config.model_config.multimodal_config.mm_processor_kwargs = {"max_pixels": 9}
    refused("mm_processor_kwargs are {'max_pixels': 9}", config)
    refused("seq_pooling_type is LAST", engine(checkpoint, "LAST"))
    config = engine(checkpoint)
    config.model_config.runner_type, config.model_config.pooler_config = "generate", None
    refused("the runner is 'generate'; leave --runner out", config)
    config = engine(checkpoint)
    config.lora_config = SimpleNamespace()
    refused("export FOLDER NEW_FOLDER` merges them", config)

    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    refused("this is vLLM 0.33.0, the plugin was run with 0.32", engine(checkpoint))
    monkeypatch.setenv("BTOK_ANY_VLLM", "1")
    vllm_plugin.check(engine(checkpoint))

    edit(checkpoint / "config.json", architectures=["LlamaForCausalLM"])
    for rows in ("LAST", "MEAN"):
        refused(f"as a LlamaForCausalLM vLLM would take {rows}; `python", engine(checkpoint, rows))
    config = engine(checkpoint)
    config.model_config.runner_type, config.model_config.pooler_config = "generate", None
    refused("as a LlamaForCausalLM vLLM would take nothing; `python", config)
    edit(checkpoint / "config.json", architectures=["BTokLlamaForCausalLM"])

    settings = checkpoint / "btok_config.json"
    had = settings.read_text()
    for changed, words in (
        ({"format_version": 2}, "format_version of its btok_config.json is 2"),
        ({"vision_positions": "text"}, "vision_positions are 'text'"),
        ({"btok_token_ids": [263, 264]}, "and the 2 bottleneck tokens"),
        ({"btok_token_ids": [262, 263, 264, 265, 266]}, "and the 5 bottleneck tokens"),
    ):
        edit(settings, **changed)
        refused(words, engine(checkpoint))
        settings.write_text(had)
    settings.write_text("{")
    refused("its btok_config.json cannot be read", engine(checkpoint))
    settings.write_text(json.dumps({"format_version": 1}))
    refused("its btok_config.json has no btok_token_ids or pooling", engine(checkpoint))
    settings.write_text(had)
    moments = checkpoint / "optimizer.safetensors"
    moments.touch()
    refused("its optimizer's moments for weights", engine(checkpoint))
    moments.unlink()
    adapted = checkpoint / "adapter_config.json"
    adapted.write_text("{}")
    refused("it is adapters; `python -m btok export", engine(checkpoint))
    adapted.unlink()
    settings.unlink()
    refused("it is a BTokLlamaForCausalLM and has no btok_config.json", engine(checkpoint))


def test_a_mean_of_all_rows_needs_all_of_them(vllm, checkpoint):
    edit(checkpoint / "config.json", architectures=["LlamaForCausalLM"])
    edit(checkpoint / "btok_config.json", pooling="mean")
    vllm_plugin.check(engine(checkpoint, "MEAN"))
    config = engine(checkpoint, "MEAN")
    config.cache_config.enable_prefix_caching = True
    with pytest.raises(ValueError, match="give --no-enable-prefix-caching"):
        vllm_plugin.check(config)


@pytest.mark.parametrize("count", [4, 0])
def test_a_tokenizer_that_begins_inputs_is_refused(vllm, checkpoint, count):
    from tokenizers.processors import TemplateProcessing

    _, processor = tiny_module("llama")
    tokenizer = processor.tokenizer
    names = ["<|im_start|>", *(f"<|btok_{i}|>" for i in range(count))]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[names[0], "$A", *names[1:]],
        pair=["$A", "$B"],
        special_tokens=list(zip(names, tokenizer.convert_tokens_to_ids(names), strict=True)),
    )
    tokenizer.save_pretrained(checkpoint)
    if not count:
        edit(checkpoint / "config.json", architectures=["LlamaForCausalLM"])
        edit(checkpoint / "btok_config.json", pooling="last", btok_token_ids=[])
    with pytest.raises(ValueError, match=f"expected .* and the {count} bottleneck tokens"):
        vllm_plugin.check(engine(checkpoint, "MEAN" if count else "LAST"))


def test_tokens_that_our_encoder_makes_of_no_input(vllm, checkpoint):
    config = engine(checkpoint).model_config
    vllm_plugin.check(SimpleNamespace(**vars(engine(checkpoint)) | {"model_config": config}))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    start, end, pad, im_end = tokenizer.convert_tokens_to_ids(
        ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|im_end|>"]
    )
    config.hf_config.vision_start_token_id, config.hf_config.vision_end_token_id = start, end
    b, a = config.hf_config.btok_token_ids, tokenizer.encode("a", add_special_tokens=False)
    space = tokenizer.encode(" ", add_special_tokens=False)
    picture = {"image": [SimpleNamespace(offset=1, length=2)]}
    for prompt, shown, words in (
        ([*a, *b], None, ""),
        (a, None, "has 0 bottleneck tokens and ends with"),
        ([*a, *b, *b], None, "has 8 bottleneck tokens"),
        ([b[0], *a, *b], None, "has 5 bottleneck tokens"),
        ([*b, *a], None, "has 4 bottleneck tokens and ends with"),
        (b, None, "an input is empty"),
        ([*space, *b], None, "an input is empty"),
        ([*a, im_end, *b], None, "a text spells <|im_end|>,"),
        ([*a, pad, *b], None, "a text spells <|image_pad|>,"),
        ([start, pad, pad, end, *a, *b], picture, ""),
        ([start, pad, pad, end, *b], picture, ""),
        ([start, pad, pad, end, *a, pad, *b], picture, "a text spells <|image_pad|>,"),
        ([start, pad, pad, end, start, *a, *b], picture, "a text spells <|vision_start|>,"),
        (None, None, "an input is embeddings"),
    ):
        asked = {"prompt_token_ids": prompt, "mm_placeholders": shown}
        said = vllm_plugin._wrong(asked, config.hf_config, tokenizer)
        assert words in said if words else said == ""


def test_an_old_tokenizer_is_refused(vllm, checkpoint):
    _, processor = tiny_module("llama")
    processor.tokenizer.save_pretrained(checkpoint)
    with pytest.raises(ValueError, match=r"its tokenizer makes .*export FOLDER"):
        vllm_plugin.check(engine(checkpoint))


def test_a_class_is_looked_up_by_name():
    for name in ("LlamaForCausalLM", "BTokMistralForCausalLM", "nothing"):
        with pytest.raises(AttributeError, match=name):
            getattr(vllm_plugin, name)


def test_the_entry_point_is_there():
    [found] = entry_points(group="vllm.general_plugins", name="btok")
    assert found.load() is vllm_plugin.register
