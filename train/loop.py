"""One training run on one rank: steps, logs, checkpoints, stop and resume."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from btok.data.records import Pair, Side
from btok.encoder import BTokEncoder
from btok.model import BTokModel
from btok.objective import Losses, pair_samples, positive_ids
from btok.packing import pack
from btok.processing import Processor
from train import checkpoint
from train.recipes import Recipe
from train.sampler import step_pairs


@dataclass
class Stop:
    """SIGTERM or Ctrl-C: at once where nothing would be lost, else after the step under way."""

    in_step: bool = False
    asked: bool = field(default=False, init=False)

    def install(self) -> None:
        """Take over both signals."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        self.asked = True
        if not self.in_step:
            raise SystemExit(0)


def train_step(
    model: BTokModel, processor: Processor, recipe: Recipe, pairs: Sequence[Pair], step: int
) -> Losses:
    """Forward and backward of this rank's pairs; gradients are left averaged over ranks."""
    captioning = step < recipe.caption_steps
    objective = recipe.objective
    generate = captioning or objective.weight(step - recipe.caption_steps) > 0
    samples = pair_samples(pairs, processor, ntp_side=recipe.ntp_side, generate=generate)
    if captioning:
        samples = [sample for sample in samples if sample[1] is not None]
    batch = pack(
        samples,
        btok_token_ids=() if captioning else model.btok_token_ids,
        prefix_ids=processor.prefix_ids,
        suffix_ids=processor.suffix_ids,
        backbone_config=model.backbone.config,
        target_positions=model.target_positions,
        condense=recipe.condense and not captioning,
    ).to(model.backbone.device)
    output = model(batch)
    ntp_scale = _over_mean(model.ntp_count(batch))
    if captioning:
        ntp = output.ntp_loss * ntp_scale
        losses = Losses(ntp, torch.zeros_like(ntp), ntp)
    else:
        losses = objective(
            output,
            positive_ids(pairs, _rank()),
            step=step - recipe.caption_steps,
            num_groups=recipe.groups_per_batch // _world(),
            ntp_scale=ntp_scale,
        )
    losses.total.backward()
    average_gradients(model)
    return Losses(*_mean(torch.stack(losses).detach()))


def train(
    model: BTokModel,
    processor: Processor,
    recipe: Recipe,
    resume: Path | None,
    stop: Stop,
) -> bool:
    """Run the steps that are left; False where a signal ended them early, after a checkpoint."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=recipe.weight_decay,
    )
    first = checkpoint.load(resume, optimizer)["step"] if resume else 0
    log = recipe.output / "log.jsonl"
    if _rank() == 0:
        _keep_rows(log, first)
    model.train()
    bar = tqdm(
        total=recipe.total_steps, initial=first, unit="step", disable=_rank() != 0, mininterval=1.0
    )
    stop.in_step = True
    began, pairs_done = time.perf_counter(), 0
    for step in range(first, recipe.total_steps):
        rate = recipe.learning_rate_at(step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        pairs = step_pairs(recipe, step, _rank(), _world())
        losses = train_step(model, processor, recipe, pairs, step)
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm))
        if not math.isfinite(norm) or not math.isfinite(float(losses.total)):
            raise FloatingPointError(
                f"step {step}: loss {float(losses.total)}, gradient norm {norm}; the newest "
                "checkpoint is from before; try a lower learning_rate"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        pairs_done += len(pairs) * _world()
        row = {
            "step": step,
            "phase": "caption" if step < recipe.caption_steps else "train",
            "loss": float(losses.total),
            **({} if step < recipe.caption_steps else {"contrastive": float(losses.contrastive)}),
            "ntp": float(losses.ntp),
            "learning_rate": rate,
            "gradient_norm": norm,
            "seconds": round(time.perf_counter() - began, 3),
        }
        if _rank() == 0:
            with open(log, "a") as file:
                file.write(json.dumps(row) + "\n")
            shown = {key: f"{row[key]:.3f}" for key in ("contrastive", "ntp") if key in row}
            bar.set_description(row["phase"])
            bar.set_postfix(
                shown | {"pairs/s": f"{pairs_done / (time.perf_counter() - began):.0f}"},
                refresh=False,
            )
            bar.update()
        done = step + 1
        stopping = _any(stop.asked)
        if stopping or done == recipe.total_steps or done % recipe.checkpoint_every == 0:
            if _rank() == 0:
                checkpoint.save(
                    recipe.output, done, model, processor, optimizer, {"world": _world()}
                )
            _barrier()
        if stopping:
            bar.close()
            return False
    bar.close()
    stop.in_step = False
    return True


def sharded_encode(encoder: BTokEncoder) -> Callable[[Sequence[Side]], np.ndarray]:
    """`encoder.encode` with the sides split over ranks; every rank gets all rows."""

    def encode(sides: Sequence[Side]) -> np.ndarray:
        if _world() == 1:
            return encoder.encode(sides)
        size = encoder.model.backbone.config.text_config.hidden_size
        mine = sides[_rank() :: _world()]
        rows = encoder.encode(mine) if mine else np.empty((0, size), np.float32)
        parts: list[Any] = [None] * _world()
        dist.all_gather_object(parts, rows)
        out = np.empty((len(sides), size), np.float32)
        for rank, part in enumerate(parts):
            out[rank :: _world()] = part
        return out

    return encode


def average_gradients(model: torch.nn.Module) -> None:
    """Replace every parameter's gradient by its mean over ranks; a missing one counts as zero."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if _world() == 1:
        return
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    flat /= _world()
    for p, mean in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad.copy_(mean.view_as(p))


def _keep_rows(log: Path, first: int) -> None:
    """Drop log rows of steps that will be done again, and a half-written last one."""
    kept = []
    for line in log.read_text().splitlines() if log.exists() else []:
        try:
            if json.loads(line)["step"] < first:
                kept.append(line + "\n")
        except ValueError:
            continue
    log.write_text("".join(kept))


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def _mean(value: torch.Tensor) -> torch.Tensor:
    """Over ranks; may change `value`."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value / _world()


def _over_mean(count: int) -> float:
    """This rank's count over the mean count; 0 where all are 0."""
    mean = float(_mean(torch.tensor(float(count), dtype=torch.float64)))
    return count / mean if mean else 0.0


def _any(flag: bool) -> bool:
    return float(_mean(torch.tensor(float(flag)))) > 0
