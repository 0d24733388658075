"""What the operator reports: conditions, statuses, events."""

from __future__ import annotations

import copy
import hashlib
import time
from datetime import UTC, datetime
from typing import Any

from controllers import OPERATOR
from kube_api import KubeAPI

from operator_model.documents import part, without_empty

Document = dict[str, Any]


class Clock:
    """The time that the operator goes by."""

    def __init__(self) -> None:
        self.ahead_s = 0.0
        """Seconds by which a test has it ahead, to be over a delay."""

    def now(self) -> float:
        return time.time() + self.ahead_s

    def stamp(self, timespec: str = "seconds") -> str:
        text = datetime.fromtimestamp(self.now(), UTC).isoformat(timespec=timespec)
        return text.replace("+00:00", "Z")

    def since(self, stamp: str) -> float:
        return self.now() - datetime.fromisoformat(stamp).timestamp()


def set_condition(
    service: Document, clock: Clock, kind: str, status: str, reason: str, message: str
) -> None:
    """``setCondition``: of the generation that the status has observed, not that of the spec."""
    conditions = service["status"].setdefault("conditions", [])
    condition = next((c for c in conditions if c["type"] == kind), None)
    if condition is None:
        conditions.append(condition := {"type": kind})
    if condition.get("status") != status:
        condition["lastTransitionTime"] = clock.stamp()
    condition |= {"status": status, "reason": reason, "message": message}
    if "observedGeneration" in service["status"]:
        condition["observedGeneration"] = service["status"]["observedGeneration"]


def drop_condition(service: Document, kind: str) -> None:
    conditions = service["status"].get("conditions") or []
    service["status"]["conditions"] = [c for c in conditions if c["type"] != kind]


def write_if_changed(api: KubeAPI, service: Document, clock: Clock) -> None:
    """``InconsistentRayServiceStatuses``: a new observedGeneration alone is not written."""
    live = api.get("rayservices", service["metadata"]["namespace"], service["metadata"]["name"])
    assert live is not None
    if _telling(live) != _telling(service):
        write(api, service, clock)


def write(api: KubeAPI, service: Document, clock: Clock) -> None:
    service["status"]["lastUpdateTime"] = clock.stamp()
    metadata, status = service["metadata"], copy.deepcopy(service["status"])
    written = api.change("rayservices", metadata["namespace"], metadata["name"], status=status)
    metadata["resourceVersion"] = written["metadata"]["resourceVersion"]


def _telling(service: Document) -> Document:
    """What of a status makes a write."""
    told = copy.deepcopy({"status": service.get("status") or {}})
    for field in ("observedGeneration", "lastUpdateTime"):
        told["status"].pop(field, None)
    for which in ("active", "pending"):
        part(told, which).pop("rayClusterStatus", None)
    return without_empty(told)  # type: ignore[no-any-return]


def record(
    api: KubeAPI, clock: Clock, about: Document, reason: str, note: str, kind: str = "Warning"
) -> None:
    """An event of events.k8s.io: no first and last timestamp; what repeats is a ``series``.

    It is the same event as long as the object's resourceVersion is (client-go's ``getKey``).
    """
    metadata, now = about["metadata"], clock.stamp("microseconds")
    key = f"{about['kind']} {metadata['resourceVersion']} {reason} {kind}"
    hashed = hashlib.sha1(key.encode()).hexdigest()[:16]
    name = f"{metadata['name']}.{hashed}"
    regarding = {key: metadata[key] for key in ("name", "namespace", "uid")}
    event: Document = {
        "metadata": {"name": name, "namespace": metadata["namespace"]},
        "type": kind,
        "reason": reason,
        "message": note,
        "involvedObject": {"kind": about["kind"], **regarding},
        "eventTime": now,
        "firstTimestamp": None,
        "lastTimestamp": None,
        "reportingComponent": "rayservice-controller",
    }
    if old := api.get("events", metadata["namespace"], name):
        count = (old.get("series") or {}).get("count", 1) + 1
        event |= {
            "metadata": copy.deepcopy(old["metadata"]),
            "eventTime": old["eventTime"],
            "series": {"count": count, "lastObservedTime": now},
        }
    api.store("events", event, OPERATOR)
