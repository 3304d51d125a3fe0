"""One training run on one rank: steps, log, checkpoints, stop and resume."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from btok.data.records import Side
from btok.encoder import BTokEncoder
from btok.model import BTokModel
from btok.processing import Processor
from train import checkpoint
from train.recipes import Recipe
from train.sampler import step_pairs
from train.step import mean_over_ranks, rank, train_step, world


class Stop:
    """SIGTERM or Ctrl-C: exit at once where nothing would be lost, else after the step's end."""

    def __init__(self) -> None:
        self.in_step = self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        self.asked = True
        if not self.in_step:
            raise SystemExit(0)


class Journal:
    """`log.jsonl` and a progress bar, on rank 0; rows of steps to be done again are dropped."""

    def __init__(self, recipe: Recipe, first: int) -> None:
        self.path = recipe.output / "log.jsonl"
        self.began, self.pairs = time.perf_counter(), 0
        steps = {"total": recipe.total_steps, "initial": first}
        self.bar = tqdm(**steps, unit="step", disable=rank() != 0, mininterval=1.0)
        if rank() == 0:
            lines = self.path.read_text().split("\n") if self.path.exists() else []
            done = (line for line in lines[:-1] if json.loads(line)["step"] < first)
            self.path.write_text("".join(f"{line}\n" for line in done))

    def write(self, row: dict[str, Any], pairs: int) -> None:
        """Add a step's row; `pairs` were its pairs."""
        if rank() != 0:
            return
        seconds = time.perf_counter() - self.began
        with open(self.path, "a") as file:
            file.write(json.dumps(row | {"seconds": round(seconds, 3)}) + "\n")
        self.pairs += pairs
        shown = {key: f"{row[key]:.3f}" for key in ("contrastive", "ntp") if key in row}
        self.bar.set_description(row["phase"], refresh=False)
        self.bar.set_postfix(shown | {"pairs/s": round(self.pairs / seconds)}, refresh=False)
        self.bar.update()


def train(
    model: BTokModel, processor: Processor, recipe: Recipe, resume: Path | None, stop: Stop
) -> bool:
    """Run the steps that are left; False where a signal ended them early, after a checkpoint."""
    optimizers = make_optimizers(model, recipe)
    first = checkpoint.load(resume, optimizers)["step"] if resume else 0
    journal = Journal(recipe, first)
    model.train()
    stop.in_step, stopping = True, False
    for step in range(first, recipe.total_steps):
        rate = recipe.learning_rate_at(step)
        for name, optimizer in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rate * (recipe.muon_rate if name == "muon" else 1.0)
        pairs = step_pairs(recipe, step, rank(), world())
        losses = train_step(model, processor, recipe, pairs, step)
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm))
        if not math.isfinite(norm + float(losses.total)):
            raise FloatingPointError(
                f"step {step}: loss {float(losses.total)}, gradient norm {norm}; the newest "
                "checkpoint is from before it; try a lower --learning-rate"
            )
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()

        row = {"step": step, "phase": "caption", "loss": float(losses.total)}
        if step >= recipe.caption_steps:
            row |= {"phase": "train", "contrastive": float(losses.contrastive)}
        row |= {"ntp": float(losses.ntp), "learning_rate": rate, "gradient_norm": norm}
        journal.write(row, len(pairs) * world())

        done = step + 1
        stopping = float(mean_over_ranks(torch.tensor(float(stop.asked)))) > 0
        if stopping or done == recipe.total_steps or done % recipe.checkpoint_every == 0:
            if rank() == 0:
                state = {"processes": world()}
                checkpoint.save(recipe.output, done, model, processor, optimizers, state)
            if world() > 1:
                dist.barrier()
        if stopping:
            break
    journal.bar.close()
    stop.in_step = False
    if stop.asked and not stopping:  # since the last step, which is saved
        raise SystemExit(0)
    return not stopping


def make_optimizers(model: BTokModel, recipe: Recipe) -> dict[str, torch.optim.Optimizer]:
    """AdamW; with a `muon_rate`, Muon for the matrices inside layers, scaled to AdamW's rates."""
    backbone = model.backbone
    outside = {id(t.weight) for t in (backbone.get_input_embeddings(), backbone.lm_head)}
    names: dict[str, list[Any]] = {"adamw": [], "muon": []}
    for p in model.parameters():
        inside = p.ndim == 2 and id(p) not in outside
        if p.requires_grad:
            names["muon" if inside and recipe.muon_rate else "adamw"].append(p)
    decay = {"weight_decay": recipe.weight_decay}
    adamw = torch.optim.AdamW(names["adamw"], betas=(0.9, 0.98), **decay)
    if not names["muon"]:
        return {"adamw": adamw}
    muon = torch.optim.Muon(names["muon"], adjust_lr_fn="match_rms_adamw", **decay)
    return {"adamw": adamw, "muon": muon}


def sharded_encode(encoder: BTokEncoder) -> Callable[[Sequence[Side]], np.ndarray]:
    """`encoder.encode` with the sides split over ranks; every rank gets all rows."""

    def encode(sides: Sequence[Side]) -> np.ndarray:
        mine = sides[rank() :: world()]
        parts: list[Any] = [encoder.encode(mine, show_progress=False) if mine else None]
        if world() > 1:
            parts *= world()
            dist.all_gather_object(parts, parts[0])
        rows = np.empty((len(sides), parts[0].shape[1]), np.float32)
        for first, part in enumerate(parts):
            if part is not None:
                rows[first :: world()] = part
        return rows

    return encode
