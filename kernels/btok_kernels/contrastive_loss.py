"""Contrastive loss (InfoNCE) of this rank's queries against the keys and negatives of all ranks.

    s = query @ [key ; negatives].T
    loss_i = logsumexp_j(s_ij / tau) - s_ii / tau,    j over the candidates that row i keeps
    loss = mean_i loss_i,    or half the sum of that and of the same over columns of query @ key.T

for M rows, N of them on this rank, each with its key and h negatives. Where a row is several
vectors, s is late interaction instead (late_interaction.py). With hardness beta > 0 negatives weigh

    w_ij = exp(beta s_ij) / mean_j exp(beta s_ij),    loss_i = log(1 + sum_j w_ij exp(..)),

without a gradient of w; the mean, over the negatives that i keeps, is what makes it more than
another temperature. The N x M logits are never materialised, nor a graph through them: memory is a
few tiles of them plus O((N + M) D). Steps:

    1. agree with the other ranks on shapes and options, so that a mistake raises on all of them
    2. gather keys, negatives and ids in one collective, padded to the largest rank on the way; on
       CUDA this rank's are worked on meanwhile, and where they are large each rank's are a
       broadcast of their own, worked on while the next is under way
    3. bidirectional: sweep the row tiles for each column's log-sum-exp (and that of beta s, and how
       many negatives it keeps), combine these over ranks
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

from .late_interaction import Similarity, computed, maxsim, similarity, tile_rows
from .launch import Reasons, always, choose, no_triton
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
    hardness: float = 0.0,
) -> Tensor:
    """The specification: the loss of each row of a whole batch, [M], dense and in at least fp32."""
    s = _dense_scores(query, key)
    own = torch.eye(len(s), dtype=torch.bool, device=s.device)
    same = own if query_ids is None or key_ids is None else query_ids[:, None] == key_ids

    def direction(s: Tensor, own: Tensor, same: Tensor) -> Tensor:
        positive = s.diagonal()
        drop = same if margin is None else same | (s > positive[:, None] + margin)
        logits = (s / temperature).masked_fill(drop & ~own, -torch.inf)
        if hardness:
            hard = (hardness * s.detach()).masked_fill(drop | own, -torch.inf)
            kept = (hard > -torch.inf).sum(1, keepdim=True, dtype=s.dtype)
            weights = hard - (hard.logsumexp(1, keepdim=True) - kept.log())  # their logs
            logits = logits + weights.masked_fill(drop | own, 0)
        return logits.logsumexp(1) - positive / temperature

    columns = direction(s.T, own, same.T) if bidirectional else None
    if negatives is not None:
        s = torch.cat([s, _dense_scores(query, negatives.flatten(0, 1))], 1)
        own, same = (F.pad(mask, (0, s.shape[1] - len(s))) for mask in (own, same))
    rows = direction(s, own, same)
    return rows if columns is None else (rows + columns) / 2


def _dense_scores(query: Tensor, key: Tensor) -> Tensor:
    """[N, M] of rows that are vectors, or several each."""
    if query.ndim == 3:
        return maxsim(query, key, impl="reference")
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.to(dtype) @ key.to(dtype).T


def _add_products(
    d: Tensor, _: None, query: Tensor, key: Tensor, d_query: Tensor, d_key: Tensor
) -> None:
    d_query.copy_(d @ key)  # a product straight there rounds by how the rows are aligned
    d_key.addmm_(d.T, query)


_PRODUCTS = Similarity(
    lambda query, key: (query @ key.T, None), lambda query, key: (query * key).sum(1), _add_products
)


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
    hardness: float = 0.0

    @property
    def inputs(self) -> tuple[Any, ...]:
        """The arguments that may have a gradient, in the order of LossAndGrad."""
        return self.query, self.key, self.negatives, self.temperature

    def tau(self, dtype: torch.dtype) -> Tensor:
        """The temperature, [] on the queries' device."""
        if isinstance(self.temperature, Tensor):
            return self.temperature.to(dtype).reshape(())
        # filled in there: a copy would have the host wait
        return self.query.new_full((), self.temperature, dtype=dtype)


class _Plan(NamedTuple):
    """The plan of a call that all ranks agreed on."""

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

    def __init__(self, call: Call, ranks: Ranks, impl: str = "chunked") -> None:
        self.call, self.ranks = call, ranks
        late = call.query.ndim == 3  # rows below are [K, D], candidates' [L, D]
        self.similarity = similarity(impl) if late else _PRODUCTS
        key = call.key[:, None]  # [N, 1, D]
        shard = key if call.negatives is None else torch.cat([key, call.negatives], 1)  # [N, E, D]
        self.query = computed(call.query, impl)  # [N, D]
        shards, *ids = ranks.shards(shard, *(() if call.key_ids is None else (call.key_ids,)))
        self.candidates = computed(join(shards), impl)  # [M, E, D]
        self.key_ids = join(ids[0]) if ids else None  # [M]
        self.tau = call.tau(torch.promote_types(call.query.dtype, torch.float32))
        self.scale = 1 / self.tau
        logits = _TILE_LOGITS * (16 if call.query.device.type == "cuda" else 1)
        columns = self.candidates.shape[:2].numel()
        height = max(1, logits // columns)
        if late:
            height = min(height, tile_rows(self.query, columns))
        self.tiles = [slice(at, at + height) for at in range(0, len(self.query), height)]

    def scores(self, rows: slice, candidates: Tensor) -> tuple[Tensor, Any]:
        """A tile [c, M, E] of candidates [M, E, D], and what its gradient needs."""
        s, kept = self.similarity.scores(self.query[rows], candidates.flatten(0, 1))
        return s.unflatten(1, candidates.shape[:2]), kept

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

    def hard(self, shift: Tensor, logits: Tensor, rows: slice) -> Tensor:
        """beta (s - s of the positive) [c, M, E], -inf at the positives and where dropped."""
        hard = (shift * self.call.hardness).masked_fill_(logits == -torch.inf, -torch.inf)
        self.positives(hard, rows).fill_(-torch.inf)
        return hard

    def weigh(self, logits: Tensor, hard: Tensor, log_mean: Tensor, rows: slice) -> Tensor:
        """The logits with the negatives' weights, in place."""
        logits += hard - log_mean
        self.positives(logits, rows).zero_()
        return logits


def _dense(call: Call, ranks: Ranks, with_grad: bool) -> list[Tensor]:
    """`_reference` of the whole batch on every rank alike, so that gradients need no exchange."""
    batch = _Batch(call, ranks)
    inputs = (ranks.gather(batch.query), batch.candidates, batch.tau)
    query, shards, tau = (t.detach().requires_grad_(with_grad) for t in inputs)
    ids = None if call.query_ids is None else ranks.gather(call.query_ids), batch.key_ids
    names = ("bidirectional", "margin", "hardness")
    options: Any = {"temperature": tau} | {name: getattr(call, name) for name in names}
    with torch.set_grad_enabled(with_grad):
        losses = ranks.weight * _reference(query, shards[:, 0], shards[:, 1:], *ids, **options)
        loss, total = losses[ranks.own].sum(), losses.sum()
    if not with_grad:
        return [loss]
    (d_tau,) = torch.autograd.grad(loss, tau, retain_graph=True)
    d_query, d_shards = torch.autograd.grad(total, (query, shards))
    d_own = d_shards[ranks.own]
    return [loss.detach(), d_query[ranks.own], d_own[:, 0], d_own[:, 1:], d_tau]


def _log_mean(log_sum: Tensor, log_count: Tensor) -> Tensor:
    """The log of the mean from the logs of a sum and of a count; 0 where there is nothing, which
    weighs nothing.
    """
    return (log_sum - log_count).masked_fill_(log_count == -torch.inf, 0.0)


def _columns(batch: _Batch, anchor: Tensor) -> tuple[Tensor, Tensor | None]:
    """The log-sum-exps of columns over all ranks' rows, [M, 1], and the log means of exp(beta s),
    [M, 1].
    """
    hardness = batch.call.hardness
    sums = anchor.new_full((len(anchor), 3 if hardness else 1), -torch.inf)
    for rows in batch.tiles:
        shift = batch.scores(rows, batch.candidates[:, :1])[0] - anchor  # [c, M, 1]
        logits = batch.logits(shift, rows)
        if hardness:  # the mean is not known yet: sums of negatives alone, to be weighed by it
            hard = batch.hard(shift, logits, rows)
            counted = torch.zeros_like(hard).masked_fill_(hard == -torch.inf, -torch.inf)
            logits = torch.cat([logits + hard, hard, counted], 2)  # [c, M, 3]
        sums = torch.logaddexp(sums, logits.logsumexp(0))
    sums = batch.ranks.logsumexp(sums)
    if not hardness:
        return sums, None
    negatives, hard, counted = sums.split(1, 1)
    log_mean = _log_mean(hard, counted)
    return torch.logaddexp(negatives - log_mean, torch.zeros_like(log_mean)), log_mean


def _chunked(call: Call, ranks: Ranks, with_grad: bool, impl: str = "chunked") -> list[Tensor]:
    """The loss and its gradients by tiles of rows: each makes scores and two gradients, where
    bidirectional scores once more.
    """
    batch = _Batch(call, ranks, impl)
    query, candidates = batch.query, batch.candidates.flatten(0, 1)  # [N, D], [M E, D]
    directions = 2 if call.bidirectional else 1
    loss, d_scale = batch.tau.new_zeros(()), batch.tau.new_zeros(())
    if call.bidirectional:
        positives = batch.similarity.pairs(query, batch.candidates[ranks.own, 0])  # [N]
        anchor = ranks.gather(positives[:, None])  # [M, 1]
        column_lse, column_mean = _columns(batch, anchor)
        loss += column_lse[ranks.own].sum()
    if with_grad:
        d_query = loss.new_empty(query.shape)  # contiguous, whatever the query is
        d_candidates = torch.zeros_like(candidates, dtype=loss.dtype)

    for rows in batch.tiles:
        s, kept = batch.scores(rows, batch.candidates)  # [c, M, E]
        shift = s - batch.positives(s, rows)[:, None, None]
        logits = batch.logits(shift, rows)
        if call.hardness:
            hard = batch.hard(shift, logits, rows)
            count = (hard > -torch.inf).sum((1, 2), keepdim=True, dtype=hard.dtype)  # [c, 1, 1]
            mean = _log_mean(hard.logsumexp((1, 2), keepdim=True), count.log())
            logits = batch.weigh(logits, hard, mean, rows)
        lse = logits.logsumexp((1, 2), keepdim=True)  # [c, 1, 1]
        loss += lse.sum()
        if not with_grad:
            continue
        d_logits = logits.sub_(lse).exp_()
        d_scale += (d_logits * shift).sum()  # not s: it would cancel
        if call.bidirectional:
            shift = s[..., :1] - anchor
            d_columns = batch.logits(shift, rows)
            if column_mean is not None:
                hard = batch.hard(shift, d_columns, rows)
                d_columns = batch.weigh(d_columns, hard, column_mean, rows)
            d_columns = d_columns.sub_(column_lse).exp_()  # [c, M, 1]
            d_scale += (d_columns * shift).sum()
            d_logits[..., :1] += d_columns
        batch.positives(d_logits, rows).sub_(directions)
        d_products = d_logits.mul_(batch.scale).flatten(1)  # [c, M E]
        batch.similarity.differentiate(
            d_products, kept, query[rows], candidates, d_query[rows], d_candidates
        )

    results = [loss]
    if with_grad:
        d_own = ranks.reduce_scatter(d_candidates.view_as(batch.candidates))  # [N, E, D]
        results += [d_query, d_own[:, 0], d_own[:, 1:], -batch.scale.square() * d_scale]
    return [ranks.weight / directions * x for x in results]


@torch.no_grad()
def _run(call: Call, plan: _Plan) -> tuple[Tensor, list[Tensor | None]]:
    """The loss and the gradients of `call.inputs`, in at least fp32; none where not wanted."""
    ranks, with_grad, impl = plan
    with torch.autocast(call.query.device.type, enabled=False):  # it would round the products
        if impl == "reference":
            loss, *gradients = _dense(call, ranks, with_grad)
        elif impl == "triton" and call.query.ndim == 2:
            from .contrastive_loss_triton import fused  # at the first call only

            loss, *gradients = fused(call, ranks, with_grad)
        else:
            loss, *gradients = _chunked(call, ranks, with_grad, impl)
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
    hardness: float = 0.0,
) -> Tensor:
    """InfoNCE (arXiv 1807.03748) of this rank's queries against all ranks' keys and negatives.

    `F.cross_entropy(query @ torch.cat([key, negatives.flatten(0, 1)]).T / temperature, arange(N))`
    in one process, without the logits. On W ranks the mean of their results is the loss of the
    whole batch, and the mean of their gradients of a parameter is its gradient, if all scale the
    result alike. A rank's d key is the derivative of the sum of all ranks' results.

    Rows of several vectors are compared by late interaction, `btok.kernels.maxsim`: s_ij is the
    mean over query i's tokens of each one's best product with a token of key j.

    Args:
        query, key: [N, D] both, or [N, K, D] and [N, L, D]; one floating dtype, taken as they are
            (not normalised here); key i is query i's positive. N may differ between ranks and be 0
            on some.
        temperature: tau > 0, a float or a differentiable tensor of one element (value not checked).
        negatives: [N, h, D] or [N, h, L, D], h equal on all ranks. Candidates of every query of
            every rank; not masked by id, absent from the column direction.
        query_ids, key_ids: int64 [N], both or neither. Where query_ids[i] == key_ids[j] and j != i,
            key j and query i are dropped from each other's candidates.
        bidirectional: half the sum of query to key and key to query.
        margin: finite, in units of s. Candidates with s_ij > s_ii + margin are dropped (in the
            column direction s_ij > s_jj + margin), the positive never.
        group: the ranks that share candidates. None: all ranks where torch.distributed is
            initialised, else this process; "local": this process alone.
        deterministic: the same bits on every run; each `impl` of this version gives them anyway.
        impl: "triton" (CUDA, fp16, bf16 or fp32; of vectors `launch.contrastive_chunk` picks one of
            its two ways, of several a row it is chunked with Triton's scores and gradients),
            "chunked", "reference" (dense, the whole batch on every rank) or "auto": triton where it
            can run on CUDA, else chunked.
        hardness: beta >= 0, in units of 1 / s (arXiv 2010.04592). Negative j of row i weighs
            exp(beta s_ij) over the mean of that over the negatives which row i keeps, as a
            constant: loss_i = log(1 + sum_j w_ij exp((s_ij - s_ii) / tau)); in the column direction
            over the column's. "triton" of vectors takes 0 alone.

    Returns:
        [] in at least fp32: the sum of this rank's row losses, times W / M for M rows in all.

    Raises:
        TypeError: a wrong type, dtype or device.
        ValueError: a wrong shape or value, a difference between ranks, no rows on any rank.
        RuntimeError: an `impl` that cannot run here.
    """
    options = (query_ids, key_ids, bidirectional, margin, group, deterministic, impl, hardness)
    call = Call(query, key, temperature, negatives, *options)
    tensors = [x for x in call.inputs if isinstance(x, Tensor)]
    with_grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return _ContrastiveLoss.apply(call, _agree_across_ranks(call, with_grad), *call.inputs)


def contrastive_loss_and_grad(query: Tensor, key: Tensor, **options: Any) -> LossAndGrad:
    """The loss and the gradients that its backward would give, at once and without autograd.

    Args:
        query, key, options: those of `contrastive_loss`.

    Returns:
        LossAndGrad: loss [], d_query, d_key and d_negatives in the inputs' shapes, d_temperature.

    Raises: as `contrastive_loss`.
    """
    call = Call(query, key, **options)
    loss, gradients = _run(call, _agree_across_ranks(call, with_grad=True))
    pairs = zip(call.inputs, gradients, strict=True)
    cast: Any = (d if d is None else d.to(x.dtype) for x, d in pairs)
    return LossAndGrad(loss, *cast)


def _agree_across_ranks(call: Call, with_grad: bool) -> _Plan:
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
    if not isinstance(query, Tensor) or query.ndim not in (2, 3) or not query.is_floating_point():
        had = f"{query.dtype} {list(query.shape)}" if isinstance(query, Tensor) else type(query)
        shapes = "[N, D] or [N, K, D]"
        raise TypeError(f"{name}: query is {had}, expected a floating-point tensor {shapes}")
    rows, columns = len(query), query.shape[-1]
    tokens: tuple[int | str, ...] = () if query.ndim == 2 else ("L",)
    if query.ndim == 3 and isinstance(call.key, Tensor) and call.key.ndim == 3:
        tokens = (call.key.shape[1],)  # of the negatives too
    for label, tensor, dtype, shape in (
        ("key", call.key, query.dtype, (rows, *tokens, columns)),
        ("negatives", call.negatives, query.dtype, (rows, "h", *tokens, columns)),
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
        sizes = zip(tensor.shape, shape, strict=False)
        if tensor.ndim != len(shape) or any(n not in (size, "h") for size, n in sizes):
            expected = f"[{', '.join(map(str, shape))}] for query {list(query.shape)}"
            raise ValueError(f"{name}: {label} is {list(tensor.shape)}, expected {expected}")
    if query.ndim == 3 and 0 in (*query.shape[1:], *tokens):
        had = f"{query.shape[1]} and {tokens[0]} tokens of D {columns}"
        raise ValueError(f"{name}: query and key have {had}, expected at least 1 of each")
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
    hardness = call.hardness
    if not (isinstance(hardness, int | float) and 0 <= hardness < math.inf):
        raise ValueError(f"{name}: hardness is {hardness!r}, expected a finite number, 0 or more")
    if call.group not in (None, "local") and not is_group(call.group):
        raise ValueError(f"{name}: group is {call.group!r}, expected a group, 'local' or None")
    return {
        "device": query.device.type,
        "dtype": query.dtype,
        "D": columns,
        "K": query.shape[1] if tokens else None,
        "L": tokens[0] if tokens else None,
        "h": None if call.negatives is None else call.negatives.shape[1],
        "query_ids": None if call.query_ids is None else "given",
        "temperature": "a tensor" if isinstance(tau, Tensor) else tau,
        "bidirectional": call.bidirectional,
        "margin": margin,
        "hardness": hardness,
        "impl": choose(name, call.impl, *implementations(call)),
    }


def implementations(call: Call) -> tuple[Reasons, tuple[str, ...]]:
    """The implementations that could compute this call's loss: by name why it cannot run here
    (asked by a call, which gives None where it can), and the names that "auto" tries in turn.
    """
    query = call.query
    reasons: Reasons = {
        "triton": lambda: no_triton(query.device, query.dtype) or _unweighted(call),
        "chunked": always,
        "reference": always,
    }
    return reasons, ("triton", "chunked") if query.device.type == "cuda" else ("chunked",)


def _unweighted(call: Call) -> str | None:
    """Why the kernels of the loss itself cannot run; None where they can or are not needed."""
    if call.query.ndim == 3 or not call.hardness:
        return None
    return f"hardness is {call.hardness}, and its kernels weigh all negatives of vectors alike"
