"""What a cluster at hand has: nodes, GPUs, secrets, classes. Ray or Kubernetes, behind one seam.

Each reader is one question to a tool that an operator has anyway: Ray's own client for a running
Ray cluster, ``kubectl`` for Kubernetes.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from serve_app.errors import UserError, first_line
from serve_app.kuberay.validate.manifests import amount
from serve_app.local import found


@dataclass(frozen=True)
class Node:
    """A machine of the cluster. ``gpu_type`` is Ray's or the EC2 name, where it is known."""

    name: str
    gpus: int
    is_head: bool = False
    gpu_type: str | None = None
    cores: float = 0.0
    """CPU cores that it gives to replicas; 0 where it does not say."""
    cpus: float | None = None
    """Cores, where no further node will come."""


class Inventory(Protocol):
    """What a cluster has."""

    kind: str

    def nodes(self) -> list[Node]: ...

    def secrets(self) -> set[str] | None:
        """Names of secrets in the current namespace; None where there are none to ask for."""

    def classes(self) -> set[str] | None:
        """Storage classes and custom resources, as ``StorageClass/gp3``; None as above."""


class RayInventory:
    """The Ray cluster of ``RAY_ADDRESS``, or that of this machine."""

    kind = "Ray"

    def __init__(self, raw_nodes: list[dict[str, Any]]) -> None:
        self._nodes = raw_nodes
        # As serve_app.cluster.capacity.may_grow: KubeRay and `ray up` name their groups.
        self._grows = any("ray.io/node-group" in (n.get("Labels") or {}) for n in raw_nodes)

    @classmethod
    def connect(cls) -> RayInventory:
        """Raises UserError where no Ray cluster answers."""
        server = found.here()
        if server is None:
            raise UserError("no Ray runs here")
        with server.reached().entered():
            import ray

            return cls(ray.nodes())

    def nodes(self) -> list[Node]:
        found = []
        for raw in self._nodes:
            if not raw.get("Alive", raw.get("alive", True)):
                continue
            resources = raw.get("Resources") or {}
            types = [
                key.removeprefix("accelerator_type:")
                for key in resources
                if key.startswith("accelerator_type:")
            ]
            found.append(
                Node(
                    name=str(raw.get("NodeManagerHostname") or raw.get("NodeID")),
                    gpus=int(resources.get("GPU", 0)),
                    is_head="node:__internal_head__" in resources,
                    gpu_type=types[0] if types else None,
                    cores=float(resources.get("CPU", 0)),
                    cpus=None if self._grows else resources.get("CPU", 0.0),
                )
            )
        return found

    def secrets(self) -> set[str] | None:
        return None

    def classes(self) -> set[str] | None:
        return None


class KubernetesInventory:
    """The cluster of the current ``kubectl`` context."""

    kind = "Kubernetes"

    def __init__(self, get: Callable[[str], list[dict[str, Any]]]) -> None:
        self._get = get

    @classmethod
    def connect(cls) -> KubernetesInventory:
        """Raises UserError where ``kubectl`` is missing or its context does not answer."""
        if shutil.which("kubectl") is None:
            raise UserError("kubectl is not installed")
        inventory = cls(_kubectl)
        inventory.nodes()
        return inventory

    def nodes(self) -> list[Node]:
        found = []
        for item in self._get("nodes"):
            labels = (item.get("metadata") or {}).get("labels") or {}
            allocatable = (item.get("status") or {}).get("allocatable") or {}
            gpu = labels.get("karpenter.k8s.aws/instance-gpu-name") or labels.get(
                "nvidia.com/gpu.product"
            )
            found.append(
                Node(
                    name=str((item.get("metadata") or {}).get("name")),
                    gpus=int(str(allocatable.get("nvidia.com/gpu") or 0)),
                    gpu_type=gpu,
                    cores=amount(allocatable.get("cpu")) or 0.0,
                )
            )
        return found

    def secrets(self) -> set[str] | None:
        return {str(item["metadata"]["name"]) for item in self._get("secrets")}

    def classes(self) -> set[str] | None:
        return {
            f"{kind}/{item['metadata']['name']}"
            for resource, kind in (
                ("storageclasses", "StorageClass"),
                ("customresourcedefinitions", "CRD"),
            )
            for item in self._get(resource)
        }


def at_hand() -> Inventory:
    """That of the cluster to ask: Ray's if one answers, else Kubernetes'.

    Raises:
        UserError: neither answers, with what each said.
    """
    problems = []
    for connect in (RayInventory.connect, KubernetesInventory.connect):
        try:
            return connect()
        except UserError as error:
            problems.append(str(error))
    raise UserError(f"no cluster at hand: {'; '.join(problems)}")


def _kubectl(resource: str) -> list[dict[str, Any]]:
    try:
        done = subprocess.run(
            ["kubectl", "get", resource, "-o", "json", "--request-timeout=10s"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"kubectl get {resource}: {first_line(error)}") from None
    if done.returncode:
        raise UserError(f"kubectl get {resource}: {_last_line(done.stderr)}")
    items: list[dict[str, Any]] = json.loads(done.stdout).get("items") or []
    return items


def _last_line(text: str) -> str:
    """kubectl logs its retries first and says what was wrong last."""
    return (text.strip().splitlines() or ["no reason given"])[-1][:200]
