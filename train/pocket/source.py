"""The pocket benchmark's training pairs, as data sets that `train.sampler` reads.

They are endless, so nothing is drawn from them: each task has its turn.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from btok.data.records import Pair
from btok.data.sources import Row, Schema, Source
from btok.model import BTokModel
from btok.processing import Processor
from btok_kernels.ranks import rank, world
from train.microbatches import PackedStep, Packing
from train.pocket.data import MODALITY, NTP_SIDE, TASKS, train_group
from train.recipes import Recipe
from train.sampler import Group, TrainSet, load_steps

_group = lru_cache(maxsize=4)(train_group)  # its pairs are asked for one by one


@dataclass(frozen=True)
class Rows:
    """The pairs of a task, made when asked for: row i is pair i % size of group i // size.

    Args:
        task: one of `TASKS`.
        size, seed: of `train_group`.
    """

    task: str
    size: int
    seed: int

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Row:
        group, place = divmod(index, self.size)
        return {"pair": _group(self.task, group, self.size, self.seed)[place]}


def _pair(row: Row, root: Path) -> Pair:
    return row["pair"]


def train_set(recipe: Recipe, processor: Processor, rank: int = 0, world: int = 1) -> TrainSet:
    """The steps of a run on the pocket benchmark; arguments as `TrainSet` has them."""
    schema, size, seed = Schema("pocket", ("pair",), _pair), recipe.group_size, recipe.seed
    sources = [
        Source(task, Rows(task, size, seed), schema, Path(), ntp_side=NTP_SIDE[task])
        for task in TASKS
    ]
    return TrainSet(recipe, processor, sources, rank, world, partial(step_groups, recipe))


def captions(
    recipe: Recipe, model: BTokModel, processor: Processor, first: int
) -> Iterator[tuple[int, PackedStep]]:
    """This rank's captioning steps from `first` on, as `load_steps` gives those of training."""
    steps = train_set(recipe.captions, processor, rank(), world())
    packing = Packing.of(model, processor, recipe.captions, captioning=True)
    yield from load_steps(steps, first, recipe.workers, packing)


def step_groups(recipe: Recipe, step: int) -> list[Group]:
    """The groups of a training step, those of all ranks, without spare rows.

    The recipe's tasks come in shuffled rounds, so each is seen equally often; the first
    `reading_steps` draw single digits only.
    """
    tasks = [task for task in TASKS if recipe.tasks in ("all", MODALITY[task])]
    groups = []
    step += recipe.caption_steps  # training goes on where captioning was
    for group in range(step * recipe.groups_per_batch, (step + 1) * recipe.groups_per_batch):
        turn, place = divmod(group, len(tasks))
        order = random.Random(f"{recipe.seed}/round/{turn}").sample(tasks, len(tasks))
        task = TASKS[0] if step < recipe.reading_steps else order[place]
        rows = np.arange(group * recipe.group_size, (group + 1) * recipe.group_size)
        groups.append(Group(TASKS.index(task), rows, rows))
    return groups
