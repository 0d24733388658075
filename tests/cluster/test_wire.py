"""What only a real Serve and a real engine show of odd requests, behind both proxies."""

from __future__ import annotations

import httpx
import openai
import pytest
from harness.servers import CHAT, Cluster

from serve_app.cluster import front_end_ids
from serve_app.cluster.response_ids import maker_of


@pytest.mark.parametrize("name", ["x-request-id", "x-session-id", "serve_multiplexed_model_id"])
def test_a_header_that_is_no_utf8_is_no_failure(http: httpx.Client, name: str) -> None:
    """Serve decodes these before the gateway has the request."""
    answer = http.get("/health", headers=[(name.encode(), b"caf\xe9")])
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


def test_serve_s_routes_are_no_clients_matter(http: httpx.Client) -> None:
    answer = http.get("/-/routes")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"
    assert http.get("/-/healthz").text == "success"  # for load balancers


def test_a_stored_response_is_found_by_its_id_alone(
    cluster: Cluster, client: openai.OpenAI
) -> None:
    made = client.responses.create(model=CHAT, input="My name is Ada.", max_output_tokens=8)
    maker = maker_of(made.id)
    assert maker and front_end_ids.replica_of(maker) in cluster.replicas(CHAT)
    assert client.responses.retrieve(made.id).output_text == made.output_text
    after = client.responses.create(
        model=CHAT, input="What is my name?", previous_response_id=made.id, max_output_tokens=8
    )
    assert after.previous_response_id == made.id
    with pytest.raises(openai.BadRequestError, match="Cannot cancel a synchronous response"):
        client.responses.cancel(made.id)
    with pytest.raises(openai.NotFoundError, match="the replica that kept it has ended"):
        client.responses.retrieve(made.id[:-8] + "elsewhere")


def test_a_response_in_the_background_is_cancelled(client: openai.OpenAI) -> None:
    made = client.responses.create(
        model=CHAT, input="Count to 1000.", max_output_tokens=1500, background=True
    )
    assert client.responses.cancel(made.id).status == "cancelled"
    assert client.responses.retrieve(made.id).status == "cancelled"
