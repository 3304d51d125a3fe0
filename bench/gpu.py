"""Tests and benchmarks on a CUDA machine, in stages that a hang or a cut-off cannot take along.

    python bench/gpu.py --out DIR --budget SECONDS [--only STAGE ...] [--again] [--dry]

Each stage is a process group of its own with a time limit, and writes DIR/STAGE.json after every
line. Started again it goes on where it stopped. `--dry` tries this script on a CPU: tiny shapes,
torch only. Needs torch, triton, transformers and numpy (pytest for the tests), and the repository's
root and `kernels` on PYTHONPATH.

Times are in milliseconds, by CUDA events with a cold L2 cache: the median, and both quartiles as
the spread. Useful operations are 4 D per pair of row and key that the mask keeps and query head
forward, 10 D backward; executed ones count the whole blocks that our kernels multiply. The stages
that run other benchmarks have `bench.harness`'s figures: `ratio` is ours over the peer's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.peers import PEERS, executed, kept_pairs, mixes, truth
from btok_kernels.layout import CondensedLayout

ROOT = Path(__file__).resolve().parent.parent
FORMULA = "4 D per kept pair and query head forward, 10 D backward"
HEADS, KEY_HEADS, DIM = 12, 2, 128


class Report:
    """The rows of one stage, in a file that is whole after every one of them."""

    def __init__(self, out: Path, stage: str, dry: bool, again: bool) -> None:
        self.path = out / f"{stage.replace(' ', '-')}.json"
        self.out, self.dry = out, dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.content: dict[str, Any] = {"machine": machine(dry), "flops": FORMULA, "rows": []}
        if self.path.exists() and not again:
            before = json.loads(self.path.read_text())
            if before["machine"] == self.content["machine"]:  # the same commit, too
                self.content["rows"] = before["rows"]

    def row(self, case: str) -> dict[str, Any] | None:
        return next((row for row in self.content["rows"] if row["case"] == case), None)

    def measure(self, case: str, figures: Callable[[], dict[str, Any]]) -> None:
        """Add what `figures` returns, unless it is there; an error is a finding too."""
        if self.row(case):
            return
        try:
            row = {"case": case, **figures()}
        except Exception as error:
            row = {"case": case, "error": f"{type(error).__name__}: {error}"[:160]}
        self.content["rows"].append(row | {"date": datetime.now(UTC).isoformat("T", "seconds")})
        partial_file = self.path.with_suffix(".tmp")
        partial_file.write_text(json.dumps(self.content, indent=1))
        partial_file.replace(self.path)
        print(json.dumps(row), flush=True)
        if "error" in row and self.device.type == "cuda":
            torch.cuda.synchronize()  # after a fault in a kernel nothing runs: leave the rest


def machine(dry: bool) -> dict[str, Any]:
    """What the figures depend on."""

    def ask(*command: str) -> str | None:
        try:
            return subprocess.check_output(command, text=True, cwd=ROOT, stderr=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError):
            return None

    driver = ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    commit = ask("git", "describe", "--always", "--dirty", "--abbrev=40")
    return {
        "device": "cpu" if dry else torch.cuda.get_device_name(),
        "driver": driver and driver.strip(),
        "cuda": torch.version.cuda,
        "torch": version("torch"),
        "triton": version("triton"),
        "commit": commit and commit.strip(),
    }


def timed(call: Callable[[], Any], device: torch.device, repeats: int = 20) -> list[float]:
    """Milliseconds of a call: lower quartile, median, upper quartile."""
    cuda = device.type == "cuda"
    for _ in range(3 if cuda else 1):
        call()
    cache = torch.empty(256 << 20, dtype=torch.int8, device=device) if cuda else None
    times = []
    for _ in range(repeats if cuda else 2):
        if cache is None:
            begin = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - begin))
            continue
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cache.zero_()
        torch.cuda._sleep(1_000_000)  # the host gets ahead, so that launching is not what is timed
        before.record()
        call()
        after.record()
        torch.cuda.synchronize()
        times.append(before.elapsed_time(after))
    return [round(t, 4) for t in statistics.quantiles(times, n=4)]


def peak_mib(call: Callable[[], Any], device: torch.device) -> float | None:
    """Memory allocated at worst during a call, beyond what was there."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def roofs(report: Report) -> None:
    """What the machine's own libraries reach, on random numbers."""
    dtype = torch.float32 if report.dry else torch.bfloat16
    n, elements = (256, 1 << 20) if report.dry else (8192, 1 << 30)
    a, b = (torch.randn(n, n, device=report.device).to(dtype) for _ in range(2))
    source = torch.randn(elements, device=report.device).to(dtype)
    target = torch.empty_like(source)

    def rate(work: float, call: Callable[[], Any]) -> dict[str, Any]:
        return {"tera_per_s": work / timed(call, report.device)[1] / 1e9}

    report.measure("matmul, FLOP", lambda: rate(2 * n**3, lambda: a @ b))
    moved = 2 * elements * dtype.itemsize
    report.measure("copy, bytes", lambda: rate(moved, lambda: target.copy_(source)))


def attention(report: Report, mix: str) -> None:
    """Every peer on one length mix: checked, then timed."""
    todo = [name for name in PEERS if not report.row(name)]
    if not todo:
        return
    device = report.device
    dtype = torch.float32 if report.dry else torch.bfloat16
    layout = mixes(64 if report.dry else 1)[mix].to(device)
    torch.manual_seed(0)
    q, k, v, grad = (
        torch.randn(layout.num_rows, heads, DIM, device=device).to(dtype)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
    )
    for tensor in (q, k, v):
        tensor.requires_grad_()
    expected = truth(layout, q, k, v, grad)

    def step(attend: Callable[..., Tensor]) -> list[Tensor]:
        out = attend(q, k, v)
        return [out, *torch.autograd.grad(out, (q, k, v), grad)]

    def errors(attend: Callable[..., Tensor]) -> list[float]:
        pairs = zip(step(attend), expected, strict=True)
        return [float((got.detach().float() - t).norm() / t.norm()) for got, t in pairs]

    allowed = errors(PEERS["sdpa"](layout))  # torch at the same precision
    matmul = Report(report.out, "roofs", report.dry, again=False).row("matmul, FLOP") or {}
    roof = matmul.get("tera_per_s")
    useful = 4 * DIM * HEADS * kept_pairs(layout)

    def figures(name: str) -> dict[str, Any]:
        attend = PEERS[name](layout)
        found = errors(attend)
        if not all(e <= 2 * a + 1e-3 for e, a in zip(found, allowed, strict=True)):
            raise ValueError(f"wrong, not timed: errors {found}, torch's {allowed}")
        with torch.no_grad():
            forward = timed(lambda: attend(q, k, v), device)
        both = timed(lambda: step(attend), device)
        took = {"forward": forward[1], "backward": both[1] - forward[1]}
        work = {"forward": useful, "backward": 2.5 * useful}
        begin = time.perf_counter()
        PEERS[name](layout)
        if device.type == "cuda":
            torch.cuda.synchronize()
        row: dict[str, Any] = {
            "rows": layout.num_rows,
            "errors": found,
            "torch_errors": allowed,
            "forward_ms": forward[1],
            "forward_spread_ms": forward[::2],
            "both_ms": both[1],
            "both_spread_ms": both[::2],
            "prepare_ms": 1e3 * (time.perf_counter() - begin),
            "extra_mib": peak_mib(lambda: step(attend), device),
        }
        for way, ms in took.items():
            row[f"{way}_tflops"] = work[way] / ms / 1e9
            row[f"{way}_share"] = roof and row[f"{way}_tflops"] / roof
        if name == "triton":
            visited = executed(layout, HEADS, KEY_HEADS, DIM, dtype)
            for (way, ms), operations in zip(took.items(), visited, strict=True):
                row[f"{way}_executed_tflops"] = operations / ms / 1e9
        return row

    for name in todo:
        report.measure(name, partial(figures, name))


def command(report: Report, case: str, *arguments: str, **environment: str) -> None:
    """The exit status of a program; its output beside the report."""

    def run() -> dict[str, Any]:
        log = report.path.with_name(f"{report.path.stem}-{case.replace(' ', '-')}.log")
        with log.open("w") as file:
            status = subprocess.run(
                arguments, cwd=ROOT, env=os.environ | environment, stdout=file, stderr=file
            ).returncode
        lines = log.read_text().splitlines() or [""]
        return {"status": status, "last_line": lines[-1][:400]}

    report.measure(case, run)


def tests(report: Report) -> None:
    # most of the time goes into compiling, which processes share
    processes = ("-n", "8") if importlib.util.find_spec("xdist") else ()
    run = (sys.executable, "-m", "pytest", "tests/device", "-q", "--maxfail=5", *processes)
    command(report, "device tests", *run, "-m", "not full")
    command(report, "all device tests", *run, "-m", "full")


def memcheck(report: Report) -> None:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    options = ("--tool", "memcheck", "--error-exitcode", "1", sys.executable)
    call = "from bench.gpu import small_case; small_case()"
    # torch's caching allocator would hide reads behind the end of a tensor
    command(report, "memcheck", tool, *options, "-c", call, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def tune(report: Report) -> None:
    call = "from bench.gpu import searched_case; searched_case()"
    command(report, "search", sys.executable, "-c", call, BTOK_AUTOTUNE="1")


def small_case() -> None:
    run_once(CondensedLayout.from_lengths([70, 0, 9], [40, 3, 0], 4))


def searched_case() -> None:
    run_once(mixes()["image queries"])


def run_once(layout: CondensedLayout) -> None:
    """Our kernels, forward and backward."""
    shapes = [(layout.num_rows, heads, DIM) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    q, k, v = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in shapes)
    attend = PEERS["triton"](layout.to("cuda"))
    attend(*(t.requires_grad_() for t in (q, k, v))).sum().backward()
    torch.cuda.synchronize()


def contests(report: Report, script: str, case: str, *selected: str) -> None:
    """A pytest benchmark, or what is selected of it: a row per contest that it has timed."""
    name = f"{report.path.stem}-{case.replace(' ', '-')}.json"
    result = report.path.with_name(name).resolve()
    if not report.row(case):
        result.unlink(missing_ok=True)  # another commit's
    arguments = ("-m", "pytest", f"bench/{script}", "--benchmark-only", "-q")
    command(report, case, sys.executable, *arguments, f"--benchmark-json={result}", *selected)
    if not result.exists():  # all were skipped, or it did not come to its end
        return
    for contest in json.loads(result.read_text())["cases"]:
        figures = {
            "dtype": contest["dtype"],
            "pairs": contest["pairs"],
            "ratio": contest["ratio"],
            "ratio_spread": contest["quartiles"],
            "predicted": contest["predicted"],
            "ms": 1e3 * contest["seconds"][1],
            "peer_ms": 1e3 * contest["peer_seconds"][1],
            "mib": contest["memory"] / 2**20,
            "peer_mib": contest["peer_memory"] / 2**20,
            "flops_share": contest["share_of_flops"],
            "bytes_share": contest["share_of_bytes"],
        }
        report.measure(f"{contest['case']}, {contest['peer']}", figures.copy)


def contrastive(report: Report) -> None:
    for rows in (1 << n for n in range(12, 19)):
        contests(report, "bench_contrastive_loss.py", f"{rows} rows", "-k", str(rows))


def inference(report: Report) -> None:
    for peer in ("padded", "packed", "full"):
        contests(report, "bench_inference.py", peer, "-k", peer)


def encoding(report: Report) -> None:
    for peer in ("padded", "one"):
        contests(report, "bench_encoding.py", peer, "-k", peer)


def training_step(report: Report) -> None:
    contests(report, "bench_training_step.py", "all")


class Stage(NamedTuple):
    seconds: float  # at most
    run: Callable[[Report], None]
    dry: bool = False  # whether a CPU can run it


STAGES = {
    "tests": Stage(400, tests),
    "memcheck": Stage(120, memcheck),
    "roofs": Stage(60, roofs, dry=True),
    **{mix: Stage(200, partial(attention, mix=mix), dry=True) for mix in mixes(64)},
    "tune": Stage(400, tune),
    "inference": Stage(400, inference),
    "encoding": Stage(180, encoding),
    "training step": Stage(420, training_step),
    "contrastive": Stage(500, contrastive),  # last: some of its peers are known to hang
}


def run_within(seconds: float, arguments: list[str]) -> str:
    """Run a program in a process group of its own, and end all of it after `seconds`."""
    process = subprocess.Popen(arguments, start_new_session=True)
    try:
        return f"status {process.wait(seconds)}"
    except subprocess.TimeoutExpired:
        return f"killed after {seconds:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it left running, too
        process.wait()


def summary(out: Path, said: dict[str, str]) -> str:
    """A line per row of every stage."""
    lines = []
    for stage in STAGES:
        path = out / f"{stage.replace(' ', '-')}.json"
        rows = json.loads(path.read_text())["rows"] if path.exists() else []
        lines.append(f"{stage}: {said.get(stage, 'not run')}")
        for row in rows:
            numbers = {key: x for key, x in row.items() if isinstance(x, float | int)}
            figures = "  ".join(f"{key} {x:.4g}" for key, x in numbers.items())
            lines.append(f"    {row['case']:20} {row.get('error', figures)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--budget", type=float, default=1500, help="seconds in all")
    parser.add_argument("--only", nargs="+", choices=STAGES, help="these stages")
    parser.add_argument("--again", action="store_true", help="measure what is there once more")
    parser.add_argument("--dry", action="store_true", help="try the script on a CPU")
    parser.add_argument("--inside", choices=STAGES, help=argparse.SUPPRESS)  # a stage's process
    args = parser.parse_args()
    if not args.dry and not torch.cuda.is_available():
        sys.exit("gpu: torch sees no CUDA device here; --dry tries the script on a CPU")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.inside:
        STAGES[args.inside].run(Report(args.out, args.inside, args.dry, args.again))
        return
    os.environ.pop("TRITON_INTERPRET", None)
    end = time.monotonic() + args.budget
    said = {}
    for name, stage in STAGES.items():
        if (args.only and name not in args.only) or (args.dry and not stage.dry):
            continue
        seconds = min(stage.seconds, end - time.monotonic() - 5)
        if seconds < 10:
            said[name] = "no time left"
            continue
        options = ["--dry"] * args.dry + ["--again"] * args.again
        inside = [sys.executable, __file__, "--out", str(args.out), "--inside", name, *options]
        print(f"{name} ...", flush=True)
        said[name] = run_within(seconds, inside)
    print(summary(args.out, said))


if __name__ == "__main__":
    main()
