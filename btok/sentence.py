"""`btok.tools.sentence` under the path that older saved checkpoints name in their modules.json."""

from typing import Any


def __getattr__(name: str) -> Any:
    from btok.tools import sentence

    return getattr(sentence, name)
