"""PodDisruptionBudgets: how many pods a drain must leave.

Each is a whole ``minAvailable``. For ``maxUnavailable`` and percentages Kubernetes asks the pods'
owner how many it wants, by the scale sub-resource. A RayCluster has none, and the budget then
allows nothing: every drain waits for ever.
"""

from __future__ import annotations

from typing import Any

from serve_app.config.document import Fleet
from serve_app.config.yaml_files import note
from serve_app.kuberay.render.names import instance_name, labels
from serve_app.kuberay.render.profile import ClusterProfile
from serve_app.kuberay.render.workers import WorkerGroup


def budgets(
    fleet: Fleet, profile: ClusterProfile, groups: list[WorkerGroup]
) -> list[dict[str, Any]]:
    """KubeRay makes no budgets (kuberay#5004). Without them a drain evicts every pod at once."""
    name = instance_name(fleet)

    def budget(suffix: str, selector: dict[str, str], least: Any) -> dict[str, Any]:
        return {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": {
                "name": f"{name}-{suffix}",
                "namespace": profile.namespace,
                "labels": labels(name),
            },
            "spec": {
                "minAvailable": least,
                "unhealthyPodEvictionPolicy": "AlwaysAllow",
                "selector": {"matchLabels": selector},
            },
        }

    found = [
        budget(
            group.name,
            # Not the label ray.io/cluster, which changes with every upgrade.
            labels(name, group.role) | {"ray.io/group": group.name},
            _least(group),
        )
        for group in groups
    ]
    if profile.redis is None:
        found.append(
            budget(
                "head",
                labels(name, "head"),
                note(
                    1,
                    "Without Redis the head takes every model with it, so no drain may begin with "
                    "it: delete the pod when that is meant. (Karpenter ends its wait by the "
                    "NodePool's terminationGracePeriod.)",
                ),
            )
        )
    return found


def _least(group: WorkerGroup) -> Any:
    """The pods of a group that a drain must leave.

    Counted from those that are always there. Pods beyond, by load, may go at the same time.
    """
    pods_per_replica = group.shape.pods_per_replica if group.shape else 1
    if group.min_pods <= pods_per_replica:
        return note(
            0,
            "One replica, or none, is always there. It must be able to go, or no drain would ever "
            "end; its pod ends once a replacement runs.",
        )
    return note(
        group.min_pods - 1,
        f"One pod at a time, of the {group.min_pods} that are always there. Must be a whole "
        "number: by maxUnavailable or a percentage Kubernetes allows nothing for a RayCluster.",
    )
