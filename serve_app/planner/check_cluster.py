"""Checks that ask the cluster at hand."""

from __future__ import annotations

import re
from collections.abc import Iterator

from serve_app.config.document import Fleet
from serve_app.errors import UserError, did_you_mean
from serve_app.planner import hardware
from serve_app.planner.check_deployment import gpus_needed, reach
from serve_app.planner.cluster import Cluster, Node
from serve_app.planner.finding import Finding
from serve_app.planner.manifests import Manifests
from serve_app.planner.vllm import defaults as engine_module


def on_cluster(fleet: Fleet, cluster: Cluster, manifests: Manifests | None) -> list[Finding]:
    """The same questions, answered by a running cluster."""
    nodes = cluster.nodes()
    about = f"{cluster.kind} cluster"
    findings = [
        Finding(
            "cluster",
            "ok",
            about,
            f"{len(nodes)} nodes, {sum(node.gpus for node in nodes)} GPUs",
        )
    ]
    least, most = gpus_needed(fleet)
    total = sum(node.gpus for node in nodes)
    if most:
        text = f"{least} to {most} GPUs for all replicas"
        elastic = cluster.kind == "Kubernetes"  # Karpenter adds nodes when pods ask
        finding = reach("cluster", about, least, most, total, text)
        if elastic and finding.status == "fail":
            finding = Finding(
                "cluster", "warn", about, finding.message, "Karpenter must be able to add them"
            )
        findings.append(finding)
    for node in nodes:
        if node.is_head and node.gpus:
            findings.append(
                Finding(
                    "head node",
                    "warn",
                    node.name,
                    f"Ray's head has {node.gpus} GPUs",
                    "start it with --num-gpus 0 where other nodes have GPUs",
                )
            )
    findings += _gpu_types(fleet, _by_type(nodes), about)
    findings += _cluster_secrets(cluster, manifests, about)
    return findings


def _by_type(nodes: list[Node]) -> dict[str, int]:
    """The most GPUs that one node of each type has."""
    found: dict[str, int] = {}
    for node in nodes:
        if node.gpus and node.gpu_type:
            found[node.gpu_type] = max(found.get(node.gpu_type, 0), node.gpus)
    return found


def _gpu_types(fleet: Fleet, there: dict[str, int], about: str) -> Iterator[Finding]:
    for name, config in fleet.models.items():
        asked = config.resources.accelerator_type
        if asked is None or config.resources.device == "cpu":
            continue
        try:
            gpu, _ = hardware.find(asked)
        except UserError as error:
            yield Finding("cluster", "fail", name, str(error), None)
            continue
        same = {asked.lower(), gpu.name.lower(), (gpu.ec2_name or "").lower()}
        sizes = [n for kind, n in there.items() if _plain(kind) in same or kind.lower() in same]
        tensor = engine_module.parallelism(config.engine).tensor
        if not sizes:
            hint = did_you_mean(asked, there)
            yield Finding(
                "cluster",
                "warn",
                name,
                f"no node with {asked} is up{hint}",
                f"it must be able to start one ({about} has: {', '.join(there) or 'none'})",
            )
        elif max(sizes) < tensor:
            yield Finding(
                "cluster",
                "fail",
                name,
                f"TP {tensor} needs that many {asked} on one node, the largest has {max(sizes)}",
                "use larger machines, or pipeline_parallel_size",
            )


def _plain(kind: str) -> str:
    """``NVIDIA-H100-80GB-HBM3`` as ``h100``."""
    found = re.search(r"(?:^|[-_ ])((?:rtx|[a-z]{1,2})[-_ ]?\d+[a-z]*)", kind.lower())
    return found[1] if found else kind.lower()


def _cluster_secrets(
    cluster: Cluster, manifests: Manifests | None, about: str
) -> Iterator[Finding]:
    if manifests is None:
        return
    there, classes = cluster.secrets(), cluster.classes()
    if there is not None:
        named = {
            str(reference.get("name"))
            for pod in manifests.pods()
            for _, entry in pod.env()
            for reference in [(entry.get("valueFrom") or {}).get("secretKeyRef") or {}]
            if reference.get("name")
        }
        for name in sorted(named - there):
            yield Finding(
                "secrets",
                "fail",
                about,
                f"the secret '{name}' does not exist",
                f"kubectl create secret generic {name} …",
            )
        if named and named <= there:
            yield Finding("secrets", "ok", about, f"{', '.join(sorted(named))} exist")
    if classes is not None:
        if "CRD/rayservices.ray.io" not in classes:
            yield Finding(
                "cluster",
                "fail",
                about,
                "the RayService resource is not installed",
                "install the KubeRay operator",
            )
        for claim in manifests.of_kind("PersistentVolumeClaim"):
            wanted = (claim.get("spec") or {}).get("storageClassName")
            if wanted and f"StorageClass/{wanted}" not in classes:
                yield Finding(
                    "cluster",
                    "fail",
                    about,
                    f"the storage class '{wanted}' does not exist",
                    "create it, or name another in the claim",
                )
