"""What ranks agree on before a collective operation, and how rows go from rank to rank."""

from __future__ import annotations

import ast
import pickle
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import gloo, spawn
from torch.utils._python_dispatch import TorchDispatchMode

from btok_kernels import ranks as module
from btok_kernels.ranks import Ranks, agree

PACKAGE = Path(module.__file__).parent


class Collectives(TorchDispatchMode):
    """Notes the collectives that run, by name, those within `all_gather_object` too."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.ran.append(func.name().removeprefix("c10d::").strip("_"))
        return func(*args, **(kwargs or {}))


def test_imports_between_modules_are_of_public_names():
    """And none goes from the ranks to an op."""
    files = sorted(PACKAGE.glob("*.py"))
    assert PACKAGE / "ranks.py" in files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert file.name != "ranks.py"
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                assert not private, f"{file.name} imports {private} of {node.module}"


@pytest.mark.parametrize("rows", [4, 7])
def test_a_message_holds_its_parts(rows):
    """Whatever their strides, dtypes and sizes; each begins on a line of 16 bytes."""
    parts = [
        torch.randn(5, rows).half().T,
        torch.arange(2 * rows)[::2],
        torch.randn(rows, 3, 1).double(),
        torch.randn(rows, 0),
    ]
    for padded in (rows, rows + 3):
        message = module._joint(parts, padded)
        found = module._disjoint(message, parts, rows, padded)
        assert all(torch.equal(a, b) for a, b in zip(found, parts, strict=True))
        assert all((part.data_ptr() - message.data_ptr()) % 16 == 0 for part in found[:3])


def test_large_shards_come_one_by_one():
    """At 1,536 bf16 numbers a row: where a shard hides more than one more collective takes."""
    width = 1536 * 2
    for world, rows, expected in (
        (2, 2500, False),
        (8, 2500, False),
        (8, 2900, True),
        (2, 2900, True),
        (16, 2900, False),  # a broadcast's ring is longer
        (16, 6000, True),
        (64, 6000, False),
        (64, 22000, True),
    ):
        assert module._one_by_one(world, rows, rows * width) == expected, (world, rows)
    # many negatives each: products are shorter than the transfer, and hide that much of it
    assert not module._one_by_one(8, 100, 100 * 16 * width * 10)
    assert module._one_by_one(8, 1000, 1000 * 16 * width)
    assert not module._one_by_one(8, 0, 0)


@pytest.mark.parametrize(
    ("backends", "device"),
    [
        ("cpu:gloo,cuda:nccl", "cpu"),
        ("cuda:nccl,cpu:gloo", "cpu"),
        ("cuda:nccl", "cuda"),
        ("cpu:gloo", "cpu"),
    ],
)
def test_hosts_meet_without_the_device_where_they_can(backends, device, monkeypatch):
    monkeypatch.setattr(dist, "get_backend_config", lambda group: backends)
    assert module._host(None) == torch.device(device)


@pytest.mark.parametrize(
    ("error", "kind"), [(ImportError("a"), ImportError), (KeyError("a"), RuntimeError)]
)
def test_whatever_the_first_process_raises_all_raise(error, kind, monkeypatch):
    """There itself, elsewhere as an object that can be sent."""

    def fails():
        raise error

    sent = []
    monkeypatch.setattr(module, "from_first", lambda found: sent.append(found) or found)
    with pytest.raises(type(error)) as raised:
        module.on_first(fails)
    assert raised.value is error and len(sent) == 1
    monkeypatch.setattr(module, "from_first", lambda found: pickle.loads(pickle.dumps(sent[0])))
    monkeypatch.setattr(module, "rank", lambda: 1)
    with pytest.raises(kind, match="a"):
        module.on_first(pytest.fail)


def test_alone_there_is_nothing_to_agree_on():
    for group in (None, "local"):
        ranks, agreed, with_grad = agree("op", group, lambda: (5, {"D": 3}), False)
        assert (ranks.rows, ranks.own, ranks.weight) == ([5], slice(0, 5), 1 / 5)
        assert (agreed, with_grad) == ({"D": 3}, False)
    with pytest.raises(ZeroDivisionError):
        agree("op", None, lambda: (1 // 0, {}), False)
    with pytest.raises(ValueError, match=r"^op: query has 0 rows on every rank"):
        agree("op", None, lambda: (0, {}), False)


# Ranks: all cases of one world size run in one spawn; the tests below look at what it saved.

SPLITS = {2: [[4, 4], [5, 2], [0, 6]], 4: [[2, 2, 2, 2], [3, 0, 5, 1]]}
ROUTES = {"waited for": (False, False), "one gather": (True, False), "broadcasts": (True, True)}


def whole(rows):
    """Parts of all ranks: keys, numbers and ids."""
    g = torch.Generator().manual_seed(sum(rows))
    keys = torch.randn(sum(rows), 3, generator=g).half()
    return keys, torch.randn(sum(rows), generator=g), torch.arange(sum(rows))


def lie(rows, rank, group=None):
    own = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
    return Ranks(group, rows, own, len(rows) / sum(rows))


def run_rank(rank, world, folder):
    torch.set_num_threads(1)
    with gloo(folder, rank, world), pytest.MonkeyPatch.context() as patch:
        saved = {}
        for route, (overlaps, one_by_one) in ROUTES.items():
            patch.setattr(module, "_overlaps", lambda _, overlaps=overlaps: overlaps)
            patch.setattr(module, "_one_by_one", lambda *_, one=one_by_one: one)
            for rows in SPLITS[world]:
                saved[f"{route}, {rows}"] = send(lie(rows, rank), rows)
        pairs = [dist.new_group([first, first + 1]) for first in range(0, world, 2)]
        ranks = lie([4, 2], rank % 2, pairs[rank // 2])
        saved["pair"] = send(ranks, [4, 2])
        ranks = lie(SPLITS[world][-1], rank)
        saved["sums"] = ranks.logsumexp(torch.arange(3.0) * rank)
        saved["own rows"] = ranks.reduce_scatter((rank + 1) * whole(ranks.rows)[1])
        saved["agreed"] = [meet(rank, world, name) for name in MEETINGS]
        torch.save(saved, f"{folder}/{rank}.pt")


def send(ranks, rows):
    """What arrived, in which order, and by which collectives."""
    with Collectives() as collectives:
        shards, arrivals = ranks.arriving(*(part[ranks.own] for part in whole(rows)))
        order = list(arrivals)
    return [[x.clone() for x in of_part] for of_part in shards], order, collectives.ran


def never():
    raise ZeroDivisionError("division by zero")


MEETINGS = {  # what each rank's check does, by whether the rank is the last
    "good": (lambda: (2, {"D": 3, "scale": 1}), lambda: (2, {"D": 3, "scale": 1})),
    "other rows": (lambda: (3, {"D": 3, "scale": 1}), lambda: (0, {"D": 3, "scale": 1})),
    "written differently": (lambda: (2, {"scale": 1}), lambda: (2, {"scale": 1.0})),
    "a difference": (lambda: (2, {"D": 3, "scale": 1}), lambda: (2, {"D": 4, "scale": 1})),
    "good again": (lambda: (2, {"D": 3, "scale": 1}), lambda: (2, {"D": 3, "scale": 1})),
    "an error of any type": (lambda: (2, {"D": 3, "scale": 1}), never),
    "all err": (never, never),
    "good at last": (lambda: (2, {"D": 3, "scale": 1}), lambda: (2, {"D": 3, "scale": 1})),
}


def meet(rank, world, name):
    """The rows, whether there are gradients, or what was raised; and the collectives it took."""
    last = rank == world - 1
    with Collectives() as collectives:
        try:
            ranks, _, with_grad = agree("op", None, MEETINGS[name][last], with_grad=last)
            said = ranks.rows, with_grad
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
    return said, collectives.ran


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.full)])
def saved(request):
    """What each rank of a world saved."""
    world = request.param
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        spawn(run_rank, (world, folder), nprocs=world)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world)]


def equal_shards(shards, rows):
    for of_part, part in zip(shards, whole(rows), strict=True):
        for got, want in zip(of_part, part.split(rows), strict=True):
            assert got.dtype == want.dtype and torch.equal(got, want)


@pytest.mark.parametrize("route", ROUTES)
def test_shards_arrive(saved, route):
    """By each route the same bits; on a GPU this rank's own first, as they are there."""
    world = len(saved)
    for rows in SPLITS[world]:
        for rank, of_rank in enumerate(saved):
            shards, order, ran = of_rank[f"{route}, {rows}"]
            equal_shards(shards, rows)
            own_first = [rank, *(other for other in range(world) if other != rank)]
            assert order == (list(range(world)) if route == "waited for" else own_first)
            assert ran == (["broadcast"] * world if route == "broadcasts" else ["allgather_base"])


def test_shards_arrive_in_a_group_of_some_ranks(saved):
    for of_rank in saved:
        shards, order, ran = of_rank["pair"]
        equal_shards(shards, [4, 2])
        assert sorted(order) == [0, 1] and ran == ["broadcast"] * 2


def test_sums_over_ranks(saved):
    world = len(saved)
    rows = SPLITS[world][-1]
    parts = torch.stack([torch.arange(3.0) * rank for rank in range(world)])
    own = (sum(range(1, world + 1)) * whole(rows)[1]).split(rows)
    for rank, of_rank in enumerate(saved):
        assert torch.equal(of_rank["sums"], parts.logsumexp(0))
        assert torch.allclose(of_rank["own rows"], own[rank])


def test_ranks_agree_by_one_small_collective_and_talk_only_of_mistakes(saved):
    world = len(saved)
    for rank, of_rank in enumerate(saved):
        said = dict(zip(MEETINGS, of_rank["agreed"], strict=True))
        own = rank == world - 1
        error = "ZeroDivisionError: division by zero"
        for name, expected in {
            "good": ([2] * world, True),  # the last rank alone wants gradients
            "other rows": ([3] * (world - 1) + [0], True),
            "written differently": ([2] * world, True),
            "a difference": f"ValueError: op: D is 4 on rank {world - 1} and 3 on rank 0",
            "good again": ([2] * world, True),
            "an error of any type": (
                error if own else f"ValueError: division by zero (on rank {world - 1})"
            ),
            "all err": error,
            "good at last": ([2] * world, True),
        }.items():
            assert said[name][0] == expected, name
            talked = "good" not in name and name != "other rows"
            # objects are gathered in two: their sizes, then they
            assert said[name][1] == ["allgather_base"] + ["allgather"] * 2 * talked, name
