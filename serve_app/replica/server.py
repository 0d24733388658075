"""The deployment of a model: one replica, from its start to its last drain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray import serve

from serve_app import lifeline
from serve_app.cluster import capacity, grpc_port, swap_actor
from serve_app.cluster.credential import internal_credential
from serve_app.cluster.swap_actor import Coordinator
from serve_app.config.document import DEPLOYMENT
from serve_app.config.environment import environment
from serve_app.config.settings import LiveConfig, ModelConfig, parse
from serve_app.errors import UserError
from serve_app.planner import front_ends
from serve_app.replica import about, gang, share
from serve_app.replica.adapters import Adapters
from serve_app.replica.engine import Engine, configure, parse_args
from serve_app.replica.front_ends import FrontEnds
from serve_app.replica.health import exit_with_engine
from serve_app.replica.load import EngineLoad
from serve_app.replica.sleep import Sleep
from serve_app.replica.start import memory, parsers
from serve_app.replica.start.plugin import MEMORY, START_FOLDER
from serve_app.replica.start.supervision import supervised
from serve_app.replica.swap import Member

logger = logging.getLogger("ray.serve")


@serve.deployment(name=DEPLOYMENT, health_check_period_s=5, health_check_timeout_s=30)
class ModelServer:
    """One replica: an engine, and its front end on an HTTP port that only the gateway may use."""

    _started = False
    """Whether Serve has found this replica healthy. From then on it can get requests."""

    async def __init__(self, args: dict[str, Any]) -> None:  # type: ignore[misc]
        lifeline.exit_with_parent()
        grpc_port.at_the_nodes_address()
        self._config = ModelConfig.model_validate(args)
        # Before vLLM is imported, and in the replica: the variables depend on this node's cores.
        os.environ.update(environment(self._config))
        try:
            await self._start()
        except UserError:
            sys.tracebacklimit = 0
            raise
        self._sleep = Sleep(self._engine, self._front_ends)
        self._adapters = Adapters(self._engine.llm, self._front_ends)
        self._health = asyncio.create_task(
            exit_with_engine(
                self._engine, self._front_ends, self._load, self._config.hang_timeout_s
            )
        )

    async def _start(self) -> None:
        config, context = self._config, serve.get_replica_context()
        replica = context.replica_id.unique_id
        with supervised(config, context.app_name, replica):
            rank = await gang.join(config.pipeline_parallel_size, config.start_timeout_s)
            part = await asyncio.to_thread(share.of, config)
            args = parse_args(config, _ids(config), rank | (part.arguments if part else {}))
            count = await asyncio.to_thread(_front_ends, config)
            vllm_config = configure(args, count)
            await asyncio.to_thread(parsers.refuse_unfit, args, vllm_config)
            host = ray.util.get_node_ip_address()
            member = await _member(config, replica)
            ours = FrontEnds(count, args, vllm_config, internal_credential(), replica, host)
            try:
                part_of_gpu = config.resources.part_of_gpu
                self._load = EngineLoad(args.served_model_name[0], part_of_gpu=part_of_gpu)
                with share.turn(part, config) if part else contextlib.nullcontext():
                    self._engine = Engine.start(args, vllm_config, self._load, ours.clients)
                await ours.listen(self._engine, self._load)
                self._about = {
                    "takes": about.takes(args, self._engine.llm.renderer, ours.first.routes),
                    "memory": _memory(vllm_config, part),
                }
            except BaseException:
                ours.kill()
                if member:
                    member.stop()
                raise
        self._front_ends = ours
        self._member = member
        if member:
            member.loaded(self._engine, ours)
        if part:
            self._part = asyncio.create_task(share.watch(part, ours))

    def record_replica_metadata(self) -> dict[str, Any]:
        """For the gateway: where its front ends listen, and what the gateway tells of its model."""
        return {
            "host": self._front_ends.first.host,
            "port": self._front_ends.ports[0],
            "ports": self._front_ends.ports,
            "ids": _ids(self._config),
            "max_model_len": self._engine.llm.model_config.max_model_len,
            "about": self._about,
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
            set_here = "adapters" in live.model_fields_set
            await self._adapters.apply(live.adapters if set_here else self._config.adapters)
        except UserError as error:
            if not self._started:
                raise
            logger.error(f"{error}; until it is corrected the adapters stay as they are")

    async def admin(self, action: str) -> tuple[str, str]:
        """One replica's part of ``serve-app admin``: its id, and what it did."""
        try:
            said = await self._sleep.act(action)
        except Exception as error:
            said = f"failed: {error}"
        return serve.get_replica_context().replica_id.unique_id, said

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What :class:`serve_app.cluster.autoscaling.LoadPolicy` decides on."""
        ours = self._front_ends
        stats = self._load.stats(ours.running, busy=ours.busy)
        return {**stats, "in_gateways": ours.waiting}

    async def check_health(self) -> None:
        """Raise when Serve must replace this replica. With its first call the start is over."""
        await self._engine.llm.check_health()
        if self._front_ends.worn_out:
            raise RuntimeError("its front ends ended too often")
        self._started = True

    async def __del__(self) -> None:
        """Called once by Serve when it stops the replica: drain, then end the engine."""
        ours = getattr(self, "_front_ends", None)
        if ours is None:
            await gang.drained(0)
            return
        began = time.monotonic()
        await ours.drain(self._config.graceful_shutdown_timeout_s)
        left = self._config.graceful_shutdown_timeout_s - (time.monotonic() - began)
        with contextlib.suppress(Exception):  # the engine must end, also without the GCS
            await gang.drained(left)
        self._health.cancel()  # only now: an engine that died in the drain must end it
        if self._member:
            self._member.stop()
        await ours.close()
        await self._engine.stop()


def _memory(vllm_config: Any, part: share.Part | None) -> dict[str, Any] | None:
    """What is in the GPU's memory, for whoever asks the gateway."""
    told = Path(os.environ[START_FOLDER]) / MEMORY
    found = memory.read(told, vllm_config.parallel_config.world_size)
    if part is None:
        return found
    planned = memory.of_part(told, vllm_config.cache_config.kv_cache_memory_bytes or 0, part.taken)
    return part.described(found or planned)


def _ids(config: ModelConfig) -> list[str]:
    """The model ids that the engine answers to, without adapters."""
    return [serve.get_replica_context().app_name, *config.served_as]


async def _member(config: ModelConfig, replica: str) -> Member | None:
    """This replica in its swap group, if it is in one."""
    group = config.resources.swap_group
    if group is None:
        return None
    id = await asyncio.to_thread(swap_actor.id_of, group)
    turn = Path(os.environ[START_FOLDER]) / "turn"
    return Member(replica, id, config.resources.evict_cost, Coordinator(group).exchange, turn)


def _front_ends(config: ModelConfig) -> int:
    """How many front ends this replica gets, on the node that it is on."""
    here = capacity.here()
    accelerators = [k.partition(":")[2] for k in here if k.startswith("accelerator_type:")]
    # A pod may have fewer cores than its machine, which only Ray was told.
    cores = min(here.get("CPU", 1), len(os.sched_getaffinity(0)))
    node = front_ends.Node(cores, int(here.get("GPU", 0)))
    chosen = front_ends.how_many(config, node, accelerators[0] if accelerators else None)
    if chosen.count > 1:
        logger.info(f"{chosen.count} front ends: {chosen.why}")
    return chosen.count
