"""Stages and the policy: what they see of a call, and that its end is told exactly once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import httpx
import pytest
from harness.scripted import Exchange, GatewayProcess, Upstream, until

from serve_app.gateway.callers import Caller
from serve_app.gateway.errors import GatewayError
from serve_app.gateway.policy import Policy
from serve_app.gateway.replicas import FrontEnd
from serve_app.gateway.stages import Call, Outcome

CHAT = "/v1/chat/completions"
ASK = {"model": "org/m:1.0"}


@dataclass
class Scripted:
    """A stage that does as a test tells it, and remembers what it was told."""

    refuses: Exception | None = None
    waits: bool = False
    fails_at_the_end: bool = False
    calls: list[Call] = field(default_factory=list)
    ends: list[tuple[Call, Outcome]] = field(default_factory=list)

    async def admit(self, call: Call) -> Call:
        self.calls.append(call)
        if self.refuses:
            raise self.refuses
        if self.waits:
            await asyncio.Event().wait()
        return replace(call, caller=Caller(f"{call.caller.name if call.caller else ''}+"))

    def ended(self, call: Call, outcome: Outcome) -> None:
        self.ends.append((call, outcome))
        if self.fails_at_the_end:
            raise RuntimeError("a bug of a stage")

    async def only_end(self) -> Outcome:
        """The outcome, which must be told once, also when some time has passed."""
        assert await until(lambda: self.ends)
        await asyncio.sleep(0.1)
        [(_, outcome)] = self.ends
        return outcome


async def test_a_call_passes_each_stage_in_turn_and_its_end_is_told_backwards() -> None:
    told: list[Scripted] = []

    class Noted(Scripted):
        def ended(self, call: Call, outcome: Outcome) -> None:
            told.append(self)
            super().ended(call, outcome)

    first, second = Noted(), Noted()
    async with Upstream() as upstream, GatewayProcess(upstream, stages=[first, second]) as gateway:
        answer = await gateway.client.post(CHAT, json=ASK, headers={"x-request-id": "r-1"})
        assert answer.status_code == 200
        outcome = await first.only_end()
    [call] = first.calls
    assert (call.request.id, call.model.name, call.caller) == ("r-1", "m", None)
    assert call.request.path == CHAT
    assert [c.caller for c in second.calls] == [Caller("+")]
    assert told == [second, first]
    # Each is told of the call as it has let it pass.
    assert [call.caller for s in told for call, _ in s.ends] == [Caller("++"), Caller("+")]
    assert (outcome.end, outcome.status, outcome.retries) == ("answered", 200, [])
    assert outcome.first_byte is not None
    assert call.arrived <= outcome.first_byte <= outcome.ended
    assert second.ends[0][1] is outcome


async def test_an_error_of_the_replica_is_an_answer() -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.answer(b"no", status="418 X")

    stage = Scripted()
    async with Upstream(script) as upstream, GatewayProcess(upstream, stages=[stage]) as gateway:
        assert (await gateway.client.post(CHAT, json=ASK)).status_code == 418
        outcome = await stage.only_end()
    assert (outcome.end, outcome.status) == ("answered", 418)


async def test_what_a_later_stage_refuses_ends_for_those_before_it_only() -> None:
    error = GatewayError(429, "Slower.", "rate_limit_error", headers={"retry-after": "7"})
    first, refusing, never = Scripted(), Scripted(refuses=error), Scripted()
    async with (
        Upstream() as upstream,
        GatewayProcess(upstream, stages=[first, refusing, never]) as gateway,
    ):
        answer = await gateway.client.post(CHAT, json=ASK)
        outcome = await first.only_end()
        assert upstream.exchanges == []
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "7")
    assert answer.json()["error"]["message"] == "Slower."
    assert (outcome.end, outcome.status, outcome.first_byte) == ("refused", 429, None)
    assert refusing.ends == never.ends == never.calls == []


async def test_a_stage_that_fails_is_a_failure_of_the_gateway() -> None:
    first, failing = Scripted(), Scripted(refuses=RuntimeError("a bug"))
    async with Upstream() as upstream, GatewayProcess(upstream, stages=[first, failing]) as gateway:
        answer = await gateway.client.post(CHAT, json=ASK)
        outcome = await first.only_end()
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert (outcome.end, outcome.status) == ("failed", 500)
    assert failing.ends == []


async def test_a_stage_that_fails_at_the_end_keeps_the_end_from_nobody() -> None:
    first, failing = Scripted(), Scripted(fails_at_the_end=True)
    async with Upstream() as upstream, GatewayProcess(upstream, stages=[first, failing]) as gateway:
        assert (await gateway.client.post(CHAT, json=ASK)).status_code == 200
        assert (await first.only_end()).end == "answered"


async def leaves(gateway: GatewayProcess, when: Any) -> None:
    """A client that asks, and goes away as soon as ``when`` is true."""
    asking = asyncio.create_task(gateway.client.post(CHAT, json=ASK))
    assert await until(when)
    asking.cancel()
    await asyncio.wait([asking])


async def test_a_client_that_leaves_in_a_stage_has_passed_those_before_it() -> None:
    first, waiting = Scripted(), Scripted(waits=True)
    async with Upstream() as upstream, GatewayProcess(upstream, stages=[first, waiting]) as gateway:
        await leaves(gateway, lambda: waiting.calls)
        outcome = await first.only_end()
        assert upstream.exchanges == []
    assert (outcome.end, outcome.status, outcome.first_byte) == ("left", 499, None)
    assert waiting.ends == []


@pytest.mark.parametrize("begun", [False, True])
async def test_a_client_that_leaves_before_the_head_or_in_mid_stream(begun: bool) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.sse(*([b"data: 1\n\n"] if begun else []))
        await exchange.client_gone()

    stage = Scripted()
    async with Upstream(script) as upstream, GatewayProcess(upstream, stages=[stage]) as gateway:
        if begun:
            async with gateway.client.stream("POST", CHAT, json=ASK) as answer:
                await anext(answer.aiter_raw())
        else:
            await leaves(gateway, lambda: upstream.exchanges)
        outcome = await stage.only_end()
    assert (outcome.end, outcome.status) == ("left", 499)
    assert (outcome.first_byte is not None) == begun


@pytest.mark.parametrize("kind", ["application/json", "text/event-stream"])
async def test_a_replica_that_is_lost_in_its_answer(kind: str) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.head(f"content-type: {kind}", "transfer-encoding: chunked")
        await exchange.chunk(b"data: 1\n\n")
        await asyncio.sleep(0.1)
        exchange.die()

    stage = Scripted()
    async with Upstream(script) as upstream, GatewayProcess(upstream, stages=[stage]) as gateway:
        with contextlib.suppress(httpx.RemoteProtocolError):
            await gateway.client.post(CHAT, json=ASK)
        outcome = await stage.only_end()
    assert (outcome.end, outcome.status) == ("lost", 502)
    assert outcome.first_byte is not None


async def dies(exchange: Exchange) -> None:
    exchange.die()


async def test_a_replica_that_is_lost_before_its_answer_is_a_retry() -> None:
    stage = Scripted()
    async with (
        Upstream(dies) as bad,
        Upstream() as good,
        GatewayProcess(bad, good, stages=[stage]) as gateway,
    ):
        assert (await gateway.client.post(CHAT, json=ASK)).status_code == 200
        outcome = await stage.only_end()
    assert (outcome.end, outcome.retries) == ("answered", ["connection closed"])


async def test_two_lost_replicas_are_a_refusal() -> None:
    stage = Scripted()
    async with (
        Upstream(dies) as one,
        Upstream(dies) as two,
        GatewayProcess(one, two, stages=[stage]) as gateway,
    ):
        assert (await gateway.client.post(CHAT, json=ASK)).status_code == 503
        outcome = await stage.only_end()
    assert (outcome.end, outcome.status) == ("refused", 503)


@pytest.mark.parametrize("begun", [False, True])
async def test_an_exception_inside_the_gateway(begun: bool) -> None:
    async def fails(replica: Any, request: Any, answer: Any) -> int:
        if begun:
            await answer.send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("a bug")

    stage = Scripted()
    async with Upstream() as upstream, GatewayProcess(upstream, stages=[stage]) as gateway:
        gateway._relay.send = fails  # type: ignore[method-assign]
        with contextlib.suppress(httpx.RemoteProtocolError):
            await gateway.client.post(CHAT, json=ASK)
        outcome = await stage.only_end()
    assert (outcome.end, outcome.status) == ("failed", 500)


# --- the policy ----------------------------------------------------------------------------------


async def test_a_policy_chooses_among_the_live_replicas_and_sees_the_call() -> None:
    seen: list[tuple[list[str], Call]] = []

    class Last(Policy):
        def choose(self, live: Sequence[FrontEnd], call: Call) -> FrontEnd:
            seen.append(([replica.id for replica in live], call))
            return live[-1]

    stage = Scripted()
    async with (
        Upstream() as first,
        Upstream(dies) as last,
        GatewayProcess(first, last, stages=[stage], policy=Last()) as gateway,
    ):
        for _ in range(2):
            assert (await gateway.client.post(CHAT, json=ASK)).status_code == 200
        assert (len(first.exchanges), len(last.exchanges)) == (2, 1)
    # The one that failed is not live in the second attempt, nor for the next call.
    assert [live for live, _ in seen] == [["r0", "r1"], ["r0"], ["r0"]]
    assert [call.caller for _, call in seen] == [Caller("+")] * 3
