"""Predicts the effect of applying a RayService.

The rules are KubeRay's (``rayservice_controller.go``, 1.7). A new hash of ``rayClusterConfig``,
computed without replica bounds, tolerations and a few other fields, makes a new cluster. Groups
appended at the end do not count. ``serveConfigV2`` is changed in place.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

import yaml

from serve_app.kuberay.live import state
from serve_app.kuberay.validate.manifests import INSTANCE_TYPE, Pods, whole, workers_of

Document = dict[str, Any]
Kind = Literal["create", "none", "in place", "new cluster", "ignored"]


@dataclass(frozen=True)
class Need:
    """GPUs that must be free for a worker group, beyond those in use."""

    group: str
    gpus: int
    instance_types: frozenset[str]
    """The machines that its pods accept; empty for any."""


@dataclass(frozen=True)
class Change:
    """The kind of change, one line for each thing that changes, and the GPUs that it takes."""

    kind: Kind
    changes: list[str]
    needs: tuple[Need, ...] = ()

    @property
    def gpus(self) -> int:
        return sum(need.gpus for need in self.needs)

    def __str__(self) -> str:
        what = {
            "create": "creates the RayService",
            "none": "changes nothing",
            "in place": "changes the running cluster in place",
            "new cluster": "starts a second cluster beside the running one, then switches",
            "ignored": "is IGNORED by KubeRay: upgradeStrategy is None; delete and deploy again",
        }[self.kind]
        gpus = f" ({self.gpus} GPUs)" if self.gpus else ""
        return "\n".join([f"{what}{gpus}", *(f"  {change}" for change in self.changes)])


def between(live: Document | None, wanted: Document) -> Change:
    """Compare a live RayService with the wanted one (from the server's dry run, with defaults)."""
    if live is None:
        return Change("create", [], _needs(wanted, _at_least))
    live, wanted = _without_empty(live), _without_empty(wanted)
    models = list(_models(live, wanted))
    cluster = list(_cluster(live, wanted))
    appended = _appended(live, wanted)
    bounds = list(_bounds(live, wanted))
    others = [
        f"{key} changes"
        for key in sorted({*live["spec"], *wanted["spec"]} - {"rayClusterConfig", "serveConfigV2"})
        if live["spec"].get(key) != wanted["spec"].get(key)
    ]
    if cluster and appended is None:
        strategy = (wanted["spec"].get("upgradeStrategy") or {}).get("type") or "NewCluster"
        if strategy == "None":
            return Change("ignored", [*models, *cluster])
        return Change("new cluster", [*models, *cluster, *bounds], _needed(wanted, strategy))
    grown = [f"worker group '{name}' is added" for name in appended or []]
    changes = [*models, *grown, *bounds, *others]
    if not changes and live["spec"].get("serveConfigV2") != wanted["spec"].get("serveConfigV2"):
        changes = ["comments or order in serveConfigV2"]
    held = {pods.name: _at_least(pods) for pods in workers_of(live)}
    more = _needs(wanted, lambda pods: _at_least(pods) - held.get(pods.name, 0))
    return Change("in place", changes, more) if changes else Change("none", [])


def _without_empty(value: Any) -> Any:
    """A copy without fields that hold nothing: with or without them KubeRay does the same.

    Its operator writes some into what was applied, such as ``scaleStrategy: {}``.
    """
    if isinstance(value, dict):
        kept = {key: _without_empty(item) for key, item in value.items()}
        return {key: item for key, item in kept.items() if item not in ({}, [], None)}
    if isinstance(value, list):
        return [_without_empty(item) for item in value]
    return value


def _needs(wanted: Document, gpus: Callable[[Pods], int]) -> tuple[Need, ...]:
    """The need of each worker group for which there is one."""
    found = [(pods, gpus(pods)) for pods in workers_of(wanted)]
    return tuple(
        Need(pods.name, count, frozenset(pods.affinity(INSTANCE_TYPE)))
        for pods, count in found
        if count > 0
    )


def _at_least(pods: Pods) -> int:
    """GPUs that a worker group holds at its minimum."""
    return pods.gpus_by("minReplicas")


def _needed(wanted: Document, strategy: str) -> tuple[Need, ...]:
    """GPUs beyond the running cluster's: all again, or the surge, at least a replica per model."""
    if strategy != "NewClusterWithIncrementalUpgrade":
        return _needs(wanted, _at_least)
    options = wanted["spec"]["upgradeStrategy"].get("clusterUpgradeOptions") or {}
    surge = int(options.get("maxSurgePercent") or 100)

    def surging(pods: Pods) -> int:
        gpus = _at_least(pods)
        replicas = whole(pods.group.get("minReplicas")) or 1
        # Serve rounds a share of the replicas up to one whole replica.
        return max(gpus // replicas, -(-gpus * surge // 100))

    return _needs(wanted, surging)


def _groups(document: Document) -> list[Document]:
    return list(document["spec"]["rayClusterConfig"].get("workerGroupSpecs") or [])


def _hashed(document: Document) -> Document:
    """The part of ``rayClusterConfig`` whose change makes a new cluster."""
    cluster: Document = copy.deepcopy(document["spec"]["rayClusterConfig"])
    cluster.pop("suspend", None)
    cluster.pop("upgradeStrategy", None)
    for group in [cluster.get("headGroupSpec") or {}, *(cluster.get("workerGroupSpecs") or [])]:
        for key in ("replicas", "minReplicas", "maxReplicas"):
            group.pop(key, None)
        (group.get("scaleStrategy") or {}).pop("workersToDelete", None)
        spec = (group.get("template") or {}).get("spec") or {}
        spec.pop("tolerations", None)
        spec.pop("schedulingGates", None)
    return cluster


def _cluster(live: Document, wanted: Document) -> Iterator[str]:
    """What changes in the cluster itself; groups that come and go by their names."""
    before, after = _hashed(live), _hashed(wanted)
    old, new = (
        {group["groupName"]: group for group in cluster.get("workerGroupSpecs") or []}
        for cluster in (before, after)
    )
    if list(old) != list(new):
        for name in old.keys() - new.keys():
            yield f"worker group '{name}' is removed"
        for name in new.keys() - old.keys():
            yield f"worker group '{name}' is added"
        both = [name for name in old if name in new]
        if both != [name for name in new if name in old]:
            yield f"worker groups change their order: {', '.join(new)}"
        before["workerGroupSpecs"] = [old[name] for name in both]
        after["workerGroupSpecs"] = [new[name] for name in both]
    yield from _paths(before, after, "rayClusterConfig")


def _appended(live: Document, wanted: Document) -> list[str] | None:
    """Names of groups appended at the end, if that is the only change of the cluster."""
    before, after = _hashed(live), _hashed(wanted)
    old, new = before.pop("workerGroupSpecs", []), after.pop("workerGroupSpecs", [])
    if before != after or new[: len(old)] != old:
        return None
    return [group["groupName"] for group in new[len(old) :]]


def _models(live: Document, wanted: Document) -> Iterator[str]:
    before, after = state.config_of(live), state.config_of(wanted)
    for name in before.keys() - after.keys():
        yield f"application '{name}' is removed"
    for name, application in after.items():
        if name not in before:
            yield f"application '{name}' is added"
        elif application != before[name]:
            changed = ", ".join(_paths(before[name], application, ""))
            yield f"application '{name}' is deployed anew: {changed}"


def _bounds(live: Document, wanted: Document) -> Iterator[str]:
    before = {group["groupName"]: group for group in _groups(live)}
    for group in _groups(wanted):
        old = before.get(group["groupName"])
        for key in ("minReplicas", "maxReplicas"):
            if old is not None and old.get(key) != group.get(key):
                where = f"worker group '{group['groupName']}'"
                yield f"{where}: {key} {old.get(key)} → {group.get(key)}"


def _paths(before: Any, after: Any, path: str) -> Iterator[str]:
    """The paths of values that differ, with short values themselves."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after}, key=str):
            yield from _paths(
                before.get(key), after.get(key), f"{path}.{key}" if path else str(key)
            )
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from _paths(one, other, f"{path}[{index}]")
    elif before != after:
        one, other = _short(before, after)
        yield f"{path} {one} → {other}"


_SHORT = 40
"""Characters of a value that are shown."""


def _short(before: Any, after: Any) -> list[str]:
    """Two different values, each cut to what a person reads; the first difference is in it."""
    texts = ["nothing" if value is None else str(value) for value in (before, after)]
    start = 0
    if max(map(len, texts)) > _SHORT:
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(*texts, strict=False))
        start = max(0, sum(1 for _ in alike) - _SHORT // 2)
    shown = []
    for text in texts:
        part = text[start : start + _SHORT]
        more = "…" if len(text) > start + _SHORT else ""
        shown.append(f"{'…' if start else ''}{part}{more}")
    return shown


def difference(live: Document | None, future: Document) -> str:
    """A unified diff of the two as YAML, without fields that only the server writes."""
    before = _readable(live) if live else []
    name = f"RayService/{future['metadata']['name']}"
    return "".join(
        difflib.unified_diff(before, _readable(future), f"live {name}", f"new {name}", n=3)
    )


def _readable(document: Document) -> list[str]:
    shown = _without_empty(document)
    shown.pop("status", None)
    for key in ("managedFields", "resourceVersion", "uid", "creationTimestamp", "generation"):
        shown["metadata"].pop(key, None)
    # Parsed: a diff of one quoted string would not be readable.
    config = shown["spec"].pop("serveConfigV2", "")
    text = yaml.safe_dump(shown, width=100, sort_keys=True)
    return [*text.splitlines(keepends=True), "# serveConfigV2\n", *config.splitlines(keepends=True)]
