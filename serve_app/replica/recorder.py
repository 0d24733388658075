"""Collects one front end's statistics of the engine, for the process that exports them all.

vLLM gives a step's ``SchedulerStats`` (running, waiting, KV cache usage) to one client only, the
first with an output, and the numbers of a request to the client that sent it. So only all clients
together know the engine's load: each sends what it got to the first, which records it as its own.
"""

from __future__ import annotations

from typing import Any

Record = tuple[Any, Any, Any, int]
"""Scheduler, iteration and multimodal cache statistics, and the engine's index, as vLLM's
``StatLoggerBase.record`` takes them."""


class Recorder:
    """A vLLM stat logger that keeps everything until it is taken."""

    def __init__(self) -> None:
        self._records: list[Record] = []

    def attach(self, vllm_config: Any, engine_index: int = 0) -> Recorder:
        """vLLM calls it as a factory of stat loggers."""
        return self

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        self._records.append((scheduler_stats, iteration_stats, mm_cache_stats, engine_idx))

    def take(self) -> list[Record]:
        """Everything since the last call."""
        taken, self._records = self._records, []
        return taken

    def log(self) -> None:
        """vLLM calls it at intervals to have statistics logged; this logger logs none."""

    def log_engine_initialized(self) -> None:
        """vLLM calls it once the engine runs."""

    def record_sleep_state(self, sleep: int, level: int) -> None:
        """vLLM 0.29 never calls it on loggers of users."""
