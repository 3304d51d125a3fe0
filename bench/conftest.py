"""What the benchmarks share: a fixture, their table, and the file of results.

`--keep FILE` writes the results after every contest, skips what FILE has of this commit on this
machine, and notes what could not be timed: a run that was stopped goes on. The file has the
machine, the versions, the commit, the roofs, the peers that are not installed, and the contests;
nothing that names the machine's user or host.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.harness import DEVICE, Contest, roof
from bench.provenance import FORMAT_VERSION, digest_of_code, machine, output_of, versions
from btok.files import write_json

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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--keep", type=Path, help="file of contests: written after each, gone on with")


def pytest_configure(config: pytest.Config) -> None:
    kept = config.getoption("keep", None)
    config.stash[KEPT] = Kept(kept) if kept else None


def pytest_report_header(config: pytest.Config) -> str | None:
    kept = config.stash[KEPT]
    return (
        f"keep: {kept.path}, of which {len(kept.found)} contests are gone on with" if kept else None
    )


@pytest.fixture(scope="session")
def lines(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Of the table, shown after the last case."""
    table: list[str] = []
    yield table
    if not table:
        return
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n", HEADER, *table, sep="\n")
        print("peers that are not installed:", ", ".join(missing()) or "none")


@pytest.fixture
def contest(
    benchmark: BenchmarkFixture, request: pytest.FixtureRequest, lines: list[str]
) -> Iterator[Contest]:
    """See `bench.harness.Contest`."""
    kept, name = request.config.stash[KEPT], request.node.nodeid
    if kept and not kept.begin(name):
        pytest.skip("kept")
    yield Contest(benchmark, request.config, lines)
    if kept and benchmark.extra_info:
        kept.put(name, benchmark.extra_info)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report = yield
    kept = item.config.stash[KEPT]
    if kept and report.when == "call" and not report.passed:
        said = report.longrepr[2] if report.skipped else report.longrepr.reprcrash.message
        kept.put(item.nodeid, {"error": said.partition("\n")[0][:200]})
        if DEVICE == "cuda":
            torch.cuda.synchronize()  # after a fault in a kernel nothing runs: leave the rest
    return report


class Kept:
    """The file of `--keep`, which is whole after every contest."""

    def __init__(self, path: Path) -> None:
        self.path, self.found = path, {}
        if path.exists():
            try:
                before = json.loads(path.read_text())
                cases = {case["id"]: case for case in before["cases"] + before["errors"]}
            except (ValueError, LookupError, TypeError):
                raise pytest.UsageError(f"--keep is {path}, which holds no such results") from None
            if all(before.get(key) == value for key, value in about().items()):
                self.found = cases

    def begin(self, name: str) -> bool:
        """Whether a contest is still to be held. One that twice did not end, as a kernel hung or
        took the process along, is not."""
        begun = self.found.get(name, {"begun": 0}).get("begun", 2)
        if begun < 2:
            self.put(name, {"error": "did not end", "begun": begun + 1})
        return begun < 2

    def put(self, name: str, case: dict[str, Any]) -> None:
        self.found[name] = {"id": name, **case}
        if os.environ.get("RANK", "0") == "0":
            errors = [each for each in self.found.values() if "error" in each]
            timed = [each for each in self.found.values() if "error" not in each]
            dtypes = sorted({case["dtype"] for case in timed if case["flops"]})
            roofs = {name: roof(getattr(torch, name))._asdict() for name in dtypes}
            found = {"roofs": roofs, "cases": timed, "errors": errors}
            write_json(self.path, {**about(), **commit(), **found})


KEPT = pytest.StashKey[Kept | None]()


def missing() -> dict[str, str]:
    """Peers that are not installed, and what they would be compared with."""
    return {name: what for name, what in PEERS.items() if not importlib.util.find_spec(name)}


@cache
def about() -> dict[str, Any]:
    """What a file's contests are of; those of anything else are not gone on with."""
    cuda = {"CUDA": torch.version.cuda} if DEVICE == "cuda" else {}
    query = ("--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    driver = {"driver": said} if cuda and (said := output_of("nvidia-smi", *query)) else {}
    return {
        "format_version": FORMAT_VERSION,
        "code": digest_of_code("bench"),
        "machine": machine(),
        "versions": versions(PACKAGES) | cuda | driver,
        "missing": missing(),
    }


def commit() -> dict[str, Any]:
    return {
        "when": datetime.now(UTC).isoformat(),
        "commit": output_of("git", "rev-parse", "HEAD") or None,
        "dirty": bool(output_of("git", "status", "--porcelain")),
    }
