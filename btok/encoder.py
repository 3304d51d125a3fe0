"""BTokEncoder: texts, images, videos and pages become vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from btok.data.records import Side
from btok.model import BTokModel
from btok.packing import Sample, pack
from btok.processing import Processor


class BTokEncoder:
    """A model and the processor of the same checkpoint."""

    def __init__(self, model: BTokModel, processor: Processor) -> None:
        self.model, self.processor = model, processor

    @torch.no_grad()
    def encode(self, sides: Sequence[Side], batch_tokens: int = 8192) -> np.ndarray:
        """Embed sides, in order, packed to a budget of tokens.

        Args:
            sides: what to embed; ValueError where there is nothing, or one cannot be read.
            batch_tokens: tokens per packed row; a longer side takes a row of its own.

        Returns:
            float32 [N, D], unit norm.
        """
        if not len(sides):
            raise ValueError("BTokEncoder.encode: sides is empty, expected at least one")
        training = self.model.training
        self.model.eval()
        vectors = []
        for samples in self._rows(sides, batch_tokens):
            batch = pack(
                samples,
                btok_token_ids=self.model.btok_token_ids,
                prefix_ids=(),
                suffix_ids=(),
                backbone_config=self.model.backbone.config,
            )
            vectors.append(self.model(batch.to(self.model.backbone.device)).embeddings.cpu())
        self.model.train(training)
        return torch.cat(vectors).float().numpy()

    def _rows(self, sides: Sequence[Side], budget: int) -> Iterator[list[Sample]]:
        """Consecutive sides, as many as fit the budget."""
        row: list[Sample] = []
        tokens = 0
        for side in sides:
            inputs = self.processor(side)
            length = len(inputs["input_ids"]) + len(self.model.btok_token_ids)
            if row and tokens + length > budget:
                yield row
                row, tokens = [], 0
            row.append((inputs, None))
            tokens += length
        yield row
