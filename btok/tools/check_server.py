"""Whether a server gives a checkpoint's vectors, and if not, why: `python -m btok check-server`.

An engine that knows nothing of bottleneck tokens serves our checkpoints all the same, takes the
last row, and says nothing. What it sends is compared with our vectors, and where it differs with
those that the usual mistakes give.
"""

from __future__ import annotations

import base64
import io
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from btok.data.records import Side
from btok.encoder import BTokEncoder
from btok.files import one_line
from btok.inputs import with_frames
from btok.packing import pack

BOUND = 0.9999  # a cosine from which two vectors are the same, in fp32
SECONDS = 120.0  # that a request may take
TEXTS = {
    "a word": "milk",
    "a sentence": "what is the capital of France?",
    "a space at its end": "a question: ",
    "a line break": "first line\nsecond line",
    "other alphabets": "Straße, naïve, 東京, Привет, 🙂",
    "an instruction": "Represent the question for finding documents: who wrote Faust?",
    "120 words": " ".join(f"word{i}" for i in range(120)),
    "1,200 words": " ".join(f"word{i}" for i in range(1200)),
}
Vector = NDArray[np.float32]


class Compared(NamedTuple):
    """An input's name and side; the server's vector, or why there is none; tokens that the server
    counted, None where it does not say; our vector and tokens.
    """

    name: str
    side: Side
    got: Vector | None
    error: str
    counted: int | None
    ours: Vector
    tokens: int

    @property
    def cosine(self) -> float:
        """Of both vectors; NaN where there is none, or one of another length."""
        if self.got is None or self.got.shape != self.ours.shape:
            return float("nan")
        return float(self.got @ self.ours / max(float(np.linalg.norm(self.got)), 1e-12))


def sides(encoder: BTokEncoder) -> dict[str, Side]:
    """What is sent, by name: texts and, where the model has vision, pictures."""
    found = {name: Side(text) for name, text in TEXTS.items()}
    if encoder.processor.has_vision:
        rng = np.random.default_rng(0)
        for name, (height, width), text in (
            ("a small picture", (56, 84), "what is it?"),
            ("a picture alone", (112, 112), ""),
            ("a large picture", (901, 1203), "what is it?"),
        ):
            rough = rng.integers(0, 256, (height // 28 + 1, width // 28 + 1, 3), np.uint8)
            picture = rough.repeat(28, 0).repeat(28, 1)[:height, :width]
            found[name] = Side(text, [picture])
    return found


def compare(url: str, encoder: BTokEncoder, model: str | None = None) -> list[Compared]:
    """Send all inputs to a server of OpenAI's embeddings interface; pictures as vLLM's takes them,
    in messages.

    Args:
        url: of the server, with or without "/v1".
        encoder: of the checkpoint that it should serve.
        model: its name there; None for the first that the server lists.

    Raises:
        ValueError: no server there, or none that embeds texts.
    """
    url = url.rstrip("/").removesuffix("/v1") + "/v1"
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"url is {url.removesuffix('/v1')!r}, expected http:// or https://")
    if model is None:
        try:
            model = str(_sent(f"{url}/models")["data"][0]["id"])
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{url}/models lists no model; give --model") from error
    asked = sides(encoder)
    ours = encoder.encode(list(asked.values()), show_progress=False)
    found = []
    for (name, side), vector in zip(asked.items(), ours, strict=True):
        sample = encoder.processor(with_frames(side))
        tokens = len(sample["input_ids"]) + len(encoder.model.btok_token_ids)
        got, refusal, counted = None, "", None
        body: dict[str, Any] = {"model": model, "encoding_format": "float"}
        body |= {"messages": _messages(side)} if side.images else {"input": [side.text]}
        try:
            answer = _sent(f"{url}/embeddings", body)
            got = np.array(answer["data"][0]["embedding"], np.float32)
            counted = answer.get("usage", {}).get("prompt_tokens")
        except (KeyError, IndexError, TypeError) as wrong:
            raise ValueError(f"{url}/embeddings gives no embeddings ({wrong!r})") from wrong
        except ValueError as refused:
            if not side.images:
                raise
            refusal = str(refused)  # as of an engine without pictures: texts may be right
        found.append(Compared(name, side, got, refusal, counted, vector, tokens))
    return found


def _messages(side: Side) -> list[dict[str, Any]]:
    from PIL import Image

    parts: list[dict[str, Any]] = []
    for image in side.images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        data = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": data}})
    if side.text:
        parts.append({"type": "text", "text": side.text})
    return [{"role": "user", "content": parts}]


def _sent(url: str, body: Mapping[str, Any] | None = None) -> Any:
    """A server's answer; a ValueError that says what it refused, or that there is none."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        said = one_line(error.read().decode(errors="replace"))[:300]
        raise ValueError(f"{url} answers {error.code}: {said}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{url} does not answer ({one_line(error)})") from error


def mistakes(encoder: BTokEncoder, side: Side) -> Iterator[tuple[str, Vector]]:
    """What usual mistakes make of an input: in words, and its vector of length 1."""
    model = encoder.model
    sample = encoder.processor(with_frames(side))
    btoks = tuple(model.btok_token_ids)
    count = len(btoks)

    def states(ids: Sequence[int]) -> torch.Tensor:
        packed = pack(
            [(sample, None)],
            btok_token_ids=ids,
            prefix_ids=(),
            suffix_ids=(),
            backbone_config=model.backbone.config,
        )
        with torch.inference_mode():
            return model.hidden_states(packed.to(model.backbone.device)).float().cpu()

    def last(rows: torch.Tensor) -> torch.Tensor:
        return rows[-1]

    def mean(rows: torch.Tensor) -> torch.Tensor:
        return rows.mean(0)

    def mean_of_btoks(rows: torch.Tensor) -> torch.Tensor:
        return rows[-count:].mean(0)

    def mean_of_directions(rows: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(rows[-count:], dim=-1).mean(0)

    pooling = model.settings.pooling
    guesses: list[tuple[str, Sequence[int], Callable[[torch.Tensor], torch.Tensor]]] = []
    if count:
        missing = f"the {count} bottleneck tokens are not in its input"
        twice = f"the {count} bottleneck tokens are in its input twice"
        guesses += [
            (f"{missing}, and it takes the last row (LAST)", (), last),
            (f"{missing}, and it takes the mean of all rows (MEAN)", (), mean),
            (twice, btoks * 2, {"btok": mean_of_btoks, "last": last, "mean": mean}[pooling]),
        ]
    if pooling == "btok":
        guesses.append(("it normalises each row before the mean", btoks, mean_of_directions))
    elif count:
        said = f"it takes the mean of the {count} bottleneck rows, not what the checkpoint pools"
        guesses.append((said, btoks, mean_of_btoks))
    if pooling != "last":
        said = "it takes the last row (LAST), not what the checkpoint pools"
        guesses.append((said, btoks, last))
    if pooling != "mean":
        said = "it takes the mean of all rows (MEAN), not what the checkpoint pools"
        guesses.append((said, btoks, mean))
    for said, ids, pooled in guesses:
        yield said, torch.nn.functional.normalize(pooled(states(ids)), dim=-1).numpy()


def causes(encoder: BTokEncoder, found: Sequence[Compared], bound: float = BOUND) -> list[str]:
    """In words, what probably is wrong with a server; empty where nothing is."""
    said = []
    sent = [each for each in found if each.got is not None]
    for each in sent:
        assert each.got is not None
        if each.got.shape != each.ours.shape:
            had = f"its vectors have {each.got.shape[0]} components"
            return [f"{had}, ours {each.ours.shape[0]}: it serves another model, or `dimensions`"]
    lengths = [float(np.linalg.norm(each.got)) for each in sent if each.got is not None]
    if any(abs(length - 1) > 1e-2 for length in lengths):
        said.append(
            f"its vectors are not of length 1, but {min(lengths):.3g} to {max(lengths):.3g}"
        )
    wrong = [each for each in sent if not each.cosine >= bound]
    texts = [each for each in wrong if not each.side.images]
    if texts:
        closest: dict[str, list[float]] = {}
        for each in texts[:3]:
            assert each.got is not None
            got = each.got / np.linalg.norm(each.got)
            for guess, vector in mistakes(encoder, each.side):
                closest.setdefault(guess, []).append(float(got @ vector))
        best = max(closest, key=lambda guess: min(closest[guess]))
        if min(closest[best]) >= bound:
            said.append(best)
    if counts := {each.counted - each.tokens for each in texts if each.counted is not None} - {0}:
        differ = ", ".join(f"{count:+d}" for count in sorted(counts))
        said.append(f"it counts other tokens than we do ({differ})")
    elif texts and not said:
        said.append(
            "none of the usual mistakes gives its vectors: other weights, precision, tokens"
        )
    if wrong and not texts:
        counts = {e.counted - e.tokens for e in wrong if e.counted is not None} - {0}
        why = "resizes pictures otherwise" if counts else "has other pixels or positions for them"
        said.append(f"texts are right, pictures are not: it {why}")
    return said


def report(
    encoder: BTokEncoder, found: Sequence[Compared], bound: float = BOUND
) -> tuple[bool, str]:
    """Whether all vectors are the same, and what there is to say, a line per input."""
    lines = []
    for each in found:
        told = each.error or f"cosine {each.cosine:.6f}"
        if each.counted is not None and each.counted != each.tokens:
            told += f", {each.counted} tokens where we have {each.tokens}"
        lines.append(f"{'      ' if each.cosine >= bound else 'WRONG '}{each.name}: {told}")
    right = all(each.cosine >= bound for each in found)
    reasons = causes(encoder, found, bound)
    if refused := sum(each.got is None for each in found):
        reasons.append(f"it refuses {refused} pictures")
    verdict = f"the same vectors, to a cosine of {bound:g}" if right else "other vectors"
    return right and not reasons, "\n".join([*lines, "; ".join([verdict, *reasons])])
