"""GET /version without a model, which some clients probe."""

from __future__ import annotations

import pytest
import ray
from harness.scripted import GatewayProcess, Upstream

import serve_app


@pytest.mark.parametrize("query", ["", "?x=1", "?models=m"])
async def test_the_gateway_tells_its_own(query: str) -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        answer = await gateway.client.get(f"/version{query}")
        assert answer.status_code == 200
        said = answer.json()
        assert said.keys() == {"version", "vllm", "serve_app", "ray"}
        assert (said["serve_app"], said["ray"]) == (serve_app.__version__, ray.__version__)
        assert upstream.exchanges == []


async def test_a_model_tells_its_own() -> None:
    async with Upstream() as upstream, GatewayProcess(upstream) as gateway:
        assert (await gateway.client.get("/version?model=m")).json() == {"ok": True}
