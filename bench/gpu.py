"""Tests, questions and benchmarks on a CUDA machine, in stages that no cut-off can take along.

    python bench/gpu.py --out DIR --budget SECONDS [--only STAGE ...] [--dry]

First the device tests: where one fails nothing is timed. Then the questions of `bench.questions`
and the benchmarks beside peers, both into DIR/gpu.json after every contest, and DIR/gpu.md, the
page of what is there, with what the questions' answers decide. Each stage is a process group of its
own with a time limit. Started again, with the same DIR, it goes on where it stopped; three times
the default budget are meant to answer the questions. `--dry` asks the questions on a CPU, under
Triton's interpreter, on tiny shapes. Needs torch, triton, transformers, numpy, matplotlib, pytest
and pytest-benchmark, and the repository's root and `kernels` on PYTHONPATH.
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
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from bench.harness import DEVICE
from bench.provenance import ROOT, digest_of_code

PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")


class Stage(NamedTuple):
    """A program, and how many seconds it may take; `{out}` of its words is the folder."""

    seconds: float
    command: tuple[str, ...]


def tests(mark: str) -> tuple[str, ...]:
    # most of the time goes into compiling, which processes share
    processes = ("-n", "8") if importlib.util.find_spec("xdist") else ()
    return (*PYTEST, "tests/device", "--maxfail=5", *processes, "-m", mark)


def contests(script: str, selected: str = "", ranks: int = 1) -> tuple[str, ...]:
    """A benchmark's contests, or those whose names fit."""
    program = (*PYTEST, f"bench/{script}.py", "--benchmark-only", "--keep", "{out}/gpu.json")
    torchrun = ("-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--no-python")
    started = (sys.executable, *torchrun) if ranks > 1 else ()
    return (*started, *program, *(("-k", selected) if selected else ()))


def memcheck() -> tuple[str, ...]:
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    # torch's caching allocator would hide reads behind the end of a tensor
    setting = ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1")
    test = ("tests/device/test_condensed_attention_triton.py", "-k", "tile_writes_its_own_rows")
    return (*setting, tool, "--tool", "memcheck", "--error-exitcode", "1", *PYTEST, *test)


# the questions by what hangs on their answers; tests that take long come last
RANKS = torch.cuda.device_count() if DEVICE == "cuda" else 2
QUESTIONS = {
    "tiles": Stage(240, contests("questions", "attention_tiles")),  # goes on the next time
    "ways": Stage(200, contests("questions", "ways")),
    "gated MLPs": Stage(40, contests("questions", "gated")),
    "gather": Stage(90, contests("questions", "gather", RANKS)),
    "workspace": Stage(90, contests("questions", "workspace")),
    "loss tiles": Stage(150, contests("questions", "loss_tiles")),
}
STAGES = {
    "tests": Stage(300, tests("not full")),
    **QUESTIONS,
    "attention": Stage(500, contests("bench_condensed_attention")),
    "inference": Stage(400, contests("bench_inference")),
    "encoding": Stage(180, contests("bench_encoding")),
    "training step": Stage(420, contests("bench_training_step")),
    "late interaction": Stage(120, contests("bench_late_interaction")),
    "launching": Stage(60, contests("bench_host")),
    "memcheck": Stage(120, memcheck()),
    "all tests": Stage(400, tests("full")),
    "contrastive": Stage(500, contests("bench_contrastive_loss")),  # some peers are known to hang
}


def run_within(seconds: float, command: list[str], log: Path) -> str:
    """Run a program in a process group of its own, and end all of it after `seconds`."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, start_new_session=True, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            return f"status {process.wait(seconds)}"
        except subprocess.TimeoutExpired:
            return f"killed after {seconds:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it left running, too
            process.wait()


def run_stages(out: Path, budget: float, only: list[str] | None, dry: bool) -> None:
    """Each while there is time; what is done of this code is not done again."""
    end = time.monotonic() + budget
    file, code = out / "stages.json", digest_of_code("bench", "tests/device")
    had = json.loads(file.read_text()) if file.exists() else {}
    said = had["stages"] if had.get("code") == code else {}
    for name in only or (QUESTIONS if dry else STAGES):
        seconds = min(STAGES[name].seconds, end - time.monotonic() - 5)
        if said.get(name) == "status 0":
            continue
        if said.get("tests", "status 0") != "status 0" and name != "tests" and not only:
            print(f"{name}: not run, as a device test fails ({out}/tests.log); --only still does")
            continue
        if seconds < 10:
            print(f"{name}: no time left")
            continue
        print(f"{name} ...", flush=True)
        log = out / f"{name.replace(' ', '-')}.log"
        command = [word.format(out=out.resolve()) for word in STAGES[name].command]
        said[name] = run_within(seconds, command, log)
        file.write_text(json.dumps({"code": code, "stages": said}, indent=1))
        print(f"{name}: {said[name]}; {(log.read_text().splitlines() or [''])[-1]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--budget", type=float, default=570, help="seconds in all")
    parser.add_argument("--only", nargs="+", choices=STAGES, help="these stages")
    parser.add_argument("--dry", action="store_true", help="try the questions on a CPU")
    args = parser.parse_args()
    if args.dry != (DEVICE == "cpu"):
        sys.exit("gpu: --dry tries the script where torch sees no CUDA device, and only there")
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ.pop("TRITON_INTERPRET", None)
    # torchrun would have its ranks take one: another machine, by what results are kept of
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    if args.dry:
        os.environ |= {"TRITON_INTERPRET": "1", "DIM": "32"}
    run_stages(args.out, args.budget, args.only, args.dry)
    if (results := args.out / "gpu.json").exists():
        from bench.report import write_page  # matplotlib

        write_page(results, args.out)
        print((args.out / "gpu.md").read_text())


if __name__ == "__main__":
    main()
