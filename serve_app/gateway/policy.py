"""Which of a model's live replicas gets a call."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol

from serve_app.gateway.replicas import Replica
from serve_app.gateway.stages import Call


class Policy(Protocol):
    """Chooses a replica. Called once for each attempt, in the event loop."""

    def choose(self, live: Sequence[Replica], call: Call) -> Replica:
        """One of ``live``, which is never empty.

        ``live`` has no replica that failed a moment ago, and a sleeping one only if all sleep.
        """
        ...


class FewestRequests:
    """The replica with the fewest requests from this gateway.

    Ties are broken at random, so that several gateways do not all pick the same one.
    """

    def choose(self, live: Sequence[Replica], call: Call) -> Replica:
        if len(live) == 1:
            return live[0]
        fewest = min(replica.inflight for replica in live)
        return random.choice([replica for replica in live if replica.inflight == fewest])
