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

logger = logging.getLogger("ray.serve")

_FIRST_REQUEST_S = 300.0
"""Seconds that an engine may go without a step until it has finished a request: what no warm-up
covers is compiled and tuned then. vLLM gives up by itself after as long."""


@serve.deployment(name=DEPLOYMENT, health_check_period_s=5, health_check_timeout_s=30)
class ModelServer:
    """One replica: one AsyncLLM in process, on an HTTP port that only the gateway may use."""

    _started = False
    """Whether Serve has found this replica healthy: from then on it may have requests."""

    async def __init__(self, args: dict[str, Any]) -> None:  # type: ignore[misc]
        lifeline.exit_with_parent()
        self._config = ModelConfig.model_validate(args)
        # Before vLLM is imported, and here: what it needs depends on this node's cores.
        os.environ.update(environment(self._config))
        from serve_app.replica.engine import Engine

        context = serve.get_replica_context()
        ids = [context.app_name, *self._config.served_as]
        try:
            self._engine = await Engine.start(
                self._config,
                ids,
                replica=context.replica_id.unique_id,
                host=ray.util.get_node_ip_address(),
                credential=internal_credential(),
            )
        except UserError:
            sys.tracebacklimit = 0
            raise
        self._watch = asyncio.create_task(self._exit_with_engine())

    def record_replica_metadata(self) -> dict[str, Any]:
        """Where the gateway reaches this replica, and what it says of the model there."""
        return {
            "host": self._engine.host,
            "port": self._engine.port,
            "max_model_len": self._engine.llm.model_config.max_model_len,
        }

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Called by Serve at the start and when only ``user_config`` changed: no restart.

        Raises:
            UserError: it cannot work. At the start only: Serve stops a replica for it, and one
                that serves shall not end for a typo. The gateway says it (GET /ready).
        """
        try:
            live = parse(LiveConfig, user_config, "user_config")
            await self._engine.adapters.apply(live.adapters)
        except UserError as error:
            if not self._started:
                raise
            logger.error(f"{error}; until it is corrected the adapters stay as they are")

    async def admin(self, action: str) -> tuple[str, str]:
        """One replica's part of ``serve-app admin``: its id, and what it did."""
        try:
            said = await sleep.act(self._engine, action)
        except Exception as error:
            said = f"failed: {error}"
        return serve.get_replica_context().replica_id.unique_id, said

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What :class:`serve_app.cluster.autoscaling.LoadPolicy` decides on."""
        return self._engine.load.stats(self._engine.requests_running)

    async def check_health(self) -> None:
        """Raise when the engine is dead. Serve's first call ends the start."""
        await self._engine.llm.check_health()
        self._started = True

    async def _exit_with_engine(self) -> None:
        """End this process as soon as the engine is dead, or hangs.

        Serve replaces a replica whose process is gone at once, but only after three failed
        health checks when it is still there.
        """
        # Counted in turns of this loop: when this process itself gets no turn (the first request
        # imports, the node is overloaded), that is no silence of the engine.
        silent, seen = 0.0, 0.0
        while True:
            await asyncio.sleep(0.2)
            if self._engine.llm.errored:
                logger.error("the engine died; this replica exits so that Serve replaces it")
                os._exit(1)
            last_step = self._engine.load.last_step
            # An idle engine owes no steps.
            silent = silent + 0.2 if self._engine.busy and last_step == seen else 0.0
            seen = last_step
            patience = self._config.hang_timeout_s
            if not self._engine.load.first_request_done:
                patience = max(patience, _FIRST_REQUEST_S)
            if silent > patience:
                logger.error(
                    f"the engine made no step for {silent:.0f} s with requests running; this "
                    "replica exits so that Serve replaces it"
                )
                os._exit(1)

    async def __del__(self) -> None:
        """Called once by Serve when it stops the replica: drain, then end the engine."""
        engine = getattr(self, "_engine", None)
        if engine is None:
            await gang.drained(0)
            return
        began = time.monotonic()
        await engine.drain(self._config.graceful_shutdown_timeout_s)
        left = self._config.graceful_shutdown_timeout_s - (time.monotonic() - began)
        with contextlib.suppress(Exception):  # without the GCS the engine must end as well
            await gang.drained(left)
        self._watch.cancel()  # not before: nothing waits for an engine that dies in the meantime
        await engine.stop()
