"""Checkpoints: a folder each, complete or absent, and checked before it is trusted.

`checkpoint-<step>/` holds a plain transformers checkpoint (weights, tokenizer, `btok_config.json`),
`optimizer.safetensors`, `rng.safetensors`, `trainer.json`, and last `manifest.json` with the
sha256 of each file. It is written beside its place and renamed; nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from btok.model import BTokModel
from btok.processing import Processor

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
    """Write `run/checkpoint-<step>`, `state` (JSON scalars) included; keep the newest `keep`."""
    final = run / f"checkpoint-{step}"
    draft = run / f".checkpoint-{step}.draft"
    for left in run.glob(".checkpoint-*.draft"):  # by a process that was killed
        shutil.rmtree(left)
    draft.mkdir(parents=True)
    model.save_pretrained(draft)
    processor.save_pretrained(draft)
    moments = {
        f"{which}.{index}.{name}": value.contiguous()
        for which, optimizer in optimizers.items()
        for index, entries in optimizer.state_dict()["state"].items()
        for name, value in entries.items()
    }
    save_file(moments, draft / "optimizer.safetensors")
    save_file({"torch": torch.get_rng_state()}, draft / "rng.safetensors")
    (draft / "trainer.json").write_text(json.dumps({"step": step, **state}, indent=2) + "\n")
    files = (p for p in sorted(draft.rglob("*")) if p.is_file())
    digests = {str(p.relative_to(draft)): _sha256(p) for p in files}
    with open(draft / MANIFEST, "w") as manifest:
        json.dump(digests, manifest, indent=2)
        manifest.flush()
        os.fsync(manifest.fileno())
    if final.exists():  # the same step again, after a resume
        shutil.rmtree(final)
    draft.rename(final)
    for old in _by_step(run)[keep:]:
        shutil.rmtree(old)
    return final


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
    """Restore optimizers and random state; returns what `save` got as state, and `step`."""
    states: dict[str, dict[int, dict[str, Tensor]]] = {which: {} for which in optimizers}
    for key, value in load_file(folder / "optimizer.safetensors").items():
        which, index, name = key.split(".", 2)
        states[which].setdefault(int(index), {})[name] = value
    for which, optimizer in optimizers.items():
        optimizer.load_state_dict({**optimizer.state_dict(), "state": states[which]})
    torch.set_rng_state(load_file(folder / "rng.safetensors")["torch"])
    return json.loads((folder / "trainer.json").read_text())


def _by_step(run: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = [p for p in run.glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")), reverse=True)


def _is_whole(folder: Path) -> bool:
    try:
        digests = json.loads((folder / MANIFEST).read_text())
        return bool(digests) and all(_sha256(folder / n) == d for n, d in digests.items())
    except (OSError, ValueError):
        return False


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
