"""vLLM's Ray executor on bundles that each hold a whole tensor-parallel group.

``RayExecutorV2`` gives every rank a placement-group bundle of its own, and refuses bundles of more
than one GPU. It only uses a bundle to start a rank's actor in it, though, and Ray can start several
one-GPU actors in one bundle. So this module replaces the two functions that find the ranks'
bundles. Everything else is vLLM's.

The replica imports this module to build the engine; EngineCore, to unpickle the class.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import ray
from ray.util import placement_group_table
from vllm.v1.executor import ray_executor_v2
from vllm.v1.executor.abstract import Executor

from serve_app.cluster.placement import STAGES_ENV, stage_bundles

FAILED_S = 3.0
"""Seconds after a worker's death in which EngineCore must have ended by itself."""


def executor_class(vllm_config: Any, member: int = 0) -> type[Executor]:
    """The executor class for this replica's engine.

    Give it to ``AsyncLLM(executor_class=...)`` in place of ``Executor.get_class``. For the Ray
    executor it also sets the environment variable that lists the bundles of the engine's stages.

    Args:
        vllm_config: as ``create_engine_config`` made it, in the replica: it then holds the
            replica's placement group.
        member: the replica's rank in its gang, where it has one.
    """
    parallel = vllm_config.parallel_config
    if parallel.distributed_executor_backend != "ray":
        chosen: type[Executor] = Executor.get_class(vllm_config)
        return chosen
    nodes = _nodes_of_bundles(parallel.placement_group)
    bundles = stage_bundles(nodes, parallel.pipeline_parallel_size, member)
    os.environ[STAGES_ENV] = ",".join(map(str, bundles))
    # EngineCore connects to Ray by itself. Without this it would look for another cluster.
    os.environ.setdefault("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    return StageExecutor


class StageExecutor(ray_executor_v2.RayExecutorV2):  # type: ignore[misc]
    """Ranks of one pipeline stage share a bundle, in the order that the replica computed."""

    def _init_executor(self) -> None:
        module: Any = ray_executor_v2
        group_size = self.parallel_config.world_size // self.parallel_config.pipeline_parallel_size
        module.initialize_ray_cluster = _connect
        module.get_bundles_sorted_by_node = lambda group: _bundles_of_ranks(group, group_size)
        super()._init_executor()

    def register_failure_callback(self, callback: Callable[[], None]) -> None:
        """End EngineCore soon after a worker died, even while it is blocked in a step.

        EngineCore reads of the death in its input queue. While it waits for a step of a worker on
        another node, it reads nothing for minutes (``VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS``), and
        its clients wait as long.
        """

        def told() -> None:
            callback()
            last_word = threading.Timer(FAILED_S, os._exit, (1,))
            last_word.daemon = True
            last_word.start()

        super().register_failure_callback(told)


def _connect(parallel_config: Any, require_gpu_on_driver: bool = False) -> None:
    """Join the replica's cluster; its placement group is already in ``parallel_config``."""
    if not ray.is_initialized():
        # The replica's own connection prints the workers' lines already.
        ray.init(runtime_env=parallel_config.ray_runtime_env, log_to_driver=False)


def _bundles_of_ranks(placement_group: Any, group_size: int) -> list[tuple[int, str, str]]:
    """Bundle index, node id and node address of every rank, in vLLM's order of ranks.

    vLLM numbers ranks stage by stage, so each stage's bundle comes ``group_size`` times.
    """
    node_of = _nodes_of_bundles(placement_group)
    address_of = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    return [
        (bundle, node_of[bundle], address_of[node_of[bundle]])
        for bundle in map(int, os.environ[STAGES_ENV].split(","))
        for _ in range(group_size)
    ]


def _nodes_of_bundles(placement_group: Any) -> list[str]:
    node_of = placement_group_table(placement_group)["bundles_to_node_id"]
    return [node_of[bundle] for bundle in sorted(node_of)]
