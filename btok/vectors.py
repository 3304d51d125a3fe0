"""What vectors an encoder gives: of how many bottleneck tokens, in how many components, as what.

A model that was trained for it (`budgets`, `dims`, `multi_vector` of `btok.config.BTokConfig`)
embeds with its first k bottleneck tokens alone, and exactly so, as no row sees a later one; in the
first d components of its embedding; and in its bottleneck rows as vectors of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from numbers import Integral, Real
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from btok.calibration import Calibration
from btok.config import BTokConfig, check_choice
from btok.model import BTokOutput

DType = Literal["float32", "int8"]
NAME = "BTokEncoder"
OPTIONS = ("dims", "multi_vector", "vectors", "bound", "calibration")  # described if not as usual


@dataclass(frozen=True)
class VectorOptions:
    """The options for making vectors from a model's output.

    Args:
        num_btoks: k, one of the numbers of bottleneck tokens that the model was trained for, the
            first ones; "auto" for the fewest that a calibration allows each input; None for all K.
        dims: d, one of the numbers of components it was trained for: `normalize(x[:, :d])`; None
            for all D.
        multi_vector: True for the k bottleneck rows as vectors [k, d] at length 1, which
            `btok.kernels.maxsim` compares; "both" for the embedding and they below it, [1 + k, d].
        dtype: "float32", or "int8": `clip(round(x / scale), -127, 127)` with the calibrated scale,
            so that a cosine is an integer product (of int32s) times scale ** 2.
        bound: with "auto", what a calibration's quantile of 1 - cos(z_k, z_K) may be at most.
    """

    num_btoks: int | Literal["auto"] | None = None
    dims: int | None = None
    multi_vector: bool | Literal["both"] = False
    dtype: DType = "float32"
    bound: float = 0.02

    def checked(self, config: BTokConfig, width: int) -> VectorOptions:
        """These options, checked for a model; None in place of the model's own value.

        Args:
            config: the model's settings.
            width: D.

        Raises:
            ValueError: what the model was not trained for; another choice.
        """
        found: dict[str, Any] = {}
        for name, allowed in (
            ("num_btoks", config.trained_budgets),
            ("dims", config.trained_dims(width)),
        ):
            value = found[name] = getattr(self, name)
            auto = isinstance(value, str) and value == "auto" and name == "num_btoks"
            if value is None or (auto and len(allowed) > 1):
                continue
            if isinstance(value, bool) or not isinstance(value, Integral) or value not in allowed:
                trained = ", ".join(map(str, allowed))
                raise ValueError(
                    f"{NAME}: {name} is {value!r:.60}, expected what it was trained for: {trained}"
                )
            found[name] = None if value == allowed[-1] else int(value)  # numpy's, too
        kinds = isinstance(self.multi_vector, bool | str)
        if not kinds or self.multi_vector not in (False, True, "both"):
            raise ValueError(
                f"{NAME}: multi_vector is {self.multi_vector!r:.60}, expected True, False or 'both'"
            )
        if self.multi_vector and not config.multi_vector:
            raise ValueError(
                f"{NAME}: multi_vector is {self.multi_vector!r}, expected False: it was trained "
                "for one vector per input"
            )
        check_choice(NAME, "dtype", self.dtype, get_args(DType))
        if self.dtype == "int8" and self.multi_vector == "both":
            raise ValueError(
                f"{NAME}: dtype is 'int8' with multi_vector 'both', whose scales are two; expected "
                "'float32'"
            )
        number_like = isinstance(self.bound, Real) and not isinstance(self.bound, bool)
        if not number_like or not 0 < self.bound <= 2:
            had = f"{NAME}: bound is {self.bound!r:.60}"
            raise ValueError(f"{had}, expected a number above 0 and at most 2")
        return replace(self, **found)

    @property
    def calibrated(self) -> str | None:
        """The option that needs a calibration, as text; None where none does."""
        if self.num_btoks == "auto":
            return "num_btoks='auto'"
        return "dtype='int8'" if self.dtype == "int8" else None

    def described(self, calibration: Calibration | None) -> dict[str, Any]:
        """The options that decide about vectors and are not the defaults, by name."""
        said = {
            "num_btoks": self.num_btoks,
            "dims": self.dims,
            "multi_vector": bool(self.multi_vector) or None,
            "vectors": None if self.dtype == "float32" else self.dtype,
            "bound": self.bound if self.num_btoks == "auto" else None,
            "calibration": None if calibration is None else calibration.digest,
        }
        return {name: value for name, value in said.items() if value is not None}

    def of(self, output: BTokOutput) -> Tensor:
        """The vectors of a model's output, float32: [N, d], [N, k, d] of the bottleneck rows, or
        [N, 1 + k, d] of both.
        """
        vectors = output.embeddings.float()
        if self.dims is not None:
            vectors = F.normalize(vectors[:, : self.dims], dim=-1)
        if not self.multi_vector:
            return vectors
        assert output.rows is not None  # of a model that was trained for it
        rows = F.normalize(output.rows.float()[..., : self.dims], dim=-1)
        return torch.cat([vectors[:, None], rows], 1) if self.multi_vector == "both" else rows

    def shape(self, config: BTokConfig, width: int) -> tuple[int, ...]:
        """The shape of one input's vector or vectors; a ValueError where each has its own number of
        them.
        """
        dims = self.dims or width
        if not self.multi_vector:
            return (dims,)
        if self.num_btoks == "auto":
            raise ValueError(
                f"{NAME}: num_btoks is 'auto' with multi_vector, which gives each input another "
                "number of vectors; expected a number, or BTokEncoder.encode_iter, whose batches "
                "have one each"
            )
        number = self.num_btoks or len(config.btok_token_ids)
        return (number + (self.multi_vector == "both"), dims)


def options_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """All options of which an encoder's settings tell, as `BTokEncoder.using` takes them: in
    float32, and of multi-vectors both.
    """
    names = ("num_btoks", "dims", "bound")
    options = {name: settings[name] for name in names if settings.get(name) is not None}
    if settings.get("multi_vector"):
        options["multi_vector"] = "both"
    return asdict(VectorOptions(**options))
