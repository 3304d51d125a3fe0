"""The compiled kernels of condensed attention for Hopper, executed, warpgroup by warpgroup.

With triton 3.9 or newer alone: `make hopper` runs this beside the environment's own.
"""

from __future__ import annotations

import itertools
import logging
import random

import pytest
import torch
from torch import Tensor

from btok_kernels import launch

if launch.interpreted():
    pytest.skip("Triton compiles nothing under TRITON_INTERPRET=1", allow_module_level=True)
if reason := launch.no_gluon():
    pytest.skip(reason, allow_module_level=True)

from btok_kernels import condensed_attention_hopper as forward
from btok_kernels import hopper_backward as backward
from btok_kernels import start
from btok_kernels.condensed_attention import condensed_attention
from btok_kernels.layout import CondensedLayout
from tests.compiled import aot
from tests.compiled.cases import LAYOUTS, attention, random_layout
from tests.compiled.conftest import PROPERTY
from tests.compiled.device import device
from tests.compiled.driver import Target, standing_in

BF16, FP16 = torch.bfloat16, torch.float16
KERNELS = ("forward", "dq", "dkdv")
FIRST_SEARCHED = [(64, 11), (128, 0)]  # in `make hopper`
HEADS = [(6, 1), (2, 2), (2, 1), (1, 1), (4, 2)]


def check(record, dtype, dim, heads, layout, seed, **options):
    errors = attention(90, dtype, dim, heads, layout, seed=seed, impl="hopper", **options)
    record(PROPERTY, [90, str(dtype)[6:], {f"hopper {name}": x for name, x in errors.items()}])
    assert max(errors.values()) <= 1, errors


def full_from(count, values):
    """The first ones in `make hopper`, the others where `full` is asked for."""
    return [pytest.param(x, marks=[pytest.mark.full] * (i >= count)) for i, x in enumerate(values)]


@pytest.mark.parametrize("name", full_from(0, LAYOUTS))
def test_every_layout(record_property, name):
    seed = list(LAYOUTS).index(name)
    dtype, dim = (BF16, FP16)[seed % 2], (128, 64, 128, 80, 96)[seed % 5]
    check(record_property, dtype, dim, HEADS[seed % len(HEADS)], LAYOUTS[name], seed)


@pytest.mark.parametrize(
    ("dtype", "dim", "heads", "name"),
    [
        (BF16, 128, (6, 1), "tail"),
        (FP16, 64, (3, 1), "budgets"),
        (BF16, 80, (2, 2), "K = 0"),
        (BF16, 64, (7, 1), "tail"),  # packed rows that a block of rows is no multiple of
        pytest.param(FP16, 128, (5, 1), "budgets", marks=pytest.mark.full),
        pytest.param(BF16, 96, (14, 2), "ragged", marks=pytest.mark.full),
    ],
    ids=str,
)
def test_kernels(record_property, dtype, dim, heads, name):
    check(record_property, dtype, dim, heads, LAYOUTS[name], dim)


@pytest.mark.parametrize("seed", full_from(4, range(32)))
def test_random_layouts(record_property, seed):
    """The order in which warpgroups go on and copies arrive comes of the seed too."""
    rng = random.Random(seed)
    dtype, dim = rng.choice([BF16, FP16]), rng.choice([64, 80, 96, 128, 128])
    check(record_property, dtype, dim, rng.choice(HEADS), random_layout(rng), seed)


@pytest.fixture
def compiled_anew():
    """The kernels, of which nothing is kept that was compiled before, or within."""
    kernels = (forward._forward_kernel, backward._dq_kernel, backward._dkdv_kernel)
    for kernel in kernels:
        kernel.device_caches.clear()
    yield kernels
    for kernel in kernels:
        kernel.device_caches.clear()


def searched():
    """By head dim and number: a candidate of each kernel, all of them at least once. 80, 96 and 128
    run the same code but for a mask of columns."""
    for padded in (64, 128):
        for i in range(max(len(launch.hopper_candidates(kernel, padded)) for kernel in KERNELS)):
            yield padded if padded == 64 else (128, 80, 96)[i % 3], i


@pytest.mark.parametrize(
    ("dim", "number"),
    [pytest.param(*x, marks=[pytest.mark.full] * (x not in FIRST_SEARCHED)) for x in searched()],
)
def test_launches_of_a_search(record_property, monkeypatch, dim, number):
    """Whatever BTOK_AUTOTUNE=1 may launch, over keys enough that all places are used again."""
    for kernel in KERNELS:
        candidates = launch.hopper_candidates(kernel, dim)
        monkeypatch.setitem(launch.HOPPER, kernel, candidates[number % len(candidates)])
    layout = CondensedLayout.from_lengths([560], [70], 4)
    check(record_property, (BF16, FP16)[number % 2], dim, (2, 1), layout, number)


@pytest.mark.full
@pytest.mark.parametrize("dim", [64, 128])
def test_launches_of_a_search_are_sound(compiled_anew, monkeypatch, dim):
    """As `make aot` has it of those that are launched without one, and they fit."""
    candidates = [launch.hopper_candidates(kernel, dim) for kernel in KERNELS]
    for configs in itertools.zip_longest(*candidates):
        for kernel, config in zip(KERNELS, configs, strict=True):
            monkeypatch.setitem(launch.HOPPER, kernel, config or launch.HOPPER[kernel])
        rows = aot.compile_job(aot.Job("hopper", 90, dim, "bfloat16", "G6 hopper"))
        assert not aot.problems(rows)
        for row in rows:
            room = launch.hopper_shared(row.kernel, dim, launch.HOPPER[row.kernel])
            assert room - 256 <= row.shared <= room


def of_one_size(rng, budgets):
    """Layouts whose tiles can be copied to where those of another lie."""
    while True:
        source, target = ([rng.choice([0, 1, rng.randrange(90)]) for _ in range(3)] for _ in "xy")
        yield CondensedLayout.from_lengths(
            source, target, 8, rng.random() < 0.75, num_rows=570, max_sequences=3,
            budgets=[rng.randrange(9) for _ in source] if budgets else None,
        )  # fmt: skip


@pytest.mark.parametrize("seed", full_from(1, range(8)))
def test_launches_made_again_serve_other_layouts(record_property, seed):
    """As a captured CUDA graph makes them: the same code, grids, pointers and tensor maps."""
    rng = random.Random(seed)
    first, *others = itertools.islice(of_one_size(rng, budgets=seed % 2 > 0), 3)
    dtype, dim = (BF16, FP16)[seed // 2 % 2], (64, 128, 80, 96)[seed // 2]
    check(record_property, dtype, dim, rng.choice(HEADS), first, seed, replayed=others)


def test_tiles_of_another_shape_are_refused():
    """Those of budgets have two columns more: a graph is captured with budgets or without."""
    rng = random.Random(0)
    plain, other = next(of_one_size(rng, False)), next(of_one_size(rng, True))
    with pytest.raises(RuntimeError, match="must match the size"):
        plain.tiles.copy_(other.tiles)
    with pytest.raises(RuntimeError, match="must match the size"):
        other.tiles.copy_(plain.tiles)


def test_a_search_of_the_default_times_both_kinds_of_kernels(monkeypatch, capsys, caplog):
    """On a call's own tensors: their launches, then they themselves, of which the faster is run."""

    def do_bench(call, return_mode):
        call()
        (tried,) = call.args
        return {"triton": 2.0, "hopper": 1.0}[tried] if isinstance(tried, str) else -tried.stages

    def candidates(kernel, dim):
        many = (3, 9) if kernel == "forward" else (3,)
        return [launch.HOPPER[kernel]._replace(stages=stages) for stages in many]

    layout = CondensedLayout.from_lengths([30], [9], 4)
    inputs = [torch.randn(layout.num_rows, heads, 64).to(BF16) for heads in (2, 1, 1, 2)]
    plain = {
        ("attention", kernel, 90, 64, BF16): launch.attention_config(kernel, 64, BF16, 90)
        for kernel in KERNELS
    }
    monkeypatch.setenv("BTOK_AUTOTUNE", "1")
    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    monkeypatch.setattr(launch, "hopper_candidates", candidates)
    monkeypatch.setattr(launch, "found", dict(plain))
    caplog.set_level(logging.DEBUG, "btok_kernels")
    with device(90, seed=1) as here:
        got = differentiated(*inputs, layout, impl="auto")
        # a plain one, two trials, then as a default and at last
        assert here.launched == {
            "_forward_kernel": 1 + 2 + 1 + 1,
            "_delta_kernel": 1,
            "_dq_kernel": 1 + 2 + 1 + 1,
            "_dkdv_kernel": 1 + 2 + 1 + 1,
        }
    wanted = differentiated(*(x.double() for x in inputs), layout, impl="reference")
    for x, y in zip(got, wanted, strict=True):
        assert (x - y).abs().max() < 0.02 * y.abs().max()
    kind = "impl of attention", "forward and backward", 90, 64, BF16
    assert launch.found.pop(kind) == "hopper"
    for kernel in KERNELS:
        assert launch.found.pop(("hopper attention", kernel, 90, 64, BF16)).stages == 3
    assert launch.found == plain
    printed = capsys.readouterr().out
    assert "impl of attention ('forward and backward', 90, 64, torch.bfloat16): " in printed
    (said,) = [message for message in caplog.messages if "shared memory" in message]
    assert said.startswith("hopper attention ('forward', 90, 64, torch.bfloat16): HopperConfig(")


class Down(Target):
    """Takes down what is launched: the code's hash, the grid, what is known of the arguments."""

    def __init__(self) -> None:
        super().__init__(90)
        self.taken: list[tuple] = []

    def launcher_cls(self, source, metadata):
        def run(x, y, z, stream, function, packed, about, enter, leave, *arguments):
            given = [(a.dtype, a.stride()) if isinstance(a, Tensor) else a for a in arguments]
            self.taken.append((metadata.hash, (x, y, z), given))

        return run


def test_what_is_started_is_what_triton_itself_would_launch(compiled_anew, monkeypatch):
    """With tensors of another dtype, more places for copies, keys of a budget in between."""
    plain = []
    for kernel in compiled_anew:

        def run(*arguments, kernel=kernel, **options):
            plain.append(kernel)
            return type(kernel).run(kernel, *arguments, **options)

        monkeypatch.setattr(kernel, "run", run)

    def attend(q, k, v, layout, stages, both):
        config = launch.HOPPER["forward"]._replace(stages=stages)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(launch.HOPPER, "forward", config)
            out, lse = forward.forward(q, k, v, layout.tiles, 1.0)
        if both:
            backward.backward(q, q, k, v, out, lse, layout.tiles, 1.0)

    layout, budgets = LAYOUTS["tail"], LAYOUTS["budgets"]
    qkv = [torch.zeros(budgets.num_rows, heads, 64).to(BF16) for heads in (4, 2, 2)]
    less = [x[: layout.num_rows] for x in qkv]
    calls = [
        (*less, layout, 2, True),
        (*(x.to(FP16) for x in less), layout, 2, False),
        (*less, layout, 3, False),
        (*qkv, budgets, 2, False),
    ]
    with standing_in(90, lambda arch: Down()) as device:
        for call in 2 * calls:
            attend(*call)
        assert len(plain) == len({code for code, *_ in device.taken}) == 6
        monkeypatch.setattr(start, "KNOWN", False)
        for call in calls:
            attend(*call)
        first, again, wanted = (device.taken[i : i + 6] for i in (0, 6, 12))
        assert first == again == wanted and len(plain) == 12


def test_a_scale_of_zero_gives_the_mean_of_what_is_seen(record_property):
    check(record_property, BF16, 64, (2, 1), LAYOUTS["tail"], 1, scale=0.0)


def differentiated(q, k, v, d_out, layout, impl="hopper"):
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = condensed_attention(*leaves, layout, impl=impl)
    return out.detach(), *torch.autograd.grad(out, leaves, d_out)


def test_nan_of_one_sequence_stays_there():
    """Of the rows behind, of those before, and of the keys that a budget leaves out."""
    layout = LAYOUTS["budgets"]
    inputs = [torch.randn(layout.num_rows, heads, 64).to(BF16) for heads in (2, 1, 1, 2)]
    start, _, _, _, end = layout.sequences()[1]
    with device(90, seed=1):
        clean = differentiated(*inputs, layout)
        for x in inputs:
            x[start:end] = torch.nan
        for got, before in zip(differentiated(*inputs, layout), clean, strict=True):
            assert torch.equal(got[:start], before[:start])
            assert torch.equal(got[end:], before[end:])
            assert got[start:end].isnan().all()


def test_the_order_of_events_changes_no_bit():
    layout = LAYOUTS["long"]
    inputs = [torch.randn(layout.num_rows, heads, 64).to(BF16) for heads in (3, 1, 1, 3)]
    found = []
    for seed in range(3):
        with device(90, seed=seed):
            found.append(differentiated(*inputs, layout))
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


def odd_gradient(how, folder):
    """[T, 32, 64] that TMA cannot take, or that offsets of int32 do not reach, or of a single row,
    which counts as contiguous whatever its stride."""
    if how == "address":
        return torch.empty(8 * 32 * 64 + 1, dtype=BF16)[1:].view(8, 32, 64)
    if how == "one row":
        return torch.empty(32 * 64, dtype=BF16).as_strided((1, 32, 64), (1, 64, 1))
    size = 31 * 2**27 + 8 * 64
    (folder / "sparse").touch()  # so much memory need not be there
    far = torch.from_file(str(folder / "sparse"), shared=True, size=size, dtype=BF16)
    return far.as_strided((8, 32, 64), (64, 1 << 27, 1))


@pytest.mark.parametrize("how", ["address", "one row", "strides"])
def test_a_gradient_that_cannot_be_copied_as_it_lies_is_copied_first(tmp_path, how):
    odd, generator = odd_gradient(how, tmp_path), torch.Generator().manual_seed(0)
    rows = len(odd)
    layout = CondensedLayout.from_lengths([rows - rows // 4], [rows // 4], 0)
    q, k, v = (torch.randn(rows, n, 64, generator=generator).to(BF16) for n in (32, 1, 1))
    plain = torch.randn(odd.shape, generator=generator).to(BF16)
    with device(90, seed=1):
        want = differentiated(q, k, v, plain, layout)
        found = differentiated(q, k, v, odd.copy_(plain), layout)
    for one, other in zip(want, found, strict=True):
        assert torch.equal(one, other)
