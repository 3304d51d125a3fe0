"""What every shipped Triton launch compiles to, and how fast a model takes that to be; no GPU.

The library's own host code runs on CPU tensors under a driver that only names its target, and each
launch is compiled and recorded instead of started. So what is listed is what ships.

    python -m tests.compiled.aot --out bench/results/aot.md    a page of everything
    python -m tests.compiled.aot --check --archs 90            exits 1 and says what is wrong
    python -m tests.compiled.aot --only attention --archs 90 --head-dims 128 --groups 6

Another Triton, of `pip install --no-deps --target FOLDER triton==...`, is looked at beside this one
with `--also FOLDER`, or alone with FOLDER first on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.nvidia.compiler import get_ptxas

from btok_kernels import launch
from btok_kernels.condensed_attention import HEAD_DIMS
from tests.compiled import overlap, sass
from tests.compiled.driver import Launch, recorded_launches

SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}  # KiB of a block
DEFAULT_ARCHS = (80, 90, 100, 120)  # of the last two no machine code is read
SPILL_LIMIT = 64  # bytes of stores and loads
RATIO_LIMIT = 1.05  # executed over useful products

# Products an iteration of the main loop makes, and the sizes of one.
WORK = {
    "forward": (2, "M", "N", "D"),
    "dkdv": (4, "M", "N", "D"),
    "dk": (3, "M", "N", "D"),  # of head dims whose dK and dV are launches of their own
    "dv": (2, "M", "N", "D"),
    "dq": (3, "M", "N", "D"),
    "sums": (1, "N", "M", "D"),
    "d_logits": (1, "N", "M", "D"),
    "d_query": (1, "N", "K", "D"),
    "d_candidates": (1, "M", "K", "D"),
    "maxima": (1, "N", "M", "D"),
    "d_query_tokens": (1, "N", "K", "D"),
    "d_key_tokens": (1, "M", "K", "D"),
}
ATTENTION = ("forward", "dkdv", "dk", "dv", "dq")


class Job(NamedTuple):
    """One call of the library: an op on tensors of one shape, compiled for one architecture."""

    op: str
    arch: int
    dim: int
    dtype: str
    variant: str


class LoopRow(NamedTuple):
    """A main loop: counts of one warp's iteration, as in `sass.Loop`, and what follows of them."""

    instructions: int
    products: int
    drained: int
    exponentials: int
    barriers: int
    waits: tuple[str, ...]
    copies: int
    waits_for_all: bool
    ratio: float  # executed over useful products
    tflops: float | None  # modelled; of useful FLOPs without a head dim's padding
    beside: int  # exponentials issued while a product is in flight


class Row(NamedTuple):
    """What one launch compiled to; shared, stack and spills in bytes."""

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
    serialized: tuple[str, ...]  # codes of ptxas's warnings
    hgmma: int
    hmma: int
    hazards: tuple[str, ...]
    loops: tuple[LoopRow, ...]
    warpgroups: overlap.Warpgroups | None = None  # of the kernels for Hopper


_reports: dict[
    str, str
] = {}  # of ptxas, by the sha256 of what it made; all jobs of a process share kernels


@contextmanager
def kept_reports() -> Iterator[None]:
    """What ptxas says of the kernels compiled inside goes to `_reports`; no cache on disk serves.

    Of Triton's own call, as its options differ from version to version.
    """
    run = subprocess.run

    def keep(command: list[str], *args: Any, **options: Any) -> subprocess.CompletedProcess[Any]:
        result = run(command, *args, **options)
        if "-o" in command and hasattr(options.get("stderr"), "name"):
            binary = Path(command[command.index("-o") + 1]).read_bytes()
            _reports[hashlib.sha256(binary).hexdigest()] = Path(options["stderr"].name).read_text()
        return result

    with mock.patch.object(subprocess, "run", keep), knobs.compilation.scope():
        knobs.compilation.always_compile = True
        yield


def attention_inputs(job: Job) -> list[torch.Tensor]:
    """q, k, v and the tiles; the variant is G, the query heads per key head, and maybe budgets."""
    from btok_kernels.layout import CondensedLayout

    budgets = [2] if "budgets" in job.variant else None
    layout = CondensedLayout.from_lengths([300], [40], 4, budgets=budgets)
    heads = 2 * int(job.variant.split()[0][1:]), 2, 2
    shapes = [(layout.num_rows, count, job.dim) for count in heads]
    return [*(torch.randn(x).to(getattr(torch, job.dtype)) for x in shapes), layout.tiles]


def attention(job: Job) -> None:
    """Forward and backward."""
    from btok_kernels import condensed_attention_triton as op

    q, k, v, tiles = attention_inputs(job)
    out, lse = op._forward(q, k, v, tiles, job.dim**-0.5)
    op._backward(torch.randn_like(out), q, k, v, out, lse, tiles, job.dim**-0.5)


def hopper(job: Job) -> None:
    """The same by the kernels for Hopper, which need triton 3.9."""
    from btok_kernels import condensed_attention_hopper as op
    from btok_kernels.hopper_backward import backward

    q, k, v, tiles = attention_inputs(job)
    out, lse = op.forward(q, k, v, tiles, job.dim**-0.5)
    backward(torch.randn_like(out), q, k, v, out, lse, tiles, job.dim**-0.5)


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


def late(job: Job) -> None:
    """Scores of late interaction and both gradients; the variant is the tokens of a row."""
    from btok_kernels.late_interaction_triton import TRITON

    dtype, tokens = getattr(torch, job.dtype), int(job.variant[1:])
    query, key = (torch.randn(n, tokens, job.dim).to(dtype) for n in (40, 100))
    scores, where = TRITON.scores(query, key)
    d_query, d_key = (torch.zeros(x.shape) for x in (query, key))
    TRITON.differentiate(scores, where, query, key, d_query, d_key)


OPS = {"attention": attention, "contrastive": contrastive, "late": late, "hopper": hopper}


def compile_job(job: Job) -> list[Row]:
    """The rows of one job's launches."""
    with kept_reports(), recorded_launches(job.arch) as launches:
        OPS[job.op](job)
    return [describe(job, launched) for launched in launches.values()]


def describe(job: Job, launched: Launch) -> Row:
    """What is to be said of one launch."""
    kernel, constants = launched.kernel, launched.constants
    name = launched.name.strip("_").removesuffix("_kernel")
    if name == "dkdv" and not (constants.get("HAS_DK", 1) and constants.get("HAS_DV", 1)):
        name = "dk" if constants["HAS_DK"] else "dv"
    sizes = {key[6:]: size for key, size in constants.items() if key[:6] == "BLOCK_"}
    report = sass.report(_reports[hashlib.sha256(kernel.asm["cubin"]).hexdigest()])
    program = sass.parse(disassembled(kernel.asm["cubin"])) if job.arch in sass.DEVICES else []
    hgmma, hmma = (sum(line.starts(opcode) for line in program) for opcode in ("HGMMA", "HMMA"))
    return Row(
        name,
        *job[1:],
        " ".join(f"{key}{size}" for key, size in sizes.items()),
        12 if job.op == "hopper" else kernel.metadata.num_warps,
        constants.get("BUFFERS", kernel.metadata.num_stages),
        kernel.metadata.shared,
        *report,
        hgmma,
        hmma,
        tuple(sass.hazards(program)) if program else (),
        tuple(loop_rows(name, job, kernel.metadata, report, program, sizes)),
        overlap.warpgroups(kernel.asm["ptx"]) if job.op == "hopper" else None,
    )


def loop_rows(
    name: str,
    job: Job,
    metadata: Any,
    report: sass.Report,
    program: list[sass.Instruction],
    sizes: dict[str, int],
) -> Iterator[LoopRow]:
    """The main loops of a kernel that multiplies."""
    if name not in WORK or not program:
        return
    products, *axes = WORK[name]
    useful = 2 * products * sizes[axes[0]] * sizes[axes[1]] * sizes[axes[2]]
    padded, warps = sizes["D"], metadata.num_warps
    if job.op == "attention" and job.dim > padded:  # the head dim in pieces
        pieces = -(-job.dim // padded)
        useful, padded = useful * pieces, padded * pieces
    share = job.dim / padded if job.op in ("attention", "hopper") else 1.0
    blocks = sass.blocks_per_sm(job.arch, report.registers, metadata.shared, warps)
    if job.op == "hopper":  # two consumers, each with loops of its own, as two blocks of a half
        useful, warps, blocks = useful // 2, 4, 2
    for loop in sass.main_loops(program):
        executed = loop.flops * warps / 4
        tflops = None
        if blocks and job.dtype != "float32":
            tflops = share * sass.rate(program, loop, job.arch, warps, blocks, useful)
        yield LoopRow(
            loop.instructions,
            loop.products,
            loop.drained,
            loop.exponentials,
            loop.barriers,
            loop.waits,
            loop.copies,
            loop.waits_for_all,
            executed / useful,
            tflops,
            loop.beside,
        )


def disassembled(binary: bytes) -> str:
    """The SASS of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        # without the analysis of data flow, which takes long and prints the same here
        command = [knobs.nvidia.nvdisasm.path, "-c", "-ndf", file.name]
        return subprocess.check_output(command, text=True)


def faults(row: Row) -> Iterator[str]:
    """What is wrong with one launch."""
    if row.spills > (0 if "hopper" in row.variant else SPILL_LIMIT):
        yield f"spills {row.spills} bytes ({row.registers} registers)"
    if row.shared > SHARED_LIMIT[row.arch] << 10:
        yield f"{row.shared} bytes of shared memory, limit {SHARED_LIMIT[row.arch] << 10}"
    if row.serialized:
        yield f"ptxas serialises its products: {', '.join(row.serialized)}"
    yield from row.hazards
    if row.warpgroups:
        yield from overlap.faults(row.kernel, row.warpgroups)
    if row.kernel not in WORK or row.arch not in sass.DEVICES:
        return
    if row.dtype != "float32":
        # a warpgroup multiplies 64 rows at a time
        smallest = min(map(int, re.findall(r"[MN](\d+)", row.blocks)))
        tall = smallest >= 64 and row.warps >= 4
        if row.arch == 90 and tall and not row.hgmma:
            yield "no HGMMA"
        elif not row.hgmma and not row.hmma:
            yield "no tensor-core instruction"
    if not row.loops:
        yield "no loop with products was found"
    for number, loop in enumerate(row.loops, 1):
        where = f"main loop {number} of {len(row.loops)}"
        if loop.drained > WORK[row.kernel][0]:
            yield f"{where}: {loop.drained} of {loop.products} products are waited for one by one"
        if loop.ratio > RATIO_LIMIT:
            yield f"{where}: executed / useful products {loop.ratio:.2f}"
        if loop.waits_for_all and row.stages > 1:
            yield f"{where}: waits for all copies before its first product, {row.stages} stages"
        if not loop.copies and row.dtype != "float32" and "hopper" not in row.variant:
            yield f"{where}: copies nothing ahead of its products"


def problems(rows: list[Row]) -> list[str]:
    """What must not ship, each line with its launch."""
    return [
        f"{row.kernel} sm_{row.arch} D {row.dim} {row.dtype} {row.variant} {row.blocks}: {fault}"
        for row in rows
        for fault in faults(row)
    ]


class Run(NamedTuple):
    """The rows of one Triton, and the versions that made them."""

    triton: str
    ptxas: dict[int, str]  # by architecture
    rows: list[Row]


HEAD = (
    "kernel", "arch", "dim", "dtype", "variant", "blocks", "warps", "stages", "shared",
    "registers", "spills", "serialised", "hazards", "instructions", "products", "exponentials",
    "barriers", "waits", "copies", "executed / useful", "D / BLOCK_D", "model",
)  # fmt: skip


def waits(waited: tuple[str, ...]) -> str:
    """In a few words: "copies 2, 12 x products 0"."""
    runs = [(name, len(list(same))) for name, same in itertools.groupby(waited)]
    return ", ".join(f"{count} x {name}" if count > 1 else name for name, count in runs)


def cells(row: Row) -> tuple[str, ...]:
    """A line of the table; what is told of several main loops is apart by slashes."""

    def each(form: Callable[[LoopRow], str]) -> str:
        texts = [form(loop) for loop in row.loops]
        return texts[0] if len(set(texts)) == 1 else " / ".join(texts)

    padded = re.search(r"D(\d+)", row.blocks)
    share = row.dim / (-(-row.dim // int(padded[1])) * int(padded[1])) if padded else 1.0
    return (
        *map(str, row[:9]),
        str(row.registers),
        str(row.spills),
        ", ".join(row.serialized) or "no",
        str(len(row.hazards)),
        each(lambda loop: str(loop.instructions)),
        each(lambda loop: str(loop.products)),
        each(lambda loop: str(loop.exponentials)),
        each(lambda loop: str(loop.barriers)),
        each(lambda loop: waits(loop.waits)),
        each(lambda loop: f"{loop.copies}{' after the wait for all' * loop.waits_for_all}"),
        each(lambda loop: f"{loop.ratio:.2f}"),
        f"{share:.2f}" if row.kernel in ATTENTION else "",
        each(lambda loop: f"{loop.tflops:.0f}" if loop.tflops else ""),
    )


def merged(
    rows: list[Row],
    head: tuple[str, ...] = HEAD,
    of: Callable[[Row], tuple[str, ...]] = cells,
) -> list[tuple[str, ...]]:
    """Lines of a table, sorted; those that differ in the variant or dtype alone are one."""
    lines = [of(row) for row in sorted(rows, key=lambda row: row[:6])]
    for column in (head.index("variant"), head.index("dtype")):
        same: dict[tuple[str, ...], list[str]] = {}
        for line in lines:
            same.setdefault((*line[:column], "", *line[column + 1 :]), []).append(line[column])
        lines = [
            (*line[:column], ", ".join(dict.fromkeys(found)), *line[column + 1 :])
            for line, found in same.items()
        ]
    return lines


def markdown(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(head)} |", f"|{'--|' * len(head)}"] + [
        f"| {' | '.join(line)} |" for line in lines
    ]


OF_WARPGROUPS = (
    "kernel", "dim", "variant", "dtype", "registers of a consumer", "of the producer",
    "in flight after each wait", "over the softmax", "exponentials beside products",
)  # fmt: skip


def of_warpgroups(row: Row) -> tuple[str, ...]:
    """A line of the table of the kernels for Hopper."""
    assert row.warpgroups
    consumers, producers, loops = row.warpgroups
    overlaps = [(", ".join(map(str, loop.waits)), str(loop.softmax)) for loop in loops]
    beside = [f"{loop.beside} of {loop.exponentials}" for loop in row.loops]
    return (
        row.kernel, str(row.dim), row.variant.removesuffix(" hopper"), row.dtype,
        *(", ".join(map(str, counts)) for counts in (consumers, producers)),
        *(" / ".join(dict.fromkeys(told)) for told in zip(*overlaps, strict=True)),
        " / ".join(beside if len(set(beside)) > 1 else beside[:1]),
    )  # fmt: skip


def warpgroups(rows: list[Row]) -> list[str]:
    """Of the kernels for Hopper, what the other table does not tell."""
    rows = [row for row in rows if row.warpgroups]
    if not rows:
        return []
    return [
        "",
        "### Warpgroups",
        "",
        "Of the kernels for Hopper. From the PTX: registers of a thread by `setmaxnreg` (above are "
        "those that the kernel starts with), groups of products that each wait of a main loop "
        "leaves in flight, and how many are over every exponential. From the machine code, in "
        "which ptxas may have moved an exponential behind a wait: how many are still issued while "
        "a product is in flight.",
        "",
        *markdown(OF_WARPGROUPS, merged(rows, OF_WARPGROUPS, of_warpgroups)),
    ]


def unmasked(row: Row) -> LoopRow:
    """The main loop that most blocks take: without a mask it has fewer instructions."""
    return min(row.loops, key=lambda loop: loop.instructions)


def attention_rates(rows: list[Row]) -> dict[tuple[int, int, str, str], dict[str, float]]:
    """Modelled TFLOP/s of forward and backward by architecture, head dim, dtype and variant.

    The backward's are its 10 D FLOPs a pair of row and key over the time of dK, dV (8 D executed)
    and dQ (6 D executed).
    """
    found: dict[tuple[int, int, str, str], dict[str, float]] = {}
    for row in rows:
        if row.kernel in ATTENTION and row.loops and (rate := unmasked(row).tflops):
            found.setdefault(row[1:5], {})[row.kernel] = rate
    for rates in found.values():
        if {"dk", "dv"} <= rates.keys():
            rates["dkdv"] = 8 / (6 / rates["dk"] + 4 / rates["dv"])
        if {"dkdv", "dq"} <= rates.keys():
            rates["backward"] = 10 / (8 / rates["dkdv"] + 6 / rates["dq"])
    return found


def summary(runs: list[Run]) -> list[str]:
    """The attention's modelled rates, a line per architecture and head dim."""
    kinds = ("forward", "backward", "dkdv", "dq")
    of = [attention_rates(run.rows) for run in runs]
    keys = sorted({key for rates in of for key in rates})
    head = tuple(f"{kind}, {run.triton}" for run in runs for kind in kinds)
    lines = []
    for key in keys:
        if key[2] == "bfloat16" and (key[1] in (64, 128, 256) or len(keys) < 9):
            lines.append((*map(str, key), *(
                f"{rates[key][kind]:.0f}" if kind in rates.get(key, {}) else ""
                for rates in of for kind in kinds
            )))  # fmt: skip
    return markdown(("arch", "dim", "dtype", "variant", *head), lines) if lines else []


def advice(runs: list[Run]) -> list[str]:
    """Which Triton to take on Hopper, where there are two to choose from."""
    if len(runs) < 2 or 90 not in runs[0].ptxas:
        return []
    said = []
    for run in runs:
        rows = [row for row in run.rows if row.arch == 90]
        said.append(
            f"Triton {run.triton} takes ptxas {run.ptxas[90]} for sm_90: "
            f"{sum(bool(row.serialized) for row in rows)} of {len(rows)} kernels with serialised "
            f"products, {sum(len(row.hazards) for row in rows)} hazards found in the machine code, "
            f"at most {max(row.spills for row in rows)} bytes of spills."
        )
    return [
        "",
        "## Which Triton on Hopper",
        "",
        *(f"- {line}" for line in said),
        "",
        "ptxas 12.8 and 12.9 are known to give away a register that a product in flight still "
        "reads (triton-lang/triton pull requests 11781 and 11854), silently and depending on the "
        "kernel. So on Hopper prefer a Triton whose ptxas is 13.3 or newer, or set "
        "TRITON_PTXAS_PATH to one; with an older one, kernels changed by hand or by "
        "BTOK_AUTOTUNE=1 are not covered by the check above, those listed here are.",
    ]


MODEL = " ".join(str(sass.rate.__doc__).partition("A model")[2].split())


def table(runs: list[Run]) -> str:
    """A Markdown page: summary, what must not ship, and all launches of each Triton."""
    lines = [
        "# Triton kernels, compiled ahead of time",
        "",
        "By `make aot`, without a GPU; nothing here is measured. Variant: query heads per key head "
        "of the attention, `hopper` by the kernels of that name; options given to the loss, none "
        "or all; tokens of a row of late interaction. Shared, spills: bytes. From `instructions` "
        "on: one iteration of a main loop (one that multiplies), per warp; first loop / second "
        "loop. `copies 2`: waits until two groups of copies are in flight.",
        "",
        f"**Modelled TFLOP/s.** A model{MODEL}",
        "",
        "`DEVICES`: "
        + "; ".join(
            f"sm_{arch} {device.multiprocessors} SMs at {device.hertz / 1e9} GHz, {device.flops} "
            f"half-precision FLOPs a cycle and SM (HMMA {device.mma_share} of that)"
            for arch, device in sass.DEVICES.items()
        )
        + ".",
        "",
        *summary(runs),
        *advice(runs),
    ]
    for run in runs:
        said = problems(run.rows)
        ptxas = ", ".join(f"sm_{arch} by ptxas {name}" for arch, name in run.ptxas.items())
        lines += [
            "",
            f"## Triton {run.triton}",
            "",
            f"{ptxas}. {len(run.rows)} kernels, the worst with "
            f"{max(row.registers for row in run.rows)} registers and "
            f"{max(row.spills for row in run.rows)} bytes of spills; {len(said)} problems.",
            "",
            *(f"- {line}" for line in said),
            *[""] * bool(said),
            *markdown(HEAD, merged(run.rows)),
            *warpgroups(run.rows),
        ]
    return "\n".join(lines) + "\n"


def finish(runs: list[Run], out: Path | None, check: bool) -> None:
    """Write or print the page; with `check`, exit 1 on anything that must not ship."""
    if out:
        out.write_text(table(runs))
    else:
        print(table(runs))
    said = [f"triton {run.triton}: {line}" for run in runs for line in problems(run.rows)]
    if check and said:
        sys.exit("aot: must not ship:\n" + "\n".join(said))


def ptxas_version(arch: int) -> str:
    """Of the ptxas that Triton takes for an architecture."""
    text = subprocess.check_output([get_ptxas(arch).path, "--version"], text=True)
    found = re.search(r"V([\d.]+)", text)
    return found[1] if found else "?"


def read_run(path: Path) -> Run:
    """What `--rows` wrote."""
    version, ptxas, rows = json.loads(path.read_text())
    return Run(
        version,
        {int(arch): name for arch, name in ptxas.items()},
        [
            Row._make(
                (
                    *fields,
                    tuple(serialized),
                    hgmma,
                    hmma,
                    tuple(hazards),
                    tuple(LoopRow._make((*loop[:5], tuple(loop[5]), *loop[6:])) for loop in loops),
                    overlap.read(groups) if groups else None,
                )
            )
            for *fields, serialized, hgmma, hmma, hazards, loops, groups in rows
        ],
    )


def other_run(folder: Path, arguments: list[str]) -> Run:
    """The same with the Triton in `folder`; in bfloat16, as the others' code differs little, and in
    float16 what is this Triton's alone."""
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch, "rows.json")
        found = [str(folder.resolve()), os.environ.get("PYTHONPATH", "")]
        arguments = [*arguments, "--dtypes", "bfloat16", "float16", "--rows", str(rows)]
        subprocess.run(
            [sys.executable, "-m", "tests.compiled.aot", *arguments],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, found))},
            check=True,
        )
        return read_run(rows)


def jobs(args: argparse.Namespace) -> Iterator[Job]:
    """What the arguments ask for, less what makes nearly the same code again.

    6 query heads per key head, by default; bfloat16 for every head dim, with 1 head too and in
    float16 for those that a line of the launch tables ends with, which is all there is where no
    machine code is read; fp32, which no tensor core multiplies, for the first architecture.
    """
    ends = (64, 128, 256)
    for arch, dtype in itertools.product(args.archs, args.dtypes):
        read = arch in sass.DEVICES
        same = dtype == "float32" or (dtype != "bfloat16" and not read)
        if same and arch != args.archs[0]:
            continue
        ops = {args.only} if args.only else OPS.keys()
        if args.rows and dtype == "float16":  # of another Triton: what only that one compiles
            ops = ops & {"hopper"}
        if "attention" in ops:
            few = [d for d in args.head_dims if d in ends] or args.head_dims
            every = read if dtype == "bfloat16" else dtype == "float32" and not args.rows
            dims = args.head_dims if every else few
            also_one = dtype == "bfloat16" and read and not (args.groups or args.rows)
            calls = [*itertools.product(args.groups or [6], dims)]
            calls += itertools.product([1], few if also_one else [])
            for heads, dim in calls:
                yield Job("attention", arch, dim, dtype, f"G{heads}")
            for dim in few if also_one else []:
                yield Job("attention", arch, dim, dtype, "G6 budgets")
        if "hopper" in ops and arch == 90 and dtype != "float32":
            dims = [dim for dim in launch.HOPPER_DIMS if dim in args.head_dims]
            for dim in dims if not launch.no_gluon() else []:
                several = dim in ends and dtype == "bfloat16"
                for variant in ("G6", "G1", "G6 budgets") if several else ("G6",):
                    yield Job("hopper", arch, dim, dtype, f"{variant} hopper")
        if "contrastive" in ops:
            for variant in ("none", "all"):
                yield Job("contrastive", arch, 1536, dtype, variant)
        if "late" in ops:
            yield Job("late", arch, 128, dtype, "K16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="write a Markdown page here")
    parser.add_argument("--rows", type=Path, help="write the rows alone here, as JSON")
    parser.add_argument("--also", type=Path, help="the folder of another Triton, to look at too")
    parser.add_argument("--check", action="store_true", help="exit 1 if anything must not ship")
    parser.add_argument("--only", choices=OPS, help="one op")
    parser.add_argument("--archs", type=int, nargs="+", default=DEFAULT_ARCHS)
    parser.add_argument("--head-dims", type=int, nargs="+", default=HEAD_DIMS)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16", "float32"])
    parser.add_argument("--groups", type=int, nargs="+", help="query heads per key head")
    args = parser.parse_args()
    if launch.interpreted():
        sys.exit("aot: unset TRITON_INTERPRET; the interpreter compiles nothing")
    if unknown := set(args.archs) - SHARED_LIMIT.keys():
        sys.exit(f"aot: --archs has {sorted(unknown)}, known are {sorted(SHARED_LIMIT)}")
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), get_context("spawn")) as pool:
        rows = [row for found in pool.map(compile_job, jobs(args)) for row in found]
    run = Run(triton.__version__, {arch: ptxas_version(arch) for arch in args.archs}, rows)
    if args.rows:
        args.rows.write_text(json.dumps(run))
        return
    runs = [run]
    if args.also:
        archs = [str(arch) for arch in args.archs if arch in sass.DEVICES] or map(str, args.archs)
        forwarded = ["--archs", *archs, "--head-dims", *map(str, args.head_dims)]
        forwarded += ["--only", args.only] if args.only else []
        runs.append(other_run(args.also, forwarded))
    finish(runs, args.out, args.check)


if __name__ == "__main__":
    main()
