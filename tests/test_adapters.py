"""Adapters: what trains, what comes back from disk, what a merge changes."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from helpers import (
    BTOKS,
    FAMILIES,
    PREFIX,
    SUFFIX,
    TINY,
    VISION,
    text,
    tiny_backbone,
    tiny_checkpoint,
    tiny_tokenizer,
    vision,
)

from btok.adapters import Lora, merge
from btok.model import BTokModel
from btok.packing import pack
from btok.processing import Processor
from btok.tools.export import export

pytest.importorskip("peft")
from safetensors.torch import load_file, save_file

LORA = Lora(rank=4, alpha=8, dropout=0.0)
NAMES = ("adapter_config.json", "adapter_model.safetensors", "btok_config.json", "config.json")
NAMES += ("modules.json",)


def base(folder, family="qwen2_vl", num_btoks=4, **options):
    """A saved checkpoint of ours; three layers, so that Qwen3-VL's last one takes pooled rows."""
    backbone = tiny_backbone(family=family, layers=3, **options)
    pooling = "btok" if num_btoks else "last"
    model = BTokModel.from_backbone(backbone, btok_token_ids=BTOKS[:num_btoks], pooling=pooling)
    model.save_pretrained(folder)
    return folder


def adapted(folder, lora=LORA, **settings):
    """A model with new adapters, every one of them moved from where it started."""
    model = BTokModel.from_pretrained(folder, lora=lora, **settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return model


def batch_of(model, targets=False):
    config = model.backbone.config
    sources = [text(length, length) for length in (1, 9, 30)]
    if config.model_type in VISION:
        sources.append(TINY[config.model_type].side(vision([(1, 4, 6)], 1)))
    return pack(
        [(source, text(4, i) if targets else None) for i, source in enumerate(sources)],
        btok_token_ids=model.btok_token_ids,
        prefix_ids=PREFIX,
        suffix_ids=SUFFIX,
        backbone_config=config,
    )


@torch.no_grad()
def embed(model):
    return model(batch_of(model)).embeddings


@pytest.mark.parametrize("dora", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_only_adapters_and_bottleneck_rows_have_gradients(family, dora, tmp_path):
    model = adapted(base(tmp_path, family), Lora(rank=4, dora=dora, dropout=0.0))
    output = model(batch_of(model, targets=True))
    (output.embeddings[:, 0].sum() + output.ntp_loss).backward()
    names = {
        name.replace(".default", "") for name, p in model.named_parameters() if p.requires_grad
    }
    inner = model.family.language_model
    inner = f"{inner}." if inner else ""
    parts = ["lora_A.weight", "lora_B.weight", *["lora_magnitude_vector.weight"] * dora]
    linears = [f"self_attn.{n}_proj" for n in "qkvo"] + ["mlp.down_proj"]
    assert names == {f"backbone.model.{inner}embed_tokens.token_adapter.trainable_tokens_delta"} | {
        f"backbone.model.{inner}layers.{layer}.{linear}.{part}"
        for layer in range(3)
        for linear in linears
        for part in parts
    }
    for name, weight in model.named_parameters():
        assert (weight.grad is not None) == weight.requires_grad, name
        assert weight.grad is None or weight.grad.abs().max() > 0, name
        assert "delta" not in name or weight.shape == (4, 64)


@pytest.mark.parametrize("family", ["qwen2", "llama"])  # tied and not
def test_lm_head_does_not_follow_the_bottleneck_rows(family, tmp_path):
    model = BTokModel.from_pretrained(base(tmp_path, family), lora=LORA)
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    before = model.backbone.lm_head(hidden)
    tied = model.backbone.config.tie_word_embeddings
    assert tied == (family == "qwen2")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "delta" in name:
                weight += 1
    rows = model.backbone.get_input_embeddings()(torch.tensor(BTOKS[:5]))
    old = model.backbone.get_input_embeddings().original_module.weight[list(BTOKS[:5])]
    assert torch.equal(rows, old + torch.tensor([1, 1, 1, 1, 0])[:, None])
    assert torch.equal(model.backbone.lm_head(hidden), before)


@pytest.mark.parametrize("num_btoks", [0, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_loaded_and_merged(family, num_btoks, tmp_path):
    model = adapted(base(tmp_path / "base", family, num_btoks))
    model.save_pretrained(tmp_path / "lora")
    assert sorted(file.name for file in (tmp_path / "lora").iterdir()) == sorted(NAMES)
    found = embed(model)
    original = embed(BTokModel.from_pretrained(tmp_path / "base"))
    assert (found - original).abs().max() > 1e-2

    again = BTokModel.from_pretrained(tmp_path / "lora")
    assert torch.equal(embed(again), found)
    with torch.no_grad():
        losses = [m(batch_of(m, targets=True)).ntp_loss for m in (model, again)]
    assert torch.equal(*losses)
    trainable = [[n for n, p in m.named_parameters() if p.requires_grad] for m in (model, again)]
    assert trainable[0] == trainable[1]

    assert export(tmp_path / "lora", tmp_path / "merged") < 1e-5
    merged = BTokModel.from_pretrained(tmp_path / "merged")
    assert (embed(merged) - found).abs().max() < 1e-5
    plain = BTokModel.from_pretrained(tmp_path / "base").state_dict()
    assert merged.state_dict().keys() == plain.keys()


def test_the_last_layer_of_pooled_rows_has_its_adapters(tmp_path):
    model = adapted(base(tmp_path))
    pooled = embed(model)
    model.last_layer = "full"
    assert (pooled - embed(model)).abs().max() < 1e-6


def test_dropout_is_drawn_in_training_mode_only(tmp_path):
    model = adapted(base(tmp_path), Lora(rank=4, dropout=0.5))
    assert torch.equal(embed(model), embed(model))
    model.train()
    assert not torch.equal(embed(model), embed(model))
    model = adapted(tmp_path).train()  # dropout 0
    assert torch.equal(embed(model), embed(model))


def test_adapters_of_a_stock_checkpoint_whose_matrix_grows(tmp_path):
    tiny_backbone(family="qwen3").save_pretrained(tmp_path / "stock")
    tiny_tokenizer().save_pretrained(tmp_path / "stock")
    model = adapted(tmp_path / "stock", num_btoks=3)
    assert model.btok_token_ids == (263, 264, 265)
    model.save_pretrained(tmp_path / "lora")
    assert torch.equal(embed(BTokModel.from_pretrained(tmp_path / "lora")), embed(model))


def test_adapters_of_a_low_precision_model_are_fp32(tmp_path):
    model = adapted(base(tmp_path / "base", dtype=torch.bfloat16))
    kinds = {p.dtype for p in model.parameters() if p.requires_grad}
    assert kinds == {torch.float32}
    assert model.backbone.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "lora")
    assert torch.equal(embed(BTokModel.from_pretrained(tmp_path / "lora")), embed(model))
    assert 0 < export(tmp_path / "lora", tmp_path / "merged") < 2e-2


def test_files_beside_the_adapters_go_along(tmp_path):
    adapted(base(tmp_path / "base")).save_pretrained(tmp_path / "lora")
    tiny_tokenizer().save_pretrained(tmp_path / "lora")
    export(tmp_path / "lora", tmp_path / "merged")
    names = {file.name for file in (tmp_path / "merged").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "btok_config.json"} <= names
    assert not any(name.startswith("adapter_") for name in names)
    with pytest.raises(ValueError, match="merged is not empty"):
        export(tmp_path / "lora", tmp_path / "merged")
    (tmp_path / "merged/btok_config.json").unlink()
    with pytest.raises(
        ValueError, match=r"merged, which has no btok_config.json, so it was never trained"
    ):
        export(tmp_path / "merged", tmp_path / "other")


def test_a_merge_that_moves_embeddings_is_not_written(tmp_path, monkeypatch):
    adapted(base(tmp_path / "base")).save_pretrained(tmp_path / "lora")

    def wrong(backbone):
        merge(backbone)
        backbone.get_input_embeddings().weight.data += 0.01

    monkeypatch.setattr("btok.adapters.merge", wrong)
    with pytest.raises(ValueError, match="merging moves embeddings by"):
        export(tmp_path / "lora", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_adapters_of_other_bottleneck_tokens_are_refused(tmp_path):
    for num_btoks in (3, 4):
        folder = tmp_path / f"lora{num_btoks}"
        adapted(base(tmp_path / f"base{num_btoks}", num_btoks=num_btoks)).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"num_btoks is 3, but .* saved with 4"):
        BTokModel.from_pretrained(tmp_path / "lora4", num_btoks=3)
    settings = (tmp_path / "lora3" / "btok_config.json").read_text()
    (tmp_path / "lora4" / "btok_config.json").write_text(settings)
    with pytest.raises(ValueError, match=r"train the rows .*103.* for K = 3"):
        BTokModel.from_pretrained(tmp_path / "lora4")


def test_adapters_of_another_model_are_refused(tmp_path):
    adapted(base(tmp_path / "base", "qwen3")).save_pretrained(tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_config.json"
    config = json.loads(file.read_text())
    for family, message in (
        ("llama", "architecture is 'llama', but .* saved with 'qwen3'"),
        ("qwen3", r"do not fit .*layers\.2.* shape \[.*\], expected None"),
    ):
        tiny_backbone(family=family).save_pretrained(tmp_path / family)  # two layers, not three
        file.write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / family)}))
        with pytest.raises(ValueError, match=message):
            BTokModel.from_pretrained(tmp_path / "lora")
    file.write_text(json.dumps(config))
    weights = load_file(tmp_path / "lora" / NAMES[1])
    name = next(name for name in weights if "lora_A" in name)
    weights[name] = weights[name][:2].clone()
    save_file(weights, tmp_path / "lora" / NAMES[1])
    with pytest.raises(ValueError, match=r"do not fit .*lora_A.* \[2, 96\], expected \[4, 96\]"):
        BTokModel.from_pretrained(tmp_path / "lora")


def test_a_folder_of_adapters_that_is_not_whole_is_refused(tmp_path):
    model = adapted(base(tmp_path / "base"))
    for name, message in (
        ("btok_config.json", "has adapters but no btok_config.json"),
        ("adapter_model.safetensors", r"has no adapter_model\.safetensors"),
    ):
        model.save_pretrained(tmp_path / name)
        (tmp_path / name / name).unlink()
        with pytest.raises(ValueError, match=message):
            BTokModel.from_pretrained(tmp_path / name)


def test_a_base_model_that_moved_is_named(tmp_path):
    model = adapted(base(tmp_path / "base"))
    model.save_pretrained(tmp_path / "lora")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"adapters of .*base, which is not there; write where"):
        BTokModel.from_pretrained(tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_config.json"
    config = json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "moved")}
    file.write_text(json.dumps(config))
    assert torch.equal(embed(BTokModel.from_pretrained(tmp_path / "lora")), embed(model))


def test_adapters_take_no_others(tmp_path):
    adapted(base(tmp_path / "base")).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match=r"has adapters already.*merge them"):
        BTokModel.from_pretrained(tmp_path / "lora", lora=LORA)


def test_unknown_targets_are_refused(tmp_path):
    with pytest.raises(ValueError, match="qkv_proj"):
        BTokModel.from_pretrained(base(tmp_path), lora=Lora(targets=("qkv_proj",)))


def test_without_peft_the_extra_is_named(tmp_path, monkeypatch):
    adapted(base(tmp_path / "base")).save_pretrained(tmp_path / "lora")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"install the extra btok\[peft\]"):
        BTokModel.from_pretrained(tmp_path / "base", lora=LORA)
    with pytest.raises(ImportError, match=r"install the extra btok\[peft\]"):
        BTokModel.from_pretrained(tmp_path / "lora")
    assert BTokModel.from_pretrained(tmp_path / "base").btok_token_ids == BTOKS[:4]


def test_peft_itself_reads_the_files(tmp_path):
    import peft

    model = adapted(base(tmp_path / "base", "llama"))
    model.save_pretrained(tmp_path / "lora")
    stock = BTokModel.from_pretrained(tmp_path / "base")
    peft.PeftModel.from_pretrained(stock.backbone, tmp_path / "lora")  # puts them in, in place
    assert torch.equal(embed(stock), embed(model))


def test_an_encoder_takes_adapters(tmp_path):
    from btok.encoder import BTokEncoder

    adapted(tiny_checkpoint(tmp_path / "base")).save_pretrained(tmp_path / "lora")
    Processor.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "lora")
    export(tmp_path / "lora", tmp_path / "merged")
    encode = [BTokEncoder.from_pretrained(tmp_path / n).encode for n in ("base", "lora", "merged")]
    base, lora, merged = (
        torch.as_tensor(e(["a", "some words"], show_progress=False)) for e in encode
    )
    assert (lora - merged).abs().max() < 1e-5 < 1e-2 < (lora - base).abs().max()


def test_the_papers_settings_are_the_defaults(tmp_path):
    model = BTokModel.from_pretrained(base(tmp_path), lora=Lora())
    config = model.backbone.peft_config["default"]
    found = (config.r, config.lora_alpha, config.lora_dropout, config.use_dora)
    assert found == (16, 32, 0.05, True)
    linear = model.backbone.model.language_model.layers[0].self_attn.q_proj
    assert linear.scaling == {"default": 2.0}
