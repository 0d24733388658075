"""The gateway's ASGI app: its own few routes, and the way of every other request."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import posixpath
import re
import uuid
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import quote

from ray.serve.exceptions import DeploymentUnavailableError
from starlette.middleware.cors import CORSMiddleware

from serve_app.config.document import RUN_ID
from serve_app.config.settings import GatewayConfig
from serve_app.errors import did_you_mean
from serve_app.gateway import body as request_body
from serve_app.gateway.directory import Directory, Model
from serve_app.gateway.errors import GatewayError, unavailable
from serve_app.gateway.metrics import Measured
from serve_app.gateway.relay import Answer, Asleep, Headers, NotStarted, Relay, Request, Send
from serve_app.gateway.replicas import Board, Replica

logger = logging.getLogger("ray.serve")

Receive = Callable[[], Awaitable[Any]]

_LOOK_S = 0.25
"""Seconds between two looks of a request that waits for a replica."""

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


def build(config: GatewayConfig, directory: Directory, board: Board, relay: Relay) -> Any:
    """The whole ASGI app: the gateway, and around it what web pages need if any may ask."""
    gateway = Gateway(config, directory, board, relay)
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
        self, config: GatewayConfig, directory: Directory, board: Board, relay: Relay
    ) -> None:
        self._config = config
        self._board = board
        self._directory = directory
        self._relay = relay
        self._bodies = request_body.Bodies(
            int(config.max_body_mib * 2**20),
            int(config.max_bodies_mib * 2**20),
            config.body_timeout_s,
        )
        self._turn: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        """By model: held by whoever is choosing its replica, which takes long only without one."""

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
            own = self._own_route(path)
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
            if not body and method in ("GET", "HEAD") and b"model=" not in query:
                raise _no_route(method, path)
            model = self._find(
                request_body.model_in(headers.get(b"content-type", b""), query, body)
            )
            target = (scope.get("raw_path") or quote(path).encode()).decode("latin-1")
            if query:
                target += "?" + query.decode("latin-1")
            root_path = scope.get("root_path", "").rstrip("/")
            request = Request(request_id, method, target, scope["headers"], body, root_path)
            with Measured(model.name, answer) as measured:
                measured.code = await self._relay_to(model, request, answer, measured)

    def _own_route(self, path: str) -> tuple[int, dict[str, Any]] | None:
        """Status and body of a route that the gateway answers by itself."""
        if path == "/health":
            return 200, {"status": "ok"}
        if path == "/ready":
            return self._ready()
        if path.rstrip("/") == "/v1/models":
            data = [self._card(id) for id in self._directory.ids()]
            return 200, {"object": "list", "data": data}
        if path.startswith("/v1/models/"):
            id = path.removeprefix("/v1/models/")
            self._find(id)
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

    def _find(self, id: str) -> Model:
        model = self._directory.find(id)
        if model is not None:
            return model
        known = self._directory.ids()
        listed = ", ".join(known[:20]) + (", …" if len(known) > 20 else "")
        hint = did_you_mean(id[:200], known) or "."
        raise GatewayError(
            404,
            f"The model '{id[:200]}' does not exist{hint} Available: {listed or 'none yet'}.",
            "invalid_request_error",
            param="model",
            code="model_not_found",
        )

    async def _relay_to(
        self, model: Model, request: Request, answer: Answer, measured: Measured
    ) -> int:
        """Relay to one replica; where it fails before its first byte, once to another.

        One that sleeps has not failed: then it is the turn of those that are awake.
        """
        failed = False
        while True:
            replica = await self._replica_for(model)
            try:
                return await self._relay.send(replica, request, answer)
            except Asleep:
                self._board.asleep(replica)
                if self._board.all_asleep(model.name):
                    raise GatewayError(
                        503,
                        f"The model '{model.name}' is asleep until its operator wakes it "
                        f"('serve-app admin {model.name} wake').",
                        "server_error",
                        code="model_asleep",
                        headers={"retry-after": "30"},
                    ) from None
            except NotStarted as error:
                logger.warning(f"request {request.id}: {model.name}, replica {replica.id}: {error}")
                self._board.avoid(replica)
                if failed:
                    raise unavailable(
                        f"The model '{model.name}' lost two replicas that had this request; "
                        "please send it again."
                    ) from None
                failed = True
                measured.retried(str(error))

    async def _replica_for(self, model: Model) -> Replica:
        """The replica to send to; requests that wait for one get it in the order they came in."""
        with contextlib.suppress(TimeoutError):
            # A lock is first come, first served, also for those who come while it is passed on.
            async with asyncio.timeout(self._config.cold_start_timeout_s), self._turn[model.name]:
                return self._board.choose(model.name) or await self._wake(model.name)
        latest = self._directory.find(model.name) or model
        doing = [f"{s['phase']} ({s['seconds']} s)" for s in self._directory.starting(latest)]
        raise unavailable(
            f"The model '{model.name}' did not start within "
            f"{self._config.cold_start_timeout_s:g} seconds; "
            + (f"it is {doing[0]}." if doing else "it may still be loading."),
            retry_after_s=30,
        )

    async def _wake(self, name: str) -> Replica:
        """Wait for a model without a live replica; if it is scaled to zero, this wakes it.

        One request at a time does this for all that wait behind it: Serve, which counts who
        waits, starts one replica for one as for many. Serve may also never answer (its controller
        is away, or the replica that it asks), so the gateway's own list and the directory are
        watched meanwhile.
        """
        asking = asyncio.create_task(self._ask_serve(name))
        try:
            while not asking.done():
                model = self._find(name)
                if model.name != name:
                    raise unavailable(
                        f"The model '{name}' has just been replaced; please send the request again."
                    )
                if model.broken:
                    raise unavailable(
                        f"The model '{name}' failed to start: {model.message}", retry_after_s=60
                    )
                await asyncio.wait([asking], timeout=_LOOK_S)
                if replica := self._board.choose(name):
                    return replica
            return asking.result()
        finally:
            asking.cancel()

    async def _ask_serve(self, name: str) -> Replica:
        """The first live replica that Serve has."""
        while True:
            try:
                async with self._directory.handle(name).choose_replica() as chosen:
                    found = chosen.replica_metadata
            except DeploymentUnavailableError:
                raise unavailable(
                    f"The model '{name}' cannot start; GET /ready says why.", retry_after_s=30
                ) from None
            replica = self._board.add(name, chosen.replica_id, found["host"], found["port"])
            if replica is not None:
                return replica
            # Either Serve has not noticed yet that it is dead, or it is not.
            await asyncio.sleep(0.1)


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
