"""BTokEncoder: texts, images, videos and pages become vectors.

inputs -> windows, each sorted by length -> packed batches (made in a thread, ahead) -> vectors
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import cached_property
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from btok.config import CONFIG_NAME
from btok.files import find
from btok.inputs import as_side, estimate_tokens, with_frames
from btok.model import BTokModel, model_digest
from btok.packing import PackedBatch
from btok.processing import Processor

if TYPE_CHECKING:
    from btok.tools.encode import Encoded

# ids of inputs, their tokens, those inputs packed, why others met on the way cannot be read
_Batch = tuple[list[Any], list[int], PackedBatch | None, dict[Any, str]]
AHEAD = 3  # batches prepared before the model asks for them


class Vectors(NamedTuple):
    """What became of some inputs.

    Args:
        ids: of those that have a vector; vectors: float32 [n, D], unit norm.
        errors: of those that cannot be read, by id, why.
        tokens: how many each vector was made of.
    """

    ids: list[Any]
    vectors: np.ndarray
    errors: dict[Any, str]
    tokens: list[int]


class BTokEncoder:
    """A model and the processor of the same checkpoint.

    What else is encoded, and in which order, moves no component of an fp32 model's vector by more
    than 1e-6; of a bf16 one's by more than 2e-2, the rounding that its vectors have anyway.

    Args:
        model, processor: as their `from_pretrained` gives them.
        checkpoint: the folder both came from; only `encode_to` and `digest` need it.
    """

    def __init__(
        self, model: BTokModel, processor: Processor, checkpoint: str | Path | None = None
    ) -> None:
        self.model, self.processor, self.checkpoint = model, processor, checkpoint

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **settings: Any) -> BTokEncoder:
        """Load model (settings as it takes them) and processor of a folder or a hub id.

        Raises:
            ValueError: a checkpoint never saved by us, unless `num_btoks` says how to embed with
                it: what it would get is untrained; what `BTokModel.from_pretrained` refuses.
        """
        found = find(name_or_path, "config.json")
        ours = find(name_or_path, CONFIG_NAME) is not None
        if found and not ours and settings.get("num_btoks") is None:
            raise ValueError(
                f"BTokEncoder: {name_or_path} has no {CONFIG_NAME}, so its bottleneck tokens would "
                "be untrained; train it first (train/main.py), or use num_btoks=0, pooling='last' "
                "for a model that embeds without them"
            )
        model = BTokModel.from_pretrained(name_or_path, **settings)
        processor = Processor.from_pretrained(name_or_path, len(model.btok_token_ids))
        return cls(model, processor, found.parent if found else None)

    def encode(
        self,
        inputs: Sequence[Any],
        instruction: str | None = None,
        batch_tokens: int = 16384,
        show_progress: bool = True,
    ) -> np.ndarray:
        """Embed inputs: row i of the result is input i.

        Args:
            inputs: what to embed, each as `as_side` takes it.
            instruction: put before the text of every input.
            batch_tokens: tokens per packed row; a longer input takes a row of its own.
            show_progress: a bar on stderr where that is a terminal; a log file gets none.

        Returns:
            float32 [N, D], unit norm.

        Raises:
            ValueError, TypeError: no inputs, or one that cannot be read (the message tells which).
        """
        inputs = list(inputs) if isinstance(inputs, Iterator) else _several(inputs)
        if not len(inputs):
            raise ValueError("BTokEncoder.encode: inputs is empty, expected at least one")
        rows = np.empty((0, 0), np.float32)
        for made in self.encode_iter(inputs, instruction, batch_tokens, show_progress):
            if not len(rows):
                rows = np.empty((len(inputs), made.vectors.shape[1]), np.float32)
            rows[made.ids] = made.vectors
        return rows

    def encode_iter(
        self,
        inputs: Iterable[Any],
        instruction: str | None = None,
        batch_tokens: int = 16384,
        show_progress: bool = True,
        *,
        ids: Iterable[Any] | None = None,
        window: int = 1024,
        strict: bool = True,
    ) -> Iterator[Vectors]:
        """Embed inputs, maybe endless, a batch at a time: `(ids, vectors, errors, tokens)`.

        Args:
            inputs: drawn in a background thread; the first four arguments are those of `encode`.
            ids: what the inputs are called, one per input, drawn before it; None: 0, 1, 2, ...
            window: how many inputs are held and sorted together; no batch spans two windows.
            strict: an input that cannot be read is a ValueError; else it is named in `errors`, and
                the rest goes on (a batch in which nothing can be read has no vectors).
        """
        _several(inputs)
        if batch_tokens < 1 or window < 1:
            had = f"batch_tokens is {batch_tokens} and window {window}"
            raise ValueError(f"BTokEncoder.encode_iter: {had}, expected at least 1")
        numbered = zip(count() if ids is None else ids, inputs, strict=ids is not None)
        batches = self._batches(numbered, instruction, batch_tokens, window, strict)
        total = len(inputs) if isinstance(inputs, Sequence) else None
        bar = tqdm(total=total, unit="input", disable=None if show_progress else True)
        with bar, closing(_ahead(batches)) as ahead:
            for names, tokens, packed, broken in ahead:
                vectors = self._vectors(names, packed)
                bar.update(len(names) + len(broken))
                yield Vectors(names, vectors, broken, tokens)

    def encode_samples(
        self, samples: Sequence[Mapping[str, Any]], batch_tokens: int = 16384
    ) -> tuple[np.ndarray, list[int]]:
        """Embed what `processor(with_frames(side))` made of inputs, perhaps elsewhere.

        Args:
            samples: one per input.
            batch_tokens: as `encode` takes it.

        Returns:
            float32 [N, D], unit norm; and how many tokens each was made of.
        """
        rows = np.empty((len(samples), self.dims), np.float32)
        tokens = [0] * len(samples)
        order = sorted(range(len(samples)), key=lambda i: -len(samples[i]["input_ids"]))
        for names, lengths, packed in self._packed(((i, samples[i]) for i in order), batch_tokens):
            if names:
                rows[names] = self._vectors(names, packed)
                for i, length in zip(names, lengths, strict=True):
                    tokens[i] = length
        return rows, tokens

    def _vectors(self, names: Sequence[Any], packed: PackedBatch | None) -> np.ndarray:
        """float32 [n, D] of a packed batch; a ValueError where one is not finite."""
        if packed is None:
            return np.empty((0, 0), np.float32)
        with torch.inference_mode(), _evaluating(self.model):
            output = self.model(packed.to(self.model.backbone.device))
        vectors = output.embeddings.float().cpu().numpy()
        if not (finite := np.isfinite(vectors).all(1)).all():
            where = names[finite.argmin()]
            raise ValueError(f"BTokEncoder: the vector of input {where} is not finite")
        return vectors

    @property
    def dims(self) -> int:
        """D, how many components a vector has."""
        return self.model.backbone.config.get_text_config().hidden_size

    @cached_property
    def digest(self) -> str:
        """sha256 of the checkpoint, by which an index knows its model; read once, 3 s for 4 GB."""
        if self.checkpoint is None:
            raise ValueError("BTokEncoder: checkpoint is None; use BTokEncoder.from_pretrained")
        return model_digest(self.checkpoint)

    @property
    def settings(self) -> dict[str, Any]:
        """What beside the weights decides about vectors, by which an index knows its own."""
        model, images = self.model, self.processor.image_processor
        return {
            "pooling": model.settings.pooling,
            "num_btoks": len(model.btok_token_ids),
            "dtype": str(model.backbone.dtype),
            "vision_positions": model.settings.vision_positions,
            **({name: getattr(images, name) for name in images.BOUNDS} if images else {}),
        }

    def encode_to(
        self,
        output: str | Path,
        inputs: Iterable[Any],
        items: Iterable[str | Mapping[str, Any]],
        *settings: Any,
        **named: Any,
    ) -> Encoded:
        """Make `output` the index of exactly these inputs and their ids; encode what it lacks.

        `btok.tools.encode.encode_to(encoder, ...)`, which says what else it takes and refuses.
        """
        from btok.tools.encode import encode_to  # users call it so; all it does is the tool's

        return encode_to(self, output, inputs, items, *settings, **named)

    def _batches(
        self,
        numbered: Iterable[tuple[Any, Any]],
        instruction: str | None,
        budget: int,
        window: int,
        strict: bool,
    ) -> Iterator[_Batch]:
        """Windows of (id, input), longest first, packed to the budget."""
        broken: dict[Any, str] = {}

        def read(i: Any, value: Any, how: Callable[[Any], Any]) -> Any:
            """What input i becomes; None for one that cannot be read."""
            try:
                return how(value)
            except Exception as error:  # a decoder of a broken file may raise anything
                if strict:
                    kinds = (TypeError, ImportError)
                    kind = next((k for k in kinds if isinstance(error, k)), ValueError)
                    raise kind(f"BTokEncoder: input {i}: {error}") from error
                broken[i] = str(error)

        numbered = iter(numbered)
        while held := dict(islice(numbered, window)):
            broken = {}
            sides = {
                i: read(i, value, lambda v: as_side(v, instruction)) for i, value in held.items()
            }
            lengths = {
                i: estimate_tokens(side, self.processor)
                for i, side in sides.items()
                if side is not None
            }
            prepared = (
                (i, read(i, sides.pop(i), lambda side: self.processor(with_frames(side))))
                for i in sorted(lengths, key=lambda i: -lengths[i])
            )
            for names, tokens, packed in self._packed(prepared, budget):
                yield names, tokens, packed, broken
                broken = {}

    def _packed(
        self, prepared: Iterable[tuple[Any, Mapping[str, Any] | None]], budget: int
    ) -> Iterator[tuple[list[Any], list[int], PackedBatch | None]]:
        """Samples in this order, packed to the budget: their names, tokens, and they themselves;
        the last may be none.
        """
        names: list[Any] = []
        tokens: list[int] = []
        samples: list[Mapping[str, Any]] = []
        total = 0
        for name, sample in prepared:
            if sample is None:
                continue
            length = len(sample["input_ids"]) + len(self.model.btok_token_ids)
            if samples and total + length > budget:
                yield names, tokens, self.model.pack(samples)
                names, tokens, samples, total = [], [], [], 0
            total += length
            names.append(name)
            tokens.append(length)
            samples.append(sample)
        yield names, tokens, self.model.pack(samples) if samples else None


def _several(inputs: Any) -> Any:
    """The inputs; a TypeError for what is one, or no list of them."""
    if isinstance(inputs, str | bytes | Path | Mapping):
        raise TypeError(f"BTokEncoder: inputs is one {type(inputs).__name__}, not a list")
    return inputs


def _ahead(batches: Iterator[_Batch]) -> Generator[_Batch, None, None]:
    """The same batches, made in a background thread before they are asked for."""
    with ThreadPoolExecutor(1, "btok-prepare") as thread:
        waiting = deque(thread.submit(next, batches, None) for _ in range(AHEAD))
        try:
            while (batch := waiting.popleft().result()) is not None:
                waiting.append(thread.submit(next, batches, None))
                yield batch
        finally:
            thread.shutdown(cancel_futures=True)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within; after it, whatever happened, each module's own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
