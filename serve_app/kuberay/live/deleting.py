"""Deletes a fleet, and waits until nothing of it holds a machine or a load balancer.

The RayService is deleted first, in the foreground: Kubernetes then deletes its clusters and pods
even where KubeRay's operator is away. The RayService itself goes when the operator takes its
finalizer away. Policies and budgets follow when the last pod is gone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from serve_app.errors import UserError
from serve_app.kuberay.live import gpus, pruning, reasons, revisions
from serve_app.kuberay.live.api_server import Unreachable
from serve_app.kuberay.live.pruning import title
from serve_app.kuberay.live.target import Target

Document = dict[str, Any]
Tell = Callable[[str], None]

_LOOK_S = 2.0
"""Seconds between two looks at what is left."""

_STUCK_S = 15.0
"""Seconds without a change after which whoever holds a finalizer seems to be away."""

_HOLDERS = {
    "ray.io/": "KubeRay's operator",
    "ingress.k8s.aws/": "the load balancer controller",
    "foregroundDeletion": "Kubernetes' garbage collector",
}
"""Who takes a finalizer away, by how it begins."""


@dataclass(frozen=True)
class Fleet:
    """What there is of a fleet."""

    service: Document | None
    clusters: list[Document]
    pods: list[Document]
    others: list[Document]
    """Its own objects that do not go with the RayService; revisions last."""

    neighbours: list[Document]
    """The other RayServices of the namespace."""

    @property
    def roots(self) -> list[Document]:
        """What to delete for its pods to go."""
        return [self.service] if self.service else self.clusters

    def lines(self) -> list[str]:
        """What goes, for a person."""
        past = [d for d in self.others if d["kind"] == "ControllerRevision"]
        running = [*map(title, self.roots), *map(title, self.clusters if self.service else [])]
        if self.pods:
            gpus_held = sum(map(gpus.held, self.pods))
            running.append(f"{len(self.pods)} pods with {gpus_held} GPUs")
        lines = [", ".join(running)] if running else []
        lines += [title(d) for d in self.others if d not in past]
        if past:
            numbers = ", ".join(str(revision["revision"]) for revision in past)
            lines.append(f"revisions {numbers}: no rollback after this")
        return lines


def find(target: Target) -> Fleet:
    """What there is of a fleet. The API server tries each deletion.

    Raises:
        UserError: there is nothing.
        Forbidden: these credentials may not list or delete something of it.
    """
    services = target.server.list("RayService", target.namespace)
    named = {service["metadata"]["name"]: service for service in services}
    fleet = Fleet(
        service=named.pop(target.name, None),
        clusters=target.clusters(),
        pods=target.pods(),
        others=[*pruning.belongings(target), *revisions.history(target)],
        neighbours=list(named.values()),
    )
    if not (fleet.roots or fleet.pods or fleet.others):
        raise UserError(f"no RayService {target.name} in namespace {target.namespace}")
    for document in [*fleet.roots, *fleet.others]:
        pruning.delete(target, document, dry_run=True)
    return fleet


def delete(
    target: Target, fleet: Fleet, *, wait: bool = True, timeout_s: float, tell: Tell
) -> None:
    """Delete it; ``wait`` until it is gone before what protects its pods follows.

    Raises:
        UserError: it is not gone in time, with what is left and who holds it.
    """
    deadline = time.monotonic() + timeout_s
    for document in fleet.roots:
        pruning.delete(target, document, foreground=True)
        tell(f"deleting {title(document)}")
    if wait:
        _until_gone(lambda: _running(target), deadline, tell)
    for document in fleet.others:
        pruning.delete(target, document)
        tell(f"deleted {title(document)}")
    if wait:
        _until_gone(lambda: [_held(d) for d in pruning.belongings(target)], deadline, tell)


def stays(target: Target, fleet: Fleet) -> list[str]:
    """What the fleet used and is kept, each with the command that deletes it.

    Fleets of a namespace share it, or somebody made it by hand. The volume holds the weights.
    """
    past = [d["data"] for d in fleet.others if d["kind"] == "ControllerRevision"]
    used = fleet.service or (past[-1] if past else {})
    here = target.namespace
    lines = []
    for claim in sorted(pruning.claims(used)):
        sharing = ", ".join(_names(d for d in fleet.neighbours if claim in pruning.claims(d)))
        alone = f"whose storage is paid for: kubectl delete pvc {claim} -n {here}"
        use = f"which {sharing} mounts too" if sharing else alone
        lines.append(f"PersistentVolumeClaim {claim} with the weights, {use}")
    monitors = f"-n {here} -l app.kubernetes.io/instance={target.name}"
    lines.append(f"alerts, if applied: kubectl delete podmonitors,prometheusrules {monitors}")
    neighbours = ", ".join(_names(fleet.neighbours))
    why = f"with {neighbours}" if neighbours else f"with no other fleet: kubectl delete ns {here}"
    lines.append(f"Namespace {here}, its ServiceAccount and Secrets, {why}")
    return lines


def _running(target: Target) -> list[str]:
    """What is left of the RayService: its pods, which hold the machines; without them, itself."""
    service = target.get()
    roots = [*([service] if service else []), *target.clusters()]
    return reasons.pod_lines(target) or [_held(root) for root in roots]


def _held(document: Document) -> str:
    """An object that is being deleted, and the finalizers for which it waits."""
    finalizers = ", ".join(document["metadata"].get("finalizers") or [])
    return f"{title(document)} waits for {finalizers}" if finalizers else f"{title(document)} left"


def _until_gone(left: Callable[[], list[str]], deadline: float, tell: Tell) -> None:
    """Look until nothing is left; tell each change, and once who seems to be away.

    While the API server is away the deletion goes on, and so does this.

    Raises:
        UserError: something is left at the deadline.
    """
    told: list[str] = []
    since, asked = time.monotonic(), False
    while True:
        try:
            lines = left()
        except Unreachable as error:
            lines = [f"{error}; the deletion itself goes on"]
        if not lines:
            return
        now = time.monotonic()
        if lines != told:
            for line in lines:
                if line not in told:
                    tell(line)
            told, since, asked = lines, now, False
        elif now - since >= _STUCK_S and not asked and (holder := _holder(lines)):
            tell(f"nothing happens: is {holder} running?")
            asked = True
        if now >= deadline:
            raise UserError(f"not gone in time: {'; '.join(lines)}; run it again for the rest")
        time.sleep(_LOOK_S)


def _holder(lines: list[str]) -> str | None:
    """Who has to take a finalizer away; None where pods are waited for."""
    return next((who for what, who in _HOLDERS.items() if f" waits for {what}" in lines[0]), None)


def _names(documents: Iterable[Document]) -> list[str]:
    return sorted(document["metadata"]["name"] for document in documents)
