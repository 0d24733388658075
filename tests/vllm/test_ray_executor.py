"""vLLM's Ray executor as we change it; where it places ranks is in test_placement_cluster.py."""

from __future__ import annotations

import subprocess
import sys

import pytest

from serve_app.replica.start.plugin import START_FOLDER

# EngineCore waits for a step that will never come; it has told its client nothing yet.
ENGINE_CORE = """
import time
from serve_app.replica import executor as module
module.FAILED_S = 0.1
executor = object.__new__(module.StageExecutor)
executor.is_failed = False
executor.register_failure_callback(lambda: print("told", flush=True))
executor.failure_callback()  # by the thread that watches the workers
time.sleep(300)
"""


def test_engine_core_ends_once_a_worker_is_dead_whatever_it_waits_for() -> None:
    pytest.importorskip("vllm.v1.executor.ray_executor_v2")
    done = subprocess.run(
        [sys.executable, "-c", ENGINE_CORE],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.stdout.splitlines()[-1] == "told", done.stderr[-2000:]
    assert done.returncode == 1


def test_vllm_hands_on_to_its_workers_on_ray_whose_engine_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By START_FOLDER a worker knows that it has to end with its raylet (plugin.prepare)."""
    from vllm.v1.executor.ray_env_utils import get_driver_env_vars

    monkeypatch.setenv(START_FOLDER, "/nowhere")
    assert get_driver_env_vars(set())[START_FOLDER] == "/nowhere"
