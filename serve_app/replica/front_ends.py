"""A replica's front ends: the first in its own process, each further one in a process of its own.

One Python process renders, detokenizes and streams about 18,000 tokens per second; an engine on a
fast GPU generates more. All front ends are clients of the one engine. This process, which Ray
knows, stays the only one that controls the engine and exports its statistics.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import time
from argparse import Namespace
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from typing import Any

from serve_app.cluster.exchange import Load
from serve_app.replica import clients, further
from serve_app.replica.channel import Channel, Lost
from serve_app.replica.clients import Client
from serve_app.replica.engine import Engine
from serve_app.replica.front_end import FrontEnd, until_quiet
from serve_app.replica.load import EngineLoad

logger = logging.getLogger("ray.serve")

HANG_S = 60.0
"""Seconds without a sign of life after which a further front end is ended and started again."""

START_S = 300.0
"""Seconds that one which is started again may take until it listens."""

SHORT_LIFE_S = 60.0
"""A front end that ends sooner than this is started again after a pause."""

PAUSE_S = 2.0
"""Seconds of that pause."""


class Further:
    """One further front end: its process, and what it reported last."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.port = 0
        self.running = 0
        """HTTP requests in flight."""

        self.due = 0
        """Reports that a gateway is about to take."""

        self.busy = False
        """Whether it has requests in the engine."""

        self.client: Client
        self.process: Any
        self.channel: Channel
        self.began = 0.0
        self.reported = 0.0
        self.listening: asyncio.Future[None]


class FrontEnds:
    """All front ends of an engine. :meth:`close` ends them."""

    def __init__(
        self, count: int, args: Namespace, config: Any, credential: bytes, replica: str, host: str
    ) -> None:
        """Start the further ones: they import vLLM while the engine loads.

        Args:
            count: how many, the first included.
            args, config: of :func:`serve_app.replica.engine.parse_args` and ``configure``.
            credential: requests must carry it.
            replica: Serve's id of this replica.
            host: address to listen on.
        """
        self._order = further.Order(args, config, credential, replica, host)
        self._engine: Engine
        self.first: FrontEnd
        spares = clients.SPARES if count > 1 else 0
        self.clients = clients.beyond_the_first(count - 1 + spares)
        """Of the engine, besides this process."""

        self._spare = self.clients[count - 1 :]
        self.worn_out = False
        """Whether one has ended and cannot be started again."""

        self.over_plan = 0
        """Bytes of the GPU that the engine holds beyond its part, told to the gateways."""

        self._closing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self.further = [Further(index) for index in range(1, count)]
        if self.further:
            from vllm.transformers_utils.config import maybe_register_config_serialize_by_value

            maybe_register_config_serialize_by_value()
            # Now: the engine's start changes the config.
            self._pickled = bytes(ForkingPickler.dumps(self._order))
        for one, client in zip(self.further, self.clients, strict=False):
            self._start(one, client)

    async def listen(self, engine: Engine, load: EngineLoad) -> None:
        """Serve, with the engine that has started.

        Raises:
            RuntimeError: why one of them could not start.
        """
        self._engine = engine
        self.first = await self._order.front_end(engine, 0, lambda: self.told(load))
        await self.first.listen(self._order.host)
        await asyncio.gather(*(one.listening for one in self.further))
        if self.further:
            self._spawn(self._watch())

    @property
    def ports(self) -> list[int]:
        """Ports of all front ends, the first's first."""
        return [self.first.port, *(one.port for one in self.further)]

    @property
    def running(self) -> int:
        """Number of HTTP requests in flight."""
        return self.first.running + sum(one.running for one in self.further)

    @property
    def waiting(self) -> int:
        """Number of requests that wait in the gateways for this model."""
        return self.first.reports.waiting

    @property
    def waited_s(self) -> float:
        """Seconds for which the oldest of these has waited."""
        return self.first.reports.waited_s

    def tell_gateways(self) -> None:
        """Let all gateways know of the engine's load, and of whether it sleeps, now."""
        self.first.reports.tell_now()

    def told(self, load: EngineLoad) -> Load:
        """What gateways are told of the engine's load."""
        now = load.now(self.running, busy=self.busy)
        return replace(
            now,
            asleep=self._engine.asleep,
            wakes=self._engine.wakes,
            over_plan=self.over_plan,
            cache_drops=self._engine.cache_drops,
        )

    @property
    def _due(self) -> int:
        return self.first.reports.due + sum(one.due for one in self.further)

    @property
    def busy(self) -> bool:
        """Whether the engine has requests of any front end."""
        return self._engine.busy or any(one.busy for one in self.further)

    async def asleep(self, asleep: bool) -> None:
        """Refuse new requests on all front ends, or take them again."""
        self._engine.asleep = asleep
        await self._tell_all("asleep", asleep)
        if asleep:
            await self.dropped()

    async def forget(self, adapter: str) -> None:
        """Have all front ends ask again for an adapter before they use it.

        The prefix cache is dropped next: it knows adapters by name only.
        """
        await self.dropped()
        await self._tell_all("forget", adapter)

    async def dropped(self) -> None:
        """The prefix cache is dropped: gateways are told so, and of no prompt that was sent."""
        self._engine.cache_drops += 1
        self.first.reports.prompts.forget()
        await self._tell_all("dropped")

    async def drain(self, timeout_s: float) -> None:
        """Wait until no request is in flight and the gateways know of all that ended.

        Waits ``timeout_s`` seconds at most.
        """
        await until_quiet(lambda: self.running + self._due, timeout_s)

    async def close(self) -> None:
        """End all HTTP servers, within 5 seconds."""
        self.kill()
        await self.first.close()

    def kill(self) -> None:
        """End the further ones now."""
        self._closing = True
        for task in self._tasks:
            task.cancel()
        for one in self.further:
            one.channel.close()
            one.process.kill()

    def _start(self, one: Further, client: Client) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        # Tied to this process's life: see `lifeline.tie_children`.
        one.process = context.Process(
            target=further.main,
            args=(one.index, self._pickled, client, one.port, theirs),
            name=f"FrontEnd_{one.index}",
            daemon=True,
        )
        one.process.start()
        theirs.close()
        one.client = client
        one.began = one.reported = time.monotonic()
        one.listening = asyncio.get_running_loop().create_future()
        one.channel = Channel(
            ours,
            {
                "listening": lambda port: self._listens(one, port),
                "failed": lambda why: self._failed(one, why),
                "report": lambda *state: self._reported(one, *state),
                "resolve": lambda name: self._resolve(one, name),
                "is_asleep": lambda: self._engine.asleep,
            },
            lost=lambda: self._lost(one),
        )

    def _listens(self, one: Further, port: int) -> None:
        one.port = port
        one.reported = time.monotonic()
        if not one.listening.done():
            one.listening.set_result(None)

    def _failed(self, one: Further, why: str) -> None:
        if not one.listening.done():
            one.listening.set_exception(RuntimeError(f"front end {one.index}: {why}"))
            one.listening.exception()  # it is told where it is awaited

    def _reported(
        self, one: Further, running: int, due: int, busy: bool, records: list[Any]
    ) -> None:
        from vllm.v1.metrics.stats import SchedulerStats

        was_busy = self.busy
        one.running, one.due, one.busy = running, due, busy
        one.reported = time.monotonic()
        manager = self._engine.llm.logger_manager
        for scheduler, iteration, cache, engine_index in records:
            manager.record(scheduler, iteration, cache, engine_index)
        if (records or was_busy) and not self.busy:
            # These steps may be older than the one recorded before them, in which the last request
            # ended. No step follows that would correct what they say of the engine.
            manager.record(SchedulerStats(), None)

    async def _resolve(self, one: Further, name: str) -> Any:
        from vllm.lora.request import LoRARequest

        found = await self.first.serving_models.resolve_lora(name)
        if isinstance(found, LoRARequest):
            # Without an await since it was found: an order to forget it is sent later.
            one.channel.tell("learn", name, found)
        return found

    async def _tell_all(self, name: str, *args: Any) -> None:
        """Return when all have done it. One that is gone starts anew, from this process's state."""
        asked = (one.channel.ask(name, *args) for one in self.further)
        for answer in await asyncio.gather(*asked, return_exceptions=True):
            if isinstance(answer, Exception) and not isinstance(answer, Lost):
                raise answer

    def _lost(self, one: Further) -> None:
        self._failed(one, "its process ended")
        one.running, one.due, one.busy = 0, 0, False
        if not self._closing and hasattr(self, "first"):
            self._spawn(self._replace(one))

    async def _replace(self, one: Further) -> None:
        lived = time.monotonic() - one.began
        logger.error(f"front end {one.index} ended after {lived:.0f} s; it is started again")
        one.process.kill()  # its pipe may have ended before it
        try:
            await clients.abort(self._engine.llm, one.client)
        except Exception as error:  # a dead engine ends the replica
            logger.warning(f"the requests of front end {one.index} were not aborted: {error}")
        if not self._spare:
            logger.error("front ends ended too often; this replica is to be replaced")
            self.worn_out = True
            return
        if lived < SHORT_LIFE_S:
            await asyncio.sleep(PAUSE_S)
        self._start(one, self._spare.pop(0))

    async def _watch(self) -> None:
        """End a further front end that hangs: it is then replaced."""
        while True:
            began = time.monotonic()
            await asyncio.sleep(HANG_S / 10)
            now = time.monotonic()
            if now - began > HANG_S / 5:
                continue  # this process stood still, and their reports have not been read
            for one in self.further:
                limit = HANG_S if one.listening.done() else START_S
                if now - one.reported > limit:
                    logger.error(f"front end {one.index} gave no sign of life for {limit:.0f} s")
                    one.reported = time.monotonic()
                    one.process.kill()

    def _spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
