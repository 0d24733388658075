"""The scheduler and the kubelets, and the controllers behind Services: what pods meet."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from kube_api import KubeAPI
from patches import matches

Document = dict[str, Any]

GPU = "nvidia.com/gpu"


class Machines:
    """Gives each pod a machine, starts it, and takes it away when it has been deleted."""

    def __init__(self, api: KubeAPI) -> None:
        self.api = api
        self.gpus: int | None = None
        """GPUs of all machines together; None for as many as pods want."""
        self.unready: set[str] = set()
        """Worker groups (``headgroup`` for heads) whose pods run, but do not become Ready."""
        self.draining = False
        """Whether pods that were deleted are still there, because their replicas end requests."""

    def step(self) -> None:
        """One look of each controller. A pod takes two to become Ready."""
        for pod in self.api.all("pods"):
            self._start(copy.deepcopy(pod))
        for service in self.api.all("services"):
            _slice(self.api, service)

    def _start(self, pod: Document) -> None:
        metadata, status = pod["metadata"], pod["status"]
        if "deletionTimestamp" in metadata:
            if not self.draining:
                self.api.remove("pods", metadata["namespace"], metadata["name"])
            return
        if status.get("phase") == "Pending":
            self._schedule(pod)
        elif not is_ready(pod) and metadata["labels"].get("ray.io/group") not in self.unready:
            status["conditions"] = _conditions(PodScheduled="True", Ready="True")
            self.api.store("pods", pod, "kubelet")

    def _schedule(self, pod: Document) -> None:
        held = sum(gpus_of(p) for p in self.api.all("pods") if p["spec"].get("nodeName"))
        if self.gpus is None or held + gpus_of(pod) <= self.gpus:
            pod["spec"]["nodeName"] = "machine"
            pod["status"] = {
                "phase": "Running",
                "conditions": _conditions(PodScheduled="True", Ready="False"),
            }
        else:
            message = f"0/3 nodes are available: 3 Insufficient {GPU}."
            if any(c.get("message") == message for c in pod["status"].get("conditions") or []):
                return
            (condition,) = _conditions(PodScheduled="False")
            condition |= {"reason": "Unschedulable", "message": message}
            pod["status"]["conditions"] = [condition]
            event(self.api, "Pod", pod["metadata"], "FailedScheduling", message)
        self.api.store("pods", pod, "kubelet")


def gpus_of(pod: Document) -> int:
    """GPUs that a pod's containers request."""
    containers = pod["spec"].get("containers") or []
    requests = ((c.get("resources") or {}).get("requests") or {} for c in containers)
    return sum(int(request.get(GPU, 0)) for request in requests)


def is_ready(pod: Document) -> bool:
    """Whether a pod is Ready and stays: one that is being deleted serves no longer."""
    conditions = {c["type"]: c["status"] for c in pod["status"].get("conditions") or []}
    return conditions.get("Ready") == "True" and "deletionTimestamp" not in pod["metadata"]


def event(api: KubeAPI, kind: str, metadata: Document, reason: str, message: str) -> None:
    """A Warning as the scheduler and the controller manager write it: by lastTimestamp."""
    name, now = f"{metadata['name']}.{len(api.objects):x}", "2026-11-26T10:00:00Z"
    about = {"kind": kind, **{key: metadata[key] for key in ("name", "namespace", "uid")}}
    document = {
        "metadata": {"name": name, "namespace": metadata["namespace"]},
        "type": "Warning",
        "reason": reason,
        "message": message,
        "involvedObject": about,
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    }
    api.store("events", document)


def _slice(api: KubeAPI, service: Document) -> None:
    """The EndpointSlice controller: pods of one Service, apart by which of its ports they have.

    A pod without a port that the Service names comes into a slice with ``ports: null``.
    """
    metadata = service["metadata"]
    name, namespace = metadata["name"], metadata["namespace"]
    found: dict[str, Document] = {}
    for pod in api.all("pods", namespace):
        selected = matches({"matchLabels": service["spec"]["selector"]}, pod["metadata"]["labels"])
        if not selected or not pod["spec"].get("nodeName"):
            continue
        ports = [port for port in service["spec"]["ports"] if _has(pod, port["targetPort"])]
        key = f"{name}-{'-'.join(port['name'] for port in ports) or 'none'}"
        document = found.setdefault(
            key,
            {
                "metadata": {
                    "name": key,
                    "namespace": namespace,
                    "labels": {"kubernetes.io/service-name": name},
                    "ownerReferences": [{"kind": "Service", "name": name, "uid": metadata["uid"]}],
                },
                "ports": [{"name": p["name"], "port": p["port"]} for p in ports] or None,
                "endpoints": [],
            },
        )
        target = {key: pod["metadata"][key] for key in ("name", "namespace", "uid")}
        document["endpoints"].append(
            {"conditions": {"ready": is_ready(pod)}, "targetRef": {"kind": "Pod", **target}}
        )
    for old in list(slices_of(api, namespace, name)):
        if old["metadata"]["name"] not in found:
            api.remove("endpointslices", namespace, old["metadata"]["name"])
    for key, document in found.items():
        there = api.get("endpointslices", namespace, key) or {}
        if there.get("endpoints") != document["endpoints"]:
            api.store("endpointslices", document)


def slices_of(api: KubeAPI, namespace: str, service: str) -> Iterator[Document]:
    """The EndpointSlices of a Service."""
    for document in api.all("endpointslices", namespace):
        if document["metadata"]["labels"]["kubernetes.io/service-name"] == service:
            yield document


def _has(pod: Document, port: Any) -> bool:
    """Whether a container has a port: by its name, or any pod by a number."""
    containers = pod["spec"].get("containers") or []
    named = {p.get("name") for container in containers for p in container.get("ports") or []}
    return isinstance(port, int) or port in named


def _conditions(**statuses: str) -> list[Document]:
    return [{"type": kind, "status": status} for kind, status in statuses.items()]
