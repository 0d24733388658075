"""Sends requests that name a stored response to the front end that keeps it.

These requests are ``GET /v1/responses/{id}`` and ``POST /v1/responses/{id}/cancel``, which name no
model, and ``POST /v1/responses`` with a ``previous_response_id``. The id contains the front end
that made it (:mod:`serve_app.cluster.response_ids`). So every gateway can tell, even a new one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from serve_app.cluster.response_ids import maker_of
from serve_app.gateway.body import previous_response_in
from serve_app.gateway.errors import GatewayError, unavailable
from serve_app.gateway.policy import Policy
from serve_app.gateway.relay import Request
from serve_app.gateway.replicas import Board, FrontEnd, Replica
from serve_app.gateway.stages import Call, Outcome

_CREATE = "/v1/responses"
_STORED = re.compile(_CREATE + r"/([^/]+)(?:/cancel)?")


class StoredResponses(Policy):
    """The policy for requests that name a stored response; ``policy`` chooses for all others.

    It is a stage too: it refuses requests whose replica is gone, before they wait for a new one.
    """

    def __init__(self, board: Board, policy: Policy) -> None:
        self._board = board
        self._policy = policy

    def model_in(self, path: str) -> str | None:
        """The application that keeps the response named in ``path``; None where none is named.

        Also None for an id that a client chose: it contains no replica.

        Raises:
            GatewayError: 404 where no replica keeps it.
        """
        if (id := _in_path(path)) is None or (maker := maker_of(id)) is None:
            return None
        if application := self._board.application_of(maker):
            return application
        raise _gone(id)

    async def admit(self, call: Call) -> Call:
        id = _named_by(call.request)
        maker = maker_of(id) if id else None
        if id and maker and self._board.application_of(maker) != call.model.name:
            raise _gone(id)
        return replace(call, front_end=maker) if maker else call

    def ended(self, call: Call, outcome: Outcome) -> None:
        pass

    def waits_for(
        self, live: Sequence[FrontEnd], call: Call, full: Mapping[Replica, int]
    ) -> tuple[Replica, float] | None:
        return self._policy.waits_for(live, call, full) if call.front_end is None else None

    def key(self, call: Call) -> bytes:
        return self._policy.key(call)

    def first_byte(self, call: Call) -> None:
        self._policy.first_byte(call)

    def left(self, call: Call) -> None:
        self._policy.left(call)

    def choose(self, live: Sequence[FrontEnd], call: Call) -> FrontEnd:
        if call.front_end is None:
            return self._policy.choose(live, call)
        for front_end in live:
            if front_end.id == call.front_end:
                return front_end
        id = _named_by(call.request) or ""
        if self._board.application_of(call.front_end) is None:
            raise _gone(id)
        raise unavailable(
            f"The replica that keeps the response '{id}' failed a moment ago, or is asleep; please "
            "send the request again."
        )


def _named_by(request: Request) -> str | None:
    """The id of the stored response that a request names."""
    path = request.path
    if not path.startswith(_CREATE):
        return None
    if path == _CREATE:
        return previous_response_in(request.body)
    return _in_path(path)


def _in_path(path: str) -> str | None:
    stored = _STORED.fullmatch(path)
    return stored[1] if stored else None


def _gone(id: str) -> GatewayError:
    return GatewayError(
        404,
        f"The response '{id[:200]}' is not stored any more: the replica that kept it has ended, or "
        "belongs to another model. Send the whole conversation as 'input' instead.",
        "invalid_request_error",
        param="response_id",
        code="response_not_found",
    )
