"""The gateway's ASGI app: tells own routes from relayed ones, and answers every request, if need
be with an error."""

from __future__ import annotations

import contextlib
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import fastapi
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match

from serve_app.config.settings import GatewayConfig
from serve_app.gateway import api, models, routes, stages
from serve_app.gateway import body as request_body
from serve_app.gateway.access_log import AccessLog
from serve_app.gateway.callers import NOBODY, Caller
from serve_app.gateway.cold_start import ColdStart
from serve_app.gateway.directory import Directory
from serve_app.gateway.dispatch import Dispatcher
from serve_app.gateway.errors import GatewayError, Unavailable, invalid
from serve_app.gateway.exchange import called
from serve_app.gateway.exposition import Exposition
from serve_app.gateway.fallback import HEADER as FALLBACK
from serve_app.gateway.fallback import Fallbacks
from serve_app.gateway.front import refuse_websocket
from serve_app.gateway.keyring import Keyring
from serve_app.gateway.ledger import Ledger
from serve_app.gateway.limits import EXPOSED, Limits
from serve_app.gateway.metrics import Metrics
from serve_app.gateway.policy import Policy
from serve_app.gateway.queue import Queue
from serve_app.gateway.relay import Answer, Relay, Request, Send
from serve_app.gateway.replicas import Board
from serve_app.gateway.routing.router import Router
from serve_app.gateway.stages import Call, Stage
from serve_app.gateway.standing import Outliers
from serve_app.gateway.stored_responses import StoredResponses
from serve_app.gateway.upstream import Headers
from serve_app.gateway.usage.record import Record

if TYPE_CHECKING:
    from serve_app.gateway.traces import Traces

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
    keyring: Keyring | None = None,
    ledger: Ledger | None = None,
    limits: Limits | None = None,
    record: Record | None = None,
    access_log: AccessLog | None = None,
    exposition: Exposition | None = None,
    traces: Traces | None = None,
    stages: Sequence[Stage] = (),
    policy: Policy | None = None,
) -> Any:
    """The whole ASGI app: the gateway, inside a CORS middleware if any origin is allowed.

    ``keyring`` has the keys that let callers in; None lets everybody in. ``ledger`` gets an entry
    for each call, and ``record`` tells what was used. ``access_log`` is also told of requests that
    get no entry. ``limits`` are those of the keys. ``exposition`` has the metrics, of other
    gateways too; without it, of this one alone. ``traces`` makes a span of each call. ``stages``
    run inside these and the metrics stage, so that their time and refusals are counted too.
    """
    ledger, limits = ledger or Ledger(), limits or Limits()
    router = Router(board, config.routing)
    stored = StoredResponses(board, policy or router)
    fallbacks = Fallbacks(directory)
    queue = Queue(
        board,
        ColdStart(directory, board),
        stored,
        config.queue,
        config.cold_start_timeout_s,
        fallbacks.after_s,
    )
    board.waiting = queue.waiting
    exposition = exposition or Exposition(Metrics(), board, b"")
    metrics = exposition.metrics
    metrics.watch(lambda: [it.name for it in directory.models()], queue.waiting, board.over_plan)
    limits.hit = metrics.limit_hit
    router.chose, router.predicted = metrics.routed, metrics.cached_as_predicted
    if record:
        record.lost = metrics.unrecorded
    for listener in (limits, queue, router, metrics, Outliers(board)):
        ledger.listen(listener)
    if access_log:
        ledger.listen(access_log)
    if traces:
        ledger.listen(traces)
    dispatcher = Dispatcher(board, queue, relay)
    own = api.build(
        directory,
        board,
        keyring,
        record,
        queue.waiting,
        exposition,
        _error_of_own_route,
        page=config.page,
    )
    gateway = Gateway(
        config,
        directory,
        keyring,
        own,
        dispatcher,
        fallbacks,
        stored,
        access_log,
        metrics,
        (metrics, ledger, *((traces,) if traces else ()), stored, limits, *stages),
    )
    if not config.cors_allow_origins:
        return gateway
    return CORSMiddleware(
        gateway,
        allow_origins=config.cors_allow_origins,
        allow_methods=("GET", "HEAD", "POST"),
        allow_headers=["*"],
        expose_headers=["x-request-id", FALLBACK, *EXPOSED],
    )


class Gateway:
    """Answers the gateway's own routes, and relays each other request to the model it names."""

    def __init__(
        self,
        config: GatewayConfig,
        directory: Directory,
        keyring: Keyring | None,
        own: fastapi.FastAPI,
        dispatcher: Dispatcher,
        fallbacks: Fallbacks,
        stored: StoredResponses,
        access_log: AccessLog | None,
        metrics: Metrics,
        stages: Sequence[Stage],
    ) -> None:
        self._directory = directory
        self._keyring = keyring
        self._own = own
        self._send = dispatcher.send
        self._fallbacks = fallbacks
        self._stored = stored
        self._access_log = access_log
        self._metrics = metrics
        self._stages = stages
        self._keepalive_s = config.stream_keepalive_s
        self._bodies = request_body.Bodies(
            int(config.max_body_mib * 2**20),
            int(config.max_bodies_mib * 2**20),
            config.body_timeout_s,
        )

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await refuse_websocket(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        path = _below_root_path(scope)
        answer = Answer(send)
        call: Call | None = None
        caller: Caller | None = None
        try:
            async with contextlib.AsyncExitStack() as held:
                caller = self._caller(scope, path)
                if _is_relayed(scope, path):
                    call = await self._call(scope, path.removesuffix("/"), receive, held, caller)
                    self._keep_alive(answer, call.request)
                    held.callback(answer.hush)
                    await self._relay(call, answer)
                else:
                    await self._answer_own({**scope, api.CALLER: caller}, path, receive, answer)
        except Exception as error:
            if answer.started_at is not None:
                raise  # the server then closes the connection, the only signal left
            if not isinstance(error, GatewayError):
                id = call.request.id if call else "that was not read yet"
                logger.exception(f"request {id}: unexpected error in the gateway")
                error = _failure()
            if call is None:
                if self._access_log:
                    self._access_log.refused(path, error.status, caller.name if caller else "")
                self._metrics.refused(error.status, caller)
            await _send_error(answer, error, path)

    async def _relay(self, call: Call, answer: Answer) -> None:
        """Relay to the model that the call names or, where it has no replica, to a fallback."""
        try:
            await self._through_stages(call, answer)
        except Unavailable as error:
            for other in self._fallbacks.calls(call):
                answer.by_fallback = partial(self._metrics.fell_back, call, error.status, other)
                try:
                    await self._through_stages(other, answer)
                    return
                except GatewayError:
                    if answer.started_at is not None:
                        raise
                finally:
                    answer.by_fallback = None
            answer.headers = call.answer_headers
            raise

    async def _through_stages(self, call: Call, answer: Answer) -> None:
        answer.headers = call.answer_headers
        await stages.run(
            self._stages, call, answer, lambda c, so_far: self._send(c, answer, so_far)
        )

    def _keep_alive(self, answer: Answer, request: Request) -> None:
        """A stream that waits for long says so: clients and what is between give up else."""
        if self._keepalive_s and routes.may_stream(request.path):
            answer.keep_alive(self._keepalive_s, lambda: request_body.asks_for_stream(request.body))

    def _caller(self, scope: Any, path: str) -> Caller | None:
        """Who asks; None where everybody may. Nobody, on the routes that are open to all.

        Raises:
            GatewayError: 401, on every other route, before anything of the body is read.
        """
        if self._keyring is None:
            return None
        try:
            return self._keyring.caller(dict(scope["headers"]))
        except GatewayError:
            if api.is_open(path):
                return NOBODY
            raise

    async def _answer_own(self, scope: Any, path: str, receive: Receive, answer: Answer) -> None:
        method = scope["method"]
        # The server leaves out the body of an answer to HEAD.
        as_get = {**scope, "method": "GET"}
        if all(route.matches(as_get)[0] is Match.NONE for route in self._own.routes):
            raise routes.no_route(method, path)
        if method not in ("GET", "HEAD"):
            raise routes.not_allowed(method, path, ["GET", "HEAD"])
        await self._own(as_get, receive, answer.send)

    async def _call(
        self,
        scope: Any,
        path: str,
        receive: Receive,
        held: contextlib.AsyncExitStack,
        caller: Caller | None,
    ) -> Call:
        """Read the whole request. Its body counts as held until ``held`` is closed."""
        headers = dict(scope["headers"])
        id = _request_id(headers)
        if headers.get(b"content-encoding", b"").strip().lower() not in _UNCOMPRESSED:
            raise GatewayError(
                415,
                "The request body is compressed; send it without a content-encoding.",
                "invalid_request_error",
                code="unsupported_content_encoding",
            )
        reading = self._bodies.read(receive, headers.get(b"content-length"))
        body = await held.enter_async_context(reading)
        arrived = time.perf_counter()
        query = _query(scope)
        named = self._stored.model_in(path) or request_body.model_in(
            headers.get(b"content-type", b""), query, body
        )
        model = models.find(self._directory, named, caller)
        number = uuid.uuid4().hex
        key = caller.name if caller else ""
        request = Request(
            id,
            scope["method"],
            path,
            query,
            scope["headers"],
            body,
            [called(number, key, model.name, named, path)],
        )
        return Call(number, request, model, named, caller, arrived=arrived)


def _is_relayed(scope: Any, path: str) -> bool:
    """Whether a model answers, not the gateway itself.

    Raises:
        GatewayError: 405 for a method that the models' route does not have.
    """
    methods = routes.methods_of(path)
    if not methods:
        return False
    if path.rstrip("/") == "/version" and not request_body.model_in_query(_query(scope)):
        return False  # the gateway tells its own
    if scope["method"] not in methods:
        raise routes.not_allowed(scope["method"], path, methods)
    return True


def _query(scope: Any) -> bytes:
    query: bytes = scope.get("query_string", b"")
    return query


_MAX_REQUEST_ID = 512  # OpenAI's limit for X-Client-Request-Id


def _request_id(headers: dict[bytes, bytes]) -> str:
    """The client's or a new one. Serve makes one too, and puts it on the answer."""
    id = headers.get(b"x-request-id", b"").decode("utf-8", "replace")
    if len(id) > _MAX_REQUEST_ID:
        raise invalid(f"The header X-Request-Id has more than {_MAX_REQUEST_ID} characters.")
    return id or uuid.uuid4().hex


def _below_root_path(scope: Any) -> str:
    """The path without ``http_options.root_path``, decoded, as FastAPI's routes see it.

    The server puts the root path before the path that a proxy has passed on.
    """
    path: str = scope["path"]
    below = path.removeprefix(scope.get("root_path", ""))
    return below if below.startswith("/") else path


async def _error_of_own_route(request: fastapi.Request, error: Exception) -> fastapi.Response:
    """Make FastAPI's answer to a :class:`GatewayError`; raise any other error again."""
    said = error if isinstance(error, GatewayError) else _failure()
    return fastapi.Response(said.body(), said.status, media_type="application/json")


def _failure() -> GatewayError:
    return GatewayError(500, "The gateway failed on this request.", "server_error")


async def _send_error(answer: Answer, error: GatewayError, path: str) -> None:
    if await answer.begin():
        await answer.send({"type": "http.response.body", "body": error.sse_event(path)})
        return
    body = error.body(path)
    headers: Headers = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        *error.headers,
    ]
    start = {"type": "http.response.start", "status": error.status, "headers": headers}
    await answer.send(start)
    await answer.send({"type": "http.response.body", "body": body})
