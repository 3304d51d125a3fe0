"""A decoder's MLP that, without gradients, makes two tensors of its width instead of three.

    down_proj(silu(gate_proj(x)) * up_proj(x))

The activation and the product are then written over the gate: the same bits, and at 16,384 rows of
Qwen2-VL-2B in bf16 280 MiB less.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GatedMLP(nn.Module):
    """A gated MLP in place of transformers' own, with the same linear layers.

    Args:
        mlp: with `gate_proj`, `up_proj`, `down_proj` and SiLU between them.
    """

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = mlp.gate_proj, mlp.up_proj
        self.down_proj, self.act_fn = mlp.down_proj, mlp.act_fn
        self.training = mlp.training

    def forward(self, x: Tensor) -> Tensor:
        """`down_proj(silu(gate_proj(x)) * up_proj(x))`, [..., D] -> [..., D]."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        if torch.is_grad_enabled():  # the backward needs what would be written over
            return self.down_proj(self.act_fn(gate) * up)
        return self.down_proj(F.silu(gate, inplace=True).mul_(up))


def use_gated_mlps(backbone: nn.Module) -> None:
    """Put `GatedMLP` in the place of every MLP of its kind, the vision tower's too."""
    from transformers.activations import ACT2FN

    silu = (nn.SiLU, type(ACT2FN["silu"]))
    for module in list(backbone.modules()):
        for name, child in module.named_children():
            linear = [getattr(child, f"{part}_proj", None) for part in ("gate", "up", "down")]
            if None not in linear and isinstance(getattr(child, "act_fn", None), silu):
                setattr(module, name, GatedMLP(child))
