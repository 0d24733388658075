"""Reads a RayService's status, and decides whether every application runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml

from serve_app.config.document import MODEL_IMPORT_PATH
from serve_app.errors import sentence_in

Document = dict[str, Any]


class Condition(NamedTuple):
    """A condition as the operator reports it."""

    holds: bool
    reason: str = ""
    message: str = ""


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
    moved: int | None = None
    """Percent of the traffic that an incremental upgrade has moved to the pending cluster."""

    applications: dict[str, Application] = field(default_factory=dict)
    pending_applications: dict[str, Application] = field(default_factory=dict)
    conditions: dict[str, Condition] = field(default_factory=dict)
    """By type."""

    updated: str = ""
    """When the operator wrote the status last."""

    suspended: bool = False
    deleting: bool = False
    """Whether somebody has deleted it: it goes when its clusters are gone, whatever is applied."""

    expected: list[str] = field(default_factory=list)
    """Applications of the config that was applied last."""

    @property
    def upgrading(self) -> bool:
        return any(self.holds(c) for c in ("UpgradeInProgress", "RollbackInProgress"))

    def holds(self, condition: str) -> bool:
        return condition in self.conditions and self.conditions[condition].holds

    @property
    def running(self) -> bool:
        """Whether every expected application runs and no change is under way.

        KubeRay's own Ready means only that one endpoint exists.
        """
        return (
            self.seen
            and not self.deleting
            and self.holds("Ready")
            and not self.upgrading
            and all(
                self.applications.get(name, Application()).status == "RUNNING"
                for name in self.expected
            )
        )

    @property
    def failure(self) -> str | None:
        """Why waiting will not help if it stays so; None while it may.

        It may be about the spec before: the operator reports a new ``observedGeneration`` one
        reconcile (2 s) before the new statuses.
        """
        ready = self.conditions.get("Ready", Condition(False))
        if ready.reason == "InitializingTimeout":
            return f"{ready.reason}: {ready.message}"
        if not self.seen:
            return None  # the statuses still belong to the previous spec
        where = self.pending_applications or self.applications
        for name, application in where.items():
            if application.status == "DEPLOY_FAILED":
                return f"application '{name}': {_short(application.message)}"
        return None

    @property
    def refusal(self) -> str | None:
        """Why the operator refuses a spec.

        It may be the spec before this one: the operator does not say of which generation it speaks,
        because a refused one does not become the ``observedGeneration``.
        """
        ready = self.conditions.get("Ready", Condition(False))
        return ready.message if ready.reason == "ValidationFailed" else None

    @property
    def spoken(self) -> object:
        """What the operator writes anew at each refusal; its time has whole seconds only."""
        return self.updated, self.conditions.get("Ready")

    @property
    def headline(self) -> str | None:
        """What keeps everything waiting; None where it is the single applications."""
        if self.deleting:
            return "it is being deleted"
        if self.suspended:
            return "it is suspended (spec.suspend: true)"
        if not self.seen and self.refusal:
            return f"the operator refuses the current spec, or has not read it yet: {self.refusal}"
        if not self.seen:
            asked = "does it run, and reach the head?"
            return f"the operator has not taken up the current spec yet ({asked})"
        return None

    @property
    def waiting(self) -> str:
        """What is missing when every application runs."""
        if self.upgrading:
            return f"the upgrade to {self.pending} is not over"
        return "no endpoint yet"

    def lines(self) -> list[str]:
        """The applications for a person, one each."""
        shown = []
        # While a second cluster starts, and while the head is away, the operator reports nothing of
        # the models of the active cluster. They may well serve.
        unknown = "not reported" if self.active and not self.applications else "NOT_STARTED"
        for title, found in (("", self.applications), ("next ", self.pending_applications)):
            names = list(dict.fromkeys([*(self.expected if not title else []), *found]))
            for name in names:
                app = found.get(name, Application(unknown))
                text = f": {_short(app.message)}" if app.message else ""
                shown.append(f"{title}{name}: {app.status}{text}")
        if self.moved is not None:
            shown.append(
                f"traffic: {100 - self.moved} % {self.active}, {self.moved} % {self.pending}"
            )
        return shown


def of(document: Document) -> State:
    """Read a RayService as the API server gives it."""
    status = document.get("status") or {}
    generation = int((document.get("metadata") or {}).get("generation") or 0)
    spec = document.get("spec") or {}
    active, pending = status.get("activeServiceStatus"), status.get("pendingServiceStatus")
    return State(
        seen=int(status.get("observedGeneration") or 0) >= generation,
        active=(active or {}).get("rayClusterName") or "",
        pending=(pending or {}).get("rayClusterName") or "",
        moved=(pending or {}).get("trafficRoutedPercent"),
        applications=_applications(active),
        pending_applications=_applications(pending),
        conditions={
            c["type"]: Condition(
                c.get("status") == "True",
                c.get("reason", ""),
                c.get("message", ""),
            )
            for c in status.get("conditions") or []
        },
        updated=status.get("lastUpdateTime") or "",
        suspended=bool(spec.get("suspend")),
        deleting="deletionTimestamp" in (document.get("metadata") or {}),
        expected=list(config_of(document)),
    )


def is_incremental(document: Document) -> bool:
    """Whether both clusters serve during an upgrade, and KubeRay itself can go back."""
    strategy = ((document.get("spec") or {}).get("upgradeStrategy") or {}).get("type")
    return bool(strategy == "NewClusterWithIncrementalUpgrade")


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
        # An application that is DEPLOYING says little, and a failed update only that it failed; its
        # unhealthy deployment says why.
        messages = [
            d.get("message") or "" for d in deployments.values() if d.get("status") != "HEALTHY"
        ] + [entry.get("message") or ""]
        found[name] = Application(
            entry.get("status") or "NOT_STARTED", next((m for m in messages if m), "")
        )
    return found


def _short(message: str) -> str:
    text = sentence_in(message) or "no message"
    return text if len(text) <= 300 else f"{text[:299]}…"
