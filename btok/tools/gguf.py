"""A language model in a GGUF file becomes a plain checkpoint."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from btok.families import named_family
from btok.files import must_be, one_line, rename
from btok.loading import alone
from btok.tools.export import must_be_new


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """A ValueError in place of whatever transformers raises on a damaged file."""
    try:
        yield
    except Exception as error:  # struct.error, KeyError, and what its vocabulary comes to
        raise ValueError(f"export: {path} cannot be read: {one_line(error)}") from error


def export_gguf(gguf: str | Path, out: str | Path) -> None:
    """Write a GGUF file's model and tokenizer as transformers saves them, in float32: GGUF's
    weights are mostly quantised, and what is written are their dequantised values.

    Args:
        gguf: a text model whose architecture is one of `btok.families.FAMILIES`.
        out: a new folder; after an error it is not there.

    Raises:
        ValueError: `out` is not empty; `gguf` is no file, is damaged, or holds an architecture
            that is not supported.
        ImportError: without the package gguf, which is the extra `btok[gguf]`.
    """
    gguf, out = Path(gguf), Path(out)
    must_be("file", "export: checkpoint", gguf)
    must_be_new("export: out", out, replaced=True)
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"export: {gguf} is read by gguf; pip install 'btok[gguf]'")
    import torch
    import transformers

    with _reading(gguf):
        given: dict[str, Any] = {"gguf_file": gguf.name}
        found, _ = transformers.PreTrainedConfig.get_config_dict(gguf.parent, **given)
    family = named_family(str(found.get("model_type")), f"export: the architecture of {gguf}")
    architecture = getattr(transformers, family.architecture)
    with alone():
        with _reading(gguf):
            tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **given)
            loaded = architecture.from_pretrained(gguf.parent, dtype=torch.float32, **given)
        # a model that was loaded from GGUF counts as quantised, which transformers does not save
        settings = loaded.config.to_dict()
        for key in ("quantization_config", "_name_or_path", "model_type"):
            settings.pop(key, None)
        config = architecture.config_class(**settings)
        plain = architecture._from_config(config, dtype=torch.float32)
        plain.load_state_dict(loaded.state_dict())
        plain.tie_weights()
    draft = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        with alone():
            plain.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        rename(draft, out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
