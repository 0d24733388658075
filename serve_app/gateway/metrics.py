"""What the gateway measures. Ray exports it on every node, with ``ray_`` before each name."""

from __future__ import annotations

import time

from ray.util.metrics import Counter, Gauge, Histogram

from serve_app.gateway.errors import GatewayError
from serve_app.gateway.relay import Answer

_SECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600]

_requests = Counter(
    "serve_app_gateway_requests_total",
    "Requests answered, by model and HTTP status (499: the client went away; 502: the replica was "
    "lost in the middle of an answer that had begun with another status).",
    tag_keys=("model", "code"),
)
_duration = Histogram(
    "serve_app_gateway_request_duration_seconds",
    "From a request's arrival to the last byte of its answer.",
    boundaries=_SECONDS,
    tag_keys=("model",),
)
_first_byte = Histogram(
    "serve_app_gateway_time_to_first_byte_seconds",
    "From a request's arrival to the first byte of its answer; streamed, that is the TTFT.",
    boundaries=_SECONDS,
    tag_keys=("model",),
)
_inflight = Gauge(
    "serve_app_gateway_inflight_requests",
    "Requests that this gateway is relaying now.",
    tag_keys=("model",),
)
_retries = Counter(
    "serve_app_gateway_retries_total",
    "Requests given to another replica, by what the first one did.",
    tag_keys=("model", "reason"),
)

_running: dict[str, int] = {}


class Measured:
    """One request for a model, from its arrival to its end; use it with ``with``."""

    def __init__(self, model: str, answer: Answer) -> None:
        self._tags = {"model": model}
        self._answer = answer
        self.code = 499
        """The status to count; what is cancelled before it has one was left by its client."""

    def __enter__(self) -> Measured:
        self._arrived = time.perf_counter()
        self._count(+1)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._count(-1)
        if isinstance(error, GatewayError):
            self.code = error.status
        elif isinstance(error, Exception):  # not a CancelledError: that is a client's going away
            self.code = 500
        _requests.inc(tags={**self._tags, "code": str(self.code)})
        _duration.observe(time.perf_counter() - self._arrived, tags=self._tags)
        if self._answer.started_at is not None:
            _first_byte.observe(self._answer.started_at - self._arrived, tags=self._tags)

    def retried(self, reason: str) -> None:
        _retries.inc(tags={**self._tags, "reason": reason})

    def _count(self, change: int) -> None:
        model = self._tags["model"]
        _running[model] = _running.get(model, 0) + change
        _inflight.set(_running[model], tags=self._tags)
