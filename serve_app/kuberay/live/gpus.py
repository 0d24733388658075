"""Whether a change can get its GPUs: idle ones, and those of nodes that Karpenter may add."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from serve_app.errors import UserError
from serve_app.kuberay.live.api_server import APIServer, Forbidden
from serve_app.kuberay.live.change import Change

_GPU = "nvidia.com/gpu"


def check(server: APIServer, change: Change, *, force: bool, tell: Callable[[str], None]) -> None:
    """Tell whether there are enough GPUs for a change.

    Raises:
        UserError: there are not, the change makes a second cluster, and ``force`` is not set.
    """
    if not change.gpus:
        return
    needs = f"needs {change.gpus} more GPUs"
    try:
        idle, to_come = _free(server)
    except Forbidden:
        tell(f"{needs} (not allowed to list nodes: cannot tell if they exist)")
        return
    how = f"{idle} idle on nodes, {to_come} within the NodePools' limits"
    if change.gpus <= idle + to_come:
        tell(f"{needs}; {how}")
        return
    shortage = (
        f"it {needs}, but {idle + to_come} can be had ({how}); raise the NodePool's "
        "limits.nvidia.com/gpu"
    )
    # A first deployment that waits for nodes does no harm. A second cluster that never comes up
    # blocks every later change (kuberay#1476).
    if change.kind == "new cluster" and not force:
        raise UserError(
            f"{shortage}, choose upgrade.strategy None or NewClusterWithIncrementalUpgrade, or go "
            "ahead with --force"
        )
    tell(f"warning: {shortage}")


def _free(server: APIServer) -> tuple[int, int]:
    """The idle GPUs on nodes, and the GPUs of nodes that Karpenter may still add.

    The second number is an upper bound: a NodePool's limit does not say what EC2 has.

    Raises:
        Forbidden: these credentials may not list nodes, pods or NodePools.
    """
    on_nodes = sum(_gpus(n.get("status"), "allocatable") for n in server.list("Node"))
    in_use = sum(
        _gpus(container.get("resources"), "requests")
        for pod in server.list("Pod")
        if (pod.get("spec") or {}).get("nodeName")
        and (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed")
        for container in pod["spec"].get("containers") or []
    )
    try:
        pools = server.list("NodePool")
    except Forbidden:
        raise
    except UserError:  # no Karpenter
        pools = []
    to_come = sum(
        max(0, _gpus(pool.get("spec"), "limits") - _gpus(pool.get("status"), "resources"))
        for pool in pools
    )
    return max(0, on_nodes - in_use), to_come


def _gpus(part: Any, key: str) -> int:
    return int(((part or {}).get(key) or {}).get(_GPU) or 0)
