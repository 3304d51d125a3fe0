"""An ImageNet network becomes the vision tower of a decoder that never saw a picture.

    python examples/smollm2/pictures.py [--minutes 30] [--seed 0]     train, score, draw
    python examples/smollm2/pictures.py --page bench/results          also put the page there

A Qwen2-VL is built around SmolLM2-135M, whose tower is EfficientNet-Lite0: its map has a stride of
32 pixels, which is a patch of 16 merged 2 x 2, so that a picture of 224 pixels is 49 tokens. The
network is frozen. A fresh projector, adapters and the K rows train on drawings of Open Clip Art and
stamps of Tux Paint with their titles. A few thousand pairs teach little: it demonstrates the whole
path from files to retrieval on real pictures, and claims nothing.

`BTokModel.from_backbone` takes that model as it is. What stock transformers does not have is the
tower's class, so no checkpoint could be loaded by it: the model is built here and trained in
memory, by the steps of the trainer. A finished training is kept and never done again; one that was
stopped begins anew. The same seed and number of steps give the same on the same machine.
"""

from __future__ import annotations

import hashlib
import html
import io
import json
import re
import shutil
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.report import table
from btok.data.records import Side
from btok.data.sources import open_source
from btok.encoder import BTokEncoder
from btok.files import rename, sha256, write_json, write_text
from btok.inputs.images import rgb_of
from btok.model import BTokModel
from btok.processing import Processor
from btok.tools import command_line
from btok.tools.pictures import SheetRow, contact_sheet, drawable, loss_curve
from examples.smollm2 import fetch
from examples.smollm2.runs import measures, ranks
from examples.smollm2.tower import NUM_BTOKS, Lite0, assemble
from examples.studies.provenance import facts_of, surroundings
from train import main as training
from train.microbatches import Packing
from train.recipes import PAPER, Recipe
from train.sampler import TrainSet, load_steps
from train.step import train_step

PROG = "examples/smollm2/pictures.py"
NAME = "smollm2-pictures"
CODE = ("examples/smollm2/pictures.py", "examples/smollm2/tower.py")
PACKAGES = ("torch", "transformers", "tokenizers", "peft", "pillow", "numpy")
EDGE = 224  # pixels of a picture's side, which the network was trained at
HELD_OUT = 300  # captions of the test
MOST_PIXELS = 1 << 22  # of a picture; there are 18 larger ones, up to 231 million
MOST_ALIKE = 4  # drawings of one title; what more have names a collection
ON_SHEET, FOUND = 5, 5  # queries of each direction on the contact sheet, and what each found
TIMED = 3  # steps that tell how long one takes


@dataclass(frozen=True)
class Pictures:
    """Train on drawings and stamps, score retrieval on held-out ones, draw what was found."""

    minutes: float = 30.0
    """Of training; the first steps tell how many steps that is."""
    steps: int | None = None
    """Training steps, in place of minutes."""
    batch: int = 32
    """Pairs of a step; each caption is a negative of the other pictures."""
    seed: int = 0
    """Of the projector's and the adapters' first weights and of the batches."""
    cache: Path = field(default_factory=fetch.default_cache)
    """Folder of weights, data and run folders."""
    output: Path | None = None
    """Run folder; None for one of this seed in the cache."""
    page: Path | None = None
    """Folder that gets the results, a page and a contact sheet besides."""


def trained_weights(model: BTokModel) -> dict[str, Tensor]:
    """The weights that training changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def drawings(cache: Path) -> Iterator[tuple[bytes, str]]:
    """PNG files of Open Clip Art with the titles that stand in them."""
    found, named = [], dict[str, int]()
    for name, content in fetch.deb(cache, "openclipart-png"):
        if name.endswith(".png") and _pixels(content) <= MOST_PIXELS:
            with Image.open(io.BytesIO(content)) as image:
                title = html.unescape(str(image.info.get("Title", ""))).strip()
            with suppress(UnicodeError):  # UTF-8 in a chunk that is Latin-1
                title = title.encode("latin-1").decode()
            found.append((content, title))
            named[title] = named.get(title, 0) + 1
    for content, title in found:
        if named[title] <= MOST_ALIKE:
            yield content, re.sub("^Clipart by .* - ", "", title).replace("_", " ").strip()


def stamps(cache: Path) -> Iterator[tuple[bytes, str]]:
    """PNG files of Tux Paint with their English captions."""
    shown, said = {}, {}
    for name, content in fetch.deb(cache, "tuxpaint-stamps-default"):
        stem, _, ending = name.rpartition(".")
        if ending == "png" and _pixels(content) <= MOST_PIXELS:
            shown[stem] = content
        elif ending == "txt" and content:
            said[stem] = content.decode("utf-8", "replace").splitlines()[0].strip()
    yield from ((shown[stem], said[stem]) for stem in shown if stem in said)


def _pixels(png: bytes) -> int:
    """The number of pixels of a PNG file, by its head: nothing is decoded."""
    width, height = struct.unpack(">II", png[16:24])
    return width * height


def told_by(caption: str) -> str:
    """A key, equal for captions with the same words but for articles, numbers and case."""
    return re.sub(r"\b(a|an|the) ", "", " ".join(re.findall(r"[^\W\d_]+", caption.lower())))


def squared(content: bytes) -> Image.Image:
    """A picture on white, in the middle of a square of `EDGE` pixels."""
    with Image.open(io.BytesIO(content)) as image:
        picture = Image.fromarray(rgb_of(image))
    scale = EDGE / max(picture.size)
    size = [max(1, round(side * scale)) for side in picture.size]
    square = Image.new("RGB", (EDGE, EDGE), "white")
    inner = picture.resize((size[0], size[1]), Image.Resampling.BICUBIC)
    square.paste(inner, ((EDGE - size[0]) // 2, (EDGE - size[1]) // 2))
    return square


Source = Callable[[Path], Iterator[tuple[bytes, str]]]
SOURCES: Mapping[str, Source] = {"Open Clip Art": drawings, "Tux Paint": stamps}


def build(cache: Path, sources: Mapping[str, Source] = SOURCES, held_out: int = HELD_OUT) -> Path:
    """The folder of pairs, made where it is not there: `train.jsonl` and `test.jsonl`, whose rows
    are picture -> caption, their pictures, and `facts.json`, with the files' digests and counts.

    The test has one picture of each of its captions; no caption, and no picture, is in both.

    Raises:
        ValueError: a package that cannot be had.
    """
    folder, draft = cache / "pictures", cache / "pictures.tmp"
    if folder.exists():
        return folder
    shutil.rmtree(draft, ignore_errors=True)
    (draft / "images").mkdir(parents=True)
    groups: dict[str, list[dict[str, Any]]] = {}
    for source, read in sources.items():
        for content, caption in read(cache):
            if not 3 <= len(told_by(caption)) <= 60:
                continue
            square = squared(content)
            name = f"images/{hashlib.sha256(square.tobytes()).hexdigest()[:24]}.png"
            square.save(draft / name)
            row = {"query": {"images": [name]}, "positive": caption, "source": source}
            groups.setdefault(told_by(caption), []).append(row | {"positive_id": told_by(caption)})
    order = sorted(groups, key=lambda key: hashlib.sha256(key.encode()).hexdigest())
    tests: dict[str, dict[str, Any]] = {}  # by picture: two captions may have the same
    for key in order:
        if len(tests) < held_out:
            tests.setdefault(groups[key][0]["query"]["images"][0], groups[key][0])
    held = {row["positive_id"] for row in tests.values()}
    shown = {row["query"]["images"][0] for key in held for row in groups[key]}
    rest = [row for key in order if key not in held for row in groups[key]]
    rows = {
        "train": [row for row in rest if row["query"]["images"][0] not in shown],
        "test": list(tests.values()),
    }
    facts: dict[str, Any] = {"pairs": {}, "sha256": {}}
    for split, some in rows.items():
        path = draft / f"{split}.jsonl"
        write_text(path, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in some))
        facts["sha256"][split] = sha256(path)
        facts["pairs"][split] = {
            source: sum(row["source"] == source for row in some) for source in sources
        }
    write_json(draft / "facts.json", facts)
    rename(draft, folder)
    return folder


def recipe_of(command: Pictures, data: Path, steps: int) -> Recipe:
    """The paper's recipe, cut to what two cores allow."""
    return replace(
        PAPER,
        data=data,
        dtype="float32",
        dora=False,
        lora_dropout=0.0,
        num_btoks=NUM_BTOKS,
        ntp_weight=1.0,
        ntp_steps=None,
        group_size=command.batch,
        groups_per_batch=1,
        chunk_tokens=None,
        gradcache=False,
        checkpoint_activations=False,
        workers=0,
        steps=steps,
        learning_rate=1e-3,
        warmup_steps=min(20, steps // 5),
        final_rate=0.05,
        seed=command.seed,
    )


def train(model: BTokModel, processor: Processor, recipe: Recipe) -> tuple[list[Any], float]:
    """The trainer's steps on a model in memory; the losses of each, and the seconds of all."""
    assert recipe.data is not None
    train_set = TrainSet(recipe, processor, [open_source(recipe.data)])
    optimizers = training.make_optimizers(model, recipe)
    packing, log, start = Packing.of(model, processor, recipe), [], time.perf_counter()
    model.train()
    for step, data in load_steps(train_set, 0, 0, packing):
        losses = train_step(model, recipe, data.pairs, data.microbatches, step).losses
        norm = training.clipped_norm(model, recipe.clip_norm)
        training.refuse_infinite(recipe, step, data, float(losses.total), norm)
        training.update(optimizers, {"adamw": recipe.learning_rate_at(step)})
        log.append({"step": step, "contrastive": float(losses.contrastive)})
        log[-1]["ntp"] = float(losses.ntp)
        if step % 10 == 0 or step + 1 == recipe.steps:
            parts = (f"{name} {log[-1][name]:.3f}" for name in ("contrastive", "ntp"))
            print(f"step {step}", *parts, f"{time.perf_counter() - start:.0f} s", flush=True)
    return log, time.perf_counter() - start


def seconds_of_a_step(model: BTokModel, processor: Processor, recipe: Recipe) -> float:
    """The seconds of a training step, measured on the first batches, whose gradients are thrown
    away: nothing is trained.
    """
    assert recipe.data is not None
    train_set = TrainSet(replace(recipe, steps=TIMED), processor, [open_source(recipe.data)])
    model.train()
    times = [time.perf_counter()]
    for step, data in load_steps(train_set, 0, 0, Packing.of(model, processor, recipe)):
        train_step(model, recipe, data.pairs, data.microbatches, step)
        model.zero_grad()
        times.append(time.perf_counter())
    return (times[-1] - times[1]) / (TIMED - 1)  # the first also warms up


class Embedded(NamedTuple):
    """The test's pairs, and their vectors [n, D]."""

    pictures: list[Path]
    captions: list[str]
    of_pictures: NDArray[np.float32]
    of_captions: NDArray[np.float32]


def embedded(encoder: BTokEncoder, folder: Path) -> Embedded:
    """The pairs of `test.jsonl`, encoded."""
    lines = (folder / "test.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    paths = [folder / row["query"]["images"][0] for row in rows]
    captions = [row["positive"] for row in rows]
    both = (encoder.encode(x, batch_tokens=2048, show_progress=False) for x in (paths, captions))
    return Embedded(paths, captions, *both)


def scores(found: Embedded) -> dict[str, dict[str, float]]:
    """Recall at 1 and 10 and the mean reciprocal rank, in percent, both ways over the test."""
    return {
        "picture to caption": measures(ranks(found.of_pictures, found.of_captions)),
        "caption to picture": measures(ranks(found.of_captions, found.of_pictures)),
    }


def chance(pool: int) -> dict[str, float]:
    """The scores of a random order of the pool, in percent."""
    reciprocal = float(np.mean(1 / np.arange(1, pool + 1)))
    parts = {"recall@1": 1 / pool, "recall@10": min(1, 10 / pool), "mrr": reciprocal}
    return {name: round(100 * value, 2) for name, value in parts.items()}


def sheet(found: Embedded, path: Path) -> None:
    """Draw what the first pictures and the last captions of the test found: none is chosen."""

    def opened(i: int) -> Side:
        with Image.open(found.pictures[i]) as image:
            return Side(images=[image.convert("RGB")])

    def said(i: int) -> Side:
        return Side(found.captions[i])

    rows, every = [], range(len(found.captions))
    similar = found.of_pictures @ found.of_captions.T
    for some, query, answer, by in (
        (every[:ON_SHEET], opened, said, similar),
        (every[-ON_SHEET:], said, opened, similar.T),
    ):
        for i in some:
            nearest = np.argsort(-by[i], kind="stable")[:FOUND].tolist()
            rank = int((by[i] >= by[i, i]).sum())
            right = [j == i for j in nearest]
            rows.append(SheetRow(query(i), [answer(j) for j in nearest], right, rank))
    contact_sheet(rows, path, f"the {FOUND} nearest of {len(every)} held-out pairs")


def page_of(result: Mapping[str, Any]) -> str:
    """The study's results as a Markdown page."""
    rows = [["", "recall@1", "recall@10", "MRR"]]
    for way, after in result["scores"]["after"].items():
        before = result["scores"]["before"][way]
        for name, found in ((f"**{way}**", after), (f"{way}, before training", before)):
            rows.append([name, *(f"{value:.1f}" for value in found.values())])
    rows.append(["chance", *(f"{value:.1f}" for value in result["chance"].values())])
    train, test = (result["data"]["pairs"][split] for split in ("train", "test"))
    counts = ", ".join(f"{train[name]} + {test[name]} of {name}" for name in train)
    steps, batch = result["steps"], result["batch"]
    minutes = result["seconds"]["training"] / 60
    losses = result["contrastive"]
    first, last = np.mean(losses[:10]), np.mean(losses[-10:])
    pool = sum(test.values())
    command = f"python {PROG} --steps {steps} --batch {batch} --seed {result['seed']}"
    return f"""# Pictures for a decoder that never saw one

{facts_of(result["settings"], command)}

SmolLM2-135M-Instruct (dequantised Q4_1) in a Qwen2-VL around it; its vision tower is
EfficientNet-Lite0 of ImageNet, frozen: 49 tokens a picture. A projector, adapters of rank 16 and
{NUM_BTOKS} bottleneck tokens trained for {minutes:.1f} minutes: {steps} steps of {batch} pairs.
Pairs to train on and to test, no caption and no picture in both: {counts}.
The contrastive loss was {first:.2f} over the first ten steps and {last:.2f} over the last.

Measured, in percent, over {pool} held-out pairs; one query is {100 / pool:.2f}:

{table(*rows)}

A demonstration of the path from files to retrieval, of one seed: no claim. Below, the first
{ON_SHEET} pictures and the last {ON_SHEET} captions of the test; none was chosen.

![queries, what they found, the right one framed]({NAME}.png)
"""


def perform(command: Pictures) -> None:
    """Build, score, train unless that is done, score again, and write what came out.

    Raises:
        ValueError: settings out of range, what cannot be had, a run folder of another run.
        ImportError: a package of an extra that is missing.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, network = fetch.backbone(command.cache), Lite0.from_pickle(fetch.lite0(command.cache))
    folder = build(command.cache)
    output = command.output or command.cache / "runs" / f"{NAME}-seed{command.seed}"
    output.mkdir(parents=True, exist_ok=True)
    drawable(output / "loss.png")  # rather than say after half an hour that it cannot be drawn
    decoder = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(base)
    bounds = {"min_pixels": EDGE**2, "max_pixels": EDGE**2}
    encoder = BTokEncoder(*assemble(decoder, tokenizer, network, command.seed, **bounds))
    record = trained(command, encoder, folder, output)
    start = time.perf_counter()
    found = embedded(encoder, folder)
    seconds = {"training": record["seconds"], "scoring": time.perf_counter() - start}
    log = record["log"]
    result = {
        **{name: record["asked"][name] for name in ("seed", "batch", "data")},
        "steps": len(log),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "settings": record["settings"],
        "chance": chance(len(found.captions)),
        "scores": {"before": record["before"], "after": scores(found)},
        **{name: [round(row[name], 4) for row in log] for name in ("contrastive", "ntp")},
    }
    page = page_of(result)
    write_json(output / f"{NAME}.json", result)
    write_text(output / f"{NAME}.md", page)
    sheet(found, output / f"{NAME}.png")
    loss_curve(log, output / "loss.png")
    if command.page is not None:
        for ending in ("json", "md", "png"):
            shutil.copy(output / f"{NAME}.{ending}", command.page)
    print(page, f"results, pictures and weights are in {output}", sep="\n")


def trained(
    command: Pictures, encoder: BTokEncoder, folder: Path, output: Path
) -> Mapping[str, Any]:
    """Train the encoder's model in place, or give it the weights of the run that was finished.

    Returns:
        What `training.json` holds: settings, scores before training, losses, seconds.

    Raises:
        ValueError: the run folder has a run of other settings or data.
    """
    facts = json.loads((folder / "facts.json").read_text("utf-8"))
    asked: dict[str, Any] = {"seed": command.seed, "batch": command.batch, "data": facts}
    asked |= {"steps": command.steps, "minutes": None if command.steps else command.minutes}
    done, weights = output / "training.json", output / "trained.safetensors"
    model, processor = encoder.model, encoder.processor
    recipe = recipe_of(command, folder / "train.jsonl", command.steps or TIMED)
    training.prepare(model, recipe)
    if done.exists():
        record = json.loads(done.read_text("utf-8"))
        for name, value in asked.items():
            if (had := record["asked"][name]) != value:
                raise ValueError(
                    f"{output} holds a run with {name} {had}, this command asks for {value}; "
                    "give the same settings or another --output"
                )
        with torch.no_grad():
            for name, value in load_file(weights).items():
                model.get_parameter(name).copy_(value)
        return record
    settings = surroundings(*CODE, packages=PACKAGES)  # of the code as it is when the run begins
    before = scores(embedded(encoder, folder))
    if command.steps is None:
        each = seconds_of_a_step(model, processor, recipe)
        steps = max(1, round(60 * command.minutes / each))
        print(f"{each:.2f} s a step: {steps} steps in {command.minutes:g} minutes", flush=True)
        recipe = recipe_of(command, folder / "train.jsonl", steps)
    log, seconds = train(model, processor, recipe)
    save_file({name: p.data for name, p in trained_weights(model).items()}, weights)
    record = {"asked": asked, "settings": settings, "before": before, "log": log}
    write_json(done, record | {"seconds": seconds})  # last: it says that the weights are whole
    return record | {"seconds": seconds}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, 2 for a mistake or for what cannot be had, told in
    one line.
    """
    try:
        command = command_line.parse(Pictures, sys.argv[1:] if argv is None else argv, PROG)
        if command.batch < 2 or not 0 < command.minutes < float("inf"):
            had = f"batch is {command.batch} and minutes {command.minutes}"
            raise ValueError(f"{had}, expected at least 2, and above 0")
        if command.steps is not None and command.steps < 1:
            raise ValueError(f"steps is {command.steps}, expected at least 1")
        if command.page is not None and not command.page.is_dir():
            raise ValueError(f"page is {command.page}, expected a folder that is there")
        perform(command)
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
