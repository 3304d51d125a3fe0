"""impl="triton" of late interaction, alone and in the loss: under the interpreter or on a GPU."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import gloo, spawn
from test_contrastive_loss import NAMES, gap, in_double, local, own_rows, truth
from test_contrastive_loss import differentiate as differentiate_loss
from test_contrastive_loss_triton import GRADIENT_BOUNDS, guarded
from test_late_contrastive import OPTIONS
from test_late_contrastive import make as make_loss
from test_late_interaction import differentiate, make
from test_late_interaction import truth as truth_of_scores

from btok.kernels import contrastive_loss, contrastive_loss_and_grad, maxsim
from btok_kernels import contrastive_loss as loss_module
from btok_kernels import late_interaction, launch
from btok_kernels.contrastive_loss import _reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.skipif(
        not launch.interpreted() and DEVICE == "cpu",
        reason="needs TRITON_INTERPRET=1 or a CUDA device",
    ),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),  # numpy's, of -inf
]
SHAPES = {  # N, K, M, L, D
    "one of each": (1, 1, 1, 1, 1),
    "vectors": (5, 1, 19, 1, 8),
    "one query token": (17, 1, 9, 4, 20),
    "one key token": (5, 3, 33, 1, 16),
    "odd": (7, 3, 21, 5, 40),
    "one row": (1, 4, 17, 6, 8),
    "one key": (6, 3, 1, 7, 3),
    "several tiles": (13, 5, 37, 3, 33),
    "no rows": (0, 3, 5, 4, 8),
    "no keys": (5, 3, 0, 4, 8),
}
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
LOSS_BOUND = 1e-6


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several ragged tiles in every test, of several blocks each."""
    shrink(monkeypatch)


def shrink(patch):
    patch.setattr(late_interaction, "_TILE_MAXIMA", 700 if DEVICE == "cpu" else 100)


def triton(query, key):
    return maxsim(query.to(DEVICE), key.to(DEVICE), impl="triton").cpu()


def check(inputs):
    """Scores and gradients against fp64, with guarded allocations."""
    want, want_grads = truth_of_scores(*inputs)
    with guarded():
        s, grads = differentiate(triton, *inputs)
    assert s.shape == want.shape and s.dtype == torch.float32
    assert (s - want).norm() <= 1e-6 * max(1e-12, want.norm())
    assert [g.dtype for g in grads] == [inputs[0].dtype] * 2
    low = differentiate(lambda q, k: maxsim(q, k, impl="reference"), *inputs)[1]
    bound = GRADIENT_BOUNDS[inputs[0].dtype] + 2 * gap(low, want_grads)
    assert gap(grads, want_grads) <= bound


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape, dtype):
    check(make(*shape, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_equal_products_the_first_takes_the_gradient(dtype):
    query = torch.ones(3, 2, 4, dtype=dtype)
    key = torch.zeros(5, 4, 4, dtype=dtype)
    key[:, 1:, 0] = torch.tensor([[2.0, 2, 2], [1, 2, 2], [2, 1, 2], [-1, -1, -1], [0, 0, 0]])
    s, (_, d_key) = differentiate(triton, query, key, torch.ones(3, 5))
    assert s[0].tolist() == [2, 2, 2, 0, 0]
    for j, (rows, taken) in enumerate(zip(d_key[..., 0].tolist(), [1, 2, 1, 0, 0], strict=True)):
        assert rows == [3.0 if b == taken else 0.0 for b in range(4)], j


@pytest.mark.parametrize("tokens", [256, 257])
def test_more_key_tokens_than_a_byte_counts(tokens):
    check(make(2, 2, 3, tokens, 8, dtype=torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-6, 1e6, 1e30])
def test_upstream_gradients_of_any_size(dtype, size):
    """In fp16 they are scaled on the way, else small ones underflow and large ones overflow."""
    query, key, upstream = make(5, 3, 17, 4, 20, dtype=torch.float32)
    _, want = truth_of_scores(query.to(dtype), key.to(dtype), upstream)
    kind = late_interaction.similarity("triton")
    q, k, d = (x.to(DEVICE) for x in (query.to(dtype), key.to(dtype), size * upstream))
    _, where = kind.scores(q, k)
    d_query, d_key = torch.empty(q.shape, device=DEVICE), torch.zeros(k.shape, device=DEVICE)
    kind.differentiate(d, where, q, k, d_query, d_key)
    if size:
        grads = [x.cpu().double() / size for x in (d_query, d_key)]
        assert gap(grads, want) < GRADIENT_BOUNDS[dtype]
    else:
        assert (d_query == 0).all() and (d_key == 0).all()


def test_nan_stays():
    query, key, _ = make(4, 2, 5, 3, 8, dtype=torch.float32)
    for b in range(3):
        broken = key.clone()
        broken[1, b, 0] = torch.nan
        s = triton(query, broken)
        assert s[:, 1].isnan().all() and torch.isfinite(s[:, [0, 2, 3, 4]]).all()


def test_views_as_inputs():
    query, key, upstream = make(6, 3, 17, 4, 8, dtype=torch.float32)
    want, want_grads = truth_of_scores(query, key, upstream)
    query = query.transpose(0, 2).contiguous().transpose(0, 2)
    key = key.transpose(0, 1).contiguous().transpose(0, 1).repeat_interleave(2, 0)[::2]
    s, grads = differentiate(triton, query, key, upstream)
    assert (s - want).norm() <= 1e-6 * want.norm()
    assert gap(grads, want_grads) < 5e-6


@pytest.mark.skipif(DEVICE == "cuda", reason="of offsets, which the interpreter computes alike")
def test_offsets_beyond_32_bits():
    """Keys 2^30 elements apart, queries too; the memory between them is never touched."""
    query, key, _ = make(4, 2, 4, 3, 8, dtype=torch.float16)
    far = [
        torch.empty(3 * 2**30 + x[0].numel(), dtype=torch.float16).as_strided(
            x.shape, (2**30, 8, 1)
        )
        for x in (query, key)
    ]
    for spread, x in zip(far, (query, key), strict=True):
        spread.copy_(x)
    with torch.no_grad():
        s = maxsim(*far, impl="triton")
    assert (s - late_interaction._reference(query, key)).abs().max() < 1e-6


def test_the_same_bits_on_every_run():
    inputs = make(9, 3, 40, 5, 20, dtype=torch.float32)
    first, second = (differentiate(triton, *inputs) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_what_cannot_run_here():
    for dtype, reason in ((torch.float64, "no kernel for"), (torch.bfloat16, "interpreter")):
        if dtype == torch.float64 or DEVICE == "cpu":
            query, key, _ = make(2, 3, 4, 5, 8, dtype=dtype)
            with pytest.raises(RuntimeError, match=f"impl='triton' cannot run: .*{reason}"):
                triton(query, key)


def test_a_search_of_configurations_leaves_no_trace(monkeypatch):
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
    check(make(7, 3, 21, 4, 20, dtype=torch.float32))
    assert len(tried) == 3


def triton_loss(**arguments):
    on_device = {
        name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()
    }
    return contrastive_loss(**on_device, impl="triton").cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_loss(options, dtype):
    arguments = make_loss(19, (3, 4), dim=20, dtype=dtype, tau=0.07, **options)
    want, want_grads = truth(arguments)
    with guarded():
        loss, grads = differentiate_loss(triton_loss, arguments)
    assert abs(loss - want) <= LOSS_BOUND * max(1, want)
    assert [g.dtype for g in grads[:2]] == [dtype] * 2
    low = differentiate_loss(lambda **a: _reference(**a).mean(), arguments)[1]
    assert gap([g.cpu() for g in grads], want_grads) <= GRADIENT_BOUNDS[dtype] + 2 * gap(
        low, want_grads
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_row(dtype):
    for options in ({"h": 2}, {"h": 2, "hardness": 1.0, "bidirectional": True}):
        arguments = make_loss(1, (2, 3), dtype=dtype, **options)
        want, want_grads = truth(arguments)
        loss, grads = differentiate_loss(triton_loss, arguments)
        assert abs(loss - want) <= LOSS_BOUND * max(1, want)
        assert gap(grads, want_grads) <= 2 * GRADIENT_BOUNDS[dtype]


def test_views_as_inputs_of_the_loss():
    arguments = make_loss(9, (3, 2), dtype=torch.float32, bidirectional=True)
    want, want_grads = truth(arguments)
    for order in ((1, 0, 2), (2, 1, 0)):  # both are their own inverses
        views = {
            name: arguments[name].permute(order).contiguous().permute(order).to(DEVICE)
            for name in ("query", "key")
        }
        call = arguments | views | {"temperature": arguments["temperature"].to(DEVICE)}
        loss, *grads = contrastive_loss_and_grad(**call, impl="triton")  # not of clones
        assert abs(loss.cpu() - want) <= LOSS_BOUND * max(1, want)
        assert gap([grads[i].cpu() for i in (0, 1, 3)], want_grads) < 5e-6


def test_auto_takes_the_kernels_on_cuda_alone():
    arguments = make_loss(4, (2, 3), dtype=torch.float32)
    call = loss_module.Call(**{k: x.to(DEVICE) for k, x in arguments.items()})
    taken = loss_module._check(call)["impl"]
    assert taken == ("triton" if DEVICE == "cuda" else "chunked")


SPLITS = {1: [[6]], 2: [[4, 4], [0, 6]]}
RANK_CASES = ("negatives", "everything")


def run_rank(rank, world, folder):
    torch.set_num_threads(1)
    saved = {}
    with gloo(folder, rank, world), pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        for rows in SPLITS[world]:
            for name in RANK_CASES:
                arguments = make_loss(sum(rows), (3, 2), dtype=torch.float32, **OPTIONS[name])
                mine = local(arguments, own_rows(rows, rank))
                loss, *grads = contrastive_loss_and_grad(**mine, impl="triton")
                dist.all_reduce(grads[-1])
                saved[f"{name}, {rows}"] = loss, grads
        torch.save(saved, f"{folder}/{rank}.pt")


@pytest.mark.skipif(DEVICE == "cuda", reason="gloo ranks on the CPU")
@pytest.mark.parametrize("world", SPLITS)
def test_ranks_equal_the_whole_batch(world):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        if world == 1:
            run_rank(0, 1, folder)
        else:
            spawn(run_rank, (world, folder), nprocs=world)
        ranks = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world)]
    for rows in SPLITS[world]:
        for name in RANK_CASES:
            arguments = make_loss(sum(rows), (3, 2), dtype=torch.float32, **OPTIONS[name])
            losses, (_, whole) = _reference(**in_double(arguments)), truth(arguments)
            assert len(whole) == len(NAMES)
            for rank, saved in enumerate(ranks):
                own = own_rows(rows, rank)
                loss, (*grads, d_tau) = saved[f"{name}, {rows}"]
                want = losses[own].sum() * world / sum(rows)
                assert abs(loss - want) < LOSS_BOUND * max(1, want)
                assert gap(grads, [world * g[own] for g in whole[:-1]]) < 1e-5
                assert gap([d_tau / world], whole[-1:]) < 1e-5
