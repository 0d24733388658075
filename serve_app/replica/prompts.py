"""What gateways have sent a front end lately, for the others: each knows only its own requests.

A gateway that starts is told all that is kept: so it knows what its predecessor knew.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import NamedTuple

KEPT = 2**17
"""Characters of keys that are kept: those of 12 MB of prompts."""

KEPT_S = 300.0
"""Seconds for which they are kept: by then the engine may have other things in its cache."""


class _Sent(NamedTuple):
    gateway: str
    key: str
    at: float


class Prompts:
    """Keys of prompts, by the order in which they came."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._sent: deque[_Sent] = deque()
        self._characters = 0
        self.last = 0
        """The number of the last one; those before it are one less each."""

    def add(self, gateway: str, key: str) -> None:
        """A gateway has sent a request with this prompt."""
        self._sent.append(_Sent(gateway, key, self._now()))
        self._characters += len(key)
        self.last += 1
        while self._characters > KEPT:
            self._forget_first()

    def after(self, number: int, gateway: str) -> list[str]:
        """The keys after the one with this number that others than this gateway have sent."""
        while self._sent and self._sent[0].at < self._now() - KEPT_S:
            self._forget_first()
        # From the end: most of what is kept has been told.
        latest = list(islice(reversed(self._sent), max(0, self.last - number)))
        return [it.key for it in reversed(latest) if it.gateway != gateway]

    def forget(self) -> None:
        """The engine has dropped its cache."""
        self._sent.clear()
        self._characters = 0

    def _forget_first(self) -> None:
        self._characters -= len(self._sent.popleft().key)
