"""What each replica of a model has to do, in tokens, and how fast it does it.

A token of a prompt that is not in the KV cache costs an engine a step's share; how many of these
are ahead of a request decides its TTFT. All estimates are calibrated against themselves: the rate
is the tokens that were believed to be ahead of a call, and its own, by the time to its first byte.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

PRIOR_TOKENS_PER_S = 8000.0
"""Prefill rate before anything was measured: between a CPU's and an H100's. It matters only for
calls that would wait longer than ``max_wait_for_cache_s``; others are compared in tokens."""

_PRIOR_S = 1.0
"""Weight of what is known of a model's replicas in the rate of one of them, in seconds of it."""

_KEPT = 0.98
"""Part of what was measured that is kept at each further call: the last 50 decide."""

_EXPIRES = 2.0
"""A prompt whose first byte does not tell that it was read (the answer is no stream) counts as read
after so many times as long as was estimated."""


class Rate:
    """Tokens per second, of the latest measurements; long ones weigh more."""

    def __init__(self, tokens: float = 0.0, seconds: float = 0.0) -> None:
        self.tokens = tokens
        self.seconds = seconds

    def measured(self, tokens: float, seconds: float) -> None:
        self.tokens = self.tokens * _KEPT + tokens
        self.seconds = self.seconds * _KEPT + seconds


class Mean:
    """A ratio of two sums, in which what is old counts less and less."""

    def __init__(self, prior: float, weight: float) -> None:
        self._above, self._below = prior * weight, weight

    def add(self, above: float, below: float) -> None:
        self._above = self._above * _KEPT + above
        self._below = self._below * _KEPT + below

    @property
    def value(self) -> float:
        return self._above / self._below


@dataclass(slots=True)
class Prefill:
    """A prompt on its way through a replica."""

    replica: str
    tokens: float
    """Of it, those that are not in the KV cache, as estimated."""

    ahead: float
    """Uncached tokens that the replica had to read before it."""

    began: float
    expires: float
    """When it counts as read without a first byte."""

    first_byte_s: float | None = None


class Load:
    """One replica's prompts that are being read, of this gateway."""

    def __init__(self) -> None:
        self.tokens = 0.0
        """Sum of those that are not in its KV cache."""

        self.rate = Rate()
        self._reading: dict[str, Prefill] = {}
        self._expiring: list[tuple[float, str]] = []

    def add(self, id: str, prefill: Prefill) -> None:
        self._reading[id] = prefill
        self.tokens += prefill.tokens
        if prefill.expires < math.inf:
            heapq.heappush(self._expiring, (prefill.expires, id))

    def read(self, id: str) -> None:
        """A prompt has been read, or will not be."""
        if prefill := self._reading.pop(id, None):
            # Without rounding errors that pile up.
            self.tokens = self.tokens - prefill.tokens if self._reading else 0.0

    def expire(self, now: float) -> None:
        """Count as read what must have been read by now."""
        while self._expiring and self._expiring[0][0] <= now:
            self.read(heapq.heappop(self._expiring)[1])


class Work:
    """All replicas of one model."""

    def __init__(self) -> None:
        self._loads: dict[str, Load] = {}
        self._rate = Rate(PRIOR_TOKENS_PER_S * _PRIOR_S, _PRIOR_S)
        self._calls: dict[str, Prefill] = {}

    def uncached(self, replica: str, now: float) -> float:
        """This gateway's uncached prompt tokens that the replica has yet to read."""
        if load := self._loads.get(replica):
            load.expire(now)
            return load.tokens
        return 0.0

    def rate(self, replica: str) -> float:
        """Tokens of prompts that a replica reads in a second."""
        of_all = self._rate.tokens / self._rate.seconds
        load = self._loads.get(replica)
        if load is None:
            return of_all
        rate = load.rate
        return (rate.tokens + of_all * _PRIOR_S) / (rate.seconds + _PRIOR_S)

    def began(
        self, id: str, replica: str, tokens: float, ahead: float, now: float, *, streams: bool
    ) -> None:
        """A call was sent to a replica, with so many uncached tokens behind so many others."""
        lasts = _EXPIRES * (ahead + tokens) / self.rate(replica)
        prefill = Prefill(replica, tokens, ahead, now, math.inf if streams else now + lasts)
        self._calls[id] = prefill
        self._loads.setdefault(replica, Load()).add(id, prefill)

    def first_byte(self, id: str, now: float) -> None:
        """The first byte of a call's answer has come: its prompt has been read."""
        if prefill := self._calls.get(id):
            self._read(id, prefill)
            if prefill.expires == math.inf:
                prefill.first_byte_s = now - prefill.began

    def ended(self, id: str) -> None:
        """It has ended at that replica, well or not."""
        if prefill := self._calls.get(id):
            self._read(id, prefill)

    def used(self, id: str, tokens: float | None) -> None:
        """The engine computed so many tokens of its prompt; None where that is not known."""
        prefill = self._calls.pop(id, None)
        if prefill and tokens is not None and prefill.first_byte_s:
            self._rate.measured(prefill.ahead + tokens, prefill.first_byte_s)
            if load := self._loads.get(prefill.replica):
                load.rate.measured(prefill.ahead + tokens, prefill.first_byte_s)

    def forget(self, replica: str) -> None:
        """A replica is gone."""
        self._loads.pop(replica, None)

    @property
    def replicas(self) -> set[str]:
        return set(self._loads)

    def _read(self, id: str, prefill: Prefill) -> None:
        if load := self._loads.get(prefill.replica):
            load.read(id)
