"""How many GPUs can be had now: idle ones on the nodes, and those that Karpenter may still make."""

from __future__ import annotations

from typing import Any

from serve_app.errors import UserError
from serve_app.kuberay.live.client import Cluster, Forbidden

_GPU = "nvidia.com/gpu"


def free_gpus(cluster: Cluster) -> tuple[int, str] | None:
    """GPUs for new pods, and how that number comes about; None where we may not look.

    A NodePool's limit is what Karpenter may ask EC2 for, not what EC2 has: the answer is an
    upper bound.
    """
    try:
        nodes, pods = cluster.list("Node"), cluster.list("Pod")
        pools = cluster.list("NodePool")
    except Forbidden:
        return None
    except UserError:
        pools = []
    on_nodes = sum(_number((n.get("status") or {}).get("allocatable")) for n in nodes)
    in_use = sum(
        _number((container.get("resources") or {}).get("requests"))
        for pod in pods
        if (pod.get("spec") or {}).get("nodeName")
        and (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed")
        for container in pod["spec"].get("containers") or []
    )
    to_come = 0
    for pool in pools:
        limit = _number((pool.get("spec") or {}).get("limits"))
        made = _number((pool.get("status") or {}).get("resources"))
        to_come += max(0, limit - made)
    idle = max(0, on_nodes - in_use)
    return idle + to_come, f"{idle} idle on nodes, {to_come} within the NodePools' limits"


def refuse_shortage(cluster: Cluster, needed: int) -> str:
    """One line about the GPUs for a change.

    Raises:
        UserError: they do not exist, with the ways out.
    """
    free = free_gpus(cluster)
    if free is None:
        return f"needs {needed} more GPUs (not allowed to list nodes: cannot tell if they exist)"
    count, how = free
    if count < needed:
        raise UserError(
            f"it needs {needed} more GPUs, but {count} can be had ({how}); raise the NodePool's "
            "limits.nvidia.com/gpu"
        )
    return f"needs {needed} more GPUs; {how}"


def _number(resources: Any) -> int:
    return int((resources or {}).get(_GPU) or 0)
