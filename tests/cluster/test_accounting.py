"""What is reported of requests is, to the token, what the engine counts itself."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from harness import servers
from harness.processes import eventually
from harness.servers import CHAT, Cluster, ModelPort

from serve_app.cluster.exchange import CALL_HEADER, PATH, Answer, Called, Question, Report

REQUESTS = 90
GATEWAY = "a test"


@pytest.fixture
def ports(cluster: Cluster) -> list[ModelPort]:
    """Of the front ends of CHAT's one replica."""
    [replica] = servers.front_ends(CHAT)
    return list(replica.values())


@dataclass(frozen=True)
class Ask:
    """A request, and after how many events its client goes away."""

    path: str
    body: dict[str, Any]
    events: int | None


def asks() -> list[Ask]:
    """A mix: chats and completions, streamed and not, several prompts, n, cached, a third cut."""
    chance = random.Random(1)
    made = []
    for number in range(REQUESTS):
        tokens = chance.randint(2, 24)
        body: dict[str, Any] = {"model": CHAT, "max_tokens": tokens, "ignore_eos": True}
        if chance.random() < 0.3:
            body["n"] = 2
        words = "once upon a time " * chance.randint(1, 40)
        if chance.random() < 0.5:
            path, more = "/v1/chat/completions", {"messages": [{"role": "user", "content": words}]}
        else:
            several = chance.random() < 0.4
            path, more = "/v1/completions", {"prompt": [words, "It"] if several else words}
        cut = number % 3 == 0
        streamed = cut or chance.random() < 0.5
        events = chance.randint(0, 4) if cut else None
        made.append(Ask(path, {**body, **more, "stream": streamed}, events))
    return made


async def send(client: httpx.AsyncClient, port: ModelPort, id: int, ask: Ask) -> None:
    called = Called(str(id), GATEWAY, "team-a", CHAT, CHAT, ask.path, 0.0)
    headers = {
        "x-serve-app-credential": port.credential,
        CALL_HEADER.decode(): called.header().decode(),
    }
    url = f"{port.base_url}{ask.path}"
    async with client.stream("POST", url, json=ask.body, headers=headers) as answer:
        assert answer.status_code == 200, await answer.aread()
        lines = 0
        async for line in answer.aiter_lines():
            lines += bool(line)
            if ask.events is not None and lines > ask.events:
                return


async def take(port: ModelPort, found: list[Report]) -> None:
    """Take the reports of one front end for ever: those of a silent gateway go to another one."""
    said = Answer("", 0)
    headers = {"x-serve-app-credential": port.credential}
    async with httpx.AsyncClient(timeout=60) as client:
        while True:
            question = Question(GATEWAY, said.of, said.last).encode()
            answer = await client.post(f"{port.base_url}{PATH}", content=question, headers=headers)
            said = Answer.decode(answer.content)
            found += [it for it in said.reports if it.usage]


async def test_the_reports_sum_up_to_the_engines_own_counters(ports: list[ModelPort]) -> None:
    first = ports[0]
    names = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")

    def counted() -> tuple[float, ...]:
        return tuple(first.metric(name) for name in names)

    before = counted()
    found: list[Report] = []
    taking = [asyncio.create_task(take(port, found)) for port in ports]
    gate = asyncio.Semaphore(12)
    async with httpx.AsyncClient(timeout=180) as client:

        async def one(id: int, ask: Ask) -> None:
            async with gate:
                await send(client, ports[id % len(ports)], id, ask)

        await asyncio.gather(*(one(id, ask) for id, ask in enumerate(asks())))
    assert await asyncio.to_thread(eventually, lambda: len(found) >= REQUESTS, 60), len(found)
    for task in taking:
        task.cancel()
    assert sorted(int(it.called.id) for it in found) == list(range(REQUESTS))
    assert {it.called.key for it in found} == {"team-a"}
    usages = [it.usage for it in found if it.usage]
    summed = (
        sum(it.prompt_tokens for it in usages),
        sum(it.completion_tokens for it in usages),
    )
    # A further front end tells the first its statistics a moment later.
    told = lambda: tuple(a - b for a, b in zip(counted(), before, strict=True))  # noqa: E731
    assert eventually(lambda: told() == summed, 10), (told(), summed)
    assert all(it.cached_tokens <= it.prompt_tokens for it in usages)
    assert any(it.cached_tokens for it in usages)


def test_the_exchange_is_the_gateways_alone(ports: list[ModelPort]) -> None:
    for port in ports:
        asked = httpx.post(f"{port.base_url}{PATH}", content=Question("g").encode())
        assert asked.status_code == 401


def test_the_first_front_end_tells_the_load(ports: list[ModelPort]) -> None:
    said = []
    for port in ports:
        headers = {"x-serve-app-credential": port.credential}
        asked = httpx.post(
            f"{port.base_url}{PATH}", content=Question("g").encode(), headers=headers, timeout=30
        )
        said.append(Answer.decode(asked.content).load)
    assert said[0] and said[0].capacity > 0 and said[0].running == 0
    assert said[1:] == [None]
