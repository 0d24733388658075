"""The gateway's Serve application: ``import_path: serve_app.gateway:app``.

One OpenAI-compatible endpoint in front of every model of the cluster.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from typing import Any

from ray import serve

from serve_app.cluster.credential import internal_credential
from serve_app.cluster.serve import runtime_env
from serve_app.config import environment
from serve_app.config.document import DEPLOYMENT, GATEWAY_DEPLOYMENT
from serve_app.config.settings import GatewayConfig, parse
from serve_app.errors import ConfigError
from serve_app.gateway import scaling

logger = logging.getLogger("ray.serve")

# Each streaming request occupies one of Serve's slots. vLLM bounds the load, so Serve need not.
_UNBOUNDED = 1_000_000

_SETTLE_S = 5.0
"""Seconds that a gateway which ends waits for what replicas report of its last requests."""

NODES_ENV = "SERVE_APP_GATEWAY_NODES"
"""Environment variable on every node: a Ray label (``key=value``) of the nodes on which gateways
may run. On Kubernetes these nodes are the endpoints of the Service. Unset: any node."""


def app(args: dict[str, Any]) -> serve.Application:
    """Build the gateway's application from its ``args`` (see :class:`GatewayConfig`).

    Raises:
        ConfigError: what is wrong with the settings, in one sentence.
    """
    try:
        config = parse(GatewayConfig, args, "args")
        nodes = os.environ.get(NODES_ENV)
        number = {"num_replicas": config.pods} if nodes else scaling.options(config)
    except ConfigError:
        sys.tracebacklimit = 0  # as in serve_app.model: the sentence, without our frames
        raise
    options: dict[str, Any] = {
        **number,
        "max_ongoing_requests": _UNBOUNDED,
        "graceful_shutdown_timeout_s": config.graceful_shutdown_timeout_s,
        "logging_config": {"enable_access_log": False},
        "ray_actor_options": {
            "num_cpus": config.num_cpus,
            # Serve then calls this code in the loop that owns the sockets: no queue between
            # the two threads for every chunk, and the client's back-pressure reaches us.
            "runtime_env": runtime_env(
                {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0", **environment.front()}
            ),
        },
    }
    if nodes:
        label, _, value = nodes.partition("=")
        options["ray_actor_options"]["label_selector"] = {label: value}
        # Else the first node to come up takes all gateways, and the other nodes serve nothing.
        options["max_replicas_per_node"] = 1
    deployment: Any = GatewayServer
    return deployment.options(**options).bind(config.model_dump(exclude_unset=True))


@serve.deployment(name=GATEWAY_DEPLOYMENT)
@serve.ingress()
class GatewayServer:
    """One gateway process."""

    async def __init__(self, args: dict[str, Any]) -> None:  # type: ignore[misc]
        try:
            await self._start(args)
        except Exception as error:
            # Serve has its traceback in the controller's log, where nobody looks for it.
            logger.error(f"the gateway cannot start: {error}")
            raise

    async def _start(self, args: dict[str, Any]) -> None:
        from serve_app.cluster import grpc_port
        from serve_app.cluster.gateways import Gateways
        from serve_app.cluster.limits_actor import Coordinator
        from serve_app.cluster.replicas import Watcher
        from serve_app.gateway import garbage
        from serve_app.gateway.access_log import AccessLog
        from serve_app.gateway.asgi import build
        from serve_app.gateway.directory import Directory
        from serve_app.gateway.exchange import Exchange
        from serve_app.gateway.exposition import Exposition
        from serve_app.gateway.keyring import Keyring
        from serve_app.gateway.leases import Leases
        from serve_app.gateway.ledger import Ledger
        from serve_app.gateway.limits import Limits
        from serve_app.gateway.metrics import Metrics
        from serve_app.gateway.relay import Relay
        from serve_app.gateway.replicas import Board
        from serve_app.gateway.usage.record import Record

        grpc_port.at_the_nodes_address()
        config = GatewayConfig.model_validate(args)
        board = Board()
        self._directory = Directory(Watcher(board, DEPLOYMENT))
        self._relay = Relay(
            internal_credential(), config.connect_timeout_s, config.request_timeout_s
        )
        keyring = Keyring(config.keys) if config.keys else None
        self._ledger = ledger = Ledger()
        limits = Limits()
        exchange = Exchange(board, ledger, internal_credential())
        metrics = Metrics()
        self._exposition = Exposition(metrics, board, internal_credential(), Gateways())
        self._record = Record.of(config)
        if self._record:
            ledger.listen(self._record)
        self._traces = None
        if config.otlp_endpoint:
            from serve_app.gateway.traces import Traces  # imports OpenTelemetry

            self._traces = Traces(
                config.otlp_endpoint, config.trace_sample_ratio, config.trace_content
            )
        self._access_log = AccessLog.of(config)
        self._app = build(
            config,
            self._directory,
            board,
            self._relay,
            keyring=keyring,
            ledger=ledger,
            limits=limits,
            record=self._record,
            access_log=self._access_log,
            exposition=self._exposition,
            traces=self._traces,
        )
        await self._directory.refresh()
        running = [
            self._directory.run(),
            exchange.run(),
            metrics.run(),
            garbage.run(lambda: metrics.running),
        ]
        if keyring:
            leases = Leases(limits.counts, Coordinator, lambda: keyring.limited)
            running += [keyring.run(), leases.run()]
        self._refreshing = [asyncio.create_task(it) for it in running]

    def __serve_build_asgi_app__(self) -> Any:
        return self._app

    async def own_metrics(self) -> tuple[str, str]:
        """For the gateway that is asked for ``GET /metrics``: see :meth:`Exposition.own`."""
        return await self._exposition.own()

    async def __del__(self) -> None:
        refreshing = getattr(self, "_refreshing", None)
        if refreshing is not None:
            await self._ledger.settle(_SETTLE_S)
            for task in refreshing:
                task.cancel()
            self._relay.close()
            if self._record:
                await asyncio.to_thread(self._record.close)
            if self._traces:
                await asyncio.to_thread(self._traces.close)
            if self._access_log:
                self._access_log.close()
