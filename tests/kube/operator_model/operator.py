"""The controller of RayServices, with all that a test runs beside it."""

from __future__ import annotations

import copy
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml
from controllers import OPERATOR, adopt, sync_budgets
from kube_api import KubeAPI
from machines import Machines, is_ready, slices_of

from operator_model import incremental, raycluster, serve, wanted
from operator_model.documents import (
    cluster_name,
    holds,
    id_of,
    is_incremental,
    made_for,
    name_of,
    owned_by,
    part,
)
from operator_model.gateways import Gateways
from operator_model.status import (
    Clock,
    drop_condition,
    record,
    set_condition,
    write,
    write_if_changed,
)

Document = dict[str, Any]


class _Later(Exception):
    """An error of a reconcile: the operator writes no status, and tries again."""


class Operator:
    """The operator, and the machines and Serve that it needs."""

    def __init__(self, api: KubeAPI) -> None:
        self.api = api
        self.machines = Machines(api)
        self.clock = Clock()
        self.outcome = serve.outcome
        """What becomes of an application (see :data:`serve.Outcome`). Tests replace it."""
        self.away = False
        """Whether the operator does not run; machines and Serve go on."""
        self._gateways = Gateways(api)
        self._put: dict[str, str] = {}  # by cluster: the serveConfigV2 that was PUT last
        self._rejected: dict[str, int] = {}  # by uid: a generation that is invalid
        self._delete_at: dict[str, float] = {}  # by cluster that is left over

    def step(self) -> None:
        """One look of every controller."""
        with self.api.lock:
            if not self.away:
                for service in self.api.all("rayservices"):
                    self.reconcile(service["metadata"]["namespace"], name_of(service))
                for cluster in self.api.all("rayclusters"):
                    namespace = cluster["metadata"]["namespace"]
                    raycluster.reconcile(self.api, self.clock, namespace, name_of(cluster))
            self.machines.step()
            sync_budgets(self.api)

    def heal(self) -> None:
        """Let all come up that a test kept from it."""
        self.outcome = serve.outcome
        self.machines.gpus = None
        self.machines.unready.clear()

    def settle(self) -> None:
        """Steps until nothing changes any more but times."""
        seen = [""]
        for _ in range(100):
            seen.append(_without_times(self.api))
            if len(set(seen[-3:])) == 1:  # a PUT is seen a step later only
                return
            self.step()
        raise AssertionError("the operator does not come to rest")

    def reconcile(self, namespace: str, name: str) -> None:
        """One reconcile of a RayService (``Reconcile``)."""
        with self.api.lock:
            service = copy.deepcopy(self.api.get("rayservices", namespace, name))
            if service is None:
                return
            service.setdefault("status", {})
            try:
                if self._has_begun(service) and not self._is_suspended(service):
                    self._bring_up(service)
            except _Later:
                return

    def _has_begun(self, service: Document) -> bool:
        """Whether it has its finalizer and a valid spec, and is not being deleted."""
        namespace, name = service["metadata"]["namespace"], name_of(service)
        left_over = self._clean_up(service)
        if "deletionTimestamp" in service["metadata"]:
            if not left_over:
                service["metadata"]["finalizers"] = []
                self.api.update("rayservices", service, OPERATOR)
            return False
        if not service["metadata"].get("finalizers"):
            adopt(self.api, namespace, name)
            return False
        generation = service["metadata"]["generation"]
        if text := wanted.invalid(service):
            if self._rejected.get(service["metadata"]["uid"]) == generation:
                return False  # it is looked at once, until its spec changes
            self._rejected[service["metadata"]["uid"]] = generation
            self._record(service, "InvalidRayServiceSpec", f"{id_of(service)}: {text}")
            # The status keeps the generation observed before, and so does this condition.
            self._set(service, "Ready", "False", "ValidationFailed", text)
            write(self.api, service, self.clock)
            return False
        return True

    def _clean_up(self, service: Document) -> bool:
        """Delete clusters left over, after their delay (``cleanUpRayClusterInstance``).

        Returns whether there are any.
        """
        deleted = "deletionTimestamp" in service["metadata"]
        delay_s = service["spec"].get("rayClusterDeletionDelaySeconds", 60)
        used = {cluster_name(service, "active"), cluster_name(service, "pending")}
        there = self._made_for(service, "rayclusters")
        left = [cluster for cluster in there if deleted or name_of(cluster) not in used]
        for cluster in left:
            name, now = name_of(cluster), self.clock.now()
            if deleted or now > self._delete_at.setdefault(name, now + delay_s):
                self.api.delete("rayclusters", cluster["metadata"]["namespace"], name)
                self._record(service, "DeletedRayCluster", f"Deleted {id_of(cluster)}", "Normal")
        return bool(left)

    def _is_suspended(self, service: Document) -> bool:
        """The three stages of ``spec.suspend``, and the way back (``handleSuspend``)."""
        asked, status = bool(service["spec"].get("suspend")), service["status"]
        if holds(service, "Suspended"):
            if not asked:
                status["observedGeneration"] = service["metadata"]["generation"]
                self._set(service, "Suspended", "False", "RayServiceResumed", "resumed")
                text = "RayService is initializing after resuming from suspend."
                self._set(service, "Ready", "False", "Initializing", text)
                self._set(service, "UpgradeInProgress", "False", "Initializing", text)
        elif holds(service, "Suspending"):
            owned = [
                (plural, document["metadata"]["namespace"], name_of(document))
                for plural in ("rayclusters", "services")
                for document in self._made_for(service, plural)
            ]
            for key in owned:
                self.api.delete(*key)
            if not owned:  # nor were there any at the look before: their deletion is over
                text = "All owned resources have been deleted."
                self._set(service, "Suspending", "False", "SuspendComplete", text)
                self._set(service, "Suspended", "True", "SuspendComplete", text)
                self._rest(service, "SuspendComplete", "RayService is suspended.")
        elif asked:
            status["observedGeneration"] = service["metadata"]["generation"]
            text = "Spec.Suspend is true; will delete all Kubernetes resources owned by this."
            self._set(service, "Suspending", "True", "SuspendRequested", text)
            self._rest(service, "SuspendInProgress", "RayService is suspending.")
            status |= {"activeServiceStatus": {}, "pendingServiceStatus": {}}
            status |= {"numServeEndpoints": 0, "serviceStatus": ""}
        write_if_changed(self.api, service, self.clock)
        return holds(service, "Suspending") or holds(service, "Suspended")

    def _rest(self, service: Document, reason: str, text: str) -> None:
        self._set(service, "Ready", "False", reason, text)
        self._set(service, "UpgradeInProgress", "False", reason, "No upgrade in progress.")
        self._set(service, "RollbackInProgress", "False", reason, "No rollback in progress.")

    def _bring_up(self, service: Document) -> None:
        """Clusters, Serve, Services, then the status (the second half of ``Reconcile``)."""
        active, pending = self._clusters(service)
        upgrading = is_incremental(service) and holds(service, "UpgradeInProgress")
        if upgrading and active and pending:
            incremental.turn_back(service, self.clock, active, pending)
        for cluster in (active, pending):
            if cluster and raycluster.head_of(self.api, cluster) is None:
                raise _Later(f"found 0 head. cluster name {name_of(cluster)}")
        pending_ready, pending_applications = self._serve(service, pending)
        # Beside a pending cluster the active one is asked in an incremental upgrade only.
        ask = is_incremental(service) if pending else not wanted.needs_new(service, active, None)
        active_ready, active_applications = self._serve(service, active if ask else None)
        weights = (
            incremental.weights(service, self.clock, pending_ready=pending_ready)
            if active and is_incremental(service)
            else None
        )
        selected, target = "", pending if pending_ready and not upgrading else active
        if target and (pending_ready or active_ready):
            selected = self._turn_services(service, target)
        service["status"]["observedGeneration"] = service["metadata"]["generation"]
        self._report(service, "active", active, active_applications)
        self._report(service, "pending", pending, pending_applications)
        if selected and weights:
            incremental.route(service, self.clock, weights, upgrading=bool(pending))
        turned = bool(selected) and selected == cluster_name(service, "pending")
        if selected and self._is_due(service, pending, selected):
            service["status"]["activeServiceStatus"] = part(service, "pending")
            service["status"]["pendingServiceStatus"] = {}
        if holds(service, "RollbackInProgress") and incremental.is_rolled_back(service):
            service["status"]["pendingServiceStatus"] = {}
            pending = None
            drop_condition(service, "RollbackInProgress")
        if wanted.needs_new(service, active, pending, turned=turned):
            self._name_new(service)
        self._conclude(service, active, pending)
        write_if_changed(self.api, service, self.clock)

    def _clusters(self, service: Document) -> tuple[Document | None, Document | None]:
        """The active and the pending RayCluster (``reconcileRayCluster``).

        A pending one that is not there is made. One that is there is written only when groups were
        appended, and then as a whole.
        """
        namespace, name = service["metadata"]["namespace"], cluster_name(service, "pending")
        active = self.api.get("rayclusters", namespace, cluster_name(service, "active"))
        pending = self.api.get("rayclusters", namespace, name)
        if name and pending is None:
            pending = self.api.store("rayclusters", wanted.cluster_of(service, name), OPERATOR)
            self._record(service, "CreatedRayCluster", f"Created {id_of(pending)}", "Normal")
            return active, pending
        if not holds(service, "UpgradeInProgress"):
            active = self._append(service, active)
        return active, self._append(service, pending)

    def _append(self, service: Document, cluster: Document | None) -> Document | None:
        """The cluster with the whole spec, if the spec has more groups (``modifyRayCluster``)."""
        if cluster is None or not wanted.is_appended(service, cluster):
            return cluster
        goal, new = wanted.cluster_of(service, name_of(cluster)), copy.deepcopy(cluster)
        new["spec"] = goal["spec"]
        new["metadata"] |= {key: goal["metadata"][key] for key in ("labels", "annotations")}
        self._record(service, "UpdatedRayCluster", f"Updated {id_of(cluster)}", "Normal")
        return self.api.update("rayclusters", new, OPERATOR)

    def _serve(self, service: Document, cluster: Document | None) -> tuple[bool, Document]:
        """Whether all applications run, and their statuses (``reconcileServe``).

        They are read before a new config is PUT, so those of a new spec come a reconcile later.
        While the head is not Ready there are none.
        """
        head = raycluster.head_of(self.api, cluster) if cluster else None
        if cluster is None or head is None or not is_ready(head):
            return False, {}
        name, config = name_of(cluster), service["spec"]["serveConfigV2"]
        its, waiting = self._gateways.serve_of(cluster), self._gateways.waiting(cluster)
        applications = its.applications(self.outcome, waiting)
        ready = all(app["status"] == "RUNNING" for app in applications.values())
        upgrading = is_incremental(service) and holds(service, "UpgradeInProgress")
        is_active = name == cluster_name(service, "active")
        leaving = is_active != holds(service, "RollbackInProgress")  # it gets no new config
        if (self._put.get(name) != config or not applications) and not (upgrading and leaving):
            try:
                its.put(config)
            except (yaml.YAMLError, KeyError, TypeError) as error:
                text = f"Failed to update serve applications to the RayCluster {id_of(cluster)}"
                self._record(service, "FailedToUpdateServeApplications", f"{text}: {error}")
                raise _Later(text) from None
            self._put[name] = config
            text = f"Updated serve applications to the RayCluster {id_of(cluster)}"
            self._record(service, "UpdatedServeApplications", text, "Normal")
        if upgrading:
            incremental.scale(service, is_active)
        return ready and bool(applications), applications

    def _turn_services(self, service: Document, cluster: Document) -> str:
        """Let the Services select this cluster (``reconcileServicesToReadyCluster``).

        Whether its gateways are Ready is not asked. Returns the cluster's name.
        """
        name, selects = name_of(service), {"ray.io/cluster": name_of(cluster)}
        own = ((service["spec"].get("serveService") or {}).get("spec") or {}).get("ports")
        by_number = [{"name": "serve", "port": 8000, "targetPort": 8000}]
        dashboard = [{"name": "dashboard", "port": 8265, "targetPort": 8265}]
        serving, ports, owner = f"{name}-serve-svc", own or by_number, service
        if is_incremental(service):  # one for each cluster, and every pod has the port
            serving, ports, owner = f"{name_of(cluster)}-serve-svc", by_number, cluster
        for metadata, selector, its_ports in (
            (owned_by(service, f"{name}-head-svc"), {"ray.io/node-type": "head"}, dashboard),
            (owned_by(owner, serving), {"ray.io/serve": "true"}, ports),
        ):
            spec = {"selector": selects | selector, "ports": its_ports}
            there = self.api.get("services", metadata["namespace"], metadata["name"])
            if there is None or there["spec"]["selector"] != spec["selector"]:
                metadata["labels"] = made_for(service)
                document = {"apiVersion": "v1", "kind": "Service", "metadata": metadata}
                self.api.store("services", {**document, "spec": spec}, OPERATOR)
        return name_of(cluster)

    def _report(
        self, service: Document, which: str, cluster: Document | None, applications: Document
    ) -> None:
        """One cluster's part of the status. Without applications it has no field for them."""
        entry = part(service, which)
        entry["rayClusterStatus"] = copy.deepcopy((cluster or {}).get("status") or {})
        entry.pop("applicationStatuses", None)
        if applications:
            entry["applicationStatuses"] = applications

    def _is_due(self, service: Document, pending: Document | None, selected: str) -> bool:
        """Whether to promote the pending cluster (``reconcilePromotionAndServingStatus``)."""
        active = cluster_name(service, "active")
        if not is_incremental(service):
            return active != selected
        if not holds(service, "UpgradeInProgress"):
            return not active and bool(cluster_name(service, "pending"))
        back = holds(service, "RollbackInProgress")
        return pending is not None and not back and incremental.is_complete(service)

    def _name_new(self, service: Document) -> None:
        """A pending cluster, which the next reconcile makes (in ``calculateStatus``)."""
        entry: Document = {"rayClusterName": f"{name_of(service)}-{raycluster.letters()}"}
        if is_incremental(service):
            entry["targetCapacity"] = 0 if cluster_name(service, "active") else 100
        service["status"]["pendingServiceStatus"] = entry

    def _conclude(
        self, service: Document, active: Document | None, pending: Document | None
    ) -> None:
        """Endpoints and conditions (``calculateConditions``).

        Endpoints are the Ready pods behind the Service, also those without its port
        (``calculateNumServeEndpointsFromSlices``).
        """
        status, titles = service["status"], [name_of(service)]
        if is_incremental(service):
            titles = [name_of(cluster) for cluster in (active, pending) if cluster]
        ready = {
            endpoint["targetRef"]["uid"]
            for title in titles
            for found in slices_of(self.api, service["metadata"]["namespace"], f"{title}-serve-svc")
            for endpoint in found["endpoints"]
            if endpoint["conditions"]["ready"]
        }
        if not status.get("conditions"):
            text = "RayService is initializing"
            self._set(service, "Ready", "False", "Initializing", text)
            self._set(service, "UpgradeInProgress", "False", "Initializing", text)
        if ready:
            text = "Number of serve endpoints is greater than 0"
            self._set(service, "Ready", "True", "NonZeroServeEndpoints", text)
        elif holds(service, "Ready"):
            text = "Number of serve endpoints dropped to 0"
            self._set(service, "Ready", "False", "ZeroServeEndpoints", text)
        if cluster_name(service, "active") and cluster_name(service, "pending"):
            text, reason = "Both active and pending Ray clusters", "BothActivePendingClustersExist"
            self._set(service, "UpgradeInProgress", "True", reason, f"{text} exist")
        elif cluster_name(service, "active"):
            text = "Active Ray cluster exists and no pending Ray cluster"
            self._set(service, "UpgradeInProgress", "False", "NoPendingCluster", text)
        status["numServeEndpoints"] = len(ready)
        status["serviceStatus"] = "Running" if holds(service, "Ready") else ""

    def _made_for(self, service: Document, plural: str) -> list[Document]:
        labels = made_for(service).items()
        there = self.api.all(plural, service["metadata"]["namespace"])
        return [d for d in there if labels <= (d["metadata"].get("labels") or {}).items()]

    def _set(self, service: Document, kind: str, status: str, reason: str, message: str) -> None:
        set_condition(service, self.clock, kind, status, reason, message)

    def _record(self, about: Document, reason: str, note: str, kind: str = "Warning") -> None:
        record(self.api, self.clock, about, reason, note, kind)


@contextmanager
def running(operator: Operator, period_s: float = 0.1) -> Iterator[Operator]:
    """Let the operator go on in the background, one step each ``period_s`` seconds.

    Raises:
        Exception: what it raised, when the block has ended.
    """
    ended = threading.Event()
    raised: list[Exception] = []

    def go_on() -> None:
        while not ended.wait(period_s):
            if time.monotonic() < operator.api.away_until:
                continue  # it, too, is a client of the API server
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


_TIMES = {"resourceVersion", "lastUpdateTime", "lastTransitionTime", "lastTrafficMigratedTime"}


def _without_times(api: KubeAPI) -> str:
    """All objects but events, to see whether anything changed."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if key not in _TIMES}
        return [strip(item) for item in value] if isinstance(value, list) else value

    return json.dumps([strip(d) for (plural, _, _), d in api.objects.items() if plural != "events"])
