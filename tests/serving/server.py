"""vLLM's HTTP server as a process, what it is asked, and the checkpoints that it serves here."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers import TINY, tiny_module
from numpy.typing import NDArray
from PIL import Image

from btok import BTokEncoder, Side
from btok.tools.check_server import messages

SITE = Path(__file__).parent / "site"
WAIT = 300.0  # seconds for a server to start
MOST = 16384  # tokens of an input
SECTIONS = {"qwen2_vl": [4, 6, 6], "qwen2_5_vl": [4, 6, 6], "qwen3_vl": [8, 4, 4]}
Rows = NDArray[np.float64]


class NotStartedError(Exception):
    """A server that ended before it answered; its last words."""


@contextmanager
def served(
    engine: Path,
    folder: Path,
    *options: str,
    dtype: str = "float32",
    version: str = "",
    **environment: str,
) -> Iterator[str]:
    """The address of a server of a checkpoint.

    Args:
        engine: the Python of an environment with vLLM.
        options: of its command line, besides.
        version: what it takes itself for; empty for what it is.
        environment: variables, besides.

    Raises:
        NotStartedError: it ended before it served.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    as_module = "import runpy; runpy.run_module({!r}, run_name='__main__')"
    code = f"import vllm; vllm.__version__ = {version!r} or vllm.__version__; "
    code += as_module.format("vllm.entrypoints.openai.api_server")
    command = [str(engine), "-c", code, "--model", str(folder)]
    command += ["--port", str(port), "--host", "127.0.0.1", "--served-model-name", "served"]
    command += ["--dtype", dtype, "--enforce-eager", "--max-model-len", str(MOST), *options]
    more = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(SITE)}
    log = folder.with_suffix(".log")
    with open(log, "wb") as out:
        server = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **more, **environment},
            start_new_session=True,
        )
    url, begun = f"http://127.0.0.1:{port}", time.monotonic()
    try:
        while True:
            if server.poll() is not None:
                raise NotStartedError(log.read_text(errors="replace"))
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=5):
                    break
            except OSError:
                if time.monotonic() - begun > WAIT:
                    raise
                time.sleep(0.5)
        yield url
    finally:
        with_children = [signal.SIGTERM, signal.SIGKILL]
        for sign in with_children:
            try:
                os.killpg(server.pid, sign)
                server.wait(20)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


def post(url: str, path: str = "v1/embeddings", **body: Any) -> Any:
    """A server's answer; a ValueError with its status and its words where it refuses."""
    data = json.dumps({"model": "served", **body}).encode()
    request = urllib.request.Request(f"{url}/{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        said = json.loads(error.read())
        raise ValueError(f"{error.code}: {said.get('error', said).get('message', said)}") from error


def rows_of(answer: Mapping[str, Any]) -> Rows:
    """[N, D], in the order in which they were asked for."""
    data = sorted(answer["data"], key=lambda row: row["index"])
    return np.array([row["embedding"] for row in data])


def asked(url: str, side: Side, **more: Any) -> Rows:
    """[D] of one side, sent as vLLM takes it."""
    text = not side.images and not len(side.video)
    body = {"input": side.text} if text else {"messages": messages(side)}
    return rows_of(post(url, **body, **more))[0]


def one_by_one(url: str, sides: Sequence[Side]) -> Rows:
    return np.stack([asked(url, side) for side in sides])


def at_once(url: str, sides: Sequence[Side], threads: int = 8) -> Rows:
    with ThreadPoolExecutor(threads) as pool:
        return np.stack(list(pool.map(lambda side: asked(url, side), sides)))


def in_batches(url: str, texts: Sequence[str], size: int = 64) -> Rows:
    """Of texts, as many to a request."""
    parts = [texts[i : i + size] for i in range(0, len(texts), size)]
    return np.concatenate([rows_of(post(url, input=part)) for part in parts])


def ours(encoder: BTokEncoder, sides: Sequence[Side]) -> Rows:
    return encoder.encode(list(sides), show_progress=False).astype(np.float64)


def cosines(one: Rows, other: Rows) -> Rows:
    return (one * other).sum(-1) / np.linalg.norm(one, axis=-1) / np.linalg.norm(other, axis=-1)


def tiny(folder: Path, family: str, **settings: Any) -> BTokEncoder:
    """A random model of a family, saved: its heads as wide as vLLM's kernels for CPUs take them,
    and its norms' weights not 1, which would hide what is normalised when.
    """
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    if family in SECTIONS:
        rope["mrope_section"] = SECTIONS[family]
    if family == "qwen3_vl":
        rope["mrope_interleaved"] = True
    language = {"hidden_size": 128, "max_position_embeddings": MOST, "rope_parameters": rope}
    if family not in ("qwen2_vl", "qwen2_5_vl"):
        language["head_dim"] = 32
    tower = TINY[family].config.get("vision_config", {})
    width = "hidden_size" if family == "qwen2_vl" else "out_hidden_size"
    if width in tower:
        tower[width] = 128
    model, processor = tiny_module(family, **language)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.backbone.named_parameters():
            if "norm" in name:
                weight.add_(torch.rand(weight.shape, generator=generator) - 0.5)
    if settings:
        ids = settings.pop("btok_token_ids", model.btok_token_ids)
        model = type(model).from_backbone(model.backbone, btok_token_ids=ids, **settings)
        processor.num_btoks = len(ids)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return BTokEncoder.from_pretrained(folder)


def texts(encoder: BTokEncoder, lengths: Sequence[int], seed: int = 0) -> list[Side]:
    """Random words, about so many tokens of them."""
    rng = np.random.default_rng(seed)
    tokenizer = encoder.processor.tokenizer
    found = []
    for length in lengths:
        words = " ".join("".join(rng.choice(list("etaoinshrdlu"), 5)) for _ in range(length))
        found.append(Side(tokenizer.decode(encoder.processor.encode(words)[:length])))
    return found


def file(rng: np.random.Generator, height: int, width: int, kind: str = "PNG") -> bytes:
    made = io.BytesIO()
    rough = rng.integers(0, 256, (-(-height // 16), -(-width // 16), 3), np.uint8)
    Image.fromarray(rough.repeat(16, 0).repeat(16, 1)[:height, :width]).save(made, kind)
    return made.getvalue()


def pictures(count: int, videos: int, seed: int = 0) -> list[Side]:
    """Pictures of many sizes, one and two at a time, with and without a text; then frames."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        sizes = [tuple(rng.integers(20, 400, 2)) for _ in range(1 + i % 2)]
        found.append(Side("what is it?" * (i % 3 > 0), [file(rng, *size) for size in sizes]))
    for i in range(videos):
        frames = [file(rng, 48 + 16 * i, 64, "JPEG") for _ in range(3 + i)]
        found.append(Side("what happens?" * i, video=frames, frame_seconds=range(len(frames))))
    return found
