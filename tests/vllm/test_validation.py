"""What a model server says of a body of the wrong shape, with vLLM's own request types."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

from serve_app.replica import validation

APP = FastAPI()
APP.add_exception_handler(RequestValidationError, validation.refuse)


@APP.post("/")
async def chat(request: ChatCompletionRequest) -> None:
    pass


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"temperature": "hot"}, "temperature", "temperature: Input should be a valid number"),
        ({"messages": [None] * 10_000}, "messages.0", "messages.0: "),
        ([], "the body", "the body: Input should be"),
    ],
)
async def test_the_answer_is_an_envelope_of_a_few_sentences(
    body: Any, param: str, said: str
) -> None:
    if isinstance(body, dict):
        body = {"model": "m", "messages": [{"role": "user", "content": "x"}]} | body
    transport = httpx.ASGITransport(APP)
    async with httpx.AsyncClient(transport=transport, base_url="http://model") as client:
        answer = await client.post("/", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert said in error["message"]
    assert len(answer.content) < 1500
    assert "function-wrap" not in error["message"] and "{'" not in error["message"]
