"""The number of a model's replicas, from the load that its engines report.

Requests reach an engine without passing through Serve, so Serve's own count of ongoing requests
is always 0 here. Instead each replica reports the requests that run and wait in its engine
(``record_autoscaling_stats``, :mod:`serve_app.replica.load`). Serve's controller asks
:class:`LoadPolicy` ten times a second how many replicas this load needs. Serve itself applies the
delays and bounds, and starts one replica when a request waits for a model scaled to zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

    from serve_app.config.settings import ModelConfig

LOOK_BACK_S = 10.0
"""Seconds over which reports are averaged."""

REPORT_INTERVAL_S = 2.0
"""Seconds between two reports of a replica's load, or of a gateway's waiting requests."""


class LoadPolicy:
    """Keeps each replica at about ``target_load``: the share of its engine's limit that it runs.

    The policy adds a replica as soon as the load per replica passes the target. It removes one only
    when the load would stay ``slack`` below the target without it. Between the two the number
    stays, so a load that wavers around a boundary changes nothing.

    Serve pickles the class by value and creates it in its controller from ``policy_kwargs``. So the
    class may use nothing but this module.
    """

    def __init__(self, target_load: float, slack: float = 0.2) -> None:
        self.target_load = target_load
        self.slack = slack

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The target number of replicas, and the policy's state, which is always empty."""
        target: int = ctx.target_num_replicas
        metrics = ctx.aggregated_metrics or {}
        if not any(metrics.get("capacity", {}).values()):
            # No replica has reported: all are starting, or too busy, or there are none. Silence is
            # not idleness, and nothing tells how much load another replica could take.
            return (max(target, 1) if ctx.total_queued_requests else target), {}
        load = total_load(metrics, ctx.total_queued_requests or 0.0)
        enough = replicas_for(load, self.target_load)
        if enough >= target or len(metrics["capacity"]) < ctx.current_num_replicas:
            return max(enough, target), {}  # scale down only when all replicas have reported
        return min(target, replicas_for(load, self.target_load * (1 - self.slack))), {}


def replicas_for(load: float, target_load: float) -> int:
    """The fewest replicas on which ``load`` is at most ``target_load`` each."""
    return math.ceil(load / target_load - 1e-9)


def total_load(metrics: Mapping[str, Mapping[Any, float]], queued: float) -> float:
    """The model's load, as the number of engines that it would fill.

    Args:
        metrics: for each statistic, its average by replica.
        queued: requests that wait at the gateways for a replica; each gateway counts one at most.
    """
    capacities = {replica: most for replica, most in metrics.get("capacity", {}).items() if most}
    if not capacities:
        return 0.0

    def of(name: str, replica: Any) -> float:
        return metrics.get(name, {}).get(replica, 0.0)

    loads = [
        engine_load(
            running=of("running", replica),
            waiting=of("waiting", replica),
            capacity=capacity,
            kv_cache_usage=of("kv_cache_usage", replica),
        )
        + of("in_front_end", replica) / capacity
        for replica, capacity in capacities.items()
    ]
    # Gateways tell each replica of all that wait in them, so that no one counts twice.
    in_gateways = max(of("in_gateways", replica) for replica in capacities)
    return sum(loads) + (queued + in_gateways) / (sum(capacities.values()) / len(capacities))


def engine_load(running: float, waiting: float, capacity: float, kv_cache_usage: float) -> float:
    """One engine's load as a share of what it can run; above 1 where requests wait in it.

    An engine is full when it runs ``capacity`` requests (``max_num_seqs``), or earlier when its
    KV cache is full (``kv_cache_usage`` is 1). A full KV cache means that the engine cannot run
    more than it runs now; the waiting requests then count in proportion.
    """
    by_number = (running + waiting) / capacity
    if running < 1:
        return by_number
    return max(by_number, kv_cache_usage * (running + waiting) / running)


def deployment_options(model: ModelConfig) -> dict[str, Any]:
    """Serve's options for the number of replicas: ``num_replicas`` or ``autoscaling_config``.

    With data parallelism Serve counts ranks. Each replica of the model is then a gang of ranks.
    """
    ranks = int(model.engine.get("data_parallel_size") or 1)
    autoscaling = model.autoscaling
    if autoscaling is None:
        return {"num_replicas": (model.replicas or 1) * ranks}
    first = autoscaling.initial_replicas
    return {
        "autoscaling_config": {
            "min_replicas": autoscaling.min_replicas * ranks,
            "max_replicas": autoscaling.max_replicas * ranks,
            "initial_replicas": None if first is None else first * ranks,
            "upscale_delay_s": autoscaling.upscale_delay_s,
            "downscale_delay_s": autoscaling.downscale_delay_s,
            "look_back_period_s": LOOK_BACK_S,
            "metrics_interval_s": REPORT_INTERVAL_S,
            "policy": {
                "policy_function": f"{__name__}:{LoadPolicy.__name__}",
                "policy_kwargs": {"target_load": autoscaling.target_load},
            },
        }
    }
