"""Samples that pairs become, and the ids of their positives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from btok.data.records import Pair, Side
from btok.data.samples import pair_samples, positive_ids
from btok.objective import Objective


def process(side):
    return {"input_ids": [ord(c) for c in side.text]}


def words(sample):
    return tuple(None if s is None else "".join(map(chr, s["input_ids"])) for s in sample)


def pair(**options):
    return Pair(query=Side("q"), positive=Side("p"), **options)


@pytest.mark.parametrize(
    ("side", "expected"),
    [
        ("positive", [("q", "p"), ("p", None)]),
        ("query", [("q", None), ("p", "q")]),
        ("both", [("q", "p"), ("p", "q")]),
        ("none", [("q", None), ("p", None)]),
    ],
)
def test_which_side_is_generated(side, expected):
    assert [words(s) for s in pair_samples([pair(ntp_side=side)], process)] == expected
    assert [words(s) for s in pair_samples([pair()], process, ntp_side=side)] == expected


def test_queries_come_first_and_a_target_replaces_the_other_side():
    pairs = [pair(target="story"), Pair(Side("a"), Side("b"), ntp_side="query", target="tale")]
    samples = [words(s) for s in pair_samples(pairs, process)]
    assert samples == [("q", "story"), ("a", None), ("p", None), ("b", "tale")]
    samples = [words(s) for s in pair_samples(pairs, process, generate=False)]
    assert samples == [("q", None), ("a", None), ("p", None), ("b", None)]
    with pytest.raises(ValueError, match="ntp_side is 'all'"):
        pair_samples(pairs, process, ntp_side="all")


def test_hard_negatives_follow_and_count_for_every_query():
    pairs = [
        Pair(Side(f"q{i}"), Side(f"p{i}"), (Side(f"n{i}"), Side(f"m{i}")), ntp_side="none")
        for i in range(2)
    ]
    samples = [words(s)[0] for s in pair_samples(pairs, process)]
    assert samples == ["q0", "q1", "p0", "p1", "n0", "n1", "m0", "m1"]
    z = F.normalize(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).double(), dim=1)
    logits = z[:2] @ z[2:].T / 0.02
    for negatives, expected in (
        ("batch", F.cross_entropy(logits, torch.arange(2))),
        (
            "group",
            F.cross_entropy(logits[[0, 1]][:, [0, 2, 4]][:1], torch.tensor([0])) / 2
            + F.cross_entropy(logits[1:][:, [1, 3, 5]], torch.tensor([0])) / 2,
        ),
    ):
        ids = torch.tensor([1, 2])
        loss = Objective(negatives=negatives).contrastive(z, ids, num_groups=2)
        assert float(loss) == pytest.approx(float(expected))
    with pytest.raises(ValueError, match=r"pairs have \[0, 2\] negatives"):
        pair_samples([pair(), pairs[0]], process)


def test_ids_are_equal_for_interchangeable_positives_only():
    pairs = [
        pair(dataset="a", positive_id="7"),
        pair(dataset="b", positive_id="7"),
        pair(dataset="a", positive_id="7"),
        pair(dataset="a"),
        pair(dataset="a"),
    ]
    ids = positive_ids(pairs).tolist()
    assert ids[0] == ids[2] and len(set(ids)) == 4
    other = positive_ids(pairs, rank=1).tolist()
    assert other[:3] == ids[:3] and not set(other[3:]) & set(ids)
