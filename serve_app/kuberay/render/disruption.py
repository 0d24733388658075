"""PodDisruptionBudgets: how many pods a drain may evict at once."""

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

    def budget(suffix: str, selector: dict[str, str], allowed: Any) -> dict[str, Any]:
        return {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": {
                "name": f"{name}-{suffix}",
                "namespace": profile.namespace,
                "labels": labels(name),
            },
            "spec": {
                "maxUnavailable": allowed,
                "unhealthyPodEvictionPolicy": "AlwaysAllow",
                "selector": {"matchLabels": selector},
            },
        }

    found = [
        budget(
            group.name,
            # Not the label ray.io/cluster, which changes with every upgrade.
            labels(name, group.role) | {"ray.io/group": group.name},
            1,
        )
        for group in groups
    ]
    if profile.redis is None:
        found.append(
            budget(
                "head",
                labels(name, "head"),
                note(0, "Without Redis the head takes every model with it."),
            )
        )
    return found
