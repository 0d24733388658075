"""How many gateway processes there are.

A number is that many. ``auto`` leaves it to Serve: it counts the requests that the gateways have,
a stream until its last byte, and adds a process for every :data:`REQUESTS` of them, up to what the
cores allow. One that it takes away gets no new requests and finishes those that it has.
"""

from __future__ import annotations

from typing import Any

from serve_app.cluster import capacity
from serve_app.cluster.autoscaling import LOOK_BACK_S, REPORT_INTERVAL_S
from serve_app.config.settings import GatewayConfig

REQUESTS = 100
"""Requests at once for one process. On an H100 a 1B model streams 256 of them at about 140 tokens
per second each (four front ends): 100 are half of what one process relays, 20,000 to 30,000."""

CORES = 5
"""Cores of the cluster for each process. Three served four front ends on 16 cores; beside each,
there are front ends, an engine, HAProxy and Ray to run."""

MOST = 8
"""The most that ``auto`` gives: 800 requests at once. More than three have not been measured."""

UPSCALE_DELAY_S = 5.0
"""Seconds for which the requests must be too many: a process is ready a few seconds later."""

DOWNSCALE_DELAY_S = 600.0
"""Seconds for which they must be few enough: one that idles costs less than one that is missing."""


def options(config: GatewayConfig) -> dict[str, Any]:
    """Serve's options for the number of gateways."""
    if config.replicas != "auto":
        return {"num_replicas": config.replicas}
    return {"autoscaling_config": autoscaling(most(capacity.cores()))}


def most(cores: float) -> int:
    """The most gateways on so many cores: 1 at least."""
    return max(1, min(MOST, int(cores // CORES)))


def autoscaling(most: int) -> dict[str, Any]:
    """Serve's ``autoscaling_config`` for one to ``most`` gateways."""
    return {
        "min_replicas": 1,
        "max_replicas": most,
        "target_ongoing_requests": REQUESTS,
        "upscale_delay_s": UPSCALE_DELAY_S,
        "downscale_delay_s": DOWNSCALE_DELAY_S,
        "look_back_period_s": LOOK_BACK_S,
        "metrics_interval_s": REPORT_INTERVAL_S,
    }
