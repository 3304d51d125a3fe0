"""Qwen3: text alone."""

from btok.families.family import Family

QWEN3 = Family("Qwen3ForCausalLM")
