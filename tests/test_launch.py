"""Launch configurations: there is one for every kernel, and BTOK_AUTOTUNE=1 finds the fastest."""

from __future__ import annotations

import contextlib
import itertools
import logging
import sys
import types

import pytest
import torch

from btok_kernels import launch
from btok_kernels.condensed_attention import HEAD_DIMS
from btok_kernels.layout import TILE, CondensedLayout


def test_every_kernel_has_a_configuration_whose_blocks_fit_the_tiles():
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    for kernel, dim, dtype, arch in itertools.product(
        ("forward", "dkdv", "dq"), HEAD_DIMS, dtypes, (0, *launch.FAMILY)
    ):
        config = launch.attention_config(kernel, dim, dtype, arch)
        assert TILE % config.block_m == 0 and TILE % config.block_n == 0
        if arch and dtype != torch.float32:
            own = config.block_m if kernel != "dkdv" else config.block_n
            shared = dim == 256 and launch.FAMILY[arch] in (80, 120)  # rows, that `make aot` counts
            assert shared or own >= 16 * config.warps, "warps would make the same products twice"
            assert config.stages >= 3, "fewer stages copy nothing ahead"


@pytest.fixture(autouse=True)
def unknown_devices():
    """What is kept of a device's architecture is of this test alone."""
    launch._capability.cache_clear()
    yield
    launch._capability.cache_clear()


@pytest.fixture
def timed(monkeypatch):
    """Stands in for Triton's timer: a call's time is what it returns, in milliseconds."""
    testing = types.SimpleNamespace(do_bench=lambda call, return_mode: call())
    monkeypatch.setitem(sys.modules, "triton.testing", testing)
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(testing=testing))


def test_the_search_keeps_the_fastest_that_runs(monkeypatch, capsys, timed):
    default = launch.Config(64, 64, 4, 2)
    ran = []

    def run(config):
        ran.append(config)
        if config.block_m == 128:
            raise RuntimeError("out of shared memory")
        return 1.0 + abs(config.block_n - 32) + config.warps + config.stages

    monkeypatch.setattr(launch, "architecture", lambda device: 90)
    monkeypatch.setattr(launch, "found", {})
    monkeypatch.setattr(launch, "attention_config", lambda *_: default)
    q = torch.zeros(4, 2, 64, dtype=torch.float16)
    launch.attention("forward", q, run)
    assert ran == [default], "without BTOK_AUTOTUNE nothing is searched"
    monkeypatch.setenv("BTOK_AUTOTUNE", "1")
    launch.attention("forward", q, run)
    fastest = launch.Config(32, 32, 4, 1)
    assert launch.found == {("attention", "forward", 90, 64, torch.float16): fastest}
    assert ran[-1] == fastest
    printed = capsys.readouterr().out
    assert str(fastest) in printed and str(default) in printed
    count = len(ran)
    launch.attention("forward", q, run)
    assert len(ran) == count + 1, "searched once"


@pytest.mark.parametrize("dim", launch.HOPPER_DIMS)
@pytest.mark.parametrize("kernel", launch.HOPPER)
def test_the_search_of_a_kernel_for_hopper_times_the_neighbours_that_fit(kernel, dim):
    candidates = launch.hopper_candidates(kernel, dim)
    config = launch.HOPPER[kernel]
    assert config in candidates and len(set(candidates)) == len(candidates) > 5
    for other in candidates:
        assert launch.hopper_shared(kernel, dim, other) <= 232448  # of a block on sm_90
        assert (other.block_m, other.block_n) in {
            (config.block_m, config.block_n),
            (config.block_m // 2, 128) if kernel == "dkdv" else (128, config.block_n // 2),
        }
        assert other.registers == config.registers and 2 <= other.stages <= 4
    turns = {other.ping_pong for other in candidates}
    assert turns == ({False, True} if kernel == "forward" else {False})


def test_what_is_found_for_hopper_is_kept_by_kernel_head_dim_and_dtype(monkeypatch, timed):
    monkeypatch.setattr(launch, "architecture", lambda device: 90)
    monkeypatch.setattr(launch, "found", {})
    ran = []

    def run(config):
        ran.append(config)
        return float(config.stages == 2) + config.block_n

    q = torch.zeros(4, 2, 64, dtype=torch.float16)
    launch.hopper("dq", q, run)
    assert ran == [launch.HOPPER["dq"]], "without BTOK_AUTOTUNE nothing is searched"
    monkeypatch.setenv("BTOK_AUTOTUNE", "1")
    launch.hopper("dq", q, run)
    fastest = launch.HopperConfig(128, 32, 3, False, 240)
    kind = "hopper attention", "dq", 90, 64, torch.float16
    assert launch.found == {kind: fastest} and ran[-1] == fastest
    count = len(ran)
    launch.hopper("dq", q, run)
    assert len(ran) == count + 1, "searched once"
    launch.hopper("dq", q.bfloat16(), run)
    launch.hopper("dq", torch.zeros(4, 2, 128, dtype=torch.float16), run)
    launch.hopper("forward", q, run)
    assert len(launch.found) == 4


def implementation(q, ways, run):
    return launch.fastest("op", (ways,), q, "triton", lambda: ["hopper"], run)


def test_the_faster_implementation_is_kept(monkeypatch, timed, capsys):
    monkeypatch.setattr(launch, "architecture", lambda device: 90)
    monkeypatch.setattr(launch, "found", {})
    monkeypatch.setenv("BTOK_AUTOTUNE", "1")
    q = torch.zeros(4, 2, 64, dtype=torch.float16)
    assert implementation(q, "both ways", {"triton": 2.0, "hopper": 1.0}.get) == "hopper"
    printed = capsys.readouterr().out.splitlines()
    assert "both ways" in printed[0] and printed[1].split() == ["1.0000", "hopper"]
    assert implementation(q, "forward", {"triton": 1.0, "hopper": 2.0}.get) == "triton"
    assert implementation(q, "both ways", lambda impl: 1 / 0) == "hopper", "asked once"


def test_nothing_is_searched_into_a_cuda_graph(monkeypatch):
    """There the default runs, or what was found before."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(launch, "architecture", lambda device: 90)
    monkeypatch.setattr(launch, "search", None)
    monkeypatch.setenv("BTOK_AUTOTUNE", "1")
    monkeypatch.setattr(launch, "found", {})
    q = torch.zeros(4, 2, 64, dtype=torch.float16)
    ran = []
    launch.attention("dq", q, ran.append)
    launch.hopper("dq", q, ran.append)
    ran += [launch.contrastive("sums", q[0], (), ran.append), implementation(q, "forward", len)]
    assert ran == [
        launch.attention_config("dq", 64, q.dtype, 90),
        launch.HOPPER["dq"],
        launch.contrastive_config("sums", q.dtype, 90),
        "triton",
    ]
    assert not launch.found
    kind = "hopper attention", "dq", 90, 64, q.dtype
    launch.found[kind] = found = ran[1]._replace(stages=3)
    launch.hopper("dq", q, ran.append)
    assert ran[-1] == found


def test_a_default_that_does_not_run_is_searched_around(timed, capsys):
    def run(config):
        if config == "default":
            raise RuntimeError("out of shared memory")
        return float(config)

    assert launch.search("op", "default", ["3", "2"], run) == "2"
    assert "failed  default" in capsys.readouterr().out


def test_a_search_in_which_nothing_runs_says_so(timed):
    def run(config):
        raise ValueError(f"{config} does not run")

    with pytest.raises(RuntimeError, match="op: no configuration runs on this device") as error:
        launch.search("op", 1, [2, 3], run)
    assert str(error.value.__cause__) == "3 does not run"


@pytest.mark.parametrize(
    ("capability", "reason"),
    [
        ((7, 5), "sm_75 is too old, it needs sm_80"),
        ((8, 0), None),
        ((8, 9), None),
        ((10, 3), None),
        ((12, 0), None),
        ((11, 0), "no launches are laid out for sm_110, only for sm_80, "),
        ((13, 0), "no launches are laid out for sm_130, only for sm_80, "),
    ],
)
def test_devices_without_launches_are_told(monkeypatch, capability, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setitem(launch.INSTALLED, "triton", True)
    told = launch.no_triton(torch.device("cuda"), torch.float16)
    assert told == reason or (reason and told and told.startswith(reason))


def test_launches_go_to_the_tensors_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    there = launch.on(torch.device("cuda", 0))
    assert isinstance(there, torch.cuda.device) and there.idx == 0
    assert isinstance(launch.on(torch.device("cuda", 1)), contextlib.nullcontext)
    assert isinstance(launch.on(torch.device("cpu")), contextlib.nullcontext)


def test_rocm_is_refused_though_it_calls_itself_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(launch.INSTALLED, "triton", True)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "built for ROCm" in launch.no_triton(torch.device("cuda"), torch.float16)


def test_auto_says_once_why_it_passed_one_over(caplog):
    launch._announced.clear()
    reasons = {"triton": lambda: "no launches for sm_130", "sdpa": launch.always}
    with caplog.at_level(logging.INFO, logger="btok_kernels"):
        for _ in range(2):
            assert launch.choose("op", "auto", reasons, ("triton", "sdpa")) == "sdpa"
        reasons["triton"] = lambda: "q has head dim 24"  # another reason is told as well
        launch.choose("op", "auto", reasons, ("triton", "sdpa"))
    assert [record.getMessage() for record in caplog.records] == [
        "op: impl 'auto' takes 'sdpa', not 'triton': no launches for sm_130",
        "op: impl 'auto' takes 'sdpa', not 'triton': q has head dim 24",
    ]
    assert {record.levelname for record in caplog.records} == {"WARNING"}


def test_batches_of_other_sizes_compile_nothing_anew():
    """Rows and capacities that are 1, divisible by 16, and neither; on a driver alone."""
    from btok_kernels import condensed_attention_triton as op
    from tests.compiled.driver import recorded_launches

    seen = set()
    with recorded_launches(90) as launches:
        for rows, sequences in ((100, 5), (96, 5), (100, 6), (1, 0), (1, 1)):
            layout = CondensedLayout.from_lengths([], [], 1, num_rows=rows, max_sequences=sequences)
            seen.add(layout.tiles.shape[1])
            q, k, v = (torch.zeros(rows, heads, 16, dtype=torch.float16) for heads in (2, 2, 2))
            out, lse = op._forward(q, k, v, layout.tiles, 0.25)
            op._backward(q, q, k, v, out, lse, layout.tiles, 0.25)
    assert {1, 16, 19} <= seen
    names = sorted(name for name, *_ in launches.values())
    assert names == ["_delta_kernel", "_dkdv_kernel", "_dq_kernel", "_forward_kernel"]


def test_auto_takes_the_first_that_can_run():
    order = ("triton", "sdpa")
    reasons = dict.fromkeys(("triton", "sdpa", "reference"), launch.always)
    assert launch.choose("op", "auto", reasons, order) == "triton"
    reasons["triton"] = lambda: "no kernel for torch.float64"
    assert launch.choose("op", "auto", reasons, order) == "sdpa"
    assert launch.choose("op", "reference", reasons, order) == "reference"
    with pytest.raises(RuntimeError, match="op: impl='triton' cannot run: no kernel for torch"):
        launch.choose("op", "triton", reasons, order)
