"""Every error that a client can cause: its class in the SDKs, and its envelope."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest
from harness.servers import CHAT, CHAT_ALIASES, EMBED, MAX_BODY_MIB, Cluster

QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]


def error_in(answer: httpx.Response) -> dict[str, Any]:
    """The error of an answer, which must be in OpenAI's envelope and nothing else."""
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str) and body["error"]["message"]
    assert isinstance(body["error"]["type"], str)
    return dict(body["error"])


# --- a model that is not there ---------------------------------------------------------------


def test_an_unknown_model_is_not_found_and_the_error_says_what_exists(
    client: openai.OpenAI,
) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        client.chat.completions.create(model="smollm2:135m.instrukt", messages=QUESTION)
    error = raised.value
    assert (error.code, error.param, error.type) == (
        "model_not_found",
        "model",
        "invalid_request_error",
    )
    assert f"did you mean '{CHAT}'?" in error.message
    for id in (CHAT, *CHAT_ALIASES, EMBED):
        assert id in error.message
    error_in(error.response)


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_model_is_not_found_when_streamed_too(
    client: openai.OpenAI, stream: bool
) -> None:
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="nothing", input="hi", stream=stream)


def test_retrieving_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        client.models.retrieve("no/such:model")
    assert raised.value.code == "model_not_found"


def test_the_anthropic_sdk_gets_its_own_envelope(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as raised:
        claude.messages.create(model="nothing", messages=QUESTION, max_tokens=8)
    body = raised.value.response.json()
    assert body.keys() == {"type", "error"}
    assert body["type"] == "error"
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert body["error"]["code"] == "model_not_found"


def test_the_anthropic_sdk_gets_its_own_envelope_from_vllm_too(
    claude: anthropic.Anthropic,
) -> None:
    with pytest.raises(anthropic.BadRequestError) as raised:
        claude.messages.create(model=CHAT, messages=QUESTION, max_tokens=10**6)
    body = raised.value.response.json()
    assert body["type"] == "error"
    assert body["error"]["message"]


def test_the_anthropic_sdk_gets_its_own_envelope_for_a_missing_field(
    claude: anthropic.Anthropic,
) -> None:
    with pytest.raises(anthropic.BadRequestError) as raised:
        claude.post("/v1/messages", body={"model": CHAT, "messages": QUESTION}, cast_to=object)
    body = raised.value.response.json()
    assert body["type"] == "error"
    assert "max_tokens" in body["error"]["message"] + str(body["error"]["param"])


# --- requests that cannot work ---------------------------------------------------------------


def test_a_request_without_a_model_is_bad(client: openai.OpenAI) -> None:
    body = {"messages": QUESTION}
    with pytest.raises(openai.BadRequestError) as raised:
        client.post("/chat/completions", body=body, cast_to=object)
    assert (raised.value.code, raised.value.param) == ("missing_model", "model")
    error_in(raised.value.response)


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "missing_model"),
        (b"   ", "missing_model"),
        (b"{}", "missing_model"),
        (b'{"model": ""}', "missing_model"),
        (b'{"model": null}', "missing_model"),
        (b'{"model": 5}', "invalid_type"),
        (b'{"model": ["a"]}', "invalid_type"),
        (b'{"model": {"id": "a"}}', "invalid_type"),
        (b'{"model": true}', "invalid_type"),
        (b'{"model": ', "invalid_json"),
        (b'{"model": "a"} x', "invalid_json"),
        (b"model=a", "invalid_json"),
        (b'["model"]', "invalid_json"),
        (b'"model"', "invalid_json"),
        (b'{"model": "\xff\xfe"}', "invalid_json"),
        (b"\xef\xbb\xbf{}", "missing_model"),
    ],
)
def test_a_body_that_cannot_be_routed_is_bad(http: httpx.Client, body: bytes, code: str) -> None:
    answer = http.post(
        "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400
    error = error_in(answer)
    assert (error["type"], error["code"]) == ("invalid_request_error", code)


def test_a_body_deeper_than_any_real_one_is_bad_and_harms_nothing(http: httpx.Client) -> None:
    depth = 200_000
    body = b'{"model": "x", "a": ' + b"[" * depth + b"]" * depth + b"}"
    answer = http.post("/v1/chat/completions", content=body)
    assert answer.status_code == 400
    assert error_in(answer)["code"] == "invalid_json"
    assert http.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"max_tokens": 10**6}, "max_model_len"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"messages": "hi"}, "messages"),
        ({"n": 0}, "n"),
        ({"logprobs": True, "top_logprobs": 10_000}, "logprobs"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "structured outputs",
        ),
        ({"tools": "hammer"}, "tools"),
    ],
)
def test_what_vllm_refuses_is_a_bad_request_in_vllms_words(
    client: openai.OpenAI, change: dict[str, Any], hint: str
) -> None:
    body = {"model": CHAT, "messages": QUESTION, **change}
    with pytest.raises(openai.BadRequestError) as raised:
        client.post("/chat/completions", body=body, cast_to=object)
    assert hint in error_in(raised.value.response)["message"]


def test_a_4_mb_prompt_is_too_long_for_the_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(
            model=CHAT, messages=[{"role": "user", "content": "lorem ipsum " * 350_000}]
        )
    assert "2048" in error_in(raised.value.response)["message"]


# --- routes that are not there ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("/v1/nothing", CHAT),
        ("/v1/embeddings", CHAT),
        ("/v1/chat/completions", EMBED),
        ("/v1/audio/transcriptions", CHAT),
    ],
)
def test_a_route_that_the_model_does_not_have_is_not_found_in_the_envelope(
    http: httpx.Client, path: str, model: str
) -> None:
    answer = http.post(path, json={"model": model, "input": "x", "messages": QUESTION})
    assert answer.status_code == 404
    error_in(answer)


def test_the_sdk_can_read_that_a_model_has_no_such_route(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        client.chat.completions.create(model=EMBED, messages=QUESTION)
    error_in(raised.value.response)


def test_a_preflight_is_refused_in_the_envelope_where_no_page_may_ask(http: httpx.Client) -> None:
    asked = {"origin": "https://a.example", "access-control-request-method": "POST"}
    answer = http.options("/v1/chat/completions", headers=asked)
    assert answer.status_code == 405
    assert "POST" in answer.headers["allow"]
    error_in(answer)


def test_a_websocket_is_refused_in_the_envelope(http: httpx.Client) -> None:
    upgrade = {
        "connection": "upgrade",
        "upgrade": "websocket",
        "sec-websocket-version": "13",
        "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    answer = http.get(f"/v1/realtime?model={CHAT}", headers=upgrade)
    assert answer.status_code == 403
    assert error_in(answer)["code"] == "websocket_not_supported"


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE"])
def test_a_wrong_method_is_an_error_in_the_envelope(http: httpx.Client, method: str) -> None:
    answer = http.request(method, "/v1/chat/completions", json={"model": CHAT})
    assert answer.status_code == 405
    error_in(answer)


@pytest.mark.parametrize(
    "path",
    [
        "/load", "/ping", "/server_info", "/sleep", "/wake_up", "/is_sleeping",
        "/pause", "/resume", "/collective_rpc", "/reset_prefix_cache", "/start_profile",
        "/docs", "/redoc", "/v1/load_lora_adapter", "/v1/unload_lora_adapter",
        "/scale_elastic_ep", "/abort_requests", "/metrics/", "/docs/oauth2-redirect",
        "//metrics", "/v1/../metrics", "/v1/%2e%2e/metrics",
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_operators_routes_are_closed_to_clients(cluster: Cluster, path: str, method: str) -> None:
    """Also by spellings of the path that an HTTP client would tidy up before it sends them."""
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", cluster.port, timeout=60)
    body = json.dumps({"model": CHAT, "method": "x", "lora_name": "x", "lora_path": "x"})
    connection.request(
        method, f"{path}?model={CHAT}", body, headers={"content-type": "application/json"}
    )
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    assert answer.status == 404, text[:300]
    assert json.loads(text)["error"].keys() == {"message", "type", "param", "code"}


def test_a_path_without_a_model_is_not_found(http: httpx.Client) -> None:
    answer = http.get("/nothing/here")
    assert answer.status_code == 404
    assert error_in(answer)["code"] == "not_found"


# --- bodies that are too large ---------------------------------------------------------------


def test_a_body_over_the_limit_is_too_large(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as raised:
        client.chat.completions.create(
            model=CHAT, messages=[{"role": "user", "content": "x" * (MAX_BODY_MIB + 1) * 2**20}]
        )
    assert raised.value.status_code == 413
    error = error_in(raised.value.response)
    assert error["code"] == "request_too_large"
    assert f"{MAX_BODY_MIB} MiB" in error["message"]


def test_a_body_over_the_limit_is_too_large_when_its_length_is_not_declared(
    http: httpx.Client,
) -> None:
    def pieces() -> Iterator[bytes]:
        yield b'{"model": "x", "input": "'
        for _ in range(MAX_BODY_MIB + 1):
            yield b"x" * 2**20
        yield b'"}'

    answer = http.post("/v1/embeddings", content=pieces())
    assert answer.status_code == 413
    assert error_in(answer)["code"] == "request_too_large"


def test_a_body_just_under_the_limit_reaches_the_model(http: httpx.Client) -> None:
    request = {"model": EMBED, "input": "x " * (MAX_BODY_MIB * 2**19 - 100)}
    answer = http.post("/v1/embeddings", json=request)
    assert answer.status_code == 400
    assert "256" in error_in(answer)["message"] or "512" in error_in(answer)["message"]


def test_a_text_model_fetches_nothing_that_a_client_names(http: httpx.Client) -> None:
    """vLLM's pooling routes would, before they find that the model takes no media."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.2)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/a.png"
        part = {"type": "image_url", "image_url": {"url": url}}
        body = {"model": EMBED, "messages": [{"role": "user", "content": [part]}]}
        for path in ("/v1/embeddings", "/pooling"):
            error = error_in(http.post(path, json=body))
            assert "the model takes text only" in error["message"]
        with pytest.raises(TimeoutError):
            listener.accept()
