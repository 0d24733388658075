"""When the clients that look at a gateway again and again shall come next."""

from __future__ import annotations

import time

HEADER = "x-poll-s"
"""Of an answer: the seconds after which its client shall ask again."""

MOST_S = 60.0
"""Seconds that a client is sent away for, at most: one that asks in a loop takes many turns."""


class Pace:
    """Gives each client the next free turn.

    However many there are, all together then ask ``per_s`` times a second; ``least_s`` seconds are
    between two turns of one. A client that goes away leaves its turn unused.
    """

    def __init__(self, per_s: float, least_s: float) -> None:
        self._apart_s = 1 / per_s
        self._least_s = least_s
        self._last = 0.0

    def next_s(self) -> float:
        """In how many seconds the client that asks now has its next turn."""
        now = time.monotonic()
        self._last = min(max(now + self._least_s, self._last + self._apart_s), now + MOST_S)
        return self._last - now
