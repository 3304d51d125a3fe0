"""What it costs to pool the last of K rows, which stock engines serve, instead of all of them.

    make demo, and with --pooling last, SEED=0 | 1 | 2
    examples/smollm2/study.py run wordnet | debian  last-of-4 | full --rate 1e-3 --weight 0.2 \
        --seed 0 | 1 | 2 --results FOLDER
    python examples/studies/pooling.py [FOLDER]

The last makes a page of FOLDER, by default bench/results/pooling: the study's files, and of the
pocket runs `metrics.json` as pocket-last-0.json and so on; those of all rows are the README's.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench.report import table
from btok.files import write_text
from examples.smollm2.page import Results
from examples.smollm2.runs import read
from examples.studies.common import said
from examples.studies.provenance import facts

SEEDS = (0, 1, 2)
RUNS = Path(__file__).resolve().parents[2] / "bench" / "results" / "pooling"


def page(folder: Path) -> str:
    """The page of a folder's runs; a ValueError where some are missing."""
    study = Results(folder)
    rows = [["benchmark", "score", "all 4 rows (`btok`)", "the last of 4 (`last`)", "last - btok"]]
    for name, what in (("wordnet", "a gloss -> its words"), ("debian", "a summary -> its text")):
        found = study.compare(name, "last-of-4", "full")
        if found is None:
            raise ValueError(f"{folder} has no runs of {name}")
        scores = [study.scores(name, v, name, "raw")["mrr"] for v in ("full", "last-of-4")]
        rows.append([f"SmolLM2-135M, {what}", "MRR", *map(said, scores), said(found.seeds, "+")])
    pocket = {
        "btok": [read(folder.parent / f"pocket-seed{seed}.json") for seed in SEEDS],
        "last": [read(folder / f"pocket-last-{seed}.json") for seed in SEEDS],
    }
    for task in ("overall", *pocket["btok"][0]["tasks"]):
        both = [[score(run, task) for run in runs] for runs in pocket.values()]
        gains = [last - btok for btok, last in zip(*both, strict=True)]
        name = "pocket, mean of nine tasks" if task == "overall" else f"pocket, {task}"
        metric = "hit@1" if task != "VisDoc" else "ndcg@5"
        rows.append([name, metric, *map(said, both), said(gains, "+")])
    settings = study.settings
    text = [
        "# Pooling the last of the K rows",
        "**Measured**, in percent: K = 4 tokens trained with both losses, the embedding the mean of"
        " their rows or the last of them alone. The same seeds and batches; means over three seeds,"
        " and of the differences by seed the 95 % interval of Student's t, in bold without 0. (The"
        " pocket runs of all rows are the README's; seed 0 again, with the code of the others, gave"
        " the same digits.)",
        "- command: `python examples/studies/pooling.py`, of files that the commands in it made\n"
        + facts(settings),
        table(*rows),
    ]
    return "\n\n".join(text) + "\n"


def score(run: dict, task: str) -> float:
    return run["overall"] if task == "overall" else run["tasks"][task]["score"]


if __name__ == "__main__":
    runs = Path(sys.argv[1]) if len(sys.argv) > 1 else RUNS
    write_text(runs.with_suffix(".md"), page(runs))
