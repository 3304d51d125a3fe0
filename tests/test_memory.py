"""The arithmetic of a run's memory, beside real configurations on the device meta."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import transformers
from helpers import BTOKS, text, tiny_backbone

from btok.model import BTokModel
from btok.packing import pack
from train.memory import GIB, memory_of, refuse_too_small
from train.recipes import PAPER, Recipe

# public shapes, and what they take by the same arithmetic on paper, GiB: whole models' weights,
# gradients and moments in fp32 over 8 devices; all weights in bf16; layer inputs of 16,384 tokens
SHAPES = {
    "qwen2_vl-2b": (
        "Qwen2VL",
        {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28},
        {"num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936},
        {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16},
        True,
        (4.1, 4.1, 1.3),
    ),
    "qwen2_5_vl-7b": (
        "Qwen2_5_VL",
        {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28},
        {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064},
        {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584},
        False,
        (15.4, 15.4, 3.1),
    ),
    "qwen3_vl-8b": (
        "Qwen3VL",
        {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36},
        {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936},
        {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "out_hidden_size": 4096},
        False,
        (16.3, 16.3, 4.5),
    ),
}
WHOLE = dataclasses.replace(PAPER, lora_rank=0, shard=True)


def on_meta(name):
    kind, width, heads, vision, tied, want = SHAPES[name]
    config = getattr(transformers, f"{kind}Config")(
        text_config={**width, **heads}, vision_config=vision, tie_word_embeddings=tied
    )
    with torch.device("meta"):
        backbone = getattr(transformers, f"{kind}ForConditionalGeneration")._from_config(
            config, dtype=torch.bfloat16
        )
    return BTokModel.from_backbone(backbone, btok_token_ids=range(150000, 150004)), want


@pytest.mark.parametrize("name", SHAPES)
def test_real_configurations(name):
    model, (over_eight, frozen, inputs) = on_meta(name)
    found = memory_of(model, WHOLE, 8)
    whole = sum(found[part] for part in ("weights", "gradients", "moments"))
    assert whole / GIB == pytest.approx(over_eight, abs=0.1)
    alone = memory_of(model, dataclasses.replace(WHOLE, shard=False), 1)
    copies = alone["weights in bfloat16"]
    assert copies == 2 * sum(p.numel() for p in model.parameters())
    more = memory_of(model, dataclasses.replace(WHOLE, replicas=2), 8)
    assert more["moments"] == 2 * found["moments"]
    model.requires_grad_(False)
    found = memory_of(model, PAPER, 8)
    assert found["frozen weights"] / GIB == pytest.approx(frozen, abs=0.1)
    assert "weights" not in found and found["vision features"] == PAPER.vision_memory
    config = model.backbone.config.get_text_config()
    kept = found["activations"] / GIB
    layer = memory_of(model, dataclasses.replace(PAPER, checkpoint_activations=False), 8)
    layer = layer["activations"] / GIB / config.num_hidden_layers
    assert kept - layer == pytest.approx(inputs, abs=0.05)


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("name", ["qwen2_vl-2b", "qwen3_vl-8b"])
def test_activations_are_about_what_autograd_keeps(name, checkpoint):
    """Of one packed pass on the device meta, counted storage by storage."""
    model, _ = on_meta(name)
    model.train()
    if checkpoint:
        model.checkpoint_activations()
    options = {"btok_token_ids": model.btok_token_ids, "prefix_ids": (5,), "suffix_ids": (6,)}
    samples = [(text(252, seed), None) for seed in range(8)]
    batch = pack(samples, **options, backbone_config=model.backbone.config).to("meta")
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.device.type == "meta" and tensor.untyped_storage()._cdata not in weights:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(batch)
    recipe = dataclasses.replace(
        WHOLE, chunk_tokens=len(batch.input_ids), checkpoint_activations=checkpoint
    )
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    expected = memory_of(model, recipe, 1)["activations"]
    if checkpoint:  # and one layer's own, while its backward goes
        whole = memory_of(model, dataclasses.replace(recipe, checkpoint_activations=False), 1)
        layers = model.backbone.config.get_text_config().num_hidden_layers
        expected -= whole["activations"] / layers
    assert 0.7 < expected / found < 1.3


def test_a_device_that_is_too_small(monkeypatch, capsys):
    model = BTokModel.from_backbone(tiny_backbone(), btok_token_ids=BTOKS[:4])
    recipe = Recipe(model="mine", caption_steps=0, chunk_tokens=4096)
    total = sum(memory_of(model, recipe, 1).values())
    device = torch.device("cuda")
    for memory, fits in ((total, True), (total - 1, False)):
        properties = SimpleNamespace(total_memory=memory)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, p=properties: p)
        if fits:
            refuse_too_small(model, recipe, device)
            told = f"training takes about {total / 2**20:.1f} MiB"  # far from a GiB
            assert told in capsys.readouterr().out
        else:
            with pytest.raises(ValueError, match=r"mine needs about .*--checkpoint-activations"):
                refuse_too_small(model, recipe, device)
    refuse_too_small(model, recipe, torch.device("cpu"))
