"""What the benchmarks share: a fixture, their table, and what `--benchmark-json` writes.

The file has the machine, the versions, the commit, the roofs, the peers that are not installed, and
the contests; nothing that names the machine's user or host.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.harness import DEVICE, Contest, roof

FORMAT_VERSION = 2
# module -> what its benchmark would compare with; `pip install .[bench]` brings those that install
PEERS = {
    "xformers": "condensed attention",
    "liger_kernel": "contrastive loss",
    "cut_cross_entropy": "contrastive loss",
    "inf_cl": "contrastive loss",
}
PACKAGES = ("btok", "torch", "triton", "transformers", "numpy", "xformers", "liger-kernel")
HEADER = (
    f"{'':19}  {'case':33}  {'peer':22} pairs  {'ratio (quartiles)':22}  {'95 %':13}  predicted"
    f"  {'ours, ms':>10}  {'MiB':>8}  {'peer':>8}"
)


@pytest.fixture(scope="session")
def lines(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Of the table, shown after the last case."""
    table: list[str] = []
    yield table
    if not table:
        return
    missing = [name for name in PEERS if not importlib.util.find_spec(name)]
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n", HEADER, *table, sep="\n")
        print("peers that are not installed:", ", ".join(missing) or "none")


@pytest.fixture
def contest(
    benchmark: BenchmarkFixture, request: pytest.FixtureRequest, lines: list[str]
) -> Contest:
    """See `bench.harness.Contest`."""
    return Contest(benchmark, request.config, lines)


def pytest_benchmark_update_json(config: Any, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """In place of pytest-benchmark's own content."""
    cases = [each["extra_info"] for each in output_json["benchmarks"] if each["extra_info"]]
    dtypes = sorted({case["dtype"] for case in cases})
    cpu = output_json["machine_info"].get("cpu", {})
    commit = output_json["commit_info"]
    machine = {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "cpu": cpu.get("brand_raw"),
        "cores": cpu.get("count"),
        "threads": torch.get_num_threads(),
    }
    roofs = {name: roof(getattr(torch, name))._asdict() for name in dtypes}
    when = str(output_json["datetime"])
    output_json.clear()
    output_json |= {
        "format_version": FORMAT_VERSION,
        "when": when,
        "commit": commit.get("id"),
        "dirty": commit.get("dirty"),
        "machine": machine,
        "versions": {name: v for name in PACKAGES if (v := _version(name))},
        "roofs": roofs,
        "missing": {n: what for n, what in PEERS.items() if not importlib.util.find_spec(n)},
        "cases": cases,
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
