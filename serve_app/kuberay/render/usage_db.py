"""The usage database's address in the gateways' pods: a variable, from a Secret."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from serve_app.config.document import Fleet
from serve_app.config.settings import UsageDb
from serve_app.kuberay.render.profile import ClusterProfile


def why_unreachable(fleet: Fleet, profile: ClusterProfile) -> str:
    """Why the usage would get lost, or its password be seen; empty if neither."""
    source = _source(fleet)
    if source is None:
        return ""
    named = (
        "usage_db: {secret_env: USAGE_DB}, and in the profile the Secret with the URL, such as "
        "usage_db: {name: serve-app-usage, key: url}"
    )
    if source.secret_env:
        if profile.usage_db:
            return ""
        return (
            f"the gateway's usage_db is in the variable {source.secret_env}, which no pod has; "
            "name in the profile the Secret with it, such as usage_db: {name: serve-app-usage, "
            "key: url}"
        )
    url = urlsplit(source.url or "")
    if url.scheme == "sqlite":
        return (
            "the gateway's usage_db is an SQLite file, which goes with its pod; give it a "
            f"PostgreSQL: {named}"
        )
    if url.password:
        return f"the gateway's usage_db has a password in plain text; write {named}"
    return ""


def env(fleet: Fleet, profile: ClusterProfile) -> list[Any]:
    """What a gateway's container gets as a variable."""
    source = _source(fleet)
    if source is None or not source.secret_env or profile.usage_db is None:
        return []
    return [{"name": source.secret_env, **profile.usage_db.value()}]


def _source(fleet: Fleet) -> UsageDb | None:
    return fleet.gateway.usage_db if fleet.gateway else None
