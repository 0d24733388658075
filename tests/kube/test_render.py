"""Rendering: placement, limits, determinism, and the manifests in kuberay/."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from harness.manifests import KEPT, ROOT, bundle, fleet, profile
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.config import caches
from serve_app.config.document import load, parse_document
from serve_app.config.yaml_files import Note, dump, note, plain
from serve_app.errors import ConfigError, UserError
from serve_app.kuberay import cli
from serve_app.kuberay.render import disruption
from serve_app.kuberay.render.files import cluster_wide, documents, render, write
from serve_app.kuberay.render.pods import HAPROXY
from serve_app.kuberay.render.profile import ClusterProfile, load_profile
from serve_app.kuberay.render.workers import groups_of, shape_of
from serve_app.planner import hardware


def service(name: str, **changes: Any) -> dict[str, Any]:
    return next(d for d in bundle(name, **changes) if d["kind"] == "RayService")


def worker_groups(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {g["groupName"]: g for g in document["spec"]["rayClusterConfig"]["workerGroupSpecs"]}


def pod_spec(group: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = group["template"]["spec"]
    return spec


def one_model(engine: dict[str, Any], **args: Any) -> Any:
    """A fleet of one model and a gateway."""
    args = {"model": "org/m", "engine": engine, "resources": {"accelerator_type": "H100"}} | args
    applications = [
        {
            "name": "m",
            "route_prefix": None,
            "import_path": "serve_app.model:app",
            "args": args,
        },
        {"name": "gateway", "route_prefix": "/", "import_path": "serve_app.gateway:app"},
    ]
    return parse_document({"applications": applications}, Path("one.yaml"))


def on_ipv6(one: Any) -> Any:
    """A fleet that listens on IPv6 too."""
    return replace(one, document={"http_options": {"host": "::0"}})


# --- the repo's own manifests -------------------------------------------------------------------


@pytest.mark.parametrize("name", KEPT)
def test_the_manifests_in_kuberay_are_what_the_config_renders(name: str) -> None:
    for path, text in render(fleet(name), profile(name)).items():
        there = ROOT / "kuberay" / name / path
        assert there.exists() and there.read_text() == text, f"{there} is stale: make manifests"


def test_the_cluster_wide_files_are_the_packages() -> None:
    for path, text in cluster_wide().items():
        there = ROOT / "kuberay" / path
        source = f"serve_app/data/cluster-wide/{path}"
        assert there.exists() and there.read_text() == text, f"edit {source}, then: make manifests"
    assert len(cluster_wide()) == 6


def test_rendering_twice_gives_the_same_bytes() -> None:
    assert render(fleet("fleet"), profile("fleet")) == render(fleet("fleet"), profile("fleet"))


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl (kustomize)")
@pytest.mark.parametrize("overlay", ["base", "overlays/dev", "overlays/prod", "nodes"])
def test_kustomize_builds_every_overlay(tmp_path: Path, overlay: str) -> None:
    write(render(fleet("llama70b"), profile("llama70b")), tmp_path)
    kustomization = tmp_path / overlay / "kustomization.yaml"
    kustomization.write_text(
        kustomization.read_text().replace("newName: REPLACE_ME", "newName: 1234")
    )
    built = subprocess.run(
        ["kubectl", "kustomize", str(tmp_path / overlay)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    kinds = {d["kind"]: d for d in yaml.safe_load_all(built.stdout)}
    if overlay == "nodes":
        assert set(kinds) == {"NodePool", "EC2NodeClass"}
        return
    spec = kinds["RayService"]["spec"]
    assert ("PodMonitor" in kinds) == (overlay == "overlays/prod")
    assert ("Ingress" in kinds) == (overlay != "overlays/dev")
    if overlay == "overlays/dev":
        assert spec["upgradeStrategy"] == {"type": "None"}
        assert "gcsFaultToleranceOptions" not in spec["rayClusterConfig"]
    if overlay != "base":
        images = set(re.findall(r"image: (\S*serve-app\S*)", built.stdout))
        assert images == {"1234.dkr.ecr.us-east-1.amazonaws.com/serve-app:0.1.0"}


# --- the RayService -----------------------------------------------------------------------------


def test_the_config_goes_in_as_it_is() -> None:
    text = (ROOT / "configs/fleet.yaml").read_text()
    assert service("fleet")["spec"]["serveConfigV2"] == text


def test_one_group_for_each_shape_of_pod() -> None:
    groups = worker_groups(service("fleet"))
    assert list(groups) == ["gateway", "h100-x4", "l40s-x1", "l4-x1"]
    bounds = {n: (g["minReplicas"], g["maxReplicas"]) for n, g in groups.items()}
    # bge-m3 is fixed at one, the reranker goes from none to two; one more each, for a drain.
    assert bounds == {"gateway": (2, 3), "h100-x4": (1, 3), "l40s-x1": (1, 5), "l4-x1": (1, 3)}
    assert groups["l4-x1"]["resources"]["accelerator_type:L4"] == "1"


def test_two_nodes_are_pods_in_one_zone_with_efa() -> None:
    group = worker_groups(service("llama70b-2node", instance_types=["g6e.12xlarge"]))[
        "l40s-x4-2nodes"
    ]
    assert (group["minReplicas"], group["maxReplicas"]) == (2, 4)
    spec = pod_spec(group)
    limits = spec["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "4" and limits["vpc.amazonaws.com/efa"] == "1"
    (term,) = spec["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term["topologyKey"] == "topology.kubernetes.io/zone"
    assert term["matchLabelKeys"] == ["ray.io/cluster"]
    assert "topologySpreadConstraints" not in spec


def test_on_a_machine_with_8_gpus_the_two_stages_share_one_pod() -> None:
    assert "l40s-x8" in worker_groups(service("llama70b-2node"))


def test_only_gateway_pods_are_endpoints() -> None:
    document = service("fleet")
    ports = document["spec"]["serveService"]["spec"]["ports"]
    assert ports[0]["targetPort"] == "serve"
    for name, group in worker_groups(document).items():
        container = pod_spec(group)["containers"][0]
        named = "serve" in {p["name"] for p in container["ports"]}
        assert named == (name == "gateway")
        # Without an own probe KubeRay asks for a proxy, which only gateways must have.
        assert ("readinessProbe" in container) == (name != "gateway")


def test_gateways_are_placed_on_the_pods_that_are_endpoints(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The label in the manifests is the one that the gateway's application asks Ray for."""
    from serve_app import gateway

    group = worker_groups(service("fleet"))["gateway"]
    env = {e["name"]: e.get("value") for e in pod_spec(group)["containers"][0]["env"]}
    selectors, per_node = [], []
    for value in (None, env[gateway.NODES_ENV]):
        if value is not None:
            monkeypatch.setenv(gateway.NODES_ENV, value)
        deployment = gateway.app({})._bound_deployment
        selectors.append(deployment.ray_actor_options.get("label_selector"))
        # One in each pod: a pod without a gateway has no proxy, and is never Ready.
        per_node.append(deployment._replica_config.max_replicas_per_node)
    assert selectors == [None, group["labels"]]
    assert per_node == [None, 1]


def test_a_gateways_pod_has_room_for_one_gateway_and_its_proxy() -> None:
    """Ray's autoscaler must see that a drained gateway's replacement needs another pod."""
    group = worker_groups(service("fleet"))["gateway"]
    assert group["resources"]["CPU"] == "1"
    assert pod_spec(group)["containers"][0]["resources"]["requests"]["cpu"] == "2"


def test_the_dev_overlay_leaves_out_what_belongs_to_the_cluster(tmp_path: Path) -> None:
    settings_ = {"upgrade": {"strategy": "NewClusterWithIncrementalUpgrade"}}
    write(render(fleet("llama70b"), ClusterProfile.model_validate(settings_)), tmp_path)
    patches = yaml.safe_load((tmp_path / "overlays/dev/kustomization.yaml").read_text())["patches"]
    deleted = {d["kind"] for p in patches if isinstance(d := yaml.safe_load(p["patch"]), dict)}
    assert deleted == {
        "PodDisruptionBudget",
        "GatewayClass",
        "LoadBalancerConfiguration",
        "TargetGroupConfiguration",
    }


def test_an_incremental_upgrade_keeps_kuberays_own_readiness() -> None:
    document = service("fleet", upgrade={"strategy": "NewClusterWithIncrementalUpgrade"})
    assert "serveService" not in document["spec"]
    for group in worker_groups(document).values():
        container = pod_spec(group)["containers"][0]
        assert "readinessProbe" not in container
        assert "serve" in {p["name"] for p in container["ports"]}
    kinds = {
        d["kind"] for d in bundle("fleet", upgrade={"strategy": "NewClusterWithIncrementalUpgrade"})
    }
    assert {"GatewayClass", "LoadBalancerConfiguration", "TargetGroupConfiguration"} <= kinds
    assert "Ingress" not in kinds


def test_the_images_haproxy_is_the_one_that_is_installed() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert Path(HAPROXY).name in scripts


def test_secrets_are_references_and_only_where_models_load() -> None:
    text = dump(service("fleet"))
    assert "hf_" not in text.replace("hf_token", "").replace("HF_", "")
    document = service("fleet")
    head = document["spec"]["rayClusterConfig"]["headGroupSpec"]
    for group, wanted in [(head, False), *((g, True) for g in worker_groups(document).values())]:
        env = {e["name"]: e for e in pod_spec(group)["containers"][0]["env"]}
        if group.get("groupName") == "gateway":
            wanted = False
        assert ("HF_TOKEN" in env) == wanted
        if wanted:
            assert env["HF_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == "hf-token"


def test_only_the_head_can_ask_the_api_server() -> None:
    """KubeRay lets the head's account patch pods and RayClusters. Workers run models and parse what
    clients send: they have the account for its rights in AWS, without the account's token."""
    document = service("fleet", role_arn="arn:aws:iam::1:role/weights")
    head = pod_spec(document["spec"]["rayClusterConfig"]["headGroupSpec"])
    assert head.get("automountServiceAccountToken", True)
    groups = worker_groups(document)
    assert {"gateway", "h100-x4"} <= groups.keys()
    for group in groups.values():
        spec = pod_spec(group)
        assert spec["automountServiceAccountToken"] is False
        assert not [volume for volume in spec["volumes"] if "projected" in volume]
        assert spec["serviceAccountName"] == head["serviceAccountName"] == "serve-app"


def test_pods_of_a_kind_share_what_they_compile_and_all_share_the_weights() -> None:
    for name, group in worker_groups(service("fleet")).items():
        container = pod_spec(group)["containers"][0]
        env = {e["name"]: e.get("value") for e in container["env"]}
        wanted = caches.downloads("/models") | caches.compiled(f"/models/{name}")
        if name == "gateway":
            assert not wanted.keys() & env.keys()
        else:
            assert wanted.items() <= env.items()
            assert "/models" in {m["mountPath"] for m in container["volumeMounts"]}


def test_without_a_volume_nothing_is_said_of_caches() -> None:
    text = dump(service("fleet", cache={"kind": "none"}))
    assert not [name for name in caches.compiled("") | caches.downloads("") if name in text]


def test_pods_write_to_their_volumes_and_with_a_gpu_to_the_root_too() -> None:
    """`make test-image` runs them so. Python, Ray and HAProxy end without a writable /tmp."""
    document = service("fleet")
    head = document["spec"]["rayClusterConfig"]["headGroupSpec"]
    seen = set()
    for group in (head, *worker_groups(document).values()):
        spec = pod_spec(group)
        container = spec["containers"][0]
        gpus = "nvidia.com/gpu" in container["resources"]["limits"]
        assert container["securityContext"].get("readOnlyRootFilesystem", False) is not gpus
        assert {"name": "tmp", "mountPath": "/tmp"} in container["volumeMounts"]
        assert {"name": "tmp", "emptyDir": {}} in spec["volumes"]
        assert {"name": "HOME", "value": "/tmp"} in container["env"]
        seen.add(gpus)
    assert seen == {True, False}


def test_shared_memory_grows_with_the_gpus_and_stays_below_the_limit() -> None:
    sizes = {}
    for name, group in worker_groups(service("fleet")).items():
        spec = pod_spec(group)
        (shm,) = [v for v in spec["volumes"] if v["name"] == "dshm"]
        sizes[name] = int(shm["emptyDir"]["sizeLimit"].removesuffix("Gi"))
        assert sizes[name] < int(
            spec["containers"][0]["resources"]["limits"]["memory"].removesuffix("Gi")
        )
    assert sizes["h100-x4"] == 17 and sizes["l40s-x1"] == 5


def test_pods_wait_longer_than_the_longest_answer(tmp_path: Path) -> None:
    slow = one_model({}, graceful_shutdown_timeout_s=1800)
    path = tmp_path / "one.yaml"
    path.write_text("applications: []\n")
    (document,) = [
        d
        for d in documents(replace(slow, path=path), ClusterProfile())
        if d["kind"] == "RayService"
    ]
    for group in worker_groups(document).values():
        spec = pod_spec(group)
        assert spec["terminationGracePeriodSeconds"] == 900 + 1800 + 15 + 30 + 60
        assert "--deadline-remaining-seconds 2745" in str(spec["containers"][0]["lifecycle"])


def test_auto_mode_has_its_own_labels_and_node_class() -> None:
    documents_ = bundle("fleet", karpenter="auto-mode")
    text = dump(*documents_)
    assert "karpenter.k8s.aws" not in text
    assert "eks.amazonaws.com/instance-gpu-name: h100" in text
    assert {d["kind"] for d in documents_} >= {"NodeClass", "NodePool"}
    # The ingress names a class that Auto Mode does not bring.
    (ingress,) = [d for d in documents_ if d["kind"] == "Ingress"]
    (named,) = [d for d in documents_ if d["kind"] == "IngressClass"]
    assert named["metadata"]["name"] == ingress["spec"]["ingressClassName"]
    assert named["spec"]["controller"] == "eks.amazonaws.com/alb"
    own = bundle("fleet", karpenter="auto-mode", node_role="my-nodes")
    assert [d["spec"]["role"] for d in own if d["kind"] == "NodeClass"] == ["my-nodes"]


def kept(documents: list[dict[str, Any]]) -> dict[str, int]:
    """What each budget keeps, by the group's name."""
    found = [d for d in documents if d["kind"] == "PodDisruptionBudget"]
    assert all(set(d["spec"]) & {"maxUnavailable"} == set() for d in found)
    return {d["metadata"]["name"].split("-", 1)[1]: d["spec"]["minAvailable"] for d in found}


def test_a_head_is_kept_without_redis_and_may_go_with_it() -> None:
    assert kept(bundle("fleet"))["head"] == 1
    assert "head" not in kept(bundle("fleet", redis={"address": "a.b:6379"}))


@pytest.mark.parametrize(
    ("engine", "replicas", "least"),
    [
        ({}, {"replicas": 3}, 2),
        ({}, {"replicas": 1}, 0),
        ({}, {"autoscaling": {"min_replicas": 0, "max_replicas": 4}}, 0),
        ({}, {"autoscaling": {"min_replicas": 2, "max_replicas": 4}}, 1),
        # Two pods are one replica: it goes with the first, and restarts once if both may go.
        ({"tensor_parallel_size": 8, "pipeline_parallel_size": 2}, {"replicas": 1}, 0),
        ({"tensor_parallel_size": 8, "pipeline_parallel_size": 2}, {"replicas": 2}, 3),
    ],
)
def test_a_drain_must_leave_all_replicas_that_are_always_there_but_one(
    engine: dict[str, Any], replicas: dict[str, Any], least: int
) -> None:
    one, profile_ = one_model(engine, **replicas), ClusterProfile()
    budgets = disruption.budgets(one, profile_, groups_of(one, profile_))
    found = kept([plain(budget) for budget in budgets])
    del found["head"], found["gateway"]
    assert list(found.values()) == [least]


# --- machines -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "accelerator", "pods", "gpus"),
    [
        ({}, "L4", 1, 1),
        ({"tensor_parallel_size": 2}, "L40S", 1, 2),
        ({"tensor_parallel_size": 8}, "H100", 1, 8),
        ({"tensor_parallel_size": 8, "pipeline_parallel_size": 2}, "H100", 2, 8),
        ({"tensor_parallel_size": 4, "data_parallel_size": 2}, "H200", 1, 8),
        ({"tensor_parallel_size": 8, "data_parallel_size": 2}, "H200", 2, 8),
        ({"tensor_parallel_size": 4}, "A100-80G", 1, 4),
    ],
)
def test_parallelism_becomes_pods(
    engine: dict[str, Any], accelerator: str, pods: int, gpus: int
) -> None:
    one = one_model(engine, resources={"accelerator_type": accelerator})
    shape = shape_of("x", one.models["m"], ClusterProfile())
    assert (shape.pods_per_replica, shape.gpus_per_pod) == (pods, gpus)
    for name in shape.instance_types:
        assert hardware.instances()[name].gpus % gpus == 0


def sharing(*parts: tuple[float, int, int]) -> Any:
    """Models with such shares of an L40S, at their fewest and most replicas."""
    models = {}
    for number, (share, least, most) in enumerate(parts):
        one = one_model(
            {},
            resources={"accelerator_type": "L40S", "gpu_share": share},
            autoscaling={"min_replicas": least, "max_replicas": most},
        )
        models[f"m{number}"] = one.models["m"]
    return replace(one, models=models)


@pytest.mark.parametrize(
    ("parts", "fewest", "most"),
    [
        ([(0.8, 1, 1), (0.1, 1, 1), (0.1, 1, 1)], 1, 1),
        ([(0.5, 1, 1), (0.5, 0, 2)], 1, 2),
        ([(0.6, 1, 1), (0.6, 1, 1)], 2, 2),
        ([(0.3, 1, 4)], 1, 2),
        ([(0.3, 0, 1)], 0, 1),
        # Serve takes pods in turn: two of 0.4 may keep two pods from one of 0.7.
        ([(0.4, 2, 2), (0.7, 1, 1)], 2, 2),
        ([(0.4, 4, 4), (0.3, 1, 1), (0.1, 1, 1)], 3, 3),
        ([(0.2, 0, 5), (0.4, 1, 5)], 1, 5),
    ],
)
def test_replicas_that_share_a_gpu_share_a_pod(
    parts: list[tuple[float, int, int]], fewest: int, most: int
) -> None:
    one = sharing(*parts)
    [*_, group] = groups_of(one, ClusterProfile())
    assert (group.name, group.gpus) == ("l40s-x1", 1)
    assert (group.min_pods, group.max_pods) == (fewest, most + 1)  # one to replace another


def test_a_pod_has_cores_and_memory_for_all_that_share_its_gpu() -> None:
    alone = groups_of(sharing((0.3, 1, 1)), ClusterProfile())[-1]
    three = groups_of(sharing((0.3, 1, 3)), ClusterProfile())[-1]
    assert alone.shape and three.shape
    assert alone.shape.instance_types[0] == "g6e.xlarge"
    assert three.memory_gib >= 3 * 12 + 8 and three.cpu >= 3 * 2
    assert three.shape.instance_types[0] == "g6e.2xlarge"
    many = sharing(*[(0.02, 1, 1)] * 40)
    with pytest.raises(ConfigError, match="cores and memory for what shares its GPU: m0, m1, m2,"):
        groups_of(many, ClusterProfile())


def test_a_whole_gpu_is_beside_shared_ones() -> None:
    one = sharing((0.5, 1, 1), (0.5, 1, 1))
    whole = one_model({}, resources={"accelerator_type": "L40S"}).models["m"]
    [*_, group] = groups_of(replace(one, models=dict(one.models) | {"w": whole}), ClusterProfile())
    assert (group.min_pods, group.max_pods) == (2, 3)


@pytest.mark.parametrize(
    ("engine", "resources", "settings_", "says"),
    [
        ({}, {}, {}, "resources.accelerator_type is missing"),
        ({}, {"accelerator_type": "L40"}, {}, "did you mean 'L40S'?"),
        (
            {},
            {"gpu_memory_gib": 20},
            {"default_accelerator": "L40S"},
            "the memory of the GPUs here is not known; set resources.accelerator_type, or gpu_sha",
        ),
        (
            {"tensor_parallel_size": 16},
            {"accelerator_type": "H100"},
            {},
            "set engine.tensor_parallel_size to 8 at most",
        ),
        (
            {"tensor_parallel_size": 3},
            {"accelerator_type": "L40S"},
            {},
            "choose engine.tensor_parallel_size so that it divides them",
        ),
        (
            {},
            {"accelerator_type": "L4", "memory_gib": 2000},
            {},
            "no L4 machine holds a pod with 1 GPU, 2 cores and 2008 GiB; lower resources.num_cpus",
        ),
        (
            {},
            {"accelerator_type": "L4"},
            {"instance_types": ["p5.48xlarge"]},
            "no instance type of the profile has an L4",
        ),
        (
            {},
            {"accelerator_type": "L4"},
            {"instance_types": ["g6.xlrge"]},
            "'g6.xlrge' is no EC2 type with a GPU",
        ),
    ],
)
def test_what_fits_nowhere_is_said_in_one_line(
    engine: dict[str, Any], resources: dict[str, Any], settings_: dict[str, Any], says: str
) -> None:
    one = one_model(engine, resources=resources)
    with pytest.raises(ConfigError) as caught:
        groups_of(one, ClusterProfile.model_validate(settings_))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_models_of_one_shape_share_the_machines_that_all_fit_on() -> None:
    one = one_model({}, resources={"accelerator_type": "L40S"})
    big = one_model({}, resources={"accelerator_type": "L40S", "memory_gib": 150})
    both = replace(one, models={"a": one.models["m"], "b": big.models["m"]})
    _gateway, group = groups_of(both, ClusterProfile())
    assert group.min_pods == 2 and group.shape is not None
    assert "g6e.2xlarge" not in group.shape.instance_types
    assert group.memory_gib >= 158


@pytest.mark.parametrize(
    ("more", "smallest"),
    [
        ({}, "g6e.xlarge"),  # `auto` is then 1
        ({"frontends": 1}, "g6e.xlarge"),
        ({"frontends": 4}, "g6e.2xlarge"),  # 5 cores of 6
        ({"frontends": 6}, "g6e.4xlarge"),
        ({"frontends": 4, "num_cpus": 10}, "g6e.4xlarge"),  # the larger of both
        # 55 GiB: with one front end 54, with three of `auto`'s 57.
        ({"frontends": 1, "memory_gib": 46}, "g6e.2xlarge"),
        ({"memory_gib": 46}, "g6e.4xlarge"),
        ({"memory_gib": 46, "num_cpus": 1}, "g6e.2xlarge"),
        ({"memory_gib": 46, "engine": {"runner": "pooling"}}, "g6e.2xlarge"),
    ],
)
def test_a_pod_has_cores_and_memory_for_its_front_ends(more: dict[str, Any], smallest: str) -> None:
    resources = {k: more[k] for k in ("num_cpus", "memory_gib") if k in more}
    args = {k: v for k, v in more.items() if k == "frontends"}
    one = one_model(
        more.get("engine", {}), resources={"accelerator_type": "L40S", **resources}, **args
    )
    _gateway, group = groups_of(one, ClusterProfile())
    assert group.shape is not None
    assert group.shape.instance_types[0] == smallest


def test_a_cpu_pod_grows_with_its_front_ends() -> None:
    def pod(**args: Any) -> tuple[int, int]:
        _gateway, group = groups_of(
            one_model({}, resources={"device": "cpu"}, **args), ClusterProfile()
        )
        return group.cpu, group.memory_gib

    cores, gib = pod()
    assert pod(frontends=1) == (cores, gib) == (4, 16)
    assert pod(frontends=6) == (7, gib + 6)  # 5 × 1.1 GiB


def test_a_cpu_model_gets_a_pod_without_gpu_or_taint() -> None:
    one = one_model({}, resources={"device": "cpu", "num_cpus": 2})
    names = [(g.name, g.gpus, g.cpu) for g in groups_of(one, ClusterProfile())]
    assert names == [("gateway", 0, 1), ("cpu", 0, 4)]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f: replace(f, gateway=None), "no gateway"),
        (lambda f: replace(f, path=Path("a" * 50 + ".yaml")), "names of 47 letters, digits and"),
        (lambda f: replace(f, path=Path("70b.yaml")), "start with a letter"),
        (
            lambda f: replace(f, document={"http_options": {"host": "127.0.0.1"}}),
            "http_options.host is 127.0.0.1",
        ),
        (
            lambda f: replace(f, document={"http_options": {"host": "::"}}),
            "of which Serve's HAProxy makes IPv4 alone; set ::0",
        ),
        (on_ipv6, "client_cidrs are all of IPv4"),
    ],
)
def test_a_config_that_cannot_become_a_rayservice(change: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        render(change(fleet("llama70b")), ClusterProfile())


# --- IPv6 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("karpenter", ["self-managed", "auto-mode"])
def test_an_ipv6_cluster_is_told_by_the_configs_host(karpenter: str) -> None:
    """Ray is told the pod's address, and the load balancer takes such addresses as targets."""
    vpc = "2600:1f18:1234:5600::/56"
    wished = {"karpenter": karpenter, "client_cidrs": ["10.0.0.0/8", vpc], "max_gpus": 32}
    files = render(on_ipv6(fleet("fleet")), ClusterProfile.model_validate(wished))
    cluster = yaml.safe_load(files["base/rayservice.yaml"])["spec"]["rayClusterConfig"]
    assert cluster["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "::"
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        assert group["rayStartParams"]["node-ip-address"] == "$POD_IP"
        [address] = [
            item["valueFrom"]
            for item in group["template"]["spec"]["containers"][0]["env"]
            if item["name"] == "POD_IP"
        ]
        assert address == {"fieldRef": {"fieldPath": "status.podIP"}}
    annotations = yaml.safe_load(files["base/ingress.yaml"])["metadata"]["annotations"]
    assert annotations["alb.ingress.kubernetes.io/ip-address-type"] == "dualstack"
    assert f"cidr: {vpc}" in files["base/networkpolicy.yaml"]
    if karpenter == "auto-mode":
        assert "ipAddressType: dualstack" in files["nodes/ingressclass.yaml"]


def test_an_ipv6_clusters_gateway_is_dualstack() -> None:
    upgrade = {"strategy": "NewClusterWithIncrementalUpgrade"}
    wished = {"client_cidrs": ["fd00::/8"], "upgrade": upgrade}
    files = render(on_ipv6(fleet("fleet")), ClusterProfile.model_validate(wished))
    assert "ipAddressType: dualstack" in files["base/gateway-class.yaml"]


# --- profile, YAML and the command line ---------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("namespce: x", "did you mean 'namespace'?"),
        ("redis: {address: no-port}", "redis.address"),
        ("ingress: {request_timeout_s: 5000}", "ingress.request_timeout_s is 5000"),
        ("upgrade: {step_percent: 60, max_surge_percent: 50}", "above max_surge_percent"),
        ("head: {memory_gib: 2}", "head.memory_gib is 2"),
        ("a: [", "line 1, column 5"),
    ],
)
def test_a_wrong_profile_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_profile(path)
    assert says in str(caught.value) and "\n" not in str(caught.value)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(min_size=1, max_size=8), inner, max_size=3)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(_json)
def test_yaml_with_comments_reads_back_as_the_same_value(value: Any) -> None:
    def annotate(item: Any) -> Any:
        if isinstance(item, dict):
            return {k: note(annotate(v), "why: because # of\nthis") for k, v in item.items()}
        if isinstance(item, list):
            return [note(annotate(v), "- so") for v in item]
        return item

    annotated = annotate(value)
    assert plain(annotated) == value
    assert yaml.safe_load(dump(annotated, header="top\n\nmore")) == value


def test_a_comment_stands_over_its_key() -> None:
    text = dump({"a": Note({"b": [note({"c": 1}, "over the item")]}, "over a")})
    assert text == "# over a\na:\n  b:\n  # over the item\n  - c: 1\n"


def test_render_writes_only_what_changed_and_removes_what_is_stale(tmp_path: Path) -> None:
    config = str(ROOT / "configs/llama70b.yaml")
    runner = CliRunner()
    first = runner.invoke(cli.render, [config, "-o", str(tmp_path)], catch_exceptions=False)
    assert first.exit_code == 0 and "wrote" in first.output
    stale = tmp_path / "base" / "gateway-class.yaml"
    header = (tmp_path / "base/rayservice.yaml").read_text().splitlines()[0]
    stale.write_text(f"{header}\nkind: GatewayClass\n")
    other = tmp_path / "other.yaml"
    other.write_text(header.replace("llama70b", "fleet") + "\n")
    (tmp_path / "mine.yaml").write_text("kept: true\n")
    second = runner.invoke(cli.render, [config, "-o", str(tmp_path)], catch_exceptions=False)
    assert second.output.strip() == f"removed {stale}"
    third = runner.invoke(cli.render, [config, "-o", str(tmp_path)], catch_exceptions=False)
    assert third.output.strip() == f"{tmp_path} is up to date"
    assert (tmp_path / "mine.yaml").exists() and other.exists()


def test_a_rendering_in_a_folder_below_is_left_alone(tmp_path: Path) -> None:
    mine, below = fleet("llama70b"), tmp_path / "overlays" / "eu"
    write(render(mine, ClusterProfile()), tmp_path)
    written = write(render(mine, ClusterProfile(zones=["eu-west-1a"])), below)
    assert write(render(mine, ClusterProfile()), tmp_path) == []
    assert all(path.exists() for path in written)


def test_render_to_the_screen_is_what_kubectl_takes() -> None:
    result = CliRunner().invoke(
        cli.render, [str(ROOT / "configs/llama70b.yaml")], catch_exceptions=False
    )
    kinds = [d["kind"] for d in yaml.safe_load_all(result.output)]
    assert kinds[0] == "Namespace" and "RayService" in kinds and "Secret" not in kinds


def test_a_swap_group_needs_the_gpu_that_it_is_rendered_with() -> None:
    result = CliRunner().invoke(
        cli.render, [str(ROOT / "configs/swap.yaml")], catch_exceptions=False
    )
    assert result.exit_code == 0
    service = next(it for it in yaml.safe_load_all(result.stdout) if it["kind"] == "RayService")
    [_, gpus] = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert (gpus["minReplicas"], gpus["maxReplicas"]) == (1, 2)  # one more for a drain


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("awake: 1", "awake: 2"), "2 of 3 awake need"),
        (("awake: 1", "awake: 4"), "awake is 4, and the group has 3 models"),
        (("      big:", "      bgi:"), "terms of 'bgi', of which no model is"),
        (
            ("H100, swap_group: big, evict", "H200, swap_group: big, evict"),
            "accelerator_type differs",
        ),
    ],
)
def test_a_swap_group_that_cannot_be_is_not_rendered(
    tmp_path: Path, change: tuple[str, str], says: str
) -> None:
    config = tmp_path / "swap.yaml"
    config.write_text((ROOT / "configs/swap.yaml").read_text().replace(*change))
    with pytest.raises(UserError, match=says):
        CliRunner().invoke(cli.render, [str(config)], catch_exceptions=False)


def test_render_needs_a_config_or_cluster_wide() -> None:
    with pytest.raises(UserError, match="give a CONFIG, or --cluster-wide"):
        CliRunner().invoke(cli.render, [], catch_exceptions=False)
    result = CliRunner().invoke(cli.render, ["--cluster-wide"], catch_exceptions=False)
    assert "# cluster/operator-values.yaml" in result.output


def test_validate_prints_every_problem_and_ends_with_the_first(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("apiVersion: v1\nkind: Secret\nmetadata: {name: s}\nstringData: {a: x, b: y}\n")
    runner = CliRunner()
    with pytest.raises(UserError, match=r"stringData.a puts a secret .* \(and 1 more\)"):
        runner.invoke(cli.validate, [str(path)], catch_exceptions=False)
    path.write_text(path.read_text().replace("{a: x, b: y}", "{a: REPLACE_ME}"))
    done = runner.invoke(cli.validate, [str(path)], catch_exceptions=False)
    assert done.output == "1 manifests, no error\n"


def with_keys(folder: Path, **source: str) -> Any:
    document = copy.deepcopy(one_model({"max_model_len": 8192}, model="Qwen/Qwen3-8B").document)
    document["applications"][1]["args"] = {"keys": source}
    (folder / "one.yaml").write_text(yaml.safe_dump(document))
    return load(folder / "one.yaml")


SECRET = {"name": "serve-app-keys", "key": "keys.yaml"}


def rendered_with_keys(folder: Path, **source: str) -> list[dict[str, Any]]:
    settings = ClusterProfile.model_validate({"max_gpus": 8, "keys": SECRET})
    files = render(with_keys(folder, **source), settings)
    return [
        d for path, text in files.items() if "kustom" not in path for d in yaml.safe_load_all(text)
    ]


def test_the_gateways_pods_alone_have_the_api_keys(tmp_path: Path) -> None:
    documents = rendered_with_keys(tmp_path, file="/etc/serve_app/keys.yaml")
    [document] = [d for d in documents if d["kind"] == "RayService"]
    for name, group in worker_groups(document).items():
        pod = pod_spec(group)
        mounts = {m["mountPath"]: m["name"] for m in pod["containers"][0]["volumeMounts"]}
        volumes = {v["name"]: v for v in pod["volumes"]}
        assert ("/etc/serve_app" in mounts) == (name == "gateway")
        if name == "gateway":
            # A whole folder: a file that is mounted alone never changes.
            assert volumes[mounts["/etc/serve_app"]]["secret"] == {
                "secretName": "serve-app-keys",
                "items": [{"key": "keys.yaml", "path": "keys.yaml"}],
            }
    [template] = [
        d for d in documents if d["kind"] == "Secret" and d["metadata"]["name"] == SECRET["name"]
    ]
    assert template["stringData"] == {"keys.yaml": "REPLACE_ME"}


def test_api_keys_in_a_variable_come_from_the_secret(tmp_path: Path) -> None:
    [document] = [
        d for d in rendered_with_keys(tmp_path, secret_env="KEYS") if d["kind"] == "RayService"
    ]
    env = {
        e["name"]: e for e in pod_spec(worker_groups(document)["gateway"])["containers"][0]["env"]
    }
    assert env["KEYS"]["valueFrom"]["secretKeyRef"] == SECRET


@pytest.mark.parametrize(
    ("source", "settings", "said"),
    [
        ({"file": "/etc/serve_app/keys.yaml"}, {}, "which no pod has; name the Secret"),
        ({"secret_env": "KEYS"}, {}, "the gateway's keys are in the variable KEYS"),
        ({"file": "keys.yaml"}, {"keys": SECRET}, "a pod needs an absolute path"),
        ({"file": "/tmp/keys.yaml"}, {"keys": SECRET}, "in a folder of its own"),
    ],
)
def test_api_keys_that_no_pod_could_read(
    tmp_path: Path, source: dict[str, str], settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        render(
            with_keys(tmp_path, **source),
            ClusterProfile.model_validate({"max_gpus": 8, **settings}),
        )


def with_gateway(folder: Path, args: dict[str, Any], **settings: Any) -> dict[str, str]:
    document = copy.deepcopy(one_model({"max_model_len": 8192}, model="Qwen/Qwen3-8B").document)
    document["applications"][1]["args"] = args
    (folder / "one.yaml").write_text(yaml.safe_dump(document))
    profile = ClusterProfile.model_validate({"max_gpus": 8, **settings})
    return render(load(folder / "one.yaml"), profile)


def with_usage_db(folder: Path, source: Any, **settings: Any) -> dict[str, str]:
    return with_gateway(folder, {"usage_db": source}, **settings)


USAGE_SECRET = {"name": "serve-app-usage", "key": "url"}


def test_the_gateways_pods_alone_have_the_usage_databases_address(tmp_path: Path) -> None:
    files = with_usage_db(tmp_path, {"secret_env": "USAGE_DB"}, usage_db=USAGE_SECRET)
    documents = [
        d for path, text in files.items() if "kustom" not in path for d in yaml.safe_load_all(text)
    ]
    [document] = [d for d in documents if d["kind"] == "RayService"]
    for name, group in worker_groups(document).items():
        env = {e["name"]: e for e in pod_spec(group)["containers"][0]["env"]}
        assert ("USAGE_DB" in env) == (name == "gateway")
        if name == "gateway":
            assert env["USAGE_DB"]["valueFrom"] == {"secretKeyRef": USAGE_SECRET}
    [template] = [
        d for d in documents if d["kind"] == "Secret" and d["metadata"]["name"] == "serve-app-usage"
    ]
    assert template["stringData"] == {"url": "REPLACE_ME"}


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({"secret_env": "USAGE_DB"}, "is in the variable USAGE_DB, which no pod has; name in the"),
        ("sqlite:////var/lib/usage.db", "is an SQLite file, which goes with its pod; give it a"),
        ("postgresql://u:hidden@db/usage", "has a password in plain text; write usage_db: {secr"),
    ],
)
def test_a_usage_database_that_would_be_lost_or_seen(
    tmp_path: Path, source: Any, said: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as error:
        with_usage_db(tmp_path, source)
    assert "hidden" not in str(error.value)
    assert with_usage_db(tmp_path, "postgresql://db/usage?sslmode=require")


OTLP_SECRET = {"name": "langfuse", "key": "headers"}


def test_the_gateways_pods_alone_have_the_trace_receivers_headers(tmp_path: Path) -> None:
    args = {"otlp_endpoint": "https://cloud.langfuse.com/api/public/otel"}
    files = with_gateway(tmp_path, args, otlp_headers=OTLP_SECRET)
    documents = [
        d for path, text in files.items() if "kustom" not in path for d in yaml.safe_load_all(text)
    ]
    [document] = [d for d in documents if d["kind"] == "RayService"]
    for name, group in worker_groups(document).items():
        env = {e["name"]: e for e in pod_spec(group)["containers"][0]["env"]}
        found = env.get("OTEL_EXPORTER_OTLP_HEADERS", {}).get("valueFrom")
        assert found == ({"secretKeyRef": OTLP_SECRET} if name == "gateway" else None)
    [template] = [
        d for d in documents if d["kind"] == "Secret" and d["metadata"]["name"] == "langfuse"
    ]
    assert template["stringData"] == {"headers": "REPLACE_ME"}


def test_headers_for_traces_that_nobody_sends(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has otlp_headers, but the gateway sends no traces; "):
        with_gateway(tmp_path, {}, otlp_headers=OTLP_SECRET)


def test_a_public_load_balancer_wants_api_keys(tmp_path: Path) -> None:
    public = {"scheme": "internet-facing"}
    without = {"max_gpus": 8, "ingress": public}
    one = with_keys(tmp_path, file="/etc/serve_app/keys.yaml")
    assert render(one, ClusterProfile.model_validate({**without, "keys": SECRET}))
    open_ = replace(one, gateway=one.gateway.model_copy(update={"keys": None}))
    with pytest.raises(ConfigError, match="internet-facing, and the gateway asks for no API keys"):
        render(open_, ClusterProfile.model_validate(without))
    for ingress in (public | {"public_without_keys": True}, public | {"kind": "none"}, {}):
        assert render(open_, ClusterProfile.model_validate(without | {"ingress": ingress}))
