"""The last decoder layer for the pooled rows alone: all that an embedding needs of it.

    K, V   = rope(k_proj(norm(hidden))), v_proj(norm(hidden))         all T rows
    h      = hidden[rows] + o_proj(attention(rope(q_proj(norm(hidden[rows]))), K, V))
    h      = h + mlp(norm(h))                                         the N R pooled rows

The pooled rows are the last R of each sequence [x ; B]. Sequences whose lengths round up to the
same power of two share a call of torch's fused attention, with a mask of R rows.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from btok_kernels.layout import CondensedLayout


def pooled_rows_only(language_model: Any, layout: CondensedLayout, num_rows: int) -> Any:
    """A language model whose last layer gives the last `num_rows` rows of each sequence only.

    It shares all layers and weights with the one given, which stays as it is.

    Args:
        language_model: transformers' decoder of Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen2, Qwen3 or
            Llama: embedding, `layers`, `norm`.
        layout: of N sequences without targets, each of at least `num_rows` rows.
        num_rows: R.

    Returns:
        A decoder to be called the same way; its last hidden state is [1, N * R, D].
    """
    view = copy.copy(language_model)
    layers = [*language_model.layers[:-1], _PooledRows(language_model.layers[-1], layout, num_rows)]
    view._modules = {**language_model._modules, "layers": nn.ModuleList(layers)}
    return view


class _PooledRows(nn.Module):
    """A decoder layer for the last `num_rows` rows of each sequence."""

    def __init__(self, layer: Any, layout: CondensedLayout, num_rows: int) -> None:
        super().__init__()
        self.layer, self.layout, self.num_rows = layer, layout, num_rows

    def forward(
        self, hidden: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: Any
    ) -> Tensor:
        """`hidden` [1, T, D] -> [1, N * R, D]."""
        layer, attention = self.layer, self.layer.self_attn
        ends = self.layout.bounds[:, 3:].long()
        rows = (ends + torch.arange(-self.num_rows, 0)).flatten().to(hidden.device)  # [N * R]
        cos, sin = (t[0][:, None] for t in position_embeddings)  # [T, 1, head dim]
        residual, states = hidden[0, rows], layer.input_layernorm(hidden)[0]
        heads = (-1, attention.head_dim)
        k = attention.k_proj(states).unflatten(-1, heads)
        v = attention.v_proj(states).unflatten(-1, heads)
        q = attention.q_proj(states[rows]).unflatten(-1, heads)
        if hasattr(attention, "q_norm"):
            q, k = attention.q_norm(q), attention.k_norm(k)
        q, k = _rotate(q, cos[rows], sin[rows]), _rotate(k, cos, sin)
        out = _attend(q, k, v, self.layout, self.num_rows, attention.scaling)
        out = residual + attention.o_proj(out.flatten(1))
        return (out + layer.mlp(layer.post_attention_layernorm(out)))[None]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, layout: CondensedLayout, num_rows: int, scale: float
) -> Tensor:
    """Causal attention of each sequence's last rows, `q` [N * R, Hq, D], on its keys [T, Hkv, D].

    A sequence's keys are laid in a power of two of columns, the last key in the last column; from
    512 on in as many as there are.
    """
    by_size: dict[int, list[int]] = defaultdict(list)
    lengths = (layout.bounds[:, 3] - layout.bounds[:, 0]).tolist()
    for index, length in enumerate(lengths):
        by_size[length if length >= 512 else 1 << (length - 1).bit_length()].append(index)
    per_key = q.shape[1] // k.shape[1]
    q = q.unflatten(0, (-1, num_rows)).unflatten(2, (-1, per_key))  # [N, R, Hkv, G, D]
    outputs, order = [], []
    for size, members in by_size.items():
        start, end = layout.bounds[members][:, ::3, None].long().unbind(1)  # [S, 1]
        columns = end - size + torch.arange(size)  # [S, L]
        seen = columns[:, None] <= end[:, None] + torch.arange(-num_rows, 0)[:, None]  # [S, R, L]
        mask = (seen & (columns >= start)[:, None])[:, None].to(q.device)
        keys = columns.clamp(min=start).to(q.device)  # none of another sequence's
        queries = q[members].permute(0, 2, 1, 3, 4).flatten(2, 3)  # [S, Hkv, R * G, D]
        out = F.scaled_dot_product_attention(
            queries,
            k[keys].transpose(1, 2),  # [S, Hkv, L, D]
            v[keys].transpose(1, 2),
            attn_mask=mask.repeat_interleave(per_key, 2),  # [S, 1, R * G, L]
            scale=scale,
        )
        out = out.unflatten(2, (num_rows, per_key)).permute(0, 2, 1, 3, 4)
        outputs.append(out.flatten(2, 3))  # [S, R, Hq, D]
        order += members
    back = torch.tensor(order, device=q.device).argsort()
    return torch.cat(outputs)[back].flatten(0, 1)  # [N * R, Hq, D]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [rows, H, D]: each half of a head is turned with the other."""
    one, two = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-two, one], dim=-1) * sin
