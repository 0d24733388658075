"""Calls that have had their turn and wait for the replica that has their prompt cached.

While all replicas are busy, the next call in line would go to whichever has a place first, where
its prompt is not. Then every replica computes every prompt, and soon none has any. So such a call
lets others pass that the free place suits, until its own replica has one.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from serve_app.gateway.replicas import Replica

MOST = 256
"""Calls that wait for one replica at most. Whoever comes next goes where there is room."""

Item = TypeVar("Item")


@dataclass(eq=False)
class _Hold(Generic[Item]):
    item: Item
    replica: Replica
    rank: Any
    until: float


class Held(Generic[Item]):
    """Those of one model, in a line for each replica."""

    def __init__(self) -> None:
        self._holds: dict[Item, _Hold[Item]] = {}
        """By the time at which they were held."""

        self._lines: dict[Replica, list[_Hold[Item]]] = {}
        """By rank."""

    def __contains__(self, item: Item) -> bool:
        return item in self._holds

    def __len__(self) -> int:
        return len(self._holds)

    def waiting(self, replica: Replica) -> int:
        """How many wait for a replica."""
        return len(self._lines.get(replica, ()))

    def add(self, item: Item, replica: Replica, rank: Any, until: float) -> None:
        """Hold a call for a replica until a time; the one with the lowest rank is its next."""
        hold = self._holds[item] = _Hold(item, replica, rank, until)
        insort(self._lines.setdefault(replica, []), hold, key=lambda it: it.rank)

    def remove(self, item: Item) -> None:
        """It is held no more."""
        hold = self._holds.pop(item)
        line = self._lines[hold.replica]
        line.remove(hold)
        if not line:
            del self._lines[hold.replica]

    def next(self, fits: Callable[[Item, Replica], bool]) -> tuple[Item, Replica, Any] | None:
        """The next call, its replica and its rank, of those whose replica has room for them."""
        heads = (line[0] for line in self._lines.values() if fits(line[0].item, line[0].replica))
        first = min(heads, key=lambda it: it.rank, default=None)
        return (first.item, first.replica, first.rank) if first else None

    def in_vain(self, now: float) -> Item | None:
        """One that has waited long enough."""
        oldest = next(iter(self._holds.values()), None)
        return oldest.item if oldest and oldest.until <= now else None
