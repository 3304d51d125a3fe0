"""BTokModel: a packed batch goes in, embeddings and the generative loss come out.

hidden = norm(backbone([x ; B ; T] ...))        one pass, condensed_attention in every layer
z      = normalize(mean(hidden[rows of B]))     fp32, per sample
ntp    = mean over samples of the mean over its labels of -log softmax(lm_head(hidden))[label]
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from packaging.version import Version
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from btok import adapters
from btok.files import read_json
from btok.gated_mlp import use_gated_mlps
from btok.last_layer import pooled_rows_only
from btok.packing import TARGET_POSITIONS, VISION_KEYS, PackedBatch, Pixels, pack
from btok.tokens import Init, add_to_embeddings, add_to_tokenizer
from btok_kernels.condensed_attention import condensed_attention
from btok_kernels.launch import always, choose, no_triton

Pooling = Literal["btok", "last", "mean"]
NtpReduction = Literal["sample_mean", "token_mean"]

# model_type -> the class of transformers that loads it
ARCHITECTURES = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
}
CONFIG_NAME = "btok_config.json"
FORMAT_VERSION = 1
_LOGITS = 1 << 25  # of the generative loss, held at once: 128 MiB in fp32


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
        backbone: a model of one of the classes in `ARCHITECTURES`; its language model's attention
            is replaced, and gated MLPs by ones that take less memory.
        btok_token_ids: the K bottleneck tokens' ids; empty for a baseline without them.
        pooling: "btok" (mean over the bottleneck rows), "last" (the last row of [x ; B]: VLM2Vec's
            where K = 0) or "mean" (over all rows of [x ; B]).
        target_positions: where a target's positions start, see `btok.packing.pack`.
        vision_positions: "mrope", or "text": every token, of images too, is one position after the
            one before it, as VLM2Vec-V2's public checkpoint was trained.
        ntp_reduction: "sample_mean" (mean over samples of each one's token mean) or "token_mean".
        last_layer: "pooled" (in evaluation mode without gradients, a batch without targets goes
            through the last layer with its pooled rows alone; not with "mean") or "full".
        attention: `impl` of `btok.kernels.condensed_attention`.

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
        vision_positions: str = "mrope",
        ntp_reduction: NtpReduction = "sample_mean",
        last_layer: str = "pooled",
        attention: str = "auto",
    ) -> None:
        super().__init__()
        _one_of("backbone", backbone.config.model_type, tuple(ARCHITECTURES))
        _one_of("pooling", pooling, ("btok", "last", "mean"))
        _one_of("target_positions", target_positions, TARGET_POSITIONS)
        _one_of("vision_positions", vision_positions, ("mrope", "text"))
        _one_of("ntp_reduction", ntp_reduction, ("sample_mean", "token_mean"))
        _one_of("last_layer", last_layer, ("pooled", "full"))
        if pooling == "btok" and not len(btok_token_ids):
            raise ValueError("BTokModel: with K = 0 use pooling='last' or 'mean', not 'btok'")
        use_condensed_attention(backbone)
        use_gated_mlps(backbone)
        self.backbone = backbone
        self.btok_token_ids = tuple(map(int, btok_token_ids))
        self.pooling = pooling
        self.target_positions = target_positions
        self.vision_positions = vision_positions
        self.ntp_reduction = ntp_reduction
        self.last_layer = last_layer
        self.attention = attention

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
        vision_positions: str | None = None,
        ntp_reduction: NtpReduction | None = None,
        last_layer: str = "pooled",
        lora: adapters.Lora | None = None,
        dtype: Any = "auto",
    ) -> BTokModel:
        """Load a checkpoint or adapters of ours, or a stock one and give it bottleneck tokens.

        Args:
            name_or_path: a folder or a hub id, of an architecture in `ARCHITECTURES`. Neither code
                that comes with a checkpoint nor pickled weights are ever loaded.
            num_btoks: K; None for the checkpoint's own, or 4.
            init: first value of new bottleneck rows, see `btok.tokens.add_to_embeddings`.
            pooling, target_positions, vision_positions, ntp_reduction: None for the checkpoint's
                own, or the class's defaults ("last" pooling where K = 0).
            last_layer: see the class; not saved.
            lora: new adapters, which alone train, with the K bottleneck rows; None for those that
                `name_or_path` has, if any.
            dtype: of the weights, as transformers takes it.

        Raises:
            ValueError: an unsupported architecture, settings other than a checkpoint of ours has,
                no weights in safetensors files, adapters that do not fit their base model.
            ImportError: adapters without peft, which is the extra `btok[peft]`.
        """
        import transformers

        base = adapters.base_of(name_or_path)
        weights = name_or_path if base is None else base
        if base is not None and (lora is not None or adapters.base_of(base) is not None):
            raise ValueError(
                f"BTokModel: {name_or_path if lora else base} has adapters already and takes no "
                "others; merge them with btok.adapters.export first"
            )
        config, _ = transformers.PreTrainedConfig.get_config_dict(weights)
        kind = str(config.get("model_type"))  # no auto class: a checkpoint's own code stays out
        _one_of(f"the architecture of {weights}", kind, tuple(ARCHITECTURES))
        saved = read_json(name_or_path, CONFIG_NAME)
        if base is not None and not saved:
            raise ValueError(f"BTokModel: {name_or_path} has adapters but no {CONFIG_NAME}")
        asked = {"format_version": FORMAT_VERSION, "architecture": kind, "num_btoks": num_btoks}
        asked |= {"pooling": pooling, "target_positions": target_positions}
        asked["vision_positions"] = vision_positions
        for name, value in asked.items():
            had = saved.get(name, "mrope" if name == "vision_positions" else None)
            if saved and value is not None and value != had:
                hints = {"format_version": "use the btok that wrote it"}
                hints["architecture"] = f"its {CONFIG_NAME} is of another checkpoint"
                raise ValueError(
                    f"BTokModel: {name} is {value!r}, but {name_or_path} was saved with {had!r}; "
                    + hints.get(name, "ask for that or leave it out")
                )
        load = getattr(transformers, ARCHITECTURES[kind]).from_pretrained
        try:
            backbone = load(weights, dtype=dtype, use_safetensors=True)
        except OSError as error:
            raise ValueError(
                f"BTokModel: {weights} gives no safetensors weights ({error}); pickled ones "
                "can run code and are not loaded: write it again with save_pretrained"
            ) from error
        except SafetensorError as error:
            raise ValueError(
                f"BTokModel: the weights of {weights} are cut short or damaged ({error}); copy "
                "them again"
            ) from error
        if saved:
            ids = saved["btok_token_ids"]
        else:
            load = transformers.AutoTokenizer.from_pretrained
            tokenizer = load(name_or_path, trust_remote_code=False)
            ids = add_to_tokenizer(tokenizer, 4 if num_btoks is None else num_btoks)
            add_to_embeddings(backbone, ids, init)
        if base is not None:
            adapters.load(backbone, name_or_path, ids)
        elif lora is not None:
            adapters.attach(backbone, lora, ids, weights)
        return cls(
            backbone,
            btok_token_ids=ids,
            pooling=pooling or saved.get("pooling", "btok" if ids else "last"),
            target_positions=target_positions or saved.get("target_positions", "reference"),
            vision_positions=vision_positions or saved.get("vision_positions", "mrope"),
            ntp_reduction=ntp_reduction or saved.get("ntp_reduction", "sample_mean"),
            last_layer=last_layer,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `btok_config.json` and a plain transformers checkpoint, or the adapters alone."""
        folder = Path(folder)
        if hasattr(self.backbone, "peft_config"):
            adapters.save(self.backbone, folder)
        else:
            self.backbone.save_pretrained(folder)
        settings = {
            "format_version": FORMAT_VERSION,
            "architecture": self.backbone.config.model_type,
            "num_btoks": len(self.btok_token_ids),
            "btok_token_ids": list(self.btok_token_ids),
            "pooling": self.pooling,
            "target_positions": self.target_positions,
            "vision_positions": self.vision_positions,
            "ntp_reduction": self.ntp_reduction,
        }
        (folder / CONFIG_NAME).write_text(json.dumps(settings, indent=2) + "\n")

    def checkpoint_activations(self, on: bool = True) -> None:
        """Make each layer's activations again in the backward instead of keeping them, or not."""
        new, old = (f"{name}_checkpointing_" for name in ("activation", "gradient"))
        name = new if hasattr(self.backbone, f"{new}enable") else old
        if on:
            getattr(self.backbone, f"{name}enable")({"use_reentrant": False})
        else:
            getattr(self.backbone, f"{name}disable")()

    def pack(self, sources: Sequence[Mapping[str, Any]]) -> PackedBatch:
        """Samples to embed, each as a processor returns it, as one batch without targets."""
        return pack(
            [(source, None) for source in sources],
            btok_token_ids=self.btok_token_ids,
            prefix_ids=(),
            suffix_ids=(),
            backbone_config=self.backbone.config,
        )

    def forward(self, batch: PackedBatch) -> BTokOutput:
        """Embed a packed batch and, where it has targets, score their generation, in one pass.

        Args:
            batch: from `btok.packing.pack` with this model's settings, on the model's device.
        """
        if rows := self._pooled_rows(batch):
            pooled = self.hidden_states(batch, rows).unflatten(0, (len(batch), rows))
            return BTokOutput(F.normalize(_wide(pooled).mean(1), dim=-1), None)
        hidden = self.hidden_states(batch)
        return BTokOutput(self._pool(hidden, batch), self._ntp_loss(hidden, batch))

    def hidden_states(self, batch: PackedBatch, last_rows: int | None = None) -> Tensor:
        """The language model's states after its final norm, [T, D]; or with `last_rows` = R, for
        a batch without targets, of the last R rows of each sample only, [N * R, D].
        """
        model = self.backbone.model
        embeds, deepstack = self._embed(batch)
        language_model = getattr(model, "language_model", model)
        if last_rows is not None:
            language_model = pooled_rows_only(language_model, batch.layout, last_rows)
        output = language_model(
            inputs_embeds=embeds[None],
            position_ids=self._position_ids(batch),
            use_cache=False,
            layout=batch.layout,
            condensed_impl=self.attention,
            **deepstack,
        )
        return output.last_hidden_state[0]

    def _embed(self, batch: PackedBatch) -> tuple[Tensor, dict[str, Any]]:
        """Token embeddings with the vision features in place [T, D]; what Qwen3-VL's language model
        takes besides: features that go onto its first layers' outputs, and their rows.
        """
        model, config = self.backbone.model, self.backbone.config
        embeds = model.get_input_embeddings()(batch.input_ids)
        levels: list[Tensor] = []  # [T, D] each
        seen = torch.zeros_like(batch.input_ids, dtype=torch.bool)
        for kind, pixels, grid in (
            ("image", batch.pixel_values, batch.image_grid_thw),
            ("video", batch.pixel_values_videos, batch.video_grid_thw),
        ):
            if pixels is None or grid is None:
                continue
            features, *deep = self._features(kind, pixels, grid)
            at = batch.input_ids == getattr(config, f"{kind}_token_id")
            embeds = _place(embeds, at, features)
            levels = levels or [torch.zeros_like(embeds) for _ in deep]
            levels = [_place(level, at, f) for level, f in zip(levels, deep, strict=True)]
            seen |= at
        if not levels:
            return embeds, {}
        return embeds, {
            "visual_pos_masks": seen[None],
            "deepstack_visual_embeds": [level[seen] for level in levels],
        }

    def _features(self, kind: str, pixels: Pixels, grid: Tensor) -> Sequence[Tensor]:
        """What the vision tower makes of pixels, [tokens, D] of each level, if it has not yet."""
        if isinstance(pixels, tuple):
            return pixels
        found = getattr(self.backbone.model, f"get_{kind}_features")(pixels, grid)
        levels = [found.pooler_output, *(getattr(found, "deepstack_features", None) or [])]
        return [torch.cat(tuple(level)) for level in levels]

    @torch.no_grad()
    def see(self, sides: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Sides, as a processor returns them, with the vision tower's features (without gradients)
        in the place of their pixels, for `pack`.
        """
        device, seen = self.backbone.device, [dict(side) for side in sides]
        for kind, (pixels_key, grid_key) in zip(("image", "video"), VISION_KEYS, strict=True):
            having = [side for side in seen if side.get(grid_key) is not None]
            if not having:
                continue
            pixels = torch.cat([torch.as_tensor(side[pixels_key]) for side in having])
            grids = [torch.as_tensor(side[grid_key]) for side in having]
            levels = self._features(kind, pixels.to(device), torch.cat(grids).to(device))
            merge = self.backbone.config.vision_config.spatial_merge_size**2
            tokens = [int(grid.prod(1).sum()) // merge for grid in grids]
            each = zip(*(level.split(tokens) for level in levels), strict=True)
            for side, features in zip(having, each, strict=True):
                side[pixels_key] = features
        return seen

    def _position_ids(self, batch: PackedBatch) -> Tensor:
        """[3, 1, T], or [1, T] where there is one axis."""
        if self.vision_positions == "text":
            rows = torch.arange(len(batch.input_ids), device=batch.input_ids.device)
            for start, _, _, end in batch.layout.bounds.tolist():
                rows[start:end] -= start
            return rows[None]
        if hasattr(self.backbone.config, "vision_config"):
            return batch.position_ids[:, None]
        return batch.position_ids[:1]

    def ntp_count(self, batch: PackedBatch) -> int:
        """What `ntp_loss` is a mean over: the weight of a batch's loss beside other batches'."""
        return batch.num_targets if self.ntp_reduction == "sample_mean" else len(batch.labels)

    def _pooled_rows(self, batch: PackedBatch) -> int:
        """How many rows per sample the last layer is enough for; 0 for all of them."""
        _, _, border, end = batch.layout.bounds.unbind(1)
        config = self.backbone.config
        vision = getattr(config, "vision_config", None)
        levels = getattr(vision, "deepstack_visual_indexes", ())  # go onto as many layers' outputs
        if (
            self.last_layer == "full"
            or torch.is_grad_enabled()
            or self.backbone.training  # dropout is drawn as in the pass with gradients
            or not border.equal(end)
            or len(levels) >= config.get_text_config().num_hidden_layers
        ):
            return 0
        return {"btok": batch.btok_rows.shape[1], "last": 1, "mean": 0}[self.pooling]

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
        losses = _label_losses(self.backbone.lm_head, hidden[batch.label_rows], batch.labels)
        if self.ntp_reduction == "token_mean":
            return losses.mean()
        counts = batch.label_samples.bincount(minlength=len(batch))
        return (losses / counts[batch.label_samples]).sum() / batch.num_targets


def _label_losses(head: Any, hidden: Tensor, labels: Tensor, impl: str = "auto") -> Tensor:
    """[R], -log softmax(head(hidden))[label], in at least fp32 from logits in hidden's dtype.

    "liger" (CUDA, the extra of that name; or the CPU under TRITON_INTERPRET=1) and "chunked" both
    make the logits a few rows at a time, and again in the backward: "chunked" above so many. "auto"
    takes liger where it can run on CUDA.
    """
    reasons = {"liger": lambda: _no_liger(head, hidden), "chunked": always}
    order = ("liger", "chunked") if hidden.is_cuda else ("chunked",)
    if choose("the generative loss", impl, reasons, order) == "liger":
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return liger_fused_linear_cross_entropy(
            hidden,
            head.weight,
            labels,
            bias=head.bias,
            reduction="none",
            accum_dtype=torch.float32,  # of the weight's gradient over its chunks
        )

    def losses(hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(_wide(head(hidden)), labels, reduction="none")

    rows = max(1, _LOGITS // len(head.weight))
    if len(labels) <= rows:
        return losses(hidden, labels)
    pairs = zip(hidden.split(rows), labels.split(rows), strict=True)
    return torch.cat([checkpoint(losses, *pair, use_reentrant=False) for pair in pairs])


def _no_liger(head: Any, hidden: Tensor) -> str | None:
    if reason := _no_liger_here():
        return reason
    if type(head) is not nn.Linear:
        return f"the head is a {type(head).__name__}, it takes a plain nn.Linear"
    return no_triton(hidden.device, hidden.dtype)


@cache
def _no_liger_here() -> str | None:
    try:
        found = version("liger-kernel")
    except PackageNotFoundError:
        return "liger-kernel is not installed; the extra is btok[liger]"
    if Version(found) < Version("0.8.2"):
        return f"liger-kernel {found} has wrong gradients of single losses; 0.8.2 has not"
    return None


def use_condensed_attention(backbone: Any) -> None:
    """Make `condensed_attention` the attention of a transformers model's language model.

    Its forward then needs `layout=CondensedLayout` and takes one packed row, batch size 1. No mask
    interface is registered under the name, so transformers builds no S x S mask.
    """
    from transformers import AttentionInterface

    layer_types = getattr(backbone.config.get_text_config(), "layer_types", None) or ()
    if "sliding_attention" in layer_types:
        raise ValueError(
            "BTokModel: the backbone has layers with sliding-window attention, which condensed "
            "attention does not have; load it with use_sliding_window=False"
        )
    AttentionInterface.register("condensed", _condensed_for_transformers)
    has_vision = hasattr(backbone.config, "vision_config")
    parts = {"text_config": "condensed", "vision_config": "sdpa"}
    backbone.set_attn_implementation(parts if has_vision else "condensed")


def _condensed_for_transformers(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    layout: Any = None,
    condensed_impl: str = "auto",
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
    out = condensed_attention(q, k, v, layout, scale=scaling, impl=condensed_impl)
    return out[None], None


def _place(embeds: Tensor, at: Tensor, features: Tensor) -> Tensor:
    """Put vision features [tokens, D] where `at` [T] is True."""
    return embeds.masked_scatter(at[:, None], features.to(embeds.dtype))


def _wide(tensor: Tensor) -> Tensor:
    """At least fp32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"BTokModel: {name} is {value!r}, expected one of {tuple(allowed)}")
