"""Tiny models, samples for it, and the measure gradients are compared by."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bench.models import byte_tokenizer as tiny_tokenizer
from btok import families
from btok.data.records import Pair
from btok.model import BTokModel
from btok.processing import Processor
from btok.tokens import add_to_embeddings, add_to_tokenizer
from train.pocket import data as pocket
from train.recipes import Recipe

IMAGE, VIDEO, VISION_START, VISION_END = 110, 111, 112, 113
BTOKS = (100, 101, 102, 103, 104, 105, 106, 107)
PREFIX, SUFFIX = (50, 51), (52,)
WIDTHS = {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48}
VISION = {  # vision towers
    "qwen2_vl": {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
    # windows of 2 x 2 merged tokens in the first layer
    "qwen2_5_vl": {
        **WIDTHS,
        "window_size": 16,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
    },
    "qwen3_vl": {**WIDTHS, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
}

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen2", "qwen3", "llama")


def tiny_backbone(
    seed: int = 0, dtype: torch.dtype = torch.float32, layers: int = 2, family: str = "qwen2_vl"
) -> Any:
    """A random model, hidden 64, 4 query and 2 key heads; embeddings tied but in two families."""
    import transformers

    language = {
        "vocab_size": 120,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.2,
    }
    tied = family not in ("qwen2_5_vl", "llama")
    config: dict[str, Any] = {"tie_word_embeddings": tied}
    if family in VISION:
        section = {"mrope_section": [4, 2, 2] if family == "qwen3_vl" else [2, 3, 3]}
        language["rope_parameters"] |= section
        if family != "qwen3_vl":
            del language["head_dim"]
        vision = {"depth": 2, "num_heads": 2, "patch_size": 4, "initializer_range": 0.2}
        config |= {
            "text_config": language,
            "vision_config": vision | VISION[family],
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "vision_start_token_id": VISION_START,
            "vision_end_token_id": VISION_END,
        }
    else:
        config |= language
    architecture = getattr(transformers, families.FAMILIES[family].architecture)
    torch.manual_seed(seed)
    return architecture(architecture.config_class(**config)).to(dtype)


def text(length: int, seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    return {"input_ids": [rng.randrange(2, 50) for _ in range(length)]}


def vision(grids: list[tuple[int, int, int]], seed: int, video: bool = False) -> dict[str, Any]:
    """Images (or videos) of the given grids (time, height, width in patches), then some text."""
    pad = VIDEO if video else IMAGE
    ids: list[int] = []
    for t, h, w in grids:
        ids += [VISION_START, *[pad] * (t * (h // 2) * (w // 2)), VISION_END]
    generator = torch.Generator().manual_seed(seed)
    patches = sum(t * h * w for t, h, w in grids)
    pixels = torch.randn(patches, 3 * 2 * 4 * 4, generator=generator)
    keys = (
        ("pixel_values_videos", "video_grid_thw") if video else ("pixel_values", "image_grid_thw")
    )
    return {
        "input_ids": ids + text(4, seed)["input_ids"],
        keys[0]: pixels,
        keys[1]: torch.tensor(grids),
    }


def pocket_pairs(recipe: Recipe, step: int, rank: int = 0, world: int = 1) -> list[Pair]:
    """A rank's pairs of a step on the pocket benchmark, told plainly: what its source must give."""
    pairs: list[Pair] = []
    count, tasks = recipe.groups_per_batch, pocket.TASKS
    for group in range(step * count, (step + 1) * count)[rank::world]:
        turn, place = divmod(group, len(tasks))
        order = random.Random(f"{recipe.seed}/round/{turn}").sample(tasks, len(tasks))
        task = tasks[0] if step < recipe.reading_steps else order[place]
        pairs += pocket.train_group(task, group, recipe.group_size, recipe.seed)
    return pairs


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    """Gradients by parameter name; zeros where there is none."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in module.named_parameters()
    }


def worst_gradient(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest |g - g'| / max(|g'|, 1e-3 |all g'|) over tensors, and the tensor's name."""
    assert got.keys() == expected.keys()
    everything = torch.cat([g.double().flatten() for g in expected.values()]).norm()
    assert everything > 0
    errors = [
        (
            float(
                (got[n].double() - g.double()).norm() / max(g.double().norm(), 1e-3 * everything)
            ),
            n,
        )
        for n, g in expected.items()
    ]
    return max(errors)


def tiny_qwen2_vl(dtype: torch.dtype = torch.float32) -> tuple[BTokModel, Processor]:
    """The tiny model with 4 bottleneck tokens, and its processor: 8 pixels a merged token."""
    tokenizer = tiny_tokenizer()
    backbone = tiny_backbone(dtype=dtype)
    ids = {n: tokenizer.convert_tokens_to_ids(f"<|{n}_pad|>") for n in ("image", "video")}
    backbone.config.image_token_id, backbone.config.video_token_id = ids["image"], ids["video"]
    btoks = add_to_tokenizer(tokenizer, 4)
    add_to_embeddings(backbone, btoks)
    return BTokModel.from_backbone(backbone, btok_token_ids=btoks), Processor(
        tokenizer, patch_size=4, min_pixels=64, max_pixels=600, max_frame_pixels=600
    )


def tiny_checkpoint(folder: Path, seed: int = 0) -> Path:
    """The tiny model and its processor, saved."""
    model, processor = tiny_qwen2_vl()
    torch.manual_seed(seed)
    with torch.no_grad():
        model.backbone.get_input_embeddings().weight.normal_(std=0.2)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@contextmanager
def gloo(folder: str, rank: int, world: int) -> Iterator[None]:
    """A process group over a file in `folder`; the ranks leave it together."""
    store = dist.FileStore(f"{folder}/store")
    wait = timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=wait)
    yield
    dist.barrier()
    dist.destroy_process_group()
