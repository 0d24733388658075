"""A model server's own port is closed to everything but the gateway."""

from __future__ import annotations

import httpx
import pytest
from harness.servers import Cluster, ModelPort

ALSO = ["/metrics", "/docs", "/redoc", "/openapi.json", "/health", "/", "/nothing", "/metrics/x"]


@pytest.fixture(params=["chat_port", "embed_port"])
def port(request: pytest.FixtureRequest, cluster: Cluster) -> ModelPort:
    port: ModelPort = request.getfixturevalue(request.param)
    return port


def routes(port: ModelPort) -> list[tuple[str, str]]:
    answer = httpx.get(
        f"{port.base_url}/openapi.json", headers={"x-serve-app-credential": port.credential}
    )
    found = [(m.upper(), path) for path, methods in answer.json()["paths"].items() for m in methods]
    assert len(found) > 10
    return found + [(method, path) for path in ALSO for method in ("GET", "POST", "OPTIONS")]


def test_without_the_credential_every_route_is_refused(port: ModelPort) -> None:
    with httpx.Client(base_url=port.base_url) as client:
        for method, path in routes(port):
            answer = client.request(method, path, json={"model": "x"})
            assert answer.status_code == 401, f"{method} {path}"
            assert answer.json()["error"]["code"] == "invalid_internal_credential"


@pytest.mark.parametrize(
    "headers",
    [
        [("x-serve-app-credential", "")],
        [("x-serve-app-credential", "wrong")],
        [("x-serve-app-credential", "{}x")],
        [("x-serve-app-credential", "{:.10}")],
        [("authorization", "Bearer {}")],
        [("x-serve-app-credentials", "{}")],
    ],
)
def test_nothing_but_the_whole_credential_opens_the_port(
    port: ModelPort, headers: list[tuple[str, str]]
) -> None:
    filled = [(name, value.format(port.credential)) for name, value in headers]
    for path in ("/metrics", "/v1/models"):
        assert httpx.get(port.base_url + path, headers=filled).status_code == 401


def test_with_the_credential_the_port_answers(port: ModelPort) -> None:
    headers = {"x-serve-app-credential": port.credential}
    assert httpx.get(f"{port.base_url}/health", headers=headers).status_code == 200
    assert (
        "vllm:num_requests_running" in httpx.get(f"{port.base_url}/metrics", headers=headers).text
    )


def test_the_credential_is_long_and_random(port: ModelPort) -> None:
    assert len(port.credential) >= 32
    assert len(set(port.credential)) > 10
