"""A run: one variant trained on one set with one seed, and scored on all sets it can be asked of.

What it gives is a JSON file that stands alone: options, seconds, versions, commit, data, losses,
and of every query the rank of its answer among all answers, of which the page's figures are made.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from btok.data.records import Side
from btok.encoder import BTokEncoder
from btok.files import sha256, write_json
from examples.smollm2 import pairs
from examples.smollm2.fetch import backbone
from examples.studies.provenance import surroundings
from examples.studies.views import dense, embed, views_of
from train import main as training

# what the others make is known by its digest
CODE = ("examples/smollm2/runs.py", "examples/studies/views.py")
PACKAGES = ("torch", "transformers", "tokenizers", "peft", "gguf", "numpy", "scikit-learn")
UNTRAINED = "untrained"  # in place of a set's name
FLOORS = "floors.json"  # beside the runs: what words in common alone find, by set
ELSEWHERE = 500  # test pairs of a set that was not trained on
CALIBRATED = 128  # validation pairs for int8 and "auto"
BOUNDS = (0.01, 0.02, 0.05, 0.1, 0.2)  # of what budgets "auto" takes
SWEEP_PAIRS = 500  # of the validation split
Rows = NDArray[np.float32]


class Variant(NamedTuple):
    """A variant of the runs: what it is, and its options of train/main.py."""

    says: str
    options: tuple[str, ...]


VARIANTS = {
    "last": Variant("K = 0, last token", ("--num-btoks", "0")),
    "mean": Variant("K = 0, mean of all tokens", ("--num-btoks", "0", "--pooling", "mean")),
    "tokens": Variant("K = 4, contrastive alone", ("--num-btoks", "4")),
    "full": Variant("K = 4, generative loss through the mask", ("--num-btoks", "4")),
    "no-mask": Variant(
        "K = 4, generative loss, targets see the source",
        ("--num-btoks", "4", "--condense", "false"),
    ),
    **{f"K{k}": Variant(f"K = {k}, as full", ("--num-btoks", str(k))) for k in (1, 2, 8, 16)},
}
# not of the grid, which asks what the paper claims: what engines without our pooling can serve,
# and one model for many budgets
ALONE = {
    "last-of-4": Variant("K = 4, as full, the last of their rows", ("--pooling", "last")),
    "nested": Variant(
        "K = 16, as full, and its first tokens and components",
        ("--num-btoks", "16", "--budgets", "1", "2", "4", "8", "--dims", "36", "72", "144", "288"),
    ),
}
MAIN = ("last", "tokens", "full", "no-mask", "mean")  # in the order in which a seed runs them
BASELINES = ("last", "mean", "tokens")  # without a generative loss
SIDES = {"wordnet": "positive", "debian": "query"}  # the side to generate: always the shorter one


@dataclass(frozen=True)
class Settings:
    """The settings that all runs of a results folder share."""

    cache: Path
    """Folder of weights, data and run folders."""
    results: Path
    """Folder of the runs' JSON files."""
    steps: int = 60
    batch: int = 16
    """Pairs of a step; each answer is a negative of the other queries."""
    dtype: str = "float32"


@dataclass(frozen=True)
class Run:
    """One run; its name is that of its file.

    Args:
        trained_on: "wordnet" or "debian", or `UNTRAINED`.
        rate, weight: peak learning rate, and weight of the generative loss.
        sweep: it is scored on validation pairs of its set alone.
    """

    trained_on: str
    variant: str
    seed: int
    rate: float = 0.0
    weight: float = 0.0
    sweep: bool = False

    @property
    def name(self) -> str:
        name = f"{self.trained_on}-{self.variant}-seed{self.seed}"
        return f"sweep-{name}-{self.rate:g}-{self.weight:g}" if self.sweep else name


def arguments(settings: Settings, run: Run, model: Path, data: Path, output: Path) -> list[str]:
    """The arguments of train/main.py for a run: the paper's recipe in what the machine allows, with
    the run's options.
    """
    given = {
        "model": model,
        "data": data,
        "output": output,
        "dtype": settings.dtype,
        "dora": "false",
        "lora-dropout": "0",  # so that variants differ in no random draw but their first weights
        "group-size": settings.batch,
        "groups-per-batch": 1,
        "gradcache": "false",
        "checkpoint-activations": "false",
        "workers": 0,
        "steps": settings.steps,
        "warmup-steps": settings.steps // 5,
        "checkpoint-every": 25,
        "learning-rate": run.rate,
        "ntp-weight": run.weight,
        "ntp-steps": settings.steps,
        "ntp-side": SIDES[run.trained_on],
        "seed": run.seed,
    }
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    return ["btok-qwen2vl-2b", *words, *(VARIANTS | ALONE)[run.variant].options]


def perform(settings: Settings, run: Run) -> dict[str, Any]:
    """Train and score, or go on with that; nothing where its file is there.

    Returns:
        What the file holds.

    Raises:
        ValueError: files of other settings, code or data in the results folder; see `pairs.load`
            and `fetch`.
    """
    path = settings.results / f"{run.name}.json"
    model = backbone(settings.cache)
    sets = {name: pairs.load(settings.cache, name) for name in pairs.SETS}
    common = depends_on(settings, model, sets)
    refuse_others(settings.results, common)
    if path.exists():
        return read(path)
    print(run.name, flush=True)
    log: list[dict[str, Any]] = []
    if run.trained_on == UNTRAINED:
        number = 4 if run.variant == "tokens" else 0
        pooling = "btok" if number else run.variant
        torch.manual_seed(run.seed)
        encoder = BTokEncoder.from_pretrained(model, num_btoks=number, pooling=pooling)
    else:
        output = settings.cache / "runs" / settings.results.name / run.name
        last = output / f"checkpoint-{settings.steps}"
        data = sets[run.trained_on].folder / "train.jsonl"
        if not last.exists():
            status = training.main(arguments(settings, run, model, data, output))
            if not last.exists():  # a mistake, which it told, or asked to stop, it saved
                raise SystemExit(status or 1)
        log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
        encoder = BTokEncoder.from_pretrained(last)
    if torch.cuda.is_available():
        encoder.model.to("cuda")
    start = time.perf_counter()
    views: dict[str, dict[str, float]] = {}
    if encoder.model.settings.budgets:
        own = sets[run.trained_on]
        texts = [side for pair in own.pairs("validation")[:CALIBRATED] for side in pair]
        found, views = scored_views(encoder, own.pairs("test"), texts)
        scored = {run.trained_on: found}
    else:
        scored = {name: score(encoder, found) for name, found in asked(run, sets).items()}
    result = {
        "run": run.name,
        **{key: value for key, value in vars(run).items() if key != "sweep"},
        "sweep": run.sweep,
        "losses": {key: [round(row[key], 4) for row in log] for key in ("contrastive", "ntp")},
        "seconds": {
            "training": round(trained_seconds(log), 1),
            "scoring": round(time.perf_counter() - start, 1),
        },
        "settings": common,
        **({"views": views} if views else {}),
        "scores": {name: {how: measures(r) for how, r in s.items()} for name, s in scored.items()},
        "ranks": {
            name: {how: " ".join(map(str, r)) for how, r in s.items()} for name, s in scored.items()
        },
    }
    settings.results.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    return result


def trained_seconds(log: Sequence[Mapping[str, Any]]) -> float:
    """The seconds of training in all sittings of a run; each begins at 0."""
    seconds = [*(row["seconds"] for row in log), 0.0]
    return sum(one for one, later in pairwise(seconds) if later < one)


def asked(run: Run, sets: Mapping[str, pairs.TextSet]) -> dict[str, list[tuple[str, str]]]:
    """The pairs a run is scored on, by set: its own whole, "unseen ..." a part of another."""
    if run.sweep:
        return {run.trained_on: sets[run.trained_on].pairs("validation")[:SWEEP_PAIRS]}
    whole = SIDES if run.trained_on == UNTRAINED else [run.trained_on]
    unseen = [name for name in sets if name != run.trained_on and run.variant in MAIN]
    return {name: sets[name].pairs("test") for name in whole} | {
        f"unseen {name}": sets[name].pairs("test")[:ELSEWHERE] for name in unseen
    }


def score(encoder: BTokEncoder, found: Sequence[tuple[str, str]]) -> dict[str, NDArray[np.intp]]:
    """Ranks of the right answers, as they come and with each side's mean vector taken off."""
    queries, answers = (
        encoder.encode([pair[side] for pair in found], show_progress=False) for side in (0, 1)
    )
    return {"raw": ranks(queries, answers), "centred": ranks(centred(queries), centred(answers))}


def scored_views(
    encoder: BTokEncoder, found: Sequence[tuple[str, str]], texts: Sequence[str]
) -> tuple[dict[str, NDArray[np.intp]], dict[str, dict[str, float]]]:
    """The ranks and measures that `score` gives; and by what of the bottleneck rows is compared, as
    `examples.studies.views` names it, the bytes of an item and raw measures. All are made of one
    pass over the pairs; int8 and the budgets of "auto" are calibrated with `texts`.
    """
    kept = encoder.model.settings
    calibration = encoder.calibrate(texts, show_progress=False)
    options = {"rows": kept.multi_vector, "cross": True}
    asked = views_of(kept.budgets, kept.dims, encoder.dims, calibration, BOUNDS, **options)
    queries, answers = (embed(encoder, [Side(pair[side]) for pair in found]) for side in (0, 1))
    scored = {}
    for name, view in asked:
        scored[name] = {"bytes": view.bytes}
        scored[name] |= measures(ranks(view.vectors(queries), view.vectors(answers)))
        if view.budgets:
            sides = [view.budgets(some) for some in (queries, answers)]
            scored[name]["tokens"] = float(np.concatenate(sides).mean())
    rows = [dense(some.rows, kept.budgets[-1], encoder.dims) for some in (queries, answers)]
    return {"raw": ranks(*rows), "centred": ranks(*map(centred, rows))}, scored


def centred(rows: Rows) -> Rows:
    """Unit rows less their mean: what all of them share says nothing of any."""
    rows = rows - rows.mean(0)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def ranks(queries: Rows, answers: Rows) -> NDArray[np.intp]:
    """The rank of answer i among all answers for query i, from 1; after those that tie with it."""
    scores = queries @ answers.T
    return (scores >= scores.diagonal()[:, None]).sum(1)


def measures(found: NDArray[np.intp], digits: int = 2) -> dict[str, float]:
    """Recall at 1 and 10 and the mean reciprocal rank, in percent."""
    return {
        "recall@1": round(100 * float(np.mean(found == 1)), digits),
        "recall@10": round(100 * float(np.mean(found <= 10)), digits),
        "mrr": round(100 * float(np.mean(1 / found)), digits),
    }


def depends_on(
    settings: Settings, model: Path, sets: Mapping[str, pairs.TextSet]
) -> dict[str, Any]:
    """The facts that all runs of a results folder must share, and the commit that stands for their
    code.
    """
    return {
        "steps": settings.steps,
        "batch": settings.batch,
        "dtype": settings.dtype,
        "backbone": sha256(model / "model.safetensors"),
        "data": {name: found.facts for name, found in sets.items()},
        **surroundings(*CODE, packages=PACKAGES),
    }


def read(path: Path) -> dict[str, Any]:
    """A run's file; a ValueError that names it where it is cut short."""
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is no whole JSON ({error}); remove it, and run it again"
        ) from error


def refuse_others(folder: Path, common: Mapping[str, Any]) -> None:
    """A ValueError where a run in the folder depends on something else than the next one would."""
    for path in sorted(folder.glob("*-seed*.json")):
        had = read(path)["settings"]
        # the same code may have another commit, and another device moves no more than rounding
        for name in sorted(common.keys() - {"commit", "device"}):
            if had.get(name) != common[name]:
                raise ValueError(
                    f"results is {folder}, whose {path.name} has {name} {had.get(name)}, this "
                    f"command {common[name]}; give another --results, or take the code of "
                    f"{had['commit']}"
                )
