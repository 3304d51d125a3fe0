"""BTokEncoder: what it takes, order, windows, the thread ahead, and what it refuses."""

from __future__ import annotations

import io
import itertools
import json
import os
import shutil
import sys
import threading

import numpy as np
import pytest
import torch
from helpers import tiny_checkpoint, tiny_module
from PIL import Image

from btok import BTokEncoder, Side
from btok.encoder import AHEAD
from btok.inputs import as_side, estimate_tokens, read_video, with_frames

RNG = np.random.default_rng(0)
PICTURES = [RNG.integers(0, 256, (24, 32, 3), dtype=np.uint8) for _ in range(6)]
SIDES = [
    Side("a red seven"),
    Side(images=[PICTURES[0]]),
    Side("which digit?", images=PICTURES[1:3]),
    Side("what motion?", video=PICTURES[3:6]),
    Side("x" * 60),
    Side("y"),
]


@pytest.fixture(scope="module")
def encoder():
    return BTokEncoder(*tiny_module())


class Spy:
    """A processor that remembers what it was asked for."""

    def __init__(self, processor):
        self.processor, self.texts, self.threads = processor, [], set()

    def __getattr__(self, name):
        return getattr(self.processor, name)

    def __call__(self, side):
        self.texts.append(side.text)
        self.threads.add(threading.current_thread().name)
        return self.processor(side)


def test_rows_keep_their_order_whatever_the_budget(encoder):
    rows = encoder.encode(SIDES)
    assert rows.shape == (6, 64) and rows.dtype == np.float32
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    for budget in (1, 40, 100):
        assert np.abs(encoder.encode(SIDES, batch_tokens=budget) - rows).max() < 1e-6
    backwards = encoder.encode(SIDES[::-1])[::-1]
    assert np.abs(backwards - rows).max() < 1e-6
    assert np.abs(rows[0] - rows[1]).max() > 1e-2


def test_inputs_of_every_kind(encoder, tmp_path):
    Image.fromarray(PICTURES[0]).save(tmp_path / "a.png")
    (tmp_path / "note.MD").write_text("from a file")
    picture = Image.fromarray(PICTURES[1])
    inputs = ["a text", "a.png", tmp_path / "a.png", tmp_path / "note.MD", picture, PICTURES[2]]
    inputs += [[PICTURES[3], str(tmp_path / "a.png")], Side("whole")]
    inputs += [(tmp_path / "a.png").read_bytes()]
    sides = [Side("a text"), Side("a.png"), Side(images=PICTURES[:1]), Side("from a file")]
    sides += [Side(images=PICTURES[1:2]), Side(images=PICTURES[2:3])]
    sides += [Side(images=[PICTURES[3], PICTURES[0]]), Side("whole"), Side(images=PICTURES[:1])]
    assert np.abs(encoder.encode(inputs) - encoder.encode(sides)).max() < 1e-6


def test_a_text_file_is_read_to_8192_characters(tmp_path):
    (tmp_path / "long.txt").write_text("é" + "x" * 9000)
    assert as_side(tmp_path / "long.txt").text == "é" + "x" * 8191


def test_the_instruction_comes_before_the_text(encoder):
    side = Side("a digit", images=PICTURES[:1])
    for instruction, text in (("Find:", "Find: a digit"), ("Find:\n", "Find:\na digit")):
        got = encoder.encode([side, PICTURES[0]], instruction)
        bare = Side(instruction, images=PICTURES[:1])
        expected = encoder.encode([Side(text, images=PICTURES[:1]), bare])
        assert np.abs(got - expected).max() < 1e-6
    assert np.abs(got - encoder.encode([side, PICTURES[0]])).max() > 1e-2


def test_a_window_smaller_than_the_inputs(encoder):
    rows = encoder.encode(SIDES)
    batches = list(encoder.encode_iter(SIDES, batch_tokens=40, window=2))
    assert sorted(i for made in batches for i in made.ids) == list(range(6))
    assert all(len({i // 2 for i in made.ids}) == 1 for made in batches)
    for made in batches:
        assert np.abs(made.vectors - rows[made.ids]).max() < 1e-6
        assert made.tokens == [len(encoder.processor(SIDES[i])["input_ids"]) + 4 for i in made.ids]


def test_vectors_by_names_of_ones_own(encoder):
    names = [f"number {i}" for i in range(6)]
    for made in encoder.encode_iter(SIDES, ids=iter(names), batch_tokens=40):
        rows = encoder.encode([SIDES[names.index(name)] for name in made.ids])
        assert np.abs(made.vectors - rows).max() < 1e-6 and not made.errors
    with pytest.raises(ValueError, match="is longer than argument"):
        list(encoder.encode_iter(SIDES, ids=names[:3]))
    with pytest.raises(ValueError, match="ids has 'b' more than once"):
        list(encoder.encode_iter(SIDES[:4], ids=["a", "b", "c", "b"]))


def test_a_window_is_sorted_longest_first():
    model, processor = tiny_module()
    spy = Spy(processor)
    texts = ["a" * n for n in (3, 50, 7, 20, 1)]
    list(BTokEncoder(model, spy).encode_iter(texts, window=4))
    assert [len(text) for text in spy.texts] == [50, 20, 7, 3, 1]


def test_lengths_are_told_from_headers(encoder, tmp_path):
    Image.fromarray(PICTURES[0]).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes(b"nothing")
    asked = [Side("abc", images=[tmp_path / "a.png"]), Side(images=PICTURES[:1]), "abcd"]
    asked += [tmp_path / "broken.png", 3, Side(video=PICTURES[:4])]
    asked += [(tmp_path / "a.png").read_bytes(), b"nothing"]
    lengths = [estimate_tokens(value, encoder.processor) for value in asked]
    assert lengths == [3 + 600 // 64, 600 // 64, 4, 0, 0, 2 * 600 // 64, 600 // 64, 0]


def test_an_endless_iterable_is_streamed_by_a_thread_a_few_batches_ahead():
    model, processor = tiny_module()
    spy, drawn = Spy(processor), []

    def endless():
        for i in itertools.count():
            drawn.append(i)
            yield f"number {i}"

    stream = BTokEncoder(model, spy).encode_iter(endless(), batch_tokens=1, window=5)
    assert sorted(i for _ in range(10) for i in next(stream).ids) == list(range(10))
    stream.close()
    assert len(spy.texts) <= 10 + AHEAD + 1 and len(drawn) <= 20
    assert all(name.startswith("btok-prepare") for name in spy.threads)
    assert not any(t.name.startswith("btok-prepare") for t in threading.enumerate())


def test_the_mode_of_the_model_is_left_as_it_was():
    model, processor = tiny_module()
    for training in (True, False):
        model.train(training)
        BTokEncoder(model, processor).encode(SIDES[:1])
        assert model.training == training
    model.train()
    model.backbone.model.visual.eval()
    seen = []
    model.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    encoder = BTokEncoder(model, processor)
    for broken in (Side(images=["no/such.png"]), 3):
        with pytest.raises((ValueError, TypeError), match="input 1"):
            encoder.encode(["fine", broken], batch_tokens=1)
        assert model.training and not model.backbone.model.visual.training
    model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encoder.encode(["fine"])
    assert model.training and not model.backbone.model.visual.training
    assert seen and not any(seen)


def test_what_cannot_be_embedded_is_named(encoder, tmp_path):
    with pytest.raises(ValueError, match="inputs is empty"):
        encoder.encode([])
    with pytest.raises(TypeError, match="inputs is one str"):
        encoder.encode("a text")
    with pytest.raises(TypeError, match="inputs is one bytes"):
        encoder.encode(b"a picture")
    for one in (Side("a text"), Image.fromarray(PICTURES[0]), 3):
        for call in (encoder.encode, lambda one: next(encoder.encode_iter(one))):
            with pytest.raises(TypeError, match=f"inputs is one {type(one).__name__}, not a list"):
                call(one)
    with pytest.raises(ValueError, match="input 1: image of 4 bytes cannot be read: it is of no"):
        encoder.encode(["a", b"\xff\xd8\xff\xe0"])
    with pytest.raises(TypeError, match="input 2: image is a int"):
        encoder.encode(["a", "b", Side(images=[3])])
    with pytest.raises(ValueError, match=r"input 1: image .*gone\.png cannot be read"):
        encoder.encode(["a", tmp_path / "gone.png"])
    with pytest.raises(ValueError, match=r"input 0: .*gone\.txt"):
        encoder.encode([tmp_path / "gone.txt"])
    for nothing in ("", " \n", Side()):
        with pytest.raises(ValueError, match="input 1: it is empty"):
            encoder.encode(["a", nothing])
    with pytest.raises(ValueError, match="batch_tokens is 0"):
        encoder.encode(["a"], batch_tokens=0)


def test_unreadable_inputs_are_told_and_the_rest_goes_on(encoder, tmp_path, monkeypatch):
    Image.fromarray(PICTURES[0]).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-200])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 32)
    Image.fromarray(np.zeros((99, 99, 3), np.uint8)).save(tmp_path / "bomb.png")
    inputs = [*SIDES, tmp_path / "cut.jpg", "", tmp_path / "bomb.png", tmp_path / "gone.md", "z"]
    inputs += [(tmp_path / "cut.jpg").read_bytes()]
    unreadable, rows = {}, {}
    for made in encoder.encode_iter(inputs, batch_tokens=40, window=4, strict=False):
        rows |= zip(made.ids, made.vectors, strict=True)
        unreadable |= made.errors
    assert sorted(rows) == [0, 1, 2, 3, 4, 5, 10]
    assert sorted(unreadable) == [6, 7, 8, 9, 11]
    for i, reason in ((6, "truncated"), (7, "empty"), (8, "decompression bomb"), (9, "gone.md")):
        assert reason in unreadable[i]
    assert "bytes cannot be read: image file is truncated" in unreadable[11]
    assert np.abs(rows[10] - encoder.encode(["z"])[0]).max() < 1e-6


def test_a_vector_that_is_not_finite_is_refused():
    model, processor = tiny_module()
    model.backbone.get_input_embeddings().weight.data[processor.encode("q")] = float("nan")
    with pytest.raises(ValueError, match="vector of input 1 is not finite"):
        BTokEncoder(model, processor).encode(["a", "q", "b"])


def test_progress_is_shown_on_terminals_alone(encoder, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, show, expected in (
        (Terminal(), True, True),
        (Terminal(), False, False),
        (io.StringIO(), True, False),
    ):
        monkeypatch.setattr(sys, "stderr", stream)
        encoder.encode(SIDES, show_progress=show)
        assert ("6/6" in stream.getvalue()) == expected


def test_from_pretrained(tmp_path):
    encoder = BTokEncoder.from_pretrained(tiny_checkpoint(tmp_path))
    again = BTokEncoder.from_pretrained(tmp_path)
    assert np.array_equal(encoder.encode(SIDES), again.encode(SIDES))
    assert encoder.checkpoint == tmp_path


def edited(name, **changes):
    """Change values of a JSON file of a checkpoint."""

    def edit(folder):
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return edit


@pytest.mark.parametrize(
    ("break_it", "settings", "message"),
    [
        (
            lambda folder: (folder / "btok_config.json").unlink(),
            {},
            r"has no btok_config\.json.* train it first .*num_btoks=0, pooling='last'",
        ),
        (None, {"num_btoks": 2}, "num_btoks is 2, but .* was saved with 4; ask for that or leave"),
        (None, {"pooling": "last"}, "pooling is 'last', but .* was saved with 'btok'; ask"),
        (edited("config.json", model_type="bert"), {}, r"is 'bert', expected one of \('qwen2_vl'"),
        (edited("btok_config.json", format_version=2), {}, "saved with 2; use the btok that wrote"),
        (
            edited("btok_config.json", architecture="llama"),
            {},
            r"its btok_config\.json is of another checkpoint",
        ),
        (
            lambda folder: (folder / "btok_config.json").write_text("{"),
            {},
            r"btok_config\.json is no JSON .* write the checkpoint again",
        ),
        (
            lambda folder: (folder / "btok_config.json").write_text("{}"),
            {},
            r"has no btok_config\.json, so its bottleneck tokens would be untrained",
        ),
        (
            lambda folder: (folder / "config.json").write_text("[1]"),
            {},
            r"config\.json is \[1\], expected a JSON object",
        ),
        (
            lambda folder: (folder / "adapter_config.json").write_text('"a"'),
            {},
            r"adapter_config\.json is 'a', expected a JSON object",
        ),
        (
            lambda folder: (folder / "adapter_config.json").write_text(
                '{"base_model_name_or_path": 3}'
            ),
            {},
            "has adapters of 3, which is not there",
        ),
        (
            edited("btok_config.json", btok_token_ids=[5, 6, 7, 10**6]),
            {},
            r"btok_token_ids is \(5, 6, 7, 1000000\), expected ids below the vocabulary's",
        ),
        (
            lambda folder: os.truncate(folder / "model.safetensors", 1000),
            {},
            "weights of .* are cut short or damaged .* copy them again",
        ),
        (
            lambda folder: os.rename(folder / "model.safetensors", folder / "pytorch_model.bin"),
            {},
            "pickled ones can run code and are not loaded: write it again with save_pretrained",
        ),
        (shutil.rmtree, {}, "mine does not exist, and is no hub id"),
        (
            lambda folder: [shutil.rmtree(folder), torch.save({}, folder)],
            {},
            "mine is a file, expected a folder .*pickled one can run code and is not loaded",
        ),
    ],
)
def test_a_checkpoint_that_cannot_embed_is_refused(tmp_path, break_it, settings, message):
    folder = tiny_checkpoint(tmp_path / "mine")
    if break_it is not None:
        break_it(folder)
    with pytest.raises(ValueError, match=message):
        BTokEncoder.from_pretrained(folder, **settings)


def test_a_stock_checkpoint_embeds_without_bottleneck_tokens(tmp_path):
    folder = tiny_checkpoint(tmp_path)
    (folder / "btok_config.json").unlink()
    encoder = BTokEncoder.from_pretrained(folder, num_btoks=0, pooling="last")
    assert encoder.model.settings.pooling == "last" and encoder.model.btok_token_ids == ()
    assert encoder.encode(SIDES).shape == (6, 64)


def test_the_stock_tokenizer_has_the_bottleneck_tokens(tmp_path):
    from transformers import AutoTokenizer

    encoder = BTokEncoder.from_pretrained(tiny_checkpoint(tmp_path))
    said = "ab<|btok_0|><|btok_1|><|btok_2|><|btok_3|>"
    stock = AutoTokenizer.from_pretrained(tmp_path)
    ids = stock(said, add_special_tokens=False)["input_ids"]
    assert ids[2:] == list(encoder.model.btok_token_ids) and len(ids) == 6


def test_a_video_file_without_pyav_names_the_extra(encoder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "a.mp4").write_bytes(b"")
    for value in (tmp_path / "a.mp4", Side(video=str(tmp_path / "a.mp4"))):
        with pytest.raises(ImportError, match=r"pip install \"btok\[video\]\""):
            encoder.encode([value])


@pytest.mark.parametrize("count", [1, 3, 8, 40])
def test_a_video_file_is_read_evenly(encoder, tmp_path, count):
    av = pytest.importorskip("av", reason="PyAV (the extra `video`) is not installed")
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", 12
        for i in range(count):
            grey = np.full((48, 64, 3), 5 * i + 20, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey)))
        container.mux(stream.encode())
    with av.open(str(tmp_path / "a.mp4")) as container:
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(shown) == count
    frames, seconds = read_video(tmp_path / "a.mp4")
    times = np.arange(count) / 10
    assert np.allclose(seconds, times if count <= 8 else times[2::5])
    assert np.array_equal(frames, shown if count <= 8 else shown[2::5])
    side = Side(video=frames, frame_seconds=seconds)
    assert with_frames(as_side(tmp_path / "a.mp4")).frame_seconds == seconds
    assert np.abs(encoder.encode([tmp_path / "a.mp4"]) - encoder.encode([side])).max() < 1e-6
    (tmp_path / "b.mp4").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"video .*b\.mp4 cannot be read"):
        encoder.encode([tmp_path / "b.mp4"])
