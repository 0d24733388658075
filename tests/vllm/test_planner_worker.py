"""What a rank of the planner's benchmark writes down of its GPU; the GPU itself is made up."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.worker import gpu_worker

from benchmarks import planner_worker


def test_each_rank_writes_a_file_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = resolve_obj_by_qualname("benchmarks.planner_worker.Worker")  # as vLLM takes worker_cls
    assert issubclass(named, gpu_worker.Worker)
    assert gpu_worker.memory_profiling is planner_worker._recorded
    monkeypatch.setattr(gpu_worker.Worker, "determine_available_memory", lambda self: 50)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setenv(planner_worker.RECORDS, str(tmp_path))
    for rank, weights in enumerate((10, 12)):
        worker = named.__new__(named)
        worker.rank, worker.requested_memory, worker.cudagraph_memory_estimate = rank, 70, 1
        worker.init_snapshot = SimpleNamespace(total_memory=80, free_memory=79)
        worker.model_runner = SimpleNamespace(model_memory_usage=weights)
        assert worker.determine_available_memory() == 50
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["rank-00", "rank-01"]
    assert [json.loads(file.read_text())["weights"] for file in files] == [10, 12]
