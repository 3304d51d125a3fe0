"""What mining hard negatives costs as a data set grows, and that a killed run ends as a whole one.

    python examples/studies/mining.py [--rows 10000 100000] [--out bench/results]

Every run is a process of its own, whose peak memory is what the system says of it. Pairs are short
synthetic texts, and the model is a random Qwen3 of two layers and 64 dimensions. The smallest size
is compared with all scores made at once; each size is run once as a whole and once killed, without
warning, in encoding and in searching, and gone on with.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.report import table
from btok.encoder import BTokEncoder
from btok.files import sha256, write_json
from btok.model import BTokModel
from btok.processing import Processor
from btok.tokens import add_to_tokenizer
from examples.studies.common import parse
from examples.studies.provenance import facts, surroundings
from train.pocket.data import texts
from train.pocket.model import make_tokenizer

COUNT, LOW, HIGH = 4, 10, 100
NEAR = 2e-6  # in score, of what another sum gives
CHECKED = 500  # rows of the smallest size
PACKAGES = ("numpy", "torch", "transformers")
RUN = """
import json, resource, sys, time
from btok.tools.cli import main
start = time.perf_counter()
status = main(sys.argv[1:])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"seconds": round(time.perf_counter() - start, 1), "peak MiB": round(peak)}))
sys.exit(status)
"""


@dataclass(frozen=True)
class Options:
    """The options of the study: what to measure, and where to write it."""

    rows: tuple[int, ...] = (10_000, 100_000)
    """Sizes of the data set."""
    out: Path = Path("bench/results")
    """Folder of mining.json and the page."""
    note: str = ""
    """What else is to be known of this run, for the page."""


def pairs(path: Path, rows: int) -> None:
    """Short texts, all different; a positive shares a few words with its query."""
    rng = random.Random(0)
    words = sorted({word for text in texts() for word in text.split()})
    with open(path, "w") as file:
        for i in range(rows):
            own = rng.choices(words, k=5)
            query, positive = own[:3], own[2:] + rng.choices(words, k=rng.randint(0, 3))
            row = {"query": " ".join([*query, str(i)]), "positive": " ".join([*positive, str(i)])}
            file.write(json.dumps(row) + "\n")


def checkpoint(folder: Path) -> None:
    """A small text model of random weights, and its processor."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = make_tokenizer()
    btoks = add_to_tokenizer(tokenizer, 4)
    shape: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "head_dim": 16,
    }
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}
    torch.manual_seed(0)
    backbone = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **shape))
    BTokModel.from_backbone(backbone, btok_token_ids=btoks).save_pretrained(folder)
    Processor(tokenizer, model_type="qwen3").save_pretrained(folder)


def command(work: Path, output: Path) -> list[str]:
    mined = ["mine", str(work / "model"), str(work / "pairs.jsonl"), "--output", str(output)]
    mined += ["--count", str(COUNT), "--ranks", str(LOW), str(HIGH), "--scores"]
    return [sys.executable, "-c", RUN, *mined]


def whole(work: Path, output: Path) -> dict[str, Any]:
    """A run to its end: seconds and peak memory."""
    said = subprocess.run(command(work, output), check=True, capture_output=True, text=True).stdout
    return json.loads(said.splitlines()[-1])


def killed(work: Path, output: Path, ready: Callable[[], bool]) -> None:
    """A run that is killed, without warning, once something is so."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    child = subprocess.Popen(command(work, output), **quiet)  # type: ignore[call-overload]
    while not ready():
        if child.poll() is not None:
            raise RuntimeError(f"the run ended, with {child.returncode}, before it was killed")
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()


def half(parts: Path, pattern: str) -> bool:
    """Whether half of the blocks of the files of a pattern are there."""
    marks = b"".join(path.read_bytes() for path in parts.glob(pattern))
    return 2 * sum(marks) >= len(marks) > 0


def check(work: Path, output: Path) -> float:
    """The largest difference between a score and that of the same rank among all scores, of some
    rows; a RuntimeError where it is no rounding."""
    rows = [json.loads(line) for line in (work / "pairs.jsonl").read_text().splitlines()]
    got = [json.loads(line) for line in output.read_text().splitlines()]
    encoder = BTokEncoder.from_pretrained(work / "model")
    picked = random.Random(1).sample(range(len(rows)), min(CHECKED, len(rows)))
    queries = encoder.encode([rows[i]["query"] for i in picked], show_progress=False)
    keys = encoder.encode([row["positive"] for row in rows], show_progress=False)
    scores = queries.astype(np.float64) @ keys.T.astype(np.float64)
    worst = 0.0
    for place, i in enumerate(picked):
        others = np.sort(np.delete(scores[place], i))[::-1]
        right = [scores[place, i], *others[LOW - 1 : LOW - 1 + COUNT]]
        worst = max(worst, float(np.abs(np.array(right) - got[i]["scores"]).max()))
    if not worst <= NEAR:
        raise RuntimeError(f"scores are {worst:.1e} off, expected at most {NEAR}")
    return worst


def measure(rows: int, compared: bool) -> dict[str, Any]:
    """One size: a whole run, one that is killed twice, and what each gave."""
    work = Path(tempfile.mkdtemp(prefix="btok-mining-"))
    try:
        pairs(work / "pairs.jsonl", rows)
        checkpoint(work / "model")
        found: dict[str, Any] = {"whole": whole(work, work / "whole.jsonl")}
        found["sha256"] = sha256(work / "whole.jsonl")
        if compared:
            found["off by"] = check(work, work / "whole.jsonl")
        output, parts = work / "again.jsonl", work / "again.jsonl.parts"
        for pattern in ("positive.f32.done", "*.chosen.done"):
            killed(work, output, lambda pattern=pattern: half(parts, pattern))  # type: ignore[misc]
        found["gone on with"] = whole(work, output)
        if sha256(output) != found["sha256"]:
            raise RuntimeError(f"killed and gone on with, {rows} rows gave other bytes")
    finally:
        shutil.rmtree(work)
    return found


def page(results: Mapping[str, Any]) -> str:
    """The study's Markdown page."""
    rows = [["rows", "seconds", "rows a second", "peak MiB", "after two kills: seconds", "MiB"]]
    for size, found in results["sizes"].items():
        one, other = found["whole"], found["gone on with"]
        shown = f"{int(size):,}", one["seconds"], round(int(size) / one["seconds"])
        rows.append([*map(str, (*shown, one["peak MiB"], other["seconds"], other["peak MiB"]))])
    least, most = (list(results["sizes"].values())[at]["whole"]["peak MiB"] for at in (0, -1))
    off = max(found.get("off by", 0.0) for found in results["sizes"].values())
    return (
        "# Mining hard negatives\n"
        "- command: `python examples/studies/mining.py`\n"
        f"{facts(results)}\n\n"
        "All figures are **measured**, each run in a process of its own, the start of Python "
        f"included. Pairs are short texts; the model is a random Qwen3 of two layers and 64 "
        f"dimensions; {COUNT} negatives of the ranks {LOW} to {HIGH}, all scores compared.\n\n"
        f"{table(*rows)}\n\n"
        "Killed without warning half-way through encoding and half-way through searching, the same "
        "command went on and gave the same bytes at every size; the last two columns are of its "
        f"last run. Scores of the smallest size are within {off:.0e} of those of all pairs made at "
        f"once. From the smallest to the largest size the peak grew by {most - least:,} MiB.\n"
        + (f"\n{results['note']}\n" if results["note"] else "")
    )


def main() -> None:
    """Measure, and write the results and their page."""
    options = parse(Options, None, "examples/studies/mining.py")
    sizes = {}
    for rows in sorted(options.rows):
        sizes[str(rows)] = measure(rows, rows == min(options.rows))
        print(rows, sizes[str(rows)], flush=True)
    results = {
        "sizes": sizes,
        "note": options.note,
        **surroundings("examples/studies/mining.py", packages=PACKAGES),
    }
    write_json(options.out / "mining.json", results)
    (options.out / "mining.md").write_text(page(results))


if __name__ == "__main__":
    main()
