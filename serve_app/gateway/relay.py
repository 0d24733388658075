"""Relays one request to one front end of a replica, and the answer back, as bytes.

The relay does not decode, batch or encode again. The client gets the replica's chunks as they
come, as fast as it takes them. Event streams are cut after whole events only, so that a replica
that dies within an event leaves the client no half of it.
"""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import aiohttp
from yarl import URL

from serve_app.cluster.credential import ASLEEP_HEADER, CREDENTIAL_HEADER
from serve_app.gateway.errors import GatewayError
from serve_app.gateway.replicas import FrontEnd

logger = logging.getLogger("ray.serve")

Headers = list[tuple[bytes, bytes]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# Hop-by-hop headers (RFC 9110 §7.6.1), and those that the HTTP library on either side sets.
_HOP_BY_HOP = {
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization",
    b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade",
}  # fmt: skip
_NOT_TO_REPLICA = _HOP_BY_HOP | {b"host", b"content-length", b"expect", CREDENTIAL_HEADER,
                                 b"authorization", b"x-request-id",
                                 # With it vLLM adds the engine's load to its answer's headers.
                                 b"endpoint-load-metrics-format"}  # fmt: skip
# Serve sets these on every answer itself.
_NOT_TO_CLIENT = _HOP_BY_HOP | {b"date", b"server", b"x-request-id", CREDENTIAL_HEADER,
                                # No route redirects; a replica's address is not for clients.
                                b"location"}  # fmt: skip
# The gateway decides which origins are allowed (cors_allow_origins); vLLM allows all.
_CORS = b"access-control-"


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

    @property
    def target(self) -> str:
        """Path and query, as a replica gets them: it sees the path that was checked, no other."""
        query = f"?{self.query.decode('latin-1')}" if self.query else ""
        return quote(self.path) + query


class Answer:
    """The answer on its way to the client, and how far it has come."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.started_at: float | None = None
        """``time.perf_counter`` at the first byte; None before it."""

        self.cut = False
        """Whether the replica was lost after a part of its answer had been sent."""

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Hand one ASGI message to the server; return when the client can take more."""
        if self.started_at is None:
            self.started_at = time.perf_counter()
        await self._send(message)


class NotStarted(Exception):
    """The replica failed before the first byte of its answer; another one may be tried."""


class Asleep(NotStarted):
    """The replica refused the request because it was put to sleep. It has not failed."""


class Relay:
    """This gateway's pool of HTTP connections to all replicas."""

    def __init__(
        self, credential: bytes, connect_timeout_s: float, silence_timeout_s: float | None
    ) -> None:
        self._credential = credential.decode()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0, keepalive_timeout=300, socket_factory=_probed_socket
            ),
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=connect_timeout_s, sock_read=silence_timeout_s
            ),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            # A slow client makes the gateway hold at most two of these buffers.
            read_bufsize=2**16,
            # A replica may repeat a client's header in its answer. A header that aiohttp does not
            # accept would count as the replica's failure.
            max_line_size=2**17,
            max_field_size=2**17,
        )

    async def close(self) -> None:
        await self._session.close()

    async def send(self, front_end: FrontEnd, request: Request, answer: Answer) -> int:
        """Send the request to ``front_end`` and its answer to ``answer``; return the status.

        The answer's head is held back until the first byte of the body has come. Until then the
        request can still go to another replica.

        Raises:
            NotStarted: no byte of an answer came.
            GatewayError: 504 for a replica that stays silent; 502 for one that is lost within an
                answer that cannot end with an error event.
        """
        events: _Events | None = None
        begun = b""
        front_end.began()
        try:
            async with self._session.request(
                request.method,
                URL(front_end.base_url + request.target, encoded=True),
                headers=_to_replica(request, self._credential),
                data=request.body or None,
                allow_redirects=False,
            ) as response:
                if ASLEEP_HEADER.decode() in response.headers:
                    raise Asleep("asleep")
                if not 200 <= response.status < 600:
                    raise NotStarted(f"status {response.status}")
                headers = _to_client(response.raw_headers)
                if "content-encoding" in response.headers:
                    pass  # compressed: relayed as it is
                elif response.content_type == "text/event-stream":
                    events = _Events()
                    # The stream may end with the gateway's error event, which this length lacks.
                    headers = [(k, v) for k, v in headers if k != b"content-length"]
                elif response.status >= 400:
                    begun = await _up_to(_MAX_ERROR, response.content)
                    if response.content.at_eof():
                        await _send_error(response, begun, headers, request, answer)
                        return response.status
                head = {
                    "type": "http.response.start",
                    "status": response.status,
                    "headers": headers,
                }
                if begun:
                    await answer.send(head)
                    await answer.send(_body(begun, more=True))
                async for chunk in response.content.iter_any():
                    if events is not None and not (chunk := events.take(chunk)):
                        continue
                    if answer.started_at is None:
                        await answer.send(head)
                    await answer.send(_body(chunk, more=True))
                if answer.started_at is None:
                    await answer.send(head)
                await answer.send(_body(bytes(events.held) if events else b"", more=False))
                return response.status
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
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
        finally:
            front_end.ended()


def _probed_socket(address: Any) -> socket.socket:
    """A socket whose connection fails after the other node's kernel was silent for 25 s.

    A node that loses its power or network closes no connection, so a request to it would wait for
    ever. TCP keep-alive probes find it: the kernel of a live node answers them even while its
    engine is silent.
    """
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    # The same for data not yet acknowledged: while there is some, no probes are sent.
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 25_000)
    return made


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


_MAX_ERROR = 2**20
"""Bytes up to which a replica's error is held. vLLM repeats wrong input many times in its error, so
a client decides how long that is. A longer one is relayed as it is."""


async def _up_to(limit: int, content: aiohttp.StreamReader) -> bytes:
    """Read until the end, or until a little over ``limit`` bytes have come."""
    read = bytearray()
    while len(read) <= limit and (chunk := await content.readany()):
        read += chunk
    return bytes(read)


async def _send_error(
    response: aiohttp.ClientResponse,
    body: bytes,
    headers: Headers,
    request: Request,
    answer: Answer,
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
        kind = "invalid_request_error" if response.status < 500 else "server_error"
        message = f"{text or response.reason} ({request.method} {request.path[:200]})"
        body = GatewayError(response.status, message, kind).body(request.path)
    elif request.path.startswith("/v1/messages") and "type" not in shown:
        body = json.dumps({"type": "error", **shown}).encode()
    if body is not sent:
        replaced = (b"content-length", b"content-type", b"content-encoding")
        headers = [(k, v) for k, v in headers if k not in replaced]
        headers.append((b"content-type", b"application/json"))
        headers.append((b"content-length", b"%d" % len(body)))
    await answer.send(
        {"type": "http.response.start", "status": response.status, "headers": headers}
    )
    await answer.send(_body(body, more=False))


def _body(chunk: bytes, *, more: bool) -> dict[str, Any]:
    return {"type": "http.response.body", "body": chunk, "more_body": more}


def _lost() -> GatewayError:
    return GatewayError(
        502,
        "The replica that was answering failed in the middle; please send the request again.",
        "server_error",
        code="replica_lost",
    )


def _before_first_byte(error: Exception) -> NotStarted | GatewayError:
    """The error to raise for a failure before the client got a byte."""
    if isinstance(error, aiohttp.ServerTimeoutError) and not isinstance(
        error, aiohttp.ConnectionTimeoutError
    ):
        # The replica works on the request. A second replica would do the same work again.
        return GatewayError(
            504,
            "The model took longer than the gateway's request_timeout_s to answer.",
            "server_error",
            code="timeout",
        )
    if isinstance(error, (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)):
        return NotStarted("no connection")
    return NotStarted("connection closed")


def _to_replica(request: Request, credential: str) -> list[tuple[str, str]]:
    drop = _NOT_TO_REPLICA | _named_by_connection(request.headers)
    # aiohttp writes headers as UTF-8; this decoding preserves their bytes.
    kept = [
        (k.decode("latin-1"), v.decode("utf-8", "replace"))
        for k, v in request.headers
        if k not in drop
    ]
    kept.append((CREDENTIAL_HEADER.decode(), credential))
    kept.append(("x-request-id", request.id))
    return kept


def _to_client(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    kept = [(k.lower(), v) for k, v in headers]
    drop = _NOT_TO_CLIENT | _named_by_connection(kept)
    return [(k, v) for k, v in kept if k not in drop and not k.startswith(_CORS)]


def _named_by_connection(headers: Headers) -> set[bytes]:
    """Headers that a ``Connection`` header declares to be hop-by-hop."""
    return {
        name.strip().lower() for k, v in headers if k == b"connection" for name in v.split(b",")
    }
