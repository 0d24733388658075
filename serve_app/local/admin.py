"""``serve-app admin``: calls to every replica of a model, over Ray."""

from __future__ import annotations

import logging

from serve_app.config.document import DEPLOYMENT
from serve_app.errors import UserError, did_you_mean


def broadcast(model: str, action: str, *, address: str | None) -> list[tuple[str, str]]:
    """Run ``action`` on all replicas of the application ``model``: (replica id, result) each.

    Raises:
        UserError: no cluster, no such model, or the model has no replica.
    """
    import ray

    from serve_app.cluster import serve

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        ray.init(address=address or "auto", log_to_driver=False, logging_level="ERROR")
    except ConnectionError:
        raise UserError("no Ray cluster is running here; give its address with --address") from None
    try:
        names = list(serve.applications(serve.report() or {}))
        if model not in names:
            raise UserError(
                f"there is no application '{model}'{did_you_mean(model, names)} "
                f"(applications: {', '.join(names) or 'none'})"
            )
        handle = serve.handle(DEPLOYMENT, model)
        results = handle.broadcast("admin", action).results()
    finally:
        ray.shutdown()
    if not results:
        raise UserError(f"'{model}' has no running replica")
    return sorted(results)
