"""Finds what of a fleet its config no longer renders, and deletes it.

A fleet's own objects are known by its labels. What has an owner goes with that owner: the
operator's Services and pods, and the budgets of a single cluster. What fleets share has no fleet's
label and is never deleted: namespace, service account, and the volume with the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from serve_app.kuberay.live import budgets
from serve_app.kuberay.live.api_server import Forbidden
from serve_app.kuberay.live.target import Target
from serve_app.kuberay.render.names import PART_OF, labels
from serve_app.kuberay.validate.manifests import get, items, pods_of

Document = dict[str, Any]
Tell = Callable[[str], None]

KINDS = ("Ingress", "NetworkPolicy", "PodDisruptionBudget")
"""The kinds of which a fleet has objects of its own, beside its RayService and its revisions."""


def belongings(target: Target) -> list[Document]:
    """The fleet's own objects of :data:`KINDS`.

    Raises:
        Forbidden: these credentials may not list a kind.
    """
    own = [
        found
        for kind in KINDS
        for found in target.server.list(kind, target.namespace, labels(target.name))
        if not found["metadata"].get("ownerReferences")
    ]
    return sorted(own, key=title)


def check(target: Target, documents: list[Document], *, remove: bool, tell: Tell) -> list[Document]:
    """Tell what is there and in ``documents`` no more; return what is to go with ``remove``.

    The API server tries each deletion.

    Raises:
        Forbidden: with ``remove``, these credentials may not list or delete a kind.
    """
    try:
        rendered = {title(document) for document in documents}
        found = [o for o in belongings(target) if title(o) not in rendered]
        for claim in _unused_claims(target, documents):
            tell(
                f"PersistentVolumeClaim {claim} is mounted by no fleet; it stays, because it holds "
                f"weights: kubectl delete pvc {claim} -n {target.namespace}"
            )
    except Forbidden as forbidden:
        if remove:
            raise
        tell(f"cannot tell what is no longer rendered ({forbidden})")
        return []
    if not found:
        return []
    many = len(found) > 1
    what = f"{len(found)} {'objects are' if many else 'object is'} no longer rendered"
    then = "to be deleted" if remove else f"remove {'them' if many else 'it'} with --prune"
    tell(f"{what}: {', '.join(map(title, found))} ({then})")
    if not remove:
        return []
    for unwanted in found:
        delete(target, unwanted, dry_run=True)
    return found


def prune(target: Target, unwanted: Iterable[Document], tell: Tell) -> None:
    """Delete them, after the apply; but no budget that alone protects pods of an old cluster."""
    for document in unwanted:
        is_budget = document["kind"] == "PodDisruptionBudget"
        relying = budgets.relying(target, document) if is_budget else []
        if relying:
            tell(
                f"kept {title(document)}: {', '.join(relying)} still has its pods; "
                "deploy with --prune again when that is gone"
            )
        else:
            delete(target, document)
            tell(f"deleted {title(document)}")


def delete(target: Target, document: Document, **how: bool) -> None:
    """Delete an object by its kind and name; ``how`` is :meth:`APIServer.delete`'s."""
    target.server.delete(document["kind"], document["metadata"]["name"], target.namespace, **how)


def claims(service: Document) -> set[str]:
    """The PersistentVolumeClaims that a RayService's pods mount."""
    volumes = [volume for pods in pods_of(service) for volume in items(pods.spec, "volumes")]
    return {str(claim) for v in volumes if (claim := get(v, "persistentVolumeClaim.claimName"))}


def title(document: Document) -> str:
    """Kind and name."""
    return f"{document['kind']} {document['metadata']['name']}"


def _unused_claims(target: Target, documents: list[Document]) -> list[str]:
    """Our claims in the namespace that no fleet mounts, once ``documents`` are applied."""
    server, namespace = target.server, target.namespace
    there = {
        c["metadata"]["name"] for c in server.list("PersistentVolumeClaim", namespace, PART_OF)
    }
    if not there:
        return []
    others = [
        service
        for service in server.list("RayService", namespace)
        if service["metadata"]["name"] != target.name
    ]
    mine = [document for document in documents if document["kind"] == "RayService"]
    return sorted(there.difference(*map(claims, [*others, *mine])))
