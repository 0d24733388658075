"""Replicas that fail: tried once elsewhere before the first byte, said aloud after it."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
from collections.abc import Awaitable, Callable
from typing import Any

import anthropic
import httpx
import openai
import pytest
from harness.processes import free_port
from harness.scripted import Exchange, GatewayProcess, Upstream, ok, until

from serve_app.cluster.credential import ASLEEP_HEADER
from serve_app.gateway import replicas
from serve_app.gateway.relay import Answer

CHAT = "/v1/chat/completions"
ASK: Any = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
ENVELOPE = {"message", "type", "param", "code"}


# --- before the first byte -------------------------------------------------------------------


async def dies_at_once(exchange: Exchange) -> None:
    exchange.die()


async def closes_at_once(exchange: Exchange) -> None:
    exchange.writer.close()


async def dies_in_the_head(exchange: Exchange) -> None:
    await exchange.send(b"HTTP/1.1 200 OK\r\ncontent-")
    exchange.die()


async def dies_after_the_head(exchange: Exchange) -> None:
    await exchange.sse()
    exchange.die()


async def dies_after_a_head_of_known_length(exchange: Exchange) -> None:
    await exchange.head("content-type: application/json", "content-length: 100")
    exchange.die()


async def speaks_no_http(exchange: Exchange) -> None:
    await exchange.send(b"SSH-2.0-OpenSSH\r\n\r\n")
    exchange.die()


async def sends_an_endless_header(exchange: Exchange) -> None:
    await exchange.send(b"HTTP/1.1 200 OK\r\nx-any: ")
    while True:
        await exchange.send(b"x" * 65536)


async def sends_headers_without_end(exchange: Exchange) -> None:
    await exchange.send(b"HTTP/1.1 200 OK\r\n")
    while True:
        await exchange.send(b"x-any: x\r\n" * 5000)


async def splits_a_header(exchange: Exchange) -> None:
    await exchange.head("x-any: a\rset-cookie: b", "content-length: 0")


async def switches_protocols(exchange: Exchange) -> None:
    await exchange.head("connection: upgrade", "upgrade: any", status="101 Switching Protocols")


async def answers_with_a_status_that_is_none(exchange: Exchange) -> None:
    await exchange.answer(b"{}", status="999 X")


async def says_two_lengths(exchange: Exchange) -> None:
    await exchange.answer(b"hello", "content-length: 2")


async def says_a_length_and_chunks(exchange: Exchange) -> None:
    await exchange.head("content-length: 2", "transfer-encoding: chunked")
    await exchange.chunk(b"hello")
    await exchange.chunk(b"")


async def promises_more_of_an_error(exchange: Exchange) -> None:
    await exchange.head("content-length: 50", status="500 X")
    await exchange.send(b"{")
    exchange.die()


NOTHING_SENT = [
    dies_at_once, closes_at_once, dies_in_the_head, dies_after_the_head,
    dies_after_a_head_of_known_length, speaks_no_http, sends_an_endless_header,
    sends_headers_without_end, splits_a_header, switches_protocols,
    answers_with_a_status_that_is_none, says_two_lengths, says_a_length_and_chunks,
    promises_more_of_an_error,
]  # fmt: skip


@pytest.mark.parametrize("first", NOTHING_SENT)
async def test_a_replica_that_fails_before_its_first_byte_is_replaced_by_another(
    first: Callable[[Exchange], Awaitable[None]],
) -> None:
    async with (
        Upstream(first) as bad,
        Upstream() as good,
        GatewayProcess(bad, good) as gateway,
    ):
        answer = await gateway.client.post(CHAT, json=ASK)
        assert (answer.status_code, answer.json()) == (200, {"ok": True})
        assert len(bad.exchanges) == len(good.exchanges) == 1
        assert bad.bodies == good.bodies
        assert bad.exchanges[0].header("x-request-id") == good.exchanges[0].header("x-request-id")


async def test_a_replica_that_refuses_the_connection_is_replaced_by_another() -> None:
    async with Upstream() as good, GatewayProcess(free_port(), good) as gateway:
        answer = await gateway.client.post(CHAT, json=ASK)
        assert (answer.status_code, answer.json()) == (200, {"ok": True})
        assert len(good.exchanges) == 1


async def test_a_replica_that_failed_is_not_asked_again_at_once() -> None:
    async with (
        Upstream(dies_at_once) as bad,
        Upstream() as good,
        GatewayProcess(bad, good) as gateway,
    ):
        for _ in range(5):
            assert (await gateway.client.post(CHAT, json=ASK)).status_code == 200
        assert (len(bad.exchanges), len(good.exchanges)) == (1, 5)


async def test_a_replica_that_failed_once_gets_requests_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replicas, "AVOID_S", 0.0)

    async def fails_once(exchange: Exchange) -> None:
        await (dies_at_once if len(flaky.exchanges) == 1 else ok)(exchange)

    async with (
        Upstream(fails_once) as flaky,
        Upstream() as good,
        GatewayProcess(flaky, good) as gateway,
    ):
        for _ in range(3):
            assert (await gateway.client.post(CHAT, json=ASK)).status_code == 200
        assert len(flaky.exchanges) > 1


async def test_two_replicas_that_fail_are_enough() -> None:
    async with (
        Upstream(dies_at_once) as one,
        Upstream(dies_at_once) as two,
        Upstream() as three,
        GatewayProcess(one, two, three) as gateway,
    ):
        answer = await gateway.client.post(CHAT, json=ASK)
        assert answer.status_code == 503
        assert answer.headers["retry-after"].isdigit()
        error = answer.json()["error"]
        assert error.keys() == ENVELOPE
        assert (error["type"], error["code"]) == ("server_error", "model_unavailable")
        assert (len(one.exchanges), len(two.exchanges), len(three.exchanges)) == (1, 1, 0)


async def is_asleep(exchange: Exchange) -> None:
    await exchange.head(f"{ASLEEP_HEADER.decode()}: 1", "content-length: 0", status="503 Asleep")


async def test_a_replica_that_sleeps_leaves_requests_to_those_that_are_awake() -> None:
    async with (
        Upstream(is_asleep) as sleeps,
        Upstream() as awake,
        GatewayProcess(sleeps, awake) as gateway,
    ):
        for _ in range(5):
            assert (await gateway.client.post(CHAT, json=ASK)).status_code == 200
        assert len(sleeps.exchanges) <= 1


async def test_a_model_whose_replicas_all_sleep_says_so_at_once() -> None:
    async with (
        Upstream(is_asleep) as one,
        Upstream(is_asleep) as two,
        GatewayProcess(one, two) as gateway,
    ):
        for _ in range(3):
            answer = await gateway.client.post(CHAT, json=ASK)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "30")
            error = answer.json()["error"]
            assert error["code"] == "model_asleep"
            assert "'serve-app admin m wake'" in error["message"]
        assert len(one.exchanges) + len(two.exchanges) == 4  # the first request asked both


async def test_one_that_sleeps_is_not_asked_over_and_over_beside_one_that_is_lost() -> None:
    async with Upstream(is_asleep) as sleeps, GatewayProcess(free_port(), sleeps) as gateway:
        answer = await gateway.client.post(CHAT, json=ASK)
        assert answer.json()["error"]["code"] == "model_asleep"
        assert len(sleeps.exchanges) == 1


async def test_of_many_replicas_the_one_that_is_awake_is_found() -> None:
    async with (
        Upstream(is_asleep) as one,
        Upstream(is_asleep) as two,
        Upstream(is_asleep) as three,
        Upstream() as awake,
        GatewayProcess(one, two, three, awake) as gateway,
    ):
        assert (await gateway.client.post(CHAT, json=ASK)).status_code == 200


async def test_a_model_without_replicas_that_cannot_start_is_unavailable() -> None:
    async with GatewayProcess() as gateway:
        answer = await gateway.client.post(CHAT, json=ASK)
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "model_unavailable"


async def test_an_error_of_the_replica_is_an_answer_and_not_a_failure() -> None:
    async def script(exchange: Exchange) -> None:
        body = (
            b'{"error":{"message":"engine","type":"InternalServerError","param":null,"code":500}}'
        )
        await exchange.answer(body, status="500 Internal Server Error")

    async with (
        Upstream(script) as first,
        Upstream() as second,
        GatewayProcess(first, second) as gateway,
    ):
        answer = await gateway.client.post(CHAT, json=ASK)
        assert (answer.status_code, answer.json()["error"]["message"]) == (500, "engine")
        assert second.exchanges == []


async def test_a_silent_replica_is_a_timeout_where_one_is_set_and_is_not_repeated() -> None:
    async def silent(exchange: Exchange) -> None:
        await exchange.client_gone()

    async with (
        Upstream(silent) as first,
        Upstream() as second,
        GatewayProcess(first, second, request_timeout_s=0.2) as gateway,
    ):
        answer = await gateway.client.post(CHAT, json=ASK)
        assert answer.status_code == 504
        assert answer.json()["error"].keys() == ENVELOPE
        assert second.exchanges == []


@pytest.mark.parametrize(
    ("path", "own", "envelope"),
    [
        (CHAT, b'{"detail":"Not Found"}', {"error"}),
        ("/tokenize", b'{"detail":"Method Not Allowed"}', {"error"}),
        ("/v1/messages", b'{"detail":"Not Found"}', {"type", "error"}),
        (
            "/v1/messages",
            b'{"error":{"message":"x","type":"x","param":null,"code":400}}',
            {"type", "error"},
        ),
        ("/v1/completions", b"Internal Server Error", {"error"}),
        (CHAT, b"\xff\xfe", {"error"}),
        (CHAT, b"[" * 200_000, {"error"}),
        (CHAT, b"1" * 200_000, {"error"}),
    ],
)
async def test_an_error_of_the_replica_that_is_in_no_envelope_is_put_into_one(
    path: str, own: bytes, envelope: set[str]
) -> None:
    """FastAPI's own errors, and the server's where the app itself fails."""

    async def script(exchange: Exchange) -> None:
        kind = "application/json" if own.startswith(b"{") else "text/plain; charset=utf-8"
        await exchange.answer(own, f"content-type: {kind}", status="404 Not Found")

    async with Upstream(script) as upstream, GatewayProcess(upstream) as gateway:
        answer = await gateway.client.post(path, json=ASK)
    assert answer.status_code == 404
    assert answer.json().keys() == envelope
    assert answer.json()["error"].keys() == ENVELOPE
    assert 0 < len(answer.json()["error"]["message"]) < 3000


@pytest.mark.parametrize("length", ["content-length", "transfer-encoding"])
async def test_a_huge_error_of_the_replica_is_relayed_and_not_held(length: str) -> None:
    """vLLM repeats wrong input in its error: 100 KB of it become 11 MB."""
    error = json.dumps({"error": {"message": "x" * (50 * 2**20)}}).encode()
    sent = 0

    async def script(exchange: Exchange) -> None:
        nonlocal sent
        if length == "content-length":
            await exchange.head(f"content-length: {len(error)}", status="400 Bad Request")
        else:
            await exchange.head("transfer-encoding: chunked", status="400 Bad Request")
        for at in range(0, len(error), 2**16):
            piece = error[at : at + 2**16]
            await (exchange.send if length == "content-length" else exchange.chunk)(piece)
            sent = at
        if length == "transfer-encoding":
            await exchange.send(b"0\r\n\r\n")

    async with (
        Upstream(script) as upstream,
        GatewayProcess(upstream) as gateway,
        gateway.client.stream("POST", CHAT, json=ASK) as answer,
    ):
        await asyncio.sleep(1)
        assert answer.status_code == 400
        assert sent < len(error) / 2  # a client that does not read holds the replica back
        assert b"".join([chunk async for chunk in answer.aiter_raw()]) == error


async def test_a_compressed_error_of_the_replica_is_relayed_as_it_is() -> None:
    body = gzip.compress(b'{"error": {"message": "x"}}')

    async def script(exchange: Exchange) -> None:
        kind = "content-type: application/json"
        await exchange.answer(body, kind, "content-encoding: gzip", status="400 Bad Request")

    async with Upstream(script) as upstream, GatewayProcess(upstream) as gateway:
        answer = await gateway.client.post(CHAT, json=ASK)
    assert (answer.status_code, answer.json()) == (400, {"error": {"message": "x"}})


# --- after the first byte --------------------------------------------------------------------


def chunk_of(text: str) -> bytes:
    delta = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    body = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return b"data: " + json.dumps({**body, "choices": [delta]}).encode() + b"\n\n"


async def test_the_openai_sdk_raises_when_a_chat_stream_is_cut() -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.sse(chunk_of("Hel"), chunk_of("lo"))
        exchange.die()

    got = []
    async with (
        asyncio.timeout(30),
        Upstream(script) as upstream,
        Upstream() as other,
        GatewayProcess(upstream, other) as gateway,
        openai.AsyncOpenAI(base_url=f"{gateway.base_url}/v1", api_key="-", max_retries=0) as client,
    ):
        stream = await client.chat.completions.create(**ASK, stream=True)
        with pytest.raises(openai.APIError) as raised:
            async for chunk in stream:
                got.append(chunk.choices[0].delta.content)
        assert other.exchanges == []
    assert got == ["Hel", "lo"]
    assert raised.value.code == "replica_lost"
    assert "send the request again" in raised.value.message


async def test_the_openai_sdk_raises_when_a_response_is_cut() -> None:
    async def script(exchange: Exchange) -> None:
        event = {"type": "response.output_text.delta", "delta": "Hel", "sequence_number": 1}
        await exchange.sse(
            b"event: response.output_text.delta\ndata: " + json.dumps(event).encode() + b"\n\n"
        )
        exchange.die()

    async with (
        asyncio.timeout(120),
        Upstream(script) as upstream,
        GatewayProcess(upstream) as gateway,
        openai.AsyncOpenAI(base_url=f"{gateway.base_url}/v1", api_key="-", max_retries=0) as client,
    ):
        stream = await client.responses.create(model="m", input="hi", stream=True)
        events = [event async for event in stream]
    assert [e.type for e in events] == ["response.output_text.delta", "error"]
    assert "send the request again" in getattr(events[-1], "message", "")


async def test_the_anthropic_sdk_raises_when_a_message_is_cut() -> None:
    async def script(exchange: Exchange) -> None:
        event = {
            "type": "content_block_delta",
            "index": 0,
            "delta": {"type": "text_delta", "text": "Hel"},
        }
        await exchange.sse(
            b"event: content_block_delta\ndata: " + json.dumps(event).encode() + b"\n\n"
        )
        exchange.die()

    async with (
        asyncio.timeout(30),
        Upstream(script) as upstream,
        GatewayProcess(upstream) as gateway,
        anthropic.AsyncAnthropic(base_url=gateway.base_url, api_key="-", max_retries=0) as client,
    ):
        stream = await client.messages.create(**ASK, max_tokens=8, stream=True)
        with pytest.raises(anthropic.APIStatusError) as raised:
            async for event in stream:
                assert event.type == "content_block_delta"
    assert "send the request again" in str(raised.value)


async def test_the_openai_sdk_raises_our_error_where_a_stream_is_cut_within_an_event() -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.sse(chunk_of("Hel"), chunk_of("lo")[:25])
        exchange.die()

    got = []
    async with (
        asyncio.timeout(30),
        Upstream(script) as upstream,
        GatewayProcess(upstream) as gateway,
        openai.AsyncOpenAI(base_url=f"{gateway.base_url}/v1", api_key="-", max_retries=0) as client,
    ):
        stream = await client.chat.completions.create(**ASK, stream=True)
        with pytest.raises(openai.APIError) as raised:
            async for chunk in stream:
                got.append(chunk.choices[0].delta.content)
    assert got == ["Hel"]
    assert raised.value.code == "replica_lost"
    assert "send the request again" in raised.value.message


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/messages", "/v1/responses"])
@pytest.mark.parametrize("end", ["die", "close"])
@pytest.mark.parametrize(
    "tail",
    [
        b'data: {"a": 1}\n\n',
        b'data: {"a"',
        b'data: {"a": 1}\n',
        b'data: {"a": 1}\r\n\r\n',
        b'data: {"a": 1}\r\n\r',
    ],
)
async def test_a_cut_stream_ends_well_with_an_error_event(path: str, end: str, tail: bytes) -> None:
    """The client sees the end of a whole HTTP answer whose last event is the error."""

    async def script(exchange: Exchange) -> None:
        await exchange.sse(b'data: {"n": 0}\n\n', tail)
        if end == "die":
            exchange.die()
        else:
            exchange.writer.close()

    async with (
        asyncio.timeout(30),
        Upstream(script) as upstream,
        GatewayProcess(upstream) as gateway,
    ):
        answer = await gateway.client.post(path, json={**ASK, "stream": True})
    events = answer.text.removesuffix("\n\n").replace("\r\n", "\n").split("\n\n")
    assert answer.text.endswith("\n\n")
    whole = [e.decode() for e in (tail.strip(),) if tail.endswith((b"\n\n", b"\r\n\r\n"))]
    assert events[:-1] == ['data: {"n": 0}', *whole]  # and nothing of a half event
    *names, data = events[-1].split("\n")
    error = json.loads(data.removeprefix("data: "))
    if path == "/v1/messages":
        assert names == ["event: error"]
        assert error["type"] == "error" and error["error"]["message"]
    elif path == "/v1/responses":
        assert names == ["event: error"]
        assert error["type"] == "error" and error["message"] and error["code"] == "replica_lost"
    else:
        assert names == []
        assert error["error"].keys() == ENVELOPE and error["error"]["code"] == "replica_lost"


async def test_a_cut_within_an_event_too_large_to_be_held_still_ends_with_a_readable_error() -> (
    None
):
    async def script(exchange: Exchange) -> None:
        await exchange.sse(b"data: " + b"x" * 2**21, b"yz")
        exchange.die()

    async with (
        asyncio.timeout(30),
        Upstream(script) as upstream,
        GatewayProcess(upstream) as gateway,
    ):
        answer = await gateway.client.post(CHAT, json=ASK)
    large, error = answer.text.removesuffix("\n\n").split("\n\n")
    assert large.startswith("data: xxx")
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "replica_lost"


async def test_a_replica_that_fails_within_its_first_event_is_replaced_by_another() -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.sse(b'data: {"half')
        exchange.die()

    async with (
        Upstream(script) as bad,
        Upstream() as good,
        GatewayProcess(bad, good) as gateway,
    ):
        answer = await gateway.client.post(CHAT, json=ASK)
        assert (answer.status_code, answer.json()) == (200, {"ok": True})


async def test_a_stream_of_a_known_length_can_still_end_with_an_error_event() -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.head("content-type: text/event-stream", "content-length: 1000")
        await exchange.send(b"data: 1\n\n")
        exchange.die()

    async with (
        asyncio.timeout(30),
        Upstream(script) as upstream,
        GatewayProcess(upstream) as gateway,
    ):
        answer = await gateway.client.post(CHAT, json=ASK)
    one, error = answer.text.removesuffix("\n\n").split("\n\n")
    assert one == "data: 1"
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "replica_lost"


async def test_a_compressed_stream_that_is_cut_is_a_broken_connection() -> None:
    """An event of ours among compressed bytes would be noise."""

    async def script(exchange: Exchange) -> None:
        compressed = "content-type: text/event-stream", "content-encoding: br"
        await exchange.head(*compressed, "transfer-encoding: chunked")
        await exchange.chunk(b"\x01\x02\n\n")
        await asyncio.sleep(0.1)
        exchange.die()

    async with (
        asyncio.timeout(30),
        Upstream(script) as upstream,
        GatewayProcess(upstream) as gateway,
    ):
        with pytest.raises(httpx.RemoteProtocolError):
            async with gateway.client.stream("POST", CHAT, json=ASK) as answer:
                async for chunk in answer.aiter_raw():
                    assert chunk == b"\x01\x02\n\n"


async def test_a_stream_that_falls_silent_ends_with_an_error_event_where_a_timeout_is_set() -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.sse(b"data: 1\n\n")
        await exchange.client_gone()

    async with (
        asyncio.timeout(30),
        Upstream(script) as upstream,
        GatewayProcess(upstream, request_timeout_s=0.3) as gateway,
    ):
        answer = await gateway.client.post(CHAT, json=ASK)
    assert answer.text.startswith("data: 1\n\ndata: ")
    assert json.loads(answer.text.split("data: ")[2])["error"].keys() == ENVELOPE


@pytest.mark.parametrize("length", ["content-length: 1000", "transfer-encoding: chunked"])
async def test_a_cut_document_is_a_broken_connection_and_never_a_whole_answer(length: str) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.head("content-type: application/json", length)
        await (exchange.chunk if "chunked" in length else exchange.send)(b'{"half": ')
        await asyncio.sleep(0.1)
        exchange.die()

    async with (
        asyncio.timeout(30),
        Upstream(script) as upstream,
        Upstream() as other,
        GatewayProcess(upstream, other) as gateway,
    ):
        with pytest.raises(httpx.RemoteProtocolError):
            await gateway.client.post(CHAT, json=ASK)
        assert other.exchanges == []
        assert (await gateway.client.get("/health")).status_code == 200


# --- what is counted ---------------------------------------------------------------------------


def counted(gateway: GatewayProcess) -> list[str]:
    """The statuses that requests for models were counted under."""
    return [
        sample.labels["code"]
        for family in gateway.metrics.registry.collect()
        for sample in family.samples
        if sample.name == "serve_app_gateway_requests_total"
        for _ in range(int(sample.value))
    ]


@pytest.mark.parametrize("kind", ["application/json", "text/event-stream"])
async def test_a_replica_lost_in_the_middle_is_counted_as_an_error(
    kind: str,
) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.head(f"content-type: {kind}", "transfer-encoding: chunked")
        await exchange.chunk(b"data: 1\n\n")
        await asyncio.sleep(0.1)
        exchange.die()

    async with Upstream(script) as upstream, GatewayProcess(upstream) as gateway:
        with contextlib.suppress(httpx.RemoteProtocolError):
            await gateway.client.post(CHAT, json=ASK)
        assert await until(lambda: counted(gateway))
    assert counted(gateway) == ["502"]


@pytest.mark.parametrize("begun", [False, True])
async def test_an_exception_in_the_gateway_is_counted_as_an_error(
    begun: bool,
) -> None:
    async def fails(replica: Any, request: Any, answer: Answer) -> int:
        if begun:
            await answer.send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("a bug")

    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        gateway._relay.send = fails  # type: ignore[method-assign]
        if begun:
            with pytest.raises(httpx.RemoteProtocolError):
                await gateway.client.post(CHAT, json=ASK)
        else:
            assert (await gateway.client.post(CHAT, json=ASK)).status_code == 500
        assert await until(lambda: counted(gateway))
    assert counted(gateway) == ["500"]


@pytest.mark.parametrize(
    ("path", "body", "code"),
    [
        (CHAT, {"model": "other"}, "404"),
        (CHAT, {}, "400"),
        (CHAT, {"model": "m", "x": "a" * 2**20}, "413"),
        ("/v1/nothing", {"model": "m"}, "404"),
    ],
)
async def test_what_is_refused_before_its_model_is_known_is_counted(
    path: str, body: Any, code: str
) -> None:
    async with GatewayProcess(max_body_mib=1) as gateway:
        assert (await gateway.client.post(path, json=body)).status_code == int(code)
    assert counted(gateway) == [code]


async def test_an_exception_before_the_model_is_known_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("serve_app.gateway.models.find", lambda directory, id: 1 / 0)
    async with GatewayProcess() as gateway:
        assert (await gateway.client.post(CHAT, json=ASK)).status_code == 500
    assert counted(gateway) == ["500"]


async def test_a_client_that_goes_away_is_counted_as_one() -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.sse(b"data: 1\n\n")
        await exchange.client_gone()

    async with Upstream(script) as upstream, GatewayProcess(upstream) as gateway:
        async with gateway.client.stream("POST", CHAT, json=ASK) as answer:
            await anext(answer.aiter_raw())
        assert await until(lambda: counted(gateway))
    assert counted(gateway) == ["499"]


# --- which replica ---------------------------------------------------------------------------


async def test_requests_go_to_the_replica_with_the_fewest_of_them() -> None:
    release = asyncio.Event()

    async def script(exchange: Exchange) -> None:
        await release.wait()
        await ok(exchange)

    async with (
        Upstream(script) as a,
        Upstream(script) as b,
        Upstream(script) as c,
        GatewayProcess(a, b, c) as gateway,
    ):
        for front_end in gateway.front_ends:
            front_end.inflight = front_end.replica.inflight = 0
        asked = [asyncio.create_task(gateway.client.post(CHAT, json=ASK)) for _ in range(30)]
        assert await until(lambda: sum(len(u.exchanges) for u in (a, b, c)) == 30)
        assert [len(u.exchanges) for u in (a, b, c)] == [10, 10, 10]
        release.set()
        for task in asked:
            assert (await task).status_code == 200
        for order, front_end in enumerate(gateway.front_ends):
            front_end.inflight += order  # as it was
