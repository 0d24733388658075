"""The key-value store of Ray's GCS, by which our processes exchange small values.

It is a private API of Ray, and this is the only module that uses it. Keys live until the cluster
ends.
"""

from __future__ import annotations

from ray.experimental import internal_kv

_PREFIX = "serve_app/"


def put(key: str, value: bytes) -> None:
    """Store a value; replace an existing one."""
    internal_kv._internal_kv_put(_key(key), value, overwrite=True)


def put_first(key: str, value: bytes) -> None:
    """Store a value unless the key exists: of several processes the first wins."""
    internal_kv._internal_kv_put(_key(key), value, overwrite=False)


def get(key: str) -> bytes | None:
    """The value, or None where there is none."""
    found: bytes | None = internal_kv._internal_kv_get(_key(key))
    return found


def exists(key: str) -> bool:
    return bool(internal_kv._internal_kv_exists(_key(key)))


def delete(key: str) -> None:
    """Delete a key, if it exists."""
    internal_kv._internal_kv_del(_key(key))


def _key(key: str) -> bytes:
    return (_PREFIX + key).encode()
