"""Whether a server gives a checkpoint's vectors, and if not, why: `python -m btok check-server`.

An engine that knows nothing of bottleneck tokens serves our checkpoints all the same, takes the
last row, and says nothing. What it sends is compared with our vectors, and where it differs with
those that the usual mistakes give.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from torch.nn.functional import normalize

from btok.data.records import Side
from btok.encoder import BTokEncoder
from btok.files import one_line, printable
from btok.inputs import with_frames
from btok.packing import pack
from btok.tools.command_line import load

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
Vector = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class CheckServer:
    """Ask a server for embeddings of a dozen inputs, compare them with the checkpoint's, and say
    what is wrong; exits with 1 where something is.

    Args:
        url: of a server with OpenAI's embeddings interface, as of vLLM: http://localhost:8000.
        checkpoint: what it should serve.
        model: its name there; the first that the server lists by default.
        bound: a cosine from which vectors are the same; 0.999 suits a server in bfloat16.
        api_key: sent to it; OPENAI_API_KEY's by default.
    """

    url: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="URL")]
    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    model: str | None = None
    bound: float = BOUND
    api_key: str | None = None


def check_server(command: CheckServer) -> bool:
    """Run the command: print what there is to say; whether all is right.

    Raises:
        ValueError: a bound that is not above 0 and at most 1; as `compare` says.
    """
    if not 0 < command.bound <= 1:
        raise ValueError(f"bound is {command.bound}, expected above 0 and at most 1")
    encoder, key = load(command.checkpoint), os.environ.get("OPENAI_API_KEY")
    found = compare(command.url, encoder, command.model, command.api_key or key)
    right, said = report(encoder, found, command.bound)
    print("\n".join(map(printable, said.splitlines())))
    return right


class Compared(NamedTuple):
    """An input with our vector and the one that a server made of it.

    Args:
        name, side: the input's.
        ours, tokens: our vector, and our number of tokens.
        got: the server's vector; empty where it refused the input.
        counted: tokens that it counted; None where it does not say.
        error: what it said where it refused the input.
    """

    name: str
    side: Side
    ours: Vector
    tokens: int
    got: Vector = np.empty(0)
    counted: int | None = None
    error: str = ""

    @property
    def kind(self) -> str:
        """The kind of input that was embedded: "texts", "pictures" or "frames"."""
        return "frames" if len(self.side.video) else "pictures" if self.side.images else "texts"

    @property
    def cosine(self) -> float:
        """The cosine of our vector and the server's; NaN where it sent none, or one of another
        length.
        """
        if self.got.shape != self.ours.shape:
            return float("nan")
        return float(directed(self.got) @ self.ours)

    @property
    def more(self) -> int:
        """The number of tokens that the server counts beyond ours; 0 where it does not say."""
        return 0 if self.counted is None else self.counted - self.tokens


def directed(vector: Vector) -> Vector:
    """A vector scaled to length 1."""
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


def sides(encoder: BTokEncoder) -> dict[str, Side]:
    """The inputs that are sent, by name: texts and, where the model has vision, pictures and four
    frames of a video, a second apart, as bytes of files.
    """
    found = {name: Side(text) for name, text in TEXTS.items()}
    if encoder.processor.has_vision:
        rng = np.random.default_rng(0)

        def file(height: int, width: int, kind: str) -> bytes:
            from PIL import Image

            rough = rng.integers(0, 256, (height // 28 + 1, width // 28 + 1, 3), np.uint8)
            made = io.BytesIO()
            Image.fromarray(rough.repeat(28, 0).repeat(28, 1)[:height, :width]).save(made, kind)
            return made.getvalue()

        found["a small picture"] = Side("what is it?", [file(56, 84, "PNG")])
        found["a picture alone"] = Side("", [file(112, 112, "PNG")])
        found["two pictures"] = Side("which?", [file(84, 56, "PNG"), file(56, 56, "PNG")])
        found["a large picture"] = Side("what is it?", [file(901, 1203, "PNG")])
        frames = [file(112, 112, "JPEG") for _ in range(4)]
        found["frames"] = Side("what happens?", video=frames, frame_seconds=range(4))
    return found


def compare(
    url: str, encoder: BTokEncoder, model: str | None = None, api_key: str | None = None
) -> list[Compared]:
    """Send all inputs to a server of OpenAI's embeddings interface; pictures and frames as vLLM's
    takes them, in messages. One that is longer than what the server says it takes is left out.

    Args:
        url: of the server, with or without "/v1".
        encoder: of the checkpoint that it should serve.
        model: its name there; None for the first that the server lists.
        api_key: sent as a bearer's token; None for none.

    Raises:
        ValueError: no server there, or none that embeds texts, or none of these inputs.
    """
    url = url.rstrip("/").removesuffix("/v1") + "/v1"
    if not url.lower().startswith(("http://", "https://")):
        raise ValueError(f"url is {url.removesuffix('/v1')!r}, expected http:// or https://")
    model, most = _served(url, model, api_key)
    asked = []
    for name, side in sides(encoder).items():
        sample = encoder.processor(with_frames(side))
        tokens = len(sample["input_ids"]) + len(encoder.model.btok_token_ids)
        if tokens <= most:
            asked.append((name, side, tokens))
    if not asked:
        raise ValueError(f"{url}/models: max_model_len is {most:g}, which takes none of the inputs")
    ours = encoder.encode([side for _, side, _ in asked], show_progress=False)
    found = []
    for (name, side, tokens), vector in zip(asked, ours, strict=True):
        made = Compared(name, side, vector, tokens)
        body: dict[str, Any] = {"model": model, "encoding_format": "float"}
        body |= {"input": [side.text]} if made.kind == "texts" else {"messages": messages(side)}
        try:
            answer = _sent(f"{url}/embeddings", body, api_key)
        except ValueError as refused:
            if made.kind == "texts":
                raise
            # as of an engine without pictures, whose texts may be right
            found.append(made._replace(error=str(refused)))
            continue
        got, counted = _read(answer, f"{url}/embeddings")
        found.append(made._replace(got=got, counted=counted))
    return found


def _read(answer: Any, where: str) -> tuple[Vector, int | None]:
    """The vector of an answer, and its tokens; a ValueError for one that has no vector."""
    try:
        values = answer["data"][0]["embedding"]
        if not isinstance(values, list) or not all(isinstance(x, int | float) for x in values):
            raise TypeError(
                f"an embedding is a {type(values).__name__}, expected a list of numbers"
            )
        usage = answer.get("usage")
        counted = usage.get("prompt_tokens") if isinstance(usage, Mapping) else None
        return np.array(values, np.float64), counted if isinstance(counted, int) else None
    except (KeyError, IndexError, TypeError, AttributeError) as wrong:
        raise ValueError(f"{where} gives no embeddings ({one_line(repr(wrong))[:200]})") from wrong


def _served(url: str, model: str | None, api_key: str | None) -> tuple[str, float]:
    """A model's name on the server, and the most tokens that it takes, if it says."""
    try:
        listed = _sent(f"{url}/models", api_key=api_key)["data"]
        one: dict[str, Any] = next((each for each in listed if model in (None, each["id"])), {})
        name = str(one["id"]) if model is None else model
        most = one.get("max_model_len")
        return name, most if isinstance(most, int) and most > 0 else np.inf
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        if model is not None:
            return model, np.inf
        if isinstance(error, ValueError):
            raise
        raise ValueError(f"{url}/models lists no model; give --model") from error


def messages(side: Side) -> list[dict[str, Any]]:
    """A side whose images are PNG files' bytes, and its frames JPEG's, as vLLM takes it."""
    parts: list[dict[str, Any]] = []

    def add(kind: str, files: Sequence[bytes], what: str) -> None:
        data = ",".join(base64.b64encode(file).decode() for file in files)
        parts.append({"type": f"{kind}_url", f"{kind}_url": {"url": f"data:{what};base64,{data}"}})

    for image in side.images:
        add("image", [image], "image/png")
    if len(side.video):
        add("video", side.video, "video/jpeg")
    if side.text:
        parts.append({"type": "text", "text": side.text})
    return [{"role": "user", "content": parts}]


def _sent(url: str, body: Mapping[str, Any] | None = None, api_key: str | None = None) -> Any:
    """A server's answer; a ValueError that says what it refused, or that there is none."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    headers |= {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        request = urllib.request.Request(url, data, headers)
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        said = one_line(error.read().decode(errors="replace"))[:300]
        said = said or one_line(error.headers.get("Location") or error.reason)
        if error.code == 404 and said == '{"detail":"Not Found"}':
            said += "; of vLLM's server this one embeds nothing: start it with --runner pooling"
        raise ValueError(f"{url} answers {error.code}: {said}") from error
    except (OSError, ValueError, RecursionError, http.client.HTTPException) as error:
        raise ValueError(f"{url} does not answer ({one_line(repr(error))[:300]})") from error


def mistakes(encoder: BTokEncoder, side: Side) -> Iterator[tuple[str, Vector]]:
    """Yield what usual mistakes make of an input: each in words, with its vector of length 1."""
    model = encoder.model
    sample = encoder.processor(with_frames(side))
    btoks = tuple(model.btok_token_ids)
    count, pooling = len(btoks), model.settings.pooling

    @cache
    def states(ids: tuple[int, ...]) -> torch.Tensor:  # [T, D]
        packed = pack(
            [(sample, None)],
            btok_token_ids=ids,
            prefix_ids=(),
            suffix_ids=(),
            backbone_config=model.backbone.config,
        )
        with torch.inference_mode():
            return model.hidden_states(packed.to(model.backbone.device)).float().cpu()

    pooled: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "last": lambda rows: rows[-1],
        "mean": lambda rows: rows.mean(0),
        "btok": lambda rows: rows[-count:].mean(0),
        "directions": lambda rows: normalize(rows[-count:], dim=-1).mean(0),
    }
    takes = {
        "btok": f"it takes the mean of the {count} bottleneck rows",
        "last": "it takes the last row (LAST)",
        "mean": "it takes the mean of all rows (MEAN)",
    }

    def made(ids: tuple[int, ...], how: str) -> Vector:
        return normalize(pooled[how](states(ids)), dim=-1).numpy()

    if count:
        there = f"the {count} bottleneck tokens are"
        for how in ("last", "mean"):
            yield f"{there} not in its input, and {takes[how]}", made((), how)
        yield f"{there} in its input twice", made(btoks * 2, pooling)
    if pooling == "btok":
        yield "it normalises each row before the mean", made(btoks, "directions")
    for how, said in takes.items():
        if how != pooling and (count or how != "btok"):
            yield f"{said}, not what the checkpoint pools", made(btoks, how)


def causes(encoder: BTokEncoder, found: Sequence[Compared], bound: float = BOUND) -> list[str]:
    """Sentences that tell what probably is wrong with a server; empty where nothing is."""
    said = []
    sent = [each for each in found if not each.error]
    for each in sent:
        if each.got.shape != each.ours.shape:
            had = f"its vectors have {each.got.shape[0]} components"
            return [f"{had}, ours {each.ours.shape[0]}: it serves another model, or `dimensions`"]
    if not all(np.isfinite(each.got).all() for each in sent):
        return ["its vectors hold what is no number (NaN, infinity)"]
    lengths = [float(np.linalg.norm(each.got)) for each in sent]
    if any(abs(length - 1) > 1e-2 for length in lengths):
        said.append(
            f"its vectors are not of length 1, but {min(lengths):.3g} to {max(lengths):.3g}"
        )
    wrong = [each for each in sent if not each.cosine >= bound]
    texts = [each for each in wrong if each.kind == "texts"]
    if texts:
        closest: dict[str, list[float]] = {}
        for each in texts[:3]:
            for guess, vector in mistakes(encoder, each.side):
                closest.setdefault(guess, []).append(float(directed(each.got) @ vector))
        best = max(closest, key=lambda guess: min(closest[guess]))
        if min(closest[best]) >= bound:
            said.append(best)
    if counts := {each.more for each in texts} - {0}:
        differ = ", ".join(f"{count:+d}" for count in sorted(counts))
        said.append(f"it counts other tokens than we do ({differ})")
    elif texts and not said:
        said.append(
            "none of the usual mistakes gives its vectors: other weights, precision, tokens"
        )
    if wrong and not texts:
        differs = any(each.more for each in wrong)
        why = "resizes them otherwise" if differs else "has other pixels or positions for them"
        if differs and all(len(each.side.images) > 1 for each in wrong):
            why = "puts the parts of a message together otherwise (another chat template, or "
            why += "--chat-template-content-format)"
        off = {each.kind for each in wrong}
        right = {each.kind for each in sent} - off
        kinds = (" and ".join(sorted(some, reverse=True)) for some in (right, off))
        said.append("{} are right, {} are not: it ".format(*kinds) + why)
    return said


def report(
    encoder: BTokEncoder, found: Sequence[Compared], bound: float = BOUND
) -> tuple[bool, str]:
    """Whether all vectors are the same, and what there is to say, a line per input."""
    lines = []
    for each in found:
        told = each.error or f"cosine {each.cosine:.6f}"
        if each.more:
            told += f", {each.counted} tokens where we have {each.tokens}"
        mark = "REFUSED " if each.error else "" if each.cosine >= bound else "WRONG "
        lines.append(f"{mark:8}{each.name}: {told}")
    if left := sides(encoder).keys() - {each.name for each in found}:
        lines.append(f"{'':8}left out, of more tokens than it takes: {', '.join(sorted(left))}")
    reasons = causes(encoder, found, bound)
    if refused := [each.name for each in found if each.error]:
        reasons.append(f"it refuses {', '.join(refused)}")
    same = all(each.cosine >= bound for each in found if not each.error)
    verdict = f"the same vectors, to a cosine of {bound:g}" if same else "other vectors"
    return same and not reasons, "\n".join([*lines, "; ".join([verdict, *reasons])])
