"""Responses that vLLM stores get ids by which the gateway finds their replica again."""

from __future__ import annotations

from typing import Any

from serve_app.cluster.response_ids import made_by


def mark(serving: Any, replica: str) -> None:
    """Let ``serving`` (vLLM's ``OpenAIServingResponses``) mark the ids that it makes.

    vLLM takes a response's id from the request's ``request_id``, which it makes up where the client
    sent none. One that the client chose stays as it is.
    """
    create = serving.create_responses

    async def create_marked(request: Any, raw_request: Any = None) -> Any:
        if "request_id" not in request.model_fields_set:
            request.request_id = made_by(request.request_id, replica)
        return await create(request, raw_request)

    serving.create_responses = create_marked
