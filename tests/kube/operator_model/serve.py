"""Serve on one Ray cluster, as the operator sees it through the dashboard.

The words are those of Ray 2.60: ``application_state.py`` and ``deployment_state.py``.
"""

from __future__ import annotations

from typing import Any

import yaml

from serve_app.config.document import DEPLOYMENT, GATEWAY_DEPLOYMENT, MODEL_IMPORT_PATH

Document = dict[str, Any]

Outcome = tuple[str, str]
"""What an application ends in (``RUNNING``, ``DEPLOY_FAILED``, or ``DEPLOYING`` if it never ends),
and why: the error of its replicas, or what its deployment says meanwhile."""


def outcome(application: Document) -> Outcome:
    """An application runs, unless it is a model whose path begins with ``/nope``."""
    model = str((application.get("args") or {}).get("model"))
    if model.startswith("/nope"):
        reason = f"serve_app.errors.UserError: '{model}' is neither a folder nor a hub id"
        return "DEPLOY_FAILED", f"Traceback (most recent call last):\n  …\n{reason}\n"
    return "RUNNING", ""


def is_model(application: Document) -> bool:
    return bool(application.get("import_path") == MODEL_IMPORT_PATH)


class Serve:
    """Serve's applications. Each is DEPLOYING when it is first looked at after a PUT."""

    def __init__(self) -> None:
        self._wanted: dict[str, Document] = {}
        self._looks: dict[str, int] = {}
        """By application: how often its status was asked since its config changed."""
        self._runs: set[str] = set()
        """Those that run with their present config; they go on when a machine is missing."""
        self._ran: set[str] = set()
        """Those that ran before, whose replicas an update that fails keeps."""

    def put(self, config: str) -> None:
        """Deploy a serveConfigV2: applications whose config is the same are left alone.

        Raises:
            yaml.YAMLError, KeyError, TypeError: it is none, which Serve answers with HTTP 400.
        """
        wanted = {a["name"]: a for a in yaml.safe_load(config)["applications"]}
        for name, application in wanted.items():
            if self._wanted.get(name) != application:
                self._looks[name] = 0
                self._runs.discard(name)
        self._wanted = wanted

    def answers(self, name: str) -> bool:
        """Whether replicas of an application answer."""
        return name in self._wanted and name in self._ran

    def __contains__(self, name: str) -> bool:
        return name in self._wanted

    def applications(self, outcome: Any, waiting: set[bool]) -> dict[str, Document]:
        """The statuses of a GET.

        ``waiting`` tells for what there are pods without a machine: models (True), the gateway
        (False).
        """
        return {
            name: self._status(name, application, outcome(application), waiting)
            for name, application in self._wanted.items()
        }

    def _status(
        self, name: str, application: Document, outcome: Outcome, waiting: set[bool]
    ) -> Document:
        deployment = DEPLOYMENT if is_model(application) else GATEWAY_DEPLOYMENT
        self._looks[name] += 1
        status, reason = outcome
        if name in self._runs and status == "RUNNING":
            return _status("RUNNING", deployment, "HEALTHY")
        if self._looks[name] == 1:
            return _status("DEPLOYING", deployment, "UPDATING")
        if status == "RUNNING" and is_model(application) in waiting:
            slow = (
                f"Deployment '{deployment}' in application '{name}' has 1 replicas that have taken "
                "more than 30s to be scheduled. This may be due to waiting for the cluster to "
                "auto-scale or for a runtime environment to be installed."
            )
            return _status("DEPLOYING", deployment, "UPDATING", slow)
        if status == "RUNNING":
            self._runs.add(name)
            self._ran.add(name)
            return _status("RUNNING", deployment, "HEALTHY")
        if status == "DEPLOYING":
            return _status("DEPLOYING", deployment, "UPDATING", reason)
        if self._looks[name] == 2:
            again = "A replica failed to start with exception. Retrying 2 more time(s). Error:\n"
            return _status("DEPLOYING", deployment, "UPDATING", f"{again}{reason}")
        update = " during a rolling update" if name in self._ran else ""
        failed = (
            f"The deployment failed to start 3 times in a row{update}. This may be due to a "
            "problem with its constructor or initial health check failing. See controller logs "
            f"for details. Error:\n{reason}"
        )
        return {
            **_status("DEPLOY_FAILED", deployment, "DEPLOY_FAILED", failed),
            "message": f"Failed to update the deployments ['{deployment}'].",
        }


def _status(status: str, deployment: str, its_status: str, message: str = "") -> Document:
    """An application's entry; Go leaves empty messages out."""
    entry = {"status": its_status, **({"message": message} if message else {})}
    return {"status": status, "serveDeploymentStatuses": {deployment: entry}}
