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
                    **(get(group, "template.metadata.labels") or {}),
                    **(group.get("labels") or {}),
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


def groups_of(document: Document) -> Iterator[tuple[str, Document]]:
    cluster = get(document, "spec.rayClusterConfig") or {}
    if isinstance(cluster.get("headGroupSpec"), dict):
        yield "spec.rayClusterConfig.headGroupSpec", cluster["headGroupSpec"]
    for index, group in enumerate(cluster.get("workerGroupSpecs") or []):
        if isinstance(group, dict):
            yield f"spec.rayClusterConfig.workerGroupSpecs[{index}]", group


def containers(group: Document) -> list[Document]:
    return [c for c in get(group, "template.spec.containers") or [] if isinstance(c, dict)]


def container_of(group: Document) -> Document:
    """Ray's container: the first."""
    return next(iter(containers(group)), {})


def resources(group: Document, field: str) -> Document:
    return get(container_of(group), f"resources.{field}") or {}


def gpus_of(group: Document) -> int:
    return int(resources(group, "limits").get(GPU) or 0)


def accelerator_of(group: Document) -> str:
    for key in group.get("resources") or {}:
        if str(key).startswith("accelerator_type:"):
            return str(key).removeprefix("accelerator_type:")
    return ""


def count(group: Document, field: str) -> int:
    value = group.get(field)
    number = value if isinstance(value, int) else 0
    return number * int(group.get("numOfHosts") or 1)


def affinity_values(group: Document, key: str) -> list[str]:
    required = (
        get(
            group,
            "template.spec.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution",
        )
        or {}
    )
    return [
        str(value)
        for term in required.get("nodeSelectorTerms") or []
        for expression in term.get("matchExpressions") or []
        if expression.get("key") == key and expression.get("operator") == "In"
        for value in expression.get("values") or []
    ]


def required_values(pool: Document, key: str) -> list[str] | None:
    for requirement in get(pool, "spec.template.spec.requirements") or []:
        if requirement.get("key") == key and requirement.get("operator") == "In":
            return [str(value) for value in requirement.get("values") or []]
    return None


def gpu_limit(bundle: Bundle) -> int | None:
    limits = [get(p, "spec.limits") or {} for p in bundle.node_pools]
    given = [int(limit[GPU]) for limit in limits if limit.get(GPU)]
    return sum(given) if given else None


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
    text = str(get(container, f"resources.{field}.cpu") or "0")
    return float(text[:-1]) / 1000 if text.endswith("m") else float(text)


def seconds_of(duration: Any) -> int | None:
    """A Go duration (``1h30m``) in seconds; None for none."""
    parts = re.findall(r"(\d+)([hms])", str(duration or ""))
    factor = {"h": 3600, "m": 60, "s": 1}
    return sum(int(n) * factor[u] for n, u in parts) if parts else None


def is_token(key: str, value: str) -> bool:
    named = key in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY") and value
    return bool(named or re.match(r"hf_[A-Za-z0-9]{20,}", value))
