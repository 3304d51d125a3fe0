"""Launch configurations: there is one for every kernel, and BTOK_AUTOTUNE=1 finds the fastest."""

from __future__ import annotations

import itertools
import sys
import types

import pytest
import torch

from btok_kernels import launch
from btok_kernels.condensed_attention import HEAD_DIMS
from btok_kernels.layout import TILE


def test_every_kernel_has_a_configuration_whose_blocks_fit_the_tiles():
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    for kernel, dim, dtype, arch in itertools.product(
        ("forward", "dkdv", "dq"), HEAD_DIMS, dtypes, (0, 80, 86, 89, 90, 100, 120)
    ):
        config = launch.attention_config(kernel, dim, dtype, arch)
        assert TILE % config.block_m == 0 and TILE % config.block_n == 0


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
    assert launch.found == {("forward", 90, 64, torch.float16): fastest}
    assert ran[-1] == fastest
    printed = capsys.readouterr().out
    assert str(fastest) in printed and str(default) in printed
    count = len(ran)
    launch.attention("forward", q, run)
    assert len(ran) == count + 1, "searched once"


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
    ("capability", "reason"), [((7, 5), "sm_75 is too old, it needs sm_80"), ((8, 0), None)]
)
def test_old_devices_are_told(monkeypatch, capability, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setitem(launch.INSTALLED, "triton", True)
    assert launch.no_triton(torch.device("cuda"), torch.float16) == reason


def test_auto_takes_the_first_that_can_run():
    order = ("triton", "sdpa")
    reasons = dict.fromkeys(("triton", "sdpa", "reference"), launch.always)
    assert launch.choose("op", "auto", reasons, order) == "triton"
    reasons["triton"] = lambda: "no kernel for torch.float64"
    assert launch.choose("op", "auto", reasons, order) == "sdpa"
    assert launch.choose("op", "reference", reasons, order) == "reference"
    with pytest.raises(RuntimeError, match="op: impl='triton' cannot run: no kernel for torch"):
        launch.choose("op", "triton", reasons, order)
