"""All that knows of other processes: how they meet, what they exchange, who speaks for them."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from btok_kernels.ranks import world


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


def average_gradients(model: nn.Module) -> None:
    """Make every gradient its mean over ranks, a missing one counting as zero."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = mean_over_ranks(torch.cat([gradient.flatten() for gradient in gradients]))
    for p, mean in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = mean.view_as(p)
