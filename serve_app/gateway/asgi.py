"""The gateway's ASGI app: tells own routes from relayed ones, and answers every request, if need
be with an error."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import quote

import fastapi
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match

from serve_app.config.settings import GatewayConfig
from serve_app.gateway import api, models, routes, stages
from serve_app.gateway import body as request_body
from serve_app.gateway.cold_start import ColdStartQueue
from serve_app.gateway.directory import Directory
from serve_app.gateway.dispatch import Dispatcher
from serve_app.gateway.errors import GatewayError
from serve_app.gateway.metrics import Metrics
from serve_app.gateway.policy import FewestRequests, Policy
from serve_app.gateway.relay import Answer, Headers, Relay, Request, Send
from serve_app.gateway.replicas import Board
from serve_app.gateway.stages import Call, Stage
from serve_app.gateway.stored_responses import StoredResponses

logger = logging.getLogger("ray.serve")

Receive = Callable[[], Awaitable[Any]]

# Some clients send the charset as the content-encoding, or an empty one.
_UNCOMPRESSED = (b"", b"identity", b"utf-8", b"utf8")


def build(
    config: GatewayConfig,
    directory: Directory,
    board: Board,
    relay: Relay,
    *,
    stages: Sequence[Stage] = (),
    policy: Policy | None = None,
) -> Any:
    """The whole ASGI app: the gateway, inside a CORS middleware if any origin is allowed.

    ``stages`` run inside the metrics stage, so that their time and refusals are counted too.
    """
    queue = ColdStartQueue(directory, board, config.cold_start_timeout_s)
    stored = StoredResponses(board, policy or FewestRequests())
    dispatcher = Dispatcher(board, queue, stored, relay)
    own = api.build(directory, board, _error_of_own_route)
    gateway = Gateway(config, directory, own, dispatcher, stored, (Metrics(), stored, *stages))
    if not config.cors_allow_origins:
        return gateway
    return CORSMiddleware(
        gateway,
        allow_origins=config.cors_allow_origins,
        allow_methods=("GET", "HEAD", "POST"),
        allow_headers=["*"],
        expose_headers=["x-request-id"],
    )


class Gateway:
    """Answers the gateway's own routes, and relays each other request to the model it names."""

    def __init__(
        self,
        config: GatewayConfig,
        directory: Directory,
        own: fastapi.FastAPI,
        dispatcher: Dispatcher,
        stored: StoredResponses,
        stages: Sequence[Stage],
    ) -> None:
        self._directory = directory
        self._own = own
        self._send = dispatcher.send
        self._stored = stored
        self._stages = stages
        self._bodies = request_body.Bodies(
            int(config.max_body_mib * 2**20),
            int(config.max_bodies_mib * 2**20),
            config.body_timeout_s,
        )

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await _refuse_websocket(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        path, raw_path = _below_root_path(scope)
        # Serve makes an id where the client sent none, and puts it on the answer.
        headers = dict(scope["headers"])
        request_id = (
            headers.get(b"x-request-id", b"").decode("utf-8", "replace") or uuid.uuid4().hex
        )
        answer = Answer(send)
        try:
            methods = routes.methods_of(path)
            if methods and not (
                path == "/version" and b"model=" not in scope.get("query_string", b"")
            ):
                if scope["method"] not in methods:
                    raise routes.not_allowed(scope["method"], path, methods)
                await self._relay(scope, path, raw_path, headers, request_id, receive, answer)
            else:
                await self._answer_own(scope, path, receive, answer)
        except GatewayError as error:
            if answer.started_at is not None:
                raise  # the server then closes the connection, the only signal left
            await _send_error(answer, error, path)
        except Exception:
            if answer.started_at is not None:
                raise
            logger.exception(f"request {request_id}: unexpected error in the gateway")
            await _send_error(answer, _failure(), path)

    async def _answer_own(self, scope: Any, path: str, receive: Receive, answer: Answer) -> None:
        method = scope["method"]
        # The server leaves out the body of an answer to HEAD.
        as_get = {**scope, "method": "GET"}
        if all(route.matches(as_get)[0] is Match.NONE for route in self._own.routes):
            raise routes.no_route(method, path)
        if method not in ("GET", "HEAD"):
            raise routes.not_allowed(method, path, ["GET", "HEAD"])
        await self._own(as_get, receive, answer.send)

    async def _relay(
        self,
        scope: Any,
        path: str,
        raw_path: bytes,
        headers: dict[bytes, bytes],
        request_id: str,
        receive: Receive,
        answer: Answer,
    ) -> None:
        if headers.get(b"content-encoding", b"").strip().lower() not in _UNCOMPRESSED:
            raise GatewayError(
                415,
                "The request body is compressed; send it without a content-encoding.",
                "invalid_request_error",
                code="unsupported_content_encoding",
            )
        async with self._bodies.read(receive, headers.get(b"content-length")) as body:
            query = scope.get("query_string", b"")
            id = self._stored.model_in(path)
            id = id or request_body.model_in(headers.get(b"content-type", b""), query, body)
            model = models.find(self._directory, id)
            request = _request(scope, raw_path or quote(path).encode(), request_id, body)
            call = Call(request, model, caller=None, arrived=time.perf_counter())
            await stages.run(
                self._stages, call, answer, lambda call, so_far: self._send(call, answer, so_far)
            )


def _request(scope: Any, raw_path: bytes, request_id: str, body: bytes) -> Request:
    target = raw_path.decode("latin-1")
    if query := scope.get("query_string"):
        target += "?" + query.decode("latin-1")
    return Request(
        id=request_id,
        method=scope["method"],
        target=target,
        headers=scope["headers"],
        body=body,
        root_path=scope.get("root_path", "").rstrip("/"),
    )


def _below_root_path(scope: Any) -> tuple[str, bytes]:
    """The path without ``http_options.root_path``, decoded and raw, as FastAPI's routes see it.

    The server puts the root path before the path that a proxy has passed on.
    """
    root, path, raw = scope.get("root_path", ""), scope["path"], scope.get("raw_path") or b""
    below = path.removeprefix(root)
    if below == path or not below.startswith("/"):
        return path, raw
    return below, raw.removeprefix(root.encode()) if raw.startswith(root.encode()) else b""


async def _error_of_own_route(request: fastapi.Request, error: Exception) -> fastapi.Response:
    """Make FastAPI's answer to a :class:`GatewayError`; raise any other error again."""
    said = error if isinstance(error, GatewayError) else _failure()
    return fastapi.Response(said.body(), said.status, media_type="application/json")


def _failure() -> GatewayError:
    return GatewayError(500, "The gateway failed on this request.", "server_error")


async def _send_error(answer: Answer, error: GatewayError, path: str, kind: str = "http") -> None:
    body = error.body(path)
    headers: Headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        *error.headers,
    ]
    start = {"type": f"{kind}.response.start", "status": error.status, "headers": headers}
    await answer.send(start)
    await answer.send({"type": f"{kind}.response.body", "body": body})


async def _refuse_websocket(scope: Any, receive: Receive, send: Send) -> None:
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
    await _send_error(Answer(send), error, _below_root_path(scope)[0], "websocket.http")
