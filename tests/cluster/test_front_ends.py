"""A replica with two front ends: what has to be one, is one. The other tests run on it too."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest
from harness import servers
from harness.processes import eventually
from harness.servers import CHAT, Cluster, ModelPort


@pytest.fixture
def ports(cluster: Cluster) -> list[ModelPort]:
    """Of the one replica of CHAT."""
    [replica] = servers.front_ends(CHAT)
    assert [id.partition("-")[2] for id in replica] == ["", "1"]
    return list(replica.values())


def complete(port: ModelPort, tokens: int) -> None:
    body = {"model": CHAT, "prompt": "Long ago", "max_tokens": tokens, "ignore_eos": True}
    answer = port.post("/v1/completions", **body)
    assert answer.json()["usage"]["completion_tokens"] == tokens, answer.text


def test_each_is_open_to_the_gateway_only(ports: list[ModelPort]) -> None:
    for port in ports:
        assert httpx.get(f"{port.base_url}/v1/models").status_code == 401
        complete(port, 1)


def _settle(first: ModelPort) -> None:
    """Wait until what earlier tests left has been counted: the second tells of it with its next
    statistics, and an engine ends aborted requests a step later."""
    said: list[float] = []

    def unchanged() -> bool:
        said.append(first.metric("vllm:generation_tokens_total"))
        return len(said) > 2 and len(set(said[-3:])) == 1

    assert eventually(unchanged, 60, 1.0)


def test_the_first_counts_for_all(ports: list[ModelPort]) -> None:
    """Tokens and requests are summed exactly, histograms too; what the engine reports, once."""
    first, second = ports
    _settle(first)

    def change(name: str) -> Callable[[], float]:
        before = first.metric(name)
        return lambda: first.metric(name) - before

    tokens = change("vllm:generation_tokens_total")
    requests = change("vllm:request_success_total")
    first_tokens = change("vllm:time_to_first_token_seconds_count")
    between = change("vllm:inter_token_latency_seconds_count")
    for port, number in ((second, 7), (first, 3), (second, 11), (second, 1)):
        complete(port, number)
    assert eventually(lambda: requests() == 4, 10)
    assert (tokens(), first_tokens(), between()) == (22, 4, 22 - 4)
    assert first.metric("vllm:num_requests_running") == 0


def test_a_stored_response_is_found_where_it_was_made(
    cluster: Cluster, ports: list[ModelPort]
) -> None:
    ids = []
    for port in ports:
        made = port.post("/v1/responses", model=CHAT, input="Paris is", max_output_tokens=4)
        ids.append(made.json()["id"])
    assert ids[1].endswith("-1") and not ids[0].endswith("-1")
    for id in ids * 3:  # the gateway's choice is random among idle ones
        answer = httpx.get(f"{cluster.base_url}/v1/responses/{id}", timeout=30)
        assert (answer.status_code, answer.json()["id"]) == (200, id)
    more = {"model": CHAT, "input": "And?", "previous_response_id": ids[1], "max_output_tokens": 4}
    answer = httpx.post(f"{cluster.base_url}/v1/responses", json=more, timeout=180)
    assert answer.status_code == 200, answer.text
    assert answer.json()["id"].endswith("-1")
