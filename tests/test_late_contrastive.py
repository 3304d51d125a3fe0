"""The contrastive loss of rows of several vectors, and its weights of hard negatives: loops, paths
against the reference, ranks against one."""

from __future__ import annotations

import math
import re
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import Largest, gloo, spawn
from test_contrastive_loss import (
    NAMES,
    differentiate,
    gap,
    in_double,
    local,
    own_rows,
    refusal,
    truth,
)
from test_contrastive_loss import make as vectors

from btok_kernels import contrastive_loss as module
from btok_kernels import late_interaction
from btok_kernels.contrastive_loss import _reference, contrastive_loss, contrastive_loss_and_grad

OPTIONS = {
    "plain": {},
    "negatives": {"h": 3},
    "ids": {"ids": True},
    "margin": {"margin": 0.05},
    "bidirectional": {"bidirectional": True},
    "hard": {"hardness": 2.0},
    "hard both ways": {"hardness": 5.0, "bidirectional": True},
    "everything": {"h": 2, "ids": True, "margin": 0.1, "bidirectional": True, "hardness": 3.0},
}
TOKENS = {"vectors": None, "1 x 1": (1, 1), "3 x 2": (3, 2), "2 x 5": (2, 5)}  # K, L


def make(n, tokens=(3, 2), *, dim=8, dtype=torch.float64, seed=0, h=0, hardness=0.0, **options):
    """Arguments of one call; rows of (K, L) unit tokens, or vectors for None."""
    arguments = vectors(n, h=h, dim=dim, dtype=torch.float64, seed=seed, **options)
    if hardness:
        arguments["hardness"] = hardness
    g = torch.Generator().manual_seed(seed)

    def several(x, count):
        x = x.unsqueeze(-2).expand(*x.shape[:-1], count, dim)
        noise = torch.randn(x.shape, generator=g, dtype=torch.float64)
        return torch.nn.functional.normalize(x + 0.3 * noise, dim=-1)

    for name, count in zip(NAMES[:3], (tokens or ())[:1] + (tokens or ())[1:] * 2, strict=False):
        if name in arguments:
            arguments[name] = several(arguments[name], count)
    for name in NAMES:
        if name in arguments and name != "temperature":
            arguments[name] = arguments[name].to(dtype)
    tau = arguments["temperature"]
    return arguments | {"temperature": tau.to(torch.promote_types(dtype, torch.float32))}


def by_loops(query, key, temperature, negatives=None, query_ids=None, key_ids=None, **options):
    """The loss written out candidate by candidate, token by token."""
    n, margin, beta = len(query), options.get("margin"), options.get("hardness", 0.0)

    def similarity(q, k):
        if q.ndim == 1:
            return q.dot(k)
        best = [max((a.dot(b) for b in k), key=float) for a in q]
        return sum(best) / len(best)

    def shared(i, j):
        return query_ids is not None and query_ids[i] == key_ids[j]

    def loss(positive, others):
        kept = [s for s in others if margin is None or not s > positive + margin]
        weights = [math.exp(beta * float(s)) for s in kept]
        total = torch.ones((), dtype=torch.float64)
        for s, weight in zip(kept, weights, strict=True):
            share = weight / (sum(weights) / len(weights))
            total = total + share * ((s - positive) / temperature).exp()
        return total.log()

    losses = []
    for i in range(n):
        others = [similarity(query[i], key[j]) for j in range(n) if j != i and not shared(i, j)]
        if negatives is not None:
            others += [similarity(query[i], each) for row in negatives for each in row]
        losses.append(loss(similarity(query[i], key[i]), others))
    for j in range(n) if options.get("bidirectional") else ():
        others = [similarity(query[i], key[j]) for i in range(n) if i != j and not shared(i, j)]
        losses.append(loss(similarity(query[j], key[j]), others))
    return sum(losses) / n / (2 if options.get("bidirectional") else 1)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several ragged tiles in every test."""
    shrink(monkeypatch)


def shrink(patch):
    patch.setattr(module, "_TILE_LOGITS", 40)
    patch.setattr(late_interaction, "_TILE_MAXIMA", 60)
    patch.setattr(late_interaction, "_BLOCK_MAXIMA", 1)


@pytest.mark.parametrize("impl", ["specification", "reference", "chunked"])
@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_plain_loops(options, tokens, impl):
    arguments = make(6, tokens, **options)
    want, want_grads = differentiate(by_loops, arguments)
    assert 0.005 < want < 8
    of = {"specification": lambda **a: _reference(**a).mean()}
    loss, grads = differentiate(
        of.get(impl, lambda **a: contrastive_loss(**a, impl=impl)), arguments
    )
    assert abs(loss - want) < 1e-12
    assert gap(grads, want_grads) < 1e-11


def test_the_options_bite():
    """On this data hardness and the masks change the loss, so that losing one is seen."""
    for tokens in (None, (3, 2)):
        plain = _reference(**make(20, tokens, h=2, bidirectional=True)).mean()
        for changed in ({"margin": 0.1}, {"ids": True}, {"hardness": 2.0}):
            losses = _reference(**make(20, tokens, h=2, bidirectional=True, **changed))
            assert abs(losses.mean() - plain) > 1e-3


BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("n", [1, 2, 23])
@pytest.mark.parametrize("tokens", TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_chunked_against_the_reference(options, tokens, n, dtype):
    arguments = make(n, tokens, dtype=dtype, tau=0.07, seed=n, **options)
    want, want_grads = truth(arguments)
    loss, grads = differentiate(contrastive_loss, arguments)
    _, dense_grads = differentiate(lambda **a: _reference(**a).mean(), arguments)
    assert [g.dtype for g in grads] == [arguments[x].dtype for x in NAMES if x in arguments]
    assert abs(loss - want) <= max(BOUNDS[dtype], 1e-12) * max(want, 1)
    if want > 1e-3:
        assert gap(grads, want_grads) <= 2 * gap(dense_grads, want_grads) + BOUNDS[dtype]
    else:  # hardly anything to tell the key from: relative errors mean nothing
        for g, w, dense in zip(grads, want_grads, dense_grads, strict=True):
            assert (g - w).abs().max() <= 2 * (dense - w).abs().max() + 1e-5


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_one_token_each_is_the_loss_of_vectors(options):
    arguments = make(11, None, **options)
    want, want_grads = differentiate(contrastive_loss, arguments)
    late = {name: x.unsqueeze(-2) if name in NAMES[:3] else x for name, x in arguments.items()}
    loss, grads = differentiate(contrastive_loss, late)
    assert abs(loss - want) < 1e-12
    grads = [g.squeeze(-2) if g.ndim > 1 else g for g in grads]
    assert gap(grads, want_grads) < 1e-12


@pytest.mark.parametrize("logits", [1, 300, 10**6])
@pytest.mark.parametrize("maxima", [1, 500, 10**6])
def test_the_tile_sizes_do_not_matter(logits, maxima, monkeypatch):
    arguments = make(12, **OPTIONS["everything"])
    monkeypatch.setattr(module, "_TILE_LOGITS", logits)
    monkeypatch.setattr(late_interaction, "_TILE_MAXIMA", maxima)
    want, want_grads = truth(arguments)
    loss, grads = differentiate(contrastive_loss, arguments)
    assert abs(loss - want) < 1e-12
    assert gap(grads, want_grads) < 1e-12


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_loss_and_grad_is_loss_and_backward(impl):
    arguments = make(9, **OPTIONS["everything"])
    loss, grads = differentiate(lambda **a: contrastive_loss(**a, impl=impl), arguments)
    got = contrastive_loss_and_grad(**arguments, impl=impl)
    assert got.loss == loss
    for g, want, name in zip(got[1:], grads, NAMES, strict=True):
        assert torch.equal(g, want) and g.shape == arguments[name].shape


def test_views_as_inputs():
    arguments = make(9, **OPTIONS["everything"])
    want, want_grads = truth(arguments)
    for order in ((1, 0, 2), (2, 1, 0), (0, 2, 1)):
        back = tuple(order.index(i) for i in range(3))
        views = {
            name: arguments[name].permute(order).contiguous().permute(back)
            for name in ("query", "key")
        }
        views["negatives"] = arguments["negatives"].transpose(0, 1).contiguous().transpose(0, 1)
        for changed in (views, views | {"negatives": None}):
            call = arguments | changed
            loss, *grads = contrastive_loss_and_grad(**call)  # not of clones
            if changed["negatives"] is not None:
                assert abs(loss - want) < 1e-12
                assert gap(grads, want_grads) < 1e-12
            else:
                same = {**arguments, "negatives": None}
                plain = contrastive_loss_and_grad(**same, impl="reference")
                assert abs(loss - plain.loss) < 1e-12
                assert gap(grads[:2], plain[1:3]) < 1e-12


def test_no_gradient_passes_through_the_weights():
    """Nor d tau: the weights' exponent has no temperature."""
    arguments = make(6, None, hardness=4.0)
    weights = (4.0 * arguments["query"] @ arguments["key"].T).exp().fill_diagonal_(0)
    weights *= 5 / weights.sum(1, keepdim=True)

    def weighed(query, key, temperature, hardness):
        s = query @ key.T
        terms = ((s - s.diagonal()[:, None]) / temperature).exp()
        return (1 + (weights * terms).sum(1)).log().mean()

    want, want_grads = differentiate(weighed, arguments)
    loss, grads = differentiate(contrastive_loss, arguments)
    assert abs(loss - want) < 1e-12
    assert gap(grads, want_grads) < 1e-12


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_equal_negatives_weigh_one(impl, bidirectional):
    """The mean of the weights is one, whatever beta."""
    one = torch.nn.functional.normalize(torch.ones(10, 8, dtype=torch.float64), dim=-1)
    for hardness in (0.0, 1.0, 50.0):
        options = {"hardness": hardness, "bidirectional": bidirectional, "impl": impl}
        assert abs(contrastive_loss(one, one, **options) - math.log(10)) < 1e-12


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_rows_without_negatives_lose_nothing(impl):
    """All of a row's dropped by ids; of a column's too; the others as if those were not there."""
    arguments = make(6, None, hardness=2.0, bidirectional=True)
    ids = torch.tensor([0, 0, 1, 2, 3, 4])
    alone = {name: x[:2] if name in NAMES[:3] else x for name, x in arguments.items()}
    options = {"impl": impl, "query_ids": ids[:2], "key_ids": ids[:2]}
    loss, grads = differentiate(lambda **a: contrastive_loss(**a, **options), alone)
    assert loss == 0 and all(g.abs().max() < 1e-12 for g in grads)
    every = dict.fromkeys(("query_ids", "key_ids"), torch.zeros(6, dtype=torch.int64))
    every["key_ids"] = torch.tensor([0, 0, 0, 0, 0, 1])  # query 5 keeps no negative, key 5 all
    losses = _reference(**arguments, **every)
    loss, grads = differentiate(lambda **a: contrastive_loss(**a, **every, impl=impl), arguments)
    assert abs(loss - losses.mean()) < 1e-12
    assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("hardness", [50.0, 1e4])
def test_a_high_hardness_does_not_overflow(hardness):
    for tokens in (None, (3, 2)):
        arguments = make(12, tokens, dtype=torch.float32, hardness=hardness, bidirectional=True)
        want, want_grads = truth(arguments)
        loss, grads = differentiate(contrastive_loss, arguments)
        dense, dense_grads = differentiate(lambda **a: _reference(**a).mean(), arguments)
        assert abs(loss - want) <= 2 * abs(dense - want) + 1e-4
        assert gap(grads, want_grads) <= 2 * gap(dense_grads, want_grads) + 1e-3


def test_no_hardness_is_the_same_bits():
    arguments = make(23, None, dtype=torch.float32, h=1, bidirectional=True)
    without = contrastive_loss_and_grad(**arguments)
    for nothing in (0, 0.0):
        with_it = contrastive_loss_and_grad(**arguments, hardness=nothing)
        assert all(torch.equal(a, b) for a, b in zip(without, with_it, strict=True))


def test_ties_go_to_the_first_token():
    query = torch.ones(3, 2, 4, dtype=torch.float64)
    key = torch.ones(3, 3, 4, dtype=torch.float64)
    for impl in ("reference", "chunked"):
        got = contrastive_loss_and_grad(query, 2 * key, negatives=key[:, None], impl=impl)
        for d in (got.d_key, got.d_negatives[:, 0]):
            assert (d[:, 1:] == 0).all()
        assert (got.d_negatives[:, 0, 0] != 0).all()


def test_memory_is_a_few_tiles(monkeypatch):
    n, tokens, dim = 128, (8, 16), 4

    monkeypatch.setattr(late_interaction, "_TILE_MAXIMA", n * tokens[0] * 4)
    arguments = make(n, tokens, dim=dim, ids=True, margin=0.1, bidirectional=True, hardness=1.0)
    with Largest() as largest:
        contrastive_loss_and_grad(**arguments)
    of_pairs = n * tokens[0] * tokens[1]  # of up to 1,024 rows with their own keys
    assert largest.numel == max(n * tokens[1] * dim, n * tokens[0] * 4, of_pairs)


def bad(**changes):
    return {**make(4, h=1, ids=True), "margin": 0.1, **changes}


def tokens_of(*shape):
    return torch.ones(shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (bad(query=tokens_of(4, 3, 8, 1)), TypeError, r"query is .*, expected .* \[N, K, D\]"),
        (bad(key=tokens_of(4, 8)), ValueError, r"key is \[4, 8\], expected \[4, L, 8\] for query"),
        (bad(key=tokens_of(3, 2, 8)), ValueError, r"key is \[3, 2, 8\], expected \[4, 2, 8\]"),
        (bad(key=tokens_of(4, 2, 7)), ValueError, r"key is \[4, 2, 7\], expected \[4, 2, 8\]"),
        (
            bad(negatives=tokens_of(4, 2, 8)),
            ValueError,
            r"negatives is \[4, 2, 8\], expected \[4, h, 2, 8\] for query",
        ),
        (bad(negatives=tokens_of(4, 1, 3, 8)), ValueError, r"negatives is \[4, 1, 3, 8\]"),
        (bad(query=tokens_of(4, 0, 8)), ValueError, "query and key have 0 and 2 tokens of D 8"),
        (
            bad(key=tokens_of(4, 0, 8), negatives=None),
            ValueError,
            "query and key have 3 and 0 tokens of D 8, expected at least 1 of each",
        ),
        (bad(hardness=-1), ValueError, "hardness is -1, expected a finite number, 0 or more"),
        (bad(hardness=math.inf), ValueError, "hardness is inf"),
        (bad(hardness=math.nan), ValueError, "hardness is nan"),
        (bad(hardness=None), ValueError, "hardness is None"),
        (bad(hardness="hard"), ValueError, "hardness is 'hard'"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_arguments(arguments, error, message):
    for function in (contrastive_loss, contrastive_loss_and_grad):
        with pytest.raises(error, match=f"^contrastive_loss: {message}"):
            function(**arguments)


def test_the_kernels_of_vectors_have_no_weights(monkeypatch):
    monkeypatch.setattr(module, "no_triton", lambda device, dtype: None)
    for tokens, runs in ((None, False), ((3, 2), True)):
        arguments = make(4, tokens, hardness=1.0)
        if runs:
            call = module.Call(**arguments, impl="triton")
            assert module._check(call)["impl"] == "triton"
        else:
            message = r"impl='triton' cannot run: hardness is 1.0, and its kernels weigh all"
            with pytest.raises(RuntimeError, match=f"^contrastive_loss: {message}"):
                contrastive_loss(**arguments, impl="triton")


# Ranks: all cases of one world size run in one spawn; the tests below look at what it saved.

SPLITS = {1: [[6]], 2: [[4, 4], [5, 2], [0, 6]], 4: [[2, 2, 2, 2], [3, 0, 5, 1]]}
RANK_CASES = {
    f"{name}, {kind}, {dtype}, {impl}": (OPTIONS[name], TOKENS[kind], dtype, impl)
    for name, kind, dtype, impl in [
        *((name, "3 x 2", torch.float64, "chunked") for name in OPTIONS),
        *((name, "vectors", torch.float64, "chunked") for name in ("hard", "hard both ways")),
        ("everything", "vectors", torch.float64, "chunked"),
        ("everything", "2 x 5", torch.float64, "reference"),
        ("everything", "2 x 5", torch.float32, "chunked"),
    ]
}
DISAGREEMENTS = {  # what the last rank calls with -> what every rank says
    "K": (make(4, (2, 2), h=1), "K is 2 on rank"),
    "L": (make(4, (3, 3), h=1), "L is 3 on rank"),
    "vectors": (make(4, None, h=1), "K is None on rank"),
    "hardness": (make(4, h=1, hardness=0.5), "hardness is 0.5 on rank"),
}


def run_rank(rank, world, folder):
    torch.set_num_threads(1)
    saved = {}
    with gloo(folder, rank, world), pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        for name, (options, tokens, dtype, impl) in RANK_CASES.items():
            for rows in SPLITS[world]:
                arguments = make(sum(rows), tokens, dtype=dtype, **options)
                mine = local(arguments, own_rows(rows, rank))
                loss, *grads = contrastive_loss_and_grad(**mine, impl=impl)
                grads = [g for g in grads if g is not None]
                dist.all_reduce(grads[-1])  # of tau, which all share
                saved[f"{name}, {rows}"] = loss, grads
        for name, (arguments, _) in DISAGREEMENTS.items() if world > 1 else ():
            saved[name] = refusal(arguments if rank == world - 1 else make(4, h=1))
        torch.save(saved, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module", params=[1, 2, pytest.param(4, marks=pytest.mark.full)])
def ranks(request):
    """What each rank of a world saved."""
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
    options, tokens, dtype, _ = RANK_CASES[name]
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    for rows in SPLITS[len(ranks)]:
        arguments = make(sum(rows), tokens, dtype=dtype, **options)
        losses = _reference(**in_double(arguments))
        _, whole = truth(arguments)
        for rank, saved in enumerate(ranks):
            own = own_rows(rows, rank)
            loss, (*grads, d_tau) = saved[f"{name}, {rows}"]
            assert abs(loss - losses[own].sum() * len(ranks) / sum(rows)) < bound
            assert gap(grads, [len(ranks) * g[own] for g in whole[:-1]]) < bound
            assert gap([d_tau / len(ranks)], whole[-1:]) < bound


@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_disagreements_raise_on_all_ranks(ranks, name):
    if len(ranks) == 1:
        pytest.skip("one rank agrees with itself")
    for saved in ranks:
        assert re.match(f"ValueError: contrastive_loss: {DISAGREEMENTS[name][1]}", saved[name])
