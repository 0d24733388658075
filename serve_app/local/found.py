"""The server that a command means that names none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serve_app import addresses
from serve_app.cluster.connection import Connection, at_hand, by_environment
from serve_app.config.document import GATEWAY_IMPORT_PATH
from serve_app.errors import UserError
from serve_app.local import instance, runs
from serve_app.local.endpoint import Endpoint
from serve_app.local.runs import Run

NOTHING = "nothing is served here; start it: serve-app run CONFIG"


@dataclass(frozen=True)
class Server:
    """What serves on this machine or at RAY_ADDRESS: a ``serve-app run``, or another Ray."""

    run: Run | None
    connection: Connection | None
    """None for a run whose Ray has not started yet."""

    def reached(self) -> Connection:
        """The way to its Ray.

        Raises:
            UserError: its Ray has not started yet.
        """
        if self.connection is None:
            raise UserError("its Ray has not started yet; try again in a few seconds")
        return self.connection

    def endpoint(self, details: Mapping[str, Any]) -> Endpoint:
        """Where it answers, by Serve's report ``details`` if it is no run of ours."""
        if self.run is not None:
            return self.run.endpoint
        options = details.get("http_options") or {}
        host = str(options.get("host") or "127.0.0.1")
        head = addresses.split(self.reached().address.rpartition("://")[2])
        if (
            head
            and host in ("0.0.0.0", "::", addresses.ANY_IPV6)
            and not addresses.is_here(head[0])
        ):
            host = head[0]
        return Endpoint(host, int(options.get("port") or 8000))


def failed_gateway(server: Server) -> str:
    """Why no gateway of a server came up, which then cannot tell it; empty while one may."""
    if server.connection is None:
        return ""
    try:
        details = server.connection.serve().get_serve_details()
    except (UserError, OSError, RuntimeError):  # Ray is starting, or ending
        return ""
    from serve_app.cluster import serve

    for application in serve.applications(details).values():
        if (
            application.import_path == GATEWAY_IMPORT_PATH
            and application.status == "DEPLOY_FAILED"
            and not any(replica.state == "RUNNING" for replica in application.replicas)
        ):
            return application.message or "Serve gives no reason"
    return ""


def server(port: int | None = None) -> Server:
    """That of ``port``, of RAY_ADDRESS, the one ``serve-app run`` here, or the one Ray here.

    Raises:
        UserError: there is none, or there are several.
    """
    found = here(port)
    if found is None:
        raise UserError(NOTHING)
    return found


def here(port: int | None = None) -> Server | None:
    """As :func:`server`, with None where there is none."""
    all_runs = runs.running(instance.bases())
    if port is not None:
        chosen = [run for run in all_runs if run.port == port]
        if not chosen:
            there = ", ".join(str(run.port) for run in all_runs) or "none"
            raise UserError(f"no serve-app run has port {port} here (ports: {there})")
        return of(chosen[0])
    if named := by_environment():  # also after `eval "$(serve-app env)"`
        ours = next((run for run in all_runs if run.gcs == named.address), None)
        return of(ours) if ours else Server(None, named)
    if len(all_runs) > 1:
        ports = ", ".join(str(run.port) for run in all_runs)
        raise UserError(f"{len(all_runs)} servers run here; name one by --port (ports: {ports})")
    if all_runs:
        return of(all_runs[0])
    connection = at_hand()
    return Server(None, connection) if connection else None


def of(run: Run) -> Server:
    """The server of a ``serve-app run``."""
    gcs = run.gcs
    return Server(run, Connection(gcs, f"of serve-app run, port {run.port}") if gcs else None)
