"""What a model says of a route that it has not: vLLM's own app, with no engine behind it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from serve_app.replica import front_end

MODELS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "chat": (("generate",), None),
    "embed": (("embed", "token_embed"), "embed"),
}
"""By model: vLLM's tasks for it, and the one of them that it pools by."""


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> None:
    """An app without the objects behind its routes, which are the engine's."""
    from vllm.entrypoints.launchers.api_server import app_state

    async def nothing(*args: Any) -> None:
        pass

    monkeypatch.setattr(app_state, "init_app_state", nothing)


async def app_of(tasks: tuple[str, ...], pooling_task: str | None) -> Any:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    argv = ["--model", "folder", "--served-model-name", "m", "alias"]
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(argv)

    async def supported() -> tuple[str, ...]:
        return tasks

    config: Any = SimpleNamespace(
        get_pooling_task=lambda tasks: pooling_task, is_multimodal_model=False
    )
    llm: Any = SimpleNamespace(get_supported_tasks=supported, model_config=config)
    return await front_end._build_app(llm, args, "r0")


async def test_a_body_of_the_wrong_shape_gets_a_few_sentences(state: None) -> None:
    """vLLM's own handler makes 91 MB of 40,000 nulls."""
    app = await app_of(*MODELS["embed"])
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        answer = await client.post("/v1/embeddings", json={"model": "m", "input": [None] * 1000})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert len(answer.content) < 1500


async def ask(app: Any, method: str, path: str) -> httpx.Response:
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        return await client.request(method, path, json={"model": "m"})


@pytest.mark.parametrize(
    ("model", "path", "says"),
    [
        ("embed", "/v1/chat/completions", "is for embed, token_embed: use POST /v1/embeddings"),
        ("embed", "/v1/nothing", "is for embed, token_embed: use POST /v1/embeddings"),
        ("chat", "/v1/embeddings", "is for generate: use POST /v1/chat/completions, "),
    ],
)
async def test_a_model_that_has_not_a_route_says_what_it_is_for(
    state: None, model: str, path: str, says: str
) -> None:
    answer = await ask(await app_of(*MODELS[model]), "POST", path)
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert error["code"] == "not_found"
    assert error["message"].startswith(f"The model 'm' has no route POST {path}. It {says}")


async def test_routes_that_there_are_are_vllms_as_before(state: None) -> None:
    app = await app_of(*MODELS["embed"])
    assert (await ask(app, "GET", "/version")).status_code == 200
    assert (await ask(app, "GET", "/v1/embeddings")).status_code == 405
