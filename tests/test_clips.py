"""Videos in parts: what a clip shows, and a folder whose videos are cut into clips."""

from __future__ import annotations

import os

import numpy as np
import pytest
from helpers import held, tiny_checkpoint
from test_inputs import video

pytest.importorskip("av", reason="PyAV (the extra `video`) is not installed")
from btok import BTokEncoder, Side
from btok.inputs import Clip, as_side, cut, duration, read_video, with_frames
from btok.tools.cli import main

LONG = list(range(250))  # 25 seconds, each frame a little brighter than the one before


def bright(frames):
    return np.array([frame.mean() for frame in frames])


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_a_clip_shows_its_part_of_the_video(tmp_path, name):
    path = video(tmp_path / name, bright=LONG)
    assert duration(path) == pytest.approx(25, abs=0.15)
    frames, seconds = read_video(path)
    assert len(frames) == 8 and np.abs(bright(frames) - 10 * np.array(seconds)).max() < 8
    frames, seconds = read_video(Clip(path, 10.0, 18.0))
    assert len(frames) == 8 and np.abs(np.array(seconds) - np.arange(0.5, 8)).max() < 0.15
    assert np.abs(bright(frames) - 10 * (10 + np.array(seconds))).max() < 8
    last, seconds = read_video(Clip(path, 24.0, 99.0))  # ends with the video
    assert bright(last).min() > 235 and max(seconds) < 1
    short, seconds = read_video(Clip(path, 3.0, 3.1))
    assert len(short) in (1, 2) and np.abs(bright(short) - 30).max() < 8
    side = with_frames(as_side(Clip(path, 10.0, 18.0)))
    assert len(side.video) == len(side.frame_seconds) == 8
    with pytest.raises(ValueError, match=r"a\.\w+ cannot be read: it ends at 2.*, a clip of it at"):
        read_video(Clip(path, 60.0, 61.0))


def test_what_cannot_be_cut(tmp_path):
    path = video(tmp_path / "a.avi", bf="2")  # AVI has no times for frames in another order
    assert duration(path) is None
    with pytest.raises(ValueError, match=r"a\.avi cannot be read: its frames have no times to cut"):
        read_video(Clip(path, 0.0, 1.0))
    for start, end in ((2.0, 1.0), (-1.0, 1.0), (0.0, float("inf")), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="expected 0 <= start < end"):
            Clip(path, start, end)
    with pytest.raises(ValueError, match="has 1 times beside the file"):
        with_frames(Side(video=Clip(path, 0.0, 1.0), frame_seconds=[0.5]))


def test_parts_are_equal_few_and_together_the_whole():
    assert cut(25.0, 10.0) == [(0.0, 8.333), (8.333, 16.667), (16.667, 25.0)]
    assert cut(20.0, 10.0) == [(0.0, 10.0), (10.0, 20.0)]
    assert cut(3.0, 10.0) == [(0.0, 3.0)] and cut(0.0, 10.0) == [(0.0, 0.001)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "films").mkdir()
    video(tmp_path / "films/long.mp4", bright=LONG)
    video(tmp_path / "films/short.mkv")
    video(tmp_path / "films/no times.avi", bf="2")
    (tmp_path / "films/note.ts").write_text("const a = 1;\n")  # a program's text
    (tmp_path / "films/broken.mp4").write_bytes(b"nothing")
    return tmp_path / "films"


@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.full)])
def test_a_folder_of_clips(folder, tmp_path, capsys, monkeypatch, engine):
    pytest.importorskip("lance", reason="pylance (the extra `lance`) is not installed")
    if engine == "ray":
        pytest.importorskip("ray", reason="Ray (the extra `ray`) is not installed")
    checkpoint = str(tiny_checkpoint(tmp_path / "tiny"))
    command = [checkpoint, str(folder), "--engine", engine]
    assert main(["encode", *command, "--clip", "10"]) == 0
    said = capsys.readouterr().err
    assert "4 files, 6 items, 6 of them new or changed, 0 gone, 1 unreadable" in said
    assert "broken.mp4: video" in said
    rows = held(folder / ".btok")
    times = {
        (item["uri"], item.get("start"), item.get("end"), item.get("duration"))
        for item, _ in rows.values()
    }
    assert times == {
        ("long.mp4", 0.0, 8.333, 25.0),
        ("long.mp4", 8.333, 16.667, 25.0),
        ("long.mp4", 16.667, 25.0, 25.0),
        ("short.mkv", 0.0, 2.5, 2.5),
        ("no times.avi", None, None, None),
        ("note.ts", None, None, None),
    }
    encoder = BTokEncoder.from_pretrained(checkpoint)
    (alone,) = encoder.encode([Clip(folder / "long.mp4", 8.333, 16.667)])
    stored = next(v for item, v in rows.values() if item.get("start") == 8.333)
    assert np.abs(stored - alone).max() < 1e-6

    if engine == "local":
        read = []
        made = lambda path: read.append(path) or duration(path)  # noqa: E731
        monkeypatch.setattr("btok.tools.folder.duration", made)
    os.rename(folder / "long.mp4", folder / "other.mp4")
    capsys.readouterr()
    assert main(["search", *command, "x", "--clip", "10", "--where", "start > 5"]) == 0
    said = capsys.readouterr()
    assert sorted(line.split(maxsplit=2)[2] for line in said.out.splitlines()) == [
        "other.mp4, 0:08-0:16",
        "other.mp4, 0:16-0:25",
    ]
    assert "4 files, 6 items, 0 of them new or changed" in said.err
    if engine == "local":  # nothing is opened whose length is known
        assert sorted(path.name for path in read) == ["broken.mp4", "no times.avi", "other.mp4"]

    assert main(["encode", *command, "--clip", "13"]) == 0
    said = capsys.readouterr().err
    assert "4 files, 5 items, 2 of them new or changed, 0 gone" in said  # halves, not thirds
    assert main(["encode", *command]) == 0
    assert "4 files, 2 of them new or changed, 0 gone" in capsys.readouterr().err
    assert main(["encode", *command, "--clip", "0"]) == 2
    assert "clip is 0.0, expected at least 0.1 seconds" in capsys.readouterr().err
