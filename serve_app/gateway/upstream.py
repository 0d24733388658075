"""HTTP/1.1 to the replicas: connections that are an ``asyncio.Protocol``, and a pool of them.

Between a replica's socket and the client's, every frame of Python is paid for each event. So there
is only httptools here, uvicorn's own parser, and no stream reader, task or timer for each answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import time
import types
from collections.abc import Awaitable, Callable, Generator
from typing import Any, Self, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from serve_app import addresses

Headers = list[tuple[bytes, bytes]]
Address = tuple[str, int]
Sender = Callable[[bytes], Awaitable[None] | None]

_IDLE_S = 300
"""Seconds after which a connection that is not used is closed. Replicas keep them for longer."""

_MAX_HELD = 2**16
"""Bytes of an answer that wait here, before the replica has to. One read may come on top."""

_MAX_FRAMING = 2**18
"""Bytes without a byte of body in them: heads, trailers, extensions of chunks. A replica may repeat
a client's target and headers in its head; of headers the gateway accepts 64 KiB."""

_WITHOUT_BODY = ("GET", "HEAD", "OPTIONS", "TRACE")
"""Methods for which no length means that there is no body; with others a length is expected."""

_IDEMPOTENT = (*_WITHOUT_BODY, "PUT", "DELETE")


class UpstreamError(Exception):
    """A replica gave no answer, or not all of it."""


class NoConnection(UpstreamError):
    """It took no connection."""


class Lost(UpstreamError):
    """It closed the connection before the end of its answer, or what it sent was not HTTP."""


class Silent(UpstreamError):
    """It sent nothing for as long as it may be silent."""


class Connection(asyncio.Protocol):
    """A connection to one replica. It has one request at a time, and the answer to that.

    As a context manager it gives itself back to its pool, or closes at once if the answer has not
    come to its end: that is what tells the replica that nobody waits for the rest.
    """

    status: int
    reason: bytes
    headers: Headers
    """With names in lower case."""

    asked_at: float
    """``time.perf_counter`` when the request was written."""

    def __init__(self, pool: Pool, address: Address) -> None:
        self.address = address
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._silence_s = pool.silence_timeout_s
        self._host = addresses.join(*address)
        self._transport: asyncio.Transport
        self._parser: HttpResponseParser | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at = math.inf
        self._deadline = math.inf

    # --- what the relay calls ------------------------------------------------------------------

    async def ask(self, method: str, target: str, headers: Headers, body: bytes) -> None:
        """Send a request; return when the head of its answer has come.

        Raises:
            Lost, Silent: before that.
        """
        self.status, self.reason, self.headers = 0, b"", []
        self._parser = HttpResponseParser(self)
        self._is_head = method == "HEAD"
        self._pieces: list[bytes] = []
        self._held = self._framing = 0
        self._paused = self._complete = self._keep = self._until_closed = False
        self._error: UpstreamError | None = None
        self._send: Sender | None = None
        self._begun: Awaitable[None] | None = None
        try:
            self._expect_within(self._silence_s)
            self.asked_at = time.perf_counter()
            self._transport.writelines((self._head(method, target, headers, body), body))
            while not self.status:
                if self._error is not None:
                    raise self._error
                await self._more()
        except BaseException:
            self.release()
            raise

    async def read(self) -> bytes:
        """All of the body that has come since the last call, at least a byte; empty at the end.

        Raises:
            Lost, Silent: instead of the end.
        """
        while not self._pieces and not self._complete:
            if self._error is not None:
                raise self._error
            await self._more()
        return self._take()

    async def pass_on(self, send: Sender) -> None:
        """Call ``send`` with what comes, as soon as it comes; return before the last of it.

        What ``send`` returns begins to run where the bytes came in, not in this task; if it has to
        wait, this task goes on with it. So an event costs no turn of the loop unless the client is
        slow. ``send`` must not ask which task it is in before it waits.

        Raises:
            Lost, Silent: instead of the end.
        """
        while not self._complete:
            if self._pieces:
                self._begin(send)
            elif self._error is not None:
                raise self._error
            else:
                self._send = send
                try:
                    await self._more()
                finally:
                    self._send = None
            if self._begun is not None:
                begun, self._begun = self._begun, None
                await begun

    def _begin(self, send: Sender) -> None:
        """Send what has come; what then has to wait, or has failed, is in ``_begun``."""
        if (sending := send(self._take())) is None:
            return
        steps = sending.__await__()
        try:
            waits_for = next(steps)
        except StopIteration:
            pass
        except BaseException as error:
            self._begun = self._loop.create_future()
            self._begun.set_exception(error)
        else:
            self._begun = _rest_of(steps, waits_for)

    def _take(self) -> bytes:
        """All that waits here."""
        pieces = self._pieces
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        self._held = 0
        if self._paused:
            self._paused = False
            self._transport.resume_reading()
            self._expect_within(self._silence_s)
        return data

    @property
    def ended(self) -> bool:
        """Whether all of the answer has come and been read."""
        return self._complete and not self._pieces

    @property
    def heard(self) -> bool:
        """Whether any byte of an answer to this request has come."""
        return bool(self.status or self._framing)

    def release(self) -> None:
        """Have no more to do with this request: let another use the connection, or close it."""
        self._parser = self._begun = None
        rests = self._complete and self._keep and not self.closing
        if rests and not self._transport.get_write_buffer_size():
            self._expect_within(_IDLE_S)
            self._pool.rest(self)
        else:
            self._transport.abort()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    @property
    def closing(self) -> bool:
        return self._transport.is_closing()

    def close(self) -> None:
        """Close it at once, whatever it does."""
        self._transport.abort()

    def _head(self, method: str, target: str, headers: Headers, body: bytes) -> bytes:
        lines = [f"{method} {target} HTTP/1.1\r\nHost: {self._host}".encode("latin-1")]
        lines += [name + b": " + value for name, value in headers]
        if body or method not in _WITHOUT_BODY:
            lines.append(b"Content-Length: %d" % len(body))
        head = b"\r\n".join(lines) + b"\r\n\r\n"
        if head.count(b"\n") != len(lines) + 2:
            raise ValueError("a line break within a header")  # would make two requests of one
        return head

    # --- waiting ---------------------------------------------------------------------------------

    async def _more(self) -> None:
        """Wait until something has happened."""
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, error: UpstreamError) -> None:
        if self._error is None:
            self._error = error
        self._transport.abort()
        self._wake()

    def _expect_within(self, seconds: float | None) -> None:
        """Set the time by which something must have happened on this connection; None: no time.

        There is one timer. It looks at the deadline when it fires, so a later deadline, which each
        read sets, costs nothing more.
        """
        self._deadline = math.inf if seconds is None else self._loop.time() + seconds
        self._set_alarm()

    def _set_alarm(self) -> None:
        if self._deadline < self._alarm_at:
            if self._alarm is not None:
                self._alarm.cancel()
            self._alarm = self._loop.call_at(self._deadline, self._ring)
            self._alarm_at = self._deadline

    def _ring(self) -> None:
        self._alarm, self._alarm_at = None, math.inf
        if self._loop.time() < self._deadline:
            self._set_alarm()
        elif self._parser is None:
            self._transport.abort()  # not used for long
        else:
            self._fail(Silent(f"nothing came for {self._silence_s} s"))

    # --- what the transport calls ----------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._parser is None or self._complete:
            self._transport.abort()  # an answer that nobody asked for
            return
        self._held += len(data)
        self._framing += len(data)
        try:
            self._parser.feed_data(data)
            if self._framing > _MAX_FRAMING:
                raise HttpParserError("no end of a head or a chunk")
        except (HttpParserError, HttpParserUpgrade) as error:
            # What came in the same read may be as wrong.
            self._pieces.clear()
            self._complete = False
            self._fail(Lost(f"not HTTP: {error.__context__ or error}"))
            return
        if self._complete:
            self._deadline = math.inf
        else:
            if self._silence_s is not None:
                self._deadline = self._loop.time() + self._silence_s
            if self._send is not None and self._pieces:
                self._begin(self._send)
                if self._begun is None:
                    return
                self._send = None
            if self._pieces and self._held > _MAX_HELD:
                self._paused = True
                self._transport.pause_reading()
                self._deadline = math.inf  # the client is slow, not the replica
        self._wake()

    def pause_writing(self) -> None:
        self._deadline = math.inf  # the replica reads a large body

    def resume_writing(self) -> None:
        if self._parser is not None and not self._complete and not self._paused:
            self._expect_within(self._silence_s)

    def eof_received(self) -> None:
        self._closed(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed(exc)
        self._pool.forget(self)
        if self._alarm is not None:
            self._alarm.cancel()

    def _closed(self, why: Exception | None) -> None:
        if self._parser is None or self._complete:
            return
        if self._until_closed and why is None and self._error is None:
            self._complete = True
            self._wake()
        else:
            self._fail(Lost(str(why or "connection closed")))

    # --- what the parser calls -------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._complete:
            raise ValueError("more than one answer")

    def on_status(self, reason: bytes) -> None:
        self.reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.status:  # else it is a trailer, and no use for one is known
            self.headers.append((name.lower(), value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        status = self._parser.get_status_code()
        if status < 100 or status == 101:
            raise ValueError(f"status {status}")
        if status < 200:  # a hint before the answer
            self.reason, self.headers = b"", []
            return
        framed = False
        for name, value in self.headers:
            if name == b"transfer-encoding" and value.lower() != b"chunked":
                raise ValueError("a transfer-encoding that was not asked for")
            framed = framed or name in (b"transfer-encoding", b"content-length")
        self.status = status
        self._keep = self._parser.should_keep_alive()
        self._until_closed = not framed
        if self._is_head:
            self._complete, self._keep = True, False  # the parser waits for a body

    def on_body(self, data: bytes) -> None:
        self._pieces.append(data)
        self._framing = 0

    def on_message_complete(self) -> None:
        if self.status:
            self._complete = True


@types.coroutine
def _rest_of(steps: Generator[Any, Any, None], waits_for: Any) -> Generator[Any, Any, None]:
    """What is left of an awaitable whose first step, outside of a task, said what it waits for."""
    with contextlib.suppress(StopIteration):
        while True:
            try:
                value = yield waits_for
            except BaseException as error:  # the task is cancelled, for one
                waits_for = steps.throw(error)
            else:
                waits_for = steps.send(value)


class Pool:
    """This process's connections to all replicas. Those at rest are used again, the last first.

    Must be made and used in one event loop.
    """

    def __init__(self, connect_timeout_s: float, silence_timeout_s: float | None) -> None:
        self.silence_timeout_s = silence_timeout_s
        self._connect_timeout_s = connect_timeout_s
        self._open: set[Connection] = set()
        self._resting: dict[Address, dict[Connection, None]] = {}  # each a stack, without gaps

    async def ask(
        self, host: str, port: int, method: str, target: str, headers: Headers, body: bytes
    ) -> Connection:
        """Send a request; return its connection when the head of the answer has come.

        ``target`` and ``headers`` go out as they are, between a ``Host`` and a ``Content-Length``.

        Raises:
            UpstreamError: no head came.
        """
        if connection := self._rested((host, port)):
            try:
                await connection.ask(method, target, headers, body)
                return connection
            except Lost:
                # The replica may have closed it just when the request went out.
                if connection.heard or method not in _IDEMPOTENT:
                    raise
        connection = await self._connect((host, port))
        await connection.ask(method, target, headers, body)
        return connection

    def close(self) -> None:
        """Close all connections at once."""
        for connection in list(self._open):
            connection.close()

    def rest(self, connection: Connection) -> None:
        self._resting.setdefault(connection.address, {})[connection] = None

    def forget(self, connection: Connection) -> None:
        self._open.discard(connection)
        resting = self._resting.get(connection.address)
        if resting is not None:
            resting.pop(connection, None)
            if not resting:
                del self._resting[connection.address]

    def _rested(self, address: Address) -> Connection | None:
        resting = self._resting.get(address)
        while resting:
            connection, _ = resting.popitem()
            if not connection.closing:
                return connection
        return None

    async def _connect(self, address: Address) -> Connection:
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                made = _probed_socket(address[0])
                try:
                    loop = asyncio.get_running_loop()
                    await loop.sock_connect(made, address)
                    _, connection = await loop.create_connection(
                        lambda: Connection(self, address), sock=made
                    )
                except BaseException:
                    made.close()
                    raise
        except (OSError, TimeoutError) as error:
            raise NoConnection(str(error) or "no answer to a connection") from error
        self._open.add(connection)
        return connection


def _probed_socket(host: str) -> socket.socket:
    """A socket whose connection fails after the other node's kernel was silent for 25 s.

    A node that loses its power or network closes no connection, so a request to it would wait for
    ever. TCP keep-alive probes find it: the kernel of a live node answers them even while its
    engine is silent. A process that reads nothing for as long while a body fills its window counts
    as lost too; it cannot have begun with a request that it has not read.
    """
    made = socket.socket(addresses.family(host))
    made.setblocking(False)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    # The same for data not yet acknowledged: while there is some, no probes are sent.
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 25_000)
    return made
