"""The live front ends of every model's replicas. A choice among them needs no call to Ray."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from serve_app.cluster import front_end_ids
from serve_app.cluster.exchange import Load

Address = tuple[str, int]
"""Host and port."""

LOST = 2
"""Front ends of one replica that failed at the same time, with which all of it counts as lost."""

AVOID_S = 3.0
"""Seconds for which a front end that failed a request is avoided.

Serve removes a dead replica within that time. A live replica, which closed an idle connection just
when a request went out, gets requests again afterwards.
"""


@dataclass(eq=False)
class FrontEnd:
    """A process that can be sent requests; one or several make up a replica."""

    id: str
    """See :mod:`serve_app.cluster.front_end_ids`."""

    host: str
    port: int
    replica: Replica
    inflight: int = 0
    """This gateway's requests in flight at the front end."""

    def began(self) -> None:
        """A request is sent to it."""
        self.inflight += 1
        self.replica.inflight += 1

    def ended(self) -> None:
        """A request has got its answer, or will get none."""
        self.inflight -= 1
        self.replica.inflight -= 1


@dataclass(eq=False)
class Replica:
    """What the front ends of one engine have in common."""

    id: str
    inflight: int = 0
    """This gateway's requests in flight at all its front ends."""

    load: Load | None = None
    """Its engine's load, as it told last; None before that."""

    asleep_until: float = 0.0
    """By ``time.monotonic``; until then replicas that are awake are preferred."""

    avoid_until: dict[str, float] = field(default_factory=dict)
    """By front end that failed: the time, by ``time.monotonic``, until which it is avoided."""

    def avoids(self, front_end: str) -> bool:
        """Whether it failed a moment ago: alone, or with another one of this replica."""
        if not self.avoid_until:
            return False
        now = time.monotonic()
        self.avoid_until = {id: until for id, until in self.avoid_until.items() if until > now}
        return front_end in self.avoid_until or len(self.avoid_until) >= LOST


class Board:
    """The front ends that Serve reported last, by application. Avoids those that failed since."""

    def __init__(self) -> None:
        self._front_ends: dict[str, dict[str, FrontEnd]] = {}
        self.max_model_len: dict[str, int] = {}
        """By application, as its replicas reported it last; kept while there are none."""

    def publish(
        self,
        application: str,
        running: Mapping[str, Address],
        max_model_len: int | None = None,
    ) -> None:
        """Replace an application's front ends by ``{front end id: (host, port)}``.

        ``max_model_len`` is what the replicas report; None keeps the last value.
        """
        if max_model_len:
            self.max_model_len[application] = max_model_len
        before = self._front_ends.get(application, {})
        replicas = {it.replica.id: it.replica for it in before.values()}
        self._front_ends[application] = {
            id: before.get(id) or _front_end(id, address, replicas)
            for id, address in running.items()
        }

    def forget(self, application: str) -> None:
        """Forget an application that was removed."""
        self._front_ends.pop(application, None)
        self.max_model_len.pop(application, None)

    def avoid(self, front_end: FrontEnd) -> None:
        """Keep a front end that failed a request out of :meth:`live` for a few seconds.

        With the second one of a replica, the whole replica counts as lost.
        """
        front_end.replica.avoid_until[front_end.id] = time.monotonic() + AVOID_S

    def asleep(self, front_end: FrontEnd) -> None:
        """Note that a replica sleeps: for a while it is live only if all others sleep too."""
        front_end.replica.asleep_until = time.monotonic() + AVOID_S

    def all_asleep(self, application: str) -> bool:
        """Whether requests found every live replica of an application asleep a moment ago."""
        now = time.monotonic()
        return all(it.replica.asleep_until > now for it in self._not_avoided(application))

    def add(self, application: str, running: Mapping[str, Address]) -> list[FrontEnd]:
        """Add the front ends of a replica that a Serve handle named; return those not avoided."""
        known = self._front_ends.setdefault(application, {})
        replicas = {it.replica.id: it.replica for it in known.values()}
        for id, address in running.items():
            known.setdefault(id, _front_end(id, address, replicas))
        return [it for id in running if not (it := known[id]).replica.avoids(id)]

    def all(self) -> list[tuple[str, FrontEnd]]:
        """Every front end with its application, avoided ones too."""
        return [(name, it) for name, known in self._front_ends.items() for it in known.values()]

    def report(self, replica_id: str, load: Load) -> None:
        """Take what a replica says of its engine's load. One that is not known is ignored."""
        for known in self._front_ends.values():
            for front_end in known.values():
                if front_end.replica.id == replica_id:
                    front_end.replica.load = load
                    return

    def application_of(self, front_end: str) -> str | None:
        """The application of the front end with this id, live or avoided."""
        having = (name for name, known in self._front_ends.items() if front_end in known)
        return next(having, None)

    def live(self, application: str) -> list[FrontEnd]:
        """Front ends to choose from: not avoided, and awake unless all are asleep."""
        live = self._not_avoided(application)
        if len(live) < 2:
            return live
        now = time.monotonic()
        return [it for it in live if it.replica.asleep_until < now] or live

    def _not_avoided(self, application: str) -> list[FrontEnd]:
        known = self._front_ends.get(application, {})
        return [it for id, it in known.items() if not it.replica.avoids(id)]


def _front_end(id: str, address: Address, replicas: dict[str, Replica]) -> FrontEnd:
    name = front_end_ids.replica_of(id)
    host, port = address
    return FrontEnd(id, host, port, replicas.setdefault(name, Replica(name)))
