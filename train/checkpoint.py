"""Checkpoints: a folder each, complete or absent, and checked before it is trusted.

`checkpoint-<step>/` holds a plain transformers checkpoint (weights, tokenizer, `btok_config.json`),
`optimizer.safetensors`, `rng.safetensors` (the random state of each rank), `trainer.json`, and last
`manifest.json` with the sha256 of each file. It is written beside its place and renamed; nothing is
pickled.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from btok.files import sha256, write_text
from btok.model import BTokModel
from btok.processing import Processor
from btok_kernels.ranks import rank, world

MANIFEST = "manifest.json"


def save(
    run: Path,
    step: int,
    model: BTokModel,
    processor: Processor,
    optimizers: Mapping[str, torch.optim.Optimizer],
    state: dict[str, Any],
    keep: int = 2,
) -> Path:
    """Write `run/checkpoint-<step>`, `state` (JSON scalars) included; keep the newest `keep`.

    Every rank calls it, rank 0 writes, and all return after that.

    Raises:
        OSError: on every rank, where it could not be written; the older ones are as they were.
    """
    states = _random_states()
    draft, final = run / f".checkpoint-{step}.draft", run / f"checkpoint-{step}"
    cause, failed = None, [""]
    if rank() == 0:
        try:
            for left in run.glob(".checkpoint-*.draft"):  # by a process that was killed
                shutil.rmtree(left)
            draft.mkdir(parents=True)
            _write(draft, step, model, processor, optimizers, state, states)
            if final.exists():  # the same step again, after a resume
                shutil.rmtree(final)
            draft.rename(final)
            for old in _by_step(run)[keep:]:
                shutil.rmtree(old)
        except Exception as error:  # for a full disk safetensors and tokenizers have their own
            shutil.rmtree(draft, ignore_errors=True)
            cause, failed = error, [unwritable(final, error)]
    if world() > 1:
        dist.broadcast_object_list(failed)
    if failed[0]:
        raise OSError(failed[0]) from cause
    return final


def unwritable(path: Path, error: Exception) -> str:
    """What to tell where a run could not write."""
    return (
        f"{path} cannot be written ({type(error).__name__}: {error}); free space there and give "
        "the same command again"
    )


def _write(
    draft: Path,
    step: int,
    model: BTokModel,
    processor: Processor,
    optimizers: Mapping[str, torch.optim.Optimizer],
    state: dict[str, Any],
    states: dict[str, Tensor],
) -> None:
    model.save_pretrained(draft)
    processor.save_pretrained(draft)
    moments = {
        f"{which}.{index}.{name}": value.contiguous()
        for which, optimizer in optimizers.items()
        for index, entries in optimizer.state_dict()["state"].items()
        for name, value in entries.items()
    }
    save_file(moments, draft / "optimizer.safetensors")
    save_file(states, draft / "rng.safetensors")
    (draft / "trainer.json").write_text(json.dumps({"step": step, **state}, indent=2) + "\n")
    files = (p for p in sorted(draft.rglob("*")) if p.is_file())
    digests = {str(p.relative_to(draft)): sha256(p) for p in files}
    write_text(draft / MANIFEST, json.dumps(digests, indent=2))


def newest_valid(run: Path) -> Path | None:
    """The newest whole checkpoint of a run; broken ones are set aside as `<name>.broken`."""
    for folder in _by_step(run):
        if _is_whole(folder):
            return folder
        aside = folder.with_name(folder.name + ".broken")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        print(f"{folder.name} is damaged; set aside as {aside.name}", file=sys.stderr)
    return None


def load(folder: Path, optimizers: Mapping[str, torch.optim.Optimizer]) -> dict[str, Any]:
    """Restore optimizers and this rank's random state; returns `save`'s state, and `step`."""
    states: dict[str, dict[int, dict[str, Tensor]]] = {which: {} for which in optimizers}
    for key, value in load_file(folder / "optimizer.safetensors").items():
        which, index, name = key.split(".", 2)
        states[which].setdefault(int(index), {})[name] = value
    for which, optimizer in optimizers.items():
        optimizer.load_state_dict({**optimizer.state_dict(), "state": states[which]})
    drawn = load_file(folder / "rng.safetensors")
    torch.set_rng_state(drawn[f"cpu.{rank()}"])
    if f"cuda.{rank()}" in drawn:
        torch.cuda.set_rng_state(drawn[f"cuda.{rank()}"])
    return json.loads((folder / "trainer.json").read_text())


def _random_states() -> dict[str, Tensor]:
    """Of every rank: `cpu.<rank>`, and `cuda.<rank>` where it draws there."""
    mine = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        mine["cuda"] = torch.cuda.get_rng_state()
    found = [mine] * world()
    if world() > 1:
        dist.all_gather_object(found, mine)
    return {
        f"{kind}.{i}": state for i, states in enumerate(found) for kind, state in states.items()
    }


def _by_step(run: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [p for p in run.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")), reverse=True)


def _is_whole(folder: Path) -> bool:
    try:
        digests = json.loads((folder / MANIFEST).read_text())
        return bool(digests) and all(sha256(folder / n) == d for n, d in digests.items())
    except (OSError, ValueError):
        return False
