"""Llama: text alone."""

from btok.families.family import CHATML, Family

LLAMA = Family(
    "LlamaForCausalLM",
    turns=(("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"), CHATML),
)
