"""The gateway's metrics. ``GET /metrics`` shows them, and so does Ray's exporter on every node."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry

from serve_app.gateway.callers import Caller
from serve_app.gateway.ledger import Entry
from serve_app.gateway.replicas import Waiting
from serve_app.gateway.series import Counter, Gauge, Histogram
from serve_app.gateway.stages import Call, Outcome

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_OVERHEAD = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)

_SAMPLE_S = 5.0
"""Seconds between two looks at the gauges for Ray, whose workers report every ten."""


class Metrics:
    """The stage that counts and times each call, and the listener that counts its tokens."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._running: dict[str, int] = {}
        self._models: Callable[[], Iterable[str]] = lambda: ()
        self._holds_over: Callable[[str], int] = lambda model: 0
        self._waiting: Callable[[str], Waiting] = lambda model: Waiting(0, 0.0)
        self._seen: set[str] = set()
        self._requests = Counter(
            registry,
            "serve_app_gateway_requests_total",
            "Requests answered, by model, API key and HTTP status (499: the client went away; 502: "
            "the replica was lost in the middle of an answer that had begun with another status). "
            "Without a model: those that the gateway refused before it knew one.",
            ("model", "key", "code"),
        )
        self._duration = Histogram(
            registry,
            "serve_app_gateway_request_duration_seconds",
            "From a request's arrival to the last byte of its answer.",
            ("model",),
            _SECONDS,
        )
        self._first_byte = Histogram(
            registry,
            "serve_app_gateway_time_to_first_byte_seconds",
            "From a request's arrival to the first byte of its answer; streamed, that is the TTFT.",
            ("model",),
            _SECONDS,
        )
        self._per_token = Histogram(
            registry,
            "serve_app_gateway_time_per_output_token_seconds",
            "Of each stream that came to its end: the time from its first byte to its last, by the "
            "generated tokens but one.",
            ("model",),
            _PER_TOKEN,
        )
        self._queue_time = Histogram(
            registry,
            "serve_app_gateway_queue_time_seconds",
            "How long a request waited in the gateway for a replica with room, or for the first "
            "replica of a cold model; also if it then gave up, but not where the queue was full.",
            ("model",),
            _SECONDS,
        )
        self._overhead = Histogram(
            registry,
            "serve_app_gateway_relay_overhead_seconds",
            "What the gateway itself adds: from a request's arrival to its being written to its "
            "replica's connection, less the time in the queue. Of requests without a retry.",
            ("model",),
            _OVERHEAD,
        )
        self._retries = Counter(
            registry,
            "serve_app_gateway_retries_total",
            "Requests given to another replica, by what the first one did.",
            ("model", "reason"),
        )
        self._fallbacks = Counter(
            registry,
            "serve_app_gateway_fallbacks_total",
            "Requests that a fallback answered, by the model that they named, the HTTP status "
            "with which that one refused them (and counts them), and the one that answered.",
            ("model", "code", "to"),
        )
        self._limits_hit = Counter(
            registry,
            "serve_app_gateway_limits_hit_total",
            "Requests refused by a limit of their API key, by that limit's name in the keys file.",
            ("model", "key", "limit"),
        )
        self._tokens = Counter(
            registry,
            "serve_app_gateway_tokens_total",
            "Tokens of ended requests, by model, API key and kind: prompt, cached (the part of the "
            "prompt that the KV cache had) or completion.",
            ("model", "key", "kind"),
        )
        self._unrecorded = Counter(
            registry,
            "serve_app_gateway_usage_unrecorded_total",
            "Requests that usage_db or usage_dir will never have: a disk was full, or 4 GiB of "
            "requests waited for the database already.",
        )
        self._routed = Counter(
            registry,
            "serve_app_gateway_routing_choices_total",
            "Choices among several replicas, by why one was chosen (docs/routing.md): warm, "
            "overflow, cold, session, short; least_loaded or round_robin where that decides.",
            ("model", "reason"),
        )
        self._routed_tokens = Counter(
            registry,
            "serve_app_gateway_routing_tokens_total",
            "Of the requests that were routed by what is cached: tokens of their prompts (prompt), "
            "those that were predicted to be in the KV cache (predicted), and those that were "
            "(cached).",
            ("model", "kind"),
        )
        self._inflight = Gauge(
            registry,
            "serve_app_gateway_inflight_requests",
            "Requests that this gateway has now, those that wait too.",
            ("model",),
        )
        self._queued = Gauge(
            registry,
            "serve_app_gateway_queued_requests",
            "Requests that wait in this gateway for a replica.",
            ("model",),
        )
        self._longest_wait = Gauge(
            registry,
            "serve_app_gateway_longest_wait_seconds",
            "For how long the first of these has waited.",
            ("model",),
        )
        self._over_plan = Gauge(
            registry,
            "serve_app_gateway_gpu_memory_over_plan_bytes",
            "Bytes that an engine of the model holds beyond its part of a GPU; the most of one.",
            ("model",),
        )

    @property
    def running(self) -> int:
        """Requests that are open, of all models."""
        return sum(self._running.values())

    # --- told by others ------------------------------------------------------------------------

    async def admit(self, call: Call) -> Call:
        model = call.model.name
        self._running[model] = self._running.get(model, 0) + 1
        return call

    def ended(self, call: Call, outcome: Outcome) -> None:
        model = call.model.name
        self._running[model] -= 1
        key = call.caller.name if call.caller else ""
        self._requests.inc(model, key, str(outcome.status))
        self._duration.observe(outcome.ended - call.arrived, model)
        if outcome.first_byte is not None:
            self._first_byte.observe(outcome.first_byte - call.arrived, model)
        if outcome.queued_s and outcome.status != 429:  # one that the full queue refuses waits not
            self._queue_time.observe(outcome.queued_s, model)
        if outcome.sent is not None and not outcome.retries:
            self._overhead.observe(outcome.sent - call.arrived - outcome.queued_s, model)
        for reason in outcome.retries:
            self._retries.inc(model, reason)

    def entered(self, entry: Entry) -> None:
        usage = entry.usage
        if usage is None:
            return
        self._tokens.inc(entry.model, entry.key, "prompt", by=usage.prompt_tokens)
        self._tokens.inc(entry.model, entry.key, "cached", by=usage.cached_tokens)
        self._tokens.inc(entry.model, entry.key, "completion", by=usage.completion_tokens)
        whole = entry.streamed and entry.end == "answered"
        if whole and entry.first_byte_s is not None and usage.completion_tokens > 1:
            generating_s = entry.duration_s - entry.first_byte_s
            self._per_token.observe(generating_s / (usage.completion_tokens - 1), entry.model)

    def refused(self, status: int, caller: Caller | None) -> None:
        """Count a request that was refused before it was known which model it is for."""
        self._requests.inc("", caller.name if caller else "", str(status))

    def fell_back(self, named: Call, status: int, other: Call) -> None:
        """Count a request that one model refused, with ``status``, and another answers."""
        self._fallbacks.inc(named.model.name, str(status), other.model.name)

    def limit_hit(self, call: Call, limit: str) -> None:
        """Count a request that a limit of its key refuses."""
        self._limits_hit.inc(call.model.name, call.caller.name if call.caller else "", limit)

    def routed(self, model: str, reason: str) -> None:
        """Count a choice among several replicas."""
        self._routed.inc(model, reason)

    def cached_as_predicted(self, model: str, predicted: float, cached: int, prompt: int) -> None:
        """Count a request's tokens that were believed to be in the KV cache, and that were."""
        self._routed_tokens.inc(model, "prompt", by=prompt)
        self._routed_tokens.inc(model, "predicted", by=predicted)
        self._routed_tokens.inc(model, "cached", by=cached)

    def unrecorded(self) -> None:
        """Count a request that could not be written down."""
        self._unrecorded.inc()

    # --- asked of others -----------------------------------------------------------------------

    def watch(
        self,
        models: Callable[[], Iterable[str]],
        waiting: Callable[[str], Waiting],
        over_plan: Callable[[str], int],
    ) -> None:
        """Ask these for the gauges: what models there are, what waits for one, and what its
        engines hold beyond their parts of GPUs."""
        self._models, self._waiting, self._holds_over = models, waiting, over_plan

    def sample(self) -> None:
        """Set the gauges to what is now. A model that was removed stays, with nothing."""
        self._seen.update(self._models(), self._running)
        for model in self._seen:
            waiting = self._waiting(model)
            self._inflight.set(self._running.get(model, 0), model)
            self._queued.set(waiting.requests, model)
            self._longest_wait.set(waiting.longest_s, model)
            self._over_plan.set(self._holds_over(model), model)

    async def run(self) -> None:
        """Sample for ever."""
        while True:
            self.sample()
            await asyncio.sleep(_SAMPLE_S)
