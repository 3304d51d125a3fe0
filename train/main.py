"""Train a model with Bottleneck Tokens and show what it learned.

    python train/main.py [recipe] [--output DIR] [--steps N] ...
    torchrun --nproc-per-node 2 train/main.py [recipe] ...

Settings: `train/recipes.py`. The same command again goes on where a stopped run was.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import Any

if not __package__:  # run as a file: make the folder above importable
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
import tyro
from transformers.utils.logging import disable_progress_bar

from btok.data.mixture import load_mixture
from btok.data.sources import Source
from btok.files import write_json
from btok.kernels import CondensedLayout, condensed_attention
from btok.model import BTokModel
from btok.processing import Processor
from btok.tools import command_line, pictures
from btok_kernels.ranks import rank, world
from train import checkpoint, parallel
from train.log import TrainLog
from train.pocket import source as pocket
from train.pocket.evaluation import evaluate, show
from train.recipes import RECIPES, Recipe, build
from train.sampler import Step, TrainSet, load_steps
from train.step import train_step

FITS = "out of memory; try a lower --chunk-tokens, --gradcache true, --checkpoint-activations true"
MISTAKES = (ValueError, OSError, ImportError, FloatingPointError, torch.OutOfMemoryError)
MAY_CHANGE = {"output", "checkpoint_every", "workers", "max_skipped", "tensorboard"}  # in a run


def main(argv: Sequence[str] | None = None) -> int:
    """Run a recipe; 2 for a mistake in the command or the data, 1 for a loss that is not finite.

    Both are told in a line; BTOK_DEBUG=1 shows where it was noticed. The other processes end with
    the one that fails or is stopped; `torchrun` itself then returns 1 for any that did not give 0.
    What it starts again after such an error ends at once; an OSError or lack of memory may pass.
    """
    store = parallel.connect()
    if store.underlying_store.check(["mistake"]):  # before a restart
        code, what = json.loads(store.underlying_store.get("mistake"))
        return tell(store, f"not tried again: {what}", code)
    parallel.join(store)
    with Stop() as stop:
        try:
            run(parse(list(sys.argv[1:] if argv is None else argv)), stop)
            parallel.leave()
        except MISTAKES as error:
            code = 1 if isinstance(error, FloatingPointError) else 2
            what = " ".join(str(error).split())
            if isinstance(error, torch.OutOfMemoryError):
                what = f"{FITS}: {what}"
            if not isinstance(error, (OSError, torch.OutOfMemoryError)):  # those may pass
                store.underlying_store.set("mistake", json.dumps([code, what]))
            if os.environ.get("BTOK_DEBUG"):
                raise
            return tell(store, what, code)
        except SystemExit:  # a signal, where nothing would be lost
            store.add("stopped", 1)
            raise
        except RuntimeError:  # also of a collective that another process has left
            if store.add("stopped", 0) and not store.add("failed", 0):
                return 0
            if store.add("failed", 1) > 1:
                return 1
            raise
    return 0


def tell(store: dist.Store, what: str, code: int) -> int:
    """Print an error, if no other process has; returns the exit code."""
    if store.add("failed", 1) == 1:
        line = "\n" * (rank() > 0)  # behind the progress bar of rank 0
        print(f"{line}error: {what}", file=sys.stderr)
    return code


class Stop:
    """SIGTERM or Ctrl-C: exit at once where nothing would be lost, else after the step's end."""

    def __init__(self) -> None:
        self.in_step = self.asked = False

    def __enter__(self) -> Stop:
        numbers = (signal.SIGTERM, signal.SIGINT)
        self.before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if not self.in_step:
            raise SystemExit(0)


def parse(argv: list[str]) -> Recipe:
    """The recipe a command line describes.

    Raises:
        ValueError: an unknown recipe or option, a value out of range.
    """
    name = argv.pop(0) if argv and not argv[0].startswith("-") else "pocket"
    if name not in RECIPES:
        raise ValueError(f"recipe is '{name}', expected one of {sorted(RECIPES)}")
    argv = [{"true": "True", "false": "False"}.get(word, word) for word in argv]
    options = {"default": RECIPES[name], "config": (tyro.conf.FlagConversionOff,)}
    return command_line.parse(Recipe, argv, "train/main.py", **options)


def run(recipe: Recipe, stop: Stop) -> None:
    """Build, evaluate, train, evaluate, and draw; only on the pocket benchmark is there an
    evaluation. A run that was stopped goes on from its newest whole checkpoint.

    Raises:
        ValueError: settings that do not fit the run folder, the processes, the data or the device.
    """
    sources = [] if recipe.data is None else load_mixture(recipe.data)
    settings = check(recipe, sources)
    resume = parallel.from_first(checkpoint.newest_valid(recipe.output) if rank() == 0 else None)
    if resume:
        processor = Processor.from_pretrained(resume, recipe.num_btoks)
        model = BTokModel.from_pretrained(resume, num_btoks=recipe.num_btoks, dtype=recipe.weights)
    else:
        model, processor = build(recipe)
    model.attention = recipe.attention
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    try_attention(model, recipe)
    if recipe.data is None:
        train_set = pocket.train_set(recipe, processor, rank(), world())
    else:
        train_set = TrainSet(recipe, processor, sources, rank(), world())
    if rank() == 0 and resume is None:  # not before: a mistake leaves nothing behind
        recipe.output.mkdir(parents=True, exist_ok=True)
        write_json(recipe.output / "config.json", settings)

    disable_progress_bar()  # of every checkpoint's single shard
    say = print if rank() == 0 else lambda *_: None
    has_scores = recipe.eval_queries and recipe.data is None
    if resume:
        say(f"going on from {resume}")
    elif has_scores:
        say("before training:")
        evaluate(model, processor, recipe, "before.json")
    if not train(model, processor, recipe, train_set, resume, stop):
        say(f"stopped; the same command goes on from {recipe.output}")
        return
    if has_scores:
        say("after training:")
        retrieved = evaluate(model, processor, recipe, "metrics.json")
    if rank() == 0:
        if log := (recipe.output / "log.jsonl").read_text().splitlines():
            pictures.loss_curve(map(json.loads, log), recipe.output / "loss.png")
        if has_scores:
            show(recipe, retrieved)
        print(f"metrics, pictures, log and checkpoints are in {recipe.output}")


def check(recipe: Recipe, sources: Sequence[Source]) -> dict[str, Any]:
    """What `config.json` of a run says, so that no run goes on as another one.

    Raises:
        ValueError: a run folder that belongs to a run with other settings or data; groups that do
            not divide among the processes.
    """
    settings = {**recipe.described(), "processes": world()}
    sets = settings["data sets"] = [[s.name, len(s), s.weight, s.digest] for s in sources]
    config = recipe.output / "config.json"
    saved = json.loads(config.read_text()) if config.exists() else settings
    before = saved.get("data sets", [])
    if [entry[:3] for entry in before] == [entry[:3] for entry in sets]:
        for (name, _, _, *was), now in zip(before, sets, strict=True):
            if was not in ([], now[3:]):  # a run of an older version has no digests
                raise ValueError(
                    f"{recipe.output} holds a run whose data set {name} had another content; give "
                    "the same file or another --output"
                )
        saved["data sets"] = sets
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
    return settings


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


def train(
    model: BTokModel,
    processor: Processor,
    recipe: Recipe,
    train_set: TrainSet,
    resume: Path | None,
    stop: Stop,
) -> bool:
    """Take the steps that are left; False where a signal ended them early, after a checkpoint."""
    if recipe.checkpoint_activations:
        model.checkpoint_activations()
    optimizers = make_optimizers(model, recipe)
    torch.manual_seed(recipe.seed * world() + rank())  # of what is drawn at random on each rank
    saved = checkpoint.load(resume, optimizers) if resume else {}
    first, before = saved.get("step", 0), recipe.caption_steps
    # on the pocket benchmark captioning comes first, which teaches its small model to see
    captions = pocket.captions(recipe, processor, first) if first < before else ()
    steps = chain(captions, load_steps(train_set, max(first - before, 0), recipe.workers))
    model.train()
    stop.in_step, stopping = True, False
    with TrainLog(recipe, first, saved.get("skipped", 0)) as log:
        for step, (number, drawn) in enumerate(steps, first):
            log.count_skipped(drawn.skipped)
            captioning = step < before
            phase = recipe.captions if captioning else recipe
            data = drawn.pairs, drawn.samples
            result = train_step(model, processor, phase, *data, number, captioning)
            losses = result.losses
            norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm))
            if not math.isfinite(norm + float(losses.total)):
                path = write_batch(recipe, step, drawn)
                raise FloatingPointError(
                    f"step {step}: loss {float(losses.total)}, gradient norm {norm}; {path} names "
                    "its batch, the newest checkpoint is from before it; try a lower "
                    "--learning-rate"
                )
            rate = phase.learning_rate_at(number)
            for name, optimizer in optimizers.items():
                for group in optimizer.param_groups:
                    group["lr"] = rate * (recipe.muon_rate if name == "muon" else 1.0)
                optimizer.step()
                optimizer.zero_grad()

            row = {"step": step, "phase": "caption", "loss": float(losses.total)}
            if not captioning:
                row |= {"phase": "train", "contrastive": float(losses.contrastive)}
            row |= {"ntp": float(losses.ntp), "learning_rate": rate, "gradient_norm": norm}
            row |= {"skipped": log.skipped} if log.skipped else {}
            log.write(row, recipe.groups_per_batch * recipe.group_size, result.tokens, result.flops)

            done = step + 1
            # agreed upon: a signal may reach the ranks in different steps
            stopping = parallel.total_over_ranks(stop.asked) > 0
            if stopping or done == recipe.total_steps or done % recipe.checkpoint_every == 0:
                state = {"processes": world(), "skipped": log.skipped}
                checkpoint.save(recipe.output, done, model, processor, optimizers, state)
            if stopping:
                break
    stop.in_step = False
    if stop.asked and not stopping:  # since the last step, which is saved
        raise SystemExit(0)
    return not stopping


def make_optimizers(model: BTokModel, recipe: Recipe) -> dict[str, torch.optim.Optimizer]:
    """AdamW; with a `muon_rate`, Muon for the matrices inside layers, scaled to AdamW's rates."""
    backbone = model.backbone
    outside = {id(t.weight) for t in (backbone.get_input_embeddings(), backbone.lm_head)}
    names: dict[str, list[torch.nn.Parameter]] = {"adamw": [], "muon": []}
    for p in model.parameters():
        inside = p.ndim == 2 and id(p) not in outside
        if p.requires_grad:
            names["muon" if inside and recipe.muon_rate else "adamw"].append(p)
    decay = recipe.weight_decay
    adamw = torch.optim.AdamW(names["adamw"], betas=(0.9, recipe.beta2), weight_decay=decay)
    if not names["muon"]:
        return {"adamw": adamw}
    muon = torch.optim.Muon(names["muon"], weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    return {"adamw": adamw, "muon": muon}


def write_batch(recipe: Recipe, step: int, drawn: Step) -> Path:
    """Which pairs all ranks had in a step, as `nonfinite.json`; every rank calls it."""
    rows = [
        {"dataset": pair.dataset, "row": row, "positive_id": pair.positive_id}
        for pair, row in zip(drawn.pairs, drawn.rows, strict=True)
    ]
    found = parallel.gather(rows)
    path = recipe.output / "nonfinite.json"
    if rank() == 0:
        pairs = [{"rank": i, **row} for i, rows in enumerate(found) for row in rows]
        write_json(path, {"step": step, "pairs": pairs})
    return path


if __name__ == "__main__":
    sys.exit(main())
