"""What the benchmarks share: a fixture, their table, and the file of results.

`--keep FILE` writes the results after every contest, skips what FILE has of this commit on this
machine, and notes what could not be timed: a run that was stopped goes on. The file has the
machine, the versions, the commit, the roofs, what was found for launches, and the contests; nothing
that names the machine's user or host.
"""

from __future__ import annotations

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
from bench.provenance import digest_of_code, machine, output_of, versions
from bench.report import FORMAT_VERSION, HEADER, row
from btok.files import write_json
from btok_kernels import launch

PACKAGES = "btok torch triton transformers numpy xformers liger-kernel cut-cross-entropy flash-attn"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--keep", type=Path, help="file of contests: written after each, gone on with")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[KEPT] = Kept(config.getoption("keep", None))


def pytest_report_header(config: pytest.Config) -> str | None:
    kept = config.stash[KEPT]
    said = f"keep: {kept.path}, of which {len(kept.found)} contests are gone on with"
    return said if kept.path else None


@pytest.fixture
def contest(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Iterator[Contest]:
    """The fixture `contest`, a `bench.harness.Contest` whose result is kept."""
    kept, name = request.config.stash[KEPT], request.node.nodeid
    if not kept.begin(name):
        pytest.skip("kept")
    yield Contest(benchmark, request.config)
    if benchmark.extra_info:
        kept.put(name, benchmark.extra_info)
    elif "begun" in kept.found[name]:  # it was interrupted, and did neither hang nor crash
        del kept.found[name]
        kept.save()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Function) -> Any:
    report = yield
    if "contest" in item.fixturenames and report.when == "call" and not report.passed:
        said = report.longrepr[2] if report.skipped else report.longrepr.reprcrash.message
        item.config.stash[KEPT].put(item.nodeid, {"error": said.partition("\n")[0][:200]})
        if DEVICE == "cuda":
            torch.cuda.synchronize()  # after a fault in a kernel nothing runs: leave the rest
    return report


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The table of contests, those that are gone on with included."""
    timed = [case for case in config.stash[KEPT].found.values() if "error" not in case]
    if not timed:
        return
    rows = [["bench", *HEADER], *([case["bench"], *row(case)] for case in timed)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    terminalreporter.section("contests")
    for cells in rows:
        line = "  ".join(map(str.ljust, cells, widths))
        terminalreporter.write_line(line.rstrip())


class Kept:
    """The contests, and the file of `--keep`, which is whole after every one.

    Args:
        path: of the file, or None for none.
    """

    def __init__(self, path: Path | None) -> None:
        self.path, self.found = path, dict[str, Any]()
        if path is None:
            return
        if not path.parent.is_dir():
            raise pytest.UsageError(f"--keep is {path}, and {path.parent} is no folder")
        if path.exists():
            try:
                before = json.loads(path.read_text())
                cases = {case["id"]: case for case in before["cases"] + before["errors"]}
            except (OSError, ValueError, LookupError, TypeError):
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
        self.save()

    def save(self) -> None:
        if self.path is None or os.environ.get("RANK", "0") != "0":
            return
        errors = [each for each in self.found.values() if "error" in each]
        timed = [each for each in self.found.values() if "error" not in each]
        dtypes = sorted({case["dtype"] for case in timed if case["flops"]})
        roofs = {name: roof(getattr(torch, name))._asdict() for name in dtypes}
        searched = {f"{op} {kind}": str(config) for (op, *kind), config in launch.found.items()}
        found: dict[str, Any] = {"when": datetime.now(UTC).isoformat(), "roofs": roofs}
        found["commit"] = output_of("git", "rev-parse", "HEAD") or None
        found["dirty"] = bool(output_of("git", "status", "--porcelain"))
        found |= {"found": searched, "cases": timed, "errors": errors}
        write_json(self.path, {**about(), **found})


KEPT = pytest.StashKey[Kept]()


@cache
def about() -> dict[str, Any]:
    """The facts that a file's contests depend on; a file with others is not gone on with."""
    cuda = {"CUDA": torch.version.cuda} if DEVICE == "cuda" else {}
    query = ("--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    driver = {"driver": said} if cuda and (said := output_of("nvidia-smi", *query)) else {}
    return {
        "format_version": FORMAT_VERSION,
        "code": digest_of_code("bench"),
        "machine": machine(),
        "versions": versions(PACKAGES.split()) | cuda | driver,
    }
