"""``serve-app status`` of a server on this machine, or of the one at RAY_ADDRESS."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from serve_app.config.document import MODEL_IMPORT_PATH
from serve_app.errors import UserError, did_you_mean
from serve_app.local import found
from serve_app.local.found import Server

if TYPE_CHECKING:
    from serve_app.cluster.serve import Application

_COLORS = {"ready": "green", "failed": "red"}


def show(server: Server, console: Console, only: str | None = None) -> bool:
    """Print the address, each model (or ``only`` one) and the GPUs; whether all of it is ready.

    Raises:
        UserError: the server does not answer, or has no such model.
    """
    if server.run is not None:
        endpoint = server.run.endpoint
        ready = endpoint.ready()
        started_by = f"serve-app run, pid {server.run.pid}"
        if ready is None:
            failed = found.failed_gateway(server)
            state = f": the gateway failed: {failed}" if failed else " yet: it is starting"
            said = f"{endpoint.url} does not answer{state} ({started_by})"
            console.print(said, markup=False, highlight=False, soft_wrap=True)
            return False
        models = ready["models"]
    else:
        connection = server.reached()
        details = connection.serve().get_serve_details()
        from serve_app.cluster import serve

        started_by = f"Ray at {connection.address}"
        endpoint = server.endpoint(details)
        ready = endpoint.ready()
        models = (ready or {}).get("models") or _models(serve.applications(details))
    if only is not None:
        if only not in models:
            there = did_you_mean(only, models) or f" (there are: {', '.join(models) or 'none'})"
            raise UserError(f"the server of this machine has no model '{only}'{there}")
        models = {only: models[only]}
    waiting = _waiting(ready, models)
    if only is not None:
        waiting &= {only}
    console.print(f"{endpoint.url}/v1 ({started_by})", highlight=False, soft_wrap=True)
    for what in ("keys", "usage"):  # as GET /ready tells them
        if why := (ready or {}).get(what):
            said = f"{what}: {why}"
            console.print(said, style="yellow", markup=False, highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for column in ("model", "status", "replicas", ""):
        table.add_column(column, overflow="fold")
    for name, model in models.items():
        word, why = _status(model, waits=name in waiting)
        table.add_row(name, Text(word, style=_COLORS.get(word, "")), str(model["replicas"]), why)
    console.print(table)
    for line in gpu_lines():
        console.print(line, highlight=False)
    return bool(models) and not waiting


def _waiting(ready: dict[str, Any] | None, models: Mapping[str, dict[str, Any]]) -> set[str]:
    """The models that are to be up and are not yet."""
    if ready is None:
        return set(models)
    if models and not ready["models"]:  # it tells nothing without an API key; Serve has told them
        return {name for name, model in models.items() if model["status"] != "RUNNING"}
    return set(ready["waiting_for"])


def _models(applications: Mapping[str, Application]) -> dict[str, dict[str, Any]]:
    """What ``GET /ready`` would say of them, as far as Serve knows it."""
    return {
        name: {
            "status": application.status,
            "message": application.message,
            "replicas": sum(replica.state == "RUNNING" for replica in application.replicas),
        }
        for name, application in applications.items()
        if application.import_path == MODEL_IMPORT_PATH
    }


def _status(model: Mapping[str, Any], *, waits: bool) -> tuple[str, str]:
    """A word, and what a user would ask next."""
    starting = "; ".join(f"{s['phase']}, {s['seconds']} s" for s in model.get("starting") or [])
    if model["status"] == "DEPLOY_FAILED":
        return "failed", model["message"]
    if waits:
        word = "updating" if model["replicas"] else "starting"
        return word, starting or model["message"]
    if not model["replicas"]:
        return "scaled to zero", starting
    return ("asleep" if model.get("asleep") else "ready"), starting


def gpu_lines() -> Iterator[str]:
    """One line for each NVIDIA GPU of this machine: its memory in use, in GiB."""
    query = "--query-gpu=index,name,memory.used,memory.total,utilization.gpu"
    try:
        said = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return
    for line in said.splitlines():
        index, name, used, total, busy = (field.strip() for field in line.split(","))
        memory = f"{int(used) / 1024:.1f} of {int(total) / 1024:.1f} GiB in use"
        yield f"GPU {index} {name}: {memory}, {busy} % busy"
