"""When the clients that look at a gateway again and again shall come next."""

from __future__ import annotations

import time

from serve_app.cluster import haproxy

HEADER = "x-poll-s"
"""Of an answer: the seconds after which its client shall ask again."""

MOST_S = 300.0
"""Seconds that a client is sent away for, at most."""

SHARE = 0.015
"""Part of a core that all of them together may take."""

COST_S = {"HAProxy": 0.0014, "Python proxy": 0.0035}
"""CPU time of the gateway for one request that comes alone, by Serve's proxy in front of it. Nearly
all of it is Serve's and the server's: docs/decisions.md."""


class Pace:
    """Has all of them together ask ``per_s`` times a second, however many there are.

    Each request takes some time for itself alone, and its client comes again when all the time that
    is taken is over. One that went away does not come, and nobody waits for it.
    """

    def __init__(self, per_s: float) -> None:
        self._each_s = 1 / per_s
        self._taken_until = 0.0
        """By ``time.monotonic``."""

    def next_s(self, least_s: float) -> float:
        """In how many seconds the client that asks now shall ask again; ``least_s`` if few do."""
        now = time.monotonic()
        taken = max(now, self._taken_until) + self._each_s
        self._taken_until = min(taken, now + MOST_S)
        return max(least_s, self._taken_until - now)


def affordable_per_s() -> float:
    """How many requests a second all clients together may make here."""
    return SHARE / COST_S["HAProxy" if haproxy.in_front() else "Python proxy"]
