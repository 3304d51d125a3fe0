"""The last layer for the pooled rows alone against the full one."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import BTOKS, FAMILIES, PREFIX, SUFFIX, TINY, VISION, text, tiny_backbone, vision

from btok.last_layer import pooled_rows_only
from btok.model import BTokModel
from btok.packing import pack

POOLINGS = [(0, "last"), (1, "btok"), (4, "btok"), (8, "btok"), (4, "last")]
TEXTS = [text(length, length) for length in (1, 7, 1, 30, 4, 60, 2, 8, 9, 29)]
IMAGES = [vision([(1, 4, 6)], 1), vision([(1, 4, 4), (1, 6, 4)], 2)]


def tiny(family: str, num_btoks: int = 4, layers: int = 3, **settings) -> BTokModel:
    """In evaluation mode; of three layers, since Qwen3-VL's first two take vision features."""
    backbone = tiny_backbone(family=family, layers=layers).eval()
    settings = {"pooling": "btok" if num_btoks else "last"} | settings
    return BTokModel.from_backbone(backbone, btok_token_ids=BTOKS[:num_btoks], **settings)


def batch_of(model: BTokModel, target=None, sources=None):
    config = model.backbone.config
    if sources is None:
        images = IMAGES if config.model_type in VISION else []
        sources = TEXTS[:3] + [TINY[config.model_type].side(side) for side in images] + TEXTS[3:]
    return pack(
        [(source, target) for source in sources],
        btok_token_ids=model.btok_token_ids,
        prefix_ids=PREFIX,
        suffix_ids=SUFFIX,
        backbone_config=config,
    )


def run(model: BTokModel, batch):
    """The output, and how many rows the last MLP, its query projection and the norm saw."""
    decoder = model.family.decoder(model.backbone)
    last, seen = decoder.layers[-1], []
    hooks = [
        module.register_forward_hook(lambda _, arguments, __: seen.append(arguments[0][..., 0]))
        for module in (last.self_attn.q_proj, last.self_attn.o_proj, last.mlp, decoder.norm)
    ]
    output = model(batch)
    for hook in hooks:
        hook.remove()
    return output, [rows.numel() for rows in seen]


@pytest.mark.parametrize(("num_btoks", "pooling"), POOLINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_pooled_equals_full(family, num_btoks, pooling):
    model = tiny(family, num_btoks, pooling=pooling)
    with torch.no_grad():  # biases and the norms' weights are 0 and 1 in a new model
        generator = torch.Generator().manual_seed(0)
        for weight in model.backbone.model.parameters():
            if weight.ndim == 1:
                weight += 0.3 * torch.randn(weight.shape, generator=generator)
    for module in model.modules():
        if hasattr(module, "scaling") and hasattr(module, "q_proj"):
            module.scaling *= 1.5  # not the default of torch's attention
    batch = batch_of(model)
    rows = len(batch) * (num_btoks if pooling == "btok" else 1)
    with torch.no_grad():
        short, counts = run(model, batch)
        model.last_layer = "full"
        full, full_counts = run(model, batch)
    assert counts == [rows] * 4
    assert full_counts == [len(batch.input_ids)] * 4
    assert short.ntp_loss is None
    assert short.embeddings.shape == full.embeddings.shape == (len(batch), 64)
    error = (short.embeddings - full.embeddings).abs().max(1).values
    assert error.max() < 1e-6, f"sample {int(error.argmax())}: {error.max():.2e}"


def test_an_embedding_does_not_depend_on_its_batch():
    model = tiny("qwen2_vl")
    sources = IMAGES + TEXTS
    with torch.no_grad():
        together = model(batch_of(model)).embeddings
        order = [*range(2, 5), 0, 1, *range(5, len(sources))]
        alone = [model(batch_of(model, sources=[sources[i]])).embeddings for i in order]
    assert (together - torch.cat(alone)).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    model = tiny("qwen3").to(dtype)
    with torch.no_grad():
        short = model(batch_of(model)).embeddings
        model.last_layer = "full"
        full = model(batch_of(model)).embeddings
    assert short.dtype == full.dtype == torch.promote_types(dtype, torch.float32)
    assert (short - full).abs().max() < (1e-13 if dtype == torch.float64 else 0.02)


def test_a_sequence_with_broken_values_breaks_no_other():
    model = tiny("qwen2_vl")
    sources = [TEXTS[1], IMAGES[0] | {"pixel_values": IMAGES[0]["pixel_values"] * torch.nan}]
    for order in (sources, sources[::-1]):
        with torch.no_grad():
            found = model(batch_of(model, sources=order)).embeddings
        assert [bool(z.isnan().any()) for z in found] == [s is sources[1] for s in order]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("family", ["qwen3_vl", "llama"])
def test_the_model_stays_as_it_was(family, fails):
    model = tiny(family)
    batch = batch_of(model)
    decoder = model.family.decoder(model.backbone)
    before = [(name, id(module)) for name, module in model.named_modules()]
    attributes = {id(m): (set(vars(m)), dict(m._modules)) for m in model.modules()}
    weights = copy.deepcopy(model.state_dict())
    pointers = [weight.data_ptr() for weight in model.parameters()]
    with torch.no_grad():
        if fails:
            hook = decoder.layers[-1].mlp.register_forward_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(batch)
            hook.remove()
        else:
            model(batch)
    assert [(name, id(module)) for name, module in model.named_modules()] == before
    assert {id(m): (set(vars(m)), dict(m._modules)) for m in model.modules()} == attributes
    assert [weight.data_ptr() for weight in model.parameters()] == pointers
    assert all(torch.equal(weights[name], w) for name, w in model.state_dict().items())
    assert run(model, batch)[1] == [len(batch.input_ids)] * 4  # with gradients


def test_the_view_shares_the_weights():
    model = tiny("llama")
    decoder = model.backbone.model
    view = pooled_rows_only(decoder, 4)
    pointers = {weight.data_ptr() for weight in decoder.parameters()}
    assert {weight.data_ptr() for weight in view.parameters()} == pointers
    assert len(view.layers) == len(decoder.layers)


@pytest.mark.parametrize("why", ["gradients", "targets", "mean", "training", "full"])
def test_the_full_layer_otherwise(why):
    pooling = "mean" if why == "mean" else "btok"
    last_layer = "full" if why == "full" else "pooled"
    model = tiny("qwen2_vl", pooling=pooling, last_layer=last_layer).train(why == "training")
    batch = batch_of(model, text(3, 0) if why == "targets" else None)
    with torch.set_grad_enabled(why == "gradients"):
        output, counts = run(model, batch)
    assert counts == [len(batch.input_ids)] * 4
    assert (output.ntp_loss is not None) == (why == "targets")
    assert output.embeddings.requires_grad == (why == "gradients")


def test_targets_without_labels_count_as_targets():
    model = tiny("llama")
    batch = pack(
        [(text(5, 0), {"input_ids": []})],
        btok_token_ids=BTOKS[:4],
        prefix_ids=PREFIX,
        suffix_ids=(),
        backbone_config=model.backbone.config,
    )
    assert batch.num_targets == 0
    with torch.no_grad():
        assert run(model, batch)[1] == [5 + 4 + len(PREFIX)] * 4


def test_vision_features_that_reach_the_last_layer_need_all_of_it():
    model = tiny("qwen3_vl", layers=2)  # both take vision features
    batch = batch_of(model)
    with torch.no_grad():
        assert run(model, batch)[1] == [len(batch.input_ids)] * 4


def test_one_layer_is_the_last():
    model = tiny("qwen3", layers=1)
    with torch.no_grad():
        short = model(batch_of(model)).embeddings
        model.last_layer = "full"
        full = model(batch_of(model)).embeddings
    assert (short - full).abs().max() < 1e-6


def test_an_unknown_last_layer_is_refused():
    with pytest.raises(ValueError, match="last_layer is 'half', expected one of"):
        tiny("llama", last_layer="half")


def test_the_switch_is_not_saved(tmp_path):
    tiny("llama", last_layer="full").save_pretrained(tmp_path)
    assert "last_layer" not in (tmp_path / "btok_config.json").read_text()
    assert BTokModel.from_pretrained(tmp_path).last_layer == "pooled"
    assert BTokModel.from_pretrained(tmp_path, last_layer="full").last_layer == "full"
