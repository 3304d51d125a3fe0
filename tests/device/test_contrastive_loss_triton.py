"""impl="triton" of the contrastive loss: both of its ways, under the interpreter or on a GPU."""

from __future__ import annotations

import math
import random
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import gloo, spawn
from test_contrastive_loss import (
    NAMES,
    OPTIONS,
    differentiate,
    gap,
    in_double,
    local,
    make,
    own_rows,
    through_towers,
    truth,
)
from torch.utils._python_dispatch import TorchDispatchMode

from btok_kernels import contrastive_loss as module
from btok_kernels import launch
from btok_kernels import ranks as ranks_module
from btok_kernels.contrastive_loss import (
    Call,
    _reference,
    contrastive_loss,
    contrastive_loss_and_grad,
)
from btok_kernels.ranks import Ranks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(
        not launch.interpreted() and DEVICE == "cpu",
        reason="needs TRITON_INTERPRET=1 or a CUDA device",
    ),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # numpy's, of log(0)
]
OPTIONS = OPTIONS | {"one negative": {"h": 1}, "three, both ways": {"h": 3, "bidirectional": True}}
WAYS = {"recompute": 0, "rows": 1000, "rows by 5": 5}  # rows of a chunk
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
# gradients, relative to fp64 on the same inputs: half d logits are rounded before their products
GRADIENT_BOUNDS = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
LOSS_BOUND = 1e-6


def take(patch, way):
    """One of the ways, with several panels in a test where it recomputes."""
    patch.setattr(launch, "contrastive_chunk", lambda *_: WAYS[way])
    patch.setattr(launch, "CONTRASTIVE_PANEL", 32 if DEVICE == "cpu" else 256)


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    take(monkeypatch, request.param)


def triton(**arguments):
    on_device = {
        name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()
    }
    return contrastive_loss(**on_device, impl="triton").cpu()


class Guarded(TorchDispatchMode):
    """New tensors are NaN, or zero as asked, between canaries; knows the largest of them."""

    PAD, CANARY = 64, 12345.0

    def __init__(self):
        super().__init__()
        self.buffers, self.largest, self.ran = [], 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.ran.append(func.name())
        if isinstance(out, torch.Tensor) and out.is_floating_point():
            self.largest = max(self.largest, out.numel())
        name = func.name().split(".")[0]
        new = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::zeros")
        if name not in (*new, "aten::new_zeros") or not out.is_floating_point():
            return out
        size = out.numel() + 2 * self.PAD
        buffer = torch.full((size,), self.CANARY, dtype=out.dtype, device=out.device)
        inner = buffer[self.PAD : size - self.PAD]
        inner.fill_(0 if name.endswith("zeros") else math.nan)
        self.buffers.append(buffer)
        return inner.view(out.shape)

    def check(self):
        canary = torch.tensor(self.CANARY)
        for buffer in self.buffers:
            for edge in (buffer[: self.PAD], buffer[-self.PAD :]):
                assert (edge.cpu() == canary.to(edge.dtype)).all(), "wrote beyond its output"


@contextmanager
def guarded():
    with Guarded() as mode:
        yield mode
    mode.check()


def check(arguments, loss_bound=LOSS_BOUND, dense=False):
    """Loss and gradients against fp64, with guarded allocations.

    Where gradients may cancel, `dense` allows twice the error of the reference in that dtype, too.
    """
    want, want_grads = truth(arguments)
    with guarded():
        loss, grads = differentiate(triton, arguments)
    shapes = {
        name: tuple(x.shape) if isinstance(x, torch.Tensor) and x.ndim else x
        for name, x in arguments.items()
    }
    assert abs(loss - want) <= loss_bound * max(1, want), shapes
    assert [g.dtype for g in grads[:2]] == [arguments["query"].dtype] * 2
    bound = GRADIENT_BOUNDS[arguments["query"].dtype]
    if dense:
        bound += 2 * gap(
            differentiate(lambda **a: _reference(**a).mean(), arguments)[1], want_grads
        )
    if want > 0.1:  # nearer to 0 relative errors of gradients mean nothing
        assert gap([g.cpu() for g in grads], want_grads) <= bound, shapes
    else:
        assert all(torch.isfinite(g).all() for g in grads), shapes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options, dtype, way):
    check(make(19, dim=20, dtype=dtype, tau=0.07, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hard_data(dtype, way):
    """At the temperature of training, with rows that are no multiple of a tile."""
    for options in ({}, {"h": 1, "ids": True, "bidirectional": True}):
        arguments = make(37, dim=40, tau=0.02, **options)
        nearer = arguments["query"] + 0.3 * arguments["key"]
        arguments["query"] = torch.nn.functional.normalize(nearer, dim=-1)
        for name in ("query", "key", "negatives"):
            if name in arguments:
                arguments[name] = arguments[name].to(dtype)
        arguments["temperature"] = arguments["temperature"].float()
        assert 0.5 < truth(arguments)[0] < 8
        check(arguments)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_low_temperature(bidirectional, way):
    arguments = make(12, dtype=torch.float32, tau=0.005, dim=3, h=1, bidirectional=bidirectional)
    arguments["key"] = -arguments["key"]  # the positive is the lowest logit
    assert truth(arguments)[0] > 100
    check(arguments)


@pytest.mark.parametrize("sign", [1, 0, -1], ids=["identical", "zero", "opposite"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_constant_embeddings_give_log_m(dtype, sign, way):
    one = torch.nn.functional.normalize(torch.ones(10, 8), dim=-1).to(dtype)
    for tau in (0.005, 0.02):
        for bidirectional in (False, True):
            arguments = {"query": one, "key": sign * one, "temperature": torch.tensor(tau)}
            loss, grads = differentiate(triton, arguments | {"bidirectional": bidirectional})
            assert abs(loss - math.log(10)) < 1e-5
            assert all(torch.isfinite(g).all() for g in grads)
        negatives = sign * one[:, None].expand(10, 2, 8)
        assert abs(triton(**arguments, negatives=negatives) - math.log(30)) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_one_dimension(name, dtype, way):
    """Of lengths apart: between unit vectors, all +1 or -1, most gradients cancel."""
    arguments = make(21, dim=1, dtype=dtype, tau=0.5, **OPTIONS[name])
    arguments["query"] = (arguments["query"] * torch.linspace(0.2, 2, 21)[:, None]).to(dtype)
    arguments["key"] = (arguments["key"] * torch.linspace(1.5, 0.3, 21)[:, None]).to(dtype)
    check(arguments)


def test_a_margin_keeps_ties(way):
    rows = torch.zeros(6, 4)
    rows[:, 0] = 1  # every product is 1 exactly
    for bidirectional in (False, True):
        options = {"temperature": 0.5, "bidirectional": bidirectional, "margin": 0.0}
        assert abs(triton(query=rows, key=rows, **options) - math.log(6)) < 1e-6


def test_small_half_gradients_do_not_underflow(way):
    """With many candidates alike, d logits are below the normal fp16 numbers."""
    arguments = make(40, dtype=torch.float16, tau=0.06)
    arguments["query"] = arguments["key"]
    _, want = truth(arguments)
    _, got = differentiate(lambda **a: 2.0**10 * triton(**a), arguments)
    assert gap([g.double() / 2.0**10 for g in got], want) < 1e-3


def test_views_as_inputs(way):
    arguments = make(19, h=2, dtype=torch.float32, ids=True, bidirectional=True)
    arguments["key"] = arguments["key"].repeat_interleave(2, 0)[::2]
    arguments["negatives"] = arguments["negatives"].transpose(0, 1).contiguous().transpose(0, 1)
    for name in ("query_ids", "key_ids"):
        arguments[name] = arguments[name].repeat_interleave(2)[::2]
    want, want_grads = truth(arguments)
    for query in (arguments["query"].T.contiguous().T, arguments["query"].tile(1, 3)[:, 8:16]):
        call = {**arguments, "query": query}
        call = {k: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for k, x in call.items()}
        loss, *grads = contrastive_loss_and_grad(**call, impl="triton")  # not of clones
        assert abs(loss.cpu() - want) <= LOSS_BOUND * max(1, want)
        assert gap([g.cpu() for g in grads], want_grads) <= 5e-6


@pytest.mark.skipif(DEVICE == "cuda", reason="of offsets, which the interpreter computes alike")
def test_offsets_beyond_32_bits(way):
    """Rows 2^30 elements apart; the memory between them is never touched."""
    arguments = make(4, dtype=torch.float16, bidirectional=True)
    for name in ("query", "key"):
        spread = torch.empty(3 * 2**30 + 8, dtype=torch.float16).as_strided((4, 8), (2**30, 1))
        arguments[name] = spread.copy_(arguments[name])
    want, want_grads = truth(arguments)
    loss, *grads = contrastive_loss_and_grad(**arguments, impl="triton")
    assert abs(loss - want) < LOSS_BOUND * max(1, want)
    assert gap([grads[0], grads[1], grads[3]], want_grads) < 1e-3


class Split(Ranks):
    """One process whose keys lie in shards, as if they came from ranks of `sizes` rows.

    They are NaN until they arrive. After each arrival `seen` notes it among what ran.
    """

    sizes = (5, 0, 17, 1, 14)
    order = (2, 0, 4, 1, 3)
    seen = None

    def arriving(self, *parts):
        rng = random.Random(0)
        sent = [part.split(self.sizes) for part in parts]
        shards = [[self.elsewhere(x, rng) for x in of_part] for of_part in sent]

        def arrivals():
            for rank in self.order:
                for x, shard in zip(sent, shards, strict=True):
                    shard[rank].copy_(x[rank])
                Split.seen.append("arrived")
                yield rank

        return shards, arrivals()

    @staticmethod
    def elsewhere(x, rng):
        """Room for it in its own memory, rows apart and at an odd offset where it is a matrix."""
        if x.ndim != 2:
            return torch.full_like(x, math.nan if x.is_floating_point() else -1)
        rows, dim = x.shape
        room = torch.full(
            (rows, dim + rng.randrange(1, 9)), math.nan, dtype=x.dtype, device=x.device
        )
        return room[:, room.shape[1] - dim :]


@pytest.mark.parametrize("name", ["plain", "negatives", "ids", "everything"])
def test_shards_are_read_where_they_lie_as_they_arrive(name, way):
    from btok_kernels.contrastive_loss_triton import fused

    arguments = make(37, dim=20, dtype=torch.float32, **OPTIONS[name])
    want, want_grads = truth(arguments)
    call = Call(**{k: x.to(DEVICE) if torch.is_tensor(x) else x for k, x in arguments.items()})
    with torch.no_grad(), guarded() as mode:
        Split.seen = mode.ran
        loss, *grads = fused(call, Split(None, [37], slice(0, 37), 1 / 37), True)
    grads = [
        g.cpu().reshape(arguments[k].shape)
        for k, g in zip(NAMES, grads, strict=True)
        if k in arguments
    ]
    assert abs(loss - want) < LOSS_BOUND * max(1, want)
    assert gap(grads, want_grads) < 5e-6
    # work is under way for one shard when the next comes
    marks = [i for i, ran in enumerate(mode.ran) if ran == "arrived"]
    assert len(marks) == len(Split.sizes)
    for rank, begin, end in zip(Split.order, marks, marks[1:], strict=False):
        worked = {"aten::addmm.out", "aten::logaddexp"} & set(mode.ran[begin:end])
        assert worked or not Split.sizes[rank], rank


def test_memory_does_not_grow_with_the_logits(monkeypatch):
    """Recomputing, no tensor is larger than a gradient or than a few numbers a row and column."""
    take(monkeypatch, "recompute")
    n = 112 if DEVICE == "cpu" else 4000
    arguments = make(n, dim=8, dtype=torch.float32, ids=True, margin=0.1, bidirectional=True)
    with guarded() as mode:
        differentiate(triton, arguments)
    assert mode.largest <= max(8 * n, launch.CONTRASTIVE_PANEL**2) < n * n / 5


def test_a_search_of_configurations_leaves_no_trace(way, monkeypatch):
    """Its trials run on the call's own tensors, before the launch that counts."""
    architecture, config = launch.architecture(torch.device(DEVICE)), launch.contrastive_config
    tried = []

    def search(title, default, candidates, run):
        tried.append(title)
        for _ in range(2):
            run(default)
        return default

    monkeypatch.setattr(launch, "architecture", lambda device: architecture or 90)
    monkeypatch.setattr(launch, "contrastive_config", lambda *at: config(*at[:2], architecture))
    monkeypatch.setattr(launch, "search", search)
    monkeypatch.setattr(launch, "found", {})
    monkeypatch.setenv("BTOK_AUTOTUNE", "1")
    check(make(37, dim=20, dtype=torch.float32, **OPTIONS["everything"]))
    assert len(tried) == (4 if launch.contrastive_chunk(37, 37, torch.float32) == 0 else 2)


def test_the_same_bits_on_every_run(way):
    arguments = make(23, dtype=torch.float32, **OPTIONS["everything"])
    first, second = (differentiate(triton, arguments) for _ in range(2))
    assert first[0] == second[0]
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_no_grad_makes_the_loss_alone(way):
    arguments = make(23, dtype=torch.float32, **OPTIONS["everything"])
    want, _ = truth(arguments)
    with torch.no_grad(), guarded():
        loss = triton(**arguments)
    assert not loss.requires_grad and abs(loss - want) < LOSS_BOUND * max(1, want)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_one_row(options, way):
    arguments = make(1, dtype=torch.float32, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        loss, grads = differentiate(triton, arguments)
    said = [str(w.message) for w in caught if issubclass(w.category, UserWarning)]
    if "negatives" in arguments:
        check(arguments)
        assert said == []
    else:
        assert loss == 0 and all((g == 0).all() for g in grads)
        assert said == ["contrastive_loss: one row and no negatives: the loss is 0"]


def test_what_cannot_run_here():
    for dtype, reason in ((torch.float64, "no kernel for"), (torch.bfloat16, "interpreter")):
        if dtype == torch.float64 or DEVICE == "cpu":
            with pytest.raises(RuntimeError, match=f"impl='triton' cannot run: .*{reason}"):
                triton(**make(4, dtype=dtype))


def test_auto(monkeypatch):
    arguments = make(6, dtype=torch.float32)
    ran = []
    chunked = module._chunked
    monkeypatch.setattr(module, "_chunked", lambda *args: ran.append(1) or chunked(*args))
    contrastive_loss(**{k: x.to(DEVICE) for k, x in arguments.items()})
    assert bool(ran) == (DEVICE == "cpu")


@pytest.mark.parametrize("columns", [1, 1000, 10**5, 10**6, 10**8])
def test_the_choice_of_a_way(columns):
    for rows in (1, 100, 10**5):
        for dtype in DTYPES:
            chunk = launch.contrastive_chunk(rows, columns, dtype)
            assert chunk == 0 or chunk >= min(rows, 1024)
            assert chunk * columns * 4 <= launch.CONTRASTIVE_WORKSPACE
    assert (launch.contrastive_chunk(10**5, columns, torch.float16) > 0) == (columns <= 10**5)


def test_the_kernels_share_the_width_of_a_tile():
    for arch in (0, 80, 90):
        for dtype in (torch.float16, torch.float32):
            names = ("sums", "d_logits", "d_query", "d_candidates")
            blocks = [launch.contrastive_config(name, dtype, arch) for name in names]
            assert len({block["BLOCK_M"] for block in blocks}) == 1
            assert blocks[0]["BLOCK_M"] % blocks[2]["BLOCK_K"] == 0


@pytest.mark.parametrize(
    "seed", [pytest.param(s, marks=[pytest.mark.full] * (s % 3 > 0)) for s in range(330)]
)
def test_random_shapes(seed, monkeypatch):
    g = random.Random(seed)
    monkeypatch.setitem(WAYS, "random", g.choice([0, 0, 1, 7, 16, 1000]))
    take(monkeypatch, "random")
    monkeypatch.setattr(launch, "CONTRASTIVE_PANEL", g.choice([16, 32, 4096]))
    tau = g.choice([0.02, 0.1, 1.0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of one row
        check(
            make(
                g.choice([1, 2, 15, 16, 17, g.randint(1, 36)]),
                h=g.choice([0, 0, 1, 3]),
                ids=g.random() < 0.5,
                dim=g.choice([2, 3, 8, 16, 20]),
                dtype=g.choice(DTYPES),
                seed=seed,
                tau=tau,
                bidirectional=g.random() < 0.5,
                margin=g.choice([None, None, -0.1, 0.01, 0.2]),
            ),
            loss_bound=2e-6 if tau == 0.02 else LOSS_BOUND,  # s itself is known to 6e-8
            dense=True,
        )


# Ranks, as in test_contrastive_loss.py: all cases of one world size run in one spawn.

SPLITS = {1: [[6]], 2: [[5, 2], [0, 6]], 4: [[2, 2, 2, 2], [3, 0, 5, 1]]}
RANK_CASES = {
    f"{name}, {way}{', shared tower' * shared}, {route}": case
    for way, shared, route, names in (
        ("recompute", False, "waited for", OPTIONS),
        ("rows by 5", False, "waited for", ["plain", "everything"]),
        ("recompute", True, "waited for", ["everything"]),
        ("recompute", False, "one gather", ["plain", "everything"]),
        ("rows by 5", False, "one gather", ["everything"]),
        ("recompute", False, "broadcasts", ["plain", "negatives", "everything"]),
        ("rows by 5", False, "broadcasts", ["negatives", "everything"]),
    )
    for name in names
    for case in [(OPTIONS[name], way, shared, route)]
}


def send_by(patch, route):
    """As shards go on CUDA, small or large, or as on the CPU."""
    patch.setattr(ranks_module, "_overlaps", lambda _: route != "waited for")
    patch.setattr(ranks_module, "_one_by_one", lambda *_: route == "broadcasts")


def towers(loss_of, name, total, own=slice(None), precision=torch.float32):
    options, _, shared, _ = RANK_CASES[name]
    case = (options, torch.float32, None, shared)
    return through_towers(loss_of, case, total, own, precision)


def by_gradcache(rows, own):
    """d of a tower from cached gradients of embeddings, made again two rows at a time."""
    arguments = local(make(sum(rows), dtype=torch.float32, **OPTIONS["everything"]), own)
    tower = torch.eye(8).requires_grad_()
    names = ("query", "key", "negatives")
    with torch.no_grad():
        embedded = {name: arguments[name] @ tower for name in names}
    cached = contrastive_loss_and_grad(**arguments | embedded, impl="triton")
    for name, d in zip(names, cached[1:4], strict=True):
        for part, d_part in zip(arguments[name].split(2), d.split(2), strict=True):
            ((part @ tower) * d_part).sum().backward()
    at_once = tower.detach().clone().requires_grad_()
    embedded = {name: arguments[name] @ at_once for name in names}
    contrastive_loss(**arguments | embedded, impl="triton").backward()
    zero = torch.zeros_like(tower)
    return [zero if t.grad is None else t.grad for t in (tower, at_once)]


def run_rank(rank, world, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)
    saved = {}
    with gloo(folder, rank, world), pytest.MonkeyPatch.context() as patch:
        for rows in SPLITS[world]:
            own = own_rows(rows, rank)
            for name, (_, way, _, route) in RANK_CASES.items():
                take(patch, way)
                send_by(patch, route)
                loss, grads = towers(
                    lambda **a: contrastive_loss(**a, impl="triton"), name, sum(rows), own
                )
                for grad in grads:
                    dist.all_reduce(grad)
                saved[f"{name}, {rows}"] = [loss, [grad / world for grad in grads]]
            saved[f"gradcache {rows}"] = by_gradcache(rows, own)
        if world == 4:
            pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
            take(patch, "recompute")
            batch = make(5, dtype=torch.float32, seed=rank)
            for route in ("one gather", "broadcasts"):
                send_by(patch, route)
                loss = contrastive_loss(**batch, group=pairs[rank // 2], impl="triton")
                saved[f"pair, {route}"] = loss
        torch.save(saved, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module", params=[1, 2, pytest.param(4, marks=pytest.mark.full)])
def ranks(request):
    """What each rank of a world saved."""
    if DEVICE == "cuda":
        pytest.skip("gloo ranks on the CPU")
    world = request.param
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        if world == 1:
            run_rank(0, 1, folder)
        else:
            spawn(run_rank, (world, folder), nprocs=world)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world)]


@pytest.mark.parametrize("name", RANK_CASES)
def test_ranks_equal_the_whole_batch(ranks, name):
    for rows in SPLITS[len(ranks)]:
        want, want_grads = towers(
            lambda **a: _reference(**in_double(a)).mean(), name, sum(rows), precision=torch.float64
        )
        results = [saved[f"{name}, {rows}"] for saved in ranks]
        loss = sum(loss.double() for loss, _ in results) / len(ranks)
        assert abs(loss - want) < LOSS_BOUND * max(1, want), rows
        assert all(gap(grads, want_grads) < 5e-6 for _, grads in results), rows


def test_gradcache_equals_one_pass(ranks):
    for rows in SPLITS[len(ranks)]:
        for saved in ranks:
            chunked, at_once = saved[f"gradcache {rows}"]
            assert at_once.norm() == 0 or gap([chunked], [at_once]) < 5e-6


def test_shards_arrive_in_a_group_of_some_ranks(ranks):
    if len(ranks) < 4:
        pytest.skip("two ranks have no smaller group of two")
    batches = [make(5, dtype=torch.float32, seed=rank) for rank in range(4)]
    for rank, saved in enumerate(ranks):
        pair = batches[rank - rank % 2], batches[rank - rank % 2 + 1]
        both = {name: torch.cat([batch[name] for batch in pair]) for name in ("query", "key")}
        own = slice(0, 5) if rank % 2 == 0 else slice(5, 10)
        want = _reference(**in_double({**batches[rank], **both}))[own].mean()
        for route in ("one gather", "broadcasts"):
            assert abs(saved[f"pair, {route}"] - want) < 1e-5, route
