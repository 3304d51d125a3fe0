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
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from btok_kernels.layout import CondensedLayout, on_device


def pooled_rows_only(language_model: Any, num_rows: int) -> Any:
    """A language model whose last layer gives the last `num_rows` rows of each sequence only.

    It shares all layers and weights with the one given, which stays as it is.

    Args:
        language_model: transformers' decoder of Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen2, Qwen3 or
            Llama: embedding, `layers`, `norm`.
        num_rows: R.

    Returns:
        A decoder to be called the same way, with the `layout` of N sequences without targets, each
        of at least R rows; its last hidden state is [1, N * R, D].
    """
    view, layers = copy.copy(language_model), copy.copy(language_model.layers)
    *_, (name, last) = layers._modules.items()
    # of the layer's own class, with its hooks: FSDP gathers its weights in one
    pooled = object.__new__(type(last))
    pooled.__dict__ |= {**vars(last), "forward": partial(_pooled_rows, last, num_rows)}
    layers._modules = {**layers._modules, name: pooled}
    view._modules = {**view._modules, "layers": layers}
    return view


def _pooled_rows(
    layer: Any,
    num_rows: int,
    hidden: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    layout: CondensedLayout,
    **_: Any,
) -> Tensor:
    """A decoder layer for the last rows of each sequence: [1, T, D] -> [1, N * R, D]."""
    attention = layer.self_attn
    ends = layout.bounds[:, 3:4].long()
    rows = (ends + torch.arange(-num_rows, 0)).flatten()
    rows = on_device(rows, hidden.device)  # [N * R]
    cos, sin = (t[0][:, None] for t in position_embeddings)  # [T, 1, head dim]
    residual, states = hidden[0, rows], layer.input_layernorm(hidden)[0]
    heads = (-1, attention.head_dim)
    k = attention.k_proj(states).unflatten(-1, heads)
    v = attention.v_proj(states).unflatten(-1, heads)
    q = attention.q_proj(states[rows]).unflatten(-1, heads)
    if hasattr(attention, "q_norm"):
        q, k = attention.q_norm(q), attention.k_norm(k)
    q, k = _rotate(q, cos[rows], sin[rows]), _rotate(k, cos, sin)
    out = _attend(q, k, v, layout, num_rows, attention.scaling)
    out = residual + attention.o_proj(out.flatten(1))
    return (out + layer.mlp(layer.post_attention_layernorm(out)))[None]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, layout: CondensedLayout, num_rows: int, scale: float
) -> Tensor:
    """Causal attention of each sequence's last rows, `q` [N * R, Hq, D], on its keys [T, Hkv, D].

    A sequence's keys are laid in a power of two of columns, the last key in the last column; from
    512 on in as many as there are.
    """

    def there(array: np.ndarray) -> Tensor:
        return on_device(torch.from_numpy(array), q.device)

    start, end = layout.bounds.numpy().astype(np.int64)[:, [0, 3]].T[..., None]  # [N, 1]
    by_size: dict[int, list[int]] = defaultdict(list)
    for index, length in enumerate((end - start)[:, 0].tolist()):
        by_size[length if length >= 512 else 1 << (length - 1).bit_length()].append(index)
    per_key = q.shape[1] // k.shape[1]
    q = q.unflatten(0, (-1, num_rows)).unflatten(2, (-1, per_key))  # [N, R, Hkv, G, D]
    outputs = []
    for size, members in by_size.items():
        columns = end[members] - size + np.arange(size)  # [S, L]
        seen = columns[:, None] - end[members, None] <= np.arange(-num_rows, 0)[:, None]
        seen &= (columns >= start[members])[:, None]  # [S, R, L]
        mask = there(seen[:, None].repeat(per_key, 2))
        keys = there(columns.clip(start[members]))  # none of another's
        out = F.scaled_dot_product_attention(
            q[there(np.array(members))].permute(0, 2, 1, 3, 4).flatten(2, 3),  # [S, Hkv, R * G, D]
            k[keys].transpose(1, 2),  # [S, Hkv, L, D]
            v[keys].transpose(1, 2),
            attn_mask=mask,  # [S, 1, R * G, L]
            scale=scale,
        )
        out = out.unflatten(2, (num_rows, per_key)).permute(0, 2, 1, 3, 4)
        outputs.append(out.flatten(2, 3))  # [S, R, Hq, D]
    back = np.argsort([index for members in by_size.values() for index in members])
    return torch.cat(outputs)[there(back)].flatten(0, 1)  # [N * R, Hq, D]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [rows, H, D]: each half of a head is turned with the other."""
    one, two = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-two, one], dim=-1) * sin
