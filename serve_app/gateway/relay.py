"""Relays one request to one front end of a replica, and the answer back, as bytes.

The relay does not decode, batch or encode again. The client gets the replica's chunks as they
come, as fast as it takes them. Event streams are cut after whole events only, so that a replica
that dies within an event leaves the client no half of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from serve_app.cluster.credential import ASLEEP_HEADER, CREDENTIAL_HEADER
from serve_app.errors import envelope
from serve_app.gateway import errors
from serve_app.gateway.errors import GatewayError, Unavailable
from serve_app.gateway.replicas import FrontEnd
from serve_app.gateway.upstream import (
    Connection,
    Headers,
    NoConnection,
    Pool,
    Sender,
    Silent,
    UpstreamError,
)

logger = logging.getLogger("ray.serve")

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# Hop-by-hop headers (RFC 9110 §7.6.1), and those that the HTTP library on either side sets.
_HOP_BY_HOP = {
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization",
    b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade",
}  # fmt: skip
_NOT_TO_REPLICA = _HOP_BY_HOP | {b"host", b"content-length", b"expect",
                                 b"authorization", b"x-api-key", b"x-request-id",
                                 # Who is served first, and by which rank, is not for clients.
                                 b"x-vllm-priority", b"x-data-parallel-rank",
                                 # With it vLLM adds the engine's load to its answer's headers.
                                 b"endpoint-load-metrics-format"}  # fmt: skip
# Serve sets these on every answer itself.
_NOT_TO_CLIENT = _HOP_BY_HOP | {b"date", b"server", b"x-request-id",
                                # No route redirects; a replica's address is not for clients.
                                b"location"}  # fmt: skip
# The gateway decides which origins are allowed (cors_allow_origins); vLLM allows all.
_CORS = b"access-control-"
_OURS = b"x-serve-app-"
"""Headers between gateway and replicas, which no client may send or see."""


@dataclass(frozen=True)
class Request:
    """A client's whole request, as it will be sent to a replica."""

    id: str
    method: str
    path: str
    """Decoded, as the routes of :mod:`serve_app.gateway.routes` are written."""

    query: bytes
    """Still percent-encoded."""

    headers: Headers
    body: bytes
    ours: Headers = field(default_factory=list)
    """Headers that the gateway adds for the replica."""

    to_fallback: bool = False
    """Whether the client named another model. If this one refuses it, that is no answer."""

    @property
    def target(self) -> str:
        """Path and query, as a replica gets them: it sees the path that was checked, no other."""
        query = f"?{self.query.decode('latin-1')}" if self.query else ""
        return quote(self.path) + query


class Answer:
    """The answer on its way to the client, and how far it has come."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.headers: Headers = []
        """Added to those of the replica, or of the error."""

        self.started_at: float | None = None
        """``time.perf_counter`` at the first byte; None before it. What :meth:`keep_alive` has
        sent is not the answer: until this, another replica can give it."""

        self.cut = False
        """Whether the replica was lost after a part of its answer had been sent."""

        self.asked_at: float | None = None
        """``time.perf_counter`` when the request was written to the replica that answers; None
        before that one has begun to."""

        self.streamed = False
        """Whether the replica's answer is an event stream."""

        self.first_byte: Callable[[], None] = lambda: None
        """Called at that moment."""

        self.by_fallback: Callable[[], None] | None = None
        """The same, while a fallback has the request."""

        self._opened = False
        self._alarm: asyncio.TimerHandle | None = None
        self._speaking: asyncio.Task[None] | None = None

    def keep_alive(self, every_s: float, is_stream: Callable[[], bool]) -> None:
        """Until the answer begins, send a stream's head, and a comment every so often.

        ``is_stream`` is asked after the first ``every_s`` seconds only.
        """

        def ring() -> None:
            if not (self._opened or is_stream()):
                return
            if self._speaking is None or self._speaking.done():  # else the client is slow
                self._speaking = asyncio.create_task(self._speak())
            self.keep_alive(every_s, is_stream)

        self._alarm = asyncio.get_running_loop().call_later(every_s, ring)

    def hush(self) -> None:
        """Send no more comments."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    async def begin(self) -> bool:
        """The answer begins now. Whether it has to be a stream, since its head has been sent."""
        self.hush()
        if self._speaking is not None:
            await self._speaking
        if self.started_at is None:
            self.started_at = time.perf_counter()
            self.first_byte()
            if self.by_fallback:
                self.by_fallback()
        return self._opened

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Hand one ASGI message to the server; return when the client can take more."""
        if self.started_at is None:
            await self.begin()
        if message["type"] == "http.response.start":
            if self._opened:
                return  # the same head has been sent
            message["headers"] = [*message["headers"], *self.headers]
        await self._send(message)

    def send_more(self, data: bytes) -> Awaitable[None]:
        """The same for a part of the body that is neither its first nor its last."""
        return self._send(_body(data, more=True))

    async def _speak(self) -> None:
        with contextlib.suppress(Exception):  # it has gone; whoever answers it hears of that too
            if not self._opened:
                self._opened = True
                headers = _STREAM + self.headers
                await self._send({"type": "http.response.start", "status": 200, "headers": headers})
            await self._send(_body(b": waiting\n\n", more=True))


_STREAM: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
]


class NotStarted(Exception):
    """The replica failed before the first byte of its answer; another one may be tried."""


class Asleep(NotStarted):
    """The replica refused the request because it was put to sleep. It has not failed."""


class Relay:
    """Relays over this gateway's pool of connections to all replicas."""

    def __init__(
        self, credential: bytes, connect_timeout_s: float, silence_timeout_s: float | None
    ) -> None:
        self._credential = credential
        self._pool = Pool(connect_timeout_s, silence_timeout_s)

    def close(self) -> None:
        self._pool.close()

    async def send(self, front_end: FrontEnd, request: Request, answer: Answer) -> int:
        """Send the request to ``front_end`` and its answer to ``answer``; return the status.

        The answer's head is held back until the first byte of the body has come. Until then the
        request can still go to another replica.

        Raises:
            NotStarted: no byte of an answer came.
            Unavailable: a fallback refuses the request.
            GatewayError: 504 for a replica that stays silent; 502 for one that is lost within an
                answer that cannot end with an error event.
        """
        events: _Events | None = None
        begun = b""
        try:
            with await self._pool.ask(
                front_end.host,
                front_end.port,
                request.method,
                request.target,
                _to_replica(request, self._credential),
                request.body,
            ) as upstream:
                kind = dict(upstream.headers)
                if ASLEEP_HEADER in kind:
                    raise Asleep("asleep")
                if not 200 <= upstream.status < 600:
                    raise NotStarted(f"status {upstream.status}")
                if request.to_fallback and 400 <= upstream.status < 500:
                    raise _refused_by_fallback(upstream.status)
                answer.asked_at = upstream.asked_at
                headers = _to_client(upstream.headers)
                if b"content-encoding" in kind:
                    pass  # compressed: relayed as it is
                elif _media_type(kind.get(b"content-type", b"")) == b"text/event-stream":
                    events = _Events()
                    answer.streamed = True
                    # The stream may end with the gateway's error event, which this length lacks.
                    headers = [(k, v) for k, v in headers if k != b"content-length"]
                elif upstream.status >= 400:
                    begun = await _up_to(_MAX_ERROR, upstream)
                    if upstream.ended:
                        await _send_error(upstream, begun, headers, request, answer)
                        return upstream.status
                head = {
                    "type": "http.response.start",
                    "status": upstream.status,
                    "headers": headers,
                }
                while True:
                    # All that waits here goes out at once; nothing waits for more.
                    chunk, begun = begun or await upstream.read(), b""
                    ended = upstream.ended
                    if events is not None:
                        chunk = events.take(chunk) if not ended else events.rest(chunk)
                    if not chunk and not ended:
                        continue
                    if answer.started_at is None:
                        if await answer.begin() and events is None:
                            event = _no_stream(upstream.status).sse_event(request.path)
                            await answer.send(_body(event, more=False))
                            return upstream.status
                        await answer.send(head)
                    await answer.send(_body(chunk, more=not ended))
                    if ended:
                        return upstream.status
                    await upstream.pass_on(events.to(answer) if events else answer.send_more)
        except UpstreamError as error:
            if answer.started_at is None:
                raise _before_first_byte(error) from error
            logger.warning(f"request {request.id}: replica {front_end.id} lost: {error!r}")
            answer.cut = True
            lost = _lost()
            if events is None:
                # The client expects a length or a whole document. Only a closed connection
                # tells it that the answer is incomplete.
                raise lost from error
            gap = b"\n\n" if events.torn else b""
            await answer.send(_body(gap + lost.sse_event(request.path), more=False))
            return lost.status


_EVENT_ENDS = (b"\n\n", b"\n\r\n", b"\r\r")
_MAX_HELD = 2**20


class _Events:
    """Cuts a stream after whole events. vLLM writes whole events, which pass without a copy."""

    def __init__(self) -> None:
        self.held = bytearray()
        """The beginning of an event whose end has not come yet."""

        self.torn = False
        """Whether an event too large to be held was sent on in part."""

    def take(self, chunk: bytes) -> bytes:
        """The bytes that can be sent on after ``chunk`` has come."""
        if not self.held and chunk.endswith(_EVENT_ENDS):
            self.torn = False
            return chunk
        unseen = max(0, len(self.held) - 2)  # an event's end may have begun in the held bytes
        self.held += chunk
        end = max(
            at + len(mark) if (at := self.held.rfind(mark, unseen)) >= 0 else 0
            for mark in _EVENT_ENDS
        )
        if end:
            self.torn = False
        elif len(self.held) > _MAX_HELD:
            self.torn = True
            end = len(self.held)
        whole = bytes(self.held[:end])
        del self.held[:end]
        return whole

    def to(self, answer: Answer) -> Sender:
        """Sends on what can be sent on after a chunk has come."""

        def send(chunk: bytes) -> Awaitable[None] | None:
            whole = self.take(chunk)
            return answer.send_more(whole) if whole else None

        return send

    def rest(self, chunk: bytes) -> bytes:
        """All that is left after the last ``chunk`` has come, whole events or not."""
        return bytes(self.held) + chunk


_MAX_ERROR = 2**20
"""Bytes up to which a replica's error is held. vLLM repeats wrong input many times in its error, so
a client decides how long that is. A longer one is relayed as it is."""


async def _up_to(limit: int, upstream: Connection) -> bytes:
    """Read until the end, or until a little over ``limit`` bytes have come."""
    read = bytearray()
    while len(read) <= limit and not upstream.ended:
        read += await upstream.read()
    return bytes(read)


async def _send_error(
    upstream: Connection, body: bytes, headers: Headers, request: Request, answer: Answer
) -> None:
    """Send the replica's error: unchanged if it has an envelope, else wrapped into one.

    FastAPI answers unknown routes and methods in a shape of its own, and uvicorn in plain text.
    """
    sent = body
    try:
        shown = json.loads(body)
    except (ValueError, RecursionError):
        shown = body.decode("utf-8", "replace")
    if not (isinstance(shown, dict) and "error" in shown):
        text = str((shown.get("detail") if isinstance(shown, dict) else shown) or "")[:2000]
        kind = "invalid_request_error" if upstream.status < 500 else "server_error"
        message = (
            f"{text or upstream.reason.decode('latin-1')} ({request.method} {request.path[:200]})"
        )
        shown = envelope(message, kind)
        body = errors.body(shown, request.path)
    elif request.path.startswith("/v1/messages") and "type" not in shown:
        body = errors.body(shown, request.path)
    if await answer.begin():
        await answer.send(_body(errors.sse_event(shown, request.path), more=False))
        return
    if body is not sent:
        replaced = (b"content-length", b"content-type", b"content-encoding")
        headers = [(k, v) for k, v in headers if k not in replaced]
        headers.append((b"content-type", b"application/json"))
        headers.append((b"content-length", b"%d" % len(body)))
    await answer.send(
        {"type": "http.response.start", "status": upstream.status, "headers": headers}
    )
    await answer.send(_body(body, more=False))


def _body(chunk: bytes, *, more: bool) -> dict[str, Any]:
    return {"type": "http.response.body", "body": chunk, "more_body": more}


def _no_stream(status: int) -> GatewayError:
    return GatewayError(
        502,
        f"The model answered with a document instead of a stream (status {status}); "
        "please send the request without 'stream'.",
        "server_error",
        code="no_stream",
    )


def _refused_by_fallback(status: int) -> Unavailable:
    """Its prompts may be shorter, or it takes no tools: the model that was named might take it."""
    return Unavailable(status, "The fallback refused the request.", "invalid_request_error")


def _lost() -> GatewayError:
    return GatewayError(
        502,
        "The replica that was answering failed in the middle; please send the request again.",
        "server_error",
        code="replica_lost",
    )


def _before_first_byte(error: UpstreamError) -> NotStarted | GatewayError:
    """The error to raise for a failure before the client got a byte."""
    if isinstance(error, Silent):
        # The replica works on the request. A second replica would do the same work again.
        return GatewayError(
            504,
            "The model took longer than the gateway's request_timeout_s to answer.",
            "server_error",
            code="timeout",
        )
    return NotStarted("no connection" if isinstance(error, NoConnection) else "connection closed")


def _to_replica(request: Request, credential: bytes) -> Headers:
    drop = _NOT_TO_REPLICA | _named_by_connection(request.headers)
    kept = [(k, v) for k, v in request.headers if k not in drop and not k.startswith(_OURS)]
    kept.append((CREDENTIAL_HEADER, credential))
    kept.append((b"x-request-id", request.id.encode()))
    kept += request.ours
    return kept


def _to_client(headers: Headers) -> Headers:
    drop = _NOT_TO_CLIENT | _named_by_connection(headers)
    return [(k, v) for k, v in headers if k not in drop and not k.startswith((_CORS, _OURS))]


def _media_type(content_type: bytes) -> bytes:
    return content_type.partition(b";")[0].strip().lower()


def _named_by_connection(headers: Headers) -> set[bytes]:
    """Headers that a ``Connection`` header declares to be hop-by-hop."""
    return {
        name.strip().lower() for k, v in headers if k == b"connection" for name in v.split(b",")
    }
