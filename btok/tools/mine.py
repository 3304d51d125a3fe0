"""`python -m btok mine`: hard negatives for a user's pairs, found by any checkpoint.

rows -> what they show, and which positives are interchangeable -> vectors -> the nearest -> rows

A data set's negatives are positives of other rows of the same file. What is made lies in blocks
until the output is there (`btok.tools.mine_output`): a command that was killed goes on where it was
and ends with the same bytes.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from tqdm import tqdm

from btok.config import check_choice
from btok.data.records import Side
from btok.data.sources import open_source
from btok.encoder import BTokEncoder
from btok.files import may_be_file, may_be_folder, must_be, one_line
from btok.tools.command_line import load
from btok.tools.mine_output import Job, begin, forget, manifest, write
from btok.tools.neighbours import ROWS, Blocks, mixed, nearest
from btok.tools.related import ABSENT, Hidden, Related, at_line, lines_of, looked, relate
from btok.tools.rows import refuse_ungrouped
from btok_kernels.ranks import gather, on_first, rank, world

PART = 1024  # sides that are encoded together
DEEPEST = 10_000  # rank: what is kept of a block of rows takes 80 MB then
NAMED = 10  # rows that cannot be read which are named
Draw = Literal["nearest", "random"]
Short = Literal["refuse", "drop", "fill"]
DRAWS, SHORTS = ("nearest", "random"), ("refuse", "drop", "fill")


@dataclass(frozen=True)
class Mine:
    """Find hard negatives for pairs: positives of other rows of the same file that a checkpoint
    finds near the query.

    Args:
        checkpoint: a folder with a model and its tokenizer, or a hub id.
        pairs: JSONL files of pairs, each a data set of its own.
        output: of one file a .jsonl; else a folder, in which outputs have the names of the files.
        count: negatives of a row.
        ranks: of the candidates by which they are drawn, from the first to the last of these; 1 is
            the one nearest to the query that is no positive of it.
        margin: leave out candidates whose score is above the positive's less this.
        relative: leave out those whose score is above this times the positive's; 0.95 is usual.
        draw: nearest takes the first ranks that are left, random any, by the seed.
        seed: of random.
        short: what becomes of rows with too few candidates left: refuse ends with an error, drop
            leaves them out, fill takes farther ranks (and drops those that have none).
        scores: write the scores of the positive and of each negative, as a teacher's are read.
        query_instruction: put before the text of the query.
        positive_instruction: put before the text of the positives.
        batch_tokens: tokens per packed row.
    """

    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    pairs: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PAIRS.jsonl [...]")
    ]
    output: Path
    count: int = 4
    ranks: tuple[int, int] = (10, 100)
    margin: float | None = None
    relative: float | None = None
    draw: Draw = "nearest"
    seed: int = 0
    short: Short = "refuse"
    scores: bool = False
    query_instruction: str = ""
    positive_instruction: str = ""
    batch_tokens: int = 16384


def mine(command: Mine) -> None:
    """Run the command; in a process group on every rank, which share the work.

    Raises:
        ValueError: an option out of range; files that are no pairs; a data set with too few
            candidates, before anything is encoded where that tells; an output of other settings.
        OSError: a file that is not there, a full disk.
    """
    refuse_ungrouped()
    check(command)
    jobs = jobs_of(command)
    encoder = load(command.checkpoint)
    with stoppable():
        for job in jobs:
            mine_one(job, encoder)


def check(command: Mine) -> None:
    """Raise a ValueError for an option that is out of range."""
    low, high = command.ranks
    for name, had, right, expected in (
        ("pairs", "empty", len(command.pairs) > 0, "at least one .jsonl file"),
        ("count", command.count, command.count > 0, "at least 1"),
        ("ranks", f"{low} {high}", 1 <= low <= high, "the first, from 1 on, and the last"),
        (
            "ranks",
            f"{low} {high}",
            high - low + 1 >= command.count,
            f"at least as many as count, {command.count}",
        ),
        ("ranks", f"{low} {high}", high <= DEEPEST, f"at most {DEEPEST}, which memory is for"),
        ("margin", command.margin, 0 <= (command.margin or 0) <= 2, "from 0 to 2"),
        (
            "relative",
            command.relative,
            command.relative is None or 0 < command.relative <= 1,
            "above 0 and at most 1",
        ),
        ("seed", command.seed, 0 <= command.seed < 2**63, "from 0 to 2**63 - 1"),
        ("batch_tokens", command.batch_tokens, command.batch_tokens > 0, "at least 1"),
    ):
        if not right:
            raise ValueError(f"mine: {name} is {had}, expected {expected}")
    check_choice("mine", "draw", command.draw, DRAWS)
    check_choice("mine", "short", command.short, SHORTS)


def jobs_of(command: Mine) -> list[Job]:
    """Each file's pairs, all looked at, and its output."""
    one = command.output.suffix == ".jsonl"
    if one and len(command.pairs) > 1:
        raise ValueError(
            f"mine: output is {command.output} for {len(command.pairs)} files, expected a folder"
        )
    (may_be_file if one else may_be_folder)("mine: output", command.output)
    jobs: list[Job] = []
    for path in command.pairs:
        if path.suffix != ".jsonl":
            raise ValueError(f"mine: pairs has {path}, expected .jsonl files")
        must_be("file", "mine: pairs", path, "a .jsonl file")
        output = command.output if one else command.output / path.name
        if output in (job.output for job in jobs):
            raise ValueError(f"mine: pairs has two files {path.name}, expected different names")
        if output.exists() and path.exists() and output.samefile(path):
            raise ValueError(f"mine: output {output} is a file of pairs, expected another one")
        source = open_source(
            path,
            negatives=0,
            query_instruction=command.query_instruction,
            positive_instruction=command.positive_instruction,
        )
        jobs.append(Job(command, source, output))
        may_be_folder("mine: output's parts", jobs[-1].parts)
        may_be_file("mine: output's report", jobs[-1].report)
    return jobs


@contextmanager
def stoppable() -> Iterator[None]:
    """A context in which SIGTERM ends the work as Ctrl-C does."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    own = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if own else None
    try:
        yield
    finally:
        if own:
            signal.signal(signal.SIGTERM, before)


def mine_one(job: Job, encoder: BTokEncoder) -> None:
    """Make one data set's output, or go on with it."""
    made_of = manifest(job, encoder)
    if on_first(lambda: begin(job, made_of)):
        say(f"{job.output} is there already, made of the same")
        return
    related = relate(*on_first(lambda: looked(job.source, job.parts / "rows.npz")))
    try:
        refuse_few(job, related)
    except ValueError:
        gather(None)
        if rank() == 0 and not [*job.parts.glob("*.f32")]:
            forget(job.parts)
        raise
    sides = len(related.queries), len(related.candidates)
    say(f"{job.source.name}: {len(job.source)} rows, {sides[0]} queries, {sides[1]} candidates")
    queries = encoded(job, encoder, "query", related.queries)
    candidates = encoded(job, encoder, "positive", related.candidates)
    name = blake2b(json.dumps(made_of["choice"]).encode(), digest_size=8).hexdigest()
    path, kind = job.parts / f"{name}.chosen", record(job.command.count)
    chosen = Blocks(path, len(job.source), kind, ROWS, rank() == 0)
    search(job.command, encoder.model.backbone.device, related, queries, candidates, chosen)
    say(on_first(lambda: write(job, related, chosen, made_of)))


def say(line: str) -> None:
    """Print a line on the progress to stderr, on rank 0 alone."""
    if rank() == 0:
        print(line, file=sys.stderr, flush=True)


def refuse_few(job: Job, related: Related) -> None:
    """A ValueError where it can be told before anything is encoded that candidates are too few."""
    command, source = job.command, job.source
    for row, why in islice(related.unreadable.items(), NAMED):
        say(f"{at_line(source, row)}: left out, {why}")
    if (more := len(related.unreadable) - NAMED) > 0:
        say(f"and {more} more rows that cannot be read")
    low, need = command.ranks[0], command.ranks[0] + command.count - 1
    most, had = int(related.allowed.max(initial=0)), len(related.candidates)
    if most < need:
        raise ValueError(
            f"{lines_of(source).path} has {had} different positives, of which {most} at most are "
            f"none of a query's own; ranks from {low} on and count {command.count} need {need}"
        )
    few = np.flatnonzero(related.allowed[related.query_of] < need)
    few = few[related.query_of[few] != ABSENT]
    if len(few) and command.short == "refuse":
        raise job.short(len(few), int(few[0]))


# -- vectors


def encoded(job: Job, encoder: BTokEncoder, which: str, rows: NDArray[np.int64]) -> Blocks:
    """The vectors of the queries or positives of these rows, float32 [D]; NaN for one that cannot
    be read. Blocks are shared by the ranks, and packed each on its own: the same bits always.
    """
    source, path = job.source, job.parts / f"{which}.f32"
    made = Blocks(path, len(rows), ("<f4", (encoder.dims,)), PART, rank() == 0)
    missing = on_first(made.missing)
    own = missing[rank() :: world()]
    total = sum(len(made.rows(block)) for block in own)

    def numbers() -> Iterator[int]:
        return (number for block in own for number in made.rows(block))

    def sides() -> Iterator[Side]:
        for number in numbers():
            row = int(rows[number])
            try:
                yield getattr(source[row], which)
            except (OSError, ValueError) as error:  # it was there when rows were looked at
                raise ValueError(f"{at_line(source, row)}: {one_line(error)}") from error

    waiting = iter(own)
    vectors, held, broken = np.empty(0), 0, 0
    options = {"desc": f"encoding {source.name}, {which}", "unit": "side"}
    with tqdm(total=total, disable=None if rank() == 0 else True, **options) as bar:
        for names, found, errors, _ in encoder.encode_iter(
            sides(), None, job.command.batch_tokens, False, ids=numbers(), window=PART, strict=False
        ):
            if not held:
                block = next(waiting)
                vectors = np.full((len(made.rows(block)), encoder.dims), np.nan, np.float32)
            at = np.array(names, int) - made.rows(block).start
            vectors[at] = found.reshape(len(names), encoder.dims)
            for number, why in errors.items():
                broken += 1
                if broken <= NAMED:
                    say(f"{at_line(source, int(rows[number]))}: left out, {one_line(why)}")
            held += len(names) + len(errors)
            bar.update(len(names) + len(errors))
            if held == len(vectors):
                made.write(block, vectors)
                held = 0
    gather(None)  # all have written
    return made


# -- the nearest, and those that are chosen


def record(count: int) -> np.dtype[Any]:
    """A row's candidates, ABSENT for none, the scores of its positive and of them, and how many are
    from beyond the ranks."""
    return np.dtype([("chosen", "<i8", (count,)), ("scores", "<f4", (1 + count,)), ("far", "<i4")])


def search(
    command: Mine,
    device: torch.device,
    related: Related,
    queries: Blocks,
    candidates: Blocks,
    chosen: Blocks,
) -> None:
    """Choose the negatives of all rows, a block at a time; blocks are shared by the ranks."""
    fill, limited = command.short == "fill", (command.margin, command.relative) != (None, None)
    missing = on_first(chosen.missing)
    own = missing[rank() :: world()]
    options = {"desc": "searching", "unit": "row", "unit_scale": chosen.size}
    for block in tqdm(own, disable=None if rank() == 0 else True, **options):
        rows = np.array(chosen.rows(block))
        found = np.zeros(len(rows), chosen.kind)
        found["chosen"], found["scores"] = ABSENT, np.nan
        there = np.flatnonzero(related.query_of[rows] != ABSENT)
        asking, right = related.query_of[rows[there]], related.candidate_of[rows[there]]
        vectors = queries.take(asking), candidates.take(right)
        positive = np.einsum("nd,nd->n", *vectors, dtype=np.float64).astype(np.float32)
        readable = ~np.isnan(positive)
        there, asking, positive = there[readable], asking[readable], positive[readable]
        limits = np.full(len(there), np.inf, np.float32)
        if command.margin is not None:
            limits = np.minimum(limits, positive - np.float32(command.margin))
        if command.relative is not None:
            limits = np.minimum(limits, positive * np.float32(command.relative))
        scores, near, above = nearest(
            torch.from_numpy(vectors[0][readable]).to(device),
            candidates,
            command.ranks[1] + (command.count if fill else 0),
            torch.from_numpy(limits).to(device) if limited else None,
            Hidden(related, asking),
        )
        keys = related.keys[0][asking, None], related.keys[1][near]
        at, far = choose(command, np.isfinite(scores), above, mixed(command.seed, *keys))
        none = at == ABSENT
        found["chosen"][there] = np.where(none, ABSENT, np.take_along_axis(near, at, 1))
        found["scores"][there, 0] = positive
        taken = np.where(none, np.nan, np.take_along_axis(scores, at, 1))
        found["scores"][there, 1:] = taken
        found["far"][there] = far
        chosen.write(block, found)
    gather(None)  # all have written


def choose(
    command: Mine,
    there: NDArray[np.bool_],
    above: NDArray[np.int64],
    drawn: NDArray[np.uint64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose which of each row's nearest candidates are taken, and count those from farther ranks.

    Args:
        there: bool [N, M], where a row has that many candidates within the margins, in order.
        above: int64 [N], how many more come before them.
        drawn: uint64 [N, M], by which random ones are drawn.

    Returns:
        int64 [N, count], in order, the places of those taken, ABSENT where there are too few; int64
        [N], from beyond the ranks.
    """
    low, high = command.ranks
    ranks = above[:, None] + np.arange(1, there.shape[1] + 1)
    within = there & (ranks >= low) & (ranks <= high)
    beyond = there & (ranks > high) & (command.short == "fill")
    places = np.broadcast_to(np.arange(there.shape[1]), there.shape)
    if command.draw == "random":
        order = np.lexsort((drawn, ~within), axis=1)  # those in the ranks first, by the draw
        places = np.empty_like(order)
        np.put_along_axis(places, order, np.arange(there.shape[1])[None], 1)
    # beyond only where what is within does not do, and the nearest first
    turn = np.where(within, places, there.shape[1] + np.arange(there.shape[1]))
    order = np.argsort(np.where(within | beyond, turn, 2 * there.shape[1]), 1, kind="stable")
    taken = order[:, : command.count]
    good = np.take_along_axis(within | beyond, taken, 1)
    far = (np.take_along_axis(beyond, taken, 1) & good).sum(1)
    taken = np.sort(np.where(good, taken, there.shape[1]), 1)
    taken[taken == there.shape[1]] = ABSENT
    return taken, far
