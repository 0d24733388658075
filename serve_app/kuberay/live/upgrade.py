"""Ends what an upgrade leaves behind: a cluster that was given up before it served.

KubeRay compares a new spec with the cluster that starts, not with the one that serves. So the old
spec, applied again, would become a third cluster, as stuck as the second; and the second would keep
its machines, or go on asking for them, until ``rayClusterDeletionDelaySeconds`` are over.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from serve_app.kuberay.live import cluster_spec, clusters, state
from serve_app.kuberay.live.target import Target

Document = dict[str, Any]

_OPERATOR_S = 20.0
"""Seconds for the operator to take up a spec; it looks every 2 s."""


def give_up(target: Target, tell: Callable[[str], None]) -> None:
    """Give up every cluster that is not of the applied spec and has not served; ``tell`` of each.

    Where the serving cluster is of the applied spec, none may start. Where another has to start,
    the one that started before goes as soon as the operator has taken up the spec.

    Raises:
        Forbidden: these credentials may not change a RayService's status, or delete RayClusters.
    """
    deadline = time.monotonic() + _OPERATOR_S
    while True:
        service = target.require()
        there, seen = clusters.of(target, service), state.of(service)
        if state.is_incremental(service):
            return
        wanted = service["spec"]["rayClusterConfig"]
        if seen.pending and there.active and cluster_spec.same(there.active["spec"], wanted):
            # The operator may be about to start a third one, so it is looked at again.
            status = {"status": {"pendingServiceStatus": None}}
            target.server.patch("RayService", target.name, target.namespace, status, part="status")
        elif seen.seen and not (
            there.pending and not cluster_spec.same(there.pending["spec"], wanted)
        ):
            break
        if time.monotonic() > deadline:
            tell("the operator has not taken it up yet (does it run, and reach the head?)")
            return
        time.sleep(0.5)
    for cluster in there.never_served:
        name = clusters.name_of(cluster)
        target.server.delete("RayCluster", name, target.namespace)
        tell(f"deleted RayCluster {name}, which had not served")
