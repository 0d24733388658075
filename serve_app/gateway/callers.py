"""Who may ask for what: a caller, as its API key says."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

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

    def may_use(self, id: str, model: Model | None) -> bool:
        """Whether it may name this id.

        A model that it may use may be called by any of its ids. An adapter is a model of its own.
        """
        ids = {id}
        if model is not None and id not in model.adapters:
            ids |= {other for other in model.ids if other not in model.adapters}
        return any(fnmatchcase(other, pattern) for pattern in self.models for other in ids)


NOBODY = Caller("", models=())
"""Who sent no key, on the routes that need none."""
