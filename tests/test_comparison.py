"""MMEB-V2 scores beside published ones: means, differences, the leaderboard's file, picture."""

from __future__ import annotations

import json

import numpy as np
import pytest
from helpers import tiny_checkpoint
from PIL import Image

from btok import BTokEncoder
from btok.evaluation import mmeb_v2
from btok.tools import comparison, evaluate


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def made_up(scores, queries=100):
    """A result with these scores, one per data set of the table from the first on."""
    table = mmeb_v2.data_sets()
    rows = {}
    for (name, spec), score in zip(table.items(), scores, strict=False):
        published = {f"{metric}@{k}": score / 100 for metric in ("hit", "mrr") for k in (1, 5)}
        rows[name] = {"meta_task": spec.meta_task, "modality": spec.modality, "score": score}
        rows[name] |= {"metric": spec.metric, "origin": score, "ci95": [score - 9, score + 9]}
        rows[name] |= {"queries": queries, "published": published, "data": {"digest": name}}
    return evaluate.summed_up(rows)


def test_means_stand_only_over_all_their_data_sets():
    whole = made_up(range(10, 88))
    values = np.arange(10, 88)
    assert whole["overall"] == values.mean() and whole["missing"] == []
    assert whole["modalities"] == pytest.approx(
        {"image": values[:36].mean(), "video": values[36:54].mean(), "visdoc": values[54:].mean()}
    )
    assert (
        whole["meta_tasks"]["I-QA"] == values[10:20].mean() == whole["origin"]["meta_tasks"]["I-QA"]
    )
    part = made_up(range(10, 46))
    assert part["overall"] is None and part["modalities"]["video"] is None
    assert part["modalities"]["image"] == values[:36].mean() and len(part["missing"]) == 42


def test_differences_and_their_intervals(tmp_path):
    result = made_up([50.0] * 78)
    for other in comparison.read("published"):
        said = comparison.differences(result, other, {})
        assert said.startswith(f"against {other.model}\n") and "overall" in said
    authors = {"metadata": {"model_name": "theirs"}, "metrics": {"image": {}, "visdoc": {}}}
    authors["metrics"]["image"]["N24News"] = {"hit@1": 0.4, "num_data": 100}
    authors["metrics"]["visdoc"]["ViDoSeek-page-fixed"] = {"ndcg_linear@5": 0.9, "num_data": 9}
    authors["metrics"]["video"] = {"MSVD": "FILE_N/A"}
    (tmp_path / "a.json").write_text(json.dumps(authors))
    (theirs,) = comparison.read(str(tmp_path / "a.json"))
    assert theirs.tasks == {"N24News": 40.0, "ViDoSeek-page": 90.0}
    gap, low, high = comparison._gap("N24News", result["tasks"]["N24News"], 50.0, theirs, ())
    # Newcombe: Wilson's interval of 40 in 100 is [30.9, 49.8], ours is [41, 59]
    assert gap == 10 and low == pytest.approx(10 - np.hypot(9, 9.80), abs=0.01)
    assert high == pytest.approx(10 + np.hypot(9, 9.06), abs=0.01)
    row = result["tasks"]["ViDoSeek-page"]
    _, low, high = comparison._gap("ViDoSeek-page", row, 50.0, theirs, ())
    assert (low, high) == pytest.approx((-40 - np.hypot(9, 9), -40 + np.hypot(9, 9)))
    said = comparison.differences(result, theirs, {}).splitlines()
    assert len(said) == 4 and said[2].split()[:3] == ["N24News", "50.0", "40.0"]
    assert theirs.older == ["N24News", "ViDoSeek-page"]  # by how many queries there are
    assert said[2].endswith(", of other data")
    (early, *_) = comparison.read("published")
    said = comparison.differences(result, early, {})
    assert said.count(", of other data") == 3 and said.count("some of other data") == 5
    (tmp_path / "sets").mkdir()
    for digest, values in (("GQA", {"GQA": [1.0]}), ("newer", {})):  # of a run that was killed
        kept = {"queries": [1.0], "data": {"digest": digest}}
        (tmp_path / "sets/GQA.json").write_text(json.dumps(kept))
        (tmp_path / "m.json").write_text(json.dumps(result))
        (ours,) = comparison.read(str(tmp_path / "m.json"))
        assert ours.values == values and len(ours.tasks) == 78
    nothing = comparison.Published("none", {})
    assert comparison.differences(result, nothing, {}).endswith(
        "\nnothing that both have a score of"
    )
    for wrong in (
        "{}",
        "[1]",
        "3",
        "",
        "[" * 100_000,
        '{"tasks": {"GQA": {"score": "x"}}}',
        '{"metrics": {"image": {"GQA": {}}}}',
    ):
        (tmp_path / "b.json").write_text(wrong)
        with pytest.raises(ValueError, match=r"compare is .*b\.json .*expected a file of publ"):
            comparison.read(str(tmp_path / "b.json"))


def test_published_means_are_the_published_ones():
    """The figures of the leaderboard's files, whose means are the ones in their paper."""
    v2, fixed, gme, paper = comparison.read("published")
    assert [round(np.mean([*x.tasks.values()]), 1) for x in (v2, fixed, gme)] == [58.0, 59.1, 54.1]
    assert paper.groups["overall"] == 59.0
    table = mmeb_v2.data_sets()
    for model in (v2, fixed, gme):
        assert list(model.tasks) == list(table)
        counts = {name: spec.queries for name, spec in table.items()}
        assert model.queries | {"MomentSeeker": 1602} == counts  # whose pairs came twice before


def test_the_leaderboards_file(checkpoint, tmp_path):
    encoder = BTokEncoder.from_pretrained(checkpoint)
    result = made_up([50.0] * 78)
    with pytest.raises(
        ValueError, match="ImageNet-1K has 100 queries, the benchmark 1000; its data"
    ):
        comparison.submit(result, tmp_path / "s.json", "mine", encoder)
    for name, spec in mmeb_v2.data_sets().items():
        result["tasks"][name]["queries"] = spec.queries
    comparison.submit(result, tmp_path / "s.json", "mine", encoder)
    written = json.loads((tmp_path / "s.json").read_text())
    assert written["metadata"]["model_name"] == "mine"
    assert {m: len(x) for m, x in written["metrics"].items()} == {
        "image": 36,
        "video": 18,
        "visdoc": 24,
    }
    assert "ViDoSeek-page-fixed" in written["metrics"]["visdoc"]
    assert "ViDoSeek-doc" in written["metrics"]["visdoc"]
    row = written["metrics"]["image"]["GQA"]
    assert row["num_pred"] == row["num_data"] == 1000 and row["hit@1"] == 0.5
    with pytest.raises(ValueError, match="submission needs all data sets, these are missing"):
        comparison.submit(made_up([50.0] * 77), tmp_path / "t.json", "mine", encoder)


def test_the_picture_shows_whole_groups_alone(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(comparison.pictures, "bars", lambda *a: drawn.update(zip("gspt", a)))  # noqa: B905
    comparison.draw(made_up([50.0] * 36), comparison.read("published"), tmp_path / "a.png")
    assert drawn["g"] == list(comparison.SHOWN)
    assert drawn["s"]["this checkpoint"] == [50.0] * 4 + [None] * 5
    assert drawn["s"]["BToks 2B (arXiv 2604.11095)"] == [64.3] + [None] * 8
    monkeypatch.undo()
    comparison.draw(made_up([50.0] * 36), comparison.read("published"), tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").width > 900
