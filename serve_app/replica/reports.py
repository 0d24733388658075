"""A front end's reports, each kept until a gateway has taken it.

Reports go to the gateway that sent the request. When that one has been silent for a while, they go
to whichever asks next: what was used is never lost with a gateway.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from serve_app.cluster.exchange import HOLD_S, IDLE_HOLD_S, Answer, Load, Question, Report
from serve_app.replica.prompts import Prompts

SILENT_S = 15.0
"""Seconds without a question after which a gateway counts as gone."""

_APART = 0.25
"""By which part of it each hold is shorter or longer. A gateway that has just begun asks all front
ends in the same moment, and would be answered by all in the same moment for ever: with a thousand,
all its streams would stand still for 0.1 s each time."""

_SOONEST_S = 0.01
"""Seconds between two answers to a gateway. Under load one answer tells of many requests: an answer
for each would cost a gateway a tenth of its time."""

_AT_ONCE = 500
"""Reports in one answer."""


@dataclass
class _Box:
    """One gateway's reports."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """A gateway that comes back after long silence gets another box, with numbers of its own."""

    reports: deque[Report] = field(default_factory=deque)
    first: int = 1
    """The number of the first of ``reports``; the others follow."""

    asked: float = field(default_factory=time.monotonic)
    told: float = float("-inf")
    """When it was last answered, with a report or not."""

    load: Load | None = None
    """As it was told last."""

    waiting: int = 0
    waits_since: float = 0.0
    """When the oldest of these began to wait."""

    news: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when it is to be answered; cleared by the answer."""

    questions: int = 0
    """How many it has asked."""

    soon_s: float | None = None
    """Within which time it wants to know what others have sent; None: not at all."""

    soon: asyncio.TimerHandle | None = None
    """When that is set because others have sent something that it does not know."""


class Reports:
    """All reports of a front end that no gateway has taken yet."""

    def __init__(self, load: Callable[[], Load | None]) -> None:
        self._load = load
        self.prompts = Prompts()
        self._boxes: dict[str, _Box] = {}

    def add(self, report: Report) -> None:
        """Keep a report for the gateway that sent the request."""
        box = self._boxes.setdefault(report.called.gateway, _Box())
        box.reports.append(report)
        box.news.set()

    def sent(self, gateway: str, key: str) -> None:
        """A gateway has sent a request whose prompt has this key: the others are told soon."""
        self.prompts.add(gateway, key)
        for id, box in self._boxes.items():
            if id != gateway and box.soon_s is not None and not (box.soon or _silent(box)):
                box.soon = asyncio.get_running_loop().call_later(box.soon_s, box.news.set)

    async def answer(self, question: Question) -> Answer:
        """What a gateway is told: at once if there is a report for it, else after a while."""
        box = self._boxes.setdefault(question.gateway, _Box())
        box.asked, box.waiting = time.monotonic(), question.waiting
        box.waits_since = box.asked - question.waited_s
        box.soon_s = None if question.heard is None else question.soon_s
        box.questions += 1
        number = box.questions
        while question.of == box.id and box.reports and box.first <= question.taken:
            box.reports.popleft()
            box.first += 1
        self._take_over(box)
        if not box.reports:
            part = random.uniform(1 - _APART, 1 + _APART)
            most_s = IDLE_HOLD_S if question.of == box.id else HOLD_S
            await self._news(box, HOLD_S * part, most_s * part)
        if (early := box.told + _SOONEST_S - time.monotonic()) > 0:
            await asyncio.sleep(early)
        if number != box.questions:  # it was broken off: what there is is for the next one
            return Answer(question.of, question.taken, heard=question.heard or 0)
        box.asked = box.told = time.monotonic()
        box.news.clear()
        if box.soon:
            box.soon.cancel()
            box.soon = None
        told = [box.reports[i] for i in range(min(len(box.reports), _AT_ONCE))]
        box.load = load = self._load()
        if load:
            gateways = sum(not _silent(it) for it in self._boxes.values())
            load = replace(load, gateways=gateways)
        prompts: list[str] = []
        if question.heard is not None:
            heard = question.heard if question.of == box.id else 0
            prompts = self.prompts.after(heard, question.gateway)
        last = box.first + len(told) - 1
        return Answer(box.id, last, told, load, prompts, self.prompts.last)

    @property
    def due(self) -> int:
        """Reports that a gateway is about to take."""
        return sum(len(box.reports) for box in self._boxes.values() if not _silent(box))

    @property
    def waiting(self) -> int:
        """Requests that wait in the gateways for this model."""
        # A copy, here and below: a swap group's thread reads this while the loop adds boxes.
        return sum(box.waiting for box in list(self._boxes.values()) if not _silent(box))

    @property
    def waited_s(self) -> float:
        """Seconds for which the oldest of these has waited."""
        waiting = (it for it in list(self._boxes.values()) if it.waiting and not _silent(it))
        return time.monotonic() - min((it.waits_since for it in waiting), default=time.monotonic())

    def tell_now(self) -> None:
        """Answer all gateways that ask, though there is no report."""
        for box in self._boxes.values():
            box.news.set()

    async def _news(self, box: _Box, each_s: float, most_s: float) -> None:
        """Wait for a report, for a while; again where there is nothing else to tell either."""
        until = time.monotonic() + most_s
        while (left_s := until - time.monotonic()) > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(each_s, left_s)):
                    await box.news.wait()
            idle = _idle(load := self._load()) and load == box.load and not box.waiting
            if box.news.is_set() or box.reports or not idle:
                return

    def _take_over(self, box: _Box) -> None:
        for gateway, other in list(self._boxes.items()):
            if other is not box and _silent(other):
                box.reports.extend(other.reports)
                del self._boxes[gateway]


def _idle(load: Load | None) -> bool:
    """Whether the engine has nothing to do; or another front end tells of it."""
    return load is None or not (load.running or load.waiting)


def _silent(box: _Box) -> bool:
    return time.monotonic() - box.asked > SILENT_S
