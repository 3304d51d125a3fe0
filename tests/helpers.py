"""Tiny models, samples for it, and the measure gradients are compared by."""

from __future__ import annotations

import copy
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.models import byte_tokenizer as tiny_tokenizer
from btok import families
from btok.data.records import Pair
from btok.model import BTokModel
from btok.processing import Processor
from btok.tokens import add_to_embeddings, add_to_tokenizer
from train.microbatches import Packing
from train.pocket import data as pocket
from train.recipes import Recipe
from train.step import train_step

IMAGE, VIDEO, VISION_START, VISION_END = 110, 111, 112, 113
BTOKS = (100, 101, 102, 103, 104, 105, 106, 107)
PREFIX, SUFFIX = (50, 51), (52,)
WIDTHS = {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48}
TOWER = {"depth": 2, "num_heads": 2, "patch_size": 4, "initializer_range": 0.2}
QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
NOTHING: dict[str, Any] = {}
BRACKETS = {f"vision_{end}": f"<|vision_{end}|>" for end in ("start", "end")}
PADS = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
PIXELS = {"patch_size": 4, "min_pixels": 64, "max_pixels": 600, "max_frame_pixels": 600}


def _same(side: dict[str, Any]) -> dict[str, Any]:
    return side


def _with_seconds(side: dict[str, Any]) -> dict[str, Any]:
    """Qwen2.5-VL's."""
    if "video_grid_thw" not in side:
        return side
    return side | {"second_per_grid_ts": torch.tensor([0.7])}


def _with_times(side: dict[str, Any]) -> dict[str, Any]:
    """Qwen3-VL's: a time, as text, before each slot of its own."""
    if "video_grid_thw" not in side:
        return side
    [(slots, h, w)] = side["video_grid_thw"].tolist()
    slot = [VISION_START, *[VIDEO] * (h * w // 4), VISION_END]
    ids = [token for t in range(slots) for token in (20 + t, 30, *slot)]
    return side | {"input_ids": ids + side["input_ids"][-4:]}


def _by_name(side: dict[str, Any]) -> dict[str, Any]:
    names = ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw")
    return {name: side[name] for name in names if name in side}


def _in_tiles(side: dict[str, Any]) -> dict[str, Any]:
    """Idefics3's: each 4 x 4 patches a tile, of images and of videos, of one frame's pixels."""
    grids = side.get("image_grid_thw", side.get("video_grid_thw"))
    if grids is None:
        return side
    count = int(grids.prod(1).sum()) // 16
    pixels = side.get("pixel_values", side.get("pixel_values_videos"))
    ids = [token for tile in range(count) for token in (VISION_START, 20 + tile, *[IMAGE] * 4)]
    return {
        "input_ids": [*ids, VISION_START, *side["input_ids"][-4:]],
        "pixel_values": pixels[: count * 16, :48],
        "image_grid_thw": torch.tensor([[1, 4, 4]] * count),
    }


def _tiles(side: dict[str, Any]) -> dict[str, Any]:
    if "pixel_values" not in side:
        return {}
    rows = side["pixel_values"].view(-1, 4, 4, 3, 4, 4)  # tile, patch row, patch column, channel
    return {"pixel_values": rows.permute(0, 3, 1, 4, 2, 5).reshape(1, -1, 3, 16, 16)}


class Tiny(NamedTuple):
    """A tiny model of a family: what it has beside what all have, and how it is shown things.

    Args:
        language, config: settings of the language model and of the whole; for a model with vision
            `config` has the tower's as "vision_config", and the placeholders' ids.
        tied: whether lm_head is the embedding matrix.
        side: a side of `vision` below, which is Qwen2-VL's, as the family's processor gives it.
        stock: what the stock model takes of such a side, but for the ids.
        settings: of a processor that makes small pictures few tokens.
        tokens: special tokens of its tokenizer that Qwen2-VL's has not.
        pads: by kind, the placeholders in such a tokenizer.
    """

    language: dict[str, Any] = NOTHING
    config: dict[str, Any] = NOTHING
    tied: bool = True
    side: Callable[[dict[str, Any]], dict[str, Any]] = _same
    stock: Callable[[dict[str, Any]], dict[str, Any]] = _by_name
    settings: dict[str, Any] = PIXELS
    tokens: tuple[str, ...] = ()
    pads: dict[str, str] = PADS


TINY = {
    "qwen2_vl": Tiny(
        {"rope_parameters": {"mrope_section": [2, 3, 3]}, "head_dim": None},
        QWEN_IDS | {"vision_config": {**TOWER, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}},
    ),
    "qwen2_5_vl": Tiny(
        {"rope_parameters": {"mrope_section": [2, 3, 3]}, "head_dim": None},
        QWEN_IDS
        | {
            "vision_config": {
                **TOWER,
                **WIDTHS,
                "window_size": 16,  # 2 x 2 merged tokens, in the first layer
                "fullatt_block_indexes": [1],
                "tokens_per_second": 2,
            }
        },
        tied=False,
        side=_with_seconds,
    ),
    "qwen3_vl": Tiny(
        {"rope_parameters": {"mrope_section": [4, 2, 2]}},
        QWEN_IDS
        | {
            "vision_config": {
                **TOWER,
                **WIDTHS,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0, 1],
            }
        },
        side=_with_times,
    ),
    "qwen2": Tiny(),
    "qwen3": Tiny(),
    "llama": Tiny(tied=False),
    **dict.fromkeys(
        ("idefics3", "smolvlm"),
        Tiny(
            {"model_type": "llama"},
            {
                "image_token_id": IMAGE,
                "scale_factor": 2,
                "vision_config": {
                    "hidden_size": 32,
                    "intermediate_size": 48,
                    "num_hidden_layers": 2,
                    "num_attention_heads": 2,
                    "image_size": 16,
                    "patch_size": 4,
                    "initializer_range": 0.2,
                },
            },
            side=_in_tiles,
            stock=_tiles,
            settings={"tile": 16, "longest_edge": 32, "patch_size": 4, "merge_size": 2},
            tokens=(
                *("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
                *(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)),
            ),
            pads={"image": "<image>"},
        ),
    ),
}
FAMILIES = tuple(TINY)
VISION = tuple(family for family, tiny in TINY.items() if "vision_config" in tiny.config)
MROPE = tuple(family for family in FAMILIES if families.FAMILIES[family].mrope)


def tiny_backbone(
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    layers: int = 2,
    family: str = "qwen2_vl",
    **more: Any,
) -> Any:
    """A random model, hidden 64, 4 query and 2 key heads; `more` of its language model's."""
    import transformers

    tiny = TINY[family]
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    language = {
        "vocab_size": 120,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.2,
        **tiny.language,
        "rope_parameters": rope | tiny.language.get("rope_parameters", {}),
        **more,
    }
    language = {name: value for name, value in language.items() if value is not None}
    config = {"tie_word_embeddings": tiny.tied, **copy.deepcopy(tiny.config)}
    config |= {"text_config": language} if family in VISION else language
    architecture = getattr(transformers, families.FAMILIES[family].architecture)
    torch.manual_seed(seed)
    return architecture(architecture.config_class(**config)).to(dtype)


def tiny_module(
    family: str = "qwen2_vl", dtype: torch.dtype = torch.float32, **more: Any
) -> tuple[BTokModel, Processor]:
    """The tiny model with 4 bottleneck tokens, and its processor: 8 pixels a merged token."""
    tiny, tokenizer = TINY[family], tiny_tokenizer()
    tokenizer.add_tokens(list(tiny.tokens), special_tokens=True)
    backbone = tiny_backbone(dtype=dtype, family=family, **more)
    for kind, pad in {**BRACKETS, **tiny.pads}.items():
        if hasattr(backbone.config, name := f"{kind}_token_id"):
            setattr(backbone.config, name, tokenizer.convert_tokens_to_ids(pad))
    btoks = add_to_tokenizer(tokenizer, 4)
    add_to_embeddings(backbone, btoks)
    model = BTokModel.from_backbone(backbone, btok_token_ids=btoks)
    settings = tiny.settings if family in VISION else {}
    return model, Processor(tokenizer, model_type=family, **settings)


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


def tiny_checkpoint(folder: Path, seed: int = 0) -> Path:
    """The tiny model and its processor, saved."""
    model, processor = tiny_module()
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


def spawn(work: Any, args: tuple[Any, ...], nprocs: int) -> None:
    """`work(rank, *args)` in so many processes."""
    mp.spawn(_to_the_end, (work, args), nprocs=nprocs)


def _to_the_end(rank: int, work: Any, args: tuple[Any, ...]) -> None:
    work(rank, *args)
    # as the trainer: sharded weights keep the process group, whose threads may abort a process
    # while Python ends
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def one_step(model: Any, processor: Any, recipe: Recipe, pairs: Any, samples: Any, *at: Any) -> Any:
    """`train_step` of these samples; `at` are the step and whether it is captioning, by default 0
    and False.
    """
    number, captioning, *_ = *at, *(0, False)[len(at) :]
    microbatches = Packing.of(model, processor, recipe, captioning).microbatches(samples)
    if captioning:
        recipe = replace(recipe, contrastive_from=number + 1)
    return train_step(model, recipe, pairs, microbatches, number)


class Largest(TorchDispatchMode):
    """Within, `numel` is how many elements the largest tensor has that an operation gives."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.numel = max(self.numel, out.numel())
        return out


def stock_image_processor(folder: Path) -> Any:
    """Transformers' own; the test is skipped where that needs torchvision to find it."""
    import pytest
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(folder)
    except ImportError as error:
        pytest.skip(f"AutoImageProcessor of this transformers: {error}")


def held(uri):
    """By id what the items of an index say, less ids, and their vectors."""
    import numpy as np

    from btok.tools.index import Index

    index = Index.open(uri)
    items = [row for batch in index.rows(where="vector IS NOT NULL") for row in batch.to_pylist()]
    vectors = np.concatenate([rows for rows, _ in index.vectors()])
    assert len(items) == len(vectors) == len({item["id"] for item in items}) == len(index)
    said = [{k: v for k, v in item.items() if v is not None} for item in items]
    return {item.pop("id"): (item, row) for item, row in zip(said, vectors, strict=True)}


def same(one, other):
    """Whether two indexes, as `held` gives them, hold the same, whatever the order."""
    assert one.keys() == other.keys()
    for name, (item, row) in one.items():
        assert item == other[name][0]
        assert abs(row - other[name][1]).max() < 1e-6
    return True


def noting(checkpoint, texts):
    """An encoder of this checkpoint, which adds to a list the texts that it prepares."""
    from btok import BTokEncoder

    encoder = BTokEncoder.from_pretrained(checkpoint)
    processor = encoder.processor

    class Noting:
        def __getattr__(self, name):
            return getattr(processor, name)

        def __call__(self, side):
            texts.append(side.text)
            return processor(side)

    encoder.processor = Noting()
    return encoder


def counted(encoder):
    """The ids of what the encoder makes from now on."""
    made, iterate = [], encoder.encode_iter

    def noted(*arguments, **named):
        for vectors in iterate(*arguments, **named):
            made.extend(vectors.ids)
            yield vectors

    encoder.encode_iter = noted
    return made


def environment(**more):
    """In which a child finds what this process does, these helpers included."""
    root = Path(__file__).parent.parent
    path = os.pathsep.join(map(str, (root, root / "kernels", root / "tests")))
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), path)))
    return {**os.environ, "PYTHONPATH": path, **more}


def nested_module() -> tuple[BTokModel, Processor]:
    """`tiny_module`, as if it was trained for 1, 2 and 4 bottleneck tokens, 16 and 32 components,
    and its rows as vectors.
    """
    model, processor = tiny_module()
    nested = {"budgets": (1, 2, 4), "dims": (16, 32), "multi_vector": True}
    model.settings = replace(model.settings, **nested)
    return model, processor


def nested_checkpoint(folder: Path) -> Path:
    """`nested_module`, saved."""
    model, processor = nested_module()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
