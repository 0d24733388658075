"""What a trace receiver wants in headers, in the gateways' pods: a variable, from a Secret."""

from __future__ import annotations

from typing import Any

from serve_app.config.document import Fleet
from serve_app.kuberay.render.profile import ClusterProfile


def why_useless(fleet: Fleet, profile: ClusterProfile) -> str:
    """Why no gateway would send the headers; empty if one does, or there are none."""
    if profile.otlp_headers is None or _traced(fleet):
        return ""
    return (
        "the profile has otlp_headers, but the gateway sends no traces; name their receiver in the "
        "gateway's args, such as otlp_endpoint: http://otel-collector.monitoring:4318, or remove "
        "otlp_headers"
    )


def env(fleet: Fleet, profile: ClusterProfile) -> list[Any]:
    """What a gateway's container gets as a variable."""
    if profile.otlp_headers is None or not _traced(fleet):
        return []
    return [{"name": "OTEL_EXPORTER_OTLP_HEADERS", **profile.otlp_headers.value()}]


def _traced(fleet: Fleet) -> bool:
    return fleet.gateway is not None and fleet.gateway.otlp_endpoint is not None
