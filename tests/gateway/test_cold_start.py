"""Requests that wait for a model without replicas."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from harness.scripted import Exchange, GatewayProcess, Upstream, ok, until
from ray.serve.exceptions import DeploymentUnavailableError

SECOND = 1.0


class Cold:
    """Serve's handle of a model that is scaled to zero, until a test has a replica come up."""

    def __init__(self) -> None:
        self.waiting = 0
        self._replica: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def has(self, upstream: Upstream) -> None:
        metadata = {"host": "127.0.0.1", "port": upstream.port}
        self._replica.set_result(SimpleNamespace(replica_id="new", replica_metadata=metadata))

    def cannot(self) -> None:
        self._replica.set_exception(DeploymentUnavailableError(cast(Any, "m")))

    @contextlib.asynccontextmanager
    async def choose_replica(self) -> AsyncIterator[Any]:
        self.waiting += 1
        try:
            chosen = await asyncio.shield(self._replica)
            # Serve asks the replica twice; whoever asked later may be told sooner.
            await asyncio.sleep(0.05 / self.waiting)
            yield chosen
        finally:
            self.waiting -= 1


@contextlib.asynccontextmanager
async def sleeping(**config: Any) -> AsyncIterator[tuple[GatewayProcess, Cold]]:
    async with GatewayProcess(**config) as gateway:
        gateway.board.forget("m")
        cold = Cold()
        gateway.directory.handle = lambda name: cold  # type: ignore[method-assign]
        yield gateway, cold


async def queue(
    gateway: GatewayProcess, numbers: range, client: httpx.AsyncClient | None = None
) -> list[asyncio.Task[httpx.Response]]:
    """One request after the other, each when the gateway has the one before."""
    sent = []
    for number in numbers:
        before = gateway.metrics._running.get("m", 0)
        body = {"model": "m", "n": number}
        asked = (client or gateway.client).post("/v1/chat/completions", json=body)
        sent.append(asyncio.create_task(asked))
        assert await until(lambda before=before: gateway.metrics._running.get("m", 0) > before)
    return sent


def numbers(upstream: Upstream) -> list[int]:
    return [int(body.rpartition(b":")[2].rstrip(b"}")) for body in upstream.bodies]


async def test_they_reach_the_replica_in_the_order_in_which_they_came() -> None:
    all_there = asyncio.Event()

    async def in_the_end(exchange: Exchange) -> None:
        # An answer takes an engine longer than a connection takes the gateway. One that came at
        # once would leave its connection to a later request, which then need not open one.
        await all_there.wait()
        await ok(exchange)

    async with Upstream(in_the_end) as upstream, sleeping() as (gateway, cold):
        waiting = await queue(gateway, range(30))
        assert cold.waiting == 1  # which Serve counts, and it is enough to be woken
        cold.has(upstream)
        late = [
            asyncio.create_task(
                gateway.client.post("/v1/completions", json={"model": "m", "n": 30 + n})
            )
            for n in range(10)
        ]
        assert await until(lambda: len(upstream.exchanges) == 40)
        all_there.set()
        answers = await asyncio.gather(*waiting, *late)
        assert {a.status_code for a in answers} == {200}
    assert numbers(upstream)[:30] == list(range(30))


async def test_those_who_leave_do_not_hold_up_the_others() -> None:
    async with Upstream() as upstream, sleeping() as (gateway, cold):
        waiting = await queue(gateway, range(6))
        for gone in (0, 3):
            waiting[gone].cancel()
        assert await until(lambda: gateway.metrics._running["m"] == 4)
        assert await until(lambda: cold.waiting == 1)  # the next one has taken over
        cold.has(upstream)
        left = [task for n, task in enumerate(waiting) if n not in (0, 3)]
        assert {a.status_code for a in await asyncio.gather(*left)} == {200}
    assert numbers(upstream) == [1, 2, 4, 5]


async def test_nobody_waits_in_serve_when_all_have_left() -> None:
    async with sleeping() as (gateway, cold):
        for task in await queue(gateway, range(3)):
            task.cancel()
        assert await until(lambda: cold.waiting == 0)
        assert await until(lambda: gateway.metrics._running["m"] == 0)


async def test_each_waits_for_its_own_time() -> None:
    async with Upstream() as upstream, sleeping(cold_start_timeout_s=3 * SECOND) as (gateway, cold):
        [first] = await queue(gateway, range(1))
        await asyncio.sleep(2 * SECOND)
        [second] = await queue(gateway, range(1, 2))
        late = await first
        cold.has(upstream)
        in_time = await second
    assert (late.status_code, in_time.status_code) == (503, 200)
    assert "did not start within 3 seconds" in late.json()["error"]["message"]


async def test_all_are_told_that_serve_cannot_start_it() -> None:
    async with sleeping() as (gateway, cold):
        waiting = await queue(gateway, range(5))
        cold.cannot()
        answers = await asyncio.gather(*waiting)
    assert {a.status_code for a in answers} == {503}
    assert all("cannot start; GET /ready says why" in a.text for a in answers)


async def test_a_replica_that_serve_never_names_is_found_on_the_gateways_own_list() -> None:
    async with Upstream() as upstream, sleeping() as (gateway, cold):
        waiting = await queue(gateway, range(3))
        gateway.board.publish("m", {"new": ("127.0.0.1", upstream.port)})
        assert {a.status_code for a in await asyncio.gather(*waiting)} == {200}
        assert cold.waiting == 0
    assert numbers(upstream) == [0, 1, 2]


@pytest.mark.parametrize(
    ("becomes", "status", "sentence"),
    [
        ({"status": "DEPLOY_FAILED", "message": "no such weights"}, 503, "no such weights"),
        (None, 404, "does not exist"),
    ],
)
async def test_all_are_told_that_it_failed_or_is_gone_meanwhile(
    becomes: dict[str, str] | None, status: int, sentence: str
) -> None:
    async with sleeping() as (gateway, _):
        waiting = await queue(gateway, range(5))
        known = gateway.directory._by_id
        gateway.directory._by_id = (
            {id: replace(model, **becomes) for id, model in known.items()} if becomes else {}
        )
        answers = await asyncio.gather(*waiting)
    assert {a.status_code for a in answers} == {status}
    assert all(sentence in a.text for a in answers)
