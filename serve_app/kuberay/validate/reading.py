"""Reading manifests: values at a path, quantities, and what a bundle's documents say together."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Document = dict[str, Any]

GPU = "nvidia.com/gpu"
EFA = "vpc.amazonaws.com/efa"
CAPACITY_TYPE = "karpenter.sh/capacity-type"
INSTANCE_TYPE = "node.kubernetes.io/instance-type"
KARPENTER_LABELS = {"capacity-type", "nodepool", "initialized", "registered"}
"""The names that exist under ``karpenter.sh/``; those of machines have another prefix."""


@dataclass(frozen=True)
class Warn:
    """Marks a finding that works but costs."""

    text: str


Found = Iterator[tuple[str, str | Warn]]
"""Fields and what is wrong with them; an error, unless it is a :class:`Warn`."""


class Bundle:
    """What the documents say of each other."""

    def __init__(self, documents: list[Document]) -> None:
        self.documents = documents
        self.names: dict[str, set[str]] = {}
        for document in documents:
            name = get(document, "metadata.name")
            self.names.setdefault(str(document.get("kind")), set()).add(str(name))
        self.node_pools = [d for d in documents if d.get("kind") == "NodePool"]
        self.services = [d for d in documents if d.get("kind") == "RayService"]
        external = {
            str(get(d, "spec.target.name") or get(d, "metadata.name"))
            for d in documents
            if d.get("kind") == "ExternalSecret"
        }
        self.secrets = self.names.get("Secret", set()) | external

    @property
    def pod_labels(self) -> list[dict[str, str]]:
        """The labels that the pods of every RayService will have."""
        found = []
        for service in self.services:
            for _, group in groups_of(service):
                labels = {
                    **mapping(group, "template.metadata.labels"),
                    **mapping(group, "labels"),
                    "ray.io/is-ray-node": "yes",
                    "ray.io/node-type": "worker" if "groupName" in group else "head",
                    "ray.io/group": group.get("groupName", "headgroup"),
                }
                found.append(labels)
        return found


def get(value: Any, path: str) -> Any:
    """The value at a dotted path of mappings, or None."""
    for key in path.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(key)
    return value


def items(value: Any, path: str) -> list[Document]:
    """The mappings in the list at a dotted path; what is none of these is no schema's business."""
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


def whole(value: Any) -> int:
    """A count as manifests have it, a number or its text; 0 for anything else."""
    text = str(value)
    return int(text) if text.isdecimal() else 0


def groups_of(document: Document) -> Iterator[tuple[str, Document]]:
    cluster = mapping(document, "spec.rayClusterConfig")
    if isinstance(cluster.get("headGroupSpec"), dict):
        yield "spec.rayClusterConfig.headGroupSpec", cluster["headGroupSpec"]
    for index, group in enumerate(items(cluster, "workerGroupSpecs")):
        yield f"spec.rayClusterConfig.workerGroupSpecs[{index}]", group


def containers(group: Document) -> list[Document]:
    return items(group, "template.spec.containers")


def container_of(group: Document) -> Document:
    """Ray's container: the first."""
    return next(iter(containers(group)), {})


def resources(group: Document, field: str) -> Document:
    return mapping(container_of(group), f"resources.{field}")


def gpus_of(group: Document) -> int:
    return whole(resources(group, "limits").get(GPU))


def accelerator_of(group: Document) -> str:
    for key in mapping(group, "resources"):
        if str(key).startswith("accelerator_type:"):
            return str(key).removeprefix("accelerator_type:")
    return ""


def count(group: Document, field: str) -> int:
    return whole(group.get(field)) * (whole(group.get("numOfHosts")) or 1)


def affinity_values(group: Document, key: str) -> list[str]:
    required = "template.spec.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution"
    return [
        value
        for term in items(group, f"{required}.nodeSelectorTerms")
        for expression in items(term, "matchExpressions")
        if expression.get("key") == key and expression.get("operator") == "In"
        for value in texts(expression, "values")
    ]


def required_values(pool: Document, key: str) -> list[str] | None:
    for requirement in items(pool, "spec.template.spec.requirements"):
        if requirement.get("key") == key and requirement.get("operator") == "In":
            return texts(requirement, "values")
    return None


def gpu_limit(bundle: Bundle) -> int | None:
    limits = [whole(mapping(pool, "spec.limits").get(GPU)) for pool in bundle.node_pools]
    return sum(limits) or None


_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12} | {
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}


def byte_count(quantity: Any) -> int | None:
    """A Kubernetes quantity of memory in bytes; None for none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kMGT]i?|Ki)?", str(quantity or ""))
    return int(float(found[1]) * _UNITS[found[2] or ""]) if found else None


def cores(container: Document, field: str) -> float:
    return core_count(get(container, f"resources.{field}.cpu"))


def core_count(quantity: Any) -> float:
    """A Kubernetes quantity of CPU in cores; 0 for none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(m?)", str(quantity))
    return float(found[1]) / (1000 if found[2] else 1) if found else 0.0


def is_quantity(value: Any) -> bool:
    """Whether Kubernetes reads it as an amount: ``4``, ``500m``, ``16Gi``, ``1e3``."""
    text = str(value)
    return bool(re.fullmatch(r"\d+(\.\d+)?([eE]-?\d+|[munkMGTPE]|[KMGTPE]i)?", text))


def seconds_of(duration: Any) -> int | None:
    """A Go duration (``1h30m``) in seconds; None for none."""
    parts = re.findall(r"(\d+)([hms])", str(duration or ""))
    factor = {"h": 3600, "m": 60, "s": 1}
    return sum(int(n) * factor[u] for n, u in parts) if parts else None


def is_token(key: str, value: str) -> bool:
    named = key in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY") and value
    return bool(named or re.match(r"hf_[A-Za-z0-9]{20,}", value))
