"""bench/breakdown.py: which part an operation's time goes to."""

from __future__ import annotations

import torch
from helpers import tiny_backbone
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from bench.breakdown import LABEL, breakdown, labelled, parts_of, table
from btok.model import BTokModel


def profiled(call, **options):
    call()
    with (
        profile(activities=[ProfilerActivity.CPU]) as profiler,
        torch.profiler.record_function(LABEL + "other"),
    ):
        call()
    return breakdown(profiler.events(), **options)


def one_each(event):
    return float(event.name in ("aten::mm", "aten::sin", "aten::cos"))


def test_a_backward_operation_belongs_to_the_part_of_its_forward_operation():
    weight = torch.randn(60, 60, requires_grad=True)
    product, sine = labelled("product", lambda x: x @ weight), labelled("sine", torch.sin)
    found = profiled(lambda: sine(product(weight)).sum().backward(), spent_in=one_each)
    assert found == {"product": [1.0, 2.0], "sine": [1.0, 1.0], "other": [0.0, 0.0]}


def test_what_a_checkpoint_makes_again_is_its_parts_too():
    weight = torch.randn(60, 60, requires_grad=True)
    product = labelled("product", lambda x: x @ weight)
    again = lambda: checkpoint(product, weight, use_reentrant=False)  # noqa: E731
    found = profiled(lambda: again().sum().backward(), spent_in=one_each)
    assert found["product"] == [1.0, 3.0] and found["other"] == [0.0, 0.0]


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
