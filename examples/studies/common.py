"""What the studies of training share: variants of one recipe, some seeds of each, and a page.

A run is a variant with a seed, in OUTPUT/<variant>-seed<N>, and is done when its metrics are there.
OUTPUT/settings.json says what all of them depend on: the options, the sources of btok, btok_kernels
and train, the packages and the device. A command that differs in one is refused. Runs may come in
any order and over several sittings; one that was killed goes on from its checkpoint.

On the pocket benchmark a seed's variants start from one model, OUTPUT/warm-seed<N>, which learned
to caption all nine tasks' pictures without bottleneck tokens. The seed also decides the batches, so
that variants differ in nothing but their own options.
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import t as student

from bench.plots import BLUE, GREY, ORANGE, PALE, canvas
from bench.provenance import ROOT
from bench.report import table
from btok.data.mixture import PUBLIC
from btok.encoder import BTokEncoder
from btok.files import rename, write_json, write_text
from btok.tools import command_line
from examples.studies.provenance import facts_of, surroundings
from train import main as training
from train.pocket.evaluation import evaluate
from train.recipes import Recipe

POCKET_SETTINGS = ("caption_steps", "steps", "groups_per_batch", "eval_queries")
Gaps = dict[str, dict[str, list[float]]]  # differences, by variant and by what was scored
RUN_FILES = ("btok_config.json", "manifest.json", "trainer.json", "optimizer*", "rng*")

ON_POCKET = (
    "All scores are **measured**, in percent, on the pocket benchmark (hit@1, of VisDoc ndcg@5;"
    " {eval_queries} queries a task, the same for all). The settings are reduced: {caption_steps}"
    " steps of captioning, once for all variants of a seed, then {steps} steps of"
    " {groups_per_batch} x 16 pairs with AdamW; the README's scores are those of a longer recipe."
    " The paper's figures are of MMEB-V2 and 2 B parameters: what a model of one million shows here"
    " neither confirms nor refutes them."
)
ON_MMEB = "All scores are **measured**, in percent, on MMEB-V2, after the paper's training."
ABOUT = (
    "A mean over seeds stands with its 95 % interval by Student's t, which is about training, not"
    " about the choice of queries. A difference is taken seed by seed: both sides began with the"
    " same weights and had the same batches."
)


@dataclass(frozen=True)
class Options:
    """A study's command line."""

    output: Path = Path("runs/studies")
    """Folder of the runs, which the studies share."""
    only: tuple[str, ...] = ()
    """Variants to run, in this order; by default all."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds to run of each variant."""
    list: bool = False
    """Show what is done and what is left, and run nothing."""
    dry_run: bool = False
    """Print the commands that training and scoring amount to, and run nothing."""
    page: Path | None = None
    """Write the page, its picture and numbers of what is done into this folder; run nothing."""
    caption_steps: int = 800
    """Steps of the captioning that a seed's variants start from (48 pairs, AdamW)."""
    steps: int = 200
    """Training steps of each variant on the pocket benchmark."""
    groups_per_batch: int = 2
    """Groups of 16 pairs in such a step."""
    eval_queries: int = 200
    """Test queries per task of the pocket benchmark."""
    model: str = "pocket"
    """"pocket", or a folder or hub id to train by the paper's recipe; then give the next two."""
    data: Path | None = None
    """The paper's public data sets, to train on."""
    mmeb: Path | None = None
    """MMEB-V2, to score on."""
    launch: str = sys.executable
    """What starts train/main.py on it, such as "torchrun --nproc-per-node 8"."""

    def __post_init__(self) -> None:
        given = [name for name in ("data", "mmeb") if getattr(self, name) is not None]
        if len(given) != (0 if self.model == "pocket" else 2):
            raise ValueError(
                f"model is {self.model!r} with {' and '.join(given) or 'neither data nor mmeb'}; "
                "'pocket' takes neither data nor mmeb, any other model both"
            )


class Variant(NamedTuple):
    """A row of a study: what it is, its options of train/main.py ("{output}" is the folder of the
    runs, "{seed}" the run's), what the paper has for it."""

    says: str
    options: tuple[str, ...] = ()
    paper: str = ""


class Study(NamedTuple):
    """Variants by name, and that which the others are compared with.

    Args:
        images_only: train on image tasks alone.
        prepare: called with the command's options, a variant and a seed before that is trained.
    """

    name: str
    title: str
    variants: dict[str, Variant]
    against: str
    images_only: bool = False
    prepare: Callable[[Options, str, int], None] | None = None


def main(study: Study, argv: Sequence[str] | None = None) -> int:
    """A study's command: run what is left of what was asked for, or show it.

    Returns:
        0, or 2 for a mistake in the command, told in one line.
    """
    prog = f"examples/studies/{study.name}.py"
    try:
        options = parse(Options, argv, prog)
        if study.prepare and options.model != "pocket":
            raise ValueError(f"model is {options.model!r}, expected 'pocket' of this study")
        for name in options.only:
            if name not in study.variants:
                raise ValueError(f"only is {name!r}, expected among {', '.join(study.variants)}")
        if options.page:
            results = json.loads((options.output / f"{study.name}.json").read_text())
            write_page(study, results, options.page)
            return 0
        asked = [(v, s) for v in options.only or study.variants for s in options.seeds]
        if options.dry_run:
            for name, seed in asked:
                print(*map(shlex.join, commands(options, study, name, seed)), sep="\n")
            return 0
        settings = settings_of(options)
        if options.list:
            for name, seed in asked:
                done = metrics_file(options, f"{name}-seed{seed}").exists()
                print(f"{'done' if done else 'left'}  {name} --seeds {seed}")
            return 0
        options.output.mkdir(parents=True, exist_ok=True)
        write_json(options.output / "settings.json", settings)
        for name, seed in asked:
            run(options, study, name, seed)
            write_json(options.output / f"{study.name}.json", collect(options, study, settings))
    except (OSError, ValueError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2
    return 0


def parse(kind: Any, argv: Sequence[str] | None, prog: str) -> Any:
    """The options of a study's command line; a ValueError of one line for what is wrong in it."""
    return command_line.parse(kind, sys.argv[1:] if argv is None else argv, prog)


def settings_of(options: Options) -> dict[str, Any]:
    """The settings that all runs of the folder depend on, as they were when the first began.

    Raises:
        ValueError: the folder has runs that depend on something else.
    """
    apart = {"output", "only", "seeds", "list", "dry_run", "page", "launch"}
    named = {name: value for name, value in asdict(options).items() if name not in apart}
    settings = json.loads(json.dumps(named | surroundings(), default=str))
    path = options.output / "settings.json"
    had = {} if any(options.output.glob("*-seed*")) else settings
    had = json.loads(path.read_text()) if path.exists() else had
    for name in sorted(settings.keys() - {"commit"}):  # the same code may have another one
        if had.get(name) != settings[name]:
            raise ValueError(
                f"output is {options.output}, whose runs have {name} {had.get(name)}, this command "
                f"{settings[name]}; give the same or another --output"
            )
    return had


def arguments(options: Options, study: Study, name: str, seed: int) -> list[str]:
    """The arguments of train/main.py for a run or, under the name "warm", for what a seed's runs
    start from.
    """
    folder = options.output / f"{name}-seed{seed}"
    common = ["--output", str(folder)]
    words = () if name == "warm" else study.variants[name].options
    own = [word.format(output=options.output, seed=seed) for word in words]
    if options.model != "pocket":
        data = options.output / "images.toml" if study.images_only else options.data
        common += ["--seed", str(seed), "--model", options.model, "--data", str(data)]
        return ["btok-qwen2vl-2b", *common, *own]
    # in bfloat16, as torch has it, Muon takes most of a step on a CPU
    common += ["--muon-rate", "0", "--eval-queries", "0", "--checkpoint-every", "100"]
    if name == "warm":  # with a seed of its own, so that its scenes do not come again
        common += ["--seed", str(1000 + seed), "--num-btoks", "0", "--ntp-weight", "0"]
        common += ["--caption-steps", str(options.caption_steps), "--steps", "0"]
        return ["pocket", *common, "--groups-per-batch", "3"]
    common += ["--seed", str(seed), "--model", str(options.output / f"warm-seed{seed}/stock")]
    common += ["--caption-steps", "0", "--reading-steps", "0", "--steps", str(options.steps)]
    common += ["--groups-per-batch", str(options.groups_per_batch)]
    common += ["--tasks", "image"] if study.images_only else []
    return ["pocket", *common, *own]


def commands(options: Options, study: Study, name: str, seed: int) -> list[list[str]]:
    """The command lines that a run amounts to; pocket runs are made and scored in this process."""
    given = arguments(options, study, name, seed)
    train = [*shlex.split(options.launch), str(ROOT / "train/main.py"), *given]
    if options.model == "pocket":
        return [train]
    last = options.output / f"{name}-seed{seed}" / f"checkpoint-{recipe_of(given).total_steps}"
    score = [sys.executable, "-m", "btok", "eval", str(last), "mmeb-v2", "--data"]
    return [train, [*score, str(options.mmeb), "--output", str(last.parent / "mmeb-v2")]]


def recipe_of(given: list[str]) -> Recipe:
    return training.parse(list(given))


def metrics_file(options: Options, run: str) -> Path:
    return options.output / run / ("" if options.model == "pocket" else "mmeb-v2") / "metrics.json"


def run(options: Options, study: Study, name: str, seed: int) -> None:
    """Train and score, or go on with that; nothing where it is done."""
    given = arguments(options, study, name, seed)
    recipe = recipe_of(given)
    refuse_other(recipe)
    if metrics_file(options, recipe.output.name).exists():
        return
    print(f"{name}, seed {seed}", flush=True)
    if study.prepare:
        study.prepare(options, name, seed)
    if options.model != "pocket":
        if study.images_only:
            write_text(options.output / "images.toml", images_of(options.data))
        for command in commands(options, study, name, seed):
            if status := subprocess.run(command).returncode:
                raise ValueError(f"status {status} of {shlex.join(command)}")
        return
    stock = Path(recipe.model)
    if not stock.exists():
        last = train(arguments(options, study, "warm", seed))
        draft = stock.with_name("draft")
        shutil.rmtree(draft, ignore_errors=True)
        # without what says that it is ours, it gets new bottleneck tokens as any checkpoint does
        shutil.copytree(last, draft, ignore=shutil.ignore_patterns(*RUN_FILES))
        rename(draft, stock)
    encoder = BTokEncoder.from_pretrained(train(given))
    scored = replace(recipe, eval_queries=options.eval_queries)
    evaluate(encoder.model, encoder.processor, scored, "metrics.json")


def refuse_other(recipe: Recipe) -> None:
    """A ValueError where the run's folder is of another recipe: its name meant something else."""
    config = recipe.output / "config.json"
    had = json.loads(config.read_text()) if config.exists() else recipe.described()
    for key, value in recipe.described().items():
        if had.get(key) != value and key not in training.MAY_CHANGE:
            raise ValueError(
                f"output is {recipe.output.parent}, whose {recipe.output.name} has {key} "
                f"{had.get(key)}, this command {value}; give another --output"
            )


def train(given: list[str]) -> Path:
    """The last checkpoint of a pocket run, which goes on here if it is not there."""
    recipe = recipe_of(given)
    last = recipe.output / f"checkpoint-{recipe.total_steps}"
    if not last.exists():
        training.main(given)
        if not last.exists():  # asked to stop, it saved and returned
            raise SystemExit(1)
    return last


def images_of(data: Path | None) -> str:
    """A mixture of the public data sets that are images, MMEB-train's."""
    names = [name for name, (repository, *_) in PUBLIC.items() if "MMEB-train" in repository]
    folder = json.dumps(str(Path(data or "").resolve()))
    return "\n".join(f'[[dataset]]\npublic = "{name}"\nfolder = {folder}\n' for name in names)


def collect(options: Options, study: Study, settings: dict[str, Any]) -> dict[str, Any]:
    """The numbers of all runs that are done, in an order of their own."""
    runs, digests = [], set()
    for name, variant in study.variants.items():
        folders = options.output.glob(f"{name}-seed*")
        for seed in sorted(int(folder.name.rpartition("-seed")[2]) for folder in folders):
            path = metrics_file(options, f"{name}-seed{seed}")
            if path.exists():
                refuse_other(recipe_of(arguments(options, study, name, seed)))
                metrics = json.loads(path.read_text())
                digests.add(metrics.get("data_digest"))
                row = {"variant": name, "seed": seed, "options": " ".join(variant.options)}
                runs.append(row | {"tasks": metrics["tasks"]})
    if len(digests) > 1:
        raise ValueError(f"output is {options.output}, whose runs were scored on different data")
    return {"study": study.name, "settings": settings, "data_digest": digests.pop(), "runs": runs}


def scores(tasks: Mapping[str, Any]) -> dict[str, float]:
    """The scores of a run: the mean over its tasks, over each modality's, each meta-task's, and
    each alone.
    """
    groups: dict[str, list[str]] = {"mean": list(tasks)}
    for key in ("modality", "meta_task"):
        for name, row in tasks.items():
            groups.setdefault(row[key], []).append(name)
    groups |= {name: [name] for name in tasks}
    return {key: float(np.mean([tasks[n]["score"] for n in of])) for key, of in groups.items()}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half its 95 % interval by Student's t; infinite for a single value."""
    if (n := len(values)) == 1:
        return values[0], math.inf
    half = student.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n)
    return float(np.mean(values)), float(half)


def draw(
    axes: Any, x: Iterable[float], found: Iterable[Sequence[float]], label: str, colour: Any
) -> None:
    """Means over seeds with thin intervals, a line through them; nothing where there are none."""
    points = [(at, *interval(scores)) for at, scores in zip(x, found, strict=True) if scores]
    if points:
        at, means, halves = zip(*points, strict=True)
        bars = [half if math.isfinite(half) else 0.0 for half in halves]
        options = {"ms": 4, "lw": 1.2, "elinewidth": 0.6, "capsize": 2, "color": colour}
        axes.errorbar(at, means, bars, fmt="o-", label=label, **options)


def differences(runs: Sequence[Any], name: str, against: str) -> dict[str, list[float]]:
    """A variant's scores less those of another with the same seed, by what `scores` names."""
    ours, theirs = (
        {run["seed"]: scores(run["tasks"]) for run in runs if run["variant"] == which}
        for which in (name, against)
    )
    both = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
    return {key: [x[key] - y[key] for x, y in both] for key in (both[0][0] if both else ())}


def said(values: Sequence[float], sign: str = "") -> str:
    """A mean and its interval; with the sign "+" of differences, in bold if that is without 0."""
    mean, half = interval(values)
    text = f"{mean:{sign}.1f}" + ("" if math.isinf(half) else f" ± {half:.1f}")
    return f"**{text}**" if sign and abs(mean) > half else text


def verdict(values: Sequence[float]) -> str:
    """A sentence on what differences allow to say."""
    mean, half = interval(values)
    if math.isinf(half):
        return f"{mean:+.1f} with one seed, which says nothing of others"
    side = "gain" if mean > 0 else "loss"
    holds = "is without 0" if abs(mean) > half else f"holds 0, so that no {side} is shown"
    low, high = mean - half, mean + half
    return f"{mean:+.1f}, from {low:+.1f} to {high:+.1f} over {len(values)} seeds: it {holds}"


def write_page(study: Study, results: dict[str, Any], folder: Path) -> None:
    """`studies-<name>.md` of what `collect` gives, its picture, and these numbers beside it.

    Raises:
        ValueError: nothing to compare yet.
    """
    stem, runs = f"studies-{study.name}", results["runs"]
    gaps = {name: differences(runs, name, study.against) for name in study.variants}
    gaps = {name: found for name, found in gaps.items() if found and name != study.against}
    if not gaps:
        raise ValueError(f"page is {folder}: no variant and '{study.against}' have a seed yet")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{stem}.md", page(study, results, gaps, stem))
    write_json(folder / f"{stem}.json", results)
    picture(gaps, study.against).savefig(folder / f"{stem}.png", metadata={"Software": None})


def page(study: Study, results: dict[str, Any], gaps: Gaps, stem: str) -> str:
    """The Markdown page."""
    settings, tasks = results["settings"], results["runs"][0]["tasks"]
    of = {n: [run for run in results["runs"] if run["variant"] == n] for n in study.variants}
    of = {name: found for name, found in of.items() if found}
    known = {
        what: scores({name: row | {"score": row[what]} for name, row in tasks.items()})
        for what in ("chance", "floor")
        if all(what in row for row in tasks.values())
    }
    variants = [["variant", "what it is", "options", "seeds", "in the paper"]]
    for name, found in of.items():
        variant, seeds = study.variants[name], ", ".join(str(run["seed"]) for run in found)
        options = f"`{' '.join(variant.options)}`" if variant.options else ""
        variants.append([name, variant.says, options, seeds, variant.paper])
    absolute, relative, low = [["task", *known, *of]], [["task", *gaps]], []
    for key in scores(tasks):
        floors = (f"{found[key]:.1f}" for found in known.values())
        points = [[scores(run["tasks"])[key] for run in found] for found in of.values()]
        absolute.append([key, *floors, *map(said, points)])
        if key in tasks and known.get("floor", {}).get(key, -1) >= max(map(np.mean, points)):
            low.append(key)
        relative.append([key, *(said(found[key], "+") for found in gaps.values())])
    cells = [cell for row in relative[1:] for cell in row[1:]]
    sure = sum(cell.startswith("**") for cell in cells)
    pocket = settings["model"] == "pocket"
    named = POCKET_SETTINGS if pocket else ("model", "data", "mmeb")
    given = " ".join(f"--{name.replace('_', '-')} {settings[name]}" for name in named)
    script = f"python examples/studies/{study.name}.py"
    parts = [
        f"# {study.title}",
        facts_of(settings, f"{script} {given}`, then `{script}")
        + f"\n- test data: {results['data_digest'] or 'MMEB-V2'}",
        ON_POCKET.format(**settings) if pocket else ON_MMEB,
        ABOUT,
        table(*variants),
        f"## Less `{study.against}`, seed by seed",
        "On the mean over all tasks:",
        "\n".join(f"- `{name}`: {verdict(found['mean'])}" for name, found in gaps.items()),
        f"By modality and task; in bold where the interval is without 0: {sure} of {len(cells)}."
        f" If there were no differences at all, about {len(cells) / 20:.0f} would be.",
        table(*relative),
        f"![Differences by task]({stem}.png)",
        "## Scores",
        table(*absolute),
        f"No variant's mean is above the floor, a shortcut's score, in {', '.join(low) or '-'}.",
    ]
    later = f"Not yet run on MMEB-V2: `{script} --model Qwen/Qwen2-VL-2B-Instruct --data DIR"
    later += " --mmeb DIR` trains and scores there; `--dry-run` prints the commands."
    return "\n\n".join([*parts, *([later] if pocket and not study.prepare else [])]) + "\n"


def picture(gaps: Gaps, against: str) -> Figure:
    """A panel per variant: by task the difference, its interval, and a tick for every seed."""
    keys, lines = list(next(iter(gaps.values()))), -(-len(gaps) // 4)
    columns = -(-len(gaps) // lines)
    figure = canvas(0.8 + lines * (0.5 + 0.19 * len(keys)))
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axes in panels[len(gaps) :]:
        axes.set_visible(False)
    for axes, (name, found) in zip(panels, gaps.items(), strict=False):
        for y, key in enumerate(keys):
            mean, half = interval(found[key])
            colour = ORANGE if abs(mean) > half else BLUE
            axes.plot(found[key], [y] * len(found[key]), "|", color=GREY, ms=6)
            axes.plot(mean, y, "o", color=colour, ms=5)
            if math.isfinite(half):
                axes.plot([mean - half, mean + half], [y, y], color=colour, lw=1.5)
        axes.axvline(0, color="black", lw=0.8)
        axes.set_title(name, fontsize=10)
        axes.set_yticks(range(len(keys)), keys, fontsize=8)
        axes.tick_params(axis="x", labelsize=8, labelbottom=True)
        axes.set(ylim=(len(keys) - 0.5, -0.5), axisbelow=True)
        axes.grid(axis="x", color=PALE)
    of = f"points over {against}: mean and 95 % interval over seeds, orange where without 0"
    figure.supxlabel(of, fontsize=9)
    return figure
