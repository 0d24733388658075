"""The relay's HTTP client: every framing however it is cut, its pool, and what it leaves behind.

All tests run in uvloop, which Serve uses, and in asyncio's own loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import h11
import pytest
import uvloop
from harness.scripted import Exchange, Upstream, connections_to, ok, until

from serve_app.gateway import upstream
from serve_app.gateway.upstream import Connection, Lost, NoConnection, Pool, Silent, UpstreamError

KiB = 2**10
HOST = "127.0.0.1"
NONE: list[tuple[bytes, bytes]] = []


@pytest.fixture(params=[asyncio.DefaultEventLoopPolicy, uvloop.EventLoopPolicy])
def event_loop_policy(request: pytest.FixtureRequest) -> Any:
    return request.param()


@pytest.fixture
async def pool() -> AsyncIterator[Pool]:
    made = Pool(5, None)
    yield made
    made.close()
    assert await until(lambda: not made._open and not made._resting)


async def ask(pool: Pool, server: Upstream, method: str = "POST", body: bytes = b"") -> Connection:
    return await pool.ask(server.host, server.port, method, "/x", NONE, body)


async def read_all(connection: Connection) -> bytes:
    body = b""
    with connection:
        while not connection.ended:
            body += await connection.read()
    return body


async def fetch(pool: Pool, server: Upstream, method: str = "POST") -> tuple[int, bytes]:
    connection = await ask(pool, server, method)
    return connection.status, await read_all(connection)


# --- framings, without a socket ------------------------------------------------------------------


class Wire(asyncio.Transport):
    """A transport to nobody, for bytes that shall come in just these pieces."""

    def __init__(self) -> None:
        self.reading, self.aborted = asyncio.Event(), False
        self.reading.set()

    def writelines(self, pieces: Any) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return self.aborted

    def abort(self) -> None:
        self.aborted = True

    def pause_reading(self) -> None:
        self.reading.clear()

    def resume_reading(self) -> None:
        self.reading.set()


class Answer:
    """What came of an answer in these pieces, of which the last ends the connection if ``eof``."""

    def __init__(self, method: str = "POST", *, passed_on: bool = False) -> None:
        self.method, self.passed_on = method, passed_on
        self.status, self.headers, self.body = 0, NONE, b""
        self.error: UpstreamError | None = None
        self.used_again = False

    async def of(self, pieces: list[bytes], *, eof: bool) -> Answer:
        self.pool, wire = Pool(5, None), Wire()
        connection = Connection(self.pool, (HOST, 1))
        connection.connection_made(wire)
        reading = asyncio.create_task(self._read(connection))
        await asyncio.sleep(0)
        for piece in pieces:
            await wire.reading.wait()
            if not wire.aborted:
                connection.data_received(piece)
            if len(pieces) < 10 or random.random() < 0.5:
                await asyncio.sleep(0)
        if eof:
            connection.eof_received()
            connection.connection_lost(None)
        async with asyncio.timeout(5):
            await reading
        self.used_again = bool(self.pool._resting)
        return self

    async def _read(self, connection: Connection) -> None:
        try:
            await connection.ask(self.method, "/", NONE, b"")
            self.status, self.headers = connection.status, connection.headers
            with connection:
                if self.passed_on:
                    await connection.pass_on(self._send)
                while not connection.ended:
                    self.body += await connection.read()
        except UpstreamError as error:
            self.error = error

    async def _send(self, data: bytes) -> None:
        for _ in range(random.choice([0, 0, 1, 3])):
            await asyncio.sleep(0)
        self.body += data


CHUNKED = (
    b"HTTP/1.1 200 Fine\r\ncontent-type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    b'5\r\nhello\r\n00A;ext=1;x="y"\r\n, replica!\r\n0\r\nX-Trailer: 1\r\nX-Other: 2\r\n\r\n'
)
HINTED = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + CHUNKED
SIZED = b"HTTP/1.1 200 OK\r\nX-A:  b \r\nContent-Length: 15\r\n\r\nhello, replica!"
CLOSED = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nhello, replica!"
OLD = b"HTTP/1.0 200 OK\r\n\r\nhello, replica!"


@pytest.mark.parametrize("whole", [CHUNKED, HINTED, SIZED, CLOSED, OLD])
async def test_an_answer_may_be_cut_anywhere(whole: bytes) -> None:
    eof = whole in (CLOSED, OLD)
    for at in range(1, len(whole)):
        got = await Answer().of([whole[:at], whole[at:]], eof=eof)
        assert (got.error, got.status, got.body) == (None, 200, b"hello, replica!")
        assert got.used_again == (not eof)
    got = await Answer().of([bytes([byte]) for byte in whole], eof=eof)
    assert (got.error, got.body) == (None, b"hello, replica!")


@pytest.mark.parametrize("whole", [CHUNKED, HINTED, SIZED])
async def test_an_answer_that_stops_anywhere_is_lost(whole: bytes) -> None:
    for at in range(len(whole)):
        got = await Answer(passed_on=at % 2 == 1).of([whole[:at]], eof=True)
        assert isinstance(got.error, Lost)
        assert b"hello, replica!".startswith(got.body)  # what came before is not withheld


async def test_headers_are_in_lower_case_and_trimmed_and_trailers_are_dropped() -> None:
    got = await Answer().of([SIZED], eof=False)
    assert got.headers == [(b"x-a", b"b"), (b"content-length", b"15")]
    got = await Answer().of([HINTED], eof=False)
    assert [name for name, _ in got.headers] == [b"content-type", b"transfer-encoding"]


@pytest.mark.parametrize(
    ("method", "head"),
    [
        ("POST", b"HTTP/1.1 204 No Content\r\n\r\n"),
        ("POST", b"HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\n\r\n"),
        ("POST", b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"),
        ("POST", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n"),
        ("HEAD", b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n"),
        ("HEAD", b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"),
    ],
)
async def test_an_answer_without_a_body_ends_with_its_head(method: str, head: bytes) -> None:
    got = await Answer(method).of([head], eof=False)
    assert (got.error, got.body) == (None, b"")
    assert got.status in (200, 204, 304)


TOO_LONG = b"x" * 300 * KiB


@pytest.mark.parametrize(
    "wrong",
    [
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/2 200 OK\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"HTTP/1.1 000 X\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: a\rb: c\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: a\x00b\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx y: z\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nx\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhelloXX0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
        SIZED + b"more",
        SIZED + SIZED,
        CHUNKED + SIZED,
        b"HTTP/1.1 200 " + TOO_LONG,
        b"HTTP/1.1 200 OK\r\n" + TOO_LONG,
        b"HTTP/1.1 200 OK\r\nx: " + TOO_LONG,
        b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 60 * KiB,
        b"HTTP/1.1 103 X\r\n\r\n" * 20 * KiB,
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5;" + TOO_LONG,
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx: " + TOO_LONG,
    ],
)
async def test_what_is_not_http_is_an_error_and_nothing_of_it_an_answer(wrong: bytes) -> None:
    got = await Answer().of([wrong], eof=False)
    assert isinstance(got.error, Lost)
    assert got.body == b""
    assert not got.used_again


def framed(body: bytes, dice: random.Random) -> tuple[bytes, bool]:
    """An answer with this body in one of HTTP's framings; whether closing it is its end."""
    names = [b"content-type: text/event-stream", b"X-Empty:", b"X-Any: \xe4\xb8\x96 a\tb  "]
    head = [b"HTTP/1.1 200 OK", *dice.sample(names, dice.randrange(len(names) + 1))]
    kind = dice.choice(["length", "chunks", "until closed", "closed length"])
    if kind == "chunks":
        head.append(dice.choice([b"Transfer-Encoding: chunked", b"transfer-encoding:Chunked"]))
        sent, at = b"", 0
        while at < len(body):
            size = min(dice.choice([1, 2, 7, 200, 5000]), len(body) - at)
            spelled = dice.choice([b"%x", b"%X", b"0%x", b"%x;a=b", b'%x;c="d;e"']) % size
            sent += spelled + b"\r\n" + body[at : at + size] + b"\r\n"
            at += size
        body = (
            sent + b"0\r\n" + dice.choice([b"", b"X-Trailer: 1\r\n", b"A: 1\r\nB: 2\r\n"]) + b"\r\n"
        )
    elif kind in ("length", "closed length"):
        head.append(b"Content-Length: %d" % len(body))
    if kind in ("until closed", "closed length"):
        head.append(b"Connection: close")
    hints = b"HTTP/1.1 103 X\r\nlink: y\r\n\r\n" * dice.choice([0, 0, 0, 2])
    return hints + b"\r\n".join(head) + b"\r\n\r\n" + body, kind == "until closed"


def in_pieces(whole: bytes, dice: random.Random) -> list[bytes]:
    cuts = sorted(dice.sample(range(1, len(whole)), dice.randrange(min(20, len(whole) - 1))))
    return [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]


def by_h11(whole: bytes) -> tuple[int, bytes] | None:
    """Status and body as h11 reads them; None where it finds no whole answer."""
    reference = h11.Connection(h11.CLIENT, max_incomplete_event_size=2**20)
    reference.send(h11.Request(method="POST", target="/", headers=[("host", "x")]))
    reference.send(h11.EndOfMessage())
    reference.receive_data(whole)
    reference.receive_data(b"")
    status, body = 0, b""
    try:
        while not isinstance(event := reference.next_event(), h11.EndOfMessage):
            if isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.ConnectionClosed) or event in (h11.PAUSED, h11.NEED_DATA):
                return None
    except h11.RemoteProtocolError:
        return None
    return status, body


def cases(number: int) -> Iterator[random.Random]:
    for seed in range(number):
        yield random.Random(seed)


@pytest.mark.parametrize("passed_on", [False, True])
async def test_any_framing_in_any_pieces_gives_the_body(passed_on: bool) -> None:
    for dice in cases(300):
        body = dice.randbytes(dice.choice([0, 1, 100, 10_000]))
        whole, until_closed = framed(body, dice)
        got = await Answer(passed_on=passed_on).of(in_pieces(whole, dice), eof=until_closed)
        assert (got.error, got.status, got.body) == (None, 200, body)


async def test_a_damaged_answer_is_an_error_or_what_h11_reads() -> None:
    agreed = 0
    for dice in cases(1000):
        whole, _ = framed(dice.randbytes(dice.choice([0, 5, 50])), dice)
        at = dice.randrange(len(whole))
        damage = dice.choice([b"", bytes([dice.randrange(256)]), b"\r", b"\n", b"0", b" "])
        damaged = whole[:at] + damage + whole[at + dice.choice([0, 1]) :]
        got = await Answer().of(in_pieces(damaged, dice), eof=True)
        if got.error is None:
            # llhttp skips line breaks before a head, as RFC 9112 §2.2 has servers do.
            read = by_h11(re.sub(rb"(^|\r\n\r\n)[\r\n](?=HTTP/1)", rb"\1", damaged))
            assert (got.status, got.body) == read, damaged
            agreed += 1
    assert agreed > 200


# --- connections -----------------------------------------------------------------------------


async def test_the_connection_used_last_is_used_first(pool: Pool) -> None:
    together = asyncio.Barrier(3)

    async def script(exchange: Exchange) -> None:
        if exchange.method == "PUT":
            await together.wait()
        await ok(exchange)

    async with Upstream(script) as server:
        await asyncio.gather(*(fetch(pool, server, "PUT") for _ in range(3)))
        for _ in range(5):
            await fetch(pool, server)
        assert server.connections == 3
        assert len({id(e.writer) for e in server.exchanges[3:]}) == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_the_host_is_named_as_in_a_url(pool: Pool, host: str) -> None:
    async with Upstream(host=host) as server:
        assert await fetch(pool, server) == (200, b'{"ok": true}')
        shown = f"[::1]:{server.port}" if host == "::1" else f"{host}:{server.port}"
        assert server.exchanges[0].header("host") == [shown]


@pytest.mark.parametrize(
    ("method", "body", "length"),
    [("POST", b"", ["0"]), ("DELETE", b"", ["0"]), ("GET", b"", []), ("GET", b"xy", ["2"])],
)
async def test_a_length_is_said_where_a_body_could_be(
    pool: Pool, method: str, body: bytes, length: list[str]
) -> None:
    async with Upstream() as server:
        await read_all(await ask(pool, server, method, body))
        [seen] = server.exchanges
        assert (seen.method, seen.body, seen.header("content-length")) == (method, body, length)


@pytest.mark.parametrize("target", ["/x\r\nx-serve-app-credential: y", "/x\nfoo"])
async def test_a_line_break_cannot_make_two_requests_of_one(pool: Pool, target: str) -> None:
    async with Upstream() as server:
        with pytest.raises(ValueError):
            await pool.ask(server.host, server.port, "POST", target, NONE, b"")
        with pytest.raises(ValueError):
            await pool.ask(server.host, server.port, "POST", "/", [(b"x", b"y\r\nz: 1")], b"")
        assert server.exchanges == []


@pytest.mark.parametrize("head", ["HTTP/1.0 200 OK", "HTTP/1.1 200 OK\r\nconnection: close"])
async def test_a_connection_that_shall_not_be_kept_is_not(pool: Pool, head: str) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.send(f"{head}\r\ncontent-length: 2\r\n\r\nok".encode())

    async with Upstream(script) as server:
        for _ in range(2):
            assert await fetch(pool, server) == (200, b"ok")
        assert server.connections == 2


async def test_an_idle_connection_that_the_replica_closes_is_forgotten(pool: Pool) -> None:
    async def script(exchange: Exchange) -> None:
        await ok(exchange)
        exchange.writer.close()

    async with Upstream(script) as server:
        assert (await fetch(pool, server))[0] == 200
        assert await until(lambda: not pool._open)
        assert pool._resting == {}
        assert (await fetch(pool, server))[0] == 200


async def test_bytes_on_an_idle_connection_close_it(pool: Pool) -> None:
    async with Upstream() as server:
        await fetch(pool, server)
        await server.exchanges[0].send(b"HTTP/1.1 408 Request Timeout\r\n\r\n")
        assert await until(lambda: not pool._open)
        assert await fetch(pool, server) == (200, b'{"ok": true}')
        assert server.connections == 2


async def test_an_idle_connection_is_closed_after_a_while(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream, "_IDLE_S", 0.3)
    async with Upstream() as server:
        await fetch(pool, server)
        assert len(pool._open) == 1
        assert await until(lambda: not pool._open)
        assert await until(lambda: not connections_to(server.port))


@pytest.mark.parametrize(("method", "asked"), [("GET", 3), ("POST", 2)])
async def test_only_what_may_run_twice_is_sent_twice_when_an_idle_connection_was_closed(
    pool: Pool, method: str, asked: int
) -> None:
    async def script(exchange: Exchange) -> None:
        if len(server.exchanges) == 2:
            exchange.writer.close()
        else:
            await ok(exchange)

    async with Upstream(script) as server:
        await fetch(pool, server)
        if method == "GET":
            assert await fetch(pool, server, method) == (200, b'{"ok": true}')
        else:
            with pytest.raises(Lost):
                await fetch(pool, server, method)
        assert len(server.exchanges) == asked


async def test_nothing_is_sent_twice_once_a_byte_has_come(pool: Pool) -> None:
    async def script(exchange: Exchange) -> None:
        if len(server.exchanges) == 1:
            await ok(exchange)
        else:
            await exchange.send(b"H")
            exchange.writer.close()

    async with Upstream(script) as server:
        await fetch(pool, server)
        with pytest.raises(Lost):
            await fetch(pool, server, "GET")
        assert len(server.exchanges) == 2


async def test_an_answer_before_the_whole_request_was_sent_ends_the_connection(pool: Pool) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\n\r\nno")
        await gone.wait()
        writer.close()

    gone = asyncio.Event()
    server = await asyncio.start_server(serve, HOST, 0, limit=KiB)
    port = server.sockets[0].getsockname()[1]
    connection = await pool.ask(HOST, port, "POST", "/", NONE, b"x" * 50 * KiB * KiB)
    assert (connection.status, await read_all(connection)) == (413, b"no")
    assert await until(lambda: not pool._open)
    assert pool._resting == {}
    gone.set()
    server.close()


# --- time ------------------------------------------------------------------------------------


@contextlib.contextmanager
def takes_no_connections() -> Iterator[int]:
    """A port that neither accepts nor refuses, as that of a node that is gone."""
    with contextlib.ExitStack() as held:
        listener = held.enter_context(socket.socket())
        listener.bind((HOST, 0))
        listener.listen(0)
        for _ in range(2):
            waiting = held.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


async def test_a_connection_that_does_not_come_about_is_given_up() -> None:
    pool = Pool(0.2, None)
    with takes_no_connections() as port:
        async with asyncio.timeout(5):
            with pytest.raises(NoConnection):
                await pool.ask(HOST, port, "POST", "/", NONE, b"")


async def test_silence_is_what_comes_between_two_reads_and_not_a_slow_client() -> None:
    pool = Pool(5, 0.5)

    async def script(exchange: Exchange) -> None:
        await exchange.sse()
        for _ in range(8):  # together longer than the limit
            await asyncio.sleep(0.1)
            await exchange.chunk(b"x" * 100)
        await exchange.chunk(b"y" * 300 * KiB)  # the client is slow here
        await exchange.chunk(b"z" * 300 * KiB)
        await exchange.client_gone()

    async with Upstream(script) as server, asyncio.timeout(10):
        with await ask(pool, server) as connection:
            body = b""
            while len(body) < 800:
                body += await connection.read()
            await asyncio.sleep(1)
            while len(body) < 800 + 600 * KiB:
                body += await connection.read()
            with pytest.raises(Silent):
                await connection.read()
    pool.close()


# --- a slow client, and one that leaves ----------------------------------------------------------


async def test_a_slow_client_makes_the_replica_wait_at_64_kib_and_a_read(pool: Pool) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.sse()
        with contextlib.suppress(ConnectionError):
            while True:
                await exchange.chunk(b"x" * 1000)

    async with Upstream(script) as server:
        with await ask(pool, server) as connection:
            for _ in range(20):
                await asyncio.sleep(0.01)
                assert 0 < len(await connection.read()) <= (64 + 256) * KiB


async def test_events_that_wait_are_read_at_once(pool: Pool) -> None:
    async def script(exchange: Exchange) -> None:
        await exchange.sse()
        for n in range(50):
            await exchange.chunk(b"data: %d\n\n" % n)
            await asyncio.sleep(0)
        await exchange.chunk(b"")

    async with Upstream(script) as server:
        with await ask(pool, server) as connection:
            assert await until(lambda: connection._complete)
            assert await connection.read() == b"".join(b"data: %d\n\n" % n for n in range(50))
            assert connection.ended


async def an_event_stream(pool: Pool) -> Connection:
    """A connection on which an answer has begun."""
    connection = Connection(pool, (HOST, 1))
    connection.connection_made(Wire())
    asking = asyncio.create_task(connection.ask("POST", "/", NONE, b""))
    await asyncio.sleep(0)
    connection.data_received(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    await asking
    return connection


async def test_an_event_goes_on_where_it_comes_in_and_without_a_turn_of_the_loop(
    pool: Pool,
) -> None:
    sent: list[bytes] = []

    async def send(data: bytes) -> None:
        sent.append(data)

    connection = await an_event_stream(pool)
    passing = asyncio.create_task(connection.pass_on(send))
    await asyncio.sleep(0)
    for _ in range(3):
        connection.data_received(b"2\r\nab\r\n")
    assert sent == [b"ab"] * 3
    connection.data_received(b"2\r\ncd\r\n0\r\n\r\n")
    await passing
    assert sent == [b"ab"] * 3
    assert await connection.read() == b"cd"
    assert connection.ended


async def test_a_send_that_waits_is_gone_on_with_in_the_task_and_what_comes_meanwhile_waits(
    pool: Pool,
) -> None:
    sent: list[bytes] = []
    free = asyncio.Event()

    async def send(data: bytes) -> None:
        await free.wait()
        assert asyncio.current_task() is passing
        await asyncio.sleep(0)
        sent.append(data)

    connection = await an_event_stream(pool)
    passing = asyncio.create_task(connection.pass_on(send))
    await asyncio.sleep(0)
    for piece in (b"a", b"b", b"c"):
        connection.data_received(b"1\r\n%b\r\n" % piece)
        await asyncio.sleep(0)
    assert sent == []
    free.set()
    assert await until(lambda: sent == [b"a", b"bc"])
    connection.data_received(b"0\r\n\r\n")
    await passing


async def test_what_came_while_the_client_was_slow_goes_on_before_the_loss_is_told(
    pool: Pool,
) -> None:
    sent: list[bytes] = []
    free = asyncio.Event()

    async def send(data: bytes) -> None:
        await free.wait()
        sent.append(data)

    connection = await an_event_stream(pool)
    passing = asyncio.create_task(connection.pass_on(send))
    await asyncio.sleep(0)
    for piece in (b"a", b"b", b"c"):
        connection.data_received(b"1\r\n%b\r\n" % piece)
        await asyncio.sleep(0)
    connection.connection_lost(ConnectionResetError())
    free.set()
    with pytest.raises(Lost):
        await passing
    assert sent == [b"a", b"bc"]


@pytest.mark.parametrize("waits", [False, True])
async def test_a_send_that_fails_fails_in_the_task(pool: Pool, waits: bool) -> None:
    async def send(data: bytes) -> None:
        if waits:
            await asyncio.sleep(0)
        raise ZeroDivisionError

    connection = await an_event_stream(pool)
    passing = asyncio.create_task(connection.pass_on(send))
    await asyncio.sleep(0)
    connection.data_received(b"1\r\na\r\n")
    with pytest.raises(ZeroDivisionError):
        await passing


@pytest.mark.parametrize("seen", [False, True])
async def test_a_send_that_waits_is_cancelled_with_the_task(pool: Pool, seen: bool) -> None:
    ended: list[bool] = []

    async def send(data: bytes) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def relay() -> None:
        with await an_event_stream(pool) as connection:
            connections.append(connection)
            await connection.pass_on(send)

    connections: list[Connection] = []
    relaying = asyncio.create_task(relay())
    assert await until(lambda: connections and connections[0]._send)
    connections[0].data_received(b"1\r\na\r\n")
    if seen:
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    relaying.cancel()
    with pytest.raises(asyncio.CancelledError):
        await relaying
    assert connections.pop().closing
    assert ended == [True]


@pytest.mark.parametrize("phase", ["connecting", "sending", "head", "body", "slow"])
async def test_a_request_that_is_cancelled_leaves_no_connection(pool: Pool, phase: str) -> None:
    async def script(exchange: Exchange) -> None:
        if phase != "head":
            await exchange.sse(b"data: 1\n\n")
        while phase == "slow":
            await exchange.chunk(b"x" * 10_000)
        await exchange.client_gone()
        gone.set()

    async def never_reads(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await gone.wait()
        writer.close()

    async def request() -> None:
        with await pool.ask(HOST, port, "POST", "/", NONE, b"x" * 20 * KiB * KiB) as connection:
            while not (phase == "slow" and await connection.read()):
                await connection.read()
            await asyncio.sleep(60)

    gone = asyncio.Event()
    async with Upstream(script) as server:
        with takes_no_connections() as hangs:
            stuck = await asyncio.start_server(never_reads, HOST, 0, limit=1)
            stuck_port = stuck.sockets[0].getsockname()[1]
            port = {"connecting": hangs, "sending": stuck_port}.get(phase, server.port)
            before = len(connections_to(port))
            asking = asyncio.create_task(request())
            if phase != "connecting":
                assert await until(lambda: len(connections_to(port)) == before + 1)
            if phase not in ("connecting", "sending"):
                assert await until(lambda: server.exchanges)
            await asyncio.sleep(0.2)
            assert not asking.done()
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            assert await until(lambda: not pool._open and len(connections_to(port)) == before)
            if phase in ("head", "body"):
                async with asyncio.timeout(5):
                    await gone.wait()
            gone.set()
            stuck.close()
