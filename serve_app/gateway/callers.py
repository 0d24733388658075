"""Who may ask for what: a caller, as its API key says."""

from __future__ import annotations

from dataclasses import dataclass

from serve_app.config.keys import UNLIMITED, KeyLimits, matches
from serve_app.gateway.directory import Model


@dataclass(frozen=True)
class Caller:
    """Who sent a request."""

    name: str
    models: tuple[str, ...] = ("*",)
    """Ids of models, or patterns with ``*``."""

    admin: bool = False

    priority: int = 0
    """Of its requests that wait; the highest goes first."""

    weight: float = 1.0
    """Its share among callers of the same priority whose requests wait."""

    limits: KeyLimits = UNLIMITED
    model_limits: tuple[tuple[str, KeyLimits], ...] = ()
    """By id of a model, or pattern."""

    def may_use(self, id: str, model: Model | None) -> bool:
        """Whether it may name this id.

        A model that it may use may be called by any of its ids. An adapter is a model of its own.
        """
        ids = _names(id, model)
        return any(matches(pattern, ids) for pattern in self.models)

    def limits_for(self, id: str, model: Model) -> KeyLimits | None:
        """The limits for the model alone that it named ``id``: of the first entry that matches."""
        ids = _names(id, model)
        for pattern, limits in self.model_limits:
            if matches(pattern, ids):
                return limits
        return None


def _names(id: str, model: Model | None) -> set[str]:
    """All ids that mean the same as ``id``. An adapter is a model of its own."""
    if model is None or id in model.adapters:
        return {id}
    return {id} | {other for other in model.ids if other not in model.adapters}


NOBODY = Caller("", models=())
"""Who sent no key, on the routes that need none."""
