"""What models of the kernels leave open, asked of the device: contests, and what they decide.

A row of a stage's report is one contest: today's choice and an alternative took turns on one device
in one process, both results checked before (`bench.harness.duel`). The ratio is the alternative's
time over today's; its 95 % interval decides:

    an alternative wins a case where the whole interval is below 0.97, and loses one where today's
    would win so over it; where neither does, the smaller peak memory wins by the same margin, and
    16 MiB at least
    what wins in some case and loses in none takes the other's place
    of two ways between which a rule chooses, one that wins nowhere and loses somewhere is deleted

On a CPU, under Triton's interpreter, the same questions are asked on tiny shapes: that tries the
code and answers nothing.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property, partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bench.bench_contrastive_loss import (
    DIRECTIONS,
    DTYPE,
    TAU,
    Loss,
    check,
    inputs,
    ours,
    some_rows,
    step,
    truth,
)
from bench.harness import DEVICE, Call, device_seconds, duel, median_interval
from bench.peers import mixes
from bench.peers import truth as attention_truth
from btok.gated_mlp import GatedMLP
from btok_kernels import launch, ranks
from btok_kernels.condensed_attention import condensed_attention
from btok_kernels.contrastive_loss import Call as LossCall
from btok_kernels.contrastive_loss import contrastive_loss_and_grad
from btok_kernels.layout import CondensedLayout

if TYPE_CHECKING:
    from bench.gpu import Report

WINS, LEAST_MIB = 0.97, 16  # MiB between two peaks that make a difference
KERNELS = ("forward", "dkdv", "dq")
PAIRS: int | None
if DEVICE == "cuda":
    HEADS, KEY_HEADS, PAIRS, MOST_NEIGHBOURS = 12, 2, None, 99
    DIMS = [128, 64, 256]
    LAYOUTS = {mix: mixes()[mix] for mix in ("image queries", "long video", "short pairs")}
    SIZES = [1 << n for n in range(12, 19)]
    TILE_ROWS, WORKSPACE_ROWS, PANEL_ROWS = 8192, [1 << 15, 1 << 17], [1 << 13, 1 << 15]
    MLP_WIDTHS, MLP_ROWS = (1536, 8960), [512, 4096, 16384]  # of Qwen2-VL-2B
    RANKS = [(8, 512), (8, 2048), (16, 2048), (64, 512), (8, 8192)]  # ranks, rows of each
else:
    HEADS, KEY_HEADS, PAIRS, MOST_NEIGHBOURS = 2, 1, 2, 1
    DIMS, LAYOUTS = [16], {"few rows": CondensedLayout.from_lengths([9, 5], [4, 0], 2)}
    SIZES = [16]
    TILE_ROWS, WORKSPACE_ROWS, PANEL_ROWS = 16, [16], [16]
    MLP_WIDTHS, MLP_ROWS = (32, 64), [8]
    RANKS = [(2, 8)]
TRUTH_ROWS = 1 << 14  # up to here the loss is checked against fp32, then the two against each other
RANKS_PAIRS = 15  # of real ranks, which must agree on it
LINK, START, HOP = 450e9, 20e-6, 2.5e-6  # bytes a second; seconds of a collective, and of a rank

# kernel -> what launches it once more with a configuration
AttentionRuns = dict[str, Callable[[launch.Config], object]]
LossRuns = dict[str, Callable[[dict[str, int]], object]]

WAYS = "loss, by rows or recomputed"
GATHER = "gather, at once or by shards"
MLPS = "gated MLPs at inference"
# question -> what goes where today's is beaten, what goes where the alternative is
DELETES: dict[str, tuple[str, str | None]] = {
    WAYS: ("the way by rows", "the recompute way"),
    GATHER: ("the single gather", "the broadcasts by shard"),
    MLPS: ("GatedMLP", None),
}


def ask(
    report: Report,
    question: str,
    on: str,
    today: str,
    alternative: str,
    prepare: Callable[[], tuple[Call, Call]],
    *,
    pairs: int | None = PAIRS,
    **facts: Any,
) -> None:
    """Add a contest to the report.

    Args:
        question, on: what is asked, and the case it is asked of.
        today, alternative: the contestants' names.
        prepare: checks the results of both, and returns the two calls to time.
        pairs: see `duel`.
        facts: `chosen`, where a rule takes one of the two from case to case; what else to keep.
    """

    def figures() -> dict[str, Any]:
        names = {"question": question, "on": on, "today": today, "alternative": alternative}
        return names | facts | duel(*prepare(), pairs=pairs)

    report.measure(f"{question}, {on}: {alternative}", figures)


def neighbours(config: dict[str, int], fixed: tuple[str, ...] = ()) -> list[dict[str, int]]:
    """Launches that differ from one in one number: a block halved or doubled, warps, stages."""
    found = []
    for name, value in config.items():
        if name in fixed:
            continue
        if "warps" in name:
            others = [n for n in (4, 8) if n != value]
        elif "stages" in name:
            others = [n for n in (value - 1, value + 1) if n > 0]
        else:
            others = [n for n in (value // 2, 2 * value) if n >= 16 or n >= value]
        found += [config | {name: other} for other in others]
    return found[:MOST_NEIGHBOURS]


def named(config: dict[str, int]) -> str:
    short = {k.lower().removeprefix("block_").removeprefix("num_"): n for k, n in config.items()}
    return ", ".join(f"{name} {size}" for name, size in short.items())


@contextmanager
def attention_launches(configs: dict[str, launch.Config]) -> Iterator[AttentionRuns]:
    """Launch kernels with these configurations; yields what launches each of them once more."""
    runs: AttentionRuns = {}

    def attention(kernel: str, q: Tensor, run: Callable[[launch.Config], object]) -> None:
        arch = launch.architecture(q.device)
        usual = launch.attention_config(kernel, q.shape[2], q.dtype, arch)
        runs[kernel] = run
        run(configs.get(kernel, usual))

    with mock.patch.object(launch, "attention", attention):
        yield runs


@cache
def attention_case(mix: str, dim: int) -> Callable[[dict[str, launch.Config]], AttentionRuns]:
    """A function that checks the results with given tiles; it returns what launches the kernels."""
    layout = LAYOUTS[mix].to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(layout.num_rows, heads, dim, generator=generator).to(DEVICE, DTYPE)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
    )
    for tensor in (q, k, v):
        tensor.requires_grad_()
    expected = attention_truth(layout, q, k, v, grad)

    def launches(configs: dict[str, launch.Config]) -> AttentionRuns:
        with attention_launches(configs) as runs:
            out = condensed_attention(q, k, v, layout, impl="triton")
            results = [out, *torch.autograd.grad(out, (q, k, v), grad)]
        for name, got, want in zip(("out", "dq", "dk", "dv"), results, expected, strict=True):
            error = float((got.detach().float() - want).norm() / want.norm())
            if not error <= 1e-2:
                raise ValueError(f"wrong {name}, off by {error:.1e}: not timed")
        return runs

    launches({})  # today's
    return launches


def attention_tiles(report: Report, dim: int) -> None:
    """The tile table of the attention against its neighbours."""
    arch = launch.architecture(torch.device(DEVICE))

    def pair(
        mix: str, kernel: str, today: launch.Config, other: launch.Config
    ) -> tuple[Call, Call]:
        run = attention_case(mix, dim)({kernel: other})[kernel]
        return partial(run, today), partial(run, other)

    for kernel in KERNELS:
        today = launch.attention_config(kernel, dim, DTYPE, arch)
        for choice, mix in itertools.product(neighbours(today._asdict()), LAYOUTS):
            prepare = partial(pair, mix, kernel, today, launch.Config(**choice))
            names = named(today._asdict()), named(choice)
            ask(report, f"tile of {kernel}, D {dim}", mix, *names, prepare)


@contextmanager
def loss_launches(configs: dict[str, dict[str, int]]) -> Iterator[LossRuns]:
    """As `attention_launches`, for the kernels of the contrastive loss."""
    trials: LossRuns = {}
    usual = launch.contrastive

    def contrastive(
        kernel: str, query: Tensor, options: tuple[bool, ...], trial: Callable[..., object]
    ) -> dict[str, int]:
        trials[kernel] = trial
        return configs.get(kernel) or usual(kernel, query, options, trial)

    with mock.patch.object(launch, "contrastive", contrastive):
        yield trials


def recompute(*_: Any) -> int:
    """In the place of `launch.contrastive_chunk`: no rows of logits."""
    return 0


def loss_tiles(report: Report) -> None:
    """The launches of the loss's kernels against their neighbours, both directions."""
    arch = launch.architecture(torch.device(DEVICE))

    def pair(kernel: str, today: dict[str, int], other: dict[str, int]) -> tuple[Call, Call]:
        way = ours(some_rows if kernel in ("rows", "columns") else recompute, "triton")
        with loss_launches({kernel: other}) as trials:
            query, key = inputs(TILE_ROWS)
            check(named(other), step(way, query, key, True), truth(TILE_ROWS, True))
        return partial(trials[kernel], today), partial(trials[kernel], other)

    for kernel in ("sums", "d_logits", "d_query", "d_candidates", "rows", "columns"):
        today = launch.contrastive_config(kernel, DTYPE, arch)
        # a table made before all of them run is for tiles of that width
        shared = () if kernel in ("rows", "columns") else ("BLOCK_M",)
        for choice in neighbours(today, shared):
            prepare = partial(pair, kernel, today, choice)
            on = f"{TILE_ROWS} candidates"
            ask(report, f"tile of {kernel}", on, named(today), named(choice), prepare)


def loss_pair(rows: int, bidirectional: bool, today: Loss, other: Loss) -> tuple[Call, Call]:
    """A loss with its gradients by two ways, checked."""
    query, key = inputs(rows)
    calls = [partial(step, loss, query, key, bidirectional) for loss in (today, other)]
    if rows <= TRUTH_ROWS:
        expected = truth(rows, bidirectional)
        check("today's", calls[0](), expected)
    else:
        expected = [result.float().cpu() for result in calls[0]()]
    check("the alternative", calls[1](), expected)
    return calls[0], calls[1]


def ways(report: Report) -> None:
    """The loss by rows against the loss by recomputed tiles, time and memory by size."""
    by_rows, recomputed = ours(some_rows, "triton"), ours(recompute, "triton")
    for rows, direction in itertools.product(SIZES, DIRECTIONS):
        chosen = "rows" if launch.contrastive_chunk(rows, rows, DTYPE) else "recompute"
        prepare = partial(loss_pair, rows, direction == DIRECTIONS[1], by_rows, recomputed)
        on = f"{rows} candidates, {direction}"
        ask(report, WAYS, on, "rows", "recompute", prepare, chosen=chosen)


def workspace(report: Report) -> None:
    """The sizes of what the two ways of the loss hold at once."""

    def sized(name: str, size: int, loss: Loss) -> Loss:
        def run(query: Tensor, key: Tensor, bidirectional: bool) -> Tensor:
            with mock.patch.object(launch, name, size):
                return loss(query, key, bidirectional)

        return run

    for name, chunk, sizes in (
        ("CONTRASTIVE_WORKSPACE", some_rows, WORKSPACE_ROWS),
        ("CONTRASTIVE_PANEL", recompute, PANEL_ROWS),
    ):
        today, way = getattr(launch, name), ours(chunk, "triton")
        others = (today // 2, 2 * today, 4 * today)[:MOST_NEIGHBOURS]
        for size, rows in itertools.product(others, sizes):
            prepare = partial(loss_pair, rows, True, way, sized(name, size, way))
            ask(report, name, f"{rows} candidates", str(today), str(size), prepare)


def gated_mlps(report: Report) -> None:
    """The MLP that writes over its gate against transformers' own, without gradients."""
    width, inner = MLP_WIDTHS
    shapes = {"gate_proj": (width, inner), "up_proj": (width, inner), "down_proj": (inner, width)}
    options: dict[str, Any] = {"bias": False, "device": DEVICE, "dtype": DTYPE}
    layers = {name: nn.Linear(*shape, **options) for name, shape in shapes.items()}
    gated = GatedMLP(SimpleNamespace(**layers, act_fn=nn.SiLU(), training=False))

    def stock(x: Tensor) -> Tensor:
        return gated.down_proj(gated.act_fn(gated.gate_proj(x)) * gated.up_proj(x))

    def pair(rows: int) -> tuple[Call, Call]:
        x = torch.randn(rows, width, device=DEVICE).to(DTYPE)
        calls = [torch.no_grad()(partial(mlp, x)) for mlp in (gated, stock)]
        if not torch.equal(calls[0](), calls[1]()):
            raise ValueError("GatedMLP differs from the formula: not timed")
        return calls[0], calls[1]

    for rows in MLP_ROWS:
        ask(report, MLPS, f"{rows} rows", "GatedMLP", "stock MLP", partial(pair, rows))


class ModelledLink(ranks.Ranks):
    """Rank 0 of some that are not there: what the others would send is copied on a side stream.

    Each copy waits as long as a collective takes to start and its bytes take on the link. So how
    the kernels go on meanwhile is measured, how fast shards come is a model.
    """

    @cached_property
    def sources(self) -> list[list[Tensor]]:
        """What each rank sends: none yet."""
        return []

    def arriving(self, *parts: Tensor) -> tuple[list[list[Tensor]], Iterator[int]]:
        sources = self.sources
        if not sources:
            sources += [[part.roll(rank, 0) for part in parts] for rank in range(len(self.rows))]
        shards = [list(parts)]
        shards += [[torch.empty_like(part) for part in source] for source in sources[1:]]
        others = list(range(1, len(self.rows)))
        size = sum(part.nbytes for part in parts)
        by_shard = ranks._one_by_one(len(self.rows), self.rows[0], size)
        if DEVICE != "cuda":
            landed = self.land(shards, sources, others)
            return ranks._by_part(shards), iter([0, *landed])
        side, current = side_stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        events: dict[int, torch.cuda.Event] = {}
        with torch.cuda.stream(side):
            for sent in [[rank] for rank in others] if by_shard else [others]:
                took = START + len(self.rows) * HOP + len(sent) * size / LINK
                torch.cuda._sleep(int(took * cycles_a_second()))
                self.land(shards, sources, sent)
                event = side.record_event()
                events |= dict.fromkeys(sent, event)

        def arrivals() -> Iterator[int]:
            yield 0
            for rank, event in events.items():
                current.wait_event(event)
                yield rank

        return ranks._by_part(shards), arrivals()

    @staticmethod
    def land(shards: list[list[Tensor]], sources: list[list[Tensor]], sent: list[int]) -> list[int]:
        for rank in sent:
            for shard, source in zip(shards[rank], sources[rank], strict=True):
                shard.copy_(source)
        return sent

    def reduce_scatter(self, part: Tensor) -> Tensor:
        return part[self.own]


@cache
def side_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


@cache
def cycles_a_second() -> float:
    """Of `torch.cuda._sleep`."""
    cycles = 10**7
    return cycles / min(device_seconds(partial(torch.cuda._sleep, cycles)) for _ in range(3))


def gather(report: Report) -> None:
    """One gather against a broadcast for each shard, and the threshold between them.

    Under torchrun among its ranks; in one process over a modelled link.
    """
    real = dist.is_initialized()

    def pair(world: int, rows: int) -> tuple[Call, Call]:
        query, key = (x.detach()[:rows] for x in inputs(max(rows, SIZES[0])))
        if real:
            run: Call = partial(
                contrastive_loss_and_grad, query, key, temperature=TAU, impl="triton"
            )
        else:
            from btok_kernels.contrastive_loss_triton import fused  # imports triton

            link = ModelledLink(None, [rows] * world, slice(0, rows), 1 / rows)
            run = partial(fused, LossCall(query, key, TAU), link, True)

        def route(by_shard: bool) -> Any:
            with mock.patch.object(ranks, "_one_by_one", lambda *_: by_shard):
                return run()

        once, by_shard = ([x for x in route(way) if x is not None] for way in (False, True))
        check("by shards", by_shard[:3], [x.float().cpu() for x in once[:3]])
        return partial(route, False), partial(route, True)

    cases = RANKS
    if real:
        cases = sorted({(dist.get_world_size(), rows) for _, rows in RANKS})
    for world, rows in cases:
        size = rows * (inputs(SIZES[0])[0].shape[1] * DTYPE.itemsize + 4)
        chosen = "by shards" if ranks._one_by_one(world, rows, size) else "at once"
        on = f"{world} ranks of {rows} rows" + ("" if real else ", modelled link")
        pairs = RANKS_PAIRS if real and DEVICE == "cuda" else PAIRS
        names = "at once", "by shards"
        ask(report, GATHER, on, *names, partial(pair, world, rows), pairs=pairs, chosen=chosen)


def kernel_times() -> None:
    """Print milliseconds of the attention's kernels by case, of the Triton that is imported."""
    import triton

    arch, times = launch.architecture(torch.device(DEVICE)), {}
    for dim, mix in itertools.product(DIMS[:2], LAYOUTS):
        for kernel, run in attention_case(mix, dim)({}).items():
            call = partial(run, launch.attention_config(kernel, dim, DTYPE, arch))
            took = statistics.median(device_seconds(call) for _ in range(PAIRS or 25))
            times[f"{kernel} D {dim}, {mix}"] = 1e3 * took
    print(json.dumps({"version": triton.__version__, "ms": times}))


def triton_versions(report: Report) -> None:
    """The installed Triton against the one in the folder OTHER_TRITON, in processes in turns."""
    other = os.environ.get("OTHER_TRITON")
    if not other:
        print("OTHER_TRITON names no folder with another Triton")
        return

    def times(path: str | None) -> dict[str, Any]:
        paths = [*filter(None, [path, *sys.path])]
        call = "from bench.questions import kernel_times; kernel_times()"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        output = subprocess.check_output([sys.executable, "-c", call], env=environment, text=True)
        return json.loads(output.splitlines()[-1])

    turns: list[list[dict[str, Any]]] = []
    for i in range(PAIRS or 6):
        cases = [f"installed, turn {i}", f"other, turn {i}"]
        for who in (1, 0) if i % 2 else (0, 1):
            report.measure(cases[who], partial(times, other if who else None))
        turns.append([report.row(case) or {} for case in cases])
    found = [pair for pair in turns if all("ms" in row for row in pair)]
    for case in found[0][0]["ms"] if found else []:
        ratios = [row["ms"][case] / today["ms"][case] for today, row in found]
        kernel, mix = case.split(", ")
        figures = {
            "question": f"Triton, {kernel}",
            "on": mix,
            "today": found[0][0]["version"],
            "alternative": found[0][1]["version"],
            "ratio": statistics.median(ratios),
            "interval": median_interval(ratios),
            "pairs": len(ratios),
        }
        report.measure(f"Triton, {case}", figures.copy)


def outcome(row: dict[str, Any]) -> int:
    """1 where the alternative wins a contest, -1 where today's does, 0 where neither does."""
    low, high = row["interval"]
    if high < WINS:
        return 1
    if low > 1 / WINS:
        return -1
    today, other = row.get("mib", (0, 0))
    if abs(today - other) < LEAST_MIB:
        return 0
    return (other < WINS * today) - (today < WINS * other)


def verdict(rows: list[dict[str, Any]]) -> str:
    """What the contests of one question between the same two decide."""
    outcomes = [outcome(row) for row in rows]
    today, alternative = rows[0]["today"], rows[0]["alternative"]
    if_today, if_other = DELETES.get(rows[0]["question"], (None, None))
    wins, losses = outcomes.count(1), outcomes.count(-1)
    if wins and not losses:
        return f"delete {if_today}" if if_today else "replace"
    if losses and not wins and if_other:
        return f"delete {if_other}"
    names = {1: alternative, -1: today}
    wrong = [
        row["on"]
        for row, won in zip(rows, outcomes, strict=True)
        if won and row.get("chosen", names[won]) != names[won]
    ]
    return f"keep; the choice is wrong for {'; '.join(wrong)}" if wrong else "keep"


def over_cases(rows: list[dict[str, Any]]) -> tuple[float, float, float]:
    """The geometric mean of the ratios, and the widest reach of their intervals."""
    ratio = math.exp(statistics.fmean(math.log(row["ratio"]) for row in rows))
    return ratio, min(row["interval"][0] for row in rows), max(row["interval"][1] for row in rows)


def answers(rows: Iterable[dict[str, Any]]) -> list[tuple[str, ...]]:
    """question, today, alternative, ratio with its interval, cases, verdict: a line per decision.

    Between two ways every case has a line, as the crossing is what is asked for; of a choice with
    many alternatives only the one that would replace it by most, or the one that came nearest.
    """
    lines = []
    questions: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        if "question" in row:
            by_name = questions.setdefault(row["question"], {})
            by_name.setdefault(row["alternative"], []).append(row)

    def line(cases: list[dict[str, Any]], on: str, decided: str) -> tuple[str, ...]:
        first, figures = cases[0], "{:.3f} ({:.3f} - {:.3f})".format(*over_cases(cases))
        return first["question"], first["today"], first["alternative"], figures, on, decided

    won = {1: "{alternative} wins", -1: "{today} wins", 0: "tie"}
    for question, by_name in questions.items():
        if question in DELETES:
            (cases,) = by_name.values()
            for row in cases:
                mib = "{:.0f}, {:.0f} MiB".format(*row["mib"])
                lines.append(line([row], f"{row['on']} ({mib})", won[outcome(row)].format(**row)))
            lines.append(line(cases, f"all {len(cases)}", verdict(cases)))
            continue
        most = max(map(len, by_name.values()))  # one that fails somewhere replaces nothing
        whole = [cases for cases in by_name.values() if len(cases) == most]
        best = min(whole, key=lambda cases: (verdict(cases) == "keep", over_cases(cases)))
        on = best[0]["on"] if len(best) == 1 else f"{len(best)} cases"
        lines.append(line(best, f"{on}, best of {len(by_name)}", verdict(best)))
    return lines


def page(rows: Iterable[dict[str, Any]], machine: dict[str, Any]) -> str:
    """The answers as a Markdown table, with the rule and the device they are of."""
    titles = ("question", "today", "alternative", "ratio (95 %)", "cases", "verdict")
    table = [titles, tuple("--" for _ in titles), *answers(rows)]
    of = ", ".join(f"{name} {value}" for name, value in machine.items() if value)
    text = [
        f"Of {of}." if machine.get("device") != "cpu" else "Of a dry run on a CPU: no answers.",
        "Ratios are the alternative's time over today's, medians over pairs of calls in turns, over"
        f" cases their geometric mean; a contest is won where the whole interval is below {WINS},"
        " or, where neither side's is, by a peak memory smaller by as much. What wins somewhere and"
        " loses nowhere takes the other's place; of two ways one that only loses is deleted.",
        "\n".join(f"| {' | '.join(line)} |" for line in table),
    ]
    return "\n\n".join(text) + "\n"
