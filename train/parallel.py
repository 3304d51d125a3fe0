"""All that knows of other processes: how they meet, what they exchange, who speaks for them."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from btok.files import one_line, printable
from btok.model import BTokModel, BTokOutput, shared_weights
from btok_kernels.ranks import from_first, rank, world
from train.recipes import Recipe

BUCKET = 25 << 20  # bytes of gradients that are averaged together


MISTAKES = (ValueError, OSError, ImportError, FloatingPointError, torch.OutOfMemoryError)
FITS = "out of memory; try a lower --chunk-tokens, --gradcache true, --checkpoint-activations true"


class Processes:
    """All processes of a run: they meet in `join` and end together, where a mistake is told once.

    A mistake in the command or the data, a loss that is not finite or a lack of memory is told in a
    line, by whichever has it; BTOK_DEBUG=1 shows where it was noticed. The others end with the one
    that fails or is stopped; `torchrun` itself then returns 1 for any that did not give 0. What it
    starts again after such an error ends at once; an OSError or lack of memory may pass.

    Attributes:
        code: what a process returns: 0, 2 for a mistake, 1 for a loss that is not finite.
    """

    def __init__(self) -> None:
        self.code = 0
        store: dist.Store = dist.HashStore()  # of a process that nothing starts again
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 or dist.is_torchelastic_launched():
            store, _, _ = next(dist.rendezvous("env://"))
        # torchrun --max-restarts: addresses of processes that are gone stay in the store
        generation = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = dist.PrefixStore(f"generation-{generation}", store)

    def join(self) -> None:
        """Form the process group with the other processes, if there are any."""
        outliving = self.store.underlying_store
        if outliving.check(["mistake"]):  # before a restart
            self.code, what = json.loads(outliving.get("mistake"))
            raise ValueError(f"not tried again: {what}")
        if (count := int(os.environ.get("WORLD_SIZE", 1))) == 1:
            return
        # transformers loads it with a model; loaded after the group, its defaults keep the group
        # and its threads alive past destroy_process_group, and a thread that frees a tensor while
        # Python ends aborts the process (pytorch issue 190489)
        import torch.distributed.nn.functional

        backend, number = "gloo", int(os.environ["RANK"])
        if torch.cuda.is_available():
            local = int(os.environ.get("LOCAL_RANK", number))
            if local >= torch.cuda.device_count():
                raise ValueError(
                    f"LOCAL_RANK is {local}, this machine has {torch.cuda.device_count()} GPUs; "
                    "start one process per GPU"
                )
            torch.cuda.set_device(local)
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=self.store, rank=number, world_size=count)

    def leave(self) -> None:
        """End the process group, if there is one."""
        if world() > 1:
            dist.barrier()  # a rank that leaves early may take the others down
            dist.destroy_process_group()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if error is None:
            return False
        if isinstance(error, MISTAKES):
            code = self.code or (1 if isinstance(error, FloatingPointError) else 2)
            what = printable(one_line(error))
            if isinstance(error, torch.OutOfMemoryError):
                what = f"{FITS}: {what}"
            if not self.code and not isinstance(error, (OSError, torch.OutOfMemoryError)):
                self.store.underlying_store.set("mistake", json.dumps([code, what]))
            if os.environ.get("BTOK_DEBUG") and not self.code:
                return False
            self.code = code
            if self.store.add("failed", 1) == 1:
                line = "\n" * (rank() > 0)  # behind the progress bar of rank 0
                print(f"{line}error: {what}", file=sys.stderr)
        elif isinstance(error, SystemExit):  # a signal, where nothing would be lost
            self.store.add("stopped", 1)
            return False
        elif isinstance(error, RuntimeError):  # also of a collective that another process has left
            if not (self.store.add("stopped", 0) and not self.store.add("failed", 0)):
                self.code = 1
                return self.store.add("failed", 1) > 1
        else:
            return False
        return True


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


def first_alone(make: Callable[[], Any]) -> Any:
    """`make()`, on rank 0 before the others: what it leaves on the disk is there for them."""
    for turn in (True, False):
        if (rank() == 0) == turn:
            made = make()
        if world() > 1:
            dist.barrier()
    return made


def same_folder(folder: Path) -> None:
    """A ValueError where a process does not see the folder that rank 0 has made."""
    from_first(None)  # it is made
    if not folder.is_dir():
        raise ValueError(
            f"output is {folder}, which process {rank()} does not see; give a folder that all "
            "machines share"
        )


def total_over_ranks(number: int) -> int:
    """The sum of every rank's number."""
    return int(_reduced(torch.tensor(int(number))))


def most_of_ranks(number: int) -> int:
    """The largest of every rank's number."""
    return int(_reduced(torch.tensor(number), dist.ReduceOp.MAX))


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of every rank's tensor, of one shape; may change `value`."""
    return _reduced(value) / world()


def _reduced(value: Tensor, operation: Any = dist.ReduceOp.SUM) -> Tensor:
    if world() > 1:
        dist.all_reduce(value, operation)
    return value


class Backward:
    """The backwards of a step; after `finish` every gradient is its mean over ranks.

    Weights that lie on all ranks (`shard`) have that from FSDP. Others are averaged in buckets
    while the step's last backward goes on, whatever the numbers of backwards on the ranks; a
    missing gradient counts as zero.
    """

    def __init__(self, model: nn.Module) -> None:
        self.buckets: list[list[nn.Parameter]] = []
        self.at: dict[nn.Parameter, int] = {}
        self.sent: list[tuple[Tensor, dist.Work]] = []
        if world() == 1 or isinstance(model, FSDPModule):
            return
        size = BUCKET
        # gradients come in about this order; all ranks must send them in one
        for p in reversed([p for p in model.parameters() if p.requires_grad]):
            if size >= BUCKET or p.dtype != self.buckets[-1][-1].dtype:
                self.buckets.append([])
                size = 0
            self.at[p] = len(self.buckets) - 1
            self.buckets[-1].append(p)
            size += p.nbytes

    def __call__(self, loss: Tensor, is_last: bool) -> None:
        """`loss.backward()`."""
        if not (self.buckets and is_last):
            return loss.backward()
        left = [len(bucket) for bucket in self.buckets]

        def ready(p: nn.Parameter) -> None:
            left[self.at[p]] -= 1
            while len(self.sent) < len(left) and not left[len(self.sent)]:
                self._send()

        hooks = [p.register_post_accumulate_grad_hook(ready) for p in self.at]
        try:
            loss.backward()
        finally:
            for hook in hooks:
                hook.remove()

    def _send(self) -> None:
        parameters = self.buckets[len(self.sent)]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        self.sent.append((flat, dist.all_reduce(flat, async_op=True)))

    def finish(self) -> None:
        """Average what is left, and wait for all."""
        while len(self.sent) < len(self.buckets):
            self._send()
        for parameters, (flat, work) in zip(self.buckets, self.sent, strict=True):
            work.wait()
            means = (flat / world()).split([p.numel() for p in parameters])
            for p, mean in zip(parameters, means, strict=True):
                p.grad = mean.view_as(p)


def shard(model: BTokModel, recipe: Recipe) -> None:
    """Lay every weight that trains over all ranks (FSDP2), in place: each decoder layer a unit, the
    vision tower one, embedding, final norm and head another.

    With `recipe.replicas` N, over the ranks of each N-th part; the parts average their gradients.
    Weights, gradients and moments stay float32; of a recipe in bfloat16 the copies that multiply
    are that. The values are those of rank 0; a model of the others may be on the device meta.
    """
    state = model.state_dict() if rank() == 0 else {}
    buffers = dict(model.named_buffers())
    tied = shared_weights(model)
    model.to("meta")
    _tie(model, tied)  # a move makes a shared weight two
    shape: tuple[int, ...] = (world(),)
    names: tuple[str, ...] = ("shard",)
    if recipe.replicas > 1:
        shape, names = (recipe.replicas, world() // recipe.replicas), ("replicate", "shard")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    half = torch.bfloat16 if recipe.dtype == "bfloat16" else None
    options: dict[str, Any] = {
        "mesh": init_device_mesh(device, shape, mesh_dim_names=names),
        "mp_policy": MixedPrecisionPolicy(half, torch.float32, cast_forward_inputs=False),
    }
    units = list(model.family.decoder(model.backbone).layers)
    for layer in units:
        fully_shard(layer, **options)
    tower = model.family.tower(model.backbone)
    if tower is not None and any(p.requires_grad for p in tower.parameters()):
        # images and videos are a call each; a rank that has one of them alone must still agree
        fully_shard(tower, reshard_after_forward=False, **options)
        units.append(tower)
    inside = {p for unit in units for p in unit.parameters()}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    outside = [name for name, p in trained if p not in inside]
    # before FSDP's own, which ends the pass
    model.register_forward_hook(partial(_take_part, outside))
    still = {p for p in model.parameters() if not p.requires_grad}
    fully_shard(model, reshard_after_forward=False, ignored_params=still, **options)
    model.to_empty(device=device)
    _tie(model, tied)
    whole = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, state, options=whole)
    for name, buffer in model.named_buffers():  # some are in no state_dict
        if rank() == 0:
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, 0)


def _take_part(
    names: Sequence[str], model: nn.Module, arguments: Any, output: BTokOutput
) -> BTokOutput:
    """Have these weights, those outside the units, in the graph, times zero: a rank that has no use
    for one in a pass, as of a head without targets, must still add to its gradient when the others
    do.
    """
    if not torch.is_grad_enabled():
        return output
    nothing = 0 * sum(model.get_parameter(name)[:1].sum() for name in names)
    rows = None if output.rows is None else output.rows + nothing
    return output._replace(embeddings=output.embeddings + nothing, rows=rows)


def _tie(model: nn.Module, tied: list[list[str]]) -> None:
    for first, *others in tied:
        for name in others:
            module, _, own = name.rpartition(".")
            setattr(model.get_submodule(module), own, model.get_parameter(first))
