"""The Ray cluster that RAY_ADDRESS names, and what it already serves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from serve_app import addresses
from serve_app.cluster import head
from serve_app.errors import UserError

_PATIENCE_S = 60.0
"""Seconds that a cluster has to answer once its port does. Ray itself would try for minutes."""

_ASK = """
import json, ray
from serve_app.cluster import serve
ray.init(log_to_driver=False, logging_level="ERROR")
report = serve.report()  # of the options only what was set
print(json.dumps([
    ray.get_runtime_context().gcs_address,
    {"host": "127.0.0.1", "port": 8000} | report["http_options"] if report else None,
    sorted(report["applications"]) if report else [],
]))
"""


@dataclass(frozen=True)
class NamedCluster:
    """A cluster that this run did not start: its head's address, and its Serve's options if any."""

    host: str
    http_options: dict[str, Any] | None


def address() -> str | None:
    """The address in RAY_ADDRESS; None where a run starts a Ray of its own."""
    given = os.environ.get("RAY_ADDRESS", "").strip()
    return None if given in ("", "local") else given


def named_cluster() -> NamedCluster | None:
    """The cluster that RAY_ADDRESS names; None where this run starts a Ray of its own.

    Raises:
        UserError: the cluster does not answer, or already serves something, which ``serve run``
            would replace and Ctrl-C would end.
    """
    given = address()
    if given is None:
        return None
    try:
        head.refuse_gone(given, "RAY_ADDRESS")
        gcs, http_options, applications = _ask(given)
    except UserError as error:
        raise UserError(f"{error}, or unset it for a Ray of this run's own") from None
    if applications:
        raise UserError(
            f"the Ray cluster at {given} (RAY_ADDRESS) serves {', '.join(applications)} already, "
            "which this run would replace; add the models there with serve deploy, or unset "
            "RAY_ADDRESS for a Ray of this run's own"
        )
    found = addresses.split(gcs)
    return NamedCluster(found[0] if found else gcs, http_options)


def _ask(given: str) -> tuple[str, dict[str, Any] | None, list[str]]:
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ASK],
            env={**os.environ, "RAY_ADDRESS": given},
            capture_output=True,
            text=True,
            timeout=_PATIENCE_S,
        )
    except subprocess.TimeoutExpired:
        why = f"no answer in {_PATIENCE_S:.0f} s"
        raise head.silent(given, "RAY_ADDRESS", why) from None
    if done.returncode:
        if "AuthenticationError" in done.stderr:
            raise UserError(
                f"the Ray cluster at RAY_ADDRESS={given} asks for a token; set RAY_AUTH_MODE=token "
                "and RAY_AUTH_TOKEN to it"
            )
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise head.silent(given, "RAY_ADDRESS", lines[-1] if lines else f"status {done.returncode}")
    address, http_options, applications = json.loads(done.stdout.splitlines()[-1])
    return address, http_options, applications
