"""Which of a model's live front ends gets a call."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from serve_app.gateway.replicas import FrontEnd
from serve_app.gateway.stages import Call


class Policy(Protocol):
    """Chooses a front end. Called once for each attempt, in the event loop."""

    def choose(self, live: Sequence[FrontEnd], call: Call) -> FrontEnd:
        """One of ``live``, which is never empty.

        ``live`` has none that failed a moment ago, and a sleeping one only if all sleep.
        """
        ...


class FewestRequests:
    """The replica with the fewest requests from this gateway for its weight, and of it the front
    end with the fewest.

    Ties are broken at random, so that several gateways do not all pick the same one.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock

    def choose(self, live: Sequence[FrontEnd], call: Call) -> FrontEnd:
        if len(live) == 1:
            return live[0]
        now = self._clock()
        # With this one, so that of two idle replicas the one with the larger weight gets it.
        loads = [((it.replica.inflight + 1) / it.replica.weight(now), it.inflight) for it in live]
        least = min(loads)
        return random.choice([it for it, load in zip(live, loads, strict=True) if load == least])
