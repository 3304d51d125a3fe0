"""A folder of held-out files to search: scenes, digits, videos and pages of the test set."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from btok.files import rename
from train.pocket.data import held_out

COUNTS = {"I-CLS": 20, "I-RET": 60, "V-RET": 20, "VisDoc": 40}  # files of a task
FOLDERS = {"I-CLS": "digits", "I-RET": "scenes", "V-RET": "videos", "VisDoc": "pages"}
RATE = 2  # frames a second, as videos have that do not say


def write_files(folder: Path) -> None:
    """Write what the test set shows as files whose names say what is to be seen, the same bytes
    under the same versions of packages; nothing where the folder is there. Videos need PyAV (the
    extra `video`) and are left out without it.
    """
    from PIL import Image

    if folder.exists():  # perhaps with an index in it
        return
    draft = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(draft, ignore_errors=True)  # of a run that was killed
    for task, count in COUNTS.items():
        own = draft / FOLDERS[task]
        own.mkdir(parents=True)
        for number, record in enumerate(held_out(task, count)):
            if task == "I-CLS":  # several show the same digit
                name = f"{record.target.split(': ')[1]} {number}" if record.target else ""
            else:
                name = record.key if task == "VisDoc" else record.query.text
            path = own / name.replace(", ", "_").replace(" ", "-")
            if record.positive.video:
                write_video(path.with_name(f"{path.name}.mp4"), record.positive.video)
            else:
                (shown,) = record.query.images if task == "I-CLS" else record.positive.images
                Image.fromarray(shown).save(f"{path}.png")
    for own in draft.iterdir():
        if not any(own.iterdir()):
            own.rmdir()
    rename(draft, folder)


def write_video(path: Path, frames: Sequence[np.ndarray]) -> bool:
    """Write frames, uint8 [height, width, 3] of even size, as H.264 that browsers play.

    Returns:
        Whether it could: False without PyAV or an encoder in it.
    """
    try:
        import av

        av.Codec("libx264", "w")
    except (ImportError, ValueError):
        return False
    height, width, _ = frames[0].shape
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": "6"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return True
