"""What the operator and Kubernetes' own controllers do, as they were seen to do it.

Each function is one step of one controller against the stand-in (kube_api.py), which a test takes
when it wants to. Seen on Kubernetes 1.34 with KubeRay 1.7.
"""

from __future__ import annotations

import copy
from typing import Any

from kube_api import KubeAPI

Document = dict[str, Any]

OPERATOR = "kuberay-operator"


def adopt(api: KubeAPI, namespace: str, name: str) -> None:
    """The operator's first look at a RayService: it adds its finalizer.

    It does so by an Update of its typed object, which also writes the structs that Go cannot leave
    out. What such a struct changes, the operator owns from then on: a list as a whole.
    """
    service = copy.deepcopy(api.objects["rayservices", namespace, name])
    if service["metadata"].get("finalizers"):
        return
    service["metadata"]["finalizers"] = ["ray.io/rayservice-finalizer"]
    for group in service["spec"]["rayClusterConfig"].get("workerGroupSpecs") or []:
        group.setdefault("scaleStrategy", {})
    if "serveService" in service["spec"]:
        status = service["spec"]["serveService"].setdefault("status", {})
        status.setdefault("loadBalancer", {})
    api.update("rayservices", service, OPERATOR)
