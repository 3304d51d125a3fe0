"""The small model of the pocket benchmark: a tokenizer of its words and a Qwen2-VL that fits it."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch

from btok.model import BTokModel
from btok.processing import Processor
from btok.tokens import add_to_embeddings, add_to_tokenizer
from train.pocket.data import texts


def build(num_btoks: int, seed: int, **settings: Any) -> tuple[BTokModel, Processor]:
    """Make the untrained pocket model with K bottleneck tokens, and its processor.

    Args:
        num_btoks: K.
        seed: of the weights.
        settings: `pooling` and the others of `btok.config.BTokConfig`.
    """
    tokenizer = make_tokenizer()
    btoks = add_to_tokenizer(tokenizer, num_btoks)
    backbone = make_backbone(tokenizer, seed)
    add_to_embeddings(backbone, btoks, seed=seed)
    model = BTokModel.from_backbone(backbone, btok_token_ids=btoks, **settings)
    return model, Processor(tokenizer)


def make_tokenizer(vocabulary: int = 512) -> Any:
    """A byte-pair tokenizer trained on the pocket benchmark's training texts, deterministic."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    names = [
        "endoftext",
        "im_start",
        "im_end",
        "vision_start",
        "vision_end",
        "image_pad",
        "video_pad",
    ]
    special = [f"<|{name}|>" for name in names]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, show_progress=False, max_token_length=12
    )
    turn = ["assistant\n"] * 1000  # opens every target: worth one token
    tokenizer.train_from_iterator(chain(texts(), turn), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=special[0], pad_token=special[0]
    )


def make_backbone(tokenizer: Any, seed: int) -> Any:
    """A Qwen2-VL of a million parameters with random weights."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    hidden = 128
    end, image, video, first, last = tokenizer.convert_tokens_to_ids(
        f"<|{name}|>"
        for name in ("endoftext", "image_pad", "video_pad", "vision_start", "vision_end")
    )
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]}
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
    }
    text |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4}
    text |= {"max_position_embeddings": 4096, "rope_parameters": rope, "initializer_range": 0.1}
    text |= {"bos_token_id": end, "eos_token_id": end}
    vision = {"depth": 2, "embed_dim": 64, "hidden_size": hidden, "num_heads": 4, "mlp_ratio": 2}
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision | {"initializer_range": 0.1},
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=first,
        vision_end_token_id=last,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    return Qwen2VLForConditionalGeneration(config)
