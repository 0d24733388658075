"""Middleware before Serve's own HTTP code, in its proxies and at the gateway's HTTP port.

Serve decodes some headers as UTF-8 (``ray/serve/_private/proxy.py`` in
``setup_request_context_and_handle``, ``replica.py`` in ``_direct_ingress_asgi``), and answers a
plain 500 where one is not UTF-8. It also shows its routes to everyone, at ``/-/routes``. Neither
request reaches the gateway. By another header a client keeps Serve from saying that it has left.
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


# With it Serve does not say that the client has left: an engine would generate for nobody.
_DISCONNECT_DISABLED = b"x-request-disconnect-disabled"


class Front:
    """ASGI middleware: makes headers decodable for Serve, and hides Serve's routes."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and _is_routes(scope):
            error = GatewayError(
                404,
                "There is no route /-/routes for clients; GET /v1/models lists the models.",
                "invalid_request_error",
                code="not_found",
            )
            answer = Response(error.body(), error.status, media_type="application/json")
            await answer(scope, receive, send)
            return
        headers = scope.get("headers", ())
        if any(name == _DISCONNECT_DISABLED or not value.isascii() for name, value in headers):
            readable = [
                (name, value.decode("utf-8", "replace").encode())
                for name, value in headers
                if name != _DISCONNECT_DISABLED
            ]
            scope = {**scope, "headers": readable}
        await self._app(scope, receive, send)


def _is_routes(scope: Any) -> bool:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "")) == "/-/routes"
