"""Applies a fleet, or previews that by the API server's own dry run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from serve_app.errors import UserError
from serve_app.kuberay.live import budgets, clusters, in_place, pruning, revisions, state, upgrade
from serve_app.kuberay.live.api_server import KINDS, APIServer, Forbidden
from serve_app.kuberay.live.change import Change, as_it_runs, between
from serve_app.kuberay.live.leftovers import leftovers
from serve_app.kuberay.live.target import Target

Document = dict[str, Any]


@dataclass(frozen=True)
class Preview:
    """What an apply would change."""

    change: Change
    live: Document | None
    """The RayService as it runs, see :func:`change.as_it_runs`; None where there is none."""

    future: Document
    """The RayService as it would be."""

    notes: tuple[str, ...] = ()
    """For a person: what could not be found out, and what the apply leaves to others."""

    def __str__(self) -> str:
        return "\n".join([str(self.change), *self.notes])


def preview(server: APIServer, documents: list[Document], *, force: bool = False) -> Preview:
    """Preview an apply by the API server's dry run.

    Nothing is changed. In a namespace that does not exist yet the server cannot try anything: then
    it is asked whether it has every kind, and the documents themselves stand for its answer.

    Raises:
        UserError: the server refuses one of the documents, or lacks a kind; or the RayService is
            being deleted.
    """
    service = _service(documents)
    target = _target(server, service)
    live = target.get()
    if live and state.of(live).deleting:
        raise UserError(
            f"{target.name} is being deleted, and what is applied to it now goes with it; "
            "deploy again when it is gone"
        )
    if server.get("Namespace", target.namespace) is None:
        for kind in dict.fromkeys(document["kind"] for document in documents):
            server.require(kind)
        for document in documents:
            if not KINDS[document["kind"]].namespaced:
                server.apply(document, dry_run=True, force=force)
        return Preview(between(None, service), None, service)
    future = service
    for document in documents:
        answer = server.apply(document, dry_run=True, force=force)
        if document is service:
            future = answer
    there, notes = clusters.Clusters(), leftovers(future, service)
    if live is not None:
        try:
            there = clusters.of(target, live)
        except Forbidden as forbidden:
            notes.append(f"{forbidden}: this compares with the RayService, not with what runs")
    found = between(live, future, there)
    return Preview(found, as_it_runs(live, there) if live else None, future, tuple(notes))


def apply(
    server: APIServer,
    documents: list[Document],
    change: Change,
    *,
    unwanted: Sequence[Document] = (),
    force: bool = False,
    tell: Callable[[str], None],
) -> tuple[int, Document]:
    """Apply all, record the revision, delete what is unwanted.

    Returns the revision's number, and the RayService as it then is.

    ``change`` is what :func:`preview` said of it, ``unwanted`` what :func:`pruning.check` found.

    Raises:
        UserError: the server refuses a document; those before it stay applied.
    """
    service = _service(documents)
    target = _target(server, service)
    starts, together = change.kind == "new cluster", ""
    rendered = [d for d in documents if d["kind"] == "PodDisruptionBudget"]
    try:
        documents = budgets.apart(target, documents, upgrade=starts)
    except Forbidden as forbidden:
        if unwanted:
            raise
        together = f"{forbidden}: the budgets count the pods of both clusters together"
    applied, number = service, 0
    going = {pruning.title(document) for document in unwanted}
    for document in (d for d in documents if pruning.title(d) not in going):
        answer = server.apply(
            _with_replicas(document, change) if document is service else document, force=force
        )
        tell(f"applied {pruning.title(document)}")
        if document is service:
            applied = answer
            # At once: what runs has a revision, wherever this is interrupted.
            number = revisions.record(target, service, rendered)
    if starts and together:
        tell(together)
    settle(target, change, tell)
    pruning.prune(target, unwanted, tell)
    return number, applied


def settle(target: Target, change: Change, tell: Callable[[str], None]) -> None:
    """Do for an applied RayService what KubeRay leaves undone; ``tell`` what.

    The clusters are looked at again: since the preview the operator may have made one, of the spec
    before, and it brings no later bounds there.

    Raises:
        UserError: the server refuses it, or these credentials may not do it.
    """
    service = target.require()
    try:
        now = between(service, service, clusters.of(target, service))
    except Forbidden:
        if change.behind:
            raise
        return
    if change.gives_up or now.gives_up or now.clusters.never_served:
        upgrade.give_up(target, tell)
    cluster = now.clusters.active if now.kind == "back" else now.clusters.compared
    if cluster is None or now.kind not in ("in place", "back"):
        return
    for line in in_place.bring(target, cluster, service["spec"]["rayClusterConfig"]):
        tell(f"{clusters.name_of(cluster)}: {line}")


def sync(target: Target, tell: Callable[[str], None]) -> Change:
    """:func:`settle` for a RayService that another tool applied; returns what differed.

    Raises:
        UserError: there is none, or the server refuses it.
    """
    service = target.require()
    change = between(service, service, clusters.of(target, service))
    settle(target, change, tell)
    return change


def behind(target: Target, service: Document) -> list[str]:
    """The bounds and tolerations of a RayService that have not reached its cluster, a line each.

    Raises:
        Forbidden: these credentials may not list RayClusters.
    """
    cluster = clusters.of(target, service).compared
    if cluster is None:
        return []
    wanted = service["spec"]["rayClusterConfig"]
    return [str(difference) for difference in in_place.differences(cluster["spec"], wanted)]


def _with_replicas(service: Document, change: Change) -> Document:
    """With the autoscaler's ``replicas``: appending a group writes the whole cluster anew."""
    cluster = change.clusters.compared
    if cluster is None or change.kind != "in place":
        return service
    config = service["spec"]["rayClusterConfig"]
    now = {
        group["groupName"]: {"replicas": group["replicas"]}
        for group in cluster["spec"].get("workerGroupSpecs") or []
        if group.get("replicas")
    }
    groups = [{**group, **now.get(group["groupName"], {})} for group in config["workerGroupSpecs"]]
    config = {**config, "workerGroupSpecs": groups}
    return {**service, "spec": {**service["spec"], "rayClusterConfig": config}}


def _target(server: APIServer, service: Document) -> Target:
    return Target(server, service["metadata"]["name"], service["metadata"]["namespace"])


def _service(documents: list[Document]) -> Document:
    return next(d for d in documents if d["kind"] == "RayService")
