"""Calls that wait for a replica that has room: their order, their limits, and their way out."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import yaml
from harness.scripted import Exchange, GatewayProcess, Upstream, ok, reported, took, until

from serve_app.cluster.exchange import Usage
from serve_app.config import keys
from serve_app.gateway.callers import Caller
from serve_app.gateway.fair_order import AWAY_S, FairOrder, rank
from serve_app.gateway.ledger import Ledger
from serve_app.gateway.queue import Queue
from serve_app.gateway.replicas import Load
from serve_app.gateway.routes import RELAYED, runs_engine

CHAT = "/v1/chat/completions"
KEYS = {name: f"sk-{name:-<43}" for name in ("a", "b", "c", "urgent")}


class Engine(Upstream):
    """A replica that answers when the test says so, the earliest request first."""

    def __init__(self) -> None:
        super().__init__(self._answer)
        self._may: asyncio.Semaphore = asyncio.Semaphore(0)

    async def _answer(self, exchange: Exchange) -> None:
        await self._may.acquire()
        await ok(exchange)

    def answers(self, requests: int = 1000) -> None:
        for _ in range(requests):
            self._may.release()

    @property
    def got(self) -> list[Any]:
        return [json.loads(body)["n"] for body in self.bodies]


def full(capacity: int, running: int = 0, waiting: int = 0, **more: Any) -> Load:
    return Load(running, waiting, capacity, **({"kv_cache_usage": 0.0} | more))


def queue_of(gateway: GatewayProcess) -> Queue:
    queue: Any = gateway.app._send.__self__._queue
    assert isinstance(queue, Queue)
    return queue


def ledger_of(gateway: GatewayProcess) -> Ledger:
    return next(it for it in gateway.app._stages if isinstance(it, Ledger))


@contextlib.asynccontextmanager
async def one_engine(
    load: Load | None, **config: Any
) -> AsyncIterator[tuple[Engine, GatewayProcess]]:
    async with Engine() as engine, GatewayProcess(engine, **config) as gateway:
        if load:
            gateway.board.report("r0", load)
        yield engine, gateway
        engine.answers()


def ask(gateway: GatewayProcess, n: Any, key: str = "", path: str = CHAT, **headers: str) -> Any:
    if key:
        headers["authorization"] = f"Bearer {KEYS[key]}"
    body = {"model": "m", "n": n}
    return asyncio.create_task(gateway.client.post(path, json=body, headers=headers))


async def ask_in_turn(gateway: GatewayProcess, ns: Sequence[Any], key: str = "") -> list[Any]:
    """One request after the other, each when the gateway has the one before."""
    sent = []
    for n in ns:
        before = known(gateway)
        sent.append(ask(gateway, n, key))
        assert await until(lambda before=before: known(gateway) > before)
    return sent


def known(gateway: GatewayProcess) -> int:
    return queue_of(gateway).waiting("m").requests + sum(gateway.inflight())


# --- how much is sent on --------------------------------------------------------------------------


async def test_a_replica_is_sent_what_it_can_run_and_a_little_more() -> None:
    async with one_engine(full(2)) as (engine, gateway):
        sent = await ask_in_turn(gateway, range(10))
        assert await until(lambda: len(engine.exchanges) == 6)  # 2, and 4 more
        assert queue_of(gateway).waiting("m").requests == 4
        status = (await gateway.client.get("/ready")).json()["models"]["m"]
        assert (status["queued"], status["longest_wait_s"] >= 0) == (4, True)
        engine.answers(1)
        assert await until(lambda: len(engine.exchanges) == 7)
        await asyncio.sleep(0.1)
        assert len(engine.exchanges) == 7
        engine.answers()
        assert {a.status_code for a in await asyncio.gather(*sent)} == {200}
        assert engine.got == list(range(10))  # first come, first served
        assert queue_of(gateway).waiting("m") == (0, 0.0)


async def test_before_its_first_report_nothing_is_held_back() -> None:
    async with one_engine(None) as (engine, gateway):
        sent = await ask_in_turn(gateway, range(30))
        assert await until(lambda: len(engine.exchanges) == 30)
        engine.answers()
        await asyncio.gather(*sent)


async def test_what_other_gateways_have_sent_takes_room_until_a_report_says_otherwise() -> None:
    async with one_engine(full(10, running=8)) as (engine, gateway):
        sent = await ask_in_turn(gateway, range(9))
        assert await until(lambda: len(engine.exchanges) == 6)  # 10 and 4 more, less the others' 8
        gateway.board.report("r0", full(10, running=8))  # 6 of them are ours
        assert await until(lambda: len(engine.exchanges) == 9)
        engine.answers()
        await asyncio.gather(*sent)


async def test_other_gateways_cannot_keep_this_one_out() -> None:
    async with one_engine(full(40, running=40, waiting=60)) as (engine, gateway):
        sent = await ask_in_turn(gateway, range(30))
        assert await until(lambda: len(engine.exchanges) == 4)
        await asyncio.sleep(0.1)
        assert len(engine.exchanges) == 4
        gateway.board.report("r0", full(40, running=40, waiting=60, gateways=2))
        assert await until(lambda: len(engine.exchanges) == 20)  # half of it
        await asyncio.sleep(0.1)
        assert len(engine.exchanges) == 20
        engine.answers()
        await asyncio.gather(*sent)


async def test_a_full_kv_cache_bounds_what_a_replica_can_run() -> None:
    async with one_engine(full(100)) as (engine, gateway):
        sent = await ask_in_turn(gateway, range(10))
        assert await until(lambda: len(engine.exchanges) == 10)
        gateway.board.report("r0", full(100, running=9, waiting=1, kv_cache_usage=0.97))
        sent += await ask_in_turn(gateway, range(10, 20))
        assert await until(lambda: len(engine.exchanges) == 14)  # 10 fit, and 4 more
        await asyncio.sleep(0.1)
        assert len(engine.exchanges) == 14
        gateway.board.report("r0", full(100, running=10, waiting=4, kv_cache_usage=0.5))
        assert await until(lambda: len(engine.exchanges) == 20)
        engine.answers()
        await asyncio.gather(*sent)


async def test_several_replicas_are_filled_evenly_and_the_one_with_room_is_next() -> None:
    async with Engine() as one, Engine() as two, GatewayProcess(one, two) as gateway:
        for replica in ("r0", "r1"):
            gateway.board.report(replica, full(2))
        sent = await ask_in_turn(gateway, range(14))
        assert await until(lambda: len(one.exchanges) + len(two.exchanges) == 11)
        # The harness counts one request too many at the second, to have an order.
        assert (len(one.exchanges), len(two.exchanges)) == (6, 5)
        two.answers(2)
        assert await until(lambda: len(two.exchanges) == 7)
        assert len(one.exchanges) == 6
        one.answers()
        two.answers()
        assert {a.status_code for a in await asyncio.gather(*sent)} == {200}


async def test_a_new_replica_takes_from_the_queue() -> None:
    async with one_engine(full(1)) as (engine, gateway), Engine() as new:
        sent = await ask_in_turn(gateway, range(8))
        assert await until(lambda: len(engine.exchanges) == 5)
        here = {"r0": ("127.0.0.1", engine.port), "new": ("127.0.0.1", new.port)}
        gateway.board.publish("m", here)
        assert await until(lambda: len(new.exchanges) == 3)
        new.answers()
        engine.answers()
        await asyncio.gather(*sent)


async def test_a_call_whose_replica_failed_goes_before_those_that_had_no_turn() -> None:
    async def dies(exchange: Exchange) -> None:
        await gone.wait()
        exchange.die()

    gone = asyncio.Event()
    async with Upstream(dies) as bad, Engine() as good, GatewayProcess(bad, good) as gateway:
        for replica in ("r0", "r1"):
            gateway.board.report(replica, full(1))
        sent = await ask_in_turn(gateway, range(12))
        had = [json.loads(body)["n"] for body in bad.bodies]
        before = len(good.exchanges)
        gone.set()
        await asyncio.sleep(0.2)
        good.answers()
        assert {a.status_code for a in await asyncio.gather(*sent)} == {200}
        assert sorted(good.got[before : before + len(had)]) == had
        assert len(good.got) == 12


@pytest.mark.parametrize(("method", "path"), [(r.method, r.path) for r in RELAYED])
def test_which_routes_need_room(method: str, path: str) -> None:
    path = path.replace("{response_id}", "resp_1")
    alone = ("render", "/tokenize", "/detokenize", "/count_tokens", "/cancel")
    assert runs_engine(path) == (method == "POST" and not path.endswith(alone))


async def test_calls_that_the_engine_has_nothing_to_do_for_pass() -> None:
    async with one_engine(full(1)) as (engine, gateway):
        sent = await ask_in_turn(gateway, range(7))
        assert queue_of(gateway).waiting("m").requests == 2
        sent.append(ask(gateway, "tokens", path="/tokenize"))
        assert await until(lambda: "tokens" in engine.got)
        engine.answers()
        await asyncio.gather(*sent)


# --- the order ------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    entries = [{"name": n, "hash": keys.digest(k.encode())} for n, k in KEYS.items()]
    entries[-1]["priority"] = 5  # type: ignore[assignment]
    file = tmp_path / "keys.yaml"
    file.write_text(yaml.safe_dump(entries))
    return file


async def test_a_heavy_key_waits_and_a_light_one_does_not(file: Path) -> None:
    async with one_engine(full(10), keys={"file": str(file)}) as (engine, gateway):
        sent = await ask_in_turn(gateway, ["b"], "b")  # who is about
        sent += await ask_in_turn(gateway, [f"a{n}" for n in range(30)], "a")
        assert await until(lambda: len(engine.exchanges) == 9)  # a place of the ten stays free
        sent += await ask_in_turn(gateway, ["b1"], "b")
        assert await until(lambda: engine.got[-1] == "b1")
        sent += await ask_in_turn(gateway, ["b2", "b3"], "b")
        assert await until(lambda: engine.got[-1] == "b3")
        assert queue_of(gateway).waiting("m").requests == 22
        engine.answers()
        await asyncio.gather(*sent)


async def test_a_key_alone_has_all_of_the_engine(file: Path) -> None:
    async with one_engine(full(10), keys={"file": str(file)}) as (engine, gateway):
        sent = await ask_in_turn(gateway, range(20), "a")
        assert await until(lambda: len(engine.exchanges) == 14)
        engine.answers()
        await asyncio.gather(*sent)


async def test_the_priority_goes_first(file: Path) -> None:
    async with one_engine(full(1), keys={"file": str(file)}) as (engine, gateway):
        sent = await ask_in_turn(gateway, [f"a{n}" for n in range(5 + 4)], "a")
        sent += await ask_in_turn(gateway, [f"u{n}" for n in range(4)], "urgent")
        for turns in range(6, 10):
            engine.answers(1)
            assert await until(lambda turns=turns: len(engine.exchanges) == turns)
        engine.answers()
        await asyncio.gather(*sent)
    assert engine.got[5:9] == ["u0", "u1", "u2", "u3"]


async def test_keys_that_both_ask_for_much_take_turns_in_all_of_the_engine(file: Path) -> None:
    async with one_engine(full(10), keys={"file": str(file)}) as (engine, gateway):
        sent = await ask_in_turn(gateway, ["a"] * 30, "a")
        sent += await ask_in_turn(gateway, ["b"] * 30, "b")
        for turns in range(15, 30):
            engine.answers(1)
            assert await until(lambda turns=turns: len(engine.exchanges) == turns)
        engine.answers()
        await asyncio.gather(*sent)
    # "b" comes as if it had had as many turns as "a".
    assert engine.got[14:30].count("b") in (7, 8, 9)


async def test_the_tokens_count_that_replicas_report(file: Path) -> None:
    async with one_engine(full(1), keys={"file": str(file)}) as (engine, gateway):
        ledger = ledger_of(gateway)
        for key, tokens in (("a", 1000), ("b", 100)):
            [asked] = await ask_in_turn(gateway, [key], key)
            [id] = list(ledger._open)
            engine.answers(1)
            await asked
            assert await until(lambda id=id: ledger._open[id].entry)
            ledger.report(took(id, Usage(tokens, 0, 0), key), "r0")
        [order] = [line.order for line in queue_of(gateway)._lines.values()]
        a, b = order._shares.values()
        assert (a.served, a.mean, b.served, b.mean) == (1000, 1000, 100, 100)


# --- the order itself -----------------------------------------------------------------------------


class Order(FairOrder[str]):
    """An order of texts, each of which takes so many tokens as a test says."""

    def came(self, caller: Caller, *items: str) -> None:
        for item in items:
            self.add(self.share(caller, 0.0), item)

    def turns(self, takes: dict[str, float] | None = None) -> list[str]:
        """Give turns until nobody waits, and settle each at once."""
        had = []
        while share := self.first():
            self.served(rank(share))
            had.append(self.take(share))
            charge = self.charge(share)
            self.settle(share, charge, (takes or {}).get(share.caller.name, 1.0))
        return had


def test_in_one_priority_the_tokens_are_shared_by_weight() -> None:
    for weight, takes, expected in ((1.0, 10.0, 90.9), (2.0, 1.0, 33.3), (10.0, 10.0, 50.0)):
        order, light, heavy = Order(), Caller("light"), Caller("heavy", weight=weight)
        order.came(heavy, *["heavy"] * 1000)
        order.came(light, *["light"] * 1000)
        had = order.turns({"heavy": takes})[:990]
        assert abs(100 * had.count("light") / len(had) - expected) < 2, (weight, takes)


def test_nobody_saves_up_turns_while_being_away() -> None:
    order, a, b = Order(), Caller("a"), Caller("b")
    order.came(b, "b")
    order.came(a, *["a"] * 100)
    assert order.turns().count("a") == 100
    order.came(a, *["a"] * 10)
    order.came(b, *["b"] * 10)
    had = order.turns()
    assert 4 <= had[:10].count("b") <= 6


def test_calls_that_are_held_keep_nobody_waiting_who_comes_later() -> None:
    """Their caller is charged for them at once, and others are lifted to where calls are served."""
    order, a, b = Order(), Caller("a"), Caller("b")
    order.came(a, *["a"] * 50)
    held = []
    while share := order.first():
        held.append(rank(share))
        order.take(share)
        order.charge(share)
    order.served(held[0])
    order.came(b, "b")
    share = order.first()
    assert share and sum(it < rank(share) for it in held) <= 1


def test_a_priority_goes_before_any_share() -> None:
    order, low, high = Order(), Caller("low", priority=-1, weight=9.0), Caller("high", priority=1)
    order.came(low, "l")
    order.came(Caller("mid"), "m")
    order.came(high, "h1", "h2")
    assert order.turns({"high": 1000.0}) == ["h1", "h2", "m", "l"]


def test_one_caller_is_served_in_the_order_of_arrival() -> None:
    order, a = Order(), Caller("a")
    order.came(a, *"123456")
    order.remove(order.share(a, 0.0), "3")
    assert order.turns() == list("12456")


def test_who_has_been_away_for_long_has_no_share() -> None:
    order, a, b = Order(), Caller("a"), Caller("b", priority=3)
    order.came(b, "b")
    order.came(a, "a")
    order.turns()
    assert order.highest_light(8) == 3
    order.share(a, AWAY_S + 1)
    assert order.highest_light(8) == 0  # that is "a" itself


# --- the limits -----------------------------------------------------------------------------------


async def test_a_full_queue_refuses_at_once_and_says_when_to_come_back() -> None:
    async with one_engine(full(1), queue={"max_requests": 3}) as (engine, gateway):
        sent = await ask_in_turn(gateway, range(8))
        refused = await ask(gateway, 8)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert refused.json()["error"]["message"].startswith("There are 3 requests that wait")
        assert refused.headers["retry-after"] == "60"  # nothing has ended yet
        engine.answers(3)
        assert await until(lambda: len(engine.exchanges) == 8)
        sent += await ask_in_turn(gateway, range(9, 12))
        refused = await ask(gateway, 12)
        assert refused.headers["retry-after"] == "1"
        assert refused.headers["retry-after-ms"] == "1000"
        assert queue_of(gateway).waiting("m").requests == 3
        engine.answers()
        assert {a.status_code for a in await asyncio.gather(*sent)} == {200}


async def test_openais_client_comes_back_to_a_full_queue() -> None:
    async with one_engine(full(1), queue={"max_requests": 1}) as (engine, gateway):
        sent = await ask_in_turn(gateway, range(6))
        base_url = f"{gateway.base_url}/v1"
        async with openai.AsyncOpenAI(base_url=base_url, api_key="-", max_retries=1) as client:
            engine._may.release()
            asked = asyncio.create_task(
                client.chat.completions.with_raw_response.create(
                    model="m", messages=[{"role": "user", "content": ""}], extra_body={"n": 9}
                )
            )
            await asyncio.sleep(0.2)
            engine.answers()
            assert (await asked).http_response.status_code == 200
        await asyncio.gather(*sent)


async def test_one_key_cannot_fill_the_queue(file: Path) -> None:
    config = {"keys": {"file": str(file)}, "queue": {"max_requests": 10}}
    async with one_engine(full(1), **config) as (engine, gateway):
        sent = await ask_in_turn(gateway, range(5 + 8), "a")
        refused = await ask(gateway, 14, "a")
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert refused.json()["error"]["message"].startswith("The API key has 8 of the 8 requests")
        sent += await ask_in_turn(gateway, ["b"], "b")
        assert queue_of(gateway).waiting("m").requests == 9
        engine.answers()
        assert {a.status_code for a in await asyncio.gather(*sent)} == {200}


async def test_a_deadline_of_the_client() -> None:
    async with one_engine(full(1)) as (engine, gateway):
        sent = await ask_in_turn(gateway, range(5))
        late = await ask(gateway, "late", **{"x-request-timeout-ms": "100"})
        assert (late.status_code, late.json()["error"]["code"]) == (503, "queue_timeout")
        assert "had room for the request within 0.1 seconds" in late.json()["error"]["message"]
        assert "retry-after" in late.headers
        assert queue_of(gateway).waiting("m").requests == 0
        for wrong in ("soon", "0", "-1", "1.5"):
            refused = await ask(gateway, "wrong", **{"x-request-timeout-ms": wrong})
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_header")
        engine.answers()
        await asyncio.gather(*sent)
        in_time = await ask(gateway, "in time", **{"x-request-timeout-ms": "100"})
        assert in_time.status_code == 200
        assert "late" not in engine.got


async def test_the_operators_limit_of_a_wait() -> None:
    async with one_engine(full(1), queue={"max_wait_s": 0.2}) as (engine, gateway):
        sent = await ask_in_turn(gateway, range(5))
        late = await ask(gateway, "late")
        assert (late.status_code, late.json()["error"]["code"]) == (503, "queue_timeout")
        engine.answers()
        await asyncio.gather(*sent)


async def test_who_leaves_is_out_of_the_queue_and_has_no_turn() -> None:
    async with one_engine(full(1)) as (engine, gateway):
        sent = await ask_in_turn(gateway, range(9))
        for gone in (6, 8):
            sent[gone].cancel()
        assert await until(lambda: queue_of(gateway).waiting("m").requests == 2)
        engine.answers()
        await asyncio.gather(*(task for n, task in enumerate(sent) if n not in (6, 8)))
        assert engine.got == [0, 1, 2, 3, 4, 5, 7]


# --- priority in the engine -----------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["priority", "fcfs"])
async def test_the_engine_is_told_the_priority_if_it_orders_by_it(file: Path, policy: str) -> None:
    applications = {"m": reported({"engine": {"scheduling_policy": policy}})}
    config = {"applications": applications, "keys": {"file": str(file)}}
    async with one_engine(None, **config) as (engine, gateway):
        engine.answers()
        for key in ("a", "urgent"):
            await ask(gateway, 1, key, **{"X-Vllm-Priority": "-99"})
        told = [exchange.header("x-vllm-priority") for exchange in engine.exchanges]
    # vLLM serves the lowest first.
    assert told == ([["0"], ["-5"]] if policy == "priority" else [[], []])


# --- streams that wait ----------------------------------------------------------------------------

ROUTES = [CHAT, "/v1/completions", "/v1/messages", "/v1/responses"]


async def streamed(gateway: GatewayProcess, path: str = CHAT) -> tuple[httpx.Response, str]:
    body = {"model": "m", "n": 0, "stream": True}
    async with gateway.client.stream("POST", path, json=body) as answer:
        return answer, "".join([text async for text in answer.aiter_text()])


def error_in(event: str, path: str) -> dict[str, Any]:
    """What a client of this API sees as the error of a stream."""
    *kind, data = event.removesuffix("\n\n").split("\n")
    sent: dict[str, Any] = json.loads(data.removeprefix("data: "))
    if path in ("/v1/messages", "/v1/responses"):
        assert (kind, sent["type"]) == (["event: error"], "error")
    return sent if path == "/v1/responses" else sent["error"]


@contextlib.asynccontextmanager
async def busy(
    script: Any, **config: Any
) -> AsyncIterator[tuple[GatewayProcess, asyncio.Event, Upstream]]:
    """A replica that does ``script``, and has no room before the event."""
    room = asyncio.Event()

    async def either(exchange: Exchange) -> None:
        if b'"other"' in exchange.body:
            await room.wait()
            await ok(exchange)
        else:
            await script(exchange)

    config = {"stream_keepalive_s": 0.1} | config
    async with Upstream(either) as upstream, GatewayProcess(upstream, **config) as gateway:
        gateway.board.report("r0", full(1))
        sent = await ask_in_turn(gateway, ["other"] * 5)
        yield gateway, room, upstream
        room.set()
        await asyncio.gather(*sent)


async def events(exchange: Exchange) -> None:
    await exchange.sse(b"data: 1\n\n", b"data: [DONE]\n\n")
    await exchange.send(b"0\r\n\r\n")


async def test_a_stream_that_waits_gets_its_head_and_comments() -> None:
    async with busy(events) as (gateway, room, _):
        body = {"model": "m", "n": 0, "stream": True}
        async with gateway.client.stream("POST", CHAT, json=body) as answer:
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert answer.headers["cache-control"] == "no-cache"
            pieces = answer.aiter_text()
            assert [await anext(pieces) for _ in range(2)] == [": waiting\n\n"] * 2
            room.set()
            rest = "".join([text async for text in pieces])
    assert rest.replace(": waiting\n\n", "") == "data: 1\n\ndata: [DONE]\n\n"


async def test_openais_client_reads_a_stream_that_has_waited() -> None:
    chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    chunk["choices"] = [{"index": 0, "delta": {"content": "hi"}, "finish_reason": None}]

    async def script(exchange: Exchange) -> None:
        await asyncio.sleep(0.3)
        await exchange.sse(b"data: %b\n\n" % json.dumps(chunk).encode(), b"data: [DONE]\n\n")
        await exchange.send(b"0\r\n\r\n")

    async with (
        Upstream(script) as upstream,
        GatewayProcess(upstream, stream_keepalive_s=0.1) as gateway,
    ):
        base_url = f"{gateway.base_url}/v1"
        async with openai.AsyncOpenAI(base_url=base_url, api_key="-", max_retries=0) as client:
            stream = await client.chat.completions.create(model="m", messages=[], stream=True)
            texts = [it.choices[0].delta.content async for it in stream]
    assert texts == ["hi"]


@pytest.mark.parametrize("path", ROUTES)
async def test_an_error_of_the_gateway_in_a_stream_that_has_waited(path: str) -> None:
    async with busy(events, queue={"max_wait_s": 0.3}) as (gateway, _, upstream):
        answer, text = await streamed(gateway, path)
    assert answer.status_code == 200
    assert text.startswith(": waiting\n\n")
    error = error_in(text.rpartition(": waiting\n\n")[2], path)
    assert error["code"] == "queue_timeout"
    assert len(upstream.exchanges) == 5


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("known", [True, False])
async def test_an_error_of_the_replica_in_a_stream_that_has_waited(path: str, known: bool) -> None:
    said = {"error": {"message": "too long", "type": "BadRequestError", "param": None, "code": 400}}

    async def script(exchange: Exchange) -> None:
        await asyncio.sleep(0.3)
        body = json.dumps(said if known else {"detail": "too long"}).encode()
        await exchange.answer(body, "content-type: application/json", status="400 Bad Request")

    async with (
        Upstream(script) as upstream,
        GatewayProcess(upstream, stream_keepalive_s=0.1) as gateway,
    ):
        answer, text = await streamed(gateway, path)
    assert answer.status_code == 200
    error = error_in(text.rpartition(": waiting\n\n")[2], path)
    assert error["message"].startswith("too long")


async def test_a_document_instead_of_a_stream_that_has_waited() -> None:
    async def script(exchange: Exchange) -> None:
        await asyncio.sleep(0.3)
        await ok(exchange)

    async with (
        Upstream(script) as upstream,
        GatewayProcess(upstream, stream_keepalive_s=0.1) as gateway,
    ):
        answer, text = await streamed(gateway)
    assert answer.status_code == 200
    assert error_in(text.rpartition(": waiting\n\n")[2], CHAT)["code"] == "no_stream"


async def test_a_stream_that_has_waited_is_still_given_to_another_replica() -> None:
    async def dies(exchange: Exchange) -> None:
        await asyncio.sleep(0.3)
        exchange.die()

    async with (
        Upstream(dies) as bad,
        Upstream(events) as good,
        GatewayProcess(bad, good, stream_keepalive_s=0.1) as gateway,
    ):
        answer, text = await streamed(gateway)
        assert len(bad.exchanges) == len(good.exchanges) == 1
    assert answer.status_code == 200
    assert text.startswith(": waiting\n\n")
    assert text.replace(": waiting\n\n", "") == "data: 1\n\ndata: [DONE]\n\n"


@pytest.mark.parametrize(
    ("path", "body", "config"),
    [
        (CHAT, {}, {}),
        (CHAT, {"stream": False}, {}),
        (CHAT, {"metadata": {"stream": True}}, {}),
        ("/v1/embeddings", {"stream": True}, {}),
        (CHAT, {"stream": True}, {"stream_keepalive_s": None}),
    ],
)
async def test_who_gets_no_comments(
    path: str, body: dict[str, Any], config: dict[str, Any]
) -> None:
    async def script(exchange: Exchange) -> None:
        await asyncio.sleep(0.3)
        await exchange.answer(b"{}", "content-type: application/json", status="418 X")

    config = {"stream_keepalive_s": 0.1} | config
    async with Upstream(script) as upstream, GatewayProcess(upstream, **config) as gateway:
        answer = await gateway.client.post(path, json={"model": "m", **body})
    assert answer.status_code == 418


async def test_a_client_that_leaves_while_its_stream_waits_is_out_of_the_queue() -> None:
    async with busy(events) as (gateway, _, upstream):
        body = {"model": "m", "n": 0, "stream": True}
        async with gateway.client.stream("POST", CHAT, json=body) as answer:
            await anext(answer.aiter_text())
        assert await until(lambda: queue_of(gateway).waiting("m").requests == 0)
        assert len(upstream.exchanges) == 5
