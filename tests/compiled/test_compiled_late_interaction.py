"""The compiled kernels of late interaction, executed: scores, the argmax and both gradients."""

from __future__ import annotations

import pytest
import torch
from test_contrastive_loss import gap
from test_late_interaction import differentiate, make, truth
from torch import Tensor

from btok_kernels import late_interaction, launch

if launch.interpreted():
    pytest.skip("Triton compiles nothing under TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

from tests.compiled.cases import GRADIENT_BOUNDS
from tests.compiled.conftest import PROPERTY
from tests.compiled.device import device

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = [  # architecture, dtype, N, K, M, L, D
    (90, BF16, 33, 4, 70, 3, 200),
    (90, BF16, 9, 16, 130, 2, 64),
    (90, FP16, 20, 7, 65, 5, 136),
    (90, FP32, 11, 3, 40, 4, 40),
    (80, BF16, 33, 4, 70, 3, 136),
    (80, FP16, 20, 7, 65, 5, 64),
    (80, BF16, 5, 1, 17, 1, 20),
    (80, FP32, 11, 3, 40, 4, 24),
    (90, BF16, 2, 2, 9, 260, 16),  # an argmax of two bytes
]


@pytest.mark.parametrize(
    ("arch", "dtype", "shape"),
    [(arch, dtype, shape) for arch, dtype, *shape in CASES],
    ids=[f"sm_{arch}-{str(t)[6:]}-{'x'.join(map(str, s))}" for arch, t, *s in CASES],
)
def test_kernels(record_property, monkeypatch, arch, dtype, shape):
    inputs = query, key, _ = make(*shape, dtype=dtype)
    # two tiles of rows, which add to one d key
    monkeypatch.setattr(late_interaction, "_TILE_MAXIMA", -(-shape[0] // 2) * shape[1] * shape[2])
    want, want_grads = truth(*inputs)
    made: list[Tensor] = []
    empty = torch.empty

    def nan(*size, **options):
        made.append(empty(*size, **options))
        return made[-1].fill_(torch.nan if made[-1].is_floating_point() else 99)

    with device(arch) as here, monkeypatch.context() as patch:
        patch.setattr(torch, "empty", nan)
        s, grads = differentiate(
            lambda q, k: late_interaction.maxsim(q, k, impl="triton"), query, key, inputs[2]
        )
    low = differentiate(late_interaction._reference, *inputs)[1]
    bound = GRADIENT_BOUNDS[dtype] + 2 * gap(low, want_grads)
    errors = {"maxima": float((s - want).norm() / want.norm() / 1e-6)}
    for name, got, exact in zip(("d_query", "d_key"), grads, want_grads, strict=True):
        finite = bool(torch.isfinite(got).all())
        errors[f"{name}_tokens"] = gap([got], [exact]) / bound if finite else float("inf")
    record_property(PROPERTY, [arch, str(dtype)[6:], errors])
    assert len(made) >= 4 and set(here.launched) == {f"_{name}_kernel" for name in errors}
    assert max(errors.values()) <= 1, errors
