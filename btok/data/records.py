"""Record types that any training set and any evaluation set become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

Metric = Literal["hit@1", "ndcg@5", "mrr"]
NtpSide = Literal["positive", "query", "both", "none"]
NTP_SIDES: tuple[str, ...] = get_args(NtpSide)


@dataclass(frozen=True)
class Side:
    """One thing to embed: a text, images, a video's frames, or any mix of them.

    Args:
        text: instruction and content, without any vision placeholder.
        images: PIL images, uint8 arrays [height, width, 3], paths, or a file's bytes; shown before
            the text.
        video: the frames, each as an image, or a video file's path, or a `btok.inputs.Clip` of one;
            before the text, too; empty for none.
        frame_seconds: the time of each frame, in seconds; empty for two frames per second. Qwen2-VL
            does not look at it.
    """

    text: str = ""
    images: Sequence[Any] = ()
    video: Any = ()
    frame_seconds: Sequence[float] = ()


@dataclass(frozen=True)
class Pair:
    """One training example: the query should find the positive.

    Args:
        query, positive: the two sides.
        negatives: hard negatives of the query.
        dataset: the data set's name; groups of a batch come from one data set.
        ntp_side: which side is generated from the other side's bottleneck tokens.
        target: text to generate in place of the chosen side, where that says too little (an answer
            of one word).
        positive_id: equal for pairs whose positives are interchangeable and so no negatives of each
            other; None: unlike all others.
        scores: a teacher's, as of a reranker: the positive's, then each negative's; empty for none.
    """

    query: Side
    positive: Side
    negatives: Sequence[Side] = ()
    dataset: str = ""
    ntp_side: NtpSide = "positive"
    target: str | None = None
    positive_id: str | None = None
    scores: Sequence[float] = ()


@dataclass(frozen=True)
class RetrievalTask:
    """One evaluation set: queries, candidates, and which candidates are right.

    Args:
        name: unique name.
        meta_task: the family it belongs to ("I-CLS", ...); modality: "image", "video" or "visdoc".
        metric: the score that counts.
        queries, candidates: sides to embed; each candidate is embedded once.
        qrels: per query, candidate index -> relevance (> 0).
        pools: per query, the candidate indices it is ranked against; None: all (a global pool).
        hard: per query, the candidate indices, right ones included, that a shortcut cannot tell
            apart; None: no shortcut is known, every candidate counts as hard.
        published_qrels: the relevances that the code which published the set looks up, several
            where it may find either; None where there is no such code. With it a pool may name a
            candidate twice, as public lists do, and a query may have nothing right to find, which
            scores 0.
    """

    name: str
    meta_task: str
    modality: str
    metric: Metric
    queries: Sequence[Side]
    candidates: Sequence[Side]
    qrels: Sequence[Mapping[int, float]]
    pools: Sequence[Sequence[int]] | None = None
    hard: Sequence[Sequence[int]] | None = None
    published_qrels: Sequence[Mapping[int, Sequence[float]]] | None = None
