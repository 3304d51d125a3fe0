"""What a run on the pocket benchmark tells a person who watches it: what it is about to learn, what
the model can do now, with a picture it never trained on, and what to do with it in the end.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from btok.encoder import BTokEncoder
from btok.files import printable
from btok.model import BTokModel
from btok.packing import pack
from btok.processing import Processor
from btok_kernels.ranks import world
from train.microbatches import Packing
from train.pocket.data import Record, held_out
from train.recipes import Recipe

SHOWN = 60  # held-out records of a task that are asked about, one after the other
POOL = 16  # scenes among which one is looked for: its family of four edits, and others
MOST_TOKENS = 32  # of what it writes


def opening(model: BTokModel, recipe: Recipe) -> str:
    """The opening lines of a run: what is made here, and what it will learn."""
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    several = "1 process" if world() == 1 else f"{world()} processes"
    where = f"{several} on {'GPUs' if model.backbone.device.type == 'cuda' else 'CPU'}"
    lines = [
        f"a model of {millions:.1f} million parameters learns to find pictures, videos and pages "
        f"({where}, seed {recipe.seed})"
    ]
    if first := recipe.caption_steps:
        lines.append(f"  steps 1 to {first}: to see, by writing what is shown")
    if recipe.steps:
        what = f"through {recipe.num_btoks} bottleneck tokens" if recipe.num_btoks else "a vector"
        lines.append(
            f"  steps {first + 1} to {recipe.total_steps}: to embed, {what}, what belongs together"
        )
    return "\n".join(lines)


class Demonstration:
    """One held-out query now and then, and what the model makes of it; no state of the training is
    touched, and nothing is drawn at random.

    Args:
        model, processor, recipe: of the run.
    """

    def __init__(self, model: BTokModel, processor: Processor, recipe: Recipe) -> None:
        self.model, self.processor = model, processor
        self.packings = [Packing.of(model, processor, recipe, phase) for phase in (False, True)]
        self.asked = 0

    def __call__(self, captioning: bool) -> str:
        """Ask one held-out query: a line that tells what was asked, what came, and whether that is
        right.
        """
        turn, self.asked = self.asked, self.asked + 1
        if captioning or turn % 2:
            return self.told(held_out("I-QA", SHOWN)[7 * turn % SHOWN], captioning)
        return self.found(held_out("I-RET", SHOWN), 4 * (turn // 2) % SHOWN)

    def told(self, record: Record, captioning: bool) -> str:
        """A line on what the model writes of a picture; after captioning, of the bottleneck tokens
        alone.
        """
        said = self.write(record, captioning)
        source = "a new picture" if captioning else "the tokens of a new picture"
        line = f'asked of {source} "{record.query.text}" it writes "{printable(said)}"'
        verdict = "right" if said.split(":")[0] == record.positive.text else "wrong"
        return f"{verdict}: {line}" + (
            "" if said == record.target else f'; the picture shows "{record.target}"'
        )

    def write(self, record: Record, captioning: bool) -> str:
        """The most likely token, again and again, until the target's end."""
        options = self.packings[captioning].options
        source, ids = self.processor(record.query), list[int]()
        end = options["suffix_ids"]
        self.model.eval()
        with torch.inference_mode():
            while len(ids) < MOST_TOKENS:
                batch = pack([(source, {"input_ids": ids})], **options)
                hidden = self.model.hidden_states(batch.to(self.model.backbone.device))
                ids.append(int(self.model.backbone.lm_head(hidden[-1 - len(end)]).argmax()))
                if ids[-1] == end[0]:
                    ids.pop()
                    break
        self.model.train()
        text: str = self.processor.tokenizer.decode(ids)
        return text

    def found(self, records: list[Record], at: int) -> str:
        """A line on which of some scenes the model finds by a description."""
        others = [*records[:at], *records[at + 4 :]][::4]
        pool = [*records[at : at + 4], *others][:POOL]
        encoder = BTokEncoder(self.model, self.processor)
        sides = [pool[0].query, *(record.positive for record in pool)]
        query, *scenes = encoder.encode(sides, show_progress=False)
        order = np.argsort(-(np.stack(scenes) @ query), kind="stable").tolist()
        rank, line = 1 + order.index(0), f'asked for "{pool[0].query.text}" it finds'
        if rank == 1:
            return f"right: {line} that one of {len(pool)} new scenes"
        other = pool[order[0]].query.text
        return f'wrong: {line} "{other}"; the right one is {rank}. of {len(pool)}'


def closing(recipe: Recipe, files: Path) -> str:
    """The commands to try with the trained model, as lines of text."""
    checkpoint = recipe.output / f"checkpoint-{recipe.total_steps}"
    python, here = Path(sys.executable), Path.cwd()
    program = str(python.relative_to(here)) if python.is_relative_to(here) else str(python)
    query = held_out("I-RET", 1)[0].query.text
    own = "--data my-pairs.jsonl --output runs/mine --caption-steps 0 --reading-steps 0"
    own += " --eval-queries 0 --group-size 4 --groups-per-batch 1 --steps 50"
    commands: dict[str, tuple[Any, ...]] = {
        "search in a browser": ("-m", "btok", "serve", checkpoint, files),
        "search here": ("-m", "btok", "search", checkpoint, files, query, "--top", 3),
        "train on your own pairs": ("train/main.py", "pocket", "--model", checkpoint, *own.split()),
    }
    lines = ["what next:", f"  look at it: open {recipe.output / 'report.html'} in a browser"]
    for what, words in commands.items():
        lines += [f"  {what}:", f"    {shlex.join(map(str, (program, *words)))}"]
    row = '{"query": "a red seven", "positive": {"images": ["seven.png"]}}'
    return "\n".join([*lines, f"    a line of my-pairs.jsonl: {row}"])
