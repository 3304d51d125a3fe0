"""The contrastive loss: the reference against loops, the chunked path, and ranks against one."""

from __future__ import annotations

import math
import random
import re
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import Largest, gloo, spawn
from pretend_cuda import PretendCuda
from test_ranks import Collectives

from btok_kernels import contrastive_loss as module
from btok_kernels.contrastive_loss import _reference, contrastive_loss, contrastive_loss_and_grad

OPTIONS = {
    "plain": {},
    "negatives": {"h": 3},
    "ids": {"ids": True},
    "margin": {"margin": 0.05},
    "negative margin": {"margin": -0.1, "h": 1},
    "bidirectional": {"bidirectional": True},
    "bidirectional margin": {"bidirectional": True, "margin": 0.05},
    "everything": {"h": 2, "ids": True, "margin": 0.1, "bidirectional": True},
}
NAMES = ("query", "key", "negatives", "temperature")


def make(n, *, h=0, ids=False, dim=8, dtype=torch.float64, seed=0, tau=0.1, **options):
    """Arguments of one call on hard data (a loss of 0.5 to 8); ids repeat."""
    g = torch.Generator().manual_seed(seed)
    unit = torch.nn.functional.normalize
    key = unit(torch.randn(n, dim, generator=g, dtype=torch.float64), dim=-1)
    query = unit(key + 1.2 * torch.randn(n, dim, generator=g, dtype=torch.float64), dim=-1)
    arguments = {"query": query.to(dtype), "key": key.to(dtype)}
    if h:
        noise = torch.randn(n, h, dim, generator=g, dtype=torch.float64)
        arguments["negatives"] = unit(key[:, None] + 0.5 * noise, dim=-1).to(dtype)
    if ids:
        arguments["query_ids"] = torch.randint(0, max(1, n // 2), (n,), generator=g)
        arguments["key_ids"] = torch.randint(0, max(1, n // 2), (n,), generator=g)
    tau = torch.tensor(tau, dtype=torch.promote_types(dtype, torch.float32))
    return {**arguments, "temperature": tau, **options}


def differentiate(loss_of, arguments):
    """Loss and gradients by autograd; the arguments themselves stay untouched."""
    leaves = {
        name: arguments[name].detach().clone().requires_grad_()
        for name in NAMES
        if name in arguments
    }
    loss = loss_of(**{**arguments, **leaves})
    return loss.detach(), torch.autograd.grad(loss, list(leaves.values()))


def in_double(arguments):
    return {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in arguments.items()
    }


def truth(arguments):
    """The reference in fp64."""
    return differentiate(lambda **a: _reference(**a).mean(), in_double(arguments))


def gap(got, want):
    """The worst of |g - g'| / max(|g'|, 1e-3 |all g'|), per tensor."""
    assert len(got) == len(want)
    everything = math.sqrt(sum(w.double().norm().item() ** 2 for w in want))
    worst = 0.0
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape and torch.isfinite(g).all()
        scale = max(w.double().norm().item(), 1e-3 * everything, 1e-12)
        worst = max(worst, (g.double() - w.double()).norm().item() / scale)
    return worst


def by_loops(query, key, temperature, negatives=None, query_ids=None, key_ids=None, **options):
    """The loss written out candidate by candidate."""
    n, margin = len(query), options.get("margin")

    def kept(s, positive):
        return margin is None or not s > positive + margin

    def shared(i, j):
        return query_ids is not None and query_ids[i] == key_ids[j]

    def cross_entropy(positive, others):
        return (
            torch.stack([positive, *others]).div(temperature).logsumexp(0) - positive / temperature
        )

    losses = []
    for i in range(n):
        positive = query[i].dot(key[i])
        others = [query[i].dot(key[j]) for j in range(n) if j != i and not shared(i, j)]
        if negatives is not None:
            others += [query[i].dot(negative) for row in negatives for negative in row]
        losses.append(cross_entropy(positive, [s for s in others if kept(s, positive)]))
    if options.get("bidirectional"):
        for j in range(n):
            positive = query[j].dot(key[j])
            others = [query[i].dot(key[j]) for i in range(n) if i != j and not shared(i, j)]
            losses.append(cross_entropy(positive, [s for s in others if kept(s, positive)]))
    return sum(losses) / len(losses)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several ragged tiles in every test."""
    monkeypatch.setattr(module, "_TILE_LOGITS", 20)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_plain_loops(options, impl):
    arguments = make(7, **options)
    loss, grads = differentiate(by_loops, arguments)
    assert 0.5 < loss < 8 or "margin" in options
    for loss_of in (
        lambda **a: _reference(**a).mean(),
        lambda **a: contrastive_loss(**a, impl=impl),
    ):
        got, got_grads = differentiate(loss_of, arguments)
        assert abs(got - loss) < 1e-12
        assert gap(got_grads, grads) < 1e-12


def test_the_masks_bite():
    """On this data the masks change the loss, so that losing one is seen."""
    for n in (7, 20):
        plain = _reference(**make(n, h=2, bidirectional=True)).mean()
        for masked in ({"margin": 0.1}, {"ids": True}):
            losses = _reference(**make(n, h=2, bidirectional=True, **masked))
            assert abs(losses.mean() - plain) > 1e-3


BOUNDS = {  # dtype -> loss, gradients (over twice the dense error in that dtype), both relative
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-6, 2e-6),
    torch.bfloat16: (1e-6, 2e-6),
    torch.float16: (1e-6, 2e-6),
}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("n", [2, 23])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_chunked_against_the_reference(options, n, dtype):
    arguments = make(n, dtype=dtype, tau=0.07, seed=n, **options)
    loss, grads = truth(arguments)
    got, got_grads = differentiate(contrastive_loss, arguments)
    _, dense_grads = differentiate(lambda **a: _reference(**a).mean(), arguments)
    loss_bound, grad_bound = BOUNDS[dtype]
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    assert [g.dtype for g in got_grads] == [arguments[x].dtype for x in NAMES if x in arguments]
    assert abs(got - loss) <= loss_bound * max(loss, 1)
    assert gap(got_grads, grads) <= 2 * gap(dense_grads, grads) + grad_bound


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_one_row(options):
    arguments = make(1, **options)
    loss, grads = differentiate(contrastive_loss, arguments)
    want, want_grads = truth(arguments)
    assert abs(loss - want) < 1e-12
    if "negatives" in arguments:
        assert gap(grads, want_grads) < 1e-12
    else:  # nothing to tell the key from
        assert loss == 0 and all(g.abs().max() < 1e-12 for g in grads)


@pytest.mark.parametrize("rows_per_tile", [1, 5, 11, 12, 100])
def test_the_tile_size_does_not_matter(rows_per_tile, monkeypatch):
    arguments = make(12, **OPTIONS["everything"])
    monkeypatch.setattr(module, "_TILE_LOGITS", rows_per_tile * 12 * 3)
    loss, grads = differentiate(contrastive_loss, arguments)
    want, want_grads = truth(arguments)
    assert abs(loss - want) < 1e-12
    assert gap(grads, want_grads) < 1e-12


def test_gradcheck():
    arguments = make(4, dim=3, h=2, ids=True, bidirectional=True, tau=0.3)
    inputs = [arguments.pop(name).requires_grad_() for name in NAMES]

    def loss_of(*tensors):
        return contrastive_loss(**dict(zip(NAMES, tensors, strict=True)), **arguments)

    assert torch.autograd.gradcheck(loss_of, inputs)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_and_grad_is_loss_and_backward(dtype, impl):
    arguments = make(9, dtype=dtype, **OPTIONS["everything"])
    loss, grads = differentiate(lambda **a: contrastive_loss(**a, impl=impl), arguments)
    got = contrastive_loss_and_grad(**arguments, impl=impl)
    assert got.loss == loss
    for g, want in zip(got[1:], grads, strict=True):
        assert g.dtype == want.dtype and torch.equal(g, want) and not g.requires_grad
    without = contrastive_loss_and_grad(arguments["query"], arguments["key"], temperature=0.1)
    assert without.d_negatives is None and without.d_temperature is None


def test_a_float_temperature_and_a_tensor_of_one_element():
    arguments = make(6)
    tau = arguments.pop("temperature")
    want = contrastive_loss(**arguments, temperature=tau)
    assert contrastive_loss(**arguments, temperature=tau.item()) == want
    for shaped in (tau.reshape(1), tau.float().reshape(1, 1)):
        shaped.requires_grad_()
        contrastive_loss(**arguments, temperature=shaped).backward()
        _, (*_, d_tau) = truth({**arguments, "temperature": shaped.detach().reshape(())})
        assert shaped.grad.shape == shaped.shape and shaped.grad.dtype == shaped.dtype
        assert gap([shaped.grad.reshape(())], [d_tau]) < 1e-6
    default = contrastive_loss(**arguments)
    assert default == contrastive_loss(**arguments, temperature=0.02)


def test_the_host_does_not_wait_for_a_temperature():
    with PretendCuda() as device:
        query = torch.zeros(2, 3, dtype=torch.bfloat16, device="cuda")
        for given in (0.05, 1, torch.full((1,), 0.05, device="cuda")):
            tau = module.Call(query, query, given).tau(torch.float32)
            assert (tau.device, tau.dtype, tau.shape) == (query.device, torch.float32, ())
            assert tau.values == torch.tensor(given)
        assert not device.waits


def test_the_upstream_gradient_scales():
    arguments = make(6, h=1)
    _, grads = truth(arguments)
    _, got = differentiate(lambda **a: -3 * contrastive_loss(**a), arguments)
    assert gap(got, [-3 * g for g in grads]) < 1e-12


def test_a_loss_scale_saves_small_half_gradients():
    arguments = make(2000, dtype=torch.float16, tau=20.0)
    module._TILE_LOGITS = 1 << 20
    _, grads = truth(arguments)
    _, got = differentiate(lambda **a: 2.0**14 * contrastive_loss(**a), arguments)
    assert gap([g.double() / 2.0**14 for g in got], grads) < 1e-3


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_a_margin_keeps_ties(impl):
    rows = torch.zeros(6, 4)
    rows[:, 0] = 1  # every product is 1 exactly
    for bidirectional in (False, True):
        options = {"bidirectional": bidirectional, "impl": impl, "temperature": 0.5}
        assert abs(contrastive_loss(rows, rows, margin=0.0, **options) - math.log(6)) < 1e-6
        assert abs(contrastive_loss(rows, rows, margin=-0.1, **options)) < 1e-6


def test_no_grad_makes_no_gradients(monkeypatch):
    arguments = make(6, **OPTIONS["everything"])
    want, _ = truth(arguments)
    arguments["query"].requires_grad_()
    runs = []
    chunked = module._chunked
    monkeypatch.setattr(module, "_chunked", lambda *args: runs.append(args[2]) or chunked(*args))
    with torch.no_grad():
        loss = contrastive_loss(**arguments)
    assert not loss.requires_grad and abs(loss - want) < 1e-12
    assert contrastive_loss(**arguments).requires_grad
    assert runs == [False, True]


def test_views_as_inputs():
    arguments = make(6, h=2)
    want, want_grads = truth(arguments)
    arguments["query"] = arguments["query"].T.contiguous().T
    arguments["key"] = arguments["key"].repeat_interleave(2, 0)[::2]
    arguments["negatives"] = arguments["negatives"].transpose(0, 1).contiguous().transpose(0, 1)
    loss, grads = differentiate(contrastive_loss, arguments)
    assert abs(loss - want) < 1e-12
    assert gap(grads, want_grads) < 1e-12


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_autocast_does_not_round(impl):
    arguments = make(12, dtype=torch.float32, tau=0.02, bidirectional=True)
    plain, grads = differentiate(lambda **a: contrastive_loss(**a, impl=impl), arguments)
    with torch.autocast("cpu", torch.bfloat16):
        loss, got = differentiate(lambda **a: contrastive_loss(**a, impl=impl), arguments)
    assert loss == plain and gap(got, grads) == 0


@pytest.mark.parametrize("function", [contrastive_loss, contrastive_loss_and_grad])
def test_a_warning_names_the_callers_line(function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        function(**make(1))
    said = [str(w.message) for w in caught if w.filename == __file__]
    assert said == ["contrastive_loss: one row and no negatives: the loss is 0"]


def test_a_low_temperature_does_not_overflow():
    arguments = make(12, dtype=torch.float32, tau=0.005, dim=3, h=1, bidirectional=True)
    arguments["key"] = -arguments["key"]  # the positive is the lowest logit
    want, want_grads = truth(arguments)
    loss, grads = differentiate(contrastive_loss, arguments)
    assert want > 200 and abs(loss - want) < 1e-6 * want
    assert gap(grads, want_grads) < 5e-6


@pytest.mark.parametrize("bidirectional", [False, True])
def test_identical_embeddings_give_log_m(bidirectional):
    one = torch.nn.functional.normalize(torch.ones(10, 8), dim=-1)
    loss = contrastive_loss(one, one, bidirectional=bidirectional)
    assert abs(loss - math.log(10)) < 1e-5
    with_negatives = contrastive_loss(one, one, negatives=one[:, None].expand(10, 2, 8))
    assert abs(with_negatives - math.log(30)) < 1e-5


def test_the_same_bits_on_every_run():
    arguments = make(23, dtype=torch.float32, **OPTIONS["everything"])
    first, second = (contrastive_loss_and_grad(**arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_no_tensor_is_as_large_as_the_logits():
    n = 600

    arguments = make(n, ids=True, margin=0.1, bidirectional=True)
    module._TILE_LOGITS = n * 20
    with Largest() as largest:
        contrastive_loss_and_grad(**arguments)
    assert largest.numel == n * 20


def bad(**changes):
    return {**make(4, h=1, ids=True), "margin": 0.1, **changes}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (bad(query=[1.0]), TypeError, r"query is <class 'list'>, expected a floating-point tensor"),
        (bad(query=torch.ones(4, 8).long()), TypeError, "query is torch.int64"),
        (bad(query=torch.ones(8)), TypeError, r"query is torch.float32 \[8\]"),
        (bad(key=torch.ones(3, 8).double()), ValueError, r"key is \[3, 8\], expected \[4, 8\]"),
        (bad(key=torch.ones(4, 7).double()), ValueError, r"key is \[4, 7\], expected \[4, 8\]"),
        (bad(key=torch.ones(4, 8)), TypeError, "key is torch.float32, expected torch.float64"),
        (bad(key=None), TypeError, "key is <class 'NoneType'>"),
        (
            bad(key=torch.ones(4, 8, device="meta").double()),
            TypeError,
            "key is on meta, query on cpu",
        ),
        (
            bad(negatives=torch.ones(4, 8).double()),
            ValueError,
            r"negatives is \[4, 8\], expected \[4, h, 8\]",
        ),
        (bad(negatives=torch.ones(3, 1, 8).double()), ValueError, r"negatives is \[3, 1, 8\]"),
        (bad(negatives=torch.ones(4, 1, 8)), TypeError, "negatives is torch.float32"),
        (bad(query_ids=torch.ones(3).long()), ValueError, r"query_ids is \[3\], expected \[4\]"),
        (
            bad(key_ids=torch.ones(4).int()),
            TypeError,
            "key_ids is torch.int32, expected torch.int64",
        ),
        (bad(query_ids=None), ValueError, "query_ids is None"),
        (bad(key_ids=None), ValueError, "key_ids is None"),
        (bad(temperature=0), ValueError, "temperature is 0, expected a finite number above 0"),
        (bad(temperature=-0.1), ValueError, "temperature is -0.1"),
        (bad(temperature=math.inf), ValueError, "temperature is inf"),
        (bad(temperature=math.nan), ValueError, "temperature is nan"),
        (bad(temperature="warm"), ValueError, "temperature is 'warm'"),
        (bad(temperature=torch.ones(2)), ValueError, r"temperature is \[2\], expected one element"),
        (bad(temperature=torch.tensor(1)), TypeError, "temperature is torch.int64 on cpu"),
        (bad(temperature=torch.ones(1, device="meta")), TypeError, "temperature is .* on meta"),
        (bad(margin=math.nan), ValueError, "margin is nan, expected a finite number or None"),
        (bad(margin=math.inf), ValueError, "margin is inf"),
        (bad(group="here"), ValueError, "group is 'here', expected a group, 'local' or None"),
        (bad(group=5), ValueError, "group is 5, expected a group, 'local' or None"),
        (bad(impl="fast"), ValueError, "impl is 'fast', expected one of"),
        (bad(impl="triton"), RuntimeError, "impl='triton' cannot run: "),
        (make(0), ValueError, "query has 0 rows on every rank"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_arguments(arguments, error, message):
    for function in (contrastive_loss, contrastive_loss_and_grad):
        with pytest.raises(error, match=f"^contrastive_loss: {message}"):
            function(**arguments)


# Ranks: all cases of one world size run in one spawn; the tests below look at what it saved.

SPLITS = {1: [[6]], 2: [[4, 4], [5, 2], [0, 6]], 4: [[2, 2, 2, 2], [3, 0, 5, 1]]}
CHANGING = {  # rows of one call after the other
    2: [[4, 4], [4, 3], [4, 3], [0, 7], [1, 0], [4, 4]],
    4: [[2, 2, 2, 2], [2, 2, 2, 1], [0, 0, 0, 3], [5, 0, 1, 2], [2, 2, 2, 2]],
}
RANK_CASES = {
    f"{name}, {dtype}, {impl}{', shared tower' * shared}": (OPTIONS[name], dtype, impl, shared)
    for dtype, impl, shared, names in (
        (torch.float64, "chunked", False, OPTIONS),
        (torch.float64, "chunked", True, ["everything"]),
        (torch.float64, "reference", False, ["negatives", "everything"]),
        (torch.float32, "chunked", False, ["plain", "everything"]),
        (torch.bfloat16, "chunked", False, ["everything"]),
    )
    for name in names
}
RANK_BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}
DISAGREEMENTS = {  # what the last rank calls with -> what every rank says
    "dtype": (bad(**make(4, h=1, dtype=torch.float32)), "dtype is torch.float32 on rank"),
    "D": (bad(**make(4, h=1, dim=7)), "D is 7 on rank"),
    "h": (bad(**make(4, h=2)), "h is 2 on rank"),
    "no negatives": (bad(negatives=None), "h is None on rank"),
    "ids": (bad(query_ids=None, key_ids=None), "query_ids is None on rank"),
    "temperature": (bad(temperature=0.3), "temperature is 0.3 on rank"),
    "bidirectional": (bad(bidirectional=True), "bidirectional is True on rank"),
    "margin": (bad(margin=None), "margin is None on rank"),
    "impl": (bad(impl="reference"), "impl is reference on rank"),
    "device": (
        {k: x.to("meta") if isinstance(x, torch.Tensor) else x for k, x in bad().items()},
        "device is meta on rank",
    ),
    "a bad key": (bad(key=torch.ones(3, 8).double()), r"key is \[3, 8\], expected \[4, 8\]"),
    "a group": (bad(group=5), "group is 5, expected a group"),
    "a missing impl": (bad(impl="triton"), "impl='triton' cannot run: "),
}


def own_rows(rows, rank):
    return slice(sum(rows[:rank]), sum(rows[: rank + 1]))


def local(arguments, own):
    """One rank's part of a whole batch."""
    per_row = ("query", "key", "negatives", "query_ids", "key_ids")
    return {name: x[own] if name in per_row else x for name, x in arguments.items()}


def through_towers(loss_of, case, total, own=slice(None), precision=None):
    """Loss and parameter gradients of linear towers over data that every rank can make."""
    options, dtype, _, shared = case
    precision = precision or torch.promote_types(dtype, torch.float32)
    g = torch.Generator().manual_seed(1)
    noise = 0.2 * torch.randn(2, 8, 8, generator=g, dtype=torch.float64)
    towers = [(torch.eye(8) + n).to(precision).requires_grad_() for n in noise[: 2 - shared]]
    arguments = local(make(total, **options), own)
    for name, tower in (("query", towers[0]), ("key", towers[-1]), ("negatives", towers[-1])):
        if name in arguments:
            product = arguments[name].to(precision) @ tower
            arguments[name] = torch.nn.functional.normalize(product, dim=-1).to(
                dtype if dtype.itemsize == 2 else precision
            )
    tau = arguments["temperature"].to(precision).requires_grad_()
    loss = loss_of(**{**arguments, "temperature": tau})
    return loss.detach(), torch.autograd.grad(loss, [*towers, tau])


def run_rank(rank, world, folder):
    torch.set_num_threads(1)
    module._TILE_LOGITS = 20
    with gloo(folder, rank, world):
        torch.save(on_one_rank(rank, world), f"{folder}/{rank}.pt")


def on_one_rank(rank, world):
    saved = {}
    for name, case in RANK_CASES.items():
        for rows in SPLITS[world]:
            loss, grads = through_towers(
                lambda impl=case[2], **a: contrastive_loss(**a, impl=impl),
                case,
                sum(rows),
                own_rows(rows, rank),
            )
            for grad in grads:
                dist.all_reduce(grad)
            saved[f"{name}, {rows}"] = [loss, [grad / world for grad in grads]]
    for rows in SPLITS[world]:
        arguments = local(make(sum(rows), **OPTIONS["everything"]), own_rows(rows, rank))
        saved[f"direct {rows}"] = list(contrastive_loss_and_grad(**arguments))
        saved[f"dense {rows}"] = contrastive_loss(**arguments, impl="reference")
        for wants in {0, world - 1}:
            with torch.set_grad_enabled(rank == wants):
                leaf = arguments["key"].clone().requires_grad_()
                loss = contrastive_loss(**{**arguments, "key": leaf})
            if rank == wants:
                saved[f"alone with gradients {rows}"] = torch.autograd.grad(loss, leaf)[0]
    if world > 1:
        saved |= run_groups(rank, world) | run_disagreements(rank, world)
        saved |= run_again(rank, world)
    return saved


def run_groups(rank, world):
    arguments = make(5, seed=rank, bidirectional=True)
    pairs = [dist.new_group([first, first + 1]) for first in range(0, world, 2)]
    strangers = dist.new_group([0])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        contrastive_loss(**make(2 - rank % 2))  # a rank with one row is not alone
    return {
        "local": contrastive_loss(**arguments, group="local"),
        "pair": contrastive_loss(**arguments, group=pairs[rank // 2]),
        "stranger": refusal({**arguments, "group": strangers}),
    }


def run_disagreements(rank, world):
    said = {"no rows": refusal(make(0))}
    for name, (arguments, _) in DISAGREEMENTS.items():
        said[name] = refusal(arguments if rank == world - 1 else bad())
    return said


def run_again(rank, world):
    """A mistake of the first or the last rank after good calls, and a good call after each; then
    calls in which ranks' rows change. And the collectives of good calls, which take no objects.
    """
    said = {}
    with Collectives() as collectives:
        first = contrastive_loss_and_grad(**bad())
    good = [collectives.ran]
    for culprit in (0, world - 1):
        for name, (arguments, _) in DISAGREEMENTS.items():
            said[f"{name} of rank {culprit}"] = refusal(arguments if rank == culprit else bad())
            with Collectives() as collectives:
                again = contrastive_loss_and_grad(**bad())
            good.append(collectives.ran)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), name
    said["no rows again"] = refusal(make(0))
    losses = []
    for rows in CHANGING[world]:
        arguments = local(make(sum(rows), **OPTIONS["everything"]), own_rows(rows, rank))
        with Collectives() as collectives:
            losses.append(contrastive_loss(**arguments))
        good.append(collectives.ran)
    return {"again": said, "good": good, "changing": losses}


def refusal(arguments):
    try:
        return f"{contrastive_loss(**arguments)}"
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"


FOUR = pytest.param(4, marks=pytest.mark.full)
several = pytest.mark.parametrize("ranks", [2, FOUR], indirect=True, scope="module")


@pytest.fixture(scope="module", params=[1, 2, FOUR])
def ranks(request):
    """What each rank of a world saved."""
    world = request.param
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr(module, "_TILE_LOGITS", 20)
        if world == 1:
            run_rank(0, 1, folder)
        else:
            spawn(run_rank, (world, folder), nprocs=world)
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world)]


@pytest.mark.parametrize("name", RANK_CASES)
def test_ranks_equal_the_whole_batch(ranks, name):
    case = RANK_CASES[name]
    bound = RANK_BOUNDS[case[1]]
    for rows in SPLITS[len(ranks)]:
        want, want_grads = through_towers(
            lambda **a: _reference(**in_double(a)).mean(), case, sum(rows), precision=torch.float64
        )
        results = [saved[f"{name}, {rows}"] for saved in ranks]
        loss = sum(loss.double() for loss, _ in results) / len(ranks)
        assert abs(loss - want) < bound * max(1, want), rows
        assert all(gap(grads, want_grads) < bound for _, grads in results), rows


def test_each_rank_returns_its_own_rows(ranks):
    for rows in SPLITS[len(ranks)]:
        arguments = make(sum(rows), **OPTIONS["everything"])
        losses = _reference(**arguments)
        _, whole = truth(arguments)
        for rank, saved in enumerate(ranks):
            loss, *grads, _ = saved[f"direct {rows}"]
            own = own_rows(rows, rank)
            assert abs(loss - losses[own].sum() * len(ranks) / sum(rows)) < 1e-12
            assert abs(saved[f"dense {rows}"] - loss) < 1e-12
            assert gap(grads, [len(ranks) * g[own] for g in whole[:3]]) < 1e-12
        d_tau = sum(saved[f"direct {rows}"][4] for saved in ranks) / len(ranks)
        assert gap([d_tau], whole[3:]) < 1e-12


def test_one_rank_may_want_gradients_alone(ranks):
    for rows in SPLITS[len(ranks)]:
        _, (_, d_key, *_) = truth(make(sum(rows), **OPTIONS["everything"]))
        for rank in {0, len(ranks) - 1}:
            got = ranks[rank][f"alone with gradients {rows}"]
            assert gap([got], [len(ranks) * d_key[own_rows(rows, rank)]]) < 1e-12


@several
def test_groups(ranks):
    batches = [make(5, seed=rank, bidirectional=True) for rank in range(len(ranks))]
    for rank, (saved, batch) in enumerate(zip(ranks, batches, strict=True)):
        assert abs(saved["local"] - _reference(**batch).mean()) < 1e-12
        pair = batches[rank - rank % 2], batches[rank - rank % 2 + 1]
        both = {name: torch.cat([half[name] for half in pair]) for name in ("query", "key")}
        half = slice(0, 5) if rank % 2 == 0 else slice(5, 10)
        assert abs(saved["pair"] - _reference(**{**batch, **both})[half].mean()) < 1e-12
        message = "contrastive_loss: group does not contain this rank"
        assert rank == 0 or saved["stranger"] == f"ValueError: {message}"


@several
@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_disagreements_raise_on_all_ranks(ranks, name):
    last = len(ranks) - 1
    for rank, saved in enumerate(ranks):
        kind = "RuntimeError" if name == "a missing impl" and rank == last else "ValueError"
        assert re.match(f"{kind}: contrastive_loss: {DISAGREEMENTS[name][1]}", saved[name])
        assert rank == last or f"on rank {last}" in saved[name]


@several
@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_mistakes_after_good_calls_raise_on_all_ranks(ranks, name):
    """Good calls go on after them, to the same bits (`run_again`)."""
    for culprit in (0, len(ranks) - 1):
        for rank, saved in enumerate(ranks):
            said = saved["again"][f"{name} of rank {culprit}"]
            kind = "RuntimeError" if name == "a missing impl" and rank == culprit else "ValueError"
            text = DISAGREEMENTS[name][1]
            if culprit == 0 and text.endswith("on rank"):  # differences are from rank 0's
                text = rf"{text.split()[0]} is .* on rank 1 and .* on rank 0"
            assert re.match(f"{kind}: contrastive_loss: {text}", said), said
            assert rank == culprit or "on rank" in said


@several
def test_no_rows_on_any_rank(ranks):
    for saved in ranks:
        for said in (saved["no rows"], saved["again"]["no rows again"]):
            assert said.startswith("ValueError: contrastive_loss: query has 0 rows on every")


@several
def test_rows_may_change_with_every_call(ranks):
    for i, rows in enumerate(CHANGING[len(ranks)]):
        losses = _reference(**make(sum(rows), **OPTIONS["everything"]))
        for rank, saved in enumerate(ranks):
            want = losses[own_rows(rows, rank)].sum() * len(ranks) / sum(rows)
            assert abs(saved["changing"][i] - want) < 1e-12, rows


@several
def test_a_good_call_gathers_no_objects(ranks):
    """One gather to agree, one of candidates, and the reduce-scatter of their gradients; where
    bidirectional one for the columns' positives, one for their sums.
    """
    agreed, gathered = "allgather_base", "allgather_base"
    for saved in ranks:
        one_way, both_ways = (saved["good"][i] for i in (0, -1))
        assert one_way == [agreed, gathered, "reduce_scatter"]
        assert both_ways == [agreed, gathered, "allgather_base", "allgather_base"]
        mistakes = 2 * len(DISAGREEMENTS)
        assert saved["good"] == [one_way] * (1 + mistakes) + [both_ways] * len(saved["changing"])


@pytest.mark.full
@pytest.mark.parametrize("seed", range(300))
def test_random_shapes(seed, monkeypatch):
    g = random.Random(seed)
    dtype = g.choice(list(BOUNDS))
    arguments = make(
        g.randint(1, 40),
        h=g.choice([0, 0, 1, 3]),
        ids=g.random() < 0.5,
        dim=g.choice([1, 3, 8, 33]),
        dtype=dtype,
        seed=seed,
        tau=g.choice([0.02, 0.1, 1.0]),
        bidirectional=g.random() < 0.5,
        margin=g.choice([None, None, -0.1, 0.01, 0.2]),
    )
    monkeypatch.setattr(module, "_TILE_LOGITS", g.choice([1, 100, 1000, 10**6]))
    want, want_grads = truth(arguments)
    loss, grads = differentiate(contrastive_loss, arguments)
    dense, dense_grads = differentiate(lambda **a: _reference(**a).mean(), arguments)
    loss_bound, grad_bound = BOUNDS[dtype]
    assert abs(loss - want) <= 2 * abs(dense - want) + loss_bound * max(1, want)
    if want > 0.1:  # nearer to 0 relative errors of gradients mean nothing
        assert gap(grads, want_grads) <= 2 * gap(dense_grads, want_grads) + grad_bound
