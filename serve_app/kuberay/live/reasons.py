"""Why a deployment does not come up, from the pods' states and Kubernetes' warning events."""

from __future__ import annotations

from typing import Any

from serve_app.kuberay.live import revisions, state
from serve_app.kuberay.live.target import Target
from serve_app.kuberay.render.names import ROLE_LABEL

Document = dict[str, Any]

_SECONDS = len("2026-11-26T10:00:00")
"""Letters of a time to compare: some have microseconds, some not."""

_STARTING = {"ContainerCreating", "PodInitializing"}

_HINTS = {
    "ErrImagePull": "is the image's name right, and may the nodes pull from its registry?",
    "ImagePullBackOff": "is the image's name right, and may the nodes pull from its registry?",
    "CreateContainerConfigError": "a Secret or its key is missing",
    "OOMKilled": "raise resources.memory_gib",
    "Unschedulable": "no machine takes it: NodePool limit, EC2 capacity, or labels",
}


def pod_lines(target: Target) -> list[str]:
    """One line for each group: how many of its pods are at which stage."""
    groups: dict[str, dict[str, int]] = {}
    for pod in target.pods():
        group = pod["metadata"]["labels"].get("ray.io/group") or pod["metadata"]["labels"].get(
            ROLE_LABEL, "?"
        )
        counts = groups.setdefault(group, {})
        stage = stage_of(pod)
        counts[stage] = counts.get(stage, 0) + 1
    return [
        f"{group} pods: " + ", ".join(f"{n} {stage}" for stage, n in sorted(counts.items()))
        for group, counts in sorted(groups.items())
    ]


def stage_of(pod: Document) -> str:
    """The stage of a pod on its way to Ready, in a few words."""
    status = pod.get("status") or {}
    conditions = {c["type"]: c for c in status.get("conditions") or []}
    if pod["metadata"].get("deletionTimestamp"):
        return "stopping"
    if conditions.get("Ready", {}).get("status") == "True":
        return "ready"
    if conditions.get("PodScheduled", {}).get("status") == "False":
        return "waiting for a machine"
    for container in _containers(status):
        waiting = (container.get("state") or {}).get("waiting") or {}
        if waiting.get("reason") and waiting["reason"] not in _STARTING:
            return str(waiting["reason"])
    return "running" if status.get("phase") == "Running" else "starting"


def explain(target: Target) -> list[str]:
    """One line for each pod in trouble, then the latest warnings.

    Warnings are those about the RayService, its clusters, and those of its pods that are not Ready
    and do not say themselves why. Pods that are gone, or Ready by now, have had their time, and so
    has everything before the last deployment.
    """
    pods = target.pods()
    troubles = {pod["metadata"]["name"]: _trouble(pod) for pod in pods if stage_of(pod) != "ready"}
    lines = [f"pod {name}: {trouble}" for name, trouble in troubles.items() if trouble]
    mine = {("RayService", target.name)}
    mine |= {("Pod", name) for name, trouble in troubles.items() if not trouble}
    mine |= {("RayCluster", pod["metadata"]["labels"].get("ray.io/cluster")) for pod in pods}
    if service := target.get():
        seen = state.of(service)
        mine |= {("RayCluster", seen.active), ("RayCluster", seen.pending)}
    past = revisions.history(target)
    since = str(past[-1]["metadata"].get("creationTimestamp") or "") if past else ""
    warnings = [
        event
        for event in target.server.list("Event", target.namespace)
        if event.get("type") == "Warning"
        and (about := event.get("involvedObject") or {})
        and (about.get("kind"), about.get("name")) in mine
        and _last_seen(event)[:_SECONDS] >= since[:_SECONDS]
        # The operator's cache lags behind what it made.
        and not str(event.get("message")).endswith("already exists")
    ]
    warnings.sort(key=_last_seen)
    for event in warnings[-5:]:
        about = event["involvedObject"]
        text = " ".join(str(event.get("message") or "").split())
        lines.append(f"{about.get('kind')} {about.get('name')}: {event.get('reason')}: {text}")
    return list(dict.fromkeys(lines))


def _last_seen(event: Document) -> str:
    """When an event happened last, in RFC 3339. The operator's events have a ``series`` only."""
    series = event.get("series") or {}
    times = (series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime"))
    return next((str(time) for time in times if time), "")


def _trouble(pod: Document) -> str | None:
    """What keeps a pod from being Ready; None for a pod without trouble, or with none yet."""
    status = pod.get("status") or {}
    for condition in status.get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition.get("status") == "False":
            return _hinted("Unschedulable", condition.get("message"))
    for container in _containers(status):
        state = container.get("state") or {}
        waiting = state.get("waiting") or {}
        ended = state.get("terminated") or (container.get("lastState") or {}).get("terminated")
        if ended and (ended.get("reason") == "OOMKilled" or ended.get("exitCode")):
            reason = str(ended.get("reason") or "Error")
            text = f"container {container['name']} ended with {ended.get('exitCode')}"
            return _hinted(reason, ended.get("message") or text)
        if waiting.get("reason") and waiting["reason"] not in _STARTING:
            return _hinted(str(waiting["reason"]), waiting.get("message"))
    return None


def _containers(status: Document) -> list[Document]:
    return [
        *(status.get("initContainerStatuses") or []),
        *(status.get("containerStatuses") or []),
    ]


def _hinted(reason: str, message: Any) -> str:
    text = " ".join(str(message or "").split())
    hint = _HINTS.get(reason)
    return f"{reason}: {text}" + (f" ({hint})" if hint else "")
