"""vLLM's worker, which writes down what it measures of its GPU; for ``planner_accuracy.py``.

vLLM imports it by name (``worker_cls``) in the process of each rank, however that is started.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm.v1.worker import gpu_worker

RECORDS = "PLANNER_ACCURACY_RECORDS"
"""Environment variable: the folder that gets ``rank-00`` and so on."""

_profiling = gpu_worker.memory_profiling
_seen: dict[str, Any] = {}


@contextlib.contextmanager
def _recorded(*args: Any, **kwargs: Any) -> Iterator[Any]:
    with _profiling(*args, **kwargs) as result:
        yield result
    before, after = result.before_profile, result.after_profile
    _seen.update(
        total_consumed=result.total_consumed,
        activation_peak=result.transient_peak_headroom,
        non_torch_increase=result.non_torch_increase,
        non_torch_at_start=result.before_create.non_torch_memory,
        allocated_before_profile=before.torch_allocated,
        allocated_after_profile=after.torch_allocated,
        reserved_after_profile=after.torch_memory,
        profile_seconds=round(result.profile_time, 1),
    )


gpu_worker.memory_profiling = _recorded


class Worker(gpu_worker.Worker):  # type: ignore[misc]
    def determine_available_memory(self) -> int:
        import torch

        available: int = super().determine_available_memory()
        start = self.init_snapshot
        _seen.update(
            gpu=torch.cuda.get_device_name(),
            total_memory=start.total_memory,
            free_at_start=start.free_memory,
            requested_memory=self.requested_memory,
            weights=int(self.model_runner.model_memory_usage),
            cudagraph_estimate=int(self.cudagraph_memory_estimate),
            available_kv_cache=int(available),
        )
        (Path(os.environ[RECORDS]) / f"rank-{self.rank:02}").write_text(json.dumps(_seen))
        return available
