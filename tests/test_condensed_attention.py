"""condensed_attention: the reference against plain loops, the sdpa path against the reference."""

from __future__ import annotations

import logging
import random
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from test_layout import allowed_by_loops, random_layout
from torch.utils._python_dispatch import TorchDispatchMode

from btok.kernels import CondensedLayout, condensed_attention
from btok_kernels import condensed_attention as module
from btok_kernels import launch


def inputs(layout, heads, dim, seed, dtype=torch.float32, grad=False):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(layout.num_rows, h, dim, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_(grad)
        for h in (heads[0], heads[1], heads[1])
    )


def test_the_reference_is_softmax_over_what_each_row_sees():
    rng = random.Random(0)
    for case in range(12):
        layout = random_layout(rng)
        q, k, v = inputs(layout, (4, 2), 8, case, torch.float64)
        out = condensed_attention(q, k, v, layout, scale=0.7, impl="reference")
        allowed = allowed_by_loops(layout)
        for i in range(layout.num_rows):
            keys = allowed[i].nonzero().flatten().tolist()
            for head in range(4):
                if not keys:
                    assert (out[i] == 0).all()
                    continue
                scores = torch.stack([0.7 * (q[i, head] @ k[j, head // 2]) for j in keys])
                expected = scores.softmax(0) @ torch.stack([v[j, head // 2] for j in keys])
                assert torch.allclose(out[i, head], expected, atol=1e-12), (i, head)


def compare_with_the_reference(heads, cases):
    rng = random.Random(heads[0])
    for case in range(cases):
        layout = random_layout(rng)
        dim, scale = rng.choice([16, 32, 80]), rng.choice([None, 0.05])
        q, k, v = inputs(layout, heads, dim, case, grad=True)
        g = torch.randn(q.shape, generator=torch.Generator().manual_seed(case))
        expected = condensed_attention(q, k, v, layout, scale=scale, impl="reference")
        wanted = torch.autograd.grad(expected, (q, k, v), g)
        out = condensed_attention(q, k, v, layout, scale=scale, impl="sdpa")
        got = torch.autograd.grad(out, (q, k, v), g)
        pairs = zip((out, *got), (expected, *wanted), strict=True)
        for name, (a, b) in zip(("out", "dq", "dk", "dv"), pairs, strict=True):
            error = max((a - b).abs().flatten().tolist(), default=0.0)
            assert error < 1e-5, f"{name}: {error:.1e} for {layout.bounds.tolist()}, D {dim}"


HEADS = [(1, 1), (4, 4), (6, 2), (4, 1)]


@pytest.mark.parametrize("heads", HEADS)
def test_sdpa_equals_the_reference_forward_and_backward(heads):
    compare_with_the_reference(heads, 15)


@pytest.mark.full
@pytest.mark.parametrize("heads", HEADS)
def test_sdpa_equals_the_reference_on_many_layouts(heads):
    compare_with_the_reference(heads, 150)


def test_gradcheck_of_both_paths_in_double():
    layout = CondensedLayout.from_lengths([3, 0, 2], [2, 1, 0], 1, num_rows=13)
    for impl in ("reference", "sdpa"):
        tensors = inputs(layout, (2, 1), 4, 0, torch.float64, grad=True)
        assert torch.autograd.gradcheck(
            lambda q, k, v, impl=impl: condensed_attention(q, k, v, layout, impl=impl), tensors
        )


def test_low_precision_is_as_good_as_its_inputs():
    layout = CondensedLayout.from_lengths([20, 7], [9, 30], 4)
    q, k, v = inputs(layout, (4, 2), 32, 0)
    exact = condensed_attention(q, k, v, layout, impl="reference")
    for dtype, bound in ((torch.bfloat16, 3e-2), (torch.float16, 4e-3)):
        low = [t.to(dtype) for t in (q, k, v)]
        for impl in ("reference", "sdpa"):
            out = condensed_attention(*low, layout, impl=impl)
            assert out.dtype == dtype
            assert (out.float() - exact).abs().max() < bound


def test_strides_of_a_model_are_taken():
    layout = CondensedLayout.from_lengths([9], [4], 2)
    q, k, v = (torch.randn(1, h, 15, 16).transpose(1, 2)[0] for h in (4, 2, 2))
    assert not q.is_contiguous()
    out = condensed_attention(q, k, v, layout)
    expected = condensed_attention(q.contiguous(), k, v, layout, impl="reference")
    assert torch.allclose(out, expected, atol=1e-5)


def test_nan_in_a_key_reaches_only_the_rows_that_see_it():
    layout = CondensedLayout.from_lengths([6, 5], [4, 3], 2)
    q, k, v = inputs(layout, (2, 2), 16, 0)
    k[2] = torch.nan  # a source key of the first sequence
    for impl in ("reference", "sdpa"):
        touched = condensed_attention(q, k, v, layout, impl=impl).isnan().flatten(1).any(1)
        assert touched.nonzero().flatten().tolist() == list(range(2, 8))


def test_nan_in_a_value_or_a_gradient_stays_in_its_sequence():
    layout = CondensedLayout.from_lengths([6, 5, 3], [4, 3, 2], 2)
    second = set(range(12, 22))
    for poisoned in range(4):
        q, k, v = inputs(layout, (2, 2), 16, 0)
        g = torch.ones_like(q)
        (q, k, v, g)[poisoned][12] = torch.nan
        q, k, v = (t.requires_grad_() for t in (q, k, v))
        out = condensed_attention(q, k, v, layout)
        for tensor in (out, *torch.autograd.grad(out, (q, k, v), g)):
            assert set(tensor.isnan().flatten(1).any(1).nonzero().flatten().tolist()) <= second


def test_an_empty_batch_gives_an_empty_result():
    layout = CondensedLayout.from_lengths([], [], 4)
    q = torch.empty(0, 2, 16)
    assert condensed_attention(q, q, q, layout).shape == (0, 2, 16)


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
@pytest.mark.parametrize("sequences", [0, 2])
def test_rows_of_no_sequence_alone_have_gradients_of_0(impl, sequences):
    layout = CondensedLayout.from_lengths([0] * sequences, [0] * sequences, 0, num_rows=7)
    q, k, v = (t.requires_grad_() for t in inputs(layout, (4, 2), 16, 0))
    out = condensed_attention(q, k, v, layout, impl=impl)
    for tensor in (out, *torch.autograd.grad(out.sum(), (q, k, v))):
        assert tensor.shape[0] == 7 and not tensor.any()


LAYOUT = CondensedLayout.from_lengths([3], [1], 1)
Q = torch.zeros(5, 4, 8)


@pytest.mark.parametrize(
    ("q", "k", "v", "error", "message"),
    [
        (Q[0], Q, Q, ValueError, "q has shape"),
        (Q, Q[:, :3], Q[:, :3], ValueError, "k has 3 heads, which does not divide q's 4"),
        (Q, Q[:4], Q[:4], ValueError, "k has shape"),
        (Q, Q, Q[:, :2], ValueError, "v has shape"),
        (Q[:4], Q[:4], Q[:4], ValueError, "layout has 5 rows, q has 4"),
        (Q, Q.double(), Q, TypeError, "k is torch.float64, q is torch.float32"),
        (Q.long(), Q.long(), Q.long(), TypeError, "q is torch.int64"),
        (Q, Q.to("meta"), Q, TypeError, "k is on meta, q on cpu"),
        (Q, torch.zeros(5, 4, 16)[..., ::2], Q, ValueError, "k has stride 2"),
    ],
)
def test_bad_input_is_refused(q, k, v, error, message):
    with pytest.raises(error, match=message):
        condensed_attention(q, k, v, LAYOUT)


def test_a_layout_of_another_type_is_refused():
    with pytest.raises(TypeError, match=r"layout is <class 'list'>, expected a CondensedLayout"):
        condensed_attention(Q, Q, Q, [3, 1])  # lengths, as a first try might pass them


def test_implementations_that_cannot_run_are_refused(monkeypatch):
    with pytest.raises(RuntimeError, match="impl='triton' cannot run: q has head dim 8, its"):
        condensed_attention(Q, Q, Q, LAYOUT, impl="triton")
    wide = torch.zeros(5, 4, 16)
    with pytest.raises(RuntimeError, match="the tensors are on cpu; it needs CUDA, or TRITON_INT"):
        condensed_attention(wide, wide, wide, LAYOUT, impl="triton")
    monkeypatch.setitem(launch.INSTALLED, "triton", False)
    with pytest.raises(RuntimeError, match="triton is not installed"):
        condensed_attention(wide, wide, wide, LAYOUT, impl="triton")
    with pytest.raises(RuntimeError, match=r"q is torch.float32 on cpu; it needs CUDA, and fp16"):
        condensed_attention(Q, Q, Q, LAYOUT, impl="varlen")
    monkeypatch.setitem(launch.INSTALLED, "xformers", False)
    with pytest.raises(RuntimeError, match=r"the extra is btok\[xformers\]"):
        condensed_attention(Q, Q, Q, LAYOUT, impl="xformers")
    monkeypatch.setitem(launch.INSTALLED, "xformers", True)
    with pytest.raises(RuntimeError, match="q is on cpu; it needs CUDA"):
        condensed_attention(Q, Q, Q, LAYOUT, impl="xformers")
    with pytest.raises(ValueError, match="impl is 'flash', expected one of"):
        condensed_attention(Q, Q, Q, LAYOUT, impl="flash")


def test_what_32_bits_cannot_count_is_refused():
    def meta(rows, heads, *strides):
        return torch.empty_strided((rows, heads, 16), (*strides, 1), device="meta")

    near = meta(5, 2, 32, 16)
    reason = "q has 268435456 rows of 8 heads, 2^31 or more in all; pack fewer"
    many = meta(1 << 28, 8, 128, 16)
    assert module._no_triton(many, many, many) == reason
    far_rows, far_heads = meta(5, 2, 1 << 24, 16), meta(5, 2, 32, 1 << 31)
    for far, strides in ((far_rows, "[16777216, 16, 1]"), (far_heads, "[32, 2147483648, 1]")):
        for name, place in (("q", 0), ("k", 1), ("v", 2)):
            tensors = [near, near, near]
            tensors[place] = far
            reason = module._no_triton(*tensors)
            assert reason and reason.startswith(f"{name} has strides {strides}; 128 rows and"), far
    # offsets of rows and key heads are int64: neither a long pack nor far heads are refused for it
    for fine in (meta(1 << 26, 2, 64, 16), meta(5, 2, 16, 1 << 30)):
        assert "strides" not in (module._no_triton(fine, fine, fine) or "")


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_a_scale_of_zero_averages_what_a_row_sees(impl):
    layout = CondensedLayout.from_lengths([3, 2], [2, 0], 1)
    q, k, v = inputs(layout, (2, 1), 16, 0)
    allowed = allowed_by_loops(layout).float()
    mean = torch.einsum("ij,jhd->ihd", allowed / allowed.sum(1, keepdim=True), v)
    out = condensed_attention(q, k, v, layout, scale=0.0, impl=impl)
    assert torch.allclose(out, mean.expand_as(out), atol=1e-6)


@pytest.mark.parametrize("scale", [-1.0, float("inf"), float("nan")])
def test_a_scale_that_is_none_is_refused(scale):
    with pytest.raises(ValueError, match=f"scale is {scale}, expected a finite number"):
        condensed_attention(Q, Q, Q, LAYOUT, scale=scale)


class Bias:
    """What xformers' mask means: causal in blocks, counted from the bottom right."""

    def __init__(self, q_lens, k_lens):
        assert min(q_lens) > 0
        self.q_lens, self.k_lens = q_lens, k_lens

    from_seqlens = classmethod(lambda cls, q_lens, k_lens: cls(q_lens, k_lens))

    def materialize(self, shape):
        sees = torch.zeros(shape, dtype=torch.bool)
        i, j = 0, 0
        for rows, keys in zip(self.q_lens, self.k_lens, strict=True):
            sees[i : i + rows, j : j + keys] = torch.ones(rows, keys).tril(keys - rows).bool()
            i, j = i + rows, j + keys
        assert (i, j) == tuple(shape)
        return sees


def stand_in_of_xformers(monkeypatch, grouped):
    def attend(q, k, v, attn_bias, scale):
        assert q.shape[2] == k.shape[2]
        sees = attn_bias.materialize((q.shape[1], k.shape[1]))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, sees, scale=scale).transpose(1, 2)

    biases = types.SimpleNamespace(BlockDiagonalCausalFromBottomRightMask=Bias)
    ops = types.SimpleNamespace(memory_efficient_attention=attend)
    parents = {name: types.ModuleType(name) for name in ("xformers", "xformers.ops.fmha")}
    modules = {"xformers.ops": ops, "xformers.ops.fmha.attn_bias": biases, **parents}
    for name, stand_in in modules.items():
        monkeypatch.setitem(sys.modules, name, stand_in)


def stand_in_of_varlen(monkeypatch, grouped):
    from torch.nn.attention import varlen

    def attend(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size, enable_gqa=False):
        assert window_size == (-1, 0) and cu_q.dtype == cu_k.dtype == torch.int32
        assert (enable_gqa, q.shape[1] == k.shape[1]) == (grouped, not grouped)
        lens = [ends.diff().tolist() for ends in (cu_q, cu_k)]
        assert [max(x) for x in lens] == [max_q, max_k]
        sees = Bias(*lens).materialize((len(q), len(k)))
        q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, sees, scale=scale, enable_gqa=enable_gqa)
        return out[0].transpose(0, 1)

    def older(q, k, v, cu_q, cu_k, max_q, max_k, *, scale, window_size):
        return attend(q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window_size)

    monkeypatch.setattr(varlen, "varlen_attn", attend if grouped else older)


@pytest.mark.parametrize(
    ("path", "stand_in", "grouped"),
    [
        (module._xformers, stand_in_of_xformers, False),
        (module._varlen, stand_in_of_varlen, True),
        (module._varlen, stand_in_of_varlen, False),
    ],
)
def test_two_calls_equal_the_reference(path, stand_in, grouped, monkeypatch):
    """On the CPU, with a stand-in for the kernels, which need CUDA."""
    stand_in(monkeypatch, grouped)
    rng = random.Random(0)
    plain = CondensedLayout.from_lengths([5, 1, 9], [0, 0, 0], 0)  # of one call, nothing gathered
    for case, layout in enumerate([plain, *(random_layout(rng) for _ in range(30))]):
        tensors = inputs(layout, (4, 2), 16, case, grad=True)
        wanted = condensed_attention(*tensors, layout, impl="reference")
        got = path(*tensors, layout, 0.25)
        pairs = [(got, wanted)]
        g = torch.randn(got.shape, generator=torch.Generator().manual_seed(case))
        pairs += zip(*(torch.autograd.grad(t, tensors, g) for t in (got, wanted)), strict=True)
        for a, b in pairs:
            assert (a - b).abs().max() < 1e-5, layout.bounds.tolist()


def test_no_allocation_grows_as_rows_squared():
    largest = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, torch.Tensor):
                    largest[rows] = max(largest.get(rows, 0), t.untyped_storage().nbytes())
            return out

    for rows in (500, 2000):
        layout = CondensedLayout.from_lengths([rows - 54], [50], 4)
        tensors = inputs(layout, (2, 1), 16, 0, grad=True)
        with Watch():
            condensed_attention(*tensors, layout, impl="sdpa").sum().backward()
    assert largest[2000] < 6 * largest[500]


def test_auto_says_once_what_it_took(caplog):
    launch._announced.clear()
    with caplog.at_level(logging.INFO, logger="btok_kernels"):
        condensed_attention(Q, Q, Q, LAYOUT)
        condensed_attention(Q, Q, Q, LAYOUT)
    assert [r.message for r in caplog.records] == ["condensed_attention: impl 'auto' takes 'sdpa'"]


def test_a_sequences_bits_do_not_depend_on_what_is_packed_with_it():
    """So that an index brought up to date holds the vectors of one made anew."""
    g = torch.Generator().manual_seed(0)
    lengths = [5, 70, 71, 530, 600]
    q, k, v = (torch.randn(sum(lengths), 2, 16, generator=g) for _ in range(3))
    layout = CondensedLayout.from_lengths([n - 4 for n in lengths], [0] * 5, 4)
    together = condensed_attention(q, k, v, layout, impl="sdpa").split(lengths)
    for n, *parts, out in zip(
        lengths, *(t.split(lengths) for t in (q, k, v)), together, strict=True
    ):
        alone = CondensedLayout.from_lengths([n - 4], [0], 4)
        assert torch.equal(condensed_attention(*parts, alone, impl="sdpa"), out), n
