"""Reads a RayService's status, and decides whether every application runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import yaml

from serve_app.config.document import MODEL_IMPORT_PATH

Document = dict[str, Any]


@dataclass(frozen=True)
class Application:
    """One application as Serve reports it; ``status`` is Serve's own word."""

    status: str = "NOT_STARTED"
    message: str = ""


@dataclass
class State:
    """A RayService at one moment."""

    seen: bool
    """Whether the operator has seen the current spec."""

    active: str = ""
    pending: str = ""
    applications: dict[str, Application] = field(default_factory=dict)
    pending_applications: dict[str, Application] = field(default_factory=dict)
    conditions: dict[str, tuple[bool, str, str]] = field(default_factory=dict)
    """By type: whether the condition holds, its reason, its message."""

    expected: list[str] = field(default_factory=list)
    """Applications of the config that was applied last."""

    @property
    def upgrading(self) -> bool:
        return any(self.holds(c) for c in ("UpgradeInProgress", "RollbackInProgress"))

    def holds(self, condition: str) -> bool:
        return self.conditions.get(condition, (False, "", ""))[0]

    @property
    def running(self) -> bool:
        """Whether every expected application runs and no change is under way.

        KubeRay's own Ready means only that one endpoint exists.
        """
        return (
            self.seen
            and self.holds("Ready")
            and not self.upgrading
            and all(
                self.applications.get(name, Application()).status == "RUNNING"
                for name in self.expected
            )
        )

    @property
    def failure(self) -> str | None:
        """Why waiting will not help; None while it may."""
        _, reason, message = self.conditions.get("Ready", (False, "", ""))
        if reason in ("InitializingTimeout", "ValidationFailed") and not self.holds("Ready"):
            return f"{reason}: {message}"
        if not self.seen:
            return None  # the statuses still belong to the previous spec
        where = self.pending_applications or self.applications
        for name, application in where.items():
            if application.status == "DEPLOY_FAILED":
                return f"application '{name}': {_last_line(application.message)}"
        return None

    def lines(self) -> list[str]:
        """The applications for a person, one each."""
        shown = []
        for title, found in (("", self.applications), ("next ", self.pending_applications)):
            names = list(dict.fromkeys([*(self.expected if not title else []), *found]))
            for name in names:
                app = found.get(name, Application())
                text = f": {_last_line(app.message)}" if app.message else ""
                shown.append(f"{title}{name}: {app.status}{text}")
        return shown


def of(document: Document) -> State:
    """Read a RayService as the API server gives it."""
    status = document.get("status") or {}
    metadata = document.get("metadata") or {}
    active, pending = status.get("activeServiceStatus"), status.get("pendingServiceStatus")
    return State(
        seen=int(status.get("observedGeneration") or 0) >= int(metadata.get("generation") or 0),
        active=(active or {}).get("rayClusterName") or "",
        pending=(pending or {}).get("rayClusterName") or "",
        applications=_applications(active),
        pending_applications=_applications(pending),
        conditions={
            c["type"]: (c.get("status") == "True", c.get("reason", ""), c.get("message", ""))
            for c in status.get("conditions") or []
        },
        expected=list(config_of(document)),
    )


def config_of(document: Document) -> dict[str, Document]:
    """The applications in a RayService's serveConfigV2, by name; empty when unreadable."""
    try:
        config = yaml.safe_load((document.get("spec") or {}).get("serveConfigV2") or "")
        return {a["name"]: a for a in config["applications"]}
    except (yaml.YAMLError, TypeError, KeyError):
        return {}


def models_of(document: Document) -> dict[str, Document]:
    """The models among a RayService's applications, by name."""
    return {
        name: application
        for name, application in config_of(document).items()
        if application.get("import_path") == MODEL_IMPORT_PATH
    }


def _applications(cluster: Document | None) -> dict[str, Application]:
    found = {}
    for name, entry in ((cluster or {}).get("applicationStatuses") or {}).items():
        deployments = entry.get("serveDeploymentStatuses") or {}
        # An application that is DEPLOYING says little; its unhealthy deployment says why.
        messages = [entry.get("message") or ""] + [
            d.get("message") or "" for d in deployments.values() if d.get("status") != "HEALTHY"
        ]
        found[name] = Application(
            entry.get("status") or "NOT_STARTED", next((m for m in messages if m), "")
        )
    return found


def _last_line(message: str) -> str:
    """A message's last line; of a traceback, the sentence at its end."""
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    text = lines[-1] if lines else "no message"
    return text if len(text) <= 300 else f"{text[:299]}…"
