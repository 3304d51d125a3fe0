"""`python -m btok eval`: a checkpoint's scores on a public benchmark, kept set by set.

records -> task -> score -> `OUTPUT/sets/NAME.json`, and after each `OUTPUT/metrics.json`. A kept
score is taken again only where model, settings, prompts and data are those that it was made of.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro
from tqdm import tqdm

from btok.adapters import base_of
from btok.config import CONFIG_NAME, Pooling
from btok.data.records import RetrievalTask, Side
from btok.encoder import BTokEncoder
from btok.evaluation import mmeb_v2, records, runner
from btok.files import find, may_be_file, may_be_folder, must_be, read_json, sha256, write_json
from btok.tools import comparison, pictures
from btok.tools.command_line import load
from btok.vectors import OPTIONS, VectorOptions
from btok_kernels.ranks import from_first, rank

VERSION = 1  # of how a score is made
KEPT = {"version", "made_of", "data", "stamp", "row", "queries"}
KEPT_OF_ROW = {"score", "origin", "ci95", "queries", "metric", "modality", "published"}
DECIDING = (
    "config.json",
    "adapter_config.json",
    "*processor*.json",
    "*token*.json",
    "vocab*",
    "merges.txt",
    "*.model",
)


@dataclass(frozen=True)
class Evaluate:
    """Score a checkpoint on MMEB-V2.

    Args:
        checkpoint: a folder with a model and its tokenizer, or a hub id.
        benchmark: mmeb-v2.
        data: its data, laid out as the benchmark's own.
        tasks: data sets, meta-tasks or modalities, with commas; all 78 data sets by default.
        prompts: canonical, as bottleneck tokens are trained; origin, the benchmark's own strings.
        output: the folder of the scores; the same command goes on where a stopped one was.
        batch_tokens: tokens per packed row.
        num_btoks: in place of the checkpoint's own, one that it was trained for; "auto" for the
            fewest that its calibration allows each input; 0 for a model that embeds without them.
        dims: how many components of a vector, the first ones, of numbers it was trained for.
        multi_vector: compare bottleneck rows, by late interaction, of a model trained for it.
        int8: compare vectors in int8, with the scale of the checkpoint's calibration.
        bound: with num_btoks auto, the loss of similarity that is allowed.
        pooling: in place of the checkpoint's own; last or mean where num_btoks is 0.
        list: say what each data set needs on disk, and stop.
        fetch: get from the hub what is missing, one data set at a time.
        compare: published scores, the benchmark's file or another metrics.json; "published" for
            those of the benchmark's authors.
        submission: write the leaderboard's file; needs all data sets.
        model_name: the name in it.
        picture: draw the meta-tasks into this file (needs the extra `demo`).
    """

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    benchmark: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="BENCHMARK")]
    data: Path = Path("data/mmeb-v2")
    tasks: str = "all"
    prompts: mmeb_v2.Prompts = "canonical"
    output: Path = Path("runs/mmeb-v2")
    batch_tokens: int = 16384
    num_btoks: int | Literal["auto"] | None = None
    dims: int | None = None
    multi_vector: bool = False
    int8: bool = False
    bound: float = VectorOptions.bound
    pooling: Pooling | None = None
    list: bool = False
    fetch: bool = False
    compare: str | None = None
    submission: Path | None = None
    model_name: str | None = None
    picture: Path | None = None


def evaluate(command: Evaluate) -> None:
    """Run the command; in a process group on every rank, which share the work.

    Raises:
        ValueError: an unknown benchmark or task; scores of another model, other settings or prompts
            in the output folder; a file to compare with that is none; a record that does not fit.
        FileNotFoundError: a data set or a part of one is missing.
    """
    if command.benchmark != "mmeb-v2":
        raise ValueError(f"benchmark is {command.benchmark!r}, expected mmeb-v2")
    names = chosen(command.tasks)
    if command.list:
        if rank() == 0:
            print(needs(names))
        return
    others = comparison.read(command.compare) if command.compare else []
    refuse(command, names)
    encoder = encoder_of(command)
    scores = Scores(command.output, encoder, command.prompts)
    score_all(command, names, encoder, scores)
    if rank() > 0:
        return
    result = summed_up(scores.rows())
    print(comparison.table(result, names))
    for other in others:
        print(comparison.differences(result, other, scores.values()))
    if command.picture is not None:
        comparison.draw(result, others or comparison.read("published"), command.picture)
    if command.submission is not None:
        name = command.model_name or Path(command.checkpoint).name
        comparison.submit(result, command.submission, name, encoder)
    folder = shlex.quote(str(command.output))
    print(f"scores are in {command.output}; python -m btok report {folder} makes a page of them")


def chosen(tasks: str) -> list[str]:
    """The data sets of a list of data sets, meta-tasks and modalities, in the table's order."""
    table = mmeb_v2.data_sets()
    groups = {"all": [*table]} | {name: [name] for name in table}
    for named in comparison.groups().values():
        groups |= named
    spelled = {name.lower(): name for name in groups}
    wanted: set[str] = set()
    for word in filter(None, (word.strip() for word in tasks.split(","))):
        if word not in groups and word.lower() not in spelled:
            near = difflib.get_close_matches(word.lower(), spelled, 3, 0.5)
            names = " or ".join(spelled[each] for each in near) or "a data set or meta-task"
            raise ValueError(f"tasks has {word!r}, expected {names}")
        wanted.update(groups[word if word in groups else spelled[word.lower()]])
    if not wanted:
        raise ValueError(f"tasks is {tasks!r}, expected names of data sets")
    return [name for name in table if name in wanted]


def needs(names: Sequence[str]) -> str:
    """The disk space that data sets take, in GB: as the hub has them now, or as they are modelled
    where it does not answer.
    """
    specs = [mmeb_v2.data_set(name) for name in names]
    exact: dict[str, float] = {}
    archives: dict[str, float] = {}
    how = "what is no about is the hub's figure"
    try:
        for spec in specs:
            exact[spec.name] = size(spec, archives)
    except (OSError, ValueError, KeyError):
        how = "modelled: the hub does not answer"
    lines = []
    for spec in specs:
        said = f"about {spec.gb:.2f} GB"
        if spec.name in exact:
            said = f"records {exact[spec.name]:.2f} GB, media {said}"
        lines.append(f"{spec.name:<46}{spec.meta_task:<7}{said:<40}{spec.source}")
    lines += [f"{file:<53}archive {gb:.2f} GB, of several sets" for file, gb in archives.items()]
    total = sum([*exact.values(), *archives.values(), *(spec.gb for spec in specs)])
    return "\n".join([*lines, f"{len(names)} data sets, {total:.1f} GB ({how})"])


def size(spec: mmeb_v2.DataSet, archives: dict[str, float]) -> float:
    """GB of a data set's records on the hub; those of the archive of its media, which sets share,
    are put down.
    """
    _, there = records.listed(spec.source, spec.revision)
    picked = {name for part in spec.configs for name in records.pick(there, part, spec.split)}
    if spec.archive:
        archive = mmeb_v2.TABLE["archives"][spec.archive]
        if not archives.keys() >= {*archive["files"]}:
            _, files = records.listed(archive["source"], archive["revision"])
            archives.update({name: files[name] / 1e9 for name in archive["files"]})
    return sum(there[name] for name in picked) / 1e9


def refuse(command: Evaluate, names: Sequence[str]) -> None:
    """A ValueError, or a FileNotFoundError for data, of what can be told before a model is loaded:
    all data sets without records at once, and an output that something is in the way of.
    """
    if command.multi_vector and command.num_btoks == "auto":
        raise ValueError(
            "num_btoks is 'auto' with multi_vector, which gives each input another number of "
            "vectors; expected a number"
        )
    if command.submission is not None:
        if missing := mmeb_v2.data_sets().keys() - {*names}:
            raise ValueError(
                f"submission needs all data sets, tasks lacks {', '.join(sorted(missing))}"
            )
        if not command.submission.parent.is_dir():
            raise ValueError(f"submission is {command.submission}, in a folder that is not there")
        may_be_file("submission", command.submission)
    if command.picture is not None:
        pictures.drawable(command.picture)
    may_be_folder("output", command.output)
    if command.fetch:
        return
    must_be("folder", "data", command.data, "MMEB-V2's folder, which --fetch makes")
    lacking = []
    for name in names:
        spec = mmeb_v2.data_set(name)
        try:
            for part in spec.configs:
                records.find(command.data / spec.records, part, spec.split)
        except FileNotFoundError as error:
            lacking.append(f"{name} ({error})")
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise FileNotFoundError(
            f"{len(lacking)} of {len(names)} data sets are not in {command.data}: "
            f"{', '.join(lacking[:3])}{more}; --fetch gets them, --tasks leaves them out"
        )


def encoder_of(command: Evaluate) -> BTokEncoder:
    """The checkpoint's encoder, which makes vectors and reads prompts as the command says."""
    number: Any = command.num_btoks
    own = {"num_btoks": number, "pooling": command.pooling}
    options: dict[str, Any] = {"dims": command.dims, "multi_vector": command.multi_vector}
    if number == "auto" or number in read_json(command.checkpoint, CONFIG_NAME).get("budgets", ()):
        options["num_btoks"] = own.pop("num_btoks")  # the first of all that the model has
    encoder = load(command.checkpoint, **{k: v for k, v in own.items() if v is not None})
    dtype = "int8" if command.int8 else "float32"
    encoder = encoder.using(**options, bound=command.bound, dtype=dtype)
    images = encoder.processor.image_processor
    if command.prompts == "origin" and images is not None and images.brackets is None:
        raise ValueError(
            f"prompts is 'origin', a {encoder.processor.model_type} shows pictures otherwise than "
            "the benchmark's strings; expected canonical"
        )
    encoder.processor.bare = command.prompts == "origin"
    return encoder


def score_all(
    command: Evaluate, names: Sequence[str], encoder: BTokEncoder, scores: Scores
) -> None:
    """Score the data sets that have no score yet, and tell how it goes."""

    def encode(sides: Sequence[Side]) -> np.ndarray:
        return encoder.encode(sides, batch_tokens=command.batch_tokens, show_progress=False)

    contents = Contents(command.data)
    progress = Progress(names)
    with progress.bar:
        embed = runner.Embedder(encode, contents.key, command.output, progress.advance)
        for name in names:
            if command.fetch and rank() == 0:
                try:
                    read(name, command)
                except FileNotFoundError:
                    mmeb_v2.fetch(name, command.data)
            from_first(None)  # nobody reads before all is there
            loaded = read(name, command)
            task = loaded.task
            kept = from_first(scores.are_of(loaded, contents) if rank() == 0 else None)
            progress.begin(name, 0 if kept else len(task.queries) + len(task.candidates))
            if not kept:
                scored = runner.score_task(embed, task)
                if rank() == 0:
                    scores.keep(name, scored)
            if rank() == 0:
                write_json(command.output / "metrics.json", summed_up(scores.rows()))
                progress.end(f"{scores.kept[name]['row']['score']:.1f}")


class Loaded(NamedTuple):
    """A data set as a task, and what it is made of: records, their revision, their files."""

    task: RetrievalTask
    rows: Mapping[str, Any]
    revision: str
    files: Sequence[Path]


def read(name: str, command: Evaluate) -> Loaded:
    """A data set of those that lie on this disk; a FileNotFoundError where a part is missing."""
    rows, revision, files = mmeb_v2.load(name, command.data)
    task = mmeb_v2.build(name, data_dir=command.data, prompts=command.prompts, **rows)
    runner.check(task)
    return Loaded(task, rows, revision, files)


class Progress:
    """The progress through the data sets: a bar on a terminal, a line per set everywhere; rank 0
    tells.

    How many inputs a data set has is guessed until it is read.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.waiting = {name: 2 * mmeb_v2.data_set(name).queries for name in names}
        self.count = len(names)
        self.done = self.inputs = 0
        self.start = self.begun = time.monotonic()
        total = sum(self.waiting.values())
        self.bar = tqdm(total=total, unit="input", disable=None if rank() == 0 else True)

    def advance(self, inputs: int) -> None:
        """Count inputs that were encoded."""
        self.done += inputs
        self.bar.update(inputs)

    def begin(self, name: str, inputs: int) -> None:
        """Note that a data set was read; 0 inputs for one whose score was kept."""
        self.name, self.inputs, self.begun = name, inputs, time.monotonic()
        del self.waiting[name]
        self.bar.total = self.done + inputs + sum(self.waiting.values())
        self.bar.set_description(name)

    def end(self, score: str) -> None:
        """Note that a data set has a score, and tell it."""
        now = time.monotonic()
        said = f"{self.inputs} inputs in {now - self.begun:.0f} s" if self.inputs else "kept"
        if self.done and self.waiting:
            left = (now - self.start) / self.done * sum(self.waiting.values())
            said += f"; about {timedelta(seconds=round(left))} left"
        number = self.count - len(self.waiting)
        line = f"[{number}/{self.count}] {self.name}: {score} ({said})"
        self.bar.write(line, file=sys.stderr)


class Contents:
    """Digests of files' contents, each read once; paths are relative to a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.known: dict[str, str] = {}

    def digest(self, path: str) -> str:
        """The sha256 of a file."""
        if path not in self.known:
            self.known[path] = sha256(path)
        return self.known[path]

    def key(self, side: Side) -> tuple[str, str]:
        """A key of a side, equal for sides that show the same."""
        shown = [self.digest(path) for path in media_of(side)]
        return side.text, f"{len(side.video)} {' '.join(shown)}"

    def stamp(self, paths: Sequence[str]) -> str:
        """The names, sizes and times of files, which change when one is written."""
        stats = (os.stat(path) for path in paths)
        seen = [
            [os.path.relpath(path, self.root), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
            for path, stat in zip(paths, stats, strict=True)
        ]
        return digest_of(seen)


def media_of(side: Side) -> list[str]:
    """The files that a side shows."""
    return [*side.images, *side.video]


def digest_of(value: Any) -> str:
    """The sha256 of a value's JSON; what JSON does not know counts by its text."""
    text = json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class Scores:
    """The scores in a folder, of one model with its settings and prompts; rank 0 knows them.

    Raises:
        ValueError: the folder holds scores of others.
    """

    def __init__(self, folder: Path, encoder: BTokEncoder, prompts: str) -> None:
        self.folder = folder
        settings = {**encoder.settings, "files": files_digest(encoder)}
        self.made_of = {"model": encoder.digest, "settings": settings, "prompts": prompts}
        self.kept: dict[str, dict[str, Any]] = {}  # by data set what its file holds
        if rank() > 0:
            return
        (folder / "sets").mkdir(parents=True, exist_ok=True)
        for draft in [*folder.glob("*.json.*.tmp"), *folder.glob("sets/*.json.*.tmp")]:
            if not _is_running(draft.name.split(".")[-2]):
                draft.unlink()  # which a kill has left
        new = flat(self.made_of)
        for name in mmeb_v2.data_sets():
            if (had := kept_in(self.file(name))) is None:
                continue
            old = flat(had["made_of"])
            for key in (*new, *(name for name in old if name in OPTIONS)):
                if old.get(key) != new.get(key):
                    raise ValueError(
                        f"{folder} holds scores of {key} {old.get(key)}, this is {new.get(key)}; "
                        "give another --output"
                    )
            self.kept[name] = had

    def file(self, name: str) -> Path:
        """The path of the file where a data set's score is kept."""
        return self.folder / "sets" / f"{name}.json"

    def are_of(self, loaded: Loaded, contents: Contents) -> bool:
        """Whether the kept score is of just this data, as it is asked; if not, the next `keep` is
        of it.
        """
        task, rows, revision, files = loaded
        sides = (*task.queries, *task.candidates)
        media = sorted({path for side in sides for path in media_of(side)})
        asked = asdict(mmeb_v2.data_set(task.name))
        had = self.kept.get(task.name)
        stamp = digest_of([contents.stamp([*map(str, files), *media]), asked])
        if had and had["stamp"] == stamp:  # then no file need be read
            return True
        shown = {os.path.relpath(path, contents.root): contents.digest(path) for path in media}
        data = {"revision": revision, "digest": digest_of([rows, shown, asked])}
        self.now = {"data": data, "stamp": stamp}
        same = had is not None and had["data"]["digest"] == data["digest"]
        if had and same:
            self._write(task.name, had | self.now)
        return same

    def keep(self, name: str, scored: runner.Scored) -> None:
        """Write a data set's score, and each query's, of the data that `are_of` saw last."""
        kept = {"version": VERSION, "made_of": self.made_of, **self.now}
        self._write(name, kept | {"row": scored.row, "queries": scored.values})

    def _write(self, name: str, kept: dict[str, Any]) -> None:
        self.kept[name] = kept
        write_json(self.file(name), kept)

    def values(self) -> dict[str, list[float]]:
        """Each query's score, by data set, as shares."""
        return {name: kept["queries"] for name, kept in self.kept.items()}

    def rows(self) -> dict[str, dict[str, Any]]:
        """The row of each data set and what it was made of, by name, in the table's order."""
        return {
            name: self.kept[name]["row"] | self.made_of | {"data": self.kept[name]["data"]}
            for name in mmeb_v2.data_sets()
            if name in self.kept
        }


def flat(made_of: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, model and prompts that a score was made of, in one mapping; a KeyError where a
    part is missing.
    """
    return made_of["settings"] | {"model": made_of["model"], "prompts": made_of["prompts"]}


def kept_in(path: Path) -> dict[str, Any] | None:
    """The content of a data set's score file; None for no file, for what another version kept, and
    for a damaged one: it will be made again.
    """
    try:
        had = json.loads(path.read_text(encoding="utf-8"))
        row, values = had["row"], had["queries"]
        whole = had["version"] == VERSION and {*had} >= KEPT and {*row} >= KEPT_OF_ROW
        whole = whole and len(values) == row["queries"] and bool(flat(had["made_of"]))
        return had if whole and abs(100 * np.mean(values) - row["score"]) < 1e-6 else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def summed_up(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The rows of data sets, and means where none is missing, as `metrics.json` has them."""
    table = mmeb_v2.data_sets()
    means: dict[str, Any] = {}
    for score in ("score", "origin"):
        of = {name: row[score] for name, row in rows.items()}
        means[score] = {
            group: {name: comparison.mean(of, sets) for name, sets in named.items()}
            for group, named in comparison.groups().items()
        }
        means[score]["overall"] = comparison.mean(of, list(table))
    missing = [name for name in table if name not in rows]
    result = {"benchmark": "MMEB-V2", "tasks": dict(rows), **means["score"]}
    return result | {"origin": means["origin"], "missing": missing}


def files_digest(encoder: BTokEncoder) -> str:
    """The sha256 of what beside weights and bottleneck tokens a checkpoint decides by: its
    configuration, tokenizer and processor, and of one with adapters those of what they are on.
    """
    folder = Path(encoder.checkpoint or ".")
    base = base_of(folder)
    on = find(base, "config.json") if base else None
    places = [folder, *([on.parent] if on else [])]
    found = [{path for name in DECIDING for path in place.glob(name)} for place in places]
    return digest_of([[[path.name, sha256(path)] for path in sorted(paths)] for paths in found])


def _is_running(process: str) -> bool:
    try:
        os.kill(int(process), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True
