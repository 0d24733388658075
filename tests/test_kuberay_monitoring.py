"""Alerts run against Prometheus' own tools; every query uses a name that a real run exported."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from kuberay_fixtures import ROOT, fleet

from serve_app.kuberay.dashboards import dashboards
from serve_app.kuberay.monitoring import cold_models, pod_monitors, prometheus_rules
from serve_app.kuberay.yamlfile import plain

DATA = Path(__file__).parent / "data"
PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="needs promtool (apt: prometheus)")

# Not from Ray's agents: kube-state-metrics tells of pods.
_FROM_ELSEWHERE = {"kube_pod_status_unschedulable"}


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


def exported() -> set[str]:
    """Names of samples, after relabeling, that a real run's agent exported."""
    lines = (DATA / "exported_metrics.txt").read_text().splitlines()
    names = set()
    for line in lines:
        if line and not line.startswith("#"):
            name, kind = line.split()
            found = relabeled(name)
            if found is not None:
                ends = ("_bucket", "_count", "_sum") if kind == "histogram" else ("",)
                names |= {found + end for end in ends}
    return names


def queried(expression: str) -> set[str]:
    """The names of the metrics in a PromQL expression; ours all have a selector."""
    return set(re.findall(r"([a-zA-Z_][\w:]*)\{", expression))


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
    known = exported() | recorded | _FROM_ELSEWHERE
    for group in rules()["groups"]:
        for rule in group["rules"]:
            names = queried(rule["expr"])
            assert names and names <= known, (rule, names - known)


@pytest.mark.parametrize("name", sorted(dashboards()))
def test_every_panel_asks_for_names_that_exist(name: str) -> None:
    board = json.loads(dashboards()[name])
    known = exported()
    queries = [t["expr"] for p in board["panels"] for t in p["targets"]]
    queries += [v["query"]["query"] for v in board["templating"]["list"] if v["type"] == "query"]
    for query in queries:
        names = queried(query) or set(re.findall(r"label_values\((\w+),", query))
        assert names and names <= known, (query, names - known)


@needs_promtool
@pytest.mark.parametrize("name", sorted(dashboards()))
def test_every_panels_query_parses(tmp_path: Path, name: str) -> None:
    board = json.loads(dashboards()[name])
    expressions = [
        t["expr"].replace("$__rate_interval", "5m") for p in board["panels"] for t in p["targets"]
    ]
    rules_ = [{"record": f"panel:{i}", "expr": e} for i, e in enumerate(expressions)]
    path = tmp_path / "panels.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules_}]}))
    assert f"{len(rules_)} rules found" in run(
        "promtool", "check", "rules", str(path), cwd=tmp_path
    )


def test_panels_do_not_overlap_and_have_own_ids() -> None:
    for text in dashboards().values():
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
