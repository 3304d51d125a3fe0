"""Train a model with Bottleneck Tokens and show what it learned.

    python train/main.py [recipe] [--output DIR] [--steps N] ...
    torchrun --nproc-per-node 2 train/main.py [recipe] ...

Settings: `train/recipes.py`. The same command again goes on where a stopped run was.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:  # run as a file: make the folder above importable
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
import tyro
from transformers.utils.logging import disable_progress_bar

from btok.data.mixture import load_mixture
from btok.data.records import RetrievalTask
from btok.encoder import BTokEncoder
from btok.evaluation import runner
from btok.files import write_json
from btok.kernels import CondensedLayout, condensed_attention
from btok.model import BTokModel
from btok.processing import Processor
from btok.tools import command_line, pictures
from btok_kernels.ranks import rank, world
from train import checkpoint
from train.loop import Stop, sharded_encode, train
from train.pocket import data as pocket
from train.pocket.source import train_set
from train.recipes import RECIPES, Recipe, build
from train.sampler import Steps

FITS = "out of memory; try a lower --chunk-tokens, --gradcache true, --checkpoint-activations true"
MAY_CHANGE = {"output", "checkpoint_every", "workers", "max_skipped", "tensorboard"}  # in a run
SHEETS = ("I-RET", "V-RET", "VisDoc")  # tasks with pictures to find: image, video, page


def main(argv: Sequence[str] | None = None) -> int:
    """Run a recipe; 2 for a mistake in the command or the data, 1 for a loss that is not finite.

    Both are told in a line; BTOK_DEBUG=1 shows where it was noticed. The other processes end with
    the one that fails or is stopped; `torchrun` itself then returns 1 for any that did not give 0.
    What it starts again after such an error ends at once; an OSError or lack of memory may pass.
    """
    store = connect()
    if store and store.underlying_store.check(["mistake"]):  # before a restart
        code, what = json.loads(store.underlying_store.get("mistake"))
        if store.add("failed", 1) == 1:
            print(f"error: not tried again: {what}", file=sys.stderr)
        return code
    if store:
        join(store)
    with Stop() as stop:
        try:
            recipe = parse(list(sys.argv[1:] if argv is None else argv))
            run(start(recipe), stop)
            if world() > 1:
                dist.barrier()  # a rank that leaves early may take the others down
                dist.destroy_process_group()
        except (
            *(ValueError, OSError, ImportError, FloatingPointError),
            torch.OutOfMemoryError,
        ) as error:
            code = 1 if isinstance(error, FloatingPointError) else 2
            what = " ".join(str(error).split())
            if isinstance(error, torch.OutOfMemoryError):
                what = f"{FITS}: {what}"
            if store and not isinstance(error, (OSError, torch.OutOfMemoryError)):
                store.underlying_store.set("mistake", json.dumps([code, what]))
            if os.environ.get("BTOK_DEBUG"):
                raise
            if store is None or store.add("failed", 1) == 1:
                line = "\n" * (rank() > 0)  # behind the progress bar of rank 0
                print(f"{line}error: {what}", file=sys.stderr)
            return code
        except SystemExit:  # a signal, where nothing would be lost
            if store:
                store.add("stopped", 1)
            raise
        except RuntimeError:  # also of a collective that another process has left
            if store and store.add("stopped", 0) and not store.add("failed", 0):
                return 0
            if store and store.add("failed", 1) > 1:
                return 1
            raise
    return 0


def connect() -> dist.PrefixStore | None:
    """What all processes can read, if there are others or torchrun may start this one again; its
    `underlying_store` outlives that.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 and not dist.is_torchelastic_launched():
        return None
    store, _, _ = next(dist.rendezvous("env://"))
    # torchrun --max-restarts: addresses of processes that are gone stay in the store
    generation = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"generation-{generation}", store)


def join(store: dist.Store) -> None:
    """Join the other processes, if there are any."""
    number, count = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    if count == 1:
        return
    # transformers loads it with a model; loaded after the group, its defaults keep the group and
    # its threads alive past destroy_process_group, and a thread that frees a tensor while Python
    # ends aborts the process (pytorch issue 190489)
    import torch.distributed.nn.functional

    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=number, world_size=count)


def parse(argv: list[str]) -> Recipe:
    """The recipe a command line describes.

    Raises:
        ValueError: an unknown recipe or option, a value out of range.
    """
    name = argv.pop(0) if argv and not argv[0].startswith("-") else "pocket"
    if name not in RECIPES:
        raise ValueError(f"recipe is '{name}', expected one of {sorted(RECIPES)}")
    argv = [{"true": "True", "false": "False"}.get(word, word) for word in argv]
    return command_line.parse(
        Recipe,
        argv,
        "train/main.py",
        default=RECIPES[name],
        config=(tyro.conf.FlagConversionOff,),
    )


class Run(NamedTuple):
    """What a run works with; `resume` is the checkpoint it goes on from, if any."""

    recipe: Recipe
    resume: Path | None
    model: BTokModel
    processor: Processor
    steps: Steps


def start(recipe: Recipe) -> Run:
    """Find where the run was, or begin it.

    Raises:
        ValueError: groups that do not divide among the processes; a run folder that belongs to a
            run with other settings or data.
    """
    sources = [] if recipe.data is None else load_mixture(recipe.data)
    settings = {**described(recipe), "processes": world()}
    settings["data sets"] = [[s.name, len(s), s.weight] for s in sources]
    config = recipe.output / "config.json"
    saved = json.loads(config.read_text()) if config.exists() else settings
    for name in sorted(settings.keys() - MAY_CHANGE):
        if saved.get(name) != settings[name]:
            what = "--nproc-per-node" if name == "processes" else "settings"
            raise ValueError(
                f"{recipe.output} holds a run with {name} {saved.get(name)}, this command asks "
                f"for {settings[name]}; give the same {what} or another --output"
            )
    if recipe.groups_per_batch % world() and (recipe.negatives == "group" or not sources):
        raise ValueError(
            f"groups_per_batch is {recipe.groups_per_batch}, expected a multiple of the "
            f"{world()} processes"
        )
    found = [checkpoint.newest_valid(recipe.output) if rank() == 0 else None]
    if world() > 1:
        dist.broadcast_object_list(found)
    if resume := found[0]:
        processor = Processor.from_pretrained(resume, recipe.num_btoks)
        kept = {"num_btoks": recipe.num_btoks, "dtype": getattr(torch, recipe.dtype)}
        model = BTokModel.from_pretrained(resume, **kept)
    else:
        model, processor = build(recipe)
    model.attention = recipe.attention
    model.to(device())
    try_attention(model, recipe)
    where = rank(), world()
    steps = train_set(recipe, processor, *where)
    if sources:
        steps = Steps(recipe, processor, sources, *where)
    if rank() == 0 and resume is None:
        recipe.output.mkdir(parents=True, exist_ok=True)
        write_json(config, settings)
    return Run(recipe, resume, model, processor, steps)


def try_attention(model: BTokModel, recipe: Recipe) -> None:
    """Refuse an implementation that cannot run here, before any work."""
    config = model.backbone.config.get_text_config()
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    q = torch.zeros(2, 1, dim, dtype=getattr(torch, recipe.dtype), device=model.backbone.device)
    layout = CondensedLayout.from_lengths([1], [1], 0).to(q.device)
    try:
        condensed_attention(q, q, q, layout, impl=recipe.attention)
    except RuntimeError as error:
        raise ValueError(f"attention is {recipe.attention!r}: {error}") from error


def device() -> torch.device:
    """Of this process."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def described(recipe: Recipe) -> dict[str, Any]:
    """Its settings, for JSON."""
    settings = dataclasses.asdict(recipe)
    return {name: str(x) if isinstance(x, Path) else x for name, x in settings.items()}


def run(started: Run, stop: Stop) -> None:
    """Evaluate, train, evaluate, and draw; only on the pocket benchmark is there an evaluation."""
    recipe, resume, model, processor, steps = started
    disable_progress_bar()  # of every checkpoint's single shard
    say = print if rank() == 0 else lambda *_: None
    encode = sharded_encode(BTokEncoder(model, processor))
    has_tasks = recipe.eval_queries and recipe.data is None
    tasks = pocket.tasks(recipe.eval_queries) if has_tasks else []
    options: dict[str, Any] = {"data_digest": pocket.digest() if tasks else None}
    options["settings"] = described(recipe)

    def evaluate(name: str, retrieved: dict[str, list[runner.Retrieved]]) -> dict[str, Any]:
        show = rank() == 0
        result = runner.evaluate(encode, tasks, progress=show, retrieved=retrieved, **options)
        if rank() == 0:
            write_json(recipe.output / name, result)
        return result

    if resume:
        say(f"going on from {resume}")
    if tasks and resume is None:
        say("before training:")
        evaluate("before.json", {})
    if not train(model, processor, recipe, steps, resume, stop):
        say(f"stopped; the same command goes on from {recipe.output}")
        return
    retrieved: dict[str, list[runner.Retrieved]] = {}
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


def draw(task: RetrievalTask, found: Sequence[runner.Retrieved], path: Path, rows: int = 8) -> None:
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
