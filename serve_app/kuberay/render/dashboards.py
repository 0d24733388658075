"""Grafana's dashboards: the fleet at a glance, one model, and the gateway.

Each is a list of rows of panels; :func:`dashboards` lays them out and turns them into the JSON
that Grafana's sidecar picks up from a ConfigMap.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

_OWN = 'fleet=~"$fleet"'
_MODEL = f'{_OWN},model_name=~"$model"'
_ROUTED = f'{_OWN},model=~"$model"'
_WINDOW = "[$__rate_interval]"


@dataclass(frozen=True)
class Panel:
    """One panel: its queries by legend, and the unit as Grafana names it."""

    title: str
    queries: dict[str, str]
    unit: str = "short"
    kind: str = "timeseries"
    help: str = ""


def _quantile(q: float, metric: str, selector: str, by: str) -> str:
    return (
        f"histogram_quantile({q}, sum by (le, {by}) (rate({metric}_bucket{{{selector}}}{_WINDOW})))"
    )


def _rate(metric: str, selector: str, by: str) -> str:
    return f"sum by ({by}) (rate({metric}{{{selector}}}{_WINDOW}))"


FLEET: list[list[Panel]] = [
    [
        Panel(
            "Healthy replicas",
            {
                "{{application}}": "sum by (application) (ray_serve_deployment_replica_healthy"
                f'{{{_OWN},deployment="ModelServer"}})'
            },
            kind="stat",
        ),
        Panel(
            "Requests per second",
            {"{{model}}": _rate("serve_app_gateway_requests_total", _OWN, "model")},
            "reqps",
        ),
        Panel(
            "Errors of ours (5xx)",
            {
                "{{model}}": _rate(
                    "serve_app_gateway_requests_total", f'{_OWN},code=~"5.."', "model"
                )
                + " / "
                + _rate("serve_app_gateway_requests_total", _OWN, "model")
            },
            "percentunit",
        ),
    ],
    [
        Panel(
            "Tokens generated per second",
            {"{{model_name}}": _rate("vllm:generation_tokens_total", _OWN, "model_name")},
        ),
        Panel(
            "Prompt tokens per second",
            {"{{model_name}}": _rate("vllm:prompt_tokens_total", _OWN, "model_name")},
        ),
        Panel(
            "Time to first token, p95",
            {
                "{{model_name}}": _quantile(
                    0.95, "vllm:time_to_first_token_seconds", _OWN, "model_name"
                )
            },
            "s",
        ),
    ],
    [
        Panel(
            "Requests in batches",
            {"{{model_name}}": f"sum by (model_name) (vllm:num_requests_running{{{_OWN}}})"},
        ),
        Panel(
            "Requests waiting",
            {"{{model_name}}": f"sum by (model_name) (vllm:num_requests_waiting{{{_OWN}}})"},
            help="Above zero for long: the model needs replicas that it does not get.",
        ),
        Panel(
            "KV cache in use",
            {"{{model_name}}": f"max by (model_name) (vllm:kv_cache_usage_perc{{{_OWN}}})"},
            "percentunit",
        ),
    ],
    [
        Panel("Ray nodes", {"nodes": f"max(ray_cluster_active_nodes{{{_OWN}}})"}),
        Panel(
            "Memory per node",
            {"{{pod}}": f"ray_node_mem_used{{{_OWN}}} / ray_node_mem_total{{{_OWN}}}"},
            "percentunit",
        ),
        Panel("CPU per node", {"{{pod}}": f"ray_node_cpu_utilization{{{_OWN}}}"}, "percent"),
    ],
]

MODEL: list[list[Panel]] = [
    [
        Panel(
            "Time to first token",
            {
                f"p{round(q * 100)}": _quantile(
                    q, "vllm:time_to_first_token_seconds", _MODEL, "model_name"
                )
                for q in (0.5, 0.95, 0.99)
            },
            "s",
        ),
        Panel(
            "Time per output token",
            {
                f"p{round(q * 100)}": _quantile(
                    q, "vllm:request_time_per_output_token_seconds", _MODEL, "model_name"
                )
                for q in (0.5, 0.95, 0.99)
            },
            "s",
        ),
        Panel(
            "Whole request",
            {
                f"p{round(q * 100)}": _quantile(
                    q, "vllm:e2e_request_latency_seconds", _MODEL, "model_name"
                )
                for q in (0.5, 0.95, 0.99)
            },
            "s",
        ),
    ],
    [
        Panel(
            "Where a request's time goes (p95)",
            {
                "queue": _quantile(0.95, "vllm:request_queue_time_seconds", _MODEL, "model_name"),
                "prefill": _quantile(
                    0.95, "vllm:request_prefill_time_seconds", _MODEL, "model_name"
                ),
                "decode": _quantile(0.95, "vllm:request_decode_time_seconds", _MODEL, "model_name"),
            },
            "s",
            help="Queue: too few replicas. Prefill: long prompts. Decode: batches too large.",
        ),
        Panel(
            "Tokens per second",
            {
                "generated": _rate("vllm:generation_tokens_total", _MODEL, "model_name"),
                "prompt": _rate("vllm:prompt_tokens_total", _MODEL, "model_name"),
            },
        ),
        Panel(
            "Requests per replica",
            {
                "running {{ReplicaId}}": f"vllm:num_requests_running{{{_MODEL}}}",
                "waiting {{ReplicaId}}": f"vllm:num_requests_waiting{{{_MODEL}}}",
            },
        ),
    ],
    [
        Panel(
            "KV cache per replica",
            {"{{ReplicaId}}": f"vllm:kv_cache_usage_perc{{{_MODEL}}}"},
            "percentunit",
        ),
        Panel(
            "Prefix cache hit rate",
            {
                "hits": _rate("vllm:prefix_cache_hits_total", _MODEL, "model_name")
                + " / "
                + _rate("vllm:prefix_cache_queries_total", _MODEL, "model_name")
            },
            "percentunit",
        ),
        Panel(
            "Preemptions per second",
            {"{{model_name}}": _rate("vllm:num_preemptions_total", _MODEL, "model_name")},
            help="Requests thrown out of a full KV cache and computed again.",
        ),
    ],
    [
        Panel(
            "Why answers ended",
            {"{{finished_reason}}": _rate("vllm:request_success_total", _MODEL, "finished_reason")},
        ),
        Panel(
            "Prompt tokens per request",
            {
                f"p{round(q * 100)}": _quantile(
                    q, "vllm:request_prompt_tokens", _MODEL, "model_name"
                )
                for q in (0.5, 0.95)
            },
        ),
        Panel(
            "Generated tokens per request",
            {
                f"p{round(q * 100)}": _quantile(
                    q, "vllm:request_generation_tokens", _MODEL, "model_name"
                )
                for q in (0.5, 0.95)
            },
        ),
    ],
]

GATEWAY: list[list[Panel]] = [
    [
        Panel(
            "Requests by status",
            {"{{code}}": _rate("serve_app_gateway_requests_total", _ROUTED, "code")},
            "reqps",
        ),
        Panel(
            "Requests in flight",
            {"{{model}}": f"sum by (model) (serve_app_gateway_inflight_requests{{{_ROUTED}}})"},
        ),
        Panel(
            "Retries by reason",
            {
                "{{model}} {{reason}}": _rate(
                    "serve_app_gateway_retries_total", _ROUTED, "model, reason"
                )
            },
            help="A replica refused or went away before its first byte, and another was tried.",
        ),
    ],
    [
        Panel(
            "Time to first byte, p95",
            {
                "{{model}}": _quantile(
                    0.95, "serve_app_gateway_time_to_first_byte_seconds", _ROUTED, "model"
                )
            },
            "s",
        ),
        Panel(
            "Whole request, p95",
            {
                "{{model}}": _quantile(
                    0.95, "serve_app_gateway_request_duration_seconds", _OWN, "model"
                )
            },
            "s",
        ),
        Panel(
            "What the gateway adds to the first token, p50",
            {
                "seconds": _quantile(
                    0.5, "serve_app_gateway_time_to_first_byte_seconds", _ROUTED, "fleet"
                )
                + " - "
                + _quantile(0.5, "vllm:time_to_first_token_seconds", _MODEL, "fleet")
            },
            "s",
        ),
    ],
    [
        Panel(
            "Gateway replicas",
            {
                "{{fleet}}": "sum by (fleet) (ray_serve_deployment_replica_healthy"
                f'{{{_OWN},deployment="Gateway"}})'
            },
            help="As Serve's controller counts them, on the head.",
        ),
        Panel(
            "Errors by model",
            {
                "{{model}} {{code}}": _rate(
                    "serve_app_gateway_requests_total", f'{_ROUTED},code=~"[45].."', "model, code"
                )
            },
            "reqps",
        ),
    ],
]


def dashboards() -> dict[str, str]:
    """The dashboards' JSON by file name."""
    fleet = _variable("fleet", "label_values(ray_cluster_active_nodes, fleet)")
    served = _variable(
        "model", 'label_values(vllm:prompt_tokens_total{fleet=~"$fleet"}, model_name)'
    )
    routed = _variable(
        "model", 'label_values(serve_app_gateway_requests_total{fleet=~"$fleet"}, model)'
    )
    return {
        "serve-app-fleet.json": _dashboard("serve-app: fleet", FLEET, [fleet]),
        "serve-app-model.json": _dashboard("serve-app: model", MODEL, [fleet, served]),
        "serve-app-gateway.json": _dashboard("serve-app: gateway", GATEWAY, [fleet, routed]),
    }


def _variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": name,
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _dashboard(title: str, rows: list[list[Panel]], variables: list[dict[str, Any]]) -> str:
    panels: list[dict[str, Any]] = []
    for y, row in enumerate(rows):
        width = 24 // len(row)
        for x, panel in enumerate(row):
            panels.append(
                {
                    "id": len(panels) + 1,
                    "title": panel.title,
                    "description": panel.help,
                    "type": panel.kind,
                    "datasource": {"type": "prometheus", "uid": "${datasource}"},
                    "gridPos": {"h": 8, "w": width, "x": x * width, "y": y * 8},
                    "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
                    "targets": [
                        {"refId": chr(ord("A") + i), "expr": query, "legendFormat": legend}
                        for i, (legend, query) in enumerate(panel.queries.items())
                    ],
                }
            )
    source = {
        "name": "datasource",
        "type": "datasource",
        "query": "prometheus",
        "current": {"text": "default", "value": "default"},
    }
    document = {
        "title": title,
        "uid": title.replace(": ", "-"),
        "tags": ["serve-app"],
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [source, *variables]},
        "panels": panels,
    }
    return json.dumps(document, indent=1) + "\n"
