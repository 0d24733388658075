"""Checks that ask the cluster at hand."""

from __future__ import annotations

import re
from collections.abc import Iterator

from serve_app.check.checklist import gpus_needed
from serve_app.check.inventory import Inventory, Node
from serve_app.config.document import Fleet
from serve_app.config.settings import ModelConfig
from serve_app.errors import UserError, did_you_mean
from serve_app.kuberay.validate.manifests import Document, Manifests, get, pods_of
from serve_app.planner import check_model, front_ends, hardware
from serve_app.planner.finding import Finding
from serve_app.planner.hardware import GPU
from serve_app.planner.vllm import defaults


def on_cluster(
    fleet: Fleet, inventory: Inventory, documents: list[Document] | None
) -> list[Finding]:
    """The same questions, answered by a running cluster."""
    nodes = inventory.nodes()
    about = f"{inventory.kind} cluster"
    total = sum(node.gpus for node in nodes)
    findings = [Finding("cluster", "ok", about, f"{len(nodes)} nodes, {total} GPUs")]
    least, most = gpus_needed(fleet)
    if most:
        elastic = inventory.kind == "Kubernetes"  # Karpenter adds nodes when pods ask
        findings.append(_reach(about, least, most, total, elastic))
    for node in nodes:
        if node.is_head and node.gpus:
            said = f"Ray's head has {node.gpus} GPUs"
            fix = "start it with --num-gpus 0 where other nodes have GPUs"
            findings.append(Finding("head node", "warn", node.name, said, fix))
    findings += _cores(fleet, nodes)
    findings += _gpu_types(fleet, _by_type(nodes), about)
    for name, config in fleet.models.items():
        findings += check_model.too_few_cores(name, config, _with_room(config, nodes))
    if documents is not None:
        findings += _named_by(Manifests(documents), inventory, about)
    return findings


def _reach(about: str, least: int, most: int, there: int, elastic: bool) -> Finding:
    """GPUs that the replicas take, against those that the nodes have."""
    text = f"{least} to {most} GPUs for all replicas, but the nodes give {there}"
    if there >= most:
        text = f"{least} to {most} GPUs for all replicas, and the nodes can give {there}"
        return Finding("cluster", "ok", about, text)
    if there >= least:
        text = f"{text}: the upper bound is out of reach"
        return Finding("cluster", "warn", about, text, "add GPU nodes or lower max_replicas")
    if elastic:
        return Finding("cluster", "warn", about, text, "Karpenter must be able to add them")
    return Finding("cluster", "fail", about, text, "add GPU nodes or lower min_replicas")


def _cores(fleet: Fleet, nodes: list[Node]) -> Iterator[Finding]:
    """Replicas that no node has the cores for."""
    cores = [node.cpus for node in nodes if node.cpus is not None]
    for name, config in fleet.models.items():
        asked = config.resources.num_cpus
        if cores and asked > max(cores):
            said = f"resources.num_cpus is {asked:g}, and the largest node has {max(cores):g}"
            yield Finding("cluster", "fail", name, said, "lower it")


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
        sizes = [n for kind, n in there.items() if _is(kind, gpu, asked)]
        tensor = defaults.parallelism(config.engine).tensor
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


def _with_room(config: ModelConfig, nodes: list[Node]) -> dict[str, front_ends.Node]:
    """The nodes with GPUs for a replica, or for a tensor-parallel group of it, by name."""
    asked, needed = config.resources.accelerator_type, config.tensor_parallel_size
    if config.resources.device == "cpu":
        fitting = nodes
    elif asked is None:
        fitting = [node for node in nodes if node.gpus >= needed]
    else:
        try:
            gpu, _ = hardware.find(asked)
        except UserError:
            return {}  # for which there is another finding
        of_type = [n for n in nodes if n.gpu_type and _is(n.gpu_type, gpu, asked)]
        fitting = [node for node in of_type if node.gpus >= needed]
    return {node.name: front_ends.Node(node.cores, node.gpus) for node in fitting if node.cores}


def _is(kind: str, gpu: GPU, asked: str) -> bool:
    """Whether a node's type of GPU, by whichever name, is the one that a config asks for."""
    same = {asked.lower(), gpu.name.lower(), (gpu.ec2_name or "").lower()}
    return _plain(kind) in same or kind.lower() in same


def _plain(kind: str) -> str:
    """``NVIDIA-H100-80GB-HBM3`` as ``h100``."""
    found = re.search(r"(?:^|[-_ ])((?:rtx|[a-z]{1,2})[-_ ]?\d+[a-z]*)", kind.lower())
    return found[1] if found else kind.lower()


def _named_by(manifests: Manifests, inventory: Inventory, about: str) -> Iterator[Finding]:
    """Secrets, classes and resources that the manifests name."""
    there, classes = inventory.secrets(), inventory.classes()
    if there is not None:
        references = (
            get(entry, "valueFrom.secretKeyRef.name")
            for service in manifests.services
            for pods in pods_of(service)
            for _, entry in pods.env
        )
        named = {str(name) for name in references if name}
        for name in sorted(named - there):
            said = f"the secret '{name}' does not exist"
            yield Finding("secrets", "fail", about, said, f"kubectl create secret generic {name} …")
        if named and named <= there:
            yield Finding("secrets", "ok", about, f"{', '.join(sorted(named))} exist")
    if classes is None:
        return
    if "CRD/rayservices.ray.io" not in classes:
        said = "the RayService resource is not installed"
        yield Finding("cluster", "fail", about, said, "install the KubeRay operator")
    for claim in manifests.of_kind("PersistentVolumeClaim"):
        wanted = get(claim, "spec.storageClassName")
        if wanted and f"StorageClass/{wanted}" not in classes:
            said = f"the storage class '{wanted}' does not exist"
            yield Finding("cluster", "fail", about, said, "create it, or name another in the claim")
