"""BTokEncoder: texts, images, videos and pages become vectors.

inputs -> windows, each sorted by length -> packed batches (made in a thread, ahead) -> vectors
"""

from __future__ import annotations

import copy
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import fields, replace
from functools import cached_property
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from btok.calibration import COMMAND, Calibration, Measuring, cell_of, quantised
from btok.config import CONFIG_NAME
from btok.files import checkpoint_in, find, must_be_checkpoint, read_json
from btok.inputs import as_side, estimate_tokens, with_frames
from btok.model import BTokModel, BTokOutput, model_digest
from btok.packing import PackedBatch
from btok.processing import Processor
from btok.vectors import VectorOptions

if TYPE_CHECKING:
    from btok.tools.encode import Encoded

AHEAD = 3  # batches prepared before the model asks for them


class Vectors(NamedTuple):
    """The vectors of some inputs, and why others have none.

    Args:
        ids: of those that have a vector; vectors: float32 [n, D], unit norm.
        errors: of those that cannot be read, by id, why.
        tokens: how many each vector was made of.
    """

    ids: list[Any]
    vectors: np.ndarray
    errors: dict[Any, str]
    tokens: list[int]


class _Batch(NamedTuple):
    """Inputs that are packed together, with one number of bottleneck tokens; or none that could be.

    Args:
        names: what they are called; tokens: how many each has; cells: as `cell_of` names them.
        errors: by name why others, met on the way, cannot be read.
    """

    names: list[Any]
    tokens: list[int]
    cells: list[str]
    packed: PackedBatch | None
    errors: dict[Any, str]


class BTokEncoder:
    """A model and the processor of the same checkpoint.

    Its `options`, a `btok.vectors.VectorOptions`, say what vectors it gives: by default one per
    input, of all bottleneck tokens and all components. `using` gives an encoder of others.

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
        self.options = VectorOptions()

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **settings: Any) -> BTokEncoder:
        """Load model (settings as it takes them) and processor of a folder or a hub id.

        Raises:
            ValueError: a checkpoint never saved by us, unless `num_btoks` says how to embed with
                it: what it would get is untrained; what `BTokModel.from_pretrained` refuses.
        """
        found = find(name_or_path, "config.json")
        if found and not read_json(name_or_path, CONFIG_NAME) and settings.get("num_btoks") is None:
            if (folder := Path(name_or_path)).is_dir():
                must_be_checkpoint("BTokEncoder: checkpoint", folder)
            raise ValueError(
                f"BTokEncoder: {name_or_path} has no {CONFIG_NAME}, so its bottleneck tokens would "
                "be untrained; train it first (train/main.py), or use num_btoks=0, pooling='last' "
                f"for a model that embeds without them{checkpoint_in(Path(name_or_path))}"
            )
        model = BTokModel.from_pretrained(name_or_path, **settings)
        processor = Processor.from_pretrained(name_or_path, len(model.btok_token_ids))
        return cls(model, processor, found.parent if found else None)

    def using(self, **options: Any) -> BTokEncoder:
        """An encoder of the same model and processor that gives other vectors.

        Args:
            options: `num_btoks`, `dims`, `multi_vector`, `dtype` and `bound` of
                `btok.vectors.VectorOptions`; what is left out stays as it is.

        Raises:
            ValueError: what the checkpoint was not trained for; what needs a calibration, of a
                checkpoint that has none or one of other weights.
        """
        config, width = self.model.settings, self._width
        known = [field.name for field in fields(VectorOptions)]
        if unknown := [name for name in options if name not in known]:
            expected = ", ".join(known)
            raise TypeError(f"BTokEncoder: {unknown[0]} is no option, expected {expected}")
        asked = replace(self.options, **options).checked(config, width)
        if asked.calibrated:
            if self.calibration is None:
                raise ValueError(
                    f"BTokEncoder: {asked.calibrated} needs a calibration, and the checkpoint has "
                    f"none; calibrate it first: {COMMAND}"
                )
            model = "" if self.checkpoint is None else self.digest
            self.calibration.check(model, config, width)
        other = copy.copy(self)
        other.options = asked
        return other

    def encode(
        self,
        inputs: Sequence[Any],
        instruction: str | None = None,
        batch_tokens: int = 16384,
        show_progress: bool = True,
        **options: Any,
    ) -> np.ndarray:
        """Embed inputs: row i of the result is input i.

        Args:
            inputs: what to embed, each as `as_side` takes it.
            instruction: put before the text of every input.
            batch_tokens: tokens per packed row; a longer input takes a row of its own.
            show_progress: a bar on stderr where that is a terminal; a log file gets none.
            options: `num_btoks`, `dims`, `multi_vector`, `dtype` and `bound`, as `using` takes
                them.

        Returns:
            float32 [N, D], unit norm; d components of them, or int8, or [N, k, d], where the
            options say so.

        Raises:
            ValueError, TypeError: no inputs, or one that cannot be read (the message tells which);
                options that `using` refuses; `num_btoks` "auto" with `multi_vector`, which gives
                each input another number of vectors.
        """
        encoder = self.using(**options) if options else self
        shape = encoder.shape
        inputs = list(inputs) if isinstance(inputs, Iterator) else _several(inputs)
        if not len(inputs):
            raise ValueError("BTokEncoder.encode: inputs is empty, expected at least one")
        rows = np.empty((len(inputs), *shape), encoder.options.dtype)
        for made in encoder.encode_iter(inputs, instruction, batch_tokens, show_progress):
            if made.ids:
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
        **options: Any,
    ) -> Iterator[Vectors]:
        """Embed inputs, maybe endless, a batch at a time: `(ids, vectors, errors, tokens)`.

        Args:
            inputs: drawn in a background thread; the first four arguments are those of `encode`.
            ids: what the inputs are called, one per input, drawn before it, a ValueError where one
                comes twice in a window; None: 0, 1, 2, ...
            window: how many inputs are held and sorted together; no batch spans two windows.
            strict: an input that cannot be read is a ValueError; else it is named in `errors`, and
                the rest goes on (a batch in which nothing can be read has no vectors).
            options: as `encode` takes them. With `num_btoks` "auto" the inputs of a batch have one
                number of bottleneck tokens, so that there may be `multi_vector` [n, k, d], too.
        """
        encoder = self.using(**options) if options else self
        how = (instruction, batch_tokens, show_progress, ids, window, strict)
        with closing(encoder._outputs(inputs, *how)) as outputs:
            for batch, output in outputs:
                vectors = encoder._vectors(output)
                del output  # the next batch runs without this one's rows on the device
                yield Vectors(batch.names, vectors, batch.errors, batch.tokens)

    def calibrate(
        self,
        inputs: Iterable[Any],
        instruction: str | None = None,
        batch_tokens: int = 16384,
        show_progress: bool = True,
        *,
        quantile: float = 0.9,
        strict: bool = True,
    ) -> Calibration:
        """Measure what `num_btoks` "auto" and `dtype` "int8" go by, in one pass over some inputs.

        Of each kind and size of input the quantile of 1 - cos(z_k, z_K) for every k that the model
        was trained for, and the scales of int8. They are this encoder's from now on;
        `Calibration.save` puts them into a checkpoint's folder, where encoders find them.

        Args:
            inputs: such as will be encoded, some thousands; the first four arguments are those of
                `encode`, and so many inputs need no more memory than a few.
            quantile: share of the inputs whose loss is at most what is said of them.
            strict: an input that cannot be read is a ValueError; else it is passed over.

        Raises:
            ValueError: no inputs that can be read; a quantile that is not above 0 and at most 1.
        """
        if not 0 < quantile <= 1:
            had = f"BTokEncoder.calibrate: quantile is {quantile}"
            raise ValueError(f"{had}, expected above 0 and at most 1")
        plain = copy.copy(self)
        plain.options = VectorOptions()
        measuring = Measuring(self.model.settings, self._width, quantile)
        how = (instruction, batch_tokens, show_progress, None, 1024, strict)
        with closing(plain._outputs(inputs, *how)) as outputs:
            for batch, output in outputs:
                if output is not None:
                    measuring.add(batch.cells, output)
        if not measuring.inputs:
            raise ValueError("BTokEncoder.calibrate: inputs has none that can be read")
        made = measuring.calibration("" if self.checkpoint is None else self.digest)
        self.calibration = made
        return made

    def _outputs(
        self,
        inputs: Iterable[Any],
        instruction: str | None,
        batch_tokens: int,
        show_progress: bool,
        ids: Iterable[Any] | None,
        window: int,
        strict: bool,
    ) -> Generator[tuple[_Batch, BTokOutput | None], None, None]:
        """Batches of the inputs, as `encode_iter` takes its arguments, and what the model gives for
        each; None for one in which nothing can be read.
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
            for batch in ahead:
                yield batch, self._run(batch)
                bar.update(len(batch.names) + len(batch.errors))

    def encode_samples(
        self, samples: Sequence[Mapping[str, Any]], batch_tokens: int = 16384
    ) -> tuple[np.ndarray, list[int]]:
        """Embed what `processor(with_frames(side))` made of inputs, perhaps elsewhere.

        Args:
            samples: one per input.
            batch_tokens: as `encode` takes it.

        Returns:
            What `encode` gives of them; and how many tokens each was made of.
        """
        rows = np.empty((len(samples), *self.shape), self.options.dtype)
        tokens = np.zeros(len(samples), np.int64)
        order = sorted(range(len(samples)), key=lambda i: -len(samples[i]["input_ids"]))
        for batch in self._packed(((i, samples[i]) for i in order), batch_tokens):
            if batch.names:
                rows[batch.names] = self._vectors(self._run(batch))
                tokens[batch.names] = batch.tokens
        return rows, tokens.tolist()

    def _vectors(self, output: BTokOutput | None) -> np.ndarray:
        """The vectors of a batch's output, made as the options say; [0, 0] where there is no
        output.
        """
        if output is None:
            return np.empty((0, 0), self.options.dtype)
        vectors = self.options.of(output).cpu().numpy()
        return vectors if self.scale is None else quantised(vectors, self.scale)

    def _run(self, batch: _Batch) -> BTokOutput | None:
        """The model's output for a batch, None for an empty batch; a ValueError where a vector is
        not finite.
        """
        if batch.packed is None:
            return None
        with torch.inference_mode(), _evaluating(self.model):
            output = self.model(batch.packed.to(self.model.backbone.device))
        if not (finite := output.embeddings.isfinite().all(1).cpu().numpy()).all():
            where = batch.names[finite.argmin()]
            raise ValueError(f"BTokEncoder: the vector of input {where} is not finite")
        return output

    @property
    def _width(self) -> int:
        return self.model.backbone.config.get_text_config().hidden_size

    @property
    def dims(self) -> int:
        """The number of components of a vector: D, or what the options say."""
        return self.options.dims or self._width

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one input's vectors: (d,); (k, d) of multi-vectors; (1 + k, d) of both."""
        return self.options.shape(self.model.settings, self._width)

    @property
    def scale(self) -> float | None:
        """The factor that turns int8 vectors back into floats; None for those in float32."""
        if self.options.dtype != "int8":
            return None
        assert self.calibration is not None  # or `using` would have refused
        return self.calibration.scale(self.dims, bool(self.options.multi_vector))

    @cached_property
    def calibration(self) -> Calibration | None:
        """The calibration of this model: the checkpoint's, or the last that `calibrate` made; None
        without one.
        """
        return None if self.checkpoint is None else Calibration.load(self.checkpoint)

    @cached_property
    def digest(self) -> str:
        """sha256 of the checkpoint, by which an index knows its model; read once, 3 s for 4 GB."""
        if self.checkpoint is None:
            raise ValueError("BTokEncoder: checkpoint is None; use BTokEncoder.from_pretrained")
        return model_digest(self.checkpoint)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that decide about vectors besides the weights, by which an index knows its
        own.
        """
        model, images = self.model, self.processor.image_processor
        return {
            "pooling": model.settings.pooling,
            "num_btoks": len(model.btok_token_ids),
            "dtype": str(model.backbone.dtype),
            "vision_positions": model.settings.vision_positions,
            **({name: getattr(images, name) for name in images.BOUNDS} if images else {}),
            **self.options.described(self.calibration if self.options.calibrated else None),
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
        numbered: Iterator[tuple[Any, Any]],
        instruction: str | None,
        budget: int,
        window: int,
        strict: bool,
    ) -> Iterator[_Batch]:
        """Windows of (id, input), longest first, packed to the budget."""
        broken: dict[Any, str] = {}

        def read(i: Any, value: Any, how: Callable[[Any], Any]) -> Any:
            """The result of `how(value)` for input i; None for an input that cannot be read."""
            try:
                return how(value)
            except Exception as error:  # a decoder of a broken file may raise anything
                if strict:
                    kinds = (TypeError, ImportError)
                    kind = next((k for k in kinds if isinstance(error, k)), ValueError)
                    raise kind(f"BTokEncoder: input {i}: {error}") from error
                broken[i] = str(error)

        while drawn := list(islice(numbered, window)):
            held, broken = dict(drawn), {}
            if len(held) < len(drawn):
                name, _ = Counter(name for name, _ in drawn).most_common(1)[0]
                raise ValueError(f"BTokEncoder.encode_iter: ids has {name!r:.60} more than once")
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
            for batch in self._packed(prepared, budget):
                yield batch._replace(errors=broken)
                broken = {}

    def _packed(
        self, prepared: Iterable[tuple[Any, Mapping[str, Any] | None]], budget: int
    ) -> Iterator[_Batch]:
        """Samples in this order, packed to the budget; the last batch may be of none. Those of
        another number of bottleneck tokens are packed apart.
        """
        waiting: dict[int, _Batch] = {}
        samples: dict[int, list[Mapping[str, Any]]] = {}
        totals: Counter[int] = Counter()

        def closed(number: int) -> _Batch:
            totals.pop(number)
            batch, theirs = waiting.pop(number), samples.pop(number)
            return batch._replace(packed=self.model.pack(theirs, number))

        for name, sample in prepared:
            if sample is None:
                continue
            cell = cell_of(sample)
            number = self._num_btoks(cell)
            length = len(sample["input_ids"]) + number
            if number in waiting and totals[number] + length > budget:
                yield closed(number)
            batch = waiting.setdefault(number, _Batch([], [], [], None, {}))
            batch.names.append(name)
            batch.tokens.append(length)
            batch.cells.append(cell)
            samples.setdefault(number, []).append(sample)
            totals[number] += length
        if not waiting:
            yield _Batch([], [], [], None, {})
        for number in sorted(waiting):
            yield closed(number)

    def _num_btoks(self, cell: str) -> int:
        """The number of bottleneck tokens that an input of this kind and size is embedded with."""
        options = self.options
        if options.num_btoks == "auto":
            assert self.calibration is not None  # or `using` would have refused
            return self.calibration.budget(cell, options.bound, self.dims)
        return len(self.model.btok_token_ids) if options.num_btoks is None else options.num_btoks


def _several(inputs: Any) -> Any:
    """The inputs as they are; a TypeError for a single input, or for what is no list of them."""
    listed = hasattr(inputs, "__iter__") or hasattr(inputs, "__getitem__")
    if not listed or isinstance(inputs, str | bytes | Path | Mapping):
        raise TypeError(f"BTokEncoder: inputs is one {type(inputs).__name__}, not a list")
    return inputs


def _ahead(batches: Iterator[_Batch]) -> Generator[_Batch, None, None]:
    """Yield the batches in their order, each made in a background thread before it is asked for."""
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
    """A context in which the model is in evaluation mode; after it each module has its own mode
    again.
    """
    training = [module for module in model.modules() if module.training]
    if training:  # it sets every module's mode, which takes longer than to look at them
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
