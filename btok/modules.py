"""What other engines read of a checkpoint to pool as it does, or to refuse it.

`modules.json` for sentence-transformers: a text model that pools one row, or the mean of all, is
three of its own modules, and needs nothing of ours. Any other is `BTokTransformer`, which it loads
with `trust_remote_code=True` alone.

`architectures` in config.json for vLLM, SGLang and converters, which take the last row of what they
know: where that is not what a checkpoint pools it names one that they do not know, and that vLLM
has of our plugin. Transformers goes by `model_type`.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from btok.config import BTokConfig
from btok.files import read_json, write_json

ENGINE_PREFIX = "BTok"  # of an architecture that stock engines would embed wrongly with
POOLING = "1_Pooling"
OURS = {"btok.tools.sentence.BTokTransformer": ""}  # modules, each with the folder that it reads
STOCK = {
    "sentence_transformers.models.Transformer": "",
    "sentence_transformers.models.Pooling": POOLING,
    "sentence_transformers.models.Normalize": "2_Normalize",
}
MODULES = "modules.json"


def stock_pooling(settings: BTokConfig) -> str | None:
    """sentence-transformers' name for the pooling of [x ; B]; None where it has none."""
    if settings.pooling == "btok":  # of one row: it is the last
        return "lasttoken" if len(settings.btok_token_ids) == 1 else None
    return {"last": "lasttoken", "mean": "mean"}.get(settings.pooling)


def mark_architecture(folder: Path, settings: BTokConfig, architecture: str, plain: bool) -> None:
    """Have config.json name an architecture that is served rightly or not at all.

    Args:
        architecture: transformers' class of the backbone.
        plain: as `write_modules` takes it; such a mean is read of what that writes.
    """
    pooling = stock_pooling(settings)
    served = pooling == "lasttoken" or (pooling == "mean" and plain)
    config = dict(read_json(folder, "config.json"))
    config["architectures"] = [architecture if served else f"{ENGINE_PREFIX}{architecture}"]
    write_json(folder / "config.json", config)


def write_modules(folder: Path, settings: BTokConfig, dims: int, plain: bool) -> None:
    """Write `modules.json` and what it names.

    Args:
        dims: D, of an embedding.
        plain: whether transformers alone makes the last hidden states of it: a text model without
            adapters, whose tokenizer ends inputs with B.
    """
    pooling = stock_pooling(settings) if plain else None
    modules = OURS if pooling is None else STOCK
    for part in filter(None, STOCK.values()):  # of a checkpoint that was here before
        shutil.rmtree(folder / part, ignore_errors=True)
    listed = [
        {"idx": i, "name": str(i), "path": part, "type": kind}
        for i, (kind, part) in enumerate(modules.items())
    ]
    for part in modules.values():
        (folder / part).mkdir(exist_ok=True)
    write_json(folder / MODULES, listed)
    if pooling is not None:
        # read by all versions; those of today have shorter names
        named = {"lasttoken": "lasttoken", "mean_tokens": "mean", "cls_token": "cls"}
        modes = {f"pooling_mode_{name}": mode == pooling for name, mode in named.items()}
        config = {"word_embedding_dimension": dims, **modes}
        write_json(folder / POOLING / "config.json", config)
