"""The same loss curve under every implementation of the attention.

Two that differ by rounding part in time, as two runs do from weights that differ by rounding: a
step of this batch was up to 13 % apart, soon after the bottleneck tokens came in, means over 20
steps 1.1 %. The bands are on the first steps, which show a wrong kernel, and on the means.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from train.main import main

STEPS = 200
BATCH = "--group-size 8 --groups-per-batch 2"  # a dense mask of the recipe's whole batch takes long
FIRST_STEPS, BAND = 20, 1e-3
MEAN_BAND = 0.03  # of 20 steps together


def curve(folder, attention):
    """Losses [steps] of a pocket run."""
    words = f"pocket --output {folder / attention} --attention {attention} --eval-queries 0"
    words += f" --caption-steps {STEPS // 2} --reading-steps 25 --steps {STEPS // 2} {BATCH}"
    words += " --warmup-steps 10 --checkpoint-every 1000"
    assert main(words.split()) == 0
    lines = (folder / attention / "log.jsonl").read_text().splitlines()
    return np.array([json.loads(line)["loss"] for line in lines])


@pytest.mark.full
def test_the_loss_curve_is_the_same_under_every_attention(tmp_path):
    want, got = curve(tmp_path, "sdpa"), curve(tmp_path, "reference")
    assert len(want) == len(got) == STEPS and (got != want).any()
    assert want[STEPS // 2 - 20 : STEPS // 2].mean() < 0.5 * want[:5].mean()  # it learns
    assert (abs(got - want) / want)[:FIRST_STEPS].max() < BAND
    window = np.ones(20) / 20
    want, got = (np.convolve(x, window, "valid") for x in (want, got))
    assert (abs(got - want) / want).max() < MEAN_BAND


def test_an_attention_that_cannot_run_here_is_told_before_any_work(tmp_path, capsys):
    words = f"pocket --output {tmp_path / 'run'} --attention xformers --steps 1 --caption-steps 1"
    assert main(words.split()) == 2
    assert "attention is 'xformers'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
