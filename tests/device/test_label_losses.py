"""The generative loss through Liger's kernel: torch's, row by row, and its gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from btok import label_loss
from btok.label_loss import label_losses

if reason := label_loss._no_liger_here():
    pytest.skip(reason, allow_module_level=True)

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 0.02} if ON_GPU else {torch.float32: 1e-5}
ROWS, HIDDEN, VOCABULARY = 37, 16, 1000  # three chunks of its kernel


def results(impl, dtype, bias=False, frozen=False):
    """Losses and gradients by `impl`, or in fp64 by torch, of losses that weigh differently."""
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN).to(DEVICE, dtype)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=bias).to(DEVICE, dtype).requires_grad_(not frozen)
    labels, weights = torch.randint(VOCABULARY, (ROWS,)).to(DEVICE), torch.rand(ROWS).to(DEVICE)
    if impl is None:
        hidden, head, weights = hidden.double(), head.double(), weights.double()
        losses = F.cross_entropy(head(hidden.requires_grad_()), labels, reduction="none")
    else:
        losses = label_losses(head, hidden.requires_grad_(), labels, impl)
    (losses * weights).sum().backward()
    return losses.detach(), hidden.grad, *(parameter.grad for parameter in head.parameters())


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("bias", [False, True])
def test_losses_and_gradients_are_those_of_torch(dtype, bias):
    for got, want in zip(results("liger", dtype, bias), results(None, dtype, bias), strict=True):
        assert (got - want).abs().max() <= BOUNDS[dtype] * want.abs().max()


def test_a_frozen_head_gets_no_gradient():
    _, hidden, weight = results("liger", torch.float32, frozen=True)
    assert weight is None
    assert (hidden - results(None, torch.float32)[1]).abs().max() <= 1e-5


def test_auto_takes_it_on_a_gpu_alone():
    auto = results("auto", torch.float32)[0]
    assert auto.equal(results("liger" if ON_GPU else "chunked", torch.float32)[0])


def test_a_head_of_another_class_is_refused():
    class Wrapped(nn.Linear):
        pass

    hidden, labels = torch.randn(2, 4, device=DEVICE), torch.tensor([0, 1], device=DEVICE)
    with pytest.raises(RuntimeError, match=r"the head is a Wrapped, it takes a plain nn\.Linear"):
        label_losses(Wrapped(4, 9).to(DEVICE), hidden, labels, "liger")


@pytest.mark.parametrize(
    ("found", "message"),
    [(None, "is not installed; the extra is btok"), ("0.8.1", "0.8.1 has wrong gradients")],
)
def test_a_missing_or_wrong_version_is_refused(found, message, monkeypatch):
    def version(name):
        if found is None:
            raise label_loss.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(label_loss, "version", version)
    monkeypatch.setattr(label_loss, "_no_liger_here", label_loss._no_liger_here.__wrapped__)
    hidden, labels = torch.randn(2, 4, device=DEVICE), torch.tensor([0, 1], device=DEVICE)
    with pytest.raises(RuntimeError, match=message):
        label_losses(nn.Linear(4, 9).to(DEVICE), hidden, labels, "liger")
