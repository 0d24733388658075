"""``serve-app admin``: calls to every replica of a model, over Ray."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from serve_app.cluster.connection import Connection
from serve_app.config.document import DEPLOYMENT, MODEL_IMPORT_PATH
from serve_app.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from serve_app.cluster.serve import Application


def broadcast(model: str, action: str, connection: Connection) -> list[tuple[str, str]]:
    """Run ``action`` on all replicas of the application ``model``: (replica id, result) each.

    Raises:
        UserError: the cluster does not answer, it has no such model, or the model has no replica.
    """
    with connection.entered():
        from serve_app.cluster import serve

        logging.disable(logging.INFO)  # Serve sets its logger's level anew with each handle
        refuse(model, serve.applications(serve.report() or {}))
        return sorted(serve.handle(DEPLOYMENT, model).broadcast("admin", action).results())


def refuse(model: str, applications: Mapping[str, Application]) -> None:
    """Refuse what has no replica to call: Serve would wait for one without end.

    Raises:
        UserError: no such model, or it has no running replica.
    """
    models = [n for n, a in applications.items() if a.import_path == MODEL_IMPORT_PATH]
    if model not in models:
        raise UserError(
            f"there is no model '{model}'{did_you_mean(model, models)} "
            f"(models: {', '.join(models) or 'none'})"
        )
    if all(replica.state != "RUNNING" for replica in applications[model].replicas):
        raise UserError(f"'{model}' has no running replica")
