"""Prometheus: what it scrapes, and its alerts.

vLLM and the gateway hand their metrics to Ray. Ray's agent on each node exports them under names of
its own (``ray_vllm_num_requests_running``). Relabeling restores the names that vLLM documents
(``vllm:num_requests_running``), so that rules and dashboards written for vLLM work here too.
"""

from __future__ import annotations

from typing import Any

from serve_app.config.document import Fleet
from serve_app.config.yaml_files import note
from serve_app.kuberay.render.names import labels

SCRAPE_INTERVAL_S = 15

TTFT_TARGET_S = 2.5
"""The objective: this many seconds to the first token (a bound of vLLM's histogram) …"""

TTFT_OBJECTIVE = 0.95
"""… for this share of the requests, and …"""

ERROR_OBJECTIVE = 0.999
"""… this share of requests without an error of ours (5xx), over 30 days."""

_RELABELINGS = [
    note(
        {
            "sourceLabels": ["__name__"],
            "regex": "ray_vllm_(.+)",
            "targetLabel": "__name__",
            "replacement": "vllm:$1",
        },
        "vLLM's own names.",
    ),
    note(
        {
            "sourceLabels": ["__name__"],
            "regex": "ray_(serve_app_.+)",
            "targetLabel": "__name__",
            "replacement": "$1",
        },
        "The gateway's own names.",
    ),
    note(
        {
            "action": "drop",
            "sourceLabels": ["__name__"],
            "regex": "ray_(grpc_server|gcs_storage|internal_num|scheduler_placement).*",
        },
        "Ray's inner life: two thirds of the series, and no question that an operator asks.",
    ),
    note(
        {
            "action": "labeldrop",
            "regex": "SessionName|Version|otel_scope_.+",
        },
        "Tell nothing. WorkerId and Component stay: some series differ by nothing else, the "
        "gateways' for one, and Prometheus would keep only one of them.",
    ),
]


def pod_monitors(name: str, namespace: str) -> list[dict[str, Any]]:
    """One PodMonitor for all Ray nodes of the fleet, and one for metrics that only the head has."""

    def monitor(suffix: str, selector: dict[str, str], endpoints: list[Any]) -> dict[str, Any]:
        return {
            "apiVersion": "monitoring.coreos.com/v1",
            "kind": "PodMonitor",
            "metadata": {
                "name": f"{name}-{suffix}",
                "namespace": namespace,
                "labels": {
                    **labels(name),
                    "release": note(
                        "kube-prometheus-stack",
                        "Prometheus of that Helm release looks for it; others may not.",
                    ),
                },
            },
            "spec": {
                "selector": {"matchLabels": selector},
                "podMetricsEndpoints": endpoints,
            },
        }

    pod_labels = [
        {"sourceLabels": ["__meta_kubernetes_pod_label_ray_io_cluster"], "targetLabel": "cluster"},
        {
            "sourceLabels": ["__meta_kubernetes_pod_label_app_kubernetes_io_instance"],
            "targetLabel": "fleet",
        },
    ]
    nodes = {
        "port": "metrics",
        "interval": f"{SCRAPE_INTERVAL_S}s",
        "relabelings": pod_labels,
        "metricRelabelings": _RELABELINGS,
    }
    head = [
        {"port": port, "interval": "30s", "relabelings": pod_labels}
        for port in ("as-metrics", "dash-metrics")
    ]
    return [
        monitor("ray-nodes", labels(name) | {"ray.io/is-ray-node": "yes"}, [nodes]),
        monitor("ray-head", labels(name) | {"ray.io/node-type": "head"}, head),
    ]


def prometheus_rules(fleet: Fleet, name: str, namespace: str) -> dict[str, Any]:
    """The alerts as the Prometheus operator takes them."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {
            "name": f"{name}-alerts",
            "namespace": namespace,
            "labels": {**labels(name), "release": "kube-prometheus-stack"},
        },
        "spec": {"groups": rule_groups(name, cold=cold_models(fleet))},
    }


def cold_models(fleet: Fleet) -> list[str]:
    """Models that may be scaled to zero. Their having no replica raises no alert."""
    return [
        name
        for name, model in fleet.models.items()
        if model.autoscaling is not None and model.autoscaling.min_replicas == 0
    ]


def rule_groups(name: str, cold: list[str]) -> list[dict[str, Any]]:
    """Recording rules and alerts of one fleet, as plain Prometheus has them too."""
    own = f'fleet="{name}"'
    servers = f'{own},deployment="ModelServer"'
    if cold:
        servers += f',application!~"{"|".join(cold)}"'
    fast = (
        "sum by (model_name) (rate(vllm:time_to_first_token_seconds_bucket"
        f'{{{own},le="{TTFT_TARGET_S}"}}[%s]))'
        f" / sum by (model_name) (rate(vllm:time_to_first_token_seconds_count{{{own}}}[%s]))"
    )

    def failed(window: str) -> str:
        """What clients got as errors: not what another model answered in place of this one."""

        def per_model(metric: str, selector: str) -> str:
            return (
                f"sum by (model) (rate(serve_app_gateway_{metric}_total{{{selector}}}[{window}]))"
            )

        ours = f'{own},code=~"5.."'
        refused = per_model("requests", ours)
        return (
            f"clamp_min({refused} - ({per_model('fallbacks', ours)} or 0 * {refused}), 0)"
            f" / {per_model('requests', own)}"
        )

    slow_budget, error_budget = 1 - TTFT_OBJECTIVE, 1 - ERROR_OBJECTIVE
    recorded = [
        {
            "record": f"serve_app:slow_first_tokens:ratio_rate{window}",
            "expr": f"1 - ({fast % (window, window)})",
            "labels": {"fleet": name},
        }
        for window in ("5m", "30m", "1h", "6h")
    ] + [
        {
            "record": f"serve_app:errors:ratio_rate{window}",
            "expr": failed(window),
            "labels": {"fleet": name},
        }
        for window in ("5m", "30m", "1h", "6h")
    ]

    def burn(metric: str, budget: float, factor: float, long: str, short: str) -> str:
        bar = f"{factor * budget:.4g}"
        return (
            f"serve_app:{metric}:ratio_rate{long}{{{own}}} > {bar} "
            f"and serve_app:{metric}:ratio_rate{short}{{{own}}} > {bar}"
        )

    failing = (
        '{{ or $labels.model "no model" }}: {{ $value | humanizePercentage }} of requests fail'
    )
    alerts = [
        _alert(
            "ServeAppModelHasNoReplica",
            # Not `sum(...) == 0`: without replicas there is no series to sum. Status 3 is
            # UPDATING, a first start, which may take minutes.
            f"min by (application) (ray_serve_deployment_status{{{servers}}} != 3) "
            "unless on (application) sum by (application) "
            f"(ray_serve_deployment_replica_healthy{{{servers}}}) > 0",
            "2m",
            "page",
            "{{ $labels.application }} has no healthy replica.",
            f"serve-app status {name}; its message names the failing application. Pods Pending: "
            "no GPU to be had (kubectl describe pod). Crash loop: serve-app logs "
            f"{name} {{{{ $labels.application }}}}. Broken by the last deploy: serve-app rollback "
            f"{name}.",
        ),
        _alert(
            "ServeAppErrorsBurnFast",
            burn("errors", error_budget, 14.4, "1h", "5m"),
            "2m",
            "page",
            f"{failing}; the month's budget is gone in two days.",
            f"serve-app logs {name} {{{{ $labels.model }}}} for the first error; a deploy in the "
            f"last hour: serve-app rollback {name}. 503 means no replica took it: look at "
            "ServeAppModelHasNoReplica and at the queue.",
        ),
        _alert(
            "ServeAppErrorsBurnSlowly",
            burn("errors", error_budget, 6, "6h", "30m"),
            "15m",
            "ticket",
            f"{failing} over 6 hours.",
            "Group serve_app_gateway_requests_total by code: 500 is the engine (see its log), "
            "502 a replica that died, 503 none free, 504 one that was silent too long. Without a "
            "model: the gateway itself, for 503 by bodies beyond max_bodies_mib.",
        ),
        _alert(
            "ServeAppFirstTokenBurnsFast",
            burn("slow_first_tokens", slow_budget, 14.4, "1h", "5m"),
            "5m",
            "page",
            "{{ $labels.model_name }}: {{ $value | humanizePercentage }} of first tokens take more "
            f"than {TTFT_TARGET_S} s.",
            "Requests wait (serve_app_gateway_queued_requests): raise max_replicas, or lower "
            "target_load so that replicas come sooner. They do not: prompts grew "
            "(vllm:request_prompt_tokens); lower max_num_batched_tokens or add tensor parallelism.",
        ),
        _alert(
            "ServeAppFirstTokenBurnsSlowly",
            burn("slow_first_tokens", slow_budget, 6, "6h", "30m"),
            "15m",
            "ticket",
            "{{ $labels.model_name }}: first tokens have been slow for 6 hours.",
            "The same as for ServeAppFirstTokenBurnsFast, without the hurry: compare the number "
            "of replicas with max_replicas on the model dashboard.",
        ),
        _alert(
            "ServeAppFallbackAnswers",
            f"sum by (model) (rate(serve_app_gateway_fallbacks_total{{{own}}}[10m])) / "
            f"sum by (model) (rate(serve_app_gateway_requests_total{{{own}}}[10m])) > 0.05",
            "15m",
            "ticket",
            "{{ $labels.model }}: a fallback answers {{ $value | humanizePercentage }} of its "
            "requests.",
            f"serve-app status {name}. Without a replica: serve-app logs {name} "
            "{{ $labels.model }} says why none starts. With replicas: they have no room, raise "
            "max_replicas; in a swap group set fallback_after_s above its max_wait_s.",
        ),
        _alert(
            "ServeAppQueueGrows",
            # The gateway sends an engine hardly more than it runs, so what waits is in the gateway.
            "sum by (model) (avg_over_time(serve_app_gateway_queued_requests"
            f"{{{own}}}[5m])) > 0.33 * sum by (model) "
            f"(avg_over_time(serve_app_gateway_inflight_requests{{{own}}}[5m])) > 8",
            "10m",
            "ticket",
            "{{ $labels.model }}: a third of its requests wait for a replica with room.",
            "At max_replicas already: raise it (and the NodePool's GPU limit). Below it: GPUs are "
            "not to be had, see ServeAppPodsWaitForGPUs.",
        ),
        _alert(
            "ServeAppKVCachePressure",
            f"avg by (model_name) (avg_over_time(vllm:kv_cache_usage_perc{{{own}}}[10m])) > 0.95",
            "10m",
            "ticket",
            "{{ $labels.model_name }}: the KV cache is full for 10 minutes.",
            "Long contexts fill it. In this order: kv_cache_dtype fp8, lower max_model_len, "
            "lower max_num_seqs, more GPUs per replica.",
        ),
        _alert(
            "ServeAppGPUMemoryOverPlan",
            f"max by (model) (serve_app_gateway_gpu_memory_over_plan_bytes{{{own}}}) > 0",
            "5m",
            "ticket",
            "{{ $labels.model }}: an engine holds {{ $value | humanize1024 }}B of its GPU beyond "
            "its part.",
            "A neighbour on the GPU may find no memory, at its next start or under load. Make the "
            "part larger (resources.gpu_share), or set a smaller engine.kv_cache_memory_bytes.",
        ),
        _alert(
            "ServeAppPreemptions",
            f"sum by (model_name) (rate(vllm:num_preemptions_total{{{own}}}[10m])) > 0.1",
            "10m",
            "ticket",
            "{{ $labels.model_name }}: requests are thrown out of the batch and computed again, "
            "{{ $value | humanize }} a second.",
            "More is admitted than the KV cache holds: lower max_num_seqs, or see "
            "ServeAppKVCachePressure.",
        ),
        _alert(
            "ServeAppEngineRestarts",
            "sum by (application) (increase(ray_serve_deployment_replica_starts_total"
            f'{{{own},deployment="ModelServer"}}[1h])) > 3',
            "0m",
            "ticket",
            "{{ $labels.application }}: {{ $value | humanize }} replica starts within an hour.",
            f"serve-app logs {name} {{{{ $labels.application }}}} --previous: CUDA out of memory "
            "(lower gpu_memory_utilization), an OOM kill (raise resources.memory_gib), Xid errors "
            "(the GPU: cordon the node). Scaling up and down counts too: raise downscale_delay_s.",
        ),
        _alert(
            "ServeAppPodsWaitForGPUs",
            "sum by (namespace) (kube_pod_status_unschedulable"
            f'{{namespace!="",pod=~"{name}-.*"}}) > 0',
            "15m",
            "ticket",
            "{{ $value }} pods wait for a machine.",
            "kubectl describe pod says why: NodePool limit reached (raise limits.nvidia.com/gpu), "
            "no capacity in EC2 (reserve some, allow more zones or types), or a label that no "
            "machine has.",
        ),
    ]
    return [
        {"name": f"{name}.slo", "rules": recorded},
        {"name": f"{name}.alerts", "rules": alerts},
    ]


def _alert(
    alert: str, expr: str, wait: str, severity: str, summary: str, remedy: str
) -> dict[str, Any]:
    return {
        "alert": alert,
        "expr": expr,
        "for": wait,
        "labels": {"severity": severity},
        "annotations": {"summary": summary, "remedy": remedy},
    }
