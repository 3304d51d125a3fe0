"""Which groups make up each step: a pure function of (seed, step), so that nothing needs resuming.

It depends on neither the number of ranks nor the workers: rank r of W takes groups r, r + W, ...
"""

from __future__ import annotations

import random

from btok.data import pocket
from btok.data.records import Pair
from train.recipes import Recipe


def step_pairs(recipe: Recipe, step: int, rank: int = 0, world: int = 1) -> list[Pair]:
    """This rank's pairs of a step: whole groups of one task each, one behind the other.

    Tasks come in shuffled rounds of all nine, so each is seen equally often; the first
    `reading_steps` draw single digits only.
    """
    groups = range(step * recipe.groups_per_batch, (step + 1) * recipe.groups_per_batch)
    pairs: list[Pair] = []
    for group in groups[rank::world]:
        turn, place = divmod(group, len(pocket.TASKS))
        order = random.Random(f"{recipe.seed}/round/{turn}").sample(pocket.TASKS, len(pocket.TASKS))
        task = pocket.TASKS[0] if step < recipe.reading_steps else order[place]
        pairs += pocket.train_group(task, group, recipe.group_size, recipe.seed)
    return pairs
