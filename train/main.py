"""Train a model with Bottleneck Tokens and show what it learned.

    python train/main.py [recipe] [--output DIR] [--steps N] ...
    torchrun --nproc-per-node 2 train/main.py [recipe] ...

Settings: `train/recipes.py`. The same command again goes on where a stopped run was.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: make the folder above importable
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import tyro
from torch import nn

from btok.data.mixture import load_mixture
from btok.data.sources import Source
from btok.evaluation.runner import Retrieved, format_table
from btok.files import may_be_folder, one_line, printable, write_json
from btok.kernels import CondensedLayout, condensed_attention
from btok.model import BTokModel
from btok.tools import command_line, env, pictures
from btok.tools.run_report import write_report
from btok_kernels.ranks import from_first, gather, rank, world
from train import checkpoint, parallel
from train.log import TrainLog, summary_writer
from train.memory import refuse_too_small
from train.microbatches import PackedStep, Packing
from train.pocket import source as pocket
from train.pocket.demonstration import Demonstration, closing, opening
from train.pocket.evaluation import draw_sheets, evaluate, format_scores
from train.pocket.files import write_files
from train.provenance import note_end, note_start
from train.recipes import RECIPES, Recipe, load
from train.sampler import MIB, TrainSet, load_steps, shared_memory
from train.step import train_step

# in a run that goes on
MAY_CHANGE = {"output", "checkpoint_every", "workers", "max_skipped", "tensorboard"}
MAY_CHANGE |= {"processes", "shard", "replicas"}
# may not, of a data set
SETTINGS = attrgetter("ntp_side", "negatives", "query_instruction", "positive_instruction")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a recipe: build, evaluate, train, evaluate, draw. Only on the pocket benchmark is there
    an evaluation. A run that was stopped goes on from its newest whole checkpoint.

    Returns:
        0; 2 for a mistake in the command or the data, 1 for a loss that is not finite.
    """
    with parallel.Stop() as stop, parallel.Processes() as processes:
        processes.join()
        words = list(sys.argv[1:] if argv is None else argv)
        name = recipe_name(words)
        recipe = parse(words)
        sources = parallel.first_alone(lambda: load_mixture(recipe.data) if recipe.data else [])
        settings = check(recipe, sources)
        if recipe.tensorboard and rank() == 0:
            summary_writer()  # before any work
        newest = checkpoint.newest_valid(recipe.output) if rank() == 0 else None
        resume = from_first(newest)
        if resume:  # or a process that does not see it would ask the hub for its checkpoint
            parallel.same_folder(recipe.output)
        model, processor = load(recipe, resume, empty=recipe.shard and rank() > 0)
        prepare(model, recipe)
        ranks = rank(), world()
        if recipe.data is None:
            train_set = pocket.train_set(recipe, processor, *ranks)
        else:
            train_set = TrainSet(recipe, processor, sources, *ranks)
        optimizers = make_optimizers(model, recipe)
        torch.manual_seed(recipe.seed * world() + rank())  # of what each rank draws at random
        saved = checkpoint.load(resume, optimizers) if resume else {}
        first, before = saved.get("step", 0), recipe.caption_steps
        start = max(first - before, 0)
        packing = Packing.of(model, processor, recipe)
        ahead = shared_memory(train_set, packing, start, recipe.workers)
        if resume is None:  # not before: a mistake leaves nothing behind
            if rank() == 0:
                recipe.output.mkdir(parents=True, exist_ok=True)
                write_json(recipe.output / "config.json", settings)
            parallel.same_folder(recipe.output)
        say = partial(print, flush=True) if rank() == 0 else lambda *_: None
        has_scores = recipe.eval_queries > 0 and recipe.data is None
        demonstrate = Demonstration(model, processor, recipe) if has_scores else None
        if demonstrate:
            say(opening(model, recipe))
        if resume:
            say(f"going on from {resume}")
        elif has_scores:
            say("before training:")
            say(format_scores(evaluate(model, processor, recipe, "before.json")[0]))

        if rank() == 0:
            note_start(recipe, name, model, first, env.gather())
        if ahead:
            say(f"{recipe.workers} workers a process hold {ahead / MIB:,.1f} MiB of shared memory")
        # on the pocket benchmark captioning comes first, which teaches its small model to see
        captions = pocket.captions(recipe, model, processor, first) if first < before else ()
        to_caption = recipe.captions if first < before else recipe  # made, and checked, once
        filler = packing.empty() if recipe.shard else None
        drawn = load_steps(train_set, start, recipe.workers, packing)
        checkpoints = checkpoint.Checkpoints(recipe.output)
        model.train()
        stop.in_step, stopping = True, False
        # older versions kept a number of draws, which does not say of which pairs
        with TrainLog(recipe, first, saved.get("unreadable", ()), demonstrate) as log:
            for step, (number, data) in enumerate(chain(captions, drawn), first):
                captioning = step < before
                phase = to_caption if captioning else recipe
                result = train_step(model, phase, data.pairs, data.microbatches, number, filler)
                norm = clipped_norm(model, recipe.clip_norm)
                with checkpoints.kept():
                    log.count_skipped(data.skipped)
                    refuse_infinite(recipe, step, data, float(result.losses.total), norm)
                rate = phase.learning_rate_at(number)
                update(optimizers, {"adamw": rate, "muon": rate * recipe.muon_rate})
                log.write(step, captioning, result, rate, norm)
                done = step + 1
                # agreed upon: a signal may reach the ranks in different steps
                stopping = parallel.total_over_ranks(stop.asked) > 0
                checkpoints.commit()
                if stopping or done == recipe.total_steps or done % recipe.checkpoint_every == 0:
                    state = {"processes": world(), "unreadable": sorted(log.unreadable)}
                    checkpoints.save(done, model, processor, optimizers, state)
                if stopping:
                    break
            checkpoints.commit(wait=True)
        stop.in_step = False
        if stop.asked and not stopping:  # since the last step, which is saved
            raise SystemExit(0)
        if stopping:
            below = "; torchrun may print a traceback of its own below"
            below = below if torch.distributed.is_torchelastic_launched() else ""
            say(f"stopped; the same command goes on from {recipe.output}{below}")
        else:
            retrieved = None
            if has_scores:
                say("after training:")
                _, retrieved = evaluate(model, processor, recipe, "metrics.json")
            if rank() == 0:
                finish(recipe, retrieved)
        processes.leave()
    return processes.code


def finish(recipe: Recipe, retrieved: dict[str, list[Retrieved]] | None) -> None:
    """Draw and tell what became of a run that is whole on the disk; what cannot be drawn is told,
    too, and nothing else.

    Args:
        retrieved: what each query of the pocket benchmark found, where it was asked.
    """
    output, files = recipe.output, recipe.output / "files"
    drawn: list[Callable[[], object]] = [partial(note_end, recipe)]
    if lines := (output / "log.jsonl").read_text().splitlines():
        drawn.append(partial(pictures.loss_curve, map(json.loads, lines), output / "loss.png"))
    if retrieved is not None:
        drawn += [partial(draw_sheets, recipe, retrieved), partial(write_files, files)]
    drawn.append(partial(write_report, output))
    for draw in drawn:
        try:
            draw()
        # hours of training are not to end with an error because of a picture
        except Exception as error:
            print(f"not drawn: {printable(one_line(error))}", file=sys.stderr)
    if retrieved is not None:
        scores = (output / name for name in ("before.json", "metrics.json"))
        print(format_table(*(json.loads(file.read_text()) for file in scores)))
    print(f"checkpoints, log, pictures and report.html are in {output}")
    if retrieved is not None and recipe.total_steps:
        print(closing(recipe, files), flush=True)


def recipe_name(argv: Sequence[str]) -> str:
    """The name of the recipe that a command line begins with; "pocket" where it has none."""
    return argv[0] if argv and not argv[0].startswith("-") else "pocket"


def parse(argv: list[str]) -> Recipe:
    """The recipe a command line describes.

    Raises:
        ValueError: an unknown recipe or option, a value out of range.
    """
    name = recipe_name(argv)
    if name not in RECIPES:
        near = command_line.meant(name, RECIPES)
        raise ValueError(f"recipe is '{name}'{near} expected one of {', '.join(RECIPES)}")
    argv = argv[argv[:1] == [name] :]
    argv = [{"true": "True", "false": "False"}.get(word, word) for word in argv]
    options = {"default": RECIPES[name], "config": (tyro.conf.FlagConversionOff,)}
    return command_line.parse(Recipe, argv, "python train/main.py", **options)


def check(recipe: Recipe, sources: Sequence[Source]) -> dict[str, Any]:
    """The content of a run's `config.json`, which keeps a run from going on as another one.

    Raises:
        ValueError: a run folder that belongs to a run with other settings or data; groups that do
            not divide among the processes.
    """
    settings = {**recipe.described(), "processes": world()}
    sets = settings["data sets"] = [
        [s.name, len(s), s.weight, s.digest, [s.schema.name, *SETTINGS(s)]] for s in sources
    ]
    may_be_folder("output", recipe.output)
    config = recipe.output / "config.json"
    try:
        saved = json.loads(config.read_text()) if config.exists() else settings
        saved = {**Recipe().described(), **saved}  # of before there was a setting
    except (ValueError, TypeError) as error:
        had = f"{config} does not hold a run's settings ({error})"
        raise ValueError(f"{had}; write it again, or give another --output") from error
    before = saved.get("data sets", [])
    if [entry[1:3] for entry in before] == [entry[1:3] for entry in sets]:
        for i, (was, now) in enumerate(zip(before, sets, strict=True)):
            if was[3:4] not in ([], now[3:4]):  # a run of an older version has no digests
                raise ValueError(
                    f"{recipe.output} holds a run whose data set {was[0]} had another content; "
                    "give the same file or another --output"
                )
            known = was[3:4] == now[3:4] != [""]  # by its content: it may have another name
            if (known or was[0] == now[0]) and was[4:] in ([], now[4:]):
                before[i] = now
        if before == sets and all(digest for *_, digest, _ in sets):
            saved["data"] = settings["data"]
    for name in sorted(settings.keys() - MAY_CHANGE):
        if saved.get(name) != settings[name]:
            raise ValueError(
                f"{recipe.output} holds a run with {name} {saved.get(name)}, this command asks "
                f"for {settings[name]}; give the same settings or another --output"
            )
    if recipe.groups_per_batch * recipe.group_size < world():
        raise ValueError(
            f"group_size is {recipe.group_size} and groups_per_batch {recipe.groups_per_batch}, "
            f"expected a pair for each of the {world()} processes"
        )
    if recipe.shard and (world() == 1 or world() % recipe.replicas):
        raise ValueError(
            f"shard is true with {world()} processes and replicas {recipe.replicas}, expected "
            "several processes, in parts of equal size"
        )
    if recipe.groups_per_batch % world() and (recipe.negatives == "group" or not sources):
        raise ValueError(
            f"groups_per_batch is {recipe.groups_per_batch}, expected a multiple of the "
            f"{world()} processes"
        )
    return settings


def prepare(model: BTokModel, recipe: Recipe) -> None:
    """The model as it trains, on its device, or over those of all ranks.

    Raises:
        ValueError: an attention that cannot run here, or more than the device has memory for.
    """
    if recipe.freeze_vision and (tower := model.family.tower(model.backbone)) is not None:
        tower.requires_grad_(False)
    model.attention = recipe.attention
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    refuse_too_small(model, recipe, device)
    try_attention(model.backbone.config.get_text_config(), recipe, device)
    if recipe.checkpoint_activations:
        model.checkpoint_activations()
    if recipe.shard:
        parallel.shard(model, recipe)
    else:
        model.to(device)


def try_attention(config: Any, recipe: Recipe, device: torch.device) -> None:
    """Refuse an implementation that cannot run here, before any work."""
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    q = torch.zeros(2, 1, dim, dtype=getattr(torch, recipe.dtype), device=device)
    layout = CondensedLayout.from_lengths([1], [1], 0).to(device)
    try:
        condensed_attention(q, q, q, layout, impl=recipe.attention)
    except RuntimeError as error:
        raise ValueError(f"attention is {recipe.attention!r}: {error}") from error


def clipped_norm(model: nn.Module, most: float) -> float:
    """The gradient's norm, which is brought down to `most` where it is above."""
    norm: Any = torch.nn.utils.clip_grad_norm_(model.parameters(), most)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


def update(optimizers: dict[str, torch.optim.Optimizer], rates: dict[str, float]) -> None:
    """A step of each optimizer at its rate; the gradients are gone."""
    for name, optimizer in optimizers.items():
        for group in optimizer.param_groups:
            group["lr"] = rates[name]
        optimizer.step()
        optimizer.zero_grad()


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
    options: dict[str, Any] = {"betas": (0.9, recipe.beta2), "weight_decay": decay}
    fused = all(p.is_cuda for p in names["adamw"])  # one kernel for all of its operations
    adamw = torch.optim.AdamW(names["adamw"], **options, fused=fused)
    if not names["muon"]:
        return {"adamw": adamw}
    muon = torch.optim.Muon(names["muon"], weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    return {"adamw": adamw, "muon": muon}


def refuse_infinite(recipe: Recipe, step: int, data: PackedStep, loss: float, norm: float) -> None:
    """A FloatingPointError for a loss or a norm that is not finite; `nonfinite.json` then says
    which pairs all ranks had. Every rank has the same two, and calls it.
    """
    if math.isfinite(norm + loss):
        return
    rows = [
        {"dataset": pair.dataset, "row": row, "positive_id": pair.positive_id}
        for pair, row in zip(data.pairs, data.rows, strict=True)
    ]
    found = gather(rows)
    path = recipe.output / "nonfinite.json"
    if rank() == 0:
        pairs = [{"rank": i, **row} for i, rows in enumerate(found) for row in rows]
        write_json(path, {"step": step, "pairs": pairs})
    raise FloatingPointError(
        f"step {step}: loss {loss}, gradient norm {norm}; {path} names its batch, the newest "
        "checkpoint is from before it; try a lower --learning-rate"
    )


if __name__ == "__main__":
    code = main()
    # sharded weights keep the process group, whose threads may abort a process while Python ends
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
