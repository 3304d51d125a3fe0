"""Weights that lie on all ranks (FSDP2): the losses and gradients of one process, whatever each
rank has, and checkpoints that any number of ranks go on from."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket

import numpy as np
import pytest
import torch
from helpers import gloo, spawn, tiny_checkpoint, tiny_module, worst_gradient
from PIL import Image
from test_step import BASE, PAIRS, model_with

import train.main
from btok.data.samples import pair_samples
from btok.encoder import BTokEncoder
from btok.model import BTokModel
from btok.tools.export import export
from train import checkpoint, parallel
from train.microbatches import Packing
from train.recipes import Recipe
from train.step import train_step

CHUNKS = {"gradcache": True, "chunk_tokens": 120}
CASES = {  # of four ranks the third has no images
    "at once": {},
    "chunks": {"chunk_tokens": 60},
    "GradCache": CHUNKS,
    "checkpointing": {**CHUNKS, "checkpoint": True},
    "frozen vision": {**CHUNKS, "freeze_vision": True, "reuse_vision": True},
    "LoRA": {**CHUNKS, "lora": True, "reuse_vision": True},
    "DoRA": {**CHUNKS, "lora": True, "dora": True, "reuse_vision": True},
    "DoRA, checkpointing": {**CHUNKS, "lora": True, "dora": True, "checkpoint": True},
    "replicas": {**CHUNKS, "replicas": 2},
    "qwen3_vl": {**CHUNKS, "family": "qwen3_vl"},
    "idefics3": {**CHUNKS, "family": "idefics3"},
    "text": {**CHUNKS, "family": "qwen2"},
    "a head of its own": {**CHUNKS, "untied": True},
    "rows": {"budgets": (1, 2), "dims": (16,), "multi_vector": 0.5},
    "rows, GradCache": {**CHUNKS, "budgets": (1, 2), "multi_vector": 1.0},
    "warm-up": {"chunk_tokens": 60, "contrastive_from": 1},
    "frozen tower, a connector that trains": {
        **CHUNKS,
        "family": "idefics3",
        "freeze_vision": True,
    },
}


def step(
    pairs,
    shard,
    *,
    lora=False,
    dora=False,
    checkpoint=False,
    family="qwen2_vl",
    untied=False,
    **settings,
):
    """Gradients, losses and the number of microbatches of this rank's pairs."""
    model, processor = model_with(0.0, checkpoint, not lora, family, dora)
    if untied:  # some passes have no target: on that rank the head then takes no part
        head = model.backbone.lm_head
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    recipe = dataclasses.replace(BASE, **settings, shard=shard, muon_rate=0.0, eval_queries=0)
    if recipe.freeze_vision:
        model.family.tower(model.backbone).requires_grad_(False)
    packing = Packing.of(model, processor, recipe)
    samples = pair_samples(pairs, processor, generate=recipe.ntp_weight > 0)
    microbatches = packing.microbatches(samples)
    if shard:
        parallel.shard(model, recipe)
    filler = packing.empty() if shard else None
    losses = train_step(model, recipe, pairs, microbatches, 0, filler=filler).losses
    gradients = {
        name: p.grad.full_tensor() if shard and hasattr(p.grad, "full_tensor") else p.grad
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    return gradients, [float(loss) for loss in losses], len(microbatches)


def pairs_of(case):
    """Those that its model can see."""
    if case.get("family") == "qwen2":
        return [p for p in PAIRS if not (p.query.images or len(p.positive.video))][:4]
    return PAIRS


def on_a_rank(rank, world, folder, names):
    torch.set_num_threads(1)
    with gloo(folder, rank, world):
        for name in names:
            pairs = pairs_of(CASES[name])
            size = len(pairs) // world
            found = step(pairs[rank * size : (rank + 1) * size], True, **CASES[name])
            torch.save(found, f"{folder}/{name}-{rank}.pt")


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.full)])
def test_a_step_is_that_of_one_process(tmp_path, world):
    names = [name for name in CASES if CASES[name].get("replicas", 1) < world]
    spawn(on_a_rank, (world, str(tmp_path), names), nprocs=world)
    uneven = False
    for name in names:
        whole = {key: x for key, x in CASES[name].items() if key != "replicas"}
        want = step(pairs_of(whole), False, **whole)
        found = [torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(world)]
        uneven |= len({count for *_, count in found}) > 1
        for gradients, losses, _ in found:
            assert losses == pytest.approx(want[1], rel=1e-6), name
            assert gradients.keys() == want[0].keys()
            error, tensor = worst_gradient(gradients, want[0])
            assert error < 1e-5, f"{name}, {tensor}: {error:.1e}"
    assert uneven  # else nothing has filled up


def test_every_pass_shows_something_where_a_tower_lies_on_all_ranks():
    """Also where the target does, and the source does not."""
    model, processor = tiny_module()
    recipe = dataclasses.replace(BASE, **CHUNKS, shard=True, muon_rate=0.0, eval_queries=0)
    packing, samples = Packing.of(model, processor, recipe), pair_samples(PAIRS, processor)
    microbatches = packing.microbatches(samples)
    alone = [m for m in microbatches if len(m.batch) > len(m.places)]
    assert alone and any(len(m.batch.vision) > 1 for m in alone)
    assert all(m.batch.vision and m.sources.vision for m in (*microbatches, packing.empty()))


def unused_on_a_rank(rank, folder):
    torch.set_num_threads(1)
    with gloo(folder, rank, 2):
        for shard in (False, True):
            found = step(TEXTS[rank * 2 : rank * 2 + 2], shard, **UNUSED)[0]
            torch.save(sorted(found), f"{folder}/{rank}-{shard}.pt")


TEXTS = [p for p in PAIRS if not (p.query.images or len(p.positive.video))][:4]
UNUSED = {**CHUNKS, "untied": True, "ntp_weight": 0.0}


def test_what_no_rank_uses_has_no_gradient(tmp_path):
    """A tower without pictures, a head without targets: zeros would have them decay."""
    spawn(unused_on_a_rank, (str(tmp_path),), nprocs=2)
    want = sorted(step(TEXTS, False, **UNUSED)[0])
    assert not any("visual" in name or "lm_head" in name for name in want) and len(want) > 10
    for rank in range(2):
        for shard in (False, True):
            assert torch.load(tmp_path / f"{rank}-{shard}.pt") == want


def half_on_a_rank(rank, folder):
    torch.set_num_threads(1)
    with gloo(folder, rank, 2):
        size = len(PAIRS) // 2
        pairs = PAIRS[rank * size : (rank + 1) * size]
        torch.save(step(pairs, True, dtype="bfloat16", **CHUNKS), f"{folder}/{rank}.pt")


def test_products_in_bf16_of_weights_in_fp32(tmp_path):
    spawn(half_on_a_rank, (str(tmp_path),), nprocs=2)
    want, exact, _ = step(PAIRS, False, **CHUNKS)
    got, rounded, _ = torch.load(tmp_path / "0.pt")
    assert {g.dtype for g in got.values()} == {torch.float32} and got.keys() == want.keys()
    flat = [torch.cat([g[name].flatten() for name in want]) for g in (got, want)]
    assert torch.nn.functional.cosine_similarity(*flat, dim=0) > 0.98
    assert rounded != exact and rounded == pytest.approx(exact, rel=0.05)


def values(rank, folder, family):
    with gloo(folder, rank, 2):
        model, _ = tiny_module(family)
        if rank:
            model = BTokModel.from_pretrained(folder, empty=True, dtype=torch.float32)
            assert all(p.is_meta for p in model.parameters())
        parallel.shard(model, Recipe(shard=True, caption_steps=0, muon_rate=0, eval_queries=0))
        whole = {name: weight.full_tensor() for name, weight in model.state_dict().items()}
        buffers = dict(model.named_buffers())
        head, embedding = model.backbone.lm_head, model.backbone.get_input_embeddings()
        assert head.weight is embedding.weight
    torch.save((whole, buffers), f"{folder}/{rank}.pt")


@pytest.mark.parametrize("family", ["qwen2_vl", pytest.param("qwen3_vl", marks=pytest.mark.full)])
def test_all_weights_are_those_of_the_first_rank(tmp_path, family):
    """The other has the architecture alone."""
    model, _ = tiny_module(family)
    model.save_pretrained(tmp_path)
    spawn(values, (str(tmp_path), family), nprocs=2)
    for rank in range(2):
        weights, buffers = torch.load(tmp_path / f"{rank}.pt")
        assert all(torch.equal(weights[name], x) for name, x in model.state_dict().items())
        assert all(torch.equal(buffers[name], x) for name, x in model.named_buffers())


def run_on_a_rank(rank, world, port, command, steps):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "HF_HUB_OFFLINE": "1"}

    def stopping(model, recipe, pairs, microbatches, step, *more):
        if step + 1 == steps and rank == world - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(model, recipe, pairs, microbatches, step, *more)

    train.main.train_step = stopping
    assert train.main.main(command) == 0


def run(command, world, steps):
    """The command on so many ranks, stopped after so many steps of the run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    spawn(run_on_a_rank, (world, port, command, steps), nprocs=world)


@pytest.mark.parametrize("worlds", [(2, 1), pytest.param((4, 2, 1), marks=pytest.mark.full)])
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, worlds):
    """Two steps on so many ranks each; all are those of one process whose weights are whole."""
    model, data = tiny_checkpoint(tmp_path / "model"), tmp_path / "pairs.jsonl"
    rng = np.random.default_rng(0)
    with open(data, "w") as file:
        for i in range(40):
            query = {"text": f"what is {i}?"}
            if i % 3:
                picture = rng.integers(0, 256, (16, 8 * (1 + i % 3), 3), dtype=np.uint8)
                Image.fromarray(picture).save(tmp_path / f"{i}.png")
                query["images"] = [f"{i}.png"]
            file.write(json.dumps({"query": query, "positive": f"it is number {i}"}) + "\n")
    words = "--group-size 4 --groups-per-batch 4 --negatives batch --muon-rate 0 --seed 1"
    words += " --eval-queries 0 --caption-steps 0 --warmup-steps 1 --checkpoint-every 2 --steps"
    words += f" {2 * len(worlds)} --chunk-tokens 150 --gradcache true --learning-rate 1e-4"
    command = ["--model", str(model), "--data", str(data), *words.split(), "--output"]
    whole, shards = tmp_path / "whole", tmp_path / "shards"
    run([*command, str(whole)], 1, None)
    for turn, world in enumerate(worlds, 1):
        more = ["--shard", str(world > 1).lower()]
        run([*command, str(shards), *more], world, 2 * turn)
        saved = sorted(p.name for p in (shards / f"checkpoint-{2 * turn}").iterdir())
        parts = [name for name in saved if name.startswith("model-")]
        assert parts == [f"model-{r + 1:05}-of-{world:05}.safetensors" for r in range(world)] or (
            world == 1 and "model.safetensors" in saved
        )
        # a plain checkpoint, whatever wrote it
        vectors = BTokEncoder.from_pretrained(shards / f"checkpoint-{2 * turn}").encode(["seven"])
        assert vectors.shape == (1, 64)
        if world > 1:
            export(shards / f"checkpoint-{2 * turn}", tmp_path / "one")
            one, parts = (
                BTokModel.from_pretrained(f).state_dict()
                for f in (tmp_path / "one", shards / f"checkpoint-{2 * turn}")
            )
            assert all(torch.equal(one[name], weight) for name, weight in parts.items())
            names = {p.name for p in (tmp_path / "one").iterdir()}
            assert "model.safetensors" in names and "tokenizer.json" in names
            assert not names & {"trainer.json", "manifest.json", "model.safetensors.index.json"}
            shutil.rmtree(tmp_path / "one")
    logs = [(folder / "log.jsonl").read_text().splitlines() for folder in (whole, shards)]
    want, found = ([json.loads(line) for line in log] for log in logs)
    assert [row["step"] for row in found] == [row["step"] for row in want]
    for a, b in zip(found, want, strict=True):
        for name in ("contrastive", "ntp", "gradient_norm"):
            most = 1e-5 if name == "gradient_norm" else 1e-6
            assert a[name] == pytest.approx(b[name], rel=most), a
    ends = [
        BTokModel.from_pretrained(checkpoint.newest_valid(run)).state_dict()
        for run in (whole, shards)
    ]
    for name, weight in ends[0].items():
        assert (ends[1][name] - weight).abs().max() < 1e-5, name
