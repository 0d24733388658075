"""The names and labels of a fleet's objects on a cluster."""

from __future__ import annotations

from serve_app.config.document import Fleet

MAX_NAME = 47
"""Most letters of a RayService's name. KubeRay appends to it, and a Service's name may have 63."""

ROLE_LABEL = "serve-app/role"
"""Label of pods, and of Ray nodes: ``head``, ``gateway``, ``gpu`` or ``cpu``."""

PART_OF = {"app.kubernetes.io/part-of": "serve-app"}
"""Label of everything rendered. What several fleets share has no other."""


def instance_name(fleet: Fleet) -> str:
    """The RayService's name, which is the config file's."""
    return fleet.path.stem.replace("_", "-").replace(".", "-").lower()


def labels(name: str, role: str | None = None) -> dict[str, str]:
    """Labels of what one fleet has. They survive upgrades; ``ray.io/cluster`` does not."""
    stable = PART_OF | {"app.kubernetes.io/instance": name}
    return stable | ({ROLE_LABEL: role} if role else {})
