"""One engine's load, for autoscaling, and a warning when its KV cache is too small.

vLLM hands statistics of every step to its stat loggers; :class:`EngineLoad` is one of them. It
keeps the latest numbers for ``record_autoscaling_stats`` and counts preemptions: requests that
vLLM evicts from a full KV cache and computes again later. vLLM itself logs nothing of it.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from serve_app.cluster.exchange import Load

logger = logging.getLogger("ray.serve")

WINDOW_S = 60.0
"""Seconds over which preemptions are counted."""

MANY_PREEMPTIONS = 10
"""Preemptions within the window from which on a warning is due."""

QUIET_S = 600.0
"""Seconds between two warnings of one engine."""


@dataclass(frozen=True)
class Limits:
    """The settings that decide how many requests an engine's KV cache has to hold."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    tensor_parallel_size: int
    gpu_memory_utilization: float
    kv_cache_tokens: int | None = None
    """Tokens that the KV cache holds; None before it has been measured."""

    part_of_gpu: str | None = None
    """The setting that gives the engine a part of a GPU, where others share it."""

    @staticmethod
    def of(vllm_config: Any, part_of_gpu: str | None = None) -> Limits:
        """Read the settings off an engine's resolved ``VllmConfig``."""
        return Limits(
            max_num_seqs=vllm_config.scheduler_config.max_num_seqs,
            max_num_batched_tokens=vllm_config.scheduler_config.max_num_batched_tokens,
            max_model_len=vllm_config.model_config.max_model_len,
            tensor_parallel_size=vllm_config.parallel_config.tensor_parallel_size,
            gpu_memory_utilization=vllm_config.cache_config.gpu_memory_utilization,
            kv_cache_tokens=vllm_config.cache_config.kv_cache_size_tokens,
            part_of_gpu=part_of_gpu,
        )


class EngineLoad:
    """A vLLM stat logger; pass :meth:`attach` to ``AsyncLLM(stat_loggers=[...])``.

    It has the methods of vLLM's ``StatLoggerBase``, without importing vLLM. ``record`` is called
    on the event loop for every step of the engine, so it only copies numbers.
    """

    def __init__(
        self,
        model: str,
        clock: Callable[[], float] = time.monotonic,
        part_of_gpu: str | None = None,
    ) -> None:
        self._model = model
        self._part_of_gpu = part_of_gpu
        self._clock = clock
        self._config: Any = None
        self._running = 0
        self._waiting = 0
        self._kv_cache_usage = 0.0
        self._preemptions = 0
        self._tokens = 0
        self._asked = (clock(), 0)
        self.last_step = clock()
        """When the engine last made a step, in the clock's seconds."""
        self.first_request_done = False
        """Whether it has finished a request. Until then kernels may be compiled within a step."""

        self._watch = PreemptionWatch()

    def attach(self, vllm_config: Any, engine_index: int = 0) -> EngineLoad:
        """vLLM calls it as a factory of stat loggers; one engine has one logger, this."""
        self._config = vllm_config
        return self

    def stats(self, answering: int = 0, *, busy: bool = True) -> dict[str, float]:
        """What ``record_autoscaling_stats`` returns; see :mod:`serve_app.cluster.autoscaling`.

        ``running`` and ``waiting`` are requests in the engine. ``in_front_end`` are those of the
        ``answering`` requests that have not reached it: they wait for an import of vLLM's, an
        adapter's download or the tokenizer. ``capacity`` is ``max_num_seqs``, ``kv_cache_usage``
        goes from 0 to 1, ``preemptions`` are all so far, and ``tokens_per_s`` is the rate of
        generation since the previous call.

        An engine whose last requests were aborted makes no further step, which would report that
        none runs; ``busy`` tells whether any front end has a request in it.
        """
        now = self._clock()
        load = self.now(busy=busy)
        before, tokens = self._asked
        self._asked = (now, self._tokens)
        return {
            "running": load.running,
            "waiting": load.waiting,
            "in_front_end": max(0, answering - load.running - load.waiting),
            "capacity": load.capacity,
            "kv_cache_usage": load.kv_cache_usage,
            "preemptions": self._preemptions,
            "tokens_per_s": (self._tokens - tokens) / max(now - before, 1e-3),
        }

    def now(self, answering: int = 0, *, busy: bool = True) -> Load:
        """The same, as gateways want to know it; those in the front end count as waiting."""
        if not busy:
            self._running = self._waiting = 0
        capacity = self._config.scheduler_config.max_num_seqs if self._config else 0
        waiting = max(self._waiting, answering - self._running)
        return Load(
            self._running,
            waiting,
            capacity,
            self._kv_cache_usage,
            prefix_cache_tokens=self._prefix_cache_tokens,
        )

    @property
    def _prefix_cache_tokens(self) -> int | None:
        """Tokens of past prompts that the KV cache keeps at most."""
        if self._config is None:
            return None
        cache = self._config.cache_config
        return cache.kv_cache_size_tokens if cache.enable_prefix_caching else 0

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        self.last_step = self._clock()
        if scheduler_stats is not None:
            self._running = scheduler_stats.num_running_reqs
            # Skipped requests wait as well: for a grammar, an adapter or remote KV blocks.
            self._waiting = (
                scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            )
            self._kv_cache_usage = scheduler_stats.kv_cache_usage
        if iteration_stats is None:
            return
        self._tokens += iteration_stats.num_generation_tokens
        self.first_request_done = self.first_request_done or bool(iteration_stats.finished_requests)
        if preempted := iteration_stats.num_preempted_reqs:
            self._preemptions += preempted
            if count := self._watch.add(preempted, self._clock()):
                limits = Limits.of(self._config, self._part_of_gpu)
                logger.warning(preemption_warning(self._model, count, self._running, limits))

    def log(self) -> None:
        """vLLM calls it at intervals to have statistics logged; this logger logs none."""

    def log_engine_initialized(self) -> None:
        """vLLM calls it once the engine runs."""

    def record_sleep_state(self, sleep: int, level: int) -> None:
        """vLLM 0.29 never calls it on loggers of users; ``Engine.asleep`` holds the state."""


class PreemptionWatch:
    """Counts preemptions within a window, and tells when it is time to warn."""

    def __init__(
        self, many: int = MANY_PREEMPTIONS, window_s: float = WINDOW_S, quiet_s: float = QUIET_S
    ) -> None:
        self._many = many
        self._window_s = window_s
        self._quiet_s = quiet_s
        self._recent: deque[tuple[float, int]] = deque()
        self._warned = float("-inf")

    def add(self, preempted: int, now: float) -> int:
        """The number of preemptions in the window if a warning is due, else 0."""
        self._recent.append((now, preempted))
        while self._recent[0][0] <= now - self._window_s:
            self._recent.popleft()
        count = sum(number for _, number in self._recent)
        if count < self._many or now - self._warned < self._quiet_s:
            return 0
        self._warned = now
        return count


def preemption_warning(model: str, count: int, running: int, limits: Limits) -> str:
    """One line: why requests of ``model`` are preempted, and which settings help.

    Args:
        model: the model's id.
        count: preemptions within the last :data:`WINDOW_S` seconds.
        running: requests that the engine runs now, about as many as its KV cache can hold.
        limits: the engine's settings.
    """
    holds = ""
    if limits.kv_cache_tokens:
        longest = limits.kv_cache_tokens / limits.max_model_len
        holds = (
            f" (it holds {limits.kv_cache_tokens:,} tokens, {longest:.1f} requests of "
            f"max_model_len, and max_num_seqs lets {limits.max_num_seqs} in)"
        )
    remedies = []
    if limits.part_of_gpu:
        remedies.append(f"give it a larger part of the GPU (resources.{limits.part_of_gpu})")
    elif limits.gpu_memory_utilization < 0.95:
        remedies.append(f"raise gpu_memory_utilization ({limits.gpu_memory_utilization:g}) to 0.95")
    if 0 < running < limits.max_num_seqs:
        remedies.append(f"lower max_num_seqs ({limits.max_num_seqs}) to {running}")
    else:
        remedies.append(f"lower max_num_seqs ({limits.max_num_seqs})")
    remedies.append(f"lower max_num_batched_tokens ({limits.max_num_batched_tokens})")
    if not limits.part_of_gpu:
        remedies.append(f"raise tensor_parallel_size ({limits.tensor_parallel_size})")
    remedies.append(f"lower max_model_len ({limits.max_model_len})")
    return (
        f"{model}: {count} requests were preempted within {WINDOW_S:.0f} s and are computed twice, "
        f"because the KV cache is too small{holds}; what helps, best first: {', '.join(remedies)}"
    )
