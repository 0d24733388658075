"""The ledger: one entry for each request, once it has ended and its replica has told what it took.

Only the replica knows the tokens, and only the gateway the rest. Whoever wants both (limits, the
usage database, the access log, metrics) listens here and is told once for each request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass, replace
from typing import Protocol

from serve_app.cluster.exchange import Called, Report, Usage
from serve_app.gateway import routes
from serve_app.gateway.stages import Call, Outcome

logger = logging.getLogger("ray.serve")

PATIENCE_S = 30.0
"""Seconds after a request's end for which its replica's report is waited for. Reports come within
milliseconds; none comes from a replica that was lost."""


@dataclass(frozen=True)
class Entry:
    """One request, from its arrival to its end."""

    id: str
    """Made by the gateway; no two requests have the same."""

    request_id: str
    """The client's, or one that was made for it."""

    key: str
    """The name of its API key; empty where the gateway has no keys."""

    model: str
    """The application's name."""

    model_id: str
    """The id that the client named: the model's, an alias, an adapter's, or that of a model whose
    fallback this one is."""

    path: str
    replica: str
    """The id of the front end that had it last; empty where none got it."""

    end: str
    """See :class:`serve_app.gateway.stages.Outcome`, as for ``status``. ``orphaned``, with status
    0: its front end reported it, and the gateway that had it is gone."""

    status: int
    arrived: float
    """Seconds since the epoch."""

    queued_s: float
    """Seconds that it waited in the gateway for a replica."""

    first_byte_s: float | None
    """Seconds from its arrival to the first byte of its answer; None without one."""

    duration_s: float
    """Seconds from its arrival to its end."""

    retries: int
    usage: Usage | None
    """None where no replica reported: none had the request, or the one that had it was lost."""

    streamed: bool = False
    """Whether its answer was an event stream."""


class Listener(Protocol):
    """Whoever wants to know of every request."""

    def entered(self, entry: Entry) -> None:
        """Called once for each request to a model, in the event loop. Must not raise."""
        ...


@dataclass
class _Open:
    entry: Entry | None = None
    """Set at the request's end."""

    reported: tuple[str, Usage] | None = None
    """The front end that reported last, and what."""

    waits: bool = False
    """Whether its engine still works on it, though it has been answered."""

    patience: asyncio.TimerHandle | None = None
    """Set while its report is waited for."""


class Ledger:
    """The stage that opens an entry for each call; :meth:`report` and the call's end close it."""

    def __init__(self) -> None:
        self._listeners: list[Listener] = []
        self._open: dict[str, _Open] = {}
        self._closed = asyncio.Event()

    def listen(self, listener: Listener) -> None:
        """Tell ``listener`` of every further entry."""
        self._listeners.append(listener)

    async def admit(self, call: Call) -> Call:
        self._open[call.id] = _Open()
        return call

    def ended(self, call: Call, outcome: Outcome) -> None:
        first = outcome.first_byte
        entry = Entry(
            id=call.id,
            request_id=call.request.id,
            key=call.caller.name if call.caller else "",
            model=call.model.name,
            model_id=call.named,
            path=routes.told(call.request.path),
            replica=outcome.front_end,
            end=outcome.end,
            status=outcome.status,
            arrived=time.time() - (outcome.ended - call.arrived),
            queued_s=outcome.queued_s,
            first_byte_s=None if first is None else first - call.arrived,
            duration_s=outcome.ended - call.arrived,
            retries=len(outcome.retries),
            usage=None,
            streamed=outcome.streamed,
        )
        known = self._open[call.id]
        known.entry = entry
        if not entry.replica:
            self._close(entry)
        elif known.reported and known.reported[0] == entry.replica:
            self._close(replace(entry, usage=known.reported[1]))
        else:
            loop = asyncio.get_running_loop()
            known.patience = loop.call_later(PATIENCE_S, self._give_up, call.id)

    def report(self, report: Report, front_end: str) -> None:
        """Take a front end's report.

        A request that was given to a second replica counts as that one reports it. One of a gateway
        that is gone, or that was given up here, gets an entry of what its front end knows.
        """
        known = self._open.get(report.called.id)
        if known is None:
            if report.usage:
                self.enter(_orphan(report.called, front_end, report.usage))
        elif report.usage is None:
            known.waits = True
        else:
            known.reported = (front_end, report.usage)
            if known.entry and known.entry.replica == front_end:
                self._close(replace(known.entry, usage=report.usage))

    def lost(self, front_end: str) -> None:
        """Enter what has ended for its client and was still worked on at a front end that is gone:
        nobody will report it."""
        for known in list(self._open.values()):
            if known.waits and known.entry and known.entry.replica == front_end:
                self._close(known.entry)

    async def settle(self, timeout_s: float) -> None:
        """Wait until every request that has ended is entered, at most so long.

        For the end of a gateway. What is reported later, the next gateway enters as an orphan.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while any(it.entry and not it.waits for it in self._open.values()):
                    self._closed.clear()
                    await self._closed.wait()

    def _give_up(self, id: str) -> None:
        known = self._open.get(id)
        # One whose engine still works on it is reported later, if need be as an orphan.
        if known and known.entry and not known.waits:
            self._close(known.entry)

    def _close(self, entry: Entry) -> None:
        if patience := self._open.pop(entry.id).patience:
            patience.cancel()  # else there is one for each request of the last 30 s
        self._closed.set()
        self.enter(entry)

    def enter(self, entry: Entry) -> None:
        """Tell all listeners of an entry."""
        for listener in self._listeners:
            try:
                listener.entered(entry)
            except Exception:
                logger.exception(f"request {entry.request_id}: its entry was not taken")


def _orphan(called: Called, front_end: str, usage: Usage) -> Entry:
    return Entry(
        id=called.id,
        request_id="",
        key=called.key,
        model=called.model,
        model_id=called.model_id,
        path=called.path,
        replica=front_end,
        end="orphaned",
        status=0,
        arrived=called.arrived,
        queued_s=0.0,
        first_byte_s=None,
        duration_s=0.0,
        retries=0,
        usage=usage,
    )
