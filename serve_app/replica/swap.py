"""A replica's part in its swap group: it reports, and does what the coordinator orders.

It reports from a thread, also while vLLM's constructor blocks the event loop. What it is ordered it
does in the loop, one thing after the other.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from serve_app.cluster.swap import Order, Report, State
from serve_app.replica import slot
from serve_app.replica.engine import Engine
from serve_app.replica.front_ends import FrontEnds

logger = logging.getLogger("ray.serve")

STEP_S = 120.0
"""Seconds that vLLM may take to fall asleep or to wake; then the replica is to be replaced."""

REQUESTS_COME_S = 0.3
"""Seconds after a wake for requests in which it counts as busy: they are on their way."""

GATEWAYS_COME_S = 2.0
"""Seconds after its start in which it counts as busy: a gateway may have started it for requests
that wait there, and has to find it first."""

_AGAIN_S = 0.5
"""Seconds before the coordinator is asked again after it failed."""

Exchange = Callable[[Report, Callable[[], bool]], Order | None]
"""See :meth:`serve_app.cluster.swap_actor.Coordinator.exchange`."""


class Member:
    """A replica of a model in a swap group; from the start to the end of its process."""

    def __init__(
        self, replica: str, group: str, evict_cost: float, exchange: Exchange, turn: Path
    ) -> None:
        """Begin to report. The engine may start at once: before it loads, it waits for its turn.

        Args:
            group: the id of the group's GPU.
            exchange: its coordinator's.
            turn: a file that does not exist yet.
        """
        self._replica, self._group, self._evict_cost = replica, group, evict_cost
        self._exchange, self._turn = exchange, turn
        os.environ[slot.TURN_ENV] = str(turn)
        self._loop = asyncio.get_running_loop()
        self._engine: Engine
        self._front_ends: FrontEnds | None = None
        """None until the engine has loaded."""

        self._lock = threading.Lock()
        """Around what both the thread and the loop change."""

        self._state: State = "asleep"
        self._slot: int | None = None
        self._slept = False
        self._heard = ""
        self._began = self._since = time.monotonic()
        """When it woke or fell asleep, whichever was last."""

        self._failed: float | None = None
        """When it could not wake, if it has not woken since: it then queues behind the others."""

        self._come_s = GATEWAYS_COME_S
        """Seconds since it woke in which requests may be on their way."""

        self._doing: asyncio.Task[None] | None = None
        self._over = threading.Event()
        threading.Thread(target=self._talk, name="swap-group", daemon=True).start()

    def loaded(self, engine: Engine, front_ends: FrontEnds) -> None:
        """The engine has loaded, and is awake."""
        os.environ.pop(slot.TURN_ENV, None)
        self._engine, self._front_ends = engine, front_ends
        engine.wakes = True
        self._becomes("awake")

    def stop(self) -> None:
        """Report no more."""
        self._over.set()

    # --- reports: in the thread ------------------------------------------------------------------

    def report(self) -> Report:
        """What it is now."""
        with self._lock:
            now, ours = time.monotonic(), self._front_ends
            works = bool(ours and _works(ours))
            waits = bool(ours and ours.waiting)
            wants_s = None
            if ours is None:
                wants_s = now - self._began
            elif self._state == "asleep" and (works or waits):
                # What works while the engine sleeps is paused, or came just before it fell asleep.
                wants_s = max(now - self._since if works else 0.0, ours.waited_s)
            if wants_s is not None and self._failed is not None:
                wants_s = min(wants_s, now - self._failed)
            awake_s = now - self._since if self._state == "awake" else 0.0
            coming = self._state == "awake" and awake_s < self._come_s
            return Report(
                self._replica,
                self._state,
                self._slot,
                wants_s,
                busy=works or waits or coming,
                awake_s=awake_s,
                evict_cost=self._evict_cost,
                slept=self._slept,
                heard=self._heard,
            )

    def _talk(self) -> None:
        silent = False
        while not self._over.is_set():
            try:
                said = self.report()
                if said.slot is not None:
                    slot.keep(slot.file(self._group, said.slot))
                order = self._exchange(said, partial(self._has_news, said))
            except Exception as error:  # also of what the loop changes while this thread reads it
                if not silent:
                    logger.warning(f"the swap group's coordinator does not answer: {error!r}")
                silent = True
                self._over.wait(_AGAIN_S)
                continue
            silent = False
            if order and not self._over.is_set():
                self.hear(order)

    def _has_news(self, said: Report) -> bool:
        """Whether a report would now tell something else than the passing of time."""
        return _timeless(said) != _timeless(self.report())

    def hear(self, order: Order) -> None:
        """Begin with what is ordered, unless it does not apply: the next report tells."""
        with self._lock:
            if order.id == self._heard:
                return
            self._heard = order.id
            if order.wake and self._state == "asleep":
                self._state, self._slot = "waking", order.slot
                path = slot.file(self._group, order.slot)
                if self._front_ends is None:
                    slot.give_turn(self._turn, path)  # the loop may be blocked
                    return
                work = self._wake(path)
            elif not order.wake and self._state == "awake":
                self._state = "falling"
                work = self._fall_asleep(order.drain_s)
            else:
                return
        self._loop.call_soon_threadsafe(self._begin, work)

    # --- what is ordered: in the loop ------------------------------------------------------------

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        self._doing = asyncio.create_task(self._replaced_if_it_fails(work))

    async def _replaced_if_it_fails(self, work: Coroutine[Any, Any, None]) -> None:
        """End this process if its engine can neither sleep nor wake: its memory is in the way."""
        try:
            await work
        except Exception as error:
            logger.error(f"this replica exits so that Serve replaces it: {error!r}")
            os._exit(1)

    async def _wake(self, path: str) -> None:
        ours = self._front_ends
        assert ours is not None
        began = time.monotonic()
        self._come_s = REQUESTS_COME_S
        async with asyncio.timeout(STEP_S):
            why = await slot.take(self._engine.llm, path)
        if why:
            logger.warning(f"swap: not awake, {why}")
            self._failed = time.monotonic()
            self._becomes("asleep")
            return
        taken = time.monotonic()
        async with asyncio.timeout(STEP_S):
            await self._engine.llm.wake_up()
        await ours.asleep(False)
        self._becomes("awake")
        ours.tell_gateways()
        logger.info(
            f"swap: awake; the slot took {taken - began:.2f} s, "
            f"the wake {time.monotonic() - taken:.2f} s"
        )

    async def _fall_asleep(self, drain_s: float) -> None:
        ours = self._front_ends
        assert ours is not None
        began = time.monotonic()
        await ours.asleep(True)  # from now on new requests are refused
        ours.tell_gateways()
        while True:
            if not _works(ours) or time.monotonic() >= began + drain_s:
                break
            await asyncio.sleep(0.01)
        drained, paused = time.monotonic(), ours.running
        async with asyncio.timeout(STEP_S):
            # What runs goes back to the engine's queue, and is computed again when it has woken.
            await self._engine.llm.sleep(level=1, mode="keep")
            await slot.leave(self._engine.llm)
        self._becomes("asleep")
        logger.info(
            f"swap: asleep with {paused} requests paused; the drain took {drained - began:.2f} s, "
            f"the sleep {time.monotonic() - drained:.2f} s"
        )

    def _becomes(self, state: State) -> None:
        with self._lock:
            self._state, self._since = state, time.monotonic()
            if state == "asleep":
                self._slot, self._slept = None, True
            else:
                self._failed = None


def _works(front_ends: FrontEnds) -> bool:
    """Whether it has requests, also such as are answered in the background."""
    return front_ends.running > 0 or front_ends.busy


def _timeless(report: Report) -> Report:
    wants_s = None if report.wants_s is None else 0.0
    return replace(report, wants_s=wants_s, awake_s=0.0)
