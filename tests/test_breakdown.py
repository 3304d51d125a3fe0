"""examples/studies/breakdown.py: which part an operation's time goes to."""

from __future__ import annotations

import pytest
import torch
from helpers import tiny_backbone
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from btok.model import BTokModel
from examples.studies import breakdown


def profiled(call):
    """What a call spent, by part."""
    call()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        breakdown.labelled("other", call)()
    return breakdown.breakdown(profiler.events())


@pytest.fixture
def one_each(monkeypatch):
    """Some operations are counted, not timed."""
    names = ("aten::mm", "aten::sin", "aten::cos")
    monkeypatch.setattr(breakdown, "spent_in", lambda event: float(event.name in names))


def test_a_backward_operation_belongs_to_the_part_of_its_forward_operation(one_each):
    weight = torch.randn(60, 60, requires_grad=True)
    product = breakdown.labelled("product", lambda x: x @ weight)
    sine = breakdown.labelled("sine", torch.sin)
    found = profiled(lambda: sine(product(weight)).sum().backward())
    assert found == {"product": [1.0, 2.0], "sine": [1.0, 1.0], "other": [0.0, 0.0]}


def test_what_a_checkpoint_makes_again_is_its_parts_too(one_each):
    weight = torch.randn(60, 60, requires_grad=True)
    product = breakdown.labelled("product", lambda x: x @ weight)
    again = lambda: checkpoint(product, weight, use_reentrant=False)  # noqa: E731
    found = profiled(lambda: again().sum().backward())
    assert found["product"] == [1.0, 3.0] and found["other"] == [0.0, 0.0]


def test_the_parts_of_a_model():
    backbone = tiny_backbone()
    model = BTokModel.from_backbone(backbone, btok_token_ids=(100, 101))
    batch = model.pack([{"input_ids": list(range(2, 40))}])
    breakdown.label_modules(backbone)
    found = profiled(lambda: model(batch).embeddings.sum().backward())
    assert all(min(found[part]) > 0 for part in ("attention", "MLP", "layers, the rest"))
    lines = breakdown.table("step", {"a": [3.0, 1.0], "b": [6.0, 6.0]}).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["b", "6.0", "6.0", "75.0%"],
        ["a", "3.0", "1.0", "25.0%"],
    ]
