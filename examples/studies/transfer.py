"""What training on images alone gives videos and pages: BToks beside the last token.

    python examples/studies/transfer.py [--only VARIANT ...] [--seeds N ...] [--list]
    python examples/studies/transfer.py --page FOLDER

Both variants see the image tasks' training pairs, the same in the same order, and are scored on
all tasks. The captioning that they start from shows videos and pages too, as a backbone's own
training does. With --model, --data and --mmeb it is the paper's recipe on MMEB-train's images,
scored on MMEB-V2. Options: common.py.
"""

from __future__ import annotations

import sys

from examples.studies.common import Study, Variant, main

STUDY = Study(
    "transfer",
    "Transfer from images alone",
    {
        "images-last": Variant(
            "K = 0: the last token, contrastive loss alone",
            ("--num-btoks", "0", "--ntp-weight", "0"),
        ),
        "images-btoks": Variant(
            "K = 4, condensation mask, generative loss",
            (),
            "+15.88 on visual documents",
        ),
    },
    against="images-last",
    images_only=True,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
