"""Replicas with less weight get less of the real gateway's requests."""

from __future__ import annotations

import asyncio

from harness.scripted import Exchange, GatewayProcess, Upstream, ok, took, until

from serve_app.cluster.exchange import CALL_HEADER, Called, Usage
from serve_app.gateway.standing import FAULTS

CHAT = "/v1/chat/completions"


async def ill(exchange: Exchange) -> None:
    await exchange.answer(b'{"error": {"message": "CUDA error"}}', status="500 No")


async def ask(gateway: GatewayProcess, times: int) -> None:
    for _ in range(times):
        await gateway.client.post(CHAT, json={"model": "m"})


def report(gateway: GatewayProcess, number: int, replica: Upstream) -> None:
    """What the front end tells of each of its requests."""
    for exchange in replica.exchanges:
        called = Called.read(exchange.header(CALL_HEADER.decode())[0].encode())
        gateway.ledger.report(took(called.id, Usage()), f"r{number}")


async def test_one_that_answers_with_errors_gets_less() -> None:
    async with Upstream(ill) as bad, Upstream() as good, GatewayProcess(bad, good) as gateway:
        gateway.front_ends[1].inflight = gateway.front_ends[1].replica.inflight = 2
        await ask(gateway, FAULTS)
        assert len(bad.exchanges) == FAULTS
        report(gateway, 0, bad)
        replicas = (await gateway.client.get("/fleet")).json()["models"]["m"]["replicas"]
        assert [it["weight"] for it in replicas] == [0.0, 1.0]
        await ask(gateway, 20)
        assert (len(bad.exchanges), len(good.exchanges)) == (FAULTS, 20)
        gateway.front_ends[1].inflight = gateway.front_ends[1].replica.inflight = 1


async def test_a_new_one_is_not_flooded() -> None:
    """Though it has no requests and the other has some, which is how the fewest would choose."""
    held = asyncio.Event()

    async def hold(exchange: Exchange) -> None:
        await held.wait()
        await ok(exchange)

    async with Upstream(hold) as old, Upstream(hold) as new, GatewayProcess(old) as gateway:
        sent = [asyncio.create_task(ask(gateway, 1)) for _ in range(3)]
        assert await until(lambda: len(old.exchanges) == 3)
        before = {it.id: (it.host, it.port) for _, it in gateway.board.all()}
        gateway.board.publish("m", before | {"r1": (new.host, new.port)})
        (replica,) = (it for it in gateway.board.replicas_of("m") if it.id == "r1")
        replica.standing.since += 3600  # so that a slow machine sees it new, too
        sent += [asyncio.create_task(ask(gateway, 1)) for _ in range(3)]
        assert await until(lambda: len(old.exchanges) + len(new.exchanges) == 6)
        held.set()
        await asyncio.gather(*sent)
        assert (len(old.exchanges), len(new.exchanges)) == (6, 0)
