"""What things of a fleet are called on a cluster, and the labels by which they are found."""

from __future__ import annotations

from serve_app.config.document import Fleet

MAX_NAME = 47
"""Letters of a RayService's name: KubeRay appends to it, and a Service may have 63."""

ROLE_LABEL = "serve-app/role"
"""Label of pods, and of Ray nodes: ``head``, ``gateway``, ``gpu`` or ``cpu``."""


def instance_name(fleet: Fleet) -> str:
    """The RayService's name: the config file's."""
    return fleet.path.stem.replace("_", "-").replace(".", "-").lower()


def labels(name: str, role: str | None = None) -> dict[str, str]:
    """Labels that stay the same over upgrades; ``ray.io/cluster`` does not."""
    stable = {
        "app.kubernetes.io/part-of": "serve-app",
        "app.kubernetes.io/instance": name,
    }
    return stable | ({ROLE_LABEL: role} if role else {})
