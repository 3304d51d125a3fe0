"""Processor: the stock image processor's pixels, the input format, and what it refuses."""

from __future__ import annotations

import ast
import importlib
import json
import random
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import MROPE, stock_image_processor, tiny_tokenizer
from PIL import Image

import btok
from btok.data.records import Side
from btok.families import FAMILIES
from btok.families.qwen_images import smart_size
from btok.processing import Processor
from btok.tokens import add_to_tokenizer
from btok.vision import by_name

TOKENIZER = tiny_tokenizer()


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen2_vl", {}),
        ("qwen2_5_vl", {}),
        ("qwen3_vl", {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}),
    ],
)
def test_pixels_equal_the_stock_image_processor(family, settings):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    ours = Processor(TOKENIZER, model_type=family, min_pixels=56 * 56, max_pixels=150_000)
    stock = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 56 * 56, "longest_edge": 150_000}, **settings
    )
    rng = random.Random(0)
    for case in range(8):
        image = picture(rng.randrange(20, 600), rng.randrange(20, 600), case)
        expected = stock(Image.fromarray(image), return_tensors="pt")
        got = by_name(ours(Side(images=[image])))
        assert torch.equal(got["image_grid_thw"], expected["image_grid_thw"])
        assert torch.allclose(got["pixel_values"], expected["pixel_values"], atol=1e-6)


def test_a_video_is_two_frames_per_patch():
    frames = [picture(28, 56, seed) for seed in range(3)]
    got = by_name(Processor(TOKENIZER, min_pixels=28 * 28)(Side(video=frames)))
    assert got["video_grid_thw"].tolist() == [[2, 2, 4]]
    patches = got["pixel_values_videos"].reshape(2, 2, 2, 2, 3, 2, 14, 14)
    #       time, block column, row in block, column in block, channel, frame, y, x
    images = Processor(TOKENIZER).image_processor
    for time, frame, shown in ((0, 0, 0), (0, 1, 1), (1, 0, 2), (1, 1, 2)):  # the last one twice
        for block in range(2):
            for row in range(2):
                for column in range(2):
                    x, y = 28 * block + 14 * column, 14 * row
                    cut = frames[shown][y : y + 14, x : x + 14] / np.float32(255)
                    expected = (cut - images.image_mean) / images.image_std
                    patch = patches[time, block, row, column, :, frame]
                    assert np.allclose(patch, expected.transpose(2, 0, 1), atol=1e-5)


def test_the_input_format():
    processor = Processor(TOKENIZER, min_pixels=28 * 28)

    def tokens(side):
        return TOKENIZER.decode(processor(side)["input_ids"])

    image, frames = picture(56, 28), [picture(28, 28)] * 4
    one = "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>"
    clip = "<|vision_start|><|video_pad|><|video_pad|><|vision_end|>"
    assert tokens(Side("what digit?")) == "what digit?"
    assert tokens(Side(images=[image])) == one
    assert tokens(Side("what digit?", images=[image])) == one + "\nwhat digit?"
    assert tokens(Side("a", images=[image, image])) == one + one + "\na"
    assert tokens(Side("a", video=frames)) == clip + "\na"
    assert TOKENIZER.decode(processor.prefix_ids) == "<|im_start|>assistant\n"
    assert TOKENIZER.decode(processor.suffix_ids) == "<|im_end|>"


def test_qwen3_vl_tells_the_time_of_each_two_frames():
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    processor = Processor(TOKENIZER, model_type="qwen3_vl", min_pixels=32 * 32)
    slot = "<|vision_start|><|video_pad|><|video_pad|><|vision_end|>"

    def tokens(**side):
        got = by_name(processor(Side("a", **side)))
        assert "second_per_grid_ts" not in got
        return got["video_grid_thw"].tolist(), TOKENIZER.decode(got["input_ids"])

    frames = [picture(32, 64, seed) for seed in range(5)]
    grid, said = tokens(video=frames, frame_seconds=[0, 1.5, 4, 5.5, 10])
    assert grid == [[3, 2, 4]]
    assert said == f"<0.8 seconds>{slot}<4.8 seconds>{slot}<10.0 seconds>{slot}\na"
    for count in range(1, 6):
        times = Qwen3VLProcessor._calculate_timestamps(None, list(range(count)), 2.0)
        expected = "".join(f"<{time:.1f} seconds>{slot}" for time in times)
        assert tokens(video=frames[:count])[1] == expected + "\na"  # two frames a second
    picture_and_clip = processor(Side(images=[frames[0]], video=frames[:2]))["input_ids"]
    image = slot.replace("video", "image")
    assert TOKENIZER.decode(picture_and_clip) == f"{image}<0.2 seconds>{slot}"


def test_qwen2_5_vl_is_given_the_seconds_of_a_time_slot():
    processor = Processor(TOKENIZER, model_type="qwen2_5_vl", min_pixels=28 * 28)
    frames = [picture(28, 28)] * 5

    def seconds(**side):
        return processor(Side(**side))["second_per_grid_ts"].tolist()

    assert seconds(video=frames) == [1.0]  # two frames a second, two frames a slot
    assert seconds(video=frames[:1]) == [0.0]  # one slot, nothing after it
    assert seconds(video=frames, frame_seconds=[1, 2, 3, 4, 7]) == [3.0]
    assert "second_per_grid_ts" not in processor(Side("a", images=frames[:1]))
    assert "second_per_grid_ts" not in Processor(TOKENIZER)(Side(video=frames))
    with pytest.raises(ValueError, match="5 frames and 2 frame_seconds"):
        processor(Side(video=frames, frame_seconds=[0, 1]))


def test_a_model_without_vision_takes_text_alone(tmp_path):
    from transformers import Qwen3Config

    Processor(TOKENIZER, model_type="qwen3").save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    Qwen3Config().save_pretrained(tmp_path)
    processor = Processor.from_pretrained(tmp_path)
    assert list(processor(Side("abc"))) == ["input_ids"]
    assert TOKENIZER.decode(processor.prefix_ids) == "<|im_start|>assistant\n"
    for side in (Side(images=[picture(28, 28)]), Side(video=[picture(28, 28)])):
        with pytest.raises(ValueError, match="qwen3 takes text alone"):
            processor(side)
    with pytest.raises(ValueError, match="model_type is 'bert'"):
        Processor(TOKENIZER, model_type="bert")


def test_a_turn_is_the_familys():
    """Whatever else its tokenizer has; of Llama, where it has them, Llama 3's."""
    tokenizer = tiny_tokenizer()
    chatml = "<|im_start|>assistant\n<|im_end|>"
    llama_3 = "<|start_header_id|>assistant<|end_header_id|>\n\n<|eot_id|>"
    names = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<end_of_utterance>"]
    for more, llamas in (([], chatml), (names, llama_3)):
        tokenizer.add_tokens(more, special_tokens=True)
        for family, expected in (("llama", llamas), ("qwen3", chatml), ("qwen2_vl", chatml)):
            processor = Processor(tokenizer, model_type=family)
            assert tokenizer.decode(processor.prefix_ids + processor.suffix_ids) == expected


def test_what_a_family_says_stands_with_the_families():
    """A new one is a file: no other has a model type, or a token of a family's, in its code."""
    folder = Path(btok.__file__).parent
    for file in folder.rglob("*.py"):
        if file.parent.name == "families":
            continue
        nodes = list(ast.walk(ast.parse(file.read_text())))
        docs = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            text = node.value if isinstance(node, ast.Constant) and id(node) not in docs else None
            if isinstance(text, str):
                named = text in FAMILIES or re.search(
                    r"<\|(?!btok_|image_1)|<\w+_\w+>|_per_grid", text
                )
                assert not named, f"{file}: {text!r}"


def test_files_of_a_stock_qwen3_vl_checkpoint(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    stock = {
        "size": {"longest_edge": 16_777_216, "shortest_edge": 65_536},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessorFast",
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stock))
    processor = Processor.from_pretrained(tmp_path)
    assert processor.model_type == "qwen3_vl" and processor.image_processor.patch_size == 16
    assert (processor.image_processor.min_pixels, processor.image_processor.max_pixels) == (
        65_536,
        16_777_216,
    )
    processor.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again" / "preprocessor_config.json").read_text())
    assert again.items() >= {**stock, "image_processor_type": "Qwen2VLImageProcessor"}.items()


def stock_video_processor(family, folder, monkeypatch):
    """The class of transformers loaded from a folder, up to its resizing, which has torchvision:
    in the place of that it gives (height, width)."""
    base = importlib.import_module("transformers.video_processing_utils").BaseVideoProcessor
    size_alone = lambda self, image, size, resample: (size.height, size.width)  # noqa: E731
    monkeypatch.setattr(base, "resize", size_alone)
    stem = "qwen3_vl" if family == "qwen3_vl" else "qwen2_vl"
    name = f"transformers.models.{stem}.video_processing_{stem}"
    with monkeypatch.context() as patch:
        for end in range(1, 5):  # the module imports it, the class can be had without
            part = ".".join(["torchvision", "transforms", "v2", "functional"][:end])
            patch.setitem(sys.modules, part, types.ModuleType(part))
        module = importlib.import_module(name)
    sys.modules.pop(name)  # whoever imports it next gets its own
    kind = json.loads((folder / "video_preprocessor_config.json").read_text())
    return getattr(module, kind["video_processor_type"]).from_pretrained(folder)


@pytest.mark.parametrize("family", MROPE)
def test_the_stock_processors_read_our_files(family, tmp_path, monkeypatch):
    from transformers.models.auto import processing_auto

    ours = Processor(
        TOKENIZER,
        model_type=family,
        min_pixels=2_000,
        max_pixels=30_000,
        min_frame_pixels=6_000,
        max_frame_pixels=9_000,
        image_mean=(0.4, 0.5, 0.6),
        image_std=(0.2, 0.3, 0.25),
    )
    ours.save_pretrained(tmp_path)
    image, video = (
        json.loads((tmp_path / f"{kind}preprocessor_config.json").read_text())
        for kind in ("", "video_")
    )
    for file in (image, video):
        assert file["processor_class"] == processing_auto.PROCESSOR_MAPPING_NAMES[family]
    assert image["image_processor_type"] == "Qwen2VLImageProcessor"

    stock = stock_image_processor(tmp_path)
    assert type(stock).__name__.removesuffix("Pil") == "Qwen2VLImageProcessor"
    rng = random.Random(0)
    for case in range(20):
        frame = picture(rng.randrange(8, 300), rng.randrange(8, 300), case)
        expected = stock(Image.fromarray(frame), return_tensors="pt")
        got = by_name(ours(Side("", [frame])))
        assert torch.equal(got["image_grid_thw"], expected["image_grid_thw"])
        assert torch.allclose(got["pixel_values"], expected["pixel_values"], atol=1e-6)

    stock = stock_video_processor(family, tmp_path, monkeypatch)
    known = stock.valid_kwargs.__annotations__.keys() | {"processor_class", "video_processor_type"}
    assert video.keys() <= known
    for name in video.keys() - {"processor_class", "video_processor_type", "size"}:
        assert np.array_equal(getattr(stock, name), video[name]), name
    unit = ours.image_processor.patch_size * 2
    for _ in range(400):
        count = rng.randrange(1, 9) if family != "qwen3_vl" else rng.randrange(2, 9)
        shape = rng.randrange(8, 200), rng.randrange(8, 200)
        frames = torch.empty((1, count, 3, *shape), device="meta")
        options = {"factor": unit, "temporal_factor": 2, "resample": None}
        options["cap_pixels_per_frame"] = stock.cap_pixels_per_frame
        size = stock.resize(frames, stock.size, **options)
        clip = [np.zeros((*shape, 3), np.uint8)] * count
        (grid,) = ours(Side(video=clip))["vision"][0].grid.tolist()
        assert (grid[1] * unit // 2, grid[2] * unit // 2) == size, (count, shape)

    height, width = 2 * unit, 4 * unit
    clip = [picture(height, width, seed) for seed in range(5)]
    values = torch.from_numpy(np.stack(clip)).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(x)[:, None, None] for x in (stock.image_mean, stock.image_std))
    sizes = {name: video[name] for name in ("patch_size", "merge_size", "temporal_patch_size")}
    patches, *grid = stock.patchify(((values - mean) / std)[None], **sizes)
    got = by_name(ours(Side(video=clip)))
    assert got["video_grid_thw"].tolist() == [grid]
    assert torch.allclose(got["pixel_values_videos"], patches[0], atol=1e-6)


def test_files_as_transformers_5_saves_them(tmp_path):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    TOKENIZER.save_pretrained(tmp_path)
    image = Qwen2VLImageProcessorPil(size={"shortest_edge": 3_000, "longest_edge": 40_000})
    stock = {"processor_class": "Qwen3VLProcessor", "image_processor": image.to_dict()}
    stock["video_processor"] = {"size": {"shortest_edge": 4_096, "longest_edge": 25_165_824}}
    (tmp_path / "processor_config.json").write_text(json.dumps(stock))
    (tmp_path / "preprocessor_config.json").write_text('{"min_pixels": 1, "max_pixels": 2}')
    loaded = Processor.from_pretrained(tmp_path)
    assert loaded.model_type == "qwen3_vl" and loaded.image_processor.patch_size == 14
    assert (loaded.image_processor.min_pixels, loaded.image_processor.max_pixels) == (3_000, 40_000)
    assert (loaded.image_processor.min_frame_pixels, loaded.image_processor.max_frame_pixels) == (
        4_096,
        602_112,
    )


def test_a_chat_template_stays_with_the_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}<|im_end|>"
    for folder in (tmp_path / "once", tmp_path / "twice"):
        Processor(tokenizer).save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        said = tokenizer.apply_chat_template(
            [{"role": "user", "content": "ab"}], chat_template="chat", tokenize=False
        )
        assert said == "ab<|im_end|>"
        assert tokenizer.chat_template.keys() == {"default", "chat"}
        # of inputs for embeddings: see test_stock.py
        assert tokenizer.apply_chat_template([{"content": "ab"}], tokenize=False) == "ab"


def test_paths_bytes_pil_images_and_arrays_are_one(tmp_path):
    image = picture(56, 84)
    Image.fromarray(image).save(tmp_path / "a.png")
    processor = Processor(TOKENIZER)
    expected = processor(Side(images=[image]))["vision"][0].pixels
    path = tmp_path / "a.png"
    for other in (Image.fromarray(image), path, str(path), path.read_bytes()):
        assert torch.equal(processor(Side(images=[other]))["vision"][0].pixels, expected)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    processor = Processor(
        TOKENIZER,
        max_pixels=40_000,
        min_pixels=4_000,
        min_frame_pixels=2_000,
        max_frame_pixels=9_000,
    )
    processor.save_pretrained(tmp_path)
    again = Processor.from_pretrained(tmp_path, num_btoks=2)
    images = again.image_processor
    limits = (
        images.min_pixels,
        images.max_pixels,
        images.min_frame_pixels,
        images.max_frame_pixels,
    )
    assert limits == (4_000, 40_000, 2_000, 9_000)
    assert (
        Processor.from_pretrained(tmp_path, max_pixels=50_000).image_processor.max_pixels == 50_000
    )
    side = Side("abc", images=[picture(300, 200)])
    (was,), (now,) = processor(side)["vision"], again(side)["vision"]
    assert torch.equal(was.pixels, now.pixels) and was.normalization == now.normalization
    assert again.tokenizer.convert_tokens_to_ids("<|btok_1|>") == len(TOKENIZER) + 1
    stock = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert stock["image_processor_type"] == "Qwen2VLImageProcessor"
    assert stock["size"] == {"shortest_edge": 4_000, "longest_edge": 40_000}


def test_sizes_keep_within_the_bounds():
    rng = random.Random(0)
    for _ in range(300):
        height, width = rng.randrange(1, 2000), rng.randrange(1, 2000)
        if max(height, width) > 200 * min(height, width):
            continue
        h, w = smart_size(height, width, 28, 3_136, 1_003_520)
        assert h % 28 == w % 28 == 0
        assert 3_136 <= h * w <= 1_003_520
    assert smart_size(56, 84, 28, 3_136, 1_003_520) == (56, 84)


def test_a_frame_takes_a_token_where_its_bound_is_less():
    processor = Processor(
        TOKENIZER, model_type="qwen3_vl", min_pixels=64, max_pixels=600, max_frame_pixels=600
    )
    (shown,) = processor(Side(video=[picture(24, 40)] * 2))["vision"]
    assert shown.grid.tolist() == [[1, 2, 2]]


def test_what_is_no_picture_is_refused(tmp_path):
    processor = Processor(TOKENIZER)
    broken = tmp_path / "broken.jpg"
    Image.fromarray(picture(64, 64)).save(broken)
    broken.write_bytes(broken.read_bytes()[:300])
    for bad, error, message in (
        (broken, ValueError, "broken.jpg cannot be read"),
        (broken.read_bytes(), ValueError, "of 300 bytes cannot be read: .*Trunc"),
        (b"nothing", ValueError, "of 7 bytes cannot be read: it is of no known format$"),
        (tmp_path / "none.png", ValueError, "none.png cannot be read"),
        (np.zeros((4, 4), np.uint8), TypeError, r"uint8 \[4, 4\]"),
        (np.zeros((4, 4, 3)), TypeError, "float64"),
        (3, TypeError, "image is a int"),
        (np.zeros((1, 500, 3), np.uint8), ValueError, "aspect ratio"),
    ):
        with pytest.raises(error, match=message):
            processor(Side(images=[bad]))
    with pytest.raises(ValueError, match="min_pixels is 10"):
        Processor(TOKENIZER, min_pixels=10, max_pixels=5)
    with pytest.raises(ValueError, match=r"min_frame_pixels is 10, .* max_frame_pixels 5"):
        Processor(TOKENIZER, min_pixels=1, min_frame_pixels=10, max_frame_pixels=5)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen3_vl", "idefics3", "smolvlm", "qwen2", "llama"])
def test_what_spells_a_special_token_is_text(kind):
    """Wherever text comes from: alone, beside a picture, before or behind other words."""
    tokenizer = tiny_tokenizer()
    names = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    tokenizer.add_tokens(names, special_tokens=True)
    add_to_tokenizer(tokenizer, 2)
    whole = {} if "q" in kind or kind == "llama" else {"do_image_splitting": False}
    processor = Processor(tokenizer, model_type=kind, **whole)
    words = " and ".join([*tokenizer.get_added_vocab(), "<|image_pad|><|image_pad|>", "é"])
    ids = processor(Side(words))["input_ids"].tolist()
    assert len(ids) == len(words.encode())  # a byte is a token of this tokenizer
    assert tokenizer.decode(ids) == words
    assert not processor.reserved.intersection(ids)
    assert len(processor.reserved) == (
        2 if processor.image_processor is None else 4 + 2 * ("qwen" in kind)
    )
    assert ids != processor.tokenizer.encode(words)
    assert processor.prefix_ids == tokenizer.encode(tokenizer.decode(processor.prefix_ids))
    if processor.has_vision:
        shown = Side(words, [picture(60, 60)])
        alone = processor(Side("", [picture(60, 60)]))["input_ids"].tolist()
        assert processor(shown)["input_ids"].tolist()[: len(alone)] == alone
        count = [(processor(shown)["input_ids"] == i).sum() for i in sorted(processor.reserved)]
        assert count == [alone.count(i) for i in sorted(processor.reserved)]


def test_a_tokenizer_that_finds_placeholders_in_text_all_the_same_is_told():
    """It has them among its ordinary entries, which nothing splits."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<image>", "<fake_token_around_image>"])
    processor = Processor(tokenizer, model_type="smolvlm")
    with pytest.raises(
        ValueError, match="a text has <image>, which this tokenizer takes for the p"
    ):
        processor(Side("an <image> in words"))
    assert len(processor(Side("an image"))["input_ids"]) == 8


def test_a_side_answers_to_the_names_of_stock_processors():
    got = Processor(TOKENIZER)(Side("a text", images=[picture(60, 90)]))
    named = by_name(got)
    assert torch.equal(got["pixel_values"], named["pixel_values"])
    assert torch.equal(got["image_grid_thw"], named["image_grid_thw"])
    assert "pixel_values" not in got and got.get("pixel_values") is None
    for name in ("pixel_values_videos", "anything"):
        with pytest.raises(KeyError, match=name):
            got[name]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("preprocessor_config.json", [1], "preprocessor_config.json is [1], expected a JSON obje"),
        ("preprocessor_config.json", {"patch_size": 0.5}, "patch_size is 0.5, expected a whole nu"),
        ("preprocessor_config.json", {"patch_size": 0}, "patch_size is 0, expected a whole numb"),
        ("preprocessor_config.json", {"image_mean": []}, "image_mean is [], expected three num"),
        ("preprocessor_config.json", {"patch_size": 4000}, "patch_size is 4000, expected a whole"),
        ("preprocessor_config.json", {"merge_size": True}, "merge_size is True, expected a whole"),
        ("preprocessor_config.json", {"image_std": [1, 0, 1]}, "image_std is [1, 0, 1], expected"),
        ("preprocessor_config.json", {"image_mean": "abc"}, "image_mean is 'abc', expected three"),
        ("preprocessor_config.json", {"image_mean": [10**500, 0, 0]}, "image_mean is [1000000000"),
        ("preprocessor_config.json", {"max_pixels": None}, "max_pixels is None, expected a numbe"),
        ("video_preprocessor_config.json", {"size": 3, "x": 1}, None),
        ("processor_config.json", {"image_processor": "x"}, "image_processor is 'x', expected a J"),
        ("config.json", {"model_type": {}}, "the tokenizer of "),
        ("tokenizer.json", {"version": "1.0"}, "the tokenizer of "),
    ],
)
def test_a_damaged_file_of_a_checkpoint_is_refused_in_a_line(tmp_path, file, content, message):
    Processor(tiny_tokenizer()).save_pretrained(tmp_path)
    (tmp_path / file).write_text(json.dumps(content))
    if message is None:
        assert Processor.from_pretrained(tmp_path).image_processor.min_pixels == 56 * 56
        return
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        Processor.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_checkpoints_file_of_thousands_of_brackets_is_refused(tmp_path):
    Processor(tiny_tokenizer()).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is no JSON"):
        Processor.from_pretrained(tmp_path)
