"""Which of a model's live front ends gets a call."""

from __future__ import annotations

import random
from collections.abc import Sequence
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
    """The replica with the fewest requests from this gateway, and of it the front end with these.

    Ties are broken at random, so that several gateways do not all pick the same one.
    """

    def choose(self, live: Sequence[FrontEnd], call: Call) -> FrontEnd:
        if len(live) == 1:
            return live[0]
        fewest = min((it.replica.inflight, it.inflight) for it in live)
        return random.choice([it for it in live if (it.replica.inflight, it.inflight) == fewest])
