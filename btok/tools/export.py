"""A checkpoint of adapters becomes a plain one, compared with it before it is written."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import torch

from btok import adapters
from btok.config import must_be_trained
from btok.files import may_be_folder
from btok.model import BTokModel
from btok.processing import Processor

# of a checkpoint, what is its alone; a calibration is of weights with its own digest
RUN = ("model", "manifest", "trainer", "btok_calibration")


def must_be_new(argument: str, out: Path, replaced: bool = False) -> None:
    """A ValueError where what is to be written to a folder would meet other files; or, of one that
    is `replaced` whole, where this runs in it: a shell there would see nothing.
    """
    may_be_folder(argument, out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{argument} {out} is not empty; name a new folder")
    if replaced and out.resolve() == Path.cwd():
        raise ValueError(f"{argument} is {out}, the folder this runs in; name a new folder")


def export(folder: str | Path, out: str | Path, bound: float | None = None) -> float:
    """Make a checkpoint a plain one that other engines read: adapters are merged, and the two
    compared on random texts; weights in several files, as of a sharded run, become one; a tokenizer
    that was saved by an older version ends inputs with the K tokens (`end_with_btoks`).

    Args:
        folder: what `BTokModel.save_pretrained` and `Processor.save_pretrained` wrote.
        out: a new folder; tokenizer and processor files of `folder` are copied along.
        bound: what a component of an embedding may move by; None for 1e-5, or 2e-2 in a precision
            lower than fp32.

    Returns:
        The largest difference found.

    Raises:
        ValueError: a checkpoint never saved by us, `out` is not empty, a difference over the bound;
            `out` stays empty.
    """
    folder, out = Path(folder), Path(out)
    must_be_trained("export: checkpoint", folder)
    must_be_new("export: out", out)
    model = BTokModel.from_pretrained(folder).eval()
    config = model.backbone.config
    special = {value for name, value in vars(config).items() if name.endswith("_token_id")}
    plain = [i for i in range(min(1000, config.get_text_config().vocab_size)) if i not in special]
    rng = random.Random(0)
    batch = model.pack([{"input_ids": rng.choices(plain, k=n)} for n in (1, 7, 64, 200)])
    with torch.no_grad():
        before = model(batch).embeddings
        if adapters.base_of(folder) is not None:
            adapters.merge(model.backbone)
        error = float((model(batch).embeddings - before).abs().max())
    low = model.backbone.dtype.itemsize < 4
    bound = bound if bound is not None else (2e-2 if low else 1e-5)
    if not error <= bound:
        raise ValueError(f"export: merging moves embeddings by {error:.2e}, expected <= {bound}")
    model.save_pretrained(out)
    for file in folder.iterdir():
        known = file.name.startswith(("adapter_", *RUN)) or (out / file.name).exists()
        if file.suffix in (".json", ".txt", ".jinja") and not known:
            shutil.copy(file, out)
    if (out / "tokenizer_config.json").exists():
        Processor.from_pretrained(out, len(model.btok_token_ids)).save_pretrained(out)
    return error
