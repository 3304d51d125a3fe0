"""One training run on one rank: steps, log, checkpoints, stop and resume."""

from __future__ import annotations

import json
import math
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from btok.data.records import Side
from btok.encoder import BTokEncoder
from btok.files import write_json
from btok.model import BTokModel
from btok.processing import Processor
from btok_kernels.ranks import rank, world
from train import checkpoint
from train.recipes import Recipe
from train.sampler import Skipped, Step, Steps, load_steps
from train.step import mean_over_ranks, train_step


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


# dense operations a second by the makers' data sheets, in half precision
PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "H800": 989e12, "B200": 2250e12}


def peak_flops(recipe: Recipe) -> float:
    """Of this rank's device in the recipe's precision; 0 where it is not known."""
    if not torch.cuda.is_available() or recipe.dtype == "float32":
        return 0.0
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAKS.items() if part in name), 0.0)


class Journal:
    """`log.jsonl` and a progress bar, on rank 0; rows of steps to be done again are dropped.

    Args:
        tensorboard: write the numbers to `<output>/tensorboard` too.

    Raises:
        ImportError: TensorBoard is asked for and not installed.
    """

    def __init__(self, recipe: Recipe, first: int, tensorboard: bool = False) -> None:
        self.path = recipe.output / "log.jsonl"
        self.began, self.pairs, self.tokens, self.flops = time.perf_counter(), 0, 0, 0.0
        self.peak = peak_flops(recipe) * world()
        steps = {"total": recipe.total_steps, "initial": first}
        self.bar = tqdm(**steps, unit="step", disable=rank() != 0, mininterval=1.0)
        self.board = None
        if rank() != 0:
            return
        with open(self.path, "a+b") as file:
            file.seek(0)
            whole = (line for line in file if line.endswith(b"\n"))
            file.truncate(sum(len(line) for line in whole if json.loads(line)["step"] < first))
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                hint = f"TensorBoard needs the extra: pip install 'btok[tensorboard]' ({error})"
                raise ImportError(hint) from error
            self.board = SummaryWriter(str(recipe.output / "tensorboard"), purge_step=first)

    def write(self, row: dict[str, Any], pairs: int, tokens: int = 0, flops: float = 0.0) -> None:
        """Add a step's row; the rest is what all ranks worked on, 0 for unknown."""
        if rank() != 0:
            return
        seconds = time.perf_counter() - self.began
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(row | {"seconds": round(seconds, 3)}) + "\n")
        except OSError as error:
            raise OSError(checkpoint.unwritable(self.path, error)) from error
        self.pairs += pairs
        self.tokens += tokens
        self.flops += flops
        rates = {"pairs/s": self.pairs / seconds, "tokens/s": self.tokens / seconds}
        shown: dict[str, str] = {
            key: f"{row[key]:.3f}" for key in ("contrastive", "ntp") if key in row
        }
        shown |= {key: str(round(rate)) for key, rate in rates.items() if rate}
        if self.peak:
            rates["MFU"] = self.flops / seconds / self.peak
            shown["MFU"] = f"{rates['MFU']:.1%}"
        self.bar.set_description(row["phase"], refresh=False)
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        if self.board:
            for key, value in (row | rates).items():
                if key not in ("step", "phase"):
                    self.board.add_scalar(key, value, row["step"])

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.board:
            self.board.close()


def train(
    model: BTokModel,
    processor: Processor,
    recipe: Recipe,
    steps: Steps,
    resume: Path | None,
    stop: Stop,
) -> bool:
    """Run the steps that are left; False where a signal ended them early, after a checkpoint."""
    if recipe.checkpoint_activations:
        model.checkpoint_activations()
    optimizers = make_optimizers(model, recipe)
    torch.manual_seed(recipe.seed * world() + rank())  # of what is drawn at random on each rank
    saved = checkpoint.load(resume, optimizers) if resume else {}
    first, skipped = saved.get("step", 0), saved.get("skipped", 0)
    model.train()
    stop.in_step, stopping = True, False
    with Journal(recipe, first, recipe.tensorboard) as journal:
        for step, drawn in enumerate(load_steps(steps, first, recipe.workers), first):
            rate = recipe.learning_rate_at(step)
            for name, optimizer in optimizers.items():
                for group in optimizer.param_groups:
                    group["lr"] = rate * (recipe.muon_rate if name == "muon" else 1.0)
            skipped = report(drawn.skipped, skipped, recipe.max_skipped)
            pairs, samples = drawn.pairs, drawn.samples
            losses, tokens, flops = train_step(model, processor, recipe, pairs, samples, step)
            norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm))
            if not math.isfinite(norm + float(losses.total)):
                path = write_batch(recipe, step, drawn)
                raise FloatingPointError(
                    f"step {step}: loss {float(losses.total)}, gradient norm {norm}; {path} names "
                    "its batch, the newest checkpoint is from before it; try a lower "
                    "--learning-rate"
                )
            for optimizer in optimizers.values():
                optimizer.step()
                optimizer.zero_grad()

            row = {"step": step, "phase": "caption", "loss": float(losses.total)}
            if step >= recipe.caption_steps:
                row |= {"phase": "train", "contrastive": float(losses.contrastive)}
            row |= {"ntp": float(losses.ntp), "learning_rate": rate, "gradient_norm": norm}
            row |= {"skipped": skipped} if skipped else {}
            journal.write(row, recipe.groups_per_batch * recipe.group_size, tokens, flops)

            done = step + 1
            stopping = float(mean_over_ranks(torch.tensor(float(stop.asked)))) > 0
            if stopping or done == recipe.total_steps or done % recipe.checkpoint_every == 0:
                state = {"processes": world(), "skipped": skipped}
                checkpoint.save(recipe.output, done, model, processor, optimizers, state)
            if stopping:
                break
    stop.in_step = False
    if stop.asked and not stopping:  # since the last step, which is saved
        raise SystemExit(0)
    return not stopping


def report(found: Sequence[Skipped], before: int, most: int) -> int:
    """Tell what could not be read; returns the number so far, of all ranks.

    Raises:
        ValueError: more than `most`.
    """
    for pair in found:
        tqdm.write(f"{pair.dataset}, row {pair.row}: {pair.reason}", file=sys.stderr)
    total = before + round(float(mean_over_ranks(torch.tensor(float(len(found))))) * world())
    if total > most:
        raise ValueError(f"{total} pairs could not be read, over max_skipped {most}")
    return total


def write_batch(recipe: Recipe, step: int, drawn: Step) -> Path:
    """Which pairs all ranks had in a step, as `nonfinite.json`; every rank calls it."""
    both = zip(drawn.pairs, drawn.rows, strict=True)
    found = [[(pair.dataset, row, pair.positive_id) for pair, row in both]] * world()
    if world() > 1:
        dist.all_gather_object(found, found[0])
    path = recipe.output / "nonfinite.json"
    if rank() == 0:
        names = ("rank", "dataset", "row", "positive_id")
        rows = [
            dict(zip(names, (i, *ids), strict=True)) for i, own in enumerate(found) for ids in own
        ]
        write_json(path, {"step": step, "pairs": rows})
    return path


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
