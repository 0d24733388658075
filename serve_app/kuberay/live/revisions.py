"""Earlier deployments, kept on the cluster for a rollback.

Each deployment stores the RayService that it applied as a ControllerRevision, the kind that
Kubernetes itself uses for this (StatefulSets, DaemonSets). The budgets go along in an annotation:
one for two replicas would keep the last replica of a spec with one from ever being drained.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from serve_app.errors import UserError
from serve_app.kuberay.live.api_server import Conflict
from serve_app.kuberay.live.target import Target
from serve_app.kuberay.render.names import labels

KEEP = 10
"""Number of revisions that are kept; older ones are deleted."""

_BUDGETS = "serve-app/budgets"

Document = dict[str, Any]


def history(target: Target) -> list[Document]:
    """The revisions of a RayService, oldest first."""
    found = target.server.list("ControllerRevision", target.namespace, labels(target.name))
    return sorted(found, key=lambda revision: int(revision["revision"]))


def record(target: Target, service: Document, budgets: Sequence[Document] = ()) -> int:
    """Store an applied RayService with the budgets that were rendered for it; return its number.

    One that equals the latest revision is not stored again.
    """
    name, namespace = target.name, target.namespace
    past = history(target)
    if past and past[-1]["data"] == service:
        return int(past[-1]["revision"])
    number = int(past[-1]["revision"]) + 1 if past else 1
    revision = {
        "apiVersion": "apps/v1",
        "kind": "ControllerRevision",
        "metadata": {
            "name": f"{name}-r{number}",
            "namespace": namespace,
            "labels": labels(name),
            "annotations": {_BUDGETS: json.dumps(budgets)},
        },
        "revision": number,
        "data": service,
    }
    try:
        target.server.create(revision)
    except Conflict:
        raise UserError(f"someone else deploys {name} at this moment; try again") from None
    for old in past[: max(0, len(past) + 1 - KEEP)]:
        target.server.delete("ControllerRevision", old["metadata"]["name"], namespace)
    return number


def find(target: Target, number: int | None) -> list[Document]:
    """The RayService of a revision, and its budgets; without a number, of the last but one.

    Revisions of an older version have no budgets.

    Raises:
        UserError: there is no such revision; the error lists those that exist.
    """
    past, name = history(target), target.name
    numbers = [int(revision["revision"]) for revision in past]
    if number is None:
        if len(past) < 2:
            raise UserError(f"{name} has no earlier revision in namespace {target.namespace}")
        number = numbers[-2]
    if number not in numbers:
        known = ", ".join(map(str, numbers)) or "none"
        raise UserError(f"{name} has no revision {number} (known: {known})")
    revision = past[numbers.index(number)]
    budgets = (revision["metadata"].get("annotations") or {}).get(_BUDGETS) or "[]"
    return [revision["data"], *json.loads(budgets)]
