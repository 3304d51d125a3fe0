"""One model for many budgets: what training for them costs, and a score for every number of bytes.

    python bench/studies/budgets.py [--only VARIANT ...] [--seeds N ...] [--list] [--page FOLDER]

Every variant is trained on all tasks of the pocket benchmark from its seed's one captioning model
(options: common.py), then scored in every way that it has: with the first k of its K bottleneck
tokens, the first d components of its embedding, those as integers, its rows as vectors.
"""

from __future__ import annotations

import sys

from bench.studies.common import Study, Variant, main

BUDGETS = (1, 2, 4, 8, 16)
DIMS = (16, 32, 64)
K16 = ("--num-btoks", str(BUDGETS[-1]))
NESTED = (*K16, "--budgets", *map(str, BUDGETS))
EVERY_DIM = ("--dims", *map(str, DIMS))
STUDY = Study(
    "budgets",
    "One model, many budgets",
    {
        **{f"K{k}": Variant(f"K = {k} alone", ("--num-btoks", str(k))) for k in BUDGETS},
        "nested": Variant("K = 16, and its first 1, 2, 4, 8 tokens", NESTED),
        "dims": Variant("K = 4, and the first 16, 32, 64 components", EVERY_DIM),
        "multi": Variant(
            "K = 16 nested, half the loss of the rows as vectors",
            (*NESTED, "--multi-vector", "0.5"),
        ),
        "all": Variant(
            "both: budgets, components, rows as vectors",
            (*NESTED, *EVERY_DIM, "--multi-vector", "0.5"),
        ),
        "reconstruction": Variant(
            "K = 4, a side's own text restored, none generated",
            ("--ntp-weight", "0", "--reconstruction-weight", "0.5"),
        ),
        "both-losses": Variant(
            "K = 4, generated where a side has a target, else restored",
            ("--reconstruction-weight", "0.5"),
        ),
        "warm-up": Variant(
            "K = 4, the first quarter of the steps without the contrastive loss",
            ("--reconstruction-weight", "0.5", "--contrastive-from", "50"),
        ),
    },
    against="K4",
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
