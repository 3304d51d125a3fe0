"""Reading and writing weights by transformers: one thread at a time, and without its bars.

While transformers loads a model it takes `PreTrainedModel.tie_weights` and torch's initialisations
away from the whole process. A model that another thread loads meanwhile would have an lm_head of
its own, untrained, in place of the embedding matrix.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

_lock = threading.RLock()


@contextmanager
def alone(bars: bool = False) -> Iterator[None]:
    """A context that one thread at a time is within, and in which transformers draws no bars in
    that thread.

    Bars of other threads and of downloads are as they were, and afterwards all are; a hook that
    other code sets meanwhile (`transformers.utils.logging.set_tqdm_hook`) stays.

    Args:
        bars: have them all the same.
    """
    from transformers.utils.logging import set_tqdm_hook

    with _lock:
        if bars:
            yield
            return
        me: int | None = threading.get_ident()

        def hook(make: Callable[..., Any], given: Sequence[Any], named: Mapping[str, Any]) -> Any:
            if threading.get_ident() == me:
                named = {**named, "disable": True}
            return make(*given, **named) if before is None else before(make, given, named)

        before = set_tqdm_hook(hook)
        try:
            yield
        finally:
            me = None  # a hook that was set meanwhile may still ask this one
            if (last := set_tqdm_hook(before)) is not hook:
                set_tqdm_hook(last)
