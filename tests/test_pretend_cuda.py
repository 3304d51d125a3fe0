"""The lines of Python that a GPU runs, on a pretend one: results equal the CPU's to the bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from helpers import FAMILIES, VISION, one_step, tiny_module
from pretend_cuda import Cuda, PretendCuda
from test_step import PAIRS, model_with

from btok.data.records import Side
from btok.data.samples import pair_samples
from btok.encoder import BTokEncoder
from btok.evaluation import runner
from btok.kernels import CondensedLayout, condensed_attention
from btok.model import BTokModel
from train.main import main
from train.pocket import data
from train.recipes import Recipe


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


ENCODERS = [("qwen2_vl", "last"), ("qwen2_vl", "mean"), *((family, "btok") for family in FAMILIES)]


@pytest.mark.parametrize(("family", "pooling"), ENCODERS)
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


def test_a_device_without_a_number_is_the_current_one():
    q = torch.randn(6, 2, 16)
    layout = CondensedLayout.from_lengths([2], [2], 2)
    expected = condensed_attention(q, q, q, layout)
    with PretendCuda():
        there = q.to("cuda")
        layouts = [layout.to("cuda"), layout.to("cuda:0"), layout.to("cuda").to("cuda:0")]
        layouts.append(CondensedLayout(layout.bounds, 6, torch.device("cuda")))
        found = [condensed_attention(there, there, there, each).cpu() for each in layouts]
    assert all(torch.equal(each, expected) for each in found)
    assert layouts[0].device == torch.device("cuda", 0)


STEPS = [  # at least one of each lever's settings beside each family's
    {},
    {"gradcache": True},
    {"gradcache": True, "chunk_tokens": None},
    {"chunk_tokens": None, "checkpoint": True},
    {"gradcache": True, "checkpoint": True},
    {"captioning": True},
    {"captioning": True, "train_all": True, "checkpoint": True},
    {"train_all": True},
    {"train_all": True, "gradcache": True},
    {"dora": False, "gradcache": True},
    {"dropout": 0.1},
    {"dropout": 0.1, "gradcache": True},
    {"reuse_vision": True, "vision_memory": 1 << 30},
    {"reuse_vision": True, "vision_memory": 1 << 30, "gradcache": True},
    {"reuse_vision": True, "vision_memory": 3000},
    {"reuse_vision": True, "vision_memory": 0, "gradcache": True},
    {"num_btoks": 0, "pooling": "last", "gradcache": True},
    {"num_btoks": 0, "pooling": "mean"},
    {"ntp_weight": 0.0, "gradcache": True},
    {"condense": False, "negatives": "group"},
    {"dtype": "bfloat16", "gradcache": True},
    {"dtype": "bfloat16", "train_all": True},
]
EVERY = [("qwen2_vl", case) for case in STEPS]
EVERY += [
    (family, {"gradcache": gradcache, "reuse_vision": gradcache, "vision_memory": 3000})
    for family in FAMILIES[1:]
    for gradcache in (False, True)
]


@pytest.mark.parametrize(("family", "case"), EVERY, ids=str)
def test_a_training_step(family, case):
    """Losses and every gradient, from pairs with pictures and clips where the model sees."""
    pairs = PAIRS if family in VISION else [p for p in PAIRS if not p.query.images][-3:]
    expected = step(family, pairs, **case)
    with PretendCuda():
        found = step(family, pairs, device="cuda", **case)
    assert found[1] == expected[1] and all(np.isfinite(expected[1]))
    assert found[0].keys() == expected[0].keys() and len(found[0]) > 4
    for name, gradient in expected[0].items():
        assert torch.equal(found[0][name], gradient), name
    assert any(gradient.abs().max() > 0 for gradient in expected[0].values())


def step(
    family,
    pairs,
    *,
    device="cpu",
    dora=True,
    dropout=0.0,
    checkpoint=False,
    train_all=False,
    captioning=False,
    num_btoks=4,
    **settings,
):
    """Gradients by name and losses, on the CPU, of a step on a device."""
    model, processor = model_with(dropout, checkpoint, train_all, family, dora)
    ids = model.btok_token_ids[:num_btoks]
    model.settings = replace(
        model.settings, btok_token_ids=ids, pooling=settings.pop("pooling", "btok")
    )
    options = {"chunk_tokens": 120, "groups_per_batch": 4, "reuse_vision": False} | settings
    recipe = Recipe(caption_steps=0, reading_steps=0, steps=1, **options)
    generate = captioning or recipe.ntp_weight > 0
    samples = pair_samples(pairs, processor, generate=generate)
    model.to(device)
    torch.manual_seed(7)
    losses, *_ = one_step(model, processor, recipe, pairs, samples, 0, captioning)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(isinstance(g, Cuda) == (device == "cuda") for g in found.values())
    found = {name: g.values if isinstance(g, Cuda) else g for name, g in found.items()}
    return found, [float(loss) for loss in losses]


def test_an_evaluation():
    """The scores, and what every query finds, are the CPU's."""
    tasks = [task for task in data.tasks(40) if task.name in ("I-RET", "VisDoc")]

    def scored(device):
        model, processor = tiny_module()
        encoder, found = BTokEncoder(model.to(device), processor), {}
        encode = partial(encoder.encode, show_progress=False)
        return runner.evaluate(encode, tasks, retrieved=found), found

    expected = scored("cpu")
    with PretendCuda():
        there = scored("cuda")
    assert there == expected and len(expected[1]["I-RET"]) == 40


def test_a_run_stopped_and_resumed(tmp_path, capsys, monkeypatch):
    """`train/main.py` from its command line on: log, weights and moments are the CPU's bytes."""
    # the optimizer that a GPU has, on both
    options = {"fused": True}
    adamw = torch.optim.AdamW
    monkeypatch.setattr("torch.optim.AdamW", lambda *a, **k: adamw(*a, **{**k, **options}))
    words = "--steps 2 --caption-steps 1 --eval-queries 0 --group-size 4 --chunk-tokens 300"
    words += " --checkpoint-every 1 --gradcache true --muon-rate 0 --output"
    assert main([*words.split(), str(tmp_path / "cpu")]) == 0
    with PretendCuda():
        assert main([*words.split(), str(tmp_path / "there")]) == 0
        shutil.rmtree(tmp_path / "there" / "checkpoint-3")  # as if it had been stopped before
        assert main([*words.split(), str(tmp_path / "there")]) == 0
    assert "going on from" in capsys.readouterr().out
    logs = [(tmp_path / name / "log.jsonl").read_text().splitlines() for name in ("cpu", "there")]
    expected, found = ([{**json.loads(row), "seconds": 0} for row in log] for log in logs)
    assert found == expected and len(found) == 3
    for file in ("model.safetensors", "optimizer.safetensors"):
        a, b = (tmp_path / name / "checkpoint-3" / file for name in ("cpu", "there"))
        assert a.read_bytes() == b.read_bytes(), file


@pytest.mark.parametrize(
    ("family", "reuse", "pooling"),
    [
        *((family, reuse, "btok") for family in VISION for reuse in (False, True)),
        *(("qwen2_vl", False, pooling) for pooling in ("last", "mean")),
    ],
)
def test_the_host_waits_in_no_packed_pass(family, reuse, pooling, monkeypatch):
    """Forwards and backwards, the vision tower's too; not counted is what Triton's kernels do in
    the place of the CPU's, and what a step prints."""
    passes, forward = [], BTokModel.forward
    monkeypatch.setattr(BTokModel, "forward", lambda *a, **k: passes.append(1) or forward(*a, **k))
    model, processor = model_with(family=family)
    model.settings = replace(model.settings, pooling=pooling)
    samples = pair_samples(PAIRS, processor)
    recipe = Recipe(caption_steps=0, gradcache=True, chunk_tokens=120, reuse_vision=reuse)
    with PretendCuda() as device:
        model.to("cuda")
        device.waits.clear()
        one_step(model, processor, recipe, PAIRS, samples)
    # transformers' tower of Idefics3 asks once a call whether tiles are padded
    most = {"idefics3": len(passes), "smolvlm": len(passes)}.get(family, 0)
    assert len(passes) > 10 and sum(device.waits.values()) <= most, device.waits
