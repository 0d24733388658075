"""deploy --prune and delete: what goes, what stays, and in which order."""

from __future__ import annotations

import copy
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("kubernetes", reason="needs the extra 'eks'")

import click.testing
from click.testing import CliRunner, Result
from controllers import Refused, cluster_of_pods, delete_cluster, evict
from deploying import (
    CONFIG,
    NAME,
    RUNNING,
    SMALL,
    SPACE,
    config,
    deployed,
    service,
    set_status,
    started,
)
from harness.manifests import ROOT
from kube_api import KubeAPI

from serve_app.config.document import load
from serve_app.errors import UserError
from serve_app.kuberay import cli
from serve_app.kuberay.live import deleting
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


# --- delete -------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deleting, "_LOOK_S", 0.05)
    monkeypatch.setattr(deleting, "_STUCK_S", 0.2)


@pytest.fixture
def fleet(api: KubeAPI, run: Run, quick: None) -> KubeAPI:
    """A fleet that runs, with a pod that has GPUs, beside another whose name begins alike."""
    deployed(api, run)
    cluster_of_pods(api, service(api), FIRST)
    gpu_pod = api.objects["pods", SPACE, f"{FIRST}-h100-x4-0"]
    gpu_pod["spec"]["containers"] = [{"resources": {"requests": {"nvidia.com/gpu": "4"}}}]
    run("deploy", str(ROOT / "configs/llama70b-2node.yaml"), "--no-wait", "--force")
    return api


def owned_by(api: KubeAPI, name: str) -> set[tuple[str, str]]:
    """The fleet's own objects, pods too."""
    return {
        (plural, key)
        for (plural, _, key), document in api.objects.items()
        if labels(name).items() <= (document["metadata"].get("labels") or {}).items()
    }


class Operator:
    """Plays KubeRay and the garbage collector until the test ends, once the service is to go."""

    def __init__(self, api: KubeAPI) -> None:
        self.api = api
        self.left_with_pods: set[tuple[str, str]] = set()
        """What was there just before the last pod went."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(0.02):
            found = self.api.get("rayservices", SPACE, NAME)
            if found and "deletionTimestamp" in found["metadata"]:
                self._over.wait(0.2)
                self.left_with_pods = owned_by(self.api, NAME)
                delete_cluster(self.api, SPACE, FIRST)
                released(self.api, "rayservices", NAME)
                return

    def stop(self) -> None:
        self._over.set()
        self._thread.join()


def released(api: KubeAPI, plural: str, name: str) -> None:
    """Who holds an object takes the finalizers away, and the object goes."""
    assert "deletionTimestamp" in api.objects[plural, SPACE, name]["metadata"]
    api.remove(plural, SPACE, name)


def test_delete_shows_asks_and_removes_one_fleet_only(
    fleet: KubeAPI, kubeconfig: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = owned_by(fleet, "llama70b-2node")
    monkeypatch.setattr(click.testing._NamedTextIOWrapper, "isatty", lambda _: True, raising=False)

    def answer(text: str) -> Result:
        args = [NAME, "--kubeconfig", str(kubeconfig)]
        return CliRunner().invoke(cli.delete, args, input=text, catch_exceptions=False)

    before = set(fleet.objects)
    result = answer("n\n")
    assert result.exit_code == 1 and result.output.endswith("nothing was deleted\n")
    assert set(fleet.objects) == before
    assert result.output.splitlines()[:-2] == [
        f"llama70b in serve-app on {fleet.url}: this deletes",
        f"  RayService llama70b, RayCluster {FIRST}, 4 pods with 4 GPUs",
        "  Ingress llama70b",
        "  NetworkPolicy llama70b-clients",
        "  NetworkPolicy llama70b-internal",
        "  NetworkPolicy llama70b-operator",
        "  PodDisruptionBudget llama70b-gateway",
        "  PodDisruptionBudget llama70b-h100-x4",
        "  PodDisruptionBudget llama70b-head",
        "  revisions 1: no rollback after this",
        "and keeps",
        "  PersistentVolumeClaim model-cache with the weights, which llama70b-2node mounts too",
        "  alerts, if applied: kubectl delete podmonitors,prometheusrules -n serve-app "
        "-l app.kubernetes.io/instance=llama70b",
        "  Namespace serve-app, its ServiceAccount and Secrets, with llama70b-2node",
    ]
    operator = Operator(fleet)
    result = answer("y\n")
    operator.stop()
    assert result.exit_code == 0 and result.output.endswith("llama70b is gone\n"), result.output
    assert owned_by(fleet, NAME) == set()
    assert owned_by(fleet, "llama70b-2node") == other
    assert {"serviceaccounts", "persistentvolumeclaims", "namespaces"} <= {
        plural for plural, _, _ in fleet.objects
    }
    # As long as pods ran, policies kept their ports shut.
    assert ("networkpolicies", "llama70b-internal") in operator.left_with_pods
    deleted = [path for method, path in fleet.requests if method == "DELETE" if "dry" not in path]
    assert deleted[0].endswith("/rayservices/llama70b?propagationPolicy=Foreground")
    assert not any("propagationPolicy" in path for path in deleted[1:])


def test_the_last_fleet_of_a_namespace_names_what_is_still_paid_for(api: KubeAPI, run: Run) -> None:
    deployed(api, run)
    output = run("delete", NAME, "--yes", "--no-wait").output
    assert (
        "PersistentVolumeClaim model-cache with the weights, whose storage is paid for: "
        "kubectl delete pvc model-cache -n serve-app"
    ) in output
    assert "with no other fleet: kubectl delete ns serve-app" in output


def test_nobody_to_ask_is_an_error(fleet: KubeAPI, run: Run) -> None:
    before = set(fleet.objects)
    with pytest.raises(UserError, match="nobody is here to be asked; delete llama70b with --yes"):
        run("delete", NAME)
    assert set(fleet.objects) == before


def test_nothing_to_delete_is_an_error(api: KubeAPI, run: Run) -> None:
    with pytest.raises(UserError, match="no RayService llama70b in namespace serve-app"):
        run("delete", NAME, "--yes")


def test_who_may_not_delete_one_kind_deletes_nothing(fleet: KubeAPI, run: Run) -> None:
    fleet.forbidden.add(("delete", "networkpolicies"))
    before = set(fleet.objects)
    with pytest.raises(Forbidden, match="not allowed to delete NetworkPolicy llama70b-clients"):
        run("delete", NAME, "--yes")
    assert set(fleet.objects) == before
    assert "deletionTimestamp" not in service(fleet)["metadata"]


def attempt(kubeconfig: Path, *args: str) -> tuple[str, str]:
    """Delete without asking: what was said, and the error."""
    command = [NAME, "--yes", "--kubeconfig", str(kubeconfig), *args]
    result = CliRunner().invoke(cli.delete, command)
    assert result.exception is None or isinstance(result.exception, UserError), result.exception
    return result.output, str(result.exception or "")


def once_terminating(
    api: KubeAPI, plural: str, name: str, *steps: Callable[[], Any]
) -> threading.Thread:
    """Do things when an object is being deleted."""

    def play() -> None:
        while "deletionTimestamp" not in api.objects[plural, SPACE, name]["metadata"]:
            time.sleep(0.02)
        for step in steps:
            time.sleep(0.4)
            step()

    thread = threading.Thread(target=play, daemon=True)
    thread.start()
    return thread


def test_an_operator_that_is_away_is_told_and_the_rest_waits(
    fleet: KubeAPI, kubeconfig: Path
) -> None:
    # Kubernetes deletes clusters and pods by itself.
    collector = once_terminating(
        fleet, "rayservices", NAME, lambda: delete_cluster(fleet, SPACE, FIRST)
    )
    output, error = attempt(kubeconfig, "--timeout", "2")
    collector.join()
    assert "h100-x4 pods: 1 ready" in output
    assert "RayService llama70b waits for ray.io/rayservice-finalizer" in output
    assert output.count("nothing happens: is KubeRay's operator running?") == 1
    assert error == (
        "not gone in time: RayService llama70b waits for ray.io/rayservice-finalizer; "
        "run it again for the rest"
    )
    assert ("networkpolicies", "llama70b-internal") in owned_by(fleet, NAME)
    # The operator comes back.
    back = once_terminating(
        fleet, "rayservices", NAME, lambda: released(fleet, "rayservices", NAME)
    )
    output, error = attempt(kubeconfig)
    back.join()
    assert not error and output.endswith("llama70b is gone\n")
    assert owned_by(fleet, NAME) == set()


def test_pods_that_stop_are_no_sign_of_an_operator_that_is_away(
    fleet: KubeAPI, kubeconfig: Path
) -> None:
    output, error = attempt(kubeconfig, "--timeout", "1")
    assert "is KubeRay's operator running?" not in output
    assert error.startswith("not gone in time: gateway pods: 2 ready; h100-x4 pods: 1 ready; head")


def test_a_cluster_whose_redis_is_not_cleaned_up_is_named(fleet: KubeAPI, kubeconfig: Path) -> None:
    cluster = fleet.objects["rayclusters", SPACE, FIRST]
    cluster["metadata"]["finalizers"] = ["ray.io/gcs-ft-redis-cleanup-finalizer"]
    for plural, space, name in list(fleet.objects):
        if plural == "pods":
            fleet.remove(plural, space, name)
    _, error = attempt(kubeconfig, "--timeout", "0.5")
    assert f"RayCluster {FIRST} waits for ray.io/gcs-ft-redis-cleanup-finalizer" in error


def test_a_load_balancer_that_nobody_takes_down_is_told(fleet: KubeAPI, kubeconfig: Path) -> None:
    ingress = fleet.objects["ingresses", SPACE, NAME]
    ingress["metadata"]["finalizers"] = ["ingress.k8s.aws/resources"]
    operator = Operator(fleet)
    output, error = attempt(kubeconfig, "--timeout", "2")
    operator.stop()
    assert "deleted PodDisruptionBudget llama70b-head" in output
    assert "nothing happens: is the load balancer controller running?" in output
    assert "not gone in time: Ingress llama70b waits for ingress.k8s.aws/resources" in error


def test_without_waiting_everything_is_asked_to_go(fleet: KubeAPI, kubeconfig: Path) -> None:
    output, error = attempt(kubeconfig, "--no-wait")
    assert not error and "its pods may take half an hour" in output
    assert "deletionTimestamp" in service(fleet)["metadata"]
    own = {plural for plural, _ in owned_by(fleet, NAME)}
    assert own == {"rayservices", "rayclusters", "pods"}


def test_clusters_without_their_rayservice_go_too(fleet: KubeAPI, kubeconfig: Path) -> None:
    """After `kubectl delete rayservice --cascade=orphan`, say, they would hold their GPUs."""
    fleet.remove("rayservices", SPACE, NAME)
    output, _ = attempt(kubeconfig, "--no-wait")
    assert f"deleting RayCluster {FIRST}" in output
    assert "PersistentVolumeClaim model-cache" in output  # as the last revision has it
    assert there(fleet, "rayclusters") == set()


def test_an_api_server_that_is_away_ends_no_deletion(fleet: KubeAPI, kubeconfig: Path) -> None:
    def away() -> None:
        fleet.away_until = time.monotonic() + 1

    def finish() -> None:
        time.sleep(1)
        delete_cluster(fleet, SPACE, FIRST)
        released(fleet, "rayservices", NAME)

    steps = once_terminating(fleet, "rayservices", NAME, away, finish)
    output, error = attempt(kubeconfig)
    steps.join()
    assert "it cannot be reached" in output and "the deletion itself goes on" in output
    assert not error and owned_by(fleet, NAME) == set()


def test_ctrl_c_says_how_far_it_came(fleet: KubeAPI, kubeconfig: Path) -> None:
    process = started("delete", NAME, "--yes", "--kubeconfig", str(kubeconfig))
    assert process.stdout is not None
    for line in process.stdout:
        if "gateway pods: 2 ready" in line:
            break
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()
    assert process.wait(10) == 130, rest
    assert "stopped deleting llama70b: part of it is deleted; run it again for the rest" in rest, (
        rest
    )
    assert "deletionTimestamp" in service(fleet)["metadata"]
    assert there(fleet, "ingresses") == {NAME, "llama70b-2node"}
