"""Serve's controller, and what a deployment of ours needs of Serve."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray


def running_controller() -> Any | None:
    """Serve's controller actor, or None where Serve does not run (``serve build``)."""
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    if not ray.is_initialized():
        return None
    try:
        return ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return None


def runtime_env(env_vars: Mapping[str, str]) -> dict[str, Any]:
    """A deployment's ``runtime_env``: these variables over those of its application.

    Serve builds an application inside of the application's own ``runtime_env``, and passes that on
    to a deployment without one. To a deployment that has one it passes on the ``working_dir`` only.
    """
    own = dict(ray.get_runtime_context().runtime_env) if ray.is_initialized() else {}
    return own | {"env_vars": (own.get("env_vars") or {}) | dict(env_vars)}
