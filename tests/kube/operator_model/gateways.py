"""Serve of every cluster, and what its gateway answers through the Service."""

from __future__ import annotations

import json
from typing import Any

from kube_api import KubeAPI

from operator_model.documents import label, name_of
from operator_model.raycluster import head_of, pods_of
from operator_model.serve import Serve

Document = dict[str, Any]


class Gateways:
    """Each head's Serve, behind the API server's Service proxy."""

    def __init__(self, api: KubeAPI) -> None:
        self._api = api
        self._serves: dict[str, Serve] = {}
        api.proxy = self.answer

    def serve_of(self, cluster: Document) -> Serve:
        """A cluster's Serve: it dies with the head's pod, unless Redis keeps its state."""
        head = head_of(self._api, cluster)
        keeper = cluster if head is None or "gcsFaultToleranceOptions" in cluster["spec"] else head
        return self._serves.setdefault(keeper["metadata"]["uid"], Serve())

    def waiting(self, cluster: Document) -> set[bool]:
        """For what pods without a machine are missing: models (True), the gateway (False)."""
        return {
            pod["metadata"]["labels"].get("serve-app/role") != "gateway"
            for pod in pods_of(self._api, cluster)
            if label(pod, "node-type") == "worker" and not pod["spec"].get("nodeName")
        }

    def answer(self, method: str, service: str, path: str, body: Any) -> tuple[int, str]:
        """What the cluster that a Service selects answers to a request for a model."""
        name, model = service.partition(":")[0], str((body or {}).get("model"))
        with self._api.lock:
            selectors = [
                (s["metadata"]["namespace"], s["spec"]["selector"]["ray.io/cluster"])
                for s in self._api.all("services")
                if name_of(s) == name
            ]
            clusters = [self._api.get("rayclusters", *selector) for selector in selectors]
            serve = next((self.serve_of(cluster) for cluster in clusters if cluster), None)
            if serve is None:
                return 404, json.dumps({"kind": "Status", "message": f"{name} not found"})
            if model not in serve:
                error = {"message": f"The model '{model}' does not exist"}
                return 404, json.dumps({"error": error | {"code": "model_not_found"}})
            if not serve.answers(model):
                return 503, json.dumps({"error": {"message": f"{model} has no replica"}})
        return 200, "{}"
