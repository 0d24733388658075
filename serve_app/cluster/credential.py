"""The internal credential and the headers between gateway and replicas."""

from __future__ import annotations

import secrets

from serve_app.cluster import kv

CREDENTIAL_HEADER = b"x-serve-app-credential"
"""Request header that carries the credential from the gateway to a model server."""

ASLEEP_HEADER = b"x-serve-app-asleep"
"""Response header of a model server that refuses because its engine sleeps."""

_CREDENTIAL_KEY = "internal_credential"


def internal_credential() -> bytes:
    """The cluster's shared secret. The first process that asks makes it; the GCS keeps it.

    It keeps all but the gateway out of the model servers' ports. It is no weaker than Ray itself:
    whoever can read the GCS can run code on the cluster anyway.
    """
    kv.put_first(_CREDENTIAL_KEY, secrets.token_urlsafe(32).encode())
    found = kv.get(_CREDENTIAL_KEY)
    assert found is not None
    return found
