"""`btok.tools.cli` under the path that it had."""

from typing import Any


def __getattr__(name: str) -> Any:
    from btok.tools import cli

    return getattr(cli, name)
