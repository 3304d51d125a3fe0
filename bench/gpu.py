"""Tests, questions and benchmarks on a CUDA machine, in stages that no cut-off can take along.

    python bench/gpu.py --out DIR --budget SECONDS [--only STAGE ...] [--again] [--dry]

First the device tests: where one fails nothing is timed. Then the roofs, the questions of
`bench.questions`, whose answers end the output and go to DIR/answers.md, and the benchmarks beside
peers. Each stage is a process group of its own with a time limit, and writes DIR/STAGE.json after
every line. Started again, with the same DIR, it goes on where it stopped; three times the default
budget are meant to answer the questions. `--dry` tries all but the tests and benchmarks on a CPU,
under Triton's interpreter, on tiny shapes. Needs torch, triton, transformers, numpy and pytest
(pytest-benchmark for the benchmarks), and the repository's root and `kernels` on PYTHONPATH.
OTHER_TRITON may name the folder of another Triton, to be compared with the one installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
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

from bench import hopper, questions
from bench.harness import DEVICE, roof
from bench.peers import PEERS, mixes
from btok_kernels.layout import CondensedLayout

ROOT = Path(__file__).resolve().parent.parent
HEADS, KEY_HEADS, DIM = 12, 2, 128


class Report:
    """The rows of one stage, in a file that is whole after every one of them."""

    def __init__(self, out: Path, stage: str, again: bool = False) -> None:
        self.path = out / f"{stage.replace(' ', '-')}.json"
        self.writes = os.environ.get("RANK", "0") == "0"
        self.content: dict[str, Any] = {"machine": machine(), "rows": []}
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
        if self.writes:
            partial_file = self.path.with_suffix(".tmp")
            partial_file.write_text(json.dumps(self.content, indent=1))
            partial_file.replace(self.path)
            print(json.dumps(row), flush=True)
        if "error" in row and DEVICE == "cuda":
            torch.cuda.synchronize()  # after a fault in a kernel nothing runs: leave the rest


def machine() -> dict[str, Any]:
    """What the figures depend on."""

    def ask(*command: str) -> str | None:
        try:
            return subprocess.check_output(command, text=True, cwd=ROOT, stderr=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError):
            return None

    driver = ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
    commit = ask("git", "describe", "--always", "--dirty", "--abbrev=40")
    return {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "driver": driver and driver.strip(),
        "cuda": torch.version.cuda,
        "torch": version("torch"),
        "triton": version("triton"),
        "commit": commit and commit.strip(),
    }


def roofs(report: Report) -> None:
    """What the machine's own libraries reach."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    report.measure("product and copy, a second", lambda: roof(dtype)._asdict())


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


def tests(report: Report, mark: str) -> None:
    # most of the time goes into compiling, which processes share
    processes = ("-n", "8") if importlib.util.find_spec("xdist") else ()
    run = (sys.executable, "-m", "pytest", "tests/device", "-q", "--maxfail=5", *processes)
    report.content["rows"] = [row for row in report.content["rows"] if row["status"] == 0]
    command(report, "device tests", *run, "-m", mark)


def memcheck(report: Report) -> None:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    options = ("--tool", "memcheck", "--error-exitcode", "1", sys.executable)
    call = "from bench.gpu import small_case; small_case()"
    # torch's caching allocator would hide reads behind the end of a tensor
    command(report, "memcheck", tool, *options, "-c", call, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def small_case() -> None:
    """Our kernels, forward and backward, on few rows."""
    layout = CondensedLayout.from_lengths([70, 0, 9], [40, 3, 0], 4)
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


def attention(report: Report) -> None:
    for mix in mixes(64):
        words = mix.replace(" ", " and ")  # pytest's -k takes an expression
        contests(report, "bench_condensed_attention.py", mix, "-k", words)


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


# the questions by what hangs on their answers; tests that take long come last
QUESTIONS = {
    f"tiles {questions.DIMS[0]}": Stage(
        240, partial(questions.attention_tiles, dim=questions.DIMS[0])
    ),
    "ways": Stage(200, questions.ways),
    "gated MLPs": Stage(40, questions.gated_mlps),
    "gather": Stage(90, questions.gather),
    "workspace": Stage(90, questions.workspace),
    "loss tiles": Stage(150, questions.loss_tiles),
    **{
        f"tiles {dim}": Stage(200, partial(questions.attention_tiles, dim=dim))
        for dim in questions.DIMS[1:]
    },
    "Triton": Stage(240, questions.triton_versions),
}
STAGES = {
    "tests": Stage(300, partial(tests, mark="not full")),
    "roofs": Stage(60, roofs),
    **QUESTIONS,
    "hopper": Stage(400, hopper.stage),
    "attention": Stage(500, attention),
    "inference": Stage(400, inference),
    "encoding": Stage(180, encoding),
    "training step": Stage(420, training_step),
    "memcheck": Stage(120, memcheck),
    "all tests": Stage(400, partial(tests, mark="full")),
    "contrastive": Stage(500, contrastive),  # last: some of its peers are known to hang
}
DRY = ("roofs", *QUESTIONS)  # what a CPU can try


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


def rows_of(out: Path, stage: str) -> list[dict[str, Any]]:
    path = out / f"{stage.replace(' ', '-')}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def summary(out: Path, said: dict[str, str]) -> str:
    """A line per stage, and per row of those that are no questions; the questions' answers."""
    lines = []
    for stage in STAGES:
        rows = rows_of(out, stage)
        failed = [row for row in rows if "error" in row]
        told = f"{len(rows)} rows, {len(failed)} of them errors"
        lines.append(f"{stage}: {said.get(stage, 'not run')}, {told}")
        for row in failed if stage in QUESTIONS else rows:
            numbers = {key: x for key, x in row.items() if isinstance(x, float | int)}
            figures = "  ".join(f"{key} {x:.4g}" for key, x in numbers.items())
            lines.append(f"    {row['case']:20} {row.get('error', figures)}")
    rows = [row for stage in QUESTIONS for row in rows_of(out, stage)]
    answers = questions.page(rows, machine())
    (out / "answers.md").write_text(answers)
    return "\n".join([*lines, "", answers])


def run_stages(args: argparse.Namespace) -> dict[str, str]:
    """Each in its own processes, while there is time; what became of them."""
    end = time.monotonic() + args.budget
    said = {}
    for name, stage in STAGES.items():
        if (args.only and name not in args.only) or (args.dry and name not in DRY):
            continue
        failed = any(row.get("status") for row in rows_of(args.out, "tests"))
        if failed and not args.only and name != "tests":
            said[name] = "not timed, as a device test fails (tests*.log); --only does it still"
            continue
        seconds = min(stage.seconds, end - time.monotonic() - 5)
        if seconds < 10:
            said[name] = "no time left"
            continue
        ranks = torch.cuda.device_count() if name == "gather" else 1
        program = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        inside = [sys.executable, *program, __file__, "--out", str(args.out), "--inside", name]
        print(f"{name} ...", flush=True)
        said[name] = run_within(seconds, inside + ["--dry"] * args.dry + ["--again"] * args.again)
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--budget", type=float, default=570, help="seconds in all")
    parser.add_argument("--only", nargs="+", choices=STAGES, help="these stages")
    parser.add_argument("--again", action="store_true", help="measure what is there once more")
    parser.add_argument("--dry", action="store_true", help="try the script on a CPU")
    parser.add_argument("--inside", choices=STAGES, help=argparse.SUPPRESS)  # a stage's process
    args = parser.parse_args()
    if args.dry != (DEVICE == "cpu"):
        sys.exit("gpu: --dry tries the script where torch sees no CUDA device, and only there")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.inside:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            if DEVICE == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            torch.distributed.init_process_group()
        STAGES[args.inside].run(Report(args.out, args.inside, args.again))
        return
    os.environ.pop("TRITON_INTERPRET", None)
    if args.dry:
        os.environ |= {"TRITON_INTERPRET": "1", "DIM": "32"}
    print(summary(args.out, run_stages(args)))


if __name__ == "__main__":
    main()
