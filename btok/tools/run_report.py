"""`python -m btok report RUN`: what a run was and what came of it, as one HTML file.

A run folder, of a run that is done, still going or killed, or the folder of an evaluation. The file
stands alone: no script, pictures inside, nothing is fetched.
"""

from __future__ import annotations

import base64
import json
import shlex
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from btok.files import by_numbers, must_be, one_line, printable, write_text
from btok.tools.run_curves import Curve, Log, curves, finite, read_log

TEMPLATE = "run_report.html.j2"
PNG = b"\x89PNG\r\n\x1a\n"
MOST_SHEETS, MOST_BYTES = 12, 8 << 20  # of pictures that are put into a report
LONGEST = 1000  # characters of a setting that are shown
LONGEST_NAME = 26  # characters beside a score; a longer one takes several lines
NAMED = 8  # missing data sets that a command names
NOTHING = "-"


@dataclass(frozen=True)
class Report:
    """Write what a run or an evaluation was, and what came of it, as one HTML file.

    Args:
        run: its folder, as of train/main.py or eval.
        output: the file; RUN/report.html by default.
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    output: Path | None = None


class Sheet(NamedTuple):
    """A picture, as a data address."""

    name: str
    alt: str
    address: str
    width: int
    height: int


class Checkpoint(NamedTuple):
    """A checkpoint's folder, its step, and MB of its weights and of all that is in it."""

    name: str
    step: int
    weights: str
    size: str
    whole: bool


@dataclass
class Score:
    """A task's scores in percent; None for what is not known."""

    name: str
    group: str = ""
    metric: str = ""
    chance: float | None = None
    floor: float | None = None
    before: float | None = None
    after: float | None = None
    origin: float | None = None
    low: float | None = None
    high: float | None = None
    hard_only: float | None = None
    queries: float | None = None
    candidates: float | None = None

    @property
    def interval(self) -> str:
        """The 95 % interval of the newest score, as text."""
        if self.low is None or self.high is None:
            return NOTHING
        return f"[{self.low:.1f}, {self.high:.1f}]"


@dataclass
class Page:
    """The content of a report page, all that its template shows.

    Args:
        title, status: the headings; done: whether nothing is left to do.
        facts, settings, means: by name, in words.
        notes: what could not be read.
        changes: by setting what the recipe has, and what the run has instead.
        scores, mean: of the tasks.
        no_means, missing: groups without a mean, and the data sets that they lack.
        curves, sheets, checkpoints: of the run.
        commands: by what it is for, what to do next.
        made: when the page was.
    """

    title: str
    status: str
    done: bool
    facts: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    changes: dict[str, tuple[str, str]] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    scores: list[Score] = field(default_factory=list)
    mean: Score | None = None
    means: dict[str, str] = field(default_factory=dict)
    no_means: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    sheets: list[Sheet] = field(default_factory=list)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    commands: dict[str, str] = field(default_factory=dict)
    made: str = ""

    @property
    def name_width(self) -> int:
        """Characters of the longest task's name, within bounds."""
        return min(max((len(score.name) for score in self.scores), default=0), LONGEST_NAME)

    def has(self, name: str) -> bool:
        """Whether any task's score has a number under `name`."""
        return any(getattr(score, name) is not None for score in self.scores)


def write_report(run: Path, output: Path | None = None) -> Path:
    """Write the report of a run's or an evaluation's folder, whole or as far as it is.

    Args:
        run: the folder.
        output: the file; `report.html` in the folder by default.

    Returns:
        The file.

    Raises:
        ValueError: a folder without a run; an output that is a folder or in none.
    """
    path = run / "report.html" if output is None else output
    must_be("folder", "run", run, "the folder of a run or of an evaluation")
    if path.is_dir():
        raise ValueError(f"output is {path}, which is a folder; expected a file")
    must_be("folder", f"output is {path}, whose folder", path.parent)
    write_text(path, render(read_run(run)))
    return path


def render(page: Page) -> str:
    """The report page as HTML; whatever a run's files say is shown as text."""
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise ImportError("the report needs jinja2, which comes with torch") from error
    text = (files("btok.tools") / TEMPLATE).read_text(encoding="utf-8")
    options: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(autoescape=True, undefined=StrictUndefined, **options)
    environment.filters["points"] = lambda x: NOTHING if x is None else f"{x:.1f}"
    environment.filters["whole"] = lambda x: NOTHING if x is None else f"{x:.0f}"
    html: str = environment.from_string(text).render(page=page)
    # a lone surrogate, which a file's name or JSON may hold, is no UTF-8
    return html.encode("utf-8", "replace").decode("utf-8")


def read_run(run: Path) -> Page:
    """Read a run's or an evaluation's folder into the report page.

    Raises:
        ValueError: nothing of a run is.
    """
    known = ("config.json", "log.jsonl", "metrics.json")
    if not any((run / name).is_file() for name in known):
        raise ValueError(
            f"run is {run}, which has none of {', '.join(known)}; expected the folder of a run"
        )
    notes: list[str] = []
    metrics = _read(run / "metrics.json", notes)
    evaluation = "benchmark" in metrics and not (run / "log.jsonl").exists()
    page = _of_evaluation(run, metrics) if evaluation else _of_training(run, metrics, notes)
    page.notes += notes
    page.sheets = _sheets(run, page.notes)
    page.made = _time(datetime.now(UTC).timestamp())
    return page


def _of_training(run: Path, metrics: Mapping[str, Any], notes: list[str]) -> Page:
    config, noted = _read(run / "config.json", notes), _read(run / "run.json", notes)
    log = read_log(run / "log.jsonl")
    if log.damaged:
        notes.append(f"{_count(log.damaged, 'line')} of log.jsonl could not be read")
    checkpoints = _checkpoints(run)
    page = Page(f"Run {printable(run.resolve().name)}", *_status(run, config, log, checkpoints))
    page.checkpoints, page.curves = checkpoints, curves(log) if log.rows else []
    page.facts = _facts(config, noted, log)
    page.changes = {
        _text(name): (_text(had), _text(has)) for name, (had, has) in _changed(noted).items()
    }
    page.settings = {_text(name): _text(value) for name, value in config.items()}
    before = _mapping(_read(run / "before.json", notes).get("tasks"))
    page.scores = _scores(before, _mapping(metrics.get("tasks")))
    if len(page.scores) > 1:
        page.mean = _mean(page.scores)
    page.commands = _next(run, noted, page)
    return page


def _of_evaluation(run: Path, metrics: Mapping[str, Any]) -> Page:
    rows = _mapping(metrics.get("tasks"))
    missing = [_text(name) for name in _list(metrics.get("missing"))]
    name, total = _text(metrics["benchmark"]), len(rows) + len(missing)
    status = f"{len(rows)} of {total} data sets have a score."
    if missing:
        status += " No mean is given over sets of which one is missing."
    page = Page(f"Evaluation on {name}", status, not missing)
    page.scores, page.missing = _scores({}, rows), missing
    page.scores.sort(key=lambda score: score.group)
    first = _mapping(next(iter(rows.values()), {}))
    page.facts = {key: _text(first.get(key)) for key in ("model", "prompts")}
    settings = _mapping(first.get("settings"))
    page.settings = {_text(key): _text(value) for key, value in settings.items()}
    groups = {**_mapping(metrics.get("modalities")), **_mapping(metrics.get("meta_tasks"))}
    for group, value in {"all sets": metrics.get("overall"), **groups}.items():
        if (said := finite(value)) is None:
            page.no_means.append(_text(group))
        else:
            page.means[_text(group)] = f"{said:.1f}"
    left = ",".join(missing) if len(missing) <= NAMED else "all"
    again = ("eval", "CHECKPOINT", "mmeb-v2", "--data", "DATA", "--output", str(run))
    if missing:
        page.commands["score what is missing"] = _btok(*again, "--tasks", left)
    page.commands["compare with published scores"] = _btok(*again, "--compare", "published")
    return page


def _status(
    run: Path, config: Mapping[str, Any], log: Log, checkpoints: Sequence[Checkpoint]
) -> tuple[str, bool]:
    """The progress of a run in words, and whether it is done."""
    parts = [finite(config.get(name)) for name in ("caption_steps", "steps")]
    total = None if None in parts else int(sum(part or 0 for part in parts))
    if (run / "nonfinite.json").is_file():
        return "Stopped: a loss was not finite; nonfinite.json names its batch.", False
    scored = config.get("data") is None and finite(config.get("eval_queries"))
    far = f"{log.steps} of {'an unknown number of' if total is None else total} steps"
    if total is not None and log.steps >= total:
        if not scored or (run / "metrics.json").is_file():
            return f"Finished: {far}.", True
        return f"Trained: {far}, and no scores yet of afterwards.", False
    if not log.rows:
        return "No step is in its log yet.", False
    written = _time((run / "log.jsonl").stat().st_mtime)
    whole = [checkpoint.name for checkpoint in checkpoints if checkpoint.whole]
    on = f"goes on from {whole[-1]}" if whole else "begins again: there is no checkpoint yet"
    return (
        f"Not finished: {far}, the last of them written {written}. It is still going, or was "
        f"stopped; the command that started it {on}.",
        False,
    )


def _facts(config: Mapping[str, Any], noted: Mapping[str, Any], log: Log) -> dict[str, str]:
    """The facts of a training run, by name: recipe, model, data and so on."""
    starts = [start for start in _list(noted.get("starts")) if isinstance(start, dict)]
    data = config.get("data")
    facts = {
        "recipe": _text(noted.get("recipe")),
        "model": _text(config.get("model")),
        "data": "the pocket benchmark" if data is None else _text(data),
    }
    if (count := finite(noted.get("parameters"))) is not None:
        trained = finite(noted.get("trained_parameters")) or 0
        facts["parameters"] = f"{count:,.0f}, {trained:,.0f} of them trained"
    if log.rows:
        groups, size = (finite(config.get(key)) for key in ("groups_per_batch", "group_size"))
        pairs = (groups or 0) * (size or 0)
        took = f"{timedelta(seconds=round(log.seconds))} for {_count(log.steps, 'step')}"
        took += f" in {len(starts)} starts" if len(starts) > 1 else ""
        facts["training time"] = took
        if log.seconds:
            speed = f"{log.steps / log.seconds:.3g} steps a second"
            speed += f", {pairs * log.steps / log.seconds:.3g} pairs a second" if pairs else ""
            facts["throughput"] = speed
    if log.skipped:
        facts["unreadable pairs"] = str(log.skipped)
    if starts:
        for name, when in (("started", starts[0].get("time")), ("ended", noted.get("ended"))):
            facts[name] = _text(when).replace("T", " ").replace("+00:00", " UTC")
        facts |= _machine(starts[-1])
    return {name: value for name, value in facts.items() if value != NOTHING}


def _machine(start: Mapping[str, Any]) -> dict[str, str]:
    """The machine and the software of `run.json`'s last start, by name and in words."""
    own, cpu = _mapping(start.get("btok")), _mapping(start.get("cpu"))
    commit = _text(own.get("commit") or "unknown")[:12]
    commit += ", with changes" if own.get("changed") is True else ""
    gpus = [_mapping(gpu) for gpu in _list(start.get("gpus"))]
    names = ", ".join(
        f"{_text(gpu.get('name'))} ({_text(gpu.get('memory_gib'))} GiB)" for gpu in gpus
    )
    processor = f"{_text(cpu.get('model'))}, {_text(cpu.get('usable_cores'))} usable cores, "
    processor += f"{_text(cpu.get('memory_gib'))} GiB"
    versions = _mapping(_mapping(start.get("packages")).get("versions"))
    packages = ", ".join(f"{_text(name)} {_text(had)}" for name, had in versions.items())
    return {
        "processes": _text(start.get("processes")),
        "GPUs of the first process" if gpus else "GPUs": names or "none",
        "CPU": processor,
        "system": f"Python {_text(start.get('python'))}, {_text(start.get('platform'))}",
        "btok": f"{_text(own.get('version'))}, commit {commit}",
        "packages": packages or NOTHING,
    }


def _scores(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Score]:
    """The tasks of both results; numbers that are none are left out."""
    found = []
    for name in dict.fromkeys([*after, *before]):
        was, now = _mapping(before.get(name)), _mapping(after.get(name))
        row = now or was
        ends = [finite(end) for end in _list(row.get("ci95"))]
        low, high = ends if len(ends) == 2 else (None, None)
        shown = ("chance", "floor", "hard_only", "queries", "candidates")
        found.append(
            Score(
                _text(name),
                _text(row.get("meta_task", "")),
                _text(row.get("metric", "")),
                before=finite(was.get("score")),
                after=finite(now.get("score")),
                origin=finite(now.get("origin")),
                low=low,
                high=high,
                **{key: finite(row.get(key)) for key in shown},
            )
        )
    return found


def _mean(scores: Sequence[Score]) -> Score:
    """Plain means over tasks, of what all of them have."""
    mean = Score("mean")
    for name in ("chance", "floor", "before", "after", "hard_only"):
        values = [getattr(score, name) for score in scores]
        if None not in values:
            setattr(mean, name, sum(values) / len(values))
    return mean


def _checkpoints(run: Path) -> list[Checkpoint]:
    """The checkpoints in a run's folder, by step."""
    found = []
    for folder in run.glob("checkpoint-*"):
        step = folder.name.removeprefix("checkpoint-")
        if not (step.isdecimal() and folder.is_dir()):
            continue
        sizes = {path.name: path.stat().st_size for path in folder.glob("*") if path.is_file()}
        weights = sum(n for name, n in sizes.items() if _is_weights(name))
        whole = "manifest.json" in sizes
        found.append(
            Checkpoint(folder.name, int(step), _mb(weights), _mb(sum(sizes.values())), whole)
        )
    return sorted(found, key=lambda checkpoint: checkpoint.step)


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors") and name.startswith(("model", "adapter_model"))


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def _sheets(run: Path, notes: list[str]) -> list[Sheet]:
    """The pictures in a run's folder, but for the curves, which the report draws itself."""
    there = (path.name for path in run.glob("*.png") if path.is_file())
    names = sorted((name for name in there if name != "loss.png"), key=by_numbers)
    found: list[Sheet] = []
    for name in names:
        content = (run / name).read_bytes() if (run / name).stat().st_size <= MOST_BYTES else b""
        if not content.startswith(PNG) or len(content) < 24 or len(found) == MOST_SHEETS:
            notes.append(f"{printable(name)} is no picture, too large or one too many: left out")
            continue
        width, height = struct.unpack(">II", content[16:24])
        task = printable(name.removesuffix(".png").removeprefix("retrievals-"))
        alt = f"Picture {task}"
        if name.startswith("retrievals-"):
            alt = (
                f"Contact sheet of {task}: held-out queries, one a line, and the five nearest that "
                "each found; the right one is framed in green"
            )
        address = f"data:image/png;base64,{base64.b64encode(content).decode()}"
        found.append(Sheet(task, alt, address, width, height))
    return found


def _next(run: Path, noted: Mapping[str, Any], page: Page) -> dict[str, str]:
    """The commands that make sense after a training run, by their purpose."""
    found = {}
    if not page.done and isinstance(noted.get("recipe"), str):
        found["go on"] = _training_command(run, noted)
    whole = [checkpoint.name for checkpoint in page.checkpoints if checkpoint.whole]
    if not whole:
        return found
    checkpoint = str(run / whole[-1])
    own = run / "files"
    folder = str(own) if own.is_dir() else "FOLDER"
    query = "WORDS"
    if (own / "scenes").is_dir():
        query = min((path.stem for path in (own / "scenes").iterdir()), default=query)
        query = query.replace("_", ", ").replace("-", " ")
    return found | {
        "search in a browser": _btok("serve", checkpoint, folder),
        "search": _btok("search", checkpoint, folder, query, "--top", "3"),
        "evaluate on a public benchmark": _btok("eval", checkpoint, "mmeb-v2", "--data", "DATA"),
        "write this report again": _btok("report", str(run)),
    }


def _btok(*words: str) -> str:
    return shlex.join(["python", "-m", "btok", *words])


def _training_command(run: Path, noted: Mapping[str, Any]) -> str:
    """The command that goes on with a run, of its recipe and what is not the recipe's."""
    words = [str(noted["recipe"]), "--output", str(run)]
    for name, (_, has) in _changed(noted).items():
        value = has if isinstance(has, list) else [has]
        said = [str(each).lower() if isinstance(each, bool) else str(each) for each in value]
        words += [f"--{name.replace('_', '-')}", *said]
    starts = [_mapping(start) for start in _list(noted.get("starts"))]
    count = finite(starts[-1].get("processes")) if starts else 1
    launcher = ["python"]
    if count and count > 1:
        launcher = ["torchrun", "--standalone", "--nproc-per-node", f"{count:.0f}"]
    return shlex.join([*launcher, "train/main.py", *words])


def _changed(noted: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The settings that differ between the recipe and the run: [the recipe's value, the run's] by
    name.
    """
    changed = _mapping(noted.get("changed")).items()
    pairs = {name: pair for name, pair in changed if isinstance(pair, list) and len(pair) == 2}
    return {name: pair for name, pair in pairs.items() if name != "output"}


def _read(path: Path, notes: list[str]) -> dict[str, Any]:
    """A JSON file's object; empty where there is none, and a note where it is damaged."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
        return found
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.name} cannot be read: {one_line(error)[:200]}")
        return {}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: Any) -> str:
    """A value as it is shown, on one line."""
    if value is None:
        return NOTHING
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = printable(text)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
