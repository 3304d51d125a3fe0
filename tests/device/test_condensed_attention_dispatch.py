"""Attention passes torch's dispatcher by where nothing looks on; else it is an op."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from btok.kernels import CondensedLayout, condensed_attention
from btok_kernels import launch

CUDA = torch.cuda.is_available() and not launch.interpreted()
if not (CUDA or launch.interpreted()):
    pytest.skip("needs CUDA, or TRITON_INTERPRET=1", allow_module_level=True)
module = importlib.import_module("btok_kernels.condensed_attention_triton")

DEVICE = torch.device("cuda" if CUDA else "cpu")
LAYOUT = CondensedLayout.from_lengths([9, 4], [5, 0], 2).to(DEVICE)
FORWARD, BACKWARD = "btok.condensed_attention.default", "btok.condensed_attention_backward.default"


class Seen(TorchDispatchMode):
    """Writes down the library's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "btok":
            self.ops.append(str(func))
        return func(*args, **(kwargs or {}))


def tensors():
    generator = torch.Generator().manual_seed(0)
    q, k, v, d_out = (
        torch.randn(LAYOUT.num_rows, heads, 16, generator=generator).to(DEVICE)
        for heads in (4, 2, 2, 4)
    )
    return [t.requires_grad_() for t in (q, k, v)], d_out


def attend(q, k, v):
    return condensed_attention(q, k, v, LAYOUT, impl="triton")


def results():
    leaves, d_out = tensors()
    out = attend(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, d_out)


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_both_ways_give_the_same_bits(monkeypatch):
    launched = []
    forward = module._forward
    monkeypatch.setattr(module, "_op", lambda *a: pytest.fail("an op, though nothing looks on"))
    monkeypatch.setattr(module, "_forward", lambda *a: launched.append(1) or forward(*a))
    eager = results()
    assert launched
    monkeypatch.undo()
    with Seen() as seen:
        assert equal(eager, results())
    assert seen.ops == [FORWARD, BACKWARD]


def test_a_mode_of_one_direction_sees_that_op():
    wanted = results()
    leaves, d_out = tensors()
    with Seen() as seen:
        out = attend(*leaves)
    assert seen.ops == [FORWARD]
    gradients = torch.autograd.grad(out, leaves, d_out)
    out = attend(*leaves)
    with Seen() as seen:
        again = torch.autograd.grad(out, leaves, d_out)
    assert seen.ops == [BACKWARD]
    assert equal(wanted[1:], gradients) and equal(wanted[1:], again)


def test_no_gradient_is_kept_where_none_is_asked_for():
    leaves, _ = tensors()
    wanted = results()[0]
    with torch.no_grad():
        assert not attend(*leaves).requires_grad
    with torch.inference_mode():
        assert torch.equal(attend(*leaves), wanted)
    detached = [t.detach() for t in leaves]
    assert not attend(*detached).requires_grad


def test_one_leaf_of_three():
    leaves, d_out = tensors()
    for i, wanted in enumerate(results()[1:]):
        mixed = [t if i == j else t.detach() for j, t in enumerate(leaves)]
        (got,) = torch.autograd.grad(attend(*mixed), [leaves[i]], d_out)
        assert torch.equal(got, wanted)


def test_there_is_no_second_derivative():
    leaves, d_out = tensors()
    gradients = torch.autograd.grad(attend(*leaves), leaves, d_out, create_graph=True)
    with pytest.raises(RuntimeError, match="condensed_attention_backward"):
        torch.autograd.grad(gradients[0].sum(), leaves)


def test_fake_tensors_take_its_shape():
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in tensors()[0]]
        tiles = mode.from_tensor(LAYOUT.tiles)
        assert module.attention(*fake, tiles, 0.25).shape == fake[0].shape


def test_a_traced_graph_has_the_op():
    leaves, _ = tensors()
    graph = make_fx(attend)(*leaves)
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert FORWARD in called
    assert torch.equal(graph(*leaves), attend(*leaves))


def test_transforms_are_refused_but_about_it():
    (q, k, v), _ = tensors()
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(lambda q: attend(q, k, v).sum())(q.detach())
    constant = [t.detach() for t in (q, k, v)]
    wanted = attend(*constant)
    got = torch.vmap(lambda x: x * attend(*constant))(torch.ones(2, device=DEVICE))
    assert equal(got, [wanted, wanted])


def test_tiles_that_change_before_the_backward_are_noticed():
    leaves, d_out = tensors()
    layout = CondensedLayout.from_lengths([9, 4], [5, 0], 2).to(DEVICE)
    out = condensed_attention(*leaves, layout, impl="triton")
    layout.tiles.add_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out, leaves, d_out)
