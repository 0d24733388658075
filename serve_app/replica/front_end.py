"""One process's front end of an engine: vLLM's own ASGI app, on a port of its own."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import types
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn
from fastapi.exceptions import RequestValidationError

from serve_app import addresses
from serve_app.cluster.exchange import Load
from serve_app.errors import UserError
from serve_app.replica import media, meter, responses, validation
from serve_app.replica.engine import Engine
from serve_app.replica.guard import Guard
from serve_app.replica.no_route import NoRoute
from serve_app.replica.reports import Reports


class FrontEnd:
    """vLLM's app behind a :class:`Guard`; serves from :meth:`listen` to :meth:`close`."""

    host: str
    port: int

    def __init__(self, app: Any, guard: Guard, reports: Reports) -> None:
        self.reports = reports
        self.serving_models = app.state.openai_serving_models
        """vLLM's record of the adapters that this front end knows."""

        self.routes = {getattr(route, "path", "") for route in app.routes}
        """The paths that vLLM answers for this model."""

        self._guard = guard
        self._server = _Server(
            uvicorn.Config(
                guard,
                log_level="warning",
                access_log=False,
                # The gateway closes idle connections, never this server: so the gateway cannot
                # send a request into a connection that is just being closed.
                timeout_keep_alive=3600,
                backlog=4096,
                server_header=False,
                date_header=False,
                # The gateway is the only client, so no proxy's forwarding headers are trusted.
                proxy_headers=False,
            )
        )
        self._serving: asyncio.Task[None] | None = None

    @classmethod
    async def build(
        cls,
        engine: Engine,
        args: Namespace,
        credential: bytes,
        id: str,
        load: Callable[[], Load | None],
    ) -> FrontEnd:
        """Make a front end for an engine. It accepts requests that carry this credential.

        Args:
            args: the engine's own arguments.
            id: this front end's, of :func:`serve_app.cluster.front_end_ids.of`.
            load: the engine's, if this front end tells it to the gateways.
        """
        app = await _build_app(engine.llm, args, id)
        meter.install(engine.llm)
        reports = Reports(load)
        guard = Guard(app, credential, reports, lambda: engine.dead, lambda: engine.asleep)
        return cls(app, guard, reports)

    async def listen(self, host: str, port: int = 0) -> None:
        """Serve on a port of ``host``; 0 takes a free one.

        Raises:
            UserError: the server ended at once.
            OSError: the port is taken.
        """
        sock = socket.create_server((host, port), family=addresses.family(host))
        self.host, self.port = host, sock.getsockname()[1]
        self._serving = asyncio.create_task(self._server.serve(sockets=[sock]))
        while not self._server.started:
            if self._serving.done():
                await self._serving
                raise UserError(f"the model server could not listen on {host}")
            await asyncio.sleep(0.01)

    @property
    def running(self) -> int:
        """Number of HTTP requests in flight."""
        return self._guard.running

    async def close(self) -> None:
        """End the HTTP server, within 5 seconds."""
        self._server.should_exit = True
        self._server.force_exit = True
        if self._serving is not None:
            await asyncio.wait([self._serving], timeout=5)


async def until_quiet(running: Callable[[], int], timeout_s: float) -> None:
    """Wait until no request is in flight, ``timeout_s`` seconds at most."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    quiet = 0
    # Gateways learn of a shutdown at slightly different times. A request that one of them sent
    # before it knew must still find the port open.
    while quiet < 5 and asyncio.get_running_loop().time() < deadline:
        quiet = quiet + 1 if running() == 0 else 0
        await asyncio.sleep(0.1)


class _Server(uvicorn.Server):
    """Ends when the replica says so. uvicorn's own would also end at a signal, and repeat that."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _build_app(llm: Any, args: Namespace, id: str) -> Any:
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app

    if not llm.model_config.is_multimodal_model:
        # vLLM's pooling routes fetch the media of a message before they find that a text model
        # takes none: from any address, and as slowly as it comes.
        llm.model_config.allowed_media_domains = ["none, the model takes text only"]
    media.refuse_private_addresses(llm.model_config.allowed_media_domains)
    tasks = await llm.get_supported_tasks()
    app = build_app(args, tasks, llm.model_config)
    await init_app_state(llm, app.state, args, tasks)
    if serving := getattr(app.state, "openai_serving_responses", None):
        responses.mark(serving, id)
    app.add_exception_handler(RequestValidationError, validation.refuse)
    app.middleware_stack = app.build_middleware_stack()  # vLLM has built it, with its own handler
    paths = {getattr(route, "path", "") for route in app.routes}
    app.router.default = NoRoute(args.served_model_name[0], tasks, paths)
    # vLLM's error handler uses this to stop the server of a dead engine. Here the replica ends the
    # whole process instead (health.py).
    app.state.server = types.SimpleNamespace()
    return app
