"""Scores of MMEB-V2 beside published ones: tables, a picture, the leaderboard's file."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from btok.encoder import BTokEncoder
from btok.evaluation import mmeb_v2
from btok.evaluation.metrics import mean_interval, published_name
from btok.files import must_be, one_line, write_json
from btok.tools import pictures

FIXED = "-fixed"  # what the leaderboard adds to the names of two sets that were wrong at first
WRONG_UNTIL = "2025-11"
SHOWN = ("I-CLS", "I-QA", "I-RET", "I-VG", "V-CLS", "V-QA", "V-RET", "M-RET", "visdoc")
MODALITIES = ("image", "video", "visdoc")
Interval = tuple[float, float, float]  # a score, its lower and its upper end, in percent


@dataclass(frozen=True)
class Published:
    """Another model's scores, in percent.

    Args:
        model: its name, and the revision of the data where that is known.
        tasks: by data set; groups: by meta-task and modality, and "overall", where the sets are not
            published.
        queries: by data set, how many a score is over.
        values: by data set each query's score, of one of our own results.
        data: by data set, what those were made of.
        older: data sets whose data were others when it was scored.
    """

    model: str
    tasks: Mapping[str, float]
    groups: Mapping[str, float] = field(default_factory=dict)
    queries: Mapping[str, int] = field(default_factory=dict)
    values: Mapping[str, Sequence[float]] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    older: Sequence[str] = ()


def read(path: str) -> list[Published]:
    """Published scores of a file: the benchmark authors' (`all_scores/*/*.json`), a `metrics.json`
    of ours, or one as this package has it, which "published" stands for.

    ValueError for a file that is none of these.
    """
    file: Any = files("btok.evaluation") / "mmeb_v2_published.json"
    if path != "published":
        must_be("file", "compare", file := Path(path))
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(found, list):
            models = [Published(**model) for model in found]
        else:
            models = [_of_authors(found) if "metrics" in found else _of_ours(found, Path(path))]
        if not models:
            raise ValueError("it is empty")
        for model in models:
            for name, score in {**model.tasks, **model.groups}.items():
                if not 0 <= score <= 100:
                    raise ValueError(f"{name} is {score!r:.40}, expected a score in percent")
        return models
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"compare is {path} ({one_line(error):.200}), expected a file of published scores or a "
            "metrics.json"
        ) from error


def _of_authors(found: Mapping[str, Any]) -> Published:
    table, tasks, queries, older = mmeb_v2.data_sets(), {}, {}, []
    for sets in found["metrics"].values():
        for name, scores in sets.items():
            short = name.removesuffix(FIXED)
            if short not in table or not isinstance(scores, Mapping):
                continue
            tasks[short] = 100 * scores[published_name(table[short].metric)]
            queries[short] = scores["num_data"]
            was_wrong = table[short].source.endswith(FIXED) and name == short
            early = found["metadata"].get("report_generated_date", "") < WRONG_UNTIL
            if (was_wrong and early) or scores["num_data"] != table[short].queries:
                older.append(short)
    return Published(found["metadata"]["model_name"], tasks, queries=queries, older=older)


def _of_ours(found: Mapping[str, Any], path: Path) -> Published:
    rows = found["tasks"]
    values = {}
    for name, row in rows.items():
        file = path.parent / "sets" / f"{name}.json"
        kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if kept.get("data") == row["data"]:  # a run that was killed may have kept a newer one
            values[name] = kept["queries"]
    return Published(
        str(path),
        {name: row["score"] for name, row in rows.items()},
        queries={name: row["queries"] for name, row in rows.items()},
        values=values,
        data={name: row["data"] for name, row in rows.items()},
    )


def mean(scores: Mapping[str, float], names: Sequence[str]) -> float | None:
    """The plain mean over data sets; None where one is missing."""
    found = [scores[name] for name in names if name in scores]
    return float(np.mean(found)) if len(found) == len(names) else None


@cache
def groups() -> dict[str, dict[str, list[str]]]:
    """The data sets of each meta-task and of each modality."""
    found: dict[str, dict[str, list[str]]] = {"meta_tasks": {}, "modalities": {}}
    for name, spec in mmeb_v2.data_sets().items():
        found["meta_tasks"].setdefault(spec.meta_task, []).append(name)
        found["modalities"].setdefault(spec.modality, []).append(name)
    return found


def table(result: Mapping[str, Any], names: Sequence[str]) -> str:
    """The scores of some data sets as plain text, and the means of all that have one; a mean stands
    only where no data set is missing.
    """
    lines = [_line("data set", "score", "origin", "95 % interval", "queries")]
    for name in names:
        row = result["tasks"][name]
        low, high = row["ci95"]
        scores = format(row["score"], ".1f"), format(row["origin"], ".1f")
        lines.append(_line(name, *scores, f"[{low:.1f}, {high:.1f}]", _queries(name, row)))
    missing = result["missing"]
    for name, of, score, origin in _means(result):
        lacks = [each for each in of if each in missing]
        note = f"no mean: {len(lacks)} sets are missing, as {lacks[0]}" if lacks else ""
        both = ("-", "-") if lacks else (format(score, ".1f"), format(origin, ".1f"))
        lines.append(_line(name, *both, note))
    if missing:
        lines.append(f"missing: {', '.join(missing)}")
    return "\n".join(line.rstrip() for line in lines)


def _queries(name: str, row: Mapping[str, Any]) -> str:
    """The number of queries of a data set, and the number expected where it differs, as text."""
    expected = mmeb_v2.data_set(name).queries
    return f"{row['queries']}" + (f" of {expected}" if row["queries"] != expected else "")


def _line(name: str, *cells: str) -> str:
    return f"{name:<46}" + "".join(f"{cell:>9}" for cell in cells[:2]) + "  " + "  ".join(cells[2:])


def _means(result: Mapping[str, Any]) -> list[tuple[str, list[str], Any, Any]]:
    """Each group's name and data sets, our mean and the one of the benchmark's code."""
    origin = result["origin"]
    means = [
        (name, sets, result[of][name], origin[of][name])
        for of, named in groups().items()
        for name, sets in named.items()
    ]
    return [*means, ("overall", [*mmeb_v2.data_sets()], result["overall"], origin["overall"])]


def differences(
    result: Mapping[str, Any], other: Published, mine: Mapping[str, Sequence[float]]
) -> str:
    """Our scores less another model's, by data set and group, with 95 % intervals over queries.

    From both models' queries where both are there and of the same data (paired); else both scores'
    own intervals count, as if the queries were others (Newcombe's method): that is too wide rather
    than too narrow. A published ndcg, whose spread is not known, is given ours. `mine` has our
    queries' scores by data set.
    """
    rows = result["tasks"]
    lines = [f"against {other.model}", _line("data set", "ours", "theirs", "ours - theirs")]
    gaps: dict[str, Interval] = {}
    older: set[str] = set()
    for name in (name for name in rows if name in other.tasks):
        # what is published is what the benchmark's code computes
        ours = rows[name]["score" if other.data else "origin"]
        gaps[name] = _gap(name, rows[name], ours, other, mine.get(name, ()))
        gap, low, high = gaps[name]
        said = f"{gap:+.1f} [{low:+.1f}, {high:+.1f}]"
        if name in other.older or (
            other.data and _digest(other, name) != rows[name]["data"]["digest"]
        ):
            said += ", of other data"
            older.add(name)
        lines.append(_line(name, f"{ours:.1f}", f"{other.tasks[name]:.1f}", said))
    for name, of, score, origin in _means(result):
        ours = score if other.data else origin
        if ours is None:
            continue
        if gaps.keys() >= {*of}:
            each = np.array([gaps[n] for n in of])  # [data sets, 3]
            gap = float(each[:, 0].mean())
            below, above = np.linalg.norm(each[:, :1] - each[:, 1:], axis=0) / len(of)
            said = f"{gap:+.1f} [{gap - below:+.1f}, {gap + above:+.1f}]"
            said += ", some of other data" * bool(older & {*of})
            lines.append(_line(name, f"{ours:.1f}", f"{ours - gap:.1f}", said))
        elif name in other.groups:
            theirs = other.groups[name]
            lines.append(_line(name, f"{ours:.1f}", f"{theirs:.1f}", f"{ours - theirs:+.1f}"))
    if len(lines) == 2:
        lines[1:] = ["nothing that both have a score of"]
    return "\n".join(line.rstrip() for line in lines)


def _digest(other: Published, name: str) -> str | None:
    return other.data.get(name, {}).get("digest")


def _gap(
    name: str, row: Mapping[str, Any], ours: float, other: Published, mine: Sequence[float]
) -> Interval:
    theirs = other.tasks[name]
    if mine and name in other.values and _digest(other, name) == row["data"]["digest"]:
        each = np.array(mine) - np.array(other.values[name])
        # shrunk towards the widest there is by the weight of one query, so that none has no width
        spread = math.sqrt((len(each) * each.var() + 1) / (len(each) + 1))
        half = 100 * 1.96 * spread / math.sqrt(len(each))
        gap = 100 * float(each.mean())
        return gap, max(gap - half, -100.0), min(gap + half, 100.0)
    below, above = row["score"] - row["ci95"][0], row["ci95"][1] - row["score"]
    low, high = theirs - below, theirs + above
    if row["metric"].startswith("hit") and (n := other.queries.get(name)):
        hits = round(theirs / 100 * n)
        low, high = (100 * x for x in mean_interval([1.0] * hits + [0.0] * (n - hits)))
    gap = ours - theirs
    ends = gap - math.hypot(below, high - theirs), gap + math.hypot(above, theirs - low)
    return gap, max(ends[0], -100.0), min(ends[1], 100.0)


def draw(result: Mapping[str, Any], others: Sequence[Published], path: Path) -> None:
    """The meta-tasks as bars, ours first; a group with a data set missing has no bar."""
    sets = groups()["meta_tasks"] | groups()["modalities"]

    def means(model: Published) -> list[float | None]:
        found = {name: mean(model.tasks, sets[name]) for name in SHOWN}
        return [model.groups.get(name) if x is None else x for name, x in found.items()]

    ours = Published("this checkpoint", {n: row["origin"] for n, row in result["tasks"].items()})
    shown = {model.model: means(model) for model in (ours, *others)}
    pictures.bars(list(SHOWN), shown, path, "MMEB-V2 by meta-task: hit@1, documents ndcg@5, in %")


def submit(result: Mapping[str, Any], path: Path, name: str, encoder: BTokEncoder) -> None:
    """Write the leaderboard's file: all that the benchmark's code reports of all data sets.

    ValueError where one is missing.
    """
    if result["missing"]:
        raise ValueError(f"submission needs all data sets, these are missing: {result['missing']}")
    specs = mmeb_v2.data_sets()
    for task, row in result["tasks"].items():
        if row["queries"] != specs[task].queries:
            had = f"{task} has {row['queries']} queries, the benchmark {specs[task].queries}"
            raise ValueError(f"submission: {had}; its data are not whole")
    metrics: dict[str, dict[str, Any]] = {modality: {} for modality in MODALITIES}
    for task, row in result["tasks"].items():
        fixed = mmeb_v2.data_set(task).source.endswith(FIXED)
        count = {"num_pred": row["queries"], "num_data": row["queries"]}
        metrics[row["modality"]][task + FIXED * fixed] = row["published"] | count
    size = sum(p.numel() for p in encoder.model.parameters())
    config = encoder.model.backbone.config
    metadata = {
        "model_name": name,
        "model_backbone": config.model_type,
        "model_size": f"{size / 1e9:.3g}B parameters",
        "embedding_dimension": config.get_text_config().hidden_size,
        "max_length_tokens": None,
        "model_release_date": None,
        "data_source": "Self-Reported",
        "url": None,
        "report_generated_date": datetime.datetime.now().isoformat(),
    }
    write_json(path, {"metadata": metadata, "metrics": metrics})
