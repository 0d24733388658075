"""The Ray cluster that somebody named on purpose with RAY_ADDRESS, and what it serves already."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from serve_app import addresses
from serve_app.errors import UserError
from serve_app.planner.cluster import recorded_address

_PATIENCE_S = 60.0
"""For a cluster whose port answers; Ray itself would go on trying for minutes."""

_ASK = """
import json, ray
from serve_app.cluster import serve
ray.init(log_to_driver=False, logging_level="ERROR")
report = serve.report()
http = report["http_options"] if report else {}  # only what was set
print(json.dumps([
    ray.get_runtime_context().gcs_address,
    [http.get("host", "127.0.0.1"), http.get("port", 8000)] if report else None,
    sorted(report["applications"]) if report else [],
]))
"""


@dataclass(frozen=True)
class NamedCluster:
    """A cluster that is not ours: the address of its head, and where Serve listens if it runs."""

    host: str
    listens: tuple[str, int] | None


def named_cluster() -> NamedCluster | None:
    """What RAY_ADDRESS names, or None where this run starts a Ray of its own.

    Raises:
        UserError: it does not answer, or serves something already: ``serve run`` would replace
            that, and end it with Ctrl-C.
    """
    given = os.environ.get("RAY_ADDRESS", "").strip()
    if given in ("", "local"):
        return None
    _refuse_dead(given)
    address, listens, applications = _ask(given)
    if applications:
        raise UserError(
            f"the Ray cluster at {given} (RAY_ADDRESS) serves {', '.join(applications)} already, "
            "which this run would replace; add the models there with serve deploy, or unset "
            "RAY_ADDRESS for a Ray of this run's own"
        )
    head = addresses.split(address)
    return NamedCluster(head[0] if head else address, tuple(listens) if listens else None)


def is_here(host: str) -> bool:
    """Whether an address is this machine's."""
    with socket.socket(addresses.family(host)) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
    return True


def _refuse_dead(given: str) -> None:
    if given == "auto":
        given = recorded_address() or ""
        if not given:
            return  # Ray looks for one among the processes, and does not wait
    found = addresses.split(given.rpartition("://")[2])
    if found is None:
        raise UserError(
            f"RAY_ADDRESS is '{given}', which is no address; write host:6379 (an IPv6 address in "
            "brackets), or unset it for a Ray of this run's own"
        )
    try:
        socket.create_connection(found, timeout=5).close()
    except OSError as error:
        raise UserError(_silent(given, str(error.strerror or error))) from None


def _ask(given: str) -> tuple[str, list[Any] | None, list[str]]:
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ASK],
            env={**os.environ, "RAY_ADDRESS": given},
            capture_output=True,
            text=True,
            timeout=_PATIENCE_S,
        )
    except subprocess.TimeoutExpired:
        raise UserError(_silent(given, f"no answer in {_PATIENCE_S:.0f} s")) from None
    if done.returncode:
        if "AuthenticationError" in done.stderr:
            raise UserError(
                f"the Ray cluster at RAY_ADDRESS={given} asks for a token; set RAY_AUTH_MODE=token "
                "and RAY_AUTH_TOKEN to it"
            )
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise UserError(_silent(given, lines[-1] if lines else f"status {done.returncode}"))
    address, listens, applications = json.loads(done.stdout.splitlines()[-1])
    return address, listens, applications


def _silent(given: str, why: str) -> str:
    return (
        f"no Ray cluster answers at RAY_ADDRESS={given} ({why}); correct it, or unset it for a Ray "
        "of this run's own"
    )
