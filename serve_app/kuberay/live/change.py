"""Predicts the effect of applying a RayService.

A spec that differs (:mod:`cluster_spec`) makes a new cluster. The operator compares it with the
cluster, not with the RayService: after a rejected spec, or under ``upgradeStrategy: None``, the two
are not alike. ``serveConfigV2`` is changed in place.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from serve_app.kuberay.live import cluster_spec, in_place, state
from serve_app.kuberay.live.clusters import Clusters, name_of
from serve_app.kuberay.validate.manifests import INSTANCE_TYPE, Pods, whole, workers_of

Document = dict[str, Any]
_NONE = Clusters()
Kind = Literal["create", "none", "at rest", "in place", "new cluster", "back", "ignored"]


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
    clusters: Clusters = _NONE
    """Those that are there."""

    behind: bool = False
    """Whether bounds or tolerations change, which KubeRay does not bring to a cluster."""

    @property
    def gpus(self) -> int:
        return sum(need.gpus for need in self.needs)

    @property
    def gives_up(self) -> str | None:
        """The cluster that starts now, and which this change gives up."""
        pending = self.clusters.pending
        return name_of(pending) if pending and self.kind in ("new cluster", "back") else None

    def __str__(self) -> str:
        what = {
            "create": "creates the RayService",
            "none": "changes nothing",
            "at rest": "changes the RayService, of which no cluster runs now",
            "in place": "changes the running cluster in place",
            "new cluster": "starts a second cluster beside the running one, then switches",
            "back": f"ends the upgrade: the running cluster stays, {self.gives_up} goes",
            "ignored": "is IGNORED by KubeRay: upgradeStrategy is None; delete and deploy again",
        }[self.kind]
        if self.kind == "new cluster":
            if self.gives_up:
                what = f"starts a cluster in place of {self.gives_up}, which is starting"
            elif self.clusters.left:
                left = " and ".join(map(name_of, self.clusters.left))
                what += f", and {left} still holds its GPUs, too"
        gpus = f" ({self.gpus} GPUs)" if self.gpus else ""
        return "\n".join([f"{what}{gpus}", *(f"  {change}" for change in self.changes)])


def between(live: Document | None, wanted: Document, clusters: Clusters = _NONE) -> Change:
    """Compare what is live with the wanted RayService.

    That is the answer of the server's dry run, which has defaults. ``clusters`` are those there.
    """
    if live is None:
        return Change("create", [], _needs(wanted, _at_least))
    before, after = as_it_runs(live, clusters), wanted["spec"]["rayClusterConfig"]
    running = before["spec"]["rayClusterConfig"]
    models = list(_models(live, wanted))
    behind = [str(difference) for difference in in_place.differences(running, after)]
    others = [
        f"{key} changes"
        for key in sorted({*live["spec"], *wanted["spec"]} - {"rayClusterConfig", "serveConfigV2"})
        if not _alike(live["spec"].get(key), wanted["spec"].get(key))
    ]
    appended = cluster_spec.appended(running, after)
    seen = state.of(live)
    if not (seen.active or seen.pending):
        cluster = list(cluster_spec.differences(running, after))
        changes = [*models, *cluster, *behind, *others]
        return Change("at rest" if changes else "none", changes)
    cluster = list(cluster_spec.differences(running, after)) if appended is None else []
    # Also where the one that starts is a twin of it: KubeRay makes one when another tool takes a
    # change back.
    active = clusters.active if clusters.pending else None
    stays = active is not None and "deletionTimestamp" not in active["metadata"]
    if active and stays and cluster_spec.same(active["spec"], after):
        return Change("back", [*models, *cluster, *others], clusters=clusters)
    if appended is None:
        if (wanted["spec"].get("upgradeStrategy") or {}).get("type") == "None":
            return Change("ignored", [*models, *cluster], clusters=clusters)
        changes = [*models, *cluster, *behind, *others]
        return Change("new cluster", changes, _needed(wanted), clusters)
    grown = [f"worker group '{name}' is added" for name in appended]
    changes = [*models, *grown, *behind, *others]
    if not changes and live["spec"].get("serveConfigV2") != wanted["spec"].get("serveConfigV2"):
        changes = ["comments or order in serveConfigV2"]
    if not changes and _differ(live["spec"]["rayClusterConfig"], after):
        changes = ["the RayService goes back to what runs"]
    if not changes:
        return Change("none", [], clusters=clusters)
    held = {pods.name: _at_least(pods) for pods in workers_of(before)}
    more = _needs(wanted, lambda pods: _at_least(pods) - held.get(pods.name, 0))
    return Change("in place", changes, more, clusters, bool(behind))


def as_it_runs(live: Document, clusters: Clusters) -> Document:
    """The RayService with the spec of the cluster that the operator compares with."""
    if clusters.compared is None:
        return live
    return {**live, "spec": {**live["spec"], "rayClusterConfig": clusters.compared["spec"]}}


def _differ(before: Document, after: Document) -> bool:
    """Whether two cluster specs differ in anything but the autoscaler's ``replicas``."""
    return cluster_spec.appended(before, after) != [] or any(in_place.differences(before, after))


def _alike(before: Any, after: Any) -> bool:
    return bool(cluster_spec.plain(before, after) == cluster_spec.plain(after, after))


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


def _needed(wanted: Document) -> tuple[Need, ...]:
    """GPUs beyond the running cluster's: all again, or the surge, at least a replica per model."""
    if not state.is_incremental(wanted):
        return _needs(wanted, _at_least)
    options = wanted["spec"]["upgradeStrategy"].get("clusterUpgradeOptions") or {}
    surge = int(options.get("maxSurgePercent") or 100)

    def surging(pods: Pods) -> int:
        gpus = _at_least(pods)
        replicas = whole(pods.group.get("minReplicas")) or 1
        # Serve rounds a share of the replicas up to one whole replica.
        return max(gpus // replicas, -(-gpus * surge // 100))

    return _needs(wanted, surging)


def _models(live: Document, wanted: Document) -> Iterator[str]:
    before, after = state.config_of(live), state.config_of(wanted)
    for name in before.keys() - after.keys():
        yield f"application '{name}' is removed"
    for name, application in after.items():
        if name not in before:
            yield f"application '{name}' is added"
        elif application != before[name]:
            changed = ", ".join(cluster_spec.paths(before[name], application, ""))
            yield f"application '{name}' is deployed anew: {changed}"


def difference(live: Document | None, future: Document) -> str:
    """A unified diff of the two as YAML, without fields that only the server writes."""
    before = _readable(live, future) if live else []
    name = f"RayService/{future['metadata']['name']}"
    return "".join(
        difflib.unified_diff(before, _readable(future, future), f"live {name}", f"new {name}", n=3)
    )


def _readable(document: Document, beside: Document) -> list[str]:
    shown = cluster_spec.plain(document, beside)
    shown.pop("status", None)
    for key in ("managedFields", "resourceVersion", "uid", "creationTimestamp", "generation"):
        shown["metadata"].pop(key, None)
    # The autoscaler's, which nobody deploys.
    for group in shown["spec"]["rayClusterConfig"].get("workerGroupSpecs") or []:
        group.pop("replicas", None)
        group.pop("scaleStrategy", None)
    # Parsed: a diff of one quoted string would not be readable.
    config = shown["spec"].pop("serveConfigV2", "")
    text = yaml.safe_dump(shown, width=100, sort_keys=True)
    return [*text.splitlines(keepends=True), "# serveConfigV2\n", *config.splitlines(keepends=True)]
