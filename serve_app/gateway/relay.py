"""One request to one replica and its answer back, as bytes.

Nothing is decoded, batched or encoded again: what the replica sends is what the client
gets, chunk by chunk, as fast as the client takes it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

import aiohttp
from yarl import URL

from serve_app.cluster import CREDENTIAL_HEADER
from serve_app.gateway.errors import GatewayError
from serve_app.gateway.replicas import Replica

logger = logging.getLogger("ray.serve")

Headers = list[tuple[bytes, bytes]]
Send = Callable[[Mapping[str, Any]], Awaitable[None]]

# RFC 9110 §7.6.1, and what the HTTP library on either side sets by itself.
_HOP_BY_HOP = {
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization",
    b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade",
}  # fmt: skip
_NOT_TO_REPLICA = _HOP_BY_HOP | {b"host", b"content-length", b"expect", CREDENTIAL_HEADER,
                                 b"authorization", b"x-request-id"}  # fmt: skip
# Serve puts these on every answer itself.
_NOT_TO_CLIENT = _HOP_BY_HOP | {b"date", b"server", b"x-request-id"}


class NotStarted(Exception):
    """The replica failed before it sent a byte of its answer: another one may have it."""


class Relay:
    """The connections of this gateway to all replicas, kept open between requests."""

    def __init__(
        self, credential: bytes, connect_timeout_s: float, silence_timeout_s: float | None
    ) -> None:
        self._credential = credential.decode()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=300),
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=connect_timeout_s, sock_read=silence_timeout_s
            ),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            # Two of these are all that one slow client can make the gateway hold.
            read_bufsize=2**16,
        )

    async def close(self) -> None:
        await self._session.close()

    async def send(
        self,
        replica: Replica,
        method: str,
        target: str,
        headers: Headers,
        body: bytes,
        request_id: str,
        send: Send,
    ) -> int:
        """Send the request to ``replica`` and its answer to ``send``; the status returned.

        The answer's head is held back until its first byte of body is there, so that up to
        then the request can still go to another replica.

        Raises:
            NotStarted: no byte of an answer came.
        """
        started = False
        path = target.partition("?")[0]
        streamed = False
        tail = b""
        replica.inflight += 1
        try:
            async with self._session.request(
                method,
                URL(replica.base_url + target, encoded=True),
                headers=_to_replica(headers, self._credential, request_id),
                data=body or None,
                allow_redirects=False,
            ) as response:
                streamed = response.content_type == "text/event-stream"
                head = {
                    "type": "http.response.start",
                    "status": response.status,
                    "headers": _to_client(response.raw_headers),
                }
                async for chunk in response.content.iter_any():
                    if not started:
                        await send(head)
                        started = True
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                    tail = chunk
                if not started:
                    await send(head)
                    started = True
                await send({"type": "http.response.body", "body": b""})
                return response.status
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            if not started:
                raise NotStarted(_why(error)) from error
            if not streamed:
                # The client was promised a length or a whole document: only a closed
                # connection tells it that this is not it.
                raise
            lost = GatewayError(
                502,
                "The replica that was answering failed in the middle; please send the "
                "request again.",
                "server_error",
                code="replica_lost",
            )
            gap = b"" if tail.endswith(b"\n\n") else b"\n\n"
            await send({"type": "http.response.body", "body": gap + lost.sse_event(path)})
            logger.warning(f"request {request_id}: replica {replica.id} lost mid-answer: {error!r}")
            return lost.status
        finally:
            replica.inflight -= 1


def _why(error: BaseException) -> str:
    if isinstance(error, aiohttp.ClientConnectorError):
        return "it refused the connection"
    if isinstance(error, asyncio.TimeoutError):
        return "it did not answer in time"
    return "it closed the connection"


def _to_replica(headers: Headers, credential: str, request_id: str) -> list[tuple[str, str]]:
    drop = _NOT_TO_REPLICA | _named_by_connection(headers)
    kept = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in headers if k not in drop]
    kept.append((CREDENTIAL_HEADER.decode(), credential))
    kept.append(("x-request-id", request_id))
    return kept


def _to_client(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    kept = [(k.lower(), v) for k, v in headers]
    drop = _NOT_TO_CLIENT | _named_by_connection(kept)
    return [(k, v) for k, v in kept if k not in drop]


def _named_by_connection(headers: Headers) -> set[bytes]:
    """Headers that a ``Connection`` header declares to be hop-by-hop."""
    return {
        name.strip().lower() for k, v in headers if k == b"connection" for name in v.split(b",")
    }
