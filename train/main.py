"""Train a model with Bottleneck Tokens and show what it learned.

    python train/main.py [recipe] [--output DIR] [--steps N] ...
    torchrun --nproc-per-node 2 train/main.py [recipe] ...

Settings: `train/recipes.py`. The same command again goes on where a stopped run was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: make the folder above importable
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch.distributed as dist
import tyro
from transformers.utils.logging import disable_progress_bar

from btok.data import pocket
from btok.encoder import BTokEncoder
from btok.evaluation import pictures, runner
from btok.model import BTokModel
from btok.processing import Processor
from train import checkpoint
from train.loop import Stop, sharded_encode, train
from train.recipes import RECIPES, Recipe, build
from train.step import rank, world

SHEETS = ("I-RET", "V-RET", "VisDoc")  # tasks with pictures to find: image, video, page


def main(argv: Sequence[str] | None = None) -> int:
    """Run a recipe; 2 for a mistake in the command or the data, 1 for a loss that is not finite.

    Both are told in a line; BTOK_DEBUG=1 shows where it was noticed.
    """
    try:
        recipe = parse(list(sys.argv[1:] if argv is None else argv))
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            dist.init_process_group("gloo")
        run(recipe, *start(recipe))
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if os.environ.get("BTOK_DEBUG"):
            raise
        if int(os.environ.get("RANK", 0)) == 0:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    if world() > 1:
        dist.barrier()  # a rank that leaves early may take the others down
        dist.destroy_process_group()
    return 0


def parse(argv: list[str]) -> Recipe:
    """The recipe a command line describes.

    Raises:
        ValueError: an unknown recipe or option, a value out of range.
    """
    name = argv.pop(0) if argv and not argv[0].startswith("-") else "pocket"
    if name not in RECIPES:
        raise ValueError(f"recipe is '{name}', expected one of {sorted(RECIPES)}")
    said = io.StringIO()
    argv = [{"true": "True", "false": "False"}.get(word, word) for word in argv]
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                Recipe,
                args=argv,
                default=RECIPES[name],
                prog="train/main.py",
                config=(tyro.conf.FlagConversionOff,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        _, *lines = said.getvalue().splitlines()  # below the title of a box
        raise ValueError(" ".join(line.strip("─│╰╯ ") for line in lines)) from None


def start(recipe: Recipe) -> tuple[Path | None, BTokModel, Processor]:
    """Find where the run was, or begin it: (checkpoint or None, model, processor).

    Raises:
        ValueError: groups that do not divide among the processes; a run folder that belongs to a
            run with other settings.
    """
    if recipe.groups_per_batch % world():
        raise ValueError(
            f"groups_per_batch is {recipe.groups_per_batch}, expected a multiple of the "
            f"{world()} processes"
        )
    settings = {**dataclasses.asdict(recipe), "output": str(recipe.output), "processes": world()}
    config = recipe.output / "config.json"
    saved = json.loads(config.read_text()) if config.exists() else settings
    for name in sorted(settings.keys() - {"output", "checkpoint_every"}):
        if saved.get(name) != settings[name]:
            raise ValueError(
                f"{recipe.output} holds a run with {name} {saved.get(name)}, this command asks "
                f"for {settings[name]}; give the same settings or another --output"
            )
    found = [checkpoint.newest_valid(recipe.output) if rank() == 0 else None]
    if world() > 1:
        dist.broadcast_object_list(found)
    if resume := found[0]:
        processor = Processor.from_pretrained(resume, recipe.num_btoks)
        return resume, BTokModel.from_pretrained(resume, num_btoks=recipe.num_btoks), processor
    model, processor = build(recipe)
    recipe.output.mkdir(parents=True, exist_ok=True)
    runner.save_json(settings, config)
    return None, model, processor


def run(recipe: Recipe, resume: Path | None, model: BTokModel, processor: Processor) -> None:
    """Evaluate, train, evaluate, and draw."""
    disable_progress_bar()  # of every checkpoint's single shard
    stop = Stop()
    say = print if rank() == 0 else lambda *_: None
    encode = sharded_encode(BTokEncoder(model, processor))
    tasks = pocket.tasks(recipe.eval_queries) if recipe.eval_queries else []
    options: dict[str, Any] = {"data_digest": pocket.digest() if tasks else None}
    options["settings"] = {**dataclasses.asdict(recipe), "output": str(recipe.output)}

    def evaluate(name: str, retrieved: dict[str, Any]) -> dict[str, Any]:
        show = rank() == 0
        result = runner.evaluate(encode, tasks, progress=show, retrieved=retrieved, **options)
        if rank() == 0:
            runner.save_json(result, recipe.output / name)
        return result

    if tasks and resume is None:
        say("before training:")
        evaluate("before.json", {})
    if not train(model, processor, recipe, resume, stop):
        say(f"stopped; the same command goes on from {recipe.output}")
        return
    retrieved: dict[str, Any] = {}
    if tasks:
        say("after training:")
        after = evaluate("metrics.json", retrieved)
    if rank() == 0:
        log = (recipe.output / "log.jsonl").read_text().splitlines()
        if log:
            pictures.loss_curve(map(json.loads, log), recipe.output / "loss.png")
        for task in tasks:
            if task.name in SHEETS:
                draw(task, retrieved[task.name], recipe.output / f"retrievals-{task.name}.png")
        if tasks:
            before = json.loads((recipe.output / "before.json").read_text())
            say(runner.format_table(before, after))
        say(f"metrics, pictures, log and checkpoints are in {recipe.output}")


def draw(task: Any, found: Sequence[Any], path: Path, rows: int = 8) -> None:
    """A contact sheet of evenly spaced queries, as they came, right or wrong."""
    picked = range(0, len(found), max(1, len(found) // rows))[:rows]
    lines = [
        pictures.SheetRow(
            task.queries[i], [task.candidates[c] for c in found[i].top], *found[i][1:]
        )
        for i in picked
    ]
    title = f"{task.name}: query, the five nearest, the right one framed"
    pictures.contact_sheet(lines, path, title)


if __name__ == "__main__":
    sys.exit(main())
