"""What dashboards and alerts ask for, and what Prometheus has of a real run."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from harness import exported_metrics
from harness.manifests import fleet
from serve_app.config.yaml_files import plain
from serve_app.kuberay.render.files import cluster_wide
from serve_app.kuberay.render.monitoring import pod_monitors, prometheus_rules

# What Prometheus and the PodMonitor add to each sample.
_OF_THE_POD = frozenset({"namespace", "pod", "container", "cluster", "fleet"})


# Grafana's dashboards, their JSON by file name.
DASHBOARDS: dict[str, str] = {
    name: text
    for config_map in yaml.safe_load_all(cluster_wide()["monitoring/dashboards.yaml"])
    for name, text in config_map["data"].items()
}


def rules() -> dict[str, Any]:
    spec: dict[str, Any] = plain(prometheus_rules(fleet("fleet"), "fleet", "serve-app"))["spec"]
    return spec


def relabeled(name: str) -> str | None:
    """What the PodMonitor makes of an exported name; None for a series that it drops."""
    monitor = plain(pod_monitors("fleet", "serve-app")[0])
    for rule in monitor["spec"]["podMetricsEndpoints"][0]["metricRelabelings"]:
        if rule.get("sourceLabels") != ["__name__"]:
            continue
        match = re.fullmatch(rule["regex"], name)
        if match and rule.get("action") == "drop":
            return None
        if match:
            name = rule["replacement"].replace("$1", match[1])
    return name


def exported() -> dict[str, frozenset[str]]:
    """Samples that Prometheus has of a real run: their labels by their names."""
    names: dict[str, frozenset[str]] = {}
    for name, metric in exported_metrics.recorded().items():
        found = relabeled(name)
        if found is not None:
            ends = ("_bucket", "_count", "_sum") if metric.kind == "histogram" else ("",)
            kept = frozenset(k for k in metric.labels if not re.fullmatch(dropped_labels(), k))
            names |= {found + end: kept | _OF_THE_POD for end in ends}
            if metric.kind == "histogram":
                names[f"{found}_bucket"] |= {"le"}
    return names


def dropped_labels() -> str:
    monitor = plain(pod_monitors("fleet", "serve-app")[0])
    rules_ = monitor["spec"]["podMetricsEndpoints"][0]["metricRelabelings"]
    (found,) = [rule["regex"] for rule in rules_ if rule.get("action") == "labeldrop"]
    return str(found)


def kept_labels(labels: dict[str, str]) -> dict[str, str]:
    return {k: v for k, v in labels.items() if not re.fullmatch(dropped_labels(), k)}


def queried(expression: str) -> set[str]:
    """The names of the metrics in a PromQL expression; ours all have a selector."""
    return set(re.findall(r"([a-zA-Z_][\w:]*)\{", expression))


def every_query() -> list[str]:
    panels = [p for text in DASHBOARDS.values() for p in json.loads(text)["panels"]]
    alerts = [rule["expr"] for group in rules()["groups"] for rule in group["rules"]]
    return alerts + [target["expr"] for panel in panels for target in panel["targets"]]
