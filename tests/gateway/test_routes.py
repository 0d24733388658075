"""Which routes clients reach: each of vLLM's is either for them or closed, none by accident; and
what those are told who ask for one that there is not."""

from __future__ import annotations

from typing import Any

import pytest
from harness.scripted import Exchange, GatewayProcess, Upstream

from serve_app.gateway.routes import _CLOSED, route_meant

FOR_CLIENTS = {
    "/detokenize", "/generative_scoring", "/health", "/inference/v1/generate", "/invocations",
    "/tokenize", "/tokenizer_info", "/v1/audio/transcriptions", "/v1/audio/translations",
    "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/chat/completions/derender",
    "/v1/chat/completions/render", "/v1/completions", "/v1/completions/derender",
    "/v1/completions/render", "/v1/messages", "/v1/messages/count_tokens",
    "/v1/messages/render", "/v1/models", "/v1/realtime", "/v1/responses",
    "/v1/responses/{response_id}", "/v1/responses/{response_id}/cancel", "/version",
}  # fmt: skip


@pytest.fixture
def routes(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The routes of vLLM's app with all that can be turned on by its environment turned on."""
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    profiler = '{"profiler": "torch", "torch_profiler_dir": "/tmp/profile"}'
    argv = ["--model", "m", "--enable-tokenizer-info-endpoint", "--profiler-config", profiler]
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(argv)
    app = build_app(args, ("generate", "transcription", "realtime"), None)
    return {route.path for route in app.routes}


def test_every_route_of_vllm_is_for_clients_or_closed(routes: set[str]) -> None:
    """A new vLLM that brings a new route makes someone decide which it is."""
    assert {path for path in routes if not _CLOSED.match(path)} == FOR_CLIENTS
    assert {"/collective_rpc", "/sleep", "/metrics", "/update_weights"} <= routes


# --- behind a proxy that strips a prefix (http_options.root_path) -------------------------------


@pytest.mark.parametrize("root", ["/llm", "/llm/", "/a/b"])
async def test_routes_lie_below_the_root_path(root: str) -> None:
    """The server puts it before each path, as Serve's does."""
    async with Upstream() as upstream, GatewayProcess(upstream, root_path=root) as gateway:
        for path in ("/health", "/ready", "/v1/models", "/v1/models/m"):
            assert (await gateway.client.get(path)).status_code == 200, path
        answer = await gateway.client.post("/v1/x%2Fy?a=%20", json={"model": "m"})
        assert answer.status_code == 200
        assert [e.target for e in upstream.exchanges] == ["/v1/x%2Fy?a=%20"]
        closed = await gateway.client.get("/metrics?model=m")
        assert closed.status_code == 404
        assert "GET /metrics." in closed.json()["error"]["message"]
        assert len(upstream.exchanges) == 1


async def test_a_redirect_stays_below_the_root_path() -> None:
    async def script(exchange: Exchange) -> None:
        to = f"location: http://{exchange.header('host')[0]}/v1/x"
        await exchange.answer(b"", to, status="307 Temporary Redirect")

    async with Upstream(script) as upstream, GatewayProcess(upstream, root_path="/llm") as gateway:
        answer = await gateway.client.post("/v1/x/", json={"model": "m"})
    assert answer.headers["location"] == "/llm/v1/x"


async def test_anthropics_errors_are_its_own_below_the_root_path() -> None:
    async with GatewayProcess(root_path="/llm") as gateway:
        answer = await gateway.client.post("/v1/messages", json={"model": "x"})
    assert answer.json().keys() == {"type", "error"}


# --- a route written not quite right -------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "meant"),
    [
        ("GET", "/models", "/v1/models"),
        ("GET", "/models/", "/v1/models"),
        ("GET", "/models/m", "/v1/models/m"),
        ("GET", "/v1//models", "/v1/models"),
        ("GET", "//v1/models", "/v1/models"),
        ("GET", "/v1/v1/models", "/v1/models"),
        ("GET", "/openai/v1/models", "/v1/models"),
        ("POST", "/chat/completions", "/v1/chat/completions"),
        ("POST", "/v1//chat/completions", "/v1/chat/completions"),
        ("POST", "/v1/v1/chat/completions", "/v1/chat/completions"),
        ("POST", "/api/v1/chat/completions", "/v1/chat/completions"),
        ("POST", "/completions", "/v1/completions"),
        ("POST", "/embeddings", "/v1/embeddings"),
        ("POST", "/responses", "/v1/responses"),
        ("POST", "/messages", "/v1/messages"),
        ("POST", "/audio/transcriptions", "/v1/audio/transcriptions"),
    ],
)
async def test_a_route_without_its_prefix_or_with_too_much_of_it_is_told_which_was_meant(
    method: str, path: str, meant: str
) -> None:
    body: Any = {"json": {"model": "m"}} if method == "POST" else {}
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        answer = await gateway.client.request(method, path, **body)
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "not_found"
        assert f"did you mean {meant}?" in answer.json()["error"]["message"]
        assert upstream.exchanges == []


def test_no_route_of_vllm_is_taken_for_another(routes: set[str]) -> None:
    assert {path: meant for path in routes if (meant := route_meant(path))} == {}


@pytest.mark.parametrize("path", ["/v1/nothing", "/", "/completions/x", "/v1/chat/completions/"])
async def test_any_other_route_is_the_models_to_know(path: str) -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        assert (await gateway.client.post(path, json={"model": "m"})).status_code == 200
        assert [e.target for e in upstream.exchanges] == [path]


async def test_the_list_of_models_is_had_with_a_slash_too_many() -> None:
    async with GatewayProcess() as gateway:
        plain = await gateway.client.get("/v1/models")
        slash = await gateway.client.get("/v1/models/")
    assert (slash.status_code, slash.json()) == (200, plain.json())
