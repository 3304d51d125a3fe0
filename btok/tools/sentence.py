"""sentence-transformers: a checkpoint as a `SentenceTransformer` of one module.

inputs -> a padded batch -> padding dropped, packed -> BTokModel -> `sentence_embedding`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from btok.data.records import Side
from btok.encoder import BTokEncoder
from btok.families import family_of
from btok.files import read_json
from btok.inputs import as_side, with_frames
from btok.model import BTokModel, use_condensed_attention
from btok.modules import MODULES, STOCK
from btok.processing import Processor
from btok.vision import KEYS, by_name

try:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import InputModule
except ImportError as error:
    raise ImportError(
        "btok.load_sentence_transformer needs sentence-transformers: "
        'pip install "btok[sentence-transformers]"'
    ) from error


def load_sentence_transformer(
    name_or_path: str | Path, *, device: str | None = None, **settings: Any
) -> SentenceTransformer:
    """A checkpoint as a `SentenceTransformer`, without `trust_remote_code`.

    `encode` takes texts (a str is always a text), PIL images, uint8 arrays [height, width, 3] and
    dicts of "text", "image" (one or a list) and "video" (frames or a file); a `prompt` goes before
    the text as an `instruction` of `BTokEncoder` does. An empty input is refused. `save` writes a
    checkpoint that both this function and `BTokEncoder.from_pretrained` load.

    Args:
        name_or_path: a folder or a hub id, saved by sentence-transformers or not.
        device: None for the best there is.
        settings: as `BTokModel.from_pretrained` takes them.

    Raises:
        ImportError: sentence-transformers is missing (the extra `sentence-transformers`).
        ValueError: a checkpoint saved with more modules than ours; what `BTokModel` refuses.
    """
    names = [module["type"] for module in read_json(name_or_path, MODULES, list)]
    if len(names) > 1 and names != list(STOCK):  # which ours takes the place of
        raise ValueError(
            f"load_sentence_transformer: {name_or_path} was saved with the modules {names}, "
            "expected BTokTransformer alone; use SentenceTransformer(..., trust_remote_code=True)"
        )
    saved = read_json(name_or_path, "config_sentence_transformers.json")
    kept = ("prompts", "default_prompt_name", "similarity_fn_name", "truncate_dim")
    encoder = BTokEncoder.from_pretrained(name_or_path, **settings)
    module = BTokTransformer(encoder.model, encoder.processor)
    options = {name: saved[name] for name in kept if name in saved}
    return SentenceTransformer(modules=[module], device=device, **options)


class BTokTransformer(InputModule):
    """The one module of such a model: it reads inputs, unpads, packs and pools.

    Args:
        model, processor: of the same checkpoint.
    """

    def __init__(self, model: BTokModel, processor: Processor) -> None:
        super().__init__()
        self.model, self.processor = model, processor

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled module; registers the attention, which a worker of a multi-process pool
        has not yet done.
        """
        super().__setstate__(state)
        use_condensed_attention(self.model.backbone)

    @property
    def modalities(self) -> list[Any]:
        # "message" is what sentence-transformers calls a batch of mixed inputs
        return ["text", "image", "video", "message"] if self.processor.has_vision else ["text"]

    @property
    def tokenizer(self) -> Any:  # type: ignore[override]
        return self.processor.tokenizer

    @property
    def max_seq_length(self) -> None:
        """None: inputs are never cut, and there is no setter that would only seem to."""

    def get_embedding_dimension(self) -> int:
        return self.model.backbone.config.get_text_config().hidden_size

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Inputs as a padded batch: `input_ids`, `attention_mask` int64 [N, L], and all patches."""
        if unknown := kwargs.keys() - {"task"}:
            raise ValueError(f"BTokTransformer.preprocess: it does not take {sorted(unknown)}")
        samples = [self._read(value, prompt) for value in inputs]
        ids = [sample["input_ids"] for sample in samples]
        features = {
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
        }
        for key in {key for sample in samples for key in sample} - {"input_ids"}:
            features[key] = torch.cat([sample[key] for sample in samples if key in sample])
        return features

    def _read(self, value: Any, prompt: str | None) -> dict[str, Any]:
        try:
            # by name, as the losses of sentence-transformers cut them into minibatches
            return by_name(self.processor(with_frames(as_side(_side(value), prompt))))
        except Exception as error:  # of a TypeError sentence-transformers would try again
            raise ValueError(f"BTokTransformer: input {value!r:.80}: {error}") from error

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        samples = unpad(features, self.model.backbone.config)
        output = self.model(self.model.pack(samples).to(self.model.backbone.device))
        return features | {"sentence_embedding": output.embeddings}

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Write the checkpoint; always as safetensors."""
        self.model.save_pretrained(output_path)
        self.processor.save_pretrained(output_path)

    @classmethod
    def load(  # type: ignore[override]
        cls, model_name_or_path: str, **options: Any
    ) -> BTokTransformer:
        """Load a checkpoint's module for `SentenceTransformer(..., trust_remote_code=True)`."""
        names = ("subfolder", "token", "cache_folder", "revision", "local_files_only")
        folder = cls.load_dir_path(model_name_or_path, **{n: options[n] for n in names})
        settings = options.get("model_kwargs") or {}
        encoder = BTokEncoder.from_pretrained(folder or model_name_or_path, **settings)
        return cls(encoder.model, encoder.processor)


def unpad(features: Mapping[str, Any], config: Any) -> list[dict[str, Tensor]]:
    """The samples of a padded batch, each as a processor returns it.

    Args:
        features: `input_ids`, `attention_mask` [N, L], padded on any side; `pixel_values`,
            `image_grid_thw` and so on of all samples in row order.
        config: the backbone's, for the vision token ids and the merge size.
    """
    mask = features["attention_mask"].bool().cpu()
    rows = [ids[kept] for ids, kept in zip(features["input_ids"].cpu(), mask, strict=True)]
    samples: list[dict[str, Tensor]] = [{"input_ids": ids} for ids in rows]
    vision = family_of(config).vision
    for kind, (patches, grid) in KEYS.items():
        if vision is None or features.get(grid) is None:
            continue
        others = (grid, *(vision.per_video if kind == "video" else ()))
        merged = vision.merge_size(config) ** 2
        token = getattr(config, f"{kind}_token_id")
        sizes = [merged * int((ids == token).sum()) for ids in rows]  # patches of each sample
        ends = features[grid].cpu().prod(1).cumsum(0)
        ends = torch.searchsorted(ends, torch.tensor(sizes).cumsum(0), right=True)
        counts = ends.diff(prepend=torch.zeros(1, dtype=torch.int64)).tolist()
        split = {patches: features[patches].split(sizes)}
        split |= {key: features[key].cpu().split(counts) for key in others if key in features}
        for key, parts in split.items():
            for sample, part in zip(samples, parts, strict=True):
                if len(part):
                    sample[key] = part
    return samples


def _side(value: Any) -> Any:
    """A dict of sentence-transformers' as a side; anything else as it is."""
    if not isinstance(value, Mapping):
        return value
    if unknown := value.keys() - {"text", "image", "video"}:
        raise ValueError(f"it has the keys {sorted(unknown)}, expected text, image and video")
    images = value.get("image", ())
    images = images if isinstance(images, list | tuple) else [images]
    return Side(value.get("text", ""), images, value.get("video", ()))
