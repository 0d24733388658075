"""The API keys' Secret in the gateway's pods: a file that changes with it, or a variable."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from serve_app.config.document import Fleet
from serve_app.config.settings import KeySource
from serve_app.kuberay.render.profile import ClusterProfile

_VOLUME = "api-keys"
_TAKEN = ("/", "/dev", "/dev/shm", "/etc", "/home", "/opt", "/tmp", "/usr", "/var")
"""Folders that a pod needs, and that a mounted Secret would hide."""


def why_unreadable(fleet: Fleet, profile: ClusterProfile) -> str:
    """Why a gateway's pod could not read the keys that the config asks for; empty if it can."""
    source = _source(fleet)
    if source is None:
        return ""
    if profile.keys is None:
        what = source.file or f"the variable {source.secret_env}"
        return (
            f"the gateway's keys are in {what}, which no pod has; name the Secret with them in the "
            "profile, such as keys: {name: serve-app-keys, key: keys.yaml}"
        )
    if source.file:
        path = PurePosixPath(source.file)
        if not path.is_absolute() or ".." in path.parts or str(path.parent) in _TAKEN:
            return (
                f"the gateway's keys.file is {source.file}, but a pod needs an absolute path in a "
                "folder of its own, such as /etc/serve_app/keys.yaml"
            )
    return ""


def why_open(fleet: Fleet, profile: ClusterProfile) -> str:
    """Why the endpoint would be open to strangers; empty if it is not, or is meant to be."""
    ingress = profile.ingress
    public = ingress.kind == "alb" and ingress.scheme == "internet-facing"
    if not public or ingress.public_without_keys or _source(fleet):
        return ""
    return (
        "the profile's ingress is internet-facing, and the gateway asks for no API keys; name them "
        "in the gateway's args (keys: {file: /etc/serve_app/keys.yaml}), or set "
        "public_without_keys: true in the ingress"
    )


def env(fleet: Fleet, profile: ClusterProfile) -> list[Any]:
    """What a gateway's container gets as a variable."""
    source = _source(fleet)
    if source is None or not source.secret_env or profile.keys is None:
        return []
    return [{"name": source.secret_env, **profile.keys.value()}]


def mounts(fleet: Fleet) -> list[dict[str, Any]]:
    """Where a gateway's container has the file."""
    source = _source(fleet)
    if source is None or not source.file:
        return []
    # The folder and not the file alone: Kubernetes never changes a file that is mounted by itself.
    folder = str(PurePosixPath(source.file).parent)
    return [{"name": _VOLUME, "mountPath": folder, "readOnly": True}]


def volumes(fleet: Fleet, profile: ClusterProfile) -> list[dict[str, Any]]:
    """The volume behind :func:`mounts`."""
    source = _source(fleet)
    if source is None or not source.file or profile.keys is None:
        return []
    item = {"key": profile.keys.key, "path": PurePosixPath(source.file).name}
    return [{"name": _VOLUME, "secret": {"secretName": profile.keys.name, "items": [item]}}]


def _source(fleet: Fleet) -> KeySource | None:
    return fleet.gateway.keys if fleet.gateway else None
