"""All that knows of other processes: how they meet, what they exchange, who speaks for them."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from btok.model import BTokModel
from btok_kernels.ranks import world
from train.recipes import Recipe

BUCKET = 25 << 20  # bytes of gradients that are averaged together


def connect() -> dist.PrefixStore:
    """What all processes of this start can read and write; its `underlying_store` outlives a
    restart by torchrun. A process on its own, which nothing starts again, gets one of its own.
    """
    store: dist.Store = dist.HashStore()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 or dist.is_torchelastic_launched():
        store, _, _ = next(dist.rendezvous("env://"))
    # torchrun --max-restarts: addresses of processes that are gone stay in the store
    generation = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"generation-{generation}", store)


def join(store: dist.Store) -> None:
    """Form the process group with the other processes, if there are any."""
    if (count := int(os.environ.get("WORLD_SIZE", 1))) == 1:
        return
    # transformers loads it with a model; loaded after the group, its defaults keep the group and
    # its threads alive past destroy_process_group, and a thread that frees a tensor while Python
    # ends aborts the process (pytorch issue 190489)
    import torch.distributed.nn.functional

    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    number = int(os.environ["RANK"])
    dist.init_process_group(backend, store=store, rank=number, world_size=count)


def leave() -> None:
    """End the process group, if there is one."""
    if world() > 1:
        dist.barrier()  # a rank that leaves early may take the others down
        dist.destroy_process_group()


def gather(value: Any) -> list[Any]:
    """Every rank's value, in the order of the ranks."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def from_first(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    values = [value]
    if world() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def total_over_ranks(number: float) -> float:
    """The sum of every rank's number."""
    return float(mean_over_ranks(torch.tensor(number, dtype=torch.float64))) * world()


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of every rank's tensor, of one shape; may change `value`."""
    if world() > 1:
        dist.all_reduce(value)
    return value / world()


def most_of_ranks(number: int) -> int:
    """The largest of every rank's number."""
    found = torch.tensor(number)
    if world() > 1:
        dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


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
    vision tower one, embedding, final norm and head another. What does not train stays whole.

    With `recipe.replicas` N, over the ranks of each N-th part; the parts average their gradients.
    Weights, gradients and moments are as they were, float32; of a recipe in bfloat16 the copies
    that multiply are that.
    """
    shape, names = (world(),), ("shard",)
    if recipe.replicas > 1:
        shape, names = (recipe.replicas, world() // recipe.replicas), ("replicate", "shard")
    kind = model.backbone.device.type
    half = torch.bfloat16 if recipe.dtype == "bfloat16" else None
    options: dict[str, Any] = {
        "mesh": init_device_mesh(kind, shape, mesh_dim_names=names),
        "mp_policy": MixedPrecisionPolicy(half, torch.float32, cast_forward_inputs=False),
    }
    tower = model.family.tower(model.backbone)
    if tower is not None and any(p.requires_grad for p in tower.parameters()):
        # images and videos are a call each; a rank that has one of them alone must still agree
        fully_shard(tower, reshard_after_forward=False, **options)
    for layer in model.family.decoder(model.backbone).layers:
        fully_shard(layer, **options)
    still = {p for p in model.parameters() if not p.requires_grad}
    fully_shard(model, reshard_after_forward=False, ignored_params=still, **options)
