"""Applies a fleet, or previews that by the API server's own dry run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from serve_app.kuberay.live import budgets, revisions
from serve_app.kuberay.live.api_server import APIServer, Forbidden
from serve_app.kuberay.live.change import Change, between
from serve_app.kuberay.live.target import Target

Document = dict[str, Any]


def preview(
    server: APIServer, documents: list[Document], *, force: bool = False
) -> tuple[Change, Document | None, Document]:
    """Preview an apply by the API server's dry run: the change, the live and the future object.

    Nothing is changed. In a namespace that does not exist yet the server cannot try anything; the
    documents themselves then stand for its answer.

    Raises:
        UserError: the server refuses one of the documents, or lacks a kind.
    """
    service = _service(documents)
    namespace = service["metadata"]["namespace"]
    live = server.get("RayService", service["metadata"]["name"], namespace)
    if live is None:
        server.list("RayService", namespace)  # raises if KubeRay is not installed
    if server.get("Namespace", namespace) is None:
        return between(None, service), None, service
    future = service
    for document in documents:
        answer = server.apply(document, dry_run=True, force=force)
        if document is service:
            future = answer
    return between(live, future), live, future


def apply(
    server: APIServer,
    documents: list[Document],
    change: Change,
    *,
    force: bool = False,
    tell: Callable[[str], None],
) -> int:
    """Apply all, record the revision, and return its number.

    ``change`` is what :func:`preview` said of it.

    Raises:
        UserError: the server refuses a document; those before it stay applied.
    """
    service = _service(documents)
    target = Target(server, service["metadata"]["name"], service["metadata"]["namespace"])
    upgrade, together = change.kind == "new cluster", ""
    try:
        documents = budgets.apart(target, documents, upgrade=upgrade)
    except Forbidden as forbidden:
        together = f"{forbidden}: the budgets count the pods of both clusters together"
    for document in documents:
        server.apply(document, force=force)
        tell(f"applied {document['kind']} {document['metadata']['name']}")
    if upgrade and together:
        tell(together)
    return revisions.record(target, service)


def _service(documents: list[Document]) -> Document:
    return next(d for d in documents if d["kind"] == "RayService")
