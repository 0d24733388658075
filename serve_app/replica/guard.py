"""Lets only the gateway's requests reach a front end, and only while the replica can serve them.

It meters them, and answers the gateways' exchange (:mod:`serve_app.cluster.exchange`) by itself.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocketClose

from serve_app.cluster.credential import ASLEEP_HEADER, CREDENTIAL_HEADER
from serve_app.cluster.exchange import CALL_HEADER, PATH, PROMPT_HEADER, Called, Question
from serve_app.errors import envelope
from serve_app.replica import meter
from serve_app.replica.meter import Meter
from serve_app.replica.reports import Reports

_NOT_THE_GATEWAY = envelope(
    "This port belongs to the gateway; send requests there.",
    "authentication_error",
    code="invalid_internal_credential",
)
METRICS = "/metrics"
"""It needs no engine: a sleeping replica answers it, and one that drains does not wait for it."""

# An engine that sleeps would keep the request until somebody wakes it.
_ASLEEP = envelope("This replica is asleep.", "server_error", code="model_asleep")


class Guard:
    """ASGI middleware around the whole app: checks the credential, refuses, counts requests."""

    def __init__(
        self,
        app: ASGIApp,
        credential: bytes,
        reports: Reports,
        dead: Callable[[], bool],
        asleep: Callable[[], bool],
    ) -> None:
        self._app = app
        self._credential = credential
        self._reports = reports
        self._dead = dead
        self._asleep = asleep
        self.running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        given = called = prompt = b""
        for name, value in scope["headers"]:
            if name == CREDENTIAL_HEADER:
                given = value
            elif name == CALL_HEADER:
                called = value
            elif name == PROMPT_HEADER:
                prompt = value
        if not hmac.compare_digest(given, self._credential):
            await _refusal(scope, 401, _NOT_THE_GATEWAY)(scope, receive, send)
            return
        if scope["type"] == "http" and scope["path"] == PATH:
            await self._exchange(scope, receive, send)
            return
        if scope["type"] == "http" and scope["path"] == METRICS:
            await self._app(scope, receive, send)
            return
        if self._asleep():
            marked = {ASLEEP_HEADER.decode(): "1"}
            await _refusal(scope, 503, _ASLEEP, marked)(scope, receive, send)
            return

        async def send_unless_dead(message: Message) -> None:
            # With a dead engine vLLM answers 500, or an error event within a stream. This process
            # is about to exit. Until then it sends nothing, so that the gateway can give requests
            # without a first byte to another replica.
            if self._dead():
                await asyncio.Event().wait()
            await send(message)

        metered = Meter(Called.read(called), self._reports) if called else None
        meter.current.set(metered)
        if metered and prompt:
            self._reports.sent(metered.called.gateway, prompt.decode("ascii"))
        self.running += 1
        try:
            await self._app(scope, receive, send_unless_dead)
        finally:
            self.running -= 1
            if metered:
                metered.answered()

    async def _exchange(self, scope: Scope, receive: Receive, send: Send) -> None:
        question = Question.decode(await Request(scope, receive).body())
        answer = await self._reports.answer(question)
        await Response(answer.encode(), media_type="application/json")(scope, receive, send)


def _refusal(
    scope: Scope, status: int, error: dict[str, Any], headers: dict[str, str] | None = None
) -> ASGIApp:
    if scope["type"] == "websocket":
        return WebSocketClose(1008)
    return JSONResponse(error, status, headers)
