"""Which routes clients reach: each of vLLM's is either for them or closed, none by accident; and
what those are told who ask for one that there is not."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import Any, cast

import pytest
from harness.scripted import GatewayProcess, Upstream

from serve_app.gateway.routes import RELAYED, methods_of

CHAT = "/v1/chat/completions"

OWN = {("GET", "/health"), ("GET", "/metrics"), ("GET", "/v1/models")}
"""Routes of vLLM that the gateway answers by itself."""

OPERATORS = {
    ("GET", "/docs"), ("GET", "/docs/oauth2-redirect"), ("GET", "/get_world_size"),
    ("GET", "/is_paused"), ("GET", "/is_sleeping"), ("GET", "/load"),
    ("GET", "/openapi.json"), ("GET", "/ping"), ("GET", "/redoc"), ("GET", "/server_info"),
    ("GET", "/weight_info"), ("HEAD", "/docs"), ("HEAD", "/docs/oauth2-redirect"),
    ("HEAD", "/openapi.json"), ("HEAD", "/redoc"), ("POST", "/abort_requests"),
    ("POST", "/adapters"), ("DELETE", "/adapters/{adapter_name}"), ("POST", "/collective_rpc"),
    ("POST", "/finish_weight_update"), ("POST", "/init_weight_transfer_engine"),
    ("POST", "/is_scaling_elastic_ep"), ("POST", "/pause"), ("POST", "/ping"),
    ("POST", "/reset_encoder_cache"), ("POST", "/reset_mm_cache"),
    ("POST", "/reset_prefix_cache"), ("POST", "/resume"), ("POST", "/scale_elastic_ep"),
    ("POST", "/sleep"), ("POST", "/start_draft_weight_update"), ("POST", "/start_profile"),
    ("POST", "/start_weight_update"), ("POST", "/stop_profile"), ("POST", "/update_weight_version"),
    ("POST", "/update_weights"), ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"), ("POST", "/wake_up"),
}  # fmt: skip
"""Routes of vLLM that act on the engine or show its inside."""

NO_HTTP = {"/metrics", "/v1/realtime"}
"""A mounted app, and a WebSocket: the gateway relays none."""


@pytest.fixture(scope="module")
def routes() -> set[tuple[str, str]]:
    """The routes of vLLM's app with all tasks, and all that its environment can turn on.

    Cohere's need a package that vLLM does not install by itself.
    """
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Pooler:
        """What vLLM asks of a model's settings before it gives the app routes for pooling."""

        hf_config = SimpleNamespace(num_labels=1)

        def get_pooling_task(self, tasks: Any) -> str:
            return "embed"

    profiler = '{"profiler": "torch", "torch_profiler_dir": "/tmp/profile"}'
    argv = ["--model", "m", "--enable-tokenizer-info-endpoint", "--profiler-config", profiler]
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(argv)
    found: set[tuple[str, str]] = set()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_SERVER_DEV_MODE", "1")
        environment.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
        for tasks, model in (
            (("generate", "transcription", "realtime"), None),
            (("embed", "classify"), cast(Any, Pooler())),
        ):
            for route in build_app(args, tasks, model).routes:
                methods = getattr(route, "methods", None) or {"no HTTP"}
                found |= {(method, route.path) for method in methods}
    return found


def test_every_route_of_vllm_is_for_clients_or_for_operators(routes: set[tuple[str, str]]) -> None:
    """A new vLLM that brings a new route makes someone decide which it is."""
    relayed = {(r.method, r.path) for r in RELAYED if not r.path.startswith("/cohere/")}
    assert routes == relayed | OWN | OPERATORS | {("no HTTP", path) for path in NO_HTTP}


async def test_only_the_routes_for_clients_reach_a_model() -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        for route in RELAYED:
            path = route.path.replace("{response_id}", "resp_1") + "?model=m"
            answer = await gateway.client.request(route.method, path)
            assert answer.status_code == 200, path
        assert len(upstream.exchanges) == len(RELAYED)
        for method, path in OPERATORS - {("GET", "/openapi.json"), ("HEAD", "/openapi.json")}:
            answer = await gateway.client.request(method, f"{path}?model=m", json={"model": "m"})
            assert answer.status_code == 404, path
        assert len(upstream.exchanges) == len(RELAYED)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/responses/a/b", "/v1/responses/..", "/v1/responses/.",
        "/v1/responses/../cancel", "/v1/responses/a/cancel/b", "/v1/responses/a\n/b", "/version\n",
        "/versions", "/x/version", "version", "", "/", "//version", "/version//",
    ],
)  # fmt: skip
def test_a_path_is_one_of_the_list_from_its_first_to_its_last_character(path: str) -> None:
    assert methods_of(path) == []


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/chat/completions", "POST"),
        ("DELETE", "/v1/chat/completions", "POST"),
        ("PUT", "/v1/responses/resp_1", "GET"),
        ("HEAD", "/version", "GET"),
        ("POST", "/version", "GET"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("DELETE", "/v1/models/m", "GET, HEAD"),
        ("POST", "/health", "GET, HEAD"),
        ("OPTIONS", "/ready", "GET, HEAD"),
    ],
)
async def test_a_wrong_method_is_told_the_right_ones(method: str, path: str, allowed: str) -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        answer = await gateway.client.request(method, f"{path}?model=m")
        assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
        if method != "HEAD":
            assert answer.json()["error"]["code"] == "method_not_allowed"
        assert upstream.exchanges == []


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/models", "/v1/models/org/m:1.0"])
async def test_head_is_get_without_the_body(path: str) -> None:
    async with GatewayProcess() as gateway:
        head, get = await gateway.client.head(path), await gateway.client.get(path)
    assert head.status_code == get.status_code == 200
    assert head.content == b"" != get.content
    assert head.headers["content-length"] == get.headers["content-length"]


async def test_a_failure_of_an_own_route_is_in_the_envelope(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails() -> None:
        raise RuntimeError("a bug")

    async with GatewayProcess() as gateway:
        monkeypatch.setattr(gateway.directory, "models", fails)
        answer = await gateway.client.get("/ready")
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        assert "a bug" not in answer.text
        assert (await gateway.client.get("/health")).status_code == 200


# --- the OpenAPI document ------------------------------------------------------------------------


async def test_the_openapi_document_lists_every_route_and_how_errors_look() -> None:
    async with GatewayProcess(root_path="/llm") as gateway:
        answer = await gateway.client.get("/openapi.json")
        assert answer.status_code == 200
        document = answer.json()
        assert (await gateway.client.get("/docs")).status_code == 404
    assert document["info"]["title"] == "serve_app"
    assert document["servers"] == [{"url": "/llm"}]
    listed = {(method.upper(), path) for path, of in document["paths"].items() for method in of}
    paths = ("/", "/fleet", "/health", "/metrics", "/ready", "/v1/usage")
    paths += ("/v1/models", "/v1/models/{id}")
    own = {("GET", path) for path in paths}
    assert listed == own | {(r.method, r.path) for r in RELAYED}
    for of in document["paths"].values():
        for operation in of.values():
            assert operation["responses"].keys() <= {"200", "304", "404", "503", "default"}
            said = operation["responses"]["default"]["content"]["application/json"]["schema"]
            assert said == {"$ref": "#/components/schemas/ErrorEnvelope"}
    ids = [
        operation["operationId"] for of in document["paths"].values() for operation in of.values()
    ]
    assert len(ids) == len(set(ids))
    schemas = document["components"]["schemas"]
    assert schemas["ErrorEnvelope"]["properties"].keys() == {"error"}
    error = schemas["Error"]
    assert error["properties"].keys() == {"message", "type", "param", "code"}
    assert "string code" in error["properties"]["code"]["description"]
    assert schemas["ModelCard"]["properties"].keys() >= {"id", "max_model_len", "permission"}


async def test_every_reference_of_the_openapi_document_leads_somewhere() -> None:
    async with GatewayProcess() as gateway:
        document = (await gateway.client.get("/openapi.json")).json()
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
    assert "ErrorEnvelope" in references
    assert references <= document["components"]["schemas"].keys()


# --- behind a proxy that strips a prefix (http_options.root_path) -------------------------------


@pytest.mark.parametrize("root", ["/llm", "/llm/", "/a/b"])
async def test_routes_lie_below_the_root_path(root: str) -> None:
    """The server puts it before each path, as Serve's does."""
    async with Upstream() as upstream, GatewayProcess(upstream, root_path=root) as gateway:
        for path in ("/health", "/ready", "/v1/models", "/v1/models/m"):
            assert (await gateway.client.get(path)).status_code == 200, path
        answer = await gateway.client.get("/v1/responses/x%2By?model=m&a=%20")
        assert answer.status_code == 200
        assert [e.target for e in upstream.exchanges] == ["/v1/responses/x%2By?model=m&a=%20"]
        closed = await gateway.client.get("/load?model=m")
        assert closed.status_code == 404
        assert "GET /load." in closed.json()["error"]["message"]
        assert len(upstream.exchanges) == 1


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
        ("POST", "/v1/chat/completion", "/v1/chat/completions"),
        ("POST", "/v1/embedding", "/v1/embeddings"),
        ("GET", "/v1/model", "/v1/models"),
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


@pytest.mark.parametrize("query", ["", f"?{'a' * 9000}"])
async def test_one_slash_too_many_at_the_end_is_left_out(query: str) -> None:
    """vLLM would redirect, to an address of its own and with the whole query in a header."""
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        answer = await gateway.client.post(f"{CHAT}/{query}", json={"model": "m"})
        assert answer.status_code == 200
        assert [e.target for e in upstream.exchanges] == [f"{CHAT}{query}"]


@pytest.mark.parametrize("query", ["", "?model=", "?xmodel=1", "?modelx=m"])
async def test_versions_that_name_no_model_are_the_gateways(query: str) -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        assert "serve_app" in (await gateway.client.get(f"/version{query}")).json()
        error = (await gateway.client.get(f"/version/{query}")).json()["error"]
        assert "did you mean /version?" in error["message"]
        assert (await gateway.client.get("/version?mod%65l=m")).json() == {"ok": True}
        assert [e.target for e in upstream.exchanges] == ["/version?mod%65l=m"]


@pytest.mark.parametrize("path", ["/v1/nothing", "/-/page", "/completions/x", "/ping", "/load"])
async def test_any_other_path_is_told_where_the_routes_are_listed(path: str) -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        answer = await gateway.client.post(path, json={"model": "m"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
        message = f"There is no route POST {path}. GET /openapi.json lists all routes."
        assert answer.json()["error"]["message"] == message
        assert upstream.exchanges == []


async def test_the_list_of_models_is_had_with_a_slash_too_many() -> None:
    async with GatewayProcess() as gateway:
        plain = await gateway.client.get("/v1/models")
        slash = await gateway.client.get("/v1/models/")
    assert (slash.status_code, slash.json()) == (200, plain.json())
