"""What an index costs as it grows: to write, extend and search; beside one array searched whole.

    python examples/studies/index.py [--rows 1000 10000 100000 1000000] [--out bench/results]
    python examples/studies/index.py --page bench/results/index.json

Every step is a process of its own, whose peak memory is what the system says of it. Vectors are
synthetic: clusters of a hundred in 64 of the D dimensions, with noise in all; what real embeddings
give an approximate index is told by `python -m btok index INDEX --build IVF_PQ`. The folder that is
encoded has as many text files, and the model is the pocket benchmark's, untrained.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench import plots
from bench.report import table
from btok.encoder import BTokEncoder
from btok.files import write_json
from btok.tools.folder import list_files, update
from btok.tools.index import Index
from btok.tools.rows import Row
from btok.tools.tables import compressed
from examples.studies.common import parse
from examples.studies.provenance import facts, surroundings
from train.pocket.model import build

BLOCK = 1 << 13
QUERIES, K = 100, 10
BATCH_TOKENS, ENCODED = 16384, 128  # of the encoder; its dimensions
SMALLER = ("float16", "int8")  # storage
NEW = 100  # 1 in so many rows is added afterwards
META = {"model": "synthetic", "settings": {}}
STEPS = {  # in this order, each with what it is called on the page
    "make": "make the vectors",
    "write": "write all",
    "add": "add 1 %",
    "before": "search one array, all scores sorted",
    "exact": "search exactly",
    "build": "build IVF_PQ",
    "indexed": "search IVF_PQ",
    "files": "write text files",
    "encode": "encode a folder",
    "again": "encode it again, nothing new",
}
SHOWN = ("write", "add", "before", "exact", "build", "indexed", "encode", "again")
PACKAGES = ("pylance", "pyarrow", "numpy", "torch", "transformers")
Rows = NDArray[np.float32]


@dataclass(frozen=True)
class Options:
    """The options of the study: what to measure, and where to write it."""

    rows: tuple[int, ...] = (1_000, 10_000, 100_000, 1_000_000)
    """Sizes of the table."""
    dims: int = 512
    """D, of the vectors."""
    out: Path = Path("bench/results")
    """Folder of index.json and the page."""
    work: Path | None = None
    """Where tables lie while they are measured; a temporary folder by default."""
    page: Path | None = None
    """Make the page of this results file, and measure nothing."""
    step: str | None = None
    """One step alone, on the first of the sizes, in --work: what a child process does."""


def vectors(rows: int, dims: int, seed: int) -> Iterator[Rows]:
    """Unit vectors, a block at a time; of another seed, others of the same clusters."""
    shared = np.random.default_rng(0)
    basis = shared.standard_normal((64, dims), np.float32)
    centres = shared.standard_normal((max(1, rows // 100), 64), np.float32)
    rng = np.random.default_rng((seed, 1))
    for first in range(0, rows, BLOCK):
        count = min(BLOCK, rows - first)
        inner = centres[rng.integers(0, len(centres), count)]
        inner = inner + 0.7 * rng.standard_normal((count, 64), np.float32)
        made = inner @ basis + 0.5 * rng.standard_normal((count, dims), np.float32)
        yield made / np.linalg.norm(made, axis=1, keepdims=True)


def as_rows(first: int, block: Rows) -> list[Row]:
    """A block of vectors as index rows such as a folder's files give."""
    names = range(first, first + len(block))
    return [
        Row({"id": f"{i:064x}.png@2-1", "uri": f"folder/{i:09}.png", "size": i}, row, 300)
        for i, row in zip(names, block, strict=True)
    ]


def asked(rows: int, dims: int) -> Rows:
    return next(vectors(rows, dims, 2))[:QUERIES]


def searched_whole(
    stored: Rows, queries: Rows, k: int, storage: str = "float32"
) -> list[list[tuple[float, int]]]:
    """Search as an index did before it was a table: all scores at once, all sorted."""

    def scores_of(rows: Rows) -> Rows:
        if storage != "float32":
            smaller, scale = compressed(rows, storage)
            rows = smaller.astype(np.float32) * scale[:, None]
        return rows @ queries.T

    blocks = range(0, len(stored), 1 << 16)
    scores = np.concatenate([scores_of(stored[i : i + (1 << 16)]) for i in blocks]).T
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return [[(float(s[row]), int(row)) for row in b] for s, b in zip(scores, best, strict=True)]


def step(name: str, rows: int, dims: int, work: Path) -> dict[str, Any]:
    """One step's seconds and, in MiB, peak memory; and what it found, to be compared."""
    array, folder = work / "vectors.npy", work / "index"
    more: dict[str, Any] = {}
    start = time.perf_counter()
    if name == "make":
        stored = np.lib.format.open_memmap(array, "w+", np.float32, (rows, dims))
        for i, block in enumerate(vectors(rows, dims, 1)):
            stored[i * BLOCK : i * BLOCK + len(block)] = block
        stored.flush()
    elif name == "write":
        Index.create(folder, META, dims, rows=parts_of(array, rows, dims))
    elif name == "files":
        write_files(work / "files", rows)
        for made in build(4, seed=0):
            made.save_pretrained(work / "checkpoint")
    elif name in ("encode", "again"):
        encoder = BTokEncoder.from_pretrained(work / "checkpoint")
        forward = timed(encoder)
        start = time.perf_counter()
        listed = list_files(work / "files")
        update(encoder, work / "files", listed, work / "encoded", "", BATCH_TOKENS)
        more["of it the model"] = round(sum(forward), 4)
    else:
        index, queries = Index.open(folder), asked(rows, dims)
        if name == "add":
            new = np.concatenate(list(vectors(max(1, rows // NEW), dims, 3)))
            added = as_rows(rows, new)
            start = time.perf_counter()
            index.add(added)
        elif name == "build":
            if rows >= 1000:
                more["recall of stored vectors"] = round(index.build("IVF_PQ"), 4)
                more["probes"] = index.meta["probes"]
        elif name == "before":
            stored = np.load(array, mmap_mode="r")
            start = time.perf_counter()
            found = searched_whole(stored, queries, K)
            more["found"] = [[row for _, row in hits] for hits in found]
            taken = time.perf_counter() - start
            for storage in SMALLER:
                other = searched_whole(stored, queries, K, storage)
                more[storage] = [[row for _, row in hits] for hits in other]
            start = time.perf_counter() - taken
        else:
            start = time.perf_counter()
            hits = index.search(queries, K, exact=name == "exact")
            more["found"] = [[int(hit.item["id"][:64], 16) for hit in each] for each in hits]
    return {
        "seconds": round(time.perf_counter() - start, 4),
        "peak MiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        **more,
    }


def parts_of(array: Path, rows: int, dims: int) -> Iterator[list[Row]]:
    """Read, and not mapped, so that the pages of the file are not counted as this process's."""
    with open(array, "rb") as file:
        file.seek(-4 * rows * dims, 2)  # behind numpy's head
        for first in range(0, rows, BLOCK):
            count = min(BLOCK, rows - first)
            block = np.fromfile(file, np.float32, count * dims)
            yield as_rows(first, block.reshape(count, dims))


def write_files(folder: Path, count: int) -> None:
    """Text files of a few words, a thousand in a folder."""
    for first in range(0, count, 1000):
        (inner := folder / f"{first // 1000:04}").mkdir(parents=True)
        for i in range(first, min(first + 1000, count)):
            (inner / f"{i:07}.txt").write_text(f"text {i}")


def timed(encoder: BTokEncoder) -> list[float]:
    """Seconds of each of the model's forward passes, from now on."""
    seconds: list[float] = []
    encoder.model.register_forward_pre_hook(lambda *_: seconds.append(-time.perf_counter()))

    def after(*_: Any) -> None:
        seconds[-1] += time.perf_counter()

    encoder.model.register_forward_hook(after)
    return seconds


def measure(options: Options) -> dict[str, Any]:
    """All steps at all sizes, each in a process of its own."""
    sizes: dict[str, Any] = {}
    for rows in options.rows:
        work = Path(tempfile.mkdtemp(prefix="btok-index-", dir=options.work))
        found: dict[str, Any] = {}
        try:
            for name in STEPS:
                command = [sys.executable, __file__, "--step", name, "--rows", str(rows)]
                command += ["--dims", str(options.dims), "--work", str(work)]
                said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                found[name] = json.loads(said.splitlines()[-1])
                print(rows, name, found[name]["seconds"], found[name]["peak MiB"], flush=True)
            files = [path for path in (work / "index").rglob("*") if path.is_file()]
            disk = sum(path.stat().st_size for path in files if "_indices" not in path.parts)
            of_index = sum(path.stat().st_size for path in files if "_indices" in path.parts)
            found["disk MiB"] = {"table": round(disk / 2**20), "index": round(of_index / 2**20)}
        finally:
            shutil.rmtree(work)
        sizes[str(rows)] = judged(found, rows)
    settings = {"dims": options.dims, "queries": QUERIES, "k": K, "encoded dims": ENCODED}
    of = surroundings("examples/studies/index.py", packages=PACKAGES)
    return {"sizes": sizes, **settings, **of}


def judged(found: dict[str, Any], rows: int) -> dict[str, Any]:
    """Recall in place of what was found. A RuntimeError where an exact search missed anything of
    those that were there before."""
    right = [set(each) for each in found["before"].pop("found")]
    for storage in SMALLER:
        found["before"][f"recall@10 of {storage}"] = overlap(right, found["before"].pop(storage))
    exact = [set(each) for each in found["exact"].pop("found")]
    for one, other in zip(right, exact, strict=True):
        old = {row for row in other if row < rows}  # some of the new may be nearer
        if not old <= one or len(one - old) > len(other - old):
            raise RuntimeError(f"of {rows} rows the exact search found {old}, expected {one}")
    found["indexed"]["recall@10"] = overlap(exact, found["indexed"].pop("found"))
    return found


def overlap(right: Sequence[Set[int]], got: Sequence[Sequence[int]]) -> float:
    """The share of the K right rows that were found, the mean over queries."""
    hits = [len(one & set(other)) / K for one, other in zip(right, got, strict=True)]
    return round(sum(hits) / len(hits), 4)


def slope(sizes: Sequence[int], values: Sequence[float]) -> float:
    """The slope through the last two points, on logarithmic axes."""
    (a, b), (x, y) = sizes[-2:], values[-2:]
    return float(np.log(y / x) / np.log(b / a))


def page(results: Mapping[str, Any]) -> str:
    """The study's Markdown page."""
    sizes = [int(each) for each in results["sizes"]]
    of = list(results["sizes"].values())
    head = ["step", *(f"{size:,}" for size in sizes), "slope"]
    seconds, memory = [head], [[*head[:-1]]]
    for name in SHOWN:
        values = [each[name]["seconds"] for each in of]
        steep = f"{slope(sizes, values):.2f}" if len(sizes) > 1 else ""
        seconds.append([STEPS[name], *(f"{value:.3g}" for value in values), steep])
        memory.append([STEPS[name], *(f"{each[name]['peak MiB']:,}" for each in of)])
    last, least = of[-1], of[0]["make"]["peak MiB"]
    model = 100 * last["encode"]["of it the model"] / last["encode"]["seconds"]
    ratios = [
        ["question", "measured", "asked"],
        ["adding 1 %, of writing all", f"{100 * ratio(last, 'add', 'write'):.1f} %", "under 3 %"],
        ["the array's time over exact search's", f"{ratio(last, 'before', 'exact'):.1f}", ""],
        [
            "the array's time over IVF_PQ's",
            f"{ratio(last, 'before', 'indexed'):.1f}",
            "10 at least",
        ],
        ["recall@10 of IVF_PQ", f"{last['indexed']['recall@10']:.3f}", "0.95 at least"],
        *(
            [f"recall@10 of {name}, searched exactly", f"{kept:.3f}", ""]
            for name in SMALLER
            for kept in [last["before"][f"recall@10 of {name}"]]
        ),
        ["peak memory of the table's steps, MiB", f"{peak(last):,}", "under 1,536"],
    ]
    disk = [f"{each['disk MiB']['table']:,} + {each['disk MiB']['index']:,}" for each in of]
    lines = [
        "# An index as it grows",
        "- command: `python examples/studies/index.py`; this page of its results with `--page "
        "bench/results/index.json`",
        f"- {results['dims']} dimensions in float32, {results['queries']} queries at once, "
        f"k = {results['k']}",
        facts(results),
        "\nAll figures are **measured**, each step in a process of its own; its peak memory is "
        f"that of the process, of which Python and its libraries take {least:,}. Vectors are "
        "synthetic: clusters of a hundred in 64 of the dimensions, with noise in all. The array is "
        "how an index was searched before it was a table: a file in memory's map, all scores at "
        "once, all sorted. The folder has as many text files of two words; the model that encodes "
        f"them is the pocket benchmark's, untrained, of {results['encoded dims']} dimensions.",
        f"\n## At {sizes[-1]:,} rows\n\n{table(*ratios)}",
        f"\n## Seconds\n\n{table(*seconds)}",
        "\nThe slope is that of the last two sizes on logarithmic axes: 1 is linear. Of encoding "
        f"{sizes[-1]:,} files the model took {model:.0f} %.",
        "\n![Seconds over rows](index.png)",
        f"\n## Peak memory, MiB\n\n{table(*memory)}",
        "\n## On disk, MiB\n\n" + table(["", *head[1:-1]], ["table + approximate index", *disk]),
        f"\n{beyond(results)}",
    ]
    return "\n".join(lines) + "\n"


def ratio(found: Mapping[str, Any], one: str, other: str) -> float:
    return found[one]["seconds"] / found[other]["seconds"]


def peak(found: Mapping[str, Any]) -> int:
    return max(found[name]["peak MiB"] for name in ("write", "add", "exact", "build", "indexed"))


def beyond(results: Mapping[str, Any]) -> str:
    """Arithmetic for 10^8 rows of 1,536 dimensions, by what was measured for the largest table."""
    rows, dims = 10**8, 1536
    size, last = list(results["sizes"].items())[-1]
    share = rows / int(size) * dims / results["dims"]
    written = last["write"]["seconds"] * share / 3600
    scanned = last["exact"]["seconds"] * share / 60
    least = next(iter(results["sizes"].values()))["again"]["peak MiB"]
    each = max(0, last["again"]["peak MiB"] - least) * 2**20 / int(size)
    rates = [["GPUs", "at 50 inputs/s each", "at 500 inputs/s each"]]
    for gpus in (8, 64):
        hours = [f"{rows / rate / gpus / 3600:,.1f} h" for rate in (50, 500)]
        rates.append([str(gpus), *hours])
    sizes = ", ".join(
        f"{name} {rows * dims * width / 1e9:,.0f} GB"
        for name, width in (("float32", 4), ("float16", 2), ("int8", 1))
    )
    codes = rows * (dims // 8 + 8) / 1e9
    return (
        "## Beyond this machine: 10^8 rows of 1,536 dimensions (modelled)\n\n"
        f"Vectors: {sizes}; IVF_PQ's codes {codes:,.0f} GB beside them. Writing at the rate above "
        f"takes {written:,.1f} hours of one process, an exact search of {QUERIES} queries "
        f"{scanned:,.0f} minutes: past some 10^7 rows only the approximate index is for people who "
        f"wait. Of each file a process keeps {each:,.0f} bytes by the peaks above (its path, two "
        f"digests, where its row stands): {each * rows / 1e9:,.0f} GB, eight times that on a "
        "machine of eight processes. Encoding is what takes the time; the rates are assumptions, "
        f"not measured on a GPU:\n\n{table(*rates)}\n\n"
        "At 64 GPUs of 500 inputs/s a second brings 32,000 inputs: pictures of 200 KB are 6.4 GB/s "
        "to read, which is more than most file servers give, and the bottleneck. Parts of 256 rows "
        "would be 390,625 commits: `torchrun` joins what ten seconds make, Ray makes one commit of "
        "all."
    )


def picture(results: Mapping[str, Any], path: Path) -> None:
    """Seconds over rows."""
    figure = plots.canvas(4.2)
    axes = figure.add_subplot()
    sizes = [int(each) for each in results["sizes"]]
    shown = []
    for name, colour in zip(SHOWN, (plots.BLUE, *plots.COLOURS), strict=False):
        values = [each[name]["seconds"] for each in results["sizes"].values()]
        shown += values
        axes.plot(sizes, values, marker="o", color=colour, label=STEPS[name])
    plots.log_axis(axes, "x", sizes, sizes)
    plots.log_axis(axes, "y", 10.0 ** np.arange(-4, 5), shown)
    axes.set(xlabel=f"rows of {results['dims']} dimensions", ylabel="seconds")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def write_page(results: Mapping[str, Any], folder: Path) -> None:
    (folder / "index.md").write_text(page(results))
    picture(results, folder / "index.png")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(Options, argv, "examples/studies/index.py")
    if options.step is not None:
        print(json.dumps(step(options.step, options.rows[0], options.dims, options.work)))
        return 0
    if options.page is not None:
        write_page(json.loads(options.page.read_text()), options.page.parent)
        return 0
    results = measure(options)
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / "index.json", results)
    write_page(results, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
