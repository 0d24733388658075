"""Which replica gets a call: conversations stay where they are cached, and none is overrun."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness.scripted import Exchange, GatewayProcess, Upstream, ok, reported, took, until
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from serve_app.cluster.exchange import CALL_HEADER, PROMPT_HEADER, Called, Load, Usage
from serve_app.config import keys
from serve_app.gateway.queue import AT_ONCE, Queue
from serve_app.gateway.routing import prefix
from serve_app.gateway.routing.router import Router

CHAT = "/v1/chat/completions"
LONG = "word " * 2000
"""Ten blocks."""

KEYS = {name: f"sk-{name:-<43}" for name in ("a", "b")}


class Replicas:
    """Scripted replicas behind a gateway. They answer at once, or when the test says."""

    def __init__(self, count: int, args: dict[str, Any] | None = None, **config: Any) -> None:
        self.ups = [Upstream(self._answer) for _ in range(count)]
        self._args, self._config = args, config
        self.go = asyncio.Event()
        self.go.set()

    async def _answer(self, exchange: Exchange) -> None:
        await self.go.wait()
        await ok(exchange)

    @contextlib.asynccontextmanager
    async def gateway(self, **load: Any) -> AsyncIterator[GatewayProcess]:
        """One gateway in front of them; all idle."""
        gateway = GatewayProcess(
            *self.ups, applications={"m": reported(self._args)}, **self._config
        )
        for it in gateway.front_ends:
            it.inflight = it.replica.inflight = 0
        async with gateway:
            for it in gateway.front_ends:
                report(gateway, it.id, **load)
            yield gateway
            self.go.set()
            for order, it in enumerate(gateway.front_ends):
                it.inflight += order  # as it was made

    def got(self) -> list[int]:
        return [len(up.exchanges) for up in self.ups]


@contextlib.asynccontextmanager
async def replicas(count: int, **more: Any) -> AsyncIterator[Replicas]:
    async with contextlib.AsyncExitStack() as stack:
        them = Replicas(count, **more)
        for up in them.ups:
            await stack.enter_async_context(up)
        yield them


def report(gateway: GatewayProcess, replica: str, **load: Any) -> None:
    known = {"running": 0, "waiting": 0, "capacity": 64, "kv_cache_usage": 0.0}
    gateway.board.report(replica, Load(**(known | {"prefix_cache_tokens": 100_000} | load)))


def router_of(gateway: GatewayProcess) -> Router:
    router = gateway.app._stored._policy
    assert isinstance(router, Router)
    return router


def queue_of(gateway: GatewayProcess) -> Queue:
    queue = gateway.app._send.__self__._queue
    assert isinstance(queue, Queue)
    return queue


def busy(gateway: GatewayProcess, replica: str, requests: int) -> None:
    """Other requests of this gateway's begin, or end, at a replica."""
    gateway.board._front_ends["m"][replica].replica.inflight += requests


async def chat(
    gateway: GatewayProcess, *texts: str, path: str = CHAT, headers: Any = None, **more: Any
) -> str:
    """Send a conversation; the replica that had it."""
    messages = [{"role": "user", "content": text} for text in texts]
    what = {"input": texts} if "responses" in path else {"messages": messages}
    body = {"model": "m", **what, **more}
    before = gateway.ups_got()  # type: ignore[attr-defined]
    answer = await gateway.client.post(path, json=body, headers=headers or {})
    assert answer.status_code == 200, answer.text
    after = gateway.ups_got()  # type: ignore[attr-defined]
    [went] = [n for n, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    return f"r{went}"


@contextlib.asynccontextmanager
async def fleet(
    count: int, args: dict[str, Any] | None = None, load: Any = None, **config: Any
) -> AsyncIterator[tuple[Replicas, GatewayProcess]]:
    async with replicas(count, args=args, **config) as them, them.gateway(**(load or {})) as it:
        it.ups_got = them.got  # type: ignore[attr-defined]
        yield them, it


def counted(gateway: GatewayProcess, name: str, label: str) -> dict[str, float]:
    """A counter's samples by one of its labels."""
    text = generate_latest(gateway.metrics.registry).decode()
    return {
        sample.labels[label]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == f"serve_app_gateway_{name}"
    }


# --- what is cached ------------------------------------------------------------------------------


async def test_a_conversation_goes_where_its_beginning_is_cached() -> None:
    async with fleet(3) as (_, gateway):
        home = await chat(gateway, LONG)
        busy(gateway, home, 2)
        assert await chat(gateway, LONG, "yes?", "and then?") == home
        assert await chat(gateway, "Another. " + LONG) != home
        assert counted(gateway, "routing_choices_total", "reason") == {"cold": 2, "warm": 1}


@pytest.mark.parametrize(
    ("path", "more"),
    [("/v1/completions", {"prompt": LONG}), ("/v1/messages", {"system": LONG}),
     ("/v1/responses", {"instructions": LONG})],
)  # fmt: skip
async def test_so_it_is_in_every_api_that_generates(path: str, more: Any) -> None:
    async with fleet(3) as (_, gateway):
        home = await chat(gateway, path=path, **more)
        busy(gateway, home, 2)
        assert await chat(gateway, path=path, **more) == home


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/rerank", "/tokenize"])
async def test_what_generates_nothing_goes_where_there_are_the_fewest_requests(path: str) -> None:
    async with fleet(2) as (_, gateway):
        home = await chat(gateway, LONG, path=path)
        busy(gateway, home, 1)
        assert await chat(gateway, LONG, path=path) != home
        assert counted(gateway, "routing_choices_total", "reason") == {"least_loaded": 2}


async def test_a_prompt_that_everybody_sends_is_soon_on_every_replica() -> None:
    async with fleet(4) as (them, gateway):
        them.go.clear()
        sent = [asyncio.create_task(chat_anyhow(gateway, LONG, f"question {n}")) for n in range(60)]
        assert await until(lambda: sum(them.got()) == 60)
        assert max(them.got()) <= 1.5 * 15
        them.go.set()
        assert set(await asyncio.gather(*sent)) == {200}
        overflows = counted(gateway, "routing_choices_total", "reason")["overflow"]
        assert overflows == sum(got > 0 for got in them.got()) - 1  # the others had it then


async def chat_anyhow(
    gateway: GatewayProcess, *texts: str, headers: Any = None, **more: Any
) -> int:
    messages = [{"role": "user", "content": text} for text in texts]
    body = {"model": "m", "messages": messages, **more}
    return (await gateway.client.post(CHAT, json=body, headers=headers or {})).status_code


async def test_what_a_replica_had_is_forgotten_with_it() -> None:
    async with fleet(3) as (_, gateway):
        homes = []
        for n in range(6):
            homes.append(await chat(gateway, f"{n} {LONG}"))
            busy(gateway, homes[-1], 1)
        for home in homes:
            busy(gateway, home, -1)
        policy = router_of(gateway)._routed["m"].choice
        assert set(homes) == {"r0", "r1", "r2"} == set(policy.index.replicas)
        at = gateway.board._front_ends["m"]
        gateway.board.publish("m", {id: (at[id].host, at[id].port) for id in ("r0", "r1")})
        for n, home in enumerate(homes):
            assert (await chat(gateway, f"{n} {LONG}") == home) == (home != "r2")
        assert set(policy.index.replicas) == {"r0", "r1"}


async def test_a_replica_that_slept_has_nothing_cached() -> None:
    async with fleet(2) as (_, gateway):
        home = await chat(gateway, LONG)
        busy(gateway, home, 2)
        report(gateway, home, cache_drops=1)
        assert await chat(gateway, LONG) != home


async def test_after_a_failed_replica_another_one_has_the_conversation() -> None:
    async def dies(exchange: Exchange) -> None:
        exchange.die()

    async with fleet(2) as (them, gateway):
        home = await chat(gateway, LONG)
        them.ups[int(home[1])].script = dies
        assert await chat_anyhow(gateway, LONG) == 200
        assert await chat_anyhow(gateway, LONG) == 200  # the first is avoided for a while
        them.ups[int(home[1])].script = ok
        gateway.board._front_ends["m"][home].replica.avoid_until.clear()
        assert counted(gateway, "routing_choices_total", "reason") == {
            "cold": 1,
            "warm": 2,
            "overflow": 1,
        }
        assert not any(
            it.backlog.tokens for it in router_of(gateway)._routed["m"].choice._seen.values()
        )


async def test_gateways_know_what_others_have_sent() -> None:
    async with (
        replicas(4) as them,
        them.gateway(gateways=2) as one,
        them.gateway(gateways=2) as two,
    ):
        for it in (one, two):
            it.ups_got = them.got  # type: ignore[attr-defined]
        first = [await chat(one, f"{n} {LONG}") for n in range(12)]
        for number, up in enumerate(them.ups):
            for exchange in up.exchanges:
                [key] = exchange.header(PROMPT_HEADER.decode())
                two.board.heard("m", two.front_ends[number].replica, key)
        busy(two, first[0], 1)  # by their load it would go elsewhere
        then = [await chat(two, f"{n} {LONG}") for n in range(12)]
        assert first == then and len(set(first)) > 1
        assert counted(one, "routing_choices_total", "reason") == {"cold": 12}
        assert counted(two, "routing_choices_total", "reason") == {"warm": 12}


async def test_a_gateway_that_only_hears_forgets_replicas_that_are_gone() -> None:
    async with fleet(2) as (_, gateway):
        board = gateway.board
        key = prefix.key([b"8 bytes."] * 4).decode()
        before = {it.id: (it.host, it.port) for it in gateway.front_ends}
        for n in range(5):
            board.publish("m", {f"new{n}": ("127.0.0.1", 1), f"other{n}": ("127.0.0.1", 2)})
            for front_end in gateway.front_ends + board.live("m"):
                board.heard("m", front_end.replica, key)
                board.heard("m", front_end.replica, "no base64!")
        choice = router_of(gateway)._routed["m"].choice
        assert set(choice.index.replicas) == {"new4", "other4"} and choice.replicas == 2
        board.publish("m", before)


async def test_a_client_tells_gateways_nothing_of_prompts() -> None:
    async with fleet(2) as (them, gateway):
        await chat(gateway, LONG, headers={PROMPT_HEADER.decode(): "bm90IHRydWU="})
        await chat(gateway, "short", headers={PROMPT_HEADER.decode(): "bm90IHRydWU="})
        told = [it.header(PROMPT_HEADER.decode()) for up in them.ups for it in up.exchanges]
        [key] = [key for its in told for key in its]  # the short one has no whole block
        assert len(prefix.blocks_of(key)) == 9


# --- a replica without room ----------------------------------------------------------------------


async def test_a_call_lets_others_pass_until_its_own_replica_has_a_place() -> None:
    async with fleet(2, load={"capacity": 10}) as (them, gateway):
        home = await chat(gateway, LONG)
        other = "r1" if home == "r0" else "r0"
        busy(gateway, home, 1)
        assert await chat(gateway, "b" + LONG) == other
        busy(gateway, home, 13)  # 10, and 4 more
        busy(gateway, other, 14)
        before = them.got()
        held = asyncio.create_task(chat_anyhow(gateway, LONG))
        passes = asyncio.create_task(chat_anyhow(gateway, "b" + LONG))
        assert await until(lambda: queue_of(gateway).waiting("m").requests == 2)
        busy(gateway, other, -4)  # now it has places, and the call in front does not want one
        report(gateway, other, running=10, capacity=10)
        assert await passes == 200
        assert not held.done()
        busy(gateway, home, -4)
        report(gateway, home, running=10, capacity=10)
        assert await held == 200
        assert [after - b for after, b in zip(them.got(), before, strict=True)] == [1, 1]


async def test_it_waits_no_longer_than_the_setting_says() -> None:
    routing = {"max_wait_for_cache_s": 0.3}
    async with fleet(2, load={"capacity": 10}, routing=routing) as (them, gateway):
        home = await chat(gateway, LONG)
        other = "r1" if home == "r0" else "r0"
        for it in (home, other):
            busy(gateway, it, 14)
        before = them.got()
        sent = [asyncio.create_task(chat_anyhow(gateway, LONG)) for _ in range(2)]
        assert await until(lambda: queue_of(gateway).waiting("m").requests == 2)
        busy(gateway, other, -1)
        report(gateway, other, running=13, capacity=10)
        await asyncio.sleep(0.8)
        assert queue_of(gateway).waiting("m").requests == 2  # a place alone does not draw them
        busy(gateway, other, -6)
        report(gateway, other, running=7, capacity=10)
        assert await asyncio.gather(*sent) == [200, 200]
        went = {f"r{n}": got - b for n, (got, b) in enumerate(zip(them.got(), before, strict=True))}
        assert went == {home: 0, other: 2}
        assert len(queue_of(gateway)._lines["m"].held) == 0


async def test_calls_are_looked_at_in_small_parts_so_that_streams_go_on_between() -> None:
    async with fleet(2, load={"capacity": 10}) as (_, gateway):
        home = await chat(gateway, LONG)
        other = "r1" if home == "r0" else "r0"
        for it in (home, other):
            busy(gateway, it, 14)
        sent = [asyncio.create_task(chat_anyhow(gateway, LONG)) for _ in range(100)]
        assert await until(lambda: queue_of(gateway).waiting("m").requests == 100)
        held = queue_of(gateway)._lines["m"].held
        busy(gateway, other, -1)
        report(gateway, other, running=13, capacity=10)  # the place suits none of them
        assert 0 < len(held) <= AT_ONCE
        assert await until(lambda: len(held) == 100, within_s=2)
        for it in (home, other):
            busy(gateway, it, -13)
            report(gateway, it)
        assert set(await asyncio.gather(*sent)) == {200}


async def test_calls_do_not_wait_for_a_replica_that_has_faults() -> None:
    """Its errors come at once, and so do its places: all that waited for it would get one."""
    async with fleet(2, load={"capacity": 10}) as (them, gateway):
        home = await chat(gateway, LONG)
        other = "r1" if home == "r0" else "r0"
        busy(gateway, home, 14)
        busy(gateway, other, 12)
        sent = [asyncio.create_task(chat_anyhow(gateway, LONG)) for _ in range(5)]
        assert await until(lambda: len(queue_of(gateway)._lines["m"].held) == 5)
        standing = gateway.board._front_ends["m"][home].replica.standing
        standing.out, standing.since = 1, time.monotonic() + 30
        before = them.got()
        busy(gateway, home, -14)
        busy(gateway, other, -12)
        report(gateway, home, capacity=10)
        assert set(await asyncio.gather(*sent)) == {200}
        went = [after - b for after, b in zip(them.got(), before, strict=True)]
        assert went[int(home[1])] == 0


async def test_none_waits_for_its_cache_where_the_setting_is_0() -> None:
    async with fleet(2, load={"capacity": 10}, routing={"max_wait_for_cache_s": 0}) as (_, gateway):
        home = await chat(gateway, LONG)
        other = "r1" if home == "r0" else "r0"
        busy(gateway, home, 14)
        busy(gateway, other, 12)
        assert await chat(gateway, LONG) == other
        for it, requests in ((home, -14), (other, -12)):
            busy(gateway, it, requests)


# --- other policies, and settings ----------------------------------------------------------------


async def where_three_went(gateway: GatewayProcess) -> Counter[str]:
    return Counter([await chat(gateway, LONG) for _ in range(6)])


@pytest.mark.parametrize("of_model", [True, False])
async def test_round_robin_is_there_to_compare_with(of_model: bool) -> None:
    ours, other = {"policy": "round_robin"}, {"policy": "least_loaded"}
    args, routing = ({"routing": ours}, other) if of_model else (None, ours)
    async with fleet(3, args=args, routing=routing) as (_, gateway):
        assert set((await where_three_went(gateway)).values()) == {2}
        assert counted(gateway, "routing_choices_total", "reason") == {"round_robin": 6}


@pytest.mark.parametrize(
    "args", [{"routing": {"policy": "least_loaded"}}, {"engine": {"enable_prefix_caching": False}}]
)
async def test_least_loaded_where_it_is_set_or_where_nothing_is_cached(args: Any) -> None:
    async with fleet(2, args=args) as (_, gateway):
        home = await chat(gateway, LONG)
        busy(gateway, home, 1)
        assert await chat(gateway, LONG) != home
        assert counted(gateway, "routing_choices_total", "reason") == {"least_loaded": 2}


async def test_a_model_changes_what_it_sets_and_no_more() -> None:
    args = {"routing": {"session_affinity": True}}
    async with fleet(2, args=args, routing={"max_wait_for_cache_s": 7.5}) as (_, gateway):
        await chat(gateway, LONG)
        config = router_of(gateway)._routed["m"].choice.config
        assert (config.session_affinity, config.max_wait_for_cache_s) == (True, 7.5)
        assert config.policy == "cache_aware"


@pytest.mark.parametrize(
    ("headers", "body"), [({"x-session-id": "s"}, {}), ({}, {"prompt_cache_key": "s"})]
)
async def test_a_session_stays_at_one_replica_where_it_is_asked_for(
    headers: Any, body: Any
) -> None:
    async with fleet(4, routing={"session_affinity": True}) as (_, gateway):
        went = {await chat(gateway, f"{n} {LONG}", headers=headers, **body) for n in range(8)}
        assert len(went) == 1
        assert counted(gateway, "routing_choices_total", "reason") == {"session": 8}
    async with fleet(4) as (_, gateway):
        went = {await chat(gateway, f"{n} {LONG}", headers=headers, **body) for n in range(8)}
        assert len(went) > 1


async def test_one_replica_is_no_choice() -> None:
    async with fleet(1) as (_, gateway):
        await chat(gateway, LONG)
        assert counted(gateway, "routing_choices_total", "reason") == {}


# --- what it is told afterwards ------------------------------------------------------------------


async def test_it_is_counted_what_was_expected_to_be_cached_and_what_was() -> None:
    async with fleet(2) as (them, gateway):
        for cached in (0, 2000):
            home = await chat(gateway, LONG)
            exchange = them.ups[int(home[1])].exchanges[-1]
            [header] = exchange.header(CALL_HEADER.decode())
            usage = Usage(2500, cached, 10)
            gateway.ledger.report(took(Called.read(header.encode()).id, usage), home)
        tokens = counted(gateway, "routing_tokens_total", "kind")
        assert (tokens["prompt"], tokens["cached"]) == (5000, 2000)
        assert 1800 < tokens["predicted"] < 2500
        routed = router_of(gateway)._routed["m"]
        assert not routed.prompts and not routed.choice._sent


async def test_a_call_that_its_client_leaves_is_not_waited_for_any_more() -> None:
    async with fleet(2) as (them, gateway):
        them.go.clear()
        left = asyncio.create_task(chat_anyhow(gateway, LONG))
        assert await until(lambda: sum(them.got()) == 1)
        backlogs = [it.backlog for it in router_of(gateway)._routed["m"].choice._seen.values()]
        assert sum(it.tokens for it in backlogs) > 2000
        left.cancel()
        assert await until(lambda: sum(it.tokens for it in backlogs) == 0)


async def test_a_key_cannot_fill_the_queue_with_calls_that_wait_for_a_cache(tmp_path: Path) -> None:
    keys_file = tmp_path / "keys.yaml"
    entries = [{"name": n, "hash": keys.digest(k.encode())} for n, k in KEYS.items()]
    keys_file.write_text(yaml.safe_dump(entries))
    config = {"keys": {"file": str(keys_file)}, "queue": {"max_requests": 10}}
    auth = {n: {"authorization": f"Bearer {key}"} for n, key in KEYS.items()}
    async with fleet(2, load={"capacity": 10}, **config) as (_, gateway):
        home = await chat(gateway, LONG, headers=auth["a"])
        other = "r1" if home == "r0" else "r0"
        busy(gateway, home, 14)
        busy(gateway, other, 12)  # it has places, and not many
        sent = []
        for n in range(12):
            sent.append(asyncio.create_task(chat_anyhow(gateway, LONG, headers=auth["a"])))
            if n < 8:
                assert await until(lambda n=n: queue_of(gateway).waiting("m").requests == n + 1)
            else:
                assert await until(sent[-1].done, within_s=2)
        busy(gateway, other, 2)
        sent.append(asyncio.create_task(chat_anyhow(gateway, "b", headers=auth["b"])))
        assert await until(lambda: queue_of(gateway).waiting("m").requests == 9)
        share = queue_of(gateway)._lines["m"].order._shares["a"]
        assert share.held == 8
        for it in (home, other):
            busy(gateway, it, -12)
            report(gateway, it, running=2, capacity=10)
        assert [await it for it in sent] == [200] * 8 + [429] * 4 + [200]
        assert share.held == 0


async def test_a_policy_that_fails_fails_its_own_call_alone() -> None:
    async with fleet(2, load={"capacity": 10}) as (_, gateway):
        home = await chat(gateway, LONG)
        other = "r1" if home == "r0" else "r0"
        for it in (home, other):
            busy(gateway, it, 14)
        sent = asyncio.create_task(chat_anyhow(gateway, LONG))
        assert await until(lambda: queue_of(gateway).waiting("m").requests == 1)

        def fails(*asked: Any) -> Any:
            raise RuntimeError("a bug")

        router_of(gateway).waits_for = fails  # type: ignore[method-assign]
        busy(gateway, other, -2)
        report(gateway, other, running=12, capacity=10)  # which is not its fault
        assert await sent == 500
        assert queue_of(gateway).waiting("m").requests == 0


async def test_of_a_model_that_is_gone_nothing_is_kept() -> None:
    async with fleet(2) as (them, gateway):
        await chat(gateway, LONG)
        router = router_of(gateway)
        gateway.board.forget("m")
        gateway.board.publish("n", {f"n{n}": (up.host, up.port) for n, up in enumerate(them.ups)})
        gateway.directory.hear({"n": reported()})  # type: ignore[attr-defined]
        await gateway.client.post(CHAT, json={"model": "n", "messages": []})
        assert set(router._routed) == {"n"}
