"""Requests for a model that sleeps because another of its swap group has their GPU."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from harness.scripted import CREDENTIAL, Exchange, GatewayProcess, Upstream, ok, reported, until

from serve_app.cluster.exchange import PATH, Answer, Load, Question
from serve_app.gateway import exchange
from serve_app.gateway.ledger import Ledger
from serve_app.gateway.replicas import FrontEnd

AWAKE = Load(0, 0, 8, 0.0, wakes=True)
ASLEEP = Load(0, 0, 8, 0.0, asleep=True, wakes=True)


class Replica(Upstream):
    """A replica of a swap group: it takes requests while it is awake, and hears what waits."""

    def __init__(self) -> None:
        super().__init__(self._answer)
        self.load = ASLEEP
        self.questions: list[Question] = []
        self.answered = 0
        self.changed = asyncio.Event()

    def becomes(self, load: Load) -> None:
        """Tell the gateways."""
        self.load = load
        self.changed.set()
        self.changed = asyncio.Event()

    async def _answer(self, asked: Exchange) -> None:
        if asked.target == PATH:
            self.questions.append(Question.decode(asked.body))
            changed = self.changed
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(30):  # ours is 1 s: here nothing shall depend on it
                    if self.answered:
                        await changed.wait()
            self.answered += 1
            await asked.answer(Answer("box", 0, load=self.load).encode())
        elif self.load.asleep:
            await asked.answer(b"{}", "x-serve-app-asleep: 1", status="503 Service Unavailable")
        else:
            await ok(asked)

    @property
    def requests(self) -> list[Exchange]:
        return [it for it in self.exchanges if it.target != PATH]


@contextlib.asynccontextmanager
async def asleep(**config: Any) -> AsyncIterator[tuple[Replica, GatewayProcess]]:
    """A gateway that knows that its one replica sleeps, and the exchange between them."""
    async with Replica() as replica, GatewayProcess(replica, **config) as gateway:
        running = asyncio.create_task(
            exchange.Exchange(gateway.board, Ledger(), CREDENTIAL.encode()).run()
        )
        try:
            assert await until(lambda: its(gateway).replica.sleeps_for_now)
            assert await until(lambda: len(replica.questions) == 2)
            yield replica, gateway
        finally:
            running.cancel()


def its(gateway: GatewayProcess) -> FrontEnd:
    return gateway.front_ends[0]


def ask(gateway: GatewayProcess, path: str = "/v1/chat/completions") -> Any:
    return asyncio.create_task(gateway.client.post(path, json={"model": "m"}))


async def test_a_request_waits_and_is_told_at_once_until_the_model_is_awake() -> None:
    async with asleep() as (replica, gateway):
        sent = [ask(gateway), ask(gateway, "/tokenize")]  # the second needs no engine, but awake
        assert await until(lambda: replica.questions[-1].waiting > 0)
        assert replica.questions[-1].waited_s < 30 and not replica.requests
        replica.becomes(AWAKE)
        assert [(await it).status_code for it in sent] == [200, 200]
        assert len(replica.requests) == 2
        assert await until(lambda: replica.questions[-1].waiting == 0)


async def test_one_that_has_just_lost_its_turn_keeps_the_request_waiting() -> None:
    async with asleep() as (replica, gateway):
        replica.becomes(AWAKE)
        assert await until(lambda: not its(gateway).replica.sleeps_for_now)
        replica.load = ASLEEP  # the gateway does not know yet
        sent = ask(gateway)
        assert await until(lambda: replica.requests)
        assert await until(lambda: its(gateway).replica.sleeps_for_now)
        assert not sent.done()
        replica.becomes(AWAKE)
        assert (await sent).status_code == 200


async def test_a_request_that_gets_no_turn_in_time_is_told_why() -> None:
    async with asleep(queue={"max_wait_s": 0.1}) as (_, gateway):
        answer = await ask(gateway)
        assert answer.status_code == 503
        assert answer.json()["error"]["message"] == (
            "The model 'm' did not get its turn on the GPU, which it shares in a swap group, "
            "within 0.1 seconds; 0 others wait."
        )


async def test_the_fleet_shows_it_asleep_with_nothing_to_mend() -> None:
    async with asleep() as (_, gateway):
        model = (await gateway.client.get("/fleet")).json()["models"]["m"]
        assert (model["asleep"], model["mend"]) == (True, "")
        listed = (await gateway.client.get("/v1/models")).json()["data"]
        assert "m" in [it["id"] for it in listed]


async def test_a_gateway_that_has_just_begun_lets_the_request_wait() -> None:
    """Nothing has told it yet that the replica sleeps, and why; the model's settings do."""
    group = {"m": reported({"resources": {"swap_group": "big"}})}
    async with Replica() as replica, GatewayProcess(replica, applications=group) as gateway:
        sent = ask(gateway)
        assert await until(lambda: replica.requests)
        assert await until(lambda: its(gateway).replica.sleeps_for_now)
        assert not sent.done()
        replica.load = AWAKE
        gateway.board.report(its(gateway).replica.id, AWAKE)
        assert (await sent).status_code == 200
