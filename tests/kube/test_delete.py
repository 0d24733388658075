"""deploy --prune: what goes and what stays."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("kubernetes", reason="needs the extra 'eks'")

from click.testing import Result
from controllers import Refused, cluster_of_pods, delete_cluster, evict
from deploying import CONFIG, NAME, RUNNING, SMALL, SPACE, config, deployed, service, set_status
from kube_api import KubeAPI

from serve_app.config.document import load
from serve_app.kuberay.live.api_server import Forbidden
from serve_app.kuberay.render import files
from serve_app.kuberay.render.names import PART_OF, labels
from serve_app.kuberay.render.profile import ClusterProfile

Run = Callable[..., Result]

FIRST, SECOND = "llama70b-abcde", "llama70b-fghij"

REDIS = "redis: {address: 'valkey:6379'}\n"
"""In a profile: the head's budget is then no longer rendered."""

WITH_SMALL = ("- name: gateway", SMALL)
"""In a config: one more group, `l4-x1`."""


def there(api: KubeAPI, plural: str) -> set[str]:
    return {name for kind, _, name in api.objects if kind == plural}


@pytest.fixture
def deploy(run: Run, tmp_path: Path) -> Callable[..., str]:
    """Deploy with a profile's text and changes of the config; return what was said."""

    def deploy(profile: str, *args: str, changes: tuple[tuple[str, str], ...] = ()) -> str:
        (tmp_path / "profile.yaml").write_text(profile)
        cluster = ("--cluster", str(tmp_path / "profile.yaml"))
        command = [config(tmp_path, *changes), *cluster, "--no-wait", "--force", *args]
        return run("deploy", *command).output

    return deploy


# --- labels -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "profile",
    [
        ClusterProfile(),
        ClusterProfile.model_validate(
            {"upgrade": {"strategy": "NewClusterWithIncrementalUpgrade", "max_surge_percent": 50}}
        ),
    ],
    ids=["ingress", "gateway api"],
)
def test_everything_that_is_applied_can_be_found_by_its_labels(profile: ClusterProfile) -> None:
    shared = set()
    for document in files.documents(load(CONFIG), profile):
        found = document["metadata"]["labels"]
        assert PART_OF.items() <= found.items(), document
        if not labels(NAME).items() <= found.items():
            shared.add(document["kind"])
    gateway_api = {"GatewayClass", "LoadBalancerConfiguration", "TargetGroupConfiguration"}
    assert shared - gateway_api == {"Namespace", "ServiceAccount", "PersistentVolumeClaim"}


# --- deploy --prune -----------------------------------------------------------------------------


def test_what_is_no_longer_rendered_is_told_and_goes_with_prune(
    api: KubeAPI, run: Run, deploy: Callable[..., str], tmp_path: Path
) -> None:
    deploy("{}", changes=(WITH_SMALL,))
    before = set(api.objects)
    assert (
        "3 objects are no longer rendered: Ingress llama70b, PodDisruptionBudget llama70b-head, "
        "PodDisruptionBudget llama70b-l4-x1 (remove them with --prune)"
    ) in deploy("ingress: {kind: none}\n" + REDIS)
    assert before <= set(api.objects)
    output = deploy("ingress: {kind: none}\n" + REDIS, "--prune", "--dry-run")
    assert "PodDisruptionBudget llama70b-l4-x1 (to be deleted)" in output
    assert before <= set(api.objects)
    output = deploy("ingress: {kind: none}\n" + REDIS, "--prune")
    gone = [line for line in output.splitlines() if line.startswith("deleted ")]
    assert gone == [
        "deleted Ingress llama70b",
        "deleted PodDisruptionBudget llama70b-head",
        "deleted PodDisruptionBudget llama70b-l4-x1",
    ]
    assert {(plural, name) for plural, _, name in before - set(api.objects)} == {
        ("ingresses", "llama70b"),
        ("poddisruptionbudgets", "llama70b-head"),
        ("poddisruptionbudgets", "llama70b-l4-x1"),
    }
    # Deletions follow the last apply.
    real = [method for method, path in api.requests if method != "GET" and "dryRun" not in path]
    assert real[-3:] == ["DELETE"] * 3 and "DELETE" not in real[:-3]
    assert "no longer rendered" not in deploy("ingress: {kind: none}\n" + REDIS)


def test_diff_tells_what_is_no_longer_rendered_and_deletes_nothing(
    api: KubeAPI, run: Run, tmp_path: Path
) -> None:
    deployed(api, run)
    (tmp_path / "p.yaml").write_text("ingress: {kind: none}\n")
    before = set(api.objects)
    result = run("diff", str(CONFIG), "--cluster", str(tmp_path / "p.yaml"))
    assert "1 object is no longer rendered: Ingress llama70b (remove it with --prune)" in (
        result.output
    )
    assert set(api.objects) == before
    # A deployment without --prune would change nothing.
    assert "this changes nothing" in result.output and result.exit_code == 0


def test_prune_spares_what_is_another_fleets_an_owners_or_unknown(
    api: KubeAPI, deploy: Callable[..., str]
) -> None:
    deploy("{}")
    cluster_of_pods(api, service(api), FIRST)

    def put(plural: str, name: str, **metadata: Any) -> None:
        named = {"name": name, "namespace": SPACE, **metadata}
        api.store(plural, {"metadata": named, "spec": {}})

    owner = {"kind": "RayCluster", "name": FIRST, "uid": "1"}
    put("ingresses", "by-hand")
    put("ingresses", "llama70b-2node", labels=labels("llama70b-2node"))
    put("networkpolicies", "other-internal", labels=labels("other"))
    put("services", "llama70b-serve-svc", labels=labels(NAME))
    put("poddisruptionbudgets", f"{FIRST}-h", labels=labels(NAME), ownerReferences=[owner])
    put("ingresses", "llama70b-old", labels=labels(NAME))
    before = set(api.objects)
    deploy("cache: {kind: none}\n", "--prune")
    assert {key[2] for key in before - set(api.objects)} == {"llama70b-old"}


def test_a_volume_that_no_fleet_mounts_is_told_and_kept(
    api: KubeAPI, deploy: Callable[..., str]
) -> None:
    deploy("{}")
    says = (
        "PersistentVolumeClaim model-cache is mounted by no fleet; it stays, because it holds "
        "weights: kubectl delete pvc model-cache -n serve-app"
    )
    assert says not in deploy("{}")
    assert says in deploy("cache: {kind: none}\n", "--prune")
    assert there(api, "persistentvolumeclaims") == {"model-cache"}
    other = copy.deepcopy(service(api))
    other["metadata"] = {"name": "other", "namespace": SPACE}
    template = other["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]
    claim = {"name": "cache", "persistentVolumeClaim": {"claimName": "model-cache"}}
    template["spec"]["volumes"] = [claim]
    api.store("rayservices", other)
    assert says not in deploy("cache: {kind: none}\n")


@pytest.mark.parametrize("plural", ["ingresses", "persistentvolumeclaims"])
def test_who_may_not_list_deploys_all_the_same_but_prunes_nothing(
    api: KubeAPI, deploy: Callable[..., str], plural: str
) -> None:
    deploy("{}")
    api.forbidden.add(("list", plural))
    output = deploy("ingress: {kind: none}\n")
    assert "cannot tell what is no longer rendered (not allowed to list " in output
    before = service(api)
    with pytest.raises(Forbidden, match="not allowed to list"):
        deploy("ingress: {kind: none}\nimage: a/b:2\n", "--prune")
    assert service(api) == before and there(api, "ingresses") == {"llama70b"}


def test_who_may_not_delete_applies_nothing_with_prune(
    api: KubeAPI, deploy: Callable[..., str]
) -> None:
    deploy("{}")
    api.forbidden.add(("delete", "ingresses"))
    before = service(api)
    with pytest.raises(Forbidden, match="not allowed to delete Ingress llama70b"):
        deploy("ingress: {kind: none}\nimage: a/b:2\n", "--prune")
    assert service(api) == before


# --- budgets of a group that goes, while its pods are there ---------------------------------------


def drained(api: KubeAPI, cluster: str, group: str) -> list[str]:
    """Drain the machines of a cluster's group: the pods that may go."""
    gone = []
    for plural, space, name in list(api.objects):
        if plural == "pods" and name.startswith(f"{cluster}-{group}-"):
            try:
                evict(api, space, name)
                gone.append(name.removeprefix(f"{cluster}-"))
            except Refused as refused:
                assert refused.args[0] == 429, refused
    return gone


TWO_SMALL = (
    "- name: gateway",
    SMALL.replace("{model: org/small,", "{model: org/small, replicas: 2,"),
)


@pytest.mark.parametrize("prune", [(), ("--prune",)], ids=["", "prune"])
def test_an_old_cluster_keeps_the_pods_of_a_group_that_goes(
    api: KubeAPI, deploy: Callable[..., str], prune: tuple[str, ...]
) -> None:
    """It has budgets of its own, and no pod is under two: those could not be drained at all."""
    deploy("{}", changes=(TWO_SMALL,))
    set_status(api, RUNNING)
    cluster_of_pods(api, service(api), FIRST)
    output = deploy(REDIS, *prune)
    assert f"applied PodDisruptionBudget {FIRST}-l4-x1" in output
    set_status(api, RUNNING, pending=RUNNING)
    cluster_of_pods(api, service(api), SECOND)
    assert drained(api, FIRST, "headgroup") == []
    assert drained(api, FIRST, "l4-x1") == ["l4-x1-0"]
    # With Redis a head may go: only a budget that was left there keeps it.
    assert drained(api, SECOND, "headgroup") == (["headgroup-0"] if prune else [])
    assert f"{FIRST}-head" in there(api, "poddisruptionbudgets")
    assert ("llama70b-head" in there(api, "poddisruptionbudgets")) == (not prune)
    # Later, while both are there: the old one's own budgets are no leftovers.
    deploy(REDIS, "--prune")
    assert f"{FIRST}-l4-x1" in there(api, "poddisruptionbudgets")
    assert "llama70b-head" not in there(api, "poddisruptionbudgets")


def test_a_budget_stays_while_an_old_cluster_has_no_other(
    api: KubeAPI, deploy: Callable[..., str]
) -> None:
    """The upgrade was begun by `kubectl apply` or Argo CD, which copy no budgets."""
    deploy("{}", changes=(TWO_SMALL,))
    set_status(api, RUNNING)
    cluster_of_pods(api, service(api), FIRST)
    api.forbidden.add(("list", "rayclusters"))  # no copies can be made
    deploy(REDIS)
    api.forbidden.clear()
    cluster_of_pods(api, service(api), SECOND)
    set_status(api, RUNNING, pending=RUNNING)
    output = deploy(REDIS, "--prune")
    assert (
        f"kept PodDisruptionBudget llama70b-l4-x1: {FIRST} still has its pods; "
        "deploy with --prune again when that is gone"
    ) in output
    assert f"kept PodDisruptionBudget llama70b-head: {FIRST} still has its pods" in output
    assert drained(api, FIRST, "l4-x1") == ["l4-x1-0"]
    delete_cluster(api, SPACE, FIRST)
    set_status(api, RUNNING, active=SECOND)
    assert "deleted PodDisruptionBudget llama70b-l4-x1" in deploy(REDIS, "--prune")
    assert drained(api, SECOND, "headgroup") == ["headgroup-0"]


def test_a_cluster_gets_no_budget_of_its_own_for_pods_that_it_has_not(
    api: KubeAPI, deploy: Callable[..., str]
) -> None:
    deploy(REDIS)
    set_status(api, RUNNING)
    cluster_of_pods(api, service(api), FIRST)
    deploy("image: a/b:2\n", changes=(WITH_SMALL,))
    own = {name for name in there(api, "poddisruptionbudgets") if name.startswith(FIRST)}
    assert own == {f"{FIRST}-gateway", f"{FIRST}-h100-x4"}


def test_without_a_look_at_the_clusters_no_budget_is_pruned(
    api: KubeAPI, deploy: Callable[..., str]
) -> None:
    deploy("{}")
    api.forbidden.add(("list", "rayclusters"))
    with pytest.raises(Forbidden, match="not allowed to list RayCluster"):
        deploy(REDIS, "--prune")
    assert "llama70b-head" in there(api, "poddisruptionbudgets")
