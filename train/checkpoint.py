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
from safetensors.torch import load_file, save_file
from torch import Tensor

from btok.files import sha256, write_text
from btok.model import BTokModel
from btok.processing import Processor
from btok_kernels.ranks import rank
from train.parallel import from_first, gather

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
    states = gather(random_state())
    draft, final = run / f".checkpoint-{step}.draft", run / f"checkpoint-{step}"
    cause, failed = None, ""
    if rank() == 0:
        try:
            for left in run.glob(".checkpoint-*.draft"):  # by a process that was killed
                shutil.rmtree(left)
            draft.mkdir(parents=True)
            model.save_pretrained(draft)
            processor.save_pretrained(draft)
            save_file(_moments(optimizers), draft / "optimizer.safetensors")
            drawn = {f"{kind}.{i}": x for i, own in enumerate(states) for kind, x in own.items()}
            save_file(drawn, draft / "rng.safetensors")
            (draft / "trainer.json").write_text(
                json.dumps({"step": step, **state}, indent=2) + "\n"
            )
            files = [p for p in sorted(draft.rglob("*")) if p.is_file()]
            digests = {str(p.relative_to(draft)): sha256(p) for p in files}
            write_text(draft / MANIFEST, json.dumps(digests, indent=2))
            if final.exists():  # the same step again, after a resume
                shutil.rmtree(final)
            draft.rename(final)
            for old in _by_step(run)[keep:]:
                shutil.rmtree(old)
        except Exception as error:  # for a full disk safetensors and tokenizers have their own
            shutil.rmtree(draft, ignore_errors=True)
            cause, failed = error, unwritable(final, error)
    # a rank that went on alone would wait for the others forever
    if failed := from_first(failed):
        raise OSError(failed) from cause
    return final


def unwritable(path: Path, error: Exception) -> str:
    """What to tell where a run could not write."""
    return (
        f"{path} cannot be written ({type(error).__name__}: {error}); free space there and give "
        "the same command again"
    )


def _moments(optimizers: Mapping[str, torch.optim.Optimizer]) -> dict[str, Tensor]:
    return {
        f"{which}.{index}.{name}": value.contiguous()
        for which, optimizer in optimizers.items()
        for index, entries in optimizer.state_dict()["state"].items()
        for name, value in entries.items()
    }


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
    own = {kind: drawn.get(f"{kind}.{rank()}") for kind in ("cpu", "cuda")}
    set_random_state({kind: state for kind, state in own.items() if state is not None})
    return json.loads((folder / "trainer.json").read_text())


def random_state() -> dict[str, Tensor]:
    """The state that this rank draws from, on the CPU and, where it draws there, on the GPU."""
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {}
    return {"cpu": torch.get_rng_state(), **cuda}


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Draw as at the time of `random_state`."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


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
