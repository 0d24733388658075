"""The live front ends of every model's replicas. A choice among them needs no call to Ray."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from serve_app.cluster import front_end_ids
from serve_app.cluster.exchange import Load
from serve_app.gateway.standing import OUT, Standing

Address = tuple[str, int]
"""Host and port."""

LOST = 2
"""Front ends of one replica that failed at the same time, with which all of it counts as lost."""

AVOID_S = 3.0
"""Seconds for which a front end that failed a request is avoided.

Serve removes a dead replica within that time. A live replica, which closed an idle connection just
when a request went out, gets requests again afterwards.
"""

MORE = 0.1
"""Part of what an engine can run that it is sent on top, 4 requests at least: it begins with the
next one as soon as one has ended, without a turn through the gateway."""

KEPT_FREE = 0.1
"""Part of what an engine can run that is kept free while a caller is about that asks for little:
its request then waits neither here nor in the engine."""

AMPLE = 1.25
"""How many times its requests an engine could have that has ample room: calls that wait for another
one's cache go there after a while."""

KV_CACHE_FULL = 0.8
"""Part of the KV cache in use from which on it bounds what an engine can run."""

STALE_S = 5.0
"""Seconds after which a report is out of date. Replicas report every second or sooner, and every
four at the least while they idle."""


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


class Waiting(NamedTuple):
    """What waits for a model at this gateway."""

    requests: int
    longest_s: float


class Room(NamedTuple):
    """How many requests of this gateway an engine can be sent."""

    most: int
    """Those that it may have at once: what it can run, and a little more."""

    left: int
    """How many more that are now; negative where it has too many."""

    kept: int
    """Of ``left``, what is kept for callers that ask for little: the little more, and a few of
    those that run."""

    @property
    def is_ample(self) -> bool:
        """Whether it could have a quarter more than it has."""
        return self.left > 0 and self.most >= AMPLE * (self.most - self.left)


@dataclass(eq=False)
class Replica:
    """What the front ends of one engine have in common."""

    id: str
    inflight: int = 0
    """This gateway's requests in flight at all its front ends."""

    load: Load | None = None
    """Its engine's load, as it told last; None before that."""

    others: int = 0
    """Of the requests in that report, those that this gateway had not sent."""

    load_until: float = 0.0
    """By ``time.monotonic``; from then on the report tells no more than the capacity."""

    asleep_until: float = 0.0
    """By ``time.monotonic``; until then replicas that are awake are preferred."""

    avoid_until: dict[str, float] = field(default_factory=dict)
    """By front end that failed: the time, by ``time.monotonic``, until which it is avoided."""

    now: Callable[[], float] = time.monotonic
    standing: Standing = field(default_factory=Standing)

    def weight(self, now: float) -> float:
        """How much it can be asked to do beside its siblings, above 0 and at most 1; ``now`` is by
        ``time.monotonic``."""
        return self.standing.weight(now)

    @property
    def is_out(self) -> bool:
        """Whether others get its requests for now, because it has answered with errors."""
        return self.weight(self.now()) <= OUT

    def report(self, load: Load) -> None:
        """Take its report. What this gateway sends and what ends is counted from here on."""
        self.load = load
        self.others = max(0, load.running + load.waiting - self.inflight)
        self.load_until = self.now() + STALE_S

    @property
    def fresh_load(self) -> Load | None:
        """Its engine's load, unless its last report is out of date."""
        return self.load if self.now() < self.load_until else None

    @property
    def sleeps_for_now(self) -> bool:
        """Whether it sleeps, and wakes when requests wait for it: another of its swap group has
        their GPU."""
        return bool(self.load and self.load.asleep and self.load.wakes)

    def room(self) -> Room | None:
        """What it can be sent now; None before its first report."""
        if self.load is None:
            return None
        runs, others = self.load.capacity, 0
        if self.now() < self.load_until:
            others = self.others
            if self.load.kv_cache_usage >= KV_CACHE_FULL:
                # The KV cache bounds it. At this length of its requests, so many fit.
                runs = min(runs, math.ceil(self.load.running / self.load.kv_cache_usage))
        more = max(4, math.ceil(runs * MORE))
        # Another gateway's requests cannot keep all of this one's out.
        share = runs // self.load.gateways if self.load.gateways > 1 else 0
        most = max(runs + more - others, share, more)
        kept = min(more + round(runs * KEPT_FREE), most - 1)
        return Room(most, most - self.inflight, kept)

    def avoids(self, front_end: str) -> bool:
        """Whether it failed a moment ago: alone, or with another one of this replica."""
        if not self.avoid_until:
            return False
        now = self.now()
        self.avoid_until = {id: until for id, until in self.avoid_until.items() if until > now}
        return front_end in self.avoid_until or len(self.avoid_until) >= LOST


class Board:
    """The front ends that Serve reported last, by application. Avoids those that failed since."""

    def __init__(self) -> None:
        self._front_ends: dict[str, dict[str, FrontEnd]] = {}
        self._replicas: dict[str, tuple[str, Replica]] = {}
        """By a replica's id: its application, and itself. Each of a thousand replicas reports every
        second: none is looked for among all."""

        self.max_model_len: dict[str, int] = {}
        """By application, as its replicas reported it last; kept while there are none."""

        self.about: dict[str, Mapping[str, Any]] = {}
        """The same, of what they tell of their model."""

        self.changed: Callable[[str], None] = lambda application: None
        """Called with an application when it has other front ends or one reports its load."""

        self.waiting: Callable[[str], Waiting] = lambda application: Waiting(0, 0.0)
        """Tells what waits here for a replica of an application."""

        self.heard: Callable[[str, Replica, str], None] = lambda *told: None
        """Called with an application, its replica, and the key of a prompt that another gateway has
        sent there."""

        self.wanted: Callable[[str], None] = lambda application: None
        """Called with an application when requests begin to wait for it."""

    def publish(
        self,
        application: str,
        running: Mapping[str, Address],
        max_model_len: int | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        """Replace an application's front ends by ``{front end id: (host, port)}``.

        ``max_model_len`` and ``about`` are what the replicas report; None keeps the last value.
        """
        if max_model_len:
            self.max_model_len[application] = max_model_len
        if about:
            self.about[application] = about
        before = self._front_ends.get(application, {})
        replicas = {it.replica.id: it.replica for it in before.values()}
        self._forget_replicas(before)
        # The first ones are no newer than their siblings.
        since = time.monotonic() if before.keys() & running.keys() else -math.inf
        self._front_ends[application] = {
            id: before.get(id) or _front_end(id, address, replicas, since)
            for id, address in running.items()
        }
        self._know_replicas(application)
        self.changed(application)

    def forget(self, application: str) -> None:
        """Forget an application that was removed."""
        self._forget_replicas(self._front_ends.pop(application, {}))
        self.max_model_len.pop(application, None)
        self.about.pop(application, None)

    def avoid(self, front_end: FrontEnd) -> None:
        """Keep a front end that failed a request out of :meth:`live` for a few seconds.

        With the second one of a replica, the whole replica counts as lost.
        """
        front_end.replica.avoid_until[front_end.id] = time.monotonic() + AVOID_S

    def asleep(self, front_end: FrontEnd, *, wakes: bool = False) -> None:
        """Note that a replica sleeps: for a while it is live only if all others sleep too.

        ``wakes``: it is in a swap group, by its settings; it may not have told so itself yet.
        """
        replica = front_end.replica
        known = replica.load or Load(0, 0, 0, 0.0)
        if wakes or known.wakes:
            replica.load = replace(known, asleep=True, wakes=True)  # until it tells otherwise
            return
        replica.asleep_until = time.monotonic() + AVOID_S

    def all_asleep(self, application: str) -> bool:
        """Whether requests found every live replica of an application asleep a moment ago."""
        now = time.monotonic()
        return all(it.replica.asleep_until > now for it in self._not_avoided(application))

    def add(self, application: str, running: Mapping[str, Address]) -> list[FrontEnd]:
        """Add the front ends of a replica that a Serve handle named; return those not avoided."""
        known = self._front_ends.setdefault(application, {})
        replicas = {it.replica.id: it.replica for it in known.values()}
        since = time.monotonic() if known else -math.inf
        for id, address in running.items():
            known.setdefault(id, _front_end(id, address, replicas, since))
        self._know_replicas(application)
        return [it for id in running if not (it := known[id]).replica.avoids(id)]

    def all(self) -> list[tuple[str, FrontEnd]]:
        """Every front end with its application, avoided ones too."""
        return [(name, it) for name, known in self._front_ends.items() for it in known.values()]

    def report(self, replica_id: str, load: Load) -> None:
        """Take what a replica says of its engine's load. One that is not known is ignored."""
        if known := self._replicas.get(replica_id):
            application, replica = known
            replica.report(load)
            self.changed(application)

    def has(self, front_end: FrontEnd) -> bool:
        """Whether Serve still reports it, live or avoided."""
        application, _ = self._replicas.get(front_end.replica.id, ("", None))
        return self._front_ends.get(application, {}).get(front_end.id) is front_end

    def knows(self, replica: Replica) -> bool:
        """The same of a replica."""
        return self._replicas.get(replica.id, ("", None))[1] is replica

    def find(self, application: str, front_end: str) -> FrontEnd | None:
        """An application's front end by its id."""
        return self._front_ends.get(application, {}).get(front_end)

    def replicas_of(self, application: str) -> list[Replica]:
        """An application's replicas, avoided ones too."""
        known = self._front_ends.get(application, {})
        return list({it.replica.id: it.replica for it in known.values()}.values())

    def over_plan(self, application: str) -> int:
        """The most bytes that one of its engines holds beyond its part of a GPU."""
        replicas = (it.replica.fresh_load for it in self._front_ends.get(application, {}).values())
        return max((load.over_plan for load in replicas if load), default=0)

    def application_of(self, front_end: str) -> str | None:
        """The application of the front end with this id, live or avoided."""
        application, _ = self._replicas.get(front_end_ids.replica_of(front_end), ("", None))
        return application if front_end in self._front_ends.get(application, {}) else None

    def live(self, application: str) -> list[FrontEnd]:
        """Front ends to choose from: not avoided, and awake unless all are asleep."""
        live = self._not_avoided(application)
        if len(live) < 2:
            return live
        now = time.monotonic()
        return [it for it in live if it.replica.asleep_until < now] or live

    def _know_replicas(self, application: str) -> None:
        for it in self._front_ends[application].values():
            self._replicas[it.replica.id] = application, it.replica

    def _forget_replicas(self, front_ends: Mapping[str, FrontEnd]) -> None:
        for it in front_ends.values():
            self._replicas.pop(it.replica.id, None)

    def _not_avoided(self, application: str) -> list[FrontEnd]:
        known = self._front_ends.get(application, {})
        return [it for id, it in known.items() if not it.replica.avoids(id)]


def _front_end(id: str, address: Address, replicas: dict[str, Replica], since: float) -> FrontEnd:
    name = front_end_ids.replica_of(id)
    host, port = address
    new = Replica(name, standing=Standing(since))
    return FrontEnd(id, host, port, replicas.setdefault(name, new))
