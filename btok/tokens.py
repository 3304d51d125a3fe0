"""Bottleneck tokens as real vocabulary entries: in the tokenizer and in the embedding matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

Init = Literal["checkpoint", "eos"]
STEM = "<|btok_"  # of the names of bottleneck tokens


def add_to_tokenizer(tokenizer: Any, num_btoks: int) -> list[int]:
    """Make `<|btok_0|>` .. `<|btok_{K-1}|>` entries of a tokenizer; those it has are kept.

    Args:
        tokenizer: a transformers tokenizer, changed in place.
        num_btoks: K, at least 0, else a ValueError.

    Returns:
        The K token ids.
    """
    if num_btoks < 0:
        raise ValueError(f"add_to_tokenizer: num_btoks is {num_btoks}, expected at least 0")
    names = [f"{STEM}{index}|>" for index in range(num_btoks)]
    tokenizer.add_tokens(names, special_tokens=True)
    return tokenizer.convert_tokens_to_ids(names)


@torch.no_grad()
def add_to_embeddings(
    backbone: Any, token_ids: Sequence[int], init: Init = "checkpoint", seed: int = 0
) -> None:
    """Give the bottleneck tokens rows of the embedding matrix.

    Real checkpoints have spare rows, which the new ids fall into. Otherwise the matrix grows, and
    the new rows are drawn from the mean and the spread of the existing ones.

    Args:
        backbone: a transformers model, changed in place.
        token_ids: the K token ids.
        init: "checkpoint" keeps the rows as the checkpoint (or the draw) has them; "eos" copies the
            end token's row into each. Else, or without an end token, a ValueError.
        seed: of the draw.
    """
    if init not in ("checkpoint", "eos"):
        raise ValueError(f"add_to_embeddings: init is {init!r}, expected 'checkpoint' or 'eos'")
    old_rows = backbone.get_input_embeddings().weight.shape[0]
    if len(token_ids) and max(token_ids) >= old_rows:
        backbone.resize_token_embeddings(max(token_ids) + 1, mean_resizing=False)
        generator = torch.Generator().manual_seed(seed)
        matrices = (backbone.get_input_embeddings(), backbone.get_output_embeddings())
        for weight in {id(m.weight): m.weight for m in matrices if m is not None}.values():
            old = weight[:old_rows].float()
            noise = torch.randn(len(weight) - old_rows, weight.shape[1], generator=generator)
            drawn = old.mean(0) + old.std(0) * noise.to(old.device)
            weight[old_rows:] = drawn.to(weight.dtype)
    if init == "eos":
        end = backbone.config.get_text_config().eos_token_id
        if not isinstance(end, int):
            raise ValueError(f"add_to_embeddings: init is 'eos' and eos_token_id is {end}")
        weight = backbone.get_input_embeddings().weight
        weight[list(token_ids)] = weight[end].clone()
