"""Whether a change can get its GPUs: idle ones, and those of nodes that Karpenter may add."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from serve_app.errors import UserError
from serve_app.kuberay.live.api_server import APIServer, Forbidden
from serve_app.kuberay.live.change import Change, Need
from serve_app.kuberay.validate.manifests import GPU, INSTANCE_TYPE, required_values

Document = dict[str, Any]


def check(server: APIServer, change: Change, *, force: bool, tell: Callable[[str], None]) -> None:
    """Tell whether there are enough GPUs for a change.

    Raises:
        UserError: there are not, the change makes a second cluster, and ``force`` is not set.
    """
    if not change.needs:
        return
    try:
        idle, to_come = _idle(server), _to_come(server)
    except Forbidden:
        unknown = "not allowed to list nodes: cannot tell if they exist"
        tell(f"needs {change.gpus} more GPUs ({unknown})")
        return
    short = []
    for need in change.needs:
        now, later = _of(idle, need), _of(to_come, need)
        how = f"{now} idle on nodes, {later} within the NodePools' limits"
        what = f"{need.group} needs {need.gpus} more GPUs"
        if need.gpus <= now + later:
            tell(f"{what}; {how}")
        else:
            short.append(f"{what}, but {now + later} can be had ({how})")
        _take(to_come, need, need.gpus - _take(idle, need, need.gpus))
    if not short:
        return
    more = (
        "raise the NodePool's limits.nvidia.com/gpu"
        if to_come
        else "there is no NodePool to add machines: apply the folder nodes of serve-app render"
    )
    shortage = f"{'; '.join(short)}; {more}"
    # A first deployment that waits for nodes does no harm. A second cluster that never comes up
    # blocks every later change (kuberay#1476).
    if change.kind == "new cluster" and not force:
        raise UserError(
            f"{shortage}, choose upgrade.strategy None or NewClusterWithIncrementalUpgrade, or go "
            "ahead with --force"
        )
    tell(f"warning: {shortage}")


def held(pod: Document) -> int:
    """The GPUs that a pod asks for."""
    containers = (pod.get("spec") or {}).get("containers") or []
    return sum(_gpus(container.get("resources"), "requests") for container in containers)


@dataclass
class _Source:
    """GPUs that can be had from a node or a NodePool."""

    gpus: int
    instance_types: frozenset[str]
    """Empty for a NodePool that may add any."""

    def fits(self, need: Need) -> bool:
        ours, theirs = self.instance_types, need.instance_types
        return not ours or not theirs or bool(ours & theirs)


def _of(sources: list[_Source], need: Need) -> int:
    return sum(source.gpus for source in sources if source.fits(need))


def _take(sources: list[_Source], need: Need, gpus: int) -> int:
    """Take up to so many GPUs, which no other group then finds; return how many there were."""
    taken = 0
    for source in sources:
        if source.fits(need):
            part = min(source.gpus, gpus - taken)
            source.gpus -= part
            taken += part
    return taken


def _idle(server: APIServer) -> list[_Source]:
    """The idle GPUs of each node that takes our pods.

    Raises:
        Forbidden: these credentials may not list nodes or pods.
    """
    in_use: dict[str, int] = {}
    for pod in server.list("Pod"):
        spec, phase = pod.get("spec") or {}, (pod.get("status") or {}).get("phase")
        if spec.get("nodeName") and phase not in ("Succeeded", "Failed"):
            in_use[spec["nodeName"]] = in_use.get(spec["nodeName"], 0) + held(pod)
    found = []
    for node in server.list("Node"):
        metadata = node["metadata"]
        idle = _gpus(node.get("status"), "allocatable") - in_use.get(metadata["name"], 0)
        if idle > 0 and _takes_pods(node):
            kind = (metadata.get("labels") or {}).get(INSTANCE_TYPE, "unknown")
            found.append(_Source(idle, frozenset({kind})))
    return found


def _takes_pods(node: Document) -> bool:
    """Whether a node is alive and no taint keeps our GPU pods away: cordoned ones have one."""
    spec, status = node.get("spec") or {}, node.get("status") or {}
    ready = {c["type"]: c.get("status") for c in status.get("conditions") or []}.get("Ready")
    kept_away = any(
        taint.get("key") != GPU and taint.get("effect") in ("NoSchedule", "NoExecute")
        for taint in spec.get("taints") or []
    )
    return ready == "True" and not kept_away and not spec.get("unschedulable")


def _to_come(server: APIServer) -> list[_Source]:
    """The GPUs of nodes that Karpenter may still add, by NodePool.

    It is an upper bound: a NodePool's limit does not say what EC2 has.

    Raises:
        Forbidden: these credentials may not list NodePools.
    """
    try:
        pools = server.list("NodePool")
    except Forbidden:
        raise
    except UserError:  # no Karpenter
        return []
    return [
        _Source(
            max(0, _gpus(pool.get("spec"), "limits") - _gpus(pool.get("status"), "resources")),
            frozenset(required_values(pool, INSTANCE_TYPE) or ()),
        )
        for pool in pools
    ]


def _gpus(part: Any, key: str) -> int:
    return int(((part or {}).get(key) or {}).get(GPU) or 0)
