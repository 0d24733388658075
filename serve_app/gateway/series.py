"""Series of metrics: each is declared once, and recorded for two exporters.

prometheus-client keeps them for ``GET /metrics``, in a registry of each gateway's own. Ray exports
them on every node's port, with ``ray_`` before each name. So a query means the same at both.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Generic, TypeVar

import prometheus_client
from prometheus_client import CollectorRegistry
from ray.util import metrics as ray_metrics

prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
# They were a second series for each, which nothing asks for.

Child = TypeVar("Child")


class _Series(Generic[Child]):
    """A series, and its parts by the values of its labels."""

    def __init__(self, of_prometheus: Any, of_ray: Any, labels: tuple[str, ...]) -> None:
        self._of_prometheus = of_prometheus
        self._ray = of_ray
        self._labels = labels
        self._parts: dict[tuple[str, ...], tuple[Child, dict[str, str]]] = {}

    def _part(self, values: tuple[str, ...]) -> tuple[Child, dict[str, str]]:
        """Prometheus' part for these values, and Ray's tags; looking both up costs more."""
        part = self._parts.get(values)
        if part is None:
            child = self._of_prometheus.labels(*values) if values else self._of_prometheus
            tags = dict(zip(self._labels, values, strict=True))
            part = self._parts[values] = child, tags
        return part


class Counter(_Series[prometheus_client.Counter]):
    """What only grows. Its name ends in ``_total``."""

    def __init__(
        self, registry: CollectorRegistry, name: str, help: str, labels: tuple[str, ...] = ()
    ) -> None:
        ours = prometheus_client.Counter(name, help, labels, registry=registry)
        super().__init__(ours, _of_ray(ray_metrics.Counter, name, help, labels), labels)

    def inc(self, *values: str, by: float = 1) -> None:
        """Add ``by`` to the part with these label values."""
        if by > 0:  # Ray refuses to add nothing
            child, tags = self._part(values)
            child.inc(by)
            self._ray.inc(by, tags)


class Gauge(_Series[prometheus_client.Gauge]):
    """What is now."""

    def __init__(
        self, registry: CollectorRegistry, name: str, help: str, labels: tuple[str, ...] = ()
    ) -> None:
        ours = prometheus_client.Gauge(name, help, labels, registry=registry)
        super().__init__(ours, _of_ray(ray_metrics.Gauge, name, help, labels), labels)

    def set(self, value: float, *values: str) -> None:
        """Set the part with these label values."""
        child, tags = self._part(values)
        child.set(value)
        self._ray.set(value, tags)


class Histogram(_Series[prometheus_client.Histogram]):
    """How values are distributed over buckets, which end at ``bounds``."""

    def __init__(
        self,
        registry: CollectorRegistry,
        name: str,
        help: str,
        labels: tuple[str, ...],
        bounds: Sequence[float],
    ) -> None:
        ours = prometheus_client.Histogram(name, help, labels, registry=registry, buckets=bounds)
        theirs = _of_ray(ray_metrics.Histogram, name, help, labels, tuple(bounds))
        super().__init__(ours, theirs, labels)

    def observe(self, value: float, *values: str) -> None:
        """Count a value in the part with these label values."""
        child, tags = self._part(values)
        child.observe(value)
        self._ray.observe(value, tags)


@cache
def _of_ray(
    kind: type, name: str, help: str, labels: tuple[str, ...], bounds: tuple[float, ...] = ()
) -> Any:
    """Ray's metric: one for a process, however many gateways are in it."""
    more = {"boundaries": list(bounds)} if bounds else {}
    return kind(name, help, tag_keys=labels, **more)
