"""Middleware before Serve's own HTTP code, in its proxies and at the gateway's HTTP port.

Serve decodes some headers as UTF-8 (``ray/serve/_private/proxy.py`` in
``setup_request_context_and_handle``, ``replica.py`` in ``_direct_ingress_asgi``), and answers a
plain 500 where one is not UTF-8. It also shows its routes to everyone, at ``/-/routes``. Neither
request reaches the gateway. By other headers a client decides what is the operator's to decide. And
uvicorn reads a head of any size. A WebSocket to one of Serve's routes is a plain 500, too.
"""

from __future__ import annotations

from typing import Any

from starlette.middleware import Middleware
from starlette.responses import Response

from serve_app.gateway.errors import GatewayError


def middlewares() -> list[Middleware]:
    """Called by Serve in each process that has an HTTP port for clients.

    :func:`serve_app.config.environment.front` sets the variable that names this function.
    """
    return [Middleware(Front)]


_NOT_FOR_SERVE = {
    # Serve would not say that the client has left: an engine would generate for nobody.
    b"x-request-disconnect-disabled",
    # Serve would cut a stream after so many seconds without an error event, or lift its own limit.
    b"x-request-timeout-seconds",
}

_MAX_HEAD = 2**16
"""Bytes of all headers together. Proxy, gateway and replica each hold a copy of them."""


class Front:
    """ASGI middleware: makes headers decodable for Serve, and hides Serve's routes."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and (error := _refusal(scope)):
            answer = Response(error.body(), error.status, media_type="application/json")
            await answer(scope, receive, send)
            return
        if scope["type"] == "websocket" and _path(scope).startswith("/-/"):
            await refuse_websocket(scope, receive, send)
            return
        headers = scope.get("headers", ())
        if any(name in _NOT_FOR_SERVE or not value.isascii() for name, value in headers):
            readable = [
                (name, value.decode("utf-8", "replace").encode())
                for name, value in headers
                if name not in _NOT_FOR_SERVE
            ]
            scope = {**scope, "headers": readable}
        await self._app(scope, receive, send)


async def refuse_websocket(scope: Any, receive: Any, send: Any) -> None:
    """Answer a WebSocket's handshake with an error, where the server can send one."""
    await receive()  # websocket.connect
    if "websocket.http.response" not in (scope.get("extensions") or {}):
        await send({"type": "websocket.close", "code": 1008})  # servers make a bare 403 of it
        return
    error = GatewayError(
        403,
        "The gateway does not relay WebSockets; use the model's HTTP routes.",
        "invalid_request_error",
        code="websocket_not_supported",
    )
    answer = Response(error.body(_path(scope)), error.status, media_type="application/json")
    await answer(scope, receive, send)


def _path(scope: Any) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _refusal(scope: Any) -> GatewayError | None:
    path = _path(scope)
    if path == "/-/routes" or not path.startswith("/"):  # "*": Serve would name its routes
        return GatewayError(
            404,
            f"There is no route {path[:200]} for clients; GET /v1/models lists the models.",
            "invalid_request_error",
            code="not_found",
        )
    if sum(len(name) + len(value) for name, value in scope.get("headers", ())) > _MAX_HEAD:
        return GatewayError(
            431,
            f"The headers are larger than {_MAX_HEAD // 2**10} KiB; send less in them.",
            "invalid_request_error",
            code="headers_too_large",
        )
    return None
