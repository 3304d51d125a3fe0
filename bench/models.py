"""What the benchmarks' contestants share: Qwen2-VLs of random weights and a tokenizer for them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

NAMES = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
SPECIAL = [f"<|{name}|>" for name in NAMES]  # the tokenizer's ids 0 to 6


class Shape(NamedTuple):
    """A language model, as transformers' configurations name it; Qwen2-VL-2B's by default."""

    hidden_size: int = 1536
    num_attention_heads: int = 12
    num_key_value_heads: int = 2
    intermediate_size: int = 8960
    vocab_size: int = 151936
    num_hidden_layers: int = 28


class Tower(NamedTuple):
    """A vision tower, as transformers' configurations name it; Qwen2-VL's by default."""

    embed_dim: int = 1280
    num_heads: int = 16
    depth: int = 32


def random_qwen2_vl(shape: Shape, tower: Tower, device: str, dtype: torch.dtype) -> Any:
    """A Qwen2-VL in transformers, with the same weights for the same arguments."""
    from transformers import AutoModelForImageTextToText, Qwen2VLConfig

    width = shape.hidden_size
    sections = [n * width // shape.num_attention_heads // 16 for n in (2, 3, 3)]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    # weights are so large that attention is far from uniform
    language = shape._asdict() | {"rope_parameters": rope, "initializer_range": width**-0.5}
    language |= {"bos_token_id": 0, "eos_token_id": 0}
    vision = tower._asdict() | {"hidden_size": width, "initializer_range": tower.embed_dim**-0.5}
    settings: dict[str, Any] = {"vision_start_token_id": 3, "vision_end_token_id": 4}
    settings |= {"image_token_id": 5, "video_token_id": 6, "tie_word_embeddings": True}
    config = Qwen2VLConfig(text_config=language, vision_config=vision, **settings)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(config, dtype=dtype)


def byte_tokenizer() -> Any:
    """One token per byte, plus Qwen2-VL's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[0])
