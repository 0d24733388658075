"""How many gateways Serve is asked for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.config import AutoscalingConfig

from serve_app import gateway
from serve_app.cluster import capacity
from serve_app.cluster.capacity import Node
from serve_app.errors import ConfigError
from serve_app.gateway import scaling


def asked(replicas: Any) -> tuple[int | None, AutoscalingConfig | None]:
    """The number, or the bounds, that the application asks for."""
    deployment: Any = gateway.app({"replicas": replicas})._bound_deployment
    config = deployment._deployment_config
    return config.num_replicas, config.autoscaling_config


def test_a_number_is_that_many_and_does_not_scale() -> None:
    assert asked(3) == (3, None)


@pytest.mark.parametrize(
    ("cores", "most"),
    [(0, 1), (2, 1), (9.9, 1), (10, 2), (16, 3), (32, 6), (40, 8), (192, 8)],
)
def test_auto_is_one_gateway_to_what_the_cores_allow(
    monkeypatch: pytest.MonkeyPatch, cores: float, most: int
) -> None:
    monkeypatch.setattr(capacity, "cores", lambda: cores)
    _, bounds = asked("auto")
    assert bounds is not None
    assert (bounds.min_replicas, bounds.initial_replicas, bounds.max_replicas) == (1, None, most)
    assert bounds.target_ongoing_requests == scaling.REQUESTS


def test_the_cores_are_the_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr(
        capacity, "nodes", lambda: [Node("a", {"CPU": 8.0}, {}), Node("b", {"CPU": 12.0}, {})]
    )
    assert capacity.cores() == 20


def test_without_a_cluster_they_are_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "os", SimpleNamespace(cpu_count=lambda: 12))
    assert capacity.cores() == 12


def test_on_kubernetes_auto_is_refused_with_what_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway.sys, "tracebacklimit", 1000, raising=False)
    monkeypatch.setenv(gateway.NODES_ENV, "serve-app/role=gateway")
    assert asked(2) == (2, None)
    with pytest.raises(ConfigError, match=r"has a pod of its own.*; give a number, such as 2"):
        asked("auto")
