"""What further front ends report, in the statistics of the replica's own process; no engine."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from serve_app.replica.front_ends import FrontEnds, Further
from serve_app.replica.load import EngineLoad


@dataclass
class SchedulerStats:
    """As much of vLLM's, whose import takes long, as is recorded here."""

    num_running_reqs: int = 0
    num_waiting_reqs: int = 0
    num_skipped_waiting_reqs: int = 0
    kv_cache_usage: float = 0.0


def running(number: int) -> SchedulerStats:
    return SchedulerStats(num_running_reqs=number, kv_cache_usage=number / 10)


def said(load: EngineLoad) -> tuple[float, float]:
    stats = load.stats()
    return stats["running"], stats["kv_cache_usage"]


async def test_an_engine_that_has_become_idle_is_not_said_to_be_busy_by_an_older_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vllms = SimpleNamespace(SchedulerStats=SchedulerStats)
    monkeypatch.setitem(sys.modules, "vllm.v1.metrics.stats", vllms)
    ours: Any = FrontEnds.__new__(FrontEnds)
    load, one = EngineLoad("m"), Further(1)
    ours.further = [one]
    ours._engine = SimpleNamespace(busy=True, llm=SimpleNamespace(logger_manager=load))
    ours._reported(one, 1, 0, True, [(running(2), None, None, 0)])
    assert said(load) == (2, 0.2)
    # Its request ends, then this process's own in the next step, which is recorded first.
    ours._engine.busy = False
    load.record(running(0), None)
    ours._reported(one, 0, 0, False, [(running(1), None, None, 0)])
    assert said(load) == (0, 0)
    # Its only request is aborted: there is no step that would tell.
    ours._reported(one, 1, 0, True, [(running(1), None, None, 0)])
    ours._reported(one, 0, 0, False, [])
    assert said(load) == (0, 0)
