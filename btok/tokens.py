"""Bottleneck tokens as real vocabulary entries: in the tokenizer and in the embedding matrix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch

from btok.config import check_choice

Init = Literal["checkpoint", "eos"]
STEM = "<|btok_"  # of the names of bottleneck tokens
CHAT = "chat"  # the template that a tokenizer had

# in Jinja, of a conversation: its pictures, its videos and its texts, as `Processor` has those of a
# side, and what every input ends with; vLLM looks for the loop over `message['content']`, and
# without one makes a single text of the parts, with line breaks of its own
END = "all.text + BTOKS -}}"
TEMPLATE = f"""\
{{%- set all = namespace(image='', video='', texts=[], text='') -%}}
{{%- for message in messages -%}}
{{%- if message['content'] is string -%}}
{{%- set all.texts = all.texts + [message['content']] -%}}
{{%- else -%}}
{{%- for part in message['content'] | default([], true) -%}}
{{%- if part['type'] in ('image', 'image_url') -%}}
{{%- set all.image = all.image + IMAGE -%}}
{{%- elif part['type'] in ('video', 'video_url') -%}}
{{%- set all.video = all.video + VIDEO -%}}
{{%- elif part['type'] == 'text' -%}}
{{%- set all.texts = all.texts + [part['text']] -%}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- for text in all.texts -%}}
{{%- set gap = ' ' if all.text and text and not all.text[-1:].isspace() else '' -%}}
{{%- set all.text = all.text + gap + text -%}}
{{%- endfor -%}}
{{%- set gap = (VIDEO_GAP if all.video else IMAGE_GAP if all.image else '') if all.text else '' -%}}
{{{{- all.image + all.video + gap + {END}"""


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
    names = btok_names(num_btoks)
    tokenizer.add_tokens(names, special_tokens=True)
    return tokenizer.convert_tokens_to_ids(names)


def btok_names(num_btoks: int) -> list[str]:
    """The names `<|btok_0|>` .. `<|btok_{K-1}|>` of K bottleneck tokens."""
    return [f"{STEM}{index}|>" for index in range(num_btoks)]


def end_with_btoks(
    tokenizer: Any, num_btoks: int, shown: Mapping[str, tuple[str, str]] | None = None
) -> bool:
    """Have all that a tokenizer makes of a text, or of a conversation, end with the K tokens.

    Other engines, which know nothing of bottleneck tokens, then give a model the ids that
    `Processor` and the model's own packing do: a text's after `tokenizer(text)`, a conversation's
    after `tokenizer.apply_chat_template`. Nothing else is added, also where the tokenizer did
    before; a chat template that it had is kept under the name "chat" ("chat_default" where it has
    one of that name), and one without a token for padding has its end token for that. What is
    encoded with `add_special_tokens=False` stays as it was.

    Args:
        tokenizer: a transformers tokenizer that has the tokens, changed in place.
        num_btoks: K.
        shown: of "image" and "video" what stands for one in a conversation, and what comes between
            the last and the text.

    Returns:
        Whether it could be done: a tokenizer that is not of the `tokenizers` library cannot.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    from tokenizers.processors import TemplateProcessing

    names = btok_names(num_btoks)
    ids = tokenizer.convert_tokens_to_ids(names)
    end = [f"{name}:0" for name in names]
    backend.post_processor = TemplateProcessing(
        single=["$A:0", *end],
        pair=["$A:0", "$B:0", *end],
        special_tokens=list(zip(names, ids, strict=True)),
    )
    named = {"BTOKS": "".join(names)}
    for kind in ("image", "video"):
        named[kind.upper()], named[f"{kind.upper()}_GAP"] = (shown or {}).get(kind, ("", ""))
    values = "".join(f"{{%- set {name} = {value!r} -%}}\n" for name, value in named.items())
    had = tokenizer.chat_template or {}
    if not isinstance(had, dict):
        had = {"default": had}
    free = f"{CHAT}_default" if CHAT in had else CHAT
    kept = {free if name == "default" else name: each for name, each in had.items()}
    kept = {name: each for name, each in kept.items() if not each.endswith(END)}
    own = values + TEMPLATE
    if tokenizer.pad_token is None:  # which other engines need for a batch
        tokenizer.pad_token = tokenizer.eos_token or (names[-1] if names else None)
    tokenizer.chat_template = {"default": own, **kept} if kept else own
    return True


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
    check_choice("add_to_embeddings", "init", init, get_args(Init))
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
