"""A folder becomes an index on many machines, by Ray Data.

    driver: list files -> tasks: digests, pages -> driver: which items the index lacks -> items
    items -> tasks: read and prepare -> actors: vectors -> Parquet parts, and which ids they have
    driver: all parts -> one commit

Items, parts and Ray's checkpoint of finished ids lie in a staging folder until the commit, so that
a run goes on whoever was killed: a part that was written is not made again, any other is. The
machines of a cluster must all see the files and the staging folder.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from btok.files import may_be_folder, printable, write_json
from btok.inputs import as_side, with_frames
from btok.processing import Processor
from btok.tools.command_line import load
from btok.tools.encode import PART, WINDOW
from btok.tools.folder import (
    Listing,
    Looked,
    as_part,
    as_uri,
    changed,
    describe,
    index_of_files,
    known_windows,
    look,
    path_of,
    tell,
)
from btok.tools.index import READ, Index
from btok.tools.rows import Row, described, refuse_other
from btok.tools.sinks import IndexSink, fitted, is_index
from btok.tools.tables import as_table, schema_of
from btok.vectors import options_of

try:
    import pyarrow as pa
    import ray
    from pyarrow import dataset, parquet
    from ray.data.checkpoint import CheckpointConfig
except ImportError as error:
    raise ImportError('--engine ray needs Ray: pip install "btok[ray]"') from error

LOOKED = 512  # files of a task that looks at them
PREPARED = 32  # inputs of a task that prepares them
AHEAD = 0.5  # CPUs of a task; others than an encoder's, else Ray would run both in one process
ITEMS, ROWS, DONE, META = "items", "rows", "done", "meta.json"  # in the staging folder


def update(
    checkpoint: str,
    root: Path,
    listed: Listing,
    output: str,
    instruction: str = "",
    batch_tokens: int = 16384,
    storage: str | None = None,
    where: str | None = None,
    clip: float | None = None,
    workers: int | None = None,
    address: str | None = None,
    staging: Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> Index:
    """Make an index hold just these files of a folder, and say what was done; `folder.update` on
    many machines.

    Args:
        checkpoint, root, output: as all machines see them.
        workers: encoders; by default one per GPU of the cluster, or per two CPUs.
        address: of a Ray cluster; by default RAY_ADDRESS's, or a new one on this machine.
        staging: the staging folder; by default OUTPUT.parts, beside a local index.
        options: of vectors, as `btok.tools.sinks.fitted` takes them.
    """
    if not is_index(output):
        raise ValueError(f"output is {output}, expected an index's folder or address with Ray")
    if staging is None and "://" in output:
        raise ValueError(f"staging is None, expected a folder that all machines see, for {output}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}, expected at least 1")
    # by default where `list_files` passes it over; in full, as Ray takes no other for a folder here
    staging = Path(f"{output}.parts" if staging is None else staging).resolve()
    encoder = fitted(load(checkpoint), output, options)
    if encoder.options.multi_vector:
        raise ValueError("multi_vector is True, expected False with Ray, which keeps one vector")
    old = index_of_files(encoder, output, instruction, storage, where)
    sink = IndexSink(encoder, output, instruction, storage)
    meta = described(encoder, instruction)
    prepare_staging(staging, meta)
    start = time.monotonic()
    started = connect(address, workers)
    try:
        count = write_items(staging / ITEMS, root, listed, old, sink, clip)
        if count:
            model = encoder.checkpoint if Path(checkpoint).exists() else checkpoint
            btoks = len(encoder.model.btok_token_ids)
            encode(staging, str(model), btoks, meta, batch_tokens, workers)
    finally:
        if started:
            ray.shutdown()
    sink.commit(rows_of(staging / ROWS, staging / ITEMS))
    done = sink.finish()
    shutil.rmtree(staging)
    index = Index.open(output, encoder)
    tell(listed, output, done, index.distinct("uri"))
    seconds = time.monotonic() - start
    print(
        f"{printable(output)}: {count} inputs in {seconds:.0f} s, {count / seconds:.1f} a second",
        file=sys.stderr,
    )
    return index


def connect(address: str | None, workers: int | None) -> bool:
    """Join a cluster, or start one on this machine; whether this call did either."""
    if ray.is_initialized():
        return False
    address = address or os.environ.get("RAY_ADDRESS")
    settings: dict[str, Any] = {"address": address, "log_to_driver": True}
    if address is None:
        # encoders and tasks share the cores
        settings |= {"num_cpus": (os.cpu_count() or 1) + (workers or 1), "include_dashboard": False}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lance is not fork-safe")  # what is forked runs no Lance
        ray.init(**settings, logging_level=logging.WARNING)
    return True


def prepare_staging(staging: Path, asked: Mapping[str, Any]) -> None:
    """A folder for this model and settings; a ValueError where one holds parts of others."""
    may_be_folder("staging", staging)
    if (staging / META).exists():
        refuse_other(staging, json.loads((staging / META).read_text()), asked)
    elif staging.exists() and any(staging.iterdir()):
        raise ValueError(f"staging is {staging}, which has other things in it; give another folder")
    staging.mkdir(parents=True, exist_ok=True)
    write_json(staging / META, dict(asked))
    shutil.rmtree(staging / ITEMS, ignore_errors=True)
    for name in (ITEMS, ROWS, DONE):
        (staging / name).mkdir(exist_ok=True)


def write_items(
    folder: Path, root: Path, listed: Listing, old: Index, sink: IndexSink, clip: float | None
) -> int:
    """Parquet files of the items that the index lacks; how many they are."""

    real, count = listed.real, 0
    items = describe(root, listed, old, clip, looked_by_tasks)
    while window := list(islice(items, WINDOW)):
        wanted = sink.lacking(window)
        lacking = [item for item, lacks in zip(window, wanted, strict=True) if lacks]
        for first in range(0, len(lacking), PART):
            part = lacking[first : first + PART]
            paths = [str(path_of(root, item, real)) for item in part]
            table = pa.table(
                {
                    "id": [item["id"] for item in part],
                    "item": [json.dumps(item) for item in part],
                    "path": [json.dumps(path) for path in paths],  # bytes that are no UTF-8, too
                }
            )
            parquet.write_table(table, folder / f"{count + first:012}.parquet")
        count += len(lacking)
    return count


def looked_by_tasks(
    root: Path, listed: Listing, old: Index, clip: float | None
) -> Iterator[list[Looked]]:
    """A look at every file, in order, by tasks, some at a time."""
    task = ray.remote(look_at).options(num_cpus=1)
    running: list[Any] = []
    for window, known in known_windows(listed, old):
        for first in range(0, len(window), LOOKED):
            paths = window[first : first + LOOKED]
            theirs = [known.get(as_uri(path), {}) for path in paths]
            running.append(task.remote(root, paths, theirs, clip))
            if len(running) > 256:
                yield ray.get(running.pop(0))
    for each in running:
        yield ray.get(each)


def look_at(
    root: Path, paths: list[str], known: list[dict[str, Any]], clip: float | None
) -> list[Looked]:
    """A task: looks at some files."""
    return [look(root, path, theirs, clip) for path, theirs in zip(paths, known, strict=True)]


def encode(
    staging: Path,
    checkpoint: str,
    btoks: int,
    meta: Mapping[str, Any],
    batch_tokens: int,
    workers: int | None,
) -> None:
    """Vectors of all items that no part has, as Parquet parts."""
    context = ray.data.DataContext.get_current()
    context.checkpoint_config = CheckpointConfig(
        id_column="id",
        checkpoint_path=str(staging / DONE),
        delete_checkpoint_on_success=False,
    )
    found = ray.cluster_resources()
    gpus = int(found.get("GPU", 0))
    workers = workers or gpus or max(1, int(found.get("CPU", 1)) // 2)
    rows = ray.data.read_parquet(str(staging / ITEMS))
    # Ray reads small files together; a block is what is written whole, or made again after a kill
    rows = rows.repartition(target_num_rows_per_block=PART)
    prepare: Any = prepared
    rows = rows.map_batches(
        prepare,
        batch_format="pyarrow",
        batch_size=PREPARED,
        num_cpus=AHEAD,
        fn_args=(checkpoint, btoks, meta["settings"]["instruction"]),
    )
    rows = rows.map_batches(
        Encode,
        batch_format="pyarrow",
        batch_size=PART,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_gpus=1 if gpus else 0,
        num_cpus=1,
        fn_constructor_args=(checkpoint, batch_tokens, meta),
    )
    rows.write_parquet(str(staging / ROWS))


@cache
def _processor(checkpoint: str, btoks: int) -> Processor:
    return Processor.from_pretrained(checkpoint, btoks)


def prepared(batch: pa.Table, checkpoint: str, btoks: int, instruction: str) -> pa.Table:
    """A task: what the processor makes of inputs, or why they cannot be read."""
    processor = _processor(checkpoint, btoks)
    samples, errors = [], []
    for said, at in zip(batch["item"].to_pylist(), batch["path"].to_pylist(), strict=True):
        item, path, sample = json.loads(said), Path(json.loads(at)), b""
        try:
            side = with_frames(as_side(as_part(path, item), instruction))
            sample = pickle.dumps(processor(side))
            error = changed(path, item)
        except Exception as found:  # a decoder of a broken file may raise anything
            error = str(found)
        samples.append(sample if error is None else None)
        errors.append(error)
    return pa.table(
        {
            "id": batch["id"],
            "item": batch["item"],
            "sample": pa.array(samples, pa.binary()),
            "error": pa.array(errors, pa.string()),
        }
    )


class Encode:
    """An actor: vectors of what was prepared."""

    def __init__(self, checkpoint: str, batch_tokens: int, meta: Mapping[str, Any]) -> None:
        self.encoder = load(checkpoint).using(**options_of(meta["settings"]))
        self.batch_tokens = batch_tokens
        self.schema = schema_of(meta, self.encoder.dims, "float32")

    def __call__(self, batch: pa.Table) -> pa.Table:
        items = [json.loads(item) for item in batch["item"].to_pylist()]
        samples = [value and pickle.loads(value) for value in batch["sample"].to_pylist()]
        good = [i for i, sample in enumerate(samples) if sample is not None]
        vectors, tokens = self.encoder.encode_samples([samples[i] for i in good], self.batch_tokens)
        rows = [
            Row(item, None, None, error)
            for item, error in zip(items, batch["error"].to_pylist(), strict=True)
        ]
        for i, vector, count in zip(good, vectors, tokens, strict=True):
            rows[i] = Row(items[i], vector, count)
        return as_table(rows, self.schema)


def rows_of(folder: Path, items: Path) -> Iterator[list[Row]]:
    """The rows of all parts that are of items of this run, as these say now, a few thousand at a
    time; of an id that is in two parts the first. Parts of a run that was killed may be of others:
    files have changed since, or clips are of another length.
    """
    if not any(folder.glob("*.parquet")):
        return
    asked = dataset.dataset(items, format="parquet").to_batches(columns=["id", "item"])
    left: dict[str, str] = {}
    for batch in asked:
        left |= zip(batch["id"].to_pylist(), batch["item"].to_pylist(), strict=True)
    for batch in dataset.dataset(folder, format="parquet").to_batches(batch_size=READ):
        vectors = batch["vector"].flatten().to_numpy().reshape(-1, batch["vector"].type.list_size)
        made, rows = iter(vectors), []
        for said in batch.select(["id", "tokens", "error"]).to_pylist():
            vector = next(made) if said["error"] is None else None
            if (item := left.pop(said["id"], None)) is not None:
                rows.append(Row(json.loads(item), vector, said["tokens"], said["error"]))
        if rows:
            yield rows
