"""What the operator and Kubernetes' own controllers do, as they were seen to do it.

Each function is one step of one controller against the stand-in (kube_api.py), which a test takes
when it wants to. Seen on Kubernetes 1.34 with KubeRay 1.7.
"""

from __future__ import annotations

import copy
from typing import Any

from kube_api import KubeAPI
from patches import matches

Document = dict[str, Any]

OPERATOR = "kuberay-operator"


def adopt(api: KubeAPI, namespace: str, name: str) -> None:
    """The operator's first look at a RayService: it adds its finalizer.

    It does so by an Update of its typed object, which also writes the structs that Go cannot leave
    out. What such a struct changes, the operator owns from then on: a list as a whole.
    """
    service = copy.deepcopy(api.objects["rayservices", namespace, name])
    if service["metadata"].get("finalizers"):
        return
    service["metadata"]["finalizers"] = ["ray.io/rayservice-finalizer"]
    for group in service["spec"]["rayClusterConfig"].get("workerGroupSpecs") or []:
        group.setdefault("scaleStrategy", {})
    if "serveService" in service["spec"]:
        status = service["spec"]["serveService"].setdefault("status", {})
        status.setdefault("loadBalancer", {})
    api.update("rayservices", service, OPERATOR)


class Refused(Exception):
    """The eviction API's refusal of a drain: a code, and Kubernetes' reason."""


def sync_budgets(api: KubeAPI) -> None:
    """The disruption controller: counts each budget's pods and writes its status.

    Everything but a whole ``minAvailable`` needs the number of pods that are wanted, which it asks
    from the scale sub-resource of the pods' owner. A RayCluster has none.
    """
    for (plural, namespace, name), budget in list(api.objects.items()):
        if plural != "poddisruptionbudgets":
            continue
        pods = _selected(api, namespace, budget["spec"]["selector"])
        least = budget["spec"].get("minAvailable")
        owner = next((o["kind"] for p in pods for o in p["metadata"]["ownerReferences"]), None)
        if not isinstance(least, int) and owner == "RayCluster":
            healthy, allowed, reason = 0, 0, "SyncFailed"
            message = "rayclusters.ray.io does not implement the scale subresource"
        else:
            healthy, message = sum(map(_healthy, pods)), ""
            allowed = max(0, healthy - int(least or 0)) if pods else 0
            reason = "SufficientPods" if allowed else "InsufficientPods"
        condition = {
            "type": "DisruptionAllowed",
            "status": "True" if allowed else "False",
            "reason": reason,
            "message": message,
        }
        status = {
            "currentHealthy": healthy,
            "disruptionsAllowed": allowed,
            "conditions": [condition],
        }
        if status != budget.get("status"):
            api.change("poddisruptionbudgets", namespace, name, status=status)


def evict(api: KubeAPI, namespace: str, name: str) -> None:
    """The eviction API, as a drain calls it for a Ready pod: the pod is Terminating after it.

    Raises:
        Refused: a budget is exhausted (the drain asks again), or two budgets select the pod.
    """
    sync_budgets(api)
    pod = copy.deepcopy(api.objects["pods", namespace, name])
    over = [
        budget
        for (plural, space, _), budget in api.objects.items()
        if plural == "poddisruptionbudgets"
        and space == namespace
        and pod in _selected(api, namespace, budget["spec"]["selector"])
    ]
    if len(over) > 1:
        raise Refused(500, "This pod has more than one PodDisruptionBudget")
    if over and not over[0]["status"]["disruptionsAllowed"]:
        raise Refused(429, "Cannot evict pod as it would violate the pod's disruption budget.")
    pod["metadata"]["deletionTimestamp"] = "2026-11-26T10:00:00Z"
    api.store("pods", pod)


def _selected(api: KubeAPI, namespace: str, selector: Document) -> list[Document]:
    """The namespace's pods that a label selector matches."""
    pods = api.all("pods", namespace)
    return [pod for pod in pods if matches(selector, pod["metadata"].get("labels") or {})]


def _healthy(pod: Document) -> bool:
    conditions = {c["type"]: c["status"] for c in pod["status"].get("conditions") or []}
    return conditions.get("Ready") == "True" and "deletionTimestamp" not in pod["metadata"]


def cluster_of_pods(api: KubeAPI, service: Document, cluster: str) -> None:
    """The operator makes a RayCluster of a RayService, with every pod of its minimum Ready."""
    metadata = service["metadata"]
    namespace, config = metadata["namespace"], service["spec"]["rayClusterConfig"]
    made = api.store(
        "rayclusters",
        {
            "apiVersion": "ray.io/v1",
            "kind": "RayCluster",
            "metadata": {
                "name": cluster,
                "namespace": namespace,
                "labels": {
                    **metadata["labels"],
                    "ray.io/originated-from-cr-name": metadata["name"],
                    "ray.io/originated-from-crd": "RayService",
                },
            },
            "spec": copy.deepcopy(config),
        },
        OPERATOR,
    )
    groups = [{"groupName": "headgroup", "minReplicas": 1, **config["headGroupSpec"]}]
    for group in groups + config["workerGroupSpecs"]:
        for number in range(group["minReplicas"]):
            labels = group["template"]["metadata"]["labels"] | {
                "ray.io/cluster": cluster,
                "ray.io/group": group["groupName"],
            }
            owner = {"kind": "RayCluster", "name": cluster, "uid": made["metadata"]["uid"]}
            pod = {
                "metadata": {
                    "name": f"{cluster}-{group['groupName']}-{number}",
                    "namespace": namespace,
                    "labels": labels,
                    "ownerReferences": [owner],
                },
                "spec": {"containers": []},
                "status": {"conditions": [{"type": "Ready", "status": "True"}]},
            }
            api.store("pods", pod, OPERATOR)


def delete_cluster(api: KubeAPI, namespace: str, cluster: str) -> None:
    """The operator deletes a RayCluster, and the garbage collector what belongs to it."""
    gone = api.remove("rayclusters", namespace, cluster)
    assert gone is not None
    for plural, space, name in list(api.objects):
        metadata = api.objects[plural, space, name]["metadata"]
        if any(o["uid"] == gone["metadata"]["uid"] for o in metadata.get("ownerReferences", [])):
            api.remove(plural, space, name)
