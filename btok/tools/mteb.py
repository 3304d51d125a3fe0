"""mteb: an encoder that `mteb.evaluate` takes, for tasks of texts and images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from btok.data.records import Side
from btok.encoder import BTokEncoder

try:
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta, ScoringFunction
    from mteb.types import PromptType
except ImportError as error:
    raise ImportError('btok.tools.mteb needs mteb: pip install "btok[eval]"') from error


class MTEBEncoder(AbsEncoder):
    """`mteb.evaluate(MTEBEncoder(encoder), tasks)`.

    A task's own prompt is the instruction of its queries and of a task without the two roles;
    documents get one only where the task has a prompt for them. An empty input is refused.

    Args:
        encoder: from `BTokEncoder.from_pretrained`; its digest is the model's revision, by which
            mteb's cache knows results.
        name: "organization/model" in the results; None for "btok/" and the checkpoint's folder.

    Raises:
        ImportError: mteb is missing (the extra `eval`).
        ValueError: an encoder that does not know its checkpoint.
    """

    def __init__(self, encoder: BTokEncoder, name: str | None = None) -> None:
        self.encoder = encoder
        values = {
            "revision": encoder.digest,
            "name": name or f"btok/{getattr(encoder.checkpoint, 'name', 'model')}",
            "modalities": ["text", "image"] if encoder.processor.has_vision else ["text"],
            "n_parameters": sum(p.numel() for p in encoder.model.parameters()),
            "embed_dim": encoder.model.backbone.config.get_text_config().hidden_size,
            "similarity_fn_name": ScoringFunction.COSINE,
            "use_instructions": True,
            "framework": ["PyTorch", "Transformers"],
        }
        self.mteb_model_meta = ModelMeta.create_empty(overwrites=values)

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Embed what a DataLoader of mteb gives, in its order: float32 [N, D]."""
        if unknown := kwargs.keys() - {"batch_size", "show_progress_bar"}:
            raise ValueError(f"MTEBEncoder.encode: it does not take {sorted(unknown)}")
        prompt = task_metadata.prompt
        if isinstance(prompt, dict):
            prompt = prompt.get(prompt_type.value) if prompt_type else None
        elif prompt_type == PromptType.document:
            prompt = None
        sides = (side for batch in inputs for side in _sides(batch))
        show = kwargs.get("show_progress_bar", True)
        rows: dict[int, np.ndarray] = {}
        for indices, vectors in self.encoder.encode_iter(sides, prompt, show_progress=show):
            rows |= zip(indices, vectors, strict=True)
        return np.stack([rows[i] for i in range(len(rows))])


def _sides(batch: dict[str, list[Any]]) -> Iterator[Side]:
    """A batch is columns; in `image` a row has an image, a list of them or None."""
    count = len(batch["text"] if "text" in batch else batch["image"])
    texts, images = batch.get("text", [""] * count), batch.get("image", [None] * count)
    for text, image in zip(texts, images, strict=True):
        shown = image if isinstance(image, list) else [image]
        yield Side(text, [x for x in shown if x is not None])
