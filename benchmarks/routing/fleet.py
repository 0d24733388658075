"""Gateways and engines in simulated time: what a policy makes of a trace.

Each gateway has a view of its own, as in a deployment: the gateway's own classes of a replica
(:class:`serve_app.gateway.replicas.Replica`) with what it has sent and what replicas have reported.
A replica reports to a gateway when a request of that gateway has ended, at most every 10 ms, soon
after another gateway has sent something, and else every second (:mod:`serve_app.replica.reports`).
Where no replica has room by :meth:`~serve_app.gateway.replicas.Replica.room`, requests wait in the
gateway, first come first served: the queue of :mod:`serve_app.gateway.queue` for one caller.

What it leaves out: the gateways' own time, networks (a report takes 1 ms), failures, and all that
:mod:`benchmarks.routing.engine` does.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from benchmarks.routing import traces
from benchmarks.routing.engine import BLOCK, Engine, Request, Speed
from benchmarks.routing.traces import Session, Turn
from serve_app.cluster.exchange import HOLD_S, Load
from serve_app.gateway.exchange import soon_s
from serve_app.gateway.replicas import FrontEnd, Replica
from serve_app.gateway.routing.held import MOST, Held
from serve_app.replica.reports import _SOONEST_S

_REPORT_S = 0.001
"""From a replica to a gateway."""


@dataclass(eq=False, slots=True)
class Asked:
    """A request at a gateway."""

    session: Session
    number: int
    gateway: Gateway
    arrived: float
    rank: int
    """Who came first has the lowest."""

    blocks: Sequence[int]
    """vLLM's blocks of its prompt and answer."""

    front_end: FrontEnd | None = None
    reason: str = ""
    predicted_tokens: int = 0
    """Of its prompt, cached as its policy believed."""

    held: bool = False
    """Whether it waited for a replica while others had room."""

    memory: Any = None
    """What its policy wants to remember of it."""

    @property
    def turn(self) -> Turn:
        return self.session.turns[self.number]


class Policy(Protocol):
    """A policy of one gateway, with what it learns from its requests."""

    waits: bool
    """Whether requests wait in the gateway while no replica has room."""

    tells: bool
    """Whether other gateways are told of what it sends."""

    def choose(self, live: list[FrontEnd], asked: Asked) -> FrontEnd:
        """One of ``live``; sets the request's ``reason`` and ``predicted_tokens``."""
        ...

    def waits_for(
        self, live: list[FrontEnd], asked: Asked, full: Mapping[Replica, int]
    ) -> tuple[Replica, float] | None:
        """A replica without room that it should wait for, and for how long at most."""
        ...

    def first_byte(self, asked: Asked) -> None: ...

    def ended(self, asked: Asked, request: Request) -> None: ...

    def heard(self, replica: Replica, asked: Asked) -> None:
        """Another gateway has sent this request to a replica."""


class Gateway:
    """One gateway: its view of the replicas, and its line."""

    def __init__(
        self, number: int, policy: Policy, replicas: int, now: Callable[[], float]
    ) -> None:  # fmt: skip
        self.number = number
        self.policy = policy
        self.front_ends = [
            FrontEnd(f"r{n}", "", n, Replica(f"r{n}", now=now)) for n in range(replicas)
        ]  # its "port" is the engine's number
        self.replicas = dict.fromkeys(it.replica for it in self.front_ends)
        self.line: deque[Asked] = deque()
        self.held: Held[Asked] = Held()
        self._now = now

    def turns(self) -> list[Asked]:
        """Give turns to those who can have one now, as ``Queue._give_turns`` does."""
        given: list[Asked] = []
        while self._turn(given):
            pass
        return given

    def _turn(self, given: list[Asked]) -> bool:
        if not (self.line or self.held):
            return False
        live = self.front_ends
        if self.policy.waits:
            live = [it for it in live if (room := it.replica.room()) is None or room.left > 0]
            if not live:
                return False
        roomy = {it.replica: it for it in live}
        ample = [it for it in live if (room := it.replica.room()) is None or room.is_ample]
        held = self.held.next(lambda asked, replica: replica in roomy)
        if held and (not self.line or held[2] < self.line[0].rank):
            asked, replica, _ = held
            self.held.remove(asked)
            given.append(self._sent(asked, [roomy[replica]]))
            return True
        if self.line:
            asked = self.line.popleft()
            if not self._hold(asked, ample or live, roomy, bool(ample)):
                given.append(self._sent(asked, live))
            return True
        if ample and (asked_in_vain := self.held.in_vain(self._now())):
            self.held.remove(asked_in_vain)
            given.append(self._sent(asked_in_vain, ample))
            return True
        return False

    def _hold(
        self, asked: Asked, live: list[FrontEnd], roomy: dict[Replica, FrontEnd], ample: bool
    ) -> bool:
        if len(roomy) == len(self.front_ends):
            return False
        places = {
            it: waiting + 1 if ample else 0
            for it in self.replicas
            if it not in roomy and (waiting := self.held.waiting(it)) < MOST
        }
        wait = self.policy.waits_for(live, asked, places) if places else None
        if wait is None:
            return False
        replica, seconds = wait
        asked.held = True
        self.held.add(asked, replica, asked.rank, self._now() + seconds)
        return True

    def _sent(self, asked: Asked, live: list[FrontEnd]) -> Asked:
        asked.front_end = self.policy.choose(live, asked)
        asked.front_end.began()
        return asked


@dataclass
class Outcome:
    """What a run gave; of the requests that arrived in its measured part, and times within it."""

    ttft_s: list[float] = field(default_factory=list)
    """Of those that had no first token when the run was broken off, the time until then."""

    reasons: Counter[str] = field(default_factory=Counter)
    held: int = 0
    """Requests that waited for a replica while others had room."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    predicted_tokens: int = 0
    arrived: int = 0
    ended: int = 0
    """Requests that ended within the measured part, whenever they came."""

    output_tokens: int = 0
    """Of these."""

    unfinished: int = 0
    """Requests that arrived in the measured part and had not ended when the run was broken off."""


class Fleet:
    """Engines and gateways, and the time."""

    def __init__(
        self, speed: Speed, replicas: int, gateways: int,
        policy: Callable[[int, Callable[[], float]], Policy], seed: int,
    ) -> None:  # fmt: skip
        self.now = 0.0
        self.engines = [Engine(speed) for _ in range(replicas)]
        self.gateways = [
            Gateway(n, policy(seed + n, self._clock), replicas, self._clock)
            for n in range(gateways)
        ]
        random.seed(seed)  # the gateway's policies break ties by it
        self._rng = random.Random(seed)
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()
        self._told = [[0.0] * replicas for _ in self.gateways]
        self._due = [[math.inf] * replicas for _ in self.gateways]
        """By gateway and replica: when a report that it waits for is due."""

        self._sent: list[list[Asked]] = [[] for _ in self.engines]
        """What each replica was sent."""

        self._heard = [[0] * replicas for _ in self.gateways]
        """By gateway and replica: how many of these it has been told of."""

        self._ends = [float("inf")] * replicas
        self._left = self._gone = 0
        self._silent: dict[Asked, None] = {}
        """Measured requests without a first token."""

        self.last_end = 0.0
        """When the last request ended so far."""

        self.outcome = Outcome()

    def run(self, sessions: Sequence[Session], begin: float, end: float, limit: float) -> Outcome:
        """Play a trace; arrivals from ``begin`` to ``end`` are measured. Ends at ``limit``."""
        self._begin, self._end = begin, end
        coming = sum(len(session.turns) for session in sessions)
        for gateway in self.gateways:
            for engine in range(len(self.engines)):
                self._at(self._rng.random() * HOLD_S, self._report, gateway, engine)
        for session in sessions:
            self._at(session.at, self._arrive, session, 0)
        self._at(end, lambda: None)
        while self._events and self._gone < coming:
            self.now, _, what, about = heapq.heappop(self._events)
            if self.now > limit or (self.now > end and not self._left):
                break
            what(*about)
        self.outcome.unfinished = self._left
        self.outcome.ttft_s.extend(self.now - asked.arrived for asked in self._silent)
        return self.outcome

    def _clock(self) -> float:
        return self.now

    def _at(self, when: float, what: Callable[..., None], *about: Any) -> None:
        heapq.heappush(self._events, (when, next(self._order), what, about))

    def _arrive(self, session: Session, number: int) -> None:
        gateway = self._rng.choice(self.gateways)
        turn = session.turns[number]
        tokens = turn.prompt_tokens + turn.output_tokens
        blocks = traces.blocks(turn.pieces, tokens, BLOCK)
        asked = Asked(session, number, gateway, self.now, next(self._order), blocks)
        if self._begin <= self.now < self._end:
            self._left += 1
            self._silent[asked] = None
            self.outcome.arrived += 1
        gateway.line.append(asked)
        self._give(gateway)

    def _give(self, gateway: Gateway) -> None:
        for asked in gateway.turns():
            assert asked.front_end
            turn = asked.turn
            request = Request(turn.prompt_tokens, turn.output_tokens, asked.blocks, owner=asked)
            number = asked.front_end.port
            self._sent[number].append(asked)
            for other in self.gateways if gateway.policy.tells else ():
                if other is not gateway:
                    self._soon(other, number, soon_s(len(self.engines)))
            self.engines[number].add(request, self.now)
            self._look(number)

    def _look(self, number: int) -> None:
        """See that the end of an engine's step is an event."""
        ends = self.engines[number].ends
        if ends != self._ends[number]:
            self._ends[number] = ends
            if ends != float("inf"):
                self._at(ends, self._step, number, ends)

    def _step(self, number: int, ends: float) -> None:
        if ends != self._ends[number]:
            return  # it was shortened
        self._ends[number] = float("nan")
        first, ended = self.engines[number].step_ended()
        self._look(number)
        for request in first:
            asked = request.owner
            asked.gateway.policy.first_byte(asked)
            if asked in self._silent:
                del self._silent[asked]
                self.outcome.ttft_s.append(self.now - asked.arrived)
        for request in ended:
            self._ended(request)
        for gateway in {request.owner.gateway.number: request.owner.gateway for request in ended}:
            self._give(self.gateways[gateway])

    def _ended(self, request: Request) -> None:
        asked, outcome = request.owner, self.outcome
        self.last_end = self.now
        self._gone += 1
        asked.front_end.ended()
        asked.gateway.policy.ended(asked, request)
        if self._begin <= asked.arrived < self._end:
            self._left -= 1
            outcome.reasons[asked.reason] += 1
            outcome.held += asked.held
            outcome.prompt_tokens += request.prompt_tokens
            outcome.cached_tokens += request.cached_tokens
            outcome.predicted_tokens += asked.predicted_tokens
        if self._begin <= self.now < self._end:
            outcome.ended += 1
            outcome.output_tokens += request.output_tokens
        self._soon(asked.gateway, asked.front_end.port)
        following = asked.number + 1
        if following < len(asked.session.turns):
            pause = asked.session.turns[following].pause_s
            self._at(self.now + pause, self._arrive, asked.session, following)

    def _soon(self, gateway: Gateway, engine: int, after_s: float = 0.0) -> None:
        """A request of the gateway has ended there, or one of another gateway has begun: it is
        told, at most every 10 ms."""
        when = max(self.now + after_s, self._told[gateway.number][engine] + _SOONEST_S)
        if when < self._due[gateway.number][engine]:
            self._due[gateway.number][engine] = when
            self._at(when, self._report, gateway, engine)

    def _report(self, gateway: Gateway, number: int) -> None:
        told, due = self._told[gateway.number], self._due[gateway.number]
        if self.now < min(due[number], told[number] + HOLD_S) - 1e-9:
            return  # told meanwhile
        told[number], due[number] = self.now, math.inf
        engine = self.engines[number]
        load = Load(
            engine.running, len(engine.waiting), engine.speed.most_seqs, engine.kv_cache_usage,
            gateways=len(self.gateways), prefix_cache_tokens=engine.speed.kv_tokens,
        )  # fmt: skip
        sent = self._sent[number][self._heard[gateway.number][number] :]
        self._heard[gateway.number][number] += len(sent)
        others = [it for it in sent if it.gateway is not gateway]
        self._at(self.now + _REPORT_S, self._hear, gateway, number, load, others)
        self._at(self.now + HOLD_S, self._report, gateway, number)

    def _hear(self, gateway: Gateway, number: int, load: Load, others: list[Asked]) -> None:
        replica = gateway.front_ends[number].replica
        replica.report(load)
        for asked in others:
            gateway.policy.heard(replica, asked)
        self._give(gateway)
