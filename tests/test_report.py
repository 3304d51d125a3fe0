"""The report's table of several runs."""

from __future__ import annotations

import json

import pytest

from bench.report import pocket_table


def run(folder, seed, score, digest="a"):
    row = {"metric": "hit@1", "chance": 10.0, "floor": 25.0, "score": score, "hard_only": score + 1}
    tasks = {"I-CLS": row, "I-QA": row | {"score": score + 20}}
    path = folder / f"{seed}-{digest}.json"
    path.write_text(json.dumps({"tasks": tasks, "settings": {"seed": seed}, "data_digest": digest}))
    return str(path)


def test_a_column_per_run_and_the_means(tmp_path):
    lines = pocket_table([run(tmp_path, 0, 40.0), run(tmp_path, 1, 50.0)]).splitlines()
    assert lines[0] == "| task | metric | chance | floor | seed 0 | seed 1 | mean | hard only |"
    assert lines[2] == "| I-CLS | hit@1 | 10.0 | 25.0 | 40.0 | 50.0 | 45.0 | 46.0 |"
    assert lines[3] == "| I-QA | hit@1 | 10.0 | 25.0 | 60.0 | 70.0 | 65.0 | 46.0 |"
    bold = " | ".join(f"**{x}**" for x in ("10.0", "25.0", "50.0", "60.0", "55.0", "46.0"))
    assert lines[4] == f"| **mean** |  | {bold} |"


def test_runs_on_other_data_are_refused(tmp_path):
    with pytest.raises(ValueError, match="different data"):
        pocket_table([run(tmp_path, 0, 40.0), run(tmp_path, 1, 50.0, digest="b")])
