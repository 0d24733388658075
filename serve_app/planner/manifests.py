"""The rendered Kubernetes documents of a config, as far as the checklist needs them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_app.config import yaml_files
from serve_app.errors import ConfigError

Document = dict[str, Any]


@dataclass(frozen=True)
class Pod:
    """A pod template of a RayService: the head's or a worker group's."""

    name: str
    is_head: bool
    spec: Document

    @property
    def containers(self) -> list[Document]:
        return [c for c in self.spec.get("containers") or [] if isinstance(c, dict)]

    @property
    def gpus(self) -> int:
        return sum(
            int(str(limits.get("nvidia.com/gpu") or 0))
            for container in self.containers
            for limits in [_mapping(_mapping(container.get("resources")).get("limits"))]
        )

    @property
    def shm_bytes(self) -> int | None:
        """Size of /dev/shm: a memory-backed volume's limit, None where none is mounted there."""
        mounted = {
            mount.get("name")
            for container in self.containers
            for mount in container.get("volumeMounts") or []
            if mount.get("mountPath") == "/dev/shm"
        }
        for volume in self.spec.get("volumes") or []:
            if volume.get("name") in mounted:
                empty = _mapping(volume.get("emptyDir"))
                limit = empty.get("sizeLimit")
                # Without a limit a memory volume may take half of the node's memory.
                return quantity_bytes(str(limit)) if limit else 1 << 62
        return None

    @property
    def persistent_mounts(self) -> list[str]:
        """Paths that outlive the pod."""
        kept = {
            volume.get("name")
            for volume in self.spec.get("volumes") or []
            if any(kind in volume for kind in ("persistentVolumeClaim", "hostPath", "csi", "nfs"))
        }
        return [
            str(mount.get("mountPath"))
            for container in self.containers
            for mount in container.get("volumeMounts") or []
            if mount.get("name") in kept
        ]

    def env(self) -> Iterator[tuple[str, Document]]:
        for container in self.containers:
            for entry in container.get("env") or []:
                if isinstance(entry, dict):
                    yield str(entry.get("name")), entry


@dataclass(frozen=True)
class Manifests:
    """What was found beside a config."""

    folder: Path
    documents: tuple[Document, ...]

    def of_kind(self, *kinds: str) -> list[Document]:
        return [document for document in self.documents if document.get("kind") in kinds]

    @property
    def ray_cluster(self) -> Document:
        for service in self.of_kind("RayService"):
            return _mapping(_mapping(service.get("spec")).get("rayClusterConfig"))
        return {}

    def pods(self) -> list[Pod]:
        cluster = self.ray_cluster
        pods = []
        head = _mapping(cluster.get("headGroupSpec"))
        if head:
            pods.append(Pod("head", True, _pod_spec(head)))
        for group in cluster.get("workerGroupSpecs") or []:
            if isinstance(group, dict):
                pods.append(Pod(str(group.get("groupName")), False, _pod_spec(group)))
        return pods

    def gpu_limit(self) -> int:
        """GPUs that the worker groups can grow to."""
        total = 0
        for group in self.ray_cluster.get("workerGroupSpecs") or []:
            pods = int(group.get("maxReplicas") or 0) * int(group.get("numOfHosts") or 1)
            total += pods * Pod("", False, _pod_spec(group)).gpus
        return total


def find(config: Path, given: Path | None) -> Manifests | None:
    """The documents under ``given``, else those that `serve-app render` puts beside a config."""
    folder = given or config.resolve().parent.parent / "kuberay" / config.stem
    if not folder.exists():
        if given is not None:
            raise ConfigError(f"{given}: no such file or folder of manifests")
        return None
    files = [folder] if folder.is_file() else sorted(folder.rglob("*.yaml"))
    # Monitoring is shared by all configs: rendered once, beside them.
    if folder.is_dir() and given is None:
        shared = [p for p in folder.parent.rglob("*.yaml") if "monitoring" in str(p.parent)]
        files += [p for p in shared if p not in files]
    documents: list[Document] = []
    for file in files:
        documents += [found for found in yaml_files.read_all(file) if isinstance(found, dict)]
    return Manifests(folder, tuple(documents))


_SUFFIXES = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40,
             "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}  # fmt: skip


def quantity_bytes(text: str) -> int:
    """A Kubernetes quantity in bytes; 0 for one that cannot be read."""
    for suffix, factor in _SUFFIXES.items():
        if text.endswith(suffix):
            text, scale = text.removesuffix(suffix), factor
            break
    else:
        scale = 1
    try:
        return int(float(text) * scale)
    except ValueError:
        return 0


def _pod_spec(group: Document) -> Document:
    return _mapping(_mapping(group.get("template")).get("spec"))


def _mapping(value: Any) -> Document:
    return value if isinstance(value, dict) else {}
