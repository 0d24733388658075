"""The controller of RayClusters: pods, as many as each group wants."""

from __future__ import annotations

import copy
import random
import string
from typing import Any

from controllers import OPERATOR
from kube_api import KubeAPI
from machines import is_ready

from operator_model.documents import label, name_of, owned_by
from operator_model.status import Clock, set_condition

Document = dict[str, Any]


def reconcile(api: KubeAPI, clock: Clock, namespace: str, name: str) -> None:
    """One reconcile of a RayCluster: its pods and its status (``reconcilePods``).

    A pod that is being deleted still counts: it is replaced when it is gone.
    """
    cluster = copy.deepcopy(api.get("rayclusters", namespace, name))
    if cluster is None:
        return
    spec, groups = cluster["spec"], cluster["spec"].get("workerGroupSpecs") or []
    if head_of(api, cluster) is None:
        _make_pod(api, cluster, spec["headGroupSpec"], "head")
    for group in groups:
        for unwanted in (group.get("scaleStrategy") or {}).get("workersToDelete") or []:
            api.delete("pods", namespace, unwanted)
        pods = [pod for pod in pods_of(api, cluster) if label(pod, "group") == group["groupName"]]
        for _ in range(_desired(group) - len(pods)):
            _make_pod(api, cluster, group, "worker")
        if not spec.get("enableInTreeAutoscaling"):  # else only the autoscaler removes pods
            for pod in pods[_desired(group) :]:
                api.delete("pods", namespace, name_of(pod))
    pods = pods_of(api, cluster)
    ready = [label(pod, "node-type") for pod in pods if is_ready(pod)]
    before = cluster.get("status")
    cluster["status"] = {
        "state": "ready" if len(ready) == len(pods) else "",
        "desiredWorkerReplicas": sum(map(_desired, groups)),
        "readyWorkerReplicas": ready.count("worker"),
        "conditions": copy.deepcopy((before or {}).get("conditions") or []),
        "observedGeneration": cluster["metadata"]["generation"],
    }
    reason = "HeadPodRunningAndReady" if "head" in ready else "ContainersNotReady"
    set_condition(cluster, clock, "HeadPodReady", str("head" in ready), reason, "")
    if cluster["status"] != before:
        api.change("rayclusters", namespace, name, status=cluster["status"])


def pods_of(api: KubeAPI, cluster: Document) -> list[Document]:
    """A RayCluster's pods, also those that are being deleted."""
    namespace = cluster["metadata"]["namespace"]
    return [p for p in api.all("pods", namespace) if label(p, "cluster") == name_of(cluster)]


def head_of(api: KubeAPI, cluster: Document) -> Document | None:
    """``GetRayClusterHeadPod``."""
    return next((p for p in pods_of(api, cluster) if label(p, "node-type") == "head"), None)


def _make_pod(api: KubeAPI, cluster: Document, group: Document, node_type: str) -> None:
    """``createHeadPod``, ``createWorkerPod``."""
    template, title = copy.deepcopy(group["template"]), group.get("groupName", "headgroup")
    worker = [title] if node_type == "worker" else []
    metadata = owned_by(cluster, "-".join([name_of(cluster), *worker, node_type, letters()]))
    given = template.get("metadata") or {}
    metadata["annotations"] = given.get("annotations") or {}
    metadata["labels"] = (given.get("labels") or {}) | {
        "ray.io/cluster": name_of(cluster),
        "ray.io/group": title,
        "ray.io/node-type": node_type,
        # The head's follows spec.excludeHeadPodFromServeSvc, which is true in every rendering.
        "ray.io/serve": "true" if worker else "false",
    }
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}
    api.store("pods", {**pod, "status": {"phase": "Pending"}}, OPERATOR)


def letters() -> str:
    """What Kubernetes ends a generated name with."""
    return "".join(random.choices(string.ascii_lowercase + string.digits, k=5))


def _desired(group: Document) -> int:
    """``GetWorkerGroupDesiredReplicas``: pods of a worker group."""
    least, most = group.get("minReplicas", 0), group.get("maxReplicas", 2**31 - 1)
    replicas = min(max(group.get("replicas") or 0, least), most)
    return 0 if group.get("suspend") else int(replicas * group.get("numOfHosts", 1))
