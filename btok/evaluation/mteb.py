"""`MTEBEncoder` under its first path; `btok/tools/mteb.py` has it now."""

from typing import Any


def __getattr__(name: str) -> Any:
    from btok.tools import mteb

    return getattr(mteb, name)
