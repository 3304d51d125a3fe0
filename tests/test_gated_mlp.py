"""The MLP that writes over its gate against transformers' own."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import BTOKS, FAMILIES, tiny_backbone
from torch import nn

from bench.harness import peak
from btok.families import family_of
from btok.gated_mlp import GatedMLP, use_gated_mlps
from btok.model import BTokModel


def pairs(backbone):
    """(transformers' own, ours) of the same weights, from a backbone that is then changed."""
    stock = copy.deepcopy(backbone)
    use_gated_mlps(backbone)
    ours = {name: m for name, m in backbone.named_modules() if isinstance(m, GatedMLP)}
    return [(stock.get_submodule(name), m) for name, m in ours.items()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_bits_are_those_of_transformers(family, dtype):
    backbone = tiny_backbone(family=family).to(dtype)
    names = list(backbone.state_dict())
    found = pairs(backbone)
    assert list(backbone.state_dict()) == names
    assert len(found) >= len(family_of(backbone.config).decoder(backbone).layers)
    for stock, ours in found:
        results = []
        x = torch.randn(2, 3, ours.gate_proj.in_features).to(dtype)
        for mlp in (stock, ours):
            with torch.no_grad():
                kept = x.clone()
                results.append([mlp(kept)])
                assert kept.equal(x)
            y = x.clone().requires_grad_()
            out = mlp(y)
            out.square().sum().backward()
            results[-1] += [out, y.grad, *(weight.grad for weight in mlp.parameters())]
        for want, got in zip(*results, strict=True):
            assert got.equal(want)


def test_one_tensor_less_without_gradients():
    backbone = tiny_backbone()
    (stock, ours), *_ = pairs(backbone)
    wide = 2000
    for mlp in (stock, ours):
        for name, sizes in (("gate", (8, wide)), ("up", (8, wide)), ("down", (wide, 8))):
            setattr(mlp, f"{name}_proj", nn.Linear(*sizes, bias=False))
    x = torch.randn(500, 8)
    with torch.no_grad():
        most, least = (peak(lambda mlp=mlp: mlp(x)) for mlp in (stock, ours))
    size = 4 * len(x) * wide
    assert (most // size, least // size) == (3, 2)


def test_a_model_has_them_once_and_others_are_left_as_they_are():
    backbone = tiny_backbone(family="qwen2_vl")
    backbone.model.language_model.layers[1].mlp.act_fn = nn.GELU()
    model = BTokModel.from_backbone(backbone, btok_token_ids=BTOKS)
    first, second, *_ = (layer.mlp for layer in backbone.model.language_model.layers)
    assert isinstance(first, GatedMLP) and not isinstance(second, GatedMLP)
    BTokModel.from_backbone(model.backbone, btok_token_ids=BTOKS)
    again = backbone.model.language_model.layers[0].mlp
    assert isinstance(again, GatedMLP) and again.gate_proj is first.gate_proj
    assert isinstance(again.gate_proj, nn.Linear)
