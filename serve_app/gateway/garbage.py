"""Keeps Python's collector of garbage from stopping the streams.

A collection of all generations looks at every object while the event loop waits, and an open stream
has 170 of them: 0.5 s with 5,000 streams, several times while these open and now and then later.
It finds next to nothing: what requests leave behind is young, and found by the collections of the
young, which are short. So here all is looked at while little is open.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable

FEW = 200
"""Requests at once with which a collection of all takes no longer than 20 ms on a slow core."""

LONGEST_S = 3600.0
"""Seconds after which it is done in any case."""

_LOOK_S = 60.0
_SELDOM = 1_000_000
"""Collections of the middle generation before Python begins one of all by itself."""


async def run(running: Callable[[], int]) -> None:
    """Look after it for ever; ``running`` tells how many requests are open.

    What is there at the start stays, and is not looked at again.
    """
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, _SELDOM)
    gc.collect()
    gc.freeze()
    last = time.monotonic()
    while True:
        await asyncio.sleep(_LOOK_S)
        if is_due(gc.get_count()[2], running(), time.monotonic() - last):
            gc.collect()
            last = time.monotonic()


def is_due(grown: int, running: int, since_s: float) -> bool:
    """Whether to look at all objects now.

    Args:
        grown: collections of the middle generation since it was done last.
        running: requests that are open.
        since_s: seconds since it was done.
    """
    return grown > 0 and (running <= FEW or since_s >= LONGEST_S)
