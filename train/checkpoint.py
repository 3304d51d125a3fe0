"""Checkpoints: a folder each, complete or absent, and checked before it is trusted.

`checkpoint-<step>/` holds a plain transformers checkpoint (weights, tokenizer, `btok_config.json`),
the optimizers' moments, `rng.safetensors` (the random state of each rank), `trainer.json`, and last
`manifest.json` with the sha256 of each file. It is written beside its place and renamed; nothing is
pickled. Where weights lie on all ranks, each rank writes some of them, whole, in files of its own,
so that any number of ranks can read them.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.core_model_loading import revert_weight_conversion

from btok.files import sha256, write_text
from btok.model import BTokModel
from btok.processing import Processor
from btok_kernels.ranks import from_first, gather, rank, world
from train.parallel import total_over_ranks

MANIFEST, WEIGHTS, MOMENTS = "manifest.json", "model", "optimizer"
KEPT = 2  # checkpoints of a run
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free space there"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "make it writable"),
    errno.EFBIG: "raise the limit on a file's size",
}


class Checkpoints:
    """Writes the checkpoints of a run while it goes on, and keeps the newest two.

    Every rank calls each method, at the same times. One is copied to the host's memory at once, and
    written by a thread; `commit` puts it into its place when all ranks have written their files.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.thread: Thread | None = None
        self.draft = self.final = run
        self.digests: dict[str, str] = {}
        self.error: Exception | None = None

    def save(
        self,
        step: int,
        model: BTokModel,
        processor: Processor,
        optimizers: Mapping[str, torch.optim.Optimizer],
        state: dict[str, Any],
    ) -> None:
        """Begin `run/checkpoint-<step>`, `state` (as JSON) included; the one before is over.

        Raises:
            OSError: as `commit`.
        """
        self.commit(wait=True)
        self.digests, self.error = {}, None
        self.draft = self.run / f".checkpoint-{step}.draft"
        self.final = self.run / f"checkpoint-{step}"
        drawn = gather(random_state())
        # adapters are small: rank 0 writes them all
        shards = isinstance(model, FSDPModule) and not hasattr(model.backbone, "peft_config")
        weights = _copied(model.saved_state().items(), shards)
        moments = _copied(_moments(optimizers), shards)
        if rank() == 0:
            try:
                for left in self.run.glob(".checkpoint-*.draft"):  # by a process that was killed
                    shutil.rmtree(left)
                self.draft.mkdir(parents=True)
                # not in the thread: a tokenizer does not take two at a time
                processor.save_pretrained(self.draft)
                states = {
                    f"{kind}.{i}": x for i, own in enumerate(drawn) for kind, x in own.items()
                }
                save_file(states, self.draft / "rng.safetensors")
                trainer = json.dumps({"step": step, **state}) + "\n"
                (self.draft / "trainer.json").write_text(trainer)
            except Exception as error:  # for a full disk safetensors and tokenizers have their own
                self.error = error
        from_first(None)  # the folder is there
        self.thread = Thread(target=self._write, args=(model, weights, moments, shards))
        self.thread.start()

    def _write(
        self, model: BTokModel, weights: dict[str, Tensor], moments: dict[str, Tensor], shards: bool
    ) -> None:
        try:
            if self.error is not None:
                return
            part = f"-{rank() + 1:05}-of-{world():05}.safetensors" if shards else ".safetensors"
            if rank() == 0:
                # on the side: transformers removes other ranks' files of weights
                aside = self.draft / "aside"
                model.save_pretrained(aside, weights)
                for path in list(aside.iterdir()):
                    path.rename(self.draft / path.name.replace(".safetensors", part))
                aside.rmdir()
            elif shards:
                weights = revert_weight_conversion(model.backbone, weights)
                save_file(weights, self.draft / f"{WEIGHTS}{part}", {"format": "pt"})
            if rank() and not shards:
                return
            save_file(moments, self.draft / f"{MOMENTS}{part}")
            for path in self.draft.rglob("*" if rank() == 0 else f"*{part}"):
                name = str(path.relative_to(self.draft))
                if name.startswith("."):  # what safetensors of another rank is still writing
                    continue
                if ("-of-" not in name or name.endswith(part)) and path.is_file():
                    self.digests[name] = sha256(path)
        except Exception as error:
            self.error = error

    @contextmanager
    def kept(self) -> Iterator[None]:
        """A context that, on an error raised on all ranks, first completes a checkpoint that is
        being written.
        """
        try:
            yield
        except Exception:
            self.commit(wait=True)
            raise

    def commit(self, wait: bool = False) -> None:
        """Put what has been written by all ranks into its place; with `wait`, wait for that.

        Raises:
            OSError: on every rank, where it could not be written; the older ones are as they were.
        """
        if self.thread is None:
            return
        if wait:
            self.thread.join()
        if total_over_ranks(not self.thread.is_alive()) < world():
            return
        self.thread = None
        found = gather((self.digests, self.error and unwritable(self.final, self.error)))
        cause, failed = self.error, next((said for _, said in found if said), "")
        if rank() == 0 and not failed:
            try:
                digests = {name: digest for own, _ in found for name, digest in own.items()}
                # of a single file, too: vLLM takes all safetensors files for weights without one
                if parts := sorted(self.draft.glob(f"{WEIGHTS}*.safetensors")):
                    digests |= _index(self.draft, parts)
                write_text(self.draft / MANIFEST, json.dumps(digests, indent=2))
                if self.final.exists():  # the same step again, after a resume
                    shutil.rmtree(self.final)
                self.draft.rename(self.final)
                for old in _by_step(self.run)[KEPT:]:
                    shutil.rmtree(old)
            except OSError as error:
                cause, failed = error, unwritable(self.final, error)
        # a rank that went on alone would wait for the others forever
        if failed := from_first(failed):
            if rank() == 0:
                shutil.rmtree(self.draft, ignore_errors=True)
            raise OSError(failed) from cause


def _copied(named: Iterable[tuple[str, Tensor]], shards: bool) -> dict[str, Tensor]:
    """The tensors that this rank writes, copied to the host: its share, each whole, or on rank 0
    all.
    """
    copies = {}
    for index, (name, tensor) in enumerate(named):
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if rank() == (index % world() if shards else 0):
            copies[name] = whole.detach().to("cpu", copy=True).contiguous()
    return copies


def _index(folder: Path, parts: list[Path]) -> dict[str, str]:
    """Write which weight is in which file, as transformers reads it; returns its digest."""
    where: dict[str, str] = {}
    for path in parts:
        with safe_open(path, "pt") as file:
            where |= dict.fromkeys(file.keys(), path.name)
    total = sum(path.stat().st_size for path in parts)
    path = folder / f"{WEIGHTS}.safetensors.index.json"
    write_text(path, json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2))
    return {path.name: sha256(path)}


def unwritable(path: Path, error: Exception) -> str:
    """The message of a run that could not write a file, with what to do."""
    # in the text: safetensors and tokenizers have errors of their own, without `errno`
    number = re.search(r"(?:\[Errno|os error) (\d+)", str(error))
    remedy = REMEDIES.get(int(number[1]) if number else 0, "mend that")
    return (
        f"{path} cannot be written ({type(error).__name__}: {error}); {remedy} and give the same "
        "command again"
    )


def _moments(optimizers: Mapping[str, torch.optim.Optimizer]) -> Iterable[tuple[str, Tensor]]:
    for which, optimizer in optimizers.items():
        # sorted: after a resume they come in the order of the files
        for index, entries in sorted(optimizer.state_dict()["state"].items()):
            for name, value in sorted(entries.items()):
                yield f"{which}.{index}.{name}", value


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
    """Restore optimizers and this rank's random state; returns `save`'s state, and `step`.

    A rank that the run did not have when it was saved draws from where it begins.
    """
    states: dict[str, dict[int, dict[str, Tensor]]] = {which: {} for which in optimizers}
    of = {
        which: [p for group in optimizer.param_groups for p in group["params"]]
        for which, optimizer in optimizers.items()
    }
    for path in sorted(folder.glob(f"{MOMENTS}*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                which, index, name = key.split(".", 2)
                entry = _part(file.get_slice(key), of[which][int(index)])
                states[which].setdefault(int(index), {})[name] = entry
    for which, optimizer in optimizers.items():
        optimizer.load_state_dict({**optimizer.state_dict(), "state": states[which]})
    drawn = load_file(folder / "rng.safetensors")
    own = {kind: drawn.get(f"{kind}.{rank()}") for kind in ("cpu", "cuda")}
    if own["cpu"] is not None:
        set_random_state({kind: state for kind, state in own.items() if state is not None})
    return json.loads((folder / "trainer.json").read_text())


def _part(saved: Any, p: Tensor) -> Tensor:
    """A moment as its parameter lies: whole, or this rank's rows of it."""
    if not isinstance(p, DTensor) or not saved.get_shape():
        return saved[...]
    mesh = p.device_mesh
    rows = -(-len(p) // mesh["shard"].size())  # of each rank, but for the last ones
    first = min(mesh.get_local_rank("shard") * rows, len(p))
    local = saved[first : first + rows].to(p.device)
    return DTensor.from_local(local, mesh, p.placements, shape=p.shape, stride=p.stride())


def random_state() -> dict[str, Tensor]:
    """The state that this rank draws from, on the CPU and, where it draws there, on the GPU."""
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {}
    return {"cpu": torch.get_rng_state(), **cuda}


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Set the random state that `random_state` returned."""
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
    except (OSError, ValueError, AttributeError):  # the last of JSON that is no object
        return False
