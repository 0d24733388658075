"""An incremental upgrade's steps: capacity and traffic move to the new cluster, or back."""

from __future__ import annotations

from typing import Any

from operator_model.documents import holds, options, part
from operator_model.status import Clock, drop_condition, set_condition
from operator_model.wanted import HASH, hash_of

Document = dict[str, Any]


def turn_back(service: Document, clock: Clock, active: Document, pending: Document) -> None:
    """Whether the upgrade rolls back (``reconcileRollbackState``)."""
    goal = hash_of(service["spec"]["rayClusterConfig"])
    if goal == pending["metadata"]["annotations"][HASH]:
        drop_condition(service, "RollbackInProgress")
    elif not holds(service, "RollbackInProgress"):
        text = "Goal state changed mid-upgrade, rolling back to original cluster."
        if goal == active["metadata"]["annotations"][HASH]:
            text = "Goal state reverted to original cluster, rolling back."
        reason = "DesiredClusterSpecChanged"
        set_condition(service, clock, "RollbackInProgress", "True", reason, text)


def scale(service: Document, active: bool) -> None:
    """A step of one cluster's target capacity (``reconcileServeTargetCapacity``).

    First the new cluster grows, then its traffic, then the old cluster shrinks.
    """
    old, new = part(service, "active"), part(service, "pending")
    old.setdefault("targetCapacity", 100)
    new.setdefault("targetCapacity", 0)
    if holds(service, "RollbackInProgress"):
        old, new, active = new, old, not active
    if new["targetCapacity"] != new.get("trafficRoutedPercent", 0):
        return  # traffic moves first
    surge = options(service).get("maxSurgePercent", 100)
    crowded = old["targetCapacity"] + new["targetCapacity"] > 100
    if crowded and active:
        old["targetCapacity"] = max(0, old["targetCapacity"] - surge)
    elif not crowded and not active:
        new["targetCapacity"] = min(100, new["targetCapacity"] + surge)


def weights(service: Document, clock: Clock, *, pending_ready: bool) -> tuple[int, int]:
    """Percent of the traffic for both clusters (``calculateTrafficRoutedPercent``)."""
    back = holds(service, "RollbackInProgress")
    to, unset = (part(service, "active"), 100) if back else (part(service, "pending"), 0)
    share, goal = to.get("trafficRoutedPercent", unset), to.get("targetCapacity", unset)
    moved, pause = to.get("lastTrafficMigratedTime"), options(service)["intervalSeconds"]
    due = moved is None or clock.since(moved) >= pause
    if share != goal and due and (back or pending_ready):
        share = min(100, share + options(service)["stepSizePercent"], goal)
    return (share, 100 - share) if back else (100 - share, share)


def route(service: Document, clock: Clock, weights: tuple[int, int], upgrading: bool) -> None:
    """The weights into the status, with when they changed (in ``calculateStatus``)."""
    for which, weight in zip(("active", "pending"), weights, strict=True):
        if which == "active" or upgrading:
            entry = part(service, which)
            if entry.get("trafficRoutedPercent") != weight:
                entry["lastTrafficMigratedTime"] = clock.stamp()
            entry["trafficRoutedPercent"] = weight


def is_complete(service: Document) -> bool:
    """``IsIncrementalUpgradeComplete``."""
    old, new = part(service, "active"), part(service, "pending")
    return old.get("targetCapacity") == 0 and new.get("trafficRoutedPercent") == 100


def is_rolled_back(service: Document) -> bool:
    """``shouldCompleteIncrementalRollback``."""
    old, new = part(service, "active"), part(service, "pending")
    fields = ("targetCapacity", "trafficRoutedPercent")
    conditions = (new.get("rayClusterStatus") or {}).get("conditions") or []
    dead = not any(c["type"] == "HeadPodReady" and c["status"] == "True" for c in conditions)
    back = all(old.get(field) == 100 for field in fields)
    return back and (dead or all(new.get(field) == 0 for field in fields))
