"""What the benchmarks' contestants share: a Qwen2-VL of random weights, its padded forward, and a
tokenizer for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def random_qwen2_vl(
    shape: Any, vision: dict[str, Any], device: str, dtype: torch.dtype, **options: Any
) -> Any:
    """The same weights for the same arguments.

    Args:
        shape: has `hidden`, `heads`, `key_heads`, `mlp`, `layers` and `vocabulary` of the language
            model.
        vision: settings of the tower, but for its output's width.
        options: of transformers' Qwen2VLConfig besides, such as token ids.
    """
    from transformers import AutoModelForImageTextToText, Qwen2VLConfig

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e6}
    rope["mrope_section"] = [n * shape.hidden // shape.heads // 16 for n in (2, 3, 3)]
    language = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_heads,
        "rope_parameters": rope,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": shape.hidden**-0.5,  # so that attention is far from uniform
    }
    vision = vision | {"hidden_size": shape.hidden}
    config = Qwen2VLConfig(text_config=language, vision_config=vision, **options)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(config, dtype=dtype)


def pooled_of_padded(model: Any, ids: Sequence[Tensor], rows: int, **vision: Tensor) -> Tensor:
    """The mean of each one's last `rows` rows, [N, D], by transformers' own forward of ids that are
    padded to one length."""
    mask = pad_sequence([torch.ones_like(tokens) for tokens in ids], batch_first=True)
    states = model(
        input_ids=pad_sequence(list(ids), batch_first=True).to(model.device),
        attention_mask=mask.to(model.device),
        use_cache=False,
        **vision,
    ).last_hidden_state
    last = mask.sum(1, keepdim=True) + torch.arange(-rows, 0)  # [N, rows]
    return states[torch.arange(len(ids))[:, None], last].float().mean(1)


def byte_tokenizer() -> Any:
    """One token per byte, plus Qwen2-VL's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names: tuple[str, ...] = ("endoftext", "im_start", "im_end")
    names += ("vision_start", "vision_end", "image_pad", "video_pad")
    special = [f"<|{name}|>" for name in names]
    alphabet = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=special[0])
