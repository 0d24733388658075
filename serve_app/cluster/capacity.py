"""The resources of the Ray cluster's nodes, whether a placement fits, and what to say if not.

Ray itself places. This module only predicts the result, for people. A placement that fits once
other replicas have left is waited for. One that the nodes could never hold is refused, with a
sentence that says what would fit.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from serve_app.cluster.placement import TYPE, Placement, type_of
from serve_app.errors import ConfigError

Resources = Mapping[str, float]
"""Amounts by Ray's names; memory in bytes."""


@dataclass(frozen=True)
class Node:
    """A node of the cluster: its resources in all, and those that are free now."""

    name: str
    total: Resources
    free: Resources


def nodes() -> list[Node]:
    """The living nodes of the cluster that this process is connected to, most GPUs first."""
    import ray
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    found = [
        Node(node["NodeManagerAddress"], node["Resources"], free.get(node["NodeID"], {}))
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(found, key=lambda node: (-node.total.get("GPU", 0), node.name))


def here() -> Resources:
    """All that the node has on which this process runs, a replica's or an engine's."""
    import ray

    mine = ray.get_runtime_context().get_node_id()
    return next((dict(it["Resources"]) for it in ray.nodes() if it["NodeID"] == mine), {})


def types_of_gpu() -> set[str]:
    """The types of GPU of this cluster, by Ray's names; empty where it has none, or may get others.

    A node of an unnamed type has an empty name.
    """
    import ray

    if not ray.is_initialized() or may_grow():
        return set()
    return {type_of(node.total).strip() for node in nodes() if node.total.get("GPU")}


def cores() -> float:
    """The CPU cores of the cluster, by Ray's count; without one (``serve build``), this machine's.

    A node that may still come is not in it.
    """
    import ray

    if not ray.is_initialized():
        return float(os.cpu_count() or 1)
    return sum(node.total.get("CPU", 0.0) for node in nodes())


def may_grow() -> bool:
    """Whether something outside Ray may add nodes to this cluster (KubeRay, ``ray up``).

    The nodes of such clusters carry the name of their worker group. Ray does not know which groups
    could still come, nor the size of their nodes.
    """
    import ray

    return "RAY_CLUSTER_NAME" in os.environ or any(
        "ray.io/node-group" in (node.get("Labels") or {}) for node in ray.nodes()
    )


def fits(placement: Placement, available: Sequence[Resources]) -> bool:
    """Whether all bundles fit, given each node's available resources.

    Counting is exact here, for two reasons: a rank's first bundle asks for everything that its
    other bundles ask for, and more; and all bundles take the same number of GPUs.
    """
    heads = sum(_times(placement.head, node) for node in available)
    every = sum(_times(placement.stage or placement.head, node) for node in available)
    return heads >= placement.ranks and every >= placement.ranks * placement.stages


def _times(bundle: Resources, node: Resources) -> int:
    """The number of such bundles that a node can hold at once."""
    # Ray counts in units of 1/10000, so multiples of 0.001 are exact there.
    units = [
        (round(node.get(name, 0) * 10_000), round(amount * 10_000))
        for name, amount in bundle.items()
        if amount
    ]
    times = [have // need for have, need in units]
    gpus, part = node.get("GPU", 0), bundle.get("GPU", 0)
    if 0 < part < 1:  # no replica has parts of two GPUs
        times.append(int(gpus) * _times({"": part}, {"": 1}) + _times({"": part}, {"": gpus % 1}))
    return min(times, default=1_000_000)


def refuse_impossible(placement: Placement) -> None:
    """Refuse a placement that this cluster could never hold, before anything is deployed.

    A cluster that may grow refuses nothing: a pending placement group is what makes it grow.
    Without a cluster (``serve build``) nothing is refused either.

    Raises:
        ConfigError: what is needed, what each node has, and what would fit.
    """
    import ray

    if ray.is_initialized() and not may_grow():
        refuse_unplaceable(placement, nodes())


def refuse_unplaceable(placement: Placement, cluster: Sequence[Node]) -> None:
    """Refuse a placement that the nodes could not hold even if they were all free.

    Raises:
        ConfigError: what is needed, what each node has, and what would fit.
    """
    if fits(placement, [node.total for node in cluster]):
        return
    whose = "a gang" if placement.ranks > 1 else "a replica"
    raise ConfigError(
        f"this cluster has no room for the model: {whose} needs {placement}; "
        f"{_listing(placement, cluster)}{_remedy(placement, [node.total for node in cluster])}"
    )


def waiting_for(placement: Placement, cluster: Sequence[Node]) -> str | None:
    """Why a replica that has not been placed waits, or None where it would fit now."""
    if fits(placement, [node.free for node in cluster]):
        return None
    return f"waiting for {placement}; {_listing(placement, cluster)}"


def _listing(placement: Placement, cluster: Sequence[Node], most: int = 8) -> str:
    """The needed resources that each node has; the most relevant nodes only."""
    gpus = bool(placement.head.get("GPU"))
    shown = [node for node in cluster if node.total.get("GPU") or not gpus]
    if not shown:
        return "no node of the cluster has a GPU"
    rest = len(shown) - most
    listed = ", ".join(_line(placement, node) for node in shown[:most])
    return listed + (f" and {rest} more" if rest > 0 else "")


def _line(placement: Placement, node: Node) -> str:
    parts = []
    for name, unit, size in (
        ("GPU", f"{type_of(node.total)} GPUs", 1),
        ("CPU", " CPUs", 1),
        ("memory", " GiB of memory", 2**30),
    ):
        needed, free = placement.head.get(name, 0), node.free.get(name, 0)
        # GPUs are always named; other resources only where the node has too few.
        if needed and (name == "GPU" or free < needed):
            parts.append(f"{free / size:.4g} of {node.total.get(name, 0) / size:.4g}{unit}")
    return f"{node.name} has {' and '.join(parts)} free" if parts else f"{node.name} has room"


def _remedy(placement: Placement, totals: Sequence[Resources]) -> str:
    """What to change in the config, if one change is enough."""
    for name, setting in (
        (TYPE, "change resources.accelerator_type"),
        ("CPU", "lower resources.num_cpus"),
        ("memory", "lower resources.memory_gib"),
    ):
        other = replace(
            placement, head=_without(placement.head, name), stage=_without(placement.stage, name)
        )
        if fits(other, totals):
            there = sorted({type_of(node).strip() for node in totals} - {""})
            types = f" (here: {', '.join(there)})" if name == TYPE and there else ""
            return f"; {setting}{types}"
    gpus = int(placement.head.get("GPU", 0))
    if placement.in_process or not gpus:
        return ""
    for group in range(gpus - 1, 0, -1):
        if gpus * placement.stages % group == 0:
            size = {"GPU": float(group)}
            other = replace(
                placement,
                head={**placement.head, **size},
                stage={**placement.stage, **size},
                stages=gpus * placement.stages // group,
            )
            if fits(other, totals):
                return (
                    f"; tensor_parallel_size {group} with pipeline_parallel_size {other.stages} "
                    "would fit"
                )
    return ""


def _without(bundle: Resources, prefix: str) -> Resources:
    return {name: amount for name, amount in bundle.items() if not name.startswith(prefix)}
