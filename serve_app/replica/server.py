"""The deployment of a model: one replica, from its start to its last drain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import time
from typing import Any

import ray
from ray import serve

from serve_app import lifeline
from serve_app.cluster.credential import internal_credential
from serve_app.config.document import DEPLOYMENT
from serve_app.config.environment import environment
from serve_app.config.settings import LiveConfig, ModelConfig, parse
from serve_app.errors import UserError
from serve_app.replica import gang, sleep
from serve_app.replica.adapters import Adapters
from serve_app.replica.engine import Engine, parse_args
from serve_app.replica.front_end import FrontEnd
from serve_app.replica.health import exit_with_engine
from serve_app.replica.start.supervision import supervised

logger = logging.getLogger("ray.serve")


@serve.deployment(name=DEPLOYMENT, health_check_period_s=5, health_check_timeout_s=30)
class ModelServer:
    """One replica: an engine, and its front end on an HTTP port that only the gateway may use."""

    _started = False
    """Whether Serve has found this replica healthy. From then on it can get requests."""

    async def __init__(self, args: dict[str, Any]) -> None:  # type: ignore[misc]
        lifeline.exit_with_parent()
        self._config = ModelConfig.model_validate(args)
        # Before vLLM is imported, and in the replica: the variables depend on this node's cores.
        os.environ.update(environment(self._config))
        try:
            self._engine, self._front_end = await self._start()
        except UserError:
            sys.tracebacklimit = 0
            raise
        self._adapters = Adapters(self._engine.llm, self._front_end.serving_models)
        self._health = asyncio.create_task(
            exit_with_engine(self._engine, self._config.hang_timeout_s)
        )

    async def _start(self) -> tuple[Engine, FrontEnd]:
        config, context = self._config, serve.get_replica_context()
        replica = context.replica_id.unique_id
        with supervised(config, context.app_name, replica):
            rank = await gang.join(config.pipeline_parallel_size, config.start_timeout_s)
            args = parse_args(config, _ids(config), rank)
            engine = Engine.start(args)
            front_end = await FrontEnd.build(engine, args, internal_credential(), replica)
        await front_end.listen(ray.util.get_node_ip_address())
        return engine, front_end

    def record_replica_metadata(self) -> dict[str, Any]:
        """For the gateway: this replica's address, and what the gateway tells of its model."""
        return {
            "host": self._front_end.host,
            "port": self._front_end.port,
            "ids": _ids(self._config),
            "max_model_len": self._engine.llm.model_config.max_model_len,
        }

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Called by Serve at the start and when only ``user_config`` changed: no restart.

        Raises:
            UserError: the settings cannot work; raised at the start only. Serve stops a replica
                that raises here, and a replica that serves must not end for a typo. ``GET /ready``
                tells of it instead.
        """
        try:
            live = parse(LiveConfig, user_config, "user_config")
            await self._adapters.apply(live.adapters)
        except UserError as error:
            if not self._started:
                raise
            logger.error(f"{error}; until it is corrected the adapters stay as they are")

    async def admin(self, action: str) -> tuple[str, str]:
        """One replica's part of ``serve-app admin``: its id, and what it did."""
        try:
            said = await sleep.act(self._engine, self._front_end, action)
        except Exception as error:
            said = f"failed: {error}"
        return serve.get_replica_context().replica_id.unique_id, said

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What :class:`serve_app.cluster.autoscaling.LoadPolicy` decides on."""
        return self._engine.load.stats(self._front_end.running)

    async def check_health(self) -> None:
        """Raise when the engine is dead. With Serve's first call the start is over."""
        await self._engine.llm.check_health()
        self._started = True

    async def __del__(self) -> None:
        """Called once by Serve when it stops the replica: drain, then end the engine."""
        engine = getattr(self, "_engine", None)
        if engine is None:
            await gang.drained(0)
            return
        began = time.monotonic()
        await self._front_end.drain(self._config.graceful_shutdown_timeout_s)
        left = self._config.graceful_shutdown_timeout_s - (time.monotonic() - began)
        with contextlib.suppress(Exception):  # the engine must end, also without the GCS
            await gang.drained(left)
        self._health.cancel()  # only now: an engine that died in the drain must end it
        await self._front_end.close()
        await engine.stop()


def _ids(config: ModelConfig) -> list[str]:
    """The model ids that the engine answers to, without adapters."""
    return [serve.get_replica_context().app_name, *config.served_as]
