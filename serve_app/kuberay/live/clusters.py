"""The RayClusters of a RayService: which one serves, which one starts, and which are left over."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from serve_app.kuberay.live import state
from serve_app.kuberay.live.target import Target

Document = dict[str, Any]


@dataclass(frozen=True)
class Clusters:
    """The clusters that the operator made, by what it does with them."""

    active: Document | None = None
    """The one that serves."""

    pending: Document | None = None
    """The one that starts, to serve when all its models run."""

    left: list[Document] = field(default_factory=list)
    """Those that are to be deleted: after a switch they end their answers first."""

    @property
    def compared(self) -> Document | None:
        """The one that the operator compares a new spec with."""
        return self.pending or self.active

    @property
    def never_served(self) -> list[Document]:
        """Those left over that were given up before they served: they are newer than the active."""
        if self.active is None:
            return self.left
        since = self.active["metadata"]["creationTimestamp"]
        return [c for c in self.left if c["metadata"]["creationTimestamp"] > since]


def of(target: Target, service: Document) -> Clusters:
    """The clusters of a RayService, as its status names them.

    Raises:
        Forbidden: these credentials may not list RayClusters.
    """
    seen = state.of(service)
    there = {name_of(cluster): cluster for cluster in target.clusters()}
    active, pending = there.pop(seen.active, None), there.pop(seen.pending, None)
    return Clusters(active, pending, list(there.values()))


def name_of(cluster: Document) -> str:
    return str(cluster["metadata"]["name"])
