"""Bottleneck Tokens: a vision-language model becomes one embedding (arXiv 2604.11095)."""

from pathlib import Path
from typing import Any

from btok.data.records import Pair, RetrievalTask, Side
from btok.encoder import BTokEncoder
from btok.model import BTokModel
from btok.processing import Processor

__version__ = "0.1.0"
__all__ = [
    "BTokEncoder",
    "BTokModel",
    "Pair",
    "Processor",
    "RetrievalTask",
    "Side",
    "load_sentence_transformer",
]


def load_sentence_transformer(name_or_path: str | Path, **settings: Any) -> Any:
    """A checkpoint as a `SentenceTransformer`: see the same name in `btok.tools.sentence`."""
    from btok.tools.sentence import load_sentence_transformer as load

    return load(name_or_path, **settings)
