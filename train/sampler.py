"""Which pairs make up each step: a pure function of (seed, step), so that nothing needs resuming.

It depends on neither the number of ranks nor the workers: rank r of W takes groups r, r + W, ...

Over sources, a group's data set is drawn by weight. Its pairs are the next `group_size` of that
data set's permutation; each epoch of it has another one, whose remainder of fewer than `group_size`
is left out. Draws come from raw Philox bits, which no version of numpy may change.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from io import BytesIO
from itertools import chain, islice, product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from btok.data.records import Pair, Side
from btok.data.samples import pair_samples, to_restore
from btok.data.sources import Source
from btok.files import one_line
from btok.inputs import with_frames
from btok.packing import Sample
from btok.processing import Processor
from train.recipes import Recipe

PIECE = 64  # pairs that a worker reads and packs at a time
MIB = 1 << 20
TRIES = 16  # pairs that may be tried in the place of one that cannot be read


class Group(NamedTuple):
    """One group: its data set's number, its rows int64 [size], those of its epoch in order [n],
    whose end stands in for what cannot be read."""

    source: int
    rows: np.ndarray
    order: np.ndarray


def step_groups(
    lengths: Sequence[int], weights: Sequence[float], seed: int, step: int, count: int, size: int
) -> list[Group]:
    """The groups of a step, those of all ranks.

    Args:
        lengths, weights: of the data sets; none has fewer rows than `size`.
        seed, step: from 0.
        count, size: groups in a step, rows in a group.
    """
    last = (step + 1) * count
    shares = np.cumsum(weights)[:-1] / np.sum(weights)
    drawn = np.searchsorted(shares, _bits(last, seed) / 2.0**64, side="right")
    groups = []
    for group in range(last - count, last):
        source = int(drawn[group])
        before = int((drawn[:group] == source).sum())
        epoch, place = divmod(before, lengths[source] // size)
        order = _order(lengths[source], seed, source, epoch)
        groups.append(Group(source, order[place * size : (place + 1) * size], order))
    return groups


def _bits(count: int, *words: int) -> np.ndarray:
    """uint64 [count] of the stream that these words name; a 0 at their end changes nothing."""
    return np.random.Philox(np.random.SeedSequence(words)).random_raw(count)


@lru_cache(maxsize=64)
def _order(length: int, seed: int, source: int, epoch: int) -> np.ndarray:
    return np.argsort(_bits(length, seed, source + 1, epoch + 1), kind="stable")


class Skipped(NamedTuple):
    """A row that cannot be read, so that another one stands in for it: its data set by number (from
    0, in the run's order) and name, the row's number there, and why."""

    source: int
    dataset: str
    row: int
    reason: str


class Step(NamedTuple):
    """A rank's part of a step, or a piece of that: its pairs (without pictures, videos and
    negatives), their rows in their data sets, their samples, what was skipped, the samples'
    places among those that `pair_samples` gives for all of the rank's pairs, and how many
    bottleneck tokens their targets see (none said: all)."""

    pairs: list[Pair]
    rows: list[int]
    samples: list[Sample]
    skipped: list[Skipped]
    places: list[int]
    budgets: list[int]


class TrainSet(Dataset[Step]):
    """The steps of a run on one rank: `steps[i]` is read, decoded and processed when asked for;
    `steps[i, p]` is the piece p of `pieces` of it.

    In the place of a row that cannot be read comes one of its data set that no group of the step
    has, from the far end of the epoch, and where none of those can be read one of the step's other
    groups: the same whatever the ranks. Its own turn comes as well. A row that is in two groups of
    a step is no negative of itself: both pairs have its `positive_id`.

    Args:
        recipe: the settings that `__getitem__` reads.
        processor: of the model.
        sources: the data sets.
        rank, world: of this process.
        groups: step -> its groups, those of all ranks; None draws them by weight.

    Raises:
        ValueError: a data set with fewer rows than a group; data sets with unequal numbers of hard
            negatives. `steps[i]`: a group with fewer rows that can be read than places.
    """

    def __init__(
        self,
        recipe: Recipe,
        processor: Processor,
        sources: Sequence[Source],
        rank: int = 0,
        world: int = 1,
        groups: Callable[[int], list[Group]] | None = None,
    ) -> None:
        self.recipe, self.processor, self.sources = recipe, processor, sources
        self.rank, self.world = rank, world
        lengths, weights = [len(source) for source in sources], [s.weight for s in sources]
        count, size = recipe.groups_per_batch, recipe.group_size
        drawn = partial(step_groups, lengths, weights, recipe.seed, count=count, size=size)
        self.groups = groups or drawn
        places = list(product(range(count), range(size)))
        self.mine = [at for at in places if at[0] % world == rank]
        if count % world:  # the whole batch is one: cut anywhere
            cut = [len(places) * which // world for which in (rank, rank + 1)]
            self.mine = places[slice(*cut)]
        # one pass takes all at once
        self.piece = PIECE if recipe.chunk_tokens is not None else max(len(self.mine), 1)
        self.pieces = -(-len(self.mine) // self.piece)
        for source in sources:
            if len(source) < recipe.group_size:
                raise ValueError(
                    f"data set {source.name} has {len(source)} rows, expected at least a group's "
                    f"{recipe.group_size}; add rows, or give a lower --group-size"
                )
        if len({source.negatives for source in sources}) > 1:
            had = ", ".join(f"{source.name} {source.negatives}" for source in sources)
            raise ValueError(
                f"the numbers of negatives of data sets differ ({had}), expected one number; the "
                "setting negatives of a data set takes fewer"
            )
        if recipe.distillation_weight and not all(s.scored and s.negatives for s in sources):
            lacking = [s.name for s in sources if not (s.scored and s.negatives)]
            raise ValueError(
                f"distillation_weight is {recipe.distillation_weight}, and data set {lacking[0]} "
                "has no scores of negatives, expected scores in each of its rows"
            )

    def __len__(self) -> int:
        return self.recipe.steps

    def __getitem__(self, at: int | tuple[int, int]) -> Step:
        step, piece = at if isinstance(at, tuple) else (at, None)
        first, size = (0, len(self.mine)) if piece is None else (piece * self.piece, self.piece)
        mine, reading = self.mine[first : first + size], _Reading(self, step)
        found = [reading.read(number, place) for number, place in mine]
        pairs, rows, parts = zip(*found, strict=True)
        # all queries, then all positives, then every one's first hard negative, ...
        ordered = list(chain.from_iterable(zip(*parts, strict=True)))
        kinds = range(len(parts[0]))
        own = range(first, first + len(mine))
        places = [kind * len(self.mine) + place for kind in kinds for place in own]
        budgets = self._budgets(step, mine, len(kinds))
        return Step(list(pairs), list(rows), ordered, reading.skipped, places, budgets)

    def samples(
        self, which: int, row: int, step: int, among: int
    ) -> tuple[Pair, int, list[Sample]]:
        """The pair of a data set's row, without what it shows, the row, and the pair's samples."""

        def process(side: Side) -> Any:
            return self.processor(with_frames(side))

        pair, objective = self.sources[which][row], self.recipe.objective
        found = pair_samples(
            [pair], process, ntp_side=self.recipe.ntp_side, generate=objective.weight(step) > 0
        )
        if objective.reconstruction_weight:
            found[:2] = self._restored(pair, found[:2], step, among)
        # pictures stay behind: what goes to the trainer is pickled
        query, positive = Side(pair.query.text), Side(pair.positive.text)
        return replace(pair, query=query, positive=positive, negatives=()), row, found

    def _restored(
        self, pair: Pair, samples: Sequence[Sample], step: int, among: int
    ) -> list[Sample]:
        """The pair's two samples, of which one that generates nothing restores its own text."""
        found = []
        for kind, (side, (source, target)) in enumerate(
            zip((pair.query, pair.positive), samples, strict=True)
        ):
            if target is None and side.text.strip():
                text = self.processor(Side(side.text))
                words = self.recipe.seed, 1, step + 1, 2 * among + kind + 1
                draws = _bits(len(text["input_ids"]), *words)
                target = to_restore(text, self.recipe.mask_rate, draws)
            found.append((source, target))
        return found

    def _budgets(self, step: int, mine: Sequence[tuple[int, int]], kinds: int) -> list[int]:
        """The number of bottleneck tokens that each sample's target sees, drawn in each step."""
        if not (budgets := self.recipe.budgets):
            return []
        count, size = self.recipe.groups_per_batch, self.recipe.group_size
        drawn = _bits(kinds * count * size, self.recipe.seed, 2, step + 1)
        drawn = (drawn % np.uint64(len(budgets))).reshape(kinds, count, size)
        return [budgets[drawn[kind, at[0], at[1]]] for kind in range(kinds) for at in mine]


class _Reading:
    """The rows of a step, and what stands in for those that cannot be read.

    A group is told by its number in the step. Whether a row can be read is tried once.
    """

    def __init__(self, steps: TrainSet, step: int) -> None:
        self.steps, self.step, self.groups = steps, step, steps.groups(step)
        # by data set and row, why one that was tried fails; "" where it does not
        self.reasons: dict[tuple[int, int], str] = {}
        self.stand_ins: dict[int, dict[int, int]] = {}  # by group, as `_stand_ins` gives them

    @property
    def skipped(self) -> list[Skipped]:
        """The rows that were tried so far and cannot be read."""
        names = [source.name for source in self.steps.sources]
        tried = self.reasons.items()
        return [Skipped(which, names[which], row, why) for (which, row), why in tried if why]

    def read(self, number: int, place: int) -> tuple[Pair, int, list[Sample]]:
        """The pair in a place of a group, its row, its samples.

        Raises:
            ValueError: nothing that may be there can be read.
        """
        for row in self.tries(number, place):
            if found := self._attempt(number, place, row):
                return found
        if number not in self.stand_ins:
            self.stand_ins[number] = self._stand_ins(number)
        row = self.stand_ins[number].get(place, -1)
        if row >= 0 and (found := self._attempt(number, place, row)):
            return found
        which, rows, _ = self.groups[number]
        row = int(rows[place])
        raise ValueError(
            f"data set {self.steps.sources[which].name}: too little of it can be read for a group "
            f"of {len(rows)}; mend its rows, or give a lower --group-size; row {row}: "
            f"{self.reasons[which, row]}"
        )

    def tries(self, number: int, place: int) -> Iterator[int]:
        """A row of a group, and those to be tried in its place: no other place tries them, while
        there are enough that no group of the step has."""
        _, rows, order = self.groups[number]
        yield int(rows[place])
        spares = order[self._spare(number)][::-1]
        first = (number * len(rows) + place) * TRIES
        for turn in range(first, first + min(TRIES, len(spares))):
            yield int(spares[turn % len(spares)])

    def _stand_ins(self, number: int) -> dict[int, int]:
        """Place -> row, of `_others`, for the places of a group of whose `tries` none can be read;
        no row twice. All places are looked at: a rank or a worker that has some of them must find
        what one that has all would.
        """
        others = self._others(number)
        if not any(self._readable(number, 0, row) for row in others):
            return {}  # before a whole group is read for nothing
        filled = {}
        for place in range(len(self.groups[number].rows)):
            tried = self.tries(number, place)
            filled[place] = next((r for r in tried if self._readable(number, place, r)), None)
        empty = [place for place, row in filled.items() if row is None]
        left = (r for r in others if self._readable(number, 0, r) and r not in filled.values())
        return dict(zip(empty, left, strict=False))

    def _others(self, number: int) -> list[int]:
        """The rows that may fill a place of a group of whose `tries` none can be read.

        They are of its data set, and none of the group's; first those that no group of the step
        has: all of them where `tries` were all there are of those, and else about as many as a step
        has, for a large set in which so many fail in a row has another fault.
        """
        _, rows, order = self.groups[number]
        spare = self._spare(number)
        elsewhere = order[~spare & ~np.isin(order, rows)]
        # else all groups of the step would take the same one
        elsewhere = np.roll(elsewhere, -number * len(rows))
        found: list[int] = np.concatenate([order[spare], elsewhere]).tolist()
        return found[: TRIES + len(self.groups) * len(rows)]

    def _spare(self, number: int) -> np.ndarray:
        """bool [n]: which rows of a group's epoch no group of the step has."""
        which, _, order = self.groups[number]
        return ~np.isin(order, np.concatenate([g.rows for g in self.groups if g.source == which]))

    def _readable(self, number: int, place: int, row: int) -> bool:
        known = self.reasons.get((self.groups[number].source, row))
        return known == "" or self._attempt(number, place, row) is not None

    def _attempt(self, number: int, place: int, row: int) -> tuple[Pair, int, list[Sample]] | None:
        which, rows, _ = self.groups[number]
        if self.reasons.get((which, row)):
            return None
        self.reasons[which, row] = ""
        try:
            return self.steps.samples(which, row, self.step, number * len(rows) + place)
        except (ImportError, MemoryError):
            raise
        except Exception as error:  # plug-ins of PIL raise nearly anything
            self.reasons[which, row] = one_line(f"{type(error).__name__}: {error}")
            return None


def load_steps(
    steps: TrainSet, first: int, workers: int = 0, pack: Callable[[Step], Any] | None = None
) -> Iterator[tuple[int, Any]]:
    """The steps from `first` on, with their numbers; torch's random state is left alone.

    Args:
        workers: processes that make them ahead, two pieces each in shared memory; 0: this one does,
            when asked for. They leave signals to this process.
        pack: applied to each piece, by the workers; it gives a tuple of lists, whose lists are
            joined over the pieces.

    Raises:
        ValueError, ImportError: as `steps[i]`.
    """
    collate: Callable[[Any], Any] = pack or _unchanged
    loader = DataLoader(
        steps,
        batch_size=None,
        sampler=product(range(first, len(steps)), range(steps.pieces)),
        num_workers=workers,
        collate_fn=collate,
        worker_init_fn=_begin_worker,
        generator=torch.Generator(),
    )
    try:
        made = iter(loader)
        for number in range(first, len(steps)):
            pieces = list(islice(made, steps.pieces))
            fields = (list(chain(*parts)) for parts in zip(*pieces, strict=True))
            yield number, type(pieces[0])(*fields)
    except (ValueError, ImportError) as error:  # a worker's has its whole traceback as its text
        kind = type(error)
        raise kind(
            str(error).strip().splitlines()[-1].removeprefix(f"{kind.__name__}: ")
        ) from error


def shared_memory(steps: TrainSet, pack: Callable[[Step], Any], step: int, workers: int) -> int:
    """Bytes of this machine's shared memory that `load_steps` takes, about: by one piece of a step,
    which is made for it. Each worker is two pieces ahead, and the trainer holds a step.

    Raises:
        ValueError: more than there is.
    """
    if not workers or step >= len(steps):
        return 0
    torch.save(pack(steps[step, 0]), piece := BytesIO())
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    size = piece.tell() * (2 * workers + steps.pieces) * ranks
    folder = Path("/dev/shm")
    if folder.is_dir() and size > (free := shutil.disk_usage(folder).free):
        raise ValueError(
            f"workers is {workers}: what they hand over takes about {size / MIB:,.1f} MiB of "
            f"shared memory, {folder} has {free / MIB:,.1f}; give fewer workers, a lower "
            "max_pixels, or the machine more (docker run --shm-size)"
        )
    return size


def _unchanged(step: Any) -> Any:
    return step


def _begin_worker(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # else every tensor on its way is an open file, and those are limited
    torch.multiprocessing.set_sharing_strategy("file_system")
