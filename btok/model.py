"""BTokModel: a packed batch goes in, embeddings and the generative loss come out.

hidden = norm(backbone([x ; B ; T] ...))        one pass, condensed_attention in every layer
z      = normalize(mean(hidden[rows of B]))     fp32, per sample
ntp    = mean over samples of the mean over its labels of -log softmax(lm_head(hidden))[label]
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from btok import adapters
from btok.config import CONFIG_NAME, BTokConfig, check_choice
from btok.families import family_of, named_family
from btok.files import IN_GGUF, asked_for, find, must_be_checkpoint, read_json, sha256
from btok.gated_mlp import use_gated_mlps
from btok.label_loss import at_least_fp32, label_losses
from btok.last_layer import pooled_rows_only
from btok.loading import alone
from btok.modules import mark_architecture, write_modules
from btok.packing import PackedBatch, pack
from btok.tokens import Init, add_to_embeddings, add_to_tokenizer
from btok.vision import Vision, join
from btok_kernels.condensed_attention import condensed_attention
from btok_kernels.layout import on_device


class BTokOutput(NamedTuple):
    """What `BTokModel` gives for a packed batch.

    Args:
        embeddings: [N, D], unit norm, at least fp32; empty for a batch packed without bottleneck
            tokens, which a model that pools them cannot embed.
        ntp_loss: scalar, at least fp32, by the model's `ntp_reduction`; None without labels.
        rows: [N, K, D], at least fp32, the bottleneck rows, whose mean at length 1 is the
            embedding; None where another row is pooled.
        reconstruction_loss: as `ntp_loss`, of the texts that are restored.
    """

    embeddings: Tensor
    ntp_loss: Tensor | None
    rows: Tensor | None = None
    reconstruction_loss: Tensor | None = None


class BTokModel(nn.Module):
    """A transformers backbone with condensed attention, whose pooled rows are the embedding.

    Args:
        backbone: a model of one of `btok.families.FAMILIES`; its language model's attention is
            replaced, and gated MLPs by ones that take less memory.
        last_layer: "pooled" (in evaluation mode without gradients, a batch without targets goes
            through the last layer with its pooled rows alone; not with pooling "mean") or "full".
        attention: `impl` of `btok.kernels.condensed_attention`.
        settings: `btok_token_ids`, `pooling` and the others of `btok.config.BTokConfig`.

    Raises:
        ValueError: an unsupported architecture, or settings that do not go together.
    """

    def __init__(
        self, backbone: Any, *, last_layer: str = "pooled", attention: str = "auto", **settings: Any
    ) -> None:
        super().__init__()
        self.family = named_family(backbone.config.model_type, "BTokModel: backbone")
        self.settings = BTokConfig(**settings)
        self.settings.check_width(backbone.config.get_text_config().hidden_size)
        rows, ids = backbone.config.get_text_config().vocab_size, self.settings.btok_token_ids
        if not all(0 <= token < rows for token in ids):
            raise ValueError(
                f"BTokModel: btok_token_ids is {ids}, expected ids below the vocabulary's {rows}"
            )
        check_choice("BTokModel", "last_layer", last_layer, ("pooled", "full"))
        use_condensed_attention(backbone)
        use_gated_mlps(backbone)
        self.backbone = backbone
        self.last_layer = last_layer
        self.attention = attention

    @property
    def btok_token_ids(self) -> Sequence[int]:
        """The vocabulary ids of the K bottleneck tokens, in their order; empty where K = 0."""
        return self.settings.btok_token_ids

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
        last_layer: str = "pooled",
        lora: adapters.Lora | None = None,
        dtype: Any = "auto",
        empty: bool = False,
        show_progress: bool = False,
        **settings: Any,
    ) -> BTokModel:
        """Load a checkpoint or adapters of ours, or a stock one and give it bottleneck tokens.

        Threads that load at once take turns, as transformers' own loading is of a whole process;
        a model that is made without btok meanwhile has no turn.

        Args:
            name_or_path: a folder or a hub id, of a backbone in `btok.families.FAMILIES`. Neither
                code that comes with a checkpoint nor pickled weights are ever loaded.
            num_btoks: K; None for the checkpoint's own, or 4.
            init: first value of new bottleneck rows, see `btok.tokens.add_to_embeddings`.
            last_layer: see the class; not saved.
            lora: new adapters, which alone train, with the K bottleneck rows; None for those that
                `name_or_path` has, if any.
            dtype: of the weights, as transformers takes it.
            empty: on the device meta, without weights, for who gets them from elsewhere.
            show_progress: transformers' own bar while weights are read; downloads have theirs.
            settings: `pooling` and the others of `btok.config.BTokConfig`; left out or None for the
                checkpoint's own, or the defaults ("last" pooling where K = 0).

        Raises:
            ValueError: an unsupported architecture, settings other than a checkpoint of ours has,
                no weights in safetensors files, adapters that do not fit their base model.
            ImportError: adapters without peft, which is the extra `btok[peft]`.
        """
        from transformers import AutoTokenizer, PreTrainedConfig

        base = adapters.base_of(name_or_path)
        weights = name_or_path if base is None else base
        if base is not None and (lora is not None or adapters.base_of(base) is not None):
            raise ValueError(
                f"BTokModel: {name_or_path if lora else base} has adapters already and takes no "
                "others; merge them with `python -m btok export` first"
            )
        config = read_json(weights, "config.json")
        if not config and (found := sorted(Path(weights).glob("*.gguf"))):
            raise ValueError(f"BTokModel: the checkpoint {weights} {IN_GGUF.format(found[0])}")
        if (folder := Path(weights)).is_dir():
            must_be_checkpoint("BTokModel: checkpoint", folder)
        elif not config:  # which tells why: not on the hub, no connection, offline
            with asked_for(weights):
                config, _ = PreTrainedConfig.get_config_dict(weights)
        kind = str(config.get("model_type"))  # no auto class: a checkpoint's own code stays out
        family = named_family(kind, f"BTokModel: the architecture of {weights}")
        saved = BTokConfig.load(name_or_path, kind, num_btoks, **settings)
        if base is not None and saved is None:
            raise ValueError(f"BTokModel: {name_or_path} has adapters but no {CONFIG_NAME}")
        with alone(show_progress):
            backbone = _backbone(weights, family.architecture, dtype, empty)
            if saved is None:
                tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
                ids = add_to_tokenizer(tokenizer, 4 if num_btoks is None else num_btoks)
                add_to_embeddings(backbone, ids, init)
                given = {name: value for name, value in settings.items() if value is not None}
                given.setdefault("pooling", "btok" if ids else "last")
                saved = BTokConfig(ids, **given)
            if base is not None:
                adapters.load(backbone, name_or_path, saved.btok_token_ids)
            elif lora is not None:
                adapters.attach(backbone, lora, saved.btok_token_ids, weights)
        return cls(backbone, last_layer=last_layer, **vars(saved))

    def saved_state(self) -> dict[str, Tensor]:
        """The weights that `save_pretrained` writes, by name, a shared one once: all of the
        backbone's, or its adapters' alone.
        """
        if hasattr(self.backbone, "peft_config"):
            return adapters.state_of(self.backbone)
        again = {name for _, *others in shared_weights(self.backbone) for name in others}
        state = self.backbone.state_dict()
        return {name: weight for name, weight in state.items() if name not in again}

    def save_pretrained(
        self, folder: str | Path, state: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write a plain transformers checkpoint, or the adapters alone; `btok_config.json`, and
        what sentence-transformers reads.

        Args:
            state: the weights, or a part of them; None for those of `saved_state()`.
        """
        folder, state = Path(folder), self.saved_state() if state is None else dict(state)
        config, adapted = self.backbone.config, hasattr(self.backbone, "peft_config")
        plain = self.family.vision is None and not adapted
        if adapted:
            adapters.save(self.backbone, folder, state)
        else:
            with alone():
                self.backbone.save_pretrained(folder, state_dict=state)
            mark_architecture(folder, self.settings, self.family.architecture, plain)
        self.settings.save(folder, config.model_type)
        write_modules(folder, self.settings, config.get_text_config().hidden_size, plain)

    def checkpoint_activations(self, on: bool = True) -> None:
        """Make each layer's activations again in the backward instead of keeping them, or not."""
        new, old = (f"{name}_checkpointing_" for name in ("activation", "gradient"))
        name = new if hasattr(self.backbone, f"{new}enable") else old
        if on:
            getattr(self.backbone, f"{name}enable")({"use_reentrant": False})
        else:
            getattr(self.backbone, f"{name}disable")()
            self.backbone.disable_input_require_grads()  # which transformers leaves behind

    def pack(
        self, sources: Sequence[Mapping[str, Any]], num_btoks: int | None = None
    ) -> PackedBatch:
        """Samples to embed, each as a processor returns it, as one batch without targets.

        Args:
            num_btoks: k, to embed with the first k bottleneck tokens; None for all K.

        Raises:
            ValueError: a k that the model was not trained for; what `btok.packing.pack` refuses.
        """
        settings = self.settings if num_btoks is None else self.settings.with_btoks(num_btoks)
        return pack(
            [(source, None) for source in sources],
            btok_token_ids=settings.btok_token_ids,
            prefix_ids=(),
            suffix_ids=(),
            backbone_config=self.backbone.config,
        )

    def forward(self, batch: PackedBatch, generate: bool = True) -> BTokOutput:
        """Embed a packed batch and, where it has targets, score their generation, in one pass.

        Args:
            batch: from `btok.packing.pack` with this model's settings, on the model's device.
            generate: False leaves that score out; target rows are run all the same.
        """
        if count := self._pooled_rows(batch):
            pooled = self.hidden_states(batch, count).unflatten(0, (len(batch), count))
            ntp_loss = restored = None
        else:
            hidden = self.hidden_states(batch)
            ntp_loss, restored = self._label_losses(hidden, batch) if generate else (None, None)
            pooled = self._pool(hidden, batch)
        rows = at_least_fp32(pooled)
        of_btoks = rows if self.settings.pooling == "btok" and batch.btok_rows.shape[1] else None
        return BTokOutput(F.normalize(rows.mean(1), dim=-1), ntp_loss, of_btoks, restored)

    def hidden_states(self, batch: PackedBatch, last_rows: int | None = None) -> Tensor:
        """The language model's states after its final norm, [T, D]; or with `last_rows` = R, for
        a batch without targets, of the last R rows of each sample only, [N * R, D].
        """
        embeds, onto_layers = self._embed(batch)
        language_model = self.family.decoder(self.backbone)
        if last_rows is not None:
            language_model = pooled_rows_only(language_model, last_rows)
        output = language_model(
            inputs_embeds=embeds[None],
            position_ids=self._position_ids(batch),
            use_cache=False,
            layout=batch.layout,
            condensed_impl=self.attention,
            **onto_layers,
        )
        return output.last_hidden_state[0]

    def _embed(self, batch: PackedBatch) -> tuple[Tensor, dict[str, Any]]:
        """Token embeddings with the vision features in place [T, D]; what a family's language model
        takes besides: features that go onto its first layers' outputs.
        """
        embeds = self.backbone.model.get_input_embeddings()(batch.input_ids)
        levels: list[Tensor] = []  # [T, D] each
        for vision in join(batch.vision):
            features, *deep = self._features(vision)
            at = batch.input_ids == getattr(self.backbone.config, f"{vision.kind}_token_id")
            embeds = _place(embeds, at, features)
            levels = levels or [torch.zeros_like(embeds) for _ in deep]
            levels = [_place(level, at, f) for level, f in zip(levels, deep, strict=True)]
        rules = self.family.vision
        return embeds, rules.onto_layers(levels) if rules and levels else {}

    def _features(self, vision: Vision) -> Sequence[Tensor]:
        """The vision tower's features of pixels, [tokens, D] of each level, made if they are not
        there yet.
        """
        if vision.pixels is None:
            return vision.features
        assert self.family.vision is not None  # or `pack` would have refused the pixels
        return self.family.vision.features(self.backbone.model, vision.as_floats())

    @torch.no_grad()
    def encode_vision(self, shown: Sequence[Vision]) -> list[Vision]:
        """Images and videos with the vision tower's features, made without gradients, in the place
        of their pixels.
        """
        made, rules = list(shown), self.family.vision
        for together in join(shown):
            assert rules is not None
            own = [i for i, vision in enumerate(shown) if vision.kind == together.kind]
            levels = self._features(together.to(self.backbone.device))
            merged = rules.merge_size(self.backbone.config) ** 2
            tokens = [sum(shown[i].patches) // merged for i in own]
            parts = zip(*(level.split(tokens) for level in levels), strict=True)
            for i, features in zip(own, parts, strict=True):
                made[i] = replace(shown[i], pixels=None, features=features)
        return made

    def _position_ids(self, batch: PackedBatch) -> Tensor:
        """The position ids of a packed batch: [3, 1, T], or [1, T] where there is one axis."""
        if self.settings.vision_positions == "text":
            rows = torch.arange(len(batch.input_ids), device=batch.input_ids.device)
            for start, _, _, _, end in batch.layout.sequences():
                rows[start:end] -= start
            return rows[None]
        return batch.position_ids[:, None] if self.family.mrope else batch.position_ids[:1]

    def ntp_count(self, batch: PackedBatch) -> int:
        """The number that `ntp_loss` is a mean over: the weight of a batch's loss beside other
        batches'.
        """
        if self.settings.ntp_reduction == "sample_mean":
            return batch.num_targets
        return len(batch.labels) - batch.num_restored_labels

    def reconstruction_count(self, batch: PackedBatch) -> int:
        """The number that `reconstruction_loss` is a mean over, as for `ntp_count`."""
        if self.settings.ntp_reduction == "sample_mean":
            return batch.num_restored
        return batch.num_restored_labels

    def _pooled_rows(self, batch: PackedBatch) -> int:
        """The number of rows per sample that the last layer must compute; 0 for all of them."""
        border, end = batch.layout.bounds[:, 2], batch.layout.bounds[:, 3]
        config = self.backbone.config
        vision = self.family.vision  # whose levels go onto as many layers' outputs
        levels = vision.num_levels(config.vision_config) if vision else 0
        if (
            self.last_layer == "full"
            or torch.is_grad_enabled()
            or self.backbone.training  # dropout is drawn as in the pass with gradients
            or not border.equal(end)
            or levels >= config.get_text_config().num_hidden_layers
        ):
            return 0
        return {"btok": batch.btok_rows.shape[1], "last": 1, "mean": 0}[self.settings.pooling]

    def _pool(self, hidden: Tensor, batch: PackedBatch) -> Tensor:
        """The pooled rows [N, R, D] of each sample, whose mean becomes its embedding; N = 0 for a
        batch packed without the bottleneck tokens that are pooled.
        """
        if self.settings.pooling == "btok":
            if not batch.btok_rows.shape[1]:
                return hidden.new_empty(0, 1, hidden.shape[1])
            return hidden[batch.btok_rows]
        if self.settings.pooling == "last":
            rows = batch.layout.bounds[:, 2:3].long() - 1
            return hidden[on_device(rows, hidden.device)]
        bounds = batch.layout.sequences()
        means = [at_least_fp32(hidden[s:border]).mean(0) for s, _, _, border, _ in bounds]
        return torch.stack(means)[:, None]

    def _label_losses(
        self, hidden: Tensor, batch: PackedBatch
    ) -> tuple[Tensor | None, Tensor | None]:
        """The loss of what targets generate and that of what is restored; None for each that is
        absent.
        """
        if not len(batch.labels):
            return None, None
        losses = label_losses(self.backbone.lm_head, hidden[batch.label_rows], batch.labels)
        if self.settings.ntp_reduction == "sample_mean":
            counts = torch.zeros(len(batch), device=losses.device)
            counts.index_add_(0, batch.label_samples, torch.ones_like(losses, dtype=counts.dtype))
            losses = losses / counts[batch.label_samples]
        generated, restored = self.ntp_count(batch), self.reconstruction_count(batch)
        if not restored:
            return losses.sum() / generated, None
        # not picked out by the mask: the host would wait to learn how many they are
        again = torch.where(batch.restored, losses, 0).sum() / restored
        if not generated:
            return None, again
        return torch.where(batch.restored, 0, losses).sum() / generated, again


def _backbone(weights: str | Path, name: str, dtype: Any, empty: bool) -> Any:
    """The model of this class of transformers, with a checkpoint's weights or on meta."""
    import transformers

    architecture = getattr(transformers, name)
    try:
        if empty:
            config = architecture.config_class.from_pretrained(weights)
            with torch.device("meta"):
                return architecture._from_config(config, dtype=dtype)
        return architecture.from_pretrained(weights, dtype=dtype, use_safetensors=True)
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


def shared_weights(module: nn.Module) -> list[list[str]]:
    """The names of each parameter that has several, as of an embedding that is the head too."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        names.setdefault(p, []).append(name)
    return [of_one for of_one in names.values() if len(of_one) > 1]


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
    parts = {"text_config": "condensed", "vision_config": "sdpa"}
    rules = family_of(backbone.config).vision
    backbone.set_attn_implementation(parts if rules else "condensed")
    if rules:
        rules.prepare(backbone)


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
    # under autocast the rotary embedding leaves q and k in fp32, and v is what a product gives
    q, k, v = (t[0].transpose(0, 1).to(value.dtype) for t in (query, key, value))
    out = condensed_attention(q, k, v, layout, scale=scaling, impl=condensed_impl)
    return out[None], None


def _place(embeds: Tensor, at: Tensor, features: Tensor) -> Tensor:
    """Put vision features [tokens, D] where `at` [T] is True."""
    if features.shape[-1] != embeds.shape[-1]:  # which masked_scatter would take row by row
        raise ValueError(
            f"BTokModel: the vision tower gives features of width {features.shape[-1]}, the "
            f"language model has {embeds.shape[-1]}"
        )
    return embeds.masked_scatter(at[:, None], features.to(embeds.dtype))


def model_digest(checkpoint: str | Path) -> str:
    """sha256 of a checkpoint's weights (safetensors) and `btok_config.json`; 3 s for 4 GB.

    Of adapters also what scales them, and the base model they name.
    """
    total = hashlib.sha256()
    files = sorted(Path(checkpoint).glob("*model*.safetensors"))
    if not files:
        raise ValueError(f"checkpoint {checkpoint} holds no weights as *model*.safetensors")
    for path in [*files, Path(checkpoint) / CONFIG_NAME]:
        if path.exists():
            total.update(bytes.fromhex(sha256(path)))
    if base := adapters.base_of(checkpoint):
        lora = read_json(checkpoint, adapters.CONFIG_NAME)
        total.update(repr([lora.get(name) for name in ("r", "lora_alpha", "use_dora")]).encode())
        folder = find(base, "config.json")
        total.update(model_digest(folder.parent if folder else base).encode())
    return total.hexdigest()
