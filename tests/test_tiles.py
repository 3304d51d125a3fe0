"""Pictures in tiles, as Idefics3 and SmolVLM take them, against transformers' own processors."""

from __future__ import annotations

import copy
import random
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, stock_image_processor, tiny_backbone, tiny_module, tiny_tokenizer
from PIL import Image

from btok.data.records import Side
from btok.families import FAMILIES
from btok.model import BTokModel
from btok.processing import Processor
from btok.vision import by_name

KINDS = ("idefics3", "smolvlm")
TOKENIZER = tiny_tokenizer()
ROWS = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
TOKENIZER.add_tokens([*TINY["idefics3"].tokens, *ROWS], special_tokens=True)
SETTINGS = {"tile": 16, "longest_edge": 64, "patch_size": 4, "merge_size": 2}


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def stock_images(kind, **settings):
    """The image processor of transformers that does without torchvision."""
    from transformers.models.idefics3 import image_processing_pil_idefics3 as idefics3
    from transformers.models.smolvlm import image_processing_pil_smolvlm as smolvlm

    classes = {
        "idefics3": idefics3.Idefics3ImageProcessorPil,
        "smolvlm": smolvlm.SmolVLMImageProcessorPil,
    }
    edges = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 16}}
    return classes[kind](**edges | settings)


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_pixels_are_those_of_the_stock_processor(kind, split):
    from transformers import Idefics3Processor

    images = stock_images(kind, do_image_splitting=split)
    stock = Idefics3Processor(images, copy.deepcopy(TOKENIZER), image_seq_len=4)
    ours = Processor(TOKENIZER, model_type=kind, do_image_splitting=split, **SETTINGS)
    rng, counts = random.Random(0), set()
    for case in range(60):
        shown = [picture(rng.randrange(1, 200), rng.randrange(1, 200), case)]
        shown += [picture(9, 9, case)] * (case % 2)
        asked = "<image>" * len(shown) + "a text"
        expected = stock(
            images=[[Image.fromarray(image) for image in shown]],
            text=asked,
            return_tensors="pt",
            add_special_tokens=False,
        )
        got = ours(Side("a text", shown))
        assert got["input_ids"].tolist() == expected["input_ids"][0].tolist()
        (seen,) = FAMILIES[kind].vision.read(got, None)
        config = types.SimpleNamespace(vision_config=types.SimpleNamespace(patch_size=4))
        (stock_seen,) = FAMILIES[kind].vision.read(expected, config)
        assert torch.equal(seen.grid, stock_seen.grid)
        assert torch.equal(seen.as_floats().pixels, stock_seen.pixels)
        counts.add(len(seen.grid))
    assert counts == ({1, 2} if not split else counts) and len(counts) >= (6 if split else 2)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_an_embedding_is_the_stock_models_last_state(kind):
    """Of what our processor gives, and of tiles as the stock one stacks them."""
    model, processor = tiny_module(kind)
    stock = copy.deepcopy(model.backbone).eval()
    stock.set_attn_implementation("sdpa")
    for seed, (height, width) in enumerate([(20, 30), (60, 10), (5, 5)]):
        side = processor(Side("a text", [picture(height, width, seed)]))
        inputs = TINY[kind].stock(by_name(side))
        ids = torch.cat([side["input_ids"], torch.tensor(model.btok_token_ids)])
        states = stock.model(input_ids=ids[None], **inputs).last_hidden_state[0, -4:]
        expected = F.normalize(states.mean(0), dim=0)
        for sample in (side, {"input_ids": side["input_ids"], **inputs}):
            got = model(model.pack([sample])).embeddings[0]
            assert (got - expected).abs().max() < 1e-5


@torch.no_grad()
def test_pixels_that_are_no_whole_patch_are_left_out_as_the_tower_does():
    """SmolVLM-2.2B's 384 pixels in patches of 14; here 19 in patches of 4."""
    from transformers import Idefics3Processor

    backbone = tiny_backbone(family="smolvlm")
    backbone.config.image_token_id = TOKENIZER.convert_tokens_to_ids("<image>")
    backbone.resize_token_embeddings(len(TOKENIZER))
    config = copy.deepcopy(backbone.config)
    config.vision_config.image_size = 19
    torch.manual_seed(0)
    backbone = type(backbone)(config).eval()
    stock = copy.deepcopy(backbone)
    model = BTokModel.from_backbone(backbone, btok_token_ids=(), pooling="last").eval()
    edges = {"size": {"longest_edge": 38}, "max_image_size": {"longest_edge": 19}}
    images = stock_images("smolvlm", **edges)
    reads = Idefics3Processor(images, copy.deepcopy(TOKENIZER), image_seq_len=4)
    ours = Processor(TOKENIZER, model_type="smolvlm", **SETTINGS | {"tile": 19, "longest_edge": 38})
    image = picture(30, 50)
    inputs = reads(
        images=[[Image.fromarray(image)]],
        text="<image>a text",
        return_tensors="pt",
        add_special_tokens=False,
    )
    side = ours(Side("a text", [image]))
    assert side["input_ids"].tolist() == inputs["input_ids"][0].tolist()
    expected = F.normalize(stock.model(**inputs).last_hidden_state[0, -1], dim=0)
    assert (model(model.pack([side])).embeddings[0] - expected).abs().max() < 1e-5


def test_a_video_is_told_as_smolvlm_has_it(monkeypatch):
    """Each frame one tile behind its time; num2words's spelling of 1, 13 and 42."""
    from transformers.models.smolvlm import processing_smolvlm

    words = {1: "one", 13: "thirteen", 42: "forty-two"}
    monkeypatch.setattr(processing_smolvlm, "num2words", words.__getitem__)
    processor = Processor(TOKENIZER, model_type="smolvlm", **SETTINGS)
    stock = types.SimpleNamespace(
        image_seq_len=4,
        image_token="<image>",
        fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
    )
    for count in words:
        seconds = [i * 7.9 for i in range(count)]
        frames = [picture(20 + i, 30, i) for i in range(count)]
        meta = types.SimpleNamespace(fps=1, timestamps=seconds, duration=None)
        inputs = {"pixel_values": torch.zeros(1, count), "video_metadata": [meta]}
        told = processing_smolvlm.SmolVLMProcessor.replace_video_token(stock, inputs, 0)
        got = processor(Side("a text", video=frames, frame_seconds=seconds))
        assert TOKENIZER.decode(got["input_ids"]) == told + "a text"
        (shown,) = got["vision"]
        assert shown.grid.tolist() == [[1, 4, 4]] * count
        # a frame is squared as a picture is that is not cut
        whole = Processor(
            TOKENIZER,
            model_type="smolvlm",
            do_image_splitting=False,
            **SETTINGS | {"longest_edge": 16},
        )
        assert torch.equal(shown.pixels, whole(Side(images=frames))["vision"][0].pixels)


@pytest.mark.parametrize("kind", KINDS)
def test_stock_processors_read_our_files_and_we_read_theirs(kind, tmp_path):

    model, _ = tiny_module(kind)
    settings = {"tile": 16, "longest_edge": 48, "image_mean": (0.4, 0.5, 0.6)}
    ours = Processor(TOKENIZER, model_type=kind, patch_size=4, merge_size=2, **settings)
    ours.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    image = picture(70, 40)
    stock = stock_image_processor(tmp_path)
    again = Processor.from_pretrained(tmp_path, num_btoks=0)
    assert again.model_type == kind
    for name in ours.image_processor.SETTINGS:
        assert getattr(again.image_processor, name) == getattr(ours.image_processor, name), name
    expected = stock(Image.fromarray(image), return_tensors="pt")
    tiles = FAMILIES[kind].vision.read(expected, model.backbone.config)
    assert torch.equal(tiles[0].pixels, by_name(again(Side(images=[image])))["pixel_values"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tile": 128}, "tile is 128 and longest_edge 64"),
        ({"longest_edge": 5000}, "longest_edge is 5000, expected a whole number from 1 to 4096"),
        ({"do_image_splitting": "no"}, "do_image_splitting is 'no', expected True or False"),
        ({"tile": 12}, "tile is 12, 3 patches of 4 pixels, expected a multiple of merge_size 2"),
    ],
)
def test_edges_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Processor(TOKENIZER, model_type="idefics3", **SETTINGS | settings)


def test_placeholders_without_pixels_are_refused():
    model, processor = tiny_module("smolvlm")
    ids = [processor.image_processor.image, *processor.encode("an image in words")]
    with pytest.raises(ValueError, match=r"input_ids has 1 image placeholders \d+, expected 0"):
        model.pack([{"input_ids": ids}])


def test_tokens_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="no <fake_token_around_image>, expected Idefics3's"):
        Processor(tiny_tokenizer(), model_type="idefics3")
    processor = Processor(TOKENIZER, model_type="idefics3", **SETTINGS | {"longest_edge": 80})
    with pytest.raises(ValueError, match="no <row_1_col_5>"):
        processor(Side(images=[picture(9, 80)]))
    with pytest.raises(
        TypeError, match="max_pixels is no setting of a smolvlm, expected longest_e"
    ):
        Processor(TOKENIZER, model_type="smolvlm", max_pixels=1)


def test_a_folder_without_a_model_keeps_its_patches(tmp_path):
    settings = {"tile": 18, "longest_edge": 36, "patch_size": 6, "merge_size": 3}
    Processor(TOKENIZER, model_type="idefics3", **settings).save_pretrained(tmp_path)
    again = Processor.from_pretrained(tmp_path, num_btoks=0)
    assert {name: getattr(again.image_processor, name) for name in settings} == settings


def test_a_turn_of_idefics_3_on_the_tokenizer_of_llama_3():
    tokenizer = copy.deepcopy(TOKENIZER)
    names = ("start_header_id", "end_header_id", "eot_id")
    tokenizer.add_tokens([f"<|{name}|>" for name in names], special_tokens=True)
    processor = Processor(tokenizer, model_type="idefics3", **SETTINGS)
    said = tokenizer.decode(processor.prefix_ids + processor.suffix_ids)
    assert said == "\nAssistant:<end_of_utterance>"
