"""The queue: where calls wait for a replica that has room, or for the first one of a cold model.

There is one line for each model. A replica is sent what its engine can run and a little more, so
that who is next is decided here, by priority and fairly, and not by the engine's own queue, which
knows no callers. Nothing here waits for anything remote: room is known from the replicas' last
reports, and from what this gateway has sent and what has ended since.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from serve_app.config.settings import QueueConfig
from serve_app.gateway import routes
from serve_app.gateway.cold_start import LOOK_S, ColdStart
from serve_app.gateway.errors import Unavailable, invalid, unavailable
from serve_app.gateway.fair_order import ANYBODY, FairOrder, Rank, Share, cost, rank
from serve_app.gateway.ledger import Entry
from serve_app.gateway.policy import Policy
from serve_app.gateway.replicas import Board, FrontEnd, Replica, Room, Waiting
from serve_app.gateway.routing.held import MOST, Held
from serve_app.gateway.stages import Call

DEADLINE = b"x-request-timeout-ms"
"""The header by which a client says how long its request may wait here."""

_TIMES_FREE = 4
"""A key may have so many times as many calls waiting as there are places free: 80 % of them if it
is the only one, so that the first call of another key still finds a place."""

AT_ONCE = 32
"""Calls that are looked at before the event loop has its turn. A place that suits none may have all
that wait looked at, of which each has up to 1 ms of a long prompt."""

_RATE_OF = 64
"""Calls whose ends tell how fast a model answers."""


@dataclass(eq=False)
class _Place:
    """A call in a line."""

    call: Call
    share: Share[_Place] | None
    """Its caller's; None for a call that the engine has nothing to do for."""

    since: float
    granted: asyncio.Future[FrontEnd]


@dataclass(eq=False)
class _Line:
    """What waits for one model."""

    name: str
    places: dict[_Place, None] = field(default_factory=dict)
    """All of them, by the time they came."""

    passing: deque[_Place] = field(default_factory=deque)
    """Calls that need a replica, but no room in its engine."""

    held: Held[_Place] = field(default_factory=Held)
    """Calls that have had their turn, and wait for the replica that has their prompt cached."""

    again: deque[_Place] = field(default_factory=deque)
    """Calls that have had their turn, and whose replica failed."""

    order: FairOrder[_Place] = field(default_factory=FairOrder)
    """All others."""

    ends: deque[float] = field(default_factory=lambda: deque(maxlen=_RATE_OF))
    """When its latest calls ended."""

    attendant: asyncio.Task[None] | None = None
    """Wakes the model, and looks at its replicas; there while calls wait."""

    wakes_until: float = 0.0
    """By ``time.monotonic``. A call has left for a fallback because the model had no replica: until
    it has one, but no longer than this, it is woken all the same, and others do not wait for it."""

    def seconds_for(self, calls: int) -> float:
        """How long so many calls take, at the rate of the latest ones; from 1 to 60."""
        if len(self.ends) < 2:
            return 60.0
        each = (time.monotonic() - self.ends[0]) / len(self.ends)
        return min(60.0, max(1.0, calls * each))

    def hold(self, place: _Place, replica: Replica, its_rank: Rank, until: float) -> None:
        """Let a call that has had its turn wait for a replica."""
        self.held.add(place, replica, its_rank, until)
        if place.share:
            place.share.held += 1

    def release(self, place: _Place) -> None:
        """Hold a call no more."""
        self.held.remove(place)
        if place.share:
            place.share.held -= 1

    def leave(self, place: _Place) -> None:
        """Take out a call that has no turn to come."""
        if place not in self.places:
            return
        del self.places[place]
        if place in self.held:
            self.release(place)
            return
        for line in (self.passing, self.again):
            if place in line:
                line.remove(place)
                return
        if place.share:
            self.order.remove(place.share, place)


class Queue:
    """Gives each call its turn at a front end that the policy chooses."""

    def __init__(
        self,
        board: Board,
        cold_start: ColdStart,
        policy: Policy,
        config: QueueConfig,
        cold_start_timeout_s: float,
        sooner_s: Callable[[Call], float | None] = lambda call: None,
    ) -> None:
        """``sooner_s`` tells how long a call waits that another model would then take; None where
        there is none."""
        self._board = board
        self._cold_start = cold_start
        self._policy = policy
        self._config = config
        self._cold_start_timeout_s = cold_start_timeout_s
        self._sooner_s = sooner_s
        self._lines: dict[str, _Line] = {}
        """By model; kept, because they know what each caller has had."""

        self._charged: dict[str, tuple[FairOrder[_Place], Share[_Place], float]] = {}
        """By call that has had its turn and is not settled: what its caller was charged."""

        board.changed = self._changed

    def waiting(self, model: str) -> Waiting:
        """What waits for a model now."""
        line = self._lines.get(model)
        oldest = next(iter(line.places), None) if line else None
        if line is None or oldest is None:
            return Waiting(0, 0.0)
        return Waiting(len(line.places), time.monotonic() - oldest.since)

    async def turn(self, call: Call, *, again: bool = False) -> FrontEnd:
        """Wait for the call's turn. It counts as in flight there until :meth:`end`.

        Starts a replica if the model is scaled to zero.

        Args:
            again: it has had a turn, and the replica failed: it goes before those that had none.

        Raises:
            Unavailable: 429 where too many wait; 503 where its time is up, or no replica can start.
            GatewayError: 404 for a removed model; whatever the policy raises.
        """
        whole_s = deadline_s(call)
        line = self._lines.setdefault(call.model.name, _Line(call.model.name))
        place = self._join(line, call, again)
        self._give_turns(line)
        if place.granted.done():
            return place.granted.result()
        if not again:
            self._refuse_if_full(line, place)
        if len(line.places) == 1:
            self._board.wanted(line.name)
        live = self._board.live(line.name)
        patience_s = self._config.max_wait_s if live else self._cold_start_timeout_s
        sooner_s = self._sooner_s(call)
        if sooner_s is not None:
            in_vain = not live and time.monotonic() < line.wakes_until
            patience_s = 0.0 if in_vain else min(patience_s, sooner_s)
        left_s = patience_s
        if whole_s is not None and whole_s < patience_s:
            patience_s, sooner_s = whole_s, None
            left_s = whole_s - (time.perf_counter() - call.arrived)
        try:
            async with asyncio.timeout(left_s):
                return await place.granted
        except BaseException as error:
            # It may have been granted at the same moment.
            if place.granted.done() and not place.granted.cancelled():
                if not place.granted.exception():
                    self.end(call, place.granted.result())
            else:
                self._leave(line, place)
                if isinstance(error, TimeoutError) and sooner_s is not None:
                    self._wake_on(line)
                self._attend(line)
            if isinstance(error, TimeoutError):
                raise self._timed_out(line, patience_s) from None
            raise

    def end(self, call: Call, front_end: FrontEnd) -> None:
        """The call has ended at this front end, well or not; another one may have its turn."""
        front_end.ended()
        self._policy.left(call)
        if charged := self._charged.get(call.id):
            share = charged[1]
            share.inflight -= 1
            share.seen = now = time.monotonic()
            self._lines[call.model.name].ends.append(now)
        self._changed(call.model.name)

    def first_byte(self, call: Call) -> None:
        """The call's answer has begun."""
        self._policy.first_byte(call)

    def key(self, call: Call) -> bytes:
        """What other gateways are told of its prompt; empty where nothing."""
        return self._policy.key(call)

    def entered(self, entry: Entry) -> None:
        """Take what a call took, as a listener of the ledger."""
        if (charged := self._charged.pop(entry.id, None)) and entry.usage:
            order, share, charge = charged
            order.settle(share, charge, cost(entry.usage))

    # --- the line ------------------------------------------------------------------------------

    def _join(self, line: _Line, call: Call, again: bool) -> _Place:
        now = time.monotonic()
        share = None
        if again and (charged := self._charged.get(call.id)):
            share = charged[1]
        elif routes.runs_engine(call.request.path):
            share = line.order.share(call.caller or ANYBODY, now)
        place = _Place(call, share, now, asyncio.get_running_loop().create_future())
        line.places[place] = None
        if share is None:
            line.passing.append(place)
        elif again:
            line.again.append(place)
        else:
            line.order.add(share, place)
        return place

    def _refuse_if_full(self, line: _Line, place: _Place) -> None:
        others, name = len(line.places) - 1, line.name
        free = self._config.max_requests - others
        of_key = place.share.waits - 1 if place.share and place.call.caller else 0
        if free > 0 and of_key < _TIMES_FREE * free:
            return
        self._leave(line, place)
        self._attend(line)
        who = f"The API key has {of_key} of the" if free > 0 else "There are"
        wait_s = line.seconds_for(of_key if free > 0 else others)
        raise Unavailable(
            429,
            f"{who} {others} requests that wait for the model '{name}' already, which is the "
            f"most; please send the request again in {math.ceil(wait_s)} seconds.",
            "rate_limit_error",
            code="queue_full",
            headers=_retry_after(wait_s),
        )

    def _timed_out(self, line: _Line, patience_s: float) -> Unavailable:
        name = line.name
        if not self._board.live(name):
            doing = self._cold_start.doing(name)
            within = f"did not start within {patience_s:g} seconds" if patience_s else "must start"
            return unavailable(
                f"The model '{name}' {within}; it "
                + (f"is {doing}." if doing else "may still be loading."),
                retry_after_s=30,
            )
        if all(it.replica.sleeps_for_now for it in self._board.live(name)):
            return unavailable(
                f"The model '{name}' did not get its turn on the GPU, which it shares in a swap "
                f"group, within {patience_s:g} seconds; {len(line.places)} others wait.",
                retry_after_s=30,
            )
        return Unavailable(
            503,
            f"No replica of the model '{name}' had room for the request within {patience_s:g} "
            f"seconds; {len(line.places)} others wait.",
            "server_error",
            code="queue_timeout",
            headers=_retry_after(line.seconds_for(len(line.places))),
        )

    # --- turns ---------------------------------------------------------------------------------

    def _changed(self, model: str) -> None:
        line = self._lines.get(model)
        if line and line.places:
            self._give_turns(line)

    def _give_turns(self, line: _Line) -> None:
        """Give turns to those who can have one now."""
        live = [it for it in self._board.live(line.name) if not it.replica.sleeps_for_now]
        if live:
            while line.passing:
                self._grant(line, line.passing.popleft(), live)
            replicas = {it.replica for it in live}
            if all(self._give_turn(line, live, replicas) for _ in range(AT_ONCE)):
                asyncio.get_running_loop().call_soon(self._changed, line.name)
        self._attend(line)

    def _give_turn(self, line: _Line, live: list[FrontEnd], replicas: set[Replica]) -> bool:
        """Give one turn, if anyone waits for it and there is room."""
        order = line.order
        if not (line.again or order.anyone_waits or line.held):
            return False
        rooms = {replica: replica.room() for replica in replicas}
        roomy = [it for it in live if (room := rooms[it.replica]) is None or room.left > 0]
        if not roomy:
            return False
        if line.again:
            self._grant(line, line.again.popleft(), roomy)
            return True
        spare = [it for it in roomy if (room := rooms[it.replica]) is None or room.left > room.kept]
        ample = [it for it in spare if (room := rooms[it.replica]) is None or room.is_ample]
        with_room, with_spare = ({it.replica for it in some} for some in (roomy, spare))
        may_have_last = None if len(spare) == len(roomy) else _may_have_last(order, rooms)

        def able(share: Share[_Place] | None) -> list[FrontEnd]:
            """The front ends that a caller's next call can go to."""
            return roomy if may_have_last is None or (share and may_have_last(share)) else spare

        def fits(place: _Place, replica: Replica) -> bool:
            """Whether a held call can go on: to its replica, or anywhere if that is no good."""
            if replica in replicas and not replica.is_out:
                return replica in with_spare or (
                    replica in with_room and able(place.share) is roomy
                )
            return bool(able(place.share))

        share = order.first(None if spare else may_have_last)
        held = line.held.next(fits)
        if held and (share is None or held[2] < rank(share)):
            place, replica, its_rank = held
            line.release(place)
            order.served(its_rank)
            its = [] if replica.is_out else [it for it in roomy if it.replica is replica]
            self._grant(line, place, its or able(place.share))
            return True
        if share is not None:
            among, its_rank, place = able(share), rank(share), order.take(share)
            if not self._hold(line, place, its_rank, among, ample, replicas):
                order.served(its_rank)
                self._grant(line, place, among)
            return True
        if ample and (in_vain := line.held.in_vain(time.monotonic())):
            line.release(in_vain)
            self._grant(line, in_vain, ample)
            return True
        return False

    def _hold(
        self,
        line: _Line,
        place: _Place,
        its_rank: Rank,
        able: list[FrontEnd],
        ample: list[FrontEnd],
        replicas: set[Replica],
    ) -> bool:
        """Let a call whose turn it is wait for a replica without room, if the policy says so.

        How long that may take counts where another one has much room. Else all are busy, and the
        few places that are free will be used by whoever they suit.
        """
        full = replicas - {it.replica for it in able}
        if not full or place.call.front_end or place.granted.done():
            return False
        places = {
            it: waiting + 1 if ample else 0
            for it in full
            if (waiting := line.held.waiting(it)) < MOST
        }
        try:
            wait = self._policy.waits_for(ample or able, place.call, places) if places else None
        except Exception as error:  # its own, not of the call whose end or report this is
            line.places.pop(place)
            place.granted.set_exception(error)
            return True
        if wait is None:
            return False
        replica, seconds = wait
        line.hold(place, replica, its_rank, time.monotonic() + seconds)
        self._charge(line, place)
        return True

    def _grant(self, line: _Line, place: _Place, roomy: Sequence[FrontEnd]) -> None:
        line.places.pop(place)
        if place.granted.done():
            return  # its client has just left
        call = place.call
        try:
            # One that only a certain front end can answer takes room from the others.
            among = self._board.live(line.name) if call.front_end else roomy
            front_end = self._policy.choose(among, call)
        except Exception as error:
            place.granted.set_exception(error)
            return
        front_end.began()
        if share := place.share:
            share.inflight += 1
            self._charge(line, place)
        place.granted.set_result(front_end)

    def _charge(self, line: _Line, place: _Place) -> None:
        """Charge the caller for a call that has had its turn."""
        if (share := place.share) and place.call.id not in self._charged:
            self._charged[place.call.id] = line.order, share, line.order.charge(share)

    def _leave(self, line: _Line, place: _Place) -> None:
        """Take out a call that has no turn to come. One that was held has been charged for."""
        if place in line.held and (charged := self._charged.pop(place.call.id, None)):
            _, share, charge = charged
            share.served -= charge / share.caller.weight
        line.leave(place)

    # --- while calls wait ----------------------------------------------------------------------

    def _wake_on(self, line: _Line) -> None:
        """Wake a model though the call has left that waited for it."""
        now = time.monotonic()
        if now >= line.wakes_until and not self._board.live(line.name):
            line.wakes_until = now + self._cold_start_timeout_s
            # A moment later, so that the time is over by any clock.
            loop = asyncio.get_running_loop()
            loop.call_later(self._cold_start_timeout_s + LOOK_S, self._attend, line)

    def _attend(self, line: _Line) -> None:
        """Have an attendant while calls wait or the model is woken, and only then."""
        wanted = bool(line.places) or time.monotonic() < line.wakes_until
        if wanted and line.attendant is None:
            line.attendant = asyncio.create_task(self._wait_on(line))
        elif not wanted and line.attendant is not None:
            line.attendant.cancel()
            line.attendant = None

    async def _wait_on(self, line: _Line) -> None:
        """Wake the model if need be, and see what no event tells: a replica avoided no more."""
        try:
            while True:
                if not self._board.live(line.name):
                    await self._cold_start.wake(line.name)
                line.wakes_until = 0.0
                self._give_turns(line)  # which ends this task where nobody waits any more
                await asyncio.sleep(LOOK_S)
        except Exception as error:
            line.attendant, line.wakes_until = None, 0.0
            for place in list(line.places):
                self._leave(line, place)
                if not place.granted.done():
                    place.granted.set_exception(error)


def _may_have_last(
    order: FairOrder[_Place], rooms: Mapping[Replica, Room | None]
) -> Callable[[Share[_Place]], bool]:
    """Who may have the last room of a replica: callers that ask for little, who then need not wait,
    and those above them. Where there is none such, it is for all."""
    most = sum(room.most for room in rooms.values() if room)
    light = order.highest_light(most)
    return lambda it: it.caller.priority > light or order.is_light(it, most)


def deadline_s(call: Call) -> float | None:
    """How long the client lets its request wait, from its arrival."""
    value = next((v for k, v in call.request.headers if k == DEADLINE), None)
    if value is None:
        return None
    if not value.isdigit() or not int(value[:12]):
        raise invalid(
            "The header X-Request-Timeout-Ms must be a whole number of milliseconds, at least 1.",
            code="invalid_header",
        )
    return int(value[:12]) / 1000


def _retry_after(seconds: float) -> dict[str, str]:
    """OpenAI's SDKs read the milliseconds, all others the seconds."""
    return {"retry-after": str(math.ceil(seconds)), "retry-after-ms": str(round(seconds * 1000))}
