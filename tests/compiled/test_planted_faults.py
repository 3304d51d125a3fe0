"""Faults planted in the compiled code, or in the kernels' source before it is compiled, are found.

Each is a small change of the kind a compiler or an author makes. A fault that changes nothing any
more (its pattern is gone) fails here too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from btok_kernels import launch

if launch.interpreted():
    pytest.skip("Triton compiles nothing under TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

from btok_kernels import condensed_attention_triton, contrastive_loss_triton
from tests.compiled.cases import LAYOUTS, attention, contrastive
from tests.compiled.memory import Fault

BF16 = torch.bfloat16


def run_attention(arch, rewrite=None):
    return attention(arch, BF16, 64, (4, 2), LAYOUTS["ragged"], rewrite=rewrite)


def run_contrastive(arch, rewrite=None, chunk=0):
    options = {"h": 1, "ids": True, "margin": 0.1, "bidirectional": True}
    return contrastive(arch, BF16, 140, 136, chunk=chunk, rewrite=rewrite, **options)


def run_chunks(arch, rewrite=None):
    return run_contrastive(arch, rewrite, chunk=64)


def dropped(pattern: str, nth: int = 0) -> Callable[[str], str]:
    """The PTX without the nth of the lines that match."""
    return changed(pattern, lambda line: "", nth)


def changed(pattern: str, change: Callable[[str], str], nth: int = 0) -> Callable[[str], str]:
    """The PTX with the nth of the lines that match changed."""

    def rewrite(text: str) -> str:
        lines = text.split("\n")
        found = [i for i, line in enumerate(lines) if re.search(pattern, line.split("//")[0])]
        assert len(found) > nth, f"{pattern} is {len(found)} times in the code"
        changed = change(lines[found[nth]])
        assert changed != lines[found[nth]]
        lines[found[nth]] = changed
        return "\n".join(lines)

    return rewrite


def later(text: str) -> str:
    """One more group may still be in flight."""
    return re.sub(r"(\d+);", lambda found: f"{int(found[1]) + 1};", text)


def other_swizzle(text: str) -> str:
    """A descriptor's constant with another layout in its two highest bits."""
    return re.sub(r"(\d{17,});", lambda found: f"{int(found[1]) ^ (1 << 62)};", text)


def transposed(text: str) -> str:
    """The last flag of a warpgroup's product: B lies the other way."""
    return re.sub(r"([01]);", lambda found: f"{1 - int(found[1])};", text)


def swapped(text: str) -> str:
    """The descriptors of A and B."""
    return re.sub(r"(%rd\d+), (%rd\d+)", r"\2, \1", text)


def truncated(text: str) -> str:
    """The low half is dropped instead of rounded into bf16."""
    return re.sub(
        r"cvt\.rn\.bf16x2\.f32\s+(%r\d+), (%r\d+), (%r\d+);",
        r"prmt.b32 \1, \3, \2, 0x7632;",
        text,
    )


FORWARD, DKDV, DQ = "_forward_kernel", "_dkdv_kernel", "_dq_kernel"
IN_CODE = {  # name: architecture, op, kernel, change of its PTX
    "the wait for copies": (90, run_attention, FORWARD, dropped(r"cp\.async\.wait_group")),
    "a wait for copies, sm_80": (80, run_attention, DQ, dropped(r"cp\.async\.wait_group")),
    "a wait for all copies but one more": (
        90, run_attention, FORWARD, changed(r"cp\.async\.wait_group", later),
    ),
    "a copy's commit": (80, run_attention, FORWARD, dropped(r"cp\.async\.commit_group", 1)),
    "a wait for products": (90, run_attention, DKDV, dropped(r"wgmma\.wait_group", 1)),
    "a wait for products but the newest": (
        90, run_attention, FORWARD, changed(r"wgmma\.wait_group", later),
    ),
    "the fence before a product": (90, run_attention, DKDV, dropped(r"fence\.proxy\.async")),
    "a barrier": (90, run_attention, FORWARD, dropped(r"bar\.sync", 1)),
    "a barrier, sm_80": (80, run_attention, DKDV, dropped(r"bar\.sync", 8)),
    "a barrier of the loss": (90, run_contrastive, "_sums_kernel", dropped(r"bar\.sync", 1)),
    "a transposed operand": (90, run_attention, FORWARD, changed(r"wgmma\.mma", transposed)),
    "a wrong swizzle": (90, run_attention, DKDV, changed(r"\d{17,};", other_swizzle)),
    "swapped operands": (90, run_attention, FORWARD, changed(r"wgmma\.mma.*%rd.*%rd", swapped)),
    "a matrix read untransposed": (
        80, run_attention, FORWARD,
        changed(r"ldmatrix.*\.trans", lambda line: line.replace(".trans", "")),
    ),
    "bf16 cut off": (90, run_attention, FORWARD, truncated),
    "a copy of rows behind the end": (
        90, run_attention, FORWARD,
        lambda text: re.sub(r"(cp\.async\.c[ga].*0x10), %r\d+;", r"\1, 16;", text),
    ),
    "an address of the next row": (
        80, run_attention, DQ,
        changed(r"st\.global", lambda line: line.replace("+ 0", "+ 128")),
    ),
}  # fmt: skip


@contextmanager
def source(module: object, kernel: str, old: str, new: str) -> Iterator[None]:
    """A kernel compiled from a changed source, and what calls it compiled again."""
    functions = [f for f in vars(module).values() if hasattr(f, "_unsafe_update_src")]
    target = getattr(module, kernel)
    before = target.src
    assert old in before, f"{old!r} is not in {kernel}"
    try:
        target._unsafe_update_src(before.replace(old, new))
        forget(functions)
        yield
    finally:
        target._unsafe_update_src(before)
        forget(functions)


def forget(functions: list) -> None:
    for function in functions:
        function.hash = None
        function.device_caches.clear()


ATTENTION, LOSS = condensed_attention_triton, contrastive_loss_triton
IN_SOURCE = {  # name: architecture, op, module, function, its text, the text instead
    "a row that does not see itself": (
        90, run_attention, ATTENTION, "_attend",
        "offs_n[None, :] <= position[:, None]", "offs_n[None, :] < position[:, None]",
    ),
    "dK and dV under another mask": (
        90, run_attention, ATTENTION, "_gather_rows",
        "<= (packed // G)[None, :]", "< (packed // G)[None, :]",
    ),
    "dQ under another mask": (
        80, run_attention, ATTENTION, "_gather_keys",
        "offs_n[None, :] <= position[:, None]", "offs_n[None, :] <= position[:, None] + 1",
    ),
    "a block too many without a mask": (
        90, run_attention, ATTENTION, "_row_block",
        "whole = low // BLOCK_N * BLOCK_N", "whole = (low + BLOCK_N - 1) // BLOCK_N * BLOCK_N",
    ),
    "scores rounded to bf16": (
        90, run_attention, ATTENTION, "_attend",
        's = tl.dot(q, k.T, input_precision="ieee")',
        's = tl.dot(q, k.T, input_precision="ieee").to(tl.bfloat16).to(tl.float32)',
    ),
    "delta left out": (
        80, run_attention, ATTENTION, "_gather_rows", "(dpt - delta[None, :])", "dpt",
    ),
    "a row too many": (
        90, run_attention, ATTENTION, "_dq_kernel", "mask_m = packed < rows",
        "mask_m = packed <= rows",
    ),
    "another head": (
        90, run_attention, ATTENTION, "_dq_kernel",
        "row * stride_dot + head * G * stride_doh", "row * stride_dot + head * stride_doh",
    ),
    "a positive off by one": (
        90, run_contrastive, LOSS, "_mask",
        "rows[:, None] == cols[None, :]", "rows[:, None] == cols[None, :] + 1",
    ),
    "another margin": (
        80, run_contrastive, LOSS, "_logits", "shift > margin", "shift > margin * 0.5",
    ),
    "rows of another panel": (
        90, run_contrastive, LOSS, "_d_candidates_kernel",
        "mask_n = offs_n < N", "mask_n = offs_n < N - 1",
    ),
    "columns summed without their last row tile": (
        80, run_chunks, LOSS, "_columns_kernel",
        "mask_n, mask_m = offs_n < N, cols < M", "mask_n, mask_m = offs_n < N - 1, cols < M",
    ),
    "gradients of rows by the columns' sums": (
        90, run_chunks, LOSS, "_d_logits",
        "d_columns = tl.exp(logits - lse[None, :])",
        "d_columns = tl.exp(logits - row_lse[:, None])",
    ),
}  # fmt: skip


def killed(run: Callable[[], dict[str, float]]) -> bool:
    try:
        return max(run().values()) > 1
    except Fault:
        return True


def halved(faults: dict) -> list:
    """Every second fault, of all kinds, in `make test`; the others in `make test-full`."""
    return [pytest.param(x, marks=[pytest.mark.full] * (i % 2)) for i, x in enumerate(faults)]


@pytest.mark.parametrize("name", halved(IN_CODE))
def test_faults_in_the_compiled_code(name):
    arch, op, kernel, change = IN_CODE[name]
    assert killed(lambda: op(arch, {kernel: change}))


@pytest.mark.parametrize("name", halved(IN_SOURCE))
def test_faults_in_the_source(name):
    arch, op, module, kernel, old, new = IN_SOURCE[name]
    with source(module, kernel, old, new):
        assert killed(lambda: op(arch))
