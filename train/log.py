"""What a run tells of its steps: `log.jsonl`, a progress bar or plain lines, TensorBoard, what was
skipped.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from itertools import chain
from typing import Any

import torch
from tqdm import tqdm

from btok.files import printable
from btok_kernels.ranks import gather, rank, world
from train.checkpoint import unwritable
from train.parallel import total_over_ranks
from train.recipes import Recipe
from train.sampler import Skipped
from train.step import StepResult

# dense operations a second by the makers' data sheets, in half precision
PEAKS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "H800": 989e12, "B200": 2250e12}


def peak_flops(recipe: Recipe) -> float:
    """Operations a second that this rank's device can do in the recipe's precision; 0: unknown."""
    if not torch.cuda.is_available() or recipe.dtype == "float32":
        return 0.0
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAKS.items() if part in name), 0.0)


def summary_writer() -> Any:
    """TensorBoard's class of that name; an ImportError where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        hint = f"TensorBoard needs the extra: pip install 'btok[tensorboard]' ({error})"
        raise ImportError(hint) from error
    return SummaryWriter


LOSSES = ("contrastive", "ntp", "reconstruction")
FIRST_LINE, BETWEEN = 5.0, 30.0  # seconds until a line, and to the next at least
SHARE = 0.05  # to the next, of the seconds so far


class TrainLog:
    """`log.jsonl` and what a person sees, on rank 0; rows of steps to be done again are dropped.

    A terminal has a progress bar; where there is none, plain lines at growing intervals say how far
    the run is.

    Args:
        recipe: the run's; with its `tensorboard` the numbers go to `<output>/tensorboard` too.
        first: the step that the run begins or goes on with.
        unreadable: pairs that could not be read before it, by data set (from 0) and row.
        demonstrate: called on rank 0 with whether the phase is captioning; a line that goes with
            each of those, which are then on terminals, too.

    Raises:
        ImportError: TensorBoard is asked for and not installed.
    """

    def __init__(
        self,
        recipe: Recipe,
        first: int,
        unreadable: Iterable[Sequence[int]] = (),
        demonstrate: Callable[[bool], str] | None = None,
    ) -> None:
        self.path = recipe.output / "log.jsonl"
        self.unreadable, self.most = {(s, row) for s, row in unreadable}, recipe.max_skipped
        self.told = set[tuple[int, int]]()  # by this start of the run
        self.began, self.pairs, self.tokens, self.flops = time.perf_counter(), 0, 0, 0.0
        self.restores = recipe.reconstruction_weight > 0
        self.peak = peak_flops(recipe) * world()
        self.pairs_of_step = recipe.groups_per_batch * recipe.group_size
        self.first, self.total_steps = first, recipe.total_steps
        self.demonstrate, self.line_at = demonstrate, FIRST_LINE
        self.since_line: dict[str, list[float]] = {}  # each loss of the steps since then
        hidden = None if rank() == 0 else True  # None: where no terminal redraws a line
        steps: dict[str, Any] = {"total": recipe.total_steps, "initial": first, "unit": "step"}
        self.bar = tqdm(**steps, disable=hidden, mininterval=1.0)
        self.board = None
        if rank() != 0:
            return
        with open(self.path, "a+b") as file:
            file.seek(0)
            whole = (line for line in file if line.endswith(b"\n"))  # a kill may have cut the last
            file.truncate(sum(len(line) for line in whole if json.loads(line)["step"] < first))
        if recipe.tensorboard:
            self.board = summary_writer()(str(recipe.output / "tensorboard"), purge_step=first)

    def count_skipped(self, found: Sequence[Skipped]) -> None:
        """Count what the ranks could not read, and tell it on rank 0: each pair once, however often
        and by whichever rank it is drawn. Every rank then holds the pairs of all.

        Raises:
            ValueError: more pairs than the recipe's `max_skipped`.
        """
        new = [pair for pair in found if (pair.source, pair.row) not in self.told]
        if not total_over_ranks(len(new)):  # nearly always, and cheaper than to gather
            return
        for pair in chain.from_iterable(gather(new)):
            at = pair.source, pair.row
            if rank() == 0 and at not in self.told:
                told = printable(f"{pair.dataset}, row {pair.row}: {pair.reason}")
                tqdm.write(told, file=sys.stderr)
            self.told.add(at)
        self.unreadable |= self.told
        if (count := len(self.unreadable)) > self.most:
            raise ValueError(
                f"{count} pairs could not be read, over max_skipped {self.most}; mend them or give "
                "a higher --max-skipped, and the run goes on"
            )

    def write(
        self, step: int, captioning: bool, result: StepResult, rate: float, norm: float
    ) -> None:
        """Add a step's row: its losses, the learning rate and the gradient's norm."""
        if rank() != 0:
            return
        row: dict[str, Any] = {"step": step, "phase": "caption", "loss": float(result.losses.total)}
        if not captioning:
            row |= {"phase": "train", "contrastive": float(result.losses.contrastive)}
            if self.restores:
                row["reconstruction"] = float(result.losses.reconstruction)
        row |= {"ntp": float(result.losses.ntp), "learning_rate": rate, "gradient_norm": norm}
        if self.unreadable:
            row["skipped"] = len(self.unreadable)
        seconds = time.perf_counter() - self.began
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(row | {"seconds": round(seconds, 3)}) + "\n")
        except OSError as error:
            raise OSError(unwritable(self.path, error)) from error
        self.pairs += self.pairs_of_step
        self.tokens += result.tokens
        self.flops += result.flops
        rates = {"pairs/s": self.pairs / seconds, "tokens/s": self.tokens / seconds}
        losses = {key: row[key] for key in row if key in LOSSES}
        shown = {key: f"{loss:.3f}" for key, loss in losses.items()}
        shown |= {k: f"{x:.0f}" if x >= 10 else f"{x:.2g}" for k, x in rates.items() if x}
        if self.peak:
            rates["MFU"] = self.flops / seconds / self.peak
            shown["MFU"] = f"{rates['MFU']:.1%}"
        self.bar.set_description(row["phase"], refresh=False)
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        for key, loss in losses.items():
            self.since_line.setdefault(key, []).append(loss)
        if seconds >= self.line_at:
            self.line_at = seconds + max(BETWEEN, SHARE * seconds)
            means = {key: f"{sum(own) / len(own):.3f}" for key, own in self.since_line.items()}
            self._tell(row, shown | means, seconds)
            self.since_line.clear()
        if self.board:
            for key, value in (row | rates).items():
                if key not in ("step", "phase"):
                    self.board.add_scalar(key, value, row["step"])

    def _tell(self, row: Mapping[str, Any], shown: Mapping[str, str], seconds: float) -> None:
        """Print the progress of the run as a line; on a terminal with a bar only where the
        demonstration is shown beside it.
        """
        if not (self.demonstrate or self.bar.disable):
            return
        done = row["step"] + 1
        left = seconds / (done - self.first) * (self.total_steps - done)
        said = ", ".join(
            f"{value} {name}" if "/" in name else f"{name} {value}" for name, value in shown.items()
        )
        line = f"{timedelta(seconds=round(seconds))}  step {done} of {self.total_steps}: {said}"
        line += f"; about {timedelta(seconds=round(left))} left"
        if self.demonstrate:
            line += f"\n         {self.demonstrate(row['phase'] == 'caption')}"
        with tqdm.external_write_mode():
            print(line, flush=True)

    def __enter__(self) -> TrainLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.board:
            self.board.close()
