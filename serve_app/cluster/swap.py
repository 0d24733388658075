"""Which models of a swap group are awake: decided from what its members report, and only from that.

A member is a replica of one of the group's models. It reports over and over; the answer is an
:class:`Order`, or that there is none. Nothing here keeps two engines off one GPU: a lock does
(:mod:`serve_app.replica.slot`). A decision that rests on old reports fails at the lock, and the
next report corrects it. So nothing has to be saved, and a new coordinator needs only to listen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from serve_app.config.settings import SwapGroup

LIVE_S = 5.0
"""Seconds without a report after which a member counts as gone. Each reports every second."""

LISTEN_S = 1.5
"""Seconds that a new coordinator only listens: by then each member has reported once."""

State = Literal["asleep", "waking", "awake", "falling"]
"""A member that has not loaded yet is ``asleep``; while it loads, it is ``waking``."""


@dataclass(frozen=True)
class Report:
    """What a member tells of itself."""

    member: str
    """Serve's id of the replica."""

    state: State
    slot: int | None = None
    """The slot that it has, takes or leaves; None asleep."""

    wants_s: float | None = None
    """For how long it has wanted to be awake: since its oldest waiting request came, since its
    running ones were paused; or, until it has loaded, since it could. None: it does not want to."""

    busy: bool = False
    """Whether it has requests, running or waiting."""

    awake_s: float = 0.0
    """Seconds since it woke."""

    evict_cost: float = 1.0
    slept: bool = True
    """Whether it has slept since it loaded. The first sleep takes the longest: vLLM then allocates
    the pinned host memory that later ones find (1 to 2 GiB/s on an H100's host)."""

    heard: str = ""
    """The id of the order that it heard last."""


@dataclass(frozen=True)
class Order:
    """What a member is to do."""

    id: str
    wake: bool
    """Wake up in ``slot``; else fall asleep."""

    slot: int
    drain_s: float = 0.0
    """Seconds that running requests get before it falls asleep."""


@dataclass
class _Member:
    """A member as its last report has it, and the order that it has not heard yet."""

    told: Report
    at: float
    order: Order | None = None

    @property
    def state(self) -> State:
        if self.order:
            return "waking" if self.order.wake else "falling"
        return self.told.state

    @property
    def slot(self) -> int | None:
        return self.order.slot if self.order else self.told.slot

    def wants_s(self, now: float) -> float | None:
        return None if self.told.wants_s is None else self.told.wants_s + now - self.at

    def awake_s(self, now: float) -> float:
        return self.told.awake_s + now - self.at


class Group:
    """The members of one swap group. Times are in seconds of any one clock."""

    def __init__(self, name: str, now: float) -> None:
        """``name`` is this coordinator's, so that its orders are not taken for another's."""
        self._name = name
        self._listens_until = now + LISTEN_S
        self._members: dict[str, _Member] = {}
        self._orders = 0

    def report(self, report: Report, now: float) -> None:
        """Take a member's report."""
        known = self._members.get(report.member)
        order = known.order if known else None
        if order and order.id == report.heard:
            order = None
        self._members[report.member] = _Member(report, now, order)

    def order(self, member: str) -> Order | None:
        """The order that a member has not heard yet."""
        known = self._members.get(member)
        return known.order if known else None

    @property
    def empty(self) -> bool:
        """Whether no member has reported of late, as of the last :meth:`decide`."""
        return not self._members

    def decide(self, terms: SwapGroup, now: float) -> None:
        """Give the orders that are due."""
        self._members = {id: it for id, it in self._members.items() if now - it.at < LIVE_S}
        if now < self._listens_until:
            return
        members = list(self._members.values())
        taken = {it.slot for it in members if it.slot is not None}
        free = [slot for slot in range(terms.awake) if slot not in taken]
        wanting = [it for it in members if it.state == "asleep" and it.told.wants_s is not None]
        wanting.sort(key=lambda it: (-(it.wants_s(now) or 0.0), it.told.member))
        for slot, member in zip(free, wanting, strict=False):
            self._give(member, wake=True, slot=slot)
        # Slots that `awake` had when it was larger are left first.
        falling = [it for it in members if it.state == "falling"]
        surplus = [it for it in members if (it.slot or 0) >= terms.awake]
        leaving = sum(it not in surplus for it in falling)
        for member in wanting[len(free) + leaving :]:
            self._make_room(members, member, terms, now)
        for member in surplus:
            if member.state == "awake" and _may_sleep(member, terms, now):
                self._give(member, wake=False, slot=member.slot or 0, drain_s=terms.drain_s)
        # Its first sleep is not to be waited for by the first request for another.
        for member in members:
            if member.state == "awake" and not member.told.busy and not member.told.slept:
                self._give(member, wake=False, slot=member.slot or 0, drain_s=terms.drain_s)
        # An order of another coordinator's may have sent one to load into a slot that is taken.
        for member in members:
            if member.state == "waking":
                there = [it for it in members if it.slot == member.slot]
                self._make_room(there, member, terms, now)

    def _make_room(
        self, members: Sequence[_Member], wanting: _Member, terms: SwapGroup, now: float
    ) -> None:
        """Have one go to sleep for the one that wants to wake, if any may yet."""
        long_enough = (wanting.wants_s(now) or 0.0) >= terms.max_wait_s
        may = [
            it
            for it in members
            if it.state == "awake"
            and (not it.told.busy or (long_enough and _may_sleep(it, terms, now)))
        ]
        if may:
            least = min(may, key=lambda it: (it.told.evict_cost, -it.awake_s(now), it.told.member))
            self._give(least, wake=False, slot=least.slot or 0, drain_s=terms.drain_s)

    def _give(self, member: _Member, *, wake: bool, slot: int, drain_s: float = 0.0) -> None:
        self._orders += 1
        member.order = Order(f"{self._name}/{self._orders}", wake, slot, drain_s)


def _may_sleep(member: _Member, terms: SwapGroup, now: float) -> bool:
    return not member.told.busy or member.awake_s(now) >= terms.min_awake_s
