"""What runs before Serve's own HTTP code: around a stand-in that decodes headers as Serve does."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from ray.serve._private.http_util import (
    RequestIdMiddleware,
    parse_disconnect_disabled_header,
    parse_request_timeout_header,
    parse_session_id_header,
    validate_http_proxy_callback_return,
)
from ray.serve._private.utils import call_function_from_import_path

from serve_app.config import environment
from serve_app.gateway.front import Front

CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"


async def serve(scope: Any, receive: Any, send: Any) -> None:
    """What Serve's direct ingress does with the headers of a request."""
    headers = dict(scope["headers"])
    headers[b"x-request-id"].decode()
    parse_session_id_header(headers)
    disabled = str(parse_disconnect_disabled_header(headers)).encode()
    timeout = str(parse_request_timeout_header(headers, None)).encode()
    body = headers.get(b"serve_multiplexed_model_id", b"").decode().encode()
    said = [(b"disconnect-disabled", disabled), (b"timeout", timeout)]
    await send({"type": "http.response.start", "status": 200, "headers": said})
    await send({"type": "http.response.body", "body": body})


def client(monkeypatch: pytest.MonkeyPatch, root_path: str = "") -> httpx.AsyncClient:
    """As Serve makes it: its own middleware first, then those that the callback returns."""
    monkeypatch.delenv(CALLBACK, raising=False)
    returned = call_function_from_import_path(environment.front()[CALLBACK])
    app: Any = RequestIdMiddleware(serve)
    for middleware in validate_http_proxy_callback_return(returned):
        app = middleware.cls(app, *middleware.args, **middleware.kwargs)
    transport = httpx.ASGITransport(app, root_path=root_path)
    return httpx.AsyncClient(transport=transport, base_url="http://serve")


@pytest.mark.parametrize(
    "name",
    [
        b"x-request-id",
        b"x-session-id",
        b"serve_multiplexed_model_id",
        b"x-request-timeout-seconds",
        b"x-request-disconnect-disabled",
    ],
)
async def test_serve_can_read_every_header(monkeypatch: pytest.MonkeyPatch, name: bytes) -> None:
    async with client(monkeypatch) as http:
        answer = await http.get("/v1/models", headers=[(name, b"caf\xe9")])
        assert answer.status_code == 200


async def test_utf8_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    async with client(monkeypatch) as http:
        name = "modèle".encode()
        answer = await http.get("/", headers=[(b"serve_multiplexed_model_id", name)])
        assert answer.content == name


async def test_no_client_sets_a_time_limit_for_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_request_timeout_header({b"x-request-timeout-seconds": b"1"}, None) == 1
    async with client(monkeypatch) as http:
        answer = await http.get("/", headers={"x-request-timeout-seconds": "1"})
        assert answer.headers["timeout"] == "None"


async def test_a_huge_head_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async with client(monkeypatch) as http:
        assert (await http.get("/", headers={"x-a": "a" * 60_000})).status_code == 200
        answer = await http.get("/", headers={"x-a": "a" * 2**16})
        assert (answer.status_code, answer.json()["error"]["code"]) == (431, "headers_too_large")


async def test_a_target_that_is_no_path_is_not_told_serves_routes() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "OPTIONS", "path": "*", "headers": []}
    await Front(serve)(scope, None, send)
    assert sent[0]["status"] == 404
    assert b"There is no route *" in sent[1]["body"]


async def test_no_client_keeps_serve_from_noticing_that_it_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert parse_disconnect_disabled_header({b"x-request-disconnect-disabled": b"?1"})
    async with client(monkeypatch) as http:
        answer = await http.get("/", headers={"x-request-disconnect-disabled": "?1"})
        assert answer.headers["disconnect-disabled"] == "False"


@pytest.mark.parametrize("root_path", ["", "/llm"])
async def test_serves_routes_are_no_clients(
    monkeypatch: pytest.MonkeyPatch, root_path: str
) -> None:
    async with client(monkeypatch, root_path) as http:
        answer = await http.get(f"{root_path}/-/routes")
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "not_found"
        assert (await http.get(f"{root_path}/-/healthz")).status_code == 200


@pytest.mark.parametrize("path", ["/-/healthz", "/llm/-/healthz", "/-/routes", "/-/"])
async def test_a_websocket_to_serves_routes_is_declined_in_the_envelope(path: str) -> None:
    """Serve has no answer for it: its own is a plain 500."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "websocket",
        "path": path,
        "root_path": "/llm" if path.startswith("/llm") else "",
        "headers": [],
        "extensions": {"websocket.http.response": {}},
    }
    await Front(serve)(scope, receive, send)
    assert [m["type"] for m in sent] == [
        "websocket.http.response.start",
        "websocket.http.response.body",
    ]
    assert sent[0]["status"] == 403
    assert b"websocket_not_supported" in sent[1]["body"]


def test_an_operator_s_own_callback_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CALLBACK, "theirs:middlewares")
    assert environment.front() == {CALLBACK: "theirs:middlewares"}
