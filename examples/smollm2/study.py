"""Bottleneck tokens on something real: a pretrained decoder, real pairs, seeds and intervals.

    python examples/smollm2/study.py sets                       fetch, convert, build; show sizes
    python examples/smollm2/study.py run wordnet full --seed 0  train and score one variant
    python examples/smollm2/study.py grid [--minutes 90]        what is left of the sweep and grid
    python examples/smollm2/study.py page                       tables and plots of what is done

A run that is done has its JSON file in --results and is not done again; one that was stopped goes
on from its checkpoint. The same for every variant of a seed: the batches and their order.
"""

from __future__ import annotations

import fcntl
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from bench.report import table
from btok.files import write_json
from btok.tools import command_line
from examples.smollm2 import pairs
from examples.smollm2.fetch import backbone, default_cache
from examples.smollm2.runs import (
    ALONE,
    BASELINES,
    FLOORS,
    MAIN,
    SIDES,
    UNTRAINED,
    VARIANTS,
    Run,
    Settings,
    measures,
    perform,
)

PROG = "examples/smollm2/study.py"
RESULTS = Path(__file__).resolve().parent.parent.parent / "bench" / "results" / "smollm2"
SEEDS = (0, 1, 2)
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
WEIGHTS = (0.2, 1.0, 5.0)
SWEEP_SEEDS = (1000, 1001)  # whose batches no run of the grid has


@dataclass(frozen=True)
class Common:
    """The options that every command takes."""

    cache: Path = field(default_factory=default_cache)
    """Folder of weights, data and run folders."""
    results: Path = RESULTS
    """Folder of the runs' JSON files."""
    steps: int = 60
    """Training steps of a run."""
    batch: int = 16
    """Pairs of a step."""
    dtype: str = "float32"
    """Of products: "float32" or, on a GPU, "bfloat16"."""

    @property
    def settings(self) -> Settings:
        return Settings(self.cache, self.results, self.steps, self.batch, self.dtype)


@dataclass(frozen=True)
class Sets(Common):
    """Fetch the weights, build the sets of pairs, print what they are; where there are results,
    leave the lexical floors beside them, which the page shows.
    """


@dataclass(frozen=True)
class One(Common):
    """Train one variant on one set and score it."""

    trained_on: Annotated[str, tyro.conf.Positional] = "wordnet"
    """"wordnet" or "debian"."""
    variant: Annotated[str, tyro.conf.Positional] = "full"
    """See the README beside this file."""
    seed: int = 0
    rate: float | None = None
    """Peak learning rate; None for the sweep's choice."""
    weight: float | None = None
    """Of the generative loss; None for the sweep's choice."""


@dataclass(frozen=True)
class Grid(Common):
    """Run what is left of the sweep, then of the grid, in an order that compares early."""

    minutes: float | None = None
    """Begin no run after so many; None for as long as it takes."""
    seeds: tuple[int, ...] = SEEDS
    list: bool = False
    """Show what is done and what is left, and run nothing."""


@dataclass(frozen=True)
class Page(Common):
    """Write the page, its pictures and tables, of the results that are there."""

    also: tuple[Path, ...] = ()
    """Results folders of other machines, to stand beside it."""


Command = (
    Annotated[Sets, tyro.conf.subcommand("sets")]
    | Annotated[One, tyro.conf.subcommand("run")]
    | Annotated[Grid, tyro.conf.subcommand("grid")]
    | Annotated[Page, tyro.conf.subcommand("page")]
)


def sweep(results: Path) -> Iterator[Run]:
    """The runs that choose: all rates of each baseline, the two best rates of each with a second
    seed, then weights of the generative loss. All on WordNet, scored on validation pairs.
    """
    first, second = SWEEP_SEEDS
    for variant in BASELINES:
        for rate in RATES:
            yield Run("wordnet", variant, first, rate, sweep=True)
    for variant in BASELINES:
        found = swept(results, variant, first)
        for rate in sorted(sorted(found, key=lambda rate: found[rate])[-2:]):
            yield Run("wordnet", variant, second, rate, sweep=True)
    for weight in WEIGHTS:
        yield Run("wordnet", "full", first, chosen(results, "rate"), weight, sweep=True)


def swept(results: Path, variant: str, seed: int) -> dict[float, float]:
    """Mean reciprocal ranks of a sweep's runs, by rate, or of "full" by weight."""
    what = "weight" if variant == "full" else "rate"
    runs = results.glob(f"sweep-wordnet-{variant}-seed{seed}-*.json")
    found = [json.loads(path.read_text("utf-8")) for path in runs]
    return {run[what]: run["scores"]["wordnet"]["raw"]["mrr"] for run in found}


def chosen(results: Path, what: str) -> float:
    """The sweep's choice: the "rate" with the best mean over the baselines, or "full"'s best
    "weight" at that rate.

    One rate serves all: the best of a single pooling may be one at which every third seed falls
    apart in training.

    Raises:
        ValueError: the sweep is not done.
    """
    variants, values = (("full",), WEIGHTS) if what == "weight" else (BASELINES, RATES)
    of = [swept(results, variant, SWEEP_SEEDS[0]) for variant in variants]
    there, count = sum(map(len, of)), len(of) * len(values)
    if there < count:
        raise ValueError(
            f"results is {results}, which has {there} of the {count} runs that choose the {what}; "
            f"run the grid, or give --rate and --weight"
        )
    return max(values, key=lambda value: sum(found[value] for found in of))


def planned(
    results: Path,
    name: str,
    variant: str,
    seed: int,
    rate: float | None = None,
    weight: float | None = None,
) -> Run:
    """A run of the grid, with the sweep's choices for what is None."""
    if variant in BASELINES:
        weight = 0.0
    elif weight is None:
        weight = chosen(results, "weight")
    return Run(name, variant, seed, chosen(results, "rate") if rate is None else rate, weight)


def order(seeds: Sequence[int]) -> Iterator[tuple[str, str, int]]:
    """The grid's runs, (set, variant, seed): a half-finished one is already a comparison."""
    for variant in BASELINES:
        yield UNTRAINED, variant, 0
    others = [name for name in VARIANTS if name not in MAIN]
    for variants in (MAIN, others):
        for name in SIDES:
            for seed in seeds:
                for variant in variants:
                    yield name, variant, seed


def grid(command: Grid) -> None:
    """The sweep, then the grid; several processes at once share the runs."""
    results, begun = command.results, time.monotonic()
    if command.list:
        done = {path.stem for path in results.glob("*.json")}
        names = [run.name for run in sweep_names(results)]
        names += [Run(*place).name for place in order(command.seeds)]
        print(*(f"{'done' if name in done else 'left'}  {name}" for name in names), sep="\n")
        return

    def runs() -> Iterator[Run]:
        yield from sweep(results)
        for name, variant, seed in order(command.seeds):
            if name == UNTRAINED:
                yield Run(name, variant, seed)
            else:
                yield planned(results, name, variant, seed)

    waiting = True
    while waiting:
        waiting = False
        try:
            for run in runs():
                if (results / f"{run.name}.json").exists():
                    continue
                if command.minutes is not None and time.monotonic() - begun > 60 * command.minutes:
                    print(f"{command.minutes:g} minutes are over; the same command goes on")
                    return
                with alone(command.cache / "runs" / f"{run.name}.lock") as mine:
                    if mine:
                        tell(perform(command.settings, run))
                    elif run.sweep:
                        waiting = True  # what it chooses is needed
        except ValueError:
            if not waiting:
                raise
        if waiting:
            time.sleep(5)


@contextmanager
def alone(path: Path) -> Iterator[bool]:
    """A context that tells whether no other process is in it with the same file; its end, however
    it comes, leaves it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def sweep_names(results: Path) -> Iterator[Run]:
    """`sweep`, as far as it is known before its first part is done."""
    with suppress(ValueError):
        yield from sweep(results)


def tell(result: dict[str, Any]) -> None:
    """A run's scores on a line each."""
    for name, scores in result["scores"].items():
        for how, found in scores.items():
            said = "  ".join(f"{what} {value:5.1f}" for what, value in found.items())
            print(f"{result['run']:32} {name:8} {how:8} {said}", flush=True)


def show_sets(cache: Path) -> None:
    """The weights' folder and a table of the sets."""
    print(f"weights: {backbone(cache)} (dequantised Q4_1)")
    head = ["set", "train", "validation", "test", "words", "lexical floor", "sha256 of test"]
    rows = [head]
    for name in pairs.SETS:
        facts = pairs.load(cache, name).facts
        counts = (str(facts["pairs"].get(split, "")) for split in pairs.SPLITS)
        words = " -> ".join(f"{facts['words'][side]:.1f}" for side in ("query", "answer"))
        digest = facts["sha256"]["test"][:16]
        rows.append([name, *counts, words, f"{facts['floor']:.1f}", digest])
    print(table(*rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, 2 for a mistake or for what cannot be had, told in
    one line.
    """
    try:
        words = sys.argv[1:] if argv is None else argv
        command = command_line.parse(Command, words, PROG)
        if isinstance(command, Sets):
            show_sets(command.cache)
            if command.results.is_dir():
                write_floors(command.cache, command.results)
        elif isinstance(command, Grid):
            grid(command)
        elif isinstance(command, Page):
            from examples.smollm2.page import write_page

            for path in write_page(command.results, command.also):
                print(path)
        else:
            check_choice("trained_on", command.trained_on, SIDES)
            check_choice("variant", command.variant, VARIANTS | ALONE)
            show_sets(command.cache)
            place = command.trained_on, command.variant, command.seed
            run = planned(command.results, *place, command.rate, command.weight)
            tell(perform(command.settings, run))
    except (ValueError, OSError, ImportError) as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 2
    return 0


def write_floors(cache: Path, results: Path) -> None:
    """`floors.json`: by set what words in common alone find, and the test pairs it is of."""
    floors = {}
    for name in pairs.SETS:
        found = pairs.load(cache, name)
        queries, answers = zip(*found.pairs("test"), strict=True)
        of = measures(pairs.lexical_ranks(queries, answers))
        floors[name] = {"test": found.facts["sha256"]["test"], **of}
    write_json(results / FLOORS, floors)


def check_choice(name: str, value: str, among: Sequence[str] | Any) -> None:
    if value not in among:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(among)}")


if __name__ == "__main__":
    sys.exit(main())
