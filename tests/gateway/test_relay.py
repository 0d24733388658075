"""How the gateway relays: bytes as they are, headers of one hop dropped, back-pressure kept."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from harness.scripted import CREDENTIAL, Exchange, GatewayProcess, Upstream, connections_to, until

from serve_app.cluster.exchange import Called
from serve_app.gateway.exchange import GATEWAY
from serve_app.gateway.relay import Answer, Request

CHAT = "/v1/chat/completions"
ASK = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
MiB = 2**20


# --- what reaches the replica ----------------------------------------------------------------


async def test_the_request_reaches_the_replica_byte_for_byte() -> None:
    # Formatted as no serializer would, so that any decoding and encoding again would show.
    body = b' {"n":1.50, "model" : "m","x":"\\u00e9\xc3\xa9" , "n": 1e2}\n'
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        await gateway.client.post(CHAT, content=body)
    [seen] = upstream.exchanges
    assert (seen.method, seen.target, seen.body) == ("POST", CHAT, body)
    assert seen.header("content-length") == [str(len(body))]


@pytest.mark.parametrize(
    "target",
    [
        "/version?model=m&a=1&a=2",
        "/v1/responses/x%2By%20z?model=m&q=%F0%9F%98%80+b",
        "/v1/responses/resp_1?model=org%2Fm%3A1.0",
        "/version?model=m&redirect=http://elsewhere/%23",
    ],
)
async def test_path_and_query_reach_the_replica_as_they_are(target: str) -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        answer = await gateway.client.get(target)
    assert answer.json() == {"ok": True}
    assert [e.target for e in upstream.exchanges] == [target]


@pytest.mark.parametrize(("method", "path"), [("POST", CHAT), ("GET", "/tokenizer_info")])
async def test_the_method_stays_and_a_body_goes_with_any_of_them(method: str, path: str) -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        await gateway.client.request(method, path, json=ASK)
    assert [e.method for e in upstream.exchanges] == [method]
    assert json.loads(upstream.bodies[0]) == ASK


async def test_the_last_of_two_model_keys_counts_as_it_does_in_vllm() -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        await gateway.client.post(CHAT, content=b'{"model":"x","model":"m"}')
        other = await gateway.client.post(CHAT, content=b'{"model":"m","model":"x"}')
    assert len(upstream.exchanges) == 1
    assert other.status_code == 404


async def test_headers_of_one_hop_and_secrets_stop_at_the_gateway() -> None:
    sent = [
        ("connection", "close, X-Private"),
        ("x-private", "1"),
        ("keep-alive", "timeout=5"),
        ("te", "trailers"),
        ("proxy-authorization", "Basic x"),
        ("proxy-connection", "close"),
        ("upgrade", "h2c"),
        ("authorization", "Bearer sk-of-a-user"),
        ("x-serve-app-credential", "a-guess"),
        ("x-serve-app-call", "[]"),
        ("endpoint-load-metrics-format", "JSON"),
        ("x-request-id", "r-1"),
        ("x-custom", "kept"),
        ("accept-encoding", "gzip"),
        ("user-agent", "a-client"),
    ]
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        await gateway.client.post(CHAT, json=ASK, headers=sent)
    [seen] = upstream.exchanges
    seen_headers = dict(seen.headers)
    called = Called.read(seen_headers.pop("x-serve-app-call").encode())
    assert (called.gateway, called.key, called.path) == (GATEWAY, "", CHAT)
    assert seen_headers == {
        "Host": f"127.0.0.1:{upstream.port}",
        "content-type": "application/json",
        "Content-Length": str(len(seen.body)),
        "x-serve-app-credential": CREDENTIAL,
        "x-request-id": "r-1",
        "x-custom": "kept",
        "accept-encoding": "gzip",
        "user-agent": "a-client",
    }
    assert len(seen.headers) == len({k.lower() for k, _ in seen.headers})


@pytest.mark.parametrize("value", ["é世.wav", "plain", "a\tb"])
async def test_a_header_keeps_its_bytes(value: str) -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        sent = value.encode()
        await gateway.client.post(CHAT, json=ASK, headers={"x-any": sent, "x-request-id": sent})
    [seen] = upstream.exchanges
    for name in ("x-any", "x-request-id"):
        assert [v.encode("latin-1") for v in seen.header(name)] == [sent]


async def test_a_target_that_names_a_host_changes_nothing_of_where_it_goes() -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        target = b"http://elsewhere:1/version?model=m"
        writer.write(b"GET " + target + b" HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        async with asyncio.timeout(10):
            assert (await reader.read()).endswith(b'{"ok": true}')
        writer.close()
    [seen] = upstream.exchanges
    assert seen.target == "/version?model=m"
    assert seen.header("host") == [f"127.0.0.1:{upstream.port}"]


async def test_a_request_id_is_made_where_there_is_none() -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        for _ in range(2):
            await gateway.client.post(CHAT, json=ASK)
    ids = [e.header("x-request-id") for e in upstream.exchanges]
    assert all(len(id) == 1 and id[0] for id in ids)
    assert ids[0] != ids[1]


# --- what reaches the client -----------------------------------------------------------------


async def test_the_answer_reaches_the_client_with_its_status_headers_and_bytes() -> None:
    packed = gzip.compress(b'{"a": 1}')

    async def script(exchange: Exchange) -> None:
        await exchange.answer(
            packed,
            "Content-Type: application/x-any",
            "content-encoding: gzip",
            "Set-Cookie: a=1",
            "Set-Cookie: b=2",
            "X-Custom: kept",
            "Connection: X-Private",
            "X-Private: 1",
            "Keep-Alive: timeout=5",
            "Proxy-Authenticate: Basic",
            "Upgrade: h2c",
            "X-Request-Id: of-the-replica",
            "Server: of-the-replica",
            "Date: yesterday",
            "Access-Control-Allow-Origin: *",
            "Access-Control-Expose-Headers: x-custom",
            "X-Serve-App-Credential: echoed",
            status="203 Non-Authoritative Information",
        )

    async with (
        Upstream(script) as upstream,
        GatewayProcess(upstream) as gateway,
        gateway.client.stream("POST", CHAT, json=ASK) as answer,
    ):
        raw = b"".join([chunk async for chunk in answer.aiter_raw()])
    assert answer.status_code == 203
    assert raw == packed
    names = [k.lower() for k, _ in answer.headers.raw]
    # uvicorn's own two, as under Serve; Serve also sets x-request-id.
    assert [n for n in names if n not in (b"date", b"server")] == [
        b"content-type", b"content-encoding", b"set-cookie", b"set-cookie", b"x-custom",
        b"content-length",
    ]  # fmt: skip
    assert answer.headers.get_list("set-cookie") == ["a=1", "b=2"]
    assert "of-the-replica" not in str(answer.headers.raw)


@pytest.mark.parametrize("status", [204, 304, 200])
async def test_an_answer_without_a_body_comes_to_its_end(status: int) -> None:
    async def script(exchange: Exchange) -> None:
        length = () if status in (204, 304) else ("content-length: 0",)
        await exchange.head("x-custom: kept", *length, status=f"{status} X")

    async with Upstream(script) as upstream, GatewayProcess(upstream) as gateway:
        answer = await gateway.client.post(CHAT, json=ASK)
        assert (answer.status_code, answer.content) == (status, b"")
        assert answer.headers["x-custom"] == "kept"


@pytest.mark.parametrize("to", ["/elsewhere", "http://127.0.0.1:8000/x", "https://docs.example/x"])
async def test_a_redirect_is_neither_followed_nor_shown(to: str) -> None:
    """No route of vLLM redirects; the address of a replica is not for clients."""

    async def script(exchange: Exchange) -> None:
        await exchange.answer(b"", f"Location: {to}", status="307 Temporary Redirect")

    async with Upstream(script) as upstream, GatewayProcess(upstream) as gateway:
        answer = await gateway.client.post(CHAT, json=ASK)
    assert answer.status_code == 307
    assert "location" not in answer.headers
    assert len(upstream.exchanges) == 1


@pytest.mark.parametrize("name", ["x-echo", "location"])
async def test_a_header_that_repeats_a_long_one_of_the_client_is_no_failure(name: str) -> None:
    """Else a client could have each replica avoided."""

    async def script(exchange: Exchange) -> None:
        await exchange.answer(b"done", f"{name}: {'a' * 100_000}")

    async with Upstream(script) as upstream, GatewayProcess(upstream) as gateway:
        assert (await gateway.client.post(CHAT, json=ASK)).status_code == 200
        assert len(gateway.board.live("m")) == 1


async def test_a_request_id_of_more_than_512_characters_is_refused() -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        for length, status in ((512, 200), (513, 400)):
            headers = {"x-request-id": "a" * length}
            assert (
                await gateway.client.post(CHAT, json=ASK, headers=headers)
            ).status_code == status


async def test_hints_before_the_answer_are_not_the_answer() -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.head(status="100 Continue")
        await exchange.head("link: x", status="103 Early Hints")
        await exchange.answer(b"done")

    async with Upstream(script) as upstream, GatewayProcess(upstream) as gateway:
        answer = await gateway.client.post(CHAT, json=ASK)
        assert (answer.status_code, answer.content) == (200, b"done")
        assert "link" not in answer.headers


async def test_each_event_is_sent_on_before_the_next_one_is_written() -> None:
    go_on = asyncio.Event()

    async def script(exchange: Exchange) -> None:
        await exchange.sse()
        for n in range(20):
            go_on.clear()
            await exchange.chunk(b"data: %d\n\n" % n)
            await go_on.wait()
        await exchange.chunk(b"")

    seen = []
    async with (
        Upstream(script) as upstream,
        GatewayProcess(upstream) as gateway,
        asyncio.timeout(30),
        gateway.client.stream("POST", CHAT, json=ASK) as answer,
    ):
        assert answer.headers["content-type"] == "text/event-stream"
        async for chunk in answer.aiter_raw():
            seen.append(chunk)
            go_on.set()
    assert seen == [b"data: %d\n\n" % n for n in range(20)]


@pytest.mark.parametrize(
    "head", ["content-type: text/plain", "content-type: text/event-stream\r\ncontent-encoding: br"]
)
async def test_a_character_in_two_pieces_arrives_in_two_pieces(head: str) -> None:
    event = 'data: {"t":"世😀"}\n\n'.encode()
    pieces = [event[n : n + 1] for n in range(len(event))]
    next_one = asyncio.Event()

    async def script(exchange: Exchange) -> None:
        await exchange.head(head, "transfer-encoding: chunked")
        for piece in pieces:
            next_one.clear()
            await exchange.chunk(piece)
            await next_one.wait()
        await exchange.chunk(b"")

    seen = []
    async with (
        Upstream(script) as upstream,
        GatewayProcess(upstream) as gateway,
        asyncio.timeout(30),
        gateway.client.stream("POST", CHAT, json=ASK) as answer,
    ):
        async for chunk in answer.aiter_raw():
            seen.append(chunk)
            next_one.set()
    assert seen == pieces


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r"])
async def test_an_event_in_pieces_arrives_whole_as_soon_as_it_is_whole(end: bytes) -> None:
    line = end[: len(end) // 2]
    first, second = b"event: a" + line + 'data: "世"'.encode() + end, b"data: 2" + end
    written = [bytes([byte]) for byte in first[:-1]]
    written += [first[-1:] + second[:3], second[3:] + second + b"da", b"ta: 3" + end]
    whole = [first, second + second, b"data: 3" + end]
    go_on = asyncio.Event()

    async def script(exchange: Exchange) -> None:
        await exchange.sse(*written[:-2])
        for piece in written[-2:]:
            await go_on.wait()
            go_on.clear()
            await exchange.chunk(piece)
        await exchange.chunk(b"")

    seen = []
    async with (
        Upstream(script) as upstream,
        GatewayProcess(upstream) as gateway,
        asyncio.timeout(30),
        gateway.client.stream("POST", CHAT, json=ASK) as answer,
    ):
        async for chunk in answer.aiter_raw():
            seen.append(chunk)
            go_on.set()
    assert seen == whole


async def test_what_a_stream_ends_with_is_sent_although_it_is_no_whole_event() -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.sse(b"data: 1\n\ndata: [DO", b"NE]", b"")

    async with Upstream(script) as upstream, GatewayProcess(upstream) as gateway:
        answer = await gateway.client.post(CHAT, json=ASK)
    assert answer.content == b"data: 1\n\ndata: [DONE]"


async def test_an_event_too_large_to_be_held_is_sent_on_in_pieces() -> None:
    half, first_half_seen = b"data: " + b"x" * (MiB + 1), asyncio.Event()

    async def script(exchange: Exchange) -> None:
        await exchange.sse(half)
        await first_half_seen.wait()
        await exchange.chunk(b"y\n\n")
        await exchange.chunk(b"")

    got = b""
    async with (
        Upstream(script) as upstream,
        GatewayProcess(upstream) as gateway,
        asyncio.timeout(30),
        gateway.client.stream("POST", CHAT, json=ASK) as answer,
    ):
        async for chunk in answer.aiter_raw():
            got += chunk
            if len(got) > MiB:
                first_half_seen.set()
    assert got == half + b"y\n\n"


async def test_events_that_wait_while_the_client_is_busy_go_on_in_one_message() -> None:
    """And one that comes alone goes on alone, as the test of each event shows."""
    events = [b"data: %d\n\n" % n for n in range(100)]
    busy, free, written = asyncio.Event(), asyncio.Event(), asyncio.Event()
    messages: list[bytes] = []

    async def script(exchange: Exchange) -> None:
        await exchange.sse(events[0])
        await busy.wait()
        for event in events[1:]:
            await exchange.chunk(event)
            await asyncio.sleep(0)
        written.set()
        await free.wait()
        await exchange.chunk(b"")

    async def send(message: Any) -> None:
        messages.append(message.get("body", b""))
        if len(messages) == 2:
            busy.set()
            await free.wait()

    async with Upstream(script) as upstream, GatewayProcess(upstream) as gateway:
        request = Request("r", "POST", CHAT, b"", [], b"{}")
        sending = gateway._relay.send(gateway.front_ends[0], request, Answer(send))
        relaying = asyncio.create_task(sending)
        await written.wait()
        await asyncio.sleep(0.2)  # until all is in this process
        free.set()
        assert await relaying == 200
    assert messages[:3] == [b"", events[0], b"".join(events[1:])]
    assert b"".join(messages) == b"".join(events)


# --- connections -----------------------------------------------------------------------------


async def test_connections_are_used_again_on_both_sides() -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        for _ in range(5):
            answer = await gateway.client.post(CHAT, json=ASK)
            assert "connection" not in answer.headers
    assert (len(upstream.exchanges), upstream.connections) == (5, 1)


async def test_requests_at_once_are_not_queued_behind_each_other() -> None:
    together = asyncio.Barrier(200)

    async def script(exchange: Exchange) -> None:
        await together.wait()
        await exchange.answer(exchange.body)

    async with Upstream(script) as upstream, GatewayProcess(upstream) as gateway:
        bodies = [{**ASK, "n": n} for n in range(200)]
        answers = await asyncio.gather(*(gateway.client.post(CHAT, json=b) for b in bodies))
    assert [a.json() for a in answers] == bodies


# --- back-pressure ---------------------------------------------------------------------------


async def slow_client(gateway: GatewayProcess) -> socket.socket:
    """A client that has asked and does not read."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
    connection.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(connection, ("127.0.0.1", gateway.port))
    body = json.dumps(ASK).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
    await loop.sock_sendall(
        connection, f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
    )
    return connection


def memory() -> int:
    """Bytes of memory that this process holds now; the gateway is part of it."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("kind", ["text/event-stream", "application/json"])
async def test_a_slow_client_holds_the_replica_back_and_costs_no_memory(kind: str) -> None:
    total = 200 * MiB

    async def script(exchange: Exchange) -> None:
        await exchange.head(f"content-type: {kind}", f"content-length: {total}")
        block = b"x" * (64 * 1024)
        for _ in range(total // len(block)):
            await exchange.send(block)

    async with Upstream(script) as upstream, GatewayProcess(upstream) as gateway:
        before = memory()
        connection = await slow_client(gateway)
        sent = -1
        while not upstream.exchanges or sent != upstream.exchanges[0].sent:
            sent = upstream.exchanges[0].sent if upstream.exchanges else -1
            await asyncio.sleep(0.5)
        # The kernel's buffers of two connections are most of it.
        assert 0 < sent < 20 * MiB
        assert memory() - before < 32 * MiB

        # Once the client reads on, all the rest comes.
        got = 0
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(connection, MiB):
            got += len(data)
        connection.close()
        assert got > total


async def test_a_slow_client_does_not_slow_another_one() -> None:
    async def script(exchange: Exchange) -> None:
        if b"hi" not in exchange.body:
            await exchange.answer(b"quick")
            return
        await exchange.sse()
        with contextlib.suppress(ConnectionError):
            while True:
                await exchange.chunk(b"data: x\n\n" * 1000)

    async with Upstream(script) as upstream, GatewayProcess(upstream) as gateway:
        slow = await slow_client(gateway)
        assert await until(lambda: upstream.exchanges)
        for _ in range(20):
            answer = await gateway.client.post(CHAT, json={"model": "m"})
            assert answer.content == b"quick"
        slow.close()


# --- clients that go away --------------------------------------------------------------------


@pytest.mark.parametrize("after", ["the request", "the head", "an event"])
async def test_a_client_that_goes_away_closes_the_replicas_side(after: str) -> None:
    gone, waiting = asyncio.Event(), asyncio.Event()

    async def script(exchange: Exchange) -> None:
        if after == "the head":
            await exchange.sse()
        if after == "an event":
            await exchange.sse(b"data: 1\n\n")
        waiting.set()
        await exchange.client_gone()
        gone.set()

    async with Upstream(script) as upstream, GatewayProcess(upstream) as gateway:
        connection = await slow_client(gateway)
        await waiting.wait()
        if after == "an event":
            data = await asyncio.get_running_loop().sock_recv(connection, 4096)
            assert data.startswith(b"HTTP/1.1 200 OK")
        assert gateway.inflight() == [1]
        connection.close()
        async with asyncio.timeout(10):
            await gone.wait()


async def test_a_client_that_goes_away_while_its_body_comes_is_not_relayed() -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        loop = asyncio.get_running_loop()
        with socket.socket() as connection:
            connection.setblocking(False)
            await loop.sock_connect(connection, ("127.0.0.1", gateway.port))
            await loop.sock_sendall(
                connection,
                b'POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n{"model":"m"',
            )
            await asyncio.sleep(0.2)
        assert (await gateway.client.get("/health")).status_code == 200
    assert upstream.exchanges == []


# --- its connections -------------------------------------------------------------------------


async def test_a_connection_notices_a_node_that_is_gone() -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        await gateway.client.post(CHAT, json=ASK)
        [kept] = connections_to(upstream.port)
        option = kept.getsockopt
        assert option(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        tcp = socket.IPPROTO_TCP
        probes = option(tcp, socket.TCP_KEEPCNT) * option(tcp, socket.TCP_KEEPINTVL)
        assert option(tcp, socket.TCP_KEEPIDLE) + probes == 25
        assert option(tcp, socket.TCP_USER_TIMEOUT) == 25_000
