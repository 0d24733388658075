"""Another model for a request for which its own has no replica (``fallback`` of a model).

The call to a fallback is a call like any other, from its admission to its entry in the ledger; that
to the model which the client named ends as refused. A fallback's own fallbacks are not asked.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from dataclasses import replace

from serve_app.gateway import body, routes
from serve_app.gateway.directory import Directory, Model
from serve_app.gateway.exchange import called
from serve_app.gateway.queue import DEADLINE, deadline_s
from serve_app.gateway.stages import Call
from serve_app.gateway.upstream import Headers

HEADER = "x-fallback-model"
"""Header of an answer: the id of the fallback that gave it."""


class Fallbacks:
    """Knows which models may answer a call in place of the one that it names."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory

    def after_s(self, call: Call) -> float | None:
        """How long a call waits for a replica before another model gets it; None: no other would.

        The last of the fallbacks is waited for as if the client had named it.
        """
        first = call.instead_of or call
        ids = [id for id, _ in self._models(first)]
        if call.instead_of and call.model_id in ids:
            ids = ids[ids.index(call.model_id) + 1 :]
        return first.model.config.fallback_after_s if ids and first.model.config else None

    def calls(self, call: Call) -> Iterator[Call]:
        """A call to each of the models that may answer, the best one first."""
        for id, model in self._models(call):
            number = uuid.uuid4().hex
            now = time.perf_counter()
            key = call.caller.name if call.caller else ""
            request = replace(
                call.request,
                headers=_after(now - call.arrived, call),
                body=body.renamed(call.request.body, id),
                ours=[called(number, key, model.name, call.model_id, call.request.path)],
                to_fallback=True,
            )
            yield Call(
                number,
                request,
                model,
                id,
                call.caller,
                arrived=now,
                answer_headers=[(HEADER.encode(), id.encode())],
                instead_of=call,
            )

    def _models(self, call: Call) -> Iterator[tuple[str, Model]]:
        """Those that run or can be woken and that its caller may use, by their ids."""
        named = call.model
        if not (named.config and named.config.fallback) or call.model_id in named.adapters:
            return
        if not routes.may_fall_back(call.request.path) or body.is_for_one(call.request.body):
            return
        for id in named.config.fallback:
            model = self._directory.find(id)
            if model is None or model.name == named.name or not (model.replicas or model.up):
                continue
            if call.caller is None or call.caller.may_use(id, model):
                yield id, model


def _after(waited_s: float, call: Call) -> Headers:
    """A call's headers, with what is left of the time that its client lets it wait."""
    if (whole_s := deadline_s(call)) is None:
        return call.request.headers
    left = b"%d" % max(1, round((whole_s - waited_s) * 1000))
    return [*((k, v) for k, v in call.request.headers if k != DEADLINE), (DEADLINE, left)]
