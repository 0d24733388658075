"""Which RayCluster a RayService wants, and whether one that is there will do."""

from __future__ import annotations

import copy
import hashlib
import json
from typing import Any

from operator_model.documents import (
    INCREMENTAL,
    cluster_name,
    holds,
    is_incremental,
    made_for,
    options,
    owned_by,
    without_empty,
)

Document = dict[str, Any]

HASH = "ray.io/hash-without-replicas-and-workers-to-delete"
_GROUPS = "ray.io/num-worker-groups"
_VERSION = {"ray.io/kuberay-version": "v1.7.0"}


def cluster_of(service: Document, name: str) -> Document:
    """``constructRayClusterForRayService``."""
    metadata, config = service["metadata"], copy.deepcopy(service["spec"]["rayClusterConfig"])
    groups = config.get("workerGroupSpecs") or []
    marks = {HASH: hash_of(config), _GROUPS: str(len(groups)), **_VERSION}
    if is_incremental(service) and cluster_name(service, "active"):
        for group in groups:
            group.pop("replicas", None)
    made = {
        "labels": (metadata.get("labels") or {}) | made_for(service),
        "annotations": (metadata.get("annotations") or {}) | marks,
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": owned_by(service, name) | made,
        "spec": config,
    }


def hash_of(config: Document) -> str:
    """``GenerateHashWithoutReplicasAndWorkersToDelete``, of ``rayClusterSpecForHashing``."""
    config = copy.deepcopy(config)
    for field in ("suspend", "upgradeStrategy"):
        config.pop(field, None)
    for group in [config["headGroupSpec"], *(config.get("workerGroupSpecs") or [])]:
        for field in ("tolerations", "schedulingGates"):
            group["template"]["spec"].pop(field, None)
    for group in config.get("workerGroupSpecs") or []:
        for field in ("replicas", "minReplicas", "maxReplicas"):
            group.pop(field, None)
        (group.get("scaleStrategy") or {}).pop("workersToDelete", None)
    text = json.dumps(without_empty(config), sort_keys=True)
    return hashlib.sha1(text.encode()).hexdigest()


def is_appended(service: Document, cluster: Document) -> bool:
    """``shouldUpdateCluster``: the spec has more groups at the end, and is else the same."""
    return not _equal(service, cluster) and _equal(service, cluster, partial=True)


def needs_new(
    service: Document, active: Document | None, pending: Document | None, *, turned: bool = False
) -> bool:
    """``shouldPrepareNewCluster``: the pending cluster is what counts, if there is one.

    ``turned`` tells that the Services select the pending cluster.
    """
    if turned or holds(service, "RollbackInProgress"):
        return False
    cluster = pending or active
    if cluster is None:
        return True
    same = _equal(service, cluster) or _equal(service, cluster, partial=True)
    return not same and (service["spec"].get("upgradeStrategy") or {}).get("type") != "None"


def _equal(service: Document, cluster: Document, *, partial: bool = False) -> bool:
    """``isClusterSpecHashEqual``; ``partial``: without groups beyond those of the cluster."""
    config = dict(service["spec"]["rayClusterConfig"])
    marks = cluster["metadata"]["annotations"]
    if partial:
        groups = config.get("workerGroupSpecs") or []
        config["workerGroupSpecs"] = groups[: int(marks[_GROUPS])]
    return bool(hash_of(config) == marks[HASH])


def invalid(service: Document) -> str | None:
    """``ValidateRayServiceSpec``: some of its rules that the CRD does not have."""
    spec, found = service["spec"], None
    for group in spec["rayClusterConfig"].get("workerGroupSpecs") or []:
        least, most = group.get("minReplicas", 0), group.get("maxReplicas", 2**31 - 1)
        if least > most:
            bounds = f"has minReplicas {least} greater than maxReplicas {most}"
            found = f"worker group {group['groupName']} {bounds}"
    if spec.get("rayClusterDeletionDelaySeconds", 0) < 0:
        what = "Spec.RayClusterDeletionDelaySeconds should be a non-negative integer"
        found = f"{what}, got {spec['rayClusterDeletionDelaySeconds']}"
    kind = (spec.get("upgradeStrategy") or {}).get("type")
    if kind not in (None, "None", "NewCluster", INCREMENTAL):
        options_are = f"{INCREMENTAL}, NewCluster, or None"
        what = f"Spec.UpgradeStrategy.Type value {kind} is invalid"
        found = f"{what}, valid options are {options_are}"
    if is_incremental(service):
        if not spec["rayClusterConfig"].get("enableInTreeAutoscaling"):
            found = f"Ray Autoscaler is required for {INCREMENTAL}"
        elif options(service)["stepSizePercent"] > options(service).get("maxSurgePercent", 100):
            found = "stepSizePercent must be less than or equal to maxSurgePercent"
    return f"The RayService spec is invalid: {found}" if found else None
