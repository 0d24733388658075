"""The ids of responses, as the installed vLLM makes them."""

from __future__ import annotations

from typing import Any

from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

from serve_app.cluster.response_ids import maker_of
from serve_app.replica import responses


async def _named(request: ResponsesRequest, monkeypatch: Any) -> str:
    """The id that vLLM goes by once it has the request."""

    async def create(self: Any, request: ResponsesRequest, raw_request: Any = None) -> Any:
        return request.request_id

    monkeypatch.setattr(OpenAIServingResponses, "create_responses", create)
    serving = object.__new__(OpenAIServingResponses)
    responses.mark(serving, "ab12cd34")
    return str(await serving.create_responses(request, raw_request=None))


async def test_an_id_that_vllm_makes_tells_the_replica(monkeypatch: Any) -> None:
    ids = [await _named(ResponsesRequest(input="x"), monkeypatch) for _ in range(2)]
    assert [maker_of(id) for id in ids] == ["ab12cd34"] * 2
    assert len(set(ids)) == 2


async def test_one_that_the_client_chose_stays(monkeypatch: Any) -> None:
    assert await _named(ResponsesRequest(input="x", request_id="mine"), monkeypatch) == "mine"
