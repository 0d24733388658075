"""What a change finds when others act before it, between its looks, and after it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("kubernetes", reason="needs the extra 'eks'")

from click.testing import Result
from deploying import BIGGER, CONFIG, NAME, SPACE, answers, config, edited, later, service
from kube_api import KubeAPI
from operator_model import Operator, running

from serve_app.errors import UserError
from serve_app.kuberay.live import deploy
from serve_app.kuberay.live.api_server import Forbidden


def test_bounds_reach_a_cluster_that_the_operator_made_meanwhile(
    api: KubeAPI,
    operator: Operator,
    run: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the spec before: at the preview there was none yet."""
    run("deploy", str(CONFIG), "--no-wait")
    preview = deploy.preview

    def slow(*args: Any, **options: Any) -> deploy.Preview:
        found = preview(*args, **options)
        operator.settle()
        return found

    monkeypatch.setattr(deploy, "preview", slow)
    more = config(tmp_path, ("max_replicas: 2", "max_replicas: 3"))
    output = run("deploy", more, "--no-wait").output
    assert "worker group 'h100-x4': maxReplicas 3 → 4" in output.partition("applied")[2]
    (cluster,) = api.all("rayclusters")
    assert [g["maxReplicas"] for g in cluster["spec"]["workerGroupSpecs"]] == [3, 4]


def test_bounds_reach_a_cluster_that_the_operator_made_after_the_first_look(
    api: KubeAPI,
    operator: Operator,
    run: Callable[..., Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its cache lags: it may make one of the spec before after the apply."""
    answers(api)
    run("deploy", str(CONFIG), "--no-wait")
    operator.settle()
    more = config(tmp_path, ("max_replicas: 2", "max_replicas: 3"))
    settle = deploy.settle
    monkeypatch.setattr(deploy, "settle", lambda *_: monkeypatch.setattr(deploy, "settle", settle))
    with running(operator):
        output = run("deploy", more, "--timeout", "30").output
    assert output.rstrip().endswith("ready: every model answers")
    (cluster,) = api.all("rayclusters")
    assert [g["maxReplicas"] for g in cluster["spec"]["workerGroupSpecs"]] == [3, 4]


def test_bounds_do_not_arrive_unknown(
    api: KubeAPI, operator: Operator, run: Callable[..., Result], tmp_path: Path
) -> None:
    """Who may not list RayClusters cannot know, and is not told that all is ready."""
    run("deploy", str(CONFIG), "--no-wait")
    operator.settle()
    api.forbidden.add(("list", "rayclusters"))
    engine = config(tmp_path, ("max_num_seqs: 256", "max_num_seqs: 128"))
    assert run("deploy", engine, "--no-wait").exit_code == 0
    with pytest.raises(Forbidden, match="not allowed to list RayCluster"):
        run("deploy", config(tmp_path, ("max_replicas: 2", "max_replicas: 3")), "--no-wait")


@pytest.mark.parametrize("command", ["deploy", "diff", "rollback"])
def test_nothing_is_applied_to_what_is_being_deleted(
    api: KubeAPI, operator: Operator, run: Callable[..., Result], command: str
) -> None:
    run("deploy", str(CONFIG), "--no-wait")
    run("deploy", str(CONFIG), "--no-wait")
    operator.settle()
    api.delete("rayservices", SPACE, NAME)
    before = api.get("rayservices", SPACE, NAME)
    of = NAME if command == "rollback" else str(CONFIG)
    how = ("--to", "1", "--no-wait") if command == "rollback" else ()
    with pytest.raises(UserError, match=f"{NAME} is being deleted, .*; deploy again when"):
        run(command, of, *how)
    assert api.get("rayservices", SPACE, NAME) == before
    assert "  it is being deleted\n" in run("status", NAME).output


def test_what_is_deleted_meanwhile_ends_the_wait(
    api: KubeAPI, operator: Operator, run: Callable[..., Result]
) -> None:
    """While its pods drain it is still there, and its models may run."""
    later(api, lambda: api.delete("rayservices", SPACE, NAME))
    run("deploy", str(CONFIG), "--no-wait")
    operator.settle()
    with pytest.raises(UserError, match=f"somebody deletes {NAME}"):
        run("deploy", str(CONFIG), "--timeout", "30")


def test_what_another_tool_set_and_the_config_has_no_more_is_told(
    api: KubeAPI, run: Callable[..., Result]
) -> None:
    """Server-side apply leaves it there, without a conflict, and with --force, too."""
    run("deploy", str(CONFIG), "--no-wait")
    spec = copy.deepcopy(service(api)["spec"]["rayClusterConfig"])
    spec["gcsFaultToleranceOptions"] = {"redisAddress": "redis:6379"}
    edited(api, "argocd-controller", rayClusterConfig=spec)
    note = (
        'spec.rayClusterConfig.gcsFaultToleranceOptions is not of this config: "argocd-controller" '
        "set it, and it stays until taken out there"
    )
    assert run("diff", str(CONFIG)).output == f"this changes nothing\n{note}\n"
    assert note in run("deploy", str(CONFIG), "--no-wait", "--force").output
    assert service(api)["spec"]["rayClusterConfig"] == spec
    # The operator writes fields, too, which hold nothing.
    edited(api, "kuberay-operator", rayClusterConfig=spec | {"suspend": True})
    assert "suspend" not in run("diff", str(CONFIG)).output.partition("this changes")[2]


def test_a_suspended_fleet_has_no_cluster_to_sync(
    api: KubeAPI, operator: Operator, run: Callable[..., Result]
) -> None:
    run("deploy", str(CONFIG), "--no-wait")
    edited(api, "kubectl-patch", suspend=True)
    operator.settle()
    assert run("sync", NAME).output == f"{NAME}: no cluster of it runs now\n"


def test_sync_ends_an_upgrade_that_another_tool_took_back(
    api: KubeAPI, operator: Operator, run: Callable[..., Result], tmp_path: Path
) -> None:
    """KubeRay makes a third cluster, of the spec of the first, beside the stuck second one."""
    run("deploy", str(CONFIG), "--no-wait")
    operator.settle()
    before = service(api)["spec"]
    first = service(api)["status"]["activeServiceStatus"]["rayClusterName"]
    operator.machines.gpus = 0
    run("deploy", config(tmp_path, BIGGER), "--no-wait", "--force")
    operator.settle()
    assert "the cluster that starts is as the RayService says" in run("sync", NAME).output
    edited(api, "argocd-controller", **before)
    operator.settle()
    assert len(api.all("rayclusters")) == 3
    with running(operator):
        output = run("sync", NAME).output
    assert output.count("which had not served") == 2
    assert [c["metadata"]["name"] for c in api.all("rayclusters")] == [first]
    assert "is as the RayService says" in run("sync", NAME).output


def test_a_cluster_that_was_given_up_meanwhile_goes(
    api: KubeAPI,
    operator: Operator,
    run: Callable[..., Result],
    image: Callable[[str], tuple[str, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At the preview of the third image the operator had not yet begun with the second."""
    run(*image("1"))
    operator.settle()
    run(*image("2"))
    preview, record = deploy.preview, deploy.revisions.record

    def slow(*args: Any, **options: Any) -> deploy.Preview:
        found = preview(*args, **options)
        operator.machines.gpus = 0
        operator.settle()
        return found

    def late(*args: Any) -> int:
        operator.settle()  # and takes up the third
        return record(*args)

    monkeypatch.setattr(deploy, "preview", slow)
    monkeypatch.setattr(deploy.revisions, "record", late)
    output = run(*image("3")).output
    assert "starts a second cluster beside" in output
    assert "which had not served" in output
    images = [
        cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["image"]
        for cluster in api.all("rayclusters")
    ]
    assert sorted(images) == ["example.com/serve-app:1", "example.com/serve-app:3"]


def test_a_rollback_brings_the_budgets_back(
    api: KubeAPI, operator: Operator, run: Callable[..., Result], tmp_path: Path
) -> None:
    """That of two replicas would keep the only one of the spec before from ever being drained."""

    def least() -> int:
        budget = api.get("poddisruptionbudgets", SPACE, f"{NAME}-h100-x4")
        assert budget is not None
        return int(budget["spec"]["minAvailable"])

    run("deploy", str(CONFIG), "--no-wait")
    operator.settle()
    run("deploy", config(tmp_path, ("min_replicas: 1", "min_replicas: 2")), "--no-wait")
    assert least() == 1
    run("rollback", NAME, "--no-wait")
    assert least() == 0
    run("rollback", NAME, "--no-wait")
    assert least() == 1
