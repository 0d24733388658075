"""Marks the ids of stored responses with their front end, so that the gateway finds it again."""

from __future__ import annotations

from typing import Any

from serve_app.cluster.response_ids import made_by


def mark(serving: Any, front_end: str) -> None:
    """Let ``serving`` (vLLM's ``OpenAIServingResponses``) mark the ids that it makes.

    vLLM uses the request's ``request_id`` as the response's id, and makes one up where the client
    sent none. An id that the client chose is not marked.
    """
    create = serving.create_responses

    async def create_marked(request: Any, raw_request: Any = None) -> Any:
        if "request_id" not in request.model_fields_set:
            request.request_id = made_by(request.request_id, front_end)
        return await create(request, raw_request)

    serving.create_responses = create_marked
