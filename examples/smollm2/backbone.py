"""A language model in a GGUF file becomes the plain checkpoint that BTokModel loads.

    python examples/smollm2/backbone.py                       SmolLM2-135M-Instruct, fetched
    python examples/smollm2/backbone.py MODEL.gguf FOLDER     any other of a supported architecture

GGUF's weights are quantised: what comes out is their dequantised values in float32, exactly.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from btok.families import named_family
from btok.files import rename
from examples.smollm2 import fetch


def backbone(cache: Path) -> Path:
    """The folder of SmolLM2-135M-Instruct, dequantised from Q4_1; made if it is not there."""
    folder = cache / "SmolLM2-135M-Instruct"
    if not folder.exists():
        convert(fetch.gguf(cache), folder)
    return folder


def convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's model and tokenizer as transformers saves them, in float32.

    Args:
        gguf: a model whose architecture is one of `btok.families.FAMILIES`.
        folder: must not be there; nothing is left of it after an error.

    Raises:
        ValueError: `folder` is there, `gguf` is not, or holds an architecture that btok has not.
        ImportError: without the package gguf, which is the extra `btok[gguf]`.
    """
    if folder.exists():
        raise ValueError(f"{folder} is there already; name a new folder")
    if not gguf.is_file():
        raise ValueError(f"{gguf} is no file; expected a model in GGUF")
    try:
        import gguf as reader  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{gguf} is read with the extra: pip install 'btok[gguf]'") from error
    import torch
    import transformers

    where, name = gguf.parent, gguf.name
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, gguf_file=name)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            where, gguf_file=name, dtype=torch.float32
        )
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(f"{gguf} is no model that transformers reads: {error}") from error
    family = named_family(loaded.config.model_type, f"the architecture of {gguf}")
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "model_type"):
        settings.pop(key, None)
    # a model loaded from GGUF refuses to be saved as it is: it counts as quantised
    architecture = getattr(transformers, family.architecture)
    plain = architecture._from_config(architecture.config_class(**settings), dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.tie_weights()
    draft = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        plain.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        rename(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def main(argv: list[str]) -> int:
    """The command; 2 for a mistake, told in one line."""
    try:
        if len(argv) == 2:
            convert(Path(argv[0]), Path(argv[1]))
            print(argv[1])
        elif argv:
            raise ValueError(f"{len(argv)} arguments, expected none, or MODEL.gguf and FOLDER")
        else:
            print(backbone(fetch.default_cache()))
    except (ValueError, ImportError, OSError) as error:
        print(f"examples/smollm2/backbone.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
