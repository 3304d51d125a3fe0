"""What takes another way on a GPU than on a CPU, beside Triton's kernels: never run without one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from helpers import VISION, gradients, one_step
from test_step import BASE, PAIRS, model_with

from btok.data.samples import pair_samples
from btok.families.qwen_tower import attention
from btok.vision import Normalization, Vision

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def test_bytes_become_the_same_floats():
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3)[None].repeat(5, 1)
    rules = Normalization((0.481, 0.457, 0.408), (0.268, 0.261, 0.275), repeat=2)
    vision = Vision("image", torch.tensor([[1, 1, 5]]), pixels, normalization=rules)
    there = vision.to("cuda").as_floats().pixels
    assert torch.equal(there.cpu(), vision.as_floats().pixels)


@pytest.mark.parametrize("dim", [64, 72, 80])
def test_images_in_one_call_of_attention(dim):
    """Beside a call for each, both in bf16, against fp32."""
    generator = torch.Generator("cuda").manual_seed(0)
    lengths = [64, 4, 300, 16]
    ends = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    q, k, v = torch.randn(3, 1, 4, sum(lengths), dim, device="cuda", generator=generator)
    options = {"scaling": dim**-0.5, "cu_seq_lens_q": ends, "max_length_q": max(lengths)}
    exact, _ = attention(None, q, k, v, **options)
    q, k, v = (t.bfloat16() for t in (q, k, v))
    got, _ = attention(None, q, k, v, **options)
    each = [
        F.scaled_dot_product_attention(*parts, scale=dim**-0.5)
        for parts in zip(*(t.split(lengths, 2) for t in (q, k, v)), strict=True)
    ]
    low = (torch.cat(each, 2).transpose(1, 2) - exact).abs().max()
    assert (got - exact).abs().max() <= 2 * low + 1e-3


@pytest.mark.parametrize("train_all", [False, True])
@pytest.mark.parametrize("family", VISION)
def test_a_contrastive_step_in_bf16(family, train_all):
    """GradCache, features on the device; beside the CPU in fp32."""
    recipe = dataclasses.replace(BASE, gradcache=True, chunk_tokens=120, reuse_vision=True)
    found = []
    for device, dtype in (("cpu", "float32"), ("cuda", "bfloat16")):
        model, processor = model_with(train_all=train_all, family=family)
        model.to(device)
        samples = pair_samples(PAIRS, processor)
        losses = one_step(
            model, processor, dataclasses.replace(recipe, dtype=dtype), PAIRS, samples
        ).losses
        flat = torch.cat([g.float().cpu().flatten() for g in gradients(model).values()])
        found.append((flat, [float(loss) for loss in losses]))
    (want, exact), (got, rounded) = found
    assert rounded == pytest.approx(exact, rel=0.1)
    assert F.cosine_similarity(got, want, dim=0) > 0.95
