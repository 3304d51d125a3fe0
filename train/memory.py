"""The memory that training takes of each device, by arithmetic, before anything is there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from btok.label_loss import LOGITS
from btok.model import BTokModel
from btok_kernels.ranks import rank, world
from train.recipes import Recipe
from train.step import is_frozen

GIB = 1 << 30


def memory_of(model: BTokModel, recipe: Recipe, ranks: int) -> dict[str, float]:
    """Bytes on each of `ranks` devices, by what they are for.

    Activations are those of a packed pass of `chunk_tokens` in the language model; a vision tower
    that trains, what an allocator wastes and what a backward holds for a moment are not counted.
    """
    shards = ranks // recipe.replicas if recipe.shard else 1
    width = 2 if recipe.dtype == "bfloat16" else 4  # bytes of a product's result
    trained = [p for p in model.parameters() if p.requires_grad]
    numbers = sum(p.numel() for p in trained) / shards
    still = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    found = {"frozen weights": still, "weights": 4 * numbers, "gradients": 4 * numbers}
    found["moments"] = 8 * numbers  # AdamW's two; Muon has one
    decoder = model.family.decoder(model.backbone)
    config = model.backbone.config.get_text_config()
    if recipe.shard:
        layer, inside = _numel(decoder.layers[0].parameters()), _numel(decoder.layers.parameters())
        # two layers at a time; embedding, head and tower from the forward to the backward's end
        gathered = 2 * layer + _numel(trained) - inside
        found["gathered weights"] = width * gathered
    elif ranks > 1:
        found["gradients on their way"] = 4 * numbers
    if width == 2 and not recipe.shard:
        found["weights in bfloat16"] = width * numbers  # autocast keeps them through a pass
    tokens = recipe.chunk_tokens or 0
    inputs = tokens * config.hidden_size * width
    within = tokens * width * _results(decoder.layers[0], config.hidden_size)
    layers = len(decoder.layers)
    checkpointing = recipe.checkpoint_activations
    found["activations"] = layers * inputs + within if checkpointing else layers * within
    found["logits"] = 3 * 4 * min(LOGITS, tokens * config.vocab_size)  # with their gradient
    if recipe.reuse_vision and is_frozen(model):
        found["vision features"] = recipe.vision_memory
    return {name: size for name, size in found.items() if size}


def _numel(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)


def _results(layer: Any, hidden: int) -> int:
    """Numbers in the products' precision that a decoder layer keeps of each token."""
    attention = layer.self_attn
    q, k = attention.q_proj.out_features, attention.k_proj.out_features
    # a norm keeps its input in fp32 and what it normalised; its result is a product's input
    norms = 2 * 4 * hidden + (3 * (q + k) if hasattr(attention, "q_norm") else 0)
    # gate, up, the gate's activation and their product
    return norms + 2 * q + 2 * k + 4 * layer.mlp.gate_proj.out_features


def refuse_too_small(model: BTokModel, recipe: Recipe, device: torch.device) -> None:
    """Say what a run takes of each GPU.

    Raises:
        ValueError: more than there is; it names the settings to turn.
    """
    found = memory_of(model, recipe, world())
    total = sum(found.values())
    unit, one = ("GiB", GIB) if total >= GIB / 10 else ("MiB", GIB / 1024)
    parts = ", ".join(f"{name} {size / one:.1f}" for name, size in found.items())
    need = f"about {total / one:.1f} {unit} on each device by arithmetic ({parts})"
    need += "" if recipe.chunk_tokens else ", and activations: without --chunk-tokens as they come"
    if rank() == 0 and recipe.model != "pocket":
        print(f"training takes {need}")
    if device.type != "cuda":
        return
    there = torch.cuda.get_device_properties(device).total_memory
    if total > there:
        turn = {
            "--checkpoint-activations true": not recipe.checkpoint_activations,
            "--gradcache true": not recipe.gradcache,
            "a lower --chunk-tokens": recipe.chunk_tokens,
            "--lora-rank 16": not (recipe.shard or recipe.lora_rank),
            "--shard true": not (recipe.shard or recipe.lora_rank) and world() > 1,
            "more GPUs": recipe.shard,
        }
        told = " or ".join(setting for setting, helps in turn.items() if helps)
        raise ValueError(f"{recipe.model} needs {need}, this one has {there / one:.1f}; try {told}")
