"""The one reader of manifests: values at a path, quantities, pods, and facts of all documents.

Reading never fails: a value of another type than Kubernetes has there counts as missing. The
schemas (:mod:`schema`) report the wrong type.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from serve_app.config import yaml_files
from serve_app.errors import ConfigError

Document = dict[str, Any]

GPU = "nvidia.com/gpu"
EFA = "vpc.amazonaws.com/efa"
CAPACITY_TYPE = "karpenter.sh/capacity-type"
INSTANCE_TYPE = "node.kubernetes.io/instance-type"


class Pods:
    """The pods of one group of a RayService, which are all alike: the head's or a worker group's.

    ``where`` is the group's path in the document. The container is the first one, Ray's.
    """

    def __init__(self, where: str, group: Document) -> None:
        self.where, self.group = where, group
        self.is_head = where.endswith("headGroupSpec")
        self.name = str(group.get("groupName", "headgroup"))
        self.spec = mapping(group, "template.spec")
        self.spec_at = f"{where}.template.spec"
        self.containers = items(self.spec, "containers")
        self.container: Document = next(iter(self.containers), {})
        self.container_at = f"{self.spec_at}.containers[0]"
        self.limits = mapping(self.container, "resources.limits")
        self.requests = mapping(self.container, "resources.requests")
        self.told = mapping(group, "resources")
        """The resources that KubeRay tells Ray the pod has."""
        self.gpus = whole(self.limits.get(GPU))
        self.memory = amount(self.limits.get("memory"))
        """The container's memory limit in bytes; None where it has none."""

    @property
    def accelerator(self) -> str:
        """Ray's name of the pod's GPU type; empty where the group does not give it."""
        prefix = "accelerator_type:"
        named = (str(key) for key in self.told if str(key).startswith(prefix))
        return next(named, "").removeprefix(prefix)

    @property
    def cores(self) -> float:
        """Cores that the container requests."""
        return amount(self.requests.get("cpu")) or 0.0

    @property
    def ray_cores(self) -> float:
        """Cores that Ray believes the pod has."""
        told = self.told.get("CPU")
        return self.cores if told is None else amount(told) or 0.0

    @property
    def ports(self) -> dict[str, Any]:
        return {str(p.get("name")): p.get("containerPort") for p in items(self.container, "ports")}

    @property
    def env(self) -> Iterator[tuple[str, Document]]:
        """Every environment variable of every container, with its path."""
        for i, container in enumerate(self.containers):
            for j, entry in enumerate(items(container, "env")):
                yield f"{self.spec_at}.containers[{i}].env[{j}]", entry

    @property
    def lasting_mounts(self) -> set[str]:
        """Folders that outlive the pod."""
        kinds = {"persistentVolumeClaim", "hostPath", "csi", "nfs"}
        kept = {v.get("name") for v in items(self.spec, "volumes") if kinds & v.keys()}
        mounts = items(self.container, "volumeMounts")
        return {str(m.get("mountPath")).rstrip("/") for m in mounts if m.get("name") in kept}

    def bound(self, field: str) -> int:
        """The number of pods, at ``minReplicas`` or ``maxReplicas``."""
        return whole(self.group.get(field)) * (whole(self.group.get("numOfHosts")) or 1)

    def gpus_by(self, field: str) -> int:
        """The group's GPUs, at ``minReplicas`` or ``maxReplicas``."""
        return self.bound(field) * self.gpus

    def affinity(self, key: str) -> list[str]:
        """The values of a node label that the pods accept."""
        required = "affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution"
        return [
            value
            for term in items(self.spec, f"{required}.nodeSelectorTerms")
            for expression in items(term, "matchExpressions")
            if expression.get("key") == key and expression.get("operator") == "In"
            for value in texts(expression, "values")
        ]


def pods_of(service: Document) -> list[Pods]:
    """The head's pods, then those of each worker group."""
    at = "spec.rayClusterConfig"
    head = get(service, f"{at}.headGroupSpec")
    found = [Pods(f"{at}.headGroupSpec", head)] if isinstance(head, dict) else []
    groups = items(service, f"{at}.workerGroupSpecs")
    return found + [Pods(f"{at}.workerGroupSpecs[{i}]", g) for i, g in enumerate(groups)]


def workers_of(service: Document) -> list[Pods]:
    return [pods for pods in pods_of(service) if not pods.is_head]


class Manifests:
    """Documents that are applied together."""

    def __init__(self, documents: Iterable[Document]) -> None:
        self.documents = list(documents)
        self.services = self.of_kind("RayService")
        self.node_pools = self.of_kind("NodePool")

    def of_kind(self, *kinds: str) -> list[Document]:
        return [d for d in self.documents if d.get("kind") in kinds]

    def names(self, kind: str) -> set[str]:
        return {str(get(d, "metadata.name")) for d in self.of_kind(kind)}

    @cached_property
    def secrets(self) -> set[str]:
        """Names of the Secrets here, and of those that an ExternalSecret makes."""
        made = self.of_kind("ExternalSecret")
        targets = {str(get(d, "spec.target.name") or get(d, "metadata.name")) for d in made}
        return self.names("Secret") | targets

    @property
    def pod_labels(self) -> list[dict[str, Any]]:
        """The labels that the pods of every RayService will have."""
        return [
            {
                **mapping(pods.group, "template.metadata.labels"),
                **mapping(pods.group, "labels"),
                "ray.io/is-ray-node": "yes",
                "ray.io/node-type": "head" if pods.is_head else "worker",
                "ray.io/group": pods.name,
            }
            for service in self.services
            for pods in pods_of(service)
        ]

    @property
    def gpu_limit(self) -> int | None:
        """The NodePools' limit of GPUs; None where no pool has one."""
        return sum(whole(mapping(p, "spec.limits").get(GPU)) for p in self.node_pools) or None


def read(paths: Iterable[Path]) -> list[Document]:
    """Every document of the files, and of the YAML files in the folders.

    Kustomize's own files and patches are left out, because they are not Kubernetes objects.

    Raises:
        ConfigError: a file that cannot be read, with line and column; or no document at all.
    """
    paths = list(paths)
    documents: list[Document] = []
    for path in paths:
        found = sorted(path.rglob("*.yaml")) if path.is_dir() else [path]
        for file in found:
            if file.name != "kustomization.yaml" or file == path:
                documents += [d for d in yaml_files.read_all(file) if _is_object(d)]
    if not documents:
        raise ConfigError(
            f"{', '.join(map(str, paths)) or 'nothing'}: no Kubernetes manifest there"
        )
    return documents


def _is_object(document: Any) -> bool:
    return isinstance(document, dict) and isinstance(document.get("kind"), str)


def get(value: Any, path: str) -> Any:
    """The value at a dotted path of mappings, or None."""
    for key in path.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def items(value: Any, path: str) -> list[Document]:
    """The mappings in the list at a dotted path."""
    found = get(value, path)
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def texts(value: Any, path: str) -> list[str]:
    """The values of the list at a dotted path, as text."""
    found = get(value, path)
    return [str(item) for item in found] if isinstance(found, list) else []


def mapping(value: Any, path: str) -> Document:
    """The mapping at a dotted path, else an empty one."""
    found = get(value, path)
    return found if isinstance(found, dict) else {}


def required_values(pool: Document, key: str) -> list[str] | None:
    """The values of a node label that a NodePool's machines can have; None for any."""
    for requirement in items(pool, "spec.template.spec.requirements"):
        if requirement.get("key") == key and requirement.get("operator") == "In":
            return texts(requirement, "values")
    return None


def whole(value: Any) -> int:
    """A count that is a number or a numeric text; 0 for anything else."""
    text = str(value)
    return int(text) if text.isdecimal() else 0


_UNITS = {
    "n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15,
    "E": 1e18, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50, "Ei": 2**60,
}  # fmt: skip
_QUANTITY = re.compile(r"(\d+(?:\.\d+)?)(?:([eE]-?\d+)|([numkMGTPE]|[KMGTPE]i))?")
HOW_QUANTITIES_ARE = "write an amount as 4, 500m or 16Gi"


def amount(quantity: Any) -> float | None:
    """A Kubernetes quantity (``4``, ``500m``, ``16Gi``, ``1e3``) in cores, bytes …; else None."""
    found = _QUANTITY.fullmatch(str(quantity))
    if found is None:
        return None
    number, exponent, unit = found.groups(default="")
    # Kubernetes counts in billionths; what binary fractions add below that is not meant.
    return round(float(number + exponent) * _UNITS[unit], 9)


def seconds_of(duration: Any) -> int | None:
    """A Go duration (``1h30m``) in seconds; None for none."""
    parts = re.findall(r"(\d+)([hms])", str(duration or ""))
    factor = {"h": 3600, "m": 60, "s": 1}
    return sum(int(n) * factor[u] for n, u in parts) if parts else None
