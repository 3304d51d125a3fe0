"""The Triton kernels of condensed attention: on CUDA, or under Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib
import itertools
import math
import random
from itertools import pairwise

import pytest
import torch
import torch._dynamo.testing
from torch.utils.checkpoint import checkpoint

from btok.kernels import CondensedLayout, condensed_attention
from btok_kernels import launch
from btok_kernels.layout import TILE
from tests.test_layout import allowed_by_loops

CUDA = torch.cuda.is_available() and not launch.interpreted()
if not (CUDA or launch.interpreted()):
    pytest.skip("needs CUDA, or TRITON_INTERPRET=1", allow_module_level=True)
module = importlib.import_module("btok_kernels.condensed_attention_triton")

DEVICE = torch.device("cuda" if CUDA else "cpu")
# the interpreter computes bfloat16 wrong
DTYPES = [torch.float32, torch.float16, *[torch.bfloat16] * CUDA]
BLOCKS = [(16, 16), (32, 16), (16, 32), (64, 32)]
HEADS = [(1, 1), (2, 2), (3, 1), (4, 2), (6, 1)]
GUARD, CANARY = 512, 12345.0
NAMES = ("out", "lse", "dq", "dk", "dv")


@pytest.fixture
def blocks(monkeypatch):
    """Sets the blocks of all kernels; on CUDA they stay what ships."""

    def use(block_m, block_n):
        config = launch.Config(block_m, block_n, 4, 1)
        if not CUDA:
            monkeypatch.setattr(launch, "attention_config", lambda *_: config)

    return use


@pytest.fixture
def guarded(monkeypatch):
    """Outputs are NaN between canaries; call it to see that the canaries live."""
    buffers = []

    def empty(shape, *, dtype, device):
        size = torch.Size(shape).numel()
        buffer = torch.full((size + 2 * GUARD,), CANARY, dtype=dtype, device=device)
        buffer[GUARD : GUARD + size] = torch.nan
        buffers.append(buffer)
        return buffer[GUARD : GUARD + size].view(shape)

    def check():
        assert buffers, "nothing was allocated"
        for buffer in buffers:
            canary = torch.tensor(CANARY, dtype=buffer.dtype, device=buffer.device)
            assert (buffer[:GUARD] == canary).all() and (buffer[-GUARD:] == canary).all()

    def empty_like(tensor, *, memory_format):
        return empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)

    monkeypatch.setattr(module, "empty", empty)
    monkeypatch.setattr(module, "empty_like", empty_like)
    return check


def layout_of(rng, longest):
    """Up to four sequences, empty and one-token parts among them; K from 0 to 64; maybe a tail, and
    maybe a budget each."""
    count = rng.randrange(1, 5)
    source = [rng.choice([0, 1, rng.randrange(2, longest)]) for _ in range(count)]
    target = [rng.choice([0, 1, rng.randrange(2, longest)]) for _ in range(count)]
    btoks = rng.choice([0, 1, 4, rng.randrange(2, 9), 64 if count == 1 else 4])
    rows = sum(source) + sum(target) + count * btoks + rng.choice([0, 0, 0, 5, 140])
    budgets = [rng.randrange(btoks + 1) for _ in source] if rng.random() < 0.4 else None
    layout = CondensedLayout.from_lengths(
        source, target, btoks, condense=rng.random() < 0.75, num_rows=rows, budgets=budgets
    )
    return layout.to(DEVICE)


def strided(shape, dtype, generator, rng):
    """Random values whose rows and heads are apart in one of three ways."""
    rows, heads, dim = shape
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    way = rng.randrange(3)
    if way == 0:
        tensor = torch.empty(rows, heads, dim, dtype=dtype, device=DEVICE)
    elif way == 1:  # as a model has them
        tensor = torch.empty(heads, rows, dim, dtype=dtype, device=DEVICE).transpose(0, 1)
    else:  # a part of a wider projection
        tensor = torch.empty(rows, heads + 2, dim + 16, dtype=dtype, device=DEVICE)
        tensor = tensor[:, 1:-1, 16:]
    return tensor.copy_(values)


def results(impl, q, k, v, d_out, layout, scale):
    """Output and the three gradients."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = condensed_attention(*leaves, layout, scale=scale, impl=impl)
    return (out.detach(), *torch.autograd.grad(out, leaves, d_out.to(out.dtype)))


def by_rows(statistics):
    """[T, Hq] of what the kernels keep as [Hkv, T, G]."""
    return statistics.permute(1, 0, 2).flatten(1)


def lse_of(q, k, layout, scale):
    """Natural log-sum-exp of the scores, [T, Hq]; -inf for rows that see nothing."""
    sees = allowed_by_loops(layout).to(q.device)
    scores = torch.einsum("ihd,jhd->ihj", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1))
    return (scores * scale).masked_fill(~sees[:, None], -torch.inf).logsumexp(-1)


def compare(rng, seed, blocks, guarded, longest=32):
    """The largest error over its budget of a random case."""
    layout = layout_of(rng, longest)
    heads, key_heads = rng.choice(HEADS)
    dim, dtype = rng.choice([16, 16, 32, 64, 80, 96, 128, 256]), rng.choice(DTYPES)
    scale = rng.choice([dim**-0.5, 0.3])
    block = rng.choice(BLOCKS)
    blocks(*block)
    generator = torch.Generator().manual_seed(seed)
    q, d_out = (strided((layout.num_rows, heads, dim), dtype, generator, rng) for _ in range(2))
    k, v = (strided((layout.num_rows, key_heads, dim), dtype, generator, rng) for _ in range(2))

    exact = results("reference", *(t.double() for t in (q, k, v, d_out)), layout, scale)
    low = results("sdpa", q, k, v, d_out, layout, scale)
    got = results("triton", q, k, v, d_out, layout, scale)
    lse = by_rows(module._forward(q, k, v, layout.tiles, scale)[1]) * math.log(2)
    guarded()
    lses = (
        lse_of(q.double(), k.double(), layout, scale),
        lse_of(q.float(), k.float(), layout, scale),
    )
    assert torch.equal(lse == -torch.inf, lses[0] == -torch.inf), "rows that see nothing"
    lses = (t.masked_fill(t == -torch.inf, 0.0) for t in (*lses, lse))
    exact, low, got = ((r[0], t, *r[1:]) for r, t in zip((exact, low, got), lses, strict=True))
    worst = 0.0
    for name, truth, rounded, result in zip(NAMES, exact, low, got, strict=True):
        error = (result.double() - truth).abs()
        if not error.numel():
            continue
        # a step of the dtype, and fp32's noise where the truth is a difference that cancels
        step = torch.finfo(torch.float32 if name == "lse" else dtype).eps * truth.abs().amax()
        budget = 2 * (rounded.double() - truth).abs().amax() + step + 1e-5
        ratio = (error.amax() / budget).item()
        where = torch.unravel_index(error.argmax(), error.shape)
        assert ratio <= 1, (
            f"{name}: {ratio:.2f} of its budget at {[int(i) for i in where]}; "
            f"{layout.bounds.tolist()} of {layout.num_rows} rows, heads {heads, key_heads}, "
            f"D {dim}, {dtype}, blocks {block}, scale {scale}, seed {seed}"
        )
        worst = max(worst, ratio)
    return worst


@pytest.mark.parametrize(
    "part", [*range(2), *(pytest.param(n, marks=pytest.mark.full) for n in range(2, 6))]
)
def test_random_layouts(part, blocks, guarded, record_property):
    rng = random.Random(part)
    worst = max(compare(rng, seed, blocks, guarded) for seed in range(10))
    record_property("worst", worst)
    print(f"worst error {worst:.2f} of its budget")


@pytest.mark.full
@pytest.mark.parametrize("part", range(44))
def test_many_random_layouts(part, blocks, guarded):
    rng = random.Random(100 + part)
    longest = 300 if CUDA else rng.choice([32, 32, 32, 160])
    worst = max(compare(rng, seed, blocks, guarded, longest) for seed in range(10))
    print(f"worst error {worst:.2f} of its budget")


def inputs(layout, heads=(4, 2), dim=16, dtype=torch.float32, seed=0):
    """q, k, v and dO."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(layout.num_rows, h, dim, generator=generator).to(DEVICE, dtype)
        for h in (*heads, heads[1], heads[0])
    )


def rows_blocks(layout, allowed, groups, block_m, block_n):
    """Blocks of packed rows times keys with a pair that the mask allows, by plain loops."""
    visited = 0
    for start, first, last, border, end in layout.sequences():
        apart = last < border  # its range of bottleneck keys is blocks of their own
        for begin, stop, key in ((start, border, start), (border, end, border if apart else first)):
            for tile in range(begin, stop, TILE):
                packed = [row for row in range(tile, min(tile + TILE, stop)) for _ in range(groups)]
                for at in range(0, len(packed), block_m):
                    seen = allowed[packed[at : at + block_m]].any(0).nonzero().flatten().tolist()
                    visited += len({(j - key) // block_n for j in seen if j >= key})
                    visited += len({(j - first) // block_n for j in seen if j < key})
    return visited


def keys_blocks(layout, allowed, groups, block_m, block_n):
    """The same for dK and dV, whose blocks of rows are counted from a block's first key."""
    visited = 0
    for start, first, last, border, end in layout.sequences():
        cuts = [start, first, *([last, border] if last < border else []), end]
        for begin, stop in pairwise(cuts):
            for tile in range(begin, stop, TILE):
                for key in range(tile, min(tile + TILE, stop), block_n):
                    keys = slice(key, min(key + block_n, tile + TILE, stop))
                    rows = allowed[:, keys].any(1).nonzero().flatten().tolist()
                    packed = [(i - key) * groups + g for i in rows for g in range(groups)]
                    visited += len({p // block_m for p in packed})
    return visited


@pytest.mark.skipif(CUDA, reason="counts the interpreter's matrix products")
def test_visited_blocks_are_those_with_an_allowed_pair(blocks, monkeypatch):
    from triton.runtime.interpreter import InterpreterBuilder

    count = 0
    create_dot = InterpreterBuilder.create_dot

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        return create_dot(*args, **kwargs)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counted)
    rng = random.Random(0)
    layouts = [layout_of(rng, 32) for _ in range(8)]
    layouts.append(CondensedLayout.from_lengths([150, 3], [131, 0], 4))
    layouts.append(CondensedLayout.from_lengths([0, 7], [140, 20], 0, condense=False, num_rows=180))
    layouts.append(CondensedLayout.from_lengths([9, 5], [150, 20], 70, budgets=[66, 3]))
    for layout in layouts:
        groups = rng.choice([1, 2, 3])
        block_m, block_n = rng.choice([(16, 16), (32, 16), (16, 32), (64, 64)])
        blocks(block_m, block_n)
        q, k, v, d_out = inputs(layout, (groups, 1))
        allowed = allowed_by_loops(layout)
        of_rows = rows_blocks(layout, allowed, groups, block_m, block_n)
        of_keys = keys_blocks(layout, allowed, groups, block_m, block_n)
        count = 0
        out, lse = module._forward(q, k, v, layout.tiles, 0.25)
        assert count == 2 * of_rows, layout.bounds.tolist()
        count = 0
        module._backward(d_out, q, k, v, out, lse, layout.tiles, 0.25)
        assert count == 4 * of_keys + 3 * of_rows, layout.bounds.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_on_every_run_and_in_every_packing(dtype):
    source, target = [21, 0, 131, 1], [9, 13, 8, 0]
    packed = CondensedLayout.from_lengths(source, target, 4, num_rows=204).to(DEVICE)
    tensors = inputs(packed, (2, 1), dtype=dtype)
    together = results("triton", *tensors, packed, 0.25)
    again = results("triton", *tensors, packed, 0.25)
    for a, b in zip(together, again, strict=True):
        assert torch.equal(a, b)
    for n, (start, _, _, end) in enumerate(packed.bounds.tolist()):
        alone = CondensedLayout.from_lengths([source[n]], [target[n]], 4).to(DEVICE)
        own = results("triton", *(t[start:end] for t in tensors), alone, 0.25)
        for a, b in zip(together, own, strict=True):
            assert torch.equal(a[start:end], b), f"sequence {n}"


def test_a_tile_writes_its_own_rows_alone(guarded):
    layout = CondensedLayout.from_lengths([30, 21], [9, 17], 4, num_rows=90).to(DEVICE)
    q, k, v, d_out = inputs(layout)
    out, lse = module._forward(q, k, v, layout.tiles, 0.25)
    for which, tile in itertools.product(range(2), range(layout.tiles.shape[1])):
        tiles = torch.zeros_like(layout.tiles)
        tiles[which, 0] = layout.tiles[which, tile]
        first, last = tiles[which, 0, :2].tolist()
        own = torch.zeros(layout.num_rows, dtype=torch.bool, device=DEVICE)
        own[first:last] = True
        part, part_lse = module._forward(q, k, v, tiles, 0.25)
        dq, dk, dv = module._backward(d_out, q, k, v, out, lse, tiles, 0.25)
        for tensor, by in ((part, 0), (by_rows(part_lse), 0), (dq, 0), (dk, 1), (dv, 1)):
            written = ~tensor.isnan().flatten(1)
            assert torch.equal(written.any(1), own & (by == which))
            assert torch.equal(written.all(1), own & (by == which))
    guarded()


@pytest.mark.parametrize("poisoned", ["q", "k", "v", "d_out"])
def test_nan_reaches_what_sees_it_alone(poisoned):
    layout = CondensedLayout.from_lengths([9, 15, 3], [5, 22, 2], 4).to(DEVICE)
    allowed = allowed_by_loops(layout)
    start, first, border, end = layout.bounds[1].tolist()
    for row in (start + 2, first + 1, border, border + 3, end - 1):
        tensors = dict(zip(("q", "k", "v", "d_out"), inputs(layout, (2, 1)), strict=True))
        tensors[poisoned][row] = torch.nan
        got = results("triton", *tensors.values(), layout, 0.25)
        touched = [t.isnan().flatten(1).any(1).cpu() for t in got]
        seen_by, sees = allowed[:, row], allowed[row]  # rows that see `row`, keys that it sees
        self_only = torch.arange(layout.num_rows) == row
        sharing = allowed[seen_by].any(0)  # keys of a row that sees it
        if poisoned == "q":
            expected = (self_only, self_only, sees, sees)
        elif poisoned == "k":
            expected = (seen_by, seen_by, sharing, sharing)
        elif poisoned == "d_out":
            expected = (self_only & False, self_only, sees, sees)
        else:  # may spread to other rows of its blocks, never out of its sequence or row segment
            segment = torch.zeros(layout.num_rows, dtype=torch.bool)
            segment[slice(start, border) if row < border else slice(border, end)] = True
            inside = segment | seen_by
            assert (seen_by & ~touched[0]).sum() == 0
            assert (touched[0] & ~inside).sum() == 0
            own = torch.zeros(layout.num_rows, dtype=torch.bool)
            own[start:end] = True
            assert all((t & ~own).sum() == 0 for t in touched)
            continue
        for name, is_nan, should in zip(("out", "dq", "dk", "dv"), touched, expected, strict=True):
            assert torch.equal(is_nan, should), f"{name}, NaN in row {row} of {poisoned}"


def test_a_scale_of_zero_averages_what_a_row_sees():
    layout = CondensedLayout.from_lengths([19, 3], [14, 0], 2, num_rows=43).to(DEVICE)
    tensors = inputs(layout)
    out, dq, dk, dv = results("triton", *tensors, layout, 0.0)
    allowed = allowed_by_loops(layout).to(DEVICE, torch.float32)
    mean = allowed / allowed.sum(1, keepdim=True).clamp(min=1)
    groups = tensors[0].shape[1] // tensors[2].shape[1]
    wanted = torch.einsum("ij,jhd->ihd", mean, tensors[2].repeat_interleave(groups, 1))
    assert torch.allclose(out, wanted, atol=1e-5)
    d_out = tensors[3].unflatten(1, (-1, groups)).sum(2)
    assert torch.allclose(dv, torch.einsum("ij,ihd->jhd", mean, d_out), atol=1e-5)
    assert (dq == 0).all() and (dk == 0).all()


@pytest.mark.skipif(CUDA, reason="of offsets, which the interpreter computes alike")
@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("axis", ["rows", "heads"])
def test_offsets_beyond_32_bits(which, axis):
    """Rows or heads far apart; the memory between them is never touched."""
    rows_apart = axis == "rows"
    layout = CondensedLayout.from_lengths([130 if rows_apart else 4], [3], 2)
    tensors = [t.half() for t in inputs(layout, (1, 1) if rows_apart else (4, 4))]
    wanted = results("triton", *tensors, layout, 0.25)
    strides = ((1 << 24) - 64, 16, 1) if rows_apart else (16, 1 << 30, 1)
    size = sum((n - 1) * stride for n, stride in zip(tensors[0].shape, strides, strict=True)) + 1
    far = torch.empty(size, dtype=torch.float16).as_strided(tensors[0].shape, strides)
    tensors[which] = far.copy_(tensors[which])
    got = results("triton", *tensors, layout, 0.25)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


def test_strides_of_a_model_and_an_expanded_gradient():
    layout = CondensedLayout.from_lengths([19], [14], 2).to(DEVICE)
    q, k, v, _ = inputs(layout)
    leaves = [t.transpose(0, 1).contiguous().requires_grad_() for t in (q, k, v)]
    views = [t.transpose(0, 1) for t in leaves]
    got = torch.autograd.grad(condensed_attention(*views, layout, impl="triton").sum(), leaves)
    wanted = results("reference", q, k, v, torch.ones_like(q), layout, 0.25)[1:]
    for a, b in zip(got, wanted, strict=True):
        assert torch.allclose(a.transpose(0, 1), b, atol=1e-5)


def test_rows_of_no_sequence_give_zeros_and_empty_batches_nothing():
    bounds = torch.tensor([[3, 5, 7, 9], [12, 12, 14, 14]], dtype=torch.int32)
    layout = CondensedLayout(bounds, 150).to(DEVICE)
    tensors = inputs(layout)
    of_none = torch.ones(150, dtype=torch.bool, device=DEVICE)
    of_none[3:9] = of_none[12:14] = False
    for tensor in results("triton", *tensors, layout, 0.25):
        assert (tensor[of_none] == 0).all() and (tensor[~of_none] != 0).any(-1).any(-1).all()
    empty = CondensedLayout.from_lengths([], [], 4).to(DEVICE)
    assert condensed_attention(*(t[:0] for t in tensors[:3]), empty, impl="triton").numel() == 0


def test_opcheck():
    layout = CondensedLayout.from_lengths([9, 4], [5, 0], 2).to(DEVICE)
    q, k, v = (t.requires_grad_() for t in inputs(layout)[:3])
    torch.library.opcheck(module._op, (q, k, v, layout.tiles, 0.25))


def test_activation_checkpointing():
    layout = CondensedLayout.from_lengths([9, 4], [5, 0], 2).to(DEVICE)
    q, k, v, d_out = inputs(layout)
    wanted = results("triton", q, k, v, d_out, layout, None)[1:]
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out = checkpoint(
        lambda *leaves: condensed_attention(*leaves, layout, impl="triton"),
        *leaves,
        use_reentrant=False,
    )
    for a, b in zip(torch.autograd.grad(out, leaves, d_out), wanted, strict=True):
        assert torch.equal(a, b)


def test_ten_layouts_take_at_most_two_compiles():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def double(q, k, v, layout):
        return 2 * condensed_attention(q, k, v, layout, impl="triton")

    rng = random.Random(0)
    for _ in range(10):
        source, target = ([rng.randrange(0, 20) for _ in range(2)] for _ in range(2))
        layout = CondensedLayout.from_lengths(source, target, 3).to(DEVICE)
        q, k, v, d_out = inputs(layout, (2, 1))
        leaves = [t.requires_grad_() for t in (q, k, v)]
        got = torch.autograd.grad(double(*leaves, layout), leaves, d_out)
        wanted = results("triton", q, k, v, 2 * d_out, layout, None)[1:]
        for a, b in zip(got, wanted, strict=True):
            assert torch.equal(a, b)
    assert counter.frame_count <= 2


def padded_to_capacity():
    for source, target in (([30, 4], [11, 20]), ([50], [0]), ([3, 60, 5], [1, 0, 9])):
        yield CondensedLayout.from_lengths(source, target, 4, num_rows=150, max_sequences=4)


def test_tiles_of_one_capacity_can_be_copied_in_place():
    captured = CondensedLayout.from_lengths([70], [70], 4, num_rows=150, max_sequences=4).to(DEVICE)
    for layout in padded_to_capacity():
        layout = layout.to(DEVICE)
        tensors = inputs(layout)
        captured.tiles.copy_(layout.tiles)
        got = results("triton", *tensors, captured, 0.25)
        for a, b in zip(got, results("triton", *tensors, layout, 0.25), strict=True):
            assert torch.equal(a, b)


@pytest.mark.skipif(not CUDA, reason="CUDA graphs need CUDA")
@pytest.mark.parametrize("impl", ["triton", "hopper"])
def test_a_captured_cuda_graph_serves_other_layouts(impl):
    captured = CondensedLayout.from_lengths([70], [70], 4, num_rows=150, max_sequences=4).to(DEVICE)
    static = inputs(captured, dim=64, dtype=torch.bfloat16)
    if impl == "hopper" and (reason := launch.no_hopper(*static[:3])):
        pytest.skip(reason)

    def step():
        return results(impl, *static, captured, 0.25)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    for seed, layout in enumerate(padded_to_capacity()):
        layout = layout.to(DEVICE)
        fresh = inputs(layout, dim=64, dtype=torch.bfloat16, seed=seed)
        for a, b in zip(static, fresh, strict=True):
            a.copy_(b)
        captured.tiles.copy_(layout.tiles)
        graph.replay()
        for a, b in zip(outputs, results(impl, *fresh, layout, 0.25), strict=True):
            assert torch.equal(a, b)


def test_what_triton_cannot_run_is_refused():
    layout = CondensedLayout.from_lengths([9], [4], 2).to(DEVICE)
    q = torch.zeros(15, 2, 24, device=DEVICE)
    with pytest.raises(RuntimeError, match="q has head dim 24, its kernels take"):
        condensed_attention(q, q, q, layout, impl="triton")
    assert condensed_attention(q, q, q, layout).shape == q.shape  # auto goes elsewhere
    q = torch.zeros(15, 2, 16, device=DEVICE, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="no kernel for torch"):
        condensed_attention(q, q, q, layout, impl="triton")
    if not CUDA:
        with pytest.raises(RuntimeError, match="interpreter computes bfloat16 wrong"):
            condensed_attention(*(q.bfloat16(),) * 3, layout, impl="triton")
