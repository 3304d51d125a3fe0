"""Inputs become vectors in a sink: only those that it lacks, in parts, shared by the ranks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice, tee
from pathlib import Path
from typing import Any

from btok.encoder import BTokEncoder
from btok.tools.lookup import Came
from btok.tools.rows import Encoded, Row, as_item, refuse_ungrouped
from btok.tools.sinks import fitted, open_sink
from btok_kernels.ranks import gather, on_first, rank, world

PART = 256  # inputs that are encoded together, by one process
SECONDS = 10.0  # between two writes, so that many small parts make one commit
MOST = 1 << 28  # bytes of vectors that wait to be written
WINDOW = 1 << 12  # items that are looked up together


def encode_to(
    encoder: BTokEncoder,
    output: str | Path,
    inputs: Iterable[Any],
    items: Iterable[str | Mapping[str, Any]],
    instruction: str | None = None,
    batch_tokens: int = 16384,
    show_progress: bool = True,
    storage: str | None = None,
    check: Callable[[Mapping[str, Any]], str | None] = lambda item: None,
    **options: Any,
) -> Encoded:
    """Make an index, or another sink, hold exactly these inputs; encode what it lacks.

    A call that was stopped or killed goes on where it was: at most the parts of the last ten
    seconds, or the part in work, are made again. Inputs that cannot be read are told, and tried
    again by the next call. In a process group the ranks share the work.

    Args:
        encoder: from `BTokEncoder.from_pretrained`.
        output: a folder or an address for an index, NAME.parquet or NAME.npz; see
            `btok.tools.sinks`.
        inputs, instruction, batch_tokens, show_progress: as `BTokEncoder.encode` takes them.
        items: per input its id, or a mapping with its "id" and what else is to be found and
            filtered by, all different. A vector of the same id is not computed again, so an id must
            change with the content. Items are drawn in windows, ahead of their inputs.
        storage: what an index stores: "float32", "float16" or "int8"; by default what it does
            already, or float32.
        check: of an item whose vector was made, why it is not to be kept; None to keep it.
        options: `num_btoks`, `dims`, `multi_vector` and `bound`, as `BTokEncoder.using` takes them;
            by default the encoder's own, or those of the index that is there. With `multi_vector`
            an index keeps the bottleneck rows, too, for late interaction.

    Raises:
        ValueError: options that the model was not trained for, or an output does not keep; what
            `btok.tools.index.open_index` refuses; an id twice; no input that can be read.
    """
    refuse_ungrouped()
    encoder = fitted(encoder, output, options)
    most = MOST // (4 * math.prod(encoder.shape))
    sink = open_sink(encoder, output, instruction, storage)
    waiting: dict[str, Mapping[str, Any]] = {}

    def lacking() -> Iterator[tuple[str, Any]]:
        """Yield (id, input) of the items without a vector; of every world() parts of them this
        rank's one.
        """
        given, described, count = iter(inputs), map(as_item, items), 0
        came = Came()
        while window := list(islice(described, WINDOW)):
            ids = [item["id"] for item in window]
            if (again := came.add(ids)).any():
                twice = ids[int(again.argmax())]
                raise ValueError(f"{output}: the id {twice!r} came twice, expected all different")
            for item, wanted in zip(window, sink.lacking(window), strict=True):
                try:
                    value = next(given)
                except StopIteration:
                    raise ValueError("inputs is shorter than items") from None
                if wanted:
                    if count // PART % world() == rank():
                        waiting[item["id"]] = item
                        yield item["id"], value
                    count += 1
        if next(given, waiting) is not waiting:
            raise ValueError("items is shorter than inputs")

    def write(part: dict[str, Row]) -> None:
        """Write rows in the order of their items, in which vectors are not made."""
        sink.write([part[name] for name in waiting if name in part])
        for name in part:
            del waiting[name]

    part: dict[str, Row] = {}
    since = time.monotonic()
    ids, values = tee(lacking())
    made = encoder.encode_iter(
        (value for _, value in values),
        instruction,
        batch_tokens,
        show_progress and rank() == 0,
        ids=(name for name, _ in ids),
        window=PART,
        strict=False,
    )
    try:
        for names, vectors, errors, tokens in made:
            for name, row, count in zip(names, vectors, tokens, strict=True):
                why = check(waiting[name])
                kept = (row, count) if why is None else (None, None, why)
                part[name] = Row(waiting[name], *kept)
            part |= {name: Row(waiting[name], None, None, why) for name, why in errors.items()}
            late = time.monotonic() - since >= SECONDS
            if len(part) % PART == 0 and (late or len(part) >= most):
                write(part)
                part, since = {}, time.monotonic()
    finally:  # what was made is kept, whatever happened
        if part:
            write(part)
    gather(None)  # all have written
    return on_first(sink.finish)
