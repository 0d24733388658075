"""The stand-in itself: it does what a real control plane with KubeRay 1.7 was seen to do."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deploying
import pytest
import yaml
from click.testing import CliRunner
from controllers import Refused, evict
from deploying import CONFIG, GROUPS, NAME, OPERATORS, SPACE, owners, service
from harness.manifests import bundle
from kube_api import KubeAPI
from operator_model import Operator, running

from serve_app.errors import UserError
from serve_app.kuberay import cli
from serve_app.kuberay.live.api_server import APIServer

Document = dict[str, Any]
Change = Callable[[Document], Any]

MODEL = "llama-3.3-70b"
INCREMENTAL = {
    "type": "NewClusterWithIncrementalUpgrade",
    "clusterUpgradeOptions": {
        "gatewayClassName": "alb",
        "maxSurgePercent": 50,
        "stepSizePercent": 50,
        "intervalSeconds": 10,
    },
}


@pytest.fixture(scope="session")
def rendered() -> Document:
    return next(d for d in bundle(NAME) if d["kind"] == "RayService")


@pytest.fixture
def apply(api: KubeAPI, rendered: Document) -> Callable[..., Document]:
    """Apply the rendered RayService with these changes of its spec."""

    def apply(*changes: Change) -> Document:
        document = copy.deepcopy(rendered)
        for change in changes:
            change(document["spec"])
        code, answer = api.apply("rayservices", document, "serve-app", force=True, dry_run=False)
        assert code in (200, 201), answer
        return answer

    return apply


@pytest.fixture
def server(kubeconfig: Path) -> APIServer:
    return APIServer.connect(kubeconfig)


def image(tag: str) -> Change:
    """Another image in every pod: a new cluster."""

    def change(spec: Document) -> None:
        config = spec["rayClusterConfig"]
        for group in (config["headGroupSpec"], *config["workerGroupSpecs"]):
            for container in group["template"]["spec"]["containers"]:
                container["image"] = f"example.com/serve-app:{tag}"

    return change


def bounds(least: int, most: int) -> Change:
    """Other bounds of the GPU group."""
    return lambda spec: spec["rayClusterConfig"]["workerGroupSpecs"][1].update(
        minReplicas=least, maxReplicas=most
    )


def appended(spec: Document) -> None:
    """A worker group more, at the end."""
    groups = spec["rayClusterConfig"]["workerGroupSpecs"]
    groups.append(copy.deepcopy(groups[1]) | {"groupName": "more", "minReplicas": 1})


def config(*replaced: tuple[str, str]) -> Change:
    """Another serveConfigV2."""

    def change(spec: Document) -> None:
        for old, new in replaced:
            assert old in spec["serveConfigV2"]
            spec["serveConfigV2"] = spec["serveConfigV2"].replace(old, new)

    return change


NOPE = config(deploying.NOPE)


def upgrade(**strategy: Any) -> Change:
    return lambda spec: spec.update(upgradeStrategy=strategy)


def status(api: KubeAPI) -> Document:
    return service(api)["status"]


def applications(api: KubeAPI, which: str = "active") -> dict[str, str]:
    """Serve's word for each application of a cluster; empty where the field is absent."""
    entries = status(api)[f"{which}ServiceStatus"].get("applicationStatuses", {})
    return {name: entry["status"] for name, entry in entries.items()}


def cluster(api: KubeAPI, which: str = "active") -> str:
    return str(status(api)[f"{which}ServiceStatus"].get("rayClusterName", ""))


def clusters(api: KubeAPI) -> list[str]:
    return [document["metadata"]["name"] for document in api.all("rayclusters", SPACE)]


def condition(api: KubeAPI, kind: str) -> Document:
    return next(c for c in status(api)["conditions"] if c["type"] == kind)


def pods(api: KubeAPI, group: str) -> list[Document]:
    return [p for p in api.all("pods", SPACE) if p["metadata"]["labels"]["ray.io/group"] == group]


RUNNING = {MODEL: "RUNNING", "gateway": "RUNNING"}


# --- the operator -------------------------------------------------------------------------------


def test_a_first_cluster_is_pending_until_every_application_runs(
    api: KubeAPI, operator: Operator, apply: Callable[..., Document]
) -> None:
    apply()
    operator.step()
    assert service(api)["metadata"]["finalizers"] == ["ray.io/rayservice-finalizer"]
    assert "status" not in service(api)
    operator.step()
    assert (cluster(api), bool(cluster(api, "pending"))) == ("", True)
    assert condition(api, "Ready")["reason"] == "Initializing"
    operator.settle()
    assert clusters(api) == [cluster(api)] and not cluster(api, "pending")
    assert applications(api) == RUNNING
    assert condition(api, "Ready")["reason"] == "NonZeroServeEndpoints"
    marks = api.all("rayclusters")[0]["metadata"]["annotations"]
    assert marks["ray.io/num-worker-groups"] == "2"
    assert marks["ray.io/kuberay-version"] == "v1.7.0"
    assert len(marks["ray.io/hash-without-replicas-and-workers-to-delete"]) == 40


def test_the_operators_first_update_takes_no_field_of_a_rendering(
    api: KubeAPI, operator: Operator, apply: Callable[..., Document]
) -> None:
    apply()
    operator.step()
    assert {path for path, who in owners(api).items() if OPERATORS in who} == {
        ("spec", "serveService", "status", "loadBalancer")
    }
    assert service(api)["metadata"]["generation"] == 2


def test_the_operators_first_update_owns_a_list_into_which_it_wrote(
    api: KubeAPI, operator: Operator, apply: Callable[..., Document], rendered: Document
) -> None:
    """An older rendering left scaleStrategy out, and its second apply was refused."""

    def without(spec: Document) -> None:
        for group in spec["rayClusterConfig"]["workerGroupSpecs"]:
            del group["scaleStrategy"]

    apply(without)
    operator.step()
    assert owners(api)[GROUPS] == {OPERATORS}
    old = copy.deepcopy(rendered)
    without(old["spec"])
    code, status = api.apply("rayservices", old, "serve-app", force=False, dry_run=False)
    assert code == 409
    assert status["message"] == (
        'Apply failed with 1 conflict: conflict with "kuberay-operator" using ray.io/v1: '
        ".spec.rayClusterConfig.workerGroupSpecs"
    )


def test_a_raycluster_is_written_when_groups_are_appended_only(
    api: KubeAPI, operator: Operator, apply: Callable[..., Document]
) -> None:
    def groups() -> list[Document]:
        groups: list[Document] = api.all("rayclusters")[0]["spec"]["workerGroupSpecs"]
        return groups

    apply()
    operator.settle()
    apply(bounds(2, 5))
    operator.settle()
    assert (groups()[1]["minReplicas"], groups()[1]["maxReplicas"]) == (1, 3)
    assert len(pods(api, "h100-x4")) == 1
    assert condition(api, "Ready")["observedGeneration"] == service(api)["metadata"]["generation"]
    # Ray's autoscaler adds a replica. What is appended brings the whole spec along.
    scaled = copy.deepcopy(api.all("rayclusters")[0])
    scaled["spec"]["workerGroupSpecs"][0]["replicas"] = 3
    api.update("rayclusters", scaled, "autoscaler")
    operator.settle()
    assert len(pods(api, "gateway")) == 3
    apply(bounds(2, 5), appended)
    operator.settle()
    assert [group["groupName"] for group in groups()] == ["gateway", "h100-x4", "more"]
    assert (groups()[1]["minReplicas"], groups()[1]["maxReplicas"]) == (2, 5)
    assert groups()[0]["replicas"] == 0 and len(pods(api, "gateway")) == 3  # only Ray removes pods
    assert len(clusters(api)) == 1


def test_tolerations_make_no_new_cluster(
    api: KubeAPI, operator: Operator, apply: Callable[..., Document]
) -> None:
    def tolerant(spec: Document) -> None:
        pod = spec["rayClusterConfig"]["workerGroupSpecs"][1]["template"]["spec"]
        pod["tolerations"] = [{"key": "mine", "operator": "Exists"}]

    apply()
    operator.settle()
    before = copy.deepcopy(api.all("rayclusters"))
    apply(tolerant)
    operator.settle()
    assert api.all("rayclusters") == before


def test_under_strategy_none_a_new_spec_does_nothing(
    api: KubeAPI, operator: Operator, apply: Callable[..., Document]
) -> None:
    none = upgrade(type="None")
    apply(none)
    operator.settle()
    before = clusters(api)
    apply(none, image("2"))
    operator.settle()
    assert clusters(api) == before and not cluster(api, "pending")
    assert status(api)["observedGeneration"] == service(api)["metadata"]["generation"]
    # Applications are changed in place all the same.
    apply(none, image("2"), NOPE)
    operator.settle()
    assert applications(api)[MODEL] == "DEPLOY_FAILED"


def test_a_new_generation_is_observed_one_reconcile_before_its_statuses(
    api: KubeAPI, operator: Operator, apply: Callable[..., Document]
) -> None:
    apply(NOPE)
    operator.settle()
    # Not all applications ran, so nothing was promoted: the first cluster is still the pending one.
    assert applications(api, "pending")[MODEL] == "DEPLOY_FAILED"
    apply()
    operator.settle()
    assert applications(api) == RUNNING
    apply(NOPE)
    operator.settle()
    mended = apply()["metadata"]["generation"]
    assert status(api)["observedGeneration"] < mended
    operator.step()
    assert status(api)["observedGeneration"] == mended
    assert condition(api, "Ready")["observedGeneration"] == mended
    assert applications(api)[MODEL] == "DEPLOY_FAILED"
    operator.step()
    assert applications(api)[MODEL] == "DEPLOYING"
    operator.step()
    assert applications(api)[MODEL] == "RUNNING"


def test_an_invalid_spec_is_told_of_the_generation_observed_before(
    api: KubeAPI, operator: Operator, apply: Callable[..., Document]
) -> None:
    valid = apply()["metadata"]["generation"] + 1  # the operator's own Update makes one more
    operator.settle()
    invalid = apply(bounds(4, 3))["metadata"]["generation"]
    operator.step()
    assert status(api)["observedGeneration"] == valid < invalid
    ready = condition(api, "Ready")
    assert (ready["status"], ready["reason"]) == ("False", "ValidationFailed")
    assert ready["observedGeneration"] == valid  # not the one that it is about
    assert ready["message"] == (
        "The RayService spec is invalid: "
        "worker group h100-x4 has minReplicas 4 greater than maxReplicas 3"
    )
    (event,) = [e for e in api.all("events") if e["type"] == "Warning"]
    assert event["reason"] == "InvalidRayServiceSpec"


def test_events_of_the_operator_have_an_event_time_and_a_series(
    api: KubeAPI, operator: Operator, apply: Callable[..., Document]
) -> None:
    apply()
    operator.settle()
    apply(lambda spec: spec.update(serveConfigV2="no: applications"))
    operator.step()

    def event() -> Document:
        (event,) = [e for e in api.all("events") if e["type"] == "Warning"]
        return event

    assert (event()["firstTimestamp"], event()["lastTimestamp"]) == (None, None)
    assert event()["reason"] == "FailedToUpdateServeApplications"
    assert event()["involvedObject"]["kind"] == "RayService"
    first = event()["eventTime"]
    assert "series" not in event()
    operator.clock.ahead_s += 60
    operator.step()
    assert event()["eventTime"] == first
    assert event()["series"]["count"] == 2
    assert event()["series"]["lastObservedTime"] > first


def test_statuses_of_the_active_cluster_are_absent_beside_a_pending_one(
    api: KubeAPI, operator: Operator, apply: Callable[..., Document]
) -> None:
    apply()
    operator.settle()
    operator.machines.gpus = 4
    apply(image("2"))
    operator.settle()
    assert "applicationStatuses" not in status(api)["activeServiceStatus"]
    assert applications(api, "pending") == {MODEL: "DEPLOYING", "gateway": "RUNNING"}
    assert condition(api, "UpgradeInProgress")["reason"] == "BothActivePendingClustersExist"
    assert condition(api, "Ready")["status"] == "True"
    (waiting,) = [p for p in pods(api, "h100-x4") if p["status"]["phase"] == "Pending"]
    (why,) = waiting["status"]["conditions"]
    assert why["message"] == "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    operator.machines.gpus = 8
    operator.settle()
    assert applications(api) == RUNNING and not cluster(api, "pending")


def test_statuses_are_absent_while_the_head_is_not_ready(
    api: KubeAPI, operator: Operator, apply: Callable[..., Document]
) -> None:
    apply()
    operator.settle()
    (head,) = pods(api, "headgroup")
    operator.machines.unready.add("headgroup")
    api.delete("pods", SPACE, head["metadata"]["name"])
    operator.settle()
    assert "applicationStatuses" not in status(api)["activeServiceStatus"]
    assert condition(api, "Ready")["status"] == "True"
    # Without Redis the new head knows of no application: the config is PUT again.
    operator.machines.unready.clear()
    operator.settle()
    assert applications(api) == RUNNING
    puts = [e for e in api.all("events") if e["reason"] == "UpdatedServeApplications"]
    assert len(puts) == 2


def stuck(api: KubeAPI, operator: Operator, apply: Callable[..., Document]) -> tuple[str, str]:
    """An upgrade whose second cluster gets no GPUs: the names of both."""
    apply()
    operator.settle()
    operator.machines.gpus = 4
    apply(image("2"))
    operator.settle()
    return cluster(api), cluster(api, "pending")


def test_a_rollback_out_of_a_stuck_upgrade_makes_a_third_cluster(
    api: KubeAPI, operator: Operator, apply: Callable[..., Document]
) -> None:
    first, second = stuck(api, operator, apply)
    apply()
    operator.settle()
    third = cluster(api, "pending")
    assert cluster(api) == first and third not in (first, second)
    assert sorted(clusters(api)) == sorted([first, second, third])
    assert len([p for p in pods(api, "h100-x4") if p["status"]["phase"] == "Pending"]) == 2


def test_without_its_pending_status_a_rolled_back_upgrade_is_over(
    api: KubeAPI, operator: Operator, apply: Callable[..., Document], server: APIServer
) -> None:
    first, second = stuck(api, operator, apply)
    apply()
    path = f"/apis/ray.io/v1/namespaces/{SPACE}/rayservices/{NAME}/status"
    body = json.dumps({"status": {"pendingServiceStatus": None}})
    code, answer = server._send("PATCH", path, {}, body, "application/merge-patch+json")
    assert code == 200, answer
    operator.settle()
    assert (cluster(api), cluster(api, "pending")) == (first, "")
    assert condition(api, "UpgradeInProgress")["reason"] == "NoPendingCluster"
    assert applications(api) == RUNNING
    assert second in clusters(api)


def test_a_cluster_left_over_lives_on_for_the_deletion_delay(
    api: KubeAPI, operator: Operator, apply: Callable[..., Document]
) -> None:
    apply()
    operator.settle()
    first = cluster(api)
    apply(image("2"))
    operator.settle()
    assert sorted(clusters(api)) == sorted([first, cluster(api)]) and cluster(api) != first
    operator.clock.ahead_s += 950
    operator.settle()
    assert first in clusters(api)
    operator.clock.ahead_s += 20
    operator.settle()
    assert clusters(api) == [cluster(api)]
    assert not [p for p in api.all("pods") if p["metadata"]["name"].startswith(first)]


def test_a_suspended_service_has_conditions_and_nothing_else(
    api: KubeAPI, operator: Operator, apply: Callable[..., Document]
) -> None:
    def suspended(spec: Document) -> None:
        spec["suspend"] = True

    apply()
    operator.settle()
    apply(suspended)
    operator.step()
    assert condition(api, "Suspending")["reason"] == "SuspendRequested"
    assert clusters(api)
    operator.settle()
    assert condition(api, "Suspended")["status"] == "True"
    ready = condition(api, "Ready")
    assert (ready["status"], ready["reason"]) == ("False", "SuspendComplete")
    assert (cluster(api), cluster(api, "pending"), applications(api)) == ("", "", {})
    assert status(api)["numServeEndpoints"] == 0
    for plural in ("rayclusters", "services", "pods", "endpointslices"):
        assert api.all(plural) == []
    apply()
    operator.settle()
    assert condition(api, "Suspended")["reason"] == "RayServiceResumed"
    assert applications(api) == RUNNING


def shares(api: KubeAPI) -> list[tuple[int | None, int | None]]:
    """Target capacity and routed traffic of both clusters."""
    parts = (status(api)[f"{which}ServiceStatus"] for which in ("active", "pending"))
    return [(part.get("targetCapacity"), part.get("trafficRoutedPercent")) for part in parts]


def test_an_incremental_upgrade_moves_capacity_and_traffic_in_steps(
    api: KubeAPI, operator: Operator, apply: Callable[..., Document]
) -> None:
    incremental = upgrade(**INCREMENTAL)
    apply(incremental)
    operator.settle()
    first = cluster(api)
    apply(incremental, image("2"))
    seen = []
    while not seen or cluster(api) == first:
        operator.step()
        if shares(api) not in seen:
            seen.append(shares(api))
        if applications(api, "pending"):  # unlike in an upgrade with NewCluster
            assert applications(api) == RUNNING
        operator.clock.ahead_s += 11
    assert seen == [
        [(100, 100), (0, None)],
        [(100, 100), (0, 0)],
        [(100, 100), (50, 0)],  # the new cluster grows
        [(100, 50), (50, 50)],  # traffic moves
        [(50, 50), (50, 50)],  # the old cluster shrinks
        [(50, 0), (100, 100)],
        [(100, 100), (None, None)],  # promoted
    ]


def test_a_step_of_traffic_waits_for_its_interval(
    api: KubeAPI, operator: Operator, apply: Callable[..., Document]
) -> None:
    incremental = upgrade(**INCREMENTAL)
    apply(incremental)
    operator.settle()
    apply(incremental, image("2"))
    operator.settle()
    assert shares(api) == [(100, 100), (50, 0)]  # its traffic was set to 0 just now
    operator.clock.ahead_s += 11
    operator.settle()
    assert shares(api) == [(50, 50), (100, 50)]


def test_an_incremental_upgrade_goes_back_to_the_cluster_that_it_came_from(
    api: KubeAPI, operator: Operator, apply: Callable[..., Document]
) -> None:
    incremental = upgrade(**INCREMENTAL)
    apply(incremental)
    operator.settle()
    first = cluster(api)
    apply(incremental, image("2"))
    operator.settle()
    operator.clock.ahead_s += 11
    operator.settle()
    apply(incremental)
    operator.step()
    back = condition(api, "RollbackInProgress")
    assert (back["status"], back["reason"]) == ("True", "DesiredClusterSpecChanged")
    for _ in range(5):
        operator.clock.ahead_s += 11
        operator.settle()
    assert "RollbackInProgress" not in [c["type"] for c in status(api)["conditions"]]
    assert (cluster(api), cluster(api, "pending")) == (first, "")
    assert shares(api)[0] == (100, 100)


def test_a_deleted_rayservice_is_there_until_its_clusters_are_gone(
    api: KubeAPI, operator: Operator, apply: Callable[..., Document], server: APIServer
) -> None:
    apply()
    operator.settle()
    server.delete("RayService", NAME, SPACE)
    assert "deletionTimestamp" in service(api)["metadata"]
    assert clusters(api)
    operator.settle()
    assert api.get("rayservices", SPACE, NAME) is None
    for plural in ("rayclusters", "services", "pods", "endpointslices"):  # the garbage collector
        assert api.all(plural) == []


def test_while_the_operator_is_away_a_spec_is_not_observed(
    api: KubeAPI, operator: Operator, apply: Callable[..., Document]
) -> None:
    apply()
    operator.settle()
    operator.away = True
    generation = apply(image("2"))["metadata"]["generation"]
    operator.settle()
    assert status(api)["observedGeneration"] == generation - 1
    assert applications(api) == RUNNING


# --- Serve, pods and Services -------------------------------------------------------------------


def test_serve_tells_a_failed_update_twice_and_why_in_the_deployment_only(
    api: KubeAPI, operator: Operator, apply: Callable[..., Document]
) -> None:
    apply()
    operator.settle()
    apply(NOPE)
    said = []
    for _ in range(5):
        operator.step()
        said.append(status(api)["activeServiceStatus"]["applicationStatuses"][MODEL])
    trying, failed = said[2], said[-1]
    assert trying["status"] == "DEPLOYING" and "message" not in trying
    why = trying["serveDeploymentStatuses"]["ModelServer"]
    assert why["message"].startswith("A replica failed to start with exception. Retrying")
    assert failed["status"] == "DEPLOY_FAILED"
    assert failed["message"] == "Failed to update the deployments ['ModelServer']."
    why = failed["serveDeploymentStatuses"]["ModelServer"]
    assert why["status"] == "DEPLOY_FAILED"
    assert why["message"].startswith(
        "The deployment failed to start 3 times in a row during a rolling update."
    )
    assert "UserError: '/nope' is neither a folder nor a hub id" in why["message"]
    assert applications(api)["gateway"] == "RUNNING"


def test_a_pod_that_is_being_deleted_counts_and_is_replaced_when_it_is_gone(
    api: KubeAPI, operator: Operator, apply: Callable[..., Document]
) -> None:
    apply()
    operator.settle()
    (old,) = pods(api, "h100-x4")
    operator.machines.draining = True
    evict(api, SPACE, old["metadata"]["name"])
    operator.settle()
    (still,) = pods(api, "h100-x4")
    assert still["metadata"]["name"] == old["metadata"]["name"]
    assert "deletionTimestamp" in still["metadata"]
    operator.machines.draining = False
    operator.settle()
    (new,) = pods(api, "h100-x4")
    assert new["metadata"]["name"] != old["metadata"]["name"]


@pytest.mark.parametrize("least", [{"maxUnavailable": 1}, {"minAvailable": "50%"}])
def test_a_budget_that_needs_the_number_of_wanted_pods_allows_no_disruption(
    api: KubeAPI, operator: Operator, apply: Callable[..., Document], least: Document
) -> None:
    def budget(**least: Any) -> Document:
        selector = {"matchLabels": {"ray.io/group": "gateway"}}
        document = {
            "metadata": {"name": "gateway", "namespace": SPACE},
            "spec": {"selector": selector, **least},
        }
        api.store("poddisruptionbudgets", document)
        operator.settle()
        return dict(api.objects["poddisruptionbudgets", SPACE, "gateway"]["status"])

    apply()
    operator.settle()
    status = budget(**least)
    (why,) = status["conditions"]
    assert (why["type"], why["status"], why["reason"]) == (
        "DisruptionAllowed",
        "False",
        "SyncFailed",
    )
    assert why["message"] == "rayclusters.ray.io does not implement the scale subresource"
    assert status["disruptionsAllowed"] == 0
    (one, _) = pods(api, "gateway")
    with pytest.raises(Refused) as refused:
        evict(api, SPACE, one["metadata"]["name"])
    assert refused.value.args[0] == 429
    assert budget(minAvailable=1)["disruptionsAllowed"] == 1
    evict(api, SPACE, one["metadata"]["name"])


def test_gpu_pods_are_endpoints_without_ports_and_no_request_goes_there(
    api: KubeAPI, operator: Operator, apply: Callable[..., Document], server: APIServer
) -> None:
    def ask() -> tuple[int, str]:
        body = {"model": MODEL, "prompt": "ready?", "max_tokens": 1}
        where = f"{NAME}-serve-svc:serve"
        return server.through_service(where, SPACE, "POST", "/v1/completions", body)

    operator.machines.unready.add("gateway")
    apply()
    operator.settle()
    slices = {
        tuple(p["name"] for p in s["ports"] or []): s["endpoints"]
        for s in api.all("endpointslices")
        if s["metadata"]["labels"]["kubernetes.io/service-name"] == f"{NAME}-serve-svc"
    }
    assert [e["conditions"]["ready"] for e in slices["serve",]] == [False, False]
    assert [e["conditions"]["ready"] for e in slices[()]] == [True]
    # One endpoint that nobody can reach is enough for KubeRay's Ready.
    assert status(api)["numServeEndpoints"] == 1
    assert condition(api, "Ready")["status"] == "True"
    code, text = ask()
    assert code == 503
    assert f'no endpoints available for service \\"{NAME}-serve-svc:serve\\"' in text
    operator.machines.unready.clear()
    operator.settle()
    assert ask() == (200, "{}")


def test_after_a_switch_the_service_selects_the_new_cluster_ready_or_not(
    api: KubeAPI, operator: Operator, apply: Callable[..., Document]
) -> None:
    apply()
    operator.settle()
    operator.machines.unready.add("gateway")
    apply(image("2"))
    operator.settle()
    serving = api.objects["services", SPACE, f"{NAME}-serve-svc"]
    assert serving["spec"]["selector"] == {
        "ray.io/cluster": cluster(api),
        "ray.io/serve": "true",
    }
    assert len(clusters(api)) == 2


# --- the API server -----------------------------------------------------------------------------


RAYSERVICE = f"/apis/ray.io/v1/namespaces/{SPACE}/rayservices/{NAME}"


def patched(server: APIServer, path: str, body: Any, kind: str, **query: str) -> Document:
    code, text = server._send("PATCH", path, query, json.dumps(body), f"application/{kind}+json")
    return {"code": code, **json.loads(text)}


def test_a_status_is_written_by_its_sub_resource_only(
    api: KubeAPI, apply: Callable[..., Document], server: APIServer
) -> None:
    generation = apply()["metadata"]["generation"]
    both = {"spec": {"suspend": True}, "status": {"numServeEndpoints": 7}}
    answer = patched(server, f"{RAYSERVICE}/status", both, "merge-patch")
    assert answer["status"]["numServeEndpoints"] == 7 and "suspend" not in answer["spec"]
    assert answer["metadata"]["generation"] == generation
    both["status"] = {"numServeEndpoints": 8}
    answer = patched(server, RAYSERVICE, both, "merge-patch")
    assert answer["status"]["numServeEndpoints"] == 7 and answer["spec"]["suspend"] is True
    assert answer["metadata"]["generation"] == generation + 1
    api.forbidden.add(("patch", "rayservices/status"))
    assert patched(server, f"{RAYSERVICE}/status", both, "merge-patch")["code"] == 403


def test_a_patch_owns_what_it_changes(
    api: KubeAPI, apply: Callable[..., Document], server: APIServer
) -> None:
    apply()
    delay = {"spec": {"rayClusterDeletionDelaySeconds": 5}}
    patched(server, RAYSERVICE, delay, "merge-patch", fieldManager="kubectl-patch")
    path = ("spec", "rayClusterDeletionDelaySeconds")
    assert owners(api)[path] == {("kubectl-patch", "Update")}
    patched(server, RAYSERVICE, {"spec": {"suspend": True}}, "merge-patch")
    assert owners(api)["spec", "suspend"] == {("serve-app", "Update")}  # by the user agent
    patched(server, RAYSERVICE, {"spec": {"suspend": None}}, "merge-patch")
    assert "suspend" not in service(api)["spec"]


def test_a_json_patch_changes_what_its_test_finds(
    api: KubeAPI, apply: Callable[..., Document], server: APIServer
) -> None:
    apply()
    group = "/spec/rayClusterConfig/workerGroupSpecs/1"
    operations = [
        {"op": "test", "path": f"{group}/groupName", "value": "h100-x4"},
        {"op": "replace", "path": f"{group}/minReplicas", "value": 2},
        {"op": "add", "path": "/metadata/labels/a~1b", "value": "c"},
        {"op": "remove", "path": f"{group}/scaleStrategy"},
    ]
    assert patched(server, RAYSERVICE, operations, "json-patch")["code"] == 200
    after = service(api)["spec"]["rayClusterConfig"]["workerGroupSpecs"][1]
    assert after["minReplicas"] == 2 and "scaleStrategy" not in after
    assert service(api)["metadata"]["labels"]["a/b"] == "c"
    operations[0]["value"] = "l4-x1"
    refused = patched(server, RAYSERVICE, operations, "json-patch")
    assert (refused["code"], refused["reason"]) == (422, "Invalid")
    assert service(api)["spec"]["rayClusterConfig"]["workerGroupSpecs"][1] == after


def test_a_patch_is_checked_and_tried_as_an_apply_is(
    api: KubeAPI, apply: Callable[..., Document], server: APIServer
) -> None:
    apply()
    before = copy.deepcopy(service(api))
    wrong = {"spec": {"rayClusterDeletionDelaySeconds": "soon"}}
    assert patched(server, RAYSERVICE, wrong, "merge-patch")["code"] == 422
    dry = patched(server, RAYSERVICE, {"spec": {"suspend": True}}, "merge-patch", dryRun="All")
    assert dry["spec"]["suspend"] is True
    stale = {"metadata": {"resourceVersion": "1"}, "spec": {"suspend": True}}
    assert patched(server, RAYSERVICE, stale, "merge-patch")["code"] == 409
    assert patched(server, RAYSERVICE, {}, "strategic-merge-patch")["code"] == 415
    assert service(api) == before


@pytest.mark.parametrize(
    ("selector", "found"),
    [
        ("app=a", ["one", "two"]),
        ("app=a,tier!=x", ["two"]),
        ("tier in (x, y)", ["one", "two"]),
        ("app,tier notin (x)", ["three", "two"]),
        ("!tier", ["three"]),
    ],
)
def test_lists_know_every_kind_of_selector(
    api: KubeAPI, server: APIServer, selector: str, found: list[str]
) -> None:
    labels = {
        "one": {"app": "a", "tier": "x"},
        "two": {"app": "a", "tier": "y"},
        "three": {"app": "b"},
    }
    for name, these in labels.items():
        api.store("pods", {"metadata": {"name": name, "namespace": SPACE, "labels": these}})
    path = f"/api/v1/namespaces/{SPACE}/pods"
    _, text = server._send("GET", path, {"labelSelector": selector})
    assert sorted(item["metadata"]["name"] for item in json.loads(text)["items"]) == found


def test_an_api_server_that_goes_away_ends_a_watch_and_comes_back(
    api: KubeAPI, apply: Callable[..., Document], server: APIServer
) -> None:
    apply()
    since = service(api)["metadata"]["resourceVersion"]
    watch = server.watch("RayService", NAME, SPACE, since=since, timeout_s=60)
    api.change("rayservices", SPACE, NAME, status={"numServeEndpoints": 1})
    assert next(watch)["status"] == {"numServeEndpoints": 1}
    api.away_until = time.monotonic() + 1.5
    assert list(watch) == []  # long before its 60 s
    with pytest.raises(UserError, match="cannot be reached"):
        server.get("RayService", NAME, SPACE)
    time.sleep(max(0.0, api.away_until - time.monotonic()))
    assert server.get("RayService", NAME, SPACE) is not None


def test_the_operator_goes_on_beside_a_command(
    api: KubeAPI, operator: Operator, run: Callable[..., Any]
) -> None:
    with running(operator):
        output = run("deploy", str(CONFIG)).output
    assert output.rstrip().endswith("ready: every model answers")
    assert status(api)["numServeEndpoints"] == 3


Kubectl = Callable[..., str]


@pytest.fixture
def kubectl(api: KubeAPI, kubeconfig: Path, tmp_path: Path) -> Kubectl:
    """Run the real one, which must succeed; returns what it prints."""
    if shutil.which("kubectl") is None:
        pytest.skip("needs kubectl")
    api.token = None  # it sends none without TLS
    environment = os.environ | {"HOME": str(tmp_path), "KUBECONFIG": str(kubeconfig)}

    def kubectl(*args: str, text: str = "") -> str:
        command = ["kubectl", *args, "-n", SPACE]
        done = subprocess.run(command, input=text, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return kubectl


def test_kubectl_takes_what_render_prints(api: KubeAPI, kubeconfig: Path, kubectl: Kubectl) -> None:
    """`serve-app render CONFIG | kubectl …`, with kubectl as the judge of both sides."""
    text = CliRunner().invoke(cli.render, [str(CONFIG)], catch_exceptions=False).stdout
    made = kubectl(
        *("create", "--dry-run=client", "--validate=false", "-f", "-", "-o", "name"), text=text
    )
    assert "rayservice.ray.io/llama70b" in made
    assert len(made.split()) == len(list(yaml.safe_load_all(text)))
    kubectl("apply", "--server-side", "--validate=false", "-f", "-", text=text)
    assert "rayservice.ray.io/llama70b" in kubectl("get", "rayservices", "-o", "name")
    # kubectl owns the fields now, with our values: no conflict, nothing to do.
    server = APIServer.connect(kubeconfig)
    document = next(d for d in yaml.safe_load_all(text) if d["kind"] == "RayService")
    assert server.apply(document)["metadata"]["generation"] == 1


def test_kubectl_patches_selects_and_deletes(
    api: KubeAPI, operator: Operator, apply: Callable[..., Document], kubectl: Kubectl
) -> None:
    """The remedies that a person types."""
    first, second = stuck(api, operator, apply)
    apply()
    patch = '{"status": {"pendingServiceStatus": null}}'
    kubectl("patch", "rayservice", NAME, "--subresource=status", "--type=merge", "-p", patch)
    operator.settle()
    assert (cluster(api), cluster(api, "pending")) == (first, "")
    kubectl("delete", "raycluster", second)
    assert clusters(api) == [first]
    group = "/spec/workerGroupSpecs/1"
    patch = f'[{{"op": "replace", "path": "{group}/minReplicas", "value": 2}}]'
    operator.heal()
    kubectl("patch", "raycluster", first, "--type=json", "-p", patch)
    operator.settle()
    chosen = f"ray.io/cluster in ({first}),ray.io/group!=gateway"
    shown = kubectl("get", "pods", "-l", chosen, "-o", "name").split()
    assert len(shown) == 3  # the head and two with GPUs
    kubectl("delete", "rayservice", NAME, "--wait=false")
    operator.settle()
    assert api.all("pods") == []
