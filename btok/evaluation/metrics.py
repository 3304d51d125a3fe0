"""Retrieval metrics of one query, what chance gives for each, and an interval for their mean.

Relevances are in ranked order, best first, 0 = not relevant: `score(metric, rel[rank(scores)])`.
Values lie in [0, 1]; percent is the runner's affair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

PUBLISHED_AT = (1, 5, 10)
_Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution


def rank(scores: ArrayLike) -> NDArray[np.intp]:
    """Positions of the candidates, best first; equal scores keep the order of the pool.

    Args:
        scores: [n], in pool order, higher is better; ValueError for another shape or NaN.
    """
    values = np.asarray(scores)
    if values.ndim != 1:
        raise ValueError(f"rank: scores has shape {values.shape}, not [n]")
    if np.isnan(values).any():
        raise ValueError(f"rank: scores holds NaN at position {int(np.isnan(values).argmax())}")
    return np.argsort(-values, kind="stable")


def hit_at_k(relevance: ArrayLike, k: int) -> float:
    """1 if any of the first k is relevant, else 0."""
    return float((_checked(relevance, k)[:k] > 0).any())


def ndcg_at_k(relevance: ArrayLike, k: int) -> float:
    """sum_{r <= k} rel_r / log2(r + 1), linear gain, over the same sum in the ideal order."""
    rel = _checked(relevance, k)
    ideal = np.sort(rel)[::-1]
    discounts = _discounts(min(k, len(rel)))
    return float(rel[:k] @ discounts / (ideal[:k] @ discounts))


def mrr(relevance: ArrayLike) -> float:
    """1 / rank of the first relevant candidate."""
    return float(1 / (1 + (_checked(relevance, 1) > 0).argmax()))


def parse_metric(metric: str) -> tuple[str, int]:
    """ "hit@1" -> ("hit", 1), "ndcg@5" -> ("ndcg", 5), "mrr" -> ("mrr", 1), else ValueError."""
    name, at, k = metric.partition("@")
    if metric == "mrr":
        return "mrr", 1
    if name in ("hit", "ndcg") and at and k.isdecimal() and int(k) >= 1:
        return name, int(k)
    raise ValueError(f"metric: {metric!r} is none of hit@k, ndcg@k, mrr")


def score(metric: str, relevance: ArrayLike) -> float:
    """The metric of one query, from 0 to 1.

    Args:
        metric: "hit@k", "ndcg@k" or "mrr".
        relevance: [n] in ranked order, finite, >= 0 and not all 0, else a ValueError.
    """
    name, k = parse_metric(metric)
    if name == "mrr":
        return mrr(relevance)
    return hit_at_k(relevance, k) if name == "hit" else ndcg_at_k(relevance, k)


def expected(metric: str, relevance: ArrayLike) -> float:
    """The metric's exact mean over all orders of the candidates: what a random ranking gives.

    With p relevant among n, the first r places hold none of them with probability
    S_r = prod_{i < r} (n - p - i) / (n - i); so hit@k = 1 - S_k, mrr = sum_r (S_{r-1} - S_r) / r.
    A place holds the mean relevance on average: ndcg@k = mean(rel) sum_r 1 / log2(r + 1) / ideal.

    Args and Raises as for `score`; the order of `relevance` does not matter.
    """
    name, k = parse_metric(metric)
    rel = _checked(relevance, k)
    n = len(rel)
    if name == "ndcg":
        ideal = np.sort(rel)[::-1]
        discounts = _discounts(min(k, n))
        return float(rel.mean() * discounts.sum() / (ideal[:k] @ discounts))
    misses = n - np.count_nonzero(rel)
    places = np.arange(n)
    none_yet = np.cumprod(np.maximum(misses - places, 0) / (n - places))  # S_1 .. S_n
    if name == "hit":
        return float(1 - none_yet[min(k, n) - 1])
    return float((-np.diff(none_yet, prepend=1.0) / (places + 1)).sum())


def published_scores(
    ranking: Sequence[int], qrels: Mapping[int, float], published: Mapping[int, Sequence[float]]
) -> dict[str, float]:
    """All that VLM2Vec's evaluation reports of one query, at 1, 5 and 10: "hit@1", ...

    Args:
        ranking: candidates, best first; one that comes again counts again for map, mrr and ndcg, as
            it does there.
        qrels: candidate -> relevance; nothing for a query without an answer, which scores 0.
        published: the same candidates' relevances as that code looks them up; several where it
            may find either, all as likely.
    """
    top = list(ranking[:10])
    right = np.array([candidate in qrels for candidate in top], np.float64)
    looked_up = [np.array(published.get(candidate, (0.0,)), np.float64) for candidate in top]
    ideal = np.array(sorted(qrels.values(), reverse=True))
    out = {}
    for k in PUBLISHED_AT:
        found = len({candidate for candidate in top[:k] if candidate in qrels})
        precision, recall = found / k, found / max(len(qrels), 1)
        hits = right[:k]
        ranks = np.arange(1, len(hits) + 1)
        out[f"hit@{k}"] = float(found > 0)
        for name, gain in (("linear", lambda x: x), ("exponential", lambda x: 2**x - 1)):
            best = gain(ideal[:k]) @ _discounts(len(ideal[:k]))
            gains = np.array([gain(values).mean() for values in looked_up[:k]])
            dcg = gains @ _discounts(len(hits))
            out[f"ndcg_{name}@{k}"] = float(dcg / best) if best else 0.0
        out[f"precision@{k}"], out[f"recall@{k}"] = precision, recall
        out[f"f1@{k}"] = 2 * precision * recall / (precision + recall) if found else 0.0
        out[f"map@{k}"] = float(hits @ (hits.cumsum() / ranks) / max(min(len(qrels), k), 1))
        out[f"mrr@{k}"] = float(1 / (1 + hits.argmax())) if found else 0.0
    return out


def published_name(metric: str) -> str:
    """What `published_scores` calls a metric: ndcg has a linear gain here, and says so there."""
    return metric.replace("ndcg@", "ndcg_linear@")


def mean_interval(scores: ArrayLike) -> tuple[float, float]:
    """95 % interval for the mean of per-query scores in [0, 1], queries taken as independent.

    Wilson's interval for the effective count n p (1 - p) / s^2. For 0/1 scores the variance s^2
    is p (1 - p) and this is Wilson's own; for graded scores it tends to p +- z s / sqrt(n) but
    stays in [0, 1]. The variance is shrunk towards p (1 - p) by the weight of one query, so that
    equal scores keep a width, of order 1 / n. No scores, or one outside [0, 1]: a ValueError.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.size == 0 or not ((values >= 0) & (values <= 1)).all():
        raise ValueError("mean_interval: scores must be non-empty and lie in [0, 1]")
    n, p = values.size, values.mean()
    binary = p * (1 - p)
    variance = (n * values.var() + binary) / (n + 1)
    count = n * binary / variance if variance > 0 else n
    centre = (p + _Z95**2 / (2 * count)) / (1 + _Z95**2 / count)
    half = _Z95 / (1 + _Z95**2 / count) * np.sqrt(binary / count + (_Z95 / (2 * count)) ** 2)
    return float(max(0.0, centre - half)), float(min(1.0, centre + half))


def _discounts(k: int) -> NDArray[np.float64]:
    return 1 / np.log2(np.arange(k) + 2.0)


def _checked(relevance: ArrayLike, k: int) -> NDArray[np.float64]:
    rel = np.asarray(relevance, dtype=np.float64)
    if k < 1:
        raise ValueError(f"k: {k} is less than 1")
    if rel.ndim != 1 or not (np.isfinite(rel) & (rel >= 0)).all():
        raise ValueError("relevance: must be [n], finite and >= 0")
    if not rel.any():
        raise ValueError(f"relevance: none of {len(rel)} candidates is relevant")
    return rel
