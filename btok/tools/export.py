"""A checkpoint of adapters becomes a plain one, compared with it before it is written."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import torch

from btok import adapters
from btok.model import BTokModel

# of a checkpoint in several files; of a run's checkpoint, what is its alone
INDEX, RUN = "model.safetensors.index.json", ("model", "manifest", "trainer")


def refuse_used(out: Path) -> None:
    """A ValueError where what is to be written would meet other files."""
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"export: {out} is not empty; name a new folder")


def export(folder: str | Path, out: str | Path, bound: float | None = None) -> float:
    """Merge saved adapters into a plain checkpoint, and compare the two on random texts; or write
    one whose weights are in several files, as of a sharded run, as one.

    Args:
        folder: what `BTokModel.save_pretrained` wrote of a model with adapters, or a checkpoint in
            several files.
        out: a new folder; tokenizer and processor files of `folder` are copied along.
        bound: what a component of an embedding may move by; None for 1e-5, or 2e-2 in a precision
            lower than fp32.

    Returns:
        The largest difference found.

    Raises:
        ValueError: no adapters, `out` is not empty, a difference over the bound; `out` stays empty.
    """
    folder, out = Path(folder), Path(out)
    if adapters.base_of(folder) is None and not (folder / INDEX).exists():
        raise ValueError(f"export: {folder} has no adapters ({adapters.CONFIG_NAME})")
    refuse_used(out)
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
    return error
