"""The study of budgets: its views are what the encoder gives, its page says what the runs say."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

pytest.importorskip("sklearn.datasets", reason="needs the demo extra")
pytest.importorskip("matplotlib", reason="needs the demo extra")

from helpers import nested_module

from btok.data.records import RetrievalTask, Side
from btok.data.sources import open_source
from btok.encoder import BTokEncoder
from examples.smollm2 import budgets as smollm2_budgets
from examples.studies import budgets, budgets_page, negatives, views
from train.pocket.data import train_group


def nested():
    return BTokEncoder(*nested_module())


def texts(count, seed=0):
    rng = random.Random(seed)
    return [Side("".join(rng.choices("abcdefgh", k=rng.randrange(1, 40)))) for _ in range(count)]


def test_views_are_what_the_encoder_gives():
    encoder, sides = nested(), texts(40)
    calibration = encoder.calibrate(texts(400, 1), show_progress=False)
    bounds = (0.005, 0.05, 0.5)
    made = dict(views.views_of((1, 2, 4), (16, 32), 64, calibration, bounds, rows=True, cross=True))
    embedded = views.embed(encoder, sides)
    options = {"show_progress": False}
    for k in (1, 2, 4):
        for d in (16, 32, 64):
            plain = encoder.using(num_btoks=k, dims=d)
            found = made[f"{k} of {d}"]
            assert found.bytes == 4 * d
            assert np.abs(found.vectors(embedded) - plain.encode(sides, **options)).max() < 1e-5
            late, rows = made[f"rows {k} of {d}"], plain.using(multi_vector=True)
            assert late.bytes == 4 * k * d
            assert np.abs(late.vectors(embedded) - rows.encode(sides, **options)).max() < 1e-5
            for name, other in ((f"int8 rows {k} of {d}", rows), (f"int8 {k} of {d}", plain)):
                if name not in made:
                    assert k < 4
                    continue
                low = other.using(dtype="int8")
                integers = low.encode(sides, **options).astype(np.float32) * low.scale
                # a component may lie between two integers
                assert np.abs(made[name].vectors(embedded) - integers).max() < 1.01 * low.scale
    numbers = []
    for bound in bounds:
        auto, view = encoder.using(num_btoks="auto", bound=bound), made[f"auto {bound:g}"]
        assert np.abs(view.vectors(embedded) - auto.encode(sides, **options)).max() < 1e-5
        numbers.append(view.budgets(embedded).mean())
    assert numbers == sorted(numbers, reverse=True) and numbers[-1] < 2 < numbers[0]


def test_scores_are_the_runners():
    encoder = nested()
    calibration = encoder.calibrate(texts(60, 1), show_progress=False)
    sides = texts(30)
    task = RetrievalTask(
        "t", "T", "image", "hit@1", sides[:10], sides[10:], [{i: 1.0} for i in range(10)]
    )
    made = dict(views.views_of((1, 4), (16,), 64, calibration, (0.1,), rows=True))
    found = views.score(encoder, [task], made)
    assert found.keys() == made.keys()
    embedded = views.embed(encoder, sides)
    for name, view in made.items():
        vectors = view.vectors(embedded)
        right = 0
        for i in range(10):
            query, scores = vectors[i], []
            for candidate in vectors[10:]:
                products = np.atleast_2d(query) @ np.atleast_2d(candidate).T
                scores.append(products.max(1).mean())
            right += int(np.argmax(scores) == i)
        assert found[name]["mean"] == found[name]["tasks"]["t"] == 10 * right
        assert ("tokens" in found[name]) == name.startswith("auto")


def fake(variant, seed, *scores, late=False):
    names = ["1 of 8", "2 of 8", "4 of 4", "4 of 8", "int8 4 of 8", "auto 0.1"]
    names += ["rows 4 of 8", "int8 rows 4 of 8"] if late else []
    found = {}
    for name, score in zip(names, scores, strict=True):
        found[name] = {"bytes": 32, "mean": score, "tasks": {}}
    found["auto 0.1"]["tokens"] = 1.5 + seed
    return {
        "variant": variant,
        "seed": seed,
        "says": f"it is {variant}",
        "options": "",
        "views": found,
    }


def content(tmp_path):
    runs = [fake("K4", s, 10, 20, 25, 40 + s, 39, 0) for s in (0, 1)]
    runs += [fake("nested", s, 30, 32, 35, 41 + s, 38, 36) for s in (0, 1)]
    runs += [fake("dims", s, 1, 2, 33 - s, 37, 36, 0) for s in (0, 1)]
    runs += [fake("multi", s, 1, 2, 3, 37, 36, 0, 44, 43, late=True) for s in (0, 1)]
    settings = {"caption_steps": 1, "steps": 2, "groups_per_batch": 1, "eval_queries": 40}
    settings |= {"commit": "abc", "device": "CPU", "versions": {"torch": "2"}}
    timed = {"ratio": 0.5, "interval": [0.4, 0.6], "ms": [2.0, 1.0], "tokens": 1}
    times = {"times": {"1": timed, "4": timed, "auto 0.1": timed}}
    return {"settings": settings, "scored": {"commit": "def"}, "times": times, "runs": runs}


def test_the_page_says_what_the_runs_say(tmp_path):
    budgets_page.write_page(tmp_path, content(tmp_path))
    text = (tmp_path / "studies-budgets.md").read_text()
    assert "| 4 | 40.5 ± 6.4 | 41.5 ± 6.4 | **+1.0 ± 0.0** | - | - |" in text
    assert "| 1 | - | 30.0 ± 0.0 | - | - | - |" in text
    assert "| fp32 4 | 32 | 32.5 ± 6.4 | 25.0 ± 0.0 | **+7.5 ± 6.4** |" in text
    assert "| multi | 4 | 32 | 37.0 ± 0.0 | 44.0 ± 0.0 | **+7.0 ± 0.0** | 43.0 ± 0.0 |" in text
    assert "| auto 0.1 | 2.0 | 36.0 ± 0.0 |" in text and "0.50 [0.40, 0.60] | 1.00 |" in text
    kept = json.loads((tmp_path / "studies-budgets.json").read_text())
    assert kept["width"] == 8 and len(kept["runs"]) == 8
    assert (tmp_path / "studies-budgets.png").stat().st_size > 10_000


def test_a_page_needs_runs(tmp_path, capsys):
    some = content(tmp_path)
    some["runs"] = [run for run in some["runs"] if run["variant"] != "nested"]
    with pytest.raises(ValueError, match="'nested' and 'K4' have no scored run yet"):
        budgets_page.write_page(tmp_path, some)
    assert budgets.main(["page", str(tmp_path), "--output", str(tmp_path)]) == 2
    assert "which holds no run that is done" in capsys.readouterr().err


def test_runs_are_trained_scored_and_shown(tmp_path, monkeypatch):
    words = "--caption-steps 1 --steps 1 --groups-per-batch 1 --eval-queries 40 --seeds 0 --output"
    words = [*words.split(), str(tmp_path), "--only", "K4", "nested"]
    for name, value in {"QUERIES": 40, "CALIBRATED": 1, "TIMED": 2}.items():
        monkeypatch.setattr(budgets, name, value)
    monkeypatch.setattr(budgets, "duel", lambda one, other, most: one() is other() or DUEL)
    assert budgets.main(words) == 0
    assert budgets.main(["score", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "nested-seed0" / "views.json").read_text())
    assert {"1 of 128", "16 of 32", "int8 16 of 128", "auto 0.02"} <= found.keys()
    metrics = json.loads((tmp_path / "nested-seed0" / "metrics.json").read_text())
    assert found["16 of 128"]["mean"] == pytest.approx(metrics["overall"], abs=0.3)
    assert budgets.main(["page", str(tmp_path / "page"), "--output", str(tmp_path)]) == 0
    assert "One model, many budgets" in (tmp_path / "page" / "studies-budgets.md").read_text()


DUEL = {"ratio": 1.0, "interval": [0.9, 1.1], "ms": [10.0, 10.0], "pairs": 7, "mib": [0, 0]}


def test_pairs_are_written_as_the_trainer_reads_them(tmp_path, monkeypatch):
    monkeypatch.setattr(negatives, "PAIRS", 16)
    negatives.write_pairs(tmp_path / "pairs")
    for task in negatives.TASKS:
        source = open_source(tmp_path / "pairs" / f"{task}.jsonl")
        for pair, had in zip(source, train_group(task, 0, 16, seed=2000), strict=True):
            assert (pair.query.text, pair.target) == (had.query.text, had.target)
            assert pair.positive_id == had.positive_id
            assert len(pair.positive.images) == len(had.positive.images)
            assert len(pair.positive.video) == len(had.positive.video)


def test_the_page_of_real_pairs_says_what_its_files_say(tmp_path):
    folder = tmp_path / "smollm2-budgets"
    for path in (folder, tmp_path / "smollm2"):
        path.mkdir()
    names = [f"{k} of 576" for k in (1, 2, 4, 8, 16)] + ["16 of 36", "int8 16 of 36", "auto 0.1"]
    settings = {"commit": "abc", "device": "CPU", "versions": {"torch": "2"}}
    for seed in (0, 1):
        views = {name: {"bytes": 36, "mrr": 20.0 + i + seed} for i, name in enumerate(names)}
        views["auto 0.1"]["tokens"] = 2.0 + seed
        run = {"seed": seed, "views": views, "settings": settings}
        (folder / f"wordnet-nested-seed{seed}.json").write_text(json.dumps(run))
        for k, variant in smollm2_budgets.FIXED.items():
            alone = {"seed": seed, "scores": {"wordnet": {"raw": {"mrr": 21.0 + seed + k}}}}
            file = tmp_path / "smollm2" / f"wordnet-{variant}-seed{seed}.json"
            file.write_text(json.dumps(alone))
    text = smollm2_budgets.page(folder)
    assert "| 1 | 22.5 ± 6.4 | 20.5 ± 6.4 | **-2.0 ± 0.0** | **-4.0 ± 0.0** |" in text
    assert "| fp32 36 | 36 | 25.5 ± 6.4 | **+1.0 ± 0.0** |" in text
    assert "| auto 0.1 | 2.5 | 27.5 ± 6.4 | **+3.0 ± 0.0** |" in text
    smollm2_budgets.picture(folder).savefig(tmp_path / "page.png")
    with pytest.raises(ValueError, match="has no nested runs"):
        smollm2_budgets.page(tmp_path)
