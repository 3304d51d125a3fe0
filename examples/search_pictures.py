"""Embed a folder's pictures and find them by words and by a picture.

    python examples/search_pictures.py FOLDER "red six bottom right" [CHECKPOINT]
    python examples/search_pictures.py FOLDER one.png [CHECKPOINT]

A query that is a file is taken as a picture. `make demo` leaves a FOLDER, runs/demo/files, and the
CHECKPOINT that is taken by default. Everything is encoded at each call; `python -m btok search`
keeps an index beside the folder, and reads videos, documents and texts too.
"""

import sys
from pathlib import Path

import torch

from btok import BTokEncoder
from btok.inputs import IMAGES


def main(folder: str, query: str, checkpoint: str = "runs/demo/checkpoint-1000") -> None:
    """Print the five pictures of a folder that are nearest to a query, with their cosines."""
    encoder = BTokEncoder.from_pretrained(checkpoint)
    encoder.model.to("cuda" if torch.cuda.is_available() else "cpu")
    paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in IMAGES)
    if not paths:
        sys.exit(f"error: {folder} has no pictures, expected files ending in {' '.join(IMAGES)}")

    names, parts = [], []
    # strict=False: a file that cannot be read is named, and the others go on
    for batch in encoder.encode_iter(paths, ids=paths, strict=False):
        names += batch.ids
        parts += list(batch.vectors)  # each [D], float32, unit norm
        for path, why in batch.errors.items():
            print(f"passed over {path}: {why}", file=sys.stderr)
    if not names:
        sys.exit(f"error: no picture of {folder} can be read")

    asked = Path(query) if Path(query).is_file() else query
    (vector,) = encoder.encode([asked])
    cosines = [float(vector @ part) for part in parts]
    for i in sorted(range(len(names)), key=lambda i: -cosines[i])[:5]:
        print(f"{cosines[i]:6.3f}  {names[i]}")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except (ValueError, OSError, ImportError) as error:  # a mistake, and not ours
        sys.exit(f"error: {error}")
