"""The rights in cluster/deployer.yaml suffice for every command, and none is there in vain."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("kubernetes", reason="needs the extra 'eks'")

import yaml
from click.testing import Result
from controllers import cluster_of_pods
from deploying import (
    CONFIG,
    GATEWAY_API,
    NAME,
    RUNNING,
    SPACE,
    answers,
    later,
    node,
    pool,
    service,
    set_status,
)
from kube_api import KubeAPI, Right

from serve_app.kuberay.live import revisions
from serve_app.kuberay.live.api_server import Forbidden
from serve_app.kuberay.render.files import cluster_wide

DOCUMENTS = {d["kind"]: d for d in yaml.safe_load_all(cluster_wide()["cluster/deployer.yaml"])}

UNPLAYED = {
    ("list", "rayservices"),
    ("delete", "rayservices"),
    ("patch", "rayservices/status"),
    ("patch", "rayclusters"),
    ("delete", "rayclusters"),
    ("list", "networkpolicies"),
    ("delete", "networkpolicies"),
    ("list", "ingresses"),
    ("delete", "ingresses"),
    ("list", "persistentvolumeclaims"),
    ("delete", "poddisruptionbudgets"),
}
"""Rights of what is not played here: `delete`, `deploy --prune`, new bounds in place, and the
rollback out of a stuck upgrade."""


def rights(kind: str) -> Iterator[Right]:
    for rule in DOCUMENTS[kind]["rules"]:
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                for verb in rule["verbs"]:
                    yield Right(verb, group, resource, SPACE if kind == "Role" else "")


@pytest.fixture
def play(
    api: KubeAPI, run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], None]:
    """The life of a fleet: every command, an upgrade and a rollback in it."""
    monkeypatch.setattr(revisions, "KEEP", 2)

    def ready(*command: str) -> None:
        api.requests.clear()
        later(api, lambda: set_status(api, RUNNING))
        result = run(*command, "--timeout", "60")
        assert "ready: every model answers" in result.output, result.output

    def play(strategy: str) -> None:
        answers(api)
        api.store("nodes", node(8))
        api.store("nodepools", pool(16, 8))
        for tag in ("1", "2", "3"):
            settings = {"image": f"x/y:{tag}", "upgrade": {"strategy": strategy}}
            profile = tmp_path / f"{tag}.yaml"
            profile.write_text(yaml.safe_dump(settings))
            assert run("diff", str(CONFIG), "--cluster", str(profile)).exit_code == 1
            ready("deploy", str(CONFIG), "--cluster", str(profile))
            cluster_of_pods(api, service(api), f"{NAME}-{tag}")
        api.logs |= {(pod, "logs"): ["hello"] for kind, _, pod in api.objects if kind == "pods"}
        assert "hello" in run("logs", NAME).output
        ready("rollback", NAME)
        assert run("status", NAME).exit_code == 0
        set_status(api, {})
        assert run("status", NAME).exit_code == 1  # with events

    return play


def test_the_role_suffices_in_its_namespace(api: KubeAPI, play: Callable[[str], None]) -> None:
    api.granted = set(rights("Role"))
    play("NewCluster")
    # It is told, and goes on.
    assert {(r.verb, r.namespace) for r in api.refused} == {("list", "")}


def test_with_the_cluster_role_nothing_is_refused(
    api: KubeAPI, play: Callable[[str], None]
) -> None:
    api.resources |= GATEWAY_API
    api.granted = {*rights("Role"), *rights("ClusterRole")}
    play("NewClusterWithIncrementalUpgrade")
    assert api.refused == set()


def test_no_right_is_granted_in_vain(api: KubeAPI, play: Callable[[str], None]) -> None:
    api.resources |= GATEWAY_API
    play("NewClusterWithIncrementalUpgrade")
    play("NewCluster")
    idle = {*rights("Role"), *rights("ClusterRole")} - api.used
    assert {(right.verb, right.resource) for right in idle} <= UNPLAYED


def test_the_stand_in_refuses_what_is_not_granted(api: KubeAPI, run: Callable[..., Result]) -> None:
    making = Right("create", "ray.io", "rayservices", SPACE)
    api.granted = set(rights("Role")) - {making}
    with pytest.raises(Forbidden, match="not allowed to apply RayService llama70b"):
        run("deploy", str(CONFIG), "--no-wait")
    assert api.refused == {making}


def test_the_bindings_are_of_one_group_that_the_guide_names() -> None:
    subjects = [DOCUMENTS[f"{kind}Binding"]["subjects"] for kind in ("Role", "ClusterRole")]
    assert subjects[0] == subjects[1]
    guide = (CONFIG.parents[1] / "docs/eks.md").read_text()
    assert f"--kubernetes-groups {subjects[0][0]['name']}" in guide
    for kind in ("Role", "ClusterRole"):
        reference = DOCUMENTS[f"{kind}Binding"]["roleRef"]
        assert (reference["kind"], reference["name"]) == (kind, "serve-app-deployer")
        assert DOCUMENTS[kind]["metadata"] == {"name": "serve-app-deployer"}
