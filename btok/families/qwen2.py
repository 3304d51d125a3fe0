"""Qwen2: text alone."""

from btok.families.family import Family

QWEN2 = Family("Qwen2ForCausalLM")
