"""The gateway's ASGI app: its own few routes, and the way of every other request."""

from __future__ import annotations

import json
import logging
import os
import posixpath
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import quote

from starlette.middleware.cors import CORSMiddleware

from serve_app.config.document import RUN_ID
from serve_app.config.settings import GatewayConfig
from serve_app.gateway import body as request_body
from serve_app.gateway import models, stages
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
from serve_app.gateway.versions import versions

logger = logging.getLogger("ray.serve")

Receive = Callable[[], Awaitable[Any]]

_METHODS = ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")

# Routes of vLLM that act on the engine or show its inside: for operators, never for clients.
_CLOSED = re.compile(
    r"^/(metrics.*|load|ping|server_info|sleep|wake_up|is_sleeping|pause|resume|is_paused"
    r"|abort_requests|reset_\w+_cache|collective_rpc|start_profile|stop_profile"
    r"|scale_elastic_ep|is_scaling_elastic_ep|fault_tolerance|adapters|docs|redoc|openapi\.json"
    r"|v1/(un)?load_lora_adapter|(\w+_)?weights?(_\w+)?|get_world_size)(/|$)"
)

# Some clients send the charset as the content-encoding, or an empty one.
_UNCOMPRESSED = (b"", b"identity", b"utf-8", b"utf8")

# Clients write these without /v1, or with more before it, when their base URL is wrong.
_UNDER_V1 = {
    "audio/transcriptions", "audio/translations", "chat/completions", "completions", "embeddings",
    "messages", "models", "responses",
}  # fmt: skip


def build(
    config: GatewayConfig,
    directory: Directory,
    board: Board,
    relay: Relay,
    *,
    stages: Sequence[Stage] = (),
    policy: Policy | None = None,
) -> Any:
    """The whole ASGI app: the gateway, and around it what web pages need if any may ask.

    ``stages`` come after what measures every call, so that it measures them too.
    """
    queue = ColdStartQueue(directory, board, config.cold_start_timeout_s)
    stored = StoredResponses(board, policy or FewestRequests())
    dispatcher = Dispatcher(board, queue, stored, relay)
    gateway = Gateway(config, directory, board, dispatcher, stored, (Metrics(), stored, *stages))
    if not config.cors_allow_origins:
        return gateway
    return CORSMiddleware(
        gateway,
        allow_origins=config.cors_allow_origins,
        allow_methods=_METHODS,
        allow_headers=["*"],
        expose_headers=["x-request-id"],
    )


class Gateway:
    """Routes each request to the model it names."""

    def __init__(
        self,
        config: GatewayConfig,
        directory: Directory,
        board: Board,
        dispatcher: Dispatcher,
        stored: StoredResponses,
        stages: Sequence[Stage],
    ) -> None:
        self._board = board
        self._directory = directory
        self._send = dispatcher.send
        self._stored = stored
        self._stages = stages
        self._bodies = request_body.Bodies(
            int(config.max_body_mib * 2**20),
            int(config.max_bodies_mib * 2**20),
            config.body_timeout_s,
        )

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            scope = _below_root_path(scope)
        if scope["type"] == "websocket":
            await _refuse_websocket(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        named = dict(scope["headers"])
        # Serve makes one where the client sent none, and puts it on the answer.
        request_id = named.get(b"x-request-id", b"").decode("utf-8", "replace") or uuid.uuid4().hex
        answer = Answer(send)
        try:
            await self._answer(scope, receive, named, request_id, answer)
        except GatewayError as error:
            if answer.started_at is not None:
                raise  # the server then closes the connection: all that is left to say
            await _send_error(answer, error, scope["path"])
        except Exception:
            if answer.started_at is not None:
                raise
            logger.exception(f"request {request_id}: unexpected error in the gateway")
            failure = GatewayError(500, "The gateway failed on this request.", "server_error")
            await _send_error(answer, failure, scope["path"])

    async def _answer(
        self,
        scope: Any,
        receive: Receive,
        headers: dict[bytes, bytes],
        request_id: str,
        answer: Answer,
    ) -> None:
        method, path = scope["method"], scope["path"]
        if method not in _METHODS:
            raise GatewayError(
                405,
                f"The method {method[:20]} is not allowed here.",
                "invalid_request_error",
                code="method_not_allowed",
                headers={"allow": ", ".join(_METHODS)},
            )
        if method in ("GET", "HEAD"):
            own = self._own_route(path, scope.get("query_string", b""))
            if own is not None:
                await _send_json(answer, *own)
                return
        if not path.startswith("/") or _is_closed(path) or route_meant(path):
            raise _no_route(method, path)
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
            if id is None and not body and method in ("GET", "HEAD") and b"model=" not in query:
                raise _no_route(method, path)
            id = id or request_body.model_in(headers.get(b"content-type", b""), query, body)
            model = models.find(self._directory, id)
            target = (scope.get("raw_path") or quote(path).encode()).decode("latin-1")
            if query:
                target += "?" + query.decode("latin-1")
            root_path = scope.get("root_path", "").rstrip("/")
            request = Request(request_id, method, target, scope["headers"], body, root_path)
            call = Call(request, model, caller=None, arrived=time.perf_counter())
            await stages.run(
                self._stages, call, answer, lambda call, so_far: self._send(call, answer, so_far)
            )

    def _own_route(self, path: str, query: bytes) -> tuple[int, dict[str, Any]] | None:
        """Status and body of a route that the gateway answers by itself."""
        if path == "/health":
            return 200, {"status": "ok"}
        if path == "/version" and b"model=" not in query:
            return 200, versions()
        if path == "/ready":
            return self._ready()
        if path.rstrip("/") == "/v1/models":
            data = [self._card(id) for id in self._directory.ids()]
            return 200, {"object": "list", "data": data}
        if path.startswith("/v1/models/"):
            id = path.removeprefix("/v1/models/")
            models.find(self._directory, id)
            return 200, self._card(id)
        return None

    def _ready(self) -> tuple[int, dict[str, Any]]:
        models = self._directory.models()
        waiting_for = [m.name for m in models if m.must_be_up and not m.up]
        ready = bool(models) and not waiting_for
        run = os.environ.get(RUN_ID)
        report: dict[str, Any] = {"run": run} if run else {}
        return 200 if ready else 503, report | {
            "status": "ready" if ready else "not ready",
            "waiting_for": waiting_for,
            "models": {
                m.name: {
                    "status": m.status,
                    "replicas": m.replicas,
                    "message": m.message,
                    "starting": self._directory.starting(m),
                }
                for m in models
            },
        }

    def _card(self, id: str) -> dict[str, Any]:
        model = self._directory.find(id)
        assert model is not None
        return {
            "id": id,
            "object": "model",
            "created": model.created,
            "owned_by": "serve_app",
            "root": model.root,
            "parent": model.name if id in model.adapters else None,
            "max_model_len": model.max_model_len or self._board.max_model_len.get(model.name),
            "permission": [],
        }


def _below_root_path(scope: Any) -> Any:
    """The scope with the path as the client's proxy passed it on, as FastAPI's routes see it.

    The server puts ``http_options.root_path`` before each path.
    """
    root, path = scope.get("root_path", ""), scope["path"]
    below = path.removeprefix(root)
    if below == path or not below.startswith("/"):
        return scope
    raw = scope.get("raw_path") or b""
    raw_below = raw.removeprefix(root.encode()) if raw.startswith(root.encode()) else b""
    return {**scope, "path": below, "raw_path": raw_below}


def _is_closed(path: str) -> bool:
    """Whether it leads to a closed route as it is, or would if someone tidied it up."""
    tidy = posixpath.normpath("/" + path.lstrip("/"))
    return bool(_CLOSED.match(path) or _CLOSED.match(tidy))


def route_meant(path: str) -> str | None:
    """The OpenAI route that was meant, where its ``/v1`` is missing or not all of the path's start.

    One slash too many at the end is FastAPI's to mend, by a redirect.
    """
    tidy = "/" + "/".join(part for part in path.split("/") if part)
    route = tidy.rpartition("/v1/")[2].lstrip("/")
    if route not in _UNDER_V1 and not route.startswith("models/"):
        return None
    meant = "/v1/" + route
    return meant if meant != path.rstrip("/") else None


def _no_route(method: str, path: str) -> GatewayError:
    meant = route_meant(path)
    hint = (
        f"; did you mean {meant[:200]}?"
        if meant
        else ". A request without a body names its model as '?model=<id>'."
    )
    return GatewayError(
        404,
        f"There is no route {method} {path[:200]}{hint}",
        "invalid_request_error",
        code="not_found",
    )


async def _send_json(answer: Answer, status: int, body: dict[str, Any]) -> None:
    await _send_bytes(answer, status, json.dumps(body).encode(), [])


async def _send_error(answer: Answer, error: GatewayError, path: str) -> None:
    await _send_bytes(answer, error.status, error.body(path), error.headers)


async def _send_bytes(
    answer: Answer, status: int, body: bytes, extra: Headers, kind: str = "http"
) -> None:
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        *extra,
    ]
    start = {"type": f"{kind}.response.start", "status": status, "headers": headers}
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
    body = error.body(scope["path"])
    await _send_bytes(Answer(send), error.status, body, [], kind="websocket.http")
