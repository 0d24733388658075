"""Which of a model's live front ends gets a call."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from serve_app.gateway.replicas import FrontEnd, Replica
from serve_app.gateway.stages import Call


class Policy(Protocol):
    """Chooses a front end. Called once for each attempt, in the event loop."""

    def choose(self, live: Sequence[FrontEnd], call: Call) -> FrontEnd:
        """One of ``live``, which is never empty.

        ``live`` has none that failed a moment ago, and a sleeping one only if all sleep.
        """
        ...

    def waits_for(
        self, live: Sequence[FrontEnd], call: Call, full: Mapping[Replica, int]
    ) -> tuple[Replica, float] | None:
        """A replica that has no room now and is worth waiting for, and for how many seconds at
        most; None where the call shall go to one of ``live`` now.

        Args:
            full: by replica without room: how many calls must end there before this one has a
                place; 0 where no replica has ample room, so that all wait.
        """
        return None

    def key(self, call: Call) -> bytes:
        """What other gateways are told of its prompt; empty where nothing."""
        return b""

    def first_byte(self, call: Call) -> None:
        """The answer has begun."""
        return

    def left(self, call: Call) -> None:
        """The attempt has ended, well or not."""
        return


class FewestRequests(Policy):
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
