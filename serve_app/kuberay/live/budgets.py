"""Budgets for each cluster by itself, while an upgrade has two of them.

The rendered budgets select a group's pods by labels that every cluster of a RayService has: its
clusters are named by the operator, and what else tells them apart is not known before. Counted
together, two clusters would let all pods of one go. So at an upgrade each cluster that is there
gets budgets of its own, which Kubernetes deletes with it, and the rendered ones are for the cluster
that comes. No pod is under two budgets, because then it could not be evicted at all.
"""

from __future__ import annotations

from typing import Any

from serve_app.kuberay.live.target import Target
from serve_app.kuberay.render.names import labels

Document = dict[str, Any]

_KIND = "PodDisruptionBudget"
_CLUSTER = "ray.io/cluster"
"""The operator's label of a pod: its cluster's name."""


def apart(target: Target, documents: list[Document], *, upgrade: bool) -> list[Document]:
    """The documents to apply, with budgets that hold for each cluster by itself.

    ``upgrade`` tells that a new cluster comes. Those that are there keep the numbers that they had.

    Raises:
        Forbidden: these credentials may not list budgets or RayClusters.
    """
    live = target.server.list(_KIND, target.namespace, labels(target.name))
    own = {_labels(budget).get(_CLUSTER) for budget in live} - {None}
    if not upgrade and not own:
        return documents
    there = {c["metadata"]["name"]: c for c in target.clusters()}
    held = [name for name in there if upgrade or name in own]
    if not held:
        return documents
    wanted = {_name(d): d for d in documents if d["kind"] == _KIND}
    before = {
        _name(budget): _applicable(budget)
        for budget in live
        # Not an older version's maxUnavailable, by which nothing could go.
        if _CLUSTER not in _labels(budget) and isinstance(budget["spec"].get("minAvailable"), int)
    }
    numbers = wanted | before if upgrade else wanted
    return [
        *(d for d in documents if d["kind"] != _KIND),
        *(
            _of(there[cluster], budget, target.name)
            for cluster in held
            if not upgrade or cluster not in own
            for budget in numbers.values()
            if _has_pods_of(there[cluster], budget)
        ),
        # Also those that are no longer rendered, as long as they are there: no pod under two.
        *(_besides(held, budget) for budget in (before | wanted).values()),
    ]


def relying(target: Target, budget: Document) -> list[str]:
    """The clusters whose pods only this rendered budget protects, though it is rendered no more.

    They are of an older config: the group that it is for is theirs, or their head has no Redis.
    """
    live = target.server.list(_KIND, target.namespace, labels(target.name))
    own = {_labels(each).get(_CLUSTER) for each in live}
    return [
        cluster["metadata"]["name"]
        for cluster in target.clusters()
        if cluster["metadata"]["name"] not in own and _has_pods_of(cluster, budget)
    ]


def _has_pods_of(cluster: Document, budget: Document) -> bool:
    group = _labels(budget).get("ray.io/group")
    if group is None:  # the head's, which is for heads without Redis only
        return "gcsFaultToleranceOptions" not in cluster["spec"]
    return group in {g["groupName"] for g in cluster["spec"].get("workerGroupSpecs") or []}


def _of(cluster: Document, budget: Document, service: str) -> Document:
    """A budget over one cluster's pods only, which is deleted with the cluster."""
    name = cluster["metadata"]["name"]
    metadata = {
        **budget["metadata"],
        "name": f"{name}-{_name(budget).removeprefix(f'{service}-')}",
        "ownerReferences": [
            {
                "apiVersion": "ray.io/v1",
                "kind": "RayCluster",
                "name": name,
                "uid": cluster["metadata"]["uid"],
            }
        ],
    }
    selector = {"matchLabels": _labels(budget) | {_CLUSTER: name}}
    return {**budget, "metadata": metadata, "spec": {**budget["spec"], "selector": selector}}


def _besides(clusters: list[str], budget: Document) -> Document:
    """A budget over the pods of every other cluster."""
    expression = {"key": _CLUSTER, "operator": "NotIn", "values": clusters}
    selector = {"matchLabels": _labels(budget), "matchExpressions": [expression]}
    return {**budget, "spec": {**budget["spec"], "selector": selector}}


def _applicable(budget: Document) -> Document:
    """A live budget as a document to apply: without what the server wrote."""
    metadata = {key: budget["metadata"][key] for key in ("name", "namespace", "labels")}
    spec = {key: value for key, value in budget["spec"].items() if key != "selector"}
    spec["selector"] = {"matchLabels": _labels(budget)}
    return {"apiVersion": "policy/v1", "kind": _KIND, "metadata": metadata, "spec": spec}


def _labels(budget: Document) -> dict[str, str]:
    return dict((budget["spec"].get("selector") or {}).get("matchLabels") or {})


def _name(budget: Document) -> str:
    return str(budget["metadata"]["name"])
