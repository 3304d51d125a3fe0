"""Which versions of what we stand on were run: `make versions`, docs/versions.md.

    python tests/versions.py [ROW ...] [--page docs/versions.md]

Each row is a version of a package, installed into a folder of its own before the environment's on
the path, and the tests that ask of it what we use. Ends with 1 where one fails not known to fail.
Without names all rows; with --page the page says what was run, a row that was not keeps its line.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".venv" / "versions"


class Row(NamedTuple):
    """A version and the tests of it.

    Args:
        install: what pip is asked for; its dependencies too unless `alone`.
        tests: names in tests/, without "test_" and ".py"; "device" for its folder.
        fails: by a test's name, why it is known to fail.
    """

    install: tuple[str, ...]
    tests: tuple[str, ...]
    alone: bool = False
    fails: dict[str, str] = {}  # noqa: RUF012


MODEL = ("model", "encoder", "processing", "positions", "tokens", "stock", "adapters")
MODEL += ("last_layer", "gated_mlp", "vision", "pretend_cuda")
TORCH = ("model", "condensed_attention", "contrastive_loss", "step", "shards", "pretend_cuda")
OLDER = {
    "test_the_host_waits_in_no_packed_pass[idefics3": "its tower waits for the device: slower",
    "test_the_host_waits_in_no_packed_pass[smolvlm": "its tower waits for the device: slower",
    "test_equal_to_transformers_where_that_is_right[qwen2_5_vl": "transformers rounds a video's "
    "seconds otherwise there; positions are ours in all versions",
}
DRIVER = {
    "test_a_run_stopped_and_resumed": "this build asks the CUDA driver, which the tests' "
    "pretend device lacks",
}
ROWS = {
    **{
        f"transformers=={number}": Row((f"transformers=={number}", "numpy<2.4"), MODEL, fails=OLDER)
        for number in ("5.17.0", "5.22.2", "5.24.0")
    },
    **{
        f"torch=={number}": Row((f"torch=={number}", "numpy<2.4"), TORCH, fails=DRIVER)
        for number in ("2.11.0", "2.14.1")
    },
    "triton==3.9.0": Row(("triton==3.9.0", "numpy>=2.4"), ("device",), alone=True),
    **{
        f"sentence-transformers=={number}": Row(
            (f"sentence-transformers=={number}",), ("sentence", "stock"), alone=True
        )
        for number in ("6.0.0",)
    },
    **{
        f"mteb=={number}": Row(
            (f"mteb=={number}", "polars", "polars-runtime-32", "pytrec-eval-terrier"),
            ("mteb",),
            alone=True,
        )
        for number in ("2.26.0", "2.26.24")
    },
}


@dataclass(frozen=True)
class Options:
    rows: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """As "transformers==5.17.0"; none for all."""
    page: Path | None = None
    """Where to write the table."""
    processes: int = 2


def main() -> int:
    options = tyro.cli(Options, description=__doc__)
    if unknown := set(options.rows) - set(ROWS):
        print(f"rows are {sorted(unknown)}, expected some of {', '.join(ROWS)}", file=sys.stderr)
        return 2
    right, lines = True, {}
    for name in options.rows or ROWS:
        line, fine = run(name, ROWS[name], options.processes)
        print(*line, sep=" | ", flush=True)
        lines[name], right = line, right and fine
    if options.page is not None:
        write_page(options.page, lines)
    return not right


def run(name: str, row: Row, processes: int) -> tuple[list[str], bool]:
    """A row's cells, and whether nothing failed but what is known to."""
    folder = FOLDER / name.replace("==", "-")
    about = [name, ", ".join(row.tests)]
    if not (folder / "ready").exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder)]
        command += ["--upgrade", *(["--no-deps"] if row.alone else []), *row.install]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            why = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            return [*about, "", "", f"not installed: {' '.join(why)[:200]}"], False
        (folder / "ready").touch()
    device = "device" in row.tests
    paths = [f"tests/test_{test}.py" for test in row.tests if test != "device"]
    path = os.pathsep.join([str(folder), *map(str, (ROOT, ROOT / "kernels"))])
    more = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    more |= {"TRITON_INTERPRET": "1"} if device else {}
    command = [sys.executable, "-m", "pytest", "-q", "-n", str(processes), "-m", "not full"]
    command += ["--dist", "worksteal", "-p", "no:cacheprovider", "-rfE", "--tb", "line"]
    begun = time.monotonic()
    done = subprocess.run(
        [*command, *(["tests/device"] if device else paths)],
        cwd=ROOT,
        env={**os.environ, **more},
        capture_output=True,
        text=True,
    )
    said = done.stdout.splitlines()
    failed = [line.split(" ")[1] for line in said if line.startswith(("FAILED ", "ERROR "))]
    counts = dict.fromkeys(("passed", "failed", "error"), 0)
    for number, what in re.findall(r"(\d+) (passed|failed|error)", said[-1] if said else ""):
        counts[what] = int(number)
    known = {test: why for test, why in row.fails.items() if any(test in f for f in failed)}
    new = [f for f in failed if not any(test in f for test in known)]
    reasons = dict.fromkeys(known.values())
    notes = [f"{', '.join(t for t in known if known[t] == why)}: {why}" for why in reasons]
    notes += new[:5]
    fine = not new and counts["passed"] > 0 and not (done.returncode and not failed)
    if not fine and not failed:
        notes.append(" ".join((done.stdout + done.stderr).splitlines()[-3:])[:300])
    passed = f"{counts['passed']} in {time.monotonic() - begun:.0f} s"
    return [*about, passed, str(counts["failed"] + counts["error"]), "; ".join(notes)], fine


def write_page(page: Path, lines: dict[str, list[str]]) -> None:
    """The table of a page between its first line of dashes and its end: lines of these rows new."""
    head, dashes, rest = page.read_text("utf-8").partition("|--|--|--|--|--|\n")
    kept = {line.split(" | ")[0].removeprefix("| "): line for line in rest.splitlines()}
    kept |= {name: f"| {' | '.join(line)} |" for name, line in lines.items()}
    page.write_text(head + dashes + "\n".join(kept[n] for n in ROWS if n in kept) + "\n", "utf-8")


if __name__ == "__main__":
    sys.exit(main())
