"""How a model embeds and is trained: the settings that a checkpoint keeps, said once.

`btok_config.json` beside a checkpoint's weights holds them, its format's version, the number of
bottleneck tokens and the `model_type` of the backbone that they belong to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from operator import index
from pathlib import Path
from typing import Any, Literal, get_args

from btok.files import checkpoint_in, must_be, must_be_checkpoint, read_json, write_json

CONFIG_NAME = "btok_config.json"
FORMAT_VERSION = 1
Pooling = Literal["btok", "last", "mean"]
TargetPositions = Literal["reference", "continue"]
VisionPositions = Literal["mrope", "text"]
NtpReduction = Literal["sample_mean", "token_mean"]
CHOICES: dict[str, tuple[Any, ...]] = {
    "pooling": get_args(Pooling),
    "target_positions": get_args(TargetPositions),
    "vision_positions": get_args(VisionPositions),
    "ntp_reduction": get_args(NtpReduction),
    "multi_vector": (False, True),
}


def check_choice(where: str, name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise a ValueError that names `name` unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{where}: {name} is {value!r}, expected one of {tuple(allowed)}")


def must_be_trained(argument: str, folder: Path) -> None:
    """Raise a ValueError unless `folder` is a checkpoint that btok saved."""
    must_be("folder", argument, folder)
    if not (folder / CONFIG_NAME).exists():
        must_be_checkpoint(argument, folder)
        raise ValueError(
            f"{argument} is {folder}, which has no {CONFIG_NAME}, so it was never trained here"
            f"{checkpoint_in(folder)}"
        )


def rising(numbers: Sequence[int]) -> bool:
    """Whether the numbers rise strictly, from above 0."""
    return all(a < b for a, b in pairwise((0, *numbers)))


@dataclass(frozen=True)
class BTokConfig:
    """The settings of a model that its checkpoint keeps.

    Args:
        btok_token_ids: the K bottleneck tokens' ids; empty for a baseline without them.
        pooling: "btok" (mean over the bottleneck rows), "last" (the last row of [x ; B]: VLM2Vec's
            where K = 0) or "mean" (over all rows of [x ; B]).
        target_positions: where a target's positions start, see `btok.packing.pack`.
        vision_positions: "mrope", or "text": every token, of images too, is one position after the
            one before it, as VLM2Vec-V2's public checkpoint was trained.
        ntp_reduction: "sample_mean" (mean over samples of each one's token mean) or "token_mean".
        budgets: numbers of bottleneck tokens, the first ones, that it was trained to embed with
            too, rising up to K; empty for K alone.
        dims: numbers of components, the first ones, that it was trained to embed in, rising; empty
            for all alone.
        multi_vector: its bottleneck rows were trained as vectors of their own (late interaction).

    Raises:
        ValueError: a setting that is none of its choices; K = 0 and pooling "btok"; token ids that
            are no whole numbers; budgets and dims other than above, or without bottleneck rows to
            pool.
    """

    btok_token_ids: Sequence[int]
    pooling: Pooling = "btok"
    target_positions: TargetPositions = "reference"
    vision_positions: VisionPositions = "mrope"
    ntp_reduction: NtpReduction = "sample_mean"
    budgets: Sequence[int] = ()
    dims: Sequence[int] = ()
    multi_vector: bool = False

    def __post_init__(self) -> None:
        for name in ("btok_token_ids", "budgets", "dims"):
            values = getattr(self, name)
            try:
                numbers = tuple(map(index, values))
            except TypeError:
                had = f"BTokModel: {name} is {values!r:.60}"
                raise ValueError(f"{had}, expected a list of whole numbers") from None
            object.__setattr__(self, name, numbers)
        for name, allowed in CHOICES.items():
            check_choice("BTokModel", name, getattr(self, name), allowed)
        if self.pooling == "btok" and not self.btok_token_ids:
            raise ValueError("BTokModel: with K = 0 use pooling='last' or 'mean', not 'btok'")
        for name in ("budgets", "dims"):
            if not rising(numbers := getattr(self, name)):
                raise ValueError(f"BTokModel: {name} is {numbers}, expected rising numbers above 0")
        number = len(self.btok_token_ids)
        if self.budgets and self.budgets[-1] != number:
            raise ValueError(
                f"BTokModel: budgets is {self.budgets}, expected numbers up to num_btoks, {number}"
            )
        if self.pooling != "btok" and (self.budgets or self.multi_vector):
            raise ValueError(
                f"BTokModel: pooling is {self.pooling!r}, expected 'btok' with budgets or "
                "multi_vector"
            )

    @property
    def trained_budgets(self) -> tuple[int, ...]:
        """The numbers of bottleneck tokens that it embeds with, rising up to K."""
        return tuple(self.budgets) or (len(self.btok_token_ids),)

    def trained_dims(self, width: int) -> tuple[int, ...]:
        """The numbers of components that it embeds in, rising up to D = `width`."""
        return (*self.dims, width)

    def check_width(self, width: int) -> None:
        """Raise a ValueError where `dims` are not below `width`, the size of the model's
        embeddings.
        """
        if self.dims and self.dims[-1] >= width:
            raise ValueError(
                f"BTokModel: dims is {self.dims}, expected numbers below the model's {width}"
            )

    def with_btoks(self, number: int) -> BTokConfig:
        """These settings with the first `number` bottleneck tokens alone, a number the model was
        trained for.
        """
        if number not in self.trained_budgets:
            trained = ", ".join(map(str, self.trained_budgets))
            raise ValueError(f"BTokModel: num_btoks is {number}, it was trained for {trained}")
        budgets = [budget for budget in self.budgets if budget <= number]
        return replace(self, btok_token_ids=self.btok_token_ids[:number], budgets=budgets)

    @classmethod
    def load(
        cls, name_or_path: str | Path, architecture: str, num_btoks: int | None, **asked: Any
    ) -> BTokConfig | None:
        """The settings that a checkpoint keeps; None for a checkpoint that btok never saved.

        Args:
            name_or_path: its folder or hub id.
            architecture: the `model_type` of its backbone.
            num_btoks: K that it must have, or one of its budgets; None for its own.
            asked: settings that it must have, None for its own; `ntp_reduction` may be another.

        Raises:
            TypeError: a setting that there is none of.
            ValueError: a value that is none of its choices; a checkpoint with other settings, of
                another format, or of another backbone.
        """
        names = [field.name for field in fields(cls) if field.name != "btok_token_ids"]
        for name, value in asked.items():
            if name not in names:
                expected = ", ".join(names)
                raise TypeError(f"BTokModel: {name} is no setting, expected {expected}")
            if value is not None and name in CHOICES:
                check_choice("BTokModel", name, value, CHOICES[name])
        saved = read_json(name_or_path, CONFIG_NAME)
        if not saved:
            return None
        hints = {
            "format_version": "use the btok that wrote it",
            "architecture": f"its {CONFIG_NAME} is of another checkpoint",
        }

        def must(name: str, value: Any, had: Any) -> None:
            if value is not None and value != had:
                raise ValueError(
                    f"BTokModel: {name} is {value!r}, but {name_or_path} was saved with {had!r}; "
                    + hints.get(name, "ask for that or leave it out")
                )

        must("format_version", FORMAT_VERSION, saved.get("format_version"))
        must("architecture", architecture, saved.get("architecture"))
        own = {name: saved[name] for name in names if name in saved}
        found = cls(saved.get("btok_token_ids"), **own)
        if found.budgets:
            hints["num_btoks"] = f"it was trained for {', '.join(map(str, found.budgets))}"
        if num_btoks not in found.trained_budgets:
            must("num_btoks", num_btoks, len(found.btok_token_ids))
        reduction = asked.pop("ntp_reduction", None) or found.ntp_reduction
        for name, value in asked.items():
            must(name, tuple(value) if isinstance(value, list) else value, getattr(found, name))
        if num_btoks is not None:
            found = found.with_btoks(num_btoks)
        return replace(found, ntp_reduction=reduction)

    def save(self, folder: str | Path, architecture: str) -> None:
        """Write `btok_config.json` for a backbone of a `model_type`."""
        settings = {
            "format_version": FORMAT_VERSION,
            "architecture": architecture,
            "num_btoks": len(self.btok_token_ids),
            **asdict(self),
        }
        write_json(Path(folder) / CONFIG_NAME, settings)
