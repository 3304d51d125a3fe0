"""The lines of Python that a GPU runs, on a pretend one: results equal the CPU's to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import FAMILIES, VISION, tiny_module
from pretend_cuda import Cuda, PretendCuda

from btok.data.records import Side
from btok.encoder import BTokEncoder


def picture(height, width, seed):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


SHOWN = [
    Side("a picture", [picture(20, 30, 1)]),
    Side("", [picture(12, 9, 2), picture(30, 8, 3)]),
    Side("a clip", video=[picture(20, 16, seed) for seed in range(3)]),
]


def test_tensors_of_two_devices_do_not_meet():
    with PretendCuda() as device:
        here = torch.arange(6.0, device="cuda")
        assert isinstance(here, Cuda) and here.device.type == "cuda"
        for meet in (
            lambda: here + torch.ones(6),
            lambda: torch.cat([here, torch.ones(2)]),
            lambda: torch.nn.functional.linear(torch.ones(2, 6), here[None]),
            lambda: torch.where(torch.ones(6) > 0, here, here),
        ):
            with pytest.raises(RuntimeError, match="all tensors to be on the same device"):
                meet()
        with pytest.raises(TypeError, match="to numpy"):
            here.numpy()
        assert not device.waits  # nothing of the project asked
    assert (here.values * 2).tolist() == [0, 2, 4, 6, 8, 10]


def test_gradients_go_through_a_move_and_tied_weights_stay_tied():
    with PretendCuda():
        x = torch.ones(3, requires_grad=True)
        (x.to("cuda") * torch.arange(3.0, device="cuda")).sum().backward()
        model = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
        model[1].weight = model[0].weight
        model.to("cuda")
        assert model[1].weight is model[0].weight and isinstance(model[0].weight, Cuda)
        model[0](torch.ones(1, 2, device="cuda")).sum().backward()
        assert isinstance(model[0].weight.grad, Cuda)
    assert x.grad.tolist() == [0, 1, 2]


@pytest.mark.parametrize("pooling", ["btok", "last", "mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoder(family, pooling):
    sides = [Side("a text"), Side("b" * 30), *(SHOWN if family in VISION else [])]

    def encoder():
        model, processor = tiny_module(family)
        model.settings = type(model.settings)(model.btok_token_ids, pooling)
        return BTokEncoder(model, processor)

    expected = encoder().encode(sides, batch_tokens=60)
    there = encoder()
    with PretendCuda():
        there.model.to("cuda")
        found = there.encode(sides, batch_tokens=60)
    assert np.array_equal(found, expected)
