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

from btok.data import pocket
from btok.encoder import BTokEncoder
from btok.evaluation import pictures, runner
from btok.model import BTokModel
from btok.processing import Processor
from train import checkpoint
from train.loop import Stop, sharded_encode, train
from train.recipes import RECIPES, Recipe, build

SHEETS = ("I-RET", "V-RET", "VisDoc")  # tasks with pictures to retrieve: image, video, page


def main(argv: Sequence[str] | None = None) -> int:
    """Run a recipe; 2 for a mistake in the command, with a line that says what to do."""
    try:
        recipe = parse(list(sys.argv[1:] if argv is None else argv))
        world = int(os.environ.get("WORLD_SIZE", 1))
        if recipe.groups_per_batch % world:
            raise ValueError(
                f"groups_per_batch is {recipe.groups_per_batch}, expected a multiple of the "
                f"{world} processes"
            )
        resume, model, processor = start(recipe, world)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if world > 1:
        dist.init_process_group("gloo")
    try:
        run(recipe, resume, model, processor)
    finally:
        if dist.is_initialized():
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
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(Recipe, args=argv, default=RECIPES[name], prog="train/main.py")
    except SystemExit as stop:
        if not stop.code:
            raise
        words = [line.strip("╭─╮│╰╯ \n") for line in said.getvalue().splitlines()]
        raise ValueError(" ".join(word for word in words if word)) from None


def start(recipe: Recipe, world: int) -> tuple[Path | None, BTokModel, Processor]:
    """Find where the run was, or begin it: (checkpoint or None, model, processor).

    Raises:
        ValueError: the run folder belongs to a run with other settings or processes.
    """
    settings = {k: str(v) if k == "output" else v for k, v in dataclasses.asdict(recipe).items()}
    settings["processes"] = world
    config = recipe.output / "config.json"
    if config.exists():
        saved = json.loads(config.read_text())
        for name in settings.keys() - {"output", "checkpoint_every"}:
            if saved.get(name) != settings[name]:
                raise ValueError(
                    f"{recipe.output} holds a run with {name} {saved.get(name)}, this command asks "
                    f"for {settings[name]}; give the same settings or another --output"
                )
    resume = checkpoint.newest_valid(recipe.output)
    if resume:
        processor = Processor.from_pretrained(resume, recipe.num_btoks)
        return resume, BTokModel.from_pretrained(resume, num_btoks=recipe.num_btoks), processor
    model, processor = build(recipe)
    recipe.output.mkdir(parents=True, exist_ok=True)
    runner.save_json(settings, config)
    return None, model, processor


def run(recipe: Recipe, resume: Path | None, model: BTokModel, processor: Processor) -> None:
    """Evaluate, train, evaluate, and draw."""
    stop = Stop()
    stop.install()
    lead = not dist.is_initialized() or dist.get_rank() == 0
    encode = sharded_encode(BTokEncoder(model, processor))
    tasks = pocket.tasks(recipe.eval_queries) if recipe.eval_queries else []
    before_file = recipe.output / "before.json"

    def evaluate(retrieved: dict[str, Any] | None = None) -> dict[str, Any]:
        return runner.evaluate(
            encode,
            tasks,
            settings={**dataclasses.asdict(recipe), "output": str(recipe.output)},
            data_digest=pocket.digest(),
            progress=lead,
            retrieved=retrieved,
        )

    if tasks and resume is None:
        say(lead, "before training")
        before = evaluate()
        if lead:
            runner.save_json(before, before_file)
    if not train(model, processor, recipe, resume, stop):
        say(lead, f"stopped; the same command goes on from {recipe.output}")
        return
    if lead:
        rows = [json.loads(line) for line in (recipe.output / "log.jsonl").read_text().splitlines()]
        if rows:
            pictures.loss_curve(rows, recipe.output / "loss.png")
    if not tasks:
        return
    say(lead, "after training")
    retrieved: dict[str, Any] = {}
    after = evaluate(retrieved)
    if lead:
        runner.save_json(after, recipe.output / "metrics.json")
        for task in tasks:
            if task.name in SHEETS:
                draw(task, retrieved[task.name], recipe.output / f"retrievals-{task.name}.png")
        say(lead, runner.format_table(json.loads(before_file.read_text()), after))
        say(lead, f"metrics.json and pictures: {recipe.output}")


def draw(task: Any, found: Sequence[Any], path: Path, rows: int = 8) -> None:
    """A contact sheet of evenly spaced queries, as they came, right or wrong."""
    picked = range(0, len(found), max(1, len(found) // rows))[:rows]
    pictures.contact_sheet(
        [
            pictures.SheetRow(
                task.queries[i],
                [task.candidates[c] for c in found[i].top],
                found[i].right,
                found[i].rank,
            )
            for i in picked
        ],
        path,
        title=f"{task.name}: query, the five nearest, the right one framed",
    )


def say(lead: bool, text: str) -> None:
    """Print on rank 0."""
    if lead:
        print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
