"""Bottleneck Tokens: a vision-language model becomes one embedding (arXiv 2604.11095)."""

__version__ = "0.1.0"
