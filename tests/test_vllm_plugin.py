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
        ({"btok_token_ids": [263, 264]}, "expected once the 2 bottleneck tokens"),
        ({"btok_token_ids": [262, 263, 264, 265, 266]}, "expected once the 5 bottleneck tokens"),
    ):
        edit(settings, **changed)
        refused(words, engine(checkpoint))
        settings.write_text(had)
    settings.unlink()
    refused("it is a BTokLlamaForCausalLM and has no btok_config.json", engine(checkpoint))


def test_an_old_tokenizer_is_refused(vllm, checkpoint):
    _, processor = tiny_module("llama")
    processor.tokenizer.save_pretrained(checkpoint)
    with pytest.raises(ValueError, match=r"its tokenizer ends a text with .*export FOLDER"):
        vllm_plugin.check(engine(checkpoint))


def test_a_class_is_looked_up_by_name():
    for name in ("LlamaForCausalLM", "BTokMistralForCausalLM", "nothing"):
        with pytest.raises(AttributeError, match=name):
            getattr(vllm_plugin, name)


def test_the_entry_point_is_there():
    [found] = entry_points(group="vllm.general_plugins", name="btok")
    assert found.load() is vllm_plugin.register
