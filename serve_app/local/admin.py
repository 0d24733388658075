"""``serve-app admin``: calls to every replica of a model, over Ray."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from serve_app.config.document import DEPLOYMENT, MODEL_IMPORT_PATH
from serve_app.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from serve_app.cluster.serve import Application


def broadcast(model: str, action: str, *, address: str | None) -> list[tuple[str, str]]:
    """Run ``action`` on all replicas of the application ``model``: (replica id, result) each.

    Raises:
        UserError: no cluster, no such model, or the model has no replica.
    """
    import ray

    from serve_app.cluster import head, serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    named = os.environ.get("RAY_ADDRESS")
    head.refuse_gone(address or named, "--address" if address else "RAY_ADDRESS")
    try:
        ray.init(address=address or "auto", log_to_driver=False, logging_level="ERROR")
    except ConnectionError:
        raise UserError("no Ray cluster is running here; give its address with --address") from None
    try:
        refuse(model, serve.applications(serve.report() or {}))
        return sorted(serve.handle(DEPLOYMENT, model).broadcast("admin", action).results())
    finally:
        ray.shutdown()


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
