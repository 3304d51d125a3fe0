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
Vector = NDArray[np.floating[Any]]


class Compared(NamedTuple):
    """What a server made of an input.

    Args:
        name, side: the input's.
        got: the server's vector; None where there is none.
        error: what it said then.
        counted: tokens that it counted; None where it does not say.
        ours, tokens: our vector, and our number of tokens.
    """

    name: str
    side: Side
    got: Vector | None
    error: str
    counted: int | None
    ours: Vector
    tokens: int

    @property
    def kind(self) -> str:
        """What is embedded: "texts", "pictures" or "frames"."""
        return "frames" if len(self.side.video) else "pictures" if self.side.images else "texts"

    @property
    def cosine(self) -> float:
        """Of both vectors; NaN where there is none, or one of another length."""
        if self.got is None or self.got.shape != self.ours.shape:
            return float("nan")
        return float(self.got @ self.ours / max(float(np.linalg.norm(self.got)), 1e-12))


def sides(encoder: BTokEncoder) -> dict[str, Side]:
    """What is sent, by name: texts and, where the model has vision, pictures and four frames of a
    video, a second apart, as bytes of files.
    """
    found = {name: Side(text) for name, text in TEXTS.items()}
    if encoder.processor.has_vision:
        rng = np.random.default_rng(0)

        def file(height: int, width: int, kind: str) -> bytes:
            rough = rng.integers(0, 256, (height // 28 + 1, width // 28 + 1, 3), np.uint8)
            return _file(rough.repeat(28, 0).repeat(28, 1)[:height, :width], kind)

        found["a small picture"] = Side("what is it?", [file(56, 84, "PNG")])
        found["a picture alone"] = Side("", [file(112, 112, "PNG")])
        found["two pictures"] = Side("which?", [file(84, 56, "PNG"), file(56, 56, "PNG")])
        found["a large picture"] = Side("what is it?", [file(901, 1203, "PNG")])
        frames = [file(112, 112, "JPEG") for _ in range(4)]
        found["frames"] = Side("what happens?", video=frames, frame_seconds=range(4))
    return found


def _file(picture: NDArray[np.uint8], kind: str) -> bytes:
    from PIL import Image

    made = io.BytesIO()
    Image.fromarray(picture).save(made, kind)
    return made.getvalue()


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
        made = Compared(name, side, None, "", None, vector, tokens)
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
        made = made._replace(got=got, counted=counted)
        found.append(made)
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
    if any(not np.isfinite(each.got).all() for each in sent if each.got is not None):
        return ["its vectors hold what is no number (NaN, infinity)"]
    lengths = [float(np.linalg.norm(each.got)) for each in sent if each.got is not None]
    if any(abs(length - 1) > 1e-2 for length in lengths):
        said.append(
            f"its vectors are not of length 1, but {min(lengths):.3g} to {max(lengths):.3g}"
        )
    wrong = [each for each in sent if not each.cosine >= bound]
    texts = [each for each in wrong if each.kind == "texts"]
    if texts:
        closest: dict[str, list[float]] = {}
        for each in texts[:3]:
            assert each.got is not None
            got = each.got / max(float(np.linalg.norm(each.got)), 1e-12)
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
        why = "resizes them otherwise" if counts else "has other pixels or positions for them"
        if counts and all(len(each.side.images) > 1 for each in wrong):
            why = "puts the parts of a message together otherwise (another chat template, or "
            why += "--chat-template-content-format)"
        kinds = [{e.kind for e in some} for some in (sent, wrong)]
        right, off = (
            " and ".join(sorted(found, reverse=True)) for found in (kinds[0] - kinds[1], kinds[1])
        )
        said.append(f"{right} are right, {off} are not: it {why}")
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
        mark = "REFUSED " if each.got is None else "" if each.cosine >= bound else "WRONG "
        lines.append(f"{mark:8}{each.name}: {told}")
    if left := sides(encoder).keys() - {each.name for each in found}:
        lines.append(f"{'':8}left out, of more tokens than it takes: {', '.join(sorted(left))}")
    reasons = causes(encoder, found, bound)
    if refused := [each.name for each in found if each.got is None]:
        reasons.append(f"it refuses {', '.join(refused)}")
    same = all(each.cosine >= bound for each in found if each.got is not None)
    verdict = f"the same vectors, to a cosine of {bound:g}" if same else "other vectors"
    return same and not reasons, "\n".join([*lines, "; ".join([verdict, *reasons])])
