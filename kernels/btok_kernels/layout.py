"""Where each packed sequence's rows lie, and what they may see.

A sequence `[x ; B ; T]` occupies packed rows [start, end): source and bottleneck rows
[start, border), target rows [border, end). Four integers say the whole mask:

    a row i in [start, border) sees keys [start, i]
    a row i in [border, end)   sees keys [first, i]

`first` is where the bottleneck tokens begin (the condensation mask), or `start` (no condensation).
Every row sees one contiguous range of keys, so attention over a packed row of sequences is a
handful of plain causal segments, and no mask tensor is ever needed. The other way round,

    a key j in [start, first) is seen by rows [j, border)
    a key j in [first, end)   is seen by rows [j, end)

A fifth integer gives a target a budget of k bottleneck rows, those of [first, last):

    a row i in [border, end)   sees keys [first, last) and [border, i]
    a key j in [last, border)  is seen by rows [j, border)

Bottleneck rows do not see those behind them, so that such a sequence is to the bit of its mask one
with k bottleneck tokens, and has the rows of all larger budgets besides. Rows see two ranges then,
keys are still seen by one.

The Triton kernels walk `tiles`: pieces of the rows, and of the keys, that keep to one of these
lines each.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

TILE = 128  # rows, or keys, of one entry of `CondensedLayout.tiles`


class Segments(NamedTuple):
    """The mask cut into causal segments, those of about equal length stacked into groups.

    Args:
        rows: int64 [R], the packed row at each position, group after group. A shorter segment
            repeats its last row at the end, where none of its own rows sees it.
        shapes: (S, L) per group: S segments of length L.
        owner: int64 [T], the position that gives each packed row its output; R for the unused tail.
        in_place: one group of segments is all the packed rows, in their order.
    """

    rows: Tensor
    shapes: list[tuple[int, int]]
    owner: Tensor
    in_place: bool


class Half(NamedTuple):
    """One of the mask's two causal attentions; a row sees the keys up to its own, counted from the
    right.

    Args:
        rows, keys: int64, packed rows of all sequences, one sequence after the other.
        row_lens, key_lens: how many of these each sequence has that has rows.
        row_ends, key_ends: int32 [those sequences + 1], the same added up, from 0 on.
    """

    rows: Tensor
    keys: Tensor
    row_lens: list[int]
    key_lens: list[int]
    row_ends: Tensor
    key_ends: Tensor


class Halves(NamedTuple):
    """The mask cut in two: [x ; B] rows with their own keys, and target rows with [B ; T] keys.

    Args:
        calls: those of the two that have rows.
        owner: int64 [T], the position of each packed row in the rows of all calls; behind them for
            rows of no sequence.
    """

    calls: list[Half]
    owner: Tensor


@dataclass(frozen=True, eq=False)
class CondensedLayout:
    """The rows of N packed sequences and the condensation mask over them.

    Made on the host, once per batch, with `from_lengths` or from bounds of your own.

    Args:
        bounds: int32 [N, 4] on the CPU: (start, first, border, end) per sequence, in row order; or
            [N, 5], with `last` behind them, where targets see some of the bottleneck rows alone.
        num_rows: T, the packed rows; those of no sequence see nothing.
        device: where the index tensors live.
        max_sequences: what `tiles` has room for; None for these. Layouts of equal `num_rows` and
            `max_sequences`, all with budgets or all without, have `tiles` of one shape: a captured
            CUDA graph serves another layout after `captured.tiles.copy_(other.tiles)`.

    Attributes:
        tiles: int32 [2, C, 4], what the Triton kernels take their blocks from: row tiles (first
            row, last row, first key, last key), which never straddle a `border`, and key tiles
            (first key, last key, first row, last row), which never straddle a `first`. Each `last`
            is exclusive; the longest come first, zeros last. With budgets [2, C, 6]: all rows of a
            row tile see the keys from the fifth to before the sixth besides.

    Raises:
        TypeError: bounds that are not an integer tensor [N, 4] or [N, 5] on the CPU.
        ValueError: sequences that overlap, leave [0, num_rows) or break
            start <= first <= last <= border <= end; more of them than `max_sequences`.
    """

    bounds: Tensor  # on the CPU: to read a length from the device, the host would wait for it
    num_rows: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    max_sequences: int | None = None
    tiles: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        bounds = self.bounds
        if bounds.ndim != 2 or bounds.shape[1] not in (4, 5) or bounds.dtype != torch.int32:
            raise TypeError(
                f"CondensedLayout: bounds is {bounds.dtype} {list(bounds.shape)}, "
                "expected int32 [N, 4] or [N, 5]"
            )
        if bounds.device.type != "cpu":
            raise TypeError(f"CondensedLayout: bounds is on {bounds.device}, expected the CPU")
        row = 0
        for index, (start, first, last, border, end) in enumerate(self.sequences()):
            if not start <= first <= last <= border <= end:
                order = "start <= first <= border <= end"
                order += ", first <= last <= border" if bounds.shape[1] == 5 else ""
                raise ValueError(
                    f"CondensedLayout: bounds of sequence {index} are {bounds[index].tolist()}, "
                    f"expected {order}"
                )
            if start < row or end > self.num_rows:
                raise ValueError(
                    f"CondensedLayout: sequence {index} takes rows [{start}, {end}), expected them "
                    f"within [{row}, {self.num_rows})"
                )
            row = end
        if self.max_sequences is not None and len(self) > self.max_sequences:
            raise ValueError(
                f"CondensedLayout: max_sequences is {self.max_sequences}, bounds has {len(self)}"
            )
        tiles = on_device(self._build_tiles(), self.device)
        # that of the tensors: "cuda" is cuda:0 there, and is compared with theirs
        self.__dict__.update(tiles=tiles, device=tiles.device)

    @classmethod
    def from_lengths(
        cls,
        source_lens: Sequence[int] | Tensor,
        target_lens: Sequence[int] | Tensor,
        num_btoks: int,
        condense: bool = True,
        num_rows: int | None = None,
        max_sequences: int | None = None,
        budgets: Sequence[int] | Tensor | None = None,
    ) -> CondensedLayout:
        """Lay sequences of `source_lens[n]` + K + `target_lens[n]` rows one behind the other.

        Args:
            source_lens: tokens of x per sequence, bottleneck tokens not counted; may be 0.
            target_lens: tokens of T per sequence; 0 for a sequence that is only embedded.
            num_btoks: K. With K = 0 the last source token takes the bottleneck's place.
            condense: target rows see only the bottleneck rows and themselves; False lets them see
                the source too (the ablation).
            num_rows: packed rows in all; None for exactly as many as the sequences take.
            max_sequences: room in `tiles`; None for these sequences.
            budgets: per sequence, how many of its bottleneck rows, the first ones, its target sees;
                None for all of them.

        Raises:
            TypeError: lengths, budgets or a `num_btoks` that are no integers.
            ValueError: a negative length, lists of unequal length, more rows than `num_rows`,
                sequences than `max_sequences` or bottleneck rows of a budget than there are.
        """
        source = _integers("source_lens", source_lens)
        target = _integers("target_lens", target_lens)
        num_btoks = int(_integers("num_btoks", num_btoks))
        if source.ndim != 1 or source.shape != target.shape:
            raise ValueError(
                f"CondensedLayout: target_lens has shape {list(target.shape)}, source_lens "
                f"{list(source.shape)}, expected one length each per sequence"
            )
        if num_btoks < 0:
            raise ValueError(f"CondensedLayout: num_btoks is {num_btoks}, expected at least 0")
        for name, lens in (("source_lens", source), ("target_lens", target)):
            if len(lens) and int(lens.min()) < 0:
                raise ValueError(
                    f"CondensedLayout: {name} has {int(lens.min())}, expected at least 0"
                )
        end = (source + num_btoks + target).cumsum(0)
        border = end - target
        start = border - num_btoks - source
        first = torch.maximum(start, border - max(num_btoks, 1)) if condense else start
        rows = int(end[-1]) if len(end) else 0
        if num_rows is not None and rows > num_rows:
            raise ValueError(f"CondensedLayout: num_rows is {num_rows}, the sequences take {rows}")
        columns = [start, first, border, end]
        if budgets is not None:
            seen = _integers("budgets", budgets)
            if seen.shape != source.shape:
                raise ValueError(
                    f"CondensedLayout: budgets has shape {list(seen.shape)}, expected one number "
                    f"for each of the {len(source)} sequences"
                )
            wrong = seen[(seen < 0) | (seen > num_btoks)].tolist()
            if wrong:
                raise ValueError(
                    f"CondensedLayout: budgets has {wrong[0]}, expected from 0 to num_btoks, "
                    f"{num_btoks}"
                )
            # with K = 0 the last source token is what a target sees
            columns.append(border - num_btoks + seen)
        bounds = torch.stack(columns, dim=1).to(torch.int32)
        num_rows = rows if num_rows is None else num_rows
        return cls(bounds, num_rows, max_sequences=max_sequences)

    def to(self, device: torch.device | str) -> CondensedLayout:
        """This layout with its index tensors on `device`."""
        tiles = on_device(self.tiles, device)
        if tiles.device == self.device:
            return self
        moved = copy.copy(self)
        for name in ("row_first", "row_gap", "segments", "halves"):
            moved.__dict__.pop(name, None)
        moved.__dict__.update(device=tiles.device, tiles=tiles)
        return moved

    def __len__(self) -> int:
        """N, the number of sequences."""
        return len(self.bounds)

    @property
    def mean_length(self) -> float:
        """Rows of a sequence, on average, those between sequences included; 0 of none."""
        return int(self.bounds[-1, 3]) / len(self) if len(self) else 0.0

    def sequences(self) -> list[list[int]]:
        """(start, first, last, border, end) of each; `last` is `border` where bounds have none."""
        return np.stack(self._columns(), 1).tolist()

    def _columns(self) -> tuple[np.ndarray, ...]:
        """start, first, last, border and end, int64 [N] each."""
        start, first, border, end, *last = self.bounds.numpy().astype(np.int64).T
        return start, first, last[0] if last else border, border, end

    def _build_tiles(self) -> Tensor:
        start, first, last, border, end = self._columns()
        apart, none = last < border, np.zeros_like(start)
        # tiles of the rows of no sequence see nothing and are seen by nothing: they give zeros
        gaps = _cut(np.append(0, end), np.append(start, self.num_rows), np.append(0, end))
        gaps = np.pad(gaps[:, [0, 1, 0, 0]], ((0, 0), (0, 2)))
        besides = np.where(apart, first, 0), np.where(apart, last, 0)
        pieces = [_cut(start, border, start, none, none)]
        pieces.append(_cut(border, end, np.where(apart, border, first), *besides))
        rows = np.concatenate([np.concatenate(pieces)[:, [0, 1, 2, 1, 3, 4]], gaps])
        # a key that a target sees is seen to the end, one of [last, border) by its own side alone
        split, stop = np.where(apart, [last, border], end)
        pieces = [_cut(start, first, border), _cut(first, split, end)]
        pieces += [_cut(split, stop, border), _cut(stop, end, end)]
        keys = np.pad(np.concatenate(pieces)[:, [0, 1, 0, 2]], ((0, 0), (0, 2)))
        keys = np.concatenate([keys, gaps])
        # without budgets two pieces of each sequence at most, and the gaps about them
        most, columns = (2, 4) if self.bounds.shape[1] == 4 else (4, 6)
        capacity = max(len(rows), len(keys))
        if self.max_sequences is not None:
            capacity = self.num_rows // TILE + (most + 1) * self.max_sequences + 1
        tiles = np.zeros((2, capacity, columns), np.int32)
        for out, tiled in zip(tiles, (rows, keys), strict=True):
            longest = np.argsort(tiled[:, 2] - tiled[:, 3], kind="stable")
            out[: len(tiled)] = tiled[longest, :columns]
        return torch.from_numpy(tiles)

    @cached_property
    def row_first(self) -> Tensor:
        """int64 [T]: the first key each row sees; T for the unused tail, which sees nothing."""
        row_first = torch.full((self.num_rows,), self.num_rows, dtype=torch.int64)
        for start, first, last, border, end in self.sequences():
            row_first[start:border] = start
            row_first[border:end] = first if first < last else border
        return on_device(row_first, self.device)

    @cached_property
    def row_gap(self) -> Tensor:
        """int64 [2, T]: from which key to before which one each row sees none of those between its
        first and itself; two equal ones for a row that sees all."""
        row_gap = torch.zeros(2, self.num_rows, dtype=torch.int64)
        for _, _, last, border, end in self.sequences():
            row_gap[:, border:end] = torch.tensor([[last], [border]])
        return on_device(row_gap, self.device)

    @cached_property
    def segments(self) -> Segments:
        """[start, border) of every sequence, and [first, last) with [border, end) of those with
        targets, the former for their keys alone. Groups make N sequences a few calls."""
        groups: dict[int, list[tuple[int, int, int, int]]] = {}
        for start, first, last, border, end in self.sequences():
            if border == end or (first == start and last == border):  # plain causal, one piece
                segments = [(start, start, start, end)]
            else:
                segments = [(start, start, start, border), (first, last, border, end)]
            for begin, split, kept, stop in segments:
                if stop > kept:
                    length = split - begin + stop - kept
                    groups.setdefault(_padded(length), []).append((begin, split, kept, stop))
        shapes = [(len(segments), length) for length, segments in groups.items()]
        rows = [np.empty(0, np.int64)]
        owner = np.full(self.num_rows, sum(count * length for count, length in shapes))
        at = 0
        for length, segments in groups.items():
            for begin, split, kept, stop in segments:
                own = np.arange(kept, kept + length - (split - begin)).clip(max=stop - 1)
                rows += [np.arange(begin, split), own]
                owner[kept:stop] = at + split - begin + np.arange(stop - kept)
                at += length
        index = np.concatenate(rows)
        in_place = len(shapes) == 1 and np.array_equal(index, np.arange(self.num_rows))
        there = [on_device(torch.from_numpy(x), self.device) for x in (index, owner)]
        return Segments(there[0], shapes, there[1], in_place)

    @cached_property
    def halves(self) -> Halves:
        """The mask as two attentions over sequences of any length ("varlen", "xformers")."""
        start, first, last, border, end = self._columns()
        calls, rows = [], [np.empty(0, np.int64)]
        for begin, split, row, stop in ((start, start, start, border), (first, last, border, end)):
            kept = stop > row
            if kept.any():
                begin, split, row, stop = (x[kept] for x in (begin, split, row, stop))
                rows.append(np.concatenate(list(map(np.arange, row, stop))))
                ranges = zip(map(np.arange, begin, split), map(np.arange, row, stop), strict=True)
                keys = np.concatenate([part for pair in ranges for part in pair])
                row_lens, key_lens = stop - row, split - begin + stop - row
                ends = (np.append(0, np.cumsum(x)).astype(np.int32) for x in (row_lens, key_lens))
                each = (
                    on_device(torch.from_numpy(x), self.device) for x in (rows[-1], keys, *ends)
                )
                of_rows, of_keys, row_ends, key_ends = each
                lens = row_lens.tolist(), key_lens.tolist()
                calls.append(Half(of_rows, of_keys, *lens, row_ends, key_ends))
        taken = np.concatenate(rows)
        owner = np.full(self.num_rows, len(taken))
        owner[taken] = np.arange(len(taken))
        return Halves(calls, on_device(torch.from_numpy(owner), self.device))


def on_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """`tensor.to(device)`, for which the host does not wait where that is a GPU."""
    if tensor.device.type == "cpu" and torch.device(device).type == "cuda":
        # from pageable memory the call would return when the copy is over
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def _integers(name: str, given: int | Sequence[int] | Tensor) -> Tensor:
    """The given integers as int64 on the CPU; a fraction would be cut off in silence."""
    try:
        found = torch.as_tensor(given, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"CondensedLayout: {name} is {given!r:.60}, expected integers") from error
    whole = found.real.to(torch.int64)
    if not bool((whole == found).all()):
        raise TypeError(f"CondensedLayout: {name} is {given!r:.60}, expected integers")
    return whole


def _cut(begin: np.ndarray, end: np.ndarray, *others: np.ndarray) -> np.ndarray:
    """[tiles, 2 + others]: first and last of each piece of at most TILE of [begin, end), and what
    it has of the others."""
    count = -(-(end - begin) // TILE)
    nth = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    first = np.repeat(begin, count) + TILE * nth
    last = np.minimum(first + TILE, np.repeat(end, count))
    return np.stack([first, last, *(np.repeat(other, count) for other in others)], 1)


def _padded(length: int) -> int:
    """The length rounded up so that few distinct lengths remain: to a multiple of 8, or at most 1/8
    longer; from 512 on as it is, which is worth a call. By its own length alone: the sums do not
    depend on what else is packed.
    """
    if length >= 512:
        return length
    step = max(8, 1 << max(length.bit_length() - 4, 0))
    return -(-length // step) * step
