"""Weights are read and written a thread at a time, without transformers' bars, which come back."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Thread

import pytest
from helpers import tiny_backbone, tiny_checkpoint, tiny_tokenizer
from transformers.utils import logging

from btok import BTokEncoder
from btok.loading import alone
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


def test_a_hook_that_is_set_within_stays(capsys):
    """Also one that asks the hook it replaced, long after that ended."""
    asked = []

    def hook(make, given, named):
        asked.append(named.get("disable"))
        return make(*given, **named) if replaced is None else replaced(make, given, named)

    try:
        with alone():
            replaced = logging.set_tqdm_hook(hook)
            assert replaced is not None and not drawn(capsys)
        assert drawn(capsys) and asked == [None, None]
    finally:
        assert logging.set_tqdm_hook(None) is hook


def test_bars_of_other_threads_are_drawn(capsys):
    at, lines = Barrier(2), {}

    def first():
        with alone(), alone():
            at.wait(60)
            at.wait(60)  # the other has drawn, and waits for its turn or soon will
            lines["first"] = len(list(logging.tqdm(range(3), desc="first")))

    def second():
        at.wait(60)
        lines["outside"] = len(list(logging.tqdm(range(3), desc="outside")))
        at.wait(60)
        with alone():
            assert "first" in lines
            lines["within"] = len(list(logging.tqdm(range(3), desc="within")))

    threads = [Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    sys.stderr.flush()
    said = capsys.readouterr().err
    assert lines == {"first": 3, "outside": 3, "within": 3}
    assert "outside" in said and "within" not in said and "first" not in said
    assert drawn(capsys) and logging.set_tqdm_hook(None) is None


def test_threads_load_whole_models(checkpoint, tmp_path, capsys):
    """Of a tied checkpoint and of a stock one, whose embeddings grow, the head is tied in all."""
    stock = tmp_path / "stock"
    tiny_backbone(vocab_size=114).save_pretrained(stock)
    tiny_tokenizer().save_pretrained(stock)
    capsys.readouterr()
    ways = [lambda: BTokEncoder.from_pretrained(checkpoint).model] * 3
    ways.append(lambda: BTokModel.from_pretrained(stock, num_btoks=8))
    at = Barrier(len(ways))

    def load(way):
        at.wait(60)
        return [way().backbone for _ in range(4)]

    with ThreadPoolExecutor(len(ways)) as threads:
        made = [backbone for some in threads.map(load, ways) for backbone in some]
    assert len(made) == 16 and "MISSING" not in "".join(capsys.readouterr())
    assert all(each.lm_head.weight is each.get_input_embeddings().weight for each in made)
