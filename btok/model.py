"""BTokModel: a packed batch goes in, embeddings and the generative loss come out.

hidden = norm(backbone([x ; B ; T] ...))        one pass, condensed_attention in every layer
z      = normalize(mean(hidden[rows of B]))     fp32, per sample
ntp    = mean over samples of the mean over its labels of -log softmax(lm_head(hidden))[label]
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from btok.packing import TARGET_POSITIONS, PackedBatch
from btok.tokens import Init, add_to_embeddings, add_to_tokenizer
from btok_kernels.condensed_attention import condensed_attention

Pooling = Literal["btok", "last", "mean"]
NtpReduction = Literal["sample_mean", "token_mean"]

ARCHITECTURES = ("qwen2_vl",)
CONFIG_NAME = "btok_config.json"
FORMAT_VERSION = 1


class BTokOutput(NamedTuple):
    """What a forward pass gives.

    Args:
        embeddings: [N, D], unit norm, at least fp32; empty for a batch packed without bottleneck
            tokens, which a model that pools them cannot embed.
        ntp_loss: scalar, at least fp32, by the model's `ntp_reduction`; None without labels.
    """

    embeddings: Tensor
    ntp_loss: Tensor | None


class BTokModel(nn.Module):
    """A transformers backbone with condensed attention, whose pooled rows are the embedding.

    Args:
        backbone: a `Qwen2VLForConditionalGeneration`; its language model's attention is replaced.
        btok_token_ids: the K bottleneck tokens' ids; empty for a baseline without them.
        pooling: "btok" (mean over the bottleneck rows), "last" (the last row of [x ; B]: VLM2Vec's
            where K = 0) or "mean" (over all rows of [x ; B]).
        target_positions: where a target's positions start, see `btok.packing.pack`.
        ntp_reduction: "sample_mean" (mean over samples of each one's token mean) or "token_mean".

    Raises:
        ValueError: an unsupported architecture, or settings that do not go together.
    """

    def __init__(
        self,
        backbone: Any,
        *,
        btok_token_ids: Sequence[int],
        pooling: Pooling = "btok",
        target_positions: str = "reference",
        ntp_reduction: NtpReduction = "sample_mean",
    ) -> None:
        super().__init__()
        _one_of("backbone", backbone.config.model_type, ARCHITECTURES)
        _one_of("pooling", pooling, ("btok", "last", "mean"))
        _one_of("target_positions", target_positions, TARGET_POSITIONS)
        _one_of("ntp_reduction", ntp_reduction, ("sample_mean", "token_mean"))
        if pooling == "btok" and not len(btok_token_ids):
            raise ValueError("BTokModel: with K = 0 use pooling='last' or 'mean', not 'btok'")
        use_condensed_attention(backbone)
        self.backbone = backbone
        self.btok_token_ids = tuple(map(int, btok_token_ids))
        self.pooling = pooling
        self.target_positions = target_positions
        self.ntp_reduction = ntp_reduction

    @classmethod
    def from_backbone(cls, backbone: Any, **settings: Any) -> BTokModel:
        """Wrap a transformers model in memory; settings as the class takes them."""
        return cls(backbone, **settings)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        num_btoks: int | None = None,
        init: Init = "checkpoint",
        pooling: Pooling | None = None,
        target_positions: str | None = None,
        ntp_reduction: NtpReduction | None = None,
        dtype: Any = "auto",
    ) -> BTokModel:
        """Load a checkpoint of ours, or any Qwen2-VL checkpoint and give it bottleneck tokens.

        Args:
            name_or_path: a folder or a hub id.
            num_btoks: K; None for the checkpoint's own, or 4.
            init: first value of new bottleneck rows, see `btok.tokens.add_to_embeddings`.
            pooling, target_positions, ntp_reduction: None for the checkpoint's own, or the class's
                defaults ("last" pooling where K = 0).
            dtype: of the weights, as transformers takes it.

        Raises:
            ValueError: an unsupported architecture, settings other than a checkpoint of ours has.
        """
        from transformers import AutoConfig, AutoTokenizer, Qwen2VLForConditionalGeneration

        settings_file = Path(name_or_path) / CONFIG_NAME
        saved = json.loads(settings_file.read_text()) if settings_file.is_file() else {}
        asked = {"num_btoks": num_btoks, "pooling": pooling, "target_positions": target_positions}
        for name, value in {**asked, "format_version": FORMAT_VERSION}.items():
            if saved and value is not None and value != saved.get(name):
                raise ValueError(
                    f"BTokModel: {name} is {value!r}, but {name_or_path} was saved with "
                    f"{saved.get(name)!r}; ask for that or leave it out"
                )
        kind = AutoConfig.from_pretrained(name_or_path).model_type
        _one_of(f"the architecture of {name_or_path}", kind, ARCHITECTURES)
        backbone = Qwen2VLForConditionalGeneration.from_pretrained(name_or_path, dtype=dtype)
        if saved:
            ids = saved["btok_token_ids"]
        else:
            tokenizer = AutoTokenizer.from_pretrained(name_or_path)
            ids = add_to_tokenizer(tokenizer, 4 if num_btoks is None else num_btoks)
            add_to_embeddings(backbone, ids, init)
        return cls(
            backbone,
            btok_token_ids=ids,
            pooling=pooling or saved.get("pooling", "btok" if ids else "last"),
            target_positions=target_positions or saved.get("target_positions", "reference"),
            ntp_reduction=ntp_reduction or saved.get("ntp_reduction", "sample_mean"),
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a plain transformers checkpoint and, beside it, `btok_config.json`."""
        folder = Path(folder)
        self.backbone.save_pretrained(folder)
        settings = {
            "format_version": FORMAT_VERSION,
            "architecture": self.backbone.config.model_type,
            "num_btoks": len(self.btok_token_ids),
            "btok_token_ids": list(self.btok_token_ids),
            "pooling": self.pooling,
            "target_positions": self.target_positions,
            "ntp_reduction": self.ntp_reduction,
        }
        (folder / CONFIG_NAME).write_text(json.dumps(settings, indent=2) + "\n")

    def forward(self, batch: PackedBatch) -> BTokOutput:
        """Embed a packed batch and, where it has targets, score their generation, in one pass.

        Args:
            batch: from `btok.packing.pack` with this model's settings, on the model's device.
        """
        hidden = self.hidden_states(batch)
        return BTokOutput(self._pool(hidden, batch), self._ntp_loss(hidden, batch))

    def hidden_states(self, batch: PackedBatch) -> Tensor:
        """The language model's states after its final norm, [T, D]."""
        model, config = self.backbone.model, self.backbone.config
        embeds = model.get_input_embeddings()(batch.input_ids)
        if batch.pixel_values is not None:
            features = model.get_image_features(batch.pixel_values, batch.image_grid_thw)
            embeds = _place(embeds, batch.input_ids == config.image_token_id, features)
        if batch.pixel_values_videos is not None:
            features = model.get_video_features(batch.pixel_values_videos, batch.video_grid_thw)
            embeds = _place(embeds, batch.input_ids == config.video_token_id, features)
        output = model.language_model(
            inputs_embeds=embeds[None],
            position_ids=batch.position_ids[:, None],
            use_cache=False,
            layout=batch.layout,
        )
        return output.last_hidden_state[0]

    def ntp_count(self, batch: PackedBatch) -> int:
        """What `ntp_loss` is a mean over: the weight of a batch's loss beside other batches'."""
        return batch.num_targets if self.ntp_reduction == "sample_mean" else len(batch.labels)

    def _pool(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        if self.pooling == "btok" and not batch.btok_rows.shape[1]:
            return hidden.new_empty(0, hidden.shape[1])
        if self.pooling == "btok":
            return F.normalize(_wide(hidden[batch.btok_rows]).mean(1), dim=-1)
        bounds = batch.layout.bounds.tolist()
        if self.pooling == "last":
            pooled = _wide(hidden[[border - 1 for _, _, border, _ in bounds]])
        else:
            means = [_wide(hidden[start:border]).mean(0) for start, _, border, _ in bounds]
            pooled = torch.stack(means)
        return F.normalize(pooled, dim=-1)

    def _ntp_loss(self, hidden: Tensor, batch: PackedBatch) -> Tensor | None:
        if not batch.num_targets:
            return None
        logits = _wide(self.backbone.lm_head(hidden[batch.label_rows]))  # [R, vocabulary]
        losses = F.cross_entropy(logits, batch.labels, reduction="none")
        if self.ntp_reduction == "token_mean":
            return losses.mean()
        counts = batch.label_samples.bincount(minlength=len(batch))
        return (losses / counts[batch.label_samples]).sum() / batch.num_targets


def use_condensed_attention(backbone: Any) -> None:
    """Make `condensed_attention` the attention of a transformers model's language model.

    Its forward then needs `layout=CondensedLayout` and takes one packed row, batch size 1. No mask
    interface is registered under the name, so transformers builds no S x S mask.
    """
    from transformers import AttentionInterface

    AttentionInterface.register("condensed", _condensed_for_transformers)
    backbone.set_attn_implementation({"text_config": "condensed", "vision_config": "sdpa"})


def _condensed_for_transformers(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    layout: Any = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """`query` [1, Hq, T, D], `key` and `value` [1, Hkv, T, D] -> [1, T, Hq, D]."""
    if layout is None or attention_mask is not None or dropout or len(query) != 1:
        raise ValueError(
            "condensed attention takes one packed row and its layout, no mask and no dropout; "
            "run the backbone through BTokModel"
        )
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    return condensed_attention(q, k, v, layout, scale=scaling)[None], None


def _place(embeds: Tensor, at: Tensor, features: Any) -> Tensor:
    """Put vision features [n, D], in order, where `at` [T] is True."""
    return embeds.masked_scatter(at[:, None], torch.cat(features.pooler_output).to(embeds.dtype))


def _wide(tensor: Tensor) -> Tensor:
    """At least fp32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"BTokModel: {name} is {value!r}, expected one of {tuple(allowed)}")
