"""Bottleneck Tokens: a vision-language model becomes one embedding (arXiv 2604.11095)."""

from btok.data.records import Pair, RetrievalTask, Side
from btok.encoder import BTokEncoder
from btok.model import BTokModel
from btok.processing import Processor

__version__ = "0.1.0"
__all__ = ["BTokEncoder", "BTokModel", "Pair", "Processor", "RetrievalTask", "Side"]
