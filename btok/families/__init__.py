"""Backbone families: all that differs between them, a file each, and the table of them.

A new one is a file that says what there is to say (`family.py`) and a row here.
"""

from __future__ import annotations

from typing import Any

from btok.families.family import Family
from btok.families.idefics3 import IDEFICS3, SMOLVLM
from btok.families.llama import LLAMA
from btok.families.qwen2 import QWEN2
from btok.families.qwen2_5_vl import QWEN2_5_VL
from btok.families.qwen2_vl import QWEN2_VL
from btok.families.qwen3 import QWEN3
from btok.families.qwen3_vl import QWEN3_VL

FAMILIES: dict[str, Family] = {  # by a configuration's `model_type`
    "qwen2_vl": QWEN2_VL,
    "qwen2_5_vl": QWEN2_5_VL,
    "qwen3_vl": QWEN3_VL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "llama": LLAMA,
    "idefics3": IDEFICS3,
    "smolvlm": SMOLVLM,
}
DEFAULT = "qwen2_vl"  # of a processor that nothing says a family of

_WINDOW = (
    "most of its layers see a window of keys that moves with the row, and the condensation mask"
)
_WINDOW += " has one first key for all target rows"
_NOT_CAUSAL = "; the tokens of an image see later ones of it, and that mask is causal"
UNFIT = {  # asked for and refused: by `model_type`, why condensed attention is not theirs
    "gemma3": _WINDOW + _NOT_CAUSAL,
    "gemma3_text": _WINDOW,
}


def family_of(config: Any) -> Family:
    """The family of a backbone by its configuration.

    Raises:
        ValueError: a `model_type` that is not in `FAMILIES`.
    """
    return named_family(config.model_type)


def named_family(model_type: str, what: str = "the backbone's model_type") -> Family:
    """The family of a `model_type`; a ValueError says that `what` is none of `FAMILIES`."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        why = f" ({UNFIT[str(model_type)]})" if str(model_type) in UNFIT else ""
        raise ValueError(f"{what} is {model_type!r:.60}{why}, expected one of {tuple(FAMILIES)}")
    return FAMILIES[model_type]
