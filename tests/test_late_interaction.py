"""Late interaction: the reference against loops, the chunked path against it, ties, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import Largest
from test_contrastive_loss import gap

from btok.kernels import maxsim
from btok_kernels import late_interaction as module
from btok_kernels.late_interaction import _reference

SHAPES = {  # N, K, M, L, D
    "one of each": (1, 1, 1, 1, 1),
    "vectors": (5, 1, 9, 1, 8),
    "one query token": (5, 1, 9, 4, 8),
    "one key token": (5, 3, 9, 1, 8),
    "odd": (7, 3, 11, 5, 13),
    "one row": (1, 4, 6, 6, 8),
    "one key": (6, 2, 1, 7, 3),
    "wide": (4, 16, 70, 16, 32),
    "no rows": (0, 3, 5, 4, 8),
    "no keys": (5, 3, 0, 4, 8),
}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def make(n, k, m, length, dim, dtype=torch.float64, seed=0):
    """query, key, and an upstream gradient."""
    g = torch.Generator().manual_seed(seed)
    shapes = (n, k, dim), (m, length, dim)
    tokens = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]
    query, key = (torch.nn.functional.normalize(x, dim=-1).to(dtype) for x in tokens)
    upstream = torch.randn(n, m, generator=g, dtype=torch.float64)
    return query, key, upstream.to(torch.promote_types(dtype, torch.float32))


def differentiate(scores_of, query, key, upstream):
    leaves = [x.detach().clone().requires_grad_() for x in (query, key)]
    s = scores_of(*leaves)
    return s.detach(), torch.autograd.grad(s, leaves, upstream)


def truth(query, key, upstream):
    """The reference in fp64."""
    return differentiate(_reference, *(x.double() for x in (query, key, upstream)))


def by_loops(query, key, upstream):
    """Scores and gradients written out, token by token; the first of equal products wins."""
    s = torch.zeros(len(query), len(key), dtype=torch.float64)
    d_query, d_key = torch.zeros_like(query), torch.zeros_like(key)
    tokens = query.shape[1]
    for i in range(len(query)):
        for j in range(len(key)):
            for a in range(tokens):
                best, at = -math.inf, None
                for b in range(key.shape[1]):
                    product = sum(x * y for x, y in zip(query[i, a], key[j, b], strict=True))
                    if product > best:
                        best, at = product, b
                s[i, j] += best / tokens
                d_query[i, a] += upstream[i, j] / tokens * key[j, at]
                d_key[j, at] += upstream[i, j] / tokens * query[i, a]
    return s, (d_query, d_key)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several ragged tiles, of several blocks, in every test."""
    monkeypatch.setattr(module, "_TILE_MAXIMA", 40)
    monkeypatch.setattr(module, "_BLOCK_MAXIMA", 1)


@pytest.mark.parametrize("impl", ["specification", "reference", "chunked"])
@pytest.mark.parametrize("shape", [(4, 3, 5, 2, 3), (1, 2, 3, 4, 2), (3, 1, 2, 1, 2)], ids=str)
def test_plain_loops(shape, impl):
    inputs = make(*shape)
    want, want_grads = by_loops(*inputs)
    path = _reference if impl == "specification" else lambda q, k: maxsim(q, k, impl=impl)
    s, grads = differentiate(path, *inputs)
    assert (s - want).abs().max() < 1e-14
    assert gap(grads, want_grads) < 1e-14


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_against_the_reference(shape, dtype, impl):
    inputs = make(*shape, dtype=dtype)
    want, want_grads = truth(*inputs)
    s, grads = differentiate(lambda q, k: maxsim(q, k, impl=impl), *inputs)
    assert s.dtype == inputs[2].dtype and [g.dtype for g in grads] == [dtype] * 2
    assert s.shape == want.shape
    bound = 1e-14 if dtype == torch.float64 else 1e-6
    assert (s - want).norm() <= bound * max(1e-12, want.norm())
    _, dense_grads = differentiate(_reference, *inputs)
    assert gap(grads, want_grads) <= 2 * gap(dense_grads, want_grads) + bound


def test_one_token_each_is_the_product():
    query, key, upstream = make(6, 1, 9, 1, 8)
    s, grads = differentiate(maxsim, query, key, upstream)
    want, want_grads = differentiate(lambda q, k: q[:, 0] @ k[:, 0].T, query, key, upstream)
    assert (s - want).abs().max() < 1e-14
    assert gap(grads, want_grads) < 1e-14


def test_unit_tokens_score_as_cosines():
    query, _, _ = make(7, 4, 1, 1, 8)
    s = maxsim(query, query)
    assert s.abs().max() <= 1 + 1e-12
    assert (s.diagonal() - 1).abs().max() < 1e-12


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_equal_products_the_first_takes_the_gradient(dtype, impl):
    query = torch.ones(3, 2, 4, dtype=dtype)
    key = torch.zeros(5, 4, 4, dtype=dtype)
    key[:, 1:, 0] = torch.tensor([[2.0, 2, 2], [1, 2, 2], [2, 1, 2], [-1, -1, -1], [0, 0, 0]])
    upstream = torch.ones(3, 5, dtype=torch.promote_types(dtype, torch.float32))
    s, (_, d_key) = differentiate(lambda q, k: maxsim(q, k, impl=impl), query, key, upstream)
    assert s[0].tolist() == [2, 2, 2, 0, 0]
    taken = [1, 2, 1, 0, 0]
    for j, rows in enumerate(d_key[..., 0].tolist()):
        assert rows == [3.0 if b == taken[j] else 0.0 for b in range(4)], j


@pytest.mark.parametrize("maxima", [1, 33, 66, 1000, 10**6])
@pytest.mark.parametrize("block", [1, 700, 10**6])
def test_the_tile_sizes_do_not_matter(maxima, block, monkeypatch):
    inputs = make(7, 3, 130, 5, 8)
    monkeypatch.setattr(module, "_TILE_MAXIMA", maxima)
    monkeypatch.setattr(module, "_BLOCK_MAXIMA", block)
    want, want_grads = truth(*inputs)
    s, grads = differentiate(maxsim, *inputs)
    assert (s - want).abs().max() < 1e-13
    assert gap(grads, want_grads) < 1e-13


@pytest.mark.parametrize("tokens", [256, 257, 300])
def test_more_key_tokens_than_a_byte_counts(tokens):
    inputs = make(3, 2, 4, tokens, 8)
    want, want_grads = truth(*inputs)
    s, grads = differentiate(maxsim, *inputs)
    assert (s - want).abs().max() < 1e-13
    assert gap(grads, want_grads) < 1e-13
    assert module.index_dtype(tokens) == (torch.uint8 if tokens < 257 else torch.int16)
    assert module.index_dtype(1 << 15) == torch.int16
    assert module.index_dtype((1 << 15) + 1) == torch.int32


def test_gradcheck():
    query, key, _ = make(3, 2, 4, 3, 3)
    assert torch.autograd.gradcheck(maxsim, (query.requires_grad_(), key.requires_grad_()))


def test_one_input_may_need_no_gradient():
    query, key, upstream = make(4, 3, 5, 2, 8)
    _, want = truth(query, key, upstream)
    for i, leaf in enumerate((query, key)):
        alone = leaf.clone().requires_grad_()
        s = maxsim(*((alone, key) if i == 0 else (query, alone)))
        (got,) = torch.autograd.grad(s, alone, upstream)
        assert gap([got], [want[i]]) < 1e-14


def test_without_a_gradient_nothing_is_kept():
    query, key, _ = make(4, 3, 5, 2, 8)
    with torch.no_grad():
        assert not maxsim(query.requires_grad_(), key).requires_grad
    assert not maxsim(query.detach(), key).requires_grad
    assert maxsim(query, key).requires_grad


def test_views_as_inputs():
    query, key, upstream = make(6, 3, 5, 4, 8)
    want, want_grads = truth(query, key, upstream)
    query = query.transpose(0, 2).contiguous().transpose(0, 2)
    key = key.repeat_interleave(2, 0)[::2]
    s, grads = differentiate(maxsim, query, key, upstream)
    assert (s - want).abs().max() < 1e-14
    assert gap(grads, want_grads) < 1e-14


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_autocast_does_not_round(impl):
    inputs = make(6, 3, 5, 4, 8, dtype=torch.float32)
    plain, grads = differentiate(lambda q, k: maxsim(q, k, impl=impl), *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        s, got = differentiate(lambda q, k: maxsim(q, k, impl=impl), *inputs)
    assert torch.equal(s, plain)
    if impl == "chunked":  # the backward of the dense one is autograd's own
        assert gap(got, grads) == 0


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_nan_stays(impl):
    query, key, _ = make(4, 2, 5, 3, 8)
    for b in range(3):
        broken = key.clone()
        broken[1, b, 0] = torch.nan
        s = maxsim(query, broken, impl=impl)
        assert s[:, 1].isnan().all() and torch.isfinite(s[:, [0, 2, 3, 4]]).all()


def test_the_same_bits_on_every_run():
    inputs = make(9, 3, 40, 5, 8, dtype=torch.float32)
    first, second = (differentiate(maxsim, *inputs) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_no_tensor_is_as_large_as_the_products(monkeypatch):
    n, k, m, length, dim = 64, 8, 64, 16, 4
    inputs = make(n, k, m, length, dim)
    monkeypatch.setattr(module, "_TILE_MAXIMA", 4 * k * m)
    with Largest() as largest:
        differentiate(maxsim, *inputs)
    assert largest.numel == max(n * m, m * length * dim, 4 * k * m)  # of n k m length


@pytest.mark.parametrize(
    ("query", "key", "error", "message"),
    [
        ([1.0], torch.ones(2, 3, 4), TypeError, "query is <class 'list'>, expected a floating"),
        (torch.ones(2, 4), torch.ones(2, 3, 4), TypeError, r"query is torch.float32 \[2, 4\]"),
        (torch.ones(2, 3, 4).long(), torch.ones(2, 3, 4), TypeError, "query is torch.int64"),
        (torch.ones(2, 3, 4), torch.ones(2, 4), TypeError, r"key is torch.float32 \[2, 4\], exp"),
        (torch.ones(2, 3, 4), None, TypeError, "key is <class 'NoneType'>, expected a"),
        (torch.ones(2, 0, 4), torch.ones(2, 3, 4), ValueError, r"query is \[2, 0, 4\], expected a"),
        (torch.ones(2, 3, 4), torch.ones(2, 0, 4), ValueError, r"key is \[2, 0, 4\], expected a"),
        (torch.ones(2, 3, 4), torch.ones(2, 3, 5), ValueError, r"key is \[2, 3, 5\], .* D 4 as"),
        (torch.ones(2, 3, 4), torch.ones(2, 3, 4).half(), TypeError, "key is torch.float16 on cpu"),
        (
            torch.ones(2, 3, 4),
            torch.ones(2, 3, 4, device="meta"),
            TypeError,
            "key is torch.float32 on meta, expected torch.float32 on cpu",
        ),
    ],
)
def test_bad_arguments(query, key, error, message):
    with pytest.raises(error, match=f"^maxsim: {message}"):
        maxsim(query, key)


def test_implementations_that_cannot_run():
    query, key, _ = make(2, 3, 2, 3, 4)
    with pytest.raises(ValueError, match=r"^maxsim: impl is 'fast', expected one of"):
        maxsim(query, key, impl="fast")
    with pytest.raises(RuntimeError, match=r"^maxsim: impl='triton' cannot run: "):
        maxsim(query, key, impl="triton")
