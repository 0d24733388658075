"""The gateway on its own, in front of servers that do as a test tells them.

Real vLLM cannot be made to die after its third event, to answer half a document or to send
200 MB on demand. So these servers speak HTTP byte by byte as scripted, and stand in for model
servers. All else is real: the gateway's ASGI app, its relay and its choice of replicas, uvicorn
(which Serve runs too), sockets, and the clients. What a running Serve would tell the gateway
(which models there are, and where) the test says.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, cast

import httpx
import uvicorn
from ray.serve._private.http_util import RequestIdMiddleware
from ray.serve.exceptions import DeploymentUnavailableError

from serve_app.cluster.exchange import Called, Report, Usage
from serve_app.cluster.progress import Phase
from serve_app.config.document import MODEL_IMPORT_PATH
from serve_app.config.settings import GatewayConfig
from serve_app.gateway import directory
from serve_app.gateway.access_log import AccessLog
from serve_app.gateway.asgi import build
from serve_app.gateway.directory import Directory, Model
from serve_app.gateway.exchange import GATEWAY
from serve_app.gateway.exposition import Exposition, Gateways
from serve_app.gateway.front import Front
from serve_app.gateway.keyring import Keyring
from serve_app.gateway.ledger import Ledger
from serve_app.gateway.limits import Limits
from serve_app.gateway.metrics import Metrics
from serve_app.gateway.policy import Policy
from serve_app.gateway.relay import Relay
from serve_app.gateway.replicas import Board
from serve_app.gateway.stages import Stage
from serve_app.gateway.traces import Traces
from serve_app.gateway.usage.record import Record

CREDENTIAL = "the-internal-credential"

RUNNING = {"state": "RUNNING", "replica_id": "r0", "node_id": "n0", "start_time_s": 1.0}
"""A replica as Serve's controller reports it."""

Script = Callable[["Exchange"], Awaitable[None]]


@dataclass
class Exchange:
    """One request that a scripted server got, and its way to answer."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    sent: int = 0
    """Bytes given to the kernel, or waiting for it."""

    def header(self, name: str) -> list[str]:
        """Every value of a header, which should be one."""
        return [v for k, v in self.headers if k.lower() == name]

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        self.sent += len(data)
        await self.writer.drain()

    async def head(self, *headers: str, status: str = "200 OK") -> None:
        lines = [f"HTTP/1.1 {status}", *headers, "", ""]
        await self.send("\r\n".join(lines).encode("latin-1"))

    async def chunk(self, data: bytes) -> None:
        await self.send(b"%x\r\n%b\r\n" % (len(data), data))

    async def answer(self, body: bytes, *headers: str, status: str = "200 OK") -> None:
        """A whole answer of a known length."""
        await self.head(*headers, f"content-length: {len(body)}", status=status)
        await self.send(body)

    async def sse(self, *events: bytes) -> None:
        """The head of an event stream and its first events."""
        await self.head("content-type: text/event-stream", "transfer-encoding: chunked")
        for event in events:
            await self.chunk(event)

    def die(self) -> None:
        """Reset the connection, as the kernel does for a killed process."""
        cast(asyncio.Transport, self.writer.transport).abort()

    async def client_gone(self) -> None:
        """Wait until the other side has closed the connection."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65536):
                pass


async def ok(exchange: Exchange) -> None:
    """The plainest script: an answer."""
    await exchange.answer(b'{"ok": true}', "content-type: application/json")


@dataclass
class Upstream:
    """A server that answers each request by its script."""

    script: Script = ok
    host: str = "127.0.0.1"
    port: int = 0
    exchanges: list[Exchange] = field(default_factory=list)
    connections: int = 0
    _server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, self.host, 0, limit=2**26)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._server is not None
        self._server.close()
        for exchange in self.exchanges:
            exchange.die()

    @property
    def bodies(self) -> list[bytes]:
        return [e.body for e in self.exchanges]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                exchange = await _read(reader, writer)
                self.exchanges.append(exchange)
                await self.script(exchange)
        writer.close()


async def _read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Exchange:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = head.removesuffix("\r\n\r\n").split("\r\n")
    method, target, _ = first.split(" ")
    headers = [(k, v.strip()) for k, _, v in (line.partition(":") for line in lines)]
    length = next((int(v) for k, v in headers if k.lower() == "content-length"), 0)
    body = await reader.readexactly(length)
    return Exchange(method, target, headers, body, reader, writer)


class _Models(Directory):
    """A directory that knows what the test says instead of what Serve says."""

    def __init__(self, applications: dict[str, Any], board: Board) -> None:
        self.hear(applications)
        self._phases: dict[str, Phase] = {}
        self._board = board

    def hear(self, applications: dict[str, Any]) -> None:
        """Take these for what Serve says now."""
        self._models: dict[str, Model] = directory.read_details({"applications": applications})
        self._by_id = directory._by_id(self._models)

    def handle(self, name: str) -> Any:
        return _Handle()


class _Handle:
    """Serve's handle of a deployment without replicas that can be had."""

    @contextlib.asynccontextmanager
    async def choose_replica(self) -> AsyncIterator[Any]:
        raise DeploymentUnavailableError(cast(Any, "no replica"))
        yield


def reported(args: dict[str, Any] | None = None, status: str = "RUNNING") -> dict[str, Any]:
    """An application as Serve's controller reports it."""
    return {
        "status": status,
        "message": "",
        "last_deployed_time_s": 1.0,
        "deployed_app_config": {
            "import_path": MODEL_IMPORT_PATH,
            "args": {"model": "org/model"} | (args or {}),
        },
        "deployments": {"ModelServer": {"message": "", "replicas": [RUNNING]}},
    }


def took(id: str, usage: Usage, key: str = "") -> Report:
    """What a front end reports of the call with this id."""
    return Report(Called(id, GATEWAY, key, "m", "m", "/", 0.0), usage)


class GatewayProcess:
    """The gateway under uvicorn, in this event loop, in front of the model ``m``.

    ``replicas`` are ports, tried in this order while nothing else is going on. ``root_path`` is
    the one of Serve's ``http_options``, ``port`` one that a test holds. ``stages`` come
    after those that the gateway has. ``front`` puts around it what runs before it in Serve.
    """

    def __init__(
        self,
        *replicas: Upstream | int,
        applications: dict[str, Any] | None = None,
        root_path: str = "",
        front: bool = False,
        stages: Sequence[Stage] = (),
        policy: Policy | None = None,
        ledger: Ledger | None = None,
        limits: Limits | None = None,
        access_log: AccessLog | None = None,
        gateways: Gateways | None = None,
        port: int = 0,
        **config: Any,
    ) -> None:
        self._root_path, self._front = root_path, front
        self._stages, self._policy = stages, policy
        self._ledger, self._limits = ledger, limits
        self._access_log, self._gateways = access_log, gateways
        self._port = port
        places = [("127.0.0.1", r) if isinstance(r, int) else (r.host, r.port) for r in replicas]
        self.config = GatewayConfig.model_validate(config)
        self.board = Board()
        self.board.publish("m", {f"r{n}": place for n, place in enumerate(places)})
        self.front_ends = list(self.board._front_ends["m"].values())
        for order, front_end in enumerate(self.front_ends):
            front_end.inflight = front_end.replica.inflight = order
        self._applications = applications or {"m": reported({"served_as": ["org/m:1.0"]})}

    async def __aenter__(self) -> Self:
        self._relay = Relay(
            CREDENTIAL.encode(), self.config.connect_timeout_s, self.config.request_timeout_s
        )
        self.directory = _Models(self._applications, self.board)
        self.metrics = Metrics()
        self.record = Record.of(self.config)
        self.ledger = self._ledger or Ledger()
        if self.record:
            self.ledger.listen(self.record)
        self.traces = None
        if self.config.otlp_endpoint:
            self.traces = Traces(
                self.config.otlp_endpoint,
                self.config.trace_sample_ratio,
                self.config.trace_content,
            )
        self.app = build(
            self.config,
            self.directory,
            self.board,
            self._relay,
            keyring=Keyring(self.config.keys) if self.config.keys else None,
            ledger=self.ledger,
            limits=self._limits,
            record=self.record,
            access_log=self._access_log,
            exposition=Exposition(self.metrics, self.board, CREDENTIAL.encode(), self._gateways),
            traces=self.traces,
            stages=self._stages,
            policy=self._policy,
        )
        app: Any = _CancelledOnDisconnect(self.app)
        if self._front:
            app = Front(RequestIdMiddleware(app))
        # asyncio sets TCP_NODELAY only where the protocol is named; Serve's uvloop always does.
        listener = socket.socket(proto=socket.IPPROTO_TCP)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(("127.0.0.1", self._port))
        self.port = listener.getsockname()[1]
        self.base_url = f"http://127.0.0.1:{self.port}"
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                lifespan="off",
                log_level="critical",
                root_path=self._root_path,
            )
        )
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        assert await until(lambda: self._server.started)
        self.client = httpx.AsyncClient(
            base_url=self.base_url, timeout=60, limits=httpx.Limits(max_connections=None)
        )
        self.client.headers.clear()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        await self.client.aclose()
        if error is None:
            assert await until(self.is_idle), f"requests still counted: {self.inflight()}"
        self._server.should_exit = self._server.force_exit = True
        await self._serving
        self._relay.close()
        if self.record:
            await asyncio.to_thread(self.record.close)
        if self.traces:
            await asyncio.to_thread(self.traces.close)
        if self._access_log:
            self._access_log.close()

    def inflight(self) -> list[int]:
        """Requests that each front end is believed to have, by this gateway."""
        return [it.inflight - order for order, it in enumerate(self.front_ends)]

    def is_idle(self) -> bool:
        return not any(self.inflight())


class _CancelledOnDisconnect:
    """What Serve does around an app: when the client goes away, the call is cancelled."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        messages: asyncio.Queue[Any] = asyncio.Queue(maxsize=1)

        async def listen() -> None:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    answering.cancel()
                    return
                await messages.put(message)

        answering = asyncio.ensure_future(self._app(scope, messages.get, send))
        listening = asyncio.create_task(listen())
        try:
            await answering
        except asyncio.CancelledError:
            if not answering.cancelled():
                answering.cancel()
                raise
        finally:
            listening.cancel()


def connections_to(port: int) -> list[socket.socket]:
    """This process's own connections to a port, as duplicates."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            seen = socket.socket(fileno=int(name))  # raises for what is no socket
            try:
                if seen.family != socket.AF_UNIX and seen.getpeername()[1] == port:
                    found.append(seen.fileno())
            finally:
                seen.detach()
    return [socket.socket(fileno=os.dup(fd)) for fd in found]


async def until(what: Callable[[], Any], within_s: float = 10.0) -> Any:
    """Ask until the answer is true or the time is up; the last answer."""
    deadline = asyncio.get_running_loop().time() + within_s
    while True:
        answer = what()
        if answer or asyncio.get_running_loop().time() > deadline:
            return answer
        await asyncio.sleep(0.02)
