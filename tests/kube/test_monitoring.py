"""Alerts run against Prometheus' own tools; every query uses names that a real run exported."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from harness import exported_metrics
from harness.manifests import ROOT, fleet
from harness.prometheus import ABSENT, PROMTOOL
from harness.queries import (
    DASHBOARDS,
    dropped_labels,
    exported,
    queried,
    relabeled,
    rules,
)

from serve_app.config.engine_args import VLLM_VERSION
from serve_app.config.yaml_files import plain
from serve_app.kuberay.render.monitoring import cold_models, pod_monitors
from serve_app.kuberay.render.profile import RAY_VERSION

DATA = Path(__file__).parent / "data"
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason=ABSENT)

# Not from Ray's agents: kube-state-metrics tells of pods.
_FROM_ELSEWHERE = {"kube_pod_status_unschedulable": frozenset({"namespace", "pod"})}


def check_labels(expression: str, known: dict[str, frozenset[str]]) -> None:
    """Every label that an expression selects or groups by is one that its metrics have."""
    had = set()
    for name, selector in re.findall(r"([a-zA-Z_][\w:]*)\{([^}]*)\}", expression):
        if name in known:
            had |= known[name]
            asked = set(re.findall(r"(\w+)(?:=~|!~|!=|=)", selector))
            assert asked <= known[name], (name, asked - known[name], expression)
    for labels in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression):
        asked = {label.strip() for label in labels.split(",")}
        assert not had or asked <= had, (asked - had, expression)


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@needs_promtool
def test_promtool_accepts_the_rules(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules()))
    output = run("promtool", "check", "rules", "--lint-fatal", "rules.yaml", cwd=tmp_path)
    assert f"SUCCESS: {sum(len(g['rules']) for g in rules()['groups'])} rules found" in output


@needs_promtool
def test_every_alert_fires_on_its_cause_and_only_then(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules()))
    shutil.copy(DATA / "alerts_test.yaml", tmp_path)
    assert "SUCCESS" in run("promtool", "test", "rules", "alerts_test.yaml", cwd=tmp_path)


def test_every_alert_has_a_firing_case_and_a_remedy() -> None:
    alerts = {r["alert"]: r for g in rules()["groups"] for r in g["rules"] if "alert" in r}
    cases = yaml.safe_load((DATA / "alerts_test.yaml").read_text())["tests"]
    fired = {
        c["alertname"] for t in cases for c in t.get("alert_rule_test", []) if "exp_alerts" in c
    }
    assert fired == set(alerts)
    for name, alert in alerts.items():
        assert len(alert["annotations"]["remedy"]) > 60, name
        assert alert["labels"]["severity"] in ("page", "ticket")


def test_every_rule_uses_names_that_exist() -> None:
    recorded = {r["record"] for g in rules()["groups"] for r in g["rules"] if "record" in r}
    known = exported() | _FROM_ELSEWHERE
    for group in rules()["groups"]:
        for rule in group["rules"]:
            names = queried(rule["expr"])
            assert names and names <= known.keys() | recorded, (rule, names - known.keys())
            check_labels(rule["expr"], known)


@pytest.mark.parametrize("name", sorted(DASHBOARDS))
def test_every_panel_asks_for_names_that_exist(name: str) -> None:
    board = json.loads(DASHBOARDS[name])
    known = exported()
    queries = [t["expr"] for p in board["panels"] for t in p["targets"]]
    queries += [v["query"]["query"] for v in board["templating"]["list"] if v["type"] == "query"]
    for query in queries:
        names = queried(query) or set(re.findall(r"label_values\((\w+),", query))
        assert names and names <= known.keys(), (query, names - known.keys())
        check_labels(query, known)


@needs_promtool
@pytest.mark.parametrize("name", sorted(DASHBOARDS))
def test_every_panels_query_parses(tmp_path: Path, name: str) -> None:
    board = json.loads(DASHBOARDS[name])
    expressions = [
        t["expr"].replace("$__rate_interval", "5m") for p in board["panels"] for t in p["targets"]
    ]
    rules_ = [{"record": f"panel:{i}", "expr": e} for i, e in enumerate(expressions)]
    path = tmp_path / "panels.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules_}]}))
    assert f"{len(rules_)} rules found" in run(
        "promtool", "check", "rules", str(path), cwd=tmp_path
    )


def test_grafana_is_given_three_dashboards() -> None:
    assert set(DASHBOARDS) == {f"serve-app-{n}.json" for n in ("fleet", "model", "gateway")}


def test_panels_do_not_overlap_and_have_own_ids() -> None:
    for text in DASHBOARDS.values():
        panels = json.loads(text)["panels"]
        assert len({p["id"] for p in panels}) == len(panels)
        corners = {(p["gridPos"]["x"], p["gridPos"]["y"]) for p in panels}
        assert len(corners) == len(panels)
        assert all(p["gridPos"]["x"] + p["gridPos"]["w"] <= 24 for p in panels)


def test_documented_names_exist_after_relabeling() -> None:
    assert relabeled("ray_vllm_time_to_first_token_seconds") == "vllm:time_to_first_token_seconds"
    assert relabeled("ray_serve_app_gateway_requests_total") == "serve_app_gateway_requests_total"
    assert relabeled("vllm:num_preemptions_total") == "vllm:num_preemptions_total"
    assert relabeled("ray_grpc_server_req_new_total") is None
    assert relabeled("ray_serve_deployment_replica_healthy") is not None


def test_no_label_is_dropped_that_tells_series_apart() -> None:
    """Two gateways on a node differ by WorkerId alone; Prometheus would keep one of them."""
    labels = set().union(*(m.labels for m in exported_metrics.recorded().values()))
    dropped = {label for label in labels if re.fullmatch(dropped_labels(), label)}
    assert dropped and dropped <= exported_metrics.constant_labels()


def test_the_recorded_run_is_of_the_locked_versions() -> None:
    header = exported_metrics.RECORDED.read_text().splitlines()[0]
    assert f"Ray {RAY_VERSION}, vLLM {VLLM_VERSION}" in header


def test_every_metric_of_the_gateway_was_exported() -> None:
    source = (ROOT / "serve_app/gateway/metrics.py").read_text()
    own = set(re.findall(r'"(serve_app_gateway_\w+)"', source))
    assert own and {f"ray_{name}" for name in own} <= exported_metrics.recorded().keys()


def test_a_model_that_may_be_cold_calls_nobody() -> None:
    assert cold_models(fleet("fleet")) == ["bge-reranker-v2-m3"]
    expressions = [r["expr"] for g in rules()["groups"] for r in g["rules"] if "alert" in r]
    assert 'application!~"bge-reranker-v2-m3"' in expressions[0]


def test_the_pod_monitors_select_ports_that_the_pods_have() -> None:
    service = yaml.safe_load((ROOT / "kuberay/fleet/base/rayservice.yaml").read_text())
    cluster = service["spec"]["rayClusterConfig"]
    nodes, head = (plain(m) for m in pod_monitors("fleet", "serve-app"))

    def ports(group: dict[str, Any]) -> set[str]:
        return {p["name"] for p in group["template"]["spec"]["containers"][0]["ports"]}

    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        assert {e["port"] for e in nodes["spec"]["podMetricsEndpoints"]} <= ports(group)
    assert {e["port"] for e in head["spec"]["podMetricsEndpoints"]} <= ports(
        cluster["headGroupSpec"]
    )
