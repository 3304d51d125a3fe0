"""What the ranks of a collective operation agree on, who holds which rows, and how they get there.

`agree` comes first in every call, on every rank, whatever this rank was called with:

    1. check this rank's arguments; what is wrong with them is kept, not raised
    2. all-gather 24 bytes a rank: a digest of what must be equal, the rows (-1: refused), whether
       gradients are wanted. All ranks now hold one table, and decide by it alone
    3. digests differ or a rank refused: gather what the ranks were called with as objects, and all
       of them raise. Else all go on, with the rows of all ranks

No rank raises before 2 (but what is no call of ours: an argument that Python does not know, a group
without this rank), nor takes a branch after it that another does not, so a mistake of one rank
raises on all, at the first call or a later one, and no collective waits for a rank that is gone.
Nothing is remembered between calls: rows may change with each, and a refused call leaves no trace.

The table is of CPU tensors where the group has a backend for them ("cpu:gloo,cuda:nccl", torch's
default on CUDA): hosts wait for each other, not for their devices. In a group of NCCL alone it is
on the device, and the host waits for the work queued there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

# When each shard is a broadcast of its own. Modelled for H100s, not yet run on a GPU. A shard of S
# bytes, of `rows` candidates in bf16 that as many queries meet, takes S / 450 GB/s to arrive and
# S * rows / 790 TFLOP/s to be multiplied: as long at 1,755 rows. The shorter of the two is hidden.
# What it costs is a collective more: 20 us to start, in which 8 MiB arrive, and a ring through all
# ranks of 2.5 us each, in which 1 MiB does.
_BALANCED_ROWS = 1755
_BYTES_PER_RANK, _LEAST_RANKS = 1 << 20, 8


class Ranks(NamedTuple):
    """The layout of the M rows over the ranks: rank 0's first, then rank 1's, and so on."""

    group: dist.ProcessGroup | None
    rows: list[int]
    own: slice  # this rank's
    weight: float  # of a row: the mean over ranks of their weighted sums is the mean over rows

    def exchange(self, part: Tensor) -> Tensor:
        """The parts of all ranks, which have equal shapes, as [ranks, ...]."""
        return part[None] if len(self.rows) == 1 else _all_gather(part, self.group)[0]

    def shards(self, *parts: Tensor) -> list[list[Tensor]]:
        """Each part's [N, ...] of every rank, where the one collective for all parts left them."""
        if len(self.rows) == 1:
            return [[part] for part in parts]
        most = max(self.rows)  # a gather takes equal shapes alone
        received = self.exchange(_joint(parts, most))
        pairs = zip(received, self.rows, strict=True)
        return _by_part([_disjoint(data, parts, rows, most) for data, rows in pairs])

    def arriving(self, *parts: Tensor) -> tuple[list[list[Tensor]], Iterator[int]]:
        """The shards, maybe not there yet, and the ranks as theirs are, this one first.

        Where the device works on while data come, on the streams of the process group, the iterator
        makes the current stream wait for them: all at once, or one by one where shards are large.
        """
        if len(self.rows) == 1 or not _overlaps(parts[0].device):
            return self.shards(*parts), iter(range(len(self.rows)))
        me, most = dist.get_rank(self.group), max(self.rows)
        if _one_by_one(len(self.rows), most, sum(_sizes(parts, most))):
            padded = self.rows
            sizes = [sum(_sizes(parts, rows)) for rows in padded]
            received = [parts[0].new_empty(n, dtype=torch.uint8) for n in sizes]
            received[me] = _joint(parts, padded[me])
            works = [
                dist.broadcast(message, group=self.group, group_src=rank, async_op=True)
                for rank, message in enumerate(received)
            ]
        else:
            padded = [most] * len(self.rows)
            message = _joint(parts, most)
            gathered, work = _all_gather(message, self.group, async_op=True)
            received, works = list(gathered), [work] * len(padded)
            received[me] = message  # there before the others'

        def arrivals() -> Iterator[int]:
            yield me
            for rank, work in enumerate(works):
                work.wait()
                if rank != me:
                    yield rank

        found = zip(received, self.rows, padded, strict=True)
        return _by_part([_disjoint(x, parts, rows, most) for x, rows, most in found]), arrivals()

    def gather(self, part: Tensor) -> Tensor:
        """Gather the rows of all ranks: [N, ...] on each rank -> [M, ...] on all."""
        return join(self.shards(part)[0])

    def logsumexp(self, part: Tensor) -> Tensor:
        """The logsumexp of all ranks' `part`, elementwise; the same shape."""
        return self.exchange(part).logsumexp(0)

    def reduce_scatter(self, part: Tensor) -> Tensor:
        """Sum over ranks, and keep this rank's own rows: [M, ...] on each rank -> [N, ...]."""
        if len(self.rows) == 1:
            return part
        shards = list(pad_sequence(part.split(self.rows), batch_first=True))  # as in gather
        total = torch.empty_like(shards[0])
        dist.reduce_scatter(total, shards, group=self.group)
        return total[: self.own.stop - self.own.start]


def rank() -> int:
    """This process's number among those of the default process group; 0 without a group."""
    return dist.get_rank() if _grouped() else 0


def world() -> int:
    """The number of processes in the default process group; 1 without a group."""
    return dist.get_world_size() if _grouped() else 1


def gather(value: Any) -> list[Any]:
    """Every process's value, in the order of their numbers."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def from_first(value: Any) -> Any:
    """Process 0's value, in every process."""
    values = [value]
    if world() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def on_first(work: Callable[[], Any]) -> Any:
    """The result of a call on process 0, in every process; what it raises they raise as well, so
    that none waits for it: a ValueError, OSError or ImportError, and a RuntimeError for others.
    """
    outcome: Any = None
    if rank() == 0:
        try:
            outcome = work()
        except (ValueError, OSError, ImportError) as error:
            outcome = error
        except Exception as error:  # maybe of a kind that another process cannot read
            from_first(RuntimeError(f"{type(error).__name__}: {error}"))
            raise
    outcome = from_first(outcome)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def agree(
    op: str,
    group: dist.ProcessGroup | str | None,
    check: Callable[[], tuple[int, dict[str, Any]]],
    with_grad: bool,
) -> tuple[Ranks, dict[str, Any], bool]:
    """Check that all ranks were called alike, and learn their rows.

    Args:
        op: the public function's name, for messages.
        group: the ranks that meet; None: all where torch.distributed is initialised, else this
            process; "local": this process alone. What is no group is None, for `check` to refuse.
        check: raises what is wrong with this rank's arguments, or returns its number of rows and,
            by name, what must be equal on all ranks.
        with_grad: whether this rank needs gradients.

    Returns:
        The ranks; what they agree on; whether any of them needs gradients.

    Raises:
        ValueError: a group without this rank, what `check` raised on another rank, a difference
            between ranks, no rows on any.
        Exception: what `check` raised on this rank.
    """
    alone = group == "local" or not _grouped()
    members: Any = group if is_group(group) else None
    rank, world = (0, 1) if alone else (dist.get_rank(members), dist.get_world_size(members))
    if rank < 0:
        raise ValueError(f"{op}: group does not contain this rank")
    refusal: Exception | None = None
    rows = -1
    agreed: dict[str, Any] = {}
    try:
        rows, agreed = check()
    except Exception as error:
        refusal = error  # the other ranks must not wait for this one
    table = [[_digest(agreed), rows, int(with_grad)]]
    if world > 1:
        own_line = torch.tensor(table[0], device=_host(members))
        table = _all_gather(own_line, members)[0].tolist()
    digests, all_rows, wanted = zip(*table, strict=True)
    if min(all_rows) < 0 or len(set(digests)) > 1:
        agreed = _compare(op, agreed, refusal, members, world)
    if sum(all_rows) == 0:
        raise ValueError(f"{op}: query has 0 rows on every rank, expected at least 1")
    own = slice(sum(all_rows[:rank]), sum(all_rows[: rank + 1]))
    ranks = Ranks(members, list(all_rows), own, world / sum(all_rows))
    return ranks, agreed, any(wanted)


def is_group(group: object) -> bool:
    """Whether `group` is a process group, or what torch gives a rank outside a new one."""
    return dist.is_available() and (
        isinstance(group, dist.ProcessGroup) or group is dist.GroupMember.NON_GROUP_MEMBER
    )


def _compare(
    op: str,
    agreed: dict[str, Any],
    refusal: Exception | None,
    group: dist.ProcessGroup | None,
    world: int,
) -> dict[str, Any]:
    """Raise on all ranks what one refused or in what they differ; else return the metadata, which
    is equal.
    """
    metadata = None if refusal is None else str(refusal), agreed
    all_metadata = [metadata] * world
    if world > 1:
        dist.all_gather_object(all_metadata, metadata, group=group)
    for other, (refused, _) in enumerate(all_metadata):
        if refused is not None:
            raise refusal or ValueError(f"{refused} (on rank {other})")
    first = all_metadata[0][1]
    for other, (_, theirs) in enumerate(all_metadata):
        for name, had in theirs.items():
            if had != first[name]:
                raise ValueError(
                    f"{op}: {name} is {had} on rank {other} and {first[name]} on rank 0"
                )
    return first  # written in two ways, as 1 and 1.0 are


def _digest(agreed: dict[str, Any]) -> int:
    """A digest, int64, equal where all names' values are written alike."""
    written = repr(sorted(agreed.items())).encode()
    return int.from_bytes(blake2b(written, digest_size=8).digest(), "big", signed=True)


def _host(group: dist.ProcessGroup | None) -> torch.device:
    """The device on which a tensor that the host reads is best exchanged: the CPU, or the group's
    own device.
    """
    backends = dist.get_backend_config(group).split(",")
    devices = [backend.partition(":")[0] for backend in backends]
    return torch.device("cpu" if "cpu" in devices else devices[0])


def _overlaps(device: torch.device) -> bool:
    """Whether kernels run while collectives do."""
    return device.type == "cuda"


def _one_by_one(world: int, rows: int, size: int) -> bool:
    """Whether shards of so many rows and bytes each come as a broadcast of their own."""
    hidden = size * min(rows / _BALANCED_ROWS, 1)
    return hidden >= max(world, _LEAST_RANKS) * _BYTES_PER_RANK


def _all_gather(
    part: Tensor, group: dist.ProcessGroup | None, async_op: bool = False
) -> tuple[Tensor, Any]:
    """[ranks, ...] of [...] on each; and the work to wait for, if asynchronous."""
    name = "all_gather_single"  # since torch 2.13, which warns of the older
    gather = getattr(dist, name) if hasattr(dist, name) else dist.all_gather_into_tensor
    out = part.new_empty(dist.get_world_size(group), *part.shape)
    # gloo takes no output with a dimension more
    work = gather(out.flatten(), part.flatten(), group=group, async_op=async_op)
    return out, work


def join(shards: list[Tensor]) -> Tensor:
    """The shards as one tensor; a single one is not copied."""
    return shards[0] if len(shards) == 1 else torch.cat(shards)


def _sizes(parts: Sequence[Tensor], rows: int) -> list[int]:
    """Bytes that so many rows of each part take in a message, in 16s as the kernels like them."""
    return [-(-rows * part.shape[1:].numel() * part.itemsize // 16) * 16 for part in parts]


def _joint(parts: Sequence[Tensor], rows: int) -> Tensor:
    """One message, uint8, of all parts, padded to so many rows of each."""
    sizes = _sizes(parts, rows)
    message = torch.zeros(sum(sizes), dtype=torch.uint8, device=parts[0].device)
    for part, section in zip(parts, message.split(sizes), strict=True):
        section[: part.nbytes] = part.contiguous().flatten().view(torch.uint8)
    return message


def _disjoint(message: Tensor, parts: Sequence[Tensor], rows: int, padded: int) -> list[Tensor]:
    """The parts, like `parts` but of `rows` rows, that lie in a message."""
    found = []
    for part, section in zip(parts, message.split(_sizes(parts, padded)), strict=True):
        data = section[: rows * part.shape[1:].numel() * part.itemsize]
        found.append(data.view(part.dtype).view(rows, *part.shape[1:]))
    return found


def _by_part(shards: list[list[Tensor]]) -> list[list[Tensor]]:
    """A list per rank becomes one per part."""
    return [list(part) for part in zip(*shards, strict=True)]
