"""The key-value store of the cluster's GCS: what processes of ours tell each other.

It is not public API of Ray: this is the one module that uses it. Keys live until the cluster ends.
"""

from __future__ import annotations

from ray.experimental import internal_kv

_PREFIX = "serve_app/"


def put(key: str, value: bytes) -> None:
    """Store a value, in the place of one that is there."""
    internal_kv._internal_kv_put(_key(key), value, overwrite=True)


def put_first(key: str, value: bytes) -> None:
    """Store a value unless there is one: of several processes the first wins."""
    internal_kv._internal_kv_put(_key(key), value, overwrite=False)


def get(key: str) -> bytes | None:
    """The value, or None where there is none."""
    found: bytes | None = internal_kv._internal_kv_get(_key(key))
    return found


def exists(key: str) -> bool:
    return bool(internal_kv._internal_kv_exists(_key(key)))


def delete(key: str) -> None:
    """Delete a key, if it is there."""
    internal_kv._internal_kv_del(_key(key))


def _key(key: str) -> bytes:
    return (_PREFIX + key).encode()
