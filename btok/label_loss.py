"""The generative loss at the rows that predict a label, without all logits at once.

    loss[r] = -log softmax(head(hidden[r]))[labels[r]]        fp32, the logits in hidden's dtype

Liger's fused linear cross-entropy makes it on CUDA; elsewhere torch does, a few rows at a time, and
makes the logits again in the backward.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from btok_kernels.launch import Reasons, always, choose, no_triton

LOGITS = 1 << 25  # held at once: 128 MiB in fp32


def at_least_fp32(tensor: Tensor) -> Tensor:
    """The tensor in fp32, or as it is where that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def label_losses(head: Any, hidden: Tensor, labels: Tensor, impl: str = "auto") -> Tensor:
    """-log softmax(head(hidden))[label] of every row.

    Args:
        head: the model's `lm_head`, [D] -> [vocabulary].
        hidden: [R, D], states after the final norm.
        labels: int64 [R].
        impl: "liger" (CUDA, the extra of that name; or the CPU under TRITON_INTERPRET=1),
            "chunked" (any device), or "auto": liger where it can run on CUDA.

    Returns:
        [R], at least fp32.

    Raises:
        ValueError, RuntimeError: an `impl` that is unknown or cannot run here.
    """
    if choose("the generative loss", impl, *implementations(head, hidden)) == "liger":
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
        return F.cross_entropy(at_least_fp32(head(hidden)), labels, reduction="none")

    rows = max(1, LOGITS // len(head.weight))
    if len(labels) <= rows:
        return losses(hidden, labels)
    pairs = zip(hidden.split(rows), labels.split(rows), strict=True)
    return torch.cat([checkpoint(losses, *pair, use_reentrant=False) for pair in pairs])


def implementations(head: Any, hidden: Tensor) -> tuple[Reasons, tuple[str, ...]]:
    """The implementations that could compute `label_losses`, as `launch.choose` takes them: by name
    why each cannot run, asked by a call, which gives None where it can; and the names that "auto"
    tries in turn.
    """
    reasons: Reasons = {"liger": lambda: _no_liger(head, hidden), "chunked": always}
    return reasons, ("liger", "chunked") if hidden.is_cuda else ("chunked",)


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
