"""What mined negatives are worth: pairs in a file, with the negatives that a checkpoint found.

    python examples/studies/negatives.py [--only VARIANT ...] [--seeds N ...] [--list]
    python examples/studies/negatives.py --page FOLDER

The pairs are the pocket benchmark's, of the five tasks with many different positives, written to a
JSONL file each. As they are drawn from all over it, a batch has few near-duplicates, other than in
the benchmark's own training. `python -m btok mine` finds three negatives a pair by the checkpoint
that the same seed trained without any. Options: common.py.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from btok.data.records import Side
from btok.files import rename, write_text
from btok.tools.mine import Mine, mine
from examples.studies.common import Options, Study, Variant, main
from train.pocket.data import NTP_SIDE, train_group

TASKS = ("I-RET", "I-VG", "V-RET", "M-RET", "VisDoc")
PAIRS, GROUP = 512, 16  # of a task; pairs that `train_group` draws together
PLAIN, MINED = "{output}/pairs/mixture.toml", "{output}/mined-pairs-seed{seed}/mixture.toml"


def written(side: Side, folder: Path, name: str) -> str | dict[str, Any]:
    """A side as a row has it, its pictures written beside the file."""
    row: dict[str, Any] = {"text": side.text} if side.text else {}
    for kind, pictures in (("images", side.images), ("video", side.video)):
        paths = [f"pictures/{name}-{kind}{i}.png" for i in range(len(pictures))]
        for path, picture in zip(paths, pictures, strict=True):
            Image.fromarray(picture).save(folder / path)
        row |= {kind: paths} if paths else {}
    return side.text if set(row) == {"text"} else row


def write_pairs(folder: Path) -> None:
    """A JSONL file for each task, their pictures, and the mixture of them; once."""
    if folder.exists():
        return
    draft = folder.with_name(f"{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    (draft / "pictures").mkdir(parents=True)
    for task in TASKS:
        lines = []
        for group in range(PAIRS // GROUP):
            for i, pair in enumerate(train_group(task, group, GROUP, seed=2000)):
                name = f"{task}-{group}-{i}"
                row: dict[str, Any] = {
                    "query": written(pair.query, draft, f"{name}-query"),
                    "positive": written(pair.positive, draft, f"{name}-positive"),
                    "positive_id": pair.positive_id,
                }
                lines.append(json.dumps(row | ({"target": pair.target} if pair.target else {})))
        write_text(draft / f"{task}.jsonl", "\n".join(lines) + "\n")
    write_text(draft / "mixture.toml", mixture())
    rename(draft, folder)


def mixture(root: str = "") -> str:
    """The five files as data sets; where their paths start, if not beside them."""
    where = f"root = {json.dumps(root)}\n" if root else ""
    return "\n".join(
        f'[[dataset]]\npath = "{task}.jsonl"\nntp_side = "{NTP_SIDE[task]}"\n{where}'
        for task in TASKS
    )


def prepare(options: Options, name: str, seed: int) -> None:
    """The pairs, and for "mined" their negatives by the checkpoint that was trained without."""
    pairs = options.output / "pairs"
    write_pairs(pairs)
    folder = Path(MINED.format(output=options.output, seed=seed)).parent
    if name != "mined" or (folder / "mixture.toml").exists():
        return
    checkpoint = options.output / f"pairs-seed{seed}" / f"checkpoint-{options.steps}"
    if not checkpoint.exists():
        raise ValueError(f"only is 'mined' with seed {seed}, expected 'pairs' of it before")
    files = tuple(pairs / f"{task}.jsonl" for task in TASKS)
    mine(Mine(str(checkpoint), files, folder, count=3, ranks=(1, 10), draw="random", short="fill"))
    write_text(folder / "mixture.toml", mixture())


STUDY = Study(
    "negatives",
    "Mined negatives: five tasks trained, nine scored",
    {
        "pairs": Variant("the pairs alone", ("--data", PLAIN)),
        "mined": Variant("three mined negatives each", ("--data", MINED)),
        "more-pairs": Variant(
            "the pairs alone, two and a half times as many in a batch",
            ("--data", PLAIN, "--groups-per-batch", "5"),
        ),
        "hardness": Variant(
            "the pairs alone, near negatives weigh more", ("--data", PLAIN, "--hardness", "5")
        ),
    },
    against="pairs",
    prepare=prepare,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
