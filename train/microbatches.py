"""A step's samples as packed passes, made in the processes that read them.

Samples are grouped to at most so many tokens, the largest first, and packed twice where GradCache
needs them twice: as `[x ; B ; T]`, and as `[x ; B]` to be embedded first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from btok.data.records import Pair, Side
from btok.model import BTokModel
from btok.packing import PackedBatch, Sample, group_by_tokens, pack
from btok.processing import Processor
from train.recipes import Recipe
from train.sampler import Skipped, Step


class Microbatch(NamedTuple):
    """Samples of one packed pass.

    Args:
        places: of its samples among those of the step; a sample behind them has none.
        batch: the samples with what they must generate.
        sources: the samples alone; None where nothing embeds them first.
    """

    places: list[int]
    batch: PackedBatch
    sources: PackedBatch | None


class PackedStep(NamedTuple):
    """A rank's part of a step, or a piece of that, as `train.sampler.Step` has it, but packed."""

    pairs: list[Pair]
    rows: list[int]
    microbatches: list[Microbatch]
    skipped: list[Skipped]


@dataclass(frozen=True)
class Packing:
    """The packing of a run's samples; `packing(step)` does it, where the samples were read.

    Args:
        options: keyword arguments of `btok.packing.pack`.
        tokens: of a packed pass, at most; None for one pass.
        twice: whether the samples are embedded before they are trained on.
        captioning: samples without a target are left out.
        filler: one sample of no consequence, for `empty`; with `everywhere` also put into each pass
            that shows nothing, so that a vision tower whose weights lie on all ranks runs on all.
    """

    options: Mapping[str, Any]
    tokens: int | None
    twice: bool = False
    captioning: bool = False
    filler: Sequence[Sample] = ()
    everywhere: bool = False

    @classmethod
    def of(
        cls, model: BTokModel, processor: Processor, recipe: Recipe, captioning: bool = False
    ) -> Packing:
        """The packing of a run; while `captioning`, of causal rows without bottleneck tokens."""
        options = {
            "btok_token_ids": () if captioning else model.btok_token_ids,
            "prefix_ids": processor.prefix_ids,
            "suffix_ids": processor.suffix_ids,
            "backbone_config": model.backbone.config,
            "target_positions": model.settings.target_positions,
            "mask_token_id": processor.mask_token_id if recipe.reconstruction_weight else None,
            "condense": recipe.condense and not captioning,
        }
        filler, everywhere = list[Sample](), False
        if recipe.shard:
            sees = model.family.vision is not None
            blank = np.full((28, 28, 3), 255, np.uint8)
            filler = [(processor(Side("", [blank]) if sees else Side(".")), None)]
            everywhere = model.family.vision_trains(model.backbone)
        twice = recipe.gradcache and not captioning
        return cls(options, recipe.chunk_tokens, twice, captioning, filler, everywhere)

    def __call__(self, step: Step) -> PackedStep:
        """Group and pack the samples of a step."""
        microbatches = self.microbatches(step.samples, step.places, step.budgets)
        return PackedStep(step.pairs, step.rows, microbatches, step.skipped)

    def microbatches(
        self,
        samples: Sequence[Sample],
        places: Sequence[int] | None = None,
        budgets: Sequence[int] = (),
    ) -> list[Microbatch]:
        """Samples grouped and packed; their places in the step, None for one after the other; how
        many bottleneck tokens their targets see, none said: all."""
        places = range(len(samples)) if places is None else places
        budgets = budgets or [len(self.options["btok_token_ids"])] * len(samples)
        placed = list(zip(places, samples, budgets, strict=True))
        if self.captioning:
            placed = [each for each in placed if each[1][1] is not None]
        turns = [list(range(len(placed)))] if placed else []
        if self.tokens is not None:
            placed.sort(key=lambda each: -self._length(each[1]))
            turns = group_by_tokens([self._length(sample) for _, sample, _ in placed], self.tokens)
        some = [[placed[at] for at in turn] for turn in turns]
        return [self._pack(*map(list, zip(*turn, strict=True))) for turn in some]

    def empty(self) -> Microbatch:
        """The microbatch of a rank that has fewer than another; no loss depends on it."""
        return self._pack([], [], [])

    def _pack(self, places: list[int], samples: list[Sample], budgets: Sequence[int]) -> Microbatch:
        samples = samples or list(self.filler)
        number = len(self.options["btok_token_ids"])
        budgets = [*budgets, *[number] * (len(samples) - len(budgets))]
        # a layout without budgets is a simpler one, for the kernels as well
        nested = None if set(budgets) <= {number} else budgets
        batch, sources = pack(samples, **self.options, budgets=nested), None
        if self.twice:
            sources = pack([(source, None) for source, _ in samples], **self.options)
        if self.everywhere and not (batch if sources is None else sources).vision:
            return self._pack(places, [*samples, *self.filler], budgets)
        return Microbatch(places, batch, sources)

    def _length(self, sample: Sample) -> int:
        own = sum(np.asarray(side["input_ids"]).size for side in sample if side is not None)
        around = ("prefix_ids", "suffix_ids") if sample[1] is not None else ()
        return own + sum(len(self.options[name]) for name in ("btok_token_ids", *around))
