"""The progress bars that transformers draws while it reads and writes weights."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

Hook = Callable[[Callable[..., Any], Sequence[Any], Mapping[str, Any]], Any]

_lock = threading.Lock()
_quiet: list[int] = []  # the threads that are within, once for each time
_before: Hook | None = None  # what transformers had before the first of them


@contextmanager
def without_bars() -> Iterator[None]:
    """Within, transformers draws no bars in this thread. Those of other threads and of downloads
    are as they were, and afterwards all are."""
    from transformers.utils.logging import set_tqdm_hook

    global _before
    me = threading.get_ident()
    with _lock:  # in a trainer one thread saves while another may load
        if not _quiet:
            _before = set_tqdm_hook(_make)
        _quiet.append(me)
    try:
        yield
    finally:
        with _lock:
            _quiet.remove(me)
            if not _quiet:
                set_tqdm_hook(_before)


def _make(make: Callable[..., Any], given: Sequence[Any], named: Mapping[str, Any]) -> Any:
    if threading.get_ident() in _quiet:
        named = {**named, "disable": True}
    return make(*given, **named) if _before is None else _before(make, given, named)
