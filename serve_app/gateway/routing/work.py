"""What replicas have to do, in tokens of prompts, and how fast they do it.

A token of a prompt that is not in the KV cache has to be computed before the first byte of the
answer, and so have those of the prompts before it. The estimate is calibrated against itself: a
replica's rate is the tokens that were believed to be ahead of a call, and its own, by the time to
its first byte, of those that had to wait for nothing else.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

PRIOR_TOKENS_PER_S = 8000.0
"""Prefill rate before anything was measured: between a CPU's and an H100's. It matters only for
calls that would wait longer than ``max_wait_for_cache_s``; others are compared in tokens."""

_KEPT = 0.98
"""Part of what was measured that is kept at each further call: about the last 50 decide."""

_UP, _DOWN = 0.1, 0.025
"""Steps towards a measurement that is above or below what is known: so it comes to lie where four
of five are below."""

_EXPIRES = 2.0
"""A prompt whose first byte does not tell that it was read (the answer is no stream) counts as read
after so many times as long as was estimated."""


class Rate:
    """Tokens of prompts per second, of the fifth of the calls that were the fastest: others have
    waited for something else too, such as KV blocks or a step that decodes."""

    __slots__ = ("value",)

    def __init__(self, value: float = PRIOR_TOKENS_PER_S) -> None:
        self.value = value

    def measured(self, tokens: float, seconds: float) -> None:
        sample = tokens / seconds
        self.value += (_UP if sample > self.value else _DOWN) * (sample - self.value)


class Mean:
    """A ratio of two sums, in which what is old counts less and less."""

    __slots__ = ("above", "below")

    def __init__(self, prior: float, weight: float) -> None:
        self.above, self.below = prior * weight, weight

    def add(self, above: float, below: float) -> None:
        self.above = self.above * _KEPT + above
        self.below = self.below * _KEPT + below

    @property
    def value(self) -> float:
        return self.above / self.below


@dataclass(slots=True)
class _Prefill:
    tokens: float
    """Of the prompt, those that are not in the KV cache, as estimated."""

    ahead: float
    """Uncached tokens that the replica had to read before it."""

    began: float
    expires: float
    measures: bool
    first_byte_s: float | None = None


class Backlog:
    """The prompts of this gateway that one replica has yet to read."""

    def __init__(self, of_all: Rate | None = None) -> None:
        """``of_all`` is the rate of all replicas of the model, which measures as well."""
        self.tokens = 0.0
        """Of these prompts, those that are not in the KV cache."""

        self._of_all = of_all or Rate()
        self._own = Rate(self._of_all.value)
        self._calls: dict[str, _Prefill] = {}
        """Those that are not accounted for yet."""

        self._reading: dict[str, _Prefill] = {}
        self._expiring: list[tuple[float, str]] = []

    @property
    def rate(self) -> float:
        """Tokens of prompts that the replica reads in a second."""
        return self._own.value

    def began(
        self,
        id: str,
        tokens: float,
        ahead: float,
        now: float,
        *,
        streams: bool,
        measures: bool = True,
    ) -> None:
        """A call was sent there, with so many uncached tokens behind so many others.

        Args:
            streams: whether its first byte will tell when its prompt has been read.
            measures: whether this will tell the replica's rate.
        """
        expires = math.inf
        if not streams:
            expires = now + _EXPIRES * (ahead + tokens) / self.rate
            heapq.heappush(self._expiring, (expires, id))
        self._calls[id] = self._reading[id] = _Prefill(tokens, ahead, now, expires, measures)
        self.tokens += tokens

    def first_byte(self, id: str, now: float) -> None:
        """The first byte of a call's answer has come: its prompt has been read."""
        prefill = self._reading.get(id)
        if prefill and prefill.measures and prefill.expires == math.inf:
            prefill.first_byte_s = now - prefill.began
        self.read(id)

    def read(self, id: str) -> None:
        """A call's prompt has been read, or will not be."""
        if prefill := self._reading.pop(id, None):
            # From zero, so that rounding errors do not pile up.
            self.tokens = self.tokens - prefill.tokens if self._reading else 0.0

    def expire(self, now: float) -> None:
        """Count as read what must have been read by now."""
        while self._expiring and self._expiring[0][0] <= now:
            self.read(heapq.heappop(self._expiring)[1])

    def used(self, id: str, computed: int | None) -> None:
        """The engine computed so many tokens of a call's prompt; None where that is not known."""
        self.read(id)
        prefill = self._calls.pop(id, None)
        if prefill and computed is not None and prefill.first_byte_s:
            for rate in (self._own, self._of_all):
                rate.measured(prefill.ahead + computed, prefill.first_byte_s)
