"""check-server tells a right server, and of a wrong one what is wrong, by a stand-in of HTTP."""

from __future__ import annotations

import base64
import io
import json
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from helpers import tiny_checkpoint, tiny_module
from PIL import Image

from btok import BTokEncoder, Side
from btok.model import BTokModel
from btok.tools.check_server import mistakes, sides
from btok.tools.cli import main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Its final norm's weights are not 1, as no trained model's are: rows differ in length."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("tiny"))
    encoder = BTokEncoder.from_pretrained(folder)
    norm = encoder.model.family.decoder(encoder.model.backbone).norm
    with torch.no_grad():
        norm.weight.copy_(torch.rand(64, generator=torch.Generator().manual_seed(0)) ** 4)
    encoder.model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(checkpoint):
    return BTokEncoder.from_pretrained(checkpoint)


def asked_for(body):
    """The side that a request is about."""
    if "input" in body:
        return Side(body["input"][0])
    text, shown = "", {"image_url": [], "video_url": []}
    for part in body["messages"][0]["content"]:
        if part["type"] == "text":
            text = part["text"]
            continue
        start, *files = part[part["type"]]["url"].split(",")
        assert (
            start
            == {"image_url": "data:image/png", "video_url": "data:video/jpeg"}[part["type"]]
            + ";base64"
        )
        for file in files:
            picture = Image.open(io.BytesIO(base64.b64decode(file)))
            shown[part["type"]].append(np.asarray(picture))
    images, video = shown.values()
    return Side(text, images, video, range(len(video)))


class Address(str):
    def __new__(cls, url, keys):
        made = super().__new__(cls, url)
        made.keys = keys
        return made


@contextmanager
def serving(answer, models=("served",), **more):
    """A server's address; `answer` gives a side's vector and tokens, or raises what it refuses;
    or all that is sent; `more` is said of each model. What came as keys is in the address's `keys`.
    """

    keys = []

    class Handler(BaseHTTPRequestHandler):
        def reply(self, status, content):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def do_GET(self):
            assert self.path == "/v1/models"
            self.reply(200, {"data": [{"id": name, **more} for name in models]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/embeddings" and body["model"] == "served"
            keys.append(self.headers["Authorization"])
            try:
                made = answer(asked_for(body))
            except ValueError as error:
                return self.reply(400, {"message": str(error)})
            if isinstance(made, dict):
                return self.reply(200, made)
            vector, tokens = made
            data = [{"embedding": np.asarray(vector).tolist()}]
            self.reply(200, {"data": data, "usage": {"prompt_tokens": tokens}})

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield Address(f"http://127.0.0.1:{server.server_port}", keys)
    finally:
        server.shutdown()
        server.server_close()


def checked(url, checkpoint, capsys, *more):
    status = main(["check-server", url, str(checkpoint), *more])
    return status, capsys.readouterr()


def test_a_right_server(encoder, checkpoint, capsys):
    def answer(side):
        count = len(encoder.processor(side)["input_ids"]) + 4
        return encoder.encode([side], show_progress=False)[0], count

    with serving(answer) as url:
        for address in (url, f"{url}/v1/"):
            status, said = checked(address, checkpoint, capsys)
            assert status == 0 and said.out.endswith("the same vectors, to a cosine of 0.9999\n")
            lines = said.out.splitlines()
            assert len(lines) == len(sides(encoder)) + 1 == 14
            assert all("cosine 1.000000" in line for line in lines[:-1])


def by(encoder, ids, pooling):
    """Another pooling of the same weights."""
    model = BTokModel.from_backbone(encoder.model.backbone, btok_token_ids=ids, pooling=pooling)
    return BTokEncoder(model, encoder.processor)


WRONG = {
    "4 bottleneck tokens are not in its input, and it takes the last row (LAST)": ((), "last"),
    "4 bottleneck tokens are not in its input, and it takes the mean": ((), "mean"),
    "it takes the last row (LAST), not what the checkpoint pools": (1, "last"),
    "it takes the mean of all rows (MEAN), not what the checkpoint pools": (1, "mean"),
    "the 4 bottleneck tokens are in its input twice": (2, "btok"),
    "it normalises each row before the mean": (1, "rows"),
}


@pytest.mark.parametrize("reason", WRONG)
def test_a_usual_mistake_is_named(encoder, checkpoint, capsys, reason):
    times, pooling = WRONG[reason]
    ids = tuple(encoder.model.btok_token_ids) * (times or 0)

    def answer(side):
        count = len(encoder.processor(side)["input_ids"]) + len(ids)
        if pooling in ("last", "mean"):
            return by(encoder, ids, pooling).encode([side], show_progress=False)[0], count
        sample = encoder.processor(side)
        model = by(encoder, ids, "btok").model
        with torch.inference_mode():
            rows = model.hidden_states(model.pack([sample]))[-4:]
        if pooling == "rows":
            rows = torch.nn.functional.normalize(rows, dim=-1)
        return torch.nn.functional.normalize(rows.mean(0), dim=-1).numpy(), count

    with serving(answer) as url:
        status, said = checked(url, checkpoint, capsys)
    assert status == 1 and said.out.count("WRONG ") >= 8
    assert reason in said.out.splitlines()[-1]
    assert ("counts other tokens than we do" in said.out) == (times != 1)


def test_guesses_are_told_apart(encoder):
    """Else a cause would be named by chance."""
    vectors = np.stack([vector for _, vector in mistakes(encoder, Side("what is it?"))])
    vectors = np.concatenate([vectors, encoder.encode([Side("what is it?")])])
    same = (vectors @ vectors.T > 0.9999).sum()
    assert same == len(vectors)


def test_other_faults(encoder, checkpoint, capsys):
    def right(side):
        return encoder.encode([side], show_progress=False)[0], None

    def long(side):
        return 3 * right(side)[0], None

    def short(side):
        return right(side)[0][:8], None

    def noise(side):
        vector = np.random.default_rng(len(side.text)).standard_normal(64)
        return vector / np.linalg.norm(vector), None

    def blind(side):
        if side.images:
            raise ValueError("pictures are not supported")
        return right(side)

    def shrunk(side):
        return right(replace(side, images=[image[::3, ::3] for image in side.images]))

    def still(side):
        return right(replace(side, video=side.video[:2], frame_seconds=[0, 1][: len(side.video)]))

    def shaken(side):
        return still(replace(side, images=[image[::-1] for image in side.images]))

    for answer, status, reason in (
        (long, 1, "its vectors are not of length 1, but 3 to 3"),
        (short, 1, "its vectors have 8 components, ours 64"),
        (noise, 1, "none of the usual mistakes gives its vectors"),
        (blind, 1, "same vectors, to a cosine of 0.9999; it refuses a small picture, a picture al"),
        (shrunk, 1, "other vectors; texts and frames are right, pictures are not: it"),
        (still, 1, "texts and pictures are right, frames are not"),
        (shaken, 1, "texts are right, pictures and frames are not"),
    ):
        with serving(answer) as url:
            got, said = checked(url, checkpoint, capsys)
        assert got == status and reason in said.out.splitlines()[-1], said.out


def test_what_is_too_long_for_a_server_is_left_out(encoder, checkpoint, capsys):
    def answer(side):
        assert len(side.text) < 1000
        return encoder.encode([side], show_progress=False)[0], None

    with serving(answer, max_model_len=1000) as url:
        status, said = checked(url, checkpoint, capsys)
    assert status == 0 and "left out, of more tokens than it takes: 1,200 words\n" in said.out


def test_a_text_model_that_pools_the_last_row(tmp_path, capsys):
    model, processor = tiny_module("llama")
    settings = {"btok_token_ids": model.btok_token_ids, "pooling": "last"}
    model = BTokModel.from_backbone(model.backbone, **settings)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    right = BTokEncoder.from_pretrained(tmp_path)
    averaged = by(right, model.btok_token_ids, "btok")
    for served, status, reason in (
        (right, 0, "the same vectors"),
        (averaged, 1, "it takes the mean of the 4 bottleneck rows, not what the checkpoint pools"),
    ):
        with serving(lambda side: (served.encode([side])[0], None)) as url:  # noqa: B023
            got, said = checked(url, tmp_path, capsys)
        assert got == status and reason in said.out.splitlines()[-1]


def test_answers_that_are_no_vectors(encoder, checkpoint, capsys):
    def answering(embedding, **more):
        return lambda side: {"data": [{"embedding": embedding}], **more}

    for answer, status, message in (
        (answering(None), 2, "gives no embeddings (TypeError('an embedding is a NoneType"),
        (answering("QUFB"), 2, "gives no embeddings (TypeError('an embedding is a str"),
        (answering([[1.0] * 64] * 4), 2, "gives no embeddings (TypeError('an embedding is a list"),
        (lambda side: {"data": []}, 2, "gives no embeddings (IndexError("),
        (lambda side: {"error": "no"}, 2, "gives no embeddings (KeyError('data')"),
        (answering([float("nan")] * 64, usage=None), 1, "its vectors hold what is no number"),
        (answering([1e300] * 64, usage=[]), 1, "its vectors are not of length 1"),
        (answering([0.0] * 64), 1, "its vectors are not of length 1, but 0 to 0"),
    ):
        with serving(answer) as url:
            got, said = checked(url, checkpoint, capsys)
        text = said.err if status == 2 else said.out.splitlines()[-1]
        assert got == status and message in text, (text, message)
    with serving(answering([1.0]), max_model_len=1) as url:
        got, said = checked(url, checkpoint, capsys)
    assert got == 2 and "max_model_len is 1, which takes none of the inputs" in said.err


def test_parts_that_are_joined_otherwise(encoder, checkpoint, capsys):
    def joined(side):
        sample = encoder.processor(side)
        text = side.text if len(side.images) < 2 else f"\n{side.text}"
        vector = encoder.encode([replace(side, text=text)], show_progress=False)[0]
        return vector, len(sample["input_ids"]) + 4 + (len(side.images) > 1)

    with serving(joined) as url:
        status, said = checked(url, checkpoint, capsys)
    assert status == 1 and said.out.count("WRONG") == 1
    assert "it puts the parts of a message together otherwise" in said.out.splitlines()[-1]


def test_a_key_is_sent(encoder, checkpoint, capsys, monkeypatch):
    def answer(side):
        return encoder.encode([side], show_progress=False)[0], None

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with serving(answer) as url:
        assert checked(url, checkpoint, capsys)[0] == 0 and set(url.keys) == {None}
    monkeypatch.setenv("OPENAI_API_KEY", "of the environment")
    for more, key in (((), "of the environment"), (("--api-key", "given"), "given")):
        with serving(answer) as url:
            status, _ = checked(url.replace("http", "HTTP"), checkpoint, capsys, *more)
        assert status == 0 and set(url.keys) == {f"Bearer {key}"}


def test_mistakes_are_one_line(checkpoint, capsys):
    def refusing(side):
        raise ValueError("no such model\nat all")

    with serving(refusing) as url, serving(refusing, models=()) as empty:
        for address, more, message in (
            (url, (), "/v1/embeddings answers 400: "),
            (empty, (), "/v1/models lists no model; give --model"),
            ("http://127.0.0.1:9", (), "http://127.0.0.1:9/v1/models does not answer"),
            ("http://localhost:80x0", (), "/v1/models does not answer (InvalidURL("),
            ("http://local host:80", (), "/v1/models does not answer ("),
            ("localhost:8000", (), "url is 'localhost:8000', expected http:// or https://"),
            (url, ("--bound", "2"), "bound is 2.0, expected above 0 and at most 1"),
        ):
            status, said = checked(address, checkpoint, capsys, *more)
            assert status == 2 and said.err.startswith("error: ") and said.err.count("\n") == 1
            assert message in said.err
