"""What gateway and replicas share: the internal credential, and the headers between them."""

from __future__ import annotations

import secrets

from serve_app.cluster import kv

CREDENTIAL_HEADER = b"x-serve-app-credential"
"""Request header that carries the credential from the gateway to a model server."""

ASLEEP_HEADER = b"x-serve-app-asleep"
"""On a model server's refusal of a request: its engine sleeps, another replica's may not."""

_CREDENTIAL_KEY = "internal_credential"


def internal_credential() -> bytes:
    """The cluster's shared secret: made by whoever asks first, kept in the GCS.

    It keeps anything but the gateway out of the model servers' ports. Whoever can read the
    GCS can run code on the cluster anyway, so it is no weaker than Ray itself.
    """
    kv.put_first(_CREDENTIAL_KEY, secrets.token_urlsafe(32).encode())
    found = kv.get(_CREDENTIAL_KEY)
    assert found is not None
    return found
