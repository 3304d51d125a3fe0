"""The study's page: tables, verdicts and plots, all of the runs' JSON files.

Two intervals stand beside a difference, both of 95 %. Over seeds (Student's t, seed by seed) it is
about training: batches and first weights. Over queries (a bootstrap of the queries, each with its
mean over seeds) it is about which test pairs were drawn. A verdict asks both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import t as student

from bench.plots import BLUE, GREEN, GREY, ORANGE, PALE, PURPLE, RED, TEAL, canvas
from bench.provenance import versions_line
from bench.report import table
from btok.files import write_text
from examples.smollm2.pairs import SETS
from examples.smollm2.runs import (
    BASELINES,
    FLOORS,
    MAIN,
    SIDES,
    UNTRAINED,
    VARIANTS,
    measures,
    read,
)
from examples.studies.common import interval, said

STEM = "smollm2"
HOW = ("raw", "centred")
WHAT = ("recall@1", "recall@10", "mrr")
TRAINED = tuple(SIDES)
RESAMPLES = 5000
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, GREY, TEAL, RED)


class Comparison(NamedTuple):
    """The differences of one variant from another on a set, in points of the mean reciprocal rank
    as it comes.

    Args:
        seeds: its differences by seed.
        queries: the bootstrap's 2.5 % and 97.5 % quantiles.
    """

    name: str
    seeds: list[float]
    queries: tuple[float, float]

    @property
    def over_seeds(self) -> tuple[float, float]:
        """The mean's 95 % interval by Student's t; endless with a single seed."""
        mean, half = interval(self.seeds)
        return mean - half, mean + half

    @property
    def side(self) -> int:
        """1 or -1 where both intervals are on that side of 0, else 0."""
        (low, high), (lower, upper) = self.over_seeds, self.queries
        return int(min(low, lower) > 0) - int(max(high, upper) < 0)

    @property
    def seeds_needed(self) -> int | None:
        """The number of seeds of this spread that would put 0 outside their interval, were the mean
        as it is; None where more than 1,000, or with one seed.
        """
        mean, spread = np.mean(self.seeds), np.std(self.seeds, ddof=1) if len(self.seeds) > 1 else 0
        for n in range(2, 1001) if spread else ():
            if student.ppf(0.975, n - 1) * spread / math.sqrt(n) < abs(mean):
                return n
        return None


class Claim(NamedTuple):
    """A claim of the paper, and the comparisons that would show it here: (variant, beside)."""

    says: str
    pairs: tuple[tuple[str, str], ...]


CLAIMS = (
    Claim(
        "Bottleneck tokens over the last token and the mean",
        (("tokens", "last"), ("tokens", "mean")),
    ),
    Claim("The condensation mask over none", (("full", "no-mask"),)),
    Claim("The generative objective over none", (("full", "tokens"),)),
)
# all that is compared
PAIRS = (*(pair for claim in CLAIMS for pair in claim.pairs), ("full", "last"), ("full", "mean"))
NUMBERS = sorted([(4, "full"), *((int(v[1:]), v) for v in VARIANTS if v[0] == "K")])


class Results:
    """The runs of a folder.

    Raises:
        ValueError: no run in it, or runs of different code, data or settings.
    """

    def __init__(self, folder: Path) -> None:
        self.aside = folder / "set-aside"
        found = [read(path) for path in sorted(folder.glob("*-seed*.json"))]
        if not found:
            raise ValueError(f"results is {folder}, which has no run; `study.py grid` makes them")
        self.settings = found[0]["settings"]
        for run in found:
            for key, value in self.settings.items():
                if key not in ("commit", "device") and run["settings"].get(key) != value:
                    raise ValueError(
                        f"results is {folder}: {run['run']} has {key} {run['settings'].get(key)}, "
                        f"{found[0]['run']} {value}; runs of one folder must agree"
                    )
        options: dict[tuple[str, str], tuple[Any, ...]] = {}
        for run in (run for run in found if not run["sweep"]):
            had = run["rate"], run["weight"]
            if options.setdefault((run["trained_on"], run["variant"]), had) != had:
                raise ValueError(
                    f"results is {folder}: {run['run']} has rate and weight {had}, another seed of "
                    "it others; set one aside"
                )
        path = folder / FLOORS
        #: by set what words in common alone find, where that is known of the runs' test pairs
        self.floors = {
            name: floor
            for name, floor in (read(path) if path.exists() else {}).items()
            if floor["test"] == self.settings["data"][name].get("sha256", {}).get("test")
        }
        self.sweep = [run for run in found if run["sweep"]]
        self.runs = [run for run in found if not run["sweep"]]

    @cached_property
    def ranks(self) -> dict[tuple[str, str, int, str, str], NDArray[np.intp]]:
        """Ranks of the right answers by (trained on, variant, seed, scored on, raw or centred)."""
        return {
            (run["trained_on"], run["variant"], run["seed"], name, how): np.fromstring(
                text, int, sep=" "
            )
            for run in self.runs
            for name, by_how in run["ranks"].items()
            for how, text in by_how.items()
        }

    def seeds(self, trained_on: str, variant: str) -> list[int]:
        """The seeds of a variant's finished runs on a set."""
        which = (trained_on, variant)
        return sorted(r["seed"] for r in self.runs if (r["trained_on"], r["variant"]) == which)

    def scores(
        self, trained_on: str, variant: str, scored_on: str, how: str
    ) -> dict[str, list[float]]:
        """The scores of a variant in percent, by measure, one a seed."""
        found = [
            measures(self.ranks[trained_on, variant, seed, scored_on, how], digits=9)
            for seed in self.seeds(trained_on, variant)
            if (trained_on, variant, seed, scored_on, how) in self.ranks
        ]
        return {what: [m[what] for m in found] for what in WHAT} if found else {}

    def compare(
        self, trained_on: str, ours: str, theirs: str, scored_on: str = "", how: str = "raw"
    ) -> Comparison | None:
        """Two variants on the seeds that both have; None where there is none."""
        scored_on = scored_on or trained_on
        seeds = [
            seed
            for seed in self.seeds(trained_on, ours)
            if all((trained_on, v, seed, scored_on, how) in self.ranks for v in (ours, theirs))
        ]
        if not seeds:
            return None
        gains = np.stack(
            [
                100 / self.ranks[trained_on, ours, seed, scored_on, how]
                - 100 / self.ranks[trained_on, theirs, seed, scored_on, how]
                for seed in seeds
            ]
        )
        per_query = gains.mean(0)
        low, high = np.quantile(
            resampled(len(per_query)) @ per_query / len(per_query), (0.025, 0.975)
        )
        return Comparison(f"{ours} - {theirs}", gains.mean(1).tolist(), (float(low), float(high)))


@cache
def resampled(count: int) -> NDArray[np.int64]:
    """The number of times that each of so many queries is drawn, the same for all comparisons:
    [resamples, n].
    """
    return np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), RESAMPLES)


def verdict(found: Sequence[Comparison]) -> str:
    """A phrase on what the comparisons of a claim, on all sets, allow to say."""
    sides = {c.side for c in found}
    if sides == {1}:
        return "shown here"
    return "contradicted" if -1 in sides and 1 not in sides else "not shown"


def write_page(results: Path, also: Sequence[Path] = ()) -> list[Path]:
    """`smollm2.md` and its plots, beside the folder of the runs.

    Args:
        results: the folder of the runs' files.
        also: other machines' folders, whose scores stand beside these.

    Returns:
        The files written.

    Raises:
        ValueError: as `Results`.
    """
    main, others = Results(results), [Results(folder) for folder in also]
    out = results.parent
    pictures = {f"{STEM}.png": differences_plot(main), f"{STEM}-training.png": training_plot(main)}
    if any(main.seeds(name, "K1") for name in TRAINED):
        pictures[f"{STEM}-k.png"] = number_plot(main)
    write_text(out / f"{STEM}.md", page(main, others))
    for name, figure in pictures.items():
        figure.savefig(out / name, metadata={"Software": None})
    return [out / f"{STEM}.md", *(out / name for name in pictures)]


def page(main: Results, others: Sequence[Results]) -> str:
    """The study's Markdown page."""
    s = main.settings
    trained = {run["trained_on"] for run in main.runs}
    text = [
        "# Bottleneck tokens on a pretrained decoder and real text pairs",
        facts(main),
        "All figures are **measured**, in percent. Each run trains adapters (LoRA, rank 16, without"
        f" DoRA and dropout) and the K rows for {s['steps']} steps of {s['batch']} pairs, products"
        f" in {s['dtype']}: {s['steps'] * s['batch']:,} pairs, far from convergence. All variants"
        " of a seed see the same batches in the same order. A query's answer is looked for among"
        " all answers of the test set (1,000; 500 of a set that was not trained on). *Raw* is the"
        " cosine as it comes, *centred* that of vectors less their side's mean.",
        sets_table(s["data"]),
        "## Verdicts",
        "Fixed before the first run of the grid: a claim is *shown here* where, on both sets, the"
        " raw mean reciprocal rank's difference is above 0 by both intervals, over seeds and over"
        " queries; *contradicted* where on one it is below 0 by both, and on none above; else *not"
        " shown*.",
        verdicts(main),
        f"![Differences]({STEM}.png)",
    ]
    for name in TRAINED:
        if name in trained:
            text += [f"## Trained and scored on {name}", scores_table(main, name)]
    text += ["## Differences", differences_text(), differences_table(main)]
    if (fit := k_table(main)) is not None:
        text += ["## The number of tokens", fit, f"![Scores over K]({STEM}-k.png)"]
    if trained > {UNTRAINED}:
        text += ["## Sets that were not trained on", transfer_table(main)]
    text += ["## The sweep", sweep_text(main), sweep_table(main)]
    text += aside_part(main)
    text += ["## Training", f"![Losses]({STEM}-training.png)", seconds_table(main)]
    if others:
        text += ["## Machines side by side", machines_table([main, *others])]
    left = [
        f"{name} {variant}"
        for name in TRAINED
        for variant in VARIANTS
        if len(main.seeds(name, variant)) < 3
    ]
    if left:
        text += [f"Not yet run with three seeds: {', '.join(left)}."]
    return "\n\n".join(text) + "\n"


def facts(main: Results) -> str:
    """The head of the page: commits, devices, runs and seconds."""
    s = main.settings
    commits, devices = (
        sorted({run["settings"][key] for run in [*main.runs, *main.sweep]})
        for key in ("commit", "device")
    )
    seconds = sum(sum(run["seconds"].values()) for run in [*main.runs, *main.sweep])
    later = "; what the grid runs was changed after the commit below, see *Set aside*"
    count = f"{len(main.runs)} runs and {len(main.sweep)} of the sweep"
    return "\n".join(
        [
            "- command: `python examples/smollm2/study.py grid`, then `python"
            " examples/smollm2/study.py page`, which makes this page of the JSON files alone"
            + (later if aside_part(main) else ""),
            f"- backbone: SmolLM2-135M-Instruct, dequantised Q4_1 (sha256 {s['backbone'][:16]}...)",
            f"- commit: {', '.join(commits)}; sha256 of its sources {s['code'][:16]}...",
            f"- device: {'; '.join(devices)}; {count}, {seconds / 3600:.1f} hours at least",
            versions_line(s["versions"]),
        ]
    )


def sets_table(data: Mapping[str, Any]) -> str:
    """A table of the sets of pairs: what is asked, how many pairs, and the lexical floor."""
    rows = [["set", "query -> answer", "train / validation / test pairs", "words", "lexical floor"]]
    means = {
        "wordnet": "a gloss -> the words it defines",
        "debian": "a package's summary -> its description",
        "stamps": "a caption in eight languages -> in English",
    }
    for name, facts in data.items():
        counts = " / ".join(f"{n:,}" for n in facts["pairs"].values())
        words = " -> ".join(f"{n:.1f}" for n in facts["words"].values())
        rows.append([name, means[name], counts, words, f"{facts['floor']:.1f}"])
    return table(*rows) + (
        "\n\nThe floor is recall@1 of TF-IDF over words; what ties with the right answer is before"
        " it. Chance is 0.1 (0.2 on stamps). On WordNet it is 0 by construction: an answer whose"
        " word shares its first four letters with a word of the gloss is left out. On debian"
        " nothing below the floor is worth a claim of use: a comparison between variants is all it"
        " serves for. No word or phrase that a test answer lists is listed by a training answer,"
        " but it may be a part of a longer phrase there; on debian no package has texts in two"
        " splits, but a few summaries differ from another package's in a version's number alone."
    )


def compared(main: Results) -> dict[tuple[str, str, str], Comparison]:
    """All comparisons of the runs, by (set, ours, theirs)."""
    found = {(name, *pair): main.compare(name, *pair) for name in TRAINED for pair in PAIRS}
    return {key: c for key, c in found.items() if c is not None}


def verdicts(main: Results) -> str:
    """A table of the claims."""
    found = compared(main)
    rows = [["claim", "compared", *TRAINED, "verdict", "to know more"]]
    for claim in CLAIMS:
        of = [found.get((name, *pair)) for pair in claim.pairs for name in TRAINED]
        there = [c for c in of if c is not None]
        whole = len(there) == len(of) and all(len(c.seeds) >= 3 for c in there)
        said_of = verdict(there) if whole else "not yet run with three seeds"
        for i, pair in enumerate(claim.pairs):
            cells = [found.get((name, *pair)) for name in TRAINED]
            needed = [
                c.seeds_needed for c in cells if c is not None and not c.side and len(c.seeds) > 1
            ]
            more = ", ".join("over 1,000 seeds" if n is None else f"{n} seeds" for n in needed)
            more = f"{more} at this mean and spread" if more else ""
            rows.append(
                [
                    claim.says if i == 0 else "",
                    " - ".join(f"`{v}`" for v in pair),
                    *("" if c is None else said(c.seeds, "+") for c in cells),
                    f"**{said_of}**" if i == 0 else "",
                    more,
                ]
            )
    return table(*rows)


def scores_table(main: Results, name: str) -> str:
    """Variants against measures, untrained ones below, of one set."""
    rows = [["variant", "what it is", "seeds", *(f"{how} {what}" for how in HOW for what in WHAT)]]
    for trained_on, variants in ((name, VARIANTS), (UNTRAINED, BASELINES)):
        for variant in variants:
            cells = [main.scores(trained_on, variant, name, how) for how in HOW]
            if not cells[0]:
                continue
            says = VARIANTS[variant].says if trained_on == name else "before training"
            label = variant if trained_on == name else f"{variant}, untrained"
            values = [said(cell[what]) for cell in cells for what in WHAT]
            rows.append([label, says, str(len(cells[0]["mrr"])), *values])
    floor = main.floors.get(name, {"recall@1": main.settings["data"][name]["floor"]})
    values = [f"{floor[what]:.1f}" if what in floor else "" for what in WHAT]
    rows.append(["TF-IDF", "lexical floor", "", *values, *[""] * 3])
    return table(*rows)


def differences_text() -> str:
    return (
        "Points of the mean reciprocal rank: the mean with its interval over seeds, in bold without"
        " 0, and in brackets the interval over queries (a paired bootstrap,"
        f" {RESAMPLES:,} resamples)."
    )


def differences_table(main: Results) -> str:
    """Each comparison, raw and centred, on each set."""
    rows = [["compared", *(f"{name}, {how}" for name in TRAINED for how in HOW)]]
    for pair in PAIRS:
        cells = [main.compare(name, *pair, how=how) for name in TRAINED for how in HOW]
        if any(cells):
            rows.append([" - ".join(f"`{v}`" for v in pair), *map(both, cells)])
    return table(*rows)


def both(found: Comparison | None) -> str:
    """A difference with its two intervals, as text."""
    if found is None:
        return ""
    low, high = found.queries
    return f"{said(found.seeds, '+')} [{low:+.1f}, {high:+.1f}]"


def k_table(main: Results) -> str | None:
    """Scores over K with the generative loss; None before there are any."""
    rows = [["K", *(f"{name} {what}" for name in TRAINED for what in WHAT)]]
    for k, variant in NUMBERS:
        cells = [main.scores(name, variant, name, "raw") for name in TRAINED]
        rows.append([str(k), *(said(c[what]) if c else "" for c in cells for what in WHAT)])
    return table(*rows) if any(main.seeds(name, "K1") for name in TRAINED) else None


def transfer_table(main: Results) -> str:
    """Main variants by what they were trained on and scored on, beside untrained models."""
    where = [(t, s, how) for t in TRAINED for s in SETS if s != t for how in HOW]
    rows = [["variant", *(f"{t} -> {s}, {how}" for t, s, how in where)]]
    for trains, variants in ((True, MAIN), (False, BASELINES)):
        for variant in variants:
            cells = [
                main.scores(t if trains else UNTRAINED, variant, f"unseen {s}", how)
                for t, s, how in where
            ]
            values = (said(c["mrr"]) if c else "" for c in cells)
            rows.append([variant if trains else f"{variant}, untrained", *values])
    return (
        "Mean reciprocal rank among 500 answers (`wordnet -> stamps`: trained on wordnet, scored on"
        " stamps).\n\n" + table(*rows)
    )


def sweep_text(main: Results) -> str:
    return (
        "On WordNet, with seeds that no other run has, scored on 500 validation pairs by raw mean"
        " reciprocal rank. One learning rate serves all variants and both sets, the best by the"
        " mean over the three poolings with the first seed; behind a stroke, a second seed at the"
        " two best rates of each. The generative weight is chosen at that rate, for `full`, and"
        " `no-mask` and every K take the same."
    )


def aside_part(main: Results) -> list[str]:
    """The section on runs that are in no table above, if there are any."""
    runs = [read(path) for path in sorted(main.aside.glob("*.json"))]
    rows = [["run", "rate", "weight", "raw mrr", "lowest and last loss"]]
    for run in runs:
        losses = np.convolve(run["losses"]["contrastive"], np.full(10, 0.1), "valid")
        mrr = run["scores"][run["trained_on"]]["raw"]["mrr"]
        ends = f"{losses.min():.2f}, {losses[-1]:.2f}"
        options = f"{run['rate']:g}", f"{run['weight']:g}"
        rows.append([run["run"], *options, f"{mrr:.1f}", ends])
    if not runs:
        return []
    return [
        "## Set aside",
        "The grid was begun twice before, with a rate of its own for each pooling: the best by one"
        " seed of the sweep, then by two. At that rate single runs fell apart in training, so that"
        " intervals over seeds said nothing. These are all its runs at another rate than the"
        " tables'; that one rate should serve all was decided after their scores were seen. Losses"
        " are contrastive, means over ten steps.",
        table(*rows),
    ]


def sweep_table(main: Results) -> str:
    """Rates against poolings, then weights."""
    of: dict[tuple[str, float, float], list[float]] = {}
    for run in sorted(main.sweep, key=lambda run: run["seed"]):
        key = run["variant"], run["rate"], run["weight"]
        of.setdefault(key, []).append(run["scores"]["wordnet"]["raw"]["mrr"])
    rates = sorted({rate for _, rate, weight in of if not weight})
    weights = sorted({weight for *_, weight in of if weight})

    def cells(variant: str, keys: Sequence[tuple[float, float]]) -> list[str]:
        return [" / ".join(f"{x:.1f}" for x in of.get((variant, *key), [])) for key in keys]

    rows = [["learning rate", *(f"{rate:g}" for rate in rates)]]
    for variant in BASELINES:
        rows.append([variant, *cells(variant, [(rate, 0.0) for rate in rates])])
    text = table(*rows)
    if weights:
        rate = next(rate for variant, rate, weight in of if weight)
        rows = [["generative weight", *(f"{weight:g}" for weight in weights)]]
        rows.append([f"full, rate {rate:g}", *cells("full", [(rate, w) for w in weights])])
        text += "\n\n" + table(*rows)
    return text


def seconds_table(main: Results) -> str:
    """A table of the seconds that runs of each variant take, and of their last losses."""
    rows = [
        ["variant", *(f"{n}: {w}" for n in TRAINED for w in ("seconds of training", "last losses"))]
    ]
    for variant in VARIANTS:
        cells = []
        for name in TRAINED:
            found = [r for r in main.runs if (r["trained_on"], r["variant"]) == (name, variant)]
            ends = (
                [np.mean([r["losses"][key][-10:] for r in found]) for key in ("contrastive", "ntp")]
                if found
                else []
            )
            cells += [
                f"{np.median([r['seconds']['training'] for r in found]):.0f}" if found else ""
            ]
            cells += [" / ".join(f"{x:.2f}" for x in ends)]
        if any(cells):
            rows.append([variant, *cells])
    return (
        "Losses, contrastive / generative, are means of the last ten steps over seeds. Seconds are"
        " medians over seeds, on machines of different speed, and of a run that was stopped they"
        " are those of its last sitting: they say what a run takes, and compare nothing.\n\n"
        + table(*rows)
    )


def machines_table(folders: Sequence[Results]) -> str:
    """Raw mean reciprocal ranks of each folder's runs."""

    def label(found: Results) -> str:
        s = found.settings
        return f"{s['device']}, {s['steps']} x {s['batch']}, {s['dtype']}"

    rows = [["set", "variant", *map(label, folders)]]
    for name in TRAINED:
        for variant in VARIANTS:
            cells = [found.scores(name, variant, name, "raw") for found in folders]
            if all(cells):
                rows.append([name, variant, *(said(c["mrr"]) for c in cells)])
    return table(*rows)


def differences_plot(main: Results) -> Figure:
    """A panel a set: each comparison's mean, both intervals, a tick a seed."""
    figure = canvas(0.9 + 0.42 * len(PAIRS))
    panels = figure.subplots(1, len(TRAINED), sharey=True)
    for axes, name in zip(panels, TRAINED, strict=True):
        for y, pair in enumerate(PAIRS):
            if (found := main.compare(name, *pair)) is None:
                continue
            mean = float(np.mean(found.seeds))
            colour = ORANGE if found.side else BLUE
            axes.plot(found.queries, [y + 0.15] * 2, color=GREEN, lw=2)
            if all(map(math.isfinite, found.over_seeds)):
                axes.plot(found.over_seeds, [y - 0.15] * 2, color=colour, lw=2)
            axes.plot(found.seeds, [y - 0.15] * len(found.seeds), "|", color=GREY, ms=8)
            axes.plot(mean, y, "o", color=colour, ms=5)
        axes.axvline(0, color="black", lw=0.8)
        axes.set_title(f"trained and scored on {name}", fontsize=10)
        axes.set_yticks(range(len(PAIRS)), [" - ".join(pair) for pair in PAIRS], fontsize=9)
        axes.set(ylim=(len(PAIRS) - 0.5, -0.5), axisbelow=True)
        axes.grid(axis="x", color=PALE)
    figure.supxlabel(
        "points of the mean reciprocal rank; above: 95 % over seeds (ticks: each), orange where"
        " both are without 0; below, green: over queries",
        fontsize=8.5,
    )
    return figure


def number_plot(main: Results) -> Figure:
    """Scores over K."""
    figure = canvas(3.2)
    panels = figure.subplots(1, len(TRAINED))
    for axes, name in zip(panels, TRAINED, strict=True):
        for how, colour in zip(HOW, (BLUE, ORANGE), strict=True):
            found = [(k, main.scores(name, v, name, how).get("mrr")) for k, v in NUMBERS]
            there = [(k, *interval(values)) for k, values in found if values]
            if not there:
                continue
            ks, means, halves = zip(*there, strict=True)
            bars = [half if math.isfinite(half) else 0 for half in halves]
            axes.errorbar(ks, means, bars, color=colour, marker="o", capsize=3, label=how)
        axes.set_xscale("log", base=2)
        axes.set_xticks([k for k, _ in NUMBERS], [str(k) for k, _ in NUMBERS])
        axes.set(xlabel="K bottleneck tokens", title=name, axisbelow=True)
        axes.grid(color=PALE)
    panels[0].set_ylabel("mean reciprocal rank, %")
    panels[0].legend(fontsize=9)
    return figure


def training_plot(main: Results) -> Figure:
    """Contrastive losses of the main variants, mean over seeds, smoothed over ten steps."""
    figure = canvas(3.2)
    panels = figure.subplots(1, len(TRAINED), sharey=True)
    for axes, name in zip(panels, TRAINED, strict=True):
        for variant, colour in zip(MAIN, COLOURS, strict=False):
            found = [r for r in main.runs if (r["trained_on"], r["variant"]) == (name, variant)]
            if found:
                mean = np.mean([r["losses"]["contrastive"] for r in found], 0)
                smooth = np.convolve(mean, np.full(10, 0.1), "valid")
                axes.plot(range(10, len(mean) + 1), smooth, color=colour, label=variant)
        axes.set(xlabel="step", title=name, axisbelow=True)
        axes.grid(color=PALE)
    panels[0].set_ylabel("contrastive loss")
    panels[0].legend(fontsize=8)
    return figure
