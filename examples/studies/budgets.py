"""One model for many budgets: what training for them costs, and a score for every number of bytes.

    python examples/studies/budgets.py [--only VARIANT ...] [--seeds N ...] [--list]
    python examples/studies/budgets.py score [--output FOLDER]
    python examples/studies/budgets.py page FOLDER [--output FOLDER]

Every variant is trained on all tasks of the pocket benchmark from its seed's one captioning model
(options: common.py). `score` then scores what is trained in every way that it has (views.py): with
the first k of its K bottleneck tokens, the first d components of its embedding, those as integers,
its rows as vectors; and times the encoder with each budget. `page` writes studies-budgets.md.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from bench.harness import settle_allocator
from btok.data.records import Side
from btok.encoder import BTokEncoder
from btok.files import write_json
from examples.studies import common
from examples.studies.budgets_page import write_page
from examples.studies.common import Study, Variant
from examples.studies.duel import duel
from examples.studies.provenance import surroundings
from examples.studies.views import embed, score, views_of
from train.pocket import data

BUDGETS = (1, 2, 4, 8, 16)
DIMS = (16, 32, 64)
K16 = ("--num-btoks", str(BUDGETS[-1]))
NESTED = (*K16, "--budgets", *map(str, BUDGETS))
EVERY_DIM = ("--dims", *map(str, DIMS))
STUDY = Study(
    "budgets",
    "One model, many budgets",
    {
        **{f"K{k}": Variant(f"K = {k} alone", ("--num-btoks", str(k))) for k in BUDGETS},
        "nested": Variant("K = 16, and its first 1, 2, 4, 8 tokens", NESTED),
        "dims": Variant("K = 4, and the first 16, 32, 64 components", EVERY_DIM),
        "multi": Variant(
            "K = 16 nested, half the loss of the rows as vectors",
            (*NESTED, "--multi-vector", "0.5"),
        ),
        "all": Variant(
            "both: budgets, components, rows as vectors",
            (*NESTED, *EVERY_DIM, "--multi-vector", "0.5"),
        ),
        "reconstruction": Variant(
            "K = 4, a side's own text restored, none generated",
            ("--ntp-weight", "0", "--reconstruction-weight", "0.5"),
        ),
        "both-losses": Variant(
            "K = 4, generated where a side has a target, else restored",
            ("--reconstruction-weight", "0.5"),
        ),
        "warm-up": Variant(
            "K = 4, the first quarter of the steps without the contrastive loss",
            ("--reconstruction-weight", "0.5", "--contrastive-from", "50"),
        ),
    },
    against="K4",
)

BOUNDS = (0.01, 0.02, 0.05, 0.1, 0.2)
QUERIES = 200  # test queries per task
CALIBRATED = 8  # groups of 16 training pairs of each task, of a seed that none was trained with
CALIBRATION_SEED = 3000
TIMED = 16  # sides of each task that an encoder is timed with


@dataclass(frozen=True)
class Score:
    """Score and time what is trained, where it is not yet."""

    output: Path = Path("runs/studies")
    """Folder of the runs."""


@dataclass(frozen=True)
class Page:
    """Write the page, its pictures and numbers."""

    folder: Annotated[Path, tyro.conf.Positional]
    output: Path = Path("runs/studies")
    """Folder of the runs."""


def main(argv: Sequence[str]) -> int:
    """The command line; 2 for a mistake in it, told in a line."""
    command, *words = [*argv, ""]
    if command not in ("score", "page"):
        return common.main(STUDY, argv)
    prog = f"examples/studies/budgets.py {command}"
    try:
        words = list(argv[1:])
        if command == "score":
            score_all(common.parse(Score, words, prog).output)
        else:
            options = common.parse(Page, words, prog)
            write_page(options.folder, collected(options.output))
    except (OSError, ValueError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    return 0


def runs(output: Path) -> list[tuple[str, int, Path]]:
    """Variant, seed and folder of what is there, in the study's order.

    Raises:
        ValueError: nothing is there.
    """
    found = []
    for variant in STUDY.variants:
        for folder in sorted(output.glob(f"{variant}-seed*")):
            if (folder / "metrics.json").exists():
                found.append((variant, int(folder.name.rpartition("seed")[2]), folder))
    if not found:
        raise ValueError(f"output is {output}, which holds no run that is done")
    return found


def score_all(output: Path) -> None:
    """`views.json` beside each run's metrics; `times.json` of the first nested one."""
    tasks = data.tasks(QUERIES)
    for variant, _, folder in runs(output):
        if (folder / "views.json").exists():
            continue
        encoder, width = trained(folder)
        kept = encoder.model.settings
        calibration = encoder.calibrate(training_sides(), show_progress=False)
        number = len(encoder.model.btok_token_ids)
        views = views_of(
            [k for k in BUDGETS if k <= number],
            DIMS,
            width,
            calibration,
            BOUNDS if kept.budgets else (),
            rows=kept.multi_vector,
            cross=variant == "all",
        )
        print(folder.name, flush=True)
        write_json(folder / "views.json", score(encoder, tasks, dict(views)))
    nested = [folder for variant, _, folder in runs(output) if variant == "nested"]
    if nested and not (output / "times.json").exists():
        write_json(output / "times.json", {**times(nested[0]), **surroundings()})


def trained(folder: Path) -> tuple[BTokEncoder, int]:
    """The encoder of a run's last checkpoint, and its D."""
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    encoder = BTokEncoder.from_pretrained(last)
    return encoder, encoder.dims


def training_sides() -> list[Side]:
    """The sides of pairs that no run has met."""
    groups = (
        data.train_group(task, group, 16, CALIBRATION_SEED)
        for task in data.TASKS
        for group in range(CALIBRATED)
    )
    return [side for group in groups for pair in group for side in (pair.query, pair.positive)]


def times(folder: Path) -> dict[str, Any]:
    """The encoder's time with each budget, as a share of that with all K, on the test's sides."""
    settle_allocator()
    encoder, width = trained(folder)
    calibration = encoder.calibrate(training_sides(), show_progress=False)
    tasks = data.tasks(40)
    sides = [s for task in tasks for s in (*task.queries[:TIMED], *task.candidates[:TIMED])]
    embedded = embed(encoder, sides)
    views = dict(views_of(BUDGETS, (), width, calibration, BOUNDS))
    asked = {str(k): encoder.using(num_btoks=k) for k in BUDGETS}
    asked |= {f"auto {b:g}": encoder.using(num_btoks="auto", bound=b) for b in BOUNDS}
    found: dict[str, Any] = {}
    whole = partial(encoder.encode, sides, show_progress=False)
    for name, other in asked.items():
        fought = duel(whole, partial(other.encode, sides, show_progress=False), most=20)
        chosen = views[name].budgets if name in views else None
        found[name] = {
            "ratio": fought["ratio"],
            "interval": fought["interval"],
            "ms": [each / len(sides) for each in fought["ms"]],
            "tokens": float(chosen(embedded).mean()) if chosen else int(name),
        }
    return {"times": found, "sides": len(sides)}


def collected(output: Path) -> dict[str, Any]:
    """The results of a folder of runs that the page is made of."""
    found = []
    for variant, seed, folder in runs(output):
        views = folder / "views.json"
        if views.exists():
            row = {"variant": variant, "seed": seed, "says": STUDY.variants[variant].says}
            row["options"] = " ".join(STUDY.variants[variant].options)
            found.append(row | {"views": json.loads(views.read_text())})
    times_file = output / "times.json"  # made by the command that scores
    times = json.loads(times_file.read_text()) if times_file.exists() else None
    return {
        "settings": json.loads((output / "settings.json").read_text()),
        "scored": times or surroundings(),
        "times": times,
        "runs": found,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
