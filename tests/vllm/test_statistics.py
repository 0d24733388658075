"""Whether vLLM gives an engine's statistics to our stat logger, without an engine."""

from __future__ import annotations

from typing import Any
from unittest.mock import MagicMock

import pytest
from vllm.v1.engine import async_llm
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics import loggers

from serve_app.replica.load import EngineLoad


class Silent:
    """In place of vLLM's own stat loggers."""

    def __init__(self, *_: Any) -> None:
        pass

    def record(self, *_: Any, **__: Any) -> None:
        pass

    log_engine_initialized = record


@pytest.mark.parametrize("log_stats", [True, False])
async def test_statistics_are_kept_also_where_they_are_not_logged(
    monkeypatch: pytest.MonkeyPatch, log_stats: bool
) -> None:
    """``disable_log_stats`` turns off vLLM's lines about them: autoscaling has what it needs."""
    for name in ("renderer_from_config", "InputProcessor", "OutputProcessor", "EngineCoreClient"):
        monkeypatch.setattr(async_llm, name, MagicMock())
    for name in ("PrometheusStatLogger", "LoggingStatLogger"):
        monkeypatch.setattr(loggers, name, Silent)
    client: Any = async_llm.EngineCoreClient.make_async_mp_client
    client.return_value.engine_ranks_managed = [0]
    monkeypatch.setattr(AsyncLLM, "_run_output_handler", lambda self: None)
    config: Any = MagicMock()
    config.observability_config.otlp_traces_endpoint = config.profiler_config.profiler = None
    load = EngineLoad("m")
    llm: Any = AsyncLLM(config, MagicMock(), log_stats=log_stats, stat_loggers=[load.attach])
    step = MagicMock(num_running_reqs=3, num_waiting_reqs=1, num_skipped_waiting_reqs=0)
    llm.logger_manager.record(step, None)
    assert (load.stats()["running"], load.stats()["waiting"]) == (3, 1)
    for keeps in (client, async_llm.OutputProcessor):
        assert keeps.call_args.kwargs["log_stats"] is True
