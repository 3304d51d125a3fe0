"""Embedding with bottleneck tokens beside last-token pooling on the same random weights.

btok               BTokModel with K = 4: packed rows, the last layer for the K rows alone
padded last token  as VLM2Vec embeds: transformers' forward with torch's attention on the inputs in
                   the order given, padded in batches of 16 as its evaluation scripts have it, the
                   last layer in full; without the logits, which it makes and nothing needs
packed last token  BTokModel with K = 0: packed rows, the last layer for the last row alone

From lists of token ids to unit vectors: packing and padding are timed, tokenizing is not. A case is
so many inputs of so many tokens, or a set of mixed lengths, log-uniform. On a GPU it is the
language model of Qwen2-VL-2B in bf16. On a CPU it is a twelfth as wide, in fp32, with all 28
layers, since with fewer the last one's shortcut would save more; LONGEST=8192 adds longer inputs,
WIDTH=256 makes it a sixth as wide, where less of the time goes into Python.

Every case first checks the results. Then btok and its peer take turns, btok second in every other
pair: at least `--benchmark-min-rounds` pairs and `--benchmark-max-time` seconds. `ratio` is btok's
time over the peer's, the median over pairs with both quartiles; `cpu_ratio` that of processor time,
which other programs on the machine disturb less (on a GPU, the host's); `predicted` that of
multiply-adds.
"""

from __future__ import annotations

import copy
import math
import os
import random
import statistics
import time
from collections.abc import Sequence
from functools import cache, partial
from itertools import chain, cycle
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from btok.model import BTokModel

BATCH = 16  # inputs that are padded together
BUDGET = 16384  # packed rows at most, BTokEncoder's default
K = 4
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.1}  # rounding moves a bf16 vector by 0.05
PEERS = ("padded last token", "packed last token")


class Shape(NamedTuple):
    """A Qwen2-VL language model; 2B's by default."""

    hidden: int = 1536
    heads: int = 12
    key_heads: int = 2
    mlp: int = 8960
    vocabulary: int = 151936
    layers: int = 28


LENGTHS = [64, 128, 256, 512, 1024, 2048, 4096, 8192]
if torch.cuda.is_available():
    DEVICE, DTYPE, SHAPE = "cuda", torch.bfloat16, Shape()
    # alone, most of an input's time goes into launching: so a batch, too, that one packed row holds
    CASES = [f"{n}x{length}" for length in LENGTHS for n in {1, min(BATCH, 15360 // length)}]
    MIXED = (64, 64, 8192)  # inputs, the shortest, the longest
else:
    width = int(os.environ.get("WIDTH", 128))  # a multiple of 64
    DEVICE, DTYPE, SHAPE = "cpu", torch.float32, Shape(width, 4, 1, width * 93 // 16, 2000)
    CASES = [f"1x{n}" for n in LENGTHS if n <= int(os.environ.get("LONGEST", 2048))]
    MIXED = (32, 64, 512)


class Contestants:
    """One backbone's random weights behind all three; inputs are lists of token ids."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        from transformers import AutoModelForImageTextToText, Qwen2VLConfig

        rope = {"rope_type": "default", "rope_theta": 1e6}
        rope["mrope_section"] = [n * shape.hidden // shape.heads // 16 for n in (2, 3, 3)]
        language = {
            "vocab_size": shape.vocabulary,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.mlp,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.key_heads,
            "rope_parameters": rope,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "initializer_range": shape.hidden**-0.5,  # so that attention is far from uniform
        }
        unused = {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": shape.hidden}
        config = Qwen2VLConfig(text_config=language, vision_config=unused)
        torch.manual_seed(0)
        with torch.device(device):
            backbone = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
        self.stock = copy.deepcopy(backbone, {id(p): p for p in backbone.parameters()})
        btoks = range(shape.vocabulary - K, shape.vocabulary)
        self.btok = BTokModel.from_backbone(backbone, btok_token_ids=btoks).eval()
        self.last = BTokModel.from_backbone(backbone, btok_token_ids=(), pooling="last").eval()

    @torch.no_grad()
    def padded(self, inputs: Sequence[list[int]], rows: int = 1) -> Tensor:
        """Transformers' own: the mean of each input's last `rows` rows, [N, D], unit norm."""
        pooled, device = [], self.stock.device
        for at in range(0, len(inputs), BATCH):
            ids = [torch.tensor(tokens) for tokens in inputs[at : at + BATCH]]
            mask = pad_sequence([torch.ones_like(tokens) for tokens in ids], batch_first=True)
            states = self.stock.model(
                input_ids=pad_sequence(ids, batch_first=True).to(device),
                attention_mask=mask.to(device),
                use_cache=False,
            ).last_hidden_state
            last = mask.sum(1, keepdim=True) + torch.arange(-rows, 0)  # [n, rows]
            pooled.append(states[torch.arange(len(ids))[:, None], last].float().mean(1))
        return F.normalize(torch.cat(pooled), dim=-1)

    @torch.no_grad()
    def packed(self, model: BTokModel, inputs: Sequence[list[int]]) -> Tensor:
        """A model of ours, on rows that are filled as BTokEncoder fills them, [N, D]."""
        rows: list[list[int]] = []
        room = 0
        for i in sorted(range(len(inputs)), key=lambda i: -len(inputs[i])):
            length = len(inputs[i]) + len(model.btok_token_ids)
            if length > room:
                rows.append([])
                room = BUDGET
            rows[-1].append(i)
            room -= length
        batches = (model.pack([{"input_ids": inputs[i]} for i in row]) for row in rows)
        pooled = [model(batch.to(model.backbone.device)).embeddings for batch in batches]
        return torch.cat(pooled)[torch.tensor([i for row in rows for i in row]).argsort()]

    def check(self, inputs: Sequence[list[int]]) -> None:
        """Fail unless our embeddings are the stock model's; for btok, of each [x ; B] alone."""
        tolerance = TOLERANCES[self.stock.dtype]
        btoks = list(self.btok.btok_token_ids)
        alone = torch.cat([self.padded([tokens + btoks], rows=K) for tokens in inputs])
        for name, want in (("btok", alone), ("last", self.padded(inputs))):
            error = float((self.packed(getattr(self, name), inputs) - want).norm(dim=-1).max())
            assert error <= tolerance, f"wrong result of {name}, off by {error:.1e}: not timed"


def multiply_adds(
    shape: Shape, lengths: Sequence[int], pooled: int | None = None, causal: bool = True
) -> int:
    """Of the layers, for sequences of so many rows.

    Args:
        pooled: how many rows of each the last layer is for, keys and values aside; None for all.
        causal: half of attention's square, or all of it, as where torch is given a mask tensor.
    """
    keys = 2 * shape.hidden * shape.key_heads * (shape.hidden // shape.heads)  # a row's, and values
    others = 2 * shape.hidden**2 + 3 * shape.hidden * shape.mlp

    def layer(length: int, rows: int) -> int:
        pairs = rows * length - (rows * (rows - 1) // 2 if causal else 0)
        return length * keys + rows * others + 2 * shape.hidden * pairs

    return sum((shape.layers - 1) * layer(n, n) + layer(n, pooled or n) for n in lengths)


def predicted(shape: Shape, peer: str, lengths: Sequence[int]) -> float:
    """The ratio of btok's multiply-adds to the peer's."""
    ours = multiply_adds(shape, [n + K for n in lengths], pooled=K)
    if peer == "packed last token":
        return ours / multiply_adds(shape, lengths, pooled=1)
    batches = [lengths[at : at + BATCH] for at in range(0, len(lengths), BATCH)]
    padded = [multiply_adds(shape, [max(b)] * len(b), causal=len(set(b)) == 1) for b in batches]
    return ours / sum(padded)


@cache
def prepared(case: str) -> tuple[Contestants, list[list[int]]]:
    """The contestants and random inputs that they embed rightly."""
    three, rng = contestants(SHAPE, DEVICE, DTYPE), random.Random(0)
    if case == "mixed":
        count, *bounds = MIXED
        lengths = [round(math.exp(rng.uniform(*map(math.log, bounds)))) for _ in range(count)]
    else:
        count, length = map(int, case.split("x"))
        lengths = [length] * count
    inputs = [[rng.randrange(SHAPE.vocabulary // 2) for _ in range(n)] for n in lengths]
    three.check(inputs)
    return three, inputs


contestants = cache(Contestants)


@pytest.fixture(scope="module")
def table(request):
    """Lines to be shown after the last case."""
    lines = ["", f"{'':18}{'tokens':>9}  pairs  ratio (quartiles)     cpu_ratio  predicted"]
    yield lines
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n".join(lines))


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("case", [*CASES, "mixed"])
def bench_inference(benchmark, request, table, case, peer):
    three, inputs = prepared(case)
    calls = {
        "btok": partial(three.packed, three.btok),
        "packed last token": partial(three.packed, three.last),
        "padded last token": three.padded,
    }
    times: dict[str, list[tuple[float, float]]] = {"btok": [], peer: []}

    def turn(name: str) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        calls[name](inputs)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times[name].append((time.perf_counter() - wall, time.process_time() - cpu))

    turn(peer), turn("btok")
    once = sum(wall for ((wall, _),) in times.values())
    least, most = (request.config.getoption(f"benchmark_{n}") for n in ("min_rounds", "max_time"))
    pairs = max(least, int(float(most) / once))
    times |= {"btok": [], peer: []}
    turns = chain([1], cycle([0, 2]))  # peer btok, btok peer, peer btok, ...

    def before() -> None:
        for _ in range(next(turns)):
            turn(peer)

    benchmark.pedantic(turn, ("btok",), setup=before, rounds=pairs)
    if len(times[peer]) < pairs:
        turn(peer)
    both = list(zip(times["btok"], times[peer], strict=True))
    wall, cpu = (statistics.quantiles([a[i] / b[i] for a, b in both], n=4) for i in range(2))
    lengths = [len(tokens) for tokens in inputs]
    expected = predicted(SHAPE, peer, lengths)
    benchmark.group = f"{case}, {peer}"
    benchmark.extra_info |= {"peer": peer, "lengths": lengths, "pairs": pairs, **SHAPE._asdict()}
    benchmark.extra_info |= {"ratio": wall[1], "quartiles": wall[::2], "cpu_ratio": cpu[1]}
    benchmark.extra_info |= {"predicted": expected, "threads": torch.get_num_threads()}
    benchmark.extra_info["device"] = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    spread = f"{wall[1]:.3f} ({wall[0]:.3f} - {wall[2]:.3f})"
    table.append(f"{peer:18}{case:>9}{pairs:7}  {spread:22}{cpu[1]:9.3f}{expected:11.3f}")
