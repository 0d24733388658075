"""What a model server says while its engine is dead, or asleep."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from serve_app.cluster.credential import ASLEEP_HEADER, CREDENTIAL_HEADER
from serve_app.replica.guard import Guard
from serve_app.replica.reports import Reports

START = {"type": "http.response.start", "status": 200, "headers": []}


def reports() -> Reports:
    return Reports(lambda: None)


EVENT = {"type": "http.response.body", "body": b"data: {}", "more_body": True}


@pytest.mark.parametrize("said", [0, 1, 2])
async def test_a_dead_engines_answer_stops_where_it_is(said: int) -> None:
    """So that another replica can answer what has no byte yet."""
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in (START, EVENT, EVENT):
            await send(message)

    async def send(message: Any) -> None:
        sent.append(message)

    guard = Guard(app, b"secret", reports(), lambda: len(sent) == said, lambda: False)
    scope = {"type": "http", "path": "/v1/models", "headers": [(CREDENTIAL_HEADER, b"secret")]}
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await guard(scope, send, send)
    assert sent == [START, EVENT, EVENT][:said]
    assert guard.running == 0


async def test_a_sleeping_engine_gets_no_request_that_it_would_keep() -> None:
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("it got the request")

    async def send(message: Any) -> None:
        sent.append(message)

    guard = Guard(app, b"secret", reports(), lambda: False, lambda: True)
    scope = {"type": "http", "path": "/v1/models", "headers": [(CREDENTIAL_HEADER, b"secret")]}
    await guard(scope, send, send)
    head, body = sent
    assert head["status"] == 503
    assert (ASLEEP_HEADER, b"1") in head["headers"]
    assert json.loads(body["body"])["error"]["code"] == "model_asleep"


async def test_a_sleeping_engines_metrics_are_told_and_wake_nobody() -> None:
    counted: list[int] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        counted.append(guard.running)

    guard = Guard(app, b"secret", reports(), lambda: False, lambda: True)
    scope = {"type": "http", "path": "/metrics", "headers": [(CREDENTIAL_HEADER, b"secret")]}
    await guard(scope, app, app)
    assert counted == [0]
