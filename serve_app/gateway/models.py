"""Finds a model by the id that a client sent."""

from __future__ import annotations

from serve_app.errors import did_you_mean
from serve_app.gateway.directory import Directory, Model
from serve_app.gateway.errors import GatewayError


def find(directory: Directory, id: str) -> Model:
    """The model that answers to ``id``.

    Raises:
        GatewayError: 404 with the closest id and some of the existing ones.
    """
    model = directory.find(id)
    if model is not None:
        return model
    known = directory.ids()
    listed = ", ".join(known[:20]) + (", …" if len(known) > 20 else "")
    hint = did_you_mean(id[:200], known) or "."
    raise GatewayError(
        404,
        f"The model '{id[:200]}' does not exist{hint} Available: {listed or 'none yet'}.",
        "invalid_request_error",
        param="model",
        code="model_not_found",
    )
