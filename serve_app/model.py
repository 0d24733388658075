"""A model's Serve application: ``import_path: serve_app.model:app``."""

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

from serve_app import admin, autoscaling, caches, capacity, cluster, gang, placement, processes
from serve_app.config import DEPLOYMENT, MODEL_IMPORT_PATH, LiveConfig, ModelConfig, ids_of, parse
from serve_app.errors import ConfigError, UserError
from serve_app.planner import engine as planner_engine
from serve_app.planner import metadata, parallelism

logger = logging.getLogger("ray.serve")

# Serve never sees the requests, so its own cap must not be what bounds them.
_UNBOUNDED = 1_000_000

_FIRST_REQUEST_S = 300.0
"""Seconds that an engine may go without a step until it has finished a request: what no warm-up
covers is compiled and tuned then. vLLM gives up by itself after as long."""


def app(args: dict[str, Any]) -> serve.Application:
    """Build a model's application from its ``args`` (see :class:`ModelConfig`).

    Raises:
        ConfigError: what is wrong with the settings, in one sentence.
    """
    try:
        config = parse(ModelConfig, args, "args")
        _refuse_sizes(config)
        capacity.refuse_impossible(placement.of(config))
        _refuse_ids_of_others(args, config)
    except ConfigError:
        # Serve shows `traceback.format_exc()` as the application's status. The frames say
        # nothing to the user, and this process does nothing but build this application.
        sys.tracebacklimit = 0
        raise
    deployment: Any = ModelServer
    return deployment.options(**_deployment_options(config)).bind(
        config.model_dump(exclude_unset=True)
    )


def _refuse_sizes(config: ModelConfig) -> None:
    """Refuse parallel sizes that the model cannot be split into, before they are asked for.

    Where the model's ``config.json`` is not on this node, vLLM says it at the start.
    """
    if config.engine.keys() & metadata.OTHER_CONFIG:
        return
    shape = metadata.shape_at_hand(config.model, os.environ | environment(config))
    if shape is not None:
        parallelism.refuse(shape, planner_engine.parallelism(config.engine))


def _refuse_ids_of_others(args: dict[str, Any], config: ModelConfig) -> None:
    """Refuse an alias that another application of this cluster answers to.

    The application being built does not know its own name here, so it is found by its args.
    """
    controller = cluster.controller()
    claimed = ids_of("", config)[1:]
    if controller is None or not claimed:
        return
    details = ray.get(controller.get_serve_instance_details.remote())
    deployed = {
        name: application["deployed_app_config"].get("args") or {}
        for name, application in details["applications"].items()
        if (application.get("deployed_app_config") or {}).get("import_path") == MODEL_IMPORT_PATH
    }
    myself = next((name for name, others in deployed.items() if others == args), None)
    for name, others_args in deployed.items():
        if name == myself:
            continue
        others = _claims(name, others_args)
        for id in claimed:
            if id in others:
                raise ConfigError(
                    f"the model id '{id}' belongs to both '{myself or 'this application'}' and "
                    f"'{name}'; change it in one of them"
                )


def _claims(name: str, args: dict[str, Any]) -> list[str]:
    try:
        return ids_of(name, parse(ModelConfig, args, name))
    except ConfigError:  # refused, as this one may be: Serve reports it all the same
        return [name]


def _deployment_options(config: ModelConfig) -> dict[str, Any]:
    options: dict[str, Any] = {
        **placement.of(config).options(),
        **autoscaling.deployment_options(config),
        "max_ongoing_requests": _UNBOUNDED,
        # Serve's default of 20 would load a 70B for hours before it says why it cannot.
        "max_constructor_retry_count": 3,
        # Serve kills the replica when this has passed; the replica drains within it.
        "graceful_shutdown_timeout_s": config.graceful_shutdown_timeout_s + 15,
    }
    if config.env:
        options["ray_actor_options"]["runtime_env"] = cluster.runtime_env(config.env)
    if config.adapters:
        # A user_config in the config's own `deployments` takes this one's place.
        options["user_config"] = {"adapters": [a.model_dump() for a in config.adapters]}
    return options


def environment(config: ModelConfig) -> dict[str, str]:
    """Environment variables of a replica on this node: the config's, over what vLLM needs."""
    # StartWatch bounds the start. vLLM's own limit covers only a part of it, and is a part of the
    # key of what it compiles: with start_timeout_s here, to edit that would compile all anew.
    env = {"VLLM_ENGINE_READY_TIMEOUT_S": "604800"}
    if config.cache_dir:
        env |= caches.downloads(config.cache_dir) | caches.compiled(config.cache_dir)
    if config.adapters or config.engine.get("enable_lora"):
        # Lets vLLM load an adapter when it is first asked for (serve_app.adapters).
        env["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if config.resources.device == "cpu":
        # vLLM's default takes most of the machine's memory for each engine, and pins each
        # engine's threads to the same cores.
        env |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        if config.tensor_parallel_size * config.pipeline_parallel_size == 1:
            # The worker runs inside EngineCore: one process and one import of torch less.
            env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        # Ray would set it to num_cpus, which is what is reserved, not what may be used. One core
        # is left to the front end, as vLLM's own binding does: threads of a batch that share
        # their cores with it wait for each other.
        cores = len(os.sched_getaffinity(0))
        env["OMP_NUM_THREADS"] = str(max(1, cores - 1))
    return env | config.env


@serve.deployment(name=DEPLOYMENT, health_check_period_s=5, health_check_timeout_s=30)
class ModelServer:
    """One replica: one AsyncLLM in process, on an HTTP port that only the gateway may use."""

    _started = False
    """Whether Serve has found this replica healthy: from then on it may have requests."""

    async def __init__(self, args: dict[str, Any]) -> None:  # type: ignore[misc]
        processes.exit_with_parent()
        self._config = ModelConfig.model_validate(args)
        # Before vLLM is imported, and here: what it needs depends on this node's cores.
        os.environ.update(environment(self._config))
        from serve_app.engine import Engine

        context = serve.get_replica_context()
        ids = [context.app_name, *self._config.served_as]
        try:
            self._engine = await Engine.start(
                self._config,
                ids,
                replica=context.replica_id.unique_id,
                host=ray.util.get_node_ip_address(),
                credential=cluster.internal_credential(),
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
            said = await admin.act(self._engine, action)
        except Exception as error:
            said = f"failed: {error}"
        return serve.get_replica_context().replica_id.unique_id, said

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What :class:`serve_app.autoscaling.LoadPolicy` decides on."""
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
            if not self._engine.load.proven:
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
