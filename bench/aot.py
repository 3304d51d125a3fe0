"""What every shipped Triton launch compiles to for sm_80 and sm_90; needs no GPU.

The library's own host code runs on CPU tensors under a driver that only names its target, and each
launch is compiled and recorded instead of started. So what is listed is what ships.

    python bench/aot.py --out bench/results/aot.md     a Markdown table of everything
    python bench/aot.py --check --archs 90             exits 1 and says what is wrong, if anything
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from btok_kernels import launch

SHARED_LIMIT = {80: 163 << 10, 90: 227 << 10}  # bytes a block may have
NO_PRODUCT = ("delta", "rows", "columns")  # kernels without a matrix product


class Job(NamedTuple):
    """One call of the library: an op on tensors of one shape, compiled for one architecture."""

    op: str
    arch: int
    dim: int
    dtype: str
    variant: str


class Row(NamedTuple):
    """What one launch compiled to; bytes, and counts of SASS instructions."""

    kernel: str
    arch: int
    dim: int
    dtype: str
    variant: str
    blocks: str
    warps: int
    stages: int
    shared: int
    registers: int
    stack: int
    spills: int
    hgmma: int
    hmma: int
    stl: int
    ldl: int


class Target(DriverBase):
    """A driver that names a device of compute capability `arch` and can do nothing else."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps its compiled kernels, and their target, by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def recorded_launches(arch: int) -> Iterator[dict[str, tuple[str, dict[str, Any], Any]]]:
    """Compile the launches inside for `arch`: kernel's name, arguments and result, by its hash."""
    launches: dict[str, tuple[str, dict[str, Any], Any]] = {}
    run = JITFunction.run

    def compile_only(function, *args, warmup, **options):
        kernel = run(function, *args, warmup=True, **options)
        launches[kernel.hash] = (function.__name__, options, kernel)
        return kernel

    driver.set_active(Target(arch))
    with (
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(launch, "architecture", lambda device: arch),
    ):
        yield launches


def attention(job: Job) -> None:
    """Forward and backward; the variant is G, the query heads per key head."""
    from btok_kernels import condensed_attention_triton as op
    from btok_kernels.layout import CondensedLayout

    layout = CondensedLayout.from_lengths([300], [40], 4)
    q, k, v = (
        torch.randn(layout.num_rows, heads, job.dim).to(getattr(torch, job.dtype))
        for heads in (2 * int(job.variant[1:]), 2, 2)
    )
    scale = job.dim**-0.5
    out, lse = op._forward(q, k, v, layout.tiles, scale)
    op._backward(torch.randn_like(out), q, k, v, out, lse, layout.tiles, scale)


def contrastive(job: Job) -> None:
    """Both ways of the Triton path with gradients; the variant is the options it is given."""
    from btok_kernels import contrastive_loss as op
    from btok_kernels.contrastive_loss_triton import fused

    query, key = (torch.randn(256, job.dim).to(getattr(torch, job.dtype)) for _ in range(2))
    call = op.Call(query, key)
    if job.variant == "all":
        ids, negatives = torch.arange(256), key[:, None].repeat(1, 2, 1)
        call = op.Call(query, key, 0.02, negatives, ids, ids, bidirectional=True, margin=0.1)
    for chunk in (128, 0):
        with mock.patch.object(launch, "contrastive_chunk", lambda *_, chunk=chunk: chunk):
            fused(call, op.Ranks(None, [256], slice(0, 256), 1 / 256), with_grad=True)


OPS = {"attention": attention, "contrastive": contrastive}


def compile_job(job: Job) -> list[Row]:
    """The rows of one job's launches."""
    with recorded_launches(job.arch) as launches:
        OPS[job.op](job)
    rows = []
    for name, options, kernel in launches.values():
        rows.append(
            Row(
                name.strip("_").removesuffix("_kernel"),
                job.arch,
                job.dim,
                job.dtype,
                job.variant,
                " ".join(f"{key[6:]}{options[key]}" for key in options if key[:6] == "BLOCK_"),
                kernel.metadata.num_warps,
                kernel.metadata.num_stages,
                kernel.metadata.shared,
                **resources(kernel, job.arch),
            )
        )
    return rows


def resources(kernel: Any, arch: int) -> dict[str, int]:
    """Registers, stack and spills by ptxas's report; instructions by the disassembly."""
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(kernel.asm["ptx"])
        cubin.write_bytes(kernel.asm["cubin"])
        name = "sm_90a" if arch == 90 else f"sm_{arch}"  # as Triton compiles for them
        report = subprocess.run(
            [knobs.nvidia.ptxas.path, "-v", f"--gpu-name={name}", ptx, "-o", os.devnull],
            check=True,
            capture_output=True,
            text=True,
        ).stderr
        sass = subprocess.check_output([knobs.nvidia.nvdisasm.path, "-c", cubin], text=True)

    def figures(pattern: str) -> list[int]:
        return [int(figure) for figure in re.findall(pattern, report)]

    return {
        "registers": max(figures(r"Used (\d+) registers")),
        "stack": sum(figures(r"(\d+) bytes stack frame")),
        "spills": sum(figures(r"(\d+) bytes spill (?:stores|loads)")),
        **{
            opcode: len(re.findall(rf"\b{opcode.upper()}\b", sass))
            for opcode in ("hgmma", "hmma", "stl", "ldl")
        },
    }


def problems(rows: list[Row]) -> list[str]:
    """What must not ship: spills, too much shared memory, half precision without tensor cores."""
    said = []
    for row in rows:
        found = []
        if row.spills:
            found.append(f"spills {row.spills} bytes ({row.registers} registers)")
        if row.shared > SHARED_LIMIT[row.arch]:
            found.append(f"{row.shared} bytes of shared memory, limit {SHARED_LIMIT[row.arch]}")
        if row.dtype != "float32" and row.kernel not in NO_PRODUCT:
            # a warp group multiplies 64 rows at a time
            smallest = min(map(int, re.findall(r"[MN](\d+)", row.blocks)))
            tall = smallest >= 64 and row.warps >= 4
            if row.arch == 90 and tall and not row.hgmma:
                found.append("no HGMMA")
            elif not row.hgmma and not row.hmma:
                found.append("no tensor-core instruction")
        where = f"{row.kernel} sm_{row.arch} D {row.dim} {row.dtype} {row.variant} {row.blocks}"
        said += [f"{where}: {what}" for what in found]
    return said


def merged(rows: list[Row]) -> list[Row]:
    """Sorted, and those that differ in the variant alone as one."""
    variants: dict[Row, list[str]] = {}
    for row in sorted(rows):
        variants.setdefault(row._replace(variant=""), []).append(row.variant)
    return sorted(row._replace(variant=", ".join(same)) for row, same in variants.items())


def table(rows: list[Row]) -> str:
    """A Markdown table under a head of versions and a one-line summary."""
    version = subprocess.check_output([knobs.nvidia.ptxas.path, "--version"], text=True)
    ptxas = re.search(r"V([\d.]+)", version)
    said = problems(rows)
    lines = [
        "# Triton kernels, compiled ahead of time",
        "",
        f"Triton {triton.__version__}, ptxas {ptxas[1] if ptxas else '?'}, by `make aot`. Variant: "
        "query heads per key head of the attention; options given to the loss, none or all. "
        "Shared, stack, spills: bytes. The last four: instructions in the SASS.",
        "",
        f"{len(rows)} kernels, the worst with {max(row.registers for row in rows)} registers and "
        f"{max(row.spills for row in rows)} bytes of spills; {len(said)} problems.",
        "",
        *(f"- {line}" for line in said),
        *[""] * bool(said),
        f"| {' | '.join(Row._fields)} |",
        f"|{'--|' * len(Row._fields)}",
        *(f"| {' | '.join(str(cell) for cell in row)} |" for row in merged(rows)),
    ]
    return "\n".join(lines) + "\n"


def finish(rows: list[Row], out: Path | None, check: bool) -> None:
    """Write or print the table; with `check`, exit 1 on anything that must not ship."""
    if out:
        out.write_text(table(rows))
    else:
        print(table(rows))
    if check and (said := problems(rows)):
        sys.exit("aot: must not ship:\n" + "\n".join(said))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="write a Markdown table here")
    parser.add_argument("--check", action="store_true", help="exit 1 if anything must not ship")
    parser.add_argument("--only", choices=OPS, help="one op")
    parser.add_argument("--archs", type=int, nargs="+", default=sorted(SHARED_LIMIT))
    parser.add_argument("--head-dims", type=int, nargs="+", default=[16, 32, 64, 80, 96, 128])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16", "float32"])
    parser.add_argument("--groups", type=int, nargs="+", default=[1, 6])
    args = parser.parse_args()
    if launch.interpreted():
        sys.exit("aot: unset TRITON_INTERPRET; the interpreter compiles nothing")
    shapes = {
        "attention": (args.head_dims, args.dtypes, [f"G{groups}" for groups in args.groups]),
        "contrastive": ([1536], args.dtypes, ["none", "all"]),
    }
    jobs = [
        Job(op, arch, *shape)
        for op in ([args.only] if args.only else OPS)
        for arch in args.archs
        for shape in itertools.product(*shapes[op])
    ]
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), get_context("spawn")) as pool:
        rows = [row for found in pool.map(compile_job, jobs) for row in found]
    finish(rows, args.out, args.check)


if __name__ == "__main__":
    main()
