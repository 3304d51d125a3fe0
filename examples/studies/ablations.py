"""What each part of the method is worth: the paper's ablations, and the number K.

    python examples/studies/ablations.py [--only VARIANT ...] [--seeds N ...] [--list]
    python examples/studies/ablations.py --page FOLDER

Every variant is trained on all tasks and compared, seed by seed, with the full method. With
--model, --data and --mmeb it is the paper's recipe, scored on MMEB-V2. Options: common.py.
"""

from __future__ import annotations

import sys

from examples.studies.common import Study, Variant, main

STUDY = Study(
    "ablations",
    "Ablations",
    {
        "full": Variant("K = 4, condensation mask, generative loss", (), "59.0 overall"),
        "no-mask": Variant("targets see the source too", ("--condense", "false"), "-1.1"),
        "no-generative": Variant("contrastive loss alone", ("--ntp-weight", "0"), "-1.4"),
        "last": Variant(
            "K = 0: the last token, contrastive loss alone",
            ("--num-btoks", "0", "--ntp-weight", "0"),
            "-2.9",
        ),
        "last-generative": Variant(
            "K = 0: the last token, generative loss without a mask",
            ("--num-btoks", "0", "--condense", "false"),
        ),
        "K1": Variant("K = 1", ("--num-btoks", "1")),
        "K8": Variant("K = 8", ("--num-btoks", "8")),
        "K2": Variant("K = 2", ("--num-btoks", "2")),
        "reconstruction": Variant(
            "a side's own text restored, none generated",
            ("--ntp-weight", "0", "--reconstruction-weight", "0.5"),
        ),
    },
    against="full",
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
