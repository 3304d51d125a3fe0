"""Weights are read and written without bars of transformers', which are as they were afterwards."""

from __future__ import annotations

import sys
from threading import Barrier, Thread

import pytest
from helpers import tiny_checkpoint
from transformers.utils import logging

from btok import BTokEncoder
from btok.bars import without_bars
from btok.model import BTokModel


def drawn(capsys, name="a bar"):
    """Whether transformers draws a bar."""
    capsys.readouterr()
    list(logging.tqdm(range(3), desc=name))
    return name in capsys.readouterr().err


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


def test_a_checkpoint_is_read_and_written_quietly(checkpoint, tmp_path, capsys):
    assert drawn(capsys)
    BTokEncoder.from_pretrained(checkpoint).model.save_pretrained(tmp_path / "again")
    assert capsys.readouterr() == ("", "")
    assert drawn(capsys)
    BTokModel.from_pretrained(tmp_path / "again", show_progress=True)
    assert "Loading weights" in capsys.readouterr().err
    with pytest.raises(ValueError, match="is no hub id"):
        BTokModel.from_pretrained(tmp_path / "gone")
    (tmp_path / "again/model.safetensors").write_bytes(b"none")
    with pytest.raises(ValueError, match="damaged"):
        BTokModel.from_pretrained(tmp_path / "again")
    assert drawn(capsys)


def test_bars_that_are_off_stay_off(checkpoint, capsys):
    logging.disable_progress_bar()
    try:
        BTokModel.from_pretrained(checkpoint)
        assert not drawn(capsys) and not logging.is_progress_bar_enabled()
    finally:
        logging.enable_progress_bar()


def test_anothers_hook_is_asked_and_stays(checkpoint, capsys):
    asked = []

    def hook(make, given, named):
        asked.append(named.get("disable"))
        return make(*given, **named)

    assert logging.set_tqdm_hook(hook) is None
    try:
        BTokModel.from_pretrained(checkpoint)
        assert asked and set(asked) == {True} and capsys.readouterr() == ("", "")
        assert drawn(capsys) and asked[-1] is None
    finally:
        assert logging.set_tqdm_hook(None) is hook


def test_each_thread_has_its_own(capsys):
    """One that ends first neither brings back the other's bars nor leaves its own away."""
    at, lines = Barrier(2), {}

    def first():
        with without_bars():
            at.wait(60)  # the other is outside
            at.wait(60)  # it has drawn
            at.wait(60)  # it is within
        at.wait(60)  # and this one no more

    def second():
        at.wait(60)
        lines["outside"] = len(list(logging.tqdm(range(3), desc="outside")))
        at.wait(60)
        with without_bars(), without_bars():
            at.wait(60)
            at.wait(60)
            lines["within"] = len(list(logging.tqdm(range(3), desc="within")))

    threads = [Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    sys.stderr.flush()
    said = capsys.readouterr().err
    assert lines == {"outside": 3, "within": 3} and "outside" in said and "within" not in said
    assert drawn(capsys) and logging.set_tqdm_hook(None) is None
