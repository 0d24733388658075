"""What EngineCore does with a placement group: vLLM's Ray executor, with stand-in workers.

    python tests/cluster/fake_engine_core.py PLACEMENT_GROUP_ID

Prints one line of JSON: the Ray job, and where each rank is. Run by test_placement_cluster.py.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import ray
from ray._raylet import PlacementGroupID
from ray.util.placement_group import PlacementGroup
from vllm.platforms import current_platform
from vllm.v1.executor import ray_executor_v2

from serve_app.replica.executor import StageExecutor

TP, PP = 2, 3


class Worker:
    """Stands in for ``RayWorkerProc``: knows its GPU, and loads nothing."""

    def __init__(self, rank: int, **_: Any) -> None:
        self.rank = rank

    def get_node_and_physical_gpu_ids(self) -> tuple[str, list[int]]:
        context = ray.get_runtime_context()
        self.gpu = int(context.get_accelerator_ids()["GPU"][0])
        return context.get_node_id(), [self.gpu]

    def create_dist_init_method(self) -> str:
        return "tcp://nowhere"

    def initialize_worker(self, local_rank: int, *_: Any, **__: Any) -> None:
        self.local_rank = local_rank

    def wait_for_init(self) -> dict[str, Any]:
        return {"status": "READY", "handle": None}

    def run(self) -> None:
        pass

    def where(self) -> dict[str, Any]:
        node = ray.get_runtime_context().get_node_id()
        return {"node": node, "gpu": self.gpu, "local_rank": self.local_rank}


Worker.READY_STR = "READY"  # type: ignore[attr-defined]


class Queue:
    """Stands in for the message queues between executor and workers."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    @staticmethod
    def create_from_handle(*_: Any) -> Queue:
        return Queue()

    def export_handle(self) -> None:
        pass

    def wait_until_ready(self) -> None:
        pass

    def shutdown(self) -> None:
        pass


def main() -> None:
    vars(ray_executor_v2).update(RayWorkerProc=Worker, MessageQueue=Queue)
    type(current_platform).ray_device_key = "GPU"  # this vLLM may be built for CPUs
    parallel = SimpleNamespace(
        world_size=TP * PP,
        local_world_size=TP * PP,
        tensor_parallel_size=TP,
        pipeline_parallel_size=PP,
        prefill_context_parallel_size=1,
        nnodes_within_dp=1,
        placement_group=PlacementGroup(PlacementGroupID(bytes.fromhex(sys.argv[1]))),
        ray_runtime_env=None,
        ray_workers_use_nsight=False,
    )
    executor: Any = object.__new__(StageExecutor)
    executor.parallel_config = parallel
    executor.vllm_config = SimpleNamespace(
        parallel_config=parallel, instance_id="fake", weight_transfer_config=None
    )
    executor.start_worker_monitor = lambda: None
    executor._get_output_rank = lambda: 0
    executor._init_executor()
    ranks = [
        ray.get(handle.actor.where.remote()) | {"bundle": handle.bundle_id_idx}
        for handle in executor.ray_worker_handles
    ]
    job = ray.get_runtime_context().get_job_id()
    executor.shutdown()
    print(json.dumps({"job": job, "ranks": ranks}))


if __name__ == "__main__":
    main()
