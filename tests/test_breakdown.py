"""bench/breakdown.py: which part an operation's time goes to."""

from __future__ import annotations

import torch
from helpers import tiny_backbone
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from bench.breakdown import LABEL, breakdown, labelled, parts_of, table
from btok.model import BTokModel


def profiled(call):
    call()
    with (
        profile(activities=[ProfilerActivity.CPU]) as profiler,
        torch.profiler.record_function(LABEL + "other"),
    ):
        call()
    return breakdown(profiler.events())


def test_a_backward_operation_belongs_to_the_part_of_its_forward_operation():
    large, small = torch.randn(600, 600, requires_grad=True), torch.randn(1, 600)
    product = labelled("product", lambda x: x @ large)
    sine = labelled("sine", torch.sin)
    found = profiled(lambda: sine(product(large) + small).sum().backward())
    assert found.keys() == {"product", "sine", "other"}
    (forth, back), (_, of_sine) = found["product"], found["sine"]
    assert back > forth > 0 < of_sine
    assert back > 5 * of_sine  # two products of 600^3


def test_what_a_checkpoint_makes_again_is_its_parts_too():
    large = torch.randn(600, 600, requires_grad=True)
    product = labelled("product", lambda x: x @ large)
    kept = profiled(lambda: product(large).sum().backward())["product"]
    again = profiled(lambda: checkpoint(product, large, use_reentrant=False).sum().backward())
    assert again["product"][1] > 1.2 * kept[1]


def test_the_parts_of_a_model():
    backbone = tiny_backbone()
    model = BTokModel.from_backbone(backbone, btok_token_ids=(100, 101))
    batch = model.pack([{"input_ids": list(range(2, 40))}])
    with parts_of(backbone):
        found = profiled(lambda: model(batch).embeddings.sum().backward())
    assert all(min(found[part]) > 0 for part in ("attention", "MLP", "layers, the rest"))
    assert not any(name in vars(m) for m in backbone.modules() for name in ("forward",))
    lines = table("step", {"a": [3.0, 1.0], "b": [6.0, 6.0]}).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["b", "6.0", "6.0", "75.0%"],
        ["a", "3.0", "1.0", "25.0%"],
    ]
