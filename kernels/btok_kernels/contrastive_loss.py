"""Contrastive loss (InfoNCE) of this rank's queries against the keys and negatives of all ranks.

    s = query @ [key ; negatives].T
    loss_i = logsumexp_j(s_ij / tau) - s_ii / tau,    j over the candidates that row i keeps
    loss = mean_i loss_i,    or half the sum of that and of the same over columns of query @ key.T

for M rows, N of them on this rank, each with its key and h negatives. The N x M logits are never
materialised, nor a graph through them: memory is a few tiles of them plus O((N + M) D). Steps:

    1. agree with the other ranks on shapes and options, so that a mistake raises on all of them
    2. gather keys, negatives and ids in one collective, padded to the largest rank on the way; on
       CUDA this rank's are worked on meanwhile, and where they are large each rank's are a
       broadcast of their own, worked on while the next is under way
    3. bidirectional: sweep the row tiles for each column's log-sum-exp, combine these over ranks
    4. sweep the row tiles for the loss and d logits, which go at once into d query (complete),
       d candidates (this rank's part) and d tau
    5. reduce-scatter d candidates: each rank keeps the sum for its own keys and negatives

A tile is some rows of this rank against all columns, so the columns need no gathered queries. The
gradients are made in the forward; the backward only scales them, without work or communication.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .launch import always, choose, no_triton
from .ranks import Ranks, agree, is_group, join

_TILE_LOGITS = 1 << 20  # logits of one tile, which has at least one row; 16 times that on a GPU


def _reference(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    *,
    temperature: float | Tensor,
    bidirectional: bool = False,
    margin: float | None = None,
) -> Tensor:
    """The specification: the loss of each row of a whole batch, [M], dense and in at least fp32."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    s = query.to(dtype) @ key.to(dtype).T
    own = torch.eye(len(s), dtype=torch.bool, device=s.device)
    same = own if query_ids is None or key_ids is None else query_ids[:, None] == key_ids

    def direction(s: Tensor, own: Tensor, same: Tensor) -> Tensor:
        positive = s.diagonal()
        drop = same if margin is None else same | (s > positive[:, None] + margin)
        logits = (s / temperature).masked_fill(drop & ~own, -torch.inf)
        return logits.logsumexp(1) - positive / temperature

    columns = direction(s.T, own, same.T) if bidirectional else None
    if negatives is not None:
        s = torch.cat([s, query.to(dtype) @ negatives.to(dtype).flatten(0, 1).T], 1)
        own, same = (F.pad(mask, (0, s.shape[1] - len(s))) for mask in (own, same))
    rows = direction(s, own, same)
    return rows if columns is None else (rows + columns) / 2


class Call(NamedTuple):
    """The arguments of one call on this rank, as `contrastive_loss` documents them."""

    query: Tensor
    key: Tensor
    temperature: float | Tensor = 0.02
    negatives: Tensor | None = None
    query_ids: Tensor | None = None
    key_ids: Tensor | None = None
    bidirectional: bool = False
    margin: float | None = None
    group: dist.ProcessGroup | Literal["local"] | None = None
    deterministic: bool = True
    impl: str = "auto"

    @property
    def inputs(self) -> tuple[Any, ...]:
        """What may have a gradient, in the order of LossAndGrad."""
        return self.query, self.key, self.negatives, self.temperature


class _Plan(NamedTuple):
    """What all ranks do, as they agreed."""

    ranks: Ranks
    with_grad: bool
    impl: str  # that runs


class LossAndGrad(NamedTuple):
    """A loss and its gradients, in the inputs' shapes and dtypes; None for what is no tensor."""

    loss: Tensor
    d_query: Tensor
    d_key: Tensor
    d_negatives: Tensor | None
    d_temperature: Tensor | None


class _Batch:
    """This rank's N rows, by tiles of c, against the E = 1 + h candidates of each of all M rows."""

    def __init__(self, call: Call, ranks: Ranks) -> None:
        self.call, self.ranks = call, ranks
        dtype = torch.promote_types(call.query.dtype, torch.float32)
        key = call.key[:, None]  # [N, 1, D]
        shard = key if call.negatives is None else torch.cat([key, call.negatives], 1)  # [N, E, D]
        self.query = call.query.to(dtype)  # [N, D]
        shards, *ids = ranks.shards(shard, *(() if call.key_ids is None else (call.key_ids,)))
        self.candidates = join(shards).to(dtype)  # [M, E, D]
        self.key_ids = join(ids[0]) if ids else None  # [M]
        tau = call.temperature
        if not isinstance(tau, Tensor):  # filled in there: a copy would have the host wait
            tau = torch.full((), tau, dtype=dtype, device=call.query.device)
        tau = tau.to(call.query.device, dtype)
        self.tau, self.scale = tau.reshape(()), 1 / tau.reshape(())
        logits = _TILE_LOGITS * (16 if call.query.device.type == "cuda" else 1)
        height = max(1, logits // self.candidates.shape[:2].numel())
        self.tiles = [slice(at, at + height) for at in range(0, len(self.query), height)]

    def similarity(self, rows: slice, candidates: Tensor) -> Tensor:
        products = self.query[rows] @ candidates.flatten(0, 1).T  # candidates: [M, E, D]
        return products.unflatten(1, candidates.shape[:2])  # [c, M, E]

    def positives(self, tile: Tensor, rows: slice) -> Tensor:
        """The entries of a tile [c, M, E] where rows meet their own keys, a view [c]."""
        return tile[..., 0].diagonal(self.ranks.own.start + rows.start)

    def logits(self, shift: Tensor, rows: slice) -> Tensor:
        """(s - s of the positive) [c, M, E] over tau: 0 at the positives, -inf where dropped."""
        logits, query_ids = shift * self.scale, self.call.query_ids
        if self.call.margin is not None:
            logits.masked_fill_(shift > self.call.margin, -torch.inf)
        if query_ids is not None and self.key_ids is not None:
            same = query_ids[rows, None] == self.key_ids  # [c, M]
            logits[..., 0].masked_fill_(same, -torch.inf)
        self.positives(logits, rows).zero_()
        return logits


def _dense(call: Call, ranks: Ranks, with_grad: bool) -> list[Tensor]:
    """`_reference` of the whole batch on every rank alike, so that gradients need no exchange."""
    batch = _Batch(call, ranks)
    inputs = (ranks.gather(batch.query), batch.candidates, batch.tau)
    query, shards, tau = (t.detach().requires_grad_(with_grad) for t in inputs)
    ids = None if call.query_ids is None else ranks.gather(call.query_ids), batch.key_ids
    options: Any = {"temperature": tau, "bidirectional": call.bidirectional, "margin": call.margin}
    with torch.set_grad_enabled(with_grad):
        losses = ranks.weight * _reference(query, shards[:, 0], shards[:, 1:], *ids, **options)
        loss, total = losses[ranks.own].sum(), losses.sum()
    if not with_grad:
        return [loss]
    (d_tau,) = torch.autograd.grad(loss, tau, retain_graph=True)
    d_query, d_shards = torch.autograd.grad(total, (query, shards))
    d_own = d_shards[ranks.own]
    return [loss.detach(), d_query[ranks.own], d_own[:, 0], d_own[:, 1:], d_tau]


def _chunked(call: Call, ranks: Ranks, with_grad: bool) -> list[Tensor]:
    """Three products a tile with gradients, one more where bidirectional."""
    batch = _Batch(call, ranks)
    query, candidates = batch.query, batch.candidates.flatten(0, 1)  # [N, D], [M E, D]
    directions = 2 if call.bidirectional else 1
    loss, d_scale = query.new_zeros(()), query.new_zeros(())
    if call.bidirectional:
        positives = (query * batch.candidates[ranks.own, 0]).sum(1, keepdim=True)  # [N, 1]
        anchor = ranks.gather(positives)  # [M, 1]
        column_lse = torch.full_like(anchor, -torch.inf)  # [M, 1]
        for rows in batch.tiles:
            shift = batch.similarity(rows, batch.candidates[:, :1]) - anchor  # [c, M, 1]
            column_lse = torch.logaddexp(column_lse, batch.logits(shift, rows).logsumexp(0))
        column_lse = ranks.logsumexp(column_lse)
        loss += column_lse[ranks.own].sum()
    if with_grad:
        d_query, d_candidates = torch.empty_like(query), torch.zeros_like(candidates)

    for rows in batch.tiles:
        s = batch.similarity(rows, batch.candidates)  # [c, M, E]
        shift = s - batch.positives(s, rows)[:, None, None]
        logits = batch.logits(shift, rows)
        lse = logits.logsumexp((1, 2), keepdim=True)  # [c, 1, 1]
        loss += lse.sum()
        if not with_grad:
            continue
        d_logits = logits.sub_(lse).exp_()
        d_scale += (d_logits * shift).sum()  # not s: it would cancel
        if call.bidirectional:
            shift = s[..., :1] - anchor
            d_columns = batch.logits(shift, rows).sub_(column_lse).exp_()  # [c, M, 1]
            d_scale += (d_columns * shift).sum()
            d_logits[..., :1] += d_columns
        batch.positives(d_logits, rows).sub_(directions)
        d_products = d_logits.mul_(batch.scale).flatten(1)  # [c, M E]
        d_query[rows] = d_products @ candidates
        d_candidates.addmm_(d_products.T, query[rows])

    results = [loss]
    if with_grad:
        d_own = ranks.reduce_scatter(d_candidates.view_as(batch.candidates))  # [N, E, D]
        results += [d_query, d_own[:, 0], d_own[:, 1:], -batch.scale.square() * d_scale]
    return [ranks.weight / directions * x for x in results]


@torch.no_grad()
def _run(call: Call, plan: _Plan) -> tuple[Tensor, list[Tensor | None]]:
    """The loss and the gradients of `call.inputs`, in at least fp32; none where not wanted."""
    ranks, with_grad, impl = plan
    path = _dense if impl == "reference" else _chunked
    if impl == "triton":
        from .contrastive_loss_triton import fused as path  # at the first call only
    with torch.autocast(call.query.device.type, enabled=False):  # it would round the products
        loss, *gradients = path(call, ranks, with_grad)
    pairs = zip(call.inputs, gradients, strict=False)
    return loss, [d.reshape(x.shape) if isinstance(x, Tensor) else None for x, d in pairs]


class _ContrastiveLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, plan: _Plan, *inputs: Tensor | float | None) -> Tensor:
        loss, gradients = _run(call, plan)
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        # autograd casts to the inputs' dtypes: after the scaling, which saves small fp16 values
        return None, None, *(d if d is None else d * upstream for d in ctx.saved_tensors)


def contrastive_loss(
    query: Tensor,
    key: Tensor,
    *,
    temperature: float | Tensor = 0.02,
    negatives: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    bidirectional: bool = False,
    margin: float | None = None,
    group: dist.ProcessGroup | Literal["local"] | None = None,
    deterministic: bool = True,
    impl: str = "auto",
) -> Tensor:
    """InfoNCE (arXiv 1807.03748) of this rank's queries against all ranks' keys and negatives.

    `F.cross_entropy(query @ torch.cat([key, negatives.flatten(0, 1)]).T / temperature, arange(N))`
    in one process, without the logits. On W ranks the mean of their results is the loss of the
    whole batch, and the mean of their gradients of a parameter is its gradient, if all scale the
    result alike. A rank's d key is the derivative of the sum of all ranks' results.

    Args:
        query, key: [N, D], one floating dtype, taken as they are (not normalised here); key i is
            query i's positive. N may differ between ranks and be 0 on some.
        temperature: tau > 0, a float or a differentiable tensor of one element (value not checked).
        negatives: [N, h, D], h equal on all ranks. Candidates of every query of every rank; not
            masked by id, absent from the column direction.
        query_ids, key_ids: int64 [N], both or neither. Where query_ids[i] == key_ids[j] and j != i,
            key j and query i are dropped from each other's candidates.
        bidirectional: half the sum of query to key and key to query.
        margin: finite, in units of s. Candidates with s_ij > s_ii + margin are dropped (in the
            column direction s_ij > s_jj + margin), the positive never.
        group: the ranks that share candidates. None: all ranks where torch.distributed is
            initialised, else this process; "local": this process alone.
        deterministic: the same bits on every run; each `impl` of this version gives them anyway.
        impl: "triton" (CUDA, fp16, bf16 or fp32; `launch.contrastive_chunk` picks one of its two
            ways), "chunked", "reference" (dense, the whole batch on every rank) or "auto": triton
            where it can run on CUDA, else chunked.

    Returns:
        [] in at least fp32: the sum of this rank's row losses, times W / M for M rows in all.

    Raises:
        TypeError: a wrong type, dtype or device.
        ValueError: a wrong shape or value, a difference between ranks, no rows on any rank.
        RuntimeError: an `impl` that cannot run here.
    """
    options = (query_ids, key_ids, bidirectional, margin, group, deterministic, impl)
    call = Call(query, key, temperature, negatives, *options)
    tensors = [x for x in call.inputs if isinstance(x, Tensor)]
    with_grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return _ContrastiveLoss.apply(call, _meet(call, with_grad), *call.inputs)


def contrastive_loss_and_grad(query: Tensor, key: Tensor, **options: Any) -> LossAndGrad:
    """The loss and the gradients that its backward would give, at once and without autograd.

    Args:
        query, key, options: those of `contrastive_loss`.

    Returns:
        LossAndGrad: loss [], d_query and d_key [N, D], d_negatives [N, h, D], d_temperature.

    Raises: as `contrastive_loss`.
    """
    call = Call(query, key, **options)
    loss, gradients = _run(call, _meet(call, with_grad=True))
    pairs = zip(call.inputs, gradients, strict=True)
    cast: Any = (d if d is None else d.to(x.dtype) for x, d in pairs)
    return LossAndGrad(loss, *cast)


def _meet(call: Call, with_grad: bool) -> _Plan:
    """Check the arguments and that all ranks' agree; all make gradients if one needs them."""

    def check() -> tuple[int, dict[str, Any]]:
        return len(call.query), _check(call)

    ranks, agreed, with_grad = agree("contrastive_loss", call.group, check, with_grad)
    if sum(ranks.rows) == 1 and not agreed["h"]:
        text = "contrastive_loss: one row and no negatives: the loss is 0"
        warnings.warn(text, stacklevel=3)  # of whoever called the public function
    return _Plan(ranks, with_grad, agreed["impl"])


def _check(call: Call) -> dict[str, Any]:
    """Refuse bad arguments; return what must be equal on all ranks."""
    name, query, tau, margin = "contrastive_loss", call.query, call.temperature, call.margin
    if not isinstance(query, Tensor) or query.ndim != 2 or not query.is_floating_point():
        had = f"{query.dtype} {list(query.shape)}" if isinstance(query, Tensor) else type(query)
        raise TypeError(f"{name}: query is {had}, expected a floating-point tensor [N, D]")
    rows, columns = query.shape
    for label, tensor, dtype, shape in (
        ("key", call.key, query.dtype, (rows, columns)),
        ("negatives", call.negatives, query.dtype, (rows, "h", columns)),
        ("query_ids", call.query_ids, torch.int64, (rows,)),
        ("key_ids", call.key_ids, torch.int64, (rows,)),
    ):
        if tensor is None and label != "key":
            continue
        if not isinstance(tensor, Tensor) or tensor.dtype != dtype:
            had = f"{tensor.dtype if isinstance(tensor, Tensor) else type(tensor)}"
            raise TypeError(f"{name}: {label} is {had}, expected {dtype}")
        if tensor.device != query.device:
            raise TypeError(f"{name}: {label} is on {tensor.device}, query on {query.device}")
        if tensor.ndim != len(shape) or tensor.shape[0] != rows or tensor.shape[-1] != shape[-1]:
            expected = f"[{', '.join(map(str, shape))}] for query {list(query.shape)}"
            raise ValueError(f"{name}: {label} is {list(tensor.shape)}, expected {expected}")
    if (call.query_ids is None) != (call.key_ids is None):
        missing = "query_ids" if call.query_ids is None else "key_ids"
        raise ValueError(f"{name}: {missing} is None, expected query_ids and key_ids or neither")
    if isinstance(tau, Tensor):
        if tau.numel() != 1:
            raise ValueError(f"{name}: temperature is {list(tau.shape)}, expected one element")
        if not tau.is_floating_point() or tau.device != query.device:
            had = f"{tau.dtype} on {tau.device}"
            raise TypeError(f"{name}: temperature is {had}, expected a float on {query.device}")
    elif not (isinstance(tau, int | float) and 0 < tau < math.inf):
        raise ValueError(f"{name}: temperature is {tau!r}, expected a finite number above 0")
    if margin is not None and not (isinstance(margin, int | float) and math.isfinite(margin)):
        raise ValueError(f"{name}: margin is {margin!r}, expected a finite number or None")
    if call.group not in (None, "local") and not is_group(call.group):
        raise ValueError(f"{name}: group is {call.group!r}, expected a group, 'local' or None")
    reasons = {
        "triton": lambda: no_triton(query.device, query.dtype),
        "chunked": always,
        "reference": always,
    }
    order = ("triton", "chunked") if query.device.type == "cuda" else ("chunked",)
    return {
        "device": query.device.type,
        "dtype": query.dtype,
        "D": columns,
        "h": None if call.negatives is None else call.negatives.shape[1],
        "query_ids": None if call.query_ids is None else "given",
        "temperature": "a tensor" if isinstance(tau, Tensor) else tau,
        "bidirectional": call.bidirectional,
        "margin": margin,
        "impl": choose(name, call.impl, reasons, order),
    }
