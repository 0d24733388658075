"""Renders a config and a profile into a folder of manifests for kustomize and kubectl.

::

    DIR/base/               everything one fleet needs, fit for production
    DIR/overlays/dev/       the same, cheaper and without guarantees
    DIR/overlays/prod/      the same, with monitoring
    DIR/nodes/              Karpenter's NodePools and NodeClass, for whoever runs the cluster;
                            on EKS Auto Mode the load balancer's class too
    DIR/secrets.template.yaml

Rendering is a pure function: the same config and profile give the same bytes.
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any

from serve_app.config.document import Fleet
from serve_app.config.yaml_files import dump, note, plain
from serve_app.errors import ConfigError
from serve_app.kuberay.render import (
    api_keys,
    disruption,
    karpenter,
    namespace,
    network,
    otlp_headers,
    rayservice,
    usage_db,
)
from serve_app.kuberay.render.monitoring import pod_monitors, prometheus_rules
from serve_app.kuberay.render.names import MAX_NAME, instance_name
from serve_app.kuberay.render.profile import ClusterProfile
from serve_app.kuberay.render.workers import WorkerGroup, groups_of

INCREMENTAL = "NewClusterWithIncrementalUpgrade"

# The order of application: objects that the RayService refers to come before it.
_DEPLOYED = (
    "namespace.yaml",
    "serviceaccount.yaml",
    "model-cache.yaml",
    "networkpolicy.yaml",
    "gateway-class.yaml",
    "rayservice.yaml",
    "poddisruptionbudget.yaml",
    "ingress.yaml",
)


def render(fleet: Fleet, profile: ClusterProfile) -> dict[str, str]:
    """The text of every file of the folder, by its path.

    Raises:
        ConfigError: the config cannot become a RayService, with what to change.
    """
    groups = _groups(fleet, profile)
    source = f"Rendered by `serve-app render {fleet.path.name}`; change that and render again."
    base = _base(fleet, profile, groups)
    files = {f"base/{name}": dump(*documents, header=source) for name, documents in base.items()}
    nodes = _nodes(fleet, profile, groups)
    files |= {f"nodes/{name}": dump(*documents, header=source) for name, documents in nodes.items()}
    for folder, names in (("base", [n for n in _DEPLOYED if n in base]), ("nodes", list(nodes))):
        files[f"{folder}/kustomization.yaml"] = dump(_kustomization(resources=names), header=source)
    files |= _overlays(fleet, profile, base, source)
    secrets = namespace.secrets_template(profile)
    if secrets:
        files["secrets.template.yaml"] = dump(
            *secrets,
            header=(
                "Not applied by any overlay: fill in outside of git, or let External Secrets make "
                "them.\n"
                f"kubectl create secret generic {secrets[0]['metadata']['name']} "
                f"--namespace {profile.namespace} "
                f"--from-literal={next(iter(secrets[0]['stringData']))}=…"
            ),
        )
    return files


def documents(fleet: Fleet, profile: ClusterProfile) -> list[dict[str, Any]]:
    """The objects that `serve-app deploy` applies, in order: the base, without comments.

    Raises:
        ConfigError: the config cannot become a RayService, with what to change.
    """
    base = _base(fleet, profile, _groups(fleet, profile))
    return [plain(document) for name in _DEPLOYED if name in base for document in base[name]]


def node_documents(fleet: Fleet, profile: ClusterProfile) -> list[dict[str, Any]]:
    """The fleet's node pools, which the cluster's operator applies; without comments."""
    nodes = _nodes(fleet, profile, _groups(fleet, profile))
    return [plain(document) for documents in nodes.values() for document in documents]


def cluster_wide() -> dict[str, str]:
    """The files that a cluster needs once for all fleets: operator, storage, rights, dashboards.

    They are kept as package data. Returns their text by their path.
    """
    root = resources.files("serve_app").joinpath("data", "cluster-wide")
    files = {f"{folder.name}/{f.name}": f for folder in root.iterdir() for f in folder.iterdir()}
    return {path: files[path].read_text() for path in sorted(files)}


def _groups(fleet: Fleet, profile: ClusterProfile) -> list[WorkerGroup]:
    if fleet.gateway is None:
        raise ConfigError(
            f"{fleet.path}: no gateway: add an application with "
            "import_path serve_app.gateway:app at route_prefix /"
        )
    name = instance_name(fleet)
    if len(name) > MAX_NAME or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        raise ConfigError(
            f"{fleet.path}: the RayService would be called '{name}'; KubeRay takes names of "
            f"{MAX_NAME} letters, digits and '-' at most that start with a letter: rename the file"
        )
    if not fleet.models:
        raise ConfigError(
            f"{fleet.path}: no model: add an application with import_path serve_app.model:app"
        )
    if problem := network.why_unreachable(fleet.host):
        raise ConfigError(f"{fleet.path}: {problem}")
    if fleet.on_ipv6 and not any(":" in cidr for cidr in profile.client_cidrs):
        raise ConfigError(
            f"{fleet.path}: http_options.host is {fleet.host}, but the profile's client_cidrs are "
            "all of IPv4, from which no pod of an IPv6 cluster is reached; add the VPC's IPv6 "
            "network, such as 2600:1f18:1234:5600::/56"
        )
    if problem := (
        api_keys.why_unreadable(fleet, profile)
        or api_keys.why_open(fleet, profile)
        or usage_db.why_unreachable(fleet, profile)
        or otlp_headers.why_useless(fleet, profile)
    ):
        raise ConfigError(f"{fleet.path}: {problem}")
    for id, model in fleet.models.items():
        if not model.model.startswith("/") and Path(model.model).is_dir():
            raise ConfigError(
                f"{fleet.path}: application '{id}': model is the local folder {model.model}, which "
                "no pod has; use a hub id, an s3:// address, or an absolute path in the image"
            )
    return groups_of(fleet, profile)


def _base(
    fleet: Fleet, profile: ClusterProfile, groups: list[WorkerGroup]
) -> dict[str, list[dict[str, Any]]]:
    base: dict[str, list[dict[str, Any]]] = {
        "namespace.yaml": [namespace.namespace(profile)],
        "serviceaccount.yaml": [namespace.service_account(profile)],
        "networkpolicy.yaml": network.network_policies(fleet, profile),
        "rayservice.yaml": [rayservice.rayservice(fleet, profile, groups)],
        "poddisruptionbudget.yaml": disruption.budgets(fleet, profile, groups),
    }
    if profile.cache.kind == "pvc":
        base["model-cache.yaml"] = [namespace.cache_claim(profile)]
    if profile.upgrade.strategy == INCREMENTAL:
        base["gateway-class.yaml"] = network.gateway_api(fleet, profile)
    elif profile.ingress.kind == "alb":
        base["ingress.yaml"] = [network.ingress(fleet, profile)]
    return base


def _overlays(
    fleet: Fleet, profile: ClusterProfile, base: dict[str, list[dict[str, Any]]], source: str
) -> dict[str, str]:
    name = instance_name(fleet)
    repository, at, digest = profile.image.partition("@")
    if not at:
        repository, _, tag = profile.image.rpartition(":")
    image = {
        "name": repository,
        "newName": note(repository, "The registry that this environment pulls from."),
        **({"digest": digest} if at else {"newTag": tag}),
    }
    cheaper: list[dict[str, Any]] = [
        {"op": "replace", "path": "/spec/upgradeStrategy", "value": {"type": "None"}}
    ]
    if profile.redis is not None:
        cheaper.append({"op": "remove", "path": "/spec/rayClusterConfig/gcsFaultToleranceOptions"})
    # The GatewayClass is cluster-scoped: two overlays would overwrite each other's.
    without = ("poddisruptionbudget.yaml", "ingress.yaml", "gateway-class.yaml")
    patches: list[Any] = [
        note(
            {
                "target": {"group": "ray.io", "kind": "RayService", "name": name},
                "patch": dump(cheaper),
            },
            "No second cluster on a change (delete and deploy again), no Redis behind the head.",
        )
    ]
    for document in (d for file in without for d in base.get(file, [])):
        metadata = document["metadata"]
        kept = {key: metadata[key] for key in ("name", "namespace") if key in metadata}
        patches.append(
            {
                "patch": dump(
                    {
                        "apiVersion": document["apiVersion"],
                        "kind": document["kind"],
                        "metadata": kept,
                        "$patch": "delete",
                    }
                )
            }
        )
    dev = _kustomization(
        namespace=f"{profile.namespace}-dev",
        resources=["../../base"],
        images=[image],
        patches=note(patches, "Reached by `kubectl port-forward`; drained without asking anyone."),
    )
    prod = _kustomization(
        resources=note(
            ["../../base", "monitoring.yaml"],
            "Dashboards are the cluster's, once: kuberay/monitoring.",
        ),
        images=[image],
    )
    return {
        "overlays/dev/kustomization.yaml": dump(dev, header=source),
        "overlays/prod/kustomization.yaml": dump(prod, header=source),
        "overlays/prod/monitoring.yaml": dump(
            *pod_monitors(name, profile.namespace),
            prometheus_rules(fleet, name, profile.namespace),
            header=source,
        ),
    }


def _nodes(
    fleet: Fleet, profile: ClusterProfile, groups: list[WorkerGroup]
) -> dict[str, list[dict[str, Any]]]:
    types = sorted({t for group in groups if group.shape for t in group.shape.instance_types})
    nodes = {
        "nodepools.yaml": karpenter.node_pools(profile, types),
        "nodeclass.yaml": [karpenter.node_class(profile)],
    }
    if profile.karpenter == "auto-mode" and profile.ingress.kind == "alb":
        nodes["ingressclass.yaml"] = network.ingress_class(fleet, profile)
    return nodes


def _kustomization(**settings: Any) -> dict[str, Any]:
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        **settings,
    }


def write(files: dict[str, str], into: Path) -> list[Path]:
    """Write the files, remove those of an earlier rendering, and return the changed paths.

    Raises:
        ConfigError: the folder cannot be written to.
    """
    changed = []
    try:
        for path in _stale(files, into):
            path.unlink()
            changed.append(path)
        for name, text in files.items():
            path = into / name
            if not path.exists() or path.read_text() != text:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
                changed.append(path)
    except OSError as error:
        raise ConfigError(f"{into}: cannot be written ({error.strerror})") from None
    return changed


def _stale(files: dict[str, str], into: Path) -> list[Path]:
    """Files of an earlier rendering, known by their first line, that this one does not write.

    Only this rendering's own folders are searched: a folder below may hold another rendering.
    """
    ours = {text.partition("\n")[0] for text in files.values() if text.startswith("# Rendered")}
    wanted = {into / name for name in files}
    found = []
    for folder in sorted({path.parent for path in wanted}):
        for path in sorted(folder.glob("*.yaml")):
            with path.open() as file:
                if path not in wanted and file.readline().rstrip("\n") in ours:
                    found.append(path)
    return found
