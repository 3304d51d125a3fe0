"""What fewer bottleneck tokens cost in similarity, and the scales of int8 vectors, of a checkpoint.

    inputs -> one pass with all K rows -> per kind and size of input, and per budget k, a high
    quantile of 1 - cos(z_k, z_K); per number of components the scale of int8

`btok_calibration.json` in the checkpoint's folder holds them, and of which weights they are.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray

from btok.config import BTokConfig
from btok.files import read_json, write_json
from btok.model import BTokOutput
from btok.vision import vision_of

FILE = "btok_calibration.json"
FORMAT_VERSION = 1
LEAST = 32  # inputs of a cell, from which it says something
MOST = 1 << 14  # losses of a cell that are held; of more, a fair sample
BINS = 1 << 14  # of a component's size, from 0 to 1
COMMAND = "python -m btok calibrate CHECKPOINT INPUTS"


def cell_of(sample: Mapping[str, Any]) -> str:
    """The kind and size of an input, as a processor returns it: "text/6", "image/8", "video/9".

    The kind is "video" where more than one picture is shown, as frames or tiles; the size is the
    power of 2 below the number of its tokens.
    """
    shown = vision_of(sample)
    many = any(vision.kind == "video" for vision in shown) or sum(len(v.grid) for v in shown) > 1
    kind = "video" if many else "image" if shown else "text"
    return f"{kind}/{len(sample['input_ids']).bit_length() - 1}"


@dataclass(frozen=True)
class Calibration:
    """A checkpoint's calibration: what fewer bottleneck tokens cost it, and its int8 scales,
    measured once.

    Args:
        model: the checkpoint's digest; empty for a model in memory.
        num_btoks, budgets, dims: K, the numbers of bottleneck tokens (K the last) and those of
            components (D the last) that it was trained for.
        quantile: of the losses.
        inputs: how many were measured.
        counts: of the inputs of each cell, as `cell_of` names them.
        losses: per cell and number of components, of each budget the quantile of 1 - cos(z_k, z_K).
        scales: "vector" and, of the bottleneck rows, "multi_vector": per number of components the
            scale of int8.
    """

    model: str
    num_btoks: int
    budgets: Sequence[int]
    dims: Sequence[int]
    quantile: float
    inputs: int
    counts: Mapping[str, int]
    losses: Mapping[str, Mapping[str, Sequence[float]]]
    scales: Mapping[str, Mapping[str, float]]

    @property
    def digest(self) -> str:
        """The digest of this calibration, by which an index tells vectors that depend on it from
        those of another.
        """
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def budget(self, cell: str, bound: float, dims: int) -> int:
        """The fewest bottleneck tokens whose loss for such inputs is at most the bound.

        Args:
            cell: of the input, as `cell_of` names it; K where fewer than 32 such were measured.
            bound: of the quantile of 1 - cos(z_k, z_K).
            dims: the number of components that are compared.
        """
        if self.counts.get(cell, 0) < LEAST:
            return self.num_btoks
        pairs = zip(self.budgets, self.losses[cell][str(dims)], strict=True)
        return next((k for k, loss in pairs if loss <= bound), self.num_btoks)

    def scale(self, dims: int, multi_vector: bool) -> float:
        """The scale of int8 vectors of `dims` components; with `multi_vector`, that of the
        bottleneck rows.
        """
        return self.scales["multi_vector" if multi_vector else "vector"][str(dims)]

    def check(self, model: str, config: BTokConfig, width: int) -> None:
        """Raise a ValueError where this calibration is of another checkpoint.

        Args:
            model: the checkpoint's digest, empty for one in memory.
            config: its settings, as it was loaded.
            width: D.
        """
        for name, had, expected in (
            ("model", self.model, model),
            ("num_btoks", self.num_btoks, len(config.btok_token_ids)),
            ("budgets", list(self.budgets), list(config.trained_budgets)),
            ("dims", list(self.dims), list(config.trained_dims(width))),
        ):
            if had != expected:
                raise ValueError(
                    f"{FILE} is of {name} {had!r}, the checkpoint has {expected!r}; "
                    f"calibrate again: {COMMAND}"
                )

    def save(self, folder: str | Path) -> Path:
        """Write `btok_calibration.json` into a checkpoint's folder; where it is."""
        path = Path(folder) / FILE
        write_json(path, {"format_version": FORMAT_VERSION, **asdict(self)})
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Calibration | None:
        """The calibration in a checkpoint's folder; None where there is none, a ValueError where it
        is damaged.
        """
        found = read_json(folder, FILE)
        if found == {}:
            return None
        try:
            version = found.pop("format_version")
            made = cls(**found)
            tables = [made.losses[cell] for cell, count in made.counts.items() if count]
            scales = [made.scales["vector"], *made.scales.values()]
            losses = [losses for table in tables for losses in table.values()]  # of each budget
            numbers = [x for of_budgets in losses for x in of_budgets]
            numbers += [x for table in scales for x in table.values()]
            dims = {str(d) for d in made.dims}
            whole = (
                version == FORMAT_VERSION
                and all({*table} == dims for table in (*tables, *scales))
                and all(len(of_budgets) == len(made.budgets) for of_budgets in losses)
                and all(isinstance(x, int | float) for x in numbers)
            )
        except (AttributeError, TypeError, KeyError):
            whole = False
        if not whole:
            raise ValueError(f"{FILE} of {folder} is damaged; calibrate again: {COMMAND}")
        return made


def quantised(vectors: NDArray[np.float32], scale: float) -> NDArray[np.int8]:
    """`clip(round(x / scale), -127, 127)`, of the same shape."""
    return np.clip(np.rint(vectors / np.float32(scale)), -127, 127).astype(np.int8)


class Measuring:
    """A calibration as it is measured, in memory that does not grow with the inputs.

    Args:
        config: the model's settings.
        width: D.
        quantile: of the losses, above 0 and at most 1.
    """

    def __init__(self, config: BTokConfig, width: int, quantile: float) -> None:
        self.budgets, self.dims = config.trained_budgets, config.trained_dims(width)
        self.quantile, self.inputs = quantile, 0
        self.counts: dict[str, int] = {}
        self.losses: dict[str, list[NDArray[np.float32]]] = {}  # [dims, budgets] each
        kinds = ("vector", "multi_vector") if config.multi_vector else ("vector",)
        self.sizes = {kind: {d: np.zeros(BINS, np.int64) for d in self.dims} for kind in kinds}
        self.random = random.Random(0)

    def add(self, cells: Sequence[str], output: BTokOutput) -> None:
        """Measure a batch that was run with all K rows.

        Args:
            cells: of its inputs.
            output: what the model gave.
        """
        losses = np.zeros((len(cells), len(self.dims), len(self.budgets)), np.float32)
        for i, d in enumerate(self.dims):
            whole = F.normalize(output.embeddings.float()[:, :d], dim=-1)
            self._count("vector", d, whole)
            for j, k in enumerate(self.budgets[:-1]):
                assert output.rows is not None  # with several budgets these are pooled
                part = F.normalize(output.rows.float()[:, :k, :d].mean(1), dim=-1)
                self._count("vector", d, part)
                losses[:, i, j] = (1 - (part * whole).sum(1)).clamp(min=0).cpu().numpy()
            if "multi_vector" in self.sizes and output.rows is not None:
                rows = F.normalize(output.rows.float()[..., :d], dim=-1)
                self._count("multi_vector", d, rows)
        for cell, loss in zip(cells, losses, strict=True):
            self._keep(cell, loss)
        self.inputs += len(cells)

    def _keep(self, cell: str, loss: NDArray[np.float32]) -> None:
        """Keep a cell's loss: `MOST` of each are held, drawn at random (Vitter's algorithm R)."""
        held = self.losses.setdefault(cell, [])
        count = self.counts[cell] = self.counts.get(cell, 0) + 1
        if count <= MOST:
            held.append(loss)
        elif (place := self.random.randrange(count)) < MOST:
            held[place] = loss

    def _count(self, kind: str, dims: int, vectors: Any) -> None:
        """Add the vectors' components to the histogram of their absolute values."""
        sizes = (vectors.abs() * BINS).long().clamp(max=BINS - 1).flatten().cpu().numpy()
        self.sizes[kind][dims] += np.bincount(sizes, minlength=BINS)

    def calibration(self, model: str) -> Calibration:
        """The calibration that was measured, for the checkpoint whose digest is `model`."""
        losses = {}
        for cell, held in sorted(self.losses.items()):
            found = np.quantile(held, self.quantile, axis=0, method="higher")  # [dims, budgets]
            losses[cell] = {str(d): x.tolist() for d, x in zip(self.dims, found, strict=True)}
        scales = {
            kind: {str(d): best_scale(counts) for d, counts in by_dims.items()}
            for kind, by_dims in self.sizes.items()
        }
        return Calibration(
            model=model,
            num_btoks=self.budgets[-1],
            budgets=list(self.budgets),
            dims=list(self.dims),
            quantile=self.quantile,
            inputs=self.inputs,
            counts=dict(sorted(self.counts.items())),
            losses=losses,
            scales=scales,
        )


def best_scale(counts: NDArray[np.int64]) -> float:
    """The scale of int8 whose mean squared error is least, of how many components are how large.

    Those up to t = 127 scale err by scale ** 2 / 12, as roundings do; a larger one of size x is
    clipped, and errs by (x - t) ** 2. Every t at the end of a bin is tried.

    Args:
        counts: int [bins], of components whose size is in each of as many equal parts of [0, 1].
    """
    sizes = (np.arange(len(counts)) + 0.5) / len(counts)
    ends = (np.arange(len(counts)) + 1) / len(counts)
    moments = [(counts * sizes**power) for power in (0, 1, 2)]
    above = [moment.sum() - np.cumsum(moment) for moment in moments]  # beyond each end
    clipped = above[2] - 2 * ends * above[1] + ends**2 * above[0]
    rounded = np.cumsum(moments[0]) * (ends / 127) ** 2 / 12
    return float(ends[np.argmin(clipped + rounded)]) / 127
