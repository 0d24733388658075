"""The gateway's metrics. Ray exports them on every node, with ``ray_`` before each name."""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge, Histogram

from serve_app.gateway.stages import Call, Outcome

_SECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600]

_requests = Counter(
    "serve_app_gateway_requests_total",
    "Requests answered, by model and HTTP status (499: the client went away; 502: the replica was "
    "lost in the middle of an answer that had begun with another status). Without a model: those "
    "that the gateway refused before it knew one.",
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


def count_refused(status: int) -> None:
    """Count a request that was refused before it was known which model it is for."""
    _requests.inc(tags={"model": "", "code": str(status)})


class Metrics:
    """The stage that counts and times each call."""

    async def admit(self, call: Call) -> Call:
        self._count(call.model.name, +1)
        return call

    def ended(self, call: Call, outcome: Outcome) -> None:
        model = call.model.name
        tags = {"model": model}
        self._count(model, -1)
        _requests.inc(tags={**tags, "code": str(outcome.status)})
        _duration.observe(outcome.ended - call.arrived, tags=tags)
        if outcome.first_byte is not None:
            _first_byte.observe(outcome.first_byte - call.arrived, tags=tags)
        for reason in outcome.retries:
            _retries.inc(tags={**tags, "reason": reason})

    def _count(self, model: str, change: int) -> None:
        _running[model] = _running.get(model, 0) + change
        _inflight.set(_running[model], tags={"model": model})
