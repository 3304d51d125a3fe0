"""condensed_attention by pytest-benchmark, forward and forward + backward.

On a CPU: the sdpa path beside torch with a dense mask, in fp32 on a packed row of about 4,000
tokens (sources of 150-600, 4 bottleneck tokens, targets of 5-200; 12 query and 2 key heads of 64).
On a CUDA device: the Triton kernels in bf16 on every length mix, heads of 128; `gpu.py` has the
peers. Every case first checks its result against the reference.
"""

from __future__ import annotations

import pytest
import torch

from bench.peers import PEERS, filled, kept_pairs, mixes, truth

HEADS, KEY_HEADS = 12, 2
if torch.cuda.is_available():
    DEVICE, DTYPE, DIM, TOLERANCE = "cuda", torch.bfloat16, 128, 1e-2
    CASES = [(mix, "triton") for mix in mixes(64)]
else:
    DEVICE, DTYPE, DIM, TOLERANCE = "cpu", torch.float32, 64, 1e-5
    CASES = [("packed row", "sdpa"), ("packed row", "dense mask")]


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize(("mix", "name"), CASES)
def bench_condensed_attention(benchmark, mix, name, direction):
    layout = filled(4000, (150, 600), (5, 200)) if mix == "packed row" else mixes()[mix]
    layout = layout.to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (
        torch.randn(layout.num_rows, heads, DIM, generator=generator).to(DEVICE, DTYPE)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
    )
    backward = direction == "forward+backward"
    for tensor in (q, k, v):
        tensor.requires_grad_(backward)
    attend = PEERS[name](layout)

    def step():
        out = attend(q, k, v)
        results = (out, *torch.autograd.grad(out, (q, k, v), grad)) if backward else (out,)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return results

    for got, expected in zip(step(), truth(layout, q, k, v, grad), strict=False):
        error = (got.detach().float() - expected).norm() / expected.norm()
        assert error < TOLERANCE, "wrong result: not timed"
    benchmark.group = f"{mix}, {direction}"
    benchmark.extra_info |= {
        "tokens": layout.num_rows,
        "sequences": len(layout),
        "impl": name,
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "flops": (14 if backward else 4) * DIM * HEADS * kept_pairs(layout),
    }
    benchmark.pedantic(step, rounds=5, warmup_rounds=1, iterations=1)
