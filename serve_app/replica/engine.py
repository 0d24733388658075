"""One vLLM engine in this process, behind vLLM's own ASGI app on a port of its own."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
import socket
import tempfile
import types
from argparse import Namespace
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import uvicorn

from serve_app import addresses
from serve_app.cluster import placement
from serve_app.cluster.credential import ASLEEP_HEADER, CREDENTIAL_HEADER
from serve_app.config import engine_args
from serve_app.config.settings import ModelConfig
from serve_app.errors import UserError, envelope
from serve_app.lifeline import tie_children
from serve_app.replica import gang, responses
from serve_app.replica.adapters import Adapters
from serve_app.replica.load import EngineLoad
from serve_app.replica.no_route import NoRoute
from serve_app.replica.start import errors
from serve_app.replica.start.plugin import PHASE, REASON, START_FOLDER
from serve_app.replica.start.progress import Progress
from serve_app.replica.start.watch import StartWatch

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

logger = logging.getLogger("ray.serve")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]


def parse_args(config: ModelConfig, ids: list[str], rank: dict[str, Any]) -> Namespace:
    """The namespace that `vllm serve` would have, read by vLLM's own parser.

    Raises:
        UserError: vLLM refuses the arguments; its own sentence.
    """
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.launchers.launcher import validate_api_server_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    engine = {**placement.of(config).engine_defaults, **config.engine, **rank}
    if config.adapters:
        engine.setdefault("enable_lora", True)
    argv = ["--model", config.model, "--served-model-name", *ids]

    class Parser(FlexibleArgumentParser):  # type: ignore[misc]
        def error(self, message: str) -> NoReturn:
            raise ValueError(" ".join(message.split()))  # argparse would print and exit

    parser = make_arg_parser(Parser())
    try:
        args: Namespace = parser.parse_args(argv + engine_args.to_argv(engine))
        validate_parsed_serve_args(args)
        validate_api_server_args(args)
    except (TypeError, ValueError, KeyError) as error:
        # A KeyError's text is the repr of its argument, quotes and all.
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise UserError(f"vLLM refuses the engine arguments: {text}") from None
    return args


class Engine:
    """An AsyncLLM and the HTTP server in front of it.

    Created by :meth:`start` inside the event loop that will serve it; ended by :meth:`stop`.
    """

    def __init__(
        self,
        llm: AsyncLLM,
        load: EngineLoad,
        adapters: Adapters,
        server: uvicorn.Server,
        guard: Guard,
        host: str,
        port: int,
    ) -> None:
        self.llm = llm
        self.load = load
        self.adapters = adapters
        self.host = host
        self.port = port
        self.falling_asleep = asyncio.Lock()
        """Held while the engine is put to sleep or woken."""

        self._server = server
        self._guard = guard
        self._serving: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls, config: ModelConfig, ids: list[str], *, replica: str, host: str, credential: bytes
    ) -> Engine:
        """Load the model and serve it on a free port of ``host``, as the replica of this id.

        Blocks the event loop while the weights load: vLLM's constructor is synchronous.

        Raises:
            UserError: why the engine did not start, in one sentence.
        """
        tie_children()
        with (
            tempfile.TemporaryDirectory(prefix="serve-app-") as folder,
            Progress(replica, Path(folder) / PHASE) as progress,
            StartWatch(ids[0], replica, config.start_timeout_s) as watch,
        ):
            rank = await gang.join(config.pipeline_parallel_size, config.start_timeout_s)
            args = parse_args(config, ids, rank)
            reason = Path(folder) / REASON
            os.environ[START_FOLDER] = folder
            try:
                load = EngineLoad(ids[0])
                llm = _build_llm(args, load)
                app = await _build_app(llm, args, replica)
                adapters = Adapters(llm, app.state.openai_serving_models)
            except Exception as error:
                logger.exception("the engine did not start")
                if watch.overdue:
                    raise UserError(errors.too_slow(progress.phase, config)) from None
                text = f"{type(error).__name__}: {error}"
                if reason.exists():
                    text = reason.read_text()
                raise UserError(errors.explain(text, config)) from None
        guard = Guard(app, credential, lambda: llm.errored, lambda: load.asleep)
        sock = socket.socket(addresses.family(host), socket.SOCK_STREAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, 0))
        server = uvicorn.Server(
            uvicorn.Config(
                guard,
                log_level="warning",
                access_log=False,
                # The gateway keeps connections open and is the one to close them, so that
                # it never sends a request into a connection that is just being closed.
                timeout_keep_alive=3600,
                backlog=4096,
                server_header=False,
                date_header=False,
                # There is no proxy to believe: the gateway is the only client.
                proxy_headers=False,
            )
        )
        engine = cls(llm, load, adapters, server, guard, host, sock.getsockname()[1])
        engine._serving = asyncio.create_task(server.serve(sockets=[sock]))
        while not server.started:
            if engine._serving.done():
                await engine._serving
                raise UserError(f"the model server could not listen on {host}")
            await asyncio.sleep(0.01)
        return engine

    @property
    def requests_running(self) -> int:
        """HTTP requests that this server is answering at the moment."""
        return self._guard.running

    @property
    def busy(self) -> bool:
        """Whether the engine has requests that it should be making progress on."""
        return bool(self.llm.output_processor.has_unfinished_requests())

    async def drain(self, timeout_s: float) -> None:
        """Wait until no request is running, ``timeout_s`` seconds at most."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        quiet = 0
        # Gateways learn of the shutdown within moments of each other; a request that one of
        # them sent before it knew must still find the port open.
        while quiet < 5 and asyncio.get_running_loop().time() < deadline:
            quiet = quiet + 1 if self._guard.running == 0 else 0
            await asyncio.sleep(0.1)

    async def stop(self) -> None:
        """End the HTTP server and the engine's processes."""
        self._server.should_exit = True
        self._server.force_exit = True
        if self._serving is not None:
            await asyncio.wait([self._serving], timeout=5)
        await asyncio.to_thread(self.llm.shutdown, 0)


def _build_llm(args: Namespace, load: EngineLoad) -> AsyncLLM:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.loggers import PrometheusStatLogger
    from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

    from serve_app.replica.executor import executor_class

    engine_args = AsyncEngineArgs.from_cli_args(args)
    vllm_config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    return AsyncLLM(
        vllm_config,
        executor_class=executor_class(vllm_config, gang.member()),
        usage_context=UsageContext.OPENAI_API_SERVER,
        # Ray's exporter carries vLLM's metrics to Prometheus; the second keeps /metrics as it is.
        stat_loggers=[load.attach, RayPrometheusStatLogger, PrometheusStatLogger],
        log_requests=engine_args.enable_log_requests,
        log_stats=not engine_args.disable_log_stats,
        aggregate_engine_logging=engine_args.aggregate_engine_logging,
    )


async def _build_app(llm: AsyncLLM, args: Namespace, replica: str) -> Any:
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app

    tasks = await llm.get_supported_tasks()
    app = build_app(args, tasks, llm.model_config)
    await init_app_state(llm, app.state, args, tasks)
    if serving := getattr(app.state, "openai_serving_responses", None):
        responses.mark(serving, replica)
    paths = {getattr(route, "path", "") for route in app.routes}
    app.router.default = NoRoute(args.served_model_name[0], tasks, paths)
    # vLLM's error handler stops the server through this when the engine dies; here the
    # replica does that, for the whole process.
    app.state.server = types.SimpleNamespace()
    return app


class Guard:
    """ASGI middleware around everything: who may ask, when, and a count of running requests."""

    def __init__(
        self,
        app: ASGIApp,
        credential: bytes,
        dead: Callable[[], bool],
        asleep: Callable[[], bool],
    ) -> None:
        self._app = app
        self._credential = credential
        self._dead = dead
        self._asleep = asleep
        self.running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        given = b""
        for name, value in scope["headers"]:
            if name == CREDENTIAL_HEADER:
                given = value
        if not hmac.compare_digest(given, self._credential):
            await _refuse(scope, send, 401, _NOT_THE_GATEWAY, [])
            return
        if self._asleep():
            await _refuse(scope, send, 503, _ASLEEP, [(ASLEEP_HEADER, b"1")])
            return

        async def send_unless_dead(message: MutableMapping[str, Any]) -> None:
            # A dead engine answers 500 to everything, or an error event where the head of a
            # stream is out already. This process is about to exit; saying nothing until then
            # lets the gateway give what has no byte yet to another replica.
            if self._dead():
                await asyncio.Event().wait()
            await send(message)

        self.running += 1
        try:
            await self._app(scope, receive, send_unless_dead)
        finally:
            self.running -= 1


_NOT_THE_GATEWAY = envelope(
    "This port belongs to the gateway; send requests there.",
    "authentication_error",
    code="invalid_internal_credential",
)
# An engine that sleeps would keep the request until somebody wakes it.
_ASLEEP = envelope("This replica is asleep.", "server_error", code="model_asleep")


async def _refuse(
    scope: Scope,
    send: Send,
    status: int,
    error: dict[str, Any],
    extra: list[tuple[bytes, bytes]],
) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    body = json.dumps(error).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    headers += extra
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
