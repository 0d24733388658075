"""Brings to the running cluster what KubeRay leaves in the RayService: bounds and tolerations.

Its operator's hash leaves them out, and it writes a RayCluster only when it makes it or appends a
group. Without this a new bound would never arrive (seen with 1.7). The autoscaler's ``replicas``
and ``workersToDelete`` are not touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from serve_app.kuberay.live import clusters
from serve_app.kuberay.live.cluster_spec import plain
from serve_app.kuberay.live.target import Target

Document = dict[str, Any]

_BOUNDS = ("minReplicas", "maxReplicas")


@dataclass(frozen=True)
class Difference:
    """A field of a group in which the cluster is behind the RayService."""

    group: str
    """The worker group's name; empty for the head."""

    index: int
    """Of the worker group in the cluster's list."""

    path: tuple[str, ...]
    before: Any
    after: Any

    def __str__(self) -> str:
        where = f"worker group '{self.group}'" if self.group else "the head"
        if self.path[-1] in _BOUNDS:
            return f"{where}: {self.path[-1]} {self.before} → {self.after}"
        return f"{where}: {self.path[-1]} change, for pods that start from now on"


def differences(cluster: Document, wanted: Document) -> Iterator[Difference]:
    """What a RayCluster's spec lacks of a RayService's ``rayClusterConfig``, group by group."""
    groups = {group["groupName"]: group for group in wanted.get("workerGroupSpecs") or []}
    for index, group in enumerate(cluster.get("workerGroupSpecs") or []):
        name = group["groupName"]
        if name in groups:
            fields = (*((bound,) for bound in _BOUNDS), _TOLERATIONS)
            yield from _of_group(name, index, group, groups[name], fields)
    yield from _of_group(
        "",
        0,
        cluster.get("headGroupSpec") or {},
        wanted.get("headGroupSpec") or {},
        (_TOLERATIONS,),
    )


_TOLERATIONS = ("template", "spec", "tolerations")


def _of_group(
    name: str, index: int, group: Document, wanted: Document, fields: Iterable[tuple[str, ...]]
) -> Iterator[Difference]:
    for path in fields:
        before, after = _at(group, path), _at(wanted, path)
        if plain(before, after) != plain(after, after) and (before or after):
            yield Difference(name, index, path, before, after)


def bring(target: Target, cluster: Document, wanted: Document) -> list[str]:
    """Write the differences to a cluster; returns a line for each.

    Raises:
        UserError: these credentials may not, or the cluster's groups changed meanwhile.
    """
    behind = list(differences(cluster["spec"], wanted))
    if behind:
        target.server.patch(
            "RayCluster",
            clusters.name_of(cluster),
            target.namespace,
            [operation for difference in behind for operation in _operations(difference)],
        )
    return [str(difference) for difference in behind]


def _operations(difference: Difference) -> Iterator[Document]:
    """As a JSON patch, which fails as a whole if another group is at that place by now."""
    at = "/spec/headGroupSpec"
    if difference.group:
        at = f"/spec/workerGroupSpecs/{difference.index}"
        yield {"op": "test", "path": f"{at}/groupName", "value": difference.group}
    path = "/".join((at, *difference.path))
    if difference.after is None:
        yield {"op": "remove", "path": path}
    else:
        yield {"op": "add", "path": path, "value": difference.after}


def _at(group: Document, path: tuple[str, ...]) -> Any:
    value: Any = group
    for key in path:
        value = (value or {}).get(key)
    return value
