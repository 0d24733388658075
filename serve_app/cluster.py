"""What every process of one cluster shares: the internal credential, and Serve's own report."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any

import ray
from ray.experimental import internal_kv

CREDENTIAL_HEADER = b"x-serve-app-credential"
"""Request header that carries the credential from the gateway to a model server."""

ASLEEP_HEADER = b"x-serve-app-asleep"
"""On a model server's refusal of a request: its engine sleeps, another replica's may not."""

_CREDENTIAL_KEY = b"serve_app/internal_credential"


def internal_credential() -> bytes:
    """The cluster's shared secret: made by whoever asks first, kept in the GCS.

    It keeps anything but the gateway out of the model servers' ports. Whoever can read the
    GCS can run code on the cluster anyway, so it is no weaker than Ray itself.
    """
    internal_kv._internal_kv_put(
        _CREDENTIAL_KEY, secrets.token_urlsafe(32).encode(), overwrite=False
    )
    found: bytes = internal_kv._internal_kv_get(_CREDENTIAL_KEY)
    return found


def controller() -> Any | None:
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
