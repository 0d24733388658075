"""Day two: what people do to a fleet that runs.

Each test deploys what it needs, whatever the one before left. They run against the stand-in in
`make test`, and by `make test-kube` on a real cluster with the real operator.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("kubernetes", reason="needs the extra 'eks'")

from harness.manifests import CRD
from kube_api import KubeAPI
from operator_model import Operator, running
from real_cluster import real_cluster
from site_under_test import NAME, Said, Site

from serve_app.kuberay.live import follow
from serve_app.kuberay.live.api_server import APIServer
from serve_app.kuberay.validate import schema

Document = dict[str, Any]


@pytest.fixture(scope="module")
def site(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("day-two")
    if context := request.config.getoption("--kube-context"):
        with real_cluster(context, request.config.getoption("--kube-image"), folder) as site:
            yield site
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(follow, "_SETTLE_S", 0.2)
        patch.setattr(follow, "_FAILED_S", 1.0)
        patch.setattr(follow, "_LOOK_S", 0.5)
        api = KubeAPI(schema.load_crd(CRD))
        api.store("namespaces", {"metadata": {"name": "day-two"}})
        kubeconfig = api.kubeconfig(folder / "kubeconfig")
        operator = Operator(api)
        with running(operator):
            yield Site(
                APIServer.connect(kubeconfig),
                "day-two",
                ["--kubeconfig", str(kubeconfig)],
                folder,
                gpus=True,
                image="example.com/serve-app:1",
                timeout_s=30.0,
                operator=operator,
            )
        api.close()


@pytest.fixture
def fleet(site: Site) -> Document:
    """The config of a fleet that runs now, in one cluster, with every pod there."""
    config = site.fleet()
    assert is_ready(site.deploy(config, "--force", "--prune"))
    site.wait("one cluster", lambda: has_one_cluster(site))
    site.wait("its pods", lambda: len(site.pods("gateway")) == 2)
    return config


def has_one_cluster(site: Site) -> bool:
    """Old ones live on for their answers; no test waits for that."""
    for cluster in site.target.clusters():
        name = cluster["metadata"]["name"]
        if name not in (site.state().active, site.state().pending):
            site.server.delete("RayCluster", name, site.namespace)
    return len(site.target.clusters()) == 1


def is_ready(said: Said) -> bool:
    assert said.text.rstrip().endswith("ready: every model answers"), said.text
    return said.code == 0


def engine(config: Document) -> Document:
    """The first model's engine arguments."""
    found: Document = config["applications"][0]["args"]["engine"]
    return found


def test_the_same_again_changes_nothing(site: Site, fleet: Document) -> None:
    """The operator's own writes are no conflict, and no difference."""
    said = site.deploy(fleet)
    assert is_ready(said)
    assert said.change == "changes nothing"
    assert site.diff(fleet) == Said("this changes nothing\n", 0)


def test_an_engine_argument_changes_in_place(site: Site, fleet: Document) -> None:
    before = site.cluster()["metadata"]["name"]
    engine(fleet)["max_num_seqs"] = 32
    said = site.deploy(fleet)
    assert is_ready(said)
    assert said.change == "changes the running cluster in place"
    assert site.cluster()["metadata"]["name"] == before
    assert "max_num_seqs: 32" in site.service()["spec"]["serveConfigV2"]


def test_bounds_reach_the_running_cluster(site: Site, fleet: Document) -> None:
    pods = len(site.pods(site.workers))
    fleet["applications"][0]["args"]["autoscaling"] |= {"min_replicas": 2, "max_replicas": 3}
    said = site.deploy(fleet)
    assert is_ready(said)
    assert said.change.startswith("changes the running cluster in place")
    group = site.group(site.workers)
    assert (group["minReplicas"], group["maxReplicas"]) == (2, 4)
    site.wait("one more pod", lambda: len(site.pods(site.workers)) == pods + 1)
    assert site.diff(fleet).code == 0


def test_bounds_that_another_tool_applied_arrive_by_sync(site: Site, fleet: Document) -> None:
    groups = site.service()["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    index = [g["groupName"] for g in groups].index(site.workers)
    most = groups[index]["maxReplicas"] + 2
    path = f"/spec/rayClusterConfig/workerGroupSpecs/{index}/maxReplicas"
    site.patch("rayservices", NAME, [{"op": "replace", "path": path, "value": most}])
    line = f"worker group '{site.workers}': maxReplicas {most - 2} → {most}"
    assert f"! not in the running cluster: {line}" in site.on_fleet("status").text
    assert line in site.on_fleet("sync").text
    assert "not in the running cluster" not in site.on_fleet("status").text
    assert site.group(site.workers)["maxReplicas"] == most
    assert "is as the RayService says" in site.on_fleet("sync").text


def test_one_more_model_and_one_fewer(site: Site, fleet: Document) -> None:
    before = site.cluster()["metadata"]["name"]
    # As Ray's autoscaler does by load.
    groups = site.cluster()["spec"]["workerGroupSpecs"]
    index = [group["groupName"] for group in groups].index(site.workers)
    path = f"/spec/workerGroupSpecs/{index}/replicas"
    site.patch("rayclusters", before, [{"op": "replace", "path": path, "value": 2}])
    two = site.another(fleet, "small")
    said = site.deploy(two)
    assert is_ready(said)
    assert said.change.startswith("changes the running cluster in place")
    assert site.cluster()["metadata"]["name"] == before
    assert site.group(site.workers)["replicas"] >= 2
    budgets = site.names("PodDisruptionBudget")
    said = site.deploy(fleet, "--prune", "--force")
    assert is_ready(said)
    assert "application 'small' is removed" in said.text
    if site.gpus:  # its group goes with it, and takes a new cluster
        assert said.change.startswith("starts a second cluster")
        assert site.cluster()["metadata"]["name"] != before
        assert f"{NAME}-l40s-x1" in budgets - site.names("PodDisruptionBudget")


def test_a_change_of_the_pods_takes_a_second_cluster(site: Site, fleet: Document) -> None:
    before = site.cluster()["metadata"]["name"]
    fleet["applications"][-1]["args"]["num_cpus"] = 2
    assert "starts a second cluster beside the running one" in site.diff(fleet).text
    said = site.deploy(fleet, "--force")
    assert is_ready(said)
    after = site.cluster()["metadata"]["name"]
    assert after != before
    # The old one ends its answers. Each has budgets, and loses one gateway of its own.
    assert {c["metadata"]["name"] for c in site.target.clusters()} == {before, after}
    assert f"{before}-gateway" in site.names("PodDisruptionBudget")
    site.wait("both clusters' gateways", lambda: len(site.pods("gateway")) == 4)
    for cluster in (before, after):
        one, other = (pod for pod in site.pods("gateway") if pod.startswith(cluster))
        site.wait("the budget allows it", lambda pod=one: site.evict(pod))
        assert not site.evict(other)


def test_a_broken_model_is_told_and_its_fix_is_not_the_failure(site: Site, fleet: Document) -> None:
    good = fleet["applications"][0]["args"]["model"]
    fleet["applications"][0]["args"]["model"] = "/nope"
    said = site.deploy(fleet)
    assert said.code == 2
    assert f"application '{site.model}'" in said.text
    assert "'/nope' is neither a folder" in said.text.splitlines()[-1]
    assert "'/nope' is neither a folder" in site.on_fleet("status").text
    fleet["applications"][0]["args"]["model"] = good
    assert is_ready(site.deploy(fleet))


def test_a_spec_that_the_operator_refuses_and_its_fix(site: Site, fleet: Document) -> None:
    site.patch("rayservices", NAME, {"spec": {"upgradeStrategy": {"type": "Nonsense"}}})
    site.wait("the operator's refusal", lambda: "ValidationFailed" in site.on_fleet("status").text)
    said = site.deploy(fleet)
    assert said.code == 2
    assert 'conflict with "somebody"' in said.text
    said = site.deploy(fleet, "--force")
    assert is_ready(said)
    assert said.change.startswith("changes the running cluster in place")


def test_a_rollback_out_of_a_stuck_upgrade_leaves_one_cluster(site: Site, fleet: Document) -> None:
    before = site.cluster()["metadata"]["name"]
    with site.without_room() as profile:
        assert site.deploy(fleet, "--no-wait", "--force", **profile).code == 0
        site.wait("the second cluster", lambda: len(site.target.clusters()) == 2)
        second = site.state().pending
        # Another attempt takes its place, and does not stand beside it.
        fleet["applications"][-1]["args"]["num_cpus"] = 2
        said = site.deploy(fleet, "--no-wait", "--force", **profile)
        assert said.change.startswith(f"starts a cluster in place of {second}")
        assert f"deleted RayCluster {second}, which had not served" in said.text
        # KubeRay first writes its name, and makes it a moment later.
        site.wait("the cluster in its place", lambda: starts(site) not in ("", second))
        said = site.on_fleet("rollback", "--to", str(revisions(site)[-3]))
    assert is_ready(said)
    assert said.change.startswith("ends the upgrade: the running cluster stays")
    site.wait("one cluster", lambda: len(site.target.clusters()) == 1)
    assert site.cluster()["metadata"]["name"] == before
    assert not site.state().pending


def starts(site: Site) -> str:
    """The name of the cluster that starts and is there; empty without one."""
    pending = site.state().pending
    there = {cluster["metadata"]["name"] for cluster in site.target.clusters()}
    return pending if pending in there else ""


def revisions(site: Site) -> list[int]:
    found = site.server.list("ControllerRevision", site.namespace)
    return sorted(int(revision["revision"]) for revision in found)


def test_a_deploy_that_is_overtaken_does_not_end_green(site: Site, fleet: Document) -> None:
    said: list[Said] = []
    with site.without_room() as profile:
        first = threading.Thread(
            target=lambda: said.append(site.deploy(fleet, "--force", **profile))
        )
        first.start()
        site.wait("the second cluster", lambda: len(site.target.clusters()) == 2)
        assert site.on_fleet("rollback", "--no-wait").code == 0
        first.join()
    assert said[0].code == 2
    assert "somebody else has changed daytwo since" in said[0].text


def test_a_drain_takes_one_gateway_at_a_time_and_never_the_head(
    site: Site, fleet: Document
) -> None:
    site.wait("the head", lambda: site.pods("headgroup"))
    assert not site.evict(site.pods("headgroup")[0])
    one, other = site.pods("gateway")
    site.wait("the budget allows it", lambda: site.evict(one))
    assert not site.evict(other)
    site.wait("its replacement", lambda: {one} < {one, *site.pods("gateway")} - {other})
    site.wait("the next one", lambda: site.evict(other))
    site.wait("the gateways", lambda: len(set(site.pods("gateway")) - {one, other}) == 2)


def test_the_only_replica_of_a_group_may_go(site: Site, fleet: Document) -> None:
    (pod,) = site.pods(site.workers)
    site.wait("the budget allows it", lambda: site.evict(pod))
    site.wait("its replacement", lambda: set(site.pods(site.workers)) - {pod})


def test_suspend_and_back(site: Site, fleet: Document) -> None:
    site.patch("rayservices", NAME, {"spec": {"suspend": True}})
    site.wait("no pods", lambda: not site.target.pods())
    said = site.on_fleet("status")
    assert said.code == 1
    assert "it is suspended (spec.suspend: true)" in said.text
    engine(fleet)["max_num_seqs"] = 48
    said = site.deploy(fleet, "--no-wait")
    assert said.change.startswith("changes the RayService, of which no cluster runs now")
    site.patch("rayservices", NAME, {"spec": {"suspend": False}})
    assert is_ready(site.deploy(fleet))


def test_delete_takes_all_but_the_weights(site: Site, fleet: Document) -> None:
    said = site.on_fleet("delete", "--yes")
    assert said.code == 0, said.text
    assert not site.target.pods()
    assert not site.target.clusters()
    for kind in ("RayService", "PodDisruptionBudget", "NetworkPolicy", "ControllerRevision"):
        assert not site.names(kind), kind
    assert site.names("PersistentVolumeClaim")
