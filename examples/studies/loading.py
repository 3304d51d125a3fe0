"""What it costs to read pictures: from pixels to patches, and how many workers keep up.

    python examples/studies/loading.py [--data pairs.jsonl] [--workers 0 1 2 4]

The first line is a picture of 448 pixels a side, decoded, beside transformers' own image processor,
whose patches are compared before anything is timed. Then steps of a training run are read by so
many processes: of your pairs, or of texts with a JPEG of that size each. Give a trainer as many
--workers as read faster than it trains.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from bench.models import byte_tokenizer
from btok.data.records import Side
from btok.data.sources import open_source
from btok.processing import Processor
from examples.studies.duel import duel
from train.recipes import Recipe
from train.sampler import TrainSet, load_steps

EDGE = 448  # pixels


def patches(processor: Processor) -> str:
    """Compare how a picture becomes patches here and in transformers: time, and bytes of patches.

    Raises:
        RuntimeError: the patches are not the same.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    stock, images = Qwen2VLImageProcessorPil(), processor.image_processor
    assert images is not None  # the default family's
    picture = np.random.default_rng(0).integers(0, 256, (EDGE, EDGE, 3), np.uint8)
    theirs = partial(stock, Image.fromarray(picture), return_tensors="pt")
    ours = partial(images, Side(images=[picture]))
    (shown,) = ours().shown["vision"]
    expected = theirs()["pixel_values"]
    if not torch.allclose(shown.as_floats().pixels, expected, rtol=0, atol=1e-5):
        raise RuntimeError("transformers makes other patches of this picture: nothing is timed")
    found = duel(ours, theirs)
    (here, there), (low, high) = found["ms"], found["interval"]
    return (
        f"a picture of {EDGE} x {EDGE} to patches: {here:.2f} ms, {shown.pixels.nbytes:,} bytes; "
        f"transformers {there:.2f} ms ({found['ratio']:.0f} times as long, 95 % interval "
        f"{low:.0f} to {high:.0f}), {expected.nbytes:,} bytes"
    )


def write_pairs(folder: Path, count: int) -> Path:
    """Write `count` pairs of a text and a JPEG; the path of their JSONL file."""
    shades = np.add.outer(np.arange(EDGE), np.arange(EDGE))[..., None] * (1, 2, 3)
    rows = []
    for i in range(count):
        Image.fromarray((shades + i).astype(np.uint8)).save(folder / f"{i}.jpg")
        rows.append(json.dumps({"query": f"text {i}", "positive": {"images": [f"{i}.jpg"]}}))
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(rows) + "\n")
    return path


def pairs_a_second(train_set: TrainSet, workers: int) -> float:
    """The pairs a second that worker processes read of a run's steps, once those made ahead at the
    start are gone; with 0 workers this process reads.
    """
    steps = load_steps(train_set, 0, workers)
    for _ in range(2 * workers + 1):
        next(steps)
    began, pairs = time.perf_counter(), 0
    for _, step in tqdm(steps, f"{workers} workers", leave=False, disable=None):
        pairs += len(step.pairs)
    return pairs / (time.perf_counter() - began)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="pairs as train/main.py --data takes a file")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=33, help="of 8 pairs")
    arguments = parser.parse_args(argv)
    if arguments.steps < (least := 2 * max(arguments.workers) + 2):
        parser.error(f"steps is {arguments.steps}, expected at least {least} for these workers")
    processor = Processor(byte_tokenizer())
    print(patches(processor), flush=True)
    with TemporaryDirectory() as folder:
        path = arguments.data or write_pairs(Path(folder), 8 * arguments.steps)
        recipe = Recipe(caption_steps=0, steps=arguments.steps, group_size=8, groups_per_batch=1)
        train_set = TrainSet(recipe, processor, [open_source(path)])
        for workers in arguments.workers:
            rate = pairs_a_second(train_set, workers)
            print(f"{workers} workers: {rate:.0f} pairs a second", flush=True)


if __name__ == "__main__":
    main()
