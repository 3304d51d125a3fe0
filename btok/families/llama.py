"""Llama: text alone."""

from btok.families.family import Family

LLAMA = Family("LlamaForCausalLM")
