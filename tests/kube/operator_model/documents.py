"""Reading and making objects, as every controller does."""

from __future__ import annotations

from typing import Any

Document = dict[str, Any]

INCREMENTAL = "NewClusterWithIncrementalUpgrade"


def name_of(document: Document) -> str:
    return str(document["metadata"]["name"])


def id_of(document: Document) -> str:
    return f"{document['metadata']['namespace']}/{name_of(document)}"


def part(service: Document, which: str) -> Document:
    """The ``active`` or the ``pending`` part of a status, to read and to change."""
    field = f"{which}ServiceStatus"
    service["status"][field] = service["status"].get(field) or {}
    return service["status"][field]  # type: ignore[no-any-return]


def cluster_name(service: Document, which: str) -> str:
    """The name of the ``active`` or ``pending`` RayCluster, or nothing."""
    return str(part(service, which).get("rayClusterName") or "")


def holds(service: Document, kind: str) -> bool:
    """Whether a condition is True."""
    conditions = service["status"].get("conditions") or []
    return any(c["type"] == kind and c["status"] == "True" for c in conditions)


def is_incremental(service: Document) -> bool:
    return (service["spec"].get("upgradeStrategy") or {}).get("type") == INCREMENTAL


def options(service: Document) -> Document:
    """``clusterUpgradeOptions`` of an incremental upgrade."""
    return (service["spec"].get("upgradeStrategy") or {}).get("clusterUpgradeOptions") or {}


def label(pod: Document, key: str) -> str:
    """One of a pod's ``ray.io/`` labels."""
    return str((pod["metadata"].get("labels") or {}).get(f"ray.io/{key}"))


def owned_by(owner: Document, name: str) -> Document:
    """Metadata of what an owner's controller makes (``SetControllerReference``)."""
    reference = {key: owner["metadata"][key] for key in ("name", "uid")}
    kind = {"apiVersion": owner.get("apiVersion"), "kind": owner["kind"]}
    return {
        "name": name,
        "namespace": owner["metadata"]["namespace"],
        "ownerReferences": [{**kind, **reference, "controller": True}],
    }


def made_for(service: Document) -> dict[str, str]:
    """Labels of what the operator makes (``RayServiceRayClustersAssociationOptions``)."""
    return {
        "ray.io/originated-from-cr-name": name_of(service),
        "ray.io/originated-from-crd": "RayService",
    }


def without_empty(value: Any) -> Any:
    """A copy as Go writes it: without fields that hold nothing."""
    if isinstance(value, dict):
        kept = {key: without_empty(item) for key, item in value.items()}
        return {key: item for key, item in kept.items() if item not in ({}, [], None, "")}
    return [without_empty(item) for item in value] if isinstance(value, list) else value
