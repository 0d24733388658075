"""Finds a model by the id that a client sent."""

from __future__ import annotations

from serve_app.errors import did_you_mean
from serve_app.gateway.callers import Caller
from serve_app.gateway.directory import Directory, Model
from serve_app.gateway.errors import GatewayError


def ids(directory: Directory, caller: Caller | None) -> list[str]:
    """Every id that this caller can send; None may use all."""
    known = directory.ids()
    if caller is None:
        return known
    return [id for id in known if caller.may_use(id, directory.find(id))]


def find(directory: Directory, id: str, caller: Caller | None) -> Model:
    """The model that answers to ``id``.

    Raises:
        GatewayError: 403 for an id that the caller may not name, whether there is such a model or
            not; else 404 with the closest id and some of the existing ones.
    """
    model = directory.find(id)
    if caller is not None and not caller.may_use(id, model):
        listed = ", ".join(ids(directory, caller)[:20])
        raise GatewayError(
            403,
            f"The API key '{caller.name}' may not use the model '{id[:200]}'. "
            f"It may use: {listed or 'none of those that are here'}.",
            "permission_error",
            param="model",
            code="model_not_allowed",
        )
    if model is not None:
        return model
    known = ids(directory, caller)
    listed = ", ".join(known[:20]) + (", …" if len(known) > 20 else "")
    hint = did_you_mean(id[:200], known) or "."
    raise GatewayError(
        404,
        f"The model '{id[:200]}' does not exist{hint} Available: {listed or 'none yet'}.",
        "invalid_request_error",
        param="model",
        code="model_not_found",
    )
