"""The order in which calls that wait for one model have their turn.

The caller with the highest priority is first, then the one that has been served the fewest tokens
for its weight, then the one that came first. This is the virtual token counter (VTC) of Sheng et
al., "Fairness in Serving Large Language Models", OSDI 2024: a caller that comes back is lifted to
where the others are, so that nobody saves up turns while being away. What a call takes is known at
its end only. So it is charged the mean of its caller's calls when its turn comes, and the rest
later.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from serve_app.cluster.exchange import Usage
from serve_app.gateway.callers import Caller

Item = TypeVar("Item")

ANYBODY = Caller("")
"""Who calls where the gateway has no keys."""

AWAY_S = 60.0
"""Seconds without a request after which a caller has no share any more."""

_LATEST = 0.1
"""Weight of the latest call in the mean of what a caller's calls take."""


def cost(usage: Usage) -> float:
    """What a call took, in tokens of a prompt. A generated one takes an engine about two of them
    (VTC's weights); one found in the KV cache takes none."""
    return usage.prompt_tokens - usage.cached_tokens + 2.0 * usage.completion_tokens


@dataclass(eq=False)
class Share(Generic[Item]):
    """One caller's part of a model."""

    caller: Caller
    seen: float
    """When its last call came or ended."""

    served: float = 0.0
    """What it has been charged, by its weight. Compared among callers of one priority only."""

    mean: float | None = None
    """What a call of it takes; None before the first is known."""

    inflight: int = 0
    """Its calls that have had their turn and not ended."""

    held: int = 0
    """Its calls that have had their turn and wait for a certain replica."""

    waiting: deque[tuple[int, Item]] = field(default_factory=deque)
    """Its calls, with their place in the order of arrival."""

    @property
    def waits(self) -> int:
        """Calls of it that no replica has."""
        return self.held + len(self.waiting)


class FairOrder(Generic[Item]):
    """The calls that wait for one model, and what each caller has had of it."""

    def __init__(self) -> None:
        self._shares: dict[str, Share[Item]] = {}
        self._waiting: dict[str, Share[Item]] = {}
        """Those of ``_shares`` with a call that waits."""

        self._clocks: defaultdict[int, float] = defaultdict(float)
        """By priority: the count at which the last turn was given."""

        self._mean: float | None = None
        self._weights = 0.0
        """Of all shares."""

        self._arrivals = 0
        self._cleaned = 0.0

    def share(self, caller: Caller, now: float) -> Share[Item]:
        """The caller's, who is here now. Forgets those that have been away for long."""
        if now - self._cleaned > AWAY_S / 10:
            self._cleaned = now
            for it in list(self._shares.values()):
                if not it.inflight and not it.waits and now - it.seen > AWAY_S:
                    del self._shares[it.caller.name]
                    self._weights -= it.caller.weight
        share = self._shares.get(caller.name)
        if share is None:
            share = self._shares[caller.name] = Share(caller, now)
            self._weights += caller.weight
        self._weights += caller.weight - share.caller.weight
        share.caller, share.seen = caller, now  # its key's entry may have changed
        return share

    def add(self, share: Share[Item], item: Item) -> None:
        """Let a call wait."""
        if not share.waiting:
            share.served = max(share.served, self._clocks[share.caller.priority])
            self._waiting[share.caller.name] = share
        share.waiting.append((self._arrivals, item))
        self._arrivals += 1

    @property
    def anyone_waits(self) -> bool:
        return bool(self._waiting)

    def first(self, may: Callable[[Share[Item]], bool] | None = None) -> Share[Item] | None:
        """Whose turn it is, of those that ``may`` have it; None where nobody waits or may."""
        able = filter(may, self._waiting.values()) if may else self._waiting.values()
        return min(able, key=rank, default=None)

    def take(self, share: Share[Item]) -> Item:
        """Take the caller's first call out: it has its turn, and is :meth:`served` now or later."""
        _, item = share.waiting.popleft()
        self._tidy(share)
        return item

    def served(self, place: Rank) -> None:
        """A call that had this place in the order is served: who comes now is lifted to there."""
        priority, count, _ = place
        self._clocks[-priority] = max(self._clocks[-priority], count)

    def charge(self, share: Share[Item]) -> float:
        """Charge the caller for a call whose end is not known yet; return how much."""
        charge = share.mean or self._mean or 1.0
        share.served += charge / share.caller.weight
        return charge

    def remove(self, share: Share[Item], item: Item) -> None:
        """Take out a call that waits no more."""
        share.waiting = deque(it for it in share.waiting if it[1] is not item)
        self._tidy(share)

    def settle(self, share: Share[Item], charge: float, took: float) -> None:
        """Charge what a call really took instead of ``charge``."""
        share.served += (took - charge) / share.caller.weight
        share.mean = _mean(share.mean, took)
        self._mean = _mean(self._mean, took)

    def is_light(self, share: Share[Item], most: float) -> bool:
        """Whether all that the caller asks for now is within its part, by weight, of the ``most``
        calls that may run."""
        asks = share.inflight + share.waits
        return asks * self._weights <= most * share.caller.weight

    def highest_light(self, most: float) -> float:
        """The highest priority of the light callers that are about; -inf where there is none."""
        light = (it.caller.priority for it in self._shares.values() if self.is_light(it, most))
        return max(light, default=-math.inf)

    def _tidy(self, share: Share[Item]) -> None:
        if not share.waiting:
            self._waiting.pop(share.caller.name, None)


Rank = tuple[int, float, int]


def rank(share: Share[Any]) -> Rank:
    """Where a caller's next call stands; the least is the first."""
    return -share.caller.priority, share.served, share.waiting[0][0]


def _mean(before: float | None, latest: float) -> float:
    return latest if before is None else before + _LATEST * (latest - before)
