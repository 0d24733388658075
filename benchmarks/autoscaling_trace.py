"""Replicas against load: a model's autoscaling played over a trace of requests.

    python benchmarks/autoscaling_trace.py [--out docs/autoscaling.svg]

The policy and everything that Ray Serve puts around it (averaging of reports, delays, bounds) are
the real ones on a simulated clock. Engines are simulated: each runs up to ``capacity`` requests
at once, a request takes ``service_s`` seconds, what is above waits, and a new replica needs
``start_s`` seconds. Requests go to the replica with the least load, as the gateway sends them.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from ray.serve import autoscaling_policy
from ray.serve._private.common import TimeStampedValue
from ray.serve._private.metrics_utils import time_weighted_average
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from serve_app.cluster.autoscaling import (
    LOOK_BACK_S,
    REPORT_INTERVAL_S,
    LoadPolicy,
    deployment_options,
)
from serve_app.config.settings import Autoscaling, ModelConfig

TICK_S = 1.0
"""Simulated seconds between two decisions (Serve takes one every 0.1 s)."""

Trace = Callable[[float], float]
"""Requests per second at a time, in seconds."""


@dataclass
class Replica:
    """A simulated engine: requests in it, and the reports that the controller has of it."""

    ready_at: float
    requests: float = 0.0
    unsent: list[tuple[float, dict[str, float]]] = field(default_factory=list)
    reports: dict[str, list[TimeStampedValue]] = field(default_factory=dict)
    recorded: float = -math.inf


@dataclass
class Moment:
    """One tick of a simulation. ``load`` is the number of engines that the requests would fill."""

    time: float
    load: float
    ready: int
    target: int
    waiting: float


def simulate(
    trace: Trace,
    seconds: float,
    settings: Autoscaling,
    *,
    capacity: int = 32,
    service_s: float = 10.0,
    start_s: float = 60.0,
    noise: float = 0.0,
    kv_capacity: int | None = None,
    seed: int = 0,
) -> list[Moment]:
    """Play ``trace`` for ``seconds`` and tell what happened at every tick.

    Args:
        trace: requests per second, by time.
        seconds: how long.
        settings: the model's autoscaling settings.
        capacity: requests that an engine runs at once (``max_num_seqs``).
        service_s: seconds that a request takes once it runs.
        start_s: seconds until a new replica takes requests.
        noise: standard deviation of the arrivals, as a share of them.
        kv_capacity: requests that fill an engine's KV cache, where that is fewer.
        seed: of the noise.
    """
    model = ModelConfig(model="m", autoscaling=settings)
    options = deployment_options(model)["autoscaling_config"]
    config = AutoscalingConfig(**options)
    policy = autoscaling_policy._apply_autoscaling_config(
        LoadPolicy(**options["policy"]["policy_kwargs"])
    )
    dice = random.Random(seed)
    runs = min(capacity, kv_capacity or capacity)
    state: dict[str, Any] = {}
    first = (
        settings.min_replicas if settings.initial_replicas is None else settings.initial_replicas
    )
    replicas = [Replica(ready_at=0.0) for _ in range(first)]
    cold = 0.0  # requests that wait at the gateway for a first replica
    moments: list[Moment] = []
    for tick in range(int(seconds / TICK_S)):
        now = tick * TICK_S
        ready = [replica for replica in replicas if replica.ready_at <= now]
        arriving = max(0.0, trace(now) * (1 + noise * dice.gauss(0, 1))) * TICK_S
        if ready:
            _share(ready, arriving + cold)
            cold = 0.0
        else:
            cold += arriving
        for replica in ready:
            done = min(replica.requests, runs) * TICK_S / service_s
            replica.requests = max(0.0, replica.requests - done)
            if replica.requests < 0.05:  # the tail of an exponential is no request
                replica.requests = 0.0
            _report(replica, now, capacity, runs)
        context = _context(now, config, state, ready, len(replicas), cold)
        with mock.patch.object(autoscaling_policy, "time", SimpleNamespace(time=lambda t=now: t)):
            wanted, state = policy(context)
        wanted = max(settings.min_replicas, min(settings.max_replicas, math.ceil(wanted)))
        while len(replicas) < wanted:
            replicas.append(Replica(ready_at=now + start_s))
        # Serve stops replicas that are still starting first; what the others run, they finish.
        replicas = sorted(replicas, key=lambda replica: replica.ready_at)[:wanted]
        moments.append(
            Moment(
                now,
                trace(now) * service_s / runs,
                len(ready),
                wanted,
                cold + sum(max(0.0, replica.requests - runs) for replica in replicas),
            )
        )
    return moments


def _share(ready: list[Replica], requests: float) -> None:
    """Give out requests so that the least loaded replicas fill up first."""
    for index, replica in enumerate(ordered := sorted(ready, key=lambda r: r.requests)):
        following = ordered[index + 1].requests if index + 1 < len(ordered) else math.inf
        room = (following - replica.requests) * (index + 1)
        given = min(requests, room) / (index + 1)
        for lower in ordered[: index + 1]:
            lower.requests += given
        requests -= given * (index + 1)
        if requests <= 1e-9:
            return


def _report(replica: Replica, now: float, capacity: int, runs: int) -> None:
    """Record a point every fifth of the look-back window and send it, as Serve's replica does."""
    if now - replica.recorded < REPORT_INTERVAL_S:
        return
    replica.recorded = now
    running = min(replica.requests, runs)
    point = {
        "running": running,
        "waiting": replica.requests - running,
        "capacity": capacity,
        "kv_cache_usage": running / runs if runs < capacity else 0.0,
    }
    for name, value in point.items():
        series = replica.reports.setdefault(name, [])
        series.append(TimeStampedValue(now, value))
        while series[0].timestamp <= now - LOOK_BACK_S:
            series.pop(0)


def _context(
    now: float,
    config: AutoscalingConfig,
    state: dict[str, Any],
    ready: list[Replica],
    target: int,
    cold: float,
) -> AutoscalingContext:
    metrics: dict[str, dict[Any, float]] = {}
    for index, replica in enumerate(ready):
        for name, series in replica.reports.items():
            metrics.setdefault(name, {})[index] = _average(series, now)
    return AutoscalingContext(
        deployment_id=None,
        deployment_name="ModelServer",
        app_name="m",
        current_num_replicas=len(ready),
        target_num_replicas=target,
        running_replicas=list(range(len(ready))),
        total_num_requests=cold,
        total_queued_requests=cold,
        aggregated_metrics=metrics,
        raw_metrics={},
        capacity_adjusted_min_replicas=config.min_replicas,
        capacity_adjusted_max_replicas=config.max_replicas,
        policy_state=dict(state),
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=now,
        config=config,
    )


def _average(series: list[TimeStampedValue], now: float) -> float:
    last = max(now - series[-1].timestamp, 1e-3)
    return float(time_weighted_average(series, last_window_s=last) or 0.0)


TRACES: dict[str, tuple[Trace, float, Autoscaling, dict[str, Any]]] = {
    "steady, noisy": (
        lambda t: 4.0,
        1800,
        Autoscaling(max_replicas=8, initial_replicas=2),
        {"noise": 0.3},
    ),
    "step": (lambda t: 2.0 if t < 300 else 11.0, 1500, Autoscaling(max_replicas=8), {}),
    "ramp up and down": (
        lambda t: 12.0 * max(0.0, 1 - abs(t - 1500) / 1500),
        3600,
        Autoscaling(max_replicas=8),
        {"noise": 0.2},
    ),
    "burst": (
        lambda t: 20.0 if 300 <= t < 360 else 1.0,
        1800,
        Autoscaling(max_replicas=8),
        {},
    ),
    "idle, zero, wake": (
        lambda t: 1.5 if t < 200 or t > 1200 else 0.0,
        1800,
        Autoscaling(min_replicas=0, max_replicas=4, initial_replicas=1),
        {},
    ),
    "long prompts (the KV cache fills first)": (
        lambda t: 0.5 if t < 300 else 1.6,
        1500,
        Autoscaling(max_replicas=8),
        {"capacity": 256, "kv_capacity": 10},
    ),
}


def svg(panels: dict[str, list[Moment]]) -> str:
    """One panel for each trace: load in engines (filled), target (dashed), ready (line)."""
    width, height, left, top = 760, 120, 40, 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" '
        f'height="{len(panels) * (height + 50)}" font-family="sans-serif" font-size="11">'
    ]
    for row, (name, moments) in enumerate(panels.items()):
        y0 = row * (height + 50) + top
        most = max(max(m.target for m in moments), max(m.load for m in moments), 1) * 1.05
        end = moments[-1].time

        def points(
            value: Callable[[Moment], float],
            moments: list[Moment] = moments,
            y0: int = y0,
            most: float = most,
            end: float = end,
        ) -> Iterator[str]:
            for m in moments[:: len(moments) // 150 + 1]:
                x = left + (width - left - 10) * m.time / end
                yield f"{x:.0f},{y0 + height * (1 - value(m) / most):.0f}"

        area = " ".join(points(lambda m: m.load))
        parts += [
            f'<text x="{left}" y="{y0 - 8}">{name} ({end / 60:.0f} min)</text>',
            f'<polygon points="{left},{y0 + height} {area} {width - 10},{y0 + height}" '
            'fill="#c6dbef"/>',
            f'<polyline points="{" ".join(points(lambda m: m.target))}" fill="none" '
            'stroke="#e6550d" stroke-dasharray="4 3"/>',
            f'<polyline points="{" ".join(points(lambda m: m.ready))}" fill="none" '
            'stroke="#31a354" stroke-width="2"/>',
            f'<text x="4" y="{y0 + 10}">{most / 1.05:.0f}</text>',
            f'<text x="4" y="{y0 + height}">0</text>',
        ]
    parts.append(
        f'<text x="{left}" y="{len(panels) * (height + 50) - 6}">filled: load, in engines that it '
        "would fill; dashed: replicas wanted; line: replicas ready</text></svg>"
    )
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/autoscaling.svg"))
    out = parser.parse_args().out
    panels = {}
    for name, (trace, seconds, settings, engine) in TRACES.items():
        moments = simulate(trace, seconds, settings, **engine)
        panels[name] = moments
        changes = sum(a.target != b.target for a, b in itertools.pairwise(moments))
        print(
            f"{name}: {changes} changes, at most {max(m.target for m in moments)} replicas, "
            f"{max(m.waiting for m in moments):.0f} requests waiting at worst"
        )
    out.write_text(svg(panels))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
