"""What keys have taken here and at the other gateways, and how much more they may take here.

Every half second, in the background, each gateway tells all it has counted and hears what the
others have (:mod:`serve_app.cluster.limits_actor`). In between it leases itself a share of what a
key had left then: an equal part or, where the key asks mostly here, a larger one. What it hears is
up to one exchange old. So the gateways together overshoot a limit by no more than one lease of
each. While the actor is away, each goes on with its last share, or with an equal part of the limit.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from serve_app.cluster.limits_actor import DAILY, DAY_S, Counted, Told, decode_limits
from serve_app.gateway.windows import Span, Taken

logger = logging.getLogger("ray.serve")

EVERY_S = 0.5
"""Seconds between two exchanges."""

LOST_S = 5.0
"""Seconds without an exchange after which the others' running requests do not count any more."""

_TIMEOUT_S = 2.0

_START_S = 60.0
"""Seconds that the actor may take to start, before its silence is worth a word."""

_PRUNE_S = 10.0


@dataclass(frozen=True, eq=False)
class Limit:
    """A kind of limit."""

    setting: str
    """Its name in :class:`serve_app.config.keys.KeyLimits`."""

    span: Span


REQUESTS = Limit("requests_per_minute", Span(10.0, 6))
TOKENS = Limit("tokens_per_minute", Span(10.0, 6))
AT_ONCE = Limit("concurrent_requests", Span(float("inf")))
TODAY = Limit(DAILY, Span(DAY_S))
LIMITS = (REQUESTS, TOKENS, AT_ONCE, TODAY)


class _Noted(NamedTuple):
    """What was taken of a limit when a gateway last heard of the others."""

    exchange: int = 0
    """How many exchanges there had been."""

    here: float = 0.0
    there: float = 0.0
    here_before: float = 0.0
    """Here, as noted after an earlier exchange."""


class Room(NamedTuple):
    """What can be taken of a limit."""

    wait: float
    """Seconds until the amount asked for can be; 0: at once; infinite: never."""

    left: float
    """How much still can be, at all gateways together."""


class Counts:
    """What was taken of each limit, by ``scope``: a key, or a key and a model.

    Times are in seconds since the epoch, amounts in requests or tokens.
    """

    def __init__(self) -> None:
        self._own: Counted = {}
        self._others: Told = {}
        self._heard: dict[str, dict[str, Taken]] = {}
        """What has been decoded of it: keys are many, and few ask within half a second."""

        self._pruned = 0
        self._live = 1
        """Gateways, this one included."""

        self._exchanges = 0
        self._heard_at = 0.0
        self._noted: dict[tuple[str, str], _Noted] = {}
        """By scope and limit."""

    def room(self, scope: str, limit: Limit, most: float, amount: float, now: float) -> Room:
        """Whether there is room for ``amount``, so that no more than ``most`` is taken."""
        own, others = self._taken(scope, limit)
        here = limit.span.used(own, now)
        there = limit.span.used(others, now) if others else 0.0
        left = max(0.0, most - here - there)
        if amount > most:
            return Room(float("inf"), left)
        excess = here + there + amount - most
        if not amount:
            return Room(0.0, left)
        if excess > _ROUNDING:
            return Room(max(limit.span.wait(_sum(own, others), excess, now), _ROUNDING), left)
        if self._live > 1 and not self._leased(scope, limit, most, here, there, amount):
            return Room(EVERY_S, left)
        return Room(0.0, left)

    def reset(self, scope: str, limit: Limit, now: float) -> float:
        """Seconds until all of it can be taken again."""
        return max(limit.span.ends(taken, now) for taken in self._taken(scope, limit))

    def take(self, scope: str, limit: Limit, amount: float, now: float) -> int:
        """Count an amount; return the bucket that it is in."""
        bucket = limit.span.bucket(now)
        taken = self._own.setdefault(scope, {}).setdefault(limit.setting, {})
        taken[bucket] = taken.get(bucket, 0.0) + amount
        return bucket

    def correct(self, scope: str, limit: Limit, bucket: int, more: float, now: float) -> None:
        """Count ``more`` than was taken, from now on; or less, in the bucket it was taken in."""
        if more > 0:
            self.take(scope, limit, more, now)
        elif bucket in (taken := self._own.get(scope, {}).get(limit.setting, {})):
            taken[bucket] += more

    def report(self, now: float) -> Counted:
        """All that was taken here and still counts. Forgets the rest, now and then."""
        if (tick := int(now // _PRUNE_S)) != self._pruned:
            self._pruned = tick
            for scope, limits in list(self._own.items()):
                self._prune(scope, limits, now)
        return self._own

    def _prune(self, scope: str, limits: dict[str, Taken], now: float) -> None:
        for limit in LIMITS:
            if taken := limits.get(limit.setting):
                limit.span.prune(taken, now)
        if not any(any(taken.values()) for taken in limits.values()):
            del self._own[scope]
            for limit in LIMITS:
                self._noted.pop((scope, limit.setting), None)

    def heard(self, others: Told, live: int) -> None:
        """Take what the other gateways have counted, and how many there are with this one."""
        self._others, self._heard, self._live = others, {}, live
        self._exchanges += 1
        self._heard_at = time.monotonic()

    def _taken(self, scope: str, limit: Limit) -> tuple[Taken, Taken]:
        own = self._own.get(scope, {}).get(limit.setting, {})
        if scope not in self._others or (limit is AT_ONCE and self._lost()):
            return own, {}
        if (heard := self._heard.get(scope)) is None:
            heard = self._heard[scope] = decode_limits(self._others[scope])
        return own, heard.get(limit.setting, {})

    def _leased(
        self, scope: str, limit: Limit, most: float, here: float, there: float, amount: float
    ) -> bool:
        """Whether this gateway's share has room. One request it always has, however large."""
        key = scope, limit.setting
        then = self._noted.get(key, _Noted())
        if then.exchange != self._exchanges:
            then = self._noted[key] = _Noted(self._exchanges, here, there, then.here)
        if here <= then.here:
            return True
        part = 1 / self._live
        if (
            then.here and then.here_before
        ):  # else the others may have begun as well, and not told yet
            part = max(part, then.here / (then.here + then.there))
        share = then.here + part * max(0.0, most - then.here - then.there)
        if self._lost():
            share = max(share, most / self._live)
        return here + amount <= share

    def _lost(self) -> bool:
        return time.monotonic() - self._heard_at > LOST_S


_ROUNDING = 1e-6
"""Below this, an excess is one of floating-point numbers."""


def _sum(one: Taken, other: Taken) -> Taken:
    return {bucket: one.get(bucket, 0.0) + other.get(bucket, 0.0) for bucket in one | other}


class Coordinator(Protocol):
    """Where the gateways exchange their counts."""

    async def exchange(self, gateway: str, counted: Counted) -> tuple[Told, int]:
        """Take all that a gateway has counted; return the others' sum, and how many are live."""
        ...


class Leases:
    """Exchanges the counts of this gateway with those of the others."""

    def __init__(
        self, counts: Counts, connect: Callable[[], Coordinator], wanted: Callable[[], bool]
    ) -> None:
        """``connect`` may block; ``wanted`` says whether there is any limit."""
        self._counts = counts
        self._connect = connect
        self._wanted = wanted
        self._id = uuid.uuid4().hex
        self._coordinator: Coordinator | None = None
        self._silent_until: float | None = None
        """How long the actor may still be starting; None before the first exchange."""

        self._away = False

    async def run(self) -> None:
        """Exchange for ever. Nothing waits for it, and a failure leaves all as it was."""
        while True:
            if self._wanted():
                try:
                    await self.exchange()
                    self._away, self._silent_until = False, 0.0
                except Exception as error:
                    self._coordinator = None
                    if not self._away and not self._starts(error):
                        logger.warning(f"the limits' actor is away: {error!r}")
                        self._away = True
            await asyncio.sleep(EVERY_S)

    def _starts(self, error: Exception) -> bool:
        """Whether the actor has never answered yet, and its process may still be starting."""
        if self._silent_until is None:
            self._silent_until = time.monotonic() + _START_S
        return isinstance(error, TimeoutError) and time.monotonic() < self._silent_until

    async def exchange(self) -> None:
        """Exchange once. Raises whatever goes wrong, such as TimeoutError."""
        if self._coordinator is None:
            self._coordinator = await asyncio.to_thread(self._connect)
        asked = self._coordinator.exchange(self._id, self._counts.report(time.time()))
        self._counts.heard(*await asyncio.wait_for(asked, _TIMEOUT_S))
