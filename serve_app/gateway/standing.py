"""How much a replica can be asked to do beside its siblings: its weight.

A new replica begins with little (its caches are empty, its kernels cold), as Envoy's ``slow_start``
has it. One that answers with errors, or later than its siblings, gets less for a while, as in
Envoy's outlier detection: never more than half of a model's replicas, and each comes back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median_high
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serve_app.gateway.ledger import Entry
    from serve_app.gateway.replicas import Board, Replica

logger = logging.getLogger("ray.serve")

LEAST = 0.1
"""What a new replica begins with (Envoy's ``min_weight_percent``), and the least of a slow one: who
got nothing could not show that it is well again."""

OUT = 0.001
"""The weight of one with faults: none to speak of, while another one has room. It has the fewest
requests, since its errors come at once, so with a tenth it would still get the most."""

SLOW_START_S = 10.0
"""Seconds in which a weight grows to 1."""

FAULTS = 5
"""Answers in a row with a status from 500 on, or broken off, that make an outlier (Envoy's
``consecutive_5xx``)."""

OUT_S = 30.0
"""Seconds with that weight after the first faults; the second time twice as long, and so on
(Envoy's ``base_ejection_time``)."""

MOST_OUT_S = 300.0
"""The most of it (Envoy's ``max_ejection_time``). After as long without faults they are forgotten.
"""

SLOWER = 4.0
"""An outlier in TTFT has so many times the median of its siblings. Its weight is then the inverse
of that ratio, so that a replica that is five times as slow gets a fifth. With 3 and fewer streams,
equal replicas under much load were taken for slow (docs/decisions.md)."""

BASE_TOKENS = 512
"""A TTFT is the time for so many tokens more than the prompt has: the step that runs already, and
what a request costs whatever its length (about 20 ms, at 25,000 tokens/s)."""

ENOUGH = 50
"""Streams of a replica before it is compared."""

_FADE = 0.02
"""What each TTFT takes from the weight of those before it."""

OUT_OF_DATE_S = 60.0
"""Seconds after which a replica's TTFTs tell nothing of it any more."""

_JUDGE_S = 1.0
"""Seconds between two comparisons of a replica with its siblings."""


@dataclass
class Standing:
    """What speaks for and against one replica."""

    since: float = float("-inf")
    """By ``time.monotonic``: when its weight begins to grow. Until then it is :data:`OUT`."""

    faults: int = 0
    """In a row."""

    out: int = 0
    """How many times it has been an outlier by faults, of late."""

    slowness: float = 1.0
    """Its TTFT by that of its siblings where it is an outlier, else 1."""

    streams: int = 0
    """Those whose TTFT is in the two below."""

    seconds: float = 0.0
    tokens: float = 0.0
    """Sums of TTFTs and of the tokens that were computed for them; the later ones count more."""

    told: float = float("-inf")
    """When the last TTFT was added."""

    judged: float = float("-inf")

    def weight(self, now: float) -> float:
        """Above 0 and at most 1."""
        if now < self.since:
            return OUT
        grown = (now - self.since) / SLOW_START_S
        if now - self.told < OUT_OF_DATE_S:
            grown = min(grown, 1 / self.slowness)
        return min(1.0, max(LEAST, grown))

    def is_outlier(self, now: float) -> bool:
        """Whether it gets less for its faults or its TTFT, not because it is new."""
        slow = self.slowness > 1 and now - self.told < OUT_OF_DATE_S
        return slow or (self.out > 0 and now < self.since)

    def took(self, seconds: float, tokens: int, now: float) -> None:
        """Add a TTFT, and the tokens that were computed for it."""
        if now - self.told >= OUT_OF_DATE_S:
            self.streams, self.seconds, self.tokens, self.slowness = 0, 0.0, 0.0, 1.0
        self.told = now
        self.streams += 1
        self.seconds += seconds - _FADE * self.seconds
        self.tokens += BASE_TOKENS + tokens - _FADE * self.tokens

    def pace(self, now: float) -> float | None:
        """Seconds for each token until the first one is there; None where too little is known."""
        known = self.streams >= ENOUGH and now - self.told < OUT_OF_DATE_S
        return self.seconds / self.tokens if known else None


class Outliers:
    """A listener of the ledger that compares each replica with its siblings."""

    def __init__(self, board: Board, clock: Callable[[], float] = time.monotonic) -> None:
        self._board = board
        self._clock = clock

    def entered(self, entry: Entry) -> None:
        """Take how a request ended at the replica that had it last."""
        front_end = self._board.find(entry.model, entry.replica)
        if front_end is None:
            return
        replica, now = front_end.replica, self._clock()
        standing = replica.standing
        if _is_fault(entry):
            standing.faults += 1
            if standing.faults >= FAULTS:
                self._failed(entry.model, replica, now)
        elif entry.end == "answered":
            standing.faults = 0
        usage, first = entry.usage, entry.first_byte_s
        # Of one that was sent twice, this replica had only the second part of the time.
        if first is not None and usage and entry.streamed and not entry.retries:
            computed = usage.prompt_tokens - usage.cached_tokens
            standing.took(first - entry.queued_s, computed, now)
            if now - standing.judged >= _JUDGE_S:
                standing.judged = now
                self._compare(entry.model, replica, now)

    def _failed(self, model: str, replica: Replica, now: float) -> None:
        """It has faults in a row: less for it, unless the others are no better."""
        siblings, standing = self._siblings(model, replica), replica.standing
        if now < standing.since or not _may_be_out(siblings, now):
            return
        if median_high(it.faults for it in siblings) >= FAULTS:
            return
        if now - standing.since > MOST_OUT_S:
            standing.out = 0
        standing.out += 1
        standing.since = now + min(MOST_OUT_S, OUT_S * standing.out)
        logger.warning(
            f"model '{model}', replica {replica.id}: {standing.faults} errors in a row; others get "
            f"its requests for {standing.since - now:.0f} s"
        )
        standing.faults = 0

    def _compare(self, model: str, replica: Replica, now: float) -> None:
        """Hold its TTFT against those of the others."""
        siblings, standing = self._siblings(model, replica), replica.standing
        paces = [pace for it in siblings if (pace := it.pace(now)) is not None]
        mine = standing.pace(now)
        before, standing.slowness = standing.slowness, 1.0
        if mine is None or not paces or not _may_be_out(siblings, now):
            return
        ratio = mine / max(median_high(paces), 1e-9)
        if ratio >= SLOWER:
            standing.slowness = ratio
        if ratio >= SLOWER and before == 1.0:
            logger.warning(
                f"model '{model}', replica {replica.id}: its TTFT is {ratio:.1f} times that of "
                "the others; it gets less"
            )

    def _siblings(self, model: str, replica: Replica) -> list[Standing]:
        return [it.standing for it in self._board.replicas_of(model) if it is not replica]


def _may_be_out(siblings: Sequence[Standing], now: float) -> bool:
    """Whether one more outlier leaves at least half of the replicas."""
    return sum(it.is_outlier(now) for it in siblings) < (len(siblings) + 1) // 2


def _is_fault(entry: Entry) -> bool:
    """Whether the replica failed: it answered so, was lost, or stayed silent for too long."""
    if entry.end == "answered":
        return entry.status >= 500
    return entry.end == "lost" or entry.status == 504
