"""docs/eks.md can be followed from top to bottom on an empty cluster."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml
from harness.manifests import KEPT, ROOT, bundle

from serve_app.kuberay.live.api_server import KINDS
from serve_app.kuberay.render.files import cluster_wide

GUIDE = (ROOT / "docs/eks.md").read_text()

PROVIDERS = {
    "monitoring.coreos.com": "helm install kube-prometheus-stack ",
    "ray.io": "helm install kuberay-operator ",
}
"""API groups that an empty cluster of step 1 has not, and the command that brings them."""


def documents_of(path: str) -> list[dict[str, Any]]:
    """What `kubectl apply` finds at a path of the guide; `out` is a rendering of llama70b."""
    there = ROOT / re.sub(r"^out\b", "kuberay/llama70b", path)
    files = [there] if there.is_file() else [f for f in there.iterdir() if f.suffix == ".yaml"]
    found = [d for file in files for d in yaml.safe_load_all(file.read_text())]
    return [d for d in found if d and d["kind"] != "Kustomization"]


def monitored() -> Iterator[dict[str, Any]]:
    """Every document that Prometheus' operator reads."""
    wide = [d for text in cluster_wide().values() for d in yaml.safe_load_all(text)]
    for document in [*wide, *(d for name in KEPT for d in bundle(name))]:
        if str(document.get("apiVersion")).startswith("monitoring.coreos.com/"):
            yield document


def merged(chart: Any, values: Any) -> Any:
    """Helm's merge of a chart's values with those of the user: maps by key, and null removes."""
    if not isinstance(chart, dict) or not isinstance(values, dict):
        return values
    both = {
        key: merged(chart[key], values[key]) if key in chart and key in values else value
        for key, value in (chart | values).items()
    }
    return {key: value for key, value in both.items() if value is not None}


def test_no_command_needs_a_kind_that_a_later_one_brings() -> None:
    applied = list(re.finditer(r"^kubectl apply (?:-n \S+ )?-[fk] (\S+)", GUIDE, re.MULTILINE))
    assert len(applied) >= 5
    for command in applied:
        for document in documents_of(command[1]):
            provider = PROVIDERS.get(document["apiVersion"].partition("/")[0])
            before = GUIDE[: command.start()]
            assert provider is None or provider in before, (command[0], document["kind"])
    assert GUIDE.index(PROVIDERS["ray.io"]) < GUIDE.index("serve-app deploy configs/")


def test_the_operator_does_not_wait_for_prometheus() -> None:
    """Its chart's ServiceMonitor would need Prometheus' CRDs: ours comes with the dashboards."""
    values = yaml.safe_load(cluster_wide()["cluster/operator-values.yaml"])
    monitor = merged({"metrics": {"serviceMonitor": {"enabled": False}}}, values)["metrics"]
    assert not monitor["serviceMonitor"]["enabled"]
    # The name that the chart gives the operator's Service.
    watched = [d["spec"]["selector"]["matchLabels"] for d in monitored() if "Service" in d["kind"]]
    assert {"app.kubernetes.io/name": "kuberay-operator"} in watched


def test_the_operator_has_no_cpu_limit_after_helms_merge() -> None:
    values = yaml.safe_load(cluster_wide()["cluster/operator-values.yaml"])
    chart = {"resources": {"limits": {"cpu": "100m", "memory": "512Mi"}}}  # of 1.7
    assert merged(chart, values)["resources"]["limits"] == {"memory": "1Gi"}


def test_prometheus_and_grafana_select_all_that_is_for_them() -> None:
    release, namespace = re.findall(r"helm install (kube-prom\S+) \S+ -n (\S+)", GUIDE)[0]
    kinds = set()
    for document in monitored():
        kinds.add(document["kind"])
        # By default the stack selects by its Helm release's name, in every namespace.
        assert document["metadata"]["labels"]["release"] == release, document["metadata"]
    assert kinds == {"PodMonitor", "ServiceMonitor", "PrometheusRule"}
    boards = list(yaml.safe_load_all(cluster_wide()["monitoring/dashboards.yaml"]))
    assert {d["metadata"]["labels"]["grafana_dashboard"] for d in boards} == {"1"}
    assert {d["metadata"]["namespace"] for d in boards} == {namespace}


def test_deploy_asks_for_the_versions_that_are_rendered() -> None:
    incremental = {"upgrade": {"strategy": "NewClusterWithIncrementalUpgrade"}}
    found = {}
    for document in [*bundle("llama70b"), *bundle("llama70b", **incremental)]:
        found[document["kind"]] = document["apiVersion"]
    shared = found.keys() & KINDS.keys()
    assert {"RayService", "Ingress", "LoadBalancerConfiguration"} <= shared
    for kind in shared:
        assert KINDS[kind].path.split("/", 2)[2] == found[kind], kind
    # The load balancer controller deprecates v1beta1 from 3.5 on.
    assert found["LoadBalancerConfiguration"] == "gateway.k8s.aws/v1"
    assert found["TargetGroupConfiguration"] == "gateway.k8s.aws/v1"
