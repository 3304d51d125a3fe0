"""One training step: microbatches, GradCache, checkpointing, reused vision and ranks give the
same losses and gradients, which are those of the reference's two passes."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    BTOKS,
    FAMILIES,
    PREFIX,
    SUFFIX,
    VISION,
    gloo,
    gradients,
    one_step,
    spawn,
    tiny_backbone,
    tiny_module,
    worst_gradient,
)
from test_model import packed, samples_of, two_pass
from torch.utils.flop_counter import FlopCounterMode

from btok import adapters, label_loss
from btok.data.records import NTP_SIDES, Pair, Side
from btok.data.samples import pair_samples
from btok.model import BTokModel
from btok.packing import group_by_tokens
from btok.vision import vision_of
from train.microbatches import Packing
from train.recipes import Recipe, load
from train.step import count_patches, model_flops

BASE = Recipe(
    caption_steps=0, negatives="batch", ntp_weight=0.7, groups_per_batch=4, reuse_vision=False
)
WORDS = ["red", "blue", "seven", "five", "circle", "square", "above", "left", "of", "page"]


def words(rng, most):
    return " ".join(rng.choices(WORDS, k=rng.randrange(1, most)))


def make_pairs(count=12):
    """Images, videos and texts of many lengths; the third quarter has texts alone."""
    rng, pixels = random.Random(0), np.random.default_rng(0)

    def picture():
        height, width = (8 * rng.randrange(1, 4) for _ in range(2))
        return pixels.integers(0, 256, (height, width, 3), dtype=np.uint8)

    pairs = []
    for i in range(count):
        query = Side(words(rng, 9), images=[picture() for _ in range(rng.randrange(3))])
        positive = Side(words(rng, 5), video=[picture()] * 3 if i % 3 == 0 else [])
        if i // (count // 4) == 2:
            query, positive = Side(words(rng, 9)), Side(words(rng, 5))
        side = "both" if i < 4 else NTP_SIDES[i % 4]  # ranks differ in targets
        hard = [Side(words(rng, 4))]
        pairs.append(Pair(query, positive, hard, "some", side, positive_id=str(i % 7)))
    return pairs


PAIRS = make_pairs()


def model_with(dropout=0.0, checkpoint=False, train_all=False, family="qwen2_vl", dora=True):
    """The tiny model with adapters that are no longer zero; or trained as a whole."""
    model, processor = tiny_module(family)
    if not train_all:
        lora = adapters.Lora(rank=4, alpha=8, dropout=dropout, dora=dora)
        adapters.attach(model.backbone, lora, model.btok_token_ids, "tiny")
        torch.manual_seed(1)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.1)
    if checkpoint:
        model.checkpoint_activations()
    return model.train(), processor


def run(
    pairs=PAIRS,
    *,
    dropout=0.0,
    checkpoint=False,
    train_all=False,
    reduction=None,
    captioning=False,
    **settings,
):
    model, processor = model_with(dropout, checkpoint, train_all)
    if reduction:
        model.settings = dataclasses.replace(model.settings, ntp_reduction=reduction)
    recipe = dataclasses.replace(BASE, **settings)
    generate = captioning or recipe.ntp_weight > 0
    samples = pair_samples(pairs, processor, generate=generate)
    torch.manual_seed(7)
    done = one_step(model, processor, recipe, pairs, samples, 0, captioning)
    losses, tokens, flops = done
    assert tokens > 100 and flops > 0
    return gradients(model), [float(loss) for loss in losses]


def compare(got, want, name):
    error, tensor = worst_gradient(got[0], want[0])
    assert error < 1e-5, f"{name}, {tensor}: {error:.1e}"
    assert got[1] == pytest.approx(want[1], rel=1e-6), name


@pytest.mark.parametrize("reduction", ["sample_mean", "token_mean"])
def test_every_lever_gives_the_same_gradients(reduction):
    """At dropout 0; chunks of one sample, of some, of all, sorted or not."""
    want = run(reduction=reduction)
    assert all(loss > 0.1 for loss in want[1][:3])
    levers = itertools.product((None, 120, 1, 1 << 20), *[(False, True)] * 3)
    for chunk, gradcache, checkpoint, reuse in levers:
        options = {"chunk_tokens": chunk, "gradcache": gradcache, "reuse_vision": reuse}
        got = run(checkpoint=checkpoint, reduction=reduction, vision_memory=3000, **options)
        compare(got, want, (chunk, gradcache, checkpoint, reuse))


def test_a_model_trained_as_a_whole():
    want = run(train_all=True)
    for gradcache, checkpoint in ((True, False), (False, True), (True, True)):
        options = {"chunk_tokens": 120, "gradcache": gradcache, "reuse_vision": True}
        compare(run(train_all=True, checkpoint=checkpoint, **options), want, options)


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_norms_of_dora_are_made_once_a_step(monkeypatch, dropout):
    """And every result is that of norms made anew in each forward, as peft has it."""
    options = {"dropout": dropout, "chunk_tokens": 120, "gradcache": True, "checkpoint": True}
    model, calls = model_with()[0], []
    kind = next(type(m) for m in model.modules() if hasattr(m, "get_weight_norm"))
    layers = sum(isinstance(m, kind) for m in model.modules())
    norm = kind.get_weight_norm
    monkeypatch.setattr(kind, "get_weight_norm", lambda *a, **k: calls.append(0) or norm(*a, **k))
    model_with()
    making = len(calls)  # peft makes one where it begins
    calls.clear()
    got = run(**options)
    assert len(calls) == making + layers
    monkeypatch.setattr(adapters, "norms_once", lambda backbone: contextlib.nullcontext())
    calls.clear()
    compare(got, run(**options), "norms")
    assert len(calls) > making + 4 * layers
    with adapters.norms_once(model.backbone):
        pass
    assert not any("get_weight_norm" in vars(m) for m in model.modules())


def test_bfloat16_with_adapters():
    """Close to the same rounded weights in fp32; no product of the adapters is in fp32."""
    results, products = [], []
    linear = F.linear

    def watched(x, weight, bias=None):
        out = linear(x, weight, bias)
        products.append(out.dtype)
        return out

    for dtype in ("float32", "bfloat16"):
        model, processor = model_with()
        with torch.no_grad():
            for p in model.parameters():
                if not p.requires_grad:
                    p.data = p.bfloat16().to(getattr(torch, dtype))
        recipe = dataclasses.replace(BASE, dtype=dtype, gradcache=True, chunk_tokens=120)
        samples = pair_samples(PAIRS, processor)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "linear", watched)
            products.clear()
            losses = one_step(model, processor, recipe, PAIRS, samples, 0).losses
        assert set(products) == {getattr(torch, dtype)}
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
        assert grads.dtype == torch.float32
        results.append((grads, losses))
    (want, exact), (got, rounded) = results
    assert F.cosine_similarity(got, want, dim=0) > 0.98
    assert rounded.ntp.item() == pytest.approx(exact.ntp.item(), rel=2e-2)
    assert rounded.contrastive.item() == pytest.approx(exact.contrastive.item(), rel=0.1)


def test_dropout_is_drawn_alike_in_both_passes():
    for chunk, checkpoint in itertools.product((None, 120), (False, True)):
        want = run(dropout=0.05, chunk_tokens=chunk)
        got = run(dropout=0.05, chunk_tokens=chunk, checkpoint=checkpoint, gradcache=True)
        compare(got, want, (chunk, checkpoint))
    assert worst_gradient(want[0], run(chunk_tokens=120)[0])[0] > 1e-3  # dropout does something


def test_without_a_generative_loss():
    want = run(ntp_weight=0.0)
    got = run(ntp_weight=0.0, chunk_tokens=120, gradcache=True, reuse_vision=True)
    compare(got, want, "no generation")
    assert got[1][2] == 0


def test_captioning_in_chunks():
    options = {"captioning": True, "train_all": True}
    compare(run(chunk_tokens=120, **options), run(**options), "captioning")


RANKS = {
    "one pass": {},
    "chunks": {"chunk_tokens": 120, "reuse_vision": True},
    "gradcache": {"chunk_tokens": 120, "gradcache": True, "reuse_vision": True},
    "everything": {"chunk_tokens": 60, "gradcache": True, "checkpoint": True, "vision_memory": 0},
}


def on_a_rank(rank, world, folder):
    torch.set_num_threads(1)
    size = len(PAIRS) // world
    mine = PAIRS[rank * size : (rank + 1) * size]
    with gloo(folder, rank, world):
        results = {name: run(mine, **options) for name, options in RANKS.items()}
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.full)])
def test_ranks_give_the_gradients_of_one_process(tmp_path, world, monkeypatch):
    """On four ranks the third has no pixels at all."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    spawn(on_a_rank, (world, str(tmp_path)), nprocs=world)
    want = run()
    for rank in range(world):
        for name, got in torch.load(tmp_path / f"{rank}.pt").items():
            compare(got, want, (rank, name))


class Given:
    """A processor of sides made beforehand; a side's text is its number."""

    prefix_ids, suffix_ids = PREFIX, SUFFIX

    def __init__(self, sides):
        self.sides = sides

    def __call__(self, side):
        return self.sides[int(side.text)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_step_of_the_reference(family):
    """A sample at a time with the stock model: encode, keep the bottleneck tokens' cache, write."""
    sides = [side for sample in samples_of(family) for side in sample if side is not None]
    pairs = [
        Pair(Side(str(i)), Side(str(i + 1)), ntp_side=ntp_side)
        for i, ntp_side in zip(range(0, len(sides) - 1, 2), itertools.cycle(NTP_SIDES[:3]))
    ]
    backbone = tiny_backbone(family=family)
    stock = copy.deepcopy(backbone)
    stock.set_attn_implementation("sdpa")
    model = BTokModel.from_backbone(backbone, btok_token_ids=BTOKS[:4]).train()
    recipe = dataclasses.replace(BASE, chunk_tokens=40, gradcache=True)
    samples = pair_samples(pairs, Given(sides))
    losses = one_step(model, Given(sides), recipe, pairs, samples, 0).losses

    z, ntp, _ = two_pass(stock, samples, 4, "reference", True)
    query, positive = z.chunk(2)
    contrastive = F.cross_entropy(query @ positive.T / BASE.temperature, torch.arange(len(pairs)))
    (contrastive + BASE.ntp_weight * ntp).backward()
    assert losses.contrastive.item() == pytest.approx(contrastive.item(), rel=1e-5)
    assert losses.ntp.item() == pytest.approx(ntp.item(), rel=1e-5)
    error, name = worst_gradient(gradients(backbone), gradients(stock))
    assert error < 1e-4, f"{name}: {error:.1e}"


def test_the_vision_tower_runs_once_an_image(monkeypatch):
    """Whether an image is a source, a target, or both."""
    patches = []
    features = BTokModel._features

    def counted(model, vision):
        if vision.pixels is not None:
            patches.append(len(vision.pixels))
        return features(model, vision)

    monkeypatch.setattr(BTokModel, "_features", counted)
    _, processor = tiny_module()
    sides = [processor(side) for pair in PAIRS for side in (pair.query, pair.positive)]
    once = sum(len(vision.pixels) for side in sides for vision in vision_of(side))
    for gradcache in (False, True):
        options = {"chunk_tokens": 120, "gradcache": gradcache}
        patches.clear()
        run(reuse_vision=True, **options)
        assert sum(patches) == once
        patches.clear()
        run(**options)
        assert sum(patches) > once * (2 if gradcache else 1)


@pytest.mark.parametrize("family", VISION)
def test_what_vision_features_go_through_trains_whichever_part_of_it_does(family):
    """Each module beside the decoder alone, the others frozen; reused features change nothing."""
    model, processor = model_with(train_all=True, family=family)
    decoder = model.family.decoder(model.backbone)
    parts = [part for part in model.backbone.model.children() if part is not decoder]
    recipe = dataclasses.replace(BASE, ntp_weight=0.0)
    samples = pair_samples(PAIRS, processor, generate=False)
    for part in parts:
        found = []
        for other in parts:
            other.requires_grad_(other is part)
        for reuse in (False, True):
            model.zero_grad()
            recipe = dataclasses.replace(recipe, reuse_vision=reuse)
            one_step(model, processor, recipe, PAIRS, samples)
            found.append(gradients(model))
        assert any(bool(p.grad.any()) for p in part.parameters())
        assert worst_gradient(found[1], found[0])[0] < 1e-5


def test_the_logits_of_many_labels_are_made_in_parts(monkeypatch):
    want = run(train_all=True)
    monkeypatch.setattr(label_loss, "LOGITS", 120 * 9)
    shapes = []
    cross_entropy = F.cross_entropy
    monkeypatch.setattr(
        F,
        "cross_entropy",
        lambda logits, *a, **k: shapes.append(len(logits)) or cross_entropy(logits, *a, **k),
    )
    compare(run(train_all=True), want, "parts")
    assert max(shapes) <= 9 and len(shapes) > 10


@pytest.mark.parametrize("train_all", [True, False])
def test_operations_of_a_step(train_all):
    """Beside what torch counts of a layer's products, attention's own aside."""
    model, processor = model_with(train_all=train_all)
    for name, p in model.named_parameters():
        if "magnitude" in name:
            p.requires_grad_(False)
    layers = model.backbone.model.language_model.layers
    tokens, counts = 40, []
    for layer in layers:
        for linear in (m for m in layer.modules() if isinstance(m, torch.nn.Linear)):
            x = torch.randn(tokens, linear.in_features, requires_grad=True)
            with FlopCounterMode(display=False) as counter:
                linear(x).sum().backward()
            counts.append(counter.get_total_flops())
    assert model_flops(model, tokens, 0) == sum(counts)
    tower = model.backbone.model.visual
    weights = sum(p.numel() for p in tower.parameters() if p.ndim > 1)
    both = model_flops(model, tokens, 10) - model_flops(model, tokens, 0)
    assert both == 10 * weights * (6 if train_all else 2)
    samples = pair_samples(PAIRS, processor)
    sides = {id(s): s for sample in samples for s in sample if s}.values()
    packing = Packing.of(model, processor, dataclasses.replace(BASE, gradcache=True))
    expected = sum(len(v.pixels) for s in sides for v in vision_of(s))
    assert count_patches(packing.microbatches(samples)) == expected


def test_operations_of_what_stands_between_tower_and_language_model():
    """It has a row per token, and gradients go on through it where the tower trains."""
    model, _ = model_with(train_all=True, family="idefics3")
    connector, tower = model.backbone.model.connector, model.backbone.model.vision_model
    states = torch.randn(3, 16, 32, requires_grad=True)  # tiles of 16 patches, 4 tokens
    weights = sum(p.numel() for p in tower.parameters() if p.ndim > 1)
    model.family.decoder(model.backbone).requires_grad_(False)
    for both, times in ((True, 6), (False, 2)):
        tower.requires_grad_(both)
        with FlopCounterMode(display=False) as counter:
            connector(states).sum().backward()
        assert model_flops(model, 0, 48) == counter.get_total_flops() + 48 * weights * times
    connector.requires_grad_(False)
    tower.requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        connector(states).sum().backward()
    assert model_flops(model, 0, 48) == counter.get_total_flops() + 48 * weights * 6


def test_turns_within_a_budget():
    assert group_by_tokens([3, 3, 5, 9, 1, 4], 6) == [[0, 1], [2], [3], [4, 5]]
    assert group_by_tokens([], 6) == []


@pytest.mark.parametrize("family", VISION)
def test_features_stand_for_pixels(family):
    """Those of Qwen3-VL's first layers, too; a batch takes either, not both."""
    model = BTokModel.from_backbone(tiny_backbone(family=family), btok_token_ids=BTOKS[:4])
    samples = samples_of(family)
    config = model.backbone.config

    def encoded(side):
        if side is None:
            return None
        found = model.encode_vision(model.family.shown(side, config))
        assert all(vision.pixels is None and vision.features for vision in found)
        return {**side, "vision": found}

    seen = [tuple(encoded(side) for side in pair) for pair in samples]
    with torch.no_grad():
        want, got = (packed(model, some)[1] for some in (samples, seen))
    assert (got.embeddings - want.embeddings).abs().max() < 1e-6
    assert abs(got.ntp_loss - want.ntp_loss) < 1e-6
    with pytest.raises(ValueError, match="pixel_values are features in some samples"):
        packed(model, [seen[0], samples[1]])


def test_the_contrastive_loss_meets_its_ids_on_the_models_device(monkeypatch):
    """The device `meta` refuses tensors of the host, as CUDA does; what it embeds stands in."""
    model, processor = model_with()
    model.backbone.to("meta")
    samples = pair_samples(PAIRS, processor)

    def embed(forward, microbatches, contrast, weigh, backward):
        return weigh(contrast(torch.empty(len(samples), 64, device="meta")), None)

    monkeypatch.setattr("train.step.at_once", embed)
    # autocast knows no meta device
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    recipe = dataclasses.replace(BASE, gradcache=False)
    losses = one_step(model, processor, recipe, PAIRS, samples, 0).losses
    assert losses.contrastive.device.type == "meta"


def updates(weights, dtype, steps=300):
    """What so many steps of AdamW add to each weight of a text model in a dtype, by name, fp32."""
    model, processor = tiny_module("qwen2")
    model.to(weights).train()
    first = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    recipe = Recipe(caption_steps=0, groups_per_batch=1, group_size=6, dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    rng = random.Random(0)
    for number in range(steps):
        pairs = [
            Pair(Side(words(rng, 6)), Side(words(rng, 2)), positive_id=str(i)) for i in range(6)
        ]
        one_step(model, processor, recipe, pairs, pair_samples(pairs, processor), number)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().float() - first[name] for name, p in model.named_parameters()}


def test_products_in_bf16_lose_no_update_of_fp32_weights():
    """As a whole model trains; weights of bf16 would hardly move."""
    exact = updates(torch.float32, "float32")
    found = updates(torch.float32, "bfloat16")
    lost = updates(torch.bfloat16, "bfloat16", steps=50)
    flat = [torch.cat([u.flatten() for u in each.values()]) for each in (exact, found)]
    assert F.cosine_similarity(*flat, dim=0) > 0.999
    assert all(bool((u != 0).any()) for u in found.values())
    assert not all(bool((u != 0).any()) for u in lost.values())


def test_what_trains_is_loaded_in_fp32(tmp_path):
    model, processor = tiny_module()
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    for rank, expected in ((0, torch.float32), (4, torch.bfloat16)):
        options = {"dtype": "bfloat16", "lora_rank": rank, "caption_steps": 0}
        built, _ = load(Recipe(model=str(tmp_path), **options))
        assert built.backbone.dtype == expected
        assert {p.dtype for p in built.parameters() if p.requires_grad} == {torch.float32}
