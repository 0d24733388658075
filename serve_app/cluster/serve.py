"""The report of Serve's controller on each application, and what a deployment needs of Serve.

Serve has public functions for the status of applications, but none for the config that they were
deployed with. So this module reads the controller's own report, which ``serve status`` prints too.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from serve_app.errors import sentence_in

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

logger = logging.getLogger("ray.serve")

SLOW_START = "have taken more than"
"""Part of Serve's warning about replicas that start for over 30 s, which all engines do."""


@dataclass(frozen=True)
class ReplicaStatus:
    """A replica, as Serve reports it."""

    id: str
    state: str
    """Serve's ReplicaState: ``STARTING``, ``RUNNING``, ``STOPPING`` …"""

    node: str | None
    """The id of its node; None before its process has one."""

    started: float
    """When Serve asked for it, by ``time.time``."""


@dataclass(frozen=True)
class Application:
    """An application, as Serve reports it: its deployments taken together."""

    name: str
    status: str
    """Serve's ApplicationStatus: ``DEPLOYING``, ``RUNNING``, ``DEPLOY_FAILED`` …"""

    message: str
    """Why it is not running, in one line; else empty."""

    config: dict[str, Any]
    """The config that it was deployed with, ``args`` and ``user_config`` unchecked; empty if it was
    not deployed by a config file."""

    deployed_at: float
    """By ``time.time``."""

    replicas: tuple[ReplicaStatus, ...]

    @property
    def import_path(self) -> str | None:
        return self.config.get("import_path")

    @property
    def args(self) -> Any:
        return self.config.get("args") or {}


def controller() -> Any | None:
    """Serve's controller actor, or None where Serve does not run (``serve build``)."""
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    if not ray.is_initialized():
        return None
    try:
        return ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return None


def report(timeout_s: float | None = None) -> dict[str, Any] | None:
    """The controller's report on all of Serve; None where it does not run.

    Raises:
        ray.exceptions.RayError: the controller died, or did not answer in time.
    """
    actor = controller()
    if actor is None:
        return None
    found: dict[str, Any] = ray.get(actor.get_serve_instance_details.remote(), timeout=timeout_s)
    return found


async def report_async() -> dict[str, Any] | None:
    """:func:`report`, for an event loop."""
    actor = controller()
    return None if actor is None else await actor.get_serve_instance_details.remote()


def applications(report: Mapping[str, Any]) -> dict[str, Application]:
    """The applications of a report by name; one that cannot be read is left out."""
    found = {}
    for name, details in report.get("applications", {}).items():
        try:
            found[name] = _application(name, details)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            logger.warning(f"Serve reports of application '{name}' what is not known: {error!r}")
    return found


def _application(name: str, details: Mapping[str, Any]) -> Application:
    deployments = list((details.get("deployments") or {}).values())
    messages = [*(d.get("message") for d in deployments), details.get("message")]
    return Application(
        name=name,
        status=_text(details["status"]),
        message=_one_line(next(filter(None, messages), "")),
        config=dict(details.get("deployed_app_config") or {}),
        deployed_at=float(details.get("last_deployed_time_s") or 0),
        replicas=tuple(
            ReplicaStatus(r["replica_id"], _text(r["state"]), r.get("node_id"), r["start_time_s"])
            for deployment in deployments
            for r in deployment["replicas"]
        ),
    )


def _text(value: Any) -> str:
    """The text of a member of one of Serve's string enumerations."""
    return str(getattr(value, "value", value))


def _one_line(message: str) -> str:
    """Our own sentence in a status message, else its last line, where a traceback says why."""
    return "" if SLOW_START in message else sentence_in(message)


def handle(deployment: str, application: str) -> DeploymentHandle:
    """A handle of a deployment, which need not exist yet."""
    from ray import serve

    return serve.get_deployment_handle(deployment, application, _check_exists=False)


def logs_folder() -> Path:
    """Where Serve's processes on this node write their logs."""
    from ray.serve._private.logging_utils import get_serve_logs_dir

    return Path(get_serve_logs_dir())


def runtime_env(env_vars: Mapping[str, str]) -> dict[str, Any]:
    """A deployment's ``runtime_env``: its application's, with these variables over it.

    A deployment without a ``runtime_env`` inherits its application's. One that has its own inherits
    only the ``working_dir``. Serve builds an application inside the application's ``runtime_env``,
    so it can be read here.
    """
    own = dict(ray.get_runtime_context().runtime_env) if ray.is_initialized() else {}
    return own | {"env_vars": (own.get("env_vars") or {}) | dict(env_vars)}
