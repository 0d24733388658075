"""KubeRay's operator 1.7 as a model: what it does to RayServices, and RayClusters below them.

It follows ``ray-operator/controllers/ray``; each docstring names the function that it stands for.
Beyond the API server it has Machines (machines.py) for its pods and a Serve (serve_model.py) for each
head. What it has not: Gateway and HTTPRoute (their weights are in the status), Redis, and
Ray's autoscaler, whose patches of ``replicas`` a test makes by hand.

A test takes single steps (:meth:`Operator.reconcile`, :meth:`Operator.step`), lets all settle
(:meth:`Operator.settle`), or lets it go on beside the command under test (:func:`running`).
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
import string
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import serve_model
import yaml
from controllers import OPERATOR, adopt, sync_budgets
from kube_api import KubeAPI
from machines import Machines, is_ready, slices_of
from serve_model import Serve

Document = dict[str, Any]

VERSION = "v1.7.0"
HASH = "ray.io/hash-without-replicas-and-workers-to-delete"
GROUPS = "ray.io/num-worker-groups"
BY_VERSION = "ray.io/kuberay-version"
INCREMENTAL = "NewClusterWithIncrementalUpgrade"


class _Later(Exception):
    """An error of a reconcile: the operator writes no status, and tries again."""


class Operator:
    """The controllers of RayService and RayCluster, and what of a cluster they need."""

    def __init__(self, api: KubeAPI) -> None:
        self.api = api
        self.machines = Machines(api)
        self.outcome = serve_model.outcome
        """What becomes of an application (see :data:`serve_model.Outcome`); tests replace it."""
        self.away = False
        """Whether the operator does not run; machines and Serve go on."""
        self.ahead_s = 0.0
        """Seconds by which its clock is ahead, for delays and intervals."""
        self._serves: dict[str, Serve] = {}
        self._put: dict[str, str] = {}  # by cluster: the serveConfigV2 that was PUT last
        self._deleted_at: dict[str, float] = {}  # by cluster that is left over
        api.proxy = self._answer

    def step(self) -> None:
        """One look of every controller."""
        with self.api.lock:
            if not self.away:
                for namespace, name in _names(self.api, "rayservices"):
                    self.reconcile(namespace, name)
                for namespace, name in _names(self.api, "rayclusters"):
                    self.reconcile_cluster(namespace, name)
            self.machines.step()
            sync_budgets(self.api)

    def settle(self) -> None:
        """Steps until nothing changes any more but times and counts."""
        seen = [""]
        for _ in range(100):
            seen.append(_without_times(self.api))
            if len(set(seen[-3:])) == 1:  # a PUT is seen a step later only
                return
            self.step()
        raise AssertionError("the operator does not come to rest")

    # --- RayService ---

    def reconcile(self, namespace: str, name: str) -> None:
        """One reconcile of a RayService (``Reconcile``)."""
        with self.api.lock:
            found = self.api.get("rayservices", namespace, name)
            if found is None:
                return
            service = copy.deepcopy(found)
            service.setdefault("status", {})
            try:
                self._reconcile(service)
            except _Later:
                return

    def _reconcile(self, service: Document) -> None:
        left_over = self._clean_up(service)
        if "deletionTimestamp" in service["metadata"]:
            if not left_over:
                service["metadata"]["finalizers"] = []
                self.api.update("rayservices", service, OPERATOR)
            return
        if not service["metadata"].get("finalizers"):
            adopt(self.api, service["metadata"]["namespace"], service["metadata"]["name"])
            return
        if invalid := _invalid(service):
            self._event(service, "InvalidRayServiceSpec", "Validate", f"{_id(service)}: {invalid}")
            # Of the generation observed before, which the status keeps.
            self._condition(service, "Ready", "False", "ValidationFailed", invalid)
            self._write(service)
            return
        self._suspend(service)
        self._write(service)
        if _holds(service, "Suspending") or _holds(service, "Suspended"):
            return
        active, pending = self._clusters(service)
        if _incremental(service) and _holds(service, "UpgradeInProgress") and active and pending:
            self._turn_back(service, active, pending)
        for cluster in (active, pending):
            if cluster and self._head(cluster) is None:
                raise _Later(f"found 0 head. cluster name {cluster['metadata']['name']}")
        active_apps: Document = {}
        pending_apps: Document = {}
        active_ready = pending_ready = False
        if pending:
            pending_ready, pending_apps = self._serve(service, pending)
        # Beside a pending cluster the active one is asked in an incremental upgrade only.
        if active and (
            _incremental(service) if pending else not _needs_new(service, active, None, False)
        ):
            active_ready, active_apps = self._serve(service, active)
        weights = None
        if _incremental(service) and active:
            weights = self._weights(service, pending_ready)
        serving = ""
        if active_ready or pending_ready:
            upgrade = _incremental(service) and _holds(service, "UpgradeInProgress")
            target = pending if pending_ready and not upgrade else active
            assert target is not None
            serving = self._turn_services(service, target)
        for part, cluster, apps in (
            ("activeServiceStatus", active, active_apps),
            ("pendingServiceStatus", pending, pending_apps),
        ):
            self._report(service, part, cluster, apps)
        self._finish(service, active, pending, serving, weights)
        self._write(service)

    def _clean_up(self, service: Document) -> bool:
        """Whether clusters are left over, deleted or not (``cleanUpRayClusterInstance``)."""
        deleted = "deletionTimestamp" in service["metadata"]
        delay = service["spec"].get("rayClusterDeletionDelaySeconds", 60)
        used = {_part(service, "active").get("rayClusterName")}
        used.add(_part(service, "pending").get("rayClusterName"))
        left = [c for c in self._owned("rayclusters", service) if deleted or _name(c) not in used]
        for cluster in left:
            name = _name(cluster)
            if not deleted and name not in self._deleted_at:
                self._deleted_at[name] = self._now() + delay
            elif deleted or self._now() > self._deleted_at[name]:
                self.api.delete("rayclusters", cluster["metadata"]["namespace"], name)
                what = f"Deleted the RayCluster {_id(cluster)}"
                self._event(service, "DeletedRayCluster", "Delete", what, "Normal")
        return bool(left)

    def _suspend(self, service: Document) -> None:
        """The three stages of ``spec.suspend`` and the way back (``handleSuspend``)."""
        wanted = bool(service["spec"].get("suspend"))
        status = service["status"]

        def all_of(reason: str, ready: str) -> None:
            self._condition(service, "Ready", "False", reason, ready)
            self._condition(service, "UpgradeInProgress", "False", reason, "No upgrade")
            self._condition(service, "RollbackInProgress", "False", reason, "No rollback")

        if _holds(service, "Suspended"):
            if wanted:
                return
            status["observedGeneration"] = service["metadata"]["generation"]
            self._condition(service, "Suspended", "False", "RayServiceResumed", "resumed")
            for kind in ("Ready", "UpgradeInProgress"):
                text = "RayService is initializing after resuming from suspend."
                self._condition(service, kind, "False", "Initializing", text)
        elif not _holds(service, "Suspending"):
            if not wanted:
                return
            status["observedGeneration"] = service["metadata"]["generation"]
            text = "Spec.Suspend is true; will delete all Kubernetes resources"
            self._condition(service, "Suspending", "True", "SuspendRequested", text)
            all_of("SuspendInProgress", "RayService is suspending.")
            status |= {"activeServiceStatus": {}, "pendingServiceStatus": {}}
            status |= {"numServeEndpoints": 0, "serviceStatus": ""}
        elif owned := [
            (plural, document)
            for plural in ("rayclusters", "services")
            for document in self._owned(plural, service)
        ]:
            for plural, document in owned:
                self.api.delete(plural, document["metadata"]["namespace"], _name(document))
        else:
            text = "All owned resources have been deleted."
            self._condition(service, "Suspending", "False", "SuspendComplete", text)
            self._condition(service, "Suspended", "True", "SuspendComplete", text)
            all_of("SuspendComplete", "RayService is suspended.")

    def _clusters(self, service: Document) -> tuple[Document | None, Document | None]:
        """The active and the pending RayCluster (``reconcileRayCluster``).

        A pending one that is not there is made. One that is there is written only when groups were
        appended, and then as a whole.
        """
        namespace = service["metadata"]["namespace"]
        active, pending = (
            self.api.get("rayclusters", namespace, str(_part(service, p).get("rayClusterName")))
            for p in ("active", "pending")
        )
        name = _part(service, "pending").get("rayClusterName")
        if name and pending is None:
            pending = self.api.store("rayclusters", _cluster_of(service, name), OPERATOR)
            what = f"Created the RayCluster {_id(pending)}"
            self._event(service, "CreatedRayCluster", "Create", what, "Normal")
            return active, pending
        updated = []
        for part, cluster in (("active", active), ("pending", pending)):
            upgraded = part == "active" and _holds(service, "UpgradeInProgress")
            if cluster and not upgraded and _appended(service, cluster):
                goal = _cluster_of(service, _name(cluster))
                new = {**copy.deepcopy(cluster), "spec": goal["spec"]}
                new["metadata"] |= {k: goal["metadata"][k] for k in ("labels", "annotations")}
                cluster = self.api.update("rayclusters", new, OPERATOR)
                what = f"Updated the {part} RayCluster {_id(cluster)}"
                self._event(service, "UpdatedRayCluster", "Update", what, "Normal")
            updated.append(cluster)
        return updated[0], updated[1]

    def _turn_back(self, service: Document, active: Document, pending: Document) -> None:
        """Whether an incremental upgrade rolls back (``reconcileRollbackState``)."""
        goal = _hash(service["spec"]["rayClusterConfig"])
        if goal == pending["metadata"]["annotations"][HASH]:
            self._drop_condition(service, "RollbackInProgress")
        elif not _holds(service, "RollbackInProgress"):
            text = "Goal state changed mid-upgrade, rolling back to original cluster."
            if goal == active["metadata"]["annotations"][HASH]:
                text = "Goal state reverted to original cluster, rolling back."
            kind, reason = "RollbackInProgress", "DesiredClusterSpecChanged"
            self._condition(service, kind, "True", reason, text)

    def _serve(self, service: Document, cluster: Document) -> tuple[bool, Document]:
        """Whether all applications run, and their statuses (``reconcileServe``).

        They are read before a new config is PUT: those of a new spec come a reconcile later. While
        the head is not Ready there are none.
        """
        head = self._head(cluster)
        if head is None or not is_ready(head):
            return False, {}
        name, config = _name(cluster), service["spec"]["serveConfigV2"]
        serve = self._serve_of(cluster)
        applications = serve.applications(self.outcome, self._waiting(cluster))
        ready = bool(applications)
        ready &= all(app["status"] == "RUNNING" for app in applications.values())
        upgrade = _incremental(service) and _holds(service, "UpgradeInProgress")
        active = name == _part(service, "active").get("rayClusterName")
        blocked = upgrade and active != _holds(service, "RollbackInProgress")
        if (self._put.get(name) != config or not applications) and not blocked:
            try:
                serve.put(config)
            except (yaml.YAMLError, KeyError, TypeError) as error:
                text = f"Failed to update serve applications to the RayCluster {_id(cluster)}"
                text = f"{text}: fail to create / update Serve applications. err: {error}"
                self._event(service, "FailedToUpdateServeApplications", "Update", text)
                raise _Later(text) from None
            self._put[name] = config
            text = f"Updated serve applications to the RayCluster {_id(cluster)}"
            self._event(service, "UpdatedServeApplications", "Update", text, "Normal")
        if upgrade:
            self._scale(service, active)
        return ready, applications

    def _scale(self, service: Document, active: bool) -> None:
        """A step of an upgrade's target capacities (``reconcileServeTargetCapacity``).

        First the new cluster grows, then its traffic, then the old cluster shrinks.
        """
        old, new = _part(service, "active"), _part(service, "pending")
        surge = _options(service).get("maxSurgePercent", 100)
        old.setdefault("targetCapacity", 100)
        new.setdefault("targetCapacity", 0)
        if _holds(service, "RollbackInProgress"):
            old, new, active = new, old, not active
        if new["targetCapacity"] != new.get("trafficRoutedPercent", 0):
            return  # traffic moves first
        crowded = old["targetCapacity"] + new["targetCapacity"] > 100
        if crowded and active:
            old["targetCapacity"] = max(0, old["targetCapacity"] - surge)
        elif not crowded and not active:
            new["targetCapacity"] = min(100, new["targetCapacity"] + surge)

    def _weights(self, service: Document, pending_ready: bool) -> tuple[int, int]:
        """Percent of the traffic for both clusters (``calculateTrafficRoutedPercent``)."""
        back = _holds(service, "RollbackInProgress")
        parts = [_part(service, p) for p in ("active", "pending")]
        to, capacity = (parts[0], 100) if back else (parts[1], 0)
        share = to.get("trafficRoutedPercent", capacity)
        goal = to.get("targetCapacity", capacity)
        moved = to.get("lastTrafficMigratedTime")
        due = moved is None or self._now() - _seconds(moved) >= _options(service)["intervalSeconds"]
        if share != goal and due and (back or pending_ready):
            share = min(100, share + _options(service)["stepSizePercent"], goal)
        return (share, 100 - share) if back else (100 - share, share)

    def _turn_services(self, service: Document, cluster: Document) -> str:
        """Head and serve Service select this cluster (``reconcileServicesToReadyCluster``).

        Whether its gateways are Ready is not asked. Returns the cluster's name.
        """
        name, own = _name(service), service["spec"].get("serveService") or {}
        ports = (own.get("spec") or {}).get("ports")
        ports = ports or [{"name": "serve", "port": 8000, "targetPort": 8000}]
        serve = f"{name}-serve-svc"
        if _incremental(service):  # one for each cluster, of the operator's own making
            serve, ports = f"{_name(cluster)}-serve-svc", [{**ports[0], "targetPort": 8000}]
        head = [{"name": "dashboard", "port": 8265, "targetPort": 8265}]
        for title, owner, selector, these in (
            (f"{name}-head-svc", service, {"ray.io/node-type": "head"}, head),
            (serve, cluster if _incremental(service) else service, {"ray.io/serve": "true"}, ports),
        ):
            selector = {"ray.io/cluster": _name(cluster), **selector}
            there = self.api.get("services", service["metadata"]["namespace"], title)
            if there is None or there["spec"]["selector"] != selector:
                metadata = _owned_by(owner, title) | {"labels": _made_for(service)}
                spec = {"selector": selector, "ports": these}
                document = {"kind": "Service", "metadata": metadata, "spec": spec}
                self.api.store("services", document, OPERATOR)
        return _name(cluster)

    def _report(
        self, service: Document, part: str, cluster: Document | None, applications: Document
    ) -> None:
        """One cluster's part of the status; no applications means no field (Go's omitempty)."""
        entry = service["status"].setdefault(part, {})
        entry["rayClusterStatus"] = copy.deepcopy((cluster or {}).get("status") or {})
        entry.pop("applicationStatuses", None)
        if applications:
            entry["applicationStatuses"] = applications

    def _finish(
        self,
        service: Document,
        active: Document | None,
        pending: Document | None,
        serving: str,
        weights: tuple[int, int] | None,
    ) -> None:
        """Promotion, a new pending cluster, endpoints and conditions (``calculateStatus``)."""
        status = service["status"]
        status["observedGeneration"] = service["metadata"]["generation"]
        turned = False
        if serving:
            if weights:
                self._route(service, weights, bool(pending))
            turned = serving == _part(service, "pending").get("rayClusterName")
            if _is_due(service, pending, serving):
                status["activeServiceStatus"] = status.pop("pendingServiceStatus")
                status["pendingServiceStatus"] = {}
        if _holds(service, "RollbackInProgress") and _rolled_back(service):
            status["pendingServiceStatus"] = {}
            pending = None
            self._drop_condition(service, "RollbackInProgress")
        if _needs_new(service, active, pending, turned):
            letters = random.choices(string.ascii_lowercase + string.digits, k=5)
            entry: Document = {"rayClusterName": f"{_name(service)}-{''.join(letters)}"}
            if _incremental(service):
                first = not _part(service, "active").get("rayClusterName")
                entry["targetCapacity"] = 100 if first else 0
            status["pendingServiceStatus"] = entry
        status["numServeEndpoints"] = self._endpoints(service, active, pending)
        self._conclude(service)
        status["serviceStatus"] = "Running" if _holds(service, "Ready") else ""

    def _route(self, service: Document, weights: tuple[int, int], upgrading: bool) -> None:
        """The route's weights in the status, with when they changed."""
        for name, weight in zip(("active", "pending"), weights, strict=True):
            part = _part(service, name)
            if name == "pending" and not upgrading:
                continue
            if part.get("trafficRoutedPercent") != weight:
                part["lastTrafficMigratedTime"] = self._stamp()
            part["trafficRoutedPercent"] = weight

    def _endpoints(
        self, service: Document, active: Document | None, pending: Document | None
    ) -> int:
        """Ready pods behind the Service (``calculateNumServeEndpointsFromSlices``).

        Pods in slices without the port count, too.
        """
        services = [f"{_name(service)}-serve-svc"]
        if _incremental(service):
            services = [f"{_name(cluster)}-serve-svc" for cluster in (active, pending) if cluster]
        return len(
            {
                endpoint["targetRef"]["uid"]
                for title in services
                for document in slices_of(self.api, service["metadata"]["namespace"], title)
                for endpoint in document["endpoints"]
                if endpoint["conditions"]["ready"]
            }
        )

    def _conclude(self, service: Document) -> None:
        """The conditions (``calculateConditions``)."""
        status = service["status"]
        if not status.get("conditions"):
            for kind in ("Ready", "UpgradeInProgress"):
                text = "RayService is initializing"
                self._condition(service, kind, "False", "Initializing", text)
        if status["numServeEndpoints"]:
            text = "Number of serve endpoints is greater than 0"
            self._condition(service, "Ready", "True", "NonZeroServeEndpoints", text)
        elif _holds(service, "Ready"):
            text = "Number of serve endpoints dropped to 0"
            self._condition(service, "Ready", "False", "ZeroServeEndpoints", text)
        active = _part(service, "active").get("rayClusterName")
        if active and _part(service, "pending").get("rayClusterName"):
            reason, text = "BothActivePendingClustersExist", "Both active and pending Ray clusters"
            self._condition(service, "UpgradeInProgress", "True", reason, f"{text} exist")
        elif active:
            text = "Active Ray cluster exists and no pending Ray cluster"
            self._condition(service, "UpgradeInProgress", "False", "NoPendingCluster", text)

    # --- RayCluster ---

    def reconcile_cluster(self, namespace: str, name: str) -> None:
        """One reconcile of a RayCluster: its pods, and its status (``reconcilePods``).

        A pod that is being deleted still counts: it is replaced when it is gone.
        """
        cluster = self.api.get("rayclusters", namespace, name)
        if cluster is None:
            return
        spec = cluster["spec"]
        if not any(_node_type(pod) == "head" for pod in self._pods(cluster)):
            self._make_pod(cluster, spec["headGroupSpec"], "head")
        for group in spec.get("workerGroupSpecs") or []:
            for unwanted in (group.get("scaleStrategy") or {}).get("workersToDelete") or []:
                self.api.delete("pods", namespace, unwanted)
            pods = [p for p in self._pods(cluster) if _group(p) == group["groupName"]]
            for _ in range(_desired(group) - len(pods)):
                self._make_pod(cluster, group, "worker")
            if not spec.get("enableInTreeAutoscaling"):  # else only the autoscaler removes pods
                for pod in pods[_desired(group) :]:
                    self.api.delete("pods", namespace, _name(pod))
        pods = self._pods(cluster)
        ready = [pod for pod in pods if is_ready(pod)]
        heads = [pod for pod in ready if _node_type(pod) == "head"]
        status = {
            "state": "ready" if len(ready) == len(pods) else "",
            "desiredWorkerReplicas": sum(map(_desired, spec.get("workerGroupSpecs") or [])),
            "readyWorkerReplicas": len(ready) - len(heads),
            "conditions": [{"type": "HeadPodReady", "status": "True" if heads else "False"}],
            "observedGeneration": cluster["metadata"]["generation"],
        }
        if status != cluster.get("status"):
            self.api.change("rayclusters", namespace, name, status=status)

    def _make_pod(self, cluster: Document, group: Document, node_type: str) -> None:
        """A pod of a group (``createHeadPod``, ``createWorkerPod``)."""
        template, title = group["template"], group.get("groupName", "headgroup")
        letters = "".join(random.choices(string.ascii_lowercase + string.digits, k=5))
        parts = [_name(cluster), *([title] if node_type == "worker" else []), node_type, letters]
        metadata = _owned_by(cluster, "-".join(parts))
        metadata["annotations"] = (template.get("metadata") or {}).get("annotations") or {}
        metadata["labels"] = ((template.get("metadata") or {}).get("labels") or {}) | {
            "ray.io/cluster": _name(cluster),
            "ray.io/group": title,
            "ray.io/node-type": node_type,
            # The head's follows spec.excludeHeadPodFromServeSvc, which is true in a rendering.
            "ray.io/serve": "true" if node_type == "worker" else "false",
        }
        pod = {"kind": "Pod", "metadata": metadata, "spec": copy.deepcopy(template["spec"])}
        self.api.store("pods", {**pod, "status": {"phase": "Pending"}}, OPERATOR)

    def _pods(self, cluster: Document) -> list[Document]:
        return [
            document
            for (kind, space, _), document in list(self.api.objects.items())
            if kind == "pods"
            and space == cluster["metadata"]["namespace"]
            and (document["metadata"].get("labels") or {}).get("ray.io/cluster") == _name(cluster)
        ]

    def _head(self, cluster: Document) -> Document | None:
        return next((p for p in self._pods(cluster) if _node_type(p) == "head"), None)

    # --- Serve ---

    def _serve_of(self, cluster: Document) -> Serve:
        """A cluster's Serve: it dies with the head's pod, unless Redis keeps its state."""
        head = self._head(cluster)
        assert head is not None
        kept = "gcsFaultToleranceOptions" in cluster["spec"]
        return self._serves.setdefault((cluster if kept else head)["metadata"]["uid"], Serve())

    def _waiting(self, cluster: Document) -> set[bool]:
        """For what pods without a machine are missing: models (True), the gateway (False)."""
        return {
            pod["metadata"]["labels"].get("serve-app/role") != "gateway"
            for pod in self._pods(cluster)
            if _node_type(pod) == "worker" and not pod["spec"].get("nodeName")
        }

    def _answer(self, method: str, service: str, path: str, body: Any) -> tuple[int, str]:
        """What the gateway of the cluster that a Service selects answers for a model."""
        title, model = service.partition(":")[0], str((body or {}).get("model"))
        with self.api.lock:
            found = next(
                (d for (k, _, n), d in self.api.objects.items() if (k, n) == ("services", title)),
                None,
            )
            if found is None:
                return 404, json.dumps({"kind": "Status", "message": f"{title} not found"})
            namespace, selector = found["metadata"]["namespace"], found["spec"]["selector"]
            cluster = self.api.get("rayclusters", namespace, selector["ray.io/cluster"])
            serve = self._serve_of(cluster) if cluster and self._head(cluster) else Serve()
            if model not in serve:
                error = {"message": f"The model '{model}' does not exist"}
                return 404, json.dumps({"error": error | {"code": "model_not_found"}})
            if not serve.running(model):
                return 503, json.dumps({"error": {"message": f"{model} has no replica"}})
        return 200, "{}"

    # --- what the parts above share ---

    def _owned(self, plural: str, service: Document) -> list[Document]:
        """What carries a RayService's labels (``RayServiceRayClustersAssociationOptions``)."""
        return [
            document
            for (kind, space, _), document in list(self.api.objects.items())
            if kind == plural
            and space == service["metadata"]["namespace"]
            and _made_for(service).items() <= (document["metadata"].get("labels") or {}).items()
        ]

    def _condition(
        self, service: Document, kind: str, status: str, reason: str, message: str
    ) -> None:
        """``setCondition``: of the generation that the status has, not that of the spec."""
        conditions = service["status"].setdefault("conditions", [])
        old = next((c for c in conditions if c["type"] == kind), None)
        if old is None:
            old = {"type": kind}
            conditions.append(old)
        if old.get("status") != status:
            old["lastTransitionTime"] = self._stamp()
        old |= {"status": status, "reason": reason, "message": message}
        if "observedGeneration" in service["status"]:
            old["observedGeneration"] = service["status"]["observedGeneration"]

    def _drop_condition(self, service: Document, kind: str) -> None:
        conditions = service["status"].get("conditions") or []
        service["status"]["conditions"] = [c for c in conditions if c["type"] != kind]

    def _write(self, service: Document) -> None:
        """``InconsistentRayServiceStatuses``: a new observedGeneration alone is not written."""
        metadata, status = service["metadata"], service["status"]
        live = self.api.get("rayservices", metadata["namespace"], metadata["name"]) or {}
        if _telling(live.get("status") or {}) != _telling(status):
            status["lastUpdateTime"] = self._stamp()
            written = copy.deepcopy(status)
            self.api.change("rayservices", metadata["namespace"], metadata["name"], status=written)

    def _event(
        self, about: Document, reason: str, action: str, note: str, kind: str = "Warning"
    ) -> None:
        """An event of events.k8s.io: no first and last timestamp; a repeat is a ``series``."""
        metadata = about["metadata"]
        name = f"{metadata['name']}.{hashlib.sha1(f'{reason}{kind}'.encode()).hexdigest()[:16]}"
        old = self.api.get("events", metadata["namespace"], name)
        document = {
            "metadata": {"name": name, "namespace": metadata["namespace"]},
            "type": kind,
            "reason": reason,
            "action": action,
            "message": note,
            "involvedObject": {
                "kind": about["kind"],
                **{key: metadata[key] for key in ("name", "namespace", "uid")},
            },
            "eventTime": self._stamp(micro=True),
            "firstTimestamp": None,
            "lastTimestamp": None,
            "reportingComponent": "rayservice-controller",
        }
        if old:
            count = (old.get("series") or {}).get("count", 1) + 1
            series = {"count": count, "lastObservedTime": document["eventTime"]}
            document |= {"series": series, "eventTime": old["eventTime"]}
            document["metadata"] = copy.deepcopy(old["metadata"])
        self.api.store("events", document, OPERATOR)

    def _now(self) -> float:
        return time.time() + self.ahead_s

    def _stamp(self, micro: bool = False) -> str:
        text = datetime.fromtimestamp(self._now(), UTC).isoformat(
            timespec="microseconds" if micro else "seconds"
        )
        return text.replace("+00:00", "Z")


@contextmanager
def running(operator: Operator, period_s: float = 0.1) -> Iterator[Operator]:
    """Let the operator go on in the background, one step each ``period_s`` seconds.

    Raises:
        Exception: what it raised, at the end.
    """
    ended = threading.Event()
    raised: list[Exception] = []

    def go_on() -> None:
        while not ended.wait(period_s):
            if time.monotonic() >= operator.api.away_until:  # it asks the API server, too
                try:
                    operator.step()
                except Exception as error:
                    raised.append(error)
                    return

    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    try:
        yield operator
    finally:
        ended.set()
        thread.join()
    if raised:
        raise raised[0]


# --- which cluster a RayService wants ---


def _cluster_of(service: Document, name: str) -> Document:
    """``constructRayClusterForRayService``."""
    metadata, config = service["metadata"], copy.deepcopy(service["spec"]["rayClusterConfig"])
    groups = config.get("workerGroupSpecs") or []
    annotations = dict(metadata.get("annotations") or {})
    annotations |= {HASH: _hash(config), GROUPS: str(len(groups)), BY_VERSION: VERSION}
    if _incremental(service) and _part(service, "active").get("rayClusterName"):
        for group in groups:
            group.pop("replicas", None)
    labels = dict(metadata.get("labels") or {}) | _made_for(service)
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": _owned_by(service, name) | {"labels": labels, "annotations": annotations},
        "spec": config,
    }


def _hash(config: Document) -> str:
    """``GenerateHashWithoutReplicasAndWorkersToDelete``, of ``rayClusterSpecForHashing``."""
    config = copy.deepcopy(config)
    for field in ("suspend", "upgradeStrategy"):
        config.pop(field, None)
    for group in [config["headGroupSpec"], *(config.get("workerGroupSpecs") or [])]:
        for field in ("tolerations", "schedulingGates"):
            group["template"]["spec"].pop(field, None)
    for group in config.get("workerGroupSpecs") or []:
        for field in ("replicas", "minReplicas", "maxReplicas"):
            group.pop(field, None)
        (group.get("scaleStrategy") or {}).pop("workersToDelete", None)
    return hashlib.sha1(json.dumps(_without_empty(config), sort_keys=True).encode()).hexdigest()


def _equal(service: Document, cluster: Document, *, partial: bool) -> bool:
    """``isClusterSpecHashEqual``; ``partial``: without groups appended at the end."""
    config = dict(service["spec"]["rayClusterConfig"])
    if partial:
        count = int(cluster["metadata"]["annotations"][GROUPS])
        config["workerGroupSpecs"] = (config.get("workerGroupSpecs") or [])[:count]
    return _hash(config) == cluster["metadata"]["annotations"][HASH]


def _appended(service: Document, cluster: Document) -> bool:
    """``shouldUpdateCluster``, without new versions of KubeRay."""
    same = _equal(service, cluster, partial=False)
    return not same and _equal(service, cluster, partial=True)


def _needs_new(
    service: Document, active: Document | None, pending: Document | None, turned: bool
) -> bool:
    """``shouldPrepareNewCluster``: the pending cluster is what counts, if there is one."""
    if turned or _holds(service, "RollbackInProgress"):
        return False
    cluster = pending or active
    if cluster is None:
        return True
    same = _equal(service, cluster, partial=False) or _equal(service, cluster, partial=True)
    return not same and (service["spec"].get("upgradeStrategy") or {}).get("type") != "None"


def _is_due(service: Document, pending: Document | None, serving: str) -> bool:
    """Whether the pending cluster is promoted (``reconcilePromotionAndServingStatus``)."""
    old, new = _part(service, "active"), _part(service, "pending")
    if not _incremental(service):
        return bool(old.get("rayClusterName") != serving)
    if not _holds(service, "UpgradeInProgress"):
        return not old.get("rayClusterName") and bool(new.get("rayClusterName"))
    moved = old.get("targetCapacity") == 0 and new.get("trafficRoutedPercent") == 100
    return moved and pending is not None and not _holds(service, "RollbackInProgress")


def _rolled_back(service: Document) -> bool:
    """``shouldCompleteIncrementalRollback``."""
    old, new = _part(service, "active"), _part(service, "pending")
    fields = ("targetCapacity", "trafficRoutedPercent")
    conditions = (new.get("rayClusterStatus") or {}).get("conditions") or []
    dead = not any(c["type"] == "HeadPodReady" and c["status"] == "True" for c in conditions)
    back = all(old.get(field) == 100 for field in fields)
    return back and (dead or all(new.get(field) == 0 for field in fields))


def _invalid(service: Document) -> str | None:
    """A few of the rules of ``ValidateRayServiceSpec`` that the CRD does not have."""
    spec = service["spec"]
    for group in spec["rayClusterConfig"].get("workerGroupSpecs") or []:
        least, most = group.get("minReplicas", 0), group.get("maxReplicas", 2**31 - 1)
        if least > most:
            name = f"worker group {group['groupName']}"
            text = f"{name} has minReplicas {least} greater than maxReplicas {most}"
            return f"The RayService spec is invalid: {text}"
    if spec.get("rayClusterDeletionDelaySeconds", 0) < 0:
        what = "Spec.RayClusterDeletionDelaySeconds should be a non-negative integer"
        delay = spec["rayClusterDeletionDelaySeconds"]
        return f"The RayService spec is invalid: {what}, got {delay}"
    if _incremental(service):
        if not spec["rayClusterConfig"].get("enableInTreeAutoscaling"):
            text = f"Ray Autoscaler is required for {INCREMENTAL}"
            return f"The RayService spec is invalid: {text}"
        if _options(service)["stepSizePercent"] > _options(service).get("maxSurgePercent", 100):
            text = "stepSizePercent must be less than or equal to maxSurgePercent"
            return f"The RayService spec is invalid: {text}"
    return None


# --- reading ---


def _part(service: Document, which: str) -> Document:
    """The active or the pending part of a status, to read and to change."""
    part = service["status"].get(f"{which}ServiceStatus")
    if part is None:
        part = service["status"][f"{which}ServiceStatus"] = {}
    return part  # type: ignore[no-any-return]


def _holds(service: Document, kind: str) -> bool:
    conditions = service["status"].get("conditions") or []
    return any(c["type"] == kind and c["status"] == "True" for c in conditions)


def _incremental(service: Document) -> bool:
    return (service["spec"].get("upgradeStrategy") or {}).get("type") == INCREMENTAL


def _options(service: Document) -> Document:
    return (service["spec"].get("upgradeStrategy") or {}).get("clusterUpgradeOptions") or {}


def _desired(group: Document) -> int:
    """``GetWorkerGroupDesiredReplicas``: pods of a worker group."""
    least, most = group.get("minReplicas", 0), group.get("maxReplicas", 2**31 - 1)
    replicas = min(max(group.get("replicas") or 0, least), most)
    return 0 if group.get("suspend") else int(replicas * group.get("numOfHosts", 1))


def _name(document: Document) -> str:
    return str(document["metadata"]["name"])


def _id(document: Document) -> str:
    return f"{document['metadata']['namespace']}/{_name(document)}"


def _node_type(pod: Document) -> str | None:
    return pod["metadata"]["labels"].get("ray.io/node-type")  # type: ignore[no-any-return]


def _group(pod: Document) -> str | None:
    return pod["metadata"]["labels"].get("ray.io/group")  # type: ignore[no-any-return]


def _owned_by(owner: Document, name: str) -> Document:
    """Metadata of what an owner's controller makes."""
    reference = {key: owner["metadata"][key] for key in ("name", "uid")}
    kind = {"apiVersion": owner.get("apiVersion", "ray.io/v1"), "kind": owner["kind"]}
    return {
        "name": name,
        "namespace": owner["metadata"]["namespace"],
        "ownerReferences": [{**kind, **reference, "controller": True}],
    }


def _made_for(service: Document) -> dict[str, str]:
    crd = "RayService"
    return {"ray.io/originated-from-cr-name": _name(service), "ray.io/originated-from-crd": crd}


def _names(api: KubeAPI, plural: str) -> list[tuple[str, str]]:
    return [(space, name) for kind, space, name in list(api.objects) if kind == plural]


def _telling(status: Document) -> Document:
    """What of a status makes a write (``InconsistentRayServiceStatuses``)."""
    told = {k: v for k, v in status.items() if k not in ("observedGeneration", "lastUpdateTime")}
    for part in ("activeServiceStatus", "pendingServiceStatus"):
        told[part] = {k: v for k, v in (told.get(part) or {}).items() if k != "rayClusterStatus"}
    return _without_empty(told)  # type: ignore[no-any-return]


def _without_empty(value: Any) -> Any:
    """A copy as Go writes it: without fields that hold nothing."""
    if isinstance(value, dict):
        kept = {key: _without_empty(item) for key, item in value.items()}
        return {key: item for key, item in kept.items() if item not in ({}, [], None, "")}
    return [_without_empty(item) for item in value] if isinstance(value, list) else value


def _without_times(api: KubeAPI) -> str:
    """All objects but events, without versions and times, to see whether anything changed."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k not in _TIMES}
        return [strip(item) for item in value] if isinstance(value, list) else value

    return json.dumps([strip(d) for (kind, _, _), d in api.objects.items() if kind != "events"])


_TIMES = {"resourceVersion", "lastUpdateTime", "lastTransitionTime", "lastTrafficMigratedTime"}


def _seconds(stamp: str) -> float:
    return datetime.fromisoformat(stamp).timestamp()
